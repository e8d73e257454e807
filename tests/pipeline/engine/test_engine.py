"""How units are handed out, begun again when late, and set aside when they kill: the engine, with
real Ray and real processes.
"""

import json
import os
import signal
import sys
import time
from concurrent.futures import Future
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from pipeline.__main__ import app
from pipeline.engine import attempts, dispatch
from pipeline.engine.cluster import Nodes, free_slots
from pipeline.engine.dispatch import on_ray
from pipeline.engine.stragglers import Stragglers, late_units, run_copy
from pipeline.engine.units import (
    PhaseWork,
    Quarantined,
    Resources,
    UnitOutcome,
    in_process,
    run_unit,
)
from pipeline.run import execute as execution
from pipeline.run import results
from pipeline.run.execute import RunFailed, execute, forget_failures
from pipeline.run.phases import PHASES
from pipeline.run.state import read_state
from pipeline.run.status import run_status
from stages.extract import extract
from stages.storage.ledger import Commit, Failure, Output, Store, Unit
from tests.support.inline import Silent, make_config
from tests.support.processes import wait_for_exit

SMALL = Resources(1.0, 100_000_000)
NO_FILTERS = (
    "input.format=jsonl",
    "extract.filters=[]",
    "refine.filters=[]",
    "pack.seq_len=64",
    "dedup.enabled=false",
)


def unit(name, size=0):
    return Unit(name, "f", extract.ExtractTask(f"{name}.jsonl", 0), size)


def note(unit, store):
    """Append to the list of starts, and count those of this unit."""
    with open(f"{store.root}/starts", "a") as file:
        file.write(f"{unit.name}\n")
    return starts(store).count(unit.name)


def starts(store):
    with open(f"{store.root}/starts") as file:
        return file.read().split()


# --- order ----------------------------------------------------------------------------------------


@pytest.mark.ray
def test_ray_begins_the_largest_units_first(ray_session, tmp_path):
    task = PhaseWork(_noted, None, Store(str(tmp_path)), 3, "i")
    units = [unit(name, 10 * n) for n, name in enumerate("abcde")]
    ends = list(on_ray()("ordered", task, units, SMALL._replace(parallelism=1)))
    assert "".join(starts(task.store)) == "edcba" and len(ends) == 5


def _noted(unit, plan, store):
    return Commit(unit.name, unit.fingerprint, rows_in=note(unit, store))


@pytest.mark.ray
def test_no_more_tasks_are_in_rays_queue_than_the_cluster_runs_and_a_number_that_waits(
    ray_session, tmp_path, monkeypatch
):
    monkeypatch.setattr(dispatch, "MAX_WAITING", 3)
    begun = []
    real = dispatch._Tasks._watch
    monkeypatch.setattr(
        dispatch._Tasks,
        "_watch",
        lambda self, name, task: (begun.append(name), real(self, name, task)),
    )
    task = PhaseWork(_noted, None, Store(str(tmp_path)), 3, "i")
    ends = on_ray()("many", task, [unit(f"{n:02}") for n in range(40)], SMALL)
    done = {next(ends).unit}
    assert len(begun) <= 3 + os.cpu_count() + 1
    done |= {end.unit for end in ends}
    assert done == set(begun) and len(done) == len(begun) == 40


@pytest.mark.ray
def test_a_phase_that_ends_early_leaves_nothing_in_rays_queue(ray_session, tmp_path):
    task = PhaseWork(_noted_slowly, None, Store(str(tmp_path)), 3, "i")
    ends = on_ray()("early", task, [unit(f"{n:02}") for n in range(40)], SMALL)
    next(ends)
    ends.close()
    last = PhaseWork(_noted, None, Store(str(tmp_path / "last")), 3, "i")
    (tmp_path / "last").mkdir()
    assert [end.unit for end in on_ray()("last", last, [unit("last")], SMALL)] == ["last"]
    begun = starts(task.store)
    time.sleep(1.5)  # three units each
    assert starts(task.store) == begun and len(begun) < 40


