"""Crawled text in the report: placeholders of personal data, examples of rejected documents."""

import itertools
from typing import NamedTuple

import pyarrow as pa

from pipeline.report.page import clean
from pipeline.report.sample import Ledger, Sample, summed
from pipeline.run.query import quoted
from stages.formats.document import sampled

EXCERPT = 600
_CONTEXT = 70  # characters on either side of a placeholder


class Piece(NamedTuple):
    """A piece of text; `marked` is highlighted."""

    text: str
    marked: bool = False


class Entity(NamedTuple):
    """Personal data of one kind: replaced values (exact), documents with it (sampled)."""

    name: str
    values: int
    documents: int
    contexts: list[list[Piece]]


class Example(NamedTuple):
    """A rejected document; `text` is None if it was not kept."""

    url: str
    value: float | None
    low: float | None
    high: float | None
    text: str | None


def entities(ledger: Ledger, sample: Sample) -> list[Entity]:
    """Personal data that was replaced, by kind, the most frequent first."""
    commits = [*ledger.commits["refine"], *ledger.commits["refine ner"]]
    values = summed(commit.result.pii for commit in commits)
    columns = sample.scores("refined")
    names = [*ledger.setting("pii.entities", []), *ledger.setting("ner.entities", [])]
    counted = [
        _entity(ledger, sample, name, values[name])
        for name in names
        if f"pii.{name.lower()}" in columns
    ]
    return sorted(counted, key=lambda e: (-e.values, e.name))


def _entity(ledger: Ledger, sample: Sample, name: str, values: int, shown: int = 3) -> Entity:
    column = quoted(f"pii.{name.lower()}", '"')
    drawn = sample.rows(
        "SELECT doc_id, count(*) OVER () AS documents FROM refined "
        f"WHERE rejected_by IS NULL AND {column} > 0 ORDER BY draw(doc_id) LIMIT {shown}"
    )
    contexts = [_context(ledger, row["doc_id"], name) for row in drawn]
    documents = drawn[0]["documents"] if drawn else 0
    return Entity(name, values, documents, [c for c in contexts if c])


def _context(ledger: Ledger, doc_id: int, entity: str) -> list[Piece]:
    """The first placeholder of a kind in a document of the corpus, and the text around it."""
    row = ledger.row(ledger.corpus_phase, "corpus", doc_id, "text", "pii_spans")
    spans = row["pii_spans"] if row else []
    span = next((s for s in spans if s["entity"] == entity), None)
    if row is None or span is None:
        return []
    text, start, end = row["text"], span["start"], span["end"]
    before = ("…" if start > _CONTEXT else "") + text[max(0, start - _CONTEXT) : start]
    after = text[end : end + _CONTEXT] + ("…" if end + _CONTEXT < len(text) else "")
    pieces = (Piece(before), Piece(text[start:end], marked=True), Piece(after))
    return [Piece(clean(part.replace("\n", " ")), marked) for part, marked in pieces]


def examples(ledger: Ledger, sample: Sample) -> dict[str, list[Example]]:
    """Up to three rejected documents per rule, those with a text first."""
    drawn = {}
    for stage, table in (("extract", "pages"), ("refine", "refined")):
        counts = summed(commit.counts for commit in ledger.commits[stage])
        for rule in sorted(counts, key=lambda r: (-counts[r], r)):
            if rule not in ("kept", "warc.not_response"):
                drawn[rule] = _examples_of(rule, ledger, sample, stage, table)
    return drawn


def _examples_of(
    rule: str, ledger: Ledger, sample: Sample, stage: str, table: str, shown: int = 3
) -> list[Example]:
    query = (
        "SELECT doc_id, rejected_value AS value, rejected_low AS low, rejected_high AS high "
        f"FROM {table} WHERE rejected_by = $rule ORDER BY draw(doc_id)"
    )
    rows = sample.table(query, rule=rule)
    share, seed = ledger.setting(f"{stage}.keep_rejected_text", 0.0), ledger.setting("run.seed", 0)
    ids = rows["doc_id"].to_pylist()
    with_text = (i for i, doc_id in enumerate(ids) if sampled(doc_id, share=share, seed=seed))
    likely = list(itertools.islice(with_text, 6))
    candidates = [*likely, *(i for i in range(min(9, len(ids))) if i not in likely)][:9]
    kind = "documents" if stage == "extract" else "rejected"
    drawn = []
    for row in rows.take(pa.array(candidates, pa.int64())).to_pylist():
        texts = ledger.row(stage, kind, row["doc_id"], "url", "text") or {}
        url, text = texts.get("url") or "(no URL)", texts.get("text")
        shown_text = None if text is None else excerpt(text)
        drawn.append(Example(clean(url), row["value"], row["low"], row["high"], shown_text))
    return sorted(drawn, key=lambda e: e.text is None)[:shown]  # stable: else in order of draw


def excerpt(text: str) -> str:
    """The beginning of a text."""
    text = clean(text)
    return (
        text
        if len(text) <= EXCERPT
        else text[: text.rfind(" ", EXCERPT // 2, EXCERPT)].rstrip() + " …"
    )
