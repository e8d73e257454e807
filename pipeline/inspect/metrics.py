"""What a run or series comes to, for Prometheus: read from its files at each scrape, on a disk or
an object store.

Neither cluster nor driver is asked, so it works while a run is on, after it, and from another
machine. What cannot be read is told and left out, and `gristmill_up` is 0; the rest is served.
Units are told of the newest batches alone: Prometheus keeps what it was told of others. Supply and
demand are of the moment, by the controller's own arithmetic under its last policy.
"""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple, get_args

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from pipeline.controller import decide
from pipeline.report.run_data import covered
from pipeline.run import publish
from pipeline.run.results import PHASES, store_of
from stages.storage.files import names_in, open_fs
from stages.storage.ledger import Store
from trainer.telemetry import feedback

BATCHES = 10  # whose units are told, the newest
# phases whose rows are documents, one outcome each; of extract they are the records of the input
_FUNNEL = {"extract": "extract", "dedup keep": "dedup", "refine": "refine", "pack": "pack"}
_C, _G = CounterMetricFamily, GaugeMetricFamily
_FAMILIES: dict[
    str, tuple[type[CounterMetricFamily] | type[GaugeMetricFamily], str, tuple[str, ...]]
] = {
    "up": (_G, "1 if every file of the run that was looked for could be read", ()),
    "documents_total": (
        _C,
        "Documents by the rule that rejected them, or kept",
        ("batch", "stage", "reason"),
    ),
    "read_bytes_total": (_C, "Bytes of input read, where a phase counts them", ("batch", "phase")),
    "written_bytes_total": (_C, "Bytes of output", ("batch", "phase")),
    "cpu_seconds_total": (_C, "Core-seconds of units that are done", ("batch", "phase")),
    "units": (_G, "Units that are done, failed, set aside or left", ("batch", "phase", "state")),
    "rows_per_second": (
        _G,
        "Rows of a phase a second of the time in which a unit was at work",
        ("batch", "phase"),
    ),
    "last_commit_timestamp_seconds": (
        _G,
        "When a unit was done last, Unix time",
        ("batch", "phase"),
    ),
    "published_generations_total": (_C, "Generations in the catalog", ()),
    "published_tokens_total": (_C, "Tokens of the generations in the catalog", ()),
    "published_timestamp_seconds": (
        _G,
        "When the catalog was changed last, Unix time by the store's clock",
        (),
    ),
    "supply_seconds": (_G, "Time until the first live trainer has nothing left to read", ()),
    "supply_tokens": (_G, "Tokens that the live trainer furthest on has not read", ()),
    "demand_tokens_per_second": (_G, "What live trainers could take", ()),
    "decision_state": (_G, "1 for the state that the controller found last", ("state",)),
    "decision_inputs": (
        _G,
        "Inputs that the controller wanted for a batch when it was last asked",
        (),
    ),
    "decision_timestamp_seconds": (_G, "When the controller was last asked, Unix time", ()),
    "inputs_left": (
        _G,
        "Inputs of the listing that no batch has taken, as of the last decision",
        (),
    ),
    "trainer_state": (_G, "1 for what the trainer last said it was", ("trainer", "state")),
    "trainer_consumed_tokens": (
        _G,
        "Tokens in the state: a restart takes them back to the checkpoint's",
        ("trainer",),
    ),
    "trainer_processed_tokens_total": (
        _C,
        "Tokens of all work, that which restarts threw away included",
        ("trainer",),
    ),
    "trainer_tokens_per_second": (_G, "With stalls", ("trainer",)),
    "trainer_tokens_per_second_without_stalls": (
        _G,
        "Without data wait, checkpoints, evaluation, restarts",
        ("trainer",),
    ),
    "trainer_data_wait_ratio": (
        _G,
        "Share of the time that was spent waiting for data",
        ("trainer",),
    ),
    "trainer_mfu_ratio": (_G, "Model FLOPs utilisation", ("trainer",)),
    "trainer_restarts_total": (_C, "Restarts", ("trainer",)),
    "trainer_timestamp_seconds": (
        _G,
        "When the trainer told last, Unix time by the store's clock",
        ("trainer",),
    ),
}


class Sample(NamedTuple):
    """A number: a key of _FAMILIES, and the values of its labels."""

    name: str
    value: float
    labels: tuple[str, ...] = ()


