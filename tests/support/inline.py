"""A run in this process, without Ray."""

import json
from collections.abc import Sequence
from pathlib import Path

from pipeline.config.load import load
from pipeline.config.sections import Config
from pipeline.engine.units import in_process
from pipeline.run.execute import STAGES, Outcome, execute


class Silent:
    """Progress that nobody watches."""

    def begin(self, phase, *, run, units, done):
        pass

    def advance(self, phase, done):
        pass

    def end(self, phase):
        pass


def make_config(folder: Path, inputs: Sequence[Path], *overrides: str) -> Config:
    """A configuration that reads `inputs` into `folder`/run; overrides as on the command line."""
    file = folder / "config.toml"
    paths = json.dumps([str(p) for p in inputs])
    file.write_text(
        f"[run]\ndirectory = {json.dumps(str(folder / 'run'))}\n[input]\npaths = {paths}\n"
    )
    return load(file, overrides)


def run_inline(config: Config, *, until: str | None = None) -> Outcome:
    """Run every stage and publish, or stop after stage `until`. RunFailed as on the command line."""
    outcome = None
    for stage in STAGES[: STAGES.index(until) + 1] if until else (None,):
        outcome = execute(config, Silent(), in_process, only=stage)
    return outcome
