"""What each part of a run costs, measured: the input of docs/cost.md and of benchmarks/simulate.py.

    python -m benchmarks.costs [DATA] [--part NAME ...]      all parts: 25 minutes on one core

Every part replaces its own entry of benchmarks/costs.json, with the date and the machine. Seconds are
of CPU unless they are called wall, so that other work on the machine changes them little.

reading   gunzip and framing of the real WARC files: what no pipeline over WARC can avoid
recipes   the stages of three recipes on 2,240 pages (`units.in_process`, models and imports loaded before)
steps     the functions that extract calls for these pages, with engine "blocks"
names     entity recognition, on every twentieth page
dedup     the phases of dedup on a million documents that are keys only (`benchmarks.dedup_scale`)
requests  what a run on S3 sends, by phase, counted in front of a local S3 server
loads     processes that import and load what a worker does, and then end
dispatch  the driver's own CPU for units that do nothing
"""

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.dedup_scale import _generate, _ours
from benchmarks.dispatch import empty
from benchmarks.extraction_steps import bare_steps
from benchmarks.pages import Page, deal, read_pages
from benchmarks.pipeline import Silent
from benchmarks.watch import SPAWN, peak_bytes, watched
from pipeline.config.load import load
from pipeline.config.sections import Config
from pipeline.engine.dispatch import on_ray
from pipeline.engine.units import PhaseWork, Resources, in_process
from pipeline.run import results
from pipeline.run.execute import execute
from pipeline.run.phases import extract_plan
from pipeline.run.state import read_state
from stages.dedup.config import DedupConfig
from stages.read.warc import ReadStats, read_records
from stages.storage.ledger import Store, Unit

ROOT = Path(__file__).parents[1]
FIGURES = Path(__file__).with_name("costs.json")
MODELS = (
    "refine.filters=['perplexity', 'quality']",
    f"perplexity.model={ROOT}/models/wiki-en.5gram.bin",
    "perplexity.perplexity=[0.0, 8000.0]",
    f"quality.model={ROOT}/models/quality-en.ftz",
    "quality.score=[0.5, 1.0]",
)
RECIPES: dict[str, tuple[str, tuple[str, ...]]] = {
    "web": ("configs/web.toml", ()),
    "web_models": ("configs/web.toml", MODELS),
    "trafilatura": ("configs/commoncrawl.toml", ()),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path(os.environ.get("GRISTMILL_DATA", ROOT.parent / "shared" / "data"))
    parser.add_argument("data", type=Path, nargs="?", default=default)
    parser.add_argument("--part", choices=PARTS, action="append", help="default: all")
    arguments = parser.parse_args()
    for name in arguments.part or PARTS:
        with tempfile.TemporaryDirectory(prefix="gristmill-costs-") as folder:
            load_average = os.getloadavg()[0]
            figures = PARTS[name](arguments.data, Path(folder))
        record(name, figures, load_average)
        print(json.dumps({name: figures}, indent=1), flush=True)


def record(name: str, figures: dict[str, Any], load_average: float) -> None:
    """Replace one part of the figures."""
    known = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    conditions = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {_processor()}, Python {platform.python_version()}",
        "load_average": round(load_average, 2),
    }
    known[name] = conditions | figures
    ordered = {part: known[part] for part in dict.fromkeys([*PARTS, *known]) if part in known}
    FIGURES.write_text(json.dumps(ordered, indent=1) + "\n")


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((x.partition(": ")[2] for x in lines if x.startswith("model name")), "unknown")


# --- text -----------------------------------------------------------------------------------------


def reading(data: Path, folder: Path) -> dict[str, Any]:
    """Three rounds over the web pages; bytes of the files, of payloads, and pages are of one."""
    files = sorted((data / "warc" / "web").glob("*.warc.gz"))
    rounds, payload, pages = 3, 0, 0
    start = time.process_time()
    for _ in range(rounds):
        payload = pages = 0
        for file in files:
            for record in read_records(str(file), max_payload_bytes=10**8, stats=ReadStats()):
                if record.skipped is None:
                    pages, payload = pages + 1, payload + len(record.payload)
    seconds = (time.process_time() - start) / rounds
    return {
        "files": len(files),
        "gzip_bytes": sum(file.stat().st_size for file in files),
        "payload_bytes": payload,
        "pages": pages,
        "seconds": round(seconds, 3),
    }


def recipes(data: Path, folder: Path) -> dict[str, Any]:
    """Seconds of each stage, and what passed between the stages."""
    pages = list(read_pages(data))
    deal(pages, folder / "pages", copies=1)
    payload = sum(len(page.html) for page in pages)
    measured: dict[str, Any] = {"pages": len(pages), "payload_bytes": payload}
    for name in RECIPES:
        with SPAWN.Pool(1) as pool:  # a recipe after another would find its models loaded
            measured[name] = pool.apply(_recipe, (name, folder))
    return measured


