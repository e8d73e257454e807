"""What the report shows of a run, as plain data: `gather` reads it, the page's template prints it.

Counts in the funnel are sums over commit records, exact. Distributions, hosts and examples come
from the sampled parts.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

from pipeline.config.show import to_toml
from pipeline.report.charts import Histogram
from pipeline.report.distributions import Score, lengths, scores
from pipeline.report.duplicates import Duplicates, read_duplicates
from pipeline.report.groups import SHOWN, Ranking, input_files, rankings
from pipeline.report.sample import Ledger, open_sample, read_ledger
from pipeline.report.texts import Entity, Example, entities, examples
from pipeline.run import publish
from pipeline.run.funnel import FunnelRow, funnel
from pipeline.run.phases import SPECS
from pipeline.run.status import PhaseStatus, phase_status
from stages.storage.catalog import read_catalog
from stages.storage.files import exists, read_bytes


class Loss(NamedTuple):
    """Documents that one rule dropped; `left` remained after it and the rules above it."""

    rule: str
    taken: int
    left: int


@dataclass
class FunnelStage:
    """A stage of the funnel: start, losses in order, and end (None if it has not run)."""

    name: str
    unit: str
    start: int
    losses: list[Loss]
    end: int | None


class Comparison(NamedTuple):
    """An estimated amount, with its interval if there is one, and the actual amount."""

    name: str
    expected: dict[str, float | None]
    real: float


class NoteCount(NamedTuple):
    """A value that a filter noted ("" for none): measured documents, and those that it dropped."""

    value: str
    documents: int
    dropped: int


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
    estimate: list[Comparison]
    failures: list[tuple[str, str, str]]
    parts: tuple[int, int]
    refined: bool
    sampled_documents: int
    sampled_corpus: int
    scores: list[Score]
    notes: dict[str, list[NoteCount]]
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
    state = ledger.state
    since = state.started or 0.0
    phases = [phase_status(p, ledger.store(p), ledger.commits[p], since=since) for p in SPECS]
    inputs = input_files(ledger)
    ends = [p.last_commit for p in phases if p.last_commit is not None]
    generation = state.generation if state.stage == "done" else None
    rows = funnel(*(ledger.commits[p] for p in ("extract", "dedup keep", "refine", "pack")))
    totals = _totals(ledger, rows)
    with open_sample(ledger) as sample:
        return ReportData(
            root=root,
            last=state.last,
            stage=state.stage,
            keys=state.keys,
            generation=generation,
            manifest=_manifest(publish.published_to(root, ledger.state), generation),
            started=_moment(since),
            last_commit=_moment(max(ends)) if ends else None,
            settings=[(key, to_toml(s.value), s.origin) for key, s in state.config.items()],
            funnel=_funnel_stages(rows, ledger),
            phases=[p for p in phases if p.units or not SPECS[p.name].optional],
            estimate=_estimate(ledger, phases, totals),
            failures=[(p.name, unit, error) for p in phases for unit, error in p.errors.items()],
            parts=(sample.parts, sample.of),
            refined=bool(ledger.commits["refine"]),
            sampled_documents=sample.count("pages"),
            sampled_corpus=sample.count("refined WHERE rejected_by IS NULL"),
            scores=scores(ledger, sample),
            notes=_notes(ledger),
            groups=rankings(sample),
            inputs=Ranking.of(inputs, SHOWN),
            lost_inputs=sum(g.lost for g in inputs),
            duplicates=read_duplicates(ledger, sample),
            entities=entities(ledger, sample),
            lengths=lengths(sample),
            totals=totals,
            examples=examples(ledger, sample),
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
) -> list[Comparison]:
    """Compare RUN/estimate.json with a finished run; [] without one of the same configuration."""
    uri = f"{ledger.root}/estimate.json"
    if ledger.state.stage != "done" or not exists(uri):
        return []
    estimate = json.loads(read_bytes(uri))
    if estimate["keys"] != ledger.state.keys:
        return []
    compared = []
    for stage in estimate["stages"]:
        phases_of_stage = [p for p in phases if p.name.split()[0] == stage["stage"]]
        for unit, real in (
            ("core_seconds", sum(p.cpu_seconds for p in phases_of_stage)),
            ("bytes", sum(p.bytes_written for p in phases_of_stage)),
        ):
            compared.append(
                Comparison(f"{stage['stage']}: {unit.replace('_', '-')}", stage[unit], real)
            )
    return [
        *compared,
        Comparison(
            "tokens", estimate["tokens"], (totals["tokens"] or 0) + (totals["held_out_tokens"] or 0)
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
        totals["chars"] = sum(c.result.chars_out for c in ledger.commits[ledger.corpus_phase])
    if packed := ledger.commits["pack"]:
        totals["tokens"] = sum(c.result.tokens for c in packed)
        rows_out = sum(c.rows_out for c in packed)
        totals |= {"rows": rows_out, "row_tokens": rows_out * ledger.setting("pack.seq_len", 0)}
        totals["packed_documents"] = sum(c.counts["kept"] for c in packed)
        totals["held_out"] = sum(c.counts.get("pack.held_out", 0) for c in packed)
        totals["held_out_tokens"] = sum(c.result.held_out_tokens for c in packed)
    return totals


# --- notes ---------------------------------------------------------------------------------------


def _notes(ledger: Ledger) -> dict[str, list[NoteCount]]:
    """Values by note, most frequent first; notes without a value are left out."""
    sums: dict[str, dict[str, NoteCount]] = {}
    for commit in [*ledger.commits["extract"], *ledger.commits["refine"]]:
        for column, tally in commit.result.tallies.items():
            for value, (documents, dropped) in tally.items():
                before = sums.setdefault(column, {}).get(value, NoteCount(value, 0, 0))
                sums[column][value] = NoteCount(
                    value, before.documents + documents, before.dropped + dropped
                )
    return {
        column: sorted(values.values(), key=lambda n: (-n.documents, n.value))
        for column, values in sums.items()
        if any(values)
    }
