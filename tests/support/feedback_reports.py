"""Feedback reports and summaries with plausible values."""

from dataclasses import replace

from trainer.telemetry.feedback import (
    Health,
    Report,
    Source,
    Summary,
)

NOW = 1_800_000_000.0


def report(**changed) -> Report:
    base = Report(
        state="running",
        steps=10,
        tokens_total=1000,
        tokens_processed=1200,
        tokens_per_second=40.0,
        tokens_per_second_without_stalls=50.0,
        data_wait_share=0.2,
        mfu=None,
        goodput=0.8,
        wall_seconds=30.0,
        restarts=1,
        sources={"cc": Source("gen-0002", {"gen-0001": 90, "gen-0002": 10}, 1000, 3.5)},
        health=Health(1 << 30, 1 << 34, 0.97, 61, 640.5),
        budget=None,
    )
    return replace(base, **changed)


def summary(
    trainer="a",
    *,
    sequence=1,
    modified=NOW,
    time="2026-01-01T00:00:00+00:00",
    incarnation="i",
    **changed,
) -> Summary:
    return Summary(trainer, incarnation, sequence, time, 1.0, 30.0, report(**changed), modified)
