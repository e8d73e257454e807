"""Questions in every form that is known, each refusal with its line and reason, and the choice
against a slow one.
"""

import io
import json
import re
import tarfile

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from stages.formats.errors import ConfigError
from trainer.evaluate.cloze import ClozeScore, Question, read_questions, score_answers

HELLASWAG = {
    "activity_label": "Clean a pan [substeps]",
    "ctx_a": "[header] How to clean [title] Soak it.",
    "ctx_b": "then YOU",
    "ctx": "not read",
    "endings": ["wipe it. [step] Dry it.", " throw it."],
    "label": "1",
}
ARC = {
    "question": {
        "stem": "What is wet?",
        "choices": [{"text": "fire", "label": "A"}, {"text": "water", "label": "B"}],
    },
    "answerKey": "B",
}
FORMS = {
    "HellaSwag": (
        HELLASWAG,
        Question(
            "Clean a pan : How to clean. Soak it. Then you", ("wipe it. Dry it.", "throw it."), 1
        ),
    ),
    "HellaSwag, context alone": (
        {"ctx": "A man ", "endings": ["sits", "runs"], "label": 0},
        Question("A man", ("sits", "runs"), 0),
    ),
    "ARC": (ARC, Question("Question: What is wet?\nAnswer:", ("fire", "water"), 1)),
    "ARC of the hub": (
        {
            "question": "Wet?",
            "choices": {"text": ["a", "b", "c"], "label": ["1", "2", "3"]},
            "answerKey": "3",
        },
        Question("Question: Wet?\nAnswer:", ("a", "b", "c"), 2),
    ),
    "llm-foundry, open": (
        {"query": "Question: How?\n", "choices": ["so", "thus"], "gold": 0},
        Question("Question: How?\nAnswer:", ("so", "thus"), 0),
    ),
    "llm-foundry, complete": (
        {"query": "Q: 1?\nA: ", "choices": ["x", "y"], "gold": 1},
        Question("Q: 1?\nA:", ("x", "y"), 1),
    ),
    "llm-foundry, answer asked": (
        {"query": "Question: B?\nAnswer: ", "choices": ["x", "y"], "gold": 1},
        Question("Question: B?\nAnswer:", ("x", "y"), 1),
    ),
}


def write(path, *rows):
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    )
    return str(path)


@pytest.mark.parametrize("form", FORMS)
def test_a_question_is_put_in_the_prompt_of_its_benchmark(tmp_path, form):
    row, expected = FORMS[form]
    assert read_questions([write(tmp_path / "some.jsonl", row)], 9) == {"some": [expected]}


@pytest.mark.parametrize(
    "row, why",
    [
        ("{", "Expecting property name"),
        ("7", "not iterable"),
        ("[]", "neither 'endings' .HellaSwag. nor 'answerKey' .ARC. nor 'gold'"),
        ({"context_options": ["a", "b"], "continuation": "c"}, "neither 'endings'"),
        ({key: HELLASWAG[key] for key in HELLASWAG if key != "ctx_b"}, "'ctx_b' is missing"),
        ({**HELLASWAG, "label": ""}, "invalid literal for int"),
        ({**HELLASWAG, "label": 2}, "its answer is 2 of 2 endings, counted from 0"),
        ({**HELLASWAG, "endings": ["one", " [step]"]}, "an ending is empty"),
        ({**HELLASWAG, "endings": ["one"], "label": 0}, "its answer is 0 of 1 endings"),
        ({**ARC, "answerKey": "E"}, "'E' is not in list"),
        ({"question": "Wet?", "answerKey": "A"}, "'text' is missing"),
        ({"query": " ", "choices": ["a", "b"], "gold": 0}, "its context or an ending is empty"),
        ({"query": "a", "choices": "ab", "gold": 0}, "its endings are no list"),
        ({"query": "a", "choices": [1, 2], "gold": 0}, "no attribute 'strip'"),
        ({"query": "a", "choices": ["a", "b"], "gold": -1}, "its answer is -1 of 2"),
        ({"query": "a", "choices": ["a", "b"], "gold": True}, "its answer is True of 2"),
    ],
)
def test_a_line_that_is_no_question_is_named_with_what_is_wrong(tmp_path, row, why):
    file = write(tmp_path / "some.jsonl", ARC, "", row)
    with pytest.raises(
        ConfigError, match=rf"^evaluation.cloze: \S+some.jsonl: line 3 is not a question: .*{why}"
    ):
        read_questions([file], 9)
    assert len(read_questions([file], 1)["some"]) == 1  # beyond what is asked nothing is judged


