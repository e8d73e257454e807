"""The feedback format: what trainers report to the pipeline, as files in a folder. Version 1.

    FEEDBACK/NAME.jsonl              a line every `every_seconds`
    FEEDBACK/NAME.json               the last line, replaced atomically: all that a reader needs
    FEEDBACK/NAME/000000012.json     on an object store, which cannot append, an object per line

NAME is the trainer, the same over the restarts of a training run. Each start is an attempt, with an
id in the field `incarnation`; `sequence` counts lines over all attempts. A line is a JSON object:
version, the fields of Summary but `modified`, and those of Report. Readers ignore fields that they
do not know and refuse a version that they do not know. The `time` of a line is for people: whether
a trainer is alive follows from when lines arrive (`demand`), as its clock may be hours off.
Needs neither torch nor Ray. `trainer.telemetry.feedback_writer` writes the format.
"""

import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

import pydantic_core
from pydantic import AfterValidator, BeforeValidator, Field, TypeAdapter, ValidationError

from stages.storage.files import is_local, local_path, names_in, open_fs, read_bytes, read_many

VERSION = 1
State = Literal["running", "waiting", "stopped", "failed"]
_TAIL_BYTES = 1 << 16  # searched for the last whole line of a .jsonl; a line has about 1 kB


# --- the fields of a line -------------------------------------------------------------------------


def _usable_number(value: Any) -> float | None:
    is_usable = isinstance(value, int | float) and 0 <= value <= sys.float_info.max
    return float(value) if is_usable else None


