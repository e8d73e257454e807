"""What does the engine cost, and how do we compare with the peer? The whole main job on 2,240 real
pages in 8 files.

    python -m benchmarks.pipeline [DATA] [--engine trafilatura|resiliparse] [--peer-python PY
    --peer-script datatrove_fineweb.py]

Prints CPU seconds and wall seconds per stage of `gristmill run` (its driver, Ray, all workers), of
the same calls made in one bare process without Ray, and their ratio; then the peer on the same
files, the ratio of wall times, and which documents either kept and the other did not, with our
reason. The peer is datatrove 0.10.1 in its own environment with the shape of its FineWeb recipe; it
does no perplexity, quality model or tokenising, so neither does the run that is compared with it.
"""

import argparse
import gzip
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from benchmarks.watch import cpu_of_descendants
from pipeline.config.load import load
from pipeline.config.sections import Config
from pipeline.engine.units import UnitOutcome, in_process
from pipeline.inspect import export
from pipeline.run import results
from pipeline.run.execute import execute
from pipeline.run.state import read_state
from stages.storage.ledger import Commit

ROOT = Path(__file__).parents[1]
FILES = 8


def split_pages(data: Path, folder: Path, *, copies: int) -> int:
    """The three WARCs of DATA/warc/web dealt into 8 files, member by member, `copies` times over;
    the number of pages.
    """
    from fastwarc import ArchiveIterator, WarcRecordType

    folder.mkdir(parents=True)
    outputs = [open(folder / f"part-{n}.warc.gz", "wb") for n in range(FILES)]
    pages = 0
    for name in ("wcxb-500", "trafilatura-eval", "multilang-docs"):
        raw = (data / "warc" / "web" / f"{name}.warc.gz").read_bytes()
        records = ArchiveIterator(
            open(data / "warc" / "web" / f"{name}.warc.gz", "rb"), parse_http=False
        )
        offsets = [(r.stream_pos, r.record_type == WarcRecordType.response) for r in records]
        for (start, is_page), (end, _) in zip(
            offsets, [*offsets[1:], (len(raw), False)], strict=True
        ):
            if is_page:
                outputs[pages % FILES].write(raw[start:end])
                pages += 1
    for output in outputs:
        output.close()
    for copy in range(1, copies):
        for n in range(FILES):
            shutil.copy(folder / f"part-{n}.warc.gz", folder / f"part-{n}-{copy}.warc.gz")
    return pages * copies


def settings(pages: Path, run: Path, name: str) -> Config:
    """The benchmark's configuration: FineWeb's recipe (commoncrawl.toml) with one of the engines."""
    return load(
        ROOT / "configs" / "commoncrawl.toml",
        [f'input.paths=["{pages}/*.warc.gz"]', f"run.directory={run}", f"extract.engine={name}"],
    )


def with_ray(config: Config) -> tuple[float, float]:
    """Wall and CPU seconds of the command as a user runs it: the driver, Ray's own processes and
    every worker.
    """
    command = [sys.executable, "-m", "pipeline", "run", str(ROOT / "configs" / "commoncrawl.toml")]
    command += [f'input.paths=["{config.input.paths[0]}"]', f"run.directory={config.run.directory}"]
    command += [f"extract.engine={config.extract.engine}"]
    # GNU time cannot see Ray's daemons; a cgroup-free way is to sum what /proc says of the
    # session's processes
    start = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
    seen: dict[int, float] = {}
    while process.poll() is None:
        seen |= cpu_of_descendants(process.pid)
        time.sleep(0.1)
    if process.returncode:
        raise SystemExit(f"the run failed with exit code {process.returncode}")
    return time.monotonic() - start, sum(seen.values())


def without_ray(config: Config) -> dict[str, float]:
    """CPU seconds per phase of the same units, one after the other in this process and its
    extractor child.
    """
    outcome = execute(config, Silent(), in_process)
    if outcome.failed:
        raise SystemExit(f"units failed: {outcome.failed}")
    return {
        phase: sum(c.cpu_seconds for c in commits) for phase, commits in commits_of(config).items()
    }


