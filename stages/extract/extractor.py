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
import struct
import subprocess
import sys
import time
from dataclasses import asdict
from typing import IO, Any, Literal, NamedTuple

from pydantic import Field
from pydantic.dataclasses import dataclass

from filters import STRICT
from filters.language import Language
from filters.opt_out import in_html

# wall-clock limit for a page that waits instead of working, as a multiple of the CPU time limit
WALL_FACTOR = 20
# characters of a page's plain text that the gate identifies the language by
GATE_CHARS = 4_000


@dataclass(frozen=True, config=STRICT)
class TrafilaturaOptions:
    """Arguments of trafilatura.extract (Barbaresi 2021, ACL demo 15), with its own defaults.

    FineWeb sets favor_precision; on the 500 pages of WCXB's development sample that costs word-F1
    (see the README).
    """

    favor_precision: bool = False
    favor_recall: bool = False
    fast: bool = False
    include_comments: bool = True
    include_tables: bool = True
    include_links: bool = False
    include_formatting: bool = False
    deduplicate: bool = False


@dataclass(frozen=True, config=STRICT)
class ResiliparseOptions:
    """Arguments of resiliparse's extract_plain_text (Bevendorff et al. 2018, ECIR)."""

    main_content: bool = True
    alt_texts: bool = False
    links: bool = False
    form_fields: bool = False
    noscript: bool = False
    comments: bool = True
    list_bullets: bool = True


@dataclass(frozen=True, config=STRICT)
class Gate:
    """Drop pages before the expensive extraction that would be dropped after it.

    resiliparse renders the whole page as plain text (a few milliseconds). The page passes if the
    probability that this text is in an allowed language reaches `language_probability`, and if it
    has at least `min_words` words, boilerplate included, so the main text has fewer. The README
    says how many pages this drops that would have been kept.
    """

    enabled: bool = True
    language_probability: float = Field(default=0.15, ge=0, le=1)
    min_words: int = Field(default=50, ge=0)


@dataclass(frozen=True, config=STRICT)
class ExtractorOptions:
    """Settings of the child: `cpu_seconds` limits a page, `memory_bytes` the address space."""

    engine: Literal["trafilatura", "resiliparse"]
    trafilatura: TrafilaturaOptions
    resiliparse: ResiliparseOptions
    gate: Gate
    language: Language
    reject_opt_out: bool
    cpu_seconds: float
    memory_bytes: int
    recycle_after: int


class Page(NamedTuple):
    """The result of a page: its text, or None and the rule that rejected it.

    `value` is the measure that failed `bound`, if any.
    """

    text: str | None = None
    rejected_by: str | None = None
    value: float | None = None
    bound: tuple[float, float] | None = None
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

    def extract(self, payload: bytes, *, content_type: str, url: str) -> Page:
        """Decode a page and extract its main text. No page makes it raise."""
        child = self._running_child()
        assert child.stdin and child.stdout
        self._served += 1
        try:
            _send(
                child.stdin,
                json.dumps({"content_type": content_type, "url": url}).encode(),
                payload,
            )
            answer = _receive(child.stdout)
        except BrokenPipeError:
            answer = None
        if answer is None:
            return self._page_of_dead_child(child)
        meta = json.loads(answer[0])
        self.cpu_seconds += meta.pop("cpu_seconds")
        return Page(**meta, text=None if meta["rejected_by"] else answer[1].decode())

    def close(self) -> None:
        """End the child; the next page starts another."""
        if self._child is not None:
            self._child.kill()
            self._child.communicate()
        self._child, self._served = None, 0

    def _running_child(self) -> "subprocess.Popen[bytes]":
        if self._child is not None and self._served >= self.options.recycle_after:
            self.close()  # parsers leak memory; only a new process frees it for certain
        if self._child is None:
            self._child = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "stages.extract.extractor",
                    json.dumps(asdict(self.options)),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=os.environ
                | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"},
            )
        return self._child

    def _page_of_dead_child(self, child: "subprocess.Popen[bytes]") -> Page:
        code = child.wait()
        self._child, self._served = None, 0
        if -code in (signal.SIGPROF, signal.SIGALRM):
            self.cpu_seconds += self.options.cpu_seconds
            return Page(
                rejected_by="extract.timeout",
                value=self.options.cpu_seconds,
                bound=(0.0, self.options.cpu_seconds),
            )
        if code > 0 or -code in (signal.SIGKILL, signal.SIGTERM):
            # the child catches all exceptions of a page: this is the machine (out of memory, a
            # broken install)
            raise RuntimeError(
                f"the extractor's child ended with exit code {code}: "
                "out of memory, or it cannot start"
            )
        return Page(rejected_by="extract.crash", value=float(code))


