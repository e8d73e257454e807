"""What does the whole job cost, and how do we compare with the peers? On 2,240 real pages, and on
those of them that are English.

    python -m benchmarks.pipeline [DATA] [--copies 3] [--set all|english] [--engine NAME] [--bare]
        [--peer-python PY --peer-script datatrove_fineweb.py]
        [--curator-python PY --curator-script nemo_curator_cpu.py]

Prints wall and CPU seconds of `gristmill run` (its driver, Ray, all workers), per engine of
[extract], and of each peer on the same files; the ratios are at the end. Of all pages our gate
drops many before the expensive extraction; of the English ones it drops next to none. `--bare` adds
the CPU seconds of the same calls made in one process without Ray.

datatrove 0.10.1 runs in the shape of its FineWeb recipe. NeMo Curator 1.4.0 on CPUs, tuned for two
cores, does no dedup, PII or packing. Neither has perplexity or a quality model, and neither has the
run that is compared with them.
"""

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import get_args, get_type_hints

from benchmarks.pages import Page, deal, english, read_pages
from benchmarks.peers import Side, curator, datatrove
from benchmarks.watch import SPAWN, cost_of
from pipeline.config.load import load
from pipeline.engine.units import UnitOutcome, in_process
from pipeline.inspect import export
from pipeline.run import results
from pipeline.run.execute import execute
from pipeline.run.state import read_state
from stages.extract.config import ExtractConfig
from stages.storage.ledger import Commit

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "configs" / "commoncrawl.toml"  # FineWeb's recipe
ENGINES = get_args(get_type_hints(ExtractConfig)["engine"])


def main() -> None:
    """Print a line per figure, then the ratios."""
    arguments = _arguments()
    pages = list(read_pages(arguments.data))
    ratios = []
    for name in arguments.set or ("all", "english"):
        ratios += compare(name, english(pages) if name == "english" else pages, arguments)
    print("\n".join(ratios))