class Metrics:
    """A run directory or series, as a collector of prometheus_client. It keeps what it has read:
    one for a server's life.

    `tell` is called with what cannot be read, once for as long as it stands; `faults` has all of
    the last scrape.
    """

    def __init__(self, root: str, tell: Callable[[str], None]) -> None:
        self.root, self._tell = root.rstrip("/"), tell
        self.faults: set[str] = set()
        self._lock = threading.Lock()  # scrapes may overlap
        self._known: dict[str, tuple[str, Any]] = {}
        self._last: tuple[float, list[Metric]] = (0.0, [])  # when it was had, and what
        self._done: dict[str, list[Sample]] = {}  # of batches that will not change any more

    def collect(self) -> list[Metric]:
        """All families as they stand now. Never raises."""
        asked = time.monotonic()
        with self._lock:
            if self._last[0] > asked:  # by the scrape that this one has waited for
                return self._last[1]
            reader = _Reader(self._known)
            samples = list(reader.as_far(self._samples(reader), self.root))
            for fault in sorted(set(reader.faults) - self.faults):
                self._tell(fault)
            self.faults = set(reader.faults)
            # of a store that was away for a moment not all was asked for
            self._known = self._known | reader.known if self.faults else reader.known
            self._last = (
                time.monotonic(),
                _families([Sample("up", not self.faults), *samples], run=self.root),
            )
            return self._last[1]

    def _samples(self, reader: "_Reader") -> Iterator[Sample]:
        record = reader.file(f"{self.root}/decisions.jsonl", _last_record)
        names = sorted(
            (name for name in names_in(f"{self.root}/batches") if name.isdecimal()), key=int
        )
        home = self.root
        if not names and record is None:
            state = reader.file(f"{self.root}/run.json", _STATE)
            yield from reader.as_far(_of_run(reader, self.root, state, batch=""), "run")
            home = publish.published_to(self.root, state) if state else self.root
        self._done = {
            name: samples for name, samples in self._done.items() if name in names[-BATCHES:]
        }
        for name in names[-BATCHES:]:
            yield from self._of_batch(reader, name, newest=name == names[-1])
        if record:
            begun = (
                reader.file(f"{self.root}/batches/{names[-1]}/batch.json", _object("inputs"))
                if names
                else None
            )
            after = begun["inputs"] if begun and len(names) > len(record.inputs.batches) else []
            yield from _decided(record, inputs_taken=len(after))
        yield from _supply(reader, home, record)

    def _of_batch(self, reader: "_Reader", name: str, *, newest: bool) -> list[Sample]:
        if name in self._done:
            return self._done[name]
        directory, faults = f"{self.root}/batches/{name}", len(reader.faults)
        done = reader.file(
            f"{directory}/done.json", _object("generation")
        )  # first: what is read after it will stay
        state = reader.file(f"{directory}/run.json", _STATE)
        begun = state or not newest  # the newest may have been cut off before its run began
        samples = (
            list(reader.as_far(_of_run(reader, directory, state, batch=name), directory))
            if begun
            else []
        )
        if done and len(reader.faults) == faults:
            self._done[name] = samples
        return samples


def serve(metrics: Metrics, *, host: str, port: int) -> tuple[str, threading.Thread]:
    """Answer GET /metrics in a thread, afresh each time; the address, and the thread to wait for.

    `port` 0: any. OSError.
    """
    # reading all for the first time may take longer than Prometheus waits for a scrape, 10 s
    metrics.collect()
    registry = CollectorRegistry()
    registry.register(metrics)
    server, thread = start_http_server(port, host, registry)
    return f"http://{host}:{server.server_port}/metrics", thread


def _families(samples: Iterable[Sample], *, run: str) -> list[Metric]:
    found: dict[str, CounterMetricFamily | GaugeMetricFamily] = {}
    for sample in samples:
        kind, what, labels = _FAMILIES[sample.name]
        family = found.setdefault(
            sample.name, kind(f"gristmill_{sample.name}", what, labels=("run", *labels))
        )
        # a file name need not be Unicode, but Prometheus wants it
        family.add_metric(
            [label.encode("utf-8", "replace").decode() for label in (run, *sample.labels)],
            sample.value,
        )
    return list(found.values())


# --- files ----------------------------------------------------------------------------------------


