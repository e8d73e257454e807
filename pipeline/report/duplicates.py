"""Duplicates in the report: documents per rule, cluster sizes, similarities, largest losses.

Counts, cluster sizes and losses are exact, from commit records; the histogram of similarities is of
the sampled parts.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import NamedTuple

import numpy as np

from filters.text.words import normalize
from pipeline.report.charts import Floats, Histogram, binned
from pipeline.report.page import clean
from pipeline.report.sample import Ledger, Sample, summed
from pipeline.report.texts import EXCERPT, Piece
from pipeline.run import dedup_plan
from stages.dedup.config import EARLIER
from stages.dedup.keep import HeavyLoss
from stages.dedup.keys import earlier_documents
from stages.dedup.minhash import shingle_hashes

RULES = ("dedup.exact", "dedup.near", "dedup.earlier")
_CLUSTERS, _COPIES = 6, 3  # shown
_SOURCES, _BUCKETS = 24, 12  # rows of tables; the name of each is read from a part
_NAMED_BY = {"host": "host", "language": "language", "input": "warc_file"}


class Copy(NamedTuple):
    """A document of a cluster, with the rule that dropped it.

    `kept_in`: path of the earlier batch that has it, None for this one. `similarity`: share of word
    n-grams in common with the kept copy (Jaccard). `text`: None if not available. `pieces`: its
    excerpt.
    """

    url: str
    text: str | None
    kept_in: str | None = None
    rule: str | None = None
    similarity: float | None = None
    pieces: list[Piece] | None = None


class Cluster(NamedTuple):
    """A cluster, `size` documents of it in this batch, and a few members, the kept copy first."""

    size: int
    members: list[Copy]


class GroupLoss(NamedTuple):
    """A host, language or input file that lost more than `dedup.alarm_share` of its documents."""

    kind: str
    name: str
    documents: int
    dropped: int


class Alarm(NamedTuple):
    """Groups that lost too much: the first ones, their number, and the listed ones by kind."""

    ran: bool
    first: list[GroupLoss]
    total: int
    kinds: dict[str, int]


class Bucket(NamedTuple):
    """Very many documents with an equal key, by their first document.

    `documents` are those of its largest bucket, `buckets` the number of such buckets.
    """

    url: str
    documents: int
    buckets: int


@dataclass
class Duplicates:
    """Everything that the section on duplicates shows.

    `similarity` of dropped documents with their kept copies: of those `measured` in all parts, the
    ones in the sampled parts.
    """

    documents: int
    rules: dict[str, int]
    sizes: dict[str, dict[str, int]]
    measured: int
    similarity: Histogram | None
    clusters: list[Cluster]
    alarm: Alarm
    giants: list[Bucket]

    @property
    def dropped(self) -> int:
        return sum(self.rules.values())


def read_duplicates(ledger: Ledger, sample: Sample) -> Duplicates:
    """Read the results of the dedup phases."""
    kept = ledger.commits["dedup keep"]
    counts = summed(c.counts for c in kept)
    sizes = summed(c.result.cluster_sizes for c in ledger.commits["dedup elect"])
    by_size = sorted(sizes.items(), key=lambda item: int(item[0].split("-")[0]))
    similarity = sample.values("SELECT similarity FROM keep WHERE similarity IS NOT NULL")
    return Duplicates(
        documents=sum(c.rows_in for c in kept),
        rules={rule: counts[rule] for rule in RULES},
        sizes={name.replace("-", "–"): {"clusters": clusters} for name, clusters in by_size},
        measured=sum(c.result.measured for c in kept),
        similarity=similarities(similarity),
        clusters=list(_clusters(ledger)),
        alarm=_alarm(ledger),
        giants=_giants(ledger),
    )


def similarities(values: Floats) -> Histogram | None:
    """Measured similarities of dropped documents, over a range that ends at 1."""
    histogram = binned({"dropped": values}, (0.0, 1.0))
    # 1 belongs to the range, but is not a limit
    return histogram and histogram._replace(bound=None)


# --- the largest clusters -------------------------------------------------------------------------


def _clusters(ledger: Ledger) -> Iterator[Cluster]:
    ngram = ledger.setting("dedup.ngram", 5)
    sizes: dict[int, int] = {}
    members: defaultdict[int, list[int]] = defaultdict(list)
    # every group that has a member names some of the largest
    for commit in ledger.commits["dedup keep"]:
        for largest in commit.result.largest:
            sizes[largest.cluster_id] = largest.size
            members[largest.cluster_id] += largest.members
    for root in sorted(sizes, key=lambda r: (-sizes[r], r))[:_CLUSTERS]:
        copies = _copies(ledger, sorted(members[root])[:_COPIES])
        if copies:
            yield Cluster(sizes[root], compare(copies, ngram=ngram))


def _copies(ledger: Ledger, ids: Sequence[int]) -> list[Copy]:
    """The kept copy of a cluster and two other documents, from the ids of some documents."""
    columns = ("kept_id", "kept_in", "rule", "similarity")
    verdicts = (ledger.row("dedup keep", "keep", doc_id, *columns) for doc_id in ids)
    rows = [row for row in verdicts if row]
    if not rows:
        return []
    kept = (rows[0]["kept_id"], rows[0]["kept_in"])  # the same in all rows of a cluster
    others = [
        _copy(ledger, r["doc_id"])._replace(rule=r["rule"], similarity=r["similarity"])
        for r in rows
        if (r["doc_id"], None) != kept
    ]
    return [_copy(ledger, *kept), *others][:_COPIES]


def _copy(ledger: Ledger, doc_id: int, kept_in: int | None = None) -> Copy:
    """A document of this batch, or of the earlier one with the number `kept_in`."""
    row = ledger.document(doc_id, kept_in, "url", "source_id", "text") or {}
    batch = None
    if kept_in is not None:  # RUN/extract/<key>
        batch = clean(ledger.state.indexes[kept_in].documents.rsplit("/", 2)[0])
    name = row.get("url") or row.get("source_id") or f"document {doc_id}"
    return Copy(clean(name), row.get("text"), batch)


def compare(copies: Sequence[Copy], *, ngram: int) -> list[Copy]:
    """Compare copies with the first: similarity of texts, and excerpts at the first difference."""
    first, *others = copies
    texts = [None if c.text is None else _BLANKS.sub(" ", clean(c.text)) for c in copies]
    measured = [
        copy
        if copy.similarity is not None
        else copy._replace(similarity=_similarity(first.text, copy.text, ngram=ngram))
        for copy in others
    ]
    pairs = zip([first, *measured], _excerpts(texts), strict=True)
    return [copy._replace(pieces=pieces) for copy, pieces in pairs]


def _similarity(before: str | None, after: str | None, *, ngram: int) -> float | None:
    """As stage dedup measures it: of word n-grams, or of texts that are shorter than one."""
    if before is None or after is None:
        return None
    a, b = (
        set(shingle_hashes(text, ngram=ngram).tolist()) or {text}
        for text in (normalize(before), normalize(after))
    )
    return len(a & b) / len(a | b)


def _excerpts(texts: Sequence[str | None]) -> list[list[Piece] | None]:
    """Excerpts from shortly before the first difference from the first text, differences marked.

    From the beginning and without marks if the first text is not available.
    """
    first, *others = texts
    if first is None:
        return [None if t is None else [Piece(_cut(t))] for t in texts]
    differences = [_first_difference(first, t) for t in others if t is not None and t != first]
    start = max(0, first.rfind(" ", 0, max(0, min(differences, default=0) - 150)) + 1)
    lead, shown = [Piece("… ")] if start else [], _cut(first[start:])
    marked = [None if t is None else lead + differing(shown, _cut(t[start:])) for t in others]
    return [[*lead, Piece(shown)], *marked]


def _cut(text: str) -> str:
    return text[:EXCERPT].rpartition(" ")[0] if len(text) > EXCERPT else text


_BLANKS = re.compile(r"[^\S\n]+")


def _first_difference(a: str, b: str) -> int:
    """Index of the first differing character; 0 when there is none."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), 0)


