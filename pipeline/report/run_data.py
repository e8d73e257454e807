"""What the report shows of a run, as plain data: `gather` reads it, the page's template prints it.

Counts in the funnel are sums over commit records, exact. Distributions, hosts and examples come
from the sampled parts.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pipeline.config.show import to_toml
from pipeline.report.charts import Histogram
from pipeline.report.distributions import Score, lengths, scores
from pipeline.report.duplicates import Duplicates, read_duplicates
from pipeline.report.groups import LOST_GROUP, LicenseCount, Ranking, licenses, rankings
from pipeline.report.sample import Ledger, open_sample, read_ledger, summed
from pipeline.report.texts import Entity, Example, entities, examples
from pipeline.run import publish
from pipeline.run.funnel import FunnelRow, funnel
from pipeline.run.phases import FUNNEL_PHASES, SPECS, STAGES
from pipeline.run.state import RunState
from pipeline.run.status import PhaseStatus, phase_status
from stages.storage.catalog import read_catalog
from stages.storage.files import exists, read_bytes
from stages.storage.ledger import Commits


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
    """Everything the page shows. `missing` are stages that have not run under the current keys."""

    root: str
    state: RunState
    generation: str | None
    manifest: dict[str, Any]
    last_commit: float | None
    settings: list[tuple[str, str, str]]
    missing: list[str]
    funnel: list[FunnelStage]
    phases: list[PhaseStatus]
    estimate: list[Comparison]
    failures: list[tuple[str, str, str]]
    parts: tuple[int, int]
    sampled_documents: int
    sampled_corpus: int
    scores: list[Score]
    notes: dict[str, list[NoteCount]]
    groups: dict[str, Ranking]
    licenses: list[LicenseCount]
    lost_inputs: int
    duplicates: Duplicates
    entities: list[Entity]
    lengths: dict[str, Histogram]
    totals: dict[str, int | None]
    examples: dict[str, list[Example]]


def gather(root: str) -> ReportData:
    """Read a run into report data."""
    ledger = read_ledger(root)
    state, commits = ledger.state, ledger.commits
    since = state.started or 0.0
    phases = [phase_status(p, ledger.store(p), commits[p], since=since) for p in SPECS]
    generation = state.generation if state.stage == "done" else None
    rows = funnel(commits)
    totals = _totals(ledger, rows)
    asked = STAGES[: STAGES.index(state.last) + 1]
    with open_sample(ledger) as sample:
        groups = rankings(ledger, sample)
        return ReportData(
            root=root,
            state=state,
            generation=generation,
            manifest=_manifest(publish.published_to(root, state), generation),
            last_commit=max((p.last_commit for p in phases if p.last_commit), default=None),
            settings=[(key, to_toml(s.value), s.origin) for key, s in state.config.items()],
            missing=[stage for stage in asked if not commits[FUNNEL_PHASES[stage]]],
            funnel=list(_funnel_stages(rows, commits)),
            phases=[p for p in phases if p.units or not SPECS[p.name].optional],
            estimate=_estimate(ledger, phases, totals),
            failures=[(p.name, unit, error) for p in phases for unit, error in p.errors.items()],
            parts=(sample.parts, sample.of),
            sampled_documents=sample.count("pages"),
            sampled_corpus=sample.count("refined WHERE rejected_by IS NULL"),
            scores=scores(ledger, sample),
            notes=_notes(ledger),
            groups=groups,
            licenses=licenses(sample),
            lost_inputs=sample.count(f'"by input" WHERE {LOST_GROUP}'),
            duplicates=read_duplicates(ledger, sample),
            entities=entities(ledger, sample),
            lengths=lengths(sample),
            totals=totals,
            examples=examples(ledger, sample),
        )


def _manifest(root: str, generation: str | None) -> dict[str, Any]:
    uri = f"{root}/generations/{generation}/manifest.json"
    manifest: dict[str, Any] = {}
    if generation in {entry["name"] for entry in read_catalog(root)} and exists(uri):
        manifest = json.loads(read_bytes(uri))
    return manifest


# --- funnel, time, totals -------------------------------------------------------------------------


def _funnel_stages(
    rows: Sequence[FunnelRow], commits: Mapping[str, Commits]
) -> Iterator[FunnelStage]:
    count, unit = rows[0].count, "records"
    for stage in ("extract", "dedup", "refine"):
        losses, left, end = [], count, None
        for row in rows:
            if row.stage == stage and row.rule is not None:
                left -= row.count
                losses.append(Loss(row.rule, row.count, max(0, left)))
            elif row.stage == stage and row.unit == "documents" and commits[FUNNEL_PHASES[stage]]:
                end = row.count
        yield FunnelStage(stage, unit, count, losses, end)
        count, unit = end or 0, "documents"


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
        name = stage["stage"]
        own = [p for p in phases if p.name.split()[0] == name]
        seconds, written = sum(p.cpu_seconds for p in own), sum(p.bytes_written for p in own)
        compared.append(Comparison(f"{name}: core-seconds", stage["core_seconds"], seconds))
        compared.append(Comparison(f"{name}: bytes", stage["bytes"], written))
    tokens = (totals["tokens"] or 0) + (totals["held_out_tokens"] or 0)
    return [*compared, Comparison("tokens", estimate["tokens"], tokens)]


def _totals(ledger: Ledger, rows: Sequence[FunnelRow]) -> dict[str, int | None]:
    """None where the stage has not run."""
    points = {f"{row.stage} {row.unit}": row.count for row in rows if row.rule is None}
    corpus, packed = ledger.commits[ledger.corpus_phase], ledger.commits["pack"]
    counts = summed(commit.counts for commit in packed)
    return {
        "records": points["extract records"],
        "units": len(ledger.commits["extract"]),
        "documents": points.get("refine documents"),
        "chars": sum(commit.result.chars_out for commit in corpus),
        "tokens": points.get("pack tokens"),
        "rows": points.get("pack rows"),
        "row_tokens": points.get("pack rows", 0) * ledger.setting("pack.seq_len", 0),
        "packed_documents": counts["kept"],
        "held_out": counts["pack.held_out"],
        "held_out_tokens": points.get("pack held-out tokens", 0),
    }


# --- notes ---------------------------------------------------------------------------------------


def _notes(ledger: Ledger) -> dict[str, list[NoteCount]]:
    """Values by note, most frequent first; notes without a value are left out."""
    documents: defaultdict[str, Counter[str]] = defaultdict(Counter)
    dropped: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for commit in [*ledger.commits["extract"], *ledger.commits["refine"]]:
        for note, tally in commit.result.tallies.items():
            for value, (measured, rejected) in tally.items():
                documents[note][value] += measured
                dropped[note][value] += rejected
    return {
        note: [
            NoteCount(value, count, dropped[note][value])
            for value, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        ]
        for note, counts in documents.items()
        if any(counts)
    }
