"""The stores and commits that a run used last, by phase."""

from collections import Counter
from typing import Any

from pipeline.run import dedup_plan
from pipeline.run.funnel import FunnelRow, funnel
from pipeline.run.keys import store_uri
from pipeline.run.state import read_state
from stages.storage.ledger import Commit, Store

PHASES = ("extract", *dedup_plan.LISTINGS, "refine", "refine names", "pack")


def store_of(root: str, state: dict[str, Any], phase: str) -> Store:
    """The store of a phase under the keys that the run used last."""
    return Store(store_uri(root, state["keys"], phase))


def corpus_phase(root: str, state: dict[str, Any]) -> str:
    """The phase that wrote the corpus: the one that scrubs names, if the run has it."""
    return "refine names" if store_of(root, state, "refine names").listed_units() else "refine"


def all_commits(root: str, state: dict[str, Any]) -> dict[str, list[Commit]]:
    """Commits of every phase under the keys that the run used last."""
    return {phase: store_of(root, state, phase).listed_commits() for phase in PHASES}


def run_funnel(root: str) -> list[FunnelRow]:
    """The funnel of a run as far as it has come."""
    commits = all_commits(root, read_state(root))
    return funnel(commits["extract"], commits["dedup keep"], commits["refine"], commits["pack"])


def alarm(root: str) -> str | None:
    """A sentence on who lost nearly everything to dedup, None if nobody did; the report names them."""
    state = read_state(root)
    wiped = list(dedup_plan.wiped(store_of(root, state, "dedup alarm").listed_commits()))
    if not wiped:
        return None
    kinds = Counter(w["kind"] for w in wiped)
    counted = ", ".join(f"{count:,} {kind}{'s' * (count > 1)}" for kind, count in kinds.items())
    share = float(state["config"]["dedup.alarm_share"]["value"])
    return f"dedup dropped over {share:.0%} of the documents of {counted}; see Duplicates in the report"