def compare(name: str, pages: Sequence[Page], arguments: argparse.Namespace) -> list[str]:
    """Run every side on a set of pages; the lines of the peers' ratios to ours."""
    ratios, count = [], len(pages) * arguments.copies
    print(f"{name}: {count:,} pages", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        deal(pages, folder / "pages", copies=arguments.copies)
        ours = {}
        for engine in arguments.engine or ENGINES:
            ours[engine] = gristmill(engine, folder)
            show(name, ours[engine], count)
            show_stages(name, ours[engine], folder / engine)
            if arguments.bare:
                show_bare(name, ours[engine], engine, folder)
        for peer in peers(folder, arguments):
            show(name, peer, count)
            for engine, side in ours.items():
                if peer.name == "datatrove":  # Curator has other rules, and no dedup
                    show_differences(name, side, peer, folder / engine)
                ratios.append(f"{name}: {ratio(peer, side)}")
    return ratios


# --- sides ----------------------------------------------------------------------------------------


def gristmill(engine: str, folder: Path) -> Side:
    """The command as a user runs it: its driver, Ray's own processes and all workers."""
    command = [sys.executable, "-m", "pipeline", "run", str(RECIPE)]
    command += settings(folder / "pages", folder / engine, engine)
    cost = cost_of(command, cwd=ROOT, log=folder / f"{engine}.log")
    corpus = export.tables(str(folder / engine), "corpus")
    urls = [url for table in corpus for url in table["url"].to_pylist()]
    return Side(f"gristmill with {engine}", cost, urls)


def settings(pages: Path, run: Path, engine: str) -> list[str]:
    return [
        f'input.paths=["{pages}/*.warc.gz"]',
        f"run.directory={run}",
        f"extract.engine={engine}",
    ]


def bare(engine: str, folder: Path) -> float:
    """CPU seconds of the same units, one after the other in this process and its extractor child."""
    run = folder / f"bare-{engine}"
    outcome = execute(load(RECIPE, settings(folder / "pages", run, engine)), Silent(), in_process)
    if outcome.failed:
        raise SystemExit(f"units failed: {outcome.failed}")
    return sum(cpu_of_stages(run).values())


class Silent:
    """Progress that nobody watches."""

    def begin(self, phase: str, *, run: str, units: int, done: Sequence[Commit]) -> None: ...
    def advance(self, phase: str, outcome: UnitOutcome) -> None: ...
    def end(self, phase: str) -> None: ...


def cpu_of_stages(run: Path) -> dict[str, float]:
    """CPU seconds of the units of a finished run; the phases of dedup are one stage."""
    seconds: dict[str, float] = {}
    for phase, commits in results.all_commits(str(run), read_state(str(run))).items():
        stage = phase.split()[0]
        seconds[stage] = seconds.get(stage, 0) + sum(commit.cpu_seconds for commit in commits)
    return seconds


def peers(folder: Path, arguments: argparse.Namespace) -> Iterator[Side]:
    """The peers that were asked for, one after the other."""
    pages, lid = folder / "pages", arguments.data / "models" / "lid.176.ftz"
    if arguments.peer_python:
        command = arguments.peer_python, arguments.peer_script
        yield datatrove(*command, pages, folder / "datatrove", lid=lid)
    if arguments.curator_python:
        command = arguments.curator_python, arguments.curator_script
        for engine in ("trafilatura", "resiliparse"):
            yield curator(*command, engine, pages, folder / f"curator-{engine}", lid=lid)


# --- figures --------------------------------------------------------------------------------------


def show(pages: str, side: Side, count: int) -> None:
    """The figures that every side has."""
    label = f"{pages}: {side.name}"
    print(f"{label}: {side.cost.wall:.1f} s wall")
    print(f"{label}: {side.cost.cpu:.1f} s of CPU")
    print(f"{label}: {count / side.cost.wall:.1f} pages/s")
    print(f"{label}: {len(side.urls):,} documents written")
    print(f"{label}: load average {side.cost.load:.2f} at the start", flush=True)


def show_stages(pages: str, ours: Side, run: Path) -> None:
    """CPU of our stages, and what belongs to no unit: imports, Ray, planning, the report."""
    stages = cpu_of_stages(run)
    stages["outside of units"] = ours.cost.cpu - sum(stages.values())
    for stage, seconds in stages.items():
        print(f"{pages}: {ours.name}: {stage}: {seconds:.1f} s of CPU", flush=True)


def show_bare(pages: str, ours: Side, engine: str, folder: Path) -> None:
    """Our calls without Ray, in a process that has loaded nothing yet."""
    with ProcessPoolExecutor(1, mp_context=SPAWN) as pool:
        seconds = pool.submit(bare, engine, folder).result()
    label = f"{pages}: {ours.name}"
    print(f"{label}: bare process: {seconds:.1f} s of CPU")
    print(f"{label}: with Ray / bare process: {ours.cost.cpu / seconds:.2f} of CPU", flush=True)


def show_differences(pages: str, ours: Side, peer: Side, run: Path) -> None:
    """Documents that both keep, or one; our reasons for those that only the peer keeps."""
    here, there = set(ours.urls), set(peer.urls)
    label = f"{pages}: {ours.name} and {peer.name}"
    print(f"{label}: {len(here & there)} different documents kept by both")
    print(f"{label}: {len(here - there)} by us only")
    print(f"{label}: {len(there - here)} by the peer only")
    reasons = {}
    for table in export.tables(str(run), "documents"):
        for row in table.select(["url", "rejected_by"]).to_pylist():
            if row["url"] in there - here:
                reasons[row["url"]] = row["rejected_by"] or "dedup: another copy kept"
    counts = Counter(reasons.values()).most_common()
    print(f"{label}: our reasons for those: {dict(counts)}", flush=True)


def ratio(peer: Side, ours: Side) -> str:
    """How many times our time the peer takes."""
    wall, cpu = peer.cost.wall / ours.cost.wall, peer.cost.cpu / ours.cost.cpu
    return f"{peer.name} / {ours.name}: {wall:.2f} of wall time, {cpu:.2f} of CPU"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", nargs="?", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument(
        "--copies", type=int, default=1, help="of each file, so that Ray's start matters less"
    )
    parser.add_argument("--set", choices=["all", "english"], action="append", help="default: both")
    parser.add_argument("--engine", choices=ENGINES, action="append", help="default: all")
    parser.add_argument("--bare", action="store_true", help="our calls in one process too")
    for peer in ("peer", "curator"):
        parser.add_argument(f"--{peer}-python", help="of its environment")
        parser.add_argument(f"--{peer}-script")
    arguments = parser.parse_args()
    arguments.data = arguments.data.resolve()
    return arguments


if __name__ == "__main__":
    main()
