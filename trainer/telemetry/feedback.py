"""Feedback: what trainers tell the pipeline, as files in a folder. Format version 1; neither torch
nor Ray is needed.

    FEEDBACK/NAME.jsonl              a line every `every_seconds`
    FEEDBACK/NAME.json               the last line again, replaced as a whole: what a reader needs
    FEEDBACK/NAME/000000012.json     on an object store, which cannot append, each line is an object of its own

NAME is the trainer, the same over restarts of one training run. Each start is an incarnation;
`sequence` counts lines over all of them. A line is a JSON object: version, the fields of Summary
but `modified`, and beside them those of Report. Readers ignore fields they do not know and refuse a
version they do not know. The line's own `time` is for people: who is alive is decided by what
arrived (`demand`), as a trainer's clock may be hours off.
"""

import itertools
import json
import math
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple

import fsspec
from fsspec.implementations.local import LocalFileSystem

VERSION = 1
State = Literal["running", "waiting", "stopped", "failed"]
_STATES = ("running", "waiting", "stopped", "failed")
_TAIL_BYTES = 1 << 16  # where the last whole line of a .jsonl is looked for; a line has about 1 kB


class Source(NamedTuple):
    """What the steps in the state took of one source; `loss` is the mean of its targets over the
    trainer's window.
    """

    generation: str  # the newest read
    rows: dict[
        str, int
    ]  # by generation; above the generation's own number when it is read repeatedly
    tokens: int
    loss: float | None


class Health(NamedTuple):
    """A GPU as its driver sees it; None for what it does not tell."""

    memory_used_bytes: int | None
    memory_total_bytes: int | None
    utilisation: float | None  # share of the last sample period in which a kernel ran, in [0, 1]
    temperature_celsius: int | None
    power_watts: float | None


class Report(NamedTuple):
    """What a trainer says of itself. None is unknown."""

    state: State
    steps: int
    tokens_total: (
        int  # of the steps that are in the state now: a restart takes it back to the checkpoint's
    )
    tokens_processed: int  # all work, that which a restart threw away included: never goes back
    tokens_per_second: float | None  # with stalls: data wait, checkpoints, evaluation, restart
    tokens_per_second_without_stalls: float | None
    data_wait_share: float | None
    mfu: float | None
    goodput: float | None
    wall_seconds: float  # since the first start, time between incarnations included
    restarts: int
    sources: dict[str, Source]
    health: Health | None
    budget: int | None  # tokens still wanted


class Summary(NamedTuple):
    """A line as it was read."""

    trainer: str
    incarnation: str
    sequence: int
    time: str  # UTC by the trainer's clock, ISO 8601
    monotonic_seconds: float  # since the incarnation's start
    every_seconds: float
    report: Report
    modified: (
        float | None
    )  # Unix time by the store's clock; None for a line of a .jsonl, and where the store has none


class OtherVersion(ValueError):
    """A line in a version of the format that is not ours."""


class Fault(NamedTuple):
    """A file or line that tells nothing."""

    where: str
    what: str


class Reading(NamedTuple):
    """What could be read, and what could not."""

    summaries: list[Summary]
    faults: list[Fault]


# --- totals over restarts -------------------------------------------------------------------------


class Totals(NamedTuple):
    """What a run has come to: plain values, so a checkpoint keeps `totals._asdict()`.

    steps, tokens, useful_seconds and sources (rows by generation, and tokens) belong to the state
    and go back with it; the others only grow.
    """

    steps: int = 0
    tokens: int = 0
    useful_seconds: float = 0.0
    sources: Mapping[
        str, Mapping[str, Any]
    ] = {}  # name → {"rows": {generation: rows}, "tokens": tokens}
    tokens_processed: int = 0
    wall_seconds: float = 0.0
    restarts: int = 0


def resumed(checkpoint: Totals | None, last: Summary | None, *, now: float) -> Totals:
    """Totals with which an incarnation begins: the state's from its checkpoint, the others from the
    last line as well.

    Both None is a first start. Work after the last line is in no record, so tokens_processed may
    miss `every_seconds` of it. `now` is Unix time. The time between incarnations is by the two
    hosts' clocks, but never negative.
    """
    if checkpoint is None and last is None:
        return Totals()
    state = Totals() if checkpoint is None else checkpoint
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
    """Tokens of the supply that had been used at each line of a trainer: never falls.

    Data come in one fixed order, so after a restart a trainer sees again what it had seen: the
    highest total counts.
    """
    return list(itertools.accumulate((line.report.tokens_total for line in lines), max))


