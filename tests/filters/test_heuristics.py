"""Gopher, C4 and FineWeb: each rule by example, and all of them against the slow reference."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from filters import first_failure, rules, settings
from filters.c4 import C4
from filters.fineweb import Fineweb
from filters.gopher_quality import GopherQuality
from filters.gopher_repetition import GopherRepetition
from filters.text.view import TextView
from tests.support import heuristics_reference
from tests.support.texts import NASTY, PROSE, TEXTS

HEURISTICS = {
    "gopher_quality": GopherQuality(),
    "gopher_repetition": GopherRepetition(),
    "c4": C4(),
    "fineweb": Fineweb(),
}


def verdicts(text: str) -> dict[str, str | None]:
    """By filter the rule that rejects `text`; C4 edits first, and FineWeb sees what C4 leaves."""
    view, reasons = TextView(text), {}
    for name, heuristic in HEURISTICS.items():
        view = heuristic.edit(view)[0] if name == "c4" else view
        failure = first_failure(name, heuristic, heuristic.measure(view))
        reasons[name] = failure and failure.rule.split(".")[1]
    return reasons


def slow_scores(text: str) -> dict[str, dict[str, float]]:
    edited = heuristics_reference.c4_edit(text, HEURISTICS["c4"])
    return {
        "gopher_quality": heuristics_reference.gopher_quality(text, HEURISTICS["gopher_quality"]),
        "gopher_repetition": heuristics_reference.gopher_repetition(text),
        "c4": heuristics_reference.c4(edited),
        "fineweb": heuristics_reference.fineweb(edited, HEURISTICS["fineweb"]),
    }


def fast_scores(text: str) -> dict[str, dict[str, float]]:
    view = TextView(text)
    edited, _ = HEURISTICS["c4"].edit(view)
    return {
        name: heuristic.measure(edited if name in ("c4", "fineweb") else view)
        for name, heuristic in HEURISTICS.items()
    }


def test_prose_passes_every_rule() -> None:
    assert verdicts(PROSE) == dict.fromkeys(HEURISTICS)


@pytest.mark.parametrize(
    "text, reason",
    [
        ("", "word_count"),
        ("of the mill " * 10, "word_count"),
        ("to be a b c " * 30, "mean_word_length"),
        ("the incomprehensibilities of internationalization " * 20, "mean_word_length"),
        (PROSE + " #" * 30, "hash_ratio"),
        (PROSE + " ..." * 20, "ellipsis_ratio"),
        (PROSE.replace("\n", "\n• "), None),
        ("- " + PROSE.replace("\n\n", "\n").replace("\n", "\n- "), "bullet_line_ratio"),
        (PROSE.replace(".\n", "...\n"), "ellipsis_line_ratio"),
        (PROSE + " 2024 !" * 25, "alpha_word_ratio"),
        ("der Fluss treibt das alte Rad " * 20, "stop_word_count"),
        (PROSE, None),
    ],
)
def test_gopher_quality(text: str, reason: str | None) -> None:
    assert verdicts(text)["gopher_quality"] == reason


OTHER = [
    a + b
    for a in "klmnprst"
    for b in ["ab", "ebu", "idor", "oful", "uran", "yx", "elio", "osta", "inne", "arp"]
]
HAN = [chr(0x4E00 + i) for i in range(60)]


def filler(number: int, start: int = 0) -> str:
    """Words that no rule notices."""
    return " ".join(OTHER[start : start + number])


@pytest.mark.parametrize(
    "text, reason",
    [
        (f"{filler(70)}\nab\nab\nab", "duplicate_line_ratio"),
        (filler(70).replace(" ", "\n") + "\n\nab\n\nab\n\nab", "duplicate_paragraph_ratio"),
        (
            f"{filler(10)}\n{filler(10)}\n{filler(20, 20)}\n{filler(9, 40)}",
            "duplicate_line_char_ratio",
        ),
        (
            "\n\n".join("\n".join(part) for part in (HAN[:20], HAN[:20], HAN[20:40], HAN[40:])),
            "duplicate_paragraph_char_ratio",
        ),
        (f"{filler(12)} {'the mill x ' * 4}", "top_2gram_char_ratio"),
        (" ".join(f"of the old {word}" for word in OTHER[:40]), "top_2gram_char_ratio"),
        (" ".join(f"the old mill {filler(5, 5 * i)}" for i in range(16)), "top_3gram_char_ratio"),
        (
            " ".join(f"down the old mill {filler(10, 10 * i)}" for i in range(8)),
            "top_4gram_char_ratio",
        ),
        (f"{filler(40)} {filler(12)}", "duplicate_5gram_char_ratio"),
        (filler(80), None),
        ("", None),
    ],
)
def test_gopher_repetition(text: str, reason: str | None) -> None:
    assert verdicts(text)["gopher_repetition"] == reason


SENTENCES = (
    "The mill is old. The river is wide.\nThe bread is warm. The path is steep. The day is long."
)


@pytest.mark.parametrize(
    "text, reason",
    [
        (SENTENCES, None),
        ("", "sentence_count"),
        ("The mill is old. The river is wide.", "sentence_count"),
        ("The mill.\n" * 10, "sentence_count"),
        (SENTENCES + "\nLorem ipsum dolor sit amet.", "lorem_ipsum_count"),
        (SENTENCES + "\nif x then { y }", "curly_bracket_count"),
        (SENTENCES + "\nPlease turn on JavaScript {now} to read", None),
    ],
)
def test_c4(text: str, reason: str | None) -> None:
    assert verdicts(text)["c4"] == reason


@pytest.mark.parametrize(
    "line, kept",
    [
        ("a plain line", "a plain line"),
        ("  a plain line ", "a plain line"),
        ("too short", None),
        ("this needs Javascript to run", None),
        ("This Site Uses Cookies to track you", None),
        ("a word like " + "x" * 1001, None),
        ("a fact[12] that is known[citation needed].", "a fact that is known."),
        ("History[edit] of the mill", "History of the mill"),
        ("an array[i] of things", "an array[i] of things"),
    ],
)
def test_c4_edit(line: str, kept: str | None) -> None:
    edited = C4().edit(TextView(f"{SENTENCES}\n{line}"))[0].text
    assert edited == (SENTENCES if kept is None else f"{SENTENCES}\n{kept}")


def test_c4_edit_returns_the_same_view_when_nothing_changes() -> None:
    view = TextView(SENTENCES)
    assert C4().edit(view)[0] is view


@pytest.mark.parametrize(
    "line, kept", [("It ends well.", True), ("It goes on", False), ("It goes on...", False)]
)
def test_c4_may_require_terminal_punctuation(line: str, kept: bool) -> None:
    assert (C4(require_terminal_punctuation=True).edit(TextView(line))[0].text == line) == kept


@pytest.mark.parametrize(
    "text, reason",
    [
        ("", "line_punct_ratio"),
        ("A line that goes on without any end to it\n" * 8, "line_punct_ratio"),
        ("Short and sweet indeed.\n" * 8, "short_line_ratio"),
        ("A line that is long enough not to count as short.\n" * 2, "duplicate_line_char_ratio"),
        (
            "\n".join(
                f"{'a' * 10} {'b' * 10} {'c' * 10}{i}" + "." * (i % 8 == 0) for i in range(24)
            ),
            "newline_ratio",
        ),
        (PROSE.replace("\n", " "), None),
    ],
)
def test_fineweb(text: str, reason: str | None) -> None:
    assert verdicts(text)["fineweb"] == reason


@given(TEXTS)
def test_scores_equal_those_of_the_slow_reference(text: str) -> None:
    slow, fast = slow_scores(text), fast_scores(text)
    for name in HEURISTICS:
        assert fast[name] == pytest.approx(slow[name], rel=0, abs=1e-9)


@given(TEXTS)
def test_c4_edit_equals_the_slow_reference(text: str) -> None:
    for heuristic in (
        C4(),
        C4(require_terminal_punctuation=True, max_word_length=4, min_line_words=1),
    ):
        assert heuristic.edit(TextView(text))[0].text == heuristics_reference.c4_edit(
            text, heuristic
        )


@pytest.mark.parametrize("name", HEURISTICS)
@given(text=TEXTS)
def test_measure_is_total_and_finite_with_one_score_per_rule(name: str, text: str) -> None:
    scores = HEURISTICS[name].measure(TextView(text))
    assert list(scores) == list(rules(HEURISTICS[name]))
    assert all(type(score) is float and math.isfinite(score) for score in scores.values())


@pytest.mark.parametrize("name", HEURISTICS)
@given(text=st.sampled_from([*NASTY, PROSE, SENTENCES]) | TEXTS, data=st.data())
def test_loosening_a_bound_never_rejects_more(name: str, text: str, data: st.DataObject) -> None:
    tight: Any = HEURISTICS[name]
    rule = data.draw(st.sampled_from(list(rules(tight))))
    low, high = getattr(tight, rule)
    below, above = data.draw(st.floats(0, 100)), data.draw(st.floats(0, 100))
    loose = dataclasses.replace(tight, **{rule: (low - below, high + above)})
    scores = tight.measure(TextView(text))
    assert (
        first_failure(name, tight, scores) is not None or first_failure(name, loose, scores) is None
    )


@pytest.mark.parametrize("name", HEURISTICS)
def test_only_bounds_are_rules(name: str) -> None:
    assert set(settings(HEURISTICS[name])) <= {
        "stop_words",
        "short_line_length",
        "min_line_words",
        "max_word_length",
        "require_terminal_punctuation",
        "line_phrases",
    }


@pytest.mark.corpus
def test_verdicts_on_real_pages_are_those_of_the_reference(corpus: Path) -> None:
    with zstandard.open(corpus / "gold" / "wcxb-500.jsonl.zst", "rt", encoding="utf-8") as pages:
        # every fifth: the slow reference takes 20 ms a page
        texts = [json.loads(page)["main_content"] or "" for page in pages][::5]
    agree = 0
    for text in texts:
        slow = slow_scores(text)
        kept = all(
            first_failure(name, heuristic, slow[name]) is None
            for name, heuristic in HEURISTICS.items()
        )
        agree += kept == (not any(verdicts(text).values()))
    assert len(texts) == 100
    assert agree / len(texts) >= 0.99