def commits_of(config: Config) -> dict[str, list[Commit]]:
    """Commits per phase of a finished run."""
    return results.all_commits(config.run.directory, read_state(config.run.directory))


class Silent:
    """Progress that nobody watches."""

    def begin(self, phase: str, *, run: str, units: int, done: Sequence[Commit]) -> None: ...
    def advance(self, phase: str, outcome: UnitOutcome) -> None: ...
    def end(self, phase: str) -> None: ...


def peer(python: str, script: str, pages: Path, folder: Path, data: Path) -> tuple[float, set[str]]:
    """Wall seconds of the peer on the same files, and the URLs it kept."""
    start = time.monotonic()
    command = [python, script, str(pages), str(folder), str(data / "models" / "lid.176.ftz"), "2"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    seconds = time.monotonic() - start
    kept = set()
    for path in (folder / "final").glob("*.gz"):
        with gzip.open(path, "rt") as lines:
            kept |= {json.loads(line)["metadata"]["url"] for line in lines}
    return seconds, kept


def compare(run: str, theirs: set[str]) -> None:
    """Which documents were kept by both, by one only, and our reason for those that only the peer
    kept.
    """
    ours = {u for t in export.tables(run, "corpus") for u in t["url"].to_pylist()}
    print(
        f"documents kept by both: {len(ours & theirs)}, only here: {len(ours - theirs)}, only by the peer: {len(theirs - ours)}"
    )
    reasons: Counter[str] = Counter()
    for table in export.tables(run, "documents"):
        for row in table.select(["url", "rejected_by"]).to_pylist():
            if row["url"] in theirs - ours:
                reasons[row["rejected_by"] or "dedup: another copy kept"] += 1
    print(f"our reasons for those only the peer kept: {dict(reasons.most_common())}")


def main() -> None:
    """Print a line per figure."""
    parser = argparse.ArgumentParser()
    parser.add_argument("data", nargs="?", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--engine", choices=["trafilatura", "resiliparse"], action="append")
    parser.add_argument(
        "--copies",
        type=int,
        default=1,
        help="read the pages so many times: what Ray costs to start matters less",
    )
    parser.add_argument("--peer-python")
    parser.add_argument("--peer-script")
    arguments = parser.parse_args()
    data = arguments.data.resolve()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        count = split_pages(data, folder / "pages", copies=arguments.copies)
        print(f"pages: {count} in {FILES * arguments.copies} files", flush=True)
        runs = {}
        for name in arguments.engine or ["trafilatura", "resiliparse"]:
            config = settings(folder / "pages", folder / f"run-{name}", name)
            wall, cpu = with_ray(config)
            runs[name] = (wall, config.run.directory)
            for phase, commits in commits_of(config).items():
                print(
                    f"{name}: {phase}: {sum(c.cpu_seconds for c in commits):.1f} s of CPU in {len(commits)} units"
                )
            bare = without_ray(settings(folder / "pages", folder / f"bare-{name}", name))
            print(
                f"{name}: with Ray {cpu:.1f} s of CPU, {wall:.1f} s wall, {count / wall:.1f} pages/s"
            )
            print(
                f"{name}: bare process {sum(bare.values()):.1f} s of CPU ({ {k: round(v, 1) for k, v in bare.items()} })"
            )
            print(
                f"{name}: ratio of CPU, with Ray to bare: {cpu / sum(bare.values()):.2f}",
                flush=True,
            )
        if arguments.peer_python:
            seconds, kept = peer(
                arguments.peer_python,
                arguments.peer_script,
                folder / "pages",
                folder / "peer",
                data,
            )
            print(
                f"peer: {seconds:.1f} s wall, {count / seconds:.1f} pages/s, {len(kept)} documents kept"
            )
            for name, (wall, run) in runs.items():
                print(f"{name}: throughput {seconds / wall:.1f} times the peer's")
                compare(run, kept)


if __name__ == "__main__":
    main()