# --- who is alive ---------------------------------------------------------------------------------


class Sighting(NamedTuple):
    """The line of a trainer seen last, when it arrived and when it was last read: Unix times by the
    reader's clock.
    """

    incarnation: str
    sequence: int
    arrived: float
    read: float


class Demand(NamedTuple):
    """Tokens a second that live trainers can take, in all and by trainer.

    `seen` is for the next call, in whatever process.
    """

    tokens_per_second: float
    live: dict[str, float]
    stale: list[str]
    seen: dict[str, Sighting]


def demand(
    summaries: Iterable[Summary],
    now: float,
    *,
    seen: Mapping[str, Sighting] | None = None,
    patience_seconds: float = 300.0,
) -> Demand:
    """What trainers that run or wait could take without stalls; one whose budget is 0 takes
    nothing.

    A trainer is stale when nothing has arrived for `patience_seconds` and five of its intervals.
    `now` is the reader's Unix time. `time` in the lines is never looked at: a line that is new
    since `seen` arrived when the store says, if that lies between the two readings, else the
    store's clock is off and it has just arrived. Without `seen` the store's clock must do, so skew
    can mislead the first reading. Later ones it misleads only where it exceeds the patience and yet
    is shorter than the time between readings.
    """
    live, stale, sightings = {}, [], {}
    for summary in summaries:
        arrived = _arrival(summary, (seen or {}).get(summary.trainer), now)
        sightings[summary.trainer] = Sighting(summary.incarnation, summary.sequence, arrived, now)
        if summary.report.state not in ("running", "waiting"):
            continue
        if now - arrived > max(patience_seconds, 5 * summary.every_seconds):
            stale.append(summary.trainer)
        else:
            live[summary.trainer] = _wanted(summary.report)
    return Demand(sum(live.values()), live, stale, sightings)


def _arrival(summary: Summary, before: Sighting | None, now: float) -> float:
    stored = now if summary.modified is None else summary.modified
    if before is None:
        return min(now, stored)
    if (before.incarnation, before.sequence) == (summary.incarnation, summary.sequence):
        return min(now, before.arrived)
    return stored if before.read <= stored <= now else now


def _wanted(report: Report) -> float:
    return 0.0 if report.budget == 0 else report.tokens_per_second_without_stalls or 0.0


# --- reading --------------------------------------------------------------------------------------


def read_summaries(folder: str) -> Reading:
    """The last word of each trainer, by name; an absent folder has none. Never raises for what a
    file holds.

    Where NAME.json is absent or broken, the last whole line of NAME.jsonl is taken (local folders
    only).
    """
    fs, root = _open(folder)
    summaries, faults = [], []
    for name in _trainers(fs, root):
        try:
            summaries.append(_read_summary(fs, root, name))
        except ValueError as error:
            faults.append(Fault(f"{name}.json", str(error)))
    return Reading(summaries, faults)


def read_lines(folder: str, trainer: str) -> Reading:
    """All lines of a trainer, oldest first; half lines and lines of another version are faults."""
    fs, root = _open(folder)
    summaries, faults = [], []
    for where, line in _stored_lines(fs, f"{root}/{trainer}"):
        try:
            summaries.append(parse(line))
        except ValueError as error:
            faults.append(Fault(where, str(error)))
    return Reading(summaries, faults)


