"""`gristmill estimate`: what a run will cost, from real runs over a sample of its inputs. Nothing
of it is published.

Sampled are `UNITS` files or more, or all where there are fewer, and of each such a share of the
records that the sample as a whole is what was asked for; the records of few files are dealt into
`UNITS` parts. Each file or part is a unit of the sample, and its size a share of all input: by
bytes where those of all files are known before they are read, else by files.

Work is taken as load x processes + overhead x units + rate x input. A process does its first units
twice: what they cost more the first time is the load (models, imports). The overhead is what a unit
over an empty file costs, the rate a ratio estimator over the sampled units. Phases whose units are
no inputs are shared out to the inputs by the text these handed on.
"""

import dataclasses
import json
import math
import os
import random
import re
import socket
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config.load import Config, ConfigError
from pipeline.engine import units as engine
from pipeline.engine.lease import lease
from pipeline.report.charts import Floats
from pipeline.report.report import duration
from pipeline.run.execute import STAGES, Progress, Run, execute
from pipeline.run.results import PHASES, all_commits, store_of
from pipeline.run.state import Input, read_state
from pipeline.run.status import covered
from stages.pack.pack import derive_seed
from stages.read.fetch import local_copy
from stages.read.records import InputConfig, read_texts
from stages.read.warc import ReadStats, read_records
from stages.storage.files import write_atomically
from stages.storage.ledger import Commit, Store, Unit
from stages.storage.parts import read_columns

UNITS = 10  # with fewer, Student's t makes intervals wide
REPEATED = (
    5  # units of a phase that a process does twice: models are loaded when a document asks for them
)
LONG_SECONDS = 60.0  # beside a unit of so much work loads are nothing
CONFIDENCE = 0.9
_PER_INPUT = ("extract", "refine", "refine names")
_SHUFFLED = ("dedup match", "dedup star", "dedup elect", "dedup alarm", "dedup repeats")


@dataclass(frozen=True)
class Figure:
    """An expected amount and its confidence interval, None where too few units were sampled to
    tell.
    """

    value: float
    low: float | None = None
    high: float | None = None

    def scaled(self, factor: float = 1.0, *, plus: float = 0.0) -> "Figure":
        """In another unit, and with an amount more that is known."""
        return Figure(
            *(None if x is None else x * factor + plus for x in (self.value, self.low, self.high))
        )  # type: ignore[arg-type]


@dataclass(frozen=True)
class StageEstimate:
    """A stage of the whole run. `fixed_core_seconds`, a part of `core_seconds`, do not grow with
    the bytes of the inputs.

    `gets` and `puts` are requests to a run directory on an object store, at least. A unit takes
    four GETs and two PUTs for its commit, attempts and failure, and a PUT per output; a phase a PUT
    for its list, and a GET per part that it reads, which for each unit of a shuffle is one of every
    unit. A Parquet part takes more, a range each, and so does a multipart upload.
    """

    stage: str
    units: int
    core_seconds: Figure
    fixed_core_seconds: float
    wall_seconds: float
    bytes: Figure
    gets: int
    puts: int
    cost: Figure


@dataclass(frozen=True)
class Estimate:
    """A whole run; `total` is of all stages, its wall time with `start_seconds`: Ray's start and
    what the driver does alone.

    `share` of the input was sampled, in `units`. `duplicates` is the share of them in the sample:
    more input has more, so it is a lower bound, and what comes after dedup an upper one. `keys` are
    the stage keys of the configuration.
    """

    share: float
    units: int
    inputs: int
    confidence: float
    cores: int
    stages: list[StageEstimate]
    total: StageEstimate
    tokens: Figure
    start_seconds: float
    duplicates: float | None
    keys: dict[str, str]


