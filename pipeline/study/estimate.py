"""`gristmill estimate`: the cost of a run, from real runs over a sample of its inputs.

Nothing of them is published. A run over the sample (pipeline.study.input_sample) and one over an
empty input give what a phase costs:

    load x processes + overhead x units + rate x input

Short units are done twice: the load (models, imports) is what one cost more the first time. The
overhead is the cost of a unit of the empty input. The rate is the rest of the sampled units' cost,
over their share of all input. Phases whose units are not inputs have their cost divided among the
inputs by the text that these passed on.
"""

import json
import math
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config.sections import Config
from pipeline.engine import units as engine
from pipeline.engine.lease import lease
from pipeline.report.charts import Floats
from pipeline.report.page import duration
from pipeline.run.execute import Progress, Run, execute
from pipeline.run.inputs import whole_files
from pipeline.run.phases import SPECS, STAGES
from pipeline.run.results import all_commits, store_of
from pipeline.run.state import read_state
from pipeline.run.status import wall_time
from pipeline.study.input_sample import Sample, draw, write_part
from stages.formats.errors import ConfigError
from stages.storage.files import write_atomically
from stages.storage.ledger import Commit, Store, Unit
from stages.storage.parts import unit_name

LONG_SECONDS = 60.0  # in a unit that takes this long, loads are negligible: it is done once
RESAMPLES = 1000


