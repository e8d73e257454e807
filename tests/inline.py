"""A run in this process: what pipeline.run.execute does, with engine.run_one in place of Ray."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from pipeline import engine
from pipeline.config import Config, load
from pipeline.run import Outcome, Phase, Run, _donors, _pid, _publish, _unit_counts
from stages.ledger import Unit


def make_config(folder: Path, inputs: Sequence[Path], *overrides: str) -> Config:
    """A configuration that reads `inputs` into `folder`/run; overrides as on the command line."""
    file = folder / "config.toml"
    paths = json.dumps([str(p) for p in inputs])
    file.write_text(f"[run]\ndirectory = {json.dumps(str(folder / 'run'))}\n[input]\npaths = {paths}\n")
    return load(file, overrides)


def run_inline(config: Config, *, until: str | None = None) -> Outcome:
    """Run every phase and publish, or stop after phase `until`. A failed unit is in the outcome and stops nothing."""
    run = Run(config)
    inputs = run.inputs(extend=True)
    phases: dict[str, Phase] = {}
    failed: dict[str, list[str]] = {}
    run.remember(stage="extract", pid=_pid())
    for name, task in run.tasks.items():
        phase = phases[name] = run.phase(name, phases, inputs)
        run.remember(stage=name, units=_unit_counts(phases))
        plan = dataclasses.replace(task.plan, donors=_donors(run)) if name == "extract" else task.plan
        shipped = engine.Task(task.work, plan, phase.store, config.run.attempts, run.invocation)
        for unit in phase.pending:
            done = engine.run_one(Unit(*json.loads(json.dumps(unit))), shipped)
            if done.commit is not None:
                phase.commits[done.unit] = done.commit
            else:
                failed.setdefault(name, []).append(f"{done.unit}: {done.error}")
        if name == until:
            return Outcome(failed, None)
    published = _publish(run, phases, inputs)
    generation = published.name if published else None
    run.remember(stage="done", units=_unit_counts(phases), generation=generation, pid=None)
    return Outcome(failed, published)