@pytest.mark.ray
def test_a_phase_with_a_large_model_has_workers_that_no_other_phase_has(ray_session, tmp_path):
    units, pids = [unit(name) for name in "abcd"], {}
    for phase, own in (("others", False), ("large", True)):
        work = PhaseWork(_whoami, None, Store(str(tmp_path / phase)), 3, "i")
        ends = on_ray()(phase, work, units, SMALL._replace(own_workers=own))
        pids[phase] = {end.commit.rows_in for end in ends}
    assert not pids["large"] & pids["others"]


def _whoami(unit, plan, store):
    return Commit(unit.name, unit.fingerprint, rows_in=os.getpid())


def _noted_slowly(unit, plan, store):
    time.sleep(0.5)
    return _noted(unit, plan, store)


def test_slots_are_bound_by_processors_and_by_memory_where_it_is_known():
    worker = Resources(2.0, 10)
    assert Nodes(3, {"CPU": 7.0, "memory": 100.0}).slots(worker) == 9
    assert Nodes(3, {"CPU": 7.0, "memory": 25.0}).slots(worker) == 6
    assert Nodes(3, {"CPU": 7.0}).slots(worker) == 9
    assert Nodes(3, {"CPU": 1.0, "memory": 100.0}).slots(worker) == 0


def test_room_for_a_worker_is_on_one_node(monkeypatch):
    worker, free = Resources(1.0, 10), {}
    monkeypatch.setattr("ray._private.state.available_resources_per_node", lambda: free)
    assert free_slots(worker, running=0) == 0
    free |= {"a": {"CPU": 2.0, "memory": 9.0}, "b": {"CPU": 2.0}, "c": {"memory": 50.0}}
    assert free_slots(worker, running=0) == 0
    free |= {"d": {"CPU": 2.5, "memory": 30.0}, "e": {"CPU": 1.0, "memory": 10.0}}
    assert free_slots(worker, running=5) == 3
    assert free_slots(worker._replace(parallelism=6), running=5) == 1


def test_inputs_tell_their_size(tmp_path):
    seen = {}

    def run_units(name, task, units, resources):
        seen[name] = {u.name: u.bytes for u in units}
        return in_process(name, task, units, resources)

    for name, count in (("a", 3), ("b", 7)):
        rows = [
            {"text": f"{name} {n} the old mill by the river has been grinding wheat"}
            for n in range(count)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    execute(make_config(tmp_path, files, *NO_FILTERS), Silent(), run_units)
    assert seen["extract"] == {"000000": files[0].stat().st_size, "000001": files[1].stat().st_size}
    for phase, kind in (("refine", "extract"), ("pack", "refine")):
        commits = results.all_commits(f"{tmp_path}/run", read_state(f"{tmp_path}/run"))[kind]
        outputs = [o for c in commits for o in c.outputs if o.kind in ("documents", "corpus")]
        assert sum(seen[phase].values()) == sum(o.bytes for o in outputs) > 0


# --- second copies --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rates, waited, expected",
    [
        ([], 1e9, []),  # nothing to compare with
        ([1.0, 2.0, 9.0], 59.0, []),  # patience
        ([1.0, 2.0, 9.0], 61.0, ["small"]),
        ([1.0, 2.0, 9.0], 601.0, ["large", "small"]),
    ],
)
def test_a_unit_is_late_by_the_rates_of_the_others_and_its_own_size(rates, waited, expected):
    found = late_units(
        [unit("large", 100), unit("small", 10), unit("huge", 10_000)],
        rates,
        waited=waited,
        patience=60.0,
    )
    assert [u.name for u in found] == expected


def test_late_units_are_begun_again_only_while_there_is_room():
    units, watch = [unit("a", 10), unit("b", 10)], Stragglers(patience=0.0)
    watch.note(unit("c", 10), None)
    assert watch.late(units, room=2) == []  # no rate yet
    watch.note(unit("c", 10), Commit("c", "f", seconds=0.001))
    time.sleep(0.01)
    assert watch.late(units, room=0) == []
    assert watch.late(units, room=2) == []  # idle from now on
    time.sleep(0.01)
    assert watch.late(units, room=1) == units[:1]


