"""A series: the inputs of a crawl listing, batch after batch, as generations of one catalog.

    SERIES/batches/0003/              a run of its own over its part of the listing; deduplicated against the batches before it
    SERIES/batches/0003/batch.json    its inputs, numbered by the series; written first
    SERIES/batches/0003/done.json     the generation it published, or none; written last
    SERIES/inputs.jsonl               every input that a batch took, with its number, from which document ids are made
    SERIES/decisions.jsonl            why each batch had its size (pipeline.schedule)
    SERIES/catalog.jsonl, generations/, feedback/    what trainers read, and what they tell

A batch that was begun is finished before another one is: every step is a file written once, and
what is done is done again with the same result.
"""

import dataclasses
import json
import re
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from pipeline.config.sections import Config
from pipeline.controller import decide
from pipeline.engine import units
from pipeline.engine.lease import Fenced, fence, lease
from pipeline.run.execute import Outcome, Progress, execute
from stages.formats.errors import ConfigError
from stages.read.fetch import expand_inputs
from stages.storage.catalog import read_catalog
from stages.storage.files import create_only, exists, names_in, read_bytes, write_atomically
from trainer.telemetry import feedback


class Batch(NamedTuple):
    """A batch: its number from 1, directory and inputs as (number, path); when it was begun and
    what it came to, if it has.
    """

    number: int
    directory: str
    inputs: tuple[tuple[int, str], ...]
    started: float
    done: dict[str, Any] | None


class Done(NamedTuple):
    """What one call did: the batch, None where none was due, how it ended, and the decision, None
    for one that was finished.
    """

    batch: Batch | None
    outcome: Outcome | None
    decision: decide.Decision | None


def run_batch(
    config: Config,
    progress: Progress,
    run_units: units.RunUnits,
    *,
    inputs: int | None = None,
    now: float | None = None,
) -> Done:
    """Finish the batch that was begun, or else decide on the next one, begin it and finish it.

    `run.directory` is the series. `inputs` overrules the decision, which is logged all the same.
    Held when another scheduler works there, and what `execute` raises; the same call goes on from
    there.
    """
    series = config.run.directory
    with lease(series):
        begun = batches(series)
        decision = None
        if begun and begun[-1].done is None:
            batch = begun[-1]
        else:
            left = _left(config, begun)
            decision = _decide(config, begun, len(left), time.time() if now is None else now)
            taken = left[: decision.inputs if inputs is None else inputs]
            if not taken:
                return Done(None, None, decision)
            batch = _begin(series, begun, taken)
        outcome = execute(_config_of(config, batch, begun), progress, run_units)
        return Done(_finish(batch, outcome), outcome, decision)


def is_series(root: str) -> bool:
    """Whether batches were begun in a directory."""
    return exists(f"{root}/batches")


def batches(series: str) -> list[Batch]:
    """The batches of a series, oldest first."""
    found = []
    for name in sorted(names_in(f"{series}/batches")):
        directory = f"{series}/batches/{name}"
        if exists(f"{directory}/batch.json"):  # else it was cut off before it began
            record = json.loads(read_bytes(f"{directory}/batch.json"))
            done = (
                json.loads(read_bytes(f"{directory}/done.json"))
                if exists(f"{directory}/done.json")
                else None
            )
            inputs = tuple((i["ordinal"], i["path"]) for i in record["inputs"])
            found.append(Batch(int(name), directory, inputs, record["started"], done))
    return found


def _left(config: Config, begun: Sequence[Batch]) -> list[str]:
    """What the listing names and no batch has taken, in the listing's order."""
    taken = {path for batch in begun for _, path in batch.inputs}
    return [
        path
        for path in expand_inputs(list(config.input.paths), base_uri=config.input.base_uri)
        if path not in taken
    ]


