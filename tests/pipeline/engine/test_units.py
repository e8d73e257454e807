"""Doing a unit, without Ray: which errors are the unit's, and which end the process."""

from dataclasses import dataclass

import pytest

from pipeline.engine.units import PhaseWork, run_unit
from stages.formats.tokens import load_encoding
from stages.storage.ledger import Store, Unit


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
    assert outcome.commit is None and outcome.error.startswith("PanicException: ")
    assert store.failures()["000001"].task == {"path": "a.jsonl"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_is_no_failure_of_the_unit(tmp_path, error):
    def interrupted(unit, plan, store):
        raise error

    with pytest.raises(error):
        outcome_of(interrupted, tmp_path)
    assert not Store(str(tmp_path)).failures()
