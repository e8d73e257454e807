"""The report of a run: one HTML file that an engineer reads after each run, and while it works."""

from collections.abc import Iterator

from pipeline.report.duplicates import Alarm
from pipeline.report.groups import LOST, MANY, Ranking
from pipeline.report.page import clean, counted, number, size, write_page
from pipeline.report.run_data import ReportData, gather
from pipeline.run.phases import FUNNEL_PHASES, STAGES


def write_report(root: str) -> str:
    """Write RUN/report.html, for a finished run or one under way, and return its path."""
    root = root.rstrip("/")
    data = gather(root)
    uri = f"{root}/report.html"
    write_page(uri, "report.html.j2", d=data, notices=list(notices(data)))
    return uri


def notices(data: ReportData) -> Iterator[tuple[str, str]]:
    """(level, sentence): what an engineer should see before anything else."""
    if data.failures:
        yield (
            "bad",
            f"{counted(len(data.failures), 'unit')} failed; see Failures. "
            "The same command tries them again.",
        )
    for phase in data.phases:
        left = phase.units - phase.done - phase.failed
        if phase.done and left:
            yield (
                "note",
                f"{phase.name}: {left:,} of {counted(phase.units, 'unit')} are still to do.",
            )
    done = {p.name for p in data.phases if p.done}
    missing = [s for s in STAGES[: STAGES.index(data.last) + 1] if FUNNEL_PHASES[s] not in done]
    if missing:
        yield "note", f"Not run yet under these keys: {', '.join(missing)}."
    extract = data.phases[0]
    if extract.lost_bytes or extract.lost_members:
        places = counted(extract.lost_members, "damaged place")
        yield "bad", f"{size(extract.lost_bytes)} of input could not be read, at {places}."
    if data.groups["host lost"].groups:
        yield "bad", _hosts_lost(data.groups["host lost"])
    if data.lost_inputs:
        yield (
            "bad",
            f"{counted(data.lost_inputs, 'input file')} lost over {LOST:.0%} of the pages; "
            "see Sources.",
        )
    if data.duplicates.alarm.first:
        yield "bad", _dropped_most(data.duplicates.alarm)
    if data.refined and not data.totals.get("documents"):
        yield "bad", "No document was kept."


def _hosts_lost(hosts: Ranking) -> str:
    named = ", ".join(f"{clean(g.name) or '(no host)'} ({g.main_rule})" for g in hosts.groups[:3])
    number_lost = len(hosts.groups) + hosts.others
    more = f" and {number_lost - 3:,} more" if number_lost > 3 else ""
    lost = f"lost over {LOST:.0%} of {MANY} or more pages"
    return f"{counted(number_lost, 'host')} {lost}: {named}{more}."


def _dropped_most(alarm: Alarm) -> str:
    listed = sum(alarm.kinds.values())
    kinds = ", ".join(
        counted(n, {"input": "input file"}.get(kind, kind))
        for kind, n in sorted(alarm.kinds.items())
    )
    named = ", ".join(f"{w.name} ({w.dropped:,} of {w.documents:,})" for w in alarm.first[:3])
    more = f" and {alarm.total - 3:,} more" if alarm.total > 3 else ""
    least = "at least " if alarm.total > listed else ""
    share = number(100 * alarm.share)
    return f"dedup dropped over {share}% of {least}{kinds}: {named}{more}; see Duplicates."
