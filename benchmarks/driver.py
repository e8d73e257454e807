"""What a run costs its driver: seconds and memory to list, plan and show a run of N units.

    python -m benchmarks.driver [--units 10000 100000] [--loose 1000] [--s3] [--dedup]

The run is made up: the real planner lists the units of extract, dedup, refine and pack for N inputs
at made-up addresses, and each unit gets a commit like those of a Common Crawl file (about 2,400
bytes as JSON: 30 reasons, 60 languages). Commits are sealed as a run leaves them, but for the newest
`--loose`, which are files of their own. Nothing is extracted. `--s3` keeps the run on a local S3
server (moto) and counts requests. Each figure comes from a process of its own, which prints it:

    fill N ROOT          seconds to plan the run, make the commits and seal them
    repeat N ROOT        repeat the first segment of extract and refine under other names, up to N
                         units: faster than `fill`, enough for `commits` and `status`
    commits ROOT         Store.commits() of extract
    plan ROOT            Run.list_phase of every phase, as `gristmill run` does of a run that is done
    status ROOT          run_status(): `gristmill status`
    inputs ROOT          list_inputs() and extend_list()

For other benchmarks: `fill(root, units)` makes such a run, `measure(what, root)` gives a figure's
lines, as (name, value, unit).
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.config.load import load
from pipeline.config.sections import Config
from pipeline.run.execute import Run
from pipeline.run.inputs import extend_list
from pipeline.run.phases import PHASES, PhaseSpec
from pipeline.run.state import write_state
from pipeline.run.status import run_status
from stages.dedup.keep import KeepResult
from stages.dedup.keys import KeysResult
from stages.extract.extract import ExtractResult
from stages.pack.pack import PackResult
from stages.refine.refine import RefineResult
from stages.storage import ledger
from stages.storage.files import names_in, open_fs, open_parquet, remove_many, write_atomically
from stages.storage.ledger import Commit, Output, Unit
from stages.storage.parts import unit_name
from tests.support.s3 import s3_process

# S3 Standard in us-east-1, November 2026, in dollars per request; DELETE is free
PRICES = {"LIST": 5e-6, "PUT": 5e-6, "GET": 4e-7, "HEAD": 4e-7, "DELETE": 0.0}
_REQUESTS = {
    **{"list_objects_v2": "LIST", "put_object": "PUT", "get_object": "GET"},
    **{"head_object": "HEAD", "delete_object": "DELETE", "delete_objects": "DELETE"},
}
_REASONS = [f"gopher_repetition.duplicate_{n}gram_char_ratio" for n in range(30)]
_LANGUAGES = [a + b for a in "abcdef" for b in "abcdefghij"]


class Figure(NamedTuple):
    """A line of output."""

    name: str
    value: float
    unit: str


# --- a run that was never executed ----------------------------------------------------------------


def configure(root: str, listing: Path, *, dedup: bool) -> Config:
    """The configuration of the run: no models, which would have to be there."""
    return load(
        None,
        [
            f"run.directory={root}",
            f"input.paths=['{listing}']",
            "input.base_uri=https://data.commoncrawl.org",
            "extract.filters=[]",
            "refine.filters=[]",
            f"dedup.enabled={str(dedup).lower()}",
        ],
    )


def fill(root: str, units: int, *, loose: int = 1000, dedup: bool = False) -> None:
    """Make a run of `units` inputs of which all units are done."""
    folder = Path(tempfile.gettempdir()) / f"gristmill-driver-{units}"
    folder.mkdir(exist_ok=True)
    listing = folder / "warc.paths"
    name = "crawl-data/CC-MAIN-2026-43/segments/17600000{0:05d}.42/warc/CC-MAIN-2026{0:010d}-2026{0:010d}-{0:05d}.warc.gz"
    listing.write_text("".join(f"{name.format(n)}\n" for n in range(units)))
    config = configure(root, listing, dedup=dedup)
    run = Run(config)
    write_atomically(f"{root}/driver.json", json.dumps([str(listing), dedup]).encode())
    inputs = run.inputs(extend=True)
    for spec in PHASES:
        phase = run.list_phase(spec, inputs)
        draw = random.Random(spec.name)
        pending = phase.pending
        sealed = max(0, len(pending) - loose)
        for first in range(0, sealed, ledger.SEGMENT):
            chosen = pending[first : min(sealed, first + ledger.SEGMENT)]
            segment = phase.store.seal([commit(spec, unit, draw) for unit in chosen])
            phase.commits.replace_loose(segment)
        for unit in pending[sealed:]:
            last = commit(spec, unit, draw)
            phase.store.commit(last)
            phase.commits.add(last)
    write_state(root, run.state().at_work(stage="done"))


def repeat(root: str, units: int) -> None:
    """Repeat the first segment of extract and refine under other names, up to `units` units.

    The run can be read then, but not planned: paths and fingerprints are those of the first units.
    """
    run = _run(root)
    for store in (run.store("extract"), run.store("refine")):
        with open_parquet(store.uri("sealed", "000000.parquet")) as file:
            table = file.read()
        prints = table["fingerprint"].to_pylist()
        rest = pc.utf8_slice_codeunits(table["record"], len('{"unit":"000000"'))
        listed = [Unit(unit_name(n), prints[n % len(prints)], None) for n in range(units)]
        for number in range(1, units // len(table)):
            chosen = listed[number * len(table) : (number + 1) * len(table)]
            names = pa.array([unit.name for unit in chosen])
            heads = pc.binary_join_element_wise('{"unit":"', names, '"', "")
            records = pc.binary_join_element_wise(heads, rest.combine_chunks(), "")
            copy = table.set_column(0, "unit", names)
            copy = copy.set_column(copy.schema.get_field_index("record"), "record", records)
            sink = pa.BufferOutputStream()
            pq.write_table(copy, sink, compression="zstd", row_group_size=1000)
            write_atomically(store.uri("sealed", f"{number:06d}.parquet"), sink.getvalue())
        remove_many([store.uri("commits", name) for name in names_in(store.uri("commits"))])
        store.list_units(listed)


def commit(spec: PhaseSpec, unit: Unit, draw: random.Random) -> Commit:
    """A commit of a unit like one of a Common Crawl file."""
    made = Commit(unit.name, unit.fingerprint, finished=1.79e9 + draw.random() * 1e6)
    made.seconds, made.cpu_seconds = draw.uniform(400, 900), draw.uniform(400, 900)
    made.rows_in, made.rows_out = 45_000, 9_000
    made.outputs = [_output(path, draw) for path in _paths(spec, unit)]
    made.result = _result(spec, draw)
    if spec.in_funnel:
        made.counts = {reason: draw.randrange(2000) for reason in _REASONS} | {"kept": 9_000}
    return made


def _paths(spec: PhaseSpec, unit: Unit) -> list[str]:
    if spec.name == "dedup keep":
        return [f"keep/{part.unit}.parquet" for part in unit.task.parts]
    kinds = {"extract": ["documents"], "refine": ["rejected", "corpus"]}
    return [f"{kind}/{unit.name}.parquet" for kind in kinds.get(spec.name, ["parts"])]


def _output(path: str, draw: random.Random) -> Output:
    return Output(path, draw.randrange(10**8), f"{draw.getrandbits(256):064x}")


def _result(spec: PhaseSpec, draw: random.Random) -> Any:
    tallies = {"quality.likeliest": {"hq": [draw.randrange(9000), 0], "cc": [9, 1]}}
    if spec.result is ExtractResult:
        languages = {name: draw.randrange(9000) for name in _LANGUAGES}
        return ExtractResult(10**9, languages=languages, tallies=tallies)
    if spec.result is RefineResult:
        return RefineResult(10**7, {"EMAIL_ADDRESS": draw.randrange(900)}, tallies)
    known = {KeysResult: KeysResult(10**7, "k"), KeepResult: KeepResult(), PackResult: PackResult()}
    return known.get(spec.result) if spec.result in known else spec.result and spec.result()


# --- figures --------------------------------------------------------------------------------------


def measure(what: str, root: str) -> list[Figure]:
    """Figures of one of the tasks above, measured in this process."""
    with _counted_requests() as requests:
        began, cpu, before = time.monotonic(), time.process_time(), _peak()
        extra = _TASKS[what](root)
    figures = [
        Figure("wall", time.monotonic() - began, "s"),
        Figure("CPU", time.process_time() - cpu, "s"),
        Figure("peak memory", _peak(), "MB"),
        Figure("memory at its start", before, "MB"),
        *extra,
    ]
    if requests:
        figures += [Figure(f"{kind} requests", n, "") for kind, n in requests.items()]
        cost = sum(PRICES[kind] * n for kind, n in requests.items())
        figures.append(Figure("requests at S3's prices", cost, "$"))
    return [Figure(f"{what}: {name}", value, unit) for name, value, unit in figures]


def _run(root: str) -> Run:
    fs, path = open_fs(f"{root}/driver.json")
    listing, dedup = json.loads(fs.cat_file(path))
    return Run(configure(root, Path(listing), dedup=dedup))


def _read_commits(root: str) -> list[Figure]:
    return [Figure("commits", len(_run(root).store("extract").commits()), "")]


def _plan(root: str) -> list[Figure]:
    run = _run(root)
    inputs, figures = run.inputs(extend=True), []
    for spec in PHASES:
        began, cpu = time.monotonic(), time.process_time()
        phase = run.list_phase(spec, inputs)
        if pending := len(phase.pending):
            raise SystemExit(f"{spec.name}: {pending} units are pending")
        if phase.units:
            figures += [
                Figure(f"{spec.name}, wall", time.monotonic() - began, "s"),
                Figure(f"{spec.name}, CPU", time.process_time() - cpu, "s"),
                Figure(f"peak memory after {spec.name}", _peak(), "MB"),
            ]
    return figures


def _status(root: str) -> list[Figure]:
    status = run_status(root)
    return [Figure("units", sum(phase.done for phase in status.phases.values()), "")]


def _inputs(root: str) -> list[Figure]:
    inputs = _run(root).inputs(extend=False)
    extend_list(root, inputs)
    return [Figure("inputs", len(inputs), "")]


_TASKS: dict[str, Callable[[str], list[Figure]]] = {
    "inputs": _inputs,
    "commits": _read_commits,
    "plan": _plan,
    "status": _status,
}


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


@contextmanager
def _counted_requests() -> Iterator[Counter[str]]:
    """Count the requests that s3fs sends, by kind."""
    requests: Counter[str] = Counter()
    try:
        from s3fs import S3FileSystem
    except ImportError:
        yield requests
        return
    call = S3FileSystem._call_s3

    async def counted(self: Any, method: str, *args: Any, **options: Any) -> Any:
        requests[_REQUESTS.get(method, "GET")] += 1
        return await call(self, method, *args, **options)

    S3FileSystem._call_s3 = counted
    try:
        yield requests
    finally:
        S3FileSystem._call_s3 = call


# --- command line ---------------------------------------------------------------------------------


def _in_process(*task: str) -> None:
    """Print the figures of a task from a process of its own."""
    subprocess.run([sys.executable, "-m", "benchmarks.driver", *task], check=True)


def _all(units: Sequence[int], root: str, *options: str) -> None:
    for count in units:
        run = f"{root}/{count}"
        print(f"{count:,} units, {run}", flush=True)
        _in_process("fill", str(count), run, *options)
        for what in _TASKS:
            _in_process(what, run)


def _print(figures: Sequence[Figure]) -> None:
    for name, value, unit in figures:
        shown = f"{value:,.6f}" if unit == "$" else f"{value:,.2f}".removesuffix(".00")
        print(f"{name:<50} {shown:>14} {unit}", flush=True)


def main() -> None:
    """Print a line per figure."""
    parser = argparse.ArgumentParser()
    parser.add_argument("task", nargs="*", help="of a run that is there (see above)")
    parser.add_argument("--units", nargs="+", type=int, default=[10_000, 100_000])
    parser.add_argument("--loose", type=int, default=1000)
    parser.add_argument("--s3", action="store_true")
    parser.add_argument("--dedup", action="store_true")
    arguments = parser.parse_args()
    options = ["--loose", str(arguments.loose), *(["--dedup"] if arguments.dedup else [])]
    match arguments.task:
        case ["fill", count, root]:
            began, cpu = time.monotonic(), time.process_time()
            fill(root, int(count), loose=arguments.loose, dedup=arguments.dedup)
            wall, cpu = time.monotonic() - began, time.process_time() - cpu
            _print([Figure("fill: wall", wall, "s"), Figure("fill: CPU", cpu, "s")])
        case ["repeat", count, root]:
            repeat(root, int(count))
        case [what, root]:
            _print(measure(what, root))
        case _:
            with tempfile.TemporaryDirectory() as folder:
                if not arguments.s3:
                    _all(arguments.units, folder, *options)
                    return
                with s3_process(Path(folder)) as (_, endpoint):
                    os.environ |= {
                        "AWS_ENDPOINT_URL": endpoint,
                        "AWS_ACCESS_KEY_ID": "test",
                        "AWS_SECRET_ACCESS_KEY": "test",
                        "AWS_DEFAULT_REGION": "us-east-1",
                    }
                    open_fs("s3://driver")[0].mkdir("driver")
                    _all(arguments.units, "s3://driver", *options)


if __name__ == "__main__":
    main()
