"""The report of a run: one HTML file that an engineer reads after each run, and while it works."""

from pipeline.report.groups import LOST, MANY
from pipeline.report.page import write_page
from pipeline.report.run_data import gather


def write_report(root: str) -> str:
    """Write RUN/report.html, for a finished run or one under way, and return its path."""
    root = root.rstrip("/")
    uri = f"{root}/report.html"
    write_page(uri, "report.html.j2", d=gather(root), LOST=LOST, MANY=MANY)
    return uri