@dataclass(frozen=True)
class Figure:
    """An expected amount and its 90% interval, None if fewer than three units were sampled."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class StageEstimate:
    """A stage of the whole run."""

    stage: str
    units: int
    core_seconds: Figure
    wall_seconds: float
    bytes: Figure
    cost: Figure


@dataclass(frozen=True)
class Estimate:
    """A whole run. `total` is of all stages; its wall time includes `start_seconds`, in which Ray
    starts and the driver works alone.

    `share` of the input was sampled, in `units`. `duplicates` is their share in the sample: more
    input has more, so it is a lower bound, and figures after dedup are upper bounds. `keys` are the
    stage keys of the configuration.
    """

    share: float
    units: int
    inputs: int
    cores: int
    stages: list[StageEstimate]
    total: StageEstimate
    tokens: Figure
    start_seconds: float
    duplicates: float | None
    keys: dict[str, str]


def estimate(
    config: Config,
    progress: Progress,
    run_units: engine.RunUnits,
    *,
    share: float,
    price: float,
    cores: int,
) -> Estimate:
    """Run a sample in a folder of RUN that is removed afterwards, and write RUN/estimate.json.

    `price` is per core-hour. RunFailed as in a run; ValueError if the inputs or the sample are
    empty.
    """
    if not 0 <= price < math.inf:
        raise ConfigError(f"--price-per-core-hour {price}: write an amount of money, as 0.04")
    run, name = Run(config), f"estimate-{uuid.uuid4().hex[:12]}"
    root = f"{run.root}/{name}"
    inputs = run.inputs(extend=False)
    with lease(root):  # `gristmill gc` leaves a leased folder alone
        try:
            sample = draw(config, whole_files(inputs), share=share, folder=f"{root}/inputs")
            nothing = write_part(f"{root}/inputs", "empty", [], config)
            empty = _run_sample(config, [nothing], f"{root}/empty", progress, engine.in_process)
            sampled = _run_sample(config, sample.paths, f"{root}/sample", progress, run_units)
            measured = _Measured(config, len(inputs), cores, sample, sampled, empty)
            result = _whole_run(measured, price=price, keys=run.keys)
        finally:
            Store(run.root).clear(name)
    data = json.dumps(asdict(result), indent=1)
    write_atomically(f"{run.root}/estimate.json", data.encode())
    return result


def table_rows(result: Estimate) -> Iterator[list[str]]:
    """The estimate for reading: a row of cells per stage."""
    for s in (*result.stages, result.total):
        yield [
            s.stage,
            f"{s.units:,}",
            with_interval(s.core_seconds, ",.1f"),
            duration(s.wall_seconds),
            with_interval(s.bytes, ",.0f"),
            with_interval(s.cost, ",.4g"),
        ]


def with_interval(figure: Figure, form: str) -> str:
    """A figure for reading, with its interval if it has one."""
    if figure.low is None or figure.high is None:
        return f"{figure.value:{form}}"
    return f"{figure.value:{form}} ({max(0.0, figure.low):{form}} to {figure.high:{form}})"


# --- runs of the sample ---------------------------------------------------------------------------


class _SampleRun(NamedTuple):
    """A finished run: its commits by phase, and the seconds in which no unit was at work."""

    directory: str
    commits: Mapping[str, Sequence[Commit]]
    idle_seconds: float


def _run_sample(
    config: Config,
    paths: Sequence[str],
    directory: str,
    progress: Progress,
    run_units: engine.RunUnits,
) -> _SampleRun:
    # parts of Parquet files are written as JSON lines
    format = "jsonl" if paths[0].endswith(".jsonl") else config.input.format
    config = replace(
        config,
        input=replace(config.input, paths=tuple(paths), format=format, split_bytes=0),
        run=replace(config.run, directory=directory, catalog=""),
    )
    began = time.time()
    execute(config, progress, _timing(run_units))
    elapsed, commits = time.time() - began, all_commits(directory, read_state(directory))
    busy = wall_time(c for of_phase in commits.values() for c in of_phase)
    return _SampleRun(directory, commits, max(0.0, elapsed - busy))


def _timing(run_units: engine.RunUnits) -> engine.RunUnits:
    """The same, with the cost of each unit noted in its commit."""
    return lambda name, task, *rest: run_units(
        name, task._replace(work=partial(_timed_work, task.work)), *rest
    )


def _timed_work(work: engine.Work, unit: Unit, plan: Any, store: Store) -> Commit:
    """Do a unit, and again with all models loaded; note its CPU and wall seconds."""
    first, wall, commit = _timed(work, unit, plan, store)
    again = first
    if first < LONG_SECONDS:
        again, wall, commit = _timed(work, unit, plan, store)
    commit.notes |= {"load": first - again, "cpu": again, "wall": wall}
    return commit


def _timed(work: engine.Work, unit: Unit, plan: Any, store: Store) -> tuple[float, float, Commit]:
    cpu, began = time.process_time(), time.monotonic()
    commit = work(unit, plan, store)
    spent = time.process_time() - cpu + commit.cpu_seconds
    return spent, time.monotonic() - began, commit


# --- from the sample to the whole run -------------------------------------------------------------


def expected(cost: Floats, shares: Sequence[float]) -> Figure:
    """The cost of all input. `cost` is the part that does not depend on the input, then the rest by
    sampled input (see `_cost`); the sampled inputs are these shares of all.

    The interval is a bootstrap: from the 5th to the 95th percentile of what is expected from inputs
    drawn again from the sampled ones, with replacement. It is narrowed by the share that was
    sampled (finite population correction), None for fewer than three inputs, and rather too narrow
    for few. It covers chance in the choice of the inputs, nothing else.
    """
    x, y = np.asarray(shares), cost[1:]
    value = y.sum() / x.sum()
    if len(x) < 3:
        return Figure(float(cost[0] + value))
    drawn = np.random.default_rng(0).integers(len(x), size=(RESAMPLES, len(x)))
    low, high = np.quantile(y[drawn].sum(axis=1) / x[drawn].sum(axis=1), (0.05, 0.95)) - value
    unknown = math.sqrt(max(0.0, 1 - x.sum()))
    return Figure(*(float(cost[0] + value + error * unknown) for error in (0.0, low, high)))


class _Measured(NamedTuple):
    """What was measured, and what the whole run will be."""

    config: Config
    inputs: int
    cores: int
    sample: Sample
    sampled: _SampleRun
    empty: _SampleRun


class _Phase(NamedTuple):
    """A phase of the whole run; costs are as `expected` takes them."""

    name: str
    units: int
    seconds: Floats
    wall_seconds: float
    bytes: Floats


def _whole_run(measured: _Measured, *, price: float, keys: dict[str, str]) -> Estimate:
    commits, shares = measured.sampled.commits, measured.sample.shares
    phases = [_phase(p, measured) for p in SPECS if commits[p]]

    nothing = np.zeros(len(shares) + 1)

    def stage(name: str, phases: Sequence[_Phase], start: float = 0.0) -> StageEstimate:
        seconds = sum((p.seconds for p in phases), nothing)
        return StageEstimate(
            stage=name,
            units=max((p.units for p in phases), default=0),
            core_seconds=expected(seconds, shares),
            wall_seconds=start + sum(p.wall_seconds for p in phases),
            bytes=expected(sum((p.bytes for p in phases), nothing), shares),
            cost=expected(seconds * (price / 3600), shares),
        )

    start = measured.sampled.idle_seconds
    rows_in, kept = (sum(getattr(c, n) for c in commits["dedup keep"]) for n in _ROWS)
    return Estimate(
        share=sum(shares),
        units=len(shares),
        inputs=measured.inputs,
        cores=measured.cores,
        stages=[stage(s, [p for p in phases if SPECS[p.name].stage == s]) for s in STAGES],
        total=stage("total", phases, start),
        tokens=expected(np.append(0.0, _by_input("pack", _tokens, measured)), shares),
        start_seconds=start,
        duplicates=1 - kept / rows_in if rows_in else None,
        keys=keys,
    )


_ROWS = ("rows_in", "rows_out")


def _phase(name: str, measured: _Measured) -> _Phase:
    commits, config = measured.sampled.commits[name], _section(name, measured)
    units = _whole_units(name, measured)
    workers = min(units, int(measured.cores / config.num_cpus), config.parallelism or units)
    workers = max(1, workers)
    seconds = _cost(name, lambda c: float(c.notes["cpu"]), measured, units=units)
    seconds[0] += workers * max(0.0, *(float(c.notes["load"]) for c in commits))
    size = _cost(name, _bytes, measured, units=units)
    if _is_by_input(name) and not measured.sample.is_whole:
        size = np.append(0.0, _by_input(name, _bytes, measured) * _density(name, measured))
    work = max(0.0, expected(seconds, measured.sample.shares).value)
    cpu, wall = (sum(float(c.notes[what]) for c in commits) for what in ("cpu", "wall"))
    # a unit also waits for the disk, the network and other work
    wall_seconds = math.ceil(units / workers) * work / units * wall / max(1e-3, cpu)
    return _Phase(name, units, seconds, wall_seconds, size)


def _section(phase: str, measured: _Measured) -> Any:
    """The section of the configuration of a phase's stage."""
    return getattr(measured.config, SPECS[phase].stage)


