"""Part `scale` of benchmarks.dedup: documents that are keys only, through every dedup phase and
through Ray Data.

30 % of the documents are in clusters; cluster number c of C is drawn as C u^3, so that sizes follow
a power law with exponent -2.5. A member has the cluster's key in a band with probability 0.8, and
its content hash with 0.3; all else is random.

Both sides read the same Parquet parts and write the edges of stars. Ours: the phases as
pipeline.run.dedup_plan lists them, without the engine, by a pool of spawned processes per phase. Ray
Data: its keyed shuffle in three ways, see `STRATEGIES`. Not counted: the start of our processes and
their imports; the start of Ray and of its first workers. Memory: see benchmarks.watch.
"""

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.watch import MB, SPAWN, ChildError, peak_bytes, watched
from pipeline.run.phase import Phase, PlanContext
from pipeline.run.phases import PHASES, PhaseSpec
from stages.dedup import match as dedup
from stages.dedup import minhash
from stages.dedup.components import estimated_bytes
from stages.dedup.config import DedupConfig
from stages.dedup.keys import Keys, lanes_of
from stages.dedup.match import read_edges
from stages.dedup.minhash import U64
from stages.dedup.shuffle import mix, sort_rows
from stages.formats.document import POSITION_BITS, document_schema
from stages.storage.ledger import Commit, Output, Store, Unit
from stages.storage.parts import fixed_binary

# key: a group for each (lane, key), as one would write it; cell: a group for each of our
# partitions, our own code inside it; sort: sorted by (lane, key), our own code on each sorted block
STRATEGIES = ("key", "cell", "sort")


class Options(NamedTuple):
    """Sizes of the part; `limit` in wall seconds ends a strategy of Ray Data's, `rounds` is the
    size for the star rounds.
    """

    sizes: list[int]
    per_unit: int
    partition_bytes: int
    workers: int
    rounds: int
    limit: float
    plot: Path | None
    folder: Path


class Cost(NamedTuple):
    """Of a phase: wall and CPU seconds, and the largest process's peak in bytes."""

    name: str
    units: int
    rows: int
    wall: float
    cpu: float
    peak: int