def differing(before: str, after: str) -> list[Piece]:
    """`after` in pieces, marked where its words differ from `before`."""
    old, new = re.split(r"([ \n])", before), re.split(r"([ \n])", after)
    codes = SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
    if codes and codes[-1][0] == "insert":  # what came later in the other text, beyond its excerpt
        codes[-1] = ("equal", *codes[-1][1:])
    return [
        Piece("".join(new[first:last]), tag != "equal")
        for tag, _, _, first, last in codes
        if last > first
    ]


# --- largest losses, giant buckets ----------------------------------------------------------------


def _alarm(ledger: Ledger) -> Alarm:
    commits = ledger.commits["dedup alarm"]
    losses = dedup_plan.heavy_losses(commits)
    first = [
        GroupLoss(loss.kind, _loss_name(ledger, loss), loss.documents, loss.dropped)
        for loss in losses[:_SOURCES]
    ]
    total = sum(c.rows_out for c in commits)  # a commit lists a thousand of them at most
    return Alarm(bool(commits), first, total, Counter(loss.kind for loss in losses))


def _loss_name(ledger: Ledger, loss: HeavyLoss) -> str:
    column = _NAMED_BY[loss.kind]
    row = ledger.row("extract", "documents", loss.example, column)
    if row is None:
        return f"that of document {loss.example}"
    return clean(row[column] or "") or f"(no {column})"


def _giants(ledger: Ledger) -> list[Bucket]:
    """Giant buckets by their first document: texts of a cluster share most band keys."""
    sizes: defaultdict[int, list[int]] = defaultdict(list)
    for commit in ledger.commits["dedup match"]:
        for giant in commit.result.giant_buckets:
            sizes[giant.smallest].append(giant.documents)
    largest = sorted(sizes.items(), key=lambda item: (-max(item[1]), item[0]))[:_BUCKETS]
    return [Bucket(_url(ledger, doc_id), max(some), len(some)) for doc_id, some in largest]


def _url(ledger: Ledger, tagged: int) -> str:
    if tagged < EARLIER:
        return _copy(ledger, tagged).url
    number, doc_id = earlier_documents(np.array([tagged], np.uint64))
    return _copy(ledger, int(doc_id[0]), int(number[0])).url