@pytest.mark.ray
@pytest.mark.kill
def test_a_unit_that_hangs_is_begun_again_and_the_first_commit_stands(ray_session, tmp_path):
    # one attempt: second copies do not count as attempts
    task = PhaseWork(_slow_once, None, Store(str(tmp_path)), 1, "i", patience=1.0)
    units = [unit(name) for name in ("hangs", "a", "b", "c")]
    ends = {done.unit: done for done in on_ray()("hangs once", task, units, SMALL)}
    assert {name: done.error for name, done in ends.items()} == dict.fromkeys(
        ["hangs", "a", "b", "c"]
    )
    assert ends["hangs"].commit.rows_in == 2 and starts(task.store).count("hangs") == 2
    assert (
        tmp_path / "kind" / "hangs"
    ).read_text() == "the same bytes" and task.store.failures() == {}
    wait_for_exit(int((tmp_path / "pid").read_text()))


def _slow_once(unit, plan, store):
    commit = Commit(unit.name, unit.fingerprint, rows_in=note(unit, store))
    if unit.name == "hangs" and commit.rows_in == 1:
        with open(store.uri("pid"), "w") as file:
            file.write(str(os.getpid()))
        time.sleep(200)
    with store.create("kind", unit.name, outputs=commit.outputs) as path:
        path.write_text("the same bytes")
    return commit


@pytest.mark.ray
@pytest.mark.kill
def test_a_late_unit_that_ends_after_all_ends_its_second_copy(ray_session, tmp_path):
    task = PhaseWork(_slow_twice, None, Store(str(tmp_path)), 1, "i", patience=1.0)
    ends = {done.unit: done for done in on_ray()("slow", task, [unit("slow"), unit("a")], SMALL)}
    assert ends["slow"].commit.rows_in == 1 and starts(task.store).count("slow") == 2
    wait_for_exit(int((tmp_path / "pid").read_text()))


def _slow_twice(unit, plan, store):
    """The first copy ends when the second has begun, which hangs."""
    commit = Commit(unit.name, unit.fingerprint, rows_in=note(unit, store))
    if unit.name == "slow" and commit.rows_in == 2:
        with open(store.uri("pid.new"), "w") as file:
            file.write(str(os.getpid()))
        os.replace(store.uri("pid.new"), store.uri("pid"))
        time.sleep(200)
    while unit.name == "slow" and not os.path.exists(store.uri("pid")):
        time.sleep(0.05)
    return commit


def test_a_copy_that_comes_second_leaves_the_outputs_of_the_first(tmp_path):
    store = Store(str(tmp_path))
    done = run_unit(unit("u"), PhaseWork(_overtaken_before_it_writes, None, store, 1, "i"))
    assert done.error is None and done.commit.rows_in == 7 and store.failures() == {}
    assert (tmp_path / "kind" / "u").read_text() == "first" and len(
        list((tmp_path / "kind").iterdir())
    ) == 1


def _overtaken_before_it_writes(unit, plan, store):
    first, mine = (
        Commit(unit.name, unit.fingerprint, rows_in=7),
        Commit(unit.name, unit.fingerprint),
    )
    with Store(store.root).create("kind", unit.name, outputs=first.outputs) as path:
        path.write_text("first")
    Store(store.root).commit(first)
    with store.create("kind", unit.name, outputs=mine.outputs) as path:
        path.write_text("second")
    return mine


def test_no_commit_vouches_for_bytes_that_another_copy_replaced(tmp_path):
    store = Store(str(tmp_path))
    done = run_unit(unit("u"), PhaseWork(_overtaken_before_it_commits, None, store, 1, "i"))
    assert "other bytes" in done.error and store.commit_of("u") is None and "u" in store.failures()


def _overtaken_before_it_commits(unit, plan, store):
    mine = Commit(unit.name, unit.fingerprint)
    with store.create("kind", unit.name, outputs=mine.outputs) as path:
        path.write_text("second")
    other = [Output(f"kind/{unit.name}", 5, "0")]
    Store(store.root).commit(Commit(unit.name, unit.fingerprint, outputs=other))
    return mine


def test_the_failure_of_a_second_copy_is_not_the_units(tmp_path):
    store = Store(str(tmp_path))
    assert run_copy(unit("u"), PhaseWork(_wrong, None, store, 1, "i")) is None
    assert store.failures() == {} and starts(store) == ["u"]
    store.commit(Commit("u", "other input"))
    # the first copy's to withdraw
    assert run_copy(unit("u"), PhaseWork(_noted, None, store, 1, "i")) is None
    assert store.commit_of("u").fingerprint == "other input" and starts(store) == ["u"]


