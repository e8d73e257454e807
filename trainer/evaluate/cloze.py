"""Multiple-choice questions: read from files, scored from log-likelihoods; needs no torch.

Formatted and scored as by lm-evaluation-harness (EleutherAI; tasks hellaswag, arc_easy,
arc_challenge), zero-shot: the ending with the greatest log-likelihood given the context is the
answer. A line is an object in one of these forms, which has this prompt:

    HellaSwag    activity_label, ctx_a, ctx_b, endings, label
                     "{activity_label}: {ctx_a} {ctx_b, capitalized} {ending}"
                 ctx, endings, label (similar tasks)
                     "{ctx} {ending}"; in both, brackets left by WikiHow are removed
    ARC          question {stem, choices [{text, label}]}, answerKey; or as on the Hugging Face hub
                 question, choices {text, label}, answerKey
                     "Question: {stem}\\nAnswer: {choice}"
    llm-foundry  query, choices, gold
                     "{query} {choice}"; or "{query}\\nAnswer: {choice}" for a query that has
                     "Question:" and does not end with "Answer:", as in llm-foundry's list of tasks
                     for ARC, PIQA and BoolQ
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stages.formats.errors import ConfigError


class Question(NamedTuple):
    """A context, the endings that may follow it after a space, and the index of the right one."""

    context: str
    endings: tuple[str, ...]
    answer: int


class ClozeScore(NamedTuple):
    """Shares of `questions` answered right.

    By log-likelihood, by log-likelihood per byte of the ending (the harness's acc_norm is per
    character, which is nearly the same in English), and by chance.
    """

    accuracy: float
    accuracy_norm: float
    questions: int
    chance: float


def read_questions(files: Sequence[str], count: int) -> dict[str, list[Question]]:
    """The first `count` questions of each file, by the file's name without suffix.

    ConfigError with the line that is not a question, and why.
    """
    by_name = {Path(file).stem: Path(file) for file in files}
    if len(by_name) < len(files):
        raise ConfigError(
            f"evaluation.cloze: two of {', '.join(files)} have one name, which their metrics would "
            "share; rename one"
        )
    return {name: _read_file(file, count) for name, file in by_name.items()}


def score_answers(questions: Sequence[Question], likelihoods: Iterable[float]) -> ClozeScore:
    """Score questions by the log-likelihoods of all their endings, in order.

    Of equal endings the first is the answer.
    """
    remaining, right, right_norm = iter(likelihoods), 0, 0
    for question in questions:
        nats = np.array([next(remaining) for _ in question.endings])
        right += int(nats.argmax() == question.answer)
        sizes = [len(ending.encode()) for ending in question.endings]
        right_norm += int((nats / sizes).argmax() == question.answer)
    chance, count = sum(1 / len(question.endings) for question in questions), len(questions)
    return ClozeScore(right / count, right_norm / count, count, chance / count)


def _read_file(file: Path, count: int) -> list[Question]:
    try:
        lines = enumerate(file.read_bytes().splitlines(), 1)
    except OSError as error:
        raise ConfigError(f"evaluation.cloze: {file}: {error.strerror}") from None
    questions = []
    for number, line in islice(((n, line) for n, line in lines if line.strip()), max(0, count)):
        try:
            questions.append(_parse_question(json.loads(line)))
        except (ValueError, TypeError, AttributeError, LookupError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else error
            raise ConfigError(
                f"evaluation.cloze: {file}: line {number} is not a question: {reason}"
            ) from None
    if not questions:
        raise ConfigError(
            f"evaluation.cloze: {file} has no questions, or evaluation.cloze_questions = {count}"
        )
    return questions


def _parse_question(row: Mapping[str, Any]) -> Question:
    if "endings" in row:
        context = (
            f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
            if "ctx_a" in row
            else row["ctx"]
        )
        return _checked_question(
            _remove_brackets(context),
            [_remove_brackets(ending) for ending in row["endings"]],
            int(row["label"]),
        )
    if "answerKey" in row:
        stem, choices = row["question"], row.get("choices", {})
        if isinstance(stem, dict):
            stem, listed = stem["stem"], stem["choices"]
            choices = {key: [choice[key] for choice in listed] for key in ("text", "label")}
        return _checked_question(
            f"Question: {stem}\nAnswer:", choices["text"], choices["label"].index(row["answerKey"])
        )
    if "gold" in row:
        query = row["query"].rstrip()
        more = "\nAnswer:" if "Question:" in query and not query.endswith("Answer:") else ""
        return _checked_question(query + more, row["choices"], row["gold"])
    raise ValueError(
        "it has neither 'endings' (HellaSwag) nor 'answerKey' (ARC) nor 'gold' (llm-foundry)"
    )


def _remove_brackets(text: str) -> str:
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _checked_question(context: str, endings: Any, answer: Any) -> Question:
    if (
        not isinstance(endings, list)
        or not context.strip()
        or not all(ending.strip() for ending in endings)
    ):
        raise ValueError("its context or an ending is empty, or its endings are no list")
    if type(answer) is not int or answer not in range(len(endings)) or len(endings) < 2:
        raise ValueError(f"its answer is {answer!r} of {len(endings)} endings, counted from 0")
    return Question(context.rstrip(), tuple(endings), answer)
