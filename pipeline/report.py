"""The report of a run: one HTML file that an engineer reads after each run, and while it works.

`gather` reads the ledger and the parts under the run's current keys into plain data, `render` draws them. Counts in the funnel
are sums over commit records, exact. Distributions come from at most MAX_PARTS parts, spread evenly over the run, column by
column; texts are read only for the few documents that are shown.
"""

import json
import math
import re
import tomllib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from pipeline import catalog
from pipeline.charts import Column, Histogram, binned, columns_svg, compact, histogram_svg
from pipeline.explain import PHASES, all_commits, store_of
from pipeline.progress import FunnelRow, funnel
from pipeline.run import STAGES, read_state
from stages.dedup import read_columns
from stages.document import ordinal_of, sampled
from stages.ledger import Commit, Store, exists, read_bytes, write_atomically
from stages.minhash import normalize

MAX_PARTS = 64
MAX_ROWS = 1_000_000  # of sampled parts together: about 300 bytes each in memory
EXCERPT, CONTEXT = 600, 70
LOST = 0.9  # a host or input file that lost more than this share is pointed out
_MANY = 5  # ... if it had at least so many pages: a single dropped page says nothing
_DUPLICATE = "dedup.duplicate"


def write_report(root: str) -> str:
    """Write RUN/report.html, for a finished run or one under way, and return where it lies."""
    root = root.rstrip("/")
    uri = f"{root}/report.html"
    write_atomically(uri, render(gather(root)).encode("utf-8", "replace"))
    return uri


# --- what a report holds ---------------------------------------------------------------------------------------------


class Loss(NamedTuple):
    """What one rule took: `left` documents remained after it and the ones above it."""

    rule: str
    count: int
    left: int


@dataclass
class FunnelStage:
    """A stage of the funnel: what it began with, the losses in order, what was left. `end` None: it has not run."""

    name: str
    unit: str
    start: int
    losses: list[Loss]
    end: int | None


class PhaseCost(NamedTuple):
    """Work and time of a phase. `wall` is the time in which at least one unit was at work; pauses are not in it."""

    name: str
    units: int
    done: int
    failed: int
    rows_in: int
    rows_out: int
    wall: float
    cpu: float
    bytes_in: int
    bytes_out: int
    lost_bytes: int
    lost_members: int
    reapplied: int


class Score(NamedTuple):
    """The distribution of one score; `outside` is the share of measured documents beyond the bound, NaN included."""

    name: str
    stage: str
    bound: tuple[float, float] | None
    histogram: Histogram | None
    measured: int
    outside: float
    not_numbers: int
    first_dropped: int


class Group(NamedTuple):
    """Documents that share something: how many are kept so far, how many were dropped, and by which rule most of them."""

    name: str
    kept: int
    dropped: int
    main_rule: str | None = None

    @property
    def total(self) -> int:
        return self.kept + self.dropped

    @property
    def lost(self) -> bool:
        """Whether nearly all of a group of some size is gone."""
        return self.total >= _MANY and self.dropped > LOST * self.total


class Piece(NamedTuple):
    """A stretch of shown text; `marked` if it is what the reader should see."""

    text: str
    marked: bool = False


class Member(NamedTuple):
    """A copy in a cluster; `similarity` is the share of word n-grams in common with the kept copy (Jaccard)."""

    url: str
    kept: bool
    similarity: float | None
    pieces: list[Piece]


class Cluster(NamedTuple):
    """A cluster of near-duplicates with a few of its members, the kept copy first."""

    size: int
    members: list[Member]


class Entity(NamedTuple):
    """Personal data of one kind: values replaced (exact), documents with any (of the sample), places in scrubbed text."""

    name: str
    values: int
    documents: int
    contexts: list[list[Piece]]


class Example(NamedTuple):
    """A rejected document; `text` None when it was not kept."""

    url: str
    value: float | None
    low: float | None
    high: float | None
    text: str | None