def _begin(series: str, begun: Sequence[Batch], paths: Sequence[str]) -> Batch:
    """Number the inputs and write the batch down: from here on it will be finished."""
    fence()
    numbered = [pair for batch in begun for pair in batch.inputs]
    first = max((ordinal for ordinal, _ in numbered), default=-1) + 1
    inputs = tuple((first + n, path) for n, path in enumerate(paths))
    number = len(begun) + 1
    directory = f"{series}/batches/{number:04d}"
    _write_lines(f"{series}/inputs.jsonl", [*numbered, *inputs])
    _write_lines(f"{directory}/inputs.jsonl", inputs)
    batch = Batch(number, directory, inputs, time.time(), None)
    record = {"inputs": [{"ordinal": n, "path": p} for n, p in inputs], "started": batch.started}
    if not create_only(f"{directory}/batch.json", json.dumps(record).encode()):
        raise Fenced(
            f"{directory}: another scheduler began this batch at the same time; the same command finishes it"
        )
    return batch


def _write_lines(uri: str, inputs: Sequence[tuple[int, str]]) -> None:
    lines = "".join(json.dumps({"ordinal": n, "path": p}) + "\n" for n, p in inputs)
    write_atomically(uri, lines.encode())


def _config_of(config: Config, batch: Batch, begun: Sequence[Batch]) -> Config:
    """The series' configuration for one batch: its inputs, against the indexes of those before it,
    into the series' catalog.
    """
    earlier = [
        b.directory
        for b in begun
        if b.number < batch.number and exists(f"{b.directory}/index.json")
    ]
    dedup = config.dedup
    if dedup.enabled:
        dedup = dataclasses.replace(dedup, against=(*dedup.against, *earlier), write_index="kept")
    return dataclasses.replace(
        config,
        run=dataclasses.replace(
            config.run, directory=batch.directory, catalog=config.run.directory
        ),
        input=dataclasses.replace(
            config.input, paths=tuple(path for _, path in batch.inputs), base_uri=""
        ),
        dedup=dedup,
    )


def _finish(batch: Batch, outcome: Outcome) -> Batch:
    published = outcome.published
    tokens = published.manifest["tokens"] if published else 0
    done = {
        "generation": published.name if published else None,
        "tokens": tokens,
        "finished": time.time(),
    }
    fence()
    write_atomically(f"{batch.directory}/done.json", json.dumps(done).encode())
    return batch._replace(done=done)


# --- the decision ---------------------------------------------------------------------------------


def _decide(
    config: Config, begun: Sequence[Batch], inputs_left: int, now: float
) -> decide.Decision:
    """Ask the controller, and log what it was told and what it said."""
    series = config.run.directory
    lines = decisions(series)
    before = (
        decide.from_json(decide.Record, lines[-1]).decision.memory if lines else decide.Memory()
    )
    told = decide.Inputs(
        now=now,
        series=series,
        generations=tuple(
            decide.Generation(e["name"], e["rows"], e["tokens"]) for e in read_catalog(series)
        ),
        trainers=tuple(feedback.read_summaries(f"{series}/feedback").summaries),
        batches=tuple(_told(batch) for batch in begun),
        inputs_left=inputs_left,
        before=before,
    )
    decision = decide.decide(told, config.schedule)
    fence()
    record = decide.to_json(decide.Record(told, config.schedule, decision))
    write_atomically(
        f"{series}/decisions.jsonl", b"".join(line + b"\n" for line in [*lines, record])
    )
    return decision


def _told(batch: Batch) -> decide.Batch:
    if batch.done is None:
        return decide.Batch(len(batch.inputs), "running", batch.started)
    return decide.Batch(
        len(batch.inputs), "published", batch.started, batch.done["finished"], batch.done["tokens"]
    )


def decisions(series: str) -> list[bytes]:
    """The lines of decisions.jsonl, oldest first."""
    uri = f"{series}/decisions.jsonl"
    return read_bytes(uri).splitlines() if exists(uri) else []


def seconds_of(every: str) -> float:
    """Seconds of "30m", "6h" or "1d". ConfigError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", every)
    if not found or not float(found[1]):
        raise ConfigError(f"--every {every}: write a number and s, m, h or d, as 6h")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86_400}[found[2]]
