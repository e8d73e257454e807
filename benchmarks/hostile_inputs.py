"""Damaged files, damaged pages and hostile texts through the real stages, for as long as you like.

    python -m benchmarks.hostile_inputs [MINUTES] [DATA]        (DATA defaults to $GRISTMILL_DATA)

Each round is a run of its own: real pages with random changes in a WARC file with random damage,
and texts in a JSONL file, through extract, dedup, refine and pack to verified shards. A line per
round shows what came of it. It stops at the first run that fails, and at the end says how memory
grew.
"""

import gzip
import json
import os
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

from pipeline.inspect.verify import verify_path
from pipeline.run.status import run_status
from stages.read.warc import ReadStats, read_records
from tests.support.damaged_warc import SHAPES, damage, pack
from tests.support.inline import make_config, run_inline

PAGES_PER_ROUND = 30
# what has broken a text library before: runs of one class, nesting, marks without a letter
_PIECES = (
    *(" ", "\u00a0", "a", "4111 1111 1111 1111 ", "+1 415 555 2671 ", "x@y.org", "\u0301", "<", "[/b]"),
    *("((((", "\u202e", "\ud7ff", "ｗｗｗ．", "http://", "-----BEGIN PRIVATE KEY-----", "٣", "คำ", "漢字", "\0"),
    *("<div>", "<table><tr><td>", "&#", "<!--", "<script>", "<meta charset=utf-7>", "\r", "\u2028", "😀"),
)  # fmt: skip


def main(minutes: float, data: Path) -> None:
    pages = real_pages(data)
    began, number = time.monotonic(), 0
    memory: list[float] = []
    while time.monotonic() - began < 60 * minutes:
        with tempfile.TemporaryDirectory() as folder:
            print(f"round {number}: {one_round(Path(folder), random.Random(number), pages)}")
        memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)  # the most so far
        number += 1
    print(
        f"{number} rounds; memory {memory[min(5, number - 1)]:.0f} MB at the sixth, {memory[-1]:.0f} MB at the end"
    )


def real_pages(data: Path) -> list[bytes]:
    stats = ReadStats()
    file = data / "warc" / "web" / "wcxb-435.warc.gz"
    records = read_records(file, max_payload_bytes=1 << 20, stats=stats)
    return [record.payload for record in records if record.skipped is None]


def one_round(folder: Path, draw: random.Random, pages: list[bytes]) -> str:
    """Run everything on new inputs; what came of it. Raises what a run raises."""
    chosen = [changed(draw, page) for page in draw.choices(pages, k=PAGES_PER_ROUND)]
    parts, _ = damage(draw, [record(page, i) for i, page in enumerate(chosen)])
    (folder / "a.warc").write_bytes(pack(parts, draw.choice(SHAPES)))
    texts = [{"text": text(draw, pages)} for _ in range(PAGES_PER_ROUND)]
    with gzip.open(folder / "b.jsonl.gz", "wt", encoding="utf-8", errors="surrogatepass") as file:
        file.writelines(json.dumps(row) + "\n" for row in texts)
    summary = []
    for name, options in (("a.warc", []), ("b.jsonl.gz", ["input.format=jsonl"])):
        run = folder / name.partition(".")[0]
        run.mkdir()
        bounds = [
            "extract.filters=[]",
            "language.allowed=[]",
            "language.score=off",
            "extract.gate.min_words=0",
            "pack.seq_len=256",
        ]
        filters = ["refine.filters=['perplexity','quality']", "perplexity.model=models/wiki-en.5gram.bin",
                   "quality.model=models/quality-en.ftz", "quality.score=off", "perplexity.perplexity=off"]  # fmt: skip
        config = make_config(run, [folder / name], *options, *bounds, *filters)
        outcome = run_inline(config)
        assert not any(outcome.failed.values()), outcome.failed
        assert verify_path(str(run / "run"))[0].faults == []
        phases = run_status(str(run / "run")).phases
        extract = phases["extract"]
        summary.append(
            f"{name} {extract.rows_in} in, {extract.rows_out} out, {extract.lost_members} damaged places"
        )
    return "; ".join(summary)


def changed(draw: random.Random, page: bytes) -> bytes:
    """A page with up to three random changes, one of which may be 100,000 pieces in a row."""
    for _ in range(draw.randint(0, 3)):
        at = draw.randrange(len(page) + 1)
        piece = draw.choice(_PIECES).encode("utf-8", "surrogatepass")
        if draw.random() < 0.5:
            page = page[:at] + bytes(draw.randrange(256) for _ in range(20)) + page[at + 20 :]
        else:
            page = page[:at] + piece * draw.choice((1, 50, 3_000, 100_000)) + page[at:]
    return page


def text(draw: random.Random, pages: list[bytes]) -> str:
    """A text of random pieces and parts of pages."""
    pieces = draw.choices(_PIECES, k=draw.randint(1, 4))
    parts = [piece * draw.choice((1, 50, 3_000, 300_000 // len(piece))) for piece in pieces]
    parts.append(draw.choice(pages)[:2000].decode("utf-8", "replace"))
    return "".join(draw.sample(parts, len(parts)))


def record(page: bytes, number: int) -> bytes:
    block = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n" + page
    header = f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: http://example.org/{number}\r\nContent-Length: {len(block)}\r\n\r\n"
    return header.encode() + block + b"\r\n\r\n"


if __name__ == "__main__":
    default = os.environ.get("GRISTMILL_DATA", "../shared/data")
    main(
        float(sys.argv[1]) if len(sys.argv) > 1 else 1.0,
        Path(sys.argv[2] if len(sys.argv) > 2 else default),
    )
