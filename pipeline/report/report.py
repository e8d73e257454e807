"""The report of a run: one HTML file that an engineer reads after each run, and while it works."""

from pipeline.report.groups import LOST, MANY
from pipeline.report.page import write_page
from pipeline.report.run_data import gather
from stages.storage.files import read_bytes, write_atomically


def write_report(root: str) -> str:
    """Write RUN/report.html, for a finished run or one under way, and return its path.

    That of a run that published is kept as RUN/reports/gen-0001.html: a rerun replaces the other.
    """
    root = root.rstrip("/")
    uri, data = f"{root}/report.html", gather(root)
    write_page(uri, "report.html.j2", d=data, LOST=LOST, MANY=MANY)
    if data.generation:
        write_atomically(f"{root}/reports/{data.generation}.html", read_bytes(uri))
    return uri
