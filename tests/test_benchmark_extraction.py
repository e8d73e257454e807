"""benchmarks/extraction.py on a few pages."""

from itertools import islice
from pathlib import Path

import pytest

from benchmarks import extraction
from benchmarks.extraction import Counts, count_snippets
from pipeline.models import extractor_training
from stages.read.warc import ReadStats, read_records


def test_snippets_are_found_whatever_the_white_space():
    snippets = {"with": ["a b", "c"], "without": ["menu", "d"]}
    counts = count_snippets("x a\n b menu", snippets)
    assert counts == Counts(1, 1, 1)
    assert counts.figures() == "precision 0.5000, recall 0.5000, F 0.5000"
    assert Counts(0, 0, 0).figures() == "precision 0.0000, recall 0.0000, F 0.0000"


@pytest.fixture
def few(tmp_path: Path, corpus: Path) -> Path:
    """A folder like the corpus, with the first pages of each set."""
    for folder in ("gold", "warc/web"):
        (tmp_path / folder).mkdir(parents=True)
    for name in (*extraction.SETS, "trafilatura-eval"):
        source = corpus / "warc" / "web" / f"{name}.warc.gz"
        records = read_records(source, max_payload_bytes=10**8, stats=ReadStats())
        end = next(islice(records, 12, None)).offset
        with open(source, "rb") as file:
            (tmp_path / "warc" / "web" / source.name).write_bytes(file.read(end))
    for path in (corpus / "gold").iterdir():
        (tmp_path / "gold" / path.name).symlink_to(path)
    return tmp_path


@pytest.mark.corpus
def test_figures_of_a_few_pages(few, capsys, monkeypatch):
    pytest.importorskip("lightgbm")
    monkeypatch.setattr(extractor_training, "NUM_TREES", 4)
    extraction.compare_snippets(few, extraction.compare_f1(few, []))
    out = capsys.readouterr().out
    for line in (
        "wcxb-435, bare trafilatura: word-F1 0.",
        "wcxb-500, blocks, cross-validated: word-F1 0.",
        "snippets, blocks, host not seen, all: precision ",
    ):
        assert line in out


@pytest.mark.corpus
def test_steps_of_a_few_pages(few, capsys):
    extraction.print_profile(few / "warc" / "web" / "wcxb-500.warc.gz")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["read", "decode", "walk"]
    assert lines[-1].startswith("stage / bare kernels: ")
