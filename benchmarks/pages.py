"""Two sets of real pages, in WARCs of their own: all of the corpus folder, and the English ones."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.watch import SPAWN
from filters.language import Language
from stages.read.warc import ReadStats, read_records

WARCS = ("wcxb-500", "trafilatura-eval", "multilang-docs")
FILES = 8


class Page(NamedTuple):
    """A page's member of its WARC, compressed, and its HTML."""

    member: bytes
    html: bytes


def read_pages(data: Path) -> Iterator[Page]:
    """The 2,240 pages of three WARCs of DATA/warc/web, each in a member of its own."""
    for name in WARCS:
        path = data / "warc" / "web" / f"{name}.warc.gz"
        raw = path.read_bytes()
        records = list(read_records(path, max_payload_bytes=10**8, stats=ReadStats()))
        ends = [*(record.offset for record in records[1:]), len(raw)]
        for record, end in zip(records, ends, strict=True):
            if record.skipped is None:
                yield Page(raw[record.offset : end], record.payload)


def english(pages: Sequence[Page]) -> list[Page]:
    """The English ones among the pages. Takes two cores for half a minute per 1,000 pages."""
    with SPAWN.Pool(2) as pool:
        verdicts = pool.map(is_english, [page.html for page in pages], chunksize=20)
    return [page for page, verdict in zip(pages, verdicts, strict=True) if verdict]


def is_english(html: bytes) -> bool:
    """Whether lid.176 takes trafilatura's text for English with a probability of at least .65."""
    from trafilatura import extract

    guess = Language().guess(extract(html) or "")
    return guess.language == "en" and guess.score >= 0.65


def deal(pages: Sequence[Page], folder: Path, *, copies: int) -> None:
    """Write the pages in turn to 8 files of a new folder, and every file `copies` times."""
    folder.mkdir(parents=True)
    for n in range(FILES):
        members = b"".join(page.member for page in pages[n::FILES])
        for copy in range(copies):
            (folder / f"part-{n}-{copy}.warc.gz").write_bytes(members)
