"""Does the extract stage lose anything the bare library finds? Word-F1 on WCXB's 500 pages, per
page type, and ms per page.

    python -m benchmarks.extraction [DATA]

F1 is WCXB's: multiset overlap of the words `\\w+`, lower-cased, of the extracted and the gold main
text, averaged over pages. The stage runs as configured by default but without filters, so that what
is compared is the text before any policy; 'gate' rows have the gate on. Times are CPU seconds of
this process and the extractor's child.
"""

import io
import json
import re
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

import pyarrow.parquet as pq
import zstandard

from filters.language import Language
from filters.license import License
from filters.opt_out import OptOut
from filters.url_policy import UrlPolicy
from stages.dedup.config import DedupConfig
from stages.extract.config import ExtractConfig, Gate
from stages.extract.extract import ExtractPlan, ExtractTask, extract_unit
from stages.formats.document import NamedFilter
from stages.read.fetch import FetchOptions
from stages.read.listing import fingerprint
from stages.read.records import InputConfig
from stages.read.warc import ReadStats, read_records
from stages.storage.ledger import Store, Unit

WORD = re.compile(r"\w+")


def f1(found: str, gold: str) -> float:
    """Word-level F1 of two texts as multisets, in [0, 1]."""
    a, b = Counter(WORD.findall(found.lower())), Counter(WORD.findall(gold.lower()))
    common = (a & b).total()
    return 2 * common / (a.total() + b.total()) if common else 0.0


def gold(data: Path) -> dict[str, dict[str, str]]:
    """The gold rows by URL, of those of WCXB's 500 pages that have a main text."""
    with open(data / "gold" / "wcxb-500.jsonl.zst", "rb") as raw:
        lines = io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(raw), encoding="utf-8")
        return {row["url"]: row for row in map(json.loads, lines) if row["main_content"]}


def bare(warc: Path, engine: str) -> tuple[dict[str, str], float]:
    """What the library alone makes of each page's bytes, and CPU milliseconds per page."""
    from resiliparse.extract.html2text import extract_plain_text
    from resiliparse.parse.encoding import bytes_to_str, detect_encoding
    from trafilatura import extract

    records = read_records(warc, max_payload_bytes=10**8, stats=ReadStats())
    pages = {r.url: r.payload for r in records if r.skipped is None}
    start = time.process_time()
    if engine == "trafilatura":
        texts = {url: extract(html) or "" for url, html in pages.items()}
    else:
        texts = {
            url: extract_plain_text(
                bytes_to_str(html, detect_encoding(html)), main_content=True, alt_texts=False
            )
            for url, html in pages.items()
        }
    return texts, (time.process_time() - start) / len(pages) * 1000


def stage(
    warc: Path, engine: str, *, gate: bool, filters: tuple[str, ...] = ()
) -> tuple[dict[str, str], float, Counter[str]]:
    """What the extract stage stores of each page, CPU milliseconds per page, and why pages have no
    text.
    """
    config = ExtractConfig(
        engine=engine, filters=filters, keep_rejected_text=1.0, gate=Gate(enabled=gate)
    )  # type: ignore[arg-type]
    # of the 500 pages 4 opt out; what policy drops is no loss of the extraction
    opt_out = OptOut(reject=False)
    plan = ExtractPlan(
        config,
        InputConfig(),
        FetchOptions(),
        UrlPolicy(),
        opt_out,
        NamedFilter("language", Language()),
        License(),
        (),
        DedupConfig().signature,
        0,
    )
    with tempfile.TemporaryDirectory() as folder:
        unit = Unit("000000", fingerprint(str(warc)), ExtractTask(str(warc), 0))
        start = time.process_time()
        commit = extract_unit(unit, plan, Store(folder))
        seconds = time.process_time() - start + commit.cpu_seconds
        rows = pq.read_table(
            f"{folder}/documents/000000.parquet", columns=["url", "text", "rejected_by"]
        ).to_pylist()
    missing = Counter(
        row["rejected_by"]
        for row in rows
        if row["text"] is None and not row["rejected_by"].startswith("warc.")
    )
    return {row["url"]: row["text"] or "" for row in rows}, seconds / len(rows) * 1000, missing


def main(data: Path) -> None:
    """Print a line per figure."""
    warc, truth = data / "warc" / "web" / "wcxb-500.warc.gz", gold(data)
    scores: dict[str, dict[str, list[float]]] = {}
    for engine in ("trafilatura", "resiliparse"):
        runs = {f"bare {engine}": (*bare(warc, engine), Counter())}
        runs[f"stage {engine}"] = stage(warc, engine, gate=False)
        runs[f"stage {engine}, gate"] = stage(warc, engine, gate=True)
        for name, (texts, milliseconds, missing) in runs.items():
            by_type: dict[str, list[float]] = defaultdict(list)
            for url, row in truth.items():
                by_type[row["page_type"]].append(f1(texts.get(url, ""), row["main_content"]))
            scores[name] = by_type
            every = [s for values in by_type.values() for s in values]
            print(
                f"{name}: word-F1 {sum(every) / len(every):.4f} on {len(every)} pages, {milliseconds:.1f} ms of CPU per page"
            )
            if missing:
                print(f"{name}: pages without text: {dict(missing)}")
    print(f"{'page type':<16} {'pages':>5}  " + "  ".join(f"{name:>24}" for name in scores))
    for kind in sorted({row["page_type"] for row in truth.values()}):
        means = [sum(s[kind]) / len(s[kind]) for s in scores.values()]
        print(
            f"{kind:<16} {len(next(iter(scores.values()))[kind]):>5}  "
            + "  ".join(f"{m:>24.4f}" for m in means)
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[2] / "shared" / "data")
