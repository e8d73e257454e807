"""Metrics of a run or series for Prometheus, read from its files at each scrape.

Neither the cluster nor the driver is asked, so it works during a run, after it, and from another
machine. Unreadable files are reported and set `gristmill_up` to 0; everything else is still served.
Unit metrics cover only the newest batches, which bounds the cost of a scrape: Prometheus keeps what
it has read of the others. Supply and demand are as of now, computed by the controller under the
policy of its last decision.
"""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple, get_args

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from pipeline.controller.decide import HOUR, decide
from pipeline.controller.policy import Policy
from pipeline.controller.records import Generation, Inputs, PlanState, Record, State, from_json
from pipeline.run.phases import FUNNEL_PHASES, SPECS
from pipeline.run.publish import published_to
from pipeline.run.results import store_of
from pipeline.run.state import read_state
from pipeline.run.status import phase_status
from stages.storage.catalog import read_catalog
from stages.storage.files import exists, names_in, open_fs, read_bytes
from stages.storage.ledger import Store
from trainer.telemetry import feedback

BATCHES = 2  # newest batches with unit metrics: the one in progress and the one before it
# phases whose rows are documents with one outcome each; those of extract are input records
_FUNNEL = {phase: stage for stage, phase in FUNNEL_PHASES.items()}
# names that end in _total are counters, all others gauges
_HELP = {
    "up": "1 if every file of the run that is needed could be read",
    "documents_total": "Documents by the rule that rejected them, or kept",
    "read_bytes_total": "Bytes of input read, in phases that count them",
    "written_bytes_total": "Bytes of output",
    "cpu_seconds_total": "Core-seconds of committed units",
    "units": "Units that are done, failed, quarantined or left",
    "rows_per_second": "Rows of a phase per second in which a unit was at work",
    "last_commit_timestamp_seconds": "When the latest unit was committed, Unix time",
    "published_generations_total": "Generations in the catalog",
    "published_tokens_total": "Tokens of the generations in the catalog",
    "published_timestamp_seconds": "When the catalog last changed, Unix time by the store's clock",
    "supply_seconds": "Time until the first live trainer has nothing left to read",
    "supply_tokens": "Tokens that the live trainer that is furthest ahead has not read",
    "demand_tokens_per_second": "Tokens per second that live trainers could take",
    "decision_state": "1 for the state of the controller's last decision",
    "decision_inputs": "Inputs that the controller's last decision asked for",
    "decision_timestamp_seconds": "When the controller last decided, Unix time",
    "inputs_left": "Inputs of the listing that no batch has taken, as of the last decision",
    "trainer_state": "1 for the state that the trainer last reported",
    "trainer_consumed_tokens": "Tokens in the state: a restart goes back to the checkpoint's",
    "trainer_processed_tokens_total": "Tokens of all work, including what restarts threw away",
    "trainer_tokens_per_second": "Speed with stalls",
    "trainer_tokens_per_second_without_stalls": (
        "Speed without data wait, checkpoints, evaluation, restarts"
    ),
    "trainer_data_wait_ratio": "Share of the time spent waiting for data",
    "trainer_mfu_ratio": "Model FLOPs utilization",
    "trainer_restarts_total": "Restarts",
    "trainer_timestamp_seconds": "When the trainer last reported, Unix time by the store's clock",
}


class Sample(NamedTuple):
    """A number: a key of _HELP, its value, and its labels."""

    name: str
    value: float
    labels: Mapping[str, str] = {}


class Metrics:
    """The metrics of a run directory or series, as a collector of prometheus_client.

    `report_fault` is called once for each file that cannot be read, until it can be read again;
    `faults` has all faults of the last scrape.
    """

    def __init__(self, root: str, report_fault: Callable[[str], None]) -> None:
        self.root, self._report_fault = root.rstrip("/"), report_fault
        self.faults: set[str] = set()

    def collect(self) -> list[Metric]:
        """All metric families as of now. Never raises."""
        reader = _Reader(self.root)
        samples = list(reader.samples())
        faults = set(reader.faults)
        for fault in sorted(faults - self.faults):
            self._report_fault(fault)
        self.faults = faults
        return _families([Sample("up", not faults), *samples], run=self.root)


def serve(metrics: Metrics, *, host: str, port: int) -> tuple[str, threading.Thread]:
    """Answer GET /metrics in a thread, reading the files at each request.

    Returns the address, and the thread to wait for. `port` 0 takes any free one. OSError.
    """
    registry = CollectorRegistry()
    registry.register(metrics)
    server, thread = start_http_server(port, host, registry)
    return f"http://{host}:{server.server_port}/metrics", thread


def _families(samples: Iterable[Sample], *, run: str) -> list[Metric]:
    families: dict[str, CounterMetricFamily | GaugeMetricFamily] = {}
    for name, value, labels in samples:
        if name not in families:
            kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            families[name] = kind(f"gristmill_{name}", _HELP[name], labels=["run", *labels])
        # a file name need not be Unicode, but Prometheus requires it
        texts = [v.encode("utf-8", "replace").decode() for v in (run, *labels.values())]
        families[name].add_metric(texts, value)
    return list(families.values())


