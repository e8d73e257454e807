"""Multiple-choice questions: read from files, and scored from the log-likelihoods of their endings.
Needs no torch.

Put and scored as by lm-evaluation-harness (EleutherAI; tasks hellaswag, arc_easy, arc_challenge),
with no examples before them: the ending with the greatest log-likelihood given the context wins. A
line is an object in one of these forms, with its prompt:

    HellaSwag    activity_label, ctx_a, ctx_b, endings, label    "{activity_label}: {ctx_a} {ctx_b, capitalised} {ending}"
                 without their like: ctx, endings, label         "{ctx} {ending}"; in both, brackets left by WikiHow are cleared
    ARC          question {stem, choices [{text, label}]}, answerKey; or as the Hugging Face hub has it
                 question, choices {text, label}, answerKey      "Question: {stem}\\nAnswer: {choice}"
    llm-foundry  query, choices, gold                            "{query} {choice}"; or "{query}\\nAnswer: {choice}" of a query
                 with "Question:" and no "Answer:" at its end, as llm-foundry's task list has it for ARC, PIQA and BoolQ
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
    """A context without space at its end, the endings to choose from, put after a space, and the
    number of the right one.
    """

    context: str
    endings: tuple[str, ...]
    answer: int


class ClozeScore(NamedTuple):
    """Shares of `questions` answered right: by log-likelihood, by that per byte of the ending, and
    by chance.

    The harness's acc_norm is per character, in English nearly the same.
    """

    accuracy: float
    accuracy_norm: float
    questions: int
    chance: float


def read_questions(files: Sequence[str], count: int) -> dict[str, list[Question]]:
    """The first `count` questions of each file, by its name without suffix.

    ConfigError says which line is none, and why.
    """
    named = {Path(file).stem: Path(file) for file in files}
    if len(named) < len(files):
        raise ConfigError(
            f"evaluation.cloze: two of {', '.join(files)} have one name, which their figures would share; rename one"
        )
    return {name: _read(file, count) for name, file in named.items()}


def score_answers(questions: Sequence[Question], likelihoods: Iterable[float]) -> ClozeScore:
    """How many were answered right, by the log-likelihoods of all their endings, in order; of equal
    ones the first is chosen.
    """
    left, right, right_norm = iter(likelihoods), 0, 0
    for question in questions:
        nats = np.array([next(left) for _ in question.endings])
        right += int(nats.argmax() == question.answer)
        right_norm += int(
            (nats / [len(ending.encode()) for ending in question.endings]).argmax()
            == question.answer
        )
    chance = sum(1 / len(question.endings) for question in questions)
    return ClozeScore(
        right / len(questions), right_norm / len(questions), len(questions), chance / len(questions)
    )


def _read(file: Path, count: int) -> list[Question]:
    try:
        lines = enumerate(file.read_bytes().splitlines(), 1)
    except OSError as error:
        raise ConfigError(f"evaluation.cloze: {file}: {error.strerror}") from None
    questions = []
    for number, line in islice(((n, line) for n, line in lines if line.strip()), max(0, count)):
        try:
            questions.append(_question(json.loads(line)))
        except (ValueError, TypeError, AttributeError, LookupError) as error:
            why = f"{error} is missing" if isinstance(error, KeyError) else error
            raise ConfigError(
                f"evaluation.cloze: {file}: line {number} is no question: {why}"
            ) from None
    if not questions:
        raise ConfigError(
            f"evaluation.cloze: {file} holds no question, or evaluation.cloze_questions = {count} asks none"
        )
    return questions


def _question(row: Mapping[str, Any]) -> Question:
    if "endings" in row:
        context = (
            f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
            if "ctx_a" in row
            else row["ctx"]
        )
        return _checked(
            _cleared(context), [_cleared(ending) for ending in row["endings"]], int(row["label"])
        )
    if "answerKey" in row:
        stem, choices = row["question"], row.get("choices", {})
        if isinstance(stem, dict):
            stem, listed = stem["stem"], stem["choices"]
            choices = {key: [choice[key] for choice in listed] for key in ("text", "label")}
        return _checked(
            f"Question: {stem}\nAnswer:", choices["text"], choices["label"].index(row["answerKey"])
        )
    if "gold" in row:
        query = row["query"].rstrip()
        more = "\nAnswer:" if "Question:" in query and not query.endswith("Answer:") else ""
        return _checked(query + more, row["choices"], row["gold"])
    raise ValueError(
        "it has neither 'endings' (HellaSwag) nor 'answerKey' (ARC) nor 'gold' (llm-foundry)"
    )


def _cleared(text: str) -> str:
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _checked(context: str, endings: Any, answer: Any) -> Question:
    if (
        not isinstance(endings, list)
        or not context.strip()
        or not all(ending.strip() for ending in endings)
    ):
        raise ValueError("its context or an ending is empty, or its endings are no list")
    if type(answer) is not int or answer not in range(len(endings)) or len(endings) < 2:
        raise ValueError(f"its answer is {answer!r} of {len(endings)} endings, counted from 0")
    return Question(context.rstrip(), tuple(endings), answer)
