"""A series of batches over ten small files of random words."""

import json
import random

import pyarrow.parquet as pq

from pipeline.batches.batch import batches, decisions, run_batch
from pipeline.config.load import load
from pipeline.controller.decide import replay
from pipeline.engine.units import in_process
from pipeline.inspect.verify import verify_path
from stages.storage.catalog import read_catalog
from stages.storage.files import open_fs
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


def product(series):
    """What a sequence comes to: catalog, numbers of the inputs, all files of generations, corpus,
    and failures, if there are.
    """
    fs, root = open_fs(series)
    found = {path.removeprefix(f"{root}/"): path for path in fs.find(root)}
    wanted = [
        n
        for n in found
        if n in ("catalog.jsonl", "inputs.jsonl")
        or n.startswith("generations/")
        or "/failures/" in n
    ]
    # a killed unit leaves its temporary file: rubbish, no lie
    wanted += [n for n in found if "/corpus/" in n and "/." not in n]
    return {name: fs.cat_file(found[name]) for name in wanted}


def assert_undisturbed(series, undisturbed):
    """The same batches, each published once, and each file as if nothing had happened."""
    ours, theirs = product(series), product(undisturbed)
    assert sorted(ours) == sorted(theirs) and any("/corpus/" in name for name in ours)
    assert [name for name in ours if ours[name] != theirs[name]] == []
    told, expected = (
        [(b.inputs, b.done["generation"]) for b in batches(which)]
        for which in (series, undisturbed)
    )
    assert told == expected and not any(r.faults for r in verify_path(series))
    assert len(decisions(series)) >= len(told) and replay(decisions(series)) == []
