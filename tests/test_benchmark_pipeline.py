"""benchmarks/pipeline.py: the sets of pages, and what a command costs."""

import gzip
import sys

import pytest

from benchmarks import pages
from benchmarks.watch import cost_of

ENGLISH = "The committee met on Tuesday to discuss the new bridge, which had been closed for years."
GERMAN = (
    "Der Ausschuss beriet am Dienstag über die neue Brücke, die seit Jahren gesperrt gewesen ist."
)
BURN = "import time\nwhile time.process_time() < {seconds}: pass"


def page(text: str) -> bytes:
    return f"<html><body><article><p>{f'{text} ' * 5}</p></article></body></html>".encode()


def member(kind: str, block: bytes) -> bytes:
    header = f"WARC/1.1\r\nWARC-Type: {kind}\r\nWARC-Target-URI: https://a.example/\r\n"
    header += f"Content-Type: application/http\r\nContent-Length: {len(block)}\r\n\r\n"
    return gzip.compress(header.encode() + block + b"\r\n\r\n")


def test_pages_dealt_to_files_are_the_pages_that_were_read(tmp_path, monkeypatch):
    bodies = [page(f"{n} {ENGLISH}") for n in range(10)]
    http = [b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n" + body for body in bodies]
    folder = tmp_path / "warc" / "web"
    folder.mkdir(parents=True)
    members = [member("warcinfo", b""), *(member("response", block) for block in http)]
    (folder / "a.warc.gz").write_bytes(b"".join(members))
    monkeypatch.setattr(pages, "WARCS", ("a",))
    read = list(pages.read_pages(tmp_path))
    assert [p.html for p in read] == bodies
    pages.deal(read, tmp_path / "dealt", copies=2)
    files = sorted((tmp_path / "dealt").iterdir())
    assert len(files) == 2 * pages.FILES
    assert sum(file.read_bytes().count(p.member) for file in files for p in read) == 20


@pytest.mark.parametrize(
    "html, verdict", [(page(ENGLISH), True), (page(GERMAN), False), (b"", False)]
)
def test_english_pages(html, verdict):
    assert pages.is_english(html) is verdict


def test_the_cost_of_a_command_counts_what_it_starts(tmp_path):
    child = BURN.format(seconds=0.5)
    parent = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {child!r}])"
    cost = cost_of([sys.executable, "-c", parent], log=tmp_path / "log")
    assert 0.3 < cost.cpu < 2
    assert cost.wall > 0.3


def test_a_command_that_fails_says_why(tmp_path):
    with pytest.raises(SystemExit, match=r"(?s)exit code 3.*no such corpus"):
        code = "import sys; print('no such corpus'); sys.exit(3)"
        cost_of([sys.executable, "-c", code], log=tmp_path / "log")
