"""Figures and plots of benchmarks.simulate."""

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.simulate_cluster import Cluster, Trace
from benchmarks.simulate_units import Requests
from benchmarks.snapshot import inputs

# S3, for each prefix that it has split off (docs.aws.amazon.com, "Optimizing Amazon S3 performance")
LIMITS = {"write": 3500, "read": 5500}


def report(cluster: Cluster, requests: dict[str, Requests]) -> dict[str, Any]:
    """The figures of one cluster: hours are of cores, seconds of the wall."""
    traces, prices = cluster.traces, inputs().prices
    useful, lost = (sum(getattr(t, kind) for t in traces) / 3600 for kind in ("useful", "lost"))
    paid, makespan = cluster.paid / 3600, cluster.clock
    waits = {t.name: t.end - t.dry for t in traces}
    total = Requests(*(sum(kind) for kind in zip(*requests.values(), strict=True)))
    return {
        "nodes": cluster.most,
        "makespan_seconds": round(makespan),
        "core_hours": {
            "paid": round(paid),
            "useful": round(useful),
            "lost": round(lost, 1),
            "idle": round(paid - useful - lost),
        },
        "machines": {
            "most_at_once": _most_at_once(cluster),
            "launched": len(cluster.history),
        },
        "barrier_share": round(sum(waits.values()) / makespan, 4),
        "streaming_could_save": round(
            (waits.get("refine", 0) + waits.get("refine ner", 0)) / makespan, 4
        ),
        "second_copies": sum(t.copies for t in traces),
        "started": sum(t.dispatched for t in traces),
        "dollars_spot": round(paid * prices["node_spot"] / prices["node_processors"]),
        "requests": {kind: round(number) for kind, number in total._asdict().items()},
        "dollars_requests": round(
            (total.put + total.list) * prices["put_or_list"]
            + (total.get + total.head) * prices["get_or_head"],
            2,
        ),
        "phases": {t.name: _phase(t, requests[t.name]) for t in traces},
    }


def _phase(trace: Trace, requests: Requests) -> dict[str, Any]:
    wall, units = trace.end - trace.begin, len(trace.settled)
    each, peak = requests.times(1 / units), _peak_rate(trace)
    return {
        "units": units,
        "begin_seconds": round(trace.begin),
        "wall_seconds": round(wall),
        "barrier_seconds": round(trace.end - trace.dry),
        "useful_core_hours": round(trace.useful / 3600, 1),
        "lost_core_hours": round(trace.lost / 3600, 1),
        "requests_per_second": {
            kind: [round(n * units / max(wall, 1e-9), 1), round(n * peak, 1)]
            for kind, n in each._asdict().items()
        },
        "of_s3_limits": {
            "read": round((each.get + each.head + each.list) * peak / LIMITS["read"], 2),
            "write": round(each.put * peak / LIMITS["write"], 2),
        },
    }


def _peak_rate(trace: Trace, width: float = 10.0) -> float:
    """Units a second in the busiest ten: half of a unit's requests come when it starts, half when it
    ends.
    """
    moments = np.array([moment for start, end, _ in trace.attempts for moment in (start, end)])
    if not len(moments):
        return 0.0
    return float(np.bincount(((moments - moments.min()) / width).astype(int)).max() / 2 / width)


def _most_at_once(cluster: Cluster) -> int:
    changes = [(n.arrives, 1) for n in cluster.history] + [(n.ends, -1) for n in cluster.history]
    alive = most = 0
    for moment, change in sorted(changes):
        if moment <= cluster.clock:
            alive += change
            most = max(most, alive)
    return most


def print_report(name: str, of: dict[str, Any]) -> None:
    hours, machines = of["core_hours"], of["machines"]
    print(
        f"\n{name}: {of['makespan_seconds'] / 60:.1f} minutes; at most {machines['most_at_once']:,} nodes at once"
    )
    print(
        f"  core-hours: paid {hours['paid']:,}, useful {hours['useful']:,}, lost {hours['lost']:,}, idle {hours['idle']:,};"
        f" ${of['dollars_spot']:,} spot, ${of['dollars_requests']} of requests"
    )
    print(
        f"  waiting for the last units of phases: {of['barrier_share']:.1%} of the time;"
        f" of refine, which streaming could save: {of['streaming_could_save']:.1%}; {of['second_copies']} second copies"
    )
    for phase, p in of["phases"].items():
        rates = ", ".join(
            f"{k} {m:,.0f}/{most:,.0f}" for k, (m, most) in p["requests_per_second"].items()
        )
        print(
            f"  {phase:13} {p['units']:7,} units {p['wall_seconds']:6,} s, waits {p['barrier_seconds']:5,} s, useful"
            f" {p['useful_core_hours']:8,} h, lost {p['lost_core_hours']:6,} h; requests/s mean/peak {rates};"
            f" of S3's limits {p['of_s3_limits']}"
        )


# --- plots ----------------------------------------------------------------------------------------


def plot_at_work(clusters: dict[str, Cluster], path: Path) -> None:
    """Cores at work over time, a color for each phase, and cores that are paid for."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(1, len(clusters), figsize=(5 * len(clusters), 4))
    for axis, (name, cluster) in zip(np.atleast_1d(axes), clusters.items(), strict=True):
        times = np.linspace(0, cluster.clock, 600)
        for trace in cluster.traces:
            starts = np.sort([start for start, _, _ in trace.attempts])
            ends = np.sort([end for _, end, _ in trace.attempts])
            busy = trace.cpus * (
                np.searchsorted(starts, times, "right") - np.searchsorted(ends, times, "right")
            )
            axis.fill_between(
                times / 60, np.where(busy > 0, busy, np.nan), label=trace.name, alpha=0.8
            )
        launched = np.sort([n.launched for n in cluster.history])
        ended = np.sort([n.ends for n in cluster.history])
        paid = np.searchsorted(launched, times, "right") - np.searchsorted(ended, times, "right")
        axis.plot(times / 60, cluster.cloud.cores * paid, color="black", lw=1, label="paid for")
        axis.set(title=name, xlabel="minutes", ylabel="cores at work")
        axis.grid(alpha=0.3)
    np.atleast_1d(axes)[0].legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def plot_makespan(cases: dict[str, Any], path: Path) -> None:
    """Minutes against nodes, a line for each way to cut units."""
    pyplot = _pyplot()
    figure, axis = pyplot.subplots(figsize=(6, 4.5))
    for name, case in cases.items():
        of = [c for label, c in case["clusters"].items() if label == f"{c['nodes']:,} nodes"]
        minutes = [c["makespan_seconds"] / 60 for c in of]
        axis.plot([c["nodes"] for c in of], minutes, marker="o", label=name)
    axis.set(xlabel="nodes of 16 cores", ylabel="minutes", xscale="log", yscale="log")
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
