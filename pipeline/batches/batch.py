"""A series: the inputs of a crawl listing, batch after batch, as generations of one catalog.

    SERIES/batches/0003/            a run over part of the listing, deduplicated against earlier
    SERIES/batches/0003/batch.json  its inputs, numbered by the series; written first
    SERIES/batches/0003/done.json   the generation it published, if any; written last
    SERIES/inputs.jsonl             each input that a batch took, and its number (see document ids)
    SERIES/decisions.jsonl          why each batch has its size
    SERIES/catalog.jsonl, generations/, feedback/    what trainers read, and what they report

A batch that has begun is finished before the next one begins. Each step writes a file once, and
repeating a step gives the same result.
"""

import dataclasses
import json
import re
import time
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from pipeline.config.sections import Config
from pipeline.controller import records
from pipeline.controller.decide import decide
from pipeline.engine import units
from pipeline.engine.lease import Fenced, fence, lease
from pipeline.run.execute import Outcome, Progress, execute
from pipeline.run.inputs import Input, entry, number_inputs, parse_entry, write_list
from stages.formats.errors import ConfigError
from stages.read.listing import expand_inputs
from stages.storage.catalog import current_entries, read_catalog
from stages.storage.files import create_only, exists, names_in, read_bytes, write_atomically
from trainer.telemetry import feedback


class Batch(NamedTuple):
    """A batch: its number from 1, its inputs, when it began, and done.json."""

    number: int
    directory: str
    inputs: tuple[Input, ...]
    started: float
    done: dict[str, Any] | None

    @property
    def files(self) -> tuple[str, ...]:
        """Paths of the files that the batch took; decisions are made in files, not ranges."""
        return tuple(dict.fromkeys(i.path for i in self.inputs))


class BatchResult(NamedTuple):
    """What one call did.

    `batch` is None if no inputs were to be taken, `decision` None for a batch that had begun.
    """

    batch: Batch | None
    outcome: Outcome | None
    decision: records.Decision | None

    @property
    def was_too_late(self) -> bool:
        """Whether a trainer was short of data when this batch began: the next one is urgent."""
        return bool(self.batch and self.decision and self.decision.state == "STARVED")


def run_batch(
    config: Config,
    progress: Progress,
    run_units: units.RunUnits,
    *,
    inputs: int | None = None,
    period_seconds: float | None = None,
    now: float | None = None,
) -> BatchResult:
    """Finish the batch that has begun, or else decide on the next one and run it.

    `run.directory` is the series. `inputs` overrides the decision, which is logged anyway.
    `period_seconds` is the time from this call to the next, if it is known. Raises Held if another
    scheduler works there, and what `execute` raises; the same call goes on.
    """
    series = config.run.directory
    with lease(series):
        earlier = batches(series)
        decision = None
        if earlier and earlier[-1].done is None:
            batch = earlier[-1]
        else:
            left = _inputs_left(config, earlier)
            now = time.time() if now is None else now
            decision = _decide(config, earlier, len(left), now, period_seconds)
            paths = left[: decision.inputs if inputs is None else inputs]
            if not paths:
                return BatchResult(None, None, decision)
            batch = _begin(config, earlier, paths)
        outcome = execute(_batch_config(config, batch, earlier), progress, run_units)
        return BatchResult(_finish(batch, outcome), outcome, decision)


def is_series(root: str) -> bool:
    """Whether batches have begun in a directory."""
    return exists(f"{root}/batches")


def batches(series: str) -> list[Batch]:
    """The batches of a series, oldest first."""
    read = (_read_batch(f"{series}/batches/{n}") for n in sorted(names_in(f"{series}/batches")))
    return [batch for batch in read if batch is not None]


def _read_batch(directory: str) -> Batch | None:
    """A batch; None for a folder that was cut off before the batch began."""
    record, done = (
        json.loads(read_bytes(uri)) if exists(uri) else None
        for uri in (f"{directory}/batch.json", f"{directory}/done.json")
    )
    if record is None:
        return None
    inputs = tuple(parse_entry(entry) for entry in record["inputs"])
    number = int(directory.rpartition("/")[2])
    return Batch(number, directory, inputs, record["started"], done)