Count = Annotated[int, Field(ge=0, strict=True)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
# finite and >= 0, None if what was read is not: plans must not be made from anything else
Number = Annotated[float | None, BeforeValidator(_usable_number)]
Time = Annotated[str, AfterValidator(lambda time: datetime.fromisoformat(time).isoformat())]


@dataclass(frozen=True)
class Source:
    """What the steps so far took from one source.

    `loss` is the mean over its targets in the trainer's window.
    """

    generation: str  # the newest read
    rows: dict[str, Count]  # by generation; more than it has when it is read repeatedly
    tokens: Count
    loss: Number


@dataclass(frozen=True)
class Health:
    """The state of a GPU by its driver; None for what the driver does not report."""

    memory_used_bytes: int | None = None
    memory_total_bytes: int | None = None
    # share of the last sample period in which a kernel ran, in [0, 1]
    utilisation: float | None = None
    temperature_celsius: int | None = None
    power_watts: float | None = None


@dataclass(frozen=True)
class Report:
    """The state of a trainer by its own report. None is unknown.

    `health` is the worst of all ranks' GPUs, figure by figure, and `health_ranks` the rank of each.
    `held_out` are the losses of the last evaluation, in nats per token: "sources" over what these
    hold out, and each named set. Lines of earlier versions have rank 0's health and neither of the
    others.
    """

    state: State
    steps: Count
    # of the steps in the model's state: a restart goes back to the checkpoint's
    tokens_total: Count
    tokens_processed: Count  # all work, including what a restart lost: never decreases
    tokens_per_second: Number  # with stalls: data wait, checkpoints, evaluation, restart
    tokens_per_second_without_stalls: Number
    data_wait_share: Number
    mfu: Number
    goodput: Number
    wall_seconds: Seconds  # since the first start, including the time between attempts
    restarts: Count
    sources: dict[str, Source]
    health: Health | None
    budget: Count | None  # tokens left to train on
    health_ranks: dict[str, Count] = field(default_factory=dict)
    held_out: dict[str, Number] = field(default_factory=dict)


@dataclass(frozen=True)
class Summary:
    """A line that was read."""

    trainer: str
    incarnation: str
    sequence: Count
    time: Time  # UTC by the trainer's clock, ISO 8601
    monotonic_seconds: Seconds  # since the start of the attempt
    every_seconds: Seconds
    report: Report
    # Unix time by the store's clock; None for a line of a .jsonl, and where the store has none
    modified: float | None


class OtherVersion(ValueError):
    """A line in another version of the format."""


class Unreadable(NamedTuple):
    """A file or line that cannot be read."""

    where: str
    what: str


class Reading(NamedTuple):
    """The summaries that could be read, and what could not."""

    summaries: list[Summary]
    faults: list[Unreadable]


# --- totals over restarts -------------------------------------------------------------------------


class Totals(NamedTuple):
    """Totals of a run, plain values: a checkpoint keeps `totals._asdict()`.

    steps, tokens, useful_seconds and sources ({name: {"rows": {generation: rows}, "tokens":
    tokens}}) belong to the model's state and go back with it; the others only grow.
    """

    steps: int = 0
    tokens: int = 0
    useful_seconds: float = 0.0
    sources: Mapping[str, Mapping[str, Any]] = {}
    tokens_processed: int = 0
    wall_seconds: float = 0.0
    restarts: int = 0


def resumed(checkpoint: Totals | None, last: Summary | None, *, now: float) -> Totals:
    """Totals at the start of an attempt: its checkpoint's, and the last line's where they grow.

    Both None is a first start.

    Work after the last line is not recorded, so tokens_processed may miss `every_seconds` of it.
    `now` is Unix time. The time between attempts is by the two hosts' clocks, but never negative.
    """
    if checkpoint is None and last is None:
        return Totals()
    state = checkpoint or Totals()
    if last is None:
        return state._replace(restarts=state.restarts + 1)
    report = last.report
    down = max(0.0, now - datetime.fromisoformat(last.time).timestamp())
    return state._replace(
        tokens_processed=max(state.tokens_processed, report.tokens_processed),
        wall_seconds=max(state.wall_seconds, report.wall_seconds + down),
        restarts=max(state.restarts, report.restarts) + 1,
    )


def consumed(lines: Iterable[Summary]) -> list[int]:
    """Tokens of the supply used so far at each line of a trainer: never decreases.

    The data have one fixed order, so a restarted trainer sees again what it had seen: the highest
    total counts.
    """
    return list(itertools.accumulate((line.report.tokens_total for line in lines), max))


# --- demand of live trainers ----------------------------------------------------------------------


class Sighting(NamedTuple):
    """The last line seen of a trainer, when it arrived and when it was last read.

    Both are Unix times by the reader's clock.
    """

    incarnation: str
    sequence: int
    arrived: float
    read: float


Ending = Literal["finished", "stopped", "failed"]


class Demand(NamedTuple):
    """Tokens a second that live trainers can take, in total and by trainer; the stale trainers.

    `seen` is for the next call, in any process. `ended` are the trainers that have said so:
    finished with a budget of 0, in any state; stopped or failed before that, and perhaps to be
    resumed. A stale trainer has said nothing: it may be dead, or read on.
    """

    tokens_per_second: float
    live: dict[str, float]
    stale: list[str]
    seen: dict[str, Sighting]
    ended: dict[str, Ending]


def demand(
    summaries: Iterable[Summary],
    now: float,
    *,
    seen: Mapping[str, Sighting] | None = None,
    patience_seconds: float = 300.0,
) -> Demand:
    """Tokens a second that running and waiting trainers could take without stalls.

    A trainer with a budget of 0 takes none.

    A trainer is stale when nothing has arrived for `patience_seconds` and five of its intervals.
    `now` is the reader's Unix time; the `time` of a line is never used. A line that is new since
    `seen` arrived when the store says, if that is between the two readings; if not, the store's
    clock is off and the line counts as just arrived. Without `seen` the store's clock decides, so
    skew can mislead the first reading. It misleads a later one only if it exceeds the patience and
    is still shorter than the time between readings.
    """
    live, stale, sightings, ended = {}, [], {}, {}
    for summary in summaries:
        name, report = summary.trainer, summary.report
        arrived = _arrival(summary, (seen or {}).get(name), now)
        sightings[name] = Sighting(summary.incarnation, summary.sequence, arrived, now)
        ending = _ending(report)
        if ending is not None:
            ended[name] = ending
        if report.state not in ("running", "waiting"):
            continue
        if now - arrived <= max(patience_seconds, 5 * summary.every_seconds):
            wanted = 0.0 if ending == "finished" else report.tokens_per_second_without_stalls
            live[name] = wanted or 0.0
        elif ending is None:
            stale.append(name)
    return Demand(sum(live.values()), live, stale, sightings, ended)


def _ending(report: Report) -> Ending | None:
    if report.budget == 0:
        return "finished"
    return report.state if report.state in ("stopped", "failed") else None


def _arrival(summary: Summary, before: Sighting | None, now: float) -> float:
    stored = now if summary.modified is None else summary.modified
    if before is None:
        return min(now, stored)
    if (before.incarnation, before.sequence) == (summary.incarnation, summary.sequence):
        return min(now, before.arrived)
    return stored if before.read <= stored <= now else now


# --- reading --------------------------------------------------------------------------------------


def read_summaries(folder: str) -> Reading:
    """The last summary of each trainer, by name.

    [] for an absent folder. Never raises for the content of a file.

    Where NAME.json is absent or broken, the last whole line of NAME.jsonl counts (local folders
    only).
    """
    folder = folder.rstrip("/")
    return _read_each(
        (f"{name}.json", partial(read_summary, folder, name)) for name in _trainers(folder)
    )


def read_lines(folder: str, trainer: str) -> Reading:
    """All lines of a trainer, oldest first; faults are half lines and lines of another version."""
    lines = _stored_lines(f"{folder.rstrip('/')}/{trainer}")
    return _read_each((where, partial(parse, line)) for where, line in lines)


def _read_each(readers: Iterable[tuple[str, Callable[[], Summary]]]) -> Reading:
    summaries, faults = [], []
    for where, read in readers:
        try:
            summaries.append(read())
        except (FileNotFoundError, ValueError) as error:
            faults.append(Unreadable(where, str(error)))
    return Reading(summaries, faults)


def read_summary(folder: str, name: str) -> Summary:
    """The last summary of a trainer. FileNotFoundError or ValueError if there is none to read."""
    uri = f"{folder}/{name}"
    try:
        summary = parse(read_bytes(f"{uri}.json"), modified=_modified(f"{uri}.json"))
    except OtherVersion:
        raise
    except (FileNotFoundError, ValueError):
        last = last_line(uri)
        if last is None:
            raise
        summary = last
    if summary.trainer != name:
        raise ValueError(
            f"speaks of trainer {summary.trainer!r}: a copy? its demand would count twice"
        )
    return summary


def parse(line: bytes, *, modified: float | None = None) -> Summary:
    """Parse a line. ValueError if it is not a summary, OtherVersion if its version is unknown."""
    try:
        record = _OBJECT.validate_json(line)
    except ValueError:
        raise ValueError(f"no whole JSON line, but {line[:40]!r}") from None
    if record.get("version") != VERSION:
        raise OtherVersion(
            f"version {record.get('version')!r}, and this reads {VERSION}; "
            "update gristmill on the older side"
        )
    try:
        return _SUMMARY.validate_python(record | {"report": record, "modified": modified})
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])).removeprefix("report.")
        raise ValueError(
            f"fields are missing or of another kind: {field}: {first['msg']}"
        ) from None


