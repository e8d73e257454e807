"""Naming inputs, and downloading from servers that misbehave."""

import gzip
import lzma
import os
import random
import tempfile
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry
from pydantic import ValidationError

from stages.read import fetch
from stages.read.fetch import FetchError, FetchOptions, local_copy, printable
from stages.read.listing import expand_inputs, fingerprint

BODY = random.Random(0).randbytes(300_000)
ETAG = '"v1"'
QUICK = FetchOptions(attempts=4, backoff_seconds=0.001, timeout_seconds=5)


class Server(ThreadingHTTPServer):
    """Serves BODY, but answers request n as `script[n]` says; keeps the headers of each request in
    `seen`.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: list[Callable[[Handler], None]] = []
        self.seen: list[dict[str, str]] = []
        self.busy = self.busiest = 0
        self.lock = threading.Lock()

    def url(self, name: str = "a.warc.gz") -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{name}"


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        with self.server.lock:
            turn = len(self.server.seen)
            self.server.seen.append(dict(self.headers))
            self.server.busy += 1
            self.server.busiest = max(self.server.busiest, self.server.busy)
        script = self.server.script
        (script[min(turn, len(script) - 1)] if script else whole)(self)
        with self.server.lock:
            self.server.busy -= 1

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"content_length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


def whole(handler: Handler) -> None:
    handler.answer(200, BODY, etag=ETAG)


def ranged(handler: Handler) -> None:
    start = int(handler.headers["Range"].removeprefix("bytes=").removesuffix("-"))
    assert handler.headers["If-Range"] == ETAG
    handler.answer(
        206, BODY[start:], etag=ETAG, content_range=f"bytes {start}-{len(BODY) - 1}/{len(BODY)}"
    )


def dropped(part: bytes, **headers: str) -> Callable[[Handler], None]:
    """Promise the whole, send `part`, hang up."""

    def respond(handler: Handler) -> None:
        handler.answer(200, part, content_length=str(len(BODY)), **headers)
        handler.close_connection = True

    return respond


def refused(status: int, **headers: str) -> Callable[[Handler], None]:
    return lambda handler: handler.answer(status, b"no", **headers)


def other_range(handler: Handler) -> None:
    handler.answer(206, BODY[7:], etag=ETAG, content_range=f"bytes 7-{len(BODY) - 1}/{len(BODY)}")


def short_without_length(handler: Handler) -> None:
    handler.send_response(200)
    handler.send_header("Connection", "close")
    handler.end_headers()
    handler.wfile.write(BODY)


def slow(handler: Handler) -> None:
    handler.server.gate.wait(0.2)
    whole(handler)


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    server.gate = threading.Event()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def own_temp_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


HALF = BODY[:150_000]
SCRIPTS = {
    "well behaved": [whole],
    "503 twice": [refused(503), refused(503), whole],
    "403 burst": [refused(403), refused(403), refused(403), whole],
    "429 with Retry-After": [refused(429, retry_after="0"), whole],
    "Retry-After with a date": [refused(503, retry_after="Wed, 21 Oct 2026 07:28:00 GMT"), whole],
    "drops, then resumes": [dropped(HALF, etag=ETAG), ranged],
    "drops while resuming": [dropped(HALF, etag=ETAG), refused(503), ranged],
    "drops, then ignores Range": [dropped(HALF, etag=ETAG), whole],
    "drops, file has changed": [dropped(b"old" * 50_000, etag='"v0"'), whole],
    "drops, no validator": [dropped(HALF), whole],
    "drops, weak validator": [dropped(HALF, etag='W/"v1"'), whole],
    "resumes elsewhere": [dropped(HALF, etag=ETAG), other_range, whole],
    "416": [dropped(HALF, etag=ETAG), refused(416), whole],
    "says nothing": [dropped(b""), whole],
    "no length": [short_without_length],
    "gzip as an encoding": [lambda handler: handler.answer(200, BODY, content_encoding="gzip")],
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_misbehaving_server_still_gives_the_whole_file(server, name):
    server.script = SCRIPTS[name]
    with local_copy(server.url(), options=QUICK) as path:
        assert path.read_bytes() == BODY
        assert path.name.endswith("a.warc.gz")
    assert not path.exists()
    assert len(server.seen) == len(server.script)


def test_only_a_known_version_is_resumed(server):
    server.script = [dropped(HALF, etag=ETAG), ranged]
    with local_copy(server.url(), options=QUICK):
        pass
    assert server.seen[1]["Range"] == "bytes=150000-"
    server.script, server.seen = [dropped(HALF), whole], []
    with local_copy(server.url(), options=QUICK):
        pass
    assert "Range" not in server.seen[1]


def test_every_request_says_who_asks(server):
    with local_copy(server.url(), options=QUICK):
        assert server.seen[0]["User-Agent"].startswith("gristmill/")
        assert server.seen[0]["Accept-Encoding"] == "identity"


@pytest.mark.parametrize(
    "answer, asked, message",
    [
        (refused(404), 1, "status 404 Not Found, attempt 1, .*check the address"),
        (refused(410), 1, "status 410 Gone"),
        (refused(403), 4, "status 403 Forbidden, attempt 4, .*fewer connections"),
        (refused(503), 4, "status 503 .*attempt 4"),
        (dropped(HALF), 4, "attempt 4, 150,000 of 300,000 bytes; run again"),
        (other_range, 4, "Content-Range '7-299999'"),
    ],
)
def test_a_server_that_never_gives_the_file_is_an_error_that_says_so(
    server, tmp_path, answer, asked, message
):
    server.script = [answer]
    with pytest.raises(FetchError, match=message) as error, local_copy(server.url(), options=QUICK):
        pass
    assert server.url() in str(error.value)
    assert len(server.seen) == asked
    assert not [path for path in tmp_path.iterdir() if path.is_file()]


def test_nobody_listening_is_an_error():
    url, options = "http://127.0.0.1:1/x", FetchOptions(attempts=2, backoff_seconds=0)
    with (
        pytest.raises(FetchError, match=r"ConnectionError.*attempt 2"),
        local_copy(url, options=options),
    ):
        pass


def test_progress_is_rewarded_with_new_attempts(server, monkeypatch):
    monkeypatch.setattr(fetch, "_CHUNK", 10_000)

    def bit_by_bit(handler: Handler) -> None:
        start = int(handler.headers.get("Range", "bytes=0-")[6:-1])
        span = f"bytes {start}-{len(BODY) - 1}/{len(BODY)}"
        length = str(len(BODY) - start)
        handler.answer(
            206, BODY[start : start + 40_000], etag=ETAG, content_range=span, content_length=length
        )
        handler.close_connection = True

    server.script = [bit_by_bit]
    with local_copy(server.url(), options=FetchOptions(attempts=2, backoff_seconds=0)) as path:
        assert path.read_bytes() == BODY


def test_waits_grow_are_jittered_by_name_and_heed_the_server(server, monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    server.script = [
        refused(503),
        refused(503),
        refused(503),
        refused(429, retry_after="77"),
        whole,
    ]
    options = FetchOptions(attempts=5, backoff_seconds=2)
    for _ in range(2):
        server.seen.clear()
        with local_copy(server.url(), options=options):
            pass
    assert waits[:4] == waits[4:]
    assert [1 <= waits[0] <= 3, 2 <= waits[1] <= 6, 4 <= waits[2] <= 12, waits[3]] == [
        True,
        True,
        True,
        77,
    ]


def test_no_more_connections_than_allowed(server):
    server.script = [slow]
    options = FetchOptions(connections=2, attempts=1)

    def fetch() -> None:
        with local_copy(server.url(), options=options):
            pass

    threads = [threading.Thread(target=fetch) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(server.seen) == 6
    assert server.busiest <= 2


def test_options_refuse_unknown_keys_and_nonsense():
    with pytest.raises(ValidationError):
        FetchOptions(conections=3)
    with pytest.raises(ValidationError):
        FetchOptions(connections=0)


# -- naming
# ------------------------------------------------------------------------------------------------------------

BASE = "https://data.commoncrawl.org/"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in (
        "b.warc.gz",
        "a.warc",
        "sub/c.warc.wet.gz",
        "sub/d.parquet",
        "sub/e.jsonl.zst",
        "notes.txt",
    ):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    with gzip.open(tmp_path / "in" / "warc.paths.gz", "wt") as lines:
        lines.write("crawl-data/1.warc.gz\ncrawl-data/2.warc.gz\n\n")
    return tmp_path / "in"


def test_a_folder_means_all_files_in_it_that_we_can_read(folder):
    names = [
        path.removeprefix(f"{folder}/") for path in expand_inputs([str(folder)], base_uri=BASE)
    ]
    assert names == ["a.warc", "b.warc.gz", "sub/c.warc.wet.gz", "sub/d.parquet", "sub/e.jsonl.zst"]


def test_order_is_the_users_and_each_file_comes_once(folder):
    paths = [
        f"{folder}/b*",
        f"{folder}/*.warc*",
        "http://x/y.warc.gz",
        f"{folder}/notes.txt",
        "http://x/y.warc.gz",
    ]
    expected = [
        f"{folder}/b.warc.gz",
        f"{folder}/a.warc",
        "http://x/y.warc.gz",
        f"{folder}/notes.txt",
    ]
    assert expand_inputs(paths, base_uri=BASE) == expected


@pytest.mark.parametrize("base", [BASE, BASE.rstrip("/"), "s3://commoncrawl/"])
def test_a_listing_means_its_lines(folder, base):
    found = expand_inputs([f"{folder}/warc.paths.gz"], base_uri=base)
    assert found == [f"{base.rstrip('/')}/crawl-data/{n}.warc.gz" for n in (1, 2)]


def test_a_remote_listing_is_fetched(server):
    listing = gzip.compress(b"crawl-data/1.warc.gz\n")
    server.script = [lambda handler: handler.answer(200, listing)]
    found = expand_inputs([server.url("warc.paths.gz")], base_uri=BASE)
    assert found == [f"{BASE}crawl-data/1.warc.gz"]


@pytest.mark.parametrize("path", ["nothing", "no*thing", "no/such.paths.gz", "empty"])
def test_a_path_that_matches_nothing_is_named(folder, path):
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match=r"matches no file") as error:
        expand_inputs([f"{folder}/b.warc.gz", f"{folder}/{path}"], base_uri=BASE)
    assert path in str(error.value)


def test_a_name_with_brackets_is_a_name(folder):
    (folder / "x[1].warc").write_bytes(b"")
    assert expand_inputs([f"{folder}/x[1].warc"], base_uri=BASE) == [f"{folder}/x[1].warc"]


NOT_INPUTS = (
    "._a.jsonl",
    ".a.jsonl.crc",
    "_SUCCESS",
    "_a.jsonl",
    ".ipynb_checkpoints/a-checkpoint.jsonl",
    "_temporary/0/part-0.jsonl",
    "__MACOSX/._a.jsonl",
    "x.tmp",
    "out.tmp/a.jsonl",
    "a.jsonl.part",
    "a.jsonl.TMP",
    "a.jsonl~",
)
INPUTS = ("A.JSONL", "a.jsonl.xz", "a.ndjson", "c4.json.gz", "sub.d/a.warc.zst", "x_y/b.parquet")


@pytest.mark.parametrize("root", ["below", "_named/.below", "s3://bucket/_named"])
def test_hidden_and_unfinished_files_of_a_folder_are_no_inputs(tmp_path, request, root):
    if root.startswith("s3:"):
        request.getfixturevalue("bucket")
        folder, fs = root, fsspec.filesystem("s3")
        for name in (*NOT_INPUTS, *INPUTS):
            fs.pipe(f"{folder}/{name}", b"x")
    else:
        folder = str(tmp_path / root)
        for name in (*NOT_INPUTS, *INPUTS):
            Path(folder, name).parent.mkdir(parents=True, exist_ok=True)
            Path(folder, name).write_bytes(b"x")
    expected = sorted(f"{folder}/{name}" for name in INPUTS)
    assert expand_inputs([folder], base_uri="") == expected
    assert expand_inputs([f"{folder}/"], base_uri="") == expected
    top = sorted(f"{folder}/{name}" for name in INPUTS if "/" not in name)
    assert expand_inputs([f"{folder}/*"], base_uri="") == top
    for asked in ("_*", "*.part", "out.tmp/*", "_temporary/*/*"):  # a pattern may ask for them
        assert expand_inputs([f"{folder}/{asked}"], base_uri="")
    assert expand_inputs([f"{folder}/_a.jsonl"], base_uri="") == [f"{folder}/_a.jsonl"]


@pytest.mark.parametrize("root", ["local", "s3://bucket/x"])
@pytest.mark.parametrize(
    "name", ["x[1].warc", "a*b?.warc", "x[1].paths", "50%20 #1.warc", "é ü.warc"]
)
def test_an_exact_name_is_no_pattern(tmp_path, request, root, name):
    if root == "local":
        path = str(tmp_path / name)
        Path(path).write_bytes(b"a.warc\n")
    else:
        request.getfixturevalue("bucket")
        path = f"{root}/{name}"
        fsspec.filesystem("s3").pipe(path, b"a.warc\n")
    expected = [f"{BASE}a.warc"] if name.endswith(".paths") else [path]
    assert expand_inputs([path], base_uri=BASE) == expected
    assert fingerprint(path)
    with local_copy(path, options=QUICK) as copy:
        assert copy.read_bytes() == b"a.warc\n"


@pytest.mark.parametrize(
    "name, pack",
    [
        ("warc.paths", bytes),
        ("warc.paths.gz", bytes),  # unpacked by a browser
        ("warc.paths.gz", gzip.compress),
        ("warc.paths.xz", lzma.compress),
        ("warc.paths.txt", lambda data: data.decode().encode("utf-16")),
        ("WARC.PATHS.GZ", lambda data: b"\xef\xbb\xbf" + data.replace(b"\n", b"\r\n")),
    ],
)
def test_a_listing_may_be_packed_or_not_and_name_addresses_or_paths(tmp_path, name, pack):
    local = tmp_path / "here.warc"
    local.write_bytes(b"x")
    lines = f"crawl/1.warc.gz\n# note\n/crawl/2.warc.gz\n\ns3://b/3.warc.gz\nhttps://c/4.warc.gz\n{local}"
    (tmp_path / name).write_bytes(pack(lines.encode()))
    expected = [
        f"{BASE}crawl/1.warc.gz",
        f"{BASE}crawl/2.warc.gz",
        "s3://b/3.warc.gz",
        "https://c/4.warc.gz",
        str(local),
    ]
    assert expand_inputs([f"{tmp_path}/{name}"], base_uri=BASE) == expected
    assert expand_inputs([f"{tmp_path}/*.[pP][aA]*"], base_uri=BASE) == expected
    assert expand_inputs([f"{tmp_path}/{name}"], base_uri="")[0] == "crawl/1.warc.gz"


@pytest.mark.parametrize(
    "data, message",
    [
        (b"\n\n", "names no file"),
        (b"<html>", "holds HTML"),
        (gzip.compress(b"a.warc.gz\n" * 99)[:-9], "cut short at byte"),
        (b"caf\xe9.warc.gz\n", "utf-8"),
    ],
)
def test_a_listing_that_cannot_be_read_is_named(tmp_path, data, message):
    (tmp_path / "a.paths.gz").write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        expand_inputs([f"{tmp_path}/a.paths.gz"], base_uri=BASE)
    assert f"{tmp_path}/a.paths.gz" in str(error.value)


def test_a_name_that_is_not_utf_8_is_read(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.parquet")
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a")
    os.rename(tmp_path / "a", path)
    assert expand_inputs([str(tmp_path)], base_uri="") == [path]
    assert printable(path) == f"{tmp_path}/caf\\xe9.parquet"
    with local_copy(path, options=QUICK) as copy:
        assert pq.read_table(copy).num_rows == 1
    assert Path(path).exists() and not copy.exists()


def test_what_killed_processes_left_is_deleted_by_the_next_download(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    held = fetch.download_file("s3://bucket/held.warc.gz")
    for name in ("left.warc.gz", "new.warc.gz"):
        (tmp_path / f"gristmill-download-{name}").touch()
    (tmp_path / "another").touch()
    for file in tmp_path.iterdir():
        if "new" not in file.name:
            os.utime(file, (0, 0))
    with held, fetch.download_file("s3://bucket/a.warc.gz") as file:
        names = {
            held.name,
            file.name,
            *(f"{tmp_path}/{n}" for n in ("another", "gristmill-download-new.warc.gz")),
        }
        assert {str(path) for path in tmp_path.iterdir()} == names


def test_a_local_file_is_used_where_it_lies(folder):
    with local_copy(f"{folder}/a.warc", options=QUICK) as path:
        assert path == folder / "a.warc"
    assert path.exists()


def test_fingerprints_tell_versions_apart(folder):
    path = folder / "a.warc"
    before = fingerprint(str(path))
    assert fingerprint(str(path)) == before
    os.utime(path, ns=(0, 1))
    assert fingerprint(str(path)) == "1:1" != before
    assert fingerprint("https://x/y") == "https://x/y"
    with pytest.raises(FileNotFoundError):
        fingerprint(str(folder / "none"))


def test_a_file_that_each_node_of_a_job_unpacks_is_known_by_its_content(folder, monkeypatch):
    monkeypatch.chdir(folder)
    before = fingerprint("a.warc")
    os.utime("a.warc", ns=(0, 1))
    assert fingerprint("a.warc") == before
    content = Path("a.warc").read_bytes()
    Path("a.warc").write_bytes(bytes([content[0] ^ 1]) + content[1:])
    assert fingerprint("a.warc") != before


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An s3 address whose bucket lies in memory: fsspec's memory filesystem under the name s3."""

    class Fake(MemoryFileSystem):
        protocol = "s3"
        store: ClassVar[dict] = {}
        pseudo_dirs: ClassVar[list] = [""]

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return "/" + path.removeprefix("s3://").strip("/")

        def unstrip_protocol(self, name: str) -> str:
            return "s3://" + name.strip("/")

        def info(self, path: str, **kwargs: object) -> dict:
            return super().info(path, **kwargs) | {"ETag": '"abc"'}

    monkeypatch.setitem(_registry, "s3", Fake)
    fs = fsspec.filesystem("s3", skip_instance_cache=True)
    for name in ("a.warc.gz", "sub/b.warc.gz", "c.txt"):
        fs.pipe(f"s3://bucket/{name}", b"hello")
    yield "s3://bucket"


def test_s3_folders_patterns_and_files(bucket):
    assert expand_inputs([bucket], base_uri=BASE) == [
        f"{bucket}/a.warc.gz",
        f"{bucket}/sub/b.warc.gz",
    ]
    assert expand_inputs([f"{bucket}/*.txt"], base_uri=BASE) == [f"{bucket}/c.txt"]
    assert expand_inputs([f"{bucket}/c.txt"], base_uri=BASE) == [f"{bucket}/c.txt"]
    with pytest.raises(ValueError, match="s3://bucket/none"):
        expand_inputs([f"{bucket}/none"], base_uri=BASE)


def test_s3_files_are_fetched_and_told_apart(bucket):
    assert fingerprint(f"{bucket}/c.txt") == "5:abc"
    with local_copy(f"{bucket}/c.txt", options=QUICK) as path:
        assert path.read_bytes() == b"hello"
    assert not path.exists()
    with (
        pytest.raises(FetchError, match="s3://bucket/none"),
        local_copy(f"{bucket}/none", options=QUICK),
    ):
        pass
