"""What the extract stage costs: CPU per page with each engine, and the steps of engine "blocks"."""

import gc
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from filters import filter_class
from filters.language import Language
from filters.license import License
from filters.opt_out import OptOut
from filters.text.words import normalize
from filters.url_policy import UrlPolicy
from stages.dedup import minhash
from stages.dedup.config import DedupConfig
from stages.extract.blocks.features import NAMES, features
from stages.extract.blocks.model import CAUTION, best_f1, load_extractor
from stages.extract.blocks.render import render
from stages.extract.blocks.walk import walk
from stages.extract.config import ExtractConfig
from stages.extract.extract import ExtractPlan, ExtractTask, extract_unit
from stages.extract.extractor import ExtractorOptions, Page, _gate, _metadata_columns, _opt_out
from stages.formats.document import NamedFilter, document_schema, measured_columns
from stages.read.charset import decode_html
from stages.read.fetch import FetchOptions
from stages.read.listing import fingerprint
from stages.read.records import InputConfig
from stages.read.warc import ReadStats, Record, read_records
from stages.storage.ledger import Commit, Store, Unit


def default_plan(engine: str, **settings: Any) -> ExtractPlan:
    """The stage as configured by default, but for the engine and some settings."""
    config = ExtractConfig(engine=engine, **settings)  # type: ignore[arg-type]
    return ExtractPlan(
        config,
        InputConfig(),
        FetchOptions(),
        UrlPolicy(),
        OptOut(),
        NamedFilter("language", Language()),
        License(),
        tuple(NamedFilter(name, filter_class(name)()) for name in config.filters),
        DedupConfig().signature,
        seed=0,
    )


class StageCost(NamedTuple):
    """CPU seconds of this process and the stage's child: of its start, once in
    `ExtractConfig.recycle_after` pages, and of all pages.
    """

    start: float
    pages: float


def stage_cost(warc: Path, plan: ExtractPlan) -> StageCost:
    """What `extract_unit` takes for a file, in a child that has begun with an empty page."""
    with tempfile.TemporaryDirectory() as folder:
        first = Path(folder) / "first.warc"
        first.write_bytes(_member(b"<p>A page that starts the child."))
        return StageCost(*(_cpu_seconds(path, plan, folder) for path in (first, warc)))


def _cpu_seconds(warc: Path, plan: ExtractPlan, folder: str) -> float:
    unit = Unit(warc.stem, fingerprint(str(warc)), ExtractTask(str(warc), 0))
    start = time.process_time()
    commit = extract_unit(unit, plan, Store(folder))
    return time.process_time() - start + commit.cpu_seconds


def _member(html: bytes) -> bytes:
    block = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n" + html
    header = (
        "WARC/1.1\r\nWARC-Type: response\r\nWARC-Target-URI: https://a.example/\r\n"
        f"Content-Type: application/http\r\nContent-Length: {len(block)}\r\n\r\n"
    )
    return header.encode() + block + b"\r\n\r\n"


def read_pages(warc: Path) -> list[Record]:
    """The records of a WARC file that have a page."""
    records = read_records(warc, max_payload_bytes=10**8, stats=ReadStats())
    return [record for record in records if record.skipped is None]


class _Steps:
    """CPU seconds by step. Each step is done for all items in a loop of its own."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def once(self, name: str, work: Callable[[], Any]) -> Any:
        start = time.process_time()
        result = work()
        self.seconds[name] = time.process_time() - start
        return result

    def each(self, name: str, work: Callable[..., Any], *columns: Iterable[Any]) -> list[Any]:
        """`work` of each item, or of the items of several columns of the same length."""
        rows = list(zip(*columns, strict=True))
        return self.once(name, lambda: [work(*row) for row in rows])


def bare_steps(warc: Path, plan: ExtractPlan) -> dict[str, float]:
    """CPU seconds of each function that the stage calls for the pages of a file, by step.

    Without the child, what passes between it and the stage, and garbage collection. As in the
    stage, what the gate drops is not extracted, and what is rejected has no signature.
    """
    gc.disable()
    try:
        return _bare_steps(warc, plan)
    finally:
        gc.enable()


def _bare_steps(warc: Path, plan: ExtractPlan) -> dict[str, float]:
    model, steps = load_extractor(plan.config.model), _Steps()
    options = ExtractorOptions(plan.config, plan.language.filter, plan.opt_out.reject)
    plan.language.filter.guess("loads the model")
    minhash.permutations(plan.signature)  # imports scipy
    records = steps.once("read", lambda: read_pages(warc))
    types = [record.headers.get("content-type", "") for record in records]
    decoded = steps.each("decode", decode_html, [r.payload for r in records], types)
    walked = steps.each("walk", walk, [page.text for page in decoded])

    gated = steps.each("gate", lambda page: _gate(Page(), page, options), walked)
    passed = [
        (page, record.url)
        for page, record, verdict in zip(walked, records, gated, strict=True)
        if not verdict.rejected_by
    ]
    pages, urls = zip(*passed, strict=True)
    steps.each(
        "metadata",
        lambda p, url: (_opt_out(p.head), _metadata_columns(p.head, url)),
        *(pages, urls),
    )
    columns = steps.each("features", lambda p, url: features(p, url, model.lexicon), pages, urls)
    probabilities = steps.each("trees", model.trees.probabilities, columns)
    words = NAMES.index("words")
    selections = steps.each(
        "selection", lambda p, c: best_f1(p, c[words], caution=CAUTION), probabilities, columns
    )
    rendered = steps.each(
        "render", lambda p, s: render(p, s.blocks, markdown=False).text, pages, selections
    )
    texts = [text for text in rendered if text]

    guesses = steps.each("language", plan.language.filter.guess, texts)
    languages = [guess.language for guess in guesses]
    steps.each("heuristics", lambda t, la: measured_columns(t, la, plan.filters), texts, languages)
    rows = _stored_rows(warc, plan)
    kept = [row["text"] for row in rows if row["rejected_by"] is None]
    steps.once("signatures", lambda: _signatures(kept, plan))
    steps.once("write", lambda: _write(rows, plan))
    return steps.seconds


def _signatures(texts: list[str], plan: ExtractPlan) -> Any:
    normalized = [normalize(text) for text in texts]
    hashes = list(map(minhash.content_hash, texts, normalized))
    return hashes, minhash.band_keys(normalized, plan.signature)


def _stored_rows(warc: Path, plan: ExtractPlan) -> list[dict[str, Any]]:
    unit = Unit("0", fingerprint(str(warc)), ExtractTask(str(warc), 0))
    with tempfile.TemporaryDirectory() as folder:
        extract_unit(unit, plan, Store(folder))
        return pq.read_table(f"{folder}/documents/0.parquet").to_pylist()


def _write(rows: list[dict[str, Any]], plan: ExtractPlan) -> None:
    schema = document_schema(plan.filters, keys=minhash.describe(plan.signature))
    size = plan.config.batch_size
    with tempfile.TemporaryDirectory() as folder:
        commit = Commit("0", "0")
        with Store(folder).part_writer("documents", "0", schema, commit=commit) as writer:
            for begin in range(0, len(rows), size):
                writer.write_table(pa.Table.from_pylist(rows[begin : begin + size], schema=schema))