def share_of(text: str) -> float:
    """0.001 of "0.1%". ConfigError for what is no percentage above 0 and at most 100."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?%", text.strip(), re.ASCII)
    if not found or not 0 < float(found[1]) <= 100:
        raise ConfigError(f"--sample {text}: write a percentage above 0% and at most 100%, as 0.1%")
    return float(found[1]) / 100


def estimate(
    config: Config,
    progress: Progress,
    run_units: engine.RunUnits,
    *,
    share: float,
    price: float,
    cores: int,
) -> Estimate:
    """Run a sample in a folder of RUN that is removed, and write RUN/estimate.json. `price` is of a
    core-hour.

    RunFailed as of a run; ValueError when the inputs, or the sample, hold nothing.
    """
    if not 0 <= price < math.inf:
        raise ConfigError(f"--price-per-core-hour {price}: write an amount of money, as 0.04")
    run, name = Run(config), f"estimate-{uuid.uuid4().hex[:12]}"
    root = f"{run.root}/{name}"
    inputs = run.inputs(extend=False)
    with lease(root):  # which tells `gristmill gc` that this is no rubbish yet
        try:
            drawn = draw(config, inputs, share=share, folder=f"{root}/inputs")
            nothing = _write(f"{root}/inputs", "empty", [], config)
            empty = _measure(config, [nothing], f"{root}/empty", progress, engine.in_process)
            sampled = _measure(config, drawn.paths, f"{root}/sample", progress, run_units)
            dense = {
                phase: _dense(phase, config, f"{root}/sample", sampled, empty)
                for phase in ("extract", "refine")
            }
        finally:
            Store(run.root).clear(name)
    fixed = {phase: _fixed(sampled.commits[phase], empty.commits[phase]) for phase in PHASES}
    found = _summed(
        _Whole(config, len(inputs), cores, price, drawn, fixed, sampled, dense), keys=run.keys
    )
    write_atomically(
        f"{run.root}/estimate.json", json.dumps(dataclasses.asdict(found), indent=1).encode()
    )
    return found


def lines_of(found: Estimate) -> tuple[list[list[str]], list[str]]:
    """The estimate for reading: a row of cells per stage, and sentences."""
    rows = []
    for s in (*found.stages, found.total):
        spent = (
            _interval(s.core_seconds, ",.1f"),
            f"{s.fixed_core_seconds:,.1f}",
            duration(s.wall_seconds),
        )
        stored = (
            _interval(s.bytes, ",.0f"),
            f"{s.gets:,}",
            f"{s.puts:,}",
            _interval(s.cost, ",.4g"),
        )
        rows.append([s.stage, f"{s.units:,}", *spent, *stored])
    certain = found.total.core_seconds.low is not None
    sure = (
        f"{found.confidence:.0%} intervals"
        if certain
        else "too few for an interval; raise --sample"
    )
    notes = [
        f"{_interval(found.tokens, ',.0f')} tokens expected",
        f"{found.share:.3%} sampled, {found.units} units: {sure}",
    ]
    notes.append(
        f"wall time is for {found.cores:,} cores; {duration(found.start_seconds)} of it starts Ray and plans"
    )
    if found.duplicates is not None:
        more = "more input has more of them, so later stages, bytes and tokens come to less"
        notes.append(f"at least {found.duplicates:.1%} of what dedup reads are duplicates; {more}")
    return rows, notes


def _interval(figure: Figure, form: str) -> str:
    if figure.low is None or figure.high is None:
        return f"{figure.value:{form}}"
    return f"{figure.value:{form}} ({max(0.0, figure.low):{form}} to {figure.high:{form}})"


# --- the sample -----------------------------------------------------------------------------------


class Drawn(NamedTuple):
    """Files of a sample, and the share of all input that each of them is."""

    paths: list[str]
    shares: list[float]


def draw(config: Config, inputs: Sequence[Input], *, share: float, folder: str) -> Drawn:
    """Draw a share of all input by the run's seed. Parts of files are written to `folder`.

    ValueError if no record is drawn.
    """
    seed = derive_seed(config.run.seed, "estimate")
    count = min(len(inputs), max(UNITS, round(share * len(inputs))))
    within = min(1.0, share * len(inputs) / count)
    files, weights = sorted(random.Random(seed).sample(list(inputs), count)), _weights(inputs)
    if count >= UNITS and math.isclose(within, 1.0, rel_tol=1 / count):
        if any(weights[i.ordinal] for i in files):
            return Drawn([i.path for i in files], [weights[i.ordinal] for i in files])
        files = []
    parts: dict[int, list[bytes]] = {}
    shares: dict[int, float] = {}
    taken = 0
    for number, file in enumerate(files):
        start = random.Random(derive_seed(seed, "records", file.path)).random()
        with local_copy(file.path, options=config.fetch) as path:
            lengths = [len(piece) for piece in _pieces(path, config.input)]
            by_length = sorted(
                range(len(lengths)), key=lengths.__getitem__
            )  # long ones and short ones in their proportions
            chosen = {by_length[i] for i in systematic(len(lengths), share=within, start=start)}
            for piece in (p for i, p in enumerate(_pieces(path, config.input)) if i in chosen):
                part = number if count >= UNITS else taken % UNITS
                parts.setdefault(part, []).append(piece)
                shares[part] = shares.get(part, 0.0) + weights[file.ordinal] * len(piece) / sum(
                    lengths
                )
                taken += 1
    if not parts:
        raise ValueError(
            f"a sample of {share:.4%} of {len(inputs)} inputs holds no record; raise --sample"
        )
    return Drawn(
        [_write(folder, f"part-{part}", pieces, config) for part, pieces in parts.items()],
        list(shares.values()),
    )


def systematic(count: int, *, share: float, start: float) -> list[int]:
    """Every (1 / share)-th of `count` numbers; `start` in [0, 1) is where in the first step.

    Each number is as likely.
    """
    steps = (int((start + k) / share) for k in range(math.ceil(count * share)))
    return [i for i in steps if i < count]


def _weights(inputs: Sequence[Input]) -> dict[int, float]:
    """The share of all input that each file is, by its number."""
    known = [size for i in inputs if (size := i.bytes) is not None]
    sizes = known if len(known) == len(inputs) and any(known) else [1] * len(inputs)
    return {i.ordinal: size / sum(sizes) for i, size in zip(inputs, sizes, strict=True)}


def _pieces(path: Path, config: InputConfig) -> Iterator[bytes]:
    """A file's records as they can be copied: gzip members or plain records of a WARC; of texts,
    JSON lines of what is read.
    """
    if config.format in ("jsonl", "parquet"):
        for row in read_texts(path, config):
            columns = {
                config.url_column: row.url,
                config.id_column: row.source_id,
                config.text_column: row.text,
            }
            yield (
                json.dumps({k: v for k, v in columns.items() if k and not row.error}).encode()
                + b"\n"
            )
        return
    # by a limit of one byte: where records begin is asked, not what is in them
    starts = sorted({r.offset for r in read_records(path, max_payload_bytes=1, stats=ReadStats())})
    with open(path, "rb") as stream:
        for start, end in pairwise([*starts, path.stat().st_size]):
            stream.seek(start)
            yield stream.read(end - start)


def _write(folder: str, name: str, pieces: Sequence[bytes], config: Config) -> str:
    uri = f"{folder}/{name}.{'warc' if config.input.format in ('warc', 'wet') else 'jsonl'}"
    write_atomically(uri, b"".join(pieces))
    return uri


# --- its runs -------------------------------------------------------------------------------------


class _Measured(NamedTuple):
    """The commits of a run by phase, and the seconds in which none of its units was at work."""

    commits: dict[str, list[Commit]]
    start_seconds: float


def _measure(
    config: Config,
    paths: Sequence[str],
    directory: str,
    progress: Progress,
    run_units: engine.RunUnits,
) -> _Measured:
    as_lines = config.input.format == "parquet" and paths[0].startswith(
        directory.rpartition("/")[0]
    )
    read = dataclasses.replace(
        config.input, paths=tuple(paths), format="jsonl" if as_lines else config.input.format
    )
    run = dataclasses.replace(config.run, directory=directory, catalog="")
    began = time.time()
    execute(dataclasses.replace(config, run=run, input=read), progress, _noting(run_units))
    elapsed, commits = time.time() - began, all_commits(directory, read_state(directory))
    spans = [
        (c.extra["finished"] - c.seconds, c.extra["finished"])
        for of_phase in commits.values()
        for c in of_phase
    ]
    return _Measured(commits, max(0.0, elapsed - covered(spans)))


def _noting(run_units: engine.RunUnits) -> engine.RunUnits:
    """The same, with what is noted of a unit in its commit."""
    return lambda name, task, *given: run_units(
        name, task._replace(work=partial(_noted, task.work)), *given
    )


_repeated: Counter[str] = Counter()  # in a worker: units done twice, by the folder of their phase


def _noted(work: engine.Work, unit: Unit, plan: Any, store: Store) -> Commit:
    """Do a unit, and once more with all models loaded.

    Its commit notes the process, and what it cost first and last.
    """
    first, wall, commit = _timed(work, unit, plan, store)
    again, times = first, 1
    if _repeated[store.root] < REPEATED and first < LONG_SECONDS:
        _repeated[store.root] += 1
        while times == 1 or (
            again < first / 2 and times < 3
        ):  # after a load the second time may load more
            again, wall, commit = _timed(work, unit, plan, store)
            times += 1
    commit.extra["estimate"] = {
        "process": f"{socket.gethostname()}:{os.getpid()}",
        "first": first,
        "again": again,
        "wall": wall,
    }
    return commit


def _timed(work: engine.Work, unit: Unit, plan: Any, store: Store) -> tuple[float, float, Commit]:
    cpu, began = time.process_time(), time.monotonic()
    commit = work(unit, plan, store)
    return (
        time.process_time() - cpu + commit.totals.get("child_cpu_seconds", 0.0),
        time.monotonic() - began,
        commit,
    )


def _dense(
    phase: str, config: Config, directory: str, sampled: _Measured, empty: _Measured
) -> float:
    """Bytes of a phase's small parts written as one, over what they take: a full row group packs
    better than a few rows.
    """
    commits, rows = sampled.commits[phase], getattr(config, phase).batch_size
    if not commits or sum(c.rows_in for c in commits) >= rows * len(commits):
        return 1.0
    store, overhead = (
        store_of(directory, read_state(directory), phase),
        sum(map(_bytes, empty.commits[phase])),
    )
    together = 0
    for folder in {o["path"].split("/")[0] for o in commits[0].outputs}:
        parts = [
            store.uri(o["path"])
            for c in commits
            for o in c.outputs
            if o["path"].startswith(f"{folder}/")
        ]
        written = BytesIO()
        pq.write_table(
            pa.concat_tables(read_columns(p, None) for p in parts),
            written,
            compression="zstd",
            row_group_size=rows,
        )
        together += len(written.getbuffer())
    apart = sum(map(_bytes, commits)) - overhead * len(commits)
    return min(1.0, max(0.0, together - overhead) / apart) if apart > 0 else 1.0


# --- the arithmetic -------------------------------------------------------------------------------


def ratio(amounts: Sequence[float] | Floats, shares: Sequence[float]) -> Figure:
    """Expected amount in all input from sampled units that are such shares of it, with its
    interval.

    Ratio estimator, its variance by linearisation (delta method) with the finite population
    correction, Student's t: Cochran, Sampling Techniques, 3rd ed. 1977, chapter 6. No interval from
    fewer than three units.
    """
    from scipy.stats import t

    y, x = np.asarray(amounts, float), np.asarray(shares, float)
    value = float(y.sum() / x.sum())
    if len(x) < 3:
        return Figure(value)
    variance = ((y - value * x) ** 2).sum() / (len(x) - 1)
    error = math.sqrt(max(0.0, 1 - x.sum()) * variance / len(x)) / x.mean()
    reach = float(t.ppf((1 + CONFIDENCE) / 2, len(x) - 1) * error)
    return Figure(value, value - reach, value + reach)


class _Fixed(NamedTuple):
    """What a phase costs whatever its input: core-seconds per process and per unit, bytes per unit."""

    load: float
    overhead: float
    bytes: float


def _fixed(sampled: Sequence[Commit], empty: Sequence[Commit]) -> _Fixed:
    loads: Counter[str] = (
        Counter()
    )  # a process loads what its documents ask for, in a small sample not all of it
    for c in sampled:
        noted = c.extra["estimate"]
        loads[noted["process"]] += noted["first"] - noted["again"]
    units = max(1, len(empty))
    load = max(0.0, *loads.values()) if loads else 0.0
    return _Fixed(load, _spent(empty, "again") / units, sum(map(_bytes, empty)) / units)


def _spent(commits: Sequence[Commit], what: str) -> float:
    return float(sum(c.extra["estimate"][what] for c in commits))


class _Whole(NamedTuple):
    """What is estimated, and what is known of it."""

    config: Config
    inputs: int
    cores: int
    price: float
    drawn: Drawn
    fixed: Mapping[str, _Fixed]
    sampled: _Measured
    dense: Mapping[str, float]


class _Phase(NamedTuple):
    """A phase of the whole run: what is known of it, and what grows with the input, as each sampled
    unit has it.
    """

    units: int
    fixed_seconds: float
    wall_seconds: float
    fixed_bytes: float
    gets: int
    puts: int
    seconds: Floats
    bytes: Floats


def _summed(whole: _Whole, *, keys: dict[str, str]) -> Estimate:
    commits, drawn = whole.sampled.commits, whole.drawn
    phases = {p: _phase(p, whole) for p in PHASES if commits[p]}
    total = _stage("total", list(phases.values()), whole)
    judged, kept = (
        sum(getattr(c, rows) for c in commits["dedup keep"]) for rows in ("rows_in", "rows_out")
    )
    tokens = {
        c.unit: c.totals["tokens"] + c.totals.get("held_out_tokens", 0.0) for c in commits["pack"]
    }
    return Estimate(
        share=sum(drawn.shares),
        units=len(drawn.paths),
        inputs=whole.inputs,
        confidence=CONFIDENCE,
        cores=whole.cores,
        stages=[_stage(s, [phases[p] for p in phases if p.split()[0] == s], whole) for s in STAGES],
        total=dataclasses.replace(
            total, wall_seconds=total.wall_seconds + whole.sampled.start_seconds
        ),
        tokens=ratio(_shared_out("pack", tokens, whole), drawn.shares),
        start_seconds=whole.sampled.start_seconds,
        duplicates=1 - kept / judged if judged else None,
        keys=keys,
    )


def _stage(name: str, phases: Sequence[_Phase], whole: _Whole) -> StageEstimate:
    fixed, none = sum(p.fixed_seconds for p in phases), np.zeros(len(whole.drawn.shares))
    seconds = ratio(sum((p.seconds for p in phases), none), whole.drawn.shares).scaled(plus=fixed)
    return StageEstimate(
        stage=name,
        units=max((p.units for p in phases), default=0),
        core_seconds=seconds,
        fixed_core_seconds=fixed,
        wall_seconds=sum(p.wall_seconds for p in phases),
        bytes=ratio(sum((p.bytes for p in phases), none), whole.drawn.shares).scaled(
            plus=sum(p.fixed_bytes for p in phases)
        ),
        gets=sum(p.gets for p in phases),
        puts=sum(p.puts for p in phases),
        cost=seconds.scaled(whole.price / 3600),
    )


def _phase(name: str, whole: _Whole) -> _Phase:
    commits, fixed, stage = (
        whole.sampled.commits[name],
        whole.fixed[name],
        getattr(whole.config, name.split()[0]),
    )
    units = _units(name, whole)
    at_once = max(1, min(units, int(whole.cores / stage.num_cpus), stage.parallelism or units))
    known = fixed.load * at_once + fixed.overhead * units
    seconds = _shared_out(
        name, {c.unit: c.extra["estimate"]["again"] - fixed.overhead for c in commits}, whole
    )
    waiting = _spent(commits, "wall") / max(
        1e-3, _spent(commits, "again")
    )  # for disk, net, other work
    work = max(0.0, known + ratio(seconds, whole.drawn.shares).value)
    return _Phase(
        units=units,
        fixed_seconds=known,
        wall_seconds=math.ceil(units / at_once) * work / units * waiting,
        fixed_bytes=fixed.bytes * units,
        gets=4 * units + (units * units if name in _SHUFFLED else max(units, whole.inputs)),
        puts=1 + 2 * units + round(units * sum(len(c.outputs) for c in commits) / len(commits)),
        seconds=seconds,
        bytes=_shared_out(name, {c.unit: _bytes(c) - fixed.bytes for c in commits}, whole)
        * whole.dense.get(name, 1.0),
    )


def _units(phase: str, whole: _Whole) -> int:
    """Units in the whole run: inputs, groups of corpus bytes or of documents; a graph is clustered
    as the sample's is.
    """
    commits, share = whole.sampled.commits, sum(whole.drawn.shares)
    if phase == "dedup cluster":
        return len(commits[phase])
    groups: float = whole.inputs
    if phase == "pack":
        groups = sum(_bytes(c) for c in commits["refine"]) / share / whole.config.pack.group_bytes
    elif phase not in _PER_INPUT:
        groups = (
            sum(c.rows_out for c in commits["extract"])
            / share
            / whole.config.dedup.documents_per_unit
        )
    return max(1, min(whole.inputs, math.ceil(groups)))


def _shared_out(phase: str, amounts: Mapping[str, float], whole: _Whole) -> Floats:
    """Amounts of a phase's units as amounts of the sampled units."""
    count = len(whole.drawn.shares)
    names = [f"{n:06d}" for n in range(count)]
    if phase in _PER_INPUT:
        return np.array([amounts.get(name, 0.0) for name in names])
    source = whole.sampled.commits["refine" if phase == "pack" else "extract"]
    text = {c.unit: c.totals.get("chars_out", 0.0) for c in source}
    total, amount = sum(text.values()), float(sum(amounts.values()))
    return np.array(
        [amount * (text.get(name, 0.0) / total if total else 1 / count) for name in names]
    )


def _bytes(commit: Commit) -> float:
    return float(sum(o["bytes"] for o in commit.outputs))
