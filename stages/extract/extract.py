"""Stage extract: input files to documents, one Parquet part per file.

Per record: URL policy and opt-out headers, then (in a killable child) decoding, the gate and the
main text, then language, the heuristics' scores and the MinHash band keys. Every page gets a row;
`rejected_by` says which rule dropped it. Scores are stored in any case, so that a changed
bound is re-applied to the part of an earlier run instead of extracting again.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field
from pydantic.dataclasses import dataclass as validated

from filters import STRICT, Rejection, apply, first_failure, rules, settings
from filters.language import Language
from filters.opt_out import OptOut, in_headers
from filters.text.view import TextView
from filters.url_policy import UrlPolicy, host_of
from stages.dedup import minhash
from stages.extract.extractor import (
    Extractor,
    ExtractorOptions,
    Gate,
    Page,
    ResiliparseOptions,
    TrafilaturaOptions,
)
from stages.formats.document import (
    NamedFilter,
    Tallies,
    document_schema,
    make_doc_id,
    measured_columns,
    sampled,
    score_columns,
)
from stages.read.fetch import FetchOptions, fingerprint, local_copy
from stages.read.records import InputConfig, TextRecord, id_type, read_texts
from stages.read.warc import ReadStats, Record, begins_as_warc, read_records
from stages.storage.ledger import Commit, Store, Unit

VERSION = 3
_NO_DOCUMENT = ("not_response",)
Row = dict[str, Any]


@validated(frozen=True, config=STRICT)
class ExtractConfig:
    """Settings of the extract stage.

    `filters` are measured and checked in this order. Sizes in bytes, times in seconds of CPU.
    `keep_rejected_text` is the share of rejected documents, in [0, 1], whose text is kept as a
    sample (1 keeps all, so that any bound can be loosened without extracting again). Without
    `keep_text` no text is kept, and dedup is the last stage that can follow. `parallelism` caps the
    tasks at work at once; 0 leaves it to the cluster's size.
    """

    engine: Literal["trafilatura", "resiliparse"] = "trafilatura"
    filters: tuple[str, ...] = ("gopher_repetition", "gopher_quality", "c4", "fineweb")
    timeout_seconds: float = Field(default=10.0, gt=0)
    max_html_bytes: int = Field(default=10_000_000, gt=0)
    max_text_chars: int = Field(default=2_000_000, gt=0)
    child_memory_bytes: int = Field(default=2_000_000_000, ge=500_000_000)
    recycle_after: int = Field(default=5_000, gt=0)
    keep_rejected_text: float = Field(default=0.01, ge=0, le=1)
    keep_text: bool = True
    num_cpus: float = Field(default=1.0, gt=0)
    memory: int = Field(default=1_500_000_000, gt=0)
    parallelism: int = Field(default=0, ge=0)
    batch_size: int = Field(default=512, gt=0)
    gate: Gate = Gate()
    trafilatura: TrafilaturaOptions = TrafilaturaOptions()
    resiliparse: ResiliparseOptions = ResiliparseOptions()


@dataclass(frozen=True)
class ExtractPlan:
    """Everything a worker needs for a unit; paths are absolute, filters are in order."""

    config: ExtractConfig
    input: InputConfig
    fetch: FetchOptions
    url_policy: UrlPolicy
    opt_out: OptOut
    language: NamedFilter
    filters: tuple[NamedFilter, ...]
    signature: minhash.Signature
    seed: int


@dataclass(frozen=True)
class ExtractTask:
    """An input file, and its number in the run's list of inputs.

    `reusable_stores` hold the same extraction under other bounds, newest first.
    """

    path: str
    ordinal: int
    reusable_stores: tuple[str, ...] = ()


@validated(frozen=True, config=STRICT)
class ExtractResult:
    """What was read and kept of an input file.

    `bytes_in` is the size of the file; `lost_bytes` in `lost_members` places could not be read.
    `chars_out` are characters of the kept documents. `id_type` is the type of the source ids of
    JSONL and Parquet inputs, "" for others. `reapplied`: the bounds were applied to stored scores.
    """

    bytes_in: int = 0
    lost_bytes: int = 0
    lost_members: int = 0
    chars_out: int = 0
    languages: dict[str, int] = field(default_factory=dict)
    tallies: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    id_type: str = ""
    reapplied: bool = False


def extract_unit(unit: Unit, plan: ExtractPlan, store: Store) -> Commit:
    """Read an input file, measure its documents and write their part (an ExtractTask)."""
    stored = _stored_rows(unit, plan)
    if stored is not None:
        return _apply_bounds(*stored, unit, plan, store)
    task: ExtractTask = unit.task
    commit = Commit(unit.name, unit.fingerprint)
    with local_copy(task.path, options=plan.fetch) as path:
        if plan.input.format in ("warc", "wet"):
            result = _extract_web(path, task, commit, plan, store)
        else:
            result = _write_documents(_text_rows(path, task, plan), commit, plan, store)
            result = replace(result, id_type=id_type(path, plan.input))
            commit.rows_in = sum(commit.counts.values())
        commit.result = replace(result, bytes_in=path.stat().st_size)
        _require_unchanged(unit)
    return commit


def _extract_web(
    path: Path, task: ExtractTask, commit: Commit, plan: ExtractPlan, store: Store
) -> ExtractResult:
    """Documents of a WARC or WET file; ValueError if it holds no WARC record at all."""
    stats, extractor = ReadStats(), _extractor(_extractor_options(plan))
    started = extractor.cpu_seconds
    result = _write_documents(_web_rows(path, task, plan, stats), commit, plan, store)
    if not stats.records and stats.lost_bytes and not begins_as_warc(path):
        raise ValueError(
            f"{task.path}: no WARC record in {stats.lost_bytes:,} bytes; input.format is "
            f"{plan.input.format}, should it be jsonl or parquet?"
        )
    commit.rows_in = stats.records
    commit.cpu_seconds = round(extractor.cpu_seconds - started, 3)  # of the child process
    commit.counts |= {f"warc.{r}": stats.skipped[r] for r in _NO_DOCUMENT if stats.skipped[r]}
    return replace(result, lost_bytes=stats.lost_bytes, lost_members=stats.lost_members)


def _apply_bounds(
    rows: list[Row], before: Commit, unit: Unit, plan: ExtractPlan, store: Store
) -> Commit:
    """Write rows that an earlier run measured and that were judged by other bounds here."""
    commit = Commit(unit.name, unit.fingerprint, rows_in=before.rows_in)
    commit.counts = {
        rule: count
        for rule, count in before.counts.items()
        if rule.removeprefix("warc.") in _NO_DOCUMENT
    }
    result = _write_documents(rows, commit, plan, store)
    commit.result = replace(
        before.result,
        chars_out=result.chars_out,
        languages=result.languages,
        tallies=result.tallies,
        reapplied=True,
    )
    return commit


def _require_unchanged(unit: Unit) -> None:
    current = fingerprint(unit.task.path)
    if current != unit.fingerprint:
        raise ValueError(
            f"{unit.task.path} changed while it was read (was {unit.fingerprint}, is {current}); "
            "run again"
        )


def content_settings(plan: ExtractPlan) -> list[Any]:
    """The settings that decide a page's text and scores: the first half of the stage key.

    Models and lists are not in it by path: the caller adds their digests.
    """
    resources = {
        "num_cpus",
        "memory",
        "parallelism",
        "batch_size",
        "keep_rejected_text",
        "keep_text",
    }
    config = {k: v for k, v in asdict(plan.config).items() if k not in resources}
    if plan.config.engine != "trafilatura":
        config.pop("trafilatura")
    if plan.config.engine != "resiliparse":
        config.pop("resiliparse")
    measured = [(named.name, named.settings()) for named in plan.filters]
    text_input = asdict(plan.input) | {"paths": None, "base_uri": None}
    return [
        VERSION,
        config,
        measured,
        text_input,
        settings(plan.url_policy),
        plan.opt_out,
        settings(plan.language.filter),
    ]


def policy_settings(plan: ExtractPlan) -> list[Any]:
    """The settings applied to stored text and scores: the second half of the stage key.

    Bounds, signatures, the kept sample.
    """
    return [
        [
            (named.name, [(language, rules(filter)) for language, filter in named.all()])
            for named in (plan.language, *plan.filters)
        ],
        plan.signature,
        plan.config.keep_rejected_text,
        plan.config.keep_text,
        plan.seed,
        minhash.NORMALIZER,
    ]


# --- rows -----------------------------------------------------------------------------------------


def _web_rows(path: Path, task: ExtractTask, plan: ExtractPlan, stats: ReadStats) -> Iterator[Row]:
    for record in read_records(
        str(path), max_payload_bytes=plan.config.max_html_bytes, stats=stats
    ):
        if record.skipped in _NO_DOCUMENT:
            # requests and metadata records are only counted
            continue
        row: Row = {
            "doc_id": make_doc_id(task.ordinal, record.index),
            "url": record.url,
            "host": host_of(record.url),
            "crawl_date": record.date,
            "warc_file": task.path,
            "warc_offset": record.offset,
        }
        skipped = Page(rejected_by=f"warc.{record.skipped}") if record.skipped else None
        page = skipped or _policy_rejection(record, plan) or _page(record, plan)
        yield _measured_row(row | _page_columns(page), page, plan)


def _text_rows(path: Path, task: ExtractTask, plan: ExtractPlan) -> Iterator[Row]:
    for record in read_texts(path, plan.input):
        row: Row = {
            "doc_id": make_doc_id(task.ordinal, record.position),
            "url": record.url,
            "host": host_of(record.url or ""),
            "source_id": record.source_id,
            "warc_file": task.path,
            "warc_offset": record.position,
        }
        page = _text_page(record, plan)
        yield _measured_row(row | _page_columns(page), page, plan)


def _policy_rejection(record: Record, plan: ExtractPlan) -> Page | None:
    blocked = plan.url_policy.check(record.url)
    if blocked is not None:
        return Page(rejected_by=f"url_policy.{blocked.rule}")
    signal = in_headers(record.headers)
    if signal and plan.opt_out.reject:
        return Page(rejected_by="opt_out.reject", opt_out=signal)
    return None


def _page(record: Record, plan: ExtractPlan) -> Page:
    if record.kind == "text":
        return Page(text=record.payload.decode("utf-8", "replace").replace("\0", ""))
    page = _extractor(_extractor_options(plan)).extract(
        record.payload, content_type=record.headers.get("content-type", ""), url=record.url
    )
    return page if page.opt_out else page._replace(opt_out=in_headers(record.headers))


def _text_page(record: TextRecord, plan: ExtractPlan) -> Page:
    blocked = plan.url_policy.check(record.url or "")
    if blocked is not None:
        return Page(rejected_by=f"url_policy.{blocked.rule}")
    if record.error is not None:
        return Page(rejected_by=f"input.{record.error}")
    return Page(text=record.text)


def _page_columns(page: Page) -> Row:
    names = ("charset", "charset_source", "opt_out", "language", "language_score")
    return {name: getattr(page, name) for name in names}


def _measured_row(row: Row, page: Page, plan: ExtractPlan) -> Row:
    if page.rejected_by is not None:
        low, high = page.bound or (None, None)
        return row | _verdict_columns(page.rejected_by, page.value, low, high)
    assert page.text is not None
    if len(page.text) > plan.config.max_text_chars:
        return row | _verdict_columns(
            "extract.max_text_chars", float(len(page.text)), 0.0, plan.config.max_text_chars
        )
    row |= _language_columns(page.text, plan.language.filter)
    view = TextView(page.text, row.get("language"))
    for named in plan.filters:
        # C4 hands on the text without the lines it removes
        view, measured = apply(named.of(view.language), view)
        row |= measured_columns(named.name, measured)
    return _judge(row | {"text": view.text, "num_chars": len(view.text)}, plan)


def _language_columns(text: str, language: Language) -> Row:
    if not language.identify:
        return {}
    guess = language.guess(text)
    share = language.line_share_of(text, guess.language) if language.measure_lines else None
    return {"language": guess.language, "language_score": guess.score, "language_line_share": share}


def _judge(row: Row, plan: ExtractPlan) -> Row:
    """Apply the policy to a measured row: its verdict, and its text only if kept or sampled."""
    verdict = _verdict(row, plan)
    if verdict is None:
        return row | dict.fromkeys(
            ("rejected_by", "rejected_value", "rejected_low", "rejected_high")
        )
    row |= _verdict_columns(verdict.rule, verdict.value, *verdict.bound) | {
        "content_hash": None,
        "band_keys": None,
    }
    if not sampled(row["doc_id"], share=plan.config.keep_rejected_text, seed=plan.seed):
        row["text"] = None
    return row


def _verdict(row: Row, plan: ExtractPlan) -> Rejection | None:
    if plan.language.filter.identify:
        language = plan.language.of(row["language"])
        if language.allowed and row["language"] not in language.allowed:
            return Rejection("language.allowed", row["language_score"], (-math.inf, math.inf))
        failure = first_failure(
            "language", language, {rule: row[f"language_{rule}"] for rule in rules(language)}
        )
        if failure is not None:
            return failure
    for named in plan.filters:
        scores = {c.removeprefix(f"{named.name}."): row[c] for c in score_columns([named])}
        failure = first_failure(named.name, named.of(row["language"]), scores)
        if failure is not None:
            return failure
    return None


def _verdict_columns(rule: str, value: float | None, low: float | None, high: float | None) -> Row:
    return {
        "rejected_by": rule,
        "rejected_value": value,
        "rejected_low": low,
        "rejected_high": high,
    }


def _with_signatures(rows: list[Row], plan: ExtractPlan) -> list[Row]:
    """Content hashes and band keys of the kept rows, all at once."""
    kept = [row for row in rows if row["rejected_by"] is None]
    normalized = [minhash.normalize(row["text"]) for row in kept]
    for row, words, keys in zip(
        kept, normalized, minhash.band_keys(normalized, plan.signature), strict=True
    ):
        row |= {"content_hash": minhash.content_hash(row["text"], words), "band_keys": keys}
    return rows


def _with_stored_text(rows: list[Row], plan: ExtractPlan) -> list[Row]:
    if plan.config.keep_text:
        return rows
    return [row | {"text": None} for row in rows]


# --- writing and re-applying ----------------------------------------------------------------------


def _write_documents(
    rows: Iterable[Row], commit: Commit, plan: ExtractPlan, store: Store
) -> ExtractResult:
    """Write the documents part; counts go to the commit."""
    schema = document_schema(plan.filters, keys=minhash.describe(plan.signature))
    counts: Counter[str] = Counter()
    languages: Counter[str] = Counter()
    tallies = Tallies(plan.filters)
    chars = 0
    with (
        store.create("documents", f"{commit.unit}.parquet", outputs=commit.outputs) as path,
        pq.ParquetWriter(path, schema, compression="zstd") as writer,
    ):
        for batch in _batches(rows, plan.config.batch_size):
            for row in batch:
                counts[row["rejected_by"] or "kept"] += 1
                languages[row["language"] or "unknown"] += 1
                tallies.add(row)
                chars += row["num_chars"] if row["rejected_by"] is None else 0
            signed = _with_stored_text(_with_signatures(batch, plan), plan)
            writer.write_table(pa.Table.from_pylist(signed, schema=schema))
    commit.counts |= dict(sorted(counts.items()))
    commit.rows_out = counts["kept"]
    return ExtractResult(
        chars_out=chars, languages=dict(sorted(languages.items())), tallies=tallies.counts
    )


def _batches(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    batch: list[Row] = []
    for row in rows:
        batch.append({"rejected_by": None, "num_chars": None, "language": None} | row)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _stored_rows(unit: Unit, plan: ExtractPlan) -> tuple[list[Row], Commit] | None:
    """Rows of this unit from an earlier run with other bounds, judged again, and its commit.

    None if there is no such run, or if it did not keep a text that is needed now.
    """
    for root in unit.task.reusable_stores:
        store = Store(root, ExtractResult)
        before = store.commit_of(unit.name)
        if before is None or before.fingerprint != unit.fingerprint:
            continue
        rows = [_rejudge(row, plan) for row in store.read_part(before).to_pylist()]
        if all(row["text"] is not None for row in rows if _keeps_text(row, plan)):
            return rows, before
    return None


def _keeps_text(row: Row, plan: ExtractPlan) -> bool:
    if row["num_chars"] is None:
        return False
    return row["rejected_by"] is None or sampled(
        row["doc_id"], share=plan.config.keep_rejected_text, seed=plan.seed
    )


def _rejudge(row: Row, plan: ExtractPlan) -> Row:
    if row["num_chars"] is None:
        return row  # rejected before it was measured: no filter's bound was applied
    if row["text"] is None:
        verdict = _verdict(row, plan)
        if verdict is None:
            return row | {"rejected_by": None}
        return row | _verdict_columns(verdict.rule, verdict.value, *verdict.bound)
    return _judge(row, plan)


# --- per-process state ----------------------------------------------------------------------------


def _extractor_options(plan: ExtractPlan) -> ExtractorOptions:
    return ExtractorOptions(
        engine=plan.config.engine,
        trafilatura=plan.config.trafilatura,
        resiliparse=plan.config.resiliparse,
        gate=plan.config.gate,
        language=plan.language.filter,
        reject_opt_out=plan.opt_out.reject,
        cpu_seconds=plan.config.timeout_seconds,
        memory_bytes=plan.config.child_memory_bytes,
        recycle_after=plan.config.recycle_after,
    )


@lru_cache(maxsize=1)
def _extractor(options: ExtractorOptions) -> Extractor:
    # one child per worker process, kept between units
    return Extractor(options)
