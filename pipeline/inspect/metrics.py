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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import get_args

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from pipeline.batches.batch import decisions
from pipeline.controller.decide import HOUR, decide
from pipeline.controller.policy import Policy
from pipeline.controller.records import Generation, Inputs, Record, State, from_json
from pipeline.run.phases import FUNNEL_PHASES, SPECS
from pipeline.run.publish import published_to
from pipeline.run.results import store_of
from pipeline.run.state import read_state
from pipeline.run.status import phase_status
from stages.storage.catalog import current_entries, read_catalog
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
    "published_generations_total": "Generations in the catalog that none supersedes",
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
        scrape = _Scrape(self.root)
        scrape.read()
        for fault in sorted(scrape.faults - self.faults):
            self._report_fault(fault)
        self.faults = scrape.faults
        scrape.add("up", not self.faults)
        return list(scrape.families.values())


def serve(metrics: Metrics, *, host: str, port: int) -> tuple[str, threading.Thread]:
    """Answer GET /metrics in a thread, reading the files at each request.

    Returns the address, and the thread to wait for. `port` 0 takes any free one. OSError.
    """
    registry = CollectorRegistry()
    registry.register(metrics)
    server, thread = start_http_server(port, host, registry)
    return f"http://{host}:{server.server_port}/metrics", thread


class _Scrape:
    """One scrape: the families of metrics that were read, and the faults of what could not be."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.families: dict[str, CounterMetricFamily | GaugeMetricFamily] = {}
        self.faults: set[str] = set()

    def add(self, name: str, value: float | None, **labels: str) -> None:
        """Add a number under a key of _HELP; an unknown one is left out."""
        if value is None:
            return
        if name not in self.families:
            kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            family = kind(f"gristmill_{name}", _HELP[name], labels=["run", *labels])
            self.families[name] = family
        # a file name need not be Unicode, but Prometheus requires it
        texts = [v.encode("utf-8", "replace").decode() for v in (self.root, *labels.values())]
        self.families[name].add_metric(texts, value)

    @contextmanager
    def reading(self, what: str) -> Iterator[None]:
        """Turn any error, of a broken file or of a store's client, into a fault of `what`."""
        try:
            yield
        except Exception as error:
            self.faults.add(f"{what}: {type(error).__name__}: {error}")

    def read(self) -> None:
        """Add all metrics but `up`."""
        with self.reading(self.root):
            batches = [name for name in names_in(f"{self.root}/batches") if name.isdecimal()]
            batches.sort(key=int)
            record, home = None, self.root
            with self.reading(f"{self.root}/decisions.jsonl"):
                if lines := decisions(self.root):
                    record = from_json(Record, lines[-1])
            if not batches and record is None:
                with self.reading(f"{self.root}/run.json"):
                    home = published_to(self.root, read_state(self.root))
                    self._add_run(self.root, batch="")
            for name in batches[-BATCHES:]:
                directory = f"{self.root}/batches/{name}"
                with self.reading(f"{directory}/run.json"):
                    # the newest batch may have been cut off before its run began
                    if name != batches[-1] or exists(f"{directory}/run.json"):
                        self._add_run(directory, batch=name)
            if record:
                self._add_decision(record, batches)
            self._add_supply(home, record)

    def _add_run(self, root: str, *, batch: str) -> None:
        state = read_state(root)
        for phase in SPECS:
            store = store_of(root, state, phase)
            with self.reading(store.root):
                self._add_phase(phase, store, state.started or 0.0, batch)

    def _add_phase(self, phase: str, store: Store, since: float, batch: str) -> None:
        commits = store.listed_commits()
        status = phase_status(phase, store, commits, since=since)
        if not status.units:
            return
        units = {
            "done": status.done,
            "failed": status.failed - status.quarantined,
            "quarantined": status.quarantined,
            "left": status.left,
        }
        for state, count in units.items():
            self.add("units", count, batch=batch, phase=phase, state=state)
        numbers = {
            "read_bytes_total": status.bytes_read or None,
            "written_bytes_total": status.bytes_written,
            "cpu_seconds_total": status.cpu_seconds,
            "rows_per_second": status.rows_per_second,
            "last_commit_timestamp_seconds": status.last_commit,
        }
        for name, value in numbers.items():
            self.add(name, value, batch=batch, phase=phase)
        if stage := _FUNNEL.get(phase):
            for reason, count in commits.counts().items():
                self.add("documents_total", count, batch=batch, stage=stage, reason=reason)

    def _add_decision(self, record: Record, batches: list[str]) -> None:
        decision, left = record.decision, record.inputs.inputs_left
        for state in get_args(State):
            self.add("decision_state", state == decision.state, state=state)
        self.add("decision_inputs", decision.inputs)
        self.add("decision_timestamp_seconds", record.inputs.now)
        if len(batches) > len(record.inputs.batches):  # a batch began after this decision
            uri = f"{self.root}/batches/{batches[-1]}/batch.json"
            with self.reading(uri):
                taken = json.loads(read_bytes(uri))["inputs"] if exists(uri) else []
                left -= len({i["path"] for i in taken})
        self.add("inputs_left", left)

    def _add_supply(self, home: str, record: Record | None) -> None:
        """What is published in `home`, what its trainers report, how long the supply lasts."""
        trainers: list[feedback.Summary] = []
        with self.reading(f"{home}/feedback"):
            trainers, faults = feedback.read_summaries(f"{home}/feedback")
            self.faults |= {f"{home}/feedback/{fault.where}: {fault.what}" for fault in faults}
        for trainer in trainers:
            self._add_trainer(trainer)
        uri = f"{home}/catalog.jsonl"
        with self.reading(uri):
            generations = tuple(
                Generation(e["name"], e["rows"], e["tokens"])
                for e in current_entries(read_catalog(home))
            )
            self.add("published_generations_total", len(generations))
            self.add("published_tokens_total", sum(g.tokens for g in generations))
            if generations:
                fs, path = open_fs(uri)
                self.add("published_timestamp_seconds", fs.modified(path).timestamp())
            self._add_demand(home, record, generations, tuple(trainers))

    def _add_demand(
        self,
        home: str,
        record: Record | None,
        generations: tuple[Generation, ...],
        trainers: tuple[feedback.Summary, ...],
    ) -> None:
        if record:
            policy, inputs = record.policy, replace(record.inputs, before=record.decision.memory)
        else:
            policy, inputs = Policy(), Inputs(0.0, home, (), (), (), 0)
        now = replace(inputs, now=time.time(), generations=generations, trainers=trainers)
        decision = decide(now, policy)
        hours = decision.supply_hours
        self.add("demand_tokens_per_second", decision.demand_tokens_per_second)
        self.add("supply_tokens", decision.supply_tokens)
        self.add("supply_seconds", None if hours is None else hours * HOUR)

    def _add_trainer(self, summary: feedback.Summary) -> None:
        report, trainer = summary.report, summary.trainer
        for state in get_args(feedback.State):
            self.add("trainer_state", state == report.state, trainer=trainer, state=state)
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
        for name, value in numbers.items():
            self.add(f"trainer_{name}", value, trainer=trainer)