def _recipe(name: str, folder: Path) -> dict[str, Any]:
    first = f"{ROOT}/samples/sqlite3-doc.warc.gz"
    for paths, run in ((first, "first"), (f"{folder}/pages/*.warc.gz", name)):
        config = _config(name, paths, str(folder / "runs" / name / run))
        outcome = execute(config, Silent(), in_process)
        if outcome.failed:
            raise SystemExit(f"units failed: {outcome.failed}")
    return _stages(config.run.directory) | {"extract_plan": config.extract.engine}


def _config(name: str, paths: str, directory: str) -> Config:
    file, overrides = RECIPES[name]
    ours = [f"input.paths=['{paths}']", f"run.directory={directory}"]
    return load(ROOT / file, [*ours, *overrides])


def _stages(run: str) -> dict[str, Any]:
    commits = results.all_commits(run, read_state(run))
    seconds: Counter[str] = Counter()
    for phase, of in commits.items():
        seconds[phase.split()[0]] += sum(c.cpu_seconds for c in of)
    counts: Counter[str] = Counter()
    for commit in commits["extract"]:
        counts.update(commit.counts)
    gated = sum(n for rule, n in counts.items() if rule.split(".")[0] in ("gate", "warc", "url"))
    return {
        "seconds": {stage: round(s, 2) for stage, s in seconds.items()},
        "pages_extracted": sum(counts.values()) - gated,
        "documents": counts["kept"],
        "characters": sum(c.result.chars_out for c in commits["extract"]),
        "documents_refined": sum(c.rows_in for c in commits["refine"]),
        "documents_packed": sum(c.rows_in for c in commits["pack"]),
        "tokens": sum(c.result.tokens + c.result.held_out_tokens for c in commits["pack"]),
        "bytes": {
            "documents": sum(c.output().bytes for c in commits["extract"]),
            "corpus": sum(c.output("corpus").bytes for c in commits["refine"]),
            "shards": sum(o.bytes for c in commits["pack"] for o in c.outputs),
        },
    }


def steps(data: Path, folder: Path) -> dict[str, Any]:
    """Seconds of each step for all pages, in loops of its own, without the child process."""
    pages: list[Page] = list(read_pages(data))
    warc = folder / "pages.warc.gz"
    warc.write_bytes(b"".join(page.member for page in pages))
    plan = extract_plan(_config("web", str(warc), str(folder / "run")))
    return {"seconds": {name: round(s, 3) for name, s in bare_steps(warc, plan).items()}}


def names(data: Path, folder: Path) -> dict[str, Any]:
    """Entity recognition by the English model."""
    deal(list(read_pages(data))[::20], folder / "pages", copies=1)
    config = load(
        ROOT / "configs" / "web.toml",
        [
            f"input.paths=['{folder}/pages/*.warc.gz']",
            f"run.directory={folder}/run",
            "ner.enabled=true",
        ],
    )
    execute(config, Silent(), in_process)
    commits = results.all_commits(config.run.directory, read_state(config.run.directory))
    # the first unit loads the model
    counted = commits["refine ner"][1:]
    return {
        "seconds": round(sum(c.cpu_seconds for c in counted), 2),
        "characters": sum(c.result.chars_out for c in counted),
        "documents": sum(c.rows_in for c in counted),
    }


def dedup(data: Path, folder: Path) -> dict[str, Any]:
    """Seconds, rows and units by phase; rows are of keys, edges or documents."""
    documents, per_unit = 1_000_000, 250_000
    watched(_generate, folder, documents, per_unit, 1)
    config = DedupConfig(documents_per_unit=per_unit, partition_bytes=32_000_000)
    (costs, (edges, _), _), _ = watched(_ours, folder, config, 1)
    return {
        "documents": documents,
        "edges": edges,
        "phases": {
            c.name: {"seconds": round(c.cpu, 3), "rows": c.rows, "units": c.units} for c in costs
        },
    }


# --- the store ------------------------------------------------------------------------------------


