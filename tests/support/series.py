"""A series of batches over ten small files of random words."""

import json
import random

import pyarrow.parquet as pq

from pipeline.batches.batch import run_batch
from pipeline.config.load import load
from pipeline.engine.units import in_process
from stages.storage.catalog import read_catalog
from tests.support.quickstart import RecordedProgress

WORDS = [
    "mill",
    "wheat",
    "village",
    "water",
    "hill",
    "wheel",
    "sack",
    "flour",
    "baker",
    "stone",
    "furrow",
    "miller",
    "grain",
    "bread",
    "river",
    "sluice",
    "ledger",
    "harvest",
]


def document_text(number: int) -> str:
    """A document of its own order of words: near-duplicates would be taken out."""
    return " ".join(random.Random(number).choices(WORDS, k=150)) + "."


def write_listing(folder):
    """Ten files of four documents; each holds a copy of a document of the file before."""
    folder.mkdir()
    for file in range(10):
        numbers = [*range(4 * file, 4 * file + 4), *([4 * file - 1] if file else [])]
        lines = [
            json.dumps({"text": document_text(n), "url": f"https://mill.example/{file}/{n}"})
            for n in numbers
        ]
        (folder / f"{file}.jsonl").write_text("\n".join(lines))
    return folder


def series_config(tmp_path, listing, *overrides, series="series"):
    return load(
        None,
        [
            f"run.directory={tmp_path}/{series}",
            f"input.paths=['{listing}/*.jsonl']",
            "input.format=jsonl",
            "input.url_column=url",
            "language.allowed=[]",
            "extract.filters=[]",
            "refine.filters=[]",
            "pack.seq_len=64",
            "schedule.static_inputs=4",
            *overrides,
        ],
    )


def run_one_batch(settings, **options):
    return run_batch(settings, RecordedProgress(), in_process, **options)


def published_urls(tmp_path, series="series"):
    """URLs of each generation."""
    found = []
    for entry in read_catalog(f"{tmp_path}/{series}"):
        table = pq.read_table(f"{tmp_path}/{series}/generations/{entry['name']}/provenance.parquet")
        found.append(sorted(set(table["url"].to_pylist())))
    return found
