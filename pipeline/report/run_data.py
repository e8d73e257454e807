"""What the report says of a run, as plain data: `gather` reads, pipeline.report draws.

Counts in the funnel are sums over commit records, exact. Distributions, hosts and examples come
from the sampled parts.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.report.charts import Histogram, binned
from pipeline.report.duplicates import EXCERPT, Duplicates, Piece, clean, find_duplicates
from pipeline.report.sample import Ledger, Sample, by_draw, joined, read_ledger, read_sample, spread
from pipeline.run import publish
from pipeline.run.funnel import FunnelRow, funnel
from pipeline.run.phase import OPTIONAL
from pipeline.run.results import PHASES
from pipeline.run.status import PhaseStatus, phase_status
from stages.formats.document import sampled
from stages.storage.catalog import read_catalog
from stages.storage.files import exists, read_bytes
from stages.storage.parts import read_columns, rows_at, unit_name

CONTEXT = 70
LOST = 0.9  # a host or input file that lost more than this share is pointed out
MANY = 5  # ... if it had at least so many pages: a single dropped page says nothing
SHOWN = 12  # rows of a table of groups
_GROUPED = ("host", "language", "charset_source", "crawl_month", "opt_out")


class Loss(NamedTuple):
    """What one rule took: `left` documents remained after it and the ones above it."""

    rule: str
    taken: int
    left: int


@dataclass
class FunnelStage:
    """A stage of the funnel: what it began with, the losses in order, what was left. `end` None: it
    has not run.
    """

    name: str
    unit: str
    start: int
    losses: list[Loss]
    end: int | None


class Compared(NamedTuple):
    """What was expected of an amount, with its interval if there is one, and what it came to."""

    name: str
    expected: dict[str, float | None]
    real: float


class Score(NamedTuple):
    """The distribution of one score; `outside` is the share of measured documents beyond the bound,
    NaN included.

    `by_language`: the bounds of languages that have their own; `outside` knows nothing of them.
    """

    name: str
    stage: str
    bound: tuple[float, float] | None
    histogram: Histogram | None
    measured: int
    outside: float
    not_numbers: int
    first_dropped: int
    by_language: dict[str, tuple[float, float] | None]


class Noted(NamedTuple):
    """A value that a filter noted ("" for none): documents measured, and those of them that this
    filter dropped.
    """

    value: str
    documents: int
    dropped: int


class Group(NamedTuple):
    """Documents that share something: how many are kept so far and dropped, and the rule that
    dropped most of them.
    """

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
        return self.total >= MANY and self.dropped > LOST * self.total


class Ranking(NamedTuple):
    """The first groups in some order, and what the others come to."""

    groups: list[Group]
    others: int = 0
    other_pages: int = 0
    other_kept: int = 0

    @classmethod
    def of(cls, groups: Sequence[Group], limit: int) -> "Ranking":
        """The first `limit` of ordered groups."""
        rest = groups[limit:]
        return cls(
            list(groups[:limit]), len(rest), sum(g.total for g in rest), sum(g.kept for g in rest)
        )


class Entity(NamedTuple):
    """Personal data of one kind: values replaced (exact), documents with any (sample), places in
    scrubbed text.
    """

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
    last: str
    keys: dict[str, str]
    generation: str | None
    manifest: dict[str, Any]
    started: datetime
    last_commit: datetime | None
    settings: list[tuple[str, str, str]]
    funnel: list[FunnelStage]
    phases: list[PhaseStatus]
    estimate: list[Compared]
    failures: list[tuple[str, str, str]]
    parts: tuple[int, int]
    refined: bool
    sampled_documents: int
    sampled_corpus: int
    scores: list[Score]
    notes: dict[str, list[Noted]]
    groups: dict[str, Ranking]
    inputs: Ranking
    lost_inputs: int
    duplicates: Duplicates
    entities: list[Entity]
    lengths: dict[str, Histogram]
    totals: dict[str, int | None]
    examples: dict[str, list[Example]]


def gather(root: str) -> ReportData:
    """Read a run into report data."""
    ledger = read_ledger(root)
    state, sample = ledger.state, read_sample(ledger)
    since = state["history"][-1]["started"]
    phases = [phase_status(p, ledger.store(p), ledger.commits[p], since=since) for p in PHASES]
    inputs = _input_files(ledger)
    ends = [p.last_commit for p in phases if p.last_commit is not None]
    generation = state.get("generation") if state.get("stage") == "done" else None
    rows = funnel(*(ledger.commits[p] for p in ("extract", "dedup keep", "refine", "pack")))
    totals = _totals(ledger, rows)
    return ReportData(
        root=root,
        last=state.get("last", "pack"),
        stage=state.get("stage", ""),
        keys=state["keys"],
        generation=generation,
        manifest=_manifest(publish.published_to(root, ledger.state), generation),
        started=_moment(since),
        last_commit=_moment(max(ends)) if ends else None,
        settings=[(key, e["value"], e["origin"]) for key, e in state.get("config", {}).items()],
        funnel=_funnel_stages(rows, ledger),
        phases=[p for p in phases if p.units or p.name not in OPTIONAL],
        estimate=_estimate(ledger, phases, totals),
        failures=[(p.name, unit, error) for p in phases for unit, error in p.errors.items()],
        parts=(len(sample.units), sample.of),
        refined=bool(ledger.commits["refine"]),
        sampled_documents=sample.documents.num_rows,
        sampled_corpus=sample.corpus.num_rows,
        scores=_scores(ledger, sample),
        notes=_notes(ledger),
        groups=_rankings(sample.documents),
        inputs=Ranking.of(inputs, SHOWN),
        lost_inputs=sum(g.lost for g in inputs),
        duplicates=find_duplicates(ledger, sample),
        entities=_entities(ledger, sample),
        lengths=_lengths(ledger, sample),
        totals=totals,
        examples=_examples(ledger, sample),
    )


def _moment(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def _manifest(root: str, generation: str | None) -> dict[str, Any]:
    uri = f"{root}/generations/{generation}/manifest.json"
    if (
        generation is None
        or generation not in {e["name"] for e in read_catalog(root)}
        or not exists(uri)
    ):
        return {}
    manifest: dict[str, Any] = json.loads(read_bytes(uri))
    return manifest


# --- funnel, time, totals -------------------------------------------------------------------------


def _funnel_stages(rows: Sequence[FunnelRow], ledger: Ledger) -> list[FunnelStage]:
    ran = {"extract": "extract", "dedup": "dedup keep", "refine": "refine"}
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


def _estimate(
    ledger: Ledger, phases: Sequence[PhaseStatus], totals: dict[str, int | None]
) -> list[Compared]:
    """RUN/estimate.json against the run, once it has ended; nothing if there is none, or one of
    another configuration.
    """
    uri = f"{ledger.root}/estimate.json"
    if ledger.state.get("stage") != "done" or not exists(uri):
        return []
    found = json.loads(read_bytes(uri))
    if found["keys"] != ledger.state["keys"]:
        return []
    compared = []
    for stage in found["stages"]:
        mine = [p for p in phases if p.name.split()[0] == stage["stage"]]
        for unit, real in (
            ("core_seconds", sum(p.cpu_seconds for p in mine)),
            ("bytes", sum(p.bytes_written for p in mine)),
        ):
            compared.append(
                Compared(f"{stage['stage']}: {unit.replace('_', '-')}", stage[unit], real)
            )
    return [
        *compared,
        Compared(
            "tokens", found["tokens"], (totals["tokens"] or 0) + (totals["held_out_tokens"] or 0)
        ),
    ]


def _totals(ledger: Ledger, rows: Sequence[FunnelRow]) -> dict[str, int | None]:
    names = (
        "documents",
        "chars",
        "tokens",
        "rows",
        "row_tokens",
        "packed_documents",
        "held_out",
        "held_out_tokens",
    )
    totals: dict[str, int | None] = dict.fromkeys(names)
    totals |= {"records": rows[0].count, "units": len(ledger.commits["extract"])}
    if ledger.commits["refine"]:
        totals["documents"] = sum(c.rows_out for c in ledger.commits["refine"])
        totals["chars"] = int(
            sum(c.totals.get("chars_out", 0) for c in ledger.commits[ledger.corpus_phase])
        )
    if packed := ledger.commits["pack"]:
        totals["tokens"] = int(sum(c.totals["tokens"] for c in packed))
        rows_out = sum(c.rows_out for c in packed)
        totals |= {"rows": rows_out, "row_tokens": rows_out * ledger.setting("pack.seq_len", 0)}
        totals["packed_documents"] = sum(c.counts["kept"] for c in packed)
        totals["held_out"] = sum(c.counts.get("pack.held_out", 0) for c in packed)
        totals["held_out_tokens"] = int(sum(c.totals.get("held_out_tokens", 0) for c in packed))
    return totals


# --- distributions --------------------------------------------------------------------------------


def _scores(ledger: Ledger, sample: Sample) -> list[Score]:
    scores = []
    if sample.documents.num_rows:
        scores.append(
            _score("language.score", "extract", sample.documents, ledger, column="language_score")
        )
        scores += [
            _score(n, "extract", sample.documents, ledger) for n in _charted(sample.documents)
        ]
    refined = joined([sample.corpus, sample.rejected], pa.schema([]))
    measured_before = {s.name for s in scores}
    new = [n for n in _charted(refined) if n not in measured_before]
    return scores + [_score(n, "refine", refined, ledger) for n in new]


def _notes(ledger: Ledger) -> dict[str, list[Noted]]:
    """By note its values, most frequent first; notes that say nothing are left out."""
    sums: dict[str, dict[str, Noted]] = {}
    for commit in [*ledger.commits["extract"], *ledger.commits["refine"]]:
        for column, tally in commit.extra.get("tallies", {}).items():
            for value, (documents, dropped) in tally.items():
                before = sums.setdefault(column, {}).get(value, Noted(value, 0, 0))
                sums[column][value] = Noted(
                    value, before.documents + documents, before.dropped + dropped
                )
    return {
        column: sorted(found.values(), key=lambda n: (-n.documents, n.value))
        for column, found in sums.items()
        if any(found)
    }


def _charted(table: pa.Table) -> list[str]:
    """Scores; what was scrubbed has a section of its own, but for the number that a rule may bound."""
    return [
        n for n in table.column_names if "." in n and (n == "pii.count" or not n.startswith("pii."))
    ]


def _score(name: str, stage: str, table: pa.Table, ledger: Ledger, column: str = "") -> Score:
    """Drop at `rejected_by` of its own stage, not at the fate: a duplicate passed the rules that it
    was measured by.
    """
    measured = table.select([column or name, "rejected_by"]).filter(
        pc.is_valid(table[column or name])
    )
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
        by_language=ledger.bounds_by_language(name),
    )


def _rankings(documents: pa.Table) -> dict[str, Ranking]:
    """Groups by the values of columns, the largest first; hosts also by what they kept, dropped,
    and lost.
    """
    counts = {column: _counts(documents, column) for column in _GROUPED}
    hosts = counts["host"]
    lost = pc.and_(pc.greater_equal(hosts["total"], MANY), _is_lost(hosts))
    every = max(1, counts["crawl_month"].num_rows)
    wanted = {column: (table, column, "total", SHOWN) for column, table in counts.items()}
    wanted["crawl_month"] = (counts["crawl_month"], "crawl_month", "name", every)
    wanted["host by kept"] = (hosts, "host", "kept", SHOWN)
    wanted["host by dropped"] = (
        hosts.filter(pc.greater(hosts["dropped"], 0)),
        "host",
        "dropped",
        SHOWN,
    )
    wanted["host lost"] = (hosts.filter(lost), "host", "total", 2 * SHOWN)
    return {name: _ranking(documents, *how) for name, how in wanted.items()}


def _is_lost(counts: pa.Table) -> pa.ChunkedArray:
    return pc.greater(counts["dropped"], pc.multiply(pc.cast(counts["total"], pa.float64()), LOST))


def _counts(documents: pa.Table, column: str) -> pa.Table:
    """Table of name, kept, dropped, total by the values of a column, null as ""; it may have a
    million rows.
    """
    if column not in documents.column_names:
        return pa.table(
            {
                "name": pa.array([], pa.string()),
                **dict.fromkeys(("kept", "dropped", "total"), _NONE),
            }
        )
    table = pa.table(
        {"name": documents[column], "kept": pc.cast(pc.is_null(documents["fate"]), pa.int64())}
    )
    if column == "opt_out":
        table = table.filter(pc.is_valid(table["name"]))
    table = table.set_column(0, "name", pc.fill_null(table["name"], ""))
    summed = table.group_by("name").aggregate([("kept", "sum"), ([], "count_all")])
    kept, total = pc.fill_null(summed["kept_sum"], 0), summed["count_all"]
    return pa.table(
        {"name": summed["name"], "kept": kept, "dropped": pc.subtract(total, kept), "total": total}
    )


_NONE = pa.array([], pa.int64())


def _ranking(documents: pa.Table, counts: pa.Table, column: str, by: str, limit: int) -> Ranking:
    order = [(by, "descending"), ("name", "ascending")] if by != "name" else [("name", "ascending")]
    ordered = counts.sort_by(order)
    shown, rest = ordered.slice(0, limit), ordered.slice(limit)
    rules = _main_rules(documents, column, shown["name"].to_pylist())
    groups = [
        Group(r["name"], r["kept"], r["dropped"], rules.get(r["name"])) for r in shown.to_pylist()
    ]
    return Ranking(
        groups, rest.num_rows, pc.sum(rest["total"]).as_py() or 0, pc.sum(rest["kept"]).as_py() or 0
    )


def _main_rules(documents: pa.Table, column: str, names: Sequence[str]) -> dict[str, str]:
    """The rule that dropped most of each group."""
    if column not in documents.column_names:
        return {}
    table = pa.table({"name": pc.fill_null(documents[column], ""), "fate": documents["fate"]})
    table = table.filter(
        pc.and_(pc.is_in(table["name"], pa.array(names, pa.string())), pc.is_valid(table["fate"]))
    )
    counts = table.group_by(["name", "fate"]).aggregate([([], "count_all")]).to_pylist()
    # the largest comes last and stays
    return {r["name"]: r["fate"] for r in sorted(counts, key=lambda r: (r["count_all"], r["fate"]))}


def _input_files(ledger: Ledger) -> list[Group]:
    """Pages by input file, exact, most lost first; copies count as lost only once refine has come
    to a file.
    """
    paths = _input_paths(ledger.root)
    refined = {c.unit: c.rows_out for c in ledger.commits["refine"]}
    groups = []
    for commit in ledger.commits["extract"]:
        pages = Counter(
            {r: n for r, n in commit.counts.items() if r not in ("warc.not_response", "kept")}
        )
        kept = refined.get(commit.unit, commit.rows_out)
        after = commit.rows_out - kept
        main = min(pages, key=lambda r: (-pages[r], r)) if pages else None
        if after and (main is None or after > pages[main]):
            main = "dedup, refine"
        name = paths.get(commit.unit, f"input {commit.unit}")
        groups.append(Group(name, kept, pages.total() + after, main))
    return sorted(
        (g for g in groups if g.total), key=lambda g: (g.kept / g.total, -g.total, g.name)
    )


def _input_paths(root: str) -> dict[str, str]:
    uri = f"{root}/inputs.jsonl"
    lines = read_bytes(uri).splitlines() if exists(uri) else []
    return {unit_name(record["ordinal"]): record["path"] for record in map(json.loads, lines)}


def _lengths(ledger: Ledger, sample: Sample) -> dict[str, Histogram]:
    """Lengths of kept documents: characters of the corpus, tokens of the packed rows."""
    values = {}
    if sample.corpus.num_rows:
        values["characters"] = sample.corpus["num_chars"].cast(pa.float64()).to_numpy()
    tokens = [
        read_columns(
            ledger.store("pack").uri("provenance", f"{c.unit}.parquet"), ["doc_id", "length"]
        )
        for c in spread(ledger.commits["pack"], rows=lambda c: c.rows_in)
    ]
    if any(t.num_rows for t in tokens):
        per_document = pa.concat_tables(tokens).group_by("doc_id").aggregate([("length", "sum")])
        values["tokens"] = per_document["length_sum"].cast(pa.float64()).to_numpy()
    histograms = {name: binned({"kept": v}) for name, v in values.items()}
    return {name: h for name, h in histograms.items() if h is not None}


# --- personal data, rejected texts ----------------------------------------------------------------


def _entities(ledger: Ledger, sample: Sample) -> list[Entity]:
    values: Counter[str] = Counter()
    for commit in [*ledger.commits["refine"], *ledger.commits["refine names"]]:
        values.update(commit.extra.get("pii", {}))
    entities = []
    for name in [
        *ledger.setting("pii.entities", []),
        *ledger.setting("ner.entities", ledger.setting("names.entities", [])),
    ]:
        column = f"pii.{name.lower()}"
        if column in sample.corpus.column_names:
            affected = sample.corpus.filter(pc.greater(sample.corpus[column], 0))
            entities.append(
                Entity(name, values[name], affected.num_rows, _contexts(affected, name))
            )
    return sorted(entities, key=lambda e: (-e.values, e.name))


def _contexts(affected: pa.Table, entity: str, wanted: int = 3) -> list[list[Piece]]:
    contexts = []
    for i in by_draw(affected)[:wanted]:
        row = rows_at(
            affected["_part"][i].as_py(), [affected["_row"][i].as_py()], ["text", "pii_spans"]
        )[0]
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


def _examples(ledger: Ledger, sample: Sample, wanted: int = 3) -> dict[str, list[Example]]:
    """Up to three documents of every rule that rejected any, those whose text was kept before the
    others.
    """
    examples = {}
    for stage, table in (("extract", sample.documents), ("refine", sample.rejected)):
        phase_counts: Counter[str] = Counter()
        for commit in ledger.commits[stage]:
            phase_counts.update(commit.counts)
        for rule in sorted(phase_counts, key=lambda r: (-phase_counts[r], r)):
            if rule not in ("kept", "warc.not_response"):
                examples[rule] = list(_examples_of(rule, table, ledger, stage))[:wanted]
    return examples


def _examples_of(rule: str, table: pa.Table, ledger: Ledger, stage: str) -> Iterator[Example]:
    if "rejected_by" not in table.column_names:
        return
    table = table.select(
        [
            "doc_id",
            "rejected_by",
            "rejected_value",
            "rejected_low",
            "rejected_high",
            "_row",
            "_part",
        ]
    )
    rows = table.filter(pc.equal(table["rejected_by"], rule))
    share, seed = ledger.setting(f"{stage}.keep_rejected_text", 0.0), ledger.setting("run.seed", 0)
    order = by_draw(rows)
    ids = rows["doc_id"].to_pylist()
    with_text = (i for i in order if sampled(ids[i], share=share, seed=seed))
    likely = [i for i, _ in zip(with_text, range(6), strict=False)]
    held = rows.take(
        pa.array([*likely, *(i for i in order[:9] if i not in likely)][:9], pa.int64())
    ).to_pylist()
    found = [row | rows_at(row["_part"], [row["_row"]], ["url", "text"])[0] for row in held]
    for row in sorted(found, key=lambda r: r["text"] is None):  # stable: drawn order within
        low, high = row["rejected_low"], row["rejected_high"]
        text = None if row["text"] is None else excerpt(row["text"])
        yield Example(clean(row["url"] or "(no URL)"), row["rejected_value"], low, high, text)


def excerpt(text: str) -> str:
    """The beginning of a text."""
    text = clean(text)
    return (
        text
        if len(text) <= EXCERPT
        else text[: text.rfind(" ", EXCERPT // 2, EXCERPT)].rstrip() + " …"
    )
