"""Reads every file of the shared corpus and prints what came out of it: records, pages, reasons,
damage.

    python benchmarks/warc_oddities.py [DATA]        (DATA defaults to ../shared/data)

Bytes lost are bytes of the file as it lies on disk; MB/s counts delivered pages, decoded, by the
clock of this machine.
"""

import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from stages.read.warc import ReadStats, read_records

FOLDERS = ("real", "edge", "web")
MAX_PAYLOAD_BYTES = 8 << 20


def measure(path: Path) -> tuple[ReadStats, Counter[str], int]:
    """Read a file to its end: its stats, delivered records by kind, and bytes delivered."""
    stats, kinds, delivered = ReadStats(), Counter[str](), 0
    for record in read_records(path, max_payload_bytes=MAX_PAYLOAD_BYTES, stats=stats):
        if record.skipped is None:
            kinds[record.kind] += 1
            delivered += len(record.payload)
    return stats, kinds, delivered


def row(name: str, stats: ReadStats, kinds: Counter[str]) -> str:
    reasons = ", ".join(f"{reason} {count}" for reason, count in stats.skipped.most_common())
    numbers = (stats.records, kinds["html"], kinds["text"], stats.damaged_places, stats.lost_bytes)
    return f"{name[:64]:64} {'{:>8,}{:>7,}{:>6,}{:>8,}{:>10,}'.format(*numbers)}  {reasons}"


def main(data: Path) -> None:
    print(f"{'file':64} {'records':>8}{'html':>7}{'text':>6}{'damaged':>8}{'lost':>10}  skipped")
    total, total_kinds, delivered = ReadStats(), Counter[str](), 0
    started = time.perf_counter()
    for folder in FOLDERS:
        for path in sorted(
            path for path in (data / "warc" / folder).iterdir() if path.suffix != ".tsv"
        ):
            stats, kinds, size = measure(path)
            print(row(f"{folder}/{path.name}", stats, kinds))
            total.records += stats.records
            total.skipped += stats.skipped
            total.damaged_places += stats.damaged_places
            total.lost_bytes += stats.lost_bytes
            total.bytes_total += stats.bytes_total
            total_kinds += kinds
            delivered += size
    elapsed_seconds = time.perf_counter() - started
    print(row("total", total, total_kinds))
    print(
        f"{total.bytes_total:,} bytes read, {delivered:,} delivered, {delivered / 1e6 / elapsed_seconds:.0f} MB/s"
    )


if __name__ == "__main__":
    default = Path(__file__).parents[2] / "shared" / "data"
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else default)
