"""How many damaged WARC files lose a record without a word.

    python -m benchmarks.warc_damage [FILES] [--first SEED]

The files have 6 records, are plain, gzip or zstd, and have 1 to 3 changes (flipped, deleted or
inserted bytes, truncated records, a cut end). A file counts if an untouched record is not
delivered, or if a record is neither delivered nor skipped and nothing says that something is
missing. FastWARC, on the same files, says so only by raising an error.
"""

import argparse
import io
import tempfile
from pathlib import Path

from fastwarc.warc import ArchiveIterator, WarcRecordType

from tests.support.damaged_warc import Damaged, damaged_file, uncounted


def fastwarc_loses(file: Damaged) -> bool:
    """Whether FastWARC delivers fewer pages than there were, and raises nothing."""
    try:
        records = ArchiveIterator(io.BytesIO(file.data), record_types=WarcRecordType.response)
        delivered = [record.reader.read() for record in records]
    except Exception:
        return False
    return len(delivered) < len(file.pages)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="?", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="seed of the first file")
    options = parser.parse_args()
    ours = peer = 0
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.first, options.first + options.files):
            file = damaged_file(seed)
            problem = uncounted(file, Path(folder))
            if problem is not None:
                ours += 1
                print(f"seed {seed}: {problem}")
            peer += fastwarc_loses(file)
    print(f"losses without a word, gristmill: {ours} of {options.files:,} files")
    print(f"losses without a word, FastWARC:  {peer} of {options.files:,} files")


if __name__ == "__main__":
    main()