def _inputs_left(config: Config, earlier: Sequence[Batch]) -> list[str]:
    """Inputs of the listing that no batch has taken, in its order."""
    taken = {i.path for batch in earlier for i in batch.inputs}
    listed = expand_inputs(list(config.input.paths), base_uri=config.input.base_uri)
    return [path for path in listed if path not in taken]


def _begin(config: Config, earlier: Sequence[Batch], paths: Sequence[str]) -> Batch:
    """Number the inputs and record the batch: from here on it will be finished."""
    fence()
    series, number = config.run.directory, len(earlier) + 1
    taken = [i for batch in earlier for i in batch.inputs]
    inputs = tuple(number_inputs(paths, config.input, listed=taken))
    batch = Batch(number, f"{series}/batches/{number:04d}", inputs, time.time(), None)
    write_list(series, [*taken, *inputs])
    write_list(batch.directory, inputs)
    record = {"inputs": [entry(i) for i in inputs], "started": batch.started}
    if not create_only(f"{batch.directory}/batch.json", json.dumps(record).encode()):
        raise Fenced(
            f"{batch.directory}: another scheduler began this batch at the same time; the same "
            "command finishes it"
        )
    return batch


def _batch_config(config: Config, batch: Batch, earlier: Sequence[Batch]) -> Config:
    """The configuration of one batch: its inputs, deduplicated against the indexes of earlier
    batches, published in the catalog of the series.
    """
    before = [b.directory for b in earlier if b.number < batch.number]
    indexes = [directory for directory in before if exists(f"{directory}/index.json")]
    run = dataclasses.replace(config.run, directory=batch.directory, catalog=config.run.directory)
    dedup = config.dedup
    if dedup.enabled:
        dedup = dataclasses.replace(dedup, against=(*dedup.against, *indexes), write_index="kept")
    read = dataclasses.replace(config.input, paths=batch.files, base_uri="")
    return dataclasses.replace(config, run=run, input=read, dedup=dedup)


def _finish(batch: Batch, outcome: Outcome) -> Batch:
    published = outcome.published
    done = {
        "generation": published.name if published else None,
        "tokens": published.manifest["tokens"] if published else 0,
        "finished": time.time(),
    }
    fence()
    write_atomically(f"{batch.directory}/done.json", json.dumps(done).encode())
    return batch._replace(done=done)


# --- the decision ---------------------------------------------------------------------------------


def _decide(
    config: Config,
    earlier: Sequence[Batch],
    inputs_left: int,
    now: float,
    period_seconds: float | None,
) -> records.Decision:
    """Ask the controller, and log its inputs with its decision."""
    series = config.run.directory
    lines = decisions(series)
    inputs = records.Inputs(
        now=now,
        series=series,
        generations=tuple(
            records.Generation(e["name"], e["rows"], e["tokens"])
            for e in current_entries(read_catalog(series))
        ),
        trainers=tuple(feedback.read_summaries(f"{series}/feedback").summaries),
        batches=tuple(_batch_record(batch) for batch in earlier),
        inputs_left=inputs_left,
        before=records.from_json(records.Record, lines[-1]).decision.memory
        if lines
        else records.PlanState(),
        period_seconds=period_seconds,
    )
    decision = decide(inputs, config.schedule)
    fence()
    lines.append(records.to_json(records.Record(inputs, config.schedule, decision)))
    write_atomically(f"{series}/decisions.jsonl", b"".join(line + b"\n" for line in lines))
    return decision


def _batch_record(batch: Batch) -> records.Batch:
    state: Literal["running", "published"] = "published" if batch.done else "running"
    done = batch.done or {}
    return records.Batch(
        len(batch.files), state, batch.started, done.get("finished"), done.get("tokens", 0)
    )


def decisions(series: str) -> list[bytes]:
    """The lines of decisions.jsonl, oldest first."""
    uri = f"{series}/decisions.jsonl"
    return read_bytes(uri).splitlines() if exists(uri) else []


def parse_interval(every: str) -> float:
    """Seconds from "30m", "6h" or "1d". ConfigError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", every)
    if not match or not float(match[1]):
        raise ConfigError(f"--every {every}: write a number and s, m, h or d, as 6h")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86_400}[match[2]]