def _wrong(unit, plan, store):
    note(unit, store)
    raise ValueError("wrong input")


@pytest.mark.ray
@pytest.mark.kill
def test_the_death_of_a_second_copy_is_not_the_runs(ray_session, tmp_path):
    task = PhaseWork(_kill_the_copy, None, Store(str(tmp_path)), 1, "i", patience=1.0)
    ends = {done.unit: done for done in on_ray()("dies", task, [unit("slow"), unit("a")], SMALL)}
    # and there is no third
    assert ends["slow"].commit.rows_in == 1 and starts(task.store).count("slow") == 2


def _kill_the_copy(unit, plan, store):
    """The first copy ends a while after the other one has died."""
    commit = Commit(unit.name, unit.fingerprint, rows_in=note(unit, store))
    if unit.name == "slow" and commit.rows_in > 1:
        os.kill(os.getpid(), signal.SIGKILL)
    while unit.name == "slow" and starts(store).count("slow") < 2:
        time.sleep(0.05)
    time.sleep(3.0)
    return commit


def test_no_unit_is_late_while_others_have_not_begun(tmp_path, monkeypatch):
    """Each end leaves room for the next unit, not for a copy."""
    monkeypatch.setattr(dispatch, "free_slots", lambda worker, *, running: 2 - running)
    begun, copied = [], []

    def begin(unit):
        begun.append(unit.name)
        return _Task(UnitOutcome(unit.name, Commit(unit.name, unit.fingerprint)))

    def begin_again(unit):
        copied.append(len(begun))
        return _Task(None)

    work = PhaseWork(_noted, None, Store(str(tmp_path)), 1, "i", patience=0.0)
    tasks = dispatch._Tasks(work, SMALL._replace(parallelism=2), begin, begin_again)
    assert len(list(tasks.run([unit(f"{n:02}") for n in range(50)]))) == 50
    assert not [number for number in copied if number < 50]


class _Task:
    """A task of Ray that has ended."""

    def __init__(self, outcome):
        self.outcome = outcome

    def future(self):
        future = Future()
        future.set_result(self.outcome)
        return future


@pytest.mark.ray
def test_a_store_that_a_worker_cannot_write_to_ends_the_run_with_the_workers_error(ray_session):
    task = PhaseWork(_noted, None, Store("/proc/none"), 1, "i")
    with pytest.raises(OSError, match="/proc/none") as error:
        list(on_ray()("lost store", task, [unit("a")], SMALL))
    assert "\n" not in str(error.value)


# --- quarantine -----------------------------------------------------------------------------------


@pytest.mark.ray
@pytest.mark.kill
@pytest.mark.parametrize("own_workers", [False, True])
def test_a_unit_that_kills_its_worker_is_quarantined_and_others_are_done(
    ray_session, tmp_path, own_workers
):
    task = PhaseWork(_wrong_or_kill, None, Store(str(tmp_path)), 2, "i")
    worker = SMALL._replace(own_workers=own_workers)
    ends = {
        done.unit: done
        for done in on_ray()("kills", task, [unit("wrong", 2), unit("kills", 1)], worker)
    }
    assert ends["wrong"].error == "wrong.jsonl: ValueError: wrong input"
    assert "its worker died 2 times" in ends["kills"].error
    assert starts(task.store).count("kills") == 2


def _wrong_or_kill(unit, plan, store):
    if unit.name == "kills":
        note(unit, store)
        os.kill(os.getpid(), signal.SIGKILL)
    return _wrong(unit, plan, store)


