"""Part `peer` of benchmarks.dedup: datatrove's MinHash, all four steps, and `gristmill dedup` on
the same JSONL file.

The documents: WCXB's main texts, documentation pages, Wikipedia's leads; a tenth as many planted
copies of true Jaccard similarity 0.5 to 0.95, and leads repeated with other case and digits. Both:
word 5-grams, 14 bands of 8 rows, a document of each cluster kept. datatrove runs with one worker,
which is one process; ours in one bare process, and as the command, with Ray. The two draw different
permutations and cut words differently, so pairs near the threshold differ by chance: of pairs that
only one of them put together the true similarity is told.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from benchmarks import texts as sources
from benchmarks.watch import MB, Usage, Watch, peak_bytes, watched

ROOT = Path(__file__).parents[1]
MAX_CHARS = 20_000

# run by the peer's Python: FILE FOLDER; prints a line of JSON per step, the last one for all of it
PEER = """
import json, resource, sys, time
from pathlib import Path
file, folder = Path(sys.argv[1]), sys.argv[2]
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter, MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter
from datatrove.utils.hashing import HashConfig
from loguru import logger
logger.remove()
config = MinhashConfig(n_grams=5, num_buckets=14, hashes_per_bucket=8, hash_config=HashConfig(precision=64))

def cpu():
    both = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return sum(u.ru_utime + u.ru_stime for u in both)

def step(name, pipeline, tasks):
    start, before = time.monotonic(), cpu()
    LocalPipelineExecutor(pipeline=pipeline, tasks=tasks, workers=1, logging_dir=f"{folder}/logs/{name}").run()
    print(json.dumps({"step": name, "wall": time.monotonic() - start, "cpu": cpu() - before}), flush=True)

def read():
    return JsonlReader(str(file.parent), glob_pattern=file.name)

step("signatures", [read(), MinhashDedupSignature(f"{folder}/signatures", config=config, language="eng")], 1)
step("buckets", [MinhashDedupBuckets(f"{folder}/signatures", f"{folder}/buckets", config=config)], 14)
step("cluster", [MinhashDedupCluster(f"{folder}/buckets", f"{folder}/remove", config=config, save_cluster_id=True)], 1)
dropped = JsonlWriter(f"{folder}/dropped", output_filename="${rank}.jsonl", compression=None)
filter = MinhashDedupFilter(f"{folder}/remove", exclusion_writer=dropped, load_cluster_ids=True)
step("filter", [read(), filter, JsonlWriter(f"{folder}/kept", output_filename="${rank}.jsonl", compression=None)], 1)
print(json.dumps({"step": "all", "cpu": cpu()}))
"""

Labels = dict[str, int | str]


def peer(data: Path, python: str, count: int) -> None:
    """Costs of both, then how far they agree."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        texts = documents(data, count)
        file = folder / "in" / "documents.jsonl"
        file.parent.mkdir()
        rows = (json.dumps({"id": name, "text": text}) + "\n" for name, text in texts.items())
        file.write_text("".join(rows), "utf-8")
        print(
            f"peer: {len(texts):,} documents, {sum(map(len, texts.values())) / MB:.1f} M characters",
            flush=True,
        )
        theirs = _datatrove(python, file, folder / "peer")
        ours = _bare(file, folder / "bare")
        by_command = _command(file, folder / "command")
        print(
            f"peer: CPU: datatrove {theirs.cpu / ours.cpu:.1f} times ours bare, {theirs.cpu / by_command.cpu:.1f} times with Ray"
        )
        print(
            f"peer: peak memory of a process: datatrove {theirs.peak / ours.peak:.2f} times ours bare"
        )
        compare(texts, _our_result(folder / "bare"), _their_result(folder / "peer"))
        same = _our_result(folder / "bare") == _our_result(folder / "command")
        print(f"peer: ours with Ray and bare: {'the same table' if same else 'TABLES DIFFER'}")