class _Reader:
    """What files say, parsed again only where the store tells of another version than `before`; and
    what cannot be read.
    """

    def __init__(self, before: dict[str, tuple[str, Any]]) -> None:
        self.known: dict[
            str, tuple[str, Any]
        ] = {}  # name → version, value; of what was asked for alone
        self.faults: list[str] = []
        self._before = before

    def as_far(self, samples: Iterable[Sample], what: str) -> Iterator[Sample]:
        """The samples up to the first error, which is noted."""
        try:
            yield from samples
        except (
            Exception
        ) as error:  # whatever a broken file or a store's client comes up with: the rest is served
            self.faults.append(f"{what}: {type(error).__name__}: {error}")

    def file(self, uri: str, parse: Callable[[bytes], Any]) -> Any:
        """What `parse` makes of a file; None where there is none, or none that can be read."""
        fs, path = open_fs(uri)
        try:
            entry = fs.info(path)
        except FileNotFoundError:
            return None
        if not self._has(entry):
            self._take(fs, entry, parse)
        return self.known.get(entry["name"], ("", None))[1]

    def folder(self, uri: str, parse: Callable[[bytes], Any]) -> list[Any]:
        """The same of the .json files in a folder, in order of name."""
        fs, path = open_fs(uri)
        try:
            entries = fs.ls(path, detail=True)
        except FileNotFoundError:
            return []
        entries = sorted(
            (e for e in entries if e["name"].endswith(".json")), key=lambda e: str(e["name"])
        )
        with ThreadPoolExecutor(16) as pool:  # object stores answer in tens of milliseconds
            list(
                pool.map(
                    lambda entry: self._take(fs, entry, parse),
                    (e for e in entries if not self._has(e)),
                )
            )
        return [self.known[e["name"]][1] for e in entries if e["name"] in self.known]

    def _has(self, entry: dict[str, Any]) -> bool:
        before = self._before.get(entry["name"])
        if before is None or before[0] != str(
            entry
        ):  # size, time, inode or ETag: each store has its own names for them
            return False
        self.known[entry["name"]] = before
        return True

    def _take(self, fs: Any, entry: dict[str, Any], parse: Callable[[bytes], Any]) -> None:
        try:
            self.known[entry["name"]] = (str(entry), parse(fs.cat_file(entry["name"])))
        except FileNotFoundError:
            pass  # withdrawn at this moment
        except Exception as error:  # as above
            self.faults.append(f"{entry['name']}: {type(error).__name__}: {error}")


def _object(*keys: str) -> Callable[[bytes], dict[str, Any]]:
    """To read a JSON object that has these keys."""

    def parse(data: bytes) -> dict[str, Any]:
        found = {**json.loads(data)}
        return found | {key: found[key] for key in keys}

    return parse


_STATE = _object("keys", "config", "history")

# --- a run ----------------------------------------------------------------------------------------


class _Unit(NamedTuple):
    """What is told of a unit that is done: a commit without what would fill the memory of a server."""

    name: str
    fingerprint: str
    rows: int
    counts: dict[str, int]
    read: int
    written: int
    cpu: float
    started: float
    finished: float


def _unit(data: bytes) -> _Unit:
    c = json.loads(data)
    read = 0 if c["extra"].get("reapplied") else int(c["totals"].get("bytes_in", 0))
    written, finished = sum(output["bytes"] for output in c["outputs"]), c["extra"]["finished"]
    started = finished - c["seconds"]
    counts = {reason: int(count) for reason, count in c["counts"].items()}
    return _Unit(
        c["unit"],
        c["fingerprint"],
        c["rows_in"],
        counts,
        read,
        written,
        c["cpu_seconds"],
        started,
        finished,
    )


def _of_run(
    reader: _Reader, root: str, state: dict[str, Any] | None, *, batch: str
) -> Iterator[Sample]:
    if state is None:
        raise ValueError(f"{root} is neither a run nor a series, or its run.json cannot be read")
    since = state["history"][-1]["started"]
    for phase in PHASES:
        store = store_of(root, state, phase)
        listed = reader.file(store.uri("units.json"), _object())
        if listed:
            yield from reader.as_far(
                _of_phase(reader, store, phase, listed, since, batch), store.root
            )


