"""Questions about a finished or running run: how far it is, and its documents as plain files."""

import time
from typing import Any

from pipeline.run.results import PHASES, store_of
from pipeline.run.state import read_state
from stages.storage.ledger import Store


def status(root: str) -> dict[str, Any]:
    """Units done, failed and left per phase, with rates over the phase and the time left, from the
    ledger alone.
    """
    state = read_state(root)
    phases = {
        phase: _phase_status(store_of(root, state, phase), since=state["history"][-1]["started"])
        for phase in PHASES
    }
    return {
        "run": root,
        "stage": state.get("stage"),
        "process": state.get("pid"),
        "generation": state.get("generation"),
        "phases": phases,
    }


def _phase_status(store: Store, *, since: float) -> dict[str, Any]:
    units, commits = store.listed_units(), store.listed_commits()
    failures = {name: record for name, record in store.failures().items() if name in units}
    rows = sum(c.rows_in for c in commits)
    ends = [c.extra["finished"] for c in commits]
    # the rate of the run under way: what an earlier one did, and the pause between, say nothing of
    # it
    fresh = [c for c in commits if c.extra["finished"] >= since] or commits
    elapsed = max(ends) - min(c.extra["finished"] - c.seconds for c in fresh) if ends else 0.0
    left = len(units) - len({c.unit for c in commits} | failures.keys())
    return {
        "done": len(commits),
        "failed": len(failures),
        "left": left,
        "rows_in": rows,
        "rows_out": sum(c.rows_out for c in commits),
        "rows_per_second": round(sum(c.rows_in for c in fresh) / elapsed, 1) if elapsed else None,
        "eta_seconds": round(elapsed / len(fresh) * left) if fresh and left else None,
        "last_commit_age_seconds": round(time.time() - max(ends)) if ends else None,
        "errors": {name: record["error"] for name, record in failures.items()},
    }


# --- export ---------------------------------------------------------------------------------------