def documents(data: Path, count: int) -> dict[str, str]:
    """Texts by id, shuffled."""
    pages = [t for t in sources.documentation(data) if 200 <= len(t) <= MAX_CHARS]
    rng = sources.seeded("peer", count)
    rng.shuffle(pages)
    planted, repeated = count // 10, count // 40
    leads = sources.leads(data)
    originals = list(
        islice(chain(sources.web_pages(data), leads, pages), count - planted - repeated)
    )
    long = [
        t
        for t in (*sources.web_pages(data), *pages)
        if len(t.split()) >= 100 and len(t) <= MAX_CHARS
    ]
    filler = sorted({word for text in long[:200] for word in text.split()})
    copies = [
        sources.plant(text, 0.5 + 0.45 * rng.random(), filler, rng)
        for text in (long[n] for n in rng.integers(0, len(long), planted))
    ]
    again = [leads[n].upper().replace("1", "2") for n in rng.integers(0, 200, repeated)]
    texts = [*originals, *copies, *again]
    return {
        f"d{n:06d}": texts[place] for n, place in enumerate(rng.permutation(len(texts)).tolist())
    }


# --- runs -----------------------------------------------------------------------------------------


def _datatrove(python: str, file: Path, folder: Path) -> Usage:
    process = subprocess.Popen(
        [python, "-c", PEER, str(file), str(folder)],
        stdout=subprocess.PIPE,
        stderr=open(folder.with_suffix(".log"), "w"),
        text=True,
    )
    watch = Watch(process.pid)
    said, _ = process.communicate()
    used = watch.usage()
    watch.end(kill=False)
    if process.returncode != 0:
        raise SystemExit(
            f"{python}: datatrove failed\n{folder.with_suffix('.log').read_text()[-3000:]}"
        )
    *steps, last = map(json.loads, filter(lambda line: line.startswith("{"), said.splitlines()))
    for step in steps:
        print(
            f"peer: datatrove: {step['step']}: {step['cpu']:.1f} s of CPU, {step['wall']:.1f} s wall"
        )
    used = used._replace(cpu=last["cpu"])  # to the end, which the samples may miss
    _print_run("datatrove, one worker", used)
    return used


def _bare(file: Path, folder: Path) -> Usage:
    (phases, used), _ = watched(_bare_dedup, str(file), str(folder))
    for phase, seconds in phases.items():
        print(f"peer: ours: {phase}: {seconds:.1f} s of CPU")
    _print_run("ours, one bare process", used)
    return used


def _bare_dedup(mark: Callable[[], None], file: str, folder: str) -> tuple[dict[str, float], Usage]:
    from pipeline.engine.units import in_process
    from pipeline.run.dedup_command import configure, dedup_files
    from pipeline.run.results import all_commits
    from pipeline.run.state import read_state

    start = time.monotonic()
    config = configure(
        [file],
        folder,
        text_column="text",
        id_column="id",
        against=[],
        overrides=["dedup.keep_rule=first"],
    )
    result = dedup_files(config, _Silent(), in_process)
    if result.failed:
        raise RuntimeError(f"units failed: {result.failed}")
    times = os.times()
    cpu, peak = (
        times.user + times.system + times.children_user + times.children_system,
        peak_bytes(),
    )
    used = Usage(time.monotonic() - start, cpu, peak, peak)
    commits = all_commits(folder, read_state(folder))
    return {
        phase: sum(c.cpu_seconds for c in done) for phase, done in commits.items() if done
    }, used


def _command(file: Path, folder: Path) -> Usage:
    command = [
        sys.executable,
        "-m",
        "pipeline",
        "dedup",
        str(file),
        "-o",
        str(folder),
        "--set",
        "dedup.keep_rule=first",
    ]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    watch = Watch(process.pid)
    code = process.wait()
    used = watch.usage()
    watch.end(kill=False)
    if code:
        raise SystemExit(f"gristmill dedup failed with exit code {code}")
    _print_run("ours, `gristmill dedup` with Ray and report", used)
    return used


def _print_run(name: str, used: Usage) -> None:
    print(f"peer: {name}: {used.cpu:.1f} s of CPU with its start, {used.wall:.1f} s wall,", end=" ")
    print(f"peak {used.peak / MB:.0f} MB a process, {used.total / MB:.0f} MB in all", flush=True)