@dataclass
class ReportData:
    """Everything the page shows."""

    root: str
    stage: str
    keys: dict[str, str]
    generation: str | None
    manifest: dict[str, Any]
    started: datetime | None
    last_commit: datetime | None
    settings: list[tuple[str, str, str]]
    funnel: list[FunnelStage]
    phases: list[PhaseCost]
    failures: list[tuple[str, str, str]]
    parts: tuple[int, int]
    refined: bool
    sampled_documents: int
    sampled_corpus: int
    scores: list[Score]
    groups: dict[str, list[Group]]
    inputs: list[Group]
    cluster_sizes: list[Column]
    clusters: list[Cluster]
    entities: list[Entity]
    lengths: dict[str, Histogram]
    totals: dict[str, int | None]
    examples: dict[str, list[Example]]
    notices: list[tuple[str, str]] = field(default_factory=list)


# --- reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Ledger:
    """A run's state and commit records, read once."""

    root: str
    state: dict[str, Any]
    commits: dict[str, list[Commit]]

    def store(self, phase: str) -> Store:
        return store_of(self.root, self.state, phase)

    def setting(self, key: str, default: Any = None) -> Any:
        """A value of the configuration of the run; "off" is None."""
        entry = self.state.get("config", {}).get(key)
        if entry is None:
            return default
        value = tomllib.loads(f"v = {entry['value']}")["v"]
        return None if value == "off" else value

    def bound(self, rule: str) -> tuple[float, float] | None:
        value = self.setting(rule)
        return (float(value[0]), float(value[1])) if isinstance(value, list) and len(value) == 2 else None

    def outputs(self, phase: str) -> set[str]:
        return {o["path"] for c in self.commits[phase] for o in c.outputs}


@dataclass(frozen=True)
class _Sample:
    """Rows of the sampled parts without their texts; `place` finds a document's part and row again.

    `documents` has a column `fate`: the rule that dropped a document in whatever stage, null for what is kept so far.
    """

    units: list[str]
    of: int
    documents: pa.Table
    corpus: pa.Table
    rejected: pa.Table


def gather(root: str) -> ReportData:
    """Read a run into report data."""
    state = read_state(root)
    ledger = _Ledger(root, state, all_commits(root, state))
    sample = _read_sample(ledger)
    commits = [c for phase in ledger.commits.values() for c in phase]
    ends = [c.extra["finished"] for c in commits if "finished" in c.extra]
    history = state.get("history", [])
    generation = state.get("generation") if state.get("stage") == "done" else None
    rows = funnel(*(ledger.commits[p] for p in ("extract", "dedup cluster", "refine", "pack")))
    data = ReportData(
        root=root,
        stage=state.get("stage", ""),
        keys=state["keys"],
        generation=generation,
        manifest=_manifest(root, generation),
        started=_moment(history[-1]["started"]) if history else None,
        last_commit=_moment(max(ends)) if ends else None,
        settings=[(key, e["value"], e["origin"]) for key, e in state.get("config", {}).items()],
        funnel=_funnel_stages(rows, ledger),
        phases=[_phase_cost(phase, ledger) for phase in PHASES],
        failures=[(p, unit, e["error"]) for p in PHASES for unit, e in ledger.store(p).failures().items()],
        parts=(len(sample.units), sample.of),
        refined=bool(ledger.commits["refine"]),
        sampled_documents=sample.documents.num_rows,
        sampled_corpus=sample.corpus.num_rows,
        scores=_scores(ledger, sample),
        groups={column: _groups(sample.documents, column) for column in _GROUPED},
        inputs=_input_files(ledger),
        cluster_sizes=_cluster_sizes(ledger),
        clusters=_clusters(ledger),
        entities=_entities(ledger, sample),
        lengths=_lengths(ledger, sample),
        totals=_totals(ledger, rows),
        examples=_examples(ledger, sample),
    )
    data.notices = list(_notices(data))
    return data


