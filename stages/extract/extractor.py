"""Extract the main text of HTML in a child process that the kernel kills if a page takes too long.

Pages are hostile: some take the parser minutes, some all memory, some crash it. So decoding, the
gate and the extraction of each page run in a child, under a timer whose default action ends the
process, and under a memory limit. The parent sees the pipe close, records the page as rejected, and
starts the next child; other pages are not affected. The timer counts CPU time, so that a busy
machine does not change which pages time out.

`python -m stages.extract.extractor` runs that child.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from pydantic import TypeAdapter
from resiliparse.extract.html2text import extract_plain_text

from filters import validated
from filters.language import Language
from filters.opt_out import in_html
from stages.extract.config import ExtractConfig
from stages.read.charset import decode_html

# wall-clock limit for a page that waits instead of working, as a multiple of the CPU time limit
WALL_FACTOR = 20
# characters of a page's plain text that the gate identifies the language by
GATE_CHARS = 4_000


@validated
class ExtractorOptions:
    """Settings of the child."""

    config: ExtractConfig
    language: Language
    reject_opt_out: bool


class Page(NamedTuple):
    """The result of a page, as columns of its row: its text, or None and why it was rejected."""

    text: str | None = None
    rejected_by: str | None = None
    rejected_value: float | None = None
    rejected_low: float | None = None
    rejected_high: float | None = None
    charset: str | None = None
    charset_source: str | None = None
    opt_out: str | None = None
    language: str | None = None
    language_score: float | None = None


class Extractor:
    """A killable child that extracts text from pages.

    It is started on first use, and replaced when it dies or has served `recycle_after` pages.
    """

    def __init__(self, options: ExtractorOptions) -> None:
        self.options = options
        self.cpu_seconds = 0.0  # spent by all children so far
        self._child: subprocess.Popen[bytes] | None = None
        self._served = 0

    def extract(self, payload: bytes, *, content_type: str) -> Page:
        """Decode a page and extract its main text. No page makes it raise."""
        if self._child is not None and self._served >= self.options.config.recycle_after:
            self.close()  # parsers leak memory; only a new process frees it for certain
        child = self._child = self._child or self._start_child()
        self._served += 1
        try:
            self._pipe.send_bytes(content_type.encode("utf-8", "surrogatepass"))
            self._pipe.send_bytes(payload)
            *page, cpu_seconds = json.loads(self._pipe.recv_bytes())
        except (EOFError, OSError):
            return self._page_of_dead_child(child)
        self.cpu_seconds += cpu_seconds
        return Page(*page)

    def close(self) -> None:
        """End the child; the next page starts another."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()
        self._child = None

    def _start_child(self) -> "subprocess.Popen[bytes]":
        self._served = 0
        self._pipe, child_end = Pipe()
        with child_end:
            return subprocess.Popen(
                [
                    *(sys.executable, "-m", "stages.extract.extractor"),
                    *(str(child_end.fileno()), json.dumps(asdict(self.options))),
                ],
                pass_fds=[child_end.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=os.environ
                | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"},
            )

    def _page_of_dead_child(self, child: "subprocess.Popen[bytes]") -> Page:
        code = child.wait()
        self._child = None
        if -code in (signal.SIGPROF, signal.SIGALRM):
            limit = self.options.config.timeout_seconds
            self.cpu_seconds += limit
            return Page(
                rejected_by="extract.timeout",
                rejected_value=limit,
                rejected_low=0.0,
                rejected_high=limit,
            )
        if code > 0 or -code in (signal.SIGKILL, signal.SIGTERM):
            # the child catches all exceptions of a page: this is the machine (out of memory, a
            # broken install)
            raise RuntimeError(
                f"the extractor's child ended with exit code {code}: "
                "out of memory, or it cannot start"
            )
        return Page(rejected_by="extract.crash", rejected_value=float(code))


def serve(pipe: Connection, options: ExtractorOptions) -> None:
    """Run the child: answer one page after the other until the parent closes the pipe."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    engine = _engine(options.config)
    options.language.guess("a model that cannot be loaded must fail the child, not every page")
    memory, cpu_limit = options.config.child_memory_bytes, options.config.timeout_seconds
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    before = 0.0
    while True:
        content_type = pipe.recv_bytes().decode("utf-8", "surrogatepass")
        payload = pipe.recv_bytes()
        signal.setitimer(signal.ITIMER_PROF, cpu_limit)
        signal.setitimer(signal.ITIMER_REAL, cpu_limit * WALL_FACTOR)
        page = _extract(payload, content_type, options, engine)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        now = time.process_time()
        answer = json.dumps([*page, now - before], ensure_ascii=False)
        before = now
        pipe.send_bytes(answer.encode("utf-8", "replace"))


def _extract(payload: bytes, content_type: str, options: ExtractorOptions, engine: Any) -> Page:
    try:
        return _page(payload, content_type, options, engine)
    except MemoryError:
        return Page(
            rejected_by="extract.memory", rejected_value=float(options.config.child_memory_bytes)
        )
    # parsers raise anything on hostile pages, a panic of Rust is no Exception; only this page is
    # rejected
    except BaseException:
        return Page(rejected_by="extract.error")


def _page(payload: bytes, content_type: str, options: ExtractorOptions, engine: Any) -> Page:
    html, charset, source = decode_html(payload, content_type)
    page = Page(charset=charset, charset_source=source, opt_out=in_html(html))
    if page.opt_out and options.reject_opt_out:
        return page._replace(rejected_by="opt_out.reject")
    if options.config.gate.enabled:
        page = _gate(page, html, options)
    if page.rejected_by:
        return page
    text = (engine(html) or "").strip().replace("\0", "")
    if not text:
        return page._replace(rejected_by="extract.empty")
    return page._replace(text=text)


def _gate(page: Page, html: str, options: ExtractorOptions) -> Page:
    gate, language = options.config.gate, options.language
    # noscript: Discourse and similar forums put all their text there
    plain = extract_plain_text(
        html, preserve_formatting=False, main_content=False, alt_texts=False, noscript=True
    )
    words = len(plain.split())
    if words < gate.min_words:
        return page._replace(
            rejected_by="gate.min_words",
            rejected_value=float(words),
            rejected_low=gate.min_words,
            rejected_high=float("inf"),
        )
    guesses = language.guesses(plain, k=10, max_chars=GATE_CHARS)
    probability = language.probability_allowed(guesses)
    if probability < gate.language_probability:
        return page._replace(
            rejected_by="gate.language_probability",
            rejected_value=probability,
            rejected_low=gate.language_probability,
            rejected_high=1.0,
            language=guesses[0].language,
            language_score=guesses[0].score,
        )
    return page


def _engine(config: ExtractConfig) -> Any:
    if config.engine == "resiliparse":
        return partial(extract_plain_text, **asdict(config.resiliparse))
    import logging

    from trafilatura import extract
    from trafilatura.deduplication import LRUCache

    logging.disable(logging.CRITICAL)  # it logs for each page what we store for each page
    arguments = asdict(config.trafilatura)
    deduplicate = arguments.pop("deduplicate")
    # a new cache for each page: the library's default cache is shared, and makes a page depend on
    # earlier ones
    return lambda html: extract(
        html, deduplicate=LRUCache(maxsize=4096) if deduplicate else False, **arguments
    )


if __name__ == "__main__":
    with suppress(EOFError):
        serve(
            Connection(int(sys.argv[1])), TypeAdapter(ExtractorOptions).validate_json(sys.argv[2])
        )