class _Reader:
    """Reads one scrape; `faults` collects what could not be read."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.faults: list[str] = []

    @contextmanager
    def reading(self, what: str) -> Iterator[None]:
        """Turn any error, of a broken file or of a store's client, into a fault of `what`."""
        try:
            yield
        except Exception as error:
            self.faults.append(f"{what}: {type(error).__name__}: {error}")

    def samples(self) -> Iterator[Sample]:
        """All samples but `up`."""
        with self.reading(self.root):
            batches = [name for name in names_in(f"{self.root}/batches") if name.isdecimal()]
            batches.sort(key=int)
            record, home = None, self.root
            with self.reading(f"{self.root}/decisions.jsonl"):
                record = _last_decision(self.root)
            if not batches and record is None:
                with self.reading(f"{self.root}/run.json"):
                    home = published_to(self.root, read_state(self.root))
                    yield from self._run(self.root, batch="")
            for name in batches[-BATCHES:]:
                directory = f"{self.root}/batches/{name}"
                with self.reading(f"{directory}/run.json"):
                    # the newest batch may have been cut off before its run began
                    if name != batches[-1] or exists(f"{directory}/run.json"):
                        yield from self._run(directory, batch=name)
            if record:
                yield from self._decision(record, batches)
            yield from self._supply(home, record)

    def _run(self, root: str, *, batch: str) -> Iterator[Sample]:
        state = read_state(root)
        since = state.started or 0.0
        for phase in SPECS:
            store = store_of(root, state, phase)
            with self.reading(store.root):
                yield from _phase(phase, store, since, batch)

    def _decision(self, record: Record, batches: list[str]) -> Iterator[Sample]:
        decision, left = record.decision, record.inputs.inputs_left
        for state in get_args(State):
            yield Sample("decision_state", state == decision.state, {"state": state})
        yield Sample("decision_inputs", decision.inputs)
        yield Sample("decision_timestamp_seconds", record.inputs.now)
        if len(batches) > len(record.inputs.batches):  # a batch began after this decision
            uri = f"{self.root}/batches/{batches[-1]}/batch.json"
            with self.reading(uri):
                left -= len(json.loads(read_bytes(uri))["inputs"]) if exists(uri) else 0
        yield Sample("inputs_left", left)

    def _supply(self, home: str, record: Record | None) -> Iterator[Sample]:
        """What is published in `home`, what its trainers report, how long the supply lasts."""
        trainers: list[feedback.Summary] = []
        with self.reading(f"{home}/feedback"):
            trainers, faults = feedback.read_summaries(f"{home}/feedback")
            self.faults += [f"{home}/feedback/{fault.where}: {fault.what}" for fault in faults]
        for trainer in trainers:
            yield from _trainer(trainer)
        uri = f"{home}/catalog.jsonl"
        with self.reading(uri):
            generations = tuple(
                Generation(e["name"], e["rows"], e["tokens"]) for e in read_catalog(home)
            )
            yield Sample("published_generations_total", len(generations))
            yield Sample("published_tokens_total", sum(g.tokens for g in generations))
            if generations:
                fs, path = open_fs(uri)
                yield Sample("published_timestamp_seconds", fs.modified(path).timestamp())
            yield from _demand(home, record, generations, trainers)


def _last_decision(root: str) -> Record | None:
    uri = f"{root}/decisions.jsonl"
    if not exists(uri):
        return None
    return from_json(Record, read_bytes(uri).splitlines()[-1])


def _phase(phase: str, store: Store, since: float, batch: str) -> Iterator[Sample]:
    commits = store.listed_commits()
    status = phase_status(phase, store, commits, since=since)
    if not status.units:
        return
    labels = {"batch": batch, "phase": phase}
    failed = status.failed - status.quarantined
    states = {"done": status.done, "failed": failed, "quarantined": status.quarantined}
    for state, count in (states | {"left": status.left}).items():
        yield Sample("units", count, labels | {"state": state})
    numbers = {
        "read_bytes_total": status.bytes_read or None,
        "written_bytes_total": status.bytes_written,
        "cpu_seconds_total": status.cpu_seconds,
        "rows_per_second": status.rows_per_second,
        "last_commit_timestamp_seconds": status.last_commit,
    }
    yield from _known(numbers, labels)
    if phase in _FUNNEL:
        counts: Counter[str] = Counter()
        for commit in commits:
            counts.update({str(reason): int(count) for reason, count in commit.counts.items()})
        for reason, count in counts.items():
            labels = {"batch": batch, "stage": _FUNNEL[phase], "reason": reason}
            yield Sample("documents_total", count, labels)


def _demand(
    home: str,
    record: Record | None,
    generations: tuple[Generation, ...],
    trainers: Iterable[feedback.Summary],
) -> Iterator[Sample]:
    inputs = record.inputs if record else Inputs(0.0, home, (), (), (), 0)
    before = record.decision.memory if record else PlanState()
    policy = record.policy if record else Policy()
    now = replace(
        inputs,
        now=time.time(),
        generations=generations,
        trainers=tuple(trainers),
        before=before,
    )
    decision = decide(now, policy)
    hours = decision.supply_hours
    numbers = {
        "demand_tokens_per_second": decision.demand_tokens_per_second,
        "supply_tokens": decision.supply_tokens,
        "supply_seconds": None if hours is None else hours * HOUR,
    }
    yield from _known(numbers, {})


def _trainer(summary: feedback.Summary) -> Iterator[Sample]:
    report, labels = summary.report, {"trainer": summary.trainer}
    for state in get_args(feedback.State):
        yield Sample("trainer_state", state == report.state, labels | {"state": state})
    numbers = {
        "trainer_consumed_tokens": report.tokens_total,
        "trainer_processed_tokens_total": report.tokens_processed,
        "trainer_tokens_per_second": report.tokens_per_second,
        "trainer_tokens_per_second_without_stalls": report.tokens_per_second_without_stalls,
        "trainer_data_wait_ratio": report.data_wait_share,
        "trainer_mfu_ratio": report.mfu,
        "trainer_restarts_total": report.restarts,
        "trainer_timestamp_seconds": summary.modified,
    }
    yield from _known(numbers, labels)


def _known(numbers: Mapping[str, float | None], labels: Mapping[str, str]) -> Iterator[Sample]:
    for name, value in numbers.items():
        if value is not None:
            yield Sample(name, value, labels)