def test_files_that_hold_no_questions_or_share_a_name_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"none.jsonl: No such file"):
        read_questions([str(tmp_path / "none.jsonl")], 9)
    for rows, count in (((), 9), ((ARC,), 0)):
        with pytest.raises(
            ConfigError,
            match=f"has no questions, or evaluation.cloze_questions = {count}",
        ):
            read_questions([write(tmp_path / "empty.jsonl", *rows)], count)
    with pytest.raises(ConfigError, match=r"two of a/arc.jsonl, b/arc.json have one name"):
        read_questions(["a/arc.jsonl", "b/arc.json"], 9)


def test_a_line_ends_where_json_lines_do(tmp_path):
    row = {"query": "a\u2028b\x85c", "choices": ["d\u2029", "e"], "gold": 0}
    [question] = read_questions(
        [write(tmp_path / "a.jsonl", json.dumps(row, ensure_ascii=False))], 9
    )["a"]
    assert question.context == "a\u2028b\x85c"


def test_a_long_ending_wins_by_the_byte_and_loses_by_the_sum():
    question = Question("a", ("no", "a much longer one"), 1)
    assert score_answers([question], [-4.0, -6.0]) == ClozeScore(0.0, 1.0, 1, 0.5)
    # per character the first would win: -4 / 3 against -5 / 4, per byte -4 / 9 and -5 / 4
    assert score_answers([Question("a", ("あいう", "abcd"), 0)], [-4.0, -5.0]).accuracy_norm == 1.0


@given(st.data())
def test_choices_are_those_of_a_slow_reckoning(data):
    endings = st.lists(st.text("abé", min_size=1, max_size=6), min_size=2, max_size=5).map(tuple)
    asked = [
        (
            Question("c", e, data.draw(st.integers(0, len(e) - 1))),
            data.draw(st.tuples(*[st.integers(-9, -1)] * len(e))),
        )
        for e in data.draw(st.lists(endings, min_size=1, max_size=6))
    ]
    cloze = score_answers(
        [question for question, _ in asked], [nats for _, found in asked for nats in found]
    )
    right = [
        max(found) == found[q.answer] and found.index(max(found)) == q.answer for q, found in asked
    ]
    shares = [
        [nats / len(e.encode()) for nats, e in zip(found, q.endings, strict=True)]
        for q, found in asked
    ]
    right_norm = [s.index(max(s)) == q.answer for s, (q, _) in zip(shares, asked, strict=True)]
    chance = sum(1 / len(q.endings) for q, _ in asked) / len(asked)
    assert cloze == pytest.approx(
        (sum(right) / len(asked), sum(right_norm) / len(asked), len(asked), chance)
    )


@pytest.mark.corpus
def test_the_real_files_are_read_whole_or_refused(corpus, tmp_path):
    with zstandard.open(corpus / "benchmarks" / "decontam-all.tar.zst", "rb") as packed:
        tar = tarfile.open(fileobj=io.BytesIO(packed.read()))
    tar.extractall(
        tmp_path, [m for m in tar.getmembers() if m.name.endswith(".jsonl")], filter="data"
    )
    asked, refused = {}, []
    for file in sorted((tmp_path / "llm-foundry").iterdir()):
        try:
            asked |= read_questions([str(file)], 10_000)
        except ConfigError as error:
            assert re.search(
                "line 1 is not a question: (it has neither 'endings'|'query' is missing)",
                str(error),
            )
            refused.append(file.stem)
    counts = {name: len(questions) for name, questions in asked.items()}
    assert (len(counts), len(refused), sum(counts.values())) == (24, 20, 22_817)
    expected = {
        "arc_easy": 2376,
        "arc_challenge": 1172,
        "piqa": 1838,
        "copa": 100,
        "openbook_qa": 500,
        "boolq": 3270,
    }
    assert counts | expected == counts
    for name in ("arc_easy", "piqa", "boolq", "commonsense_qa"):
        assert all(
            "\nAnswer:" in q.context[-8:] and q.context.count("Answer:") == 1 for q in asked[name]
        )
    first = asked["arc_easy"][0]
    assert first.context.startswith(
        "Question: Which statement best explains why"
    ) and first.endings[0].startswith("Sunlight")