_OBJECT, _SUMMARY = TypeAdapter(dict[str, Any]), TypeAdapter(Summary)


# --- files ----------------------------------------------------------------------------------------


def append_line(path: str, line: bytes) -> None:
    """Append a line to a local file; a half line that a kill left there stays a line of its own."""
    with open(path, "ab+") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 1))
        half = file.read(1) not in (b"", b"\n")
        file.write(b"\n" * half + line + b"\n")


def to_json(value: Any) -> bytes:
    """JSON on one line; NaN and infinity become null."""
    return pydantic_core.to_json(value, inf_nan_mode="null")


def _trainers(folder: str) -> list[str]:
    files = (name for name in names_in(folder) if name.endswith((".json", ".jsonl")))
    return sorted({os.path.splitext(name)[0] for name in files})


def _modified(uri: str) -> float | None:
    fs, path = open_fs(uri)
    try:
        return float(fs.modified(path).timestamp())
    except NotImplementedError:
        return None


def last_line(uri: str) -> Summary | None:
    """The newest line of a trainer that can be read.

    `uri` is FEEDBACK/NAME. On an object store only the last object is tried.
    """
    lines = _tail(uri) if is_local(uri) else read_many(_objects(uri)[-1:])
    for line in reversed(lines):
        try:
            return parse(line)
        except OtherVersion:
            raise
        except ValueError:
            continue  # a half line: the line before it is the last one
    return None


def _tail(uri: str) -> list[bytes]:
    with suppress(FileNotFoundError), open(local_path(f"{uri}.jsonl"), "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
        return file.read().splitlines()
    return []


def _stored_lines(uri: str) -> Iterator[tuple[str, bytes]]:
    if not is_local(uri):
        objects = _objects(uri)
        yield from zip(objects, read_many(objects), strict=True)
        return
    with suppress(FileNotFoundError):
        for number, line in enumerate(read_bytes(f"{uri}.jsonl").splitlines(), 1):
            yield f"{os.path.basename(uri)}.jsonl:{number}", line


def _objects(uri: str) -> list[str]:
    return [f"{uri}/{name}" for name in sorted(names_in(uri)) if name.endswith(".json")]
