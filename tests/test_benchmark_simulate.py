"""The model of a cluster: every unit ends once, lost work is that of killed attempts, and without faults the
time is what arithmetic says.
"""

import dataclasses
import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.simulate import simulate
from benchmarks.simulate_cluster import NO_FAULTS, Cloud, Cluster, Load
from benchmarks.simulate_report import report
from benchmarks.snapshot import figures, inputs, snapshot_steps
from pipeline.engine.units import Resources
from pipeline.run.results import all_commits
from pipeline.run.state import read_state
from stages.storage.ledger import Unit

WORKER = Resources(1.0, 1_500_000_000)


def units_of(count, size=10**9):
    return [Unit(f"{n:06d}", "same", None, size) for n in range(count)]


def run(nodes, count, cloud, *, seconds=100.0, resources=WORKER, seed=0, **options):
    cluster = Cluster(nodes, cloud, seed=seed)
    trace = cluster.run("extract", units_of(count), [Load(seconds)] * count, resources, **options)
    return cluster, trace


@pytest.mark.parametrize(
    "nodes, count, resources, rounds",
    [
        (1, 16, WORKER, 1),
        (1, 17, WORKER, 2),
        (10, 160 * 5, WORKER, 5),
        (10, 160 * 5 + 1, WORKER, 6),
        (2, 16, Resources(4.0, 1), 2),  # 4 slots a node
        (2, 16, Resources(1.0, 12_000_000_000), 4),  # memory: 2 slots a node
        (2, 16, Resources(1.0, 1, parallelism=4), 4),
    ],
)
def test_without_faults_equal_units_take_whole_rounds(nodes, count, resources, rounds):
    cluster, trace = run(nodes, count, NO_FAULTS, resources=resources)
    assert trace.end == pytest.approx(100.0 * rounds)
    assert trace.useful == pytest.approx(100.0 * count * resources.num_cpus)
    assert trace.lost == 0.0


def test_a_slow_driver_is_the_limit():
    """A thousand slots, units of 100 s, 10 s a start: one unit after the other."""
    cloud = dataclasses.replace(NO_FAULTS, dispatch_seconds=10.0)
    _, trace = run(63, 200, cloud)
    assert trace.end == pytest.approx(200 * 10.0 + 100.0)


def test_machines_come_at_the_rate_of_the_cloud():
    cloud = dataclasses.replace(NO_FAULTS, launch_burst=3, launch_rate=0.01)
    cluster, trace = run(5, 80, cloud)
    assert [node.launched for node in cluster.history] == [0, 0, 0, 100, 200]
    # three machines do 48 units in the first 100 s, four 64 in the next, and none is left for the fifth
    assert trace.end == pytest.approx(200.0)


faults = st.fixed_dictionaries(
    {
        "preemptions_per_hour": st.sampled_from([0.0, 1.0, 20.0, 100.0]),
        "slow_share": st.sampled_from([0.0, 0.3]),
        "startup_seconds": st.sampled_from([0.0, 60.0]),
        "poison_share": st.sampled_from([0.0, 0.1]),
        "launch_burst": st.sampled_from([2.0, 100.0]),
        "dispatch_seconds": st.sampled_from([0.0, 0.5]),
    }
)


@given(faults, st.integers(1, 4), st.integers(1, 120), st.integers(0, 3))
def test_every_unit_ends_once_and_work_is_conserved(changes, nodes, count, seed):
    cloud = Cloud(**changes)
    cluster, trace = run(nodes, count, cloud, seed=seed, patience=30.0)
    assert Counter(s.unit for s in trace.settled) == Counter(range(count))
    # a unit counts with one attempt; all other attempts are lost
    good = [s for s in trace.settled if not s.failed]
    assert trace.useful == pytest.approx(sum(s.seconds for s in good))
    assert sum(1 for *_, counts in trace.attempts if counts) == len(good)
    assert not cluster_failed(trace) or changes["poison_share"] > 0
    if not any(changes[name] for name in ("preemptions_per_hour", "slow_share", "poison_share")):
        assert trace.lost == 0.0
    # never more at once than the machines have room for
    moments = sorted(
        [(start, 1) for start, *_ in trace.attempts] + [(end, -1) for _, end, _ in trace.attempts]
    )
    at_once = most = 0
    for _, change in moments:
        at_once += change
        most = max(most, at_once)
    assert most <= nodes * 16
    assert cluster.paid >= trace.useful + trace.lost - 1e-6


def cluster_failed(trace):
    return any(s.failed for s in trace.settled)


def test_equal_parameters_give_equal_events():
    cloud = Cloud(preemptions_per_hour=5.0, slow_share=0.1)
    first, second = (run(3, 200, cloud, seed=7)[1] for _ in range(2))
    assert (first.settled, first.attempts) == (second.settled, second.attempts)
    assert run(3, 200, cloud, seed=8)[1].settled != first.settled


def test_a_late_unit_gets_a_second_copy():
    """One machine of two is ten times slower; its units are late when the fast one has nothing left."""
    cloud = dataclasses.replace(NO_FAULTS, slow_share=0.5, slow_factor=10.0)
    seed = next(s for s in range(50) if sorted(speeds(cloud, s)) == [0.1, 1.0])
    _, trace = run(2, 32, cloud, seed=seed)
    assert trace.copies == 16
    # late after 3 x 100 s of idle processors, from 100 s on, seen at a tick; a copy takes 100 s
    assert 500 < trace.end <= 515
    _, alone = run(2, 32, cloud, seed=seed, patience=2000.0)
    assert alone.copies == 0 and alone.end == pytest.approx(1000.0)


def speeds(cloud, seed):
    cluster = Cluster(2, cloud, seed=seed)
    return [node.speed for node in cluster.launch(2)]


def test_work_of_a_machine_that_is_taken_is_lost_and_done_again():
    cloud = dataclasses.replace(NO_FAULTS, preemptions_per_hour=20.0, detection_seconds=15.0)
    cluster, trace = run(1, 16, cloud, seconds=300.0, seed=3)
    taken = cluster.history[0].ends
    assert taken < 300  # by this seed
    assert trace.lost >= 16 * taken
    assert trace.useful == pytest.approx(16 * 300.0)


def test_a_poisoned_unit_fails_after_its_attempts():
    _, trace = run(1, 4, dataclasses.replace(NO_FAULTS, poison_share=1.0), attempts=3)
    assert all(s.failed for s in trace.settled)
    assert trace.lost == pytest.approx(4 * 3 * 50.0)  # each dies half way


def test_idle_machines_are_given_back():
    cloud = dataclasses.replace(NO_FAULTS, idle_timeout=300.0)
    cluster, _ = run(10, 160, cloud)
    cluster.run("dedup sort", units_of(1), [Load(1000.0)], WORKER)
    cluster.run("refine", units_of(160), [Load(100.0)] * 160, WORKER)
    ended = sorted(node.ends for node in cluster.history if math.isfinite(node.ends))
    assert ended == [400.0] * 9
    assert len(cluster.history) == 19


# --- the real run ---------------------------------------------------------------------------------


def test_a_snapshot_runs_through_all_phases_of_the_real_planner(tmp_path):
    clusters = [Cluster(2, Cloud(preemptions_per_hour=1.0)), Cluster(20, NO_FAULTS)]
    case = simulate(clusters, tmp_path, files=40)
    root = case.config.run.directory
    commits = all_commits(root, read_state(root))
    assert len(commits["extract"]) == len(commits["refine"]) == 80
    for cluster in clusters:
        assert [t.name for t in cluster.traces] == [name for name, of in commits.items() if of]
        assert {t.name: len(t.settled) for t in cluster.traces} == case.engine.units
    share = 40 / inputs().snapshot["files"]
    documents = inputs().documents * share
    assert sum(c.rows_out for c in commits["dedup keep"]) == pytest.approx(documents, rel=0.01)
    tokens = sum(c.result.tokens for c in commits["pack"])
    assert tokens == pytest.approx(inputs().snapshot["tokens"] * share, rel=0.01)
    # the work is that of the cost page: the model only adds waits for the store, which NO_FAULTS has not
    steps = snapshot_steps(figures(), inputs())
    expected = sum(step.core_hours for step in steps) * share
    loads = 2 * 80 + 20  # first units on their slots, at most a few seconds each
    useful = sum(t.useful for t in clusters[1].traces) / 3600
    assert expected * 0.95 < useful < expected * 1.1 + loads * 10 / 3600
    figures_of = report(clusters[0], case.engine.requests)
    hours = figures_of["core_hours"]
    assert hours["paid"] == pytest.approx(hours["useful"] + hours["lost"] + hours["idle"], abs=1.5)
