"""How often does the gate drop a page that would have been kept? Per set of pages, against the same
run without the gate.

    python -m benchmarks.gate [DATA]

A false drop is a page that the gate rejects although, without it, the page passes every rule
(language, Gopher, C4, FineWeb; published bounds); 'of English' counts pages whose extracted text
the language rule accepts. Engine: resiliparse.
"""

import sys
import tempfile
from pathlib import Path

import pyarrow.parquet as pq

from benchmarks.extraction_steps import default_plan
from stages.extract.config import Gate
from stages.extract.extract import ExtractTask, extract_unit
from stages.read.listing import fingerprint
from stages.storage.ledger import Store, Unit


def verdicts(warc: Path, engine: str, *, gate: bool) -> dict[int, str | None]:
    """The rule that drops each page, None for a kept one."""
    plan = default_plan(engine, gate=Gate(enabled=gate))
    with tempfile.TemporaryDirectory() as folder:
        extract_unit(
            Unit("0", fingerprint(str(warc)), ExtractTask(str(warc), 0)),
            plan,
            Store(folder),
        )
        rows = pq.read_table(
            f"{folder}/documents/0.parquet", columns=["doc_id", "rejected_by"]
        ).to_pylist()
    return {row["doc_id"]: row["rejected_by"] for row in rows}


def main(data: Path) -> None:
    """Print a line per set of pages."""
    for name in ("wcxb-500", "wcxb-435", "trafilatura-eval", "multilang-docs"):
        warc = data / "warc" / "web" / f"{name}.warc.gz"
        with_gate, without = (verdicts(warc, "resiliparse", gate=on) for on in (True, False))
        gated = {d for d, rule in with_gate.items() if rule and rule.startswith("gate.")}
        english = {
            d
            for d, rule in without.items()
            if rule not in ("language.allowed", "language.score", "extract.empty")
        }
        kept = {d for d, rule in without.items() if rule is None}
        print(f"{name}: gate drops {len(gated)} of {len(without)} pages")
        for what, pages in (("pages kept without the gate", kept), ("English pages", english)):
            print(
                f"{name}: of {len(pages)} {what} it drops {len(gated & pages)} ({len(gated & pages) / len(pages):.2%})"
            )


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[2] / "shared" / "data")
