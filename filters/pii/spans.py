"""Values found in a text, and replacing them."""

from bisect import bisect_right
from collections.abc import Callable, Iterable
from typing import NamedTuple


class Span(NamedTuple):
    """The position of a placeholder or surrogate in the scrubbed text, `text[start:end]`.

    The replaced value itself is not stored anywhere.
    """

    entity: str
    start: int
    end: int


class Scrubbed(NamedTuple):
    """A scrubbed text and what was replaced in it, in reading order."""

    text: str
    spans: list[Span]


class Hit(NamedTuple):
    """A value found in a text, `text[start:end]`; `score` is the confidence in it, in [0, 1]."""

    entity: str
    start: int
    end: int
    score: float

    def moved(self, by: int) -> "Hit":
        """The hit in a text that has `by` more characters before it."""
        return self._replace(start=self.start + by, end=self.end + by)


def without_overlap(hits: Iterable[Hit]) -> list[Hit]:
    """Of overlapping hits keep the one with the highest score, then the longest, then the first.

    The result is in reading order.
    """
    kept: list[Hit] = []
    for hit in sorted(hits, key=lambda h: (-h.score, h.start - h.end, h.start, h.entity)):
        i = bisect_right(kept, hit.start, key=lambda k: k.end)
        if i == len(kept) or hit.end <= kept[i].start:
            kept.insert(i, hit)
    return kept


def replace_hits(
    text: str, spans: Iterable[Span], hits: Iterable[Hit], replacement: Callable[[str, str], str]
) -> Scrubbed:
    """Replace each hit by `replacement(entity, value)`, and move the spans along.

    No two of the spans and hits may overlap.
    """
    parts: list[str] = []
    moved: list[Span] = []
    old_end = new_end = 0
    marks: list[Span | Hit] = [*spans, *hits]
    for mark in sorted(marks, key=lambda mark: mark.start):
        value = text[mark.start : mark.end]
        if isinstance(mark, Hit):
            value = replacement(mark.entity, value)
        start = new_end + mark.start - old_end
        parts += [text[old_end : mark.start], value]
        old_end, new_end = mark.end, start + len(value)
        moved.append(Span(mark.entity, start, new_end))
    return Scrubbed("".join([*parts, text[old_end:]]), moved)


def spans_by_line(document: Scrubbed) -> dict[int, list[Span]]:
    """The spans of each line by its number from 0, with positions within the line."""
    spans: dict[int, list[Span]] = {}
    line = begin = 0
    for entity, start, end in document.spans:
        breaks = document.text.count("\n", begin, start)
        if breaks:
            line, begin = line + breaks, document.text.rindex("\n", begin, start) + 1
        spans.setdefault(line, []).append(Span(entity, start - begin, end - begin))
    return spans


def join_lines(lines: list[str], spans: dict[int, list[Span]]) -> Scrubbed:
    """Join lines to a document; the inverse of `spans_by_line`."""
    moved, begin = [], 0
    for i, line in enumerate(lines):
        moved += [
            Span(entity, begin + start, begin + end) for entity, start, end in spans.get(i, ())
        ]
        begin += len(line) + 1
    return Scrubbed("\n".join(lines), moved)