class _Silent:
    """Progress that nobody watches."""

    def begin(self, phase: str, *, run: str, units: int, done: Sequence[Any]) -> None: ...
    def advance(self, phase: str, done: Any) -> None: ...
    def end(self, phase: str) -> None: ...


# --- agreement ------------------------------------------------------------------------------------


def _our_result(folder: Path) -> tuple[set[str], Labels]:
    """Ids that stay, and the cluster of every id."""
    table = pq.read_table(folder / "keep.parquet", columns=["id", "cluster_id", "keep"])
    rows = list(zip(*(table[name].to_pylist() for name in table.column_names), strict=True))
    return {name for name, _, keep in rows if keep}, {name: cluster for name, cluster, _ in rows}


def _their_result(folder: Path) -> tuple[set[str], Labels]:
    kept: set[str] = set()
    labels: Labels = {}
    for kind in ("kept", "dropped"):
        for path in (folder / kind).glob("*.jsonl"):
            for row in map(json.loads, path.read_text("utf-8").strip("\n").split("\n")):
                cluster = row["metadata"].get("minhash_cluster_id", -1)
                labels[row["id"]] = row["id"] if cluster == -1 else cluster
                kept |= {row["id"]} if kind == "kept" else set()
    return kept, labels


def compare(
    texts: dict[str, str], ours: tuple[set[str], Labels], theirs: tuple[set[str], Labels]
) -> None:
    """Kept and dropped as a table; clusters as pairs and as the adjusted Rand index."""
    table = Counter((name in ours[0], name in theirs[0]) for name in texts)
    print(
        f"peer: documents kept by both {table[True, True]:,}, dropped by both {table[False, False]:,}, ",
        end="",
    )
    print(
        f"dropped only here {table[False, True]}, only by datatrove {table[True, False]}: ", end=""
    )
    print(f"{(table[True, True] + table[False, False]) / len(texts):.2%} alike")
    members = [
        Counter(Counter(side.values())[side[name]] > 1 for name in texts)[True]
        for side in (ours[1], theirs[1])
    ]
    print(f"peer: documents with a copy: ours {members[0]:,}, datatrove's {members[1]:,}")
    a, b, both = (
        _pairs(labels)
        for labels in (
            ours[1].values(),
            theirs[1].values(),
            [(ours[1][name], theirs[1][name]) for name in texts],
        )
    )
    print(
        f"peer: pairs in one cluster: by both {both:,}, only here {a - both:,}, only by datatrove {b - both:,}"
    )
    chance = a * b / _pairs([0] * len(texts))
    print(
        f"peer: adjusted Rand index of the clusters {(both - chance) / ((a + b) / 2 - chance):.4f}"
    )
    for name, here, there in (
        ("only here", ours[1], theirs[1]),
        ("only by datatrove", theirs[1], ours[1]),
    ):
        true = np.array([_true(texts[x], texts[y]) for x, y in _neighbours_apart(here, there)])
        if len(true):
            quartiles = ", ".join(f"{q:.2f}" for q in np.percentile(true, [5, 25, 50, 75, 95]))
            print(
                f"peer: {len(true)} neighbours in a cluster {name}: true Jaccard 5, 25, 50, 75, 95 %: {quartiles}"
            )


def _pairs(labels: Iterable[Any]) -> int:
    return sum(n * (n - 1) // 2 for n in Counter(labels).values())


def _neighbours_apart(here: Labels, there: Labels) -> list[tuple[str, str]]:
    """Members of clusters, each with the next one, where the other side has them apart; at most
    1,000.
    """
    clusters: defaultdict[Any, list[str]] = defaultdict(list)
    for name, cluster in sorted(here.items()):
        clusters[cluster].append(name)
    apart = (
        (x, y) for names in clusters.values() for x, y in pairwise(names) if there[x] != there[y]
    )
    return list(islice(apart, 1000))


def _true(a: str, b: str) -> float:
    return sources.jaccard(sources.shingles(a), sources.shingles(b))