def _moment(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def _manifest(root: str, generation: str | None) -> dict[str, Any]:
    uri = f"{root}/generations/{generation}/manifest.json"
    if generation is None or generation not in {e["name"] for e in catalog.read_catalog(root)} or not exists(uri):
        return {}
    manifest: dict[str, Any] = json.loads(read_bytes(uri))
    return manifest


_DOCUMENT_COLUMNS = [
    *("doc_id", "host", "crawl_date", "charset_source", "opt_out", "language", "language_score", "num_chars"),
    *("rejected_by", "rejected_value", "rejected_low", "rejected_high"),
]
_GROUPED = ("host", "language", "charset_source", "crawl_month", "opt_out")


def _read_sample(ledger: _Ledger) -> _Sample:
    extracted = ledger.commits["extract"]
    chosen = spread(extracted, rows=lambda c: sum(n for r, n in c.counts.items() if r != "warc.not_response"))
    units = [c.unit for c in chosen]
    documents = [_documents_of(ledger, unit) for unit in units]
    refined = {kind: [_refined_of(ledger, kind, unit) for unit in units] for kind in ("corpus", "rejected")}
    return _Sample(
        units,
        len(extracted),
        _joined(documents, pa.schema([("doc_id", pa.uint64()), ("fate", pa.string())])),
        _joined([t for t in refined["corpus"] if t is not None], pa.schema([("doc_id", pa.uint64())])),
        _joined([t for t in refined["rejected"] if t is not None], pa.schema([("doc_id", pa.uint64())])),
    )


def spread(commits: Sequence[Commit], *, rows: Callable[[Commit], int]) -> list[Commit]:
    """Commits spread evenly over a run: at most MAX_PARTS, about MAX_ROWS rows, at least one; the same ones every time."""
    if not commits:
        return []
    mean = max(1.0, sum(rows(c) for c in commits) / len(commits))
    count = max(1, min(len(commits), MAX_PARTS, int(MAX_ROWS / mean)))
    return [commits[i * len(commits) // count] for i in range(count)]


def _joined(tables: Sequence[pa.Table], empty: pa.Schema) -> pa.Table:
    return pa.concat_tables(tables, promote_options="default") if tables else empty.empty_table()


def _part(ledger: _Ledger, phase: str, kind: str, unit: str) -> str | None:
    """Where a committed part lies, None if there is none."""
    path = f"{kind}/{unit}.parquet"
    return ledger.store(phase).uri(path) if path in ledger.outputs(phase) else None


def _documents_of(ledger: _Ledger, unit: str) -> pa.Table:
    uri = ledger.store("extract").uri("documents", f"{unit}.parquet")
    names = column_names(uri)
    table = read_columns(uri, [*_DOCUMENT_COLUMNS, *_score_names(names)])
    table = _placed(table, uri)
    months = pc.strftime(table["crawl_date"], format="%Y-%m")
    fates = pa.array(_fates(ledger, unit, table), pa.string())
    return table.append_column("crawl_month", months).append_column("fate", fates)


def _refined_of(ledger: _Ledger, kind: str, unit: str) -> pa.Table | None:
    uri = _part(ledger, "refine", kind, unit)
    if uri is None:
        return None
    names = column_names(uri)
    wanted = ["doc_id", "num_chars", "rejected_by", "rejected_value", "rejected_low", "rejected_high"]
    table = read_columns(uri, [*wanted, *(n for n in names if "." in n)])
    return _placed(table, uri)


def _placed(table: pa.Table, uri: str) -> pa.Table:
    """The table with each row's place, so that its text can be had later."""
    rows = pa.array(np.arange(table.num_rows, dtype=np.int32))
    part = pa.DictionaryArray.from_arrays(pa.array(np.zeros(table.num_rows, np.int32)), pa.array([uri]))
    return table.append_column("_row", rows).append_column("_part", part.cast(pa.dictionary(pa.int32(), pa.string())))


def _score_names(names: Iterable[str]) -> list[str]:
    return [n for n in names if "." in n and not n.startswith("pii.")]


def _fates(ledger: _Ledger, unit: str, table: pa.Table) -> list[str | None]:
    """The rule that dropped each document of a part in any stage that has come to it, None for what is kept so far."""
    fates: list[str | None] = table["rejected_by"].to_pylist()
    kept = [i for i, rule in enumerate(fates) if rule is None]
    keep_uri = _part(ledger, "dedup cluster", "keep", unit)
    if keep_uri is not None:
        keep = read_columns(keep_uri, ["doc_id", "keep"])
        if keep["doc_id"].equals(table["doc_id"].take(pa.array(kept, pa.int64()))):  # else: of an older part
            for i, stays in zip(kept, keep["keep"].to_pylist(), strict=True):
                fates[i] = None if stays else _DUPLICATE
    rejected_uri = _part(ledger, "refine", "rejected", unit)
    if rejected_uri is not None:
        rejected = read_columns(rejected_uri, ["doc_id", "rejected_by"])
        rules = dict(zip(rejected["doc_id"].to_pylist(), rejected["rejected_by"].to_pylist(), strict=True))
        for i, doc_id in enumerate(table["doc_id"].to_pylist()):
            fates[i] = rules.get(doc_id, fates[i])
    return fates


def column_names(uri: str) -> list[str]:
    """Names of the columns of a Parquet object, from its footer."""
    fs, path = fsspec.core.url_to_fs(uri)
    with fs.open(path, "rb") as stream:
        names: list[str] = pq.ParquetFile(stream).schema_arrow.names
        return names


def rows_at(uri: str, rows: Sequence[int], columns: Sequence[str]) -> list[dict[str, Any]]:
    """Some rows of a Parquet object in the order asked for; only the row groups that hold them are read."""
    fs, path = fsspec.core.url_to_fs(uri)
    found: dict[int, dict[str, Any]] = {}
    with fs.open(path, "rb") as stream:
        file, first = pq.ParquetFile(stream), 0
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            inside = sorted({r for r in rows if first <= r < first + count})
            if inside:
                table = file.read_row_group(group, columns=list(columns)).take([r - first for r in inside])
                found |= dict(zip(inside, table.to_pylist(), strict=True))
            first += count
    return [found[r] for r in rows]


def _by_draw(table: pa.Table) -> list[int]:
    """Indices of a table's rows in an order that looks random and is the same every time."""
    ids = table["doc_id"].to_pylist()
    return sorted(range(len(ids)), key=lambda i: xxhash.xxh64_intdigest(ids[i].to_bytes(8, "little")))


# --- funnel, time, totals --------------------------------------------------------------------------------------------


def _funnel_stages(rows: Sequence[FunnelRow], ledger: _Ledger) -> list[FunnelStage]:
    ran = {"extract": "extract", "dedup": "dedup cluster", "refine": "refine"}
    points = {(r.stage, r.unit): r.count for r in rows if r.rule is None}
    stages, count, unit = [], points[("extract", "records")], "records"
    for stage, phase in ran.items():
        done = bool(ledger.commits[phase])
        losses, left = [], count
        for row in rows:
            if row.stage == stage and row.rule is not None:
                left -= row.count
                losses.append(Loss(row.rule, row.count, max(0, left)))
        end = points.get((stage, "documents")) if done else None
        stages.append(FunnelStage(stage, unit, count, losses, end))
        count, unit = end or 0, "documents"
    return stages


def _phase_cost(phase: str, ledger: _Ledger) -> PhaseCost:
    commits = ledger.commits[phase]
    failed = len(ledger.store(phase).failures())
    fresh = [c for c in commits if not c.extra.get("reapplied")]
    spans = [(c.extra["finished"] - c.seconds, c.extra["finished"]) for c in commits if "finished" in c.extra]

    def total(name: str) -> int:
        return int(sum(c.totals.get(name, 0) for c in commits))

    return PhaseCost(
        name=phase,
        units=max(ledger.state.get("units", {}).get(phase, 0), len(commits) + failed),
        done=len(commits),
        failed=failed,
        rows_in=sum(c.rows_in for c in commits),
        rows_out=sum(c.rows_out for c in commits),
        wall=covered(spans),
        cpu=sum(c.cpu_seconds for c in commits),
        bytes_in=int(sum(c.totals.get("bytes_in", 0) for c in fresh)),
        bytes_out=sum(o["bytes"] for c in commits for o in c.outputs),
        lost_bytes=total("lost_bytes"),
        lost_members=total("lost_members"),
        reapplied=len(commits) - len(fresh),
    )


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    length, reached = 0.0, -math.inf
    for start, end in sorted(spans):
        length += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return length


def _totals(ledger: _Ledger, rows: Sequence[FunnelRow]) -> dict[str, int | None]:
    totals: dict[str, int | None] = dict.fromkeys(("documents", "chars", "tokens", "rows", "row_tokens", "packed_documents"))
    totals |= {"records": rows[0].count, "units": len(ledger.commits["extract"])}
    if ledger.commits["refine"]:
        totals["documents"] = sum(c.rows_out for c in ledger.commits["refine"])
        totals["chars"] = int(sum(c.totals.get("chars_out", 0) for c in ledger.commits["refine"]))
    if packed := ledger.commits["pack"]:
        totals["tokens"] = int(sum(c.totals["tokens"] for c in packed))
        rows_out = sum(c.rows_out for c in packed)
        totals |= {"rows": rows_out, "row_tokens": rows_out * ledger.setting("pack.seq_len", 0)}
        totals["packed_documents"] = sum(c.rows_in for c in packed)
    return totals


# --- distributions ---------------------------------------------------------------------------------------------------


def _scores(ledger: _Ledger, sample: _Sample) -> list[Score]:
    scores = []
    if sample.documents.num_rows:
        scores.append(_score("language.score", "extract", sample.documents, ledger, column="language_score"))
        scores += [_score(n, "extract", sample.documents, ledger) for n in _score_names(sample.documents.column_names)]
    refined = _joined([sample.corpus, sample.rejected], pa.schema([]))
    measured_before = {s.name for s in scores}
    new = [n for n in _score_names(refined.column_names) if n not in measured_before]
    return scores + [_score(n, "refine", refined, ledger) for n in new]


def _score(name: str, stage: str, table: pa.Table, ledger: _Ledger, column: str = "") -> Score:
    """Drop at `rejected_by` of its own stage, not at the fate: a duplicate passed the rules that it was measured by."""
    measured = table.select([column or name, "rejected_by"]).filter(pc.is_valid(table[column or name]))
    values = measured[column or name].to_numpy()
    rules = measured["rejected_by"]
    here = pc.fill_null(pc.equal(rules, name), False).to_numpy(zero_copy_only=False).astype(bool)
    kept = pc.is_null(rules).to_numpy(zero_copy_only=False).astype(bool)
    bound = ledger.bound(name)
    low, high = bound or (-math.inf, math.inf)
    inside = (values >= low) & (values <= high)  # NaN is never inside
    series = {"kept": values[kept], "other rule": values[~kept & ~here], "this rule": values[here]}
    return Score(
        name=name,
        stage=stage,
        bound=bound,
        histogram=binned(series, bound),
        measured=len(values),
        outside=float(1 - inside.mean()) if len(values) and bound is not None else 0.0,
        not_numbers=int(np.isnan(values).sum()),
        first_dropped=int(here.sum()),
    )


def _groups(documents: pa.Table, column: str) -> list[Group]:
    """Documents by the values of a column, largest group first (months in order of time)."""
    if column not in documents.column_names:
        return []
    table = documents.select([column, "fate"])
    if column == "opt_out":
        table = table.filter(pc.is_valid(table[column]))
    counts = table.group_by([column, "fate"]).aggregate([([], "count_all")]).to_pylist()
    fates: dict[str, Counter[str | None]] = defaultdict(Counter)
    for row in counts:
        fates[row[column] or ""][row["fate"]] += row["count_all"]
    groups = [_group(name, fate) for name, fate in fates.items()]
    return sorted(groups, key=lambda g: (g.name if column == "crawl_month" else "", -g.total, g.name))


def _group(name: str, fates: Counter[str | None]) -> Group:
    dropped = Counter({rule: n for rule, n in fates.items() if rule is not None})
    main = min(dropped, key=lambda r: (-dropped[r], r)) if dropped else None
    return Group(name, fates[None], dropped.total(), main)


def _input_files(ledger: _Ledger) -> list[Group]:
    """Pages by input file, exact, the ones that lost most first. Copies count as lost only once refine has come to a file."""
    paths = _input_paths(ledger.root)
    refined = {c.unit: c.rows_out for c in ledger.commits["refine"]}
    groups = []
    for commit in ledger.commits["extract"]:
        pages = Counter({r: n for r, n in commit.counts.items() if r not in ("warc.not_response", "kept")})
        kept = refined.get(commit.unit, commit.rows_out)
        after = commit.rows_out - kept
        main = min(pages, key=lambda r: (-pages[r], r)) if pages else None
        if after and (main is None or after > pages[main]):
            main = "dedup, refine"
        name = paths.get(commit.unit, f"input {commit.unit}")
        groups.append(Group(name, kept, pages.total() + after, main))
    return sorted(groups, key=lambda g: (g.kept / max(1, g.total), -g.total, g.name))


def _input_paths(root: str) -> dict[str, str]:
    uri = f"{root}/inputs.jsonl"
    lines = read_bytes(uri).splitlines() if exists(uri) else []
    return {f"{record['ordinal']:06d}": record["path"] for record in map(json.loads, lines)}


def _lengths(ledger: _Ledger, sample: _Sample) -> dict[str, Histogram]:
    """Lengths of kept documents: characters of the corpus, tokens of the packed rows."""
    values = {}
    if sample.corpus.num_rows:
        values["characters"] = sample.corpus["num_chars"].cast(pa.float64()).to_numpy()
    tokens = [
        read_columns(ledger.store("pack").uri("provenance", f"{c.unit}.parquet"), ["doc_id", "length"])
        for c in spread(ledger.commits["pack"], rows=lambda c: c.rows_in)
    ]
    if any(t.num_rows for t in tokens):
        per_document = pa.concat_tables(tokens).group_by("doc_id").aggregate([("length", "sum")])
        values["tokens"] = per_document["length_sum"].cast(pa.float64()).to_numpy()
    histograms = {name: binned({"kept": v}) for name, v in values.items()}
    return {name: h for name, h in histograms.items() if h is not None}


# --- duplicates ------------------------------------------------------------------------------------------------------


def _cluster_sizes(ledger: _Ledger) -> list[Column]:
    sizes: Counter[str] = Counter()
    for commit in ledger.commits["dedup cluster"]:
        sizes.update(commit.extra.get("cluster_sizes", {}))
    ordered = sorted(sizes, key=lambda name: int(name.split("-")[0]))
    return [Column(name.replace("-", "–"), {"clusters": sizes[name]}) for name in ordered]


def _clusters(ledger: _Ledger, top: int = 6) -> list[Cluster]:
    ngram = ledger.setting("dedup.ngram", 5)
    clusters = []
    for commit in ledger.commits["dedup cluster"]:
        for largest in commit.extra.get("largest", [])[:top]:
            members = _members(ledger, largest["members"])
            if members:
                clusters.append(Cluster(largest["size"], compare(members, ngram=ngram)))
    return clusters


def _members(ledger: _Ledger, ids: Sequence[int]) -> list[dict[str, Any]]:
    """Url, text of the kept copy of some documents of one cluster and of up to two others, the kept copy first."""
    places = [p for doc_id in ids if (p := _keep_place(ledger, doc_id))]
    if not places:
        return []
    kept_id = places[0]["kept_id"]
    wanted = [kept_id, *(i for i in ids if i != kept_id)][:3]
    found = []
    for doc_id in wanted:
        uri = _part(ledger, "extract", "documents", f"{ordinal_of(doc_id):06d}")
        rows = _rows_of(uri, doc_id) if uri else []
        if uri and rows:
            found += [r | {"kept": doc_id == kept_id} for r in rows_at(uri, rows[:1], ["url", "text"])]
    return found


def _keep_place(ledger: _Ledger, doc_id: int) -> dict[str, Any] | None:
    uri = _part(ledger, "dedup cluster", "keep", f"{ordinal_of(doc_id):06d}")
    rows = _rows_of(uri, doc_id) if uri else []
    return rows_at(uri, rows[:1], ["kept_id"])[0] if uri and rows else None


def _rows_of(uri: str, doc_id: int) -> list[int]:
    ids = read_columns(uri, ["doc_id"])["doc_id"]
    rows: list[int] = pc.indices_nonzero(pc.equal(ids, pa.scalar(doc_id, pa.uint64()))).to_pylist()
    return rows


def compare(copies: Sequence[Mapping[str, Any]], *, ngram: int) -> list[Member]:
    """Members of a cluster beside the first of them: similarity over whole texts, and the text around the first difference."""
    texts = [_BLANKS.sub(" ", clean(c["text"] or "")) for c in copies]
    start = min([_first_difference(texts[0], t) for t in texts[1:]] or [0])
    start = max(0, texts[0].rfind(" ", 0, max(0, start - 150)) + 1)
    shown = [t[start : start + EXCERPT] for t in texts]
    grams = [_ngrams(t, ngram) for t in texts]
    members = []
    for i, copy in enumerate(copies):
        either = len(grams[0] | grams[i])
        similarity = len(grams[0] & grams[i]) / either if i and either else None
        lead = [Piece("… ")] if start else []
        pieces = lead + (differing(shown[0], shown[i]) if i else [Piece(shown[0])])
        members.append(Member(clean(copy["url"] or "(no URL)"), copy["kept"], similarity, pieces))
    return members


_BLANKS = re.compile(r"[^\S\n]+")


def _first_difference(a: str, b: str) -> int:
    """Index of the first differing character; 0 when there is none."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), 0)


def _ngrams(text: str, n: int) -> set[tuple[str, ...]]:
    words = normalize(text).split()
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def differing(before: str, after: str) -> list[Piece]:
    """`after` in pieces, marked where its words are not those of `before`."""
    old, new = re.split(r"([ \n])", before), re.split(r"([ \n])", after)
    codes = SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
    return [Piece("".join(new[first:last]), tag != "equal") for tag, _, _, first, last in codes if last > first]


# --- personal data, rejected texts -----------------------------------------------------------------------------------


def _entities(ledger: _Ledger, sample: _Sample) -> list[Entity]:
    values: Counter[str] = Counter()
    for commit in ledger.commits["refine"]:
        values.update(commit.extra.get("pii", {}))
    entities = []
    for name in ledger.setting("pii.entities", []):
        column = f"pii.{name.lower()}"
        if column in sample.corpus.column_names:
            affected = sample.corpus.filter(pc.greater(sample.corpus[column], 0))
            entities.append(Entity(name, values[name], affected.num_rows, _contexts(affected, name)))
    return sorted(entities, key=lambda e: (-e.values, e.name))


def _contexts(affected: pa.Table, entity: str, wanted: int = 3) -> list[list[Piece]]:
    contexts = []
    for i in _by_draw(affected)[:wanted]:
        row = rows_at(affected["_part"][i].as_py(), [affected["_row"][i].as_py()], ["text", "pii_spans"])[0]
        span = next((s for s in row["pii_spans"] if s["entity"] == entity), None)
        if span is not None:
            contexts.append(_in_context(row["text"], span["start"], span["end"]))
    return contexts


def _in_context(text: str, start: int, end: int) -> list[Piece]:
    def flat(part: str) -> str:
        return clean(part.replace("\n", " "))

    before = ("…" if start > CONTEXT else "") + flat(text[max(0, start - CONTEXT) : start])
    after = flat(text[end : end + CONTEXT]) + ("…" if end + CONTEXT < len(text) else "")
    return [Piece(before), Piece(flat(text[start:end]), marked=True), Piece(after)]


def _examples(ledger: _Ledger, sample: _Sample, wanted: int = 3) -> dict[str, list[Example]]:
    """Up to three documents of every rule that rejected any, those whose text was kept before the others."""
    examples = {}
    for stage, table in (("extract", sample.documents), ("refine", sample.rejected)):
        phase_counts: Counter[str] = Counter()
        for commit in ledger.commits[stage]:
            phase_counts.update(commit.counts)
        for rule in sorted(phase_counts, key=lambda r: (-phase_counts[r], r)):
            if rule not in ("kept", "warc.not_response"):
                examples[rule] = list(_examples_of(rule, table, ledger, stage))[:wanted]
    return examples


def _examples_of(rule: str, table: pa.Table, ledger: _Ledger, stage: str) -> Iterator[Example]:
    if "rejected_by" not in table.column_names:
        return
    rows = table.filter(pc.equal(table["rejected_by"], rule))
    share, seed = ledger.setting(f"{stage}.keep_rejected_text", 0.0), ledger.setting("run.seed", 0)
    order = _by_draw(rows)
    with_text = (i for i in order if sampled(rows["doc_id"][i].as_py(), share=share, seed=seed))
    likely = [i for i, _ in zip(with_text, range(6), strict=False)]
    held = rows.take(pa.array([*likely, *(i for i in order[:9] if i not in likely)][:9], pa.int64())).to_pylist()
    found = [row | rows_at(row["_part"], [row["_row"]], ["url", "text"])[0] for row in held]
    for row in sorted(found, key=lambda r: r["text"] is None):  # stable: drawn order within
        low, high = row["rejected_low"], row["rejected_high"]
        text = None if row["text"] is None else excerpt(row["text"])
        yield Example(clean(row["url"] or "(no URL)"), row["rejected_value"], low, high, text)


def excerpt(text: str) -> str:
    """The beginning of a text."""
    text = clean(text)
    return text if len(text) <= EXCERPT else text[: text.rfind(" ", EXCERPT // 2, EXCERPT)].rstrip() + " …"


# control characters have no place in HTML; bidirectional overrides would turn the page around the text
_UNWANTED = dict.fromkeys([*range(9), 11, 12, *range(14, 32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A)])


def clean(text: str) -> str:
    """A crawled string without characters that would break the page. Escaping is the template's business."""
    return text.translate(_UNWANTED).encode("utf-8", "replace").decode()


# --- what to look at -------------------------------------------------------------------------------------------------


def _notices(data: ReportData) -> Iterator[tuple[str, str]]:
    """(level, sentence): what an engineer should see before anything else."""
    if data.failures:
        yield "bad", f"{count(len(data.failures), 'unit')} failed; see Failures. The same command tries them again."
    for phase in data.phases:
        left = phase.units - phase.done - phase.failed
        if phase.done and left:
            yield "note", f"{phase.name}: {left:,} of {count(phase.units, 'unit')} are still to do."
    missing = [s for s in STAGES if not any(p.done for p in data.phases if p.name.split()[0] == s)]
    if missing:
        yield "note", f"Not run yet under these keys: {', '.join(missing)}."
    extract = data.phases[0]
    if extract.lost_bytes or extract.lost_members:
        places = count(extract.lost_members, "damaged place")
        yield "bad", f"{size(extract.lost_bytes)} of input could not be read, at {places}."
    hosts = [g for g in data.groups["host"] if g.lost and g.name]
    if hosts:
        named = ", ".join(f"{clean(g.name)} ({g.main_rule})" for g in hosts[:3])
        yield "bad", f"{count(len(hosts), 'host')} lost more than {percent(LOST)} of {_MANY} or more pages: {named}" + (
            f" and {len(hosts) - 3:,} more." if len(hosts) > 3 else "."
        )
    files = [g for g in data.inputs if g.lost]
    if files:
        yield "bad", f"{count(len(files), 'input file')} lost more than {percent(LOST)} of its pages; see Sources."
    if data.refined and not data.totals.get("documents"):
        yield "bad", "No document was kept."


# --- drawing ---------------------------------------------------------------------------------------------------------


def render(data: ReportData) -> str:
    """The page. Every crawled string passes through autoescape."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters |= {"number": number, "percent": percent, "size": size, "duration": duration, "bound": bound}
    environment.filters |= {"counted": count, "limited": limited, "clean": clean, "compact": compact}
    environment.globals |= {"histogram_svg": histogram_svg, "columns_svg": columns_svg, "Column": Column}
    template = Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8")
    return environment.from_string(template).render(d=data, max_rows=MAX_ROWS)


def number(value: float | None) -> str:
    """1234567 as '1,234,567', 0.12345 as '0.123', None as '–'."""
    if value is None:
        return "–"
    if isinstance(value, int) or (math.isfinite(value) and abs(value) >= 1000):
        return f"{value:,.0f}"
    return {math.inf: "∞", -math.inf: "−∞"}.get(value, f"{value:.4g}")


def percent(share: float) -> str:
    """A share in [0, 1] for reading; never '0 %' or '100 %' for what is not quite that."""
    if 0 < share < 0.0005:
        return "<0.1 %"
    if 0.9995 <= share < 1:
        return ">99.9 %"
    return f"{share:.1%}".replace("%", " %")


def size(value: float) -> str:
    """Bytes for reading, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(value) < 1000 or unit == "TB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1000
    raise AssertionError


def duration(seconds: float) -> str:
    """Seconds for reading."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def bound(limits: tuple[float, float] | None) -> str:
    """A bound as '0.2 to 1', 'at most 5', 'at least 50' or 'off'."""
    if limits is None:
        return "off"
    low, high = limits
    if math.isinf(low) or math.isinf(high):
        sides = [f"at least {number(low)}"] * math.isfinite(low) + [f"at most {number(high)}"] * math.isfinite(high)
        return sides[0] if sides else "any value"
    return f"{number(low)} to {number(high)}"


def count(value: int, noun: str) -> str:
    """'1 unit', '2,000 units'."""
    return f"{value:,} {noun}" if value == 1 else f"{value:,} {noun}s"


def limited(items: Sequence[Any], limit: int) -> Sequence[Any]:
    """The first of some items."""
    return items[:limit]
