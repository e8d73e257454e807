"""A child process for documents: what ends it costs one document."""

import os

import pytest

from stages.isolation.child import KILLS, Child, ChildKilled, Limits, Loss, shared_child
from tests.support.hostile import LOSSES, make_hostile

LIMITS = Limits(seconds=1.0, memory_bytes=10**9, recycle_after=10**6)


@pytest.fixture(scope="module")
def child():
    child = Child(make_hostile, "plan", LIMITS)
    yield child
    child.close()


@pytest.mark.parametrize("kind, reason", LOSSES.items())
def test_a_hostile_document_is_lost_alone(child, kind, reason):
    texts = ["one", f"{kind} it", "two"]
    one, loss, two = [child.result(text) for text in texts]
    assert (one, two) == ("ONE", "TWO")
    assert isinstance(loss, Loss) and loss.reason == reason
    if reason in ("timeout", "memory"):
        assert loss.value == loss.limit > 0
        assert loss.rejection("refine") == (f"refine.{reason}", loss.value, (0.0, loss.limit))


def test_of_documents_that_pass_together_each_is_lost_alone(child):
    texts = [text for kind in LOSSES for text in ("one", f"{kind} it")]
    results = child.results([*texts, "two"])
    assert results[::2] == ["ONE"] * len(LOSSES) + ["TWO"]
    assert [loss.reason for loss in results[1::2]] == list(LOSSES.values())
    assert child.results([]) == []


def test_large_documents_pass_together(child):
    texts = [letter * 10**6 for letter in "abc"]
    assert child.results(texts) == [text.upper() for text in texts]


def test_a_child_is_replaced_amid_documents_that_pass_together():
    child = Child(make_hostile, "plan", LIMITS._replace(recycle_after=2))
    assert child.results(["a", "b", "c"]) == ["A", "B", "C"]
    assert child._served == 1
    child.close()


def test_what_the_machine_kills_is_done_again_without_a_loss(tmp_path):
    child = Child(make_hostile, "plan", LIMITS)
    # more kills than may come in a row: there are results between them
    texts = [text for n in range(2 * KILLS) for text in (f"once {tmp_path}/{n}", "two")]
    assert child.results(texts) == [text.upper() for text in texts]
    assert child.results([f"once {tmp_path}/a", f"once {tmp_path}/b"])[1].startswith("ONCE")
    child.close()


@pytest.mark.parametrize(("plan", "text"), [("plan", "killed"), ("killed", "one")])
def test_a_child_that_the_machine_kills_each_time_fails_the_unit(plan, text):
    child = Child(make_hostile, plan, LIMITS)
    with pytest.raises(ChildKilled, match="ended with exit code -9: out of memory"):
        child.results([text, "two"])
    assert plan == "killed" or child.results(["two"]) == ["TWO"]
    child.close()


def test_the_time_of_lost_documents_counts(child):
    before = child.cpu_seconds
    child.result("hang")
    assert child.cpu_seconds >= before + LIMITS.seconds


def test_a_child_that_cannot_load_its_models_is_an_error_with_its_reason():
    with pytest.raises(RuntimeError, match="cannot start: ValueError: no such model"):
        Child(make_hostile, "broken", LIMITS).result("one")


def test_an_interrupted_document_leaves_no_result_for_the_next(child, monkeypatch):
    assert child.result("before") == "BEFORE"

    def interrupted(data):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("stages.isolation.child.pickle.loads", interrupted)
        with pytest.raises(KeyboardInterrupt):
            child.result("interrupted")
    assert child.result("after") == "AFTER"


def test_a_process_keeps_one_child_per_kind_of_work():
    first = shared_child(make_hostile, "one", LIMITS)
    assert first.result("text") == "TEXT" and shared_child(make_hostile, "one", LIMITS) is first
    pid = first._process.pid
    second = shared_child(make_hostile, "two", LIMITS)
    assert second is not first and not os.path.exists(f"/proc/{pid}")
