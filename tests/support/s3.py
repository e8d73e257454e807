"""A local S3 server, and a proxy before it that injects faults."""

import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class FaultyProxy(ThreadingHTTPServer):
    """A proxy before the S3 server. `fault` says what to do to the n-th request: None, a status, or
    a way to cut it off.
    """

    daemon_threads = True

    def __init__(self, server, fault, port=0):
        super().__init__(("127.0.0.1", port), _Handler)
        self.patience = 4.0  # of a "timeout", in seconds: more than its client has
        self.behind, self.fault, self.lock = server.removeprefix("http://"), fault, threading.Lock()
        self.number, self.done = 0, Counter()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def next_fault(self, method, path):
        with self.lock:
            self.number += 1
            what = self.fault(self.number, method, path)
            self.done[what] += 1
            return what


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def handle_request(self):
        self.close_connection = True
        what = self.server.next_fault(self.command, self.path)
        if what == "timeout":
            time.sleep(self.server.patience)
            what = "no answer"
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length // 2 if what == "half request" else length)
        if isinstance(what, int):
            code = {500: "InternalError", 503: "SlowDown", 409: "ConditionalRequestConflict"}[what]
            self._answer(
                what, [], f"<Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
            )
        elif what is None or what in ("no answer", "half answer"):
            status, headers, data = self._forward(body)
            if what is None:
                self._answer(status, headers, data)
            elif what == "half answer" and data:
                self._answer(status, headers, data, sent=len(data) // 2)
        elif (
            what == "half request"
        ):  # the server behind gets a header that promises more than comes
            self._forward(body, answered=False)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_request

    def _forward(self, body, answered=True):
        connection = HTTPConnection(self.server.behind, timeout=10)
        try:
            connection.putrequest(
                self.command, self.path, skip_host=True, skip_accept_encoding=True
            )
            for name, value in self.headers.items():
                if name.lower() not in ("connection", "expect"):
                    connection.putheader(name, value)
            connection.putheader("Connection", "close")
            connection.endheaders(body)
            if not answered:
                return None
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        except (OSError, HTTPException):
            return 503, [], b"<Error><Code>SlowDown</Code></Error>"
        finally:
            connection.close()

    def _answer(self, status, headers, data, sent=None):
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(name, value)
        length = (
            dict((n.lower(), v) for n, v in headers).get("content-length", len(data))
            if self.command == "HEAD"
            else len(data)
        )
        self.send_header("Content-Length", str(length))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data if sent is None else data[:sent])

    def log_message(self, *_):
        pass


def gateway(server, port):
    """A proxy without faults in a process of its own: kill it, and the store is gone in the midst of
    its requests; start it again, and the store is back with what it had stored.

    The server of these tests keeps everything in memory: killed itself, it would come back empty.
    """
    FaultyProxy(server, lambda *_: None, int(port))
    threading.Event().wait()


def forget_clients():
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()


FAULT_KINDS = [500, 503, "no answer", "half answer", "half request"]


@contextmanager
def s3_process(folder: Path) -> Iterator[tuple[subprocess.Popen, str]]:
    """An S3 server of its own, empty, its log in `folder`: the process and its endpoint.

    It forgets all when it ends.
    """
    log = folder / "s3.log"  # a pipe that nobody reads would fill
    with log.open("w") as stream:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream)
    try:
        while not (found := re.search(r"Running on (http://[\d.:]+)\s", log.read_text())):
            assert server.poll() is None, log.read_text()
            time.sleep(0.05)
        yield server, found[1]
    finally:
        server.kill()
        server.wait()