def _of_phase(
    reader: _Reader, store: Store, phase: str, listed: dict[str, str], since: float, batch: str
) -> Iterator[Sample]:
    units = [
        u for u in reader.folder(store.uri("commits"), _unit) if listed.get(u.name) == u.fingerprint
    ]
    failures = {
        record["unit"]: record for record in reader.folder(store.uri("failures"), _object("unit"))
    }
    failed = {
        name: record
        for name, record in failures.items()
        if name in listed.keys() - {u.name for u in units}
    }
    aside = sum(record.get("set_aside") == listed[name] for name, record in failed.items())
    states = {"done": len(units), "failed": len(failed) - aside, "set_aside": aside}
    for state, count in (states | {"left": len(listed) - sum(states.values())}).items():
        yield Sample("units", count, (batch, phase, state))
    if read := sum(u.read for u in units):
        yield Sample("read_bytes_total", read, (batch, phase))
    yield Sample("written_bytes_total", sum(u.written for u in units), (batch, phase))
    yield Sample("cpu_seconds_total", sum(u.cpu for u in units), (batch, phase))
    if phase in _FUNNEL:
        counts: Counter[str] = Counter()
        for unit in units:
            counts.update(unit.counts)
        yield from (
            Sample("documents_total", count, (batch, _FUNNEL[phase], reason))
            for reason, count in counts.items()
        )
    if units:
        yield Sample(
            "last_commit_timestamp_seconds", max(u.finished for u in units), (batch, phase)
        )
        # the rate of the run under way, as `gristmill status` tells it
        fresh = [u for u in units if u.finished >= since] or units
        if busy := covered((u.started, u.finished) for u in fresh):
            yield Sample("rows_per_second", sum(u.rows for u in fresh) / busy, (batch, phase))


# --- supply and demand ----------------------------------------------------------------------------


def _last_record(data: bytes) -> decide.Record:
    return decide.from_json(decide.Record, data.splitlines()[-1])


def _generations(data: bytes) -> tuple[decide.Generation, ...]:
    entries = map(json.loads, data.splitlines())
    return tuple(decide.Generation(e["name"], e["rows"], e["tokens"]) for e in entries)


def _decided(record: decide.Record, *, inputs_taken: int) -> Iterator[Sample]:
    decision = record.decision
    yield from (
        Sample("decision_state", state == decision.state, (state,))
        for state in get_args(decide.State)
    )
    yield Sample("decision_inputs", decision.inputs)
    yield Sample("decision_timestamp_seconds", record.inputs.now)
    yield Sample("inputs_left", record.inputs.inputs_left - inputs_taken)


def _supply(reader: _Reader, home: str, record: decide.Record | None) -> Iterator[Sample]:
    """What was published in `home`, what trainers say there, and how long the one lasts the others."""
    uri = f"{home}/catalog.jsonl"
    generations = reader.file(uri, _generations) or ()
    yield Sample("published_generations_total", len(generations))
    yield Sample("published_tokens_total", sum(g.tokens for g in generations))
    if generations:
        fs, path = open_fs(uri)
        yield Sample("published_timestamp_seconds", fs.modified(path).timestamp())
    trainers, faults = feedback.read_summaries(f"{home}/feedback")
    reader.faults += [f"{home}/feedback/{fault.where}: {fault.what}" for fault in faults]
    for trainer in trainers:
        yield from _of_trainer(trainer)
    told = record.inputs if record else decide.Inputs(0.0, home, (), (), (), 0)
    before, policy = (
        (record.decision.memory, record.policy) if record else (decide.Memory(), decide.Policy())
    )
    told = replace(
        told, now=time.time(), generations=generations, trainers=tuple(trainers), before=before
    )
    found = decide.decide(told, policy)
    yield Sample("demand_tokens_per_second", found.demand_tokens_per_second)
    if found.supply_tokens is not None:
        yield Sample("supply_tokens", found.supply_tokens)
    if found.supply_hours is not None:
        yield Sample("supply_seconds", found.supply_hours * decide.HOUR)


def _of_trainer(summary: feedback.Summary) -> Iterator[Sample]:
    report, name = summary.report, (summary.trainer,)
    yield from (
        Sample("trainer_state", state == report.state, (*name, state))
        for state in get_args(feedback.State)
    )
    numbers = {
        "consumed_tokens": report.tokens_total,
        "processed_tokens_total": report.tokens_processed,
        "tokens_per_second": report.tokens_per_second,
        "tokens_per_second_without_stalls": report.tokens_per_second_without_stalls,
        "data_wait_ratio": report.data_wait_share,
        "mfu_ratio": report.mfu,
        "restarts_total": report.restarts,
        "timestamp_seconds": summary.modified,
    }
    yield from (
        Sample(f"trainer_{key}", value, name) for key, value in numbers.items() if value is not None
    )