def parse(line: bytes, *, modified: float | None = None) -> Summary:
    """A line as a Summary; ValueError when it is none, OtherVersion when it is not for us."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError(f"no whole JSON line, but {line[:40]!r}") from None
    if not isinstance(record, dict):
        raise ValueError(f"no JSON object, but {line[:40]!r}")
    if record.get("version") != VERSION:
        raise OtherVersion(
            f"version {record.get('version')!r}, and this reads {VERSION}; update gristmill on the older side"
        )
    try:
        return _summary(record, modified)
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ValueError(f"fields are missing or of another kind: {error!r}") from None


def _summary(record: Mapping[str, Any], modified: float | None) -> Summary:
    state = record["state"]
    if state not in _STATES:
        raise ValueError(f"state {state!r}")
    numbers: dict[str, Any] = {key: _count(record[key]) for key in _COUNTS} | {
        key: _number(record[key]) for key in _RATES
    }
    report = Report(
        state=state,
        **numbers,
        wall_seconds=_seconds(record["wall_seconds"]),
        sources={str(name): _source(source) for name, source in record["sources"].items()},
        health=None
        if record["health"] is None
        else Health(*(record["health"].get(key) for key in Health._fields)),
        budget=None if record["budget"] is None else _count(record["budget"]),
    )
    return Summary(
        trainer=str(record["trainer"]),
        incarnation=str(record["incarnation"]),
        sequence=_count(record["sequence"]),
        time=datetime.fromisoformat(record["time"]).isoformat(),
        monotonic_seconds=_seconds(record["monotonic_seconds"]),
        every_seconds=_seconds(record["every_seconds"]),
        report=report,
        modified=modified,
    )


_COUNTS = ("steps", "tokens_total", "tokens_processed", "restarts")
_RATES = (
    "tokens_per_second",
    "tokens_per_second_without_stalls",
    "data_wait_share",
    "mfu",
    "goodput",
)


def _source(record: Mapping[str, Any]) -> Source:
    rows = {str(name): _count(count) for name, count in record["rows"].items()}
    return Source(
        str(record["generation"]), rows, _count(record["tokens"]), _number(record["loss"])
    )


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is no count")
    return value


def _number(value: Any) -> float | None:
    """A finite number from 0 on, else None: a rate that is none must not become a plan."""
    return (
        float(value)
        if isinstance(value, int | float) and math.isfinite(value) and value >= 0
        else None
    )


def _seconds(value: Any) -> float:
    number = _number(value)
    if number is None:
        raise ValueError(f"{value!r} is no duration")
    return number


# --- files ----------------------------------------------------------------------------------------


def append_line(path: str, line: bytes) -> None:
    """Append a line to a local file; a half line that a kill left at its end stays a line of its
    own.
    """
    with open(path, "ab+") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 1))
        half = file.read(1) not in (b"", b"\n")
        file.write(b"\n" * half + line + b"\n")


def to_json(value: Any) -> bytes:
    """JSON on one line; NaN and infinity become null."""
    return json.dumps(_finite(value), allow_nan=False).encode()


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def _open(folder: str) -> tuple[Any, str]:
    fs, root = fsspec.core.url_to_fs(folder)
    fs.invalidate_cache()  # others write here
    return fs, root.rstrip("/")


def _trainers(fs: Any, root: str) -> list[str]:
    try:
        names = [
            os.path.basename(entry["name"])
            for entry in fs.ls(root, detail=True)
            if entry["type"] == "file"
        ]
    except FileNotFoundError:
        return []
    return sorted(
        {os.path.splitext(name)[0] for name in names if name.endswith((".json", ".jsonl"))}
    )


def _read_summary(fs: Any, root: str, name: str) -> Summary:
    path = f"{root}/{name}.json"
    try:
        found = parse(fs.cat_file(path), modified=_modified(fs, path))
    except OtherVersion:
        raise
    except (FileNotFoundError, ValueError) as error:
        last = _last_line(fs, f"{root}/{name}")
        if last is None:
            raise ValueError(str(error)) from None
        found = last
    if found.trainer != name:
        raise ValueError(
            f"speaks of trainer {found.trainer!r}: a copy? its demand would count twice"
        )
    return found


def _modified(fs: Any, path: str) -> float | None:
    try:
        return float(fs.modified(path).timestamp())
    except NotImplementedError:
        return None


def _last_line(fs: Any, path: str) -> Summary | None:
    """The newest line that can be read; on an object store that of the last object."""
    if isinstance(fs, LocalFileSystem):
        lines = _tail(f"{path}.jsonl").splitlines()
    else:
        lines = [fs.cat_file(name) for name in sorted(_objects(fs, path))[-1:]]
    for line in reversed(lines):
        try:
            return parse(line)
        except OtherVersion:
            raise
        except ValueError:
            continue  # a half line: the one before it is the last word
    return None


def _tail(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            return file.read()
    except FileNotFoundError:
        return b""


def _stored_lines(fs: Any, path: str) -> Iterator[tuple[str, bytes]]:
    if not isinstance(fs, LocalFileSystem):
        yield from ((name, fs.cat_file(name)) for name in sorted(_objects(fs, path)))
    elif fs.exists(f"{path}.jsonl"):
        for number, line in enumerate(fs.cat_file(f"{path}.jsonl").splitlines(), 1):
            yield f"{os.path.basename(path)}.jsonl:{number}", line


def _objects(fs: Any, path: str) -> list[str]:
    try:
        return [name for name in fs.ls(path, detail=False) if name.endswith(".json")]
    except FileNotFoundError:
        return []


# --- writing --------------------------------------------------------------------------------------


class Writer:
    """Tells a folder, local or an fsspec URI, how this trainer does. For rank 0; one live
    incarnation a trainer.

    `previous` is the last line of the incarnation before, None for a first start. An incarnation
    should write a line as it begins, or a restart that dies before its first is in no count. A
    store that is slow or away never holds up a step: lines are written by a thread, one is dropped
    while the one before it is under way, and errors are counted in `failures`, the last kept in
    `error`. To begin, the store must answer. ValueError for a name that is no file name, and for
    feedback of another version.
    """

    def __init__(
        self,
        folder: str,
        *,
        trainer: str,
        incarnation: str = "",
        every_seconds: float = 30.0,
        monotonic: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,99}", trainer, re.ASCII):
            raise ValueError(
                f"a trainer is named by letters, digits, '.', '_' and '-', got {trainer!r}"
            )
        if not 0 < every_seconds < math.inf:
            raise ValueError(f"every_seconds must be above 0, got {every_seconds}")
        self._fs, root = _open(folder)
        self._fs.makedirs(root, exist_ok=True)
        self._path = f"{root}/{trainer}"
        self._trainer, self._incarnation = trainer, incarnation or uuid.uuid4().hex[:12]
        self._every, self._monotonic, self._wall = every_seconds, monotonic, wall
        self._start = self._next = monotonic()
        self._thread: threading.Thread | None = None
        self.previous = _newest(self._fs, self._path)
        self._sequence = 0 if self.previous is None else self.previous.sequence + 1
        self.dropped = self.failures = 0
        self.error: str | None = None

    def due(self) -> bool:
        """Whether `every_seconds` have passed since the last line; true before the first."""
        return self._monotonic() >= self._next

    def write(self, report: Report) -> None:
        """Write a line, whether due or not."""
        now = self._monotonic()
        self._next = now + self._every
        if self._thread is not None and self._thread.is_alive():
            self.dropped += 1
            return
        line = self._line(report, now)
        # a daemon, so that a store that hangs does not keep the process from ending
        self._thread = threading.Thread(target=self._put, args=(self._sequence, line), daemon=True)
        self._sequence += 1
        self._thread.start()

    def flush(self, *, timeout_seconds: float = 10.0) -> bool:
        """Wait for the line under way; False when it is not through in time."""
        if self._thread is None:
            return True
        self._thread.join(timeout_seconds)
        return not self._thread.is_alive()

    def close(self, report: Report, *, timeout_seconds: float = 10.0) -> bool:
        """Write the last line, of state "stopped" or "failed"; False when the store did not take it
        in time.
        """
        if not self.flush(timeout_seconds=timeout_seconds):
            return False
        before = self.failures
        self.write(report)
        return self.flush(timeout_seconds=timeout_seconds) and self.failures == before

    def _line(self, report: Report, now: float) -> bytes:
        record = {
            "version": VERSION,
            "trainer": self._trainer,
            "incarnation": self._incarnation,
            "sequence": self._sequence,
            "time": datetime.fromtimestamp(self._wall(), UTC).isoformat(),
            "monotonic_seconds": now - self._start,
            "every_seconds": self._every,
            **report._asdict(),
            "sources": {name: source._asdict() for name, source in report.sources.items()},
            "health": None if report.health is None else report.health._asdict(),
        }
        return to_json(record)

    def _put(self, sequence: int, line: bytes) -> None:
        try:
            if isinstance(self._fs, LocalFileSystem):
                append_line(f"{self._path}.jsonl", line)
                _replace(f"{self._path}.json", line)
            else:
                self._fs.pipe_file(f"{self._path}/{sequence:09}.json", line)
                self._fs.pipe_file(
                    f"{self._path}.json", line
                )  # one PUT: readers see the old or the new object
        # each store's client has its own errors, and none of them may stop the training
        except Exception as error:
            self.failures += 1
            self.error = repr(error)


def _newest(fs: Any, path: str) -> Summary | None:
    """The last word of an earlier incarnation.

    A kill may have come between the line and the summary, so both are read.
    """
    found = [line] if (line := _last_line(fs, path)) is not None else []
    if fs.exists(f"{path}.json"):
        try:
            found.append(parse(fs.cat_file(f"{path}.json")))
        except OtherVersion:
            raise
        except ValueError as error:
            if not found:
                raise ValueError(
                    f"{path}.json: {error}; remove it, or name the trainer otherwise"
                ) from None
    return max(found, key=lambda summary: summary.sequence, default=None)


def _replace(path: str, data: bytes) -> None:
    temporary = f"{path}.tmp"
    with open(temporary, "wb") as file:
        file.write(data)
    os.replace(temporary, path)
