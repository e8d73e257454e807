"""The quickstart on two sample files: its configuration, progress, and the bytes it publishes."""

from pathlib import Path

from pipeline.config.load import load
from tests.support.paths import ROOT


class RecordedProgress:
    """Progress that remembers which units ran."""

    def __init__(self):
        self.ran = {}

    def begin(self, phase, *, run, units, done):
        self.ran[phase] = []

    def advance(self, phase, done):
        self.ran[phase].append(done.unit)

    def end(self, phase):
        pass

    def stages(self):
        return {phase.split()[0] for phase, units in self.ran.items() if units}


def quickstart_config(folder, *overrides, samples="{debian-handbook,debian-handbook-translations}"):
    names = [f'"{ROOT}/samples/{n}.warc.gz"' for n in samples.strip("{}").split(",")]
    fixed = [
        f"run.directory={folder}",
        f"input.paths=[{', '.join(names)}]",
        "extract.engine=resiliparse",
        "pack.seq_len=512",
    ]
    fixed += [
        f"perplexity.model={ROOT}/models/wiki-en.5gram.bin",
        f"quality.model={ROOT}/models/quality-en.ftz",
    ]
    return load(ROOT / "configs" / "quickstart.toml", [*fixed, *overrides])


def bytes_of(generation):
    """Every file of a generation by name; what two runs must agree on."""
    folder = Path(generation)
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }
