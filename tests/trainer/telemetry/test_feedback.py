"""The feedback files: totals over restarts, who is alive under any clock, whatever a kill leaves
behind.
"""

import itertools
import json
import math
import signal
import subprocess
import threading
import time
import uuid
from dataclasses import asdict, replace

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.feedback_reports import NOW, report, summary
from tests.support.paths import ROOT
from tests.support.processes import call_command
from trainer.telemetry.feedback import (
    OtherVersion,
    Sighting,
    Source,
    Summary,
    Totals,
    append_line,
    consumed,
    demand,
    parse,
    read_lines,
    read_summaries,
    resumed,
    to_json,
)
from trainer.telemetry.feedback_writer import Writer

SECOND, MINUTE, HOUR = 1.0, 60.0, 3600.0


def written(folder, trainer="a", *reports, **options) -> Writer:
    writer = Writer(str(folder), trainer=trainer, **options)
    for one in reports:
        writer.write(one)
        assert writer.flush()
    assert writer.error is None
    return writer


@pytest.fixture(params=["local", "object store"])
def folder(request, tmp_path):
    """A folder that is not there yet."""
    return (
        str(tmp_path / "feedback")
        if request.param == "local"
        else f"memory://{uuid.uuid4().hex}/feedback"
    )


# --- what is written is read ----------------------------------------------------------------------


def test_the_summary_says_what_the_trainer_reported(folder):
    written(folder, "a", report(steps=1), report(steps=2), wall=lambda: NOW)
    reading = read_summaries(folder)
    assert reading.faults == []
    [found] = reading.summaries
    assert found.report == report(steps=2)
    assert (found.trainer, found.sequence, found.time) == ("a", 1, "2027-01-15T08:00:00+00:00")
    lines = read_lines(folder, "a")
    assert lines.faults == []
    assert [line.report.steps for line in lines.summaries] == [1, 2]


def test_an_object_store_gets_an_object_for_each_line():
    uri = f"memory://{uuid.uuid4().hex}/feedback"
    written(uri, "a", report(), report())
    fs, root = fsspec.core.url_to_fs(uri)
    assert sorted(name.removeprefix(root) for name in fs.find(root)) == [
        "/a.json",
        "/a/000000000.json",
        "/a/000000001.json",
    ]


def test_what_is_no_number_is_written_as_null(tmp_path):
    written(
        tmp_path,
        "a",
        report(
            mfu=math.nan, tokens_per_second=math.inf, sources={"cc": Source("g", {}, 0, math.nan)}
        ),
    )
    found = read_summaries(str(tmp_path)).summaries[0].report
    assert (found.mfu, found.tokens_per_second, found.sources["cc"].loss) == (None, None, None)
    assert "NaN" not in (tmp_path / "a.json").read_text()


def test_sequence_and_history_go_on_in_the_next_incarnation(folder):
    first = written(folder, "a", report(steps=1), report(steps=2), incarnation="one")
    assert first.previous is None
    second = written(folder, "a", report(steps=3), incarnation="two")
    assert second.previous is not None and second.previous.report.steps == 2
    assert [(s.incarnation, s.sequence) for s in read_lines(folder, "a").summaries] == [
        ("one", 0),
        ("one", 1),
        ("two", 2),
    ]


def test_a_line_is_due_at_once_and_then_every_interval(tmp_path):
    now = [100.0]
    writer = Writer(str(tmp_path), trainer="a", every_seconds=30, monotonic=lambda: now[0])
    assert writer.due()
    writer.write(report())
    assert writer.flush()
    due = []
    for now[0] in (100.0, 129.9, 130.0):
        due.append(writer.due())
    assert due == [False, False, True]
    assert read_summaries(str(tmp_path)).summaries[0].monotonic_seconds == 0.0


def test_an_absent_folder_has_no_trainers(tmp_path):
    assert read_summaries(str(tmp_path / "none")) == ([], [])


@pytest.mark.parametrize("name", ["", "../a", "a/b", ".hidden", "ä", "a" * 101])
def test_a_trainer_needs_a_file_name(tmp_path, name):
    with pytest.raises(ValueError, match="a trainer is named by letters"):
        Writer(str(tmp_path), trainer=name)


# --- what a kill, another version or anyone's hand leaves behind ----------------------------------


def test_a_half_line_costs_that_line_alone(tmp_path):
    written(tmp_path, "a", report(steps=1))
    with open(tmp_path / "a.jsonl", "ab") as file:
        file.write(to_json({"version": 1, "trainer": "a"})[:-4])
    written(tmp_path, "a", report(steps=2))
    lines = read_lines(str(tmp_path), "a")
    assert [line.report.steps for line in lines.summaries] == [1, 2]
    assert [fault.where for fault in lines.faults] == ["a.jsonl:2"]
    assert "no whole JSON line" in lines.faults[0].what


@pytest.mark.parametrize(
    "damage", [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:50])]
)
def test_without_a_summary_the_last_whole_line_speaks(tmp_path, damage):
    written(tmp_path, "a", report(steps=1), report(steps=2))
    damage(tmp_path / "a.json")
    with open(tmp_path / "a.jsonl", "ab") as file:
        file.write(b'{"version": 1, "tra')
    reading = read_summaries(str(tmp_path))
    assert [s.report.steps for s in reading.summaries] == [2]
    assert reading.faults == []


def test_a_kill_between_line_and_summary_repeats_no_sequence(tmp_path):
    written(tmp_path, "a", report(steps=1))
    before = (tmp_path / "a.json").read_bytes()
    written(tmp_path, "a", report(steps=2))
    (tmp_path / "a.json").write_bytes(before)
    written(tmp_path, "a", report(steps=3))
    assert [line.sequence for line in read_lines(str(tmp_path), "a").summaries] == [0, 1, 2]


def test_a_newer_version_is_a_fault_and_the_others_are_read(tmp_path):
    written(tmp_path, "a", report())
    written(tmp_path, "b", report())
    for name in ("a.json", "a.jsonl"):  # the older line 1 stays: it must not speak for the newer
        with open(tmp_path / name, "ab" if name == "a.jsonl" else "wb") as file:
            file.write(b'{"version": 2, "trainer": "a"}\n')
    reading = read_summaries(str(tmp_path))
    assert [s.trainer for s in reading.summaries] == ["b"]
    assert [fault.where for fault in reading.faults] == ["a.json"]
    assert "version 2, and this reads 1; update" in reading.faults[0].what
    with pytest.raises(OtherVersion):
        Writer(str(tmp_path), trainer="a")


def test_a_copy_of_a_summary_does_not_count_twice(tmp_path):
    written(tmp_path, "a", report())
    (tmp_path / "a (copy).json").write_bytes((tmp_path / "a.json").read_bytes())
    reading = read_summaries(str(tmp_path))
    assert [s.trainer for s in reading.summaries] == ["a"]
    assert "speaks of trainer 'a': a copy?" in reading.faults[0].what


def test_unknown_fields_are_ignored():
    line = json.loads(to_json(_record()))
    assert parse(to_json(line | {"later": {"x": 1}})) == parse(to_json(line))


def _record() -> dict:
    head = asdict(summary())
    fields = head.pop("report")
    del head["modified"]
    return {"version": 1, **head, **fields}


def test_the_line_of_these_tests_is_the_writers(tmp_path):
    written(tmp_path, "a", report())
    assert json.loads((tmp_path / "a.json").read_bytes()).keys() == _record().keys()


def test_a_line_of_an_earlier_version_has_no_losses_on_held_out_rows():
    before = {k: v for k, v in _record().items() if k not in ADDED}
    told = {"health_ranks": {"utilisation": 3}, "held_out": {"sources": 2.5, "wiki": None}}
    assert parse(to_json(before)) == parse(to_json(_record()))
    assert parse(to_json(before | told)).report == replace(parse(to_json(before)).report, **told)


ADDED = ("health_ranks", "held_out")


def test_each_missing_field_is_named():
    for key in _record().keys() - {"version", *ADDED}:
        record = _record()
        del record[key]
        with pytest.raises(ValueError, match=f"another kind: {key}: Field required"):
            parse(to_json(record))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(key=st.sampled_from(sorted(_record())), value=JSON)
def test_any_value_in_any_field_is_read_or_refused_and_never_plans_nonsense(key, value):
    try:
        found = parse(json.dumps(_record() | {key: value}).encode())
    except ValueError:
        return
    wanted = demand([found], NOW).tokens_per_second
    assert math.isfinite(wanted) and wanted >= 0
    assert consumed([found])[0] >= 0
    assert resumed(None, found, now=NOW).wall_seconds >= 0


@given(data=st.binary() | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_file_is_read_or_a_fault(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("feedback")
    (folder / "a.json").write_bytes(data)
    (folder / "b.jsonl").write_bytes(data)
    reading = read_summaries(str(folder))
    assert len(reading.summaries) + len(reading.faults) == 2
    assert len(read_lines(str(folder), "b").summaries) == 0


@given(
    st.lists(
        st.tuples(
            st.binary(min_size=1).filter(
                lambda b: not set(b) & set(b"\n\r\x0b\x0c\x1c\x1d\x1e\x85")
            ),
            st.booleans(),
        ),
        max_size=8,
    )
)
def test_appended_lines_survive_half_lines(tmp_path_factory, lines):
    path = tmp_path_factory.mktemp("lines") / "x.jsonl"
    for line, killed in lines:
        if killed:
            with open(path, "ab") as file:
                file.write(b"half")
        append_line(str(path), line)
    found = path.read_bytes().split(b"\n") if path.exists() else []
    assert [line for line in found if line not in (b"half", b"")] == [
        line for line, _ in lines if line != b"half"
    ]


def report_endlessly(folder):
    writer = Writer(folder, trainer="a", every_seconds=0.001)
    for step in itertools.count():
        writer.write(report(steps=step))
        writer.flush()


def test_a_killed_trainer_leaves_whole_summaries_and_goes_stale(tmp_path):
    trainer = subprocess.Popen(call_command(report_endlessly, tmp_path), cwd=ROOT)
    try:
        while not (tmp_path / "a.json").exists():  # before that, the last line may be a newer one
            assert trainer.poll() is None
        seen, steps = {}, []
        while len(steps) < 200:  # reads race with writes all the time
            reading = read_summaries(str(tmp_path))
            assert reading.faults == []
            steps += [s.report.steps for s in reading.summaries]
            seen = demand(reading.summaries, time.time(), seen=seen).seen
        assert steps == sorted(steps) and steps[0] < steps[-1]
    finally:
        trainer.send_signal(signal.SIGKILL)
        trainer.wait()
    last = read_summaries(str(tmp_path))
    assert last.faults == []
    now = time.time()
    first = demand(last.summaries, now, seen=seen)
    assert first.live == {"a": 50.0}
    assert demand(last.summaries, now + HOUR, seen=first.seen).stale == ["a"]
    assert written(tmp_path, "a").previous is not None


# --- a store that is away or slow -----------------------------------------------------------------


class Store(Exception):
    """No OSError, as few errors of object stores' clients are."""


def test_a_store_that_fails_is_counted_and_never_raises(monkeypatch):
    uri = f"memory://{uuid.uuid4().hex}/feedback"
    writer = Writer(uri, trainer="a")

    def away(*_args, **_options):
        raise Store("away")

    with monkeypatch.context() as patch:
        patch.setattr(type(writer._fs), "pipe_file", away)
        writer.write(report(steps=1))
        assert writer.flush()
        assert writer.error == "Store('away')"
        writer.close(report(state="failed"))
    writer.write(report(steps=2))
    assert writer.flush()
    assert [s.report.steps for s in read_summaries(uri).summaries] == [2]


def test_a_store_that_hangs_holds_up_nothing_and_costs_lines(monkeypatch):
    writer = Writer(f"memory://{uuid.uuid4().hex}/feedback", trainer="a")
    answers, calls = threading.Event(), []
    monkeypatch.setattr(
        type(writer._fs), "pipe_file", lambda *args, **_: calls.append(args) or answers.wait()
    )
    for step in range(5):
        writer.write(report(steps=step))
    assert len(calls) == 1
    assert not writer.flush(timeout_seconds=0.01)
    writer.close(report(state="stopped"), timeout_seconds=0.01)
    assert len(calls) == 1
    answers.set()
    assert writer.flush()


# --- who is alive ---------------------------------------------------------------------------------


def test_two_trainers_add_up(folder):
    written(folder, "a", report(tokens_per_second_without_stalls=50.0))
    written(folder, "b", report(tokens_per_second_without_stalls=70.0, state="waiting"))
    found = demand(read_summaries(folder).summaries, time.time())
    assert found.tokens_per_second == 120.0
    assert found.live == {"a": 50.0, "b": 70.0}


@pytest.mark.parametrize(
    "changed, live",
    [
        ({}, {"a": 50.0}),
        ({"state": "waiting"}, {"a": 50.0}),
        ({"state": "stopped"}, {}),
        ({"state": "failed"}, {}),
        ({"budget": 0}, {"a": 0.0}),
        ({"budget": 1}, {"a": 50.0}),
        ({"tokens_per_second_without_stalls": None}, {"a": 0.0}),
    ],
)
def test_demand_is_of_those_that_run_or_wait_and_want_more(changed, live):
    found = demand([summary(**changed)], NOW)
    assert (found.live, found.stale) == (live, [])


@pytest.mark.parametrize(
    "changed, ending",
    [
        ({"state": "stopped", "budget": 0}, "finished"),
        ({"state": "running", "budget": 0}, "finished"),
        ({"state": "failed", "budget": 0}, "finished"),
        ({"state": "stopped", "budget": 1}, "stopped"),
        ({"state": "stopped"}, "stopped"),
        ({"state": "failed", "budget": 1}, "failed"),
        ({"state": "running"}, None),
        ({"state": "waiting", "budget": 1}, None),
    ],
)
def test_a_trainer_that_has_ended_is_not_a_silent_one(changed, ending):
    """However long ago it said so."""
    for modified in (NOW, NOW - HOUR):
        found = demand([summary(modified=modified, **changed)], NOW)
        assert found.ended.get("a") == ending
        assert found.stale == (["a"] if ending is None and modified < NOW else [])


@pytest.mark.parametrize("clock", ["1999-01-01T00:00:00+00:00", "2100-01-01T00:00:00+00:00"])
def test_the_trainers_own_clock_decides_nothing(clock):
    assert demand([summary(time=clock)], NOW).live == {"a": 50.0}
    assert demand([summary(time=clock, modified=NOW - HOUR)], NOW).stale == ["a"]


@pytest.mark.parametrize("skew", [-10 * HOUR, -2 * MINUTE, 0.0, 2 * MINUTE, 10 * HOUR])
def test_under_a_skewed_store_two_readings_tell_the_living_from_the_dead(skew):
    first = demand(
        [summary("alive", modified=NOW + skew), summary("dead", modified=NOW + skew)], NOW
    )
    later = NOW + 10 * MINUTE
    again = [
        summary("alive", sequence=9, modified=later + skew),
        summary("dead", modified=NOW + skew),
    ]
    assert demand(again, later, seen=first.seen)[1:3] == ({"alive": 50.0}, ["dead"])


def test_a_trainer_killed_between_two_readings_is_stale_at_the_second():
    first = demand([summary(modified=NOW)], NOW)
    # it wrote for a minute more, an hour ago
    later = demand([summary(sequence=3, modified=NOW + MINUTE)], NOW + HOUR, seen=first.seen)
    assert later.stale == ["a"]


def test_a_new_incarnation_with_an_old_sequence_is_news():
    seen = {"a": Sighting("before", 1, NOW - HOUR, NOW - HOUR)}
    assert demand([summary(incarnation="after")], NOW, seen=seen).live == {"a": 50.0}


def test_slow_writers_are_given_five_intervals():
    slow = replace(summary(modified=NOW - 20 * MINUTE), every_seconds=5 * MINUTE)
    assert demand([slow], NOW).live == {"a": 50.0}
    assert demand([slow], NOW + 6 * MINUTE).stale == ["a"]


def test_what_was_seen_survives_json():
    first = demand([summary()], NOW)
    seen = {name: Sighting(*one) for name, one in json.loads(json.dumps(first.seen)).items()}
    assert demand([summary()], NOW + 1, seen=seen) == demand([summary()], NOW + 1, seen=first.seen)


@given(
    starts=st.lists(
        st.tuples(st.integers(0, 50), st.integers(0, 60)), min_size=1, max_size=4
    ),  # (first line, minutes alive)
    skew=st.sampled_from([0, 7, -7, 600, -600]),
    reads=st.lists(st.integers(1, 5), min_size=3, max_size=25),
)
def test_demand_follows_lives_under_any_clock_of_the_store(starts, skew, reads):
    """Oracle: each minute is played; trainer k writes every minute of its life.

    Readings are at most 5 minutes apart.
    """
    minute, seen = 0, None
    for wait in reads:
        minute += wait
        summaries, written_at = [], {}
        for k, (start, alive) in enumerate(starts):
            lines = [m for m in range(start, start + alive + 1) if m <= minute]
            if lines:
                written_at[f"t{k}"] = lines[-1]
                modified = NOW + (lines[-1] + skew) * MINUTE
                summaries.append(summary(f"t{k}", sequence=len(lines), modified=modified))
        before = set(seen or {})
        found = demand(summaries, NOW + minute * MINUTE, seen=seen)
        assert found.tokens_per_second == 50.0 * len(found.live)
        for name, at in written_at.items():
            age = minute - at
            if name not in before and skew:
                continue  # the first reading has only the store's word
            if skew == 0:
                assert (name in found.live) == (age <= 5)
            elif age == 0:
                assert name in found.live
            elif age > 10 + wait:
                # at the latest patience and one reading after it was seen to change
                assert name in found.stale
        seen = found.seen


# --- totals over restarts -------------------------------------------------------------------------


LIFE = st.lists(
    st.sampled_from(["step", "step", "step", "checkpoint", "line", "kill"]), max_size=60
)


@given(LIFE)
def test_totals_over_restarts_against_a_played_run(events):
    """Oracle: the set of tokens in the state, the set of tokens ever seen, a plain count of the
    work that was told.
    """
    state, checkpoint, lines = Totals(), None, []
    inside, saved, ever, told, work = set(), set(), set(), [], 0
    played = itertools.chain(["line"], *((e, "line") if e == "kill" else (e,) for e in events))
    for clock, event in enumerate(played):
        if event == "step":
            inside |= set(range(len(inside), len(inside) + 7))  # data come in one fixed order
            ever |= inside
            work += 7
            state = state._replace(
                steps=state.steps + 1,
                tokens=state.tokens + 7,
                tokens_processed=state.tokens_processed + 7,
            )
        elif event == "checkpoint":
            checkpoint, saved = state, set(inside)
        elif event == "line":  # each incarnation begins with one
            lines.append(_line(state, clock))
            told.append(len(ever))
            assert lines[-1].report.tokens_total == len(inside)
        else:
            inside = set(saved)
            work = max(
                lines[-1].report.tokens_processed,
                0 if checkpoint is None else checkpoint.tokens_processed,
            )
            state = resumed(checkpoint, lines[-1], now=NOW + clock)
        assert state.tokens == len(inside)
        assert state.tokens_processed == work
        assert state.steps * 7 == state.tokens
    used = consumed(lines)
    assert state.restarts == events.count("kill")
    assert all(a <= b for a, b in itertools.pairwise(used))
    # what no line told cannot be known…
    assert all(a <= b for a, b in zip(used, told, strict=True))
    if "kill" not in events:
        assert used == told  # …and without a kill nothing goes untold


@given(LIFE)
def test_told_every_step_consumption_is_exact(events):
    """Oracle: the set of tokens ever seen."""
    state, checkpoint, lines, ever = Totals(), None, [_line(Totals(), 0)], set()
    for clock, event in enumerate(events):
        if event == "checkpoint":
            checkpoint = state
        elif event == "kill":
            state = resumed(checkpoint, lines[-1], now=NOW + clock)
        else:
            ever |= set(range(state.tokens, state.tokens + 7))
            state = state._replace(tokens=state.tokens + 7)
        lines.append(_line(state, clock))
        assert consumed(lines)[-1] == len(ever)


def _line(state: Totals, clock: float) -> Summary:
    told = report(
        steps=state.steps,
        tokens_total=state.tokens,
        tokens_processed=state.tokens_processed,
        wall_seconds=state.wall_seconds,
        restarts=state.restarts,
    )
    return replace(summary(), report=told, time=f"2027-01-15T08:{int(clock) % 60:02}:00+00:00")


@given(st.lists(st.integers(0, 1000), max_size=40))
def test_consumption_is_the_highest_total_told_so_far(totals):
    used = consumed(summary(tokens_total=total) for total in totals)
    assert used == [max(totals[: i + 1]) for i in range(len(totals))]


def test_a_first_start_has_come_to_nothing():
    assert resumed(None, None, now=NOW) == Totals()


def test_time_between_incarnations_counts_and_is_never_negative():
    last = summary(time="2027-01-15T08:00:00+00:00", wall_seconds=100.0)
    assert resumed(None, last, now=NOW + 50).wall_seconds == 150.0
    assert resumed(None, last, now=NOW - 10 * HOUR).wall_seconds == 100.0
    assert resumed(Totals(wall_seconds=120.0), last, now=NOW).wall_seconds == 120.0


def test_totals_survive_a_checkpoint_as_json():
    totals = Totals(
        steps=3,
        tokens=21,
        useful_seconds=1.5,
        sources={"cc": {"rows": {"gen-0001": 3}, "tokens": 21}},
        restarts=1,
    )
    assert Totals(**json.loads(json.dumps(totals._asdict()))) == totals
