"""Doing a unit, without Ray: which errors are the unit's, and which end the process."""

import json
import time
from dataclasses import dataclass

import pytest

from pipeline.engine import attempts
from pipeline.engine.units import PhaseWork, Quarantined, run_unit
from stages.formats.tiktoken_encodings import load_encoding
from stages.storage.files import write_atomically
from stages.storage.ledger import Commit, Store, Unit


@dataclass(frozen=True)
class Task:
    path: str = "a.jsonl"


def outcome_of(work, folder):
    store = Store(str(folder))
    return run_unit(Unit("000001", "f", Task()), PhaseWork(work, None, store, 3, "i")), store


def test_a_panic_of_a_native_library_fails_its_unit_only(tmp_path):
    def panics(unit, plan, store):
        load_encoding("o200k_base").encode_ordinary(" " * 1_000_000)

    outcome, store = outcome_of(panics, tmp_path)
    assert outcome.commit is None and outcome.error.startswith("a.jsonl: PanicException: ")
    assert store.failures()["000001"].task == {"path": "a.jsonl"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_is_no_failure_of_the_unit(tmp_path, error):
    def interrupted(unit, plan, store):
        raise error

    with pytest.raises(error):
        outcome_of(interrupted, tmp_path)
    assert not Store(str(tmp_path)).failures()


# --- deaths of workers ----------------------------------------------------------------------------


def commits(unit, plan, store):
    return Commit(unit.name, unit.fingerprint)


def after_deaths(folder, nodes):
    """The outcome of a unit whose workers died on these nodes, by their ids."""
    store = Store(str(folder))
    records = [attempts.attempt() | {"node": node} for node in nodes]
    write_atomically(store.uri("attempts", "i", "000001"), json.dumps(records).encode())
    return outcome_of(commits, folder)[0]


@pytest.mark.parametrize(
    ("nodes", "quarantined"),
    [
        (["lost"] * 3, False),
        (["lost"] * 29, False),
        (["lost"] * 30, True),  # it may be the unit that takes the nodes down
        (["here"] * 2 + ["lost"] * 9, False),
        (["here", "lost", "here", "lost", "other"], True),
        (["here"] * 3, True),
        ([None] * 2, False),
        ([None] * 3, True),  # without Ray, or of an earlier version
    ],
)
def test_crashes_of_the_worker_count_and_losses_of_its_node_do_not(
    tmp_path, monkeypatch, nodes, quarantined
):
    monkeypatch.setattr(attempts, "live_nodes", lambda: {"here", "other"})
    monkeypatch.setattr(attempts, "NODE_CHECK_SECONDS", 0.0)
    outcome = after_deaths(tmp_path, nodes)
    assert (outcome.commit is None) == quarantined
    assert not quarantined or "its worker died" in outcome.error


def test_a_node_has_time_to_be_found_dead_before_its_loss_counts(tmp_path, monkeypatch):
    answers = iter([{"far"}, {"far"}, set()])
    monkeypatch.setattr(attempts, "live_nodes", lambda: next(answers))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    assert after_deaths(tmp_path, ["far"] * 3).commit is not None


def test_the_reason_of_a_quarantine_is_what_is_known():
    record = {"kernel_kills_since": 0, "available_bytes": 16_000_000_000}
    known = str(Quarantined([record, record]))
    assert "none for memory, of which 16.0 GB were free: a crash, or killed by another" in known
    assert "the kernel killed it for memory 1 times" in str(
        Quarantined([record, record | {"kernel_kills_since": 2}])
    )
    assert "out of memory?" in str(Quarantined([{}]))