@pytest.fixture
def poisoned(tmp_path, monkeypatch):
    """A config of two inputs of which the first kills the worker that extracts it."""
    for name in ("bad", "good"):
        rows = [
            {"text": f"{name} {n}: the old mill by the river has been grinding wheat since {n}"}
            for n in range(9)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    phases = [
        replace(spec, work=_extract_or_die) if spec.name == "extract" else spec for spec in PHASES
    ]
    monkeypatch.setattr(execution, "PHASES", phases)

    def configured(*overrides):
        return make_config(
            tmp_path, [tmp_path / "bad.jsonl", tmp_path / "good.jsonl"], *NO_FILTERS, *overrides
        )

    return configured


_EXTRACT = extract.extract_unit


def _extract_or_die(unit, plan, store):
    if "bad" in unit.task.path:
        print("last words of", unit.name, file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    return _EXTRACT(unit, plan, store)


@pytest.mark.ray
@pytest.mark.kill
def test_a_poisoned_unit_is_quarantined_with_its_attempts_until_retry(
    ray_session, tmp_path, poisoned, monkeypatch
):
    with pytest.raises(
        RunFailed, match=r"1 of 2 units of 'extract' failed \(run.max_failed_units allows 0\)"
    ):
        execute(poisoned("run.max_failed_share=0.5", "run.max_failed_units=0"), Silent(), on_ray())
    tolerant = ("run.max_failed_share=0.5", "run.max_failed_units=1")
    # in this process: it is not even tried
    outcome = execute(poisoned(*tolerant), Silent(), in_process)
    assert "bad.jsonl: Quarantined: its worker died 3 times" in outcome.failed["extract"][0]
    assert outcome.published.manifest["documents"] == 9
    status = run_status(str(tmp_path / "run")).phases["extract"]
    assert "`gristmill retry`" in status.errors["000000"]
    assert (status.failed, status.quarantined) == (1, 1)
    [record] = (
        results.store_of(f"{tmp_path}/run", read_state(f"{tmp_path}/run"), "extract")
        .failures()
        .values()
    )
    assert (
        record.task["path"].endswith("bad.jsonl") and len({a["pid"] for a in record.attempts}) == 3
    )
    assert all(
        "last words of 000000" in a["log_tail"] and a["available_bytes"] > 0
        for a in record.attempts
    )

    monkeypatch.undo()
    monkeypatch.setattr("pipeline.engine.dispatch.on_ray", lambda *_, **__: in_process)
    command = ["retry", str(tmp_path / "config.toml")]
    wrong = CliRunner().invoke(app, [*command, "000007"])
    assert wrong.exit_code == 1 and "unit '000007' has not failed; failed: 000000" in wrong.stderr
    again = CliRunner().invoke(app, [*command, "000000", *NO_FILTERS, *tolerant, "--json"])
    assert again.exit_code == 0, again.stderr
    assert json.loads(again.stdout)["generation"]["documents"] == 18


def test_a_changed_input_is_no_longer_quarantined(tmp_path, poisoned):
    config = poisoned("run.max_failed_share=0.5")

    def run_units(name, task, units, resources):
        ran.append([u.name for u in units])
        killers = [u for u in units if u.name == "000000"]
        for u in killers:
            task.store.fail(Failure(u.name, "died", quarantined=u.fingerprint))
        return iter([UnitOutcome(u.name, None, "died") for u in killers])

    ran = []
    for change in (False, True, False):
        if change:
            (tmp_path / "bad.jsonl").write_text('{"text": "longer than it was"}')
        outcome = execute(config, Silent(), run_units, only="extract")
        assert outcome.failed == {"extract": ["000000: died"]}
    assert ran == [["000000", "000001"], ["000000", "000001"], ["000001"]]


def test_to_forget_the_failures_of_what_is_no_run_makes_no_run_of_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a run directory"):
        forget_failures(str(tmp_path / "r"), [])
    assert not (tmp_path / "r").exists()


def test_what_is_known_of_a_dead_worker(tmp_path):
    log = tmp_path / "worker.err"
    log.write_text("".join(f"line {n}\n" for n in range(100)))
    dead = attempts.attempt() | {"log": str(log), "kernel_kills": -2}
    found = attempts.post_mortem(dead)
    assert found["log_tail"].startswith("line 60\n") and found["log_tail"].endswith("line 99\n")
    assert found["kernel_kills_since"] >= 2
    assert attempts.post_mortem(found | {"log": "gone"}) == found | {"log": "gone"}  # told once
    elsewhere = dead | {"host": "elsewhere"}
    assert attempts.post_mortem(elsewhere) == elsewhere
    assert attempts.post_mortem(dead | {"log": "/dev/tty"})["log_tail"] == ""
    assert "the kernel killed it for memory 1 times" in str(Quarantined([found, elsewhere]))
