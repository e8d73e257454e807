"""The funnel of a run: rows in, rows dropped by each rule, rows out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.run.phases import FUNNEL_PHASES
from stages.storage.ledger import Commits


@dataclass(frozen=True)
class FunnelRow:
    """One line of the funnel: the count at a point (`rule` None), or what one rule removed."""

    stage: str
    rule: str | None
    count: int
    unit: str = "documents"


def funnel(commits: Mapping[str, Commits]) -> list[FunnelRow]:
    """From records to tokens, summed over the commits of each phase: counts at points, and losses
    by rule between.
    """
    rows = [FunnelRow("extract", None, commits["extract"].total("rows_in"), "records")]
    for stage, phase in FUNNEL_PHASES.items():
        if commits[phase] or stage == "extract":
            rows += _losses(stage, commits[phase])
            if stage != "pack":
                rows.append(FunnelRow(stage, None, commits[phase].total("rows_out")))
    if packed := commits["pack"]:
        rows.append(FunnelRow("pack", None, packed.total("result.tokens"), "tokens"))
        rows.append(FunnelRow("pack", None, packed.total("rows_out"), "rows"))
        if held_out := packed.total("result.held_out_tokens"):
            rows.append(FunnelRow("pack", None, held_out, "held-out tokens"))
    return rows


def _losses(stage: str, commits: Commits) -> list[FunnelRow]:
    counts = commits.counts()
    del counts["kept"]
    return [
        FunnelRow(stage, rule, count)
        for rule, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    ]


def stage_bases(rows: Sequence[FunnelRow]) -> dict[str, int]:
    """What each stage started with: the count of the last point before its losses."""
    bases: dict[str, int] = {}
    last = 0
    for row in rows:
        if row.rule is None:
            last = row.count
        bases.setdefault(row.stage, last)
    return bases