def _send(pipe: IO[bytes], meta: bytes, body: bytes) -> None:
    pipe.write(struct.pack("<II", len(meta), len(body)) + meta)
    pipe.write(body)
    pipe.flush()


def _receive(pipe: IO[bytes]) -> tuple[bytes, bytes] | None:
    header = pipe.read(8)
    if len(header) < 8:
        return None
    sizes = struct.unpack("<II", header)
    meta, body = pipe.read(sizes[0]), pipe.read(sizes[1])
    return (meta, body) if len(meta) + len(body) == sum(sizes) else None


def serve(options: ExtractorOptions) -> None:
    """Run the child: answer one page after the other until the parent closes the pipe."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    engine = _engine(options)
    options.language.guess("a model that cannot be loaded must fail the child, not every page")
    resource.setrlimit(resource.RLIMIT_AS, (options.memory_bytes, options.memory_bytes))
    before = 0.0
    while (request := _receive(sys.stdin.buffer)) is not None:
        signal.setitimer(signal.ITIMER_PROF, options.cpu_seconds)
        signal.setitimer(signal.ITIMER_REAL, options.cpu_seconds * WALL_FACTOR)
        page = _extract(request[1], json.loads(request[0]), options, engine)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        now = time.process_time()
        meta, before = page._asdict() | {"cpu_seconds": now - before}, now
        text = (meta.pop("text") or "").replace("\0", "").encode("utf-8", "replace")
        _send(sys.stdout.buffer, json.dumps(meta).encode(), text)


def _extract(
    payload: bytes, request: dict[str, str], options: ExtractorOptions, engine: Any
) -> Page:
    try:
        return _page(payload, request, options, engine)
    except MemoryError:
        return Page(rejected_by="extract.memory", value=float(options.memory_bytes))
    except Exception:  # parsers raise anything on hostile pages; only this page is rejected
        return Page(rejected_by="extract.error")


def _page(payload: bytes, request: dict[str, str], options: ExtractorOptions, engine: Any) -> Page:
    from stages.read.charset import decode_html

    decoded = decode_html(payload, request["content_type"])
    page = Page(
        charset=decoded.charset, charset_source=decoded.source, opt_out=in_html(decoded.text)
    )
    if page.opt_out and options.reject_opt_out:
        return page._replace(rejected_by="opt_out.reject")
    if options.gate.enabled:
        page = _gate(page, decoded.text, options)
    if page.rejected_by:
        return page
    text = engine(decoded.text)
    if not text or not text.strip():
        return page._replace(rejected_by="extract.empty")
    return page._replace(text=text.strip())


def _gate(page: Page, html: str, options: ExtractorOptions) -> Page:
    from resiliparse.extract.html2text import extract_plain_text

    # noscript: Discourse and similar forums put all their text there
    plain = extract_plain_text(
        html, preserve_formatting=False, main_content=False, alt_texts=False, noscript=True
    )
    words = len(plain.split())
    if words < options.gate.min_words:
        return page._replace(
            rejected_by="gate.min_words",
            value=float(words),
            bound=(options.gate.min_words, float("inf")),
        )
    guesses = options.language.guesses(plain, k=10, max_chars=GATE_CHARS)
    probability = options.language.probability_allowed(guesses)
    if probability < options.gate.language_probability:
        return page._replace(
            rejected_by="gate.language_probability",
            value=probability,
            bound=(options.gate.language_probability, 1.0),
            language=guesses[0].language,
            language_score=guesses[0].score,
        )
    return page


def _engine(options: ExtractorOptions) -> Any:
    if options.engine == "resiliparse":
        from resiliparse.extract.html2text import extract_plain_text

        return lambda html: extract_plain_text(html, **asdict(options.resiliparse))
    import logging

    from trafilatura import extract
    from trafilatura.deduplication import LRUCache

    logging.disable(logging.CRITICAL)  # it logs for each page what we store for each page
    arguments = asdict(options.trafilatura)
    deduplicate = arguments.pop("deduplicate")
    # a new cache for each page: the library's default cache is shared, and makes a page depend on
    # earlier ones
    return lambda html: extract(
        html, deduplicate=LRUCache(maxsize=4096) if deduplicate else False, **arguments
    )


if __name__ == "__main__":
    from pydantic import TypeAdapter

    serve(TypeAdapter(ExtractorOptions).validate_json(sys.argv[1]))