def _cost(
    phase: str, amount: Callable[[Commit], float], measured: _Measured, *, units: int
) -> Floats:
    """An amount of a phase: the overhead of all units, then the rest by sampled input."""
    empty = [amount(c) for c in measured.empty.commits[phase]]
    overhead = sum(empty) / max(1, len(empty))
    rest = _by_input(phase, lambda c: amount(c) - overhead, measured)
    return np.append(overhead * units, rest)


def _by_input(phase: str, amount: Callable[[Commit], float], measured: _Measured) -> Floats:
    """An amount of a phase by sampled input."""
    commits, count = measured.sampled.commits, len(measured.sample.shares)

    def by_unit(phase: str, amount: Callable[[Commit], float]) -> Floats:
        amounts = {c.unit: amount(c) for c in commits[phase]}
        return np.array([amounts.get(unit_name(n), 0.0) for n in range(count)])

    if _is_by_input(phase):
        return by_unit(phase, amount)
    # a little for each input, as there may be no text
    text = by_unit("refine" if phase == "pack" else "extract", _chars) + 1e-9
    total = sum(amount(c) for c in commits[phase])
    return np.asarray(text / text.sum() * total)


def _is_by_input(phase: str) -> bool:
    """Whether a unit of the phase is an input."""
    return SPECS[phase].by_input


def _whole_units(phase: str, measured: _Measured) -> int:
    """Units in the whole run: inputs, groups of corpus bytes, or groups of documents. A graph is
    clustered in as many units as the sample's.
    """
    commits, share = measured.sampled.commits, sum(measured.sample.shares)
    if _is_by_input(phase):
        return measured.inputs
    if phase == "dedup cluster":
        return len(commits[phase])
    if phase == "pack":
        size = sum(_bytes(c) for c in commits["refine"])
        groups = size / share / measured.config.pack.group_bytes
    else:
        documents = sum(c.rows_out for c in commits["extract"])
        groups = documents / share / measured.config.dedup.documents_per_unit
    return max(1, min(measured.inputs, math.ceil(groups)))


def _density(phase: str, measured: _Measured) -> float:
    """Bytes of a phase's small Parquet parts written as one part, over their own bytes: full row
    groups compress better than those of a few rows.
    """
    commits, rows = measured.sampled.commits[phase], _section(phase, measured).batch_size
    if sum(c.rows_in for c in commits) >= rows * len(commits):
        return 1.0
    root, file = measured.sampled.directory, BytesIO()
    store = store_of(root, read_state(root), phase)
    for output in commits[0].outputs:
        table = pa.concat_tables(store.read_part(c, kind=output.kind) for c in commits)
        pq.write_table(table, file, compression="zstd", row_group_size=rows)
    return min(1.0, file.tell() / sum(map(_bytes, commits)))


def _bytes(commit: Commit) -> float:
    return sum(o.bytes for o in commit.outputs)


def _chars(commit: Commit) -> float:
    return float(commit.result.chars_out)


def _tokens(commit: Commit) -> float:
    return float(commit.result.tokens + commit.result.held_out_tokens)