class Point(NamedTuple):
    """A place in the plot."""

    series: str
    documents: int
    wall: float
    cpu: float
    peak: int
    total: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this part."""
    parser.add_argument(
        "--documents",
        type=int,
        default=4_000_000,
        help="largest size; sizes are 10,000, 50,000, and double from 250,000",
    )
    parser.add_argument("--per-unit", type=int, default=250_000, help="documents per map file")
    parser.add_argument(
        "--partition-bytes", type=int, default=32_000_000, help="of rows, per reducer"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument(
        "--rounds",
        type=int,
        default=500_000,
        help="documents for star rounds against dense components",
    )
    parser.add_argument(
        "--limit",
        type=float,
        default=180,
        help="wall seconds after which Ray Data is stopped; 0 without it",
    )
    parser.add_argument(
        "--plot",
        type=Path,
        help="PNG (SVG without matplotlib) of time and memory against documents",
    )
    parser.add_argument(
        "--scratch",
        type=Path,
        default=Path(tempfile.gettempdir()),
        help="folder for 700 bytes a document",
    )


def options(args: argparse.Namespace) -> Options:
    """The options from the command line."""
    doubled = [250_000 << n for n in range(20)]
    sizes = [n for n in (10_000, 50_000, *doubled) if n < args.documents]
    folder = Path(tempfile.mkdtemp(prefix="gristmill-scale-", dir=args.scratch))
    return Options(
        [*sizes, args.documents],
        args.per_unit,
        args.partition_bytes,
        args.workers,
        args.rounds,
        args.limit,
        args.plot,
        folder,
    )


def scale(given: Options) -> None:
    """A block of lines for each size."""
    config = _config(given)
    points: list[Point] = []
    strategies = list(STRATEGIES) if given.limit > 0 else []
    try:
        for documents in given.sizes:
            folder = given.folder / str(documents)
            watched(_generate, folder, documents, given.per_unit, given.workers)
            checksum = _print_ours(documents, folder, config, given, points)
            for strategy in list(strategies):
                if not _print_ray(strategy, documents, folder, given, points, checksum):
                    strategies.remove(strategy)
            shutil.rmtree(folder)
        _print_growth(points)
        _print_rounds(given)
        if given.plot:
            print(f"scale: plot in {plot(points, given.plot)}")
    finally:
        shutil.rmtree(given.folder, ignore_errors=True)


def _config(given: Options, **also: Any) -> DedupConfig:
    return DedupConfig(
        partition_bytes=given.partition_bytes, documents_per_unit=given.per_unit, **also
    )


def _print_ours(
    documents: int, folder: Path, config: DedupConfig, given: Options, points: list[Point]
) -> tuple[int, int]:
    (costs, checksum, idle), usage = watched(_ours, folder, config, given.workers)
    head = f"scale, {documents:,} documents"
    print(
        f"{head}: ours: {sum(c.cpu for c in costs):.1f} s of CPU, {sum(c.wall for c in costs):.1f} s wall on",
        end=" ",
    )
    print(
        f"{given.workers} workers, all phases; a process that only imported holds {idle / MB:.0f} MB"
    )
    for cost in costs:
        rate = cost.rows / max(cost.cpu, 1e-9) / MB
        print(
            f"{head}: ours: {cost.name}: {cost.units} units, {cost.rows / MB:.2f} M rows in {cost.cpu:.2f} s of CPU,",
            end=" ",
        )
        print(
            f"{rate:.2f} M rows/s/core, {cost.wall:.1f} s wall, peak {cost.peak / MB:.0f} MB a process"
        )
    shuffled = [c for c in costs if c.name in ("dedup sort", "dedup match")]
    rows, cpu, wall = shuffled[0].rows, sum(c.cpu for c in shuffled), sum(c.wall for c in shuffled)
    print(
        f"{head}: ours: rows to stars: {rows / cpu / MB:.2f} M rows/s/core, {wall:.1f} s wall,",
        end=" ",
    )
    print(f"{checksum[0] / documents:.2f} edges a document")
    sort, match = shuffled
    beyond = sort.peak - idle, match.peak - idle
    partition = 16 * documents * 15 / match.units
    print(
        f"{head}: ours: beside what it imported: sort {beyond[0] / min(documents, given.per_unit):.0f} bytes a document,",
        end=" ",
    )
    print(f"match {beyond[1] / partition:.1f} times its partition of {partition / MB:.1f} MB")
    hours = {c.name.removeprefix("dedup "): c.cpu / documents * 1e9 / 3600 for c in costs}
    print(
        f"{head}: ours: at this rate 10^9 documents take",
        ", ".join(f"{name} {h:.1f}" for name, h in hours.items()),
        end="",
    )
    print(f", in all {sum(hours.values()):.1f} core-hours", flush=True)
    points.append(Point("ours", documents, wall, cpu, max(c.peak for c in shuffled), usage.total))
    cluster = next(c for c in costs if c.name == "dedup cluster")
    points.append(
        Point("ours, components", documents, cluster.wall, cluster.cpu, cluster.peak, cluster.peak)
    )
    return checksum


def _print_ray(
    strategy: str,
    documents: int,
    folder: Path,
    given: Options,
    points: list[Point],
    expected: tuple[int, int],
) -> bool:
    """Whether it was done in time."""
    head = f"scale, {documents:,} documents: Ray Data by {strategy}"
    foreseen = _foreseen([p for p in points if p.series == f"Ray Data by {strategy}"], documents)
    if foreseen > given.limit:
        print(
            f"{head}: not tried; it would take {foreseen:.0f} s by how it grew to the last size",
            flush=True,
        )
        return False
    # as many groups as we have partitions
    per_lane = -(-documents * 16 // given.partition_bytes)
    cells = 1 << max(0, per_lane - 1).bit_length()
    try:
        (wall, checksum), usage = watched(
            _ray_stars, folder, strategy, cells, given.workers, limit=given.limit
        )
    except TimeoutError:
        print(f"{head}: stopped after {given.limit:.0f} s, not tried on more documents", flush=True)
        return False
    except ChildError as error:
        print(f"{head}: failed: {error}; not tried on more documents", flush=True)
        return False
    ours = next(p for p in points if p.series == "ours" and p.documents == documents)
    verdict = "same" if checksum == expected else "NOT THE SAME"
    print(
        f"{head}: {15 * documents / usage.cpu / MB:.2f} M rows/s/core, {usage.cpu:.1f} s of CPU ({usage.cpu / ours.cpu:.1f} times"
        f" ours), {wall:.1f} s wall ({wall / ours.wall:.1f} times ours), peak {usage.peak / MB:.0f} MB a process (ours"
        f" {ours.peak / MB:.0f}), {usage.total / MB:.0f} MB in all (ours {ours.total / MB:.0f}); {verdict} stars",
        flush=True,
    )
    points.append(
        Point(f"Ray Data by {strategy}", documents, wall, usage.cpu, usage.peak, usage.total)
    )
    return True


def _foreseen(points: Sequence[Point], documents: int) -> float:
    """Wall seconds by the line through the last two points; 0 if there are fewer."""
    if len(points) < 2:
        return 0.0
    a, b = points[-2:]
    return b.wall + (documents - b.documents) * max(0.0, b.wall - a.wall) / (
        b.documents - a.documents
    )


def _print_growth(points: Sequence[Point]) -> None:
    for series in dict.fromkeys(p.series for p in points):
        # at small sizes it is what does not grow that shows
        of = [p for p in points if p.series == series][-3:]
        if len(of) > 1:
            size = np.log([p.documents for p in of])
            time_, peak = (
                float(np.polyfit(size, np.log(values), 1)[0])
                for values in ([p.cpu for p in of], [p.peak for p in of])
            )
            growth = f"CPU time grows as n^{time_:.2f}, a process's memory as n^{peak:.2f}"
            print(f"scale: {series}: {growth}, over the last {len(of)} sizes")
    for p in (p for p in points if p.series == "ours"):
        others = [q for q in points if q.documents == p.documents and q.series.startswith("Ray")]
        for what in ("wall", "cpu", "total") if others else ():
            best = min(others, key=lambda q: getattr(q, what))
            favoured = "ours" if getattr(p, what) <= getattr(best, what) else best.series
            print(
                f"scale: {p.documents:,} documents: least {what}: {favoured}; the best of Ray Data's is {best.series}"
            )


def _print_rounds(given: Options) -> None:
    folder = given.folder / "rounds"
    watched(_generate, folder, given.rounds, given.per_unit, given.workers)
    found = {}
    for name, memory in (("dense", 1 << 60), ("rounds", 1)):
        config = _config(given, cluster_memory=memory)
        (costs, _, _), _ = watched(_ours, folder, config, given.workers)
        found[name] = [c for c in costs if c.name in ("dedup star", "dedup cluster")]
        spent = sum(c.cpu for c in found[name])
        print(
            f"scale, components of {given.rounds:,} documents, {name}: {spent:.2f} s of CPU,",
            end=" ",
        )
        print(
            f"{sum(c.wall for c in found[name]):.1f} s wall, peak {max(c.peak for c in found[name]) / MB:.0f} MB a process",
            end="",
        )
        print(
            f", {next(c.rows for c in costs if c.name == 'dedup star')} rounds"
            if name == "rounds"
            else ""
        )
    ratio = sum(c.cpu for c in found["rounds"]) / sum(c.cpu for c in found["dense"])
    print(
        f"scale, components: rounds take {ratio:.1f} times the CPU of one dense union-find; that holds",
        end=" ",
    )
    print(
        f"16 bytes a node: {estimated_bytes(250_000_000) / 1e9:.1f} GB for 250 million documents with a copy",
        flush=True,
    )


# --- documents that are keys only -----------------------------------------------------------------


def _generate(
    mark: Callable[[], None], folder: Path, documents: int, per_unit: int, workers: int
) -> None:
    units = [(n, min(per_unit, documents - n * per_unit)) for n in range(-(-documents // per_unit))]
    (folder / "extract" / "documents").mkdir(parents=True)
    with SPAWN.Pool(workers) as pool:
        pool.starmap(partial(_generate_part, folder, documents), units, chunksize=1)


def _generate_part(folder: Path, documents: int, number: int, size: int) -> None:
    """A part like those of extract: what dedup reads of one."""
    rng = np.random.default_rng([documents, number])
    clusters = max(1, documents // 10)
    cluster = (clusters * rng.random(size) ** 3).astype(np.uint64) + np.uint64(1)
    member = rng.random(size) < 0.3
    bands = rng.integers(0, 1 << 64, (size, 14), dtype=np.uint64)
    for band in range(14):
        like = member & (rng.random(size) < 0.8)
        bands[like, band] = mix(mix(cluster[like]) + np.uint64(band))
    content = rng.integers(0, 1 << 64, (size, 2), dtype=np.uint64)
    like = member & (rng.random(size) < 0.3)
    content[like] = mix(mix(cluster[like]) + np.uint64(14))[:, None]
    schema = document_schema((), keys=minhash.describe(DedupConfig().signature))
    made = {
        "doc_id": pa.array(np.arange(size, dtype=np.uint64) | np.uint64(number << POSITION_BITS)),
        "host": pa.array([f"h{n}.example" for n in (cluster % np.uint64(5000)).tolist()]),
        "language": pa.array(["en"] * size),
        "warc_file": pa.array([f"input-{number}"] * size),
        "num_chars": pa.array(rng.integers(200, 20_000, size)),
        "content_hash": pa.Array.from_buffers(pa.binary(16), size, [None, pa.py_buffer(content)]),
        "band_keys": pa.array([row.tobytes() for row in bands]),
    }
    table = pa.table([made.get(f.name, pa.nulls(size, f.type)) for f in schema], schema=schema)
    pq.write_table(
        table,
        folder / "extract" / "documents" / f"{number:06d}.parquet",
        compression="zstd",
        row_group_size=50_000,
    )


# --- ours -----------------------------------------------------------------------------------------


def _ours(
    mark: Callable[[], None], folder: Path, config: DedupConfig, workers: int
) -> tuple[list[Cost], tuple[int, int], int]:
    """All phases; what each cost, the checksum of the stars, and what a process holds that only
    imported.
    """
    phases = {"extract": _extracted(folder)}
    root = tempfile.mkdtemp(dir=folder)
    costs, idle = [], 0
    for spec in (spec for spec in PHASES if spec.stage == "dedup"):
        folder_of_phase = f"{root}/{spec.name.replace(' ', '/')}"
        phase = phases[spec.name] = Phase(spec.name, Store(folder_of_phase, spec.result), [])
        if spec.list_units(_context(config, phases, phase)).units:
            with SPAWN.Pool(workers) as pool:
                idle = max(pool.map(_nap, range(workers), chunksize=1))
                costs.append(_run_phase(spec, phase, phases, config, pool))
    matched = phases["dedup match"]
    found = checksum(read_edges([matched.store.uri(c.output().path) for c in matched.ordered()]))
    shutil.rmtree(root)
    return costs, found, idle


def _extracted(folder: Path) -> Phase:
    store = Store(str(folder / "extract"))
    phase = Phase("extract", store, [])
    for path in sorted((folder / "extract" / "documents").glob("*.parquet")):
        commit = Commit(path.stem, "", rows_out=pq.read_metadata(path).num_rows)
        commit.outputs = [Output(f"documents/{path.name}", path.stat().st_size, path.stem)]
        phase.units.append(Unit(path.stem, "", None))
        phase.add(commit)
    return phase


def _context(config: DedupConfig, phases: dict[str, Phase], phase: Phase) -> PlanContext:
    settings: Any = SimpleNamespace(dedup=config, run=SimpleNamespace(seed=0))
    return PlanContext(settings, (), phases, phase)


def _run_phase(
    spec: PhaseSpec, phase: Phase, phases: dict[str, Phase], config: DedupConfig, pool: Any
) -> Cost:
    name, store = phase.name, phase.store
    start, cpu, peak = time.monotonic(), 0.0, 0
    while True:
        listing = spec.list_units(_context(config, phases, phase))
        phase.units, phase.prepare = listing.units, listing.prepare
        pending = phase.pending
        if not pending:
            break
        jobs = [pool.apply_async(_measured, (step,)) for step in phase.prepare]
        ran = [job.get() for job in jobs]
        ran += pool.imap_unordered(
            _measured, [partial(spec.work, unit, config, store) for unit in pending]
        )
        for commit, spent, held in ran:
            cpu, peak = cpu + spent, max(peak, held)
            if commit is not None:
                phase.add(commit)
    return Cost(
        name, len(phase.units), _rows(name, phase, phases), time.monotonic() - start, cpu, peak
    )


def _rows(name: str, phase: Phase, before: dict[str, Phase]) -> int:
    """What a phase works on: rows of keys, edges, documents; of the rounds, their number."""
    commits = phase.ordered()
    if name == "dedup star":
        return len({c.unit[:2] for c in commits}) - 1 if commits else 0
    if name == "dedup cluster":
        return sum(c.rows_out for c in before["dedup match"].ordered())
    return int(sum(c.result.rows if name == "dedup sort" else c.rows_in for c in commits))


def _measured(call: Callable[[], Any]) -> tuple[Any, float, int]:
    start = time.process_time()
    result = call()
    return result, time.process_time() - start, peak_bytes()


def _nap(_: int) -> int:
    # so that every process of the pool takes one of these, and has imported by its end
    time.sleep(0.3)
    pa.array(np.arange(2)).to_pandas()  # Arrow imports pandas when it is first used
    return peak_bytes()


def checksum(chunks: Any) -> tuple[int, int]:
    """Number of edges, and a sum that does not depend on their order."""
    count = total = 0
    for edges in chunks:
        count += len(edges)
        total += int((mix(edges[:, 0]) * np.uint64(3) + mix(edges[:, 1])).sum())
    return count, total % (1 << 64)


# --- Ray Data -------------------------------------------------------------------------------------


def _ray_stars(
    mark: Callable[[], None], folder: Path, strategy: str, cells: int, workers: int
) -> tuple[float, tuple[int, int]]:
    """Wall seconds from the parts to the stars' Parquet files, without the start of Ray; and the
    stars' checksum.
    """
    import logging

    import ray
    import ray.data

    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    ray.init(
        num_cpus=workers,
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.range(8 * workers, override_num_blocks=8 * workers).map_batches(
        _wait
    ).materialize()  # starts the workers
    mark()
    start = time.monotonic()
    read = ray.data.read_parquet(
        str(folder / "extract" / "documents"), columns=["doc_id", "content_hash", "band_keys"]
    )
    rows = read.map_batches(
        partial(_exploded, cells=cells), batch_format="pyarrow", batch_size=50_000
    )
    if strategy == "key":
        stars = rows.groupby(["lane", "key"], num_partitions=15 * cells).map_groups(
            _star_of_key, batch_format="numpy"
        )
    elif strategy == "cell":
        stars = rows.groupby("cell", num_partitions=15 * cells).map_groups(
            _stars_of_rows, batch_format="numpy"
        )
    else:
        stars = rows.sort(["lane", "key"]).map_batches(
            _stars_of_rows, batch_format="numpy", batch_size=None
        )
    output = tempfile.mkdtemp(dir=folder)
    stars.write_parquet(output)
    wall = time.monotonic() - start
    tables = (
        pq.read_table(path, columns=["centre", "other"]) for path in Path(output).rglob("*.parquet")
    )
    found = checksum(
        np.column_stack([t["centre"].to_numpy(), t["other"].to_numpy()]).astype(np.uint64)
        for t in tables
    )
    shutil.rmtree(output)
    ray.shutdown()
    return wall, found


def _wait(batch: dict[str, Any]) -> dict[str, Any]:
    time.sleep(0.1)
    return batch


def _exploded(batch: pa.Table, *, cells: int) -> pa.Table:
    """A row for every lane of every document."""
    batch = batch.combine_chunks()
    ids = batch["doc_id"].to_numpy()
    content = (
        fixed_binary(batch["content_hash"].chunk(0), 16)[:, :8]
        .copy()
        .view(">u8")
        .ravel()
        .astype(np.uint64)
    )
    bands = fixed_binary(batch["band_keys"].chunk(0), 112).copy().view("<u8").reshape(-1, 14)
    lanes = np.stack(list(lanes_of([Keys(ids, content, ids, bands)], 14)))
    lane = np.repeat(np.arange(15, dtype=np.uint32), len(ids))
    key = lanes[:, :, 0].ravel()
    cell = lane * np.uint32(cells) + (
        (key >> np.uint64(32)) * np.uint64(cells) >> np.uint64(32)
    ).astype(np.uint32)
    return pa.table(
        {"lane": lane.astype(np.uint8), "key": key, "id": lanes[:, :, 1].ravel(), "cell": cell}
    )


def _star_of_key(group: dict[str, Any]) -> dict[str, Any]:
    centre = group["id"].min()
    others = group["id"][group["id"] != centre]
    return {"centre": np.full(len(others), centre, np.uint64), "other": others}


def _stars_of_rows(rows: dict[str, Any]) -> dict[str, Any]:
    found = [np.empty((0, 2), np.uint64)]
    for lane in np.unique(rows["lane"]):
        of = rows["lane"] == lane
        ordered = sort_rows(np.column_stack([rows["key"][of], rows["id"][of]]).astype(np.uint64))
        found += dedup.stars(iter([ordered]), [])
    edges: U64 = np.concatenate(found)
    return {"centre": edges[:, 0], "other": edges[:, 1]}


# --- plot -----------------------------------------------------------------------------------------


def plot(points: Sequence[Point], path: Path) -> Path:
    """Wall time and memory against documents, all series; where it went."""
    try:
        import matplotlib
    except ImportError:
        return _plot_columns(points, path.with_suffix(".svg"))
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(15, 4.5))
    kinds = [
        ("wall seconds", lambda p: p.wall),
        ("MB, largest process", lambda p: p.peak / MB),
        ("MB, all processes", lambda p: p.total / MB),
    ]
    for axis, (label, value) in zip(axes, kinds, strict=True):
        for series in dict.fromkeys(p.series for p in points):
            of = [p for p in points if p.series == series]
            axis.plot([p.documents for p in of], [value(p) for p in of], marker="o", label=series)
        axis.set(xlabel="documents (15 rows each)", ylabel=label, xscale="log", yscale="log")
        axis.grid(alpha=0.3, which="both")
    axes[0].legend()
    figure.suptitle(
        "rows to stars: ours through sorted files, and Ray Data's shuffles; connected components"
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    return path


def _plot_columns(points: Sequence[Point], path: Path) -> Path:
    from pipeline.report.charts import columns_svg, compact

    def chart(title: str, value: Callable[[Point], float]) -> str:
        return str(
            columns_svg(
                {f"{compact(p.documents)} {p.series}": {"kept": round(value(p))} for p in points},
                title,
            )
        )

    charts = [
        chart("wall seconds", lambda p: p.wall),
        chart("MB, largest process", lambda p: p.peak / MB),
    ]
    namespace = "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 340 270'>"
    path.write_text(f"{namespace}{charts[0]}<g transform='translate(0 140)'>{charts[1]}</g></svg>")
    return path