def requests(data: Path, folder: Path) -> dict[str, Any]:
    """Requests by phase and kind of two runs on a local S3 server, over 4 and over all 8 files of the
    quickstart: what a unit sends, and what it sends for each part that it reads.
    """
    files = sorted((ROOT / "samples").glob("*.warc.gz"))
    counted = {}
    for number in (len(files) // 2, len(files)):
        (folder / str(number)).mkdir()
        counted[number] = _requests(files[:number], folder / str(number))
    return {"runs": counted}


def _requests(files: list[Path], folder: Path) -> dict[str, Any]:
    from tests.support.s3 import FaultyProxy, s3_process

    seen: Counter[tuple[str, str]] = Counter()
    phase = "driver"

    class Watch(Silent):
        def begin(self, name: str, **about: Any) -> None:
            nonlocal phase
            phase = name

        def end(self, name: str) -> None:
            nonlocal phase
            phase = "driver"

    def count(number: int, method: str, path: str) -> None:
        is_listing = method == "GET" and "list-type" in path
        seen[phase, "LIST" if is_listing else method] += 1

    with s3_process(folder) as (_, endpoint), _s3_at(endpoint):
        proxy = FaultyProxy(endpoint, count)
        _fill(endpoint, files)
        with _s3_at(f"http://127.0.0.1:{proxy.server_port}"):
            config = load(
                ROOT / "configs" / "web.toml",
                ["input.paths=['s3://runs/in/*.warc.gz']", "run.directory=s3://runs/out"],
            )
            execute(config, Watch(), in_process)
            sent = dict(seen)
            commits = results.all_commits(config.run.directory, read_state(config.run.directory))
        proxy.shutdown()
    by_phase: dict[str, dict[str, int]] = {}
    for (name, kind), number in sorted(sent.items()):
        by_phase.setdefault(name, {})[kind] = number
    return {"requests": by_phase, "units": {name: len(of) for name, of in commits.items() if of}}


@contextmanager
def _s3_at(endpoint: str) -> Any:
    import s3fs

    ours = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = dict(os.environ)
    os.environ.update(ours)
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        s3fs.S3FileSystem.clear_instance_cache()


def _fill(endpoint: str, files: list[Path]) -> None:
    import s3fs

    store = s3fs.S3FileSystem()
    store.mkdir("runs")
    for file in files:
        store.put_file(str(file), f"runs/in/{file.name}")


# --- processes ------------------------------------------------------------------------------------


def loads(data: Path, folder: Path) -> dict[str, Any]:
    """Seconds of a process that imports what a worker of a phase imports, and loads its models."""
    calls = {
        "extract": "import ray, stages.extract.extract, stages.extract.extractor as e; "
        "from stages.extract.blocks.model import load_extractor; load_extractor(''); "
        "from filters.language import Language; Language().guess('a text'); import scipy.stats",
        "refine": "import ray, stages.refine.refine; from filters.pii.scrub import Pii; "
        "Pii().scrub('call +1 202 555 0175 or write to a@example.org')",
        "pack": "import ray, stages.pack.pack",
    }
    seconds = {}
    for name, code in calls.items():
        before = os.times()
        subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)
        after = os.times()
        spent = after.children_user + after.children_system
        seconds[name] = round(spent - before.children_user - before.children_system, 2)
    return {"seconds": seconds}


def dispatch(data: Path, folder: Path) -> dict[str, Any]:
    """The driver's CPU and memory, by units and by tasks that run at once."""
    measured = []
    for slots, units in ((2, 500), (2, 2000), (2, 8000), (16, 2000)):
        with SPAWN.Pool(1) as pool:
            measured.append(pool.apply(_dispatch, (slots, units, str(folder))))
    return {"plans": measured}


def _dispatch(slots: int, units: int, folder: str) -> dict[str, Any]:
    """Empty units. The cluster has more processors than the machine: tasks only wait."""
    import ray

    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    ray.init(address="local", num_cpus=slots, include_dashboard=False, log_to_driver=False)
    todo = [Unit(f"{n:06d}", "same", None) for n in range(units)]
    store = Store(f"{folder}/{slots}-{units}")
    work = PhaseWork(empty, None, store, 3, "0")
    run_units: Callable[..., Any] = on_ray()
    cpu = [time.process_time()]
    wall, first, base = time.monotonic(), 0.0, peak_bytes()
    for _ in run_units("empty", work, todo, Resources(1.0, 1_000_000)):
        if not first:
            first = time.monotonic() - wall
            cpu.append(time.process_time())
    cpu.append(time.process_time())
    wall = time.monotonic() - wall
    ray.shutdown()
    shutil.rmtree(store.root)
    return {
        "slots": slots,
        "units": units,
        "wall_seconds": round(wall, 1),
        "first_outcome_wall_seconds": round(first, 1),
        "first_outcome_seconds": round(cpu[1] - cpu[0], 2),
        "driver_seconds": round(cpu[-1] - cpu[0], 2),
        "driver_bytes_before": base,
        "driver_bytes": peak_bytes(),
    }


PARTS: dict[str, Callable[[Path, Path], dict[str, Any]]] = {
    "reading": reading,
    "recipes": recipes,
    "steps": steps,
    "names": names,
    "dedup": dedup,
    "requests": requests,
    "loads": loads,
    "dispatch": dispatch,
}

if __name__ == "__main__":
    main()
