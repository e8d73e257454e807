"""Errors of storage: which file, during what, and what to do."""

import errno
import os
import pickle
import subprocess
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import s3fs

from stages.storage import files
from stages.storage.errors import StorageError, explained


@contextmanager
def store_that_answers(status, code):
    """An object store that refuses every request; a HEAD's answer has no code."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self):
            body = f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def credentials(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3fs.S3FileSystem.clear_instance_cache()  # fsspec returns a client made in another environment
    yield monkeypatch
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize(
    "status, code, advice",
    [
        (403, "AccessDenied", "access is denied"),
        (400, "ExpiredToken", "credentials have expired"),
        (403, "RequestTimeTooSkewed", "clock of this machine"),
        (403, "InvalidAccessKeyId", "does not accept these credentials"),
        (403, "SignatureDoesNotMatch", "does not accept these credentials"),
    ],
)
def test_a_refusal_names_the_object_what_was_done_and_what_to_do(status, code, advice, credentials):
    uri = "s3://bucket/folder/part.parquet"
    with store_that_answers(status, code) as endpoint:
        credentials.setenv("AWS_ENDPOINT_URL", endpoint)
        for doing, call in {
            "reading": lambda: files.read_bytes(uri),
            "writing": lambda: files.write_atomically(uri, b"data"),
            "listing": lambda: files.names_in(uri),
        }.items():
            with pytest.raises(StorageError, match=advice) as caught:
                call()
            assert str(caught.value).startswith(f"{doing} {uri}: ")


def test_missing_credentials_are_an_error_of_storage(credentials):
    credentials.delenv("AWS_ACCESS_KEY_ID")
    credentials.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StorageError, match=r"reading s3://bucket/x: there are no credentials"):
        files.read_bytes("s3://bucket/x")


def test_absence_is_no_error_of_storage(tmp_path):
    with pytest.raises(FileNotFoundError):
        files.read_bytes(str(tmp_path / "absent"))


def test_a_full_disk_is_named_and_the_error_travels(tmp_path):
    uri = str(tmp_path / "runs/a/part.parquet")
    with pytest.raises(StorageError) as caught, explained(uri, "writing"):
        raise OSError(errno.ENOSPC, "No space left on device")
    message = str(pickle.loads(pickle.dumps(caught.value)))
    assert message.startswith(f"writing {uri}: no space left on device: the disk of {tmp_path} ")


@pytest.mark.kill
def test_a_disk_that_fills_up_is_named(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]).returncode:
        pytest.skip("only root can mount a disk")
    try:
        with pytest.raises(StorageError, match=rf"writing {disk}/big: no space .* of {disk} "):
            files.write_atomically(f"{disk}/big", b"x" * 2_000_000)
        assert os.listdir(disk) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_an_absent_bucket_is_named_and_stays_absence(credentials):
    with store_that_answers(404, "NoSuchBucket") as endpoint:
        credentials.setenv("AWS_ENDPOINT_URL", endpoint)
        with pytest.raises(FileNotFoundError, match="writing s3://bucket/x: there is no such buck"):
            files.write_atomically("s3://bucket/x", b"data")
