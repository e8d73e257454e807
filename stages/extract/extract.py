"""Stage extract: input files to documents, one Parquet part per file or range of a large file.

Per record: URL policy and opt-out headers, then (in a killable child) decoding, the gate, what the
page says about itself and its main text, then language, the heuristics' scores and the MinHash band
keys. Every page gets a row;
`rejected_by` says which rule dropped it. Scores are stored in any case, so that a changed
bound is re-applied to the part of an earlier run instead of extracting again.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from filters import Rejection, apply, first_failure, rules, settings, validated
from filters.license import License
from filters.opt_out import OptOut, in_headers
from filters.text.view import TextView
from filters.text.words import NORMALIZER, normalize
from filters.url_lists import host_of
from filters.url_policy import UrlPolicy
from stages.dedup import minhash
from stages.extract.config import ExtractConfig
from stages.extract.engines import between
from stages.extract.extractor import ExtractorOptions, Page, make_extract
from stages.formats.document import (
    NamedFilter,
    Row,
    Tallies,
    document_schema,
    first_broken_rule,
    make_doc_id,
    measured_columns,
    rejection_columns,
    sampled,
)
from stages.isolation.child import Child, Limits, Loss, shared_child
from stages.read.compression import kind_of_file
from stages.read.fetch import FetchOptions, printable
from stages.read.frames import Accounts
from stages.read.listing import fingerprint
from stages.read.ranges import WHOLE, ByteRange, local_range
from stages.read.records import InputConfig, TextStats, id_type, read_texts
from stages.read.warc import ReadStats, Record, begins_as_warc, read_records
from stages.storage.ledger import Commit, Store, Unit

VERSION = 5
# settings that other engines do not know
_OWN_SETTINGS = {
    "blocks": {"format", "rules_see_code"},
    "trafilatura": {"trafilatura"},
    "resiliparse": {"resiliparse"},
}
_NO_DOCUMENT = "not_response"
# what the child gets at once
_RECORDS_AT_ONCE, _BYTES_AT_ONCE = 32, 4_000_000


@dataclass(frozen=True)
class ExtractPlan:
    """Everything a worker needs for a unit; paths are absolute, filters are in order."""

    config: ExtractConfig
    input: InputConfig
    fetch: FetchOptions
    url_policy: UrlPolicy
    opt_out: OptOut
    language: NamedFilter
    license: License
    filters: tuple[NamedFilter, ...]
    signature: minhash.Signature
    seed: int


@validated
class ExtractTask:
    """An input file, or a range of a WARC file, and its number in the run's list of inputs.

    `reusable_stores` hold the same extraction under other bounds, newest first.
    """

    path: str
    ordinal: int
    reusable_stores: tuple[str, ...] = ()
    byte_range: ByteRange = WHOLE

    @property
    def name(self) -> str:
        """The path as text: the name of a file may not be UTF-8."""
        return printable(self.path)


@validated
class ExtractResult:
    """What was read and kept of an input file or range.

    `bytes_in` is its size; `lost_bytes` in `lost_members` damaged places are in no
    record that could be read (compressed, where they cannot be decompressed). `truncated` pages may
    be only a part of what was crawled. `damage` says in words what was lost and where, "" if
    nothing. `chars_out` are characters of the kept documents. `id_type`
    is the type of the source ids of JSONL and Parquet inputs, "" for others. `reapplied`: the
    bounds were applied to stored scores.
    """

    bytes_in: int = 0
    lost_bytes: int = 0
    lost_members: int = 0
    truncated: int = 0
    damage: str = ""
    chars_out: int = 0
    languages: dict[str, int] = field(default_factory=dict)
    tallies: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    id_type: str = ""
    reapplied: bool = False


def extract_unit(unit: Unit, plan: ExtractPlan, store: Store) -> Commit:
    """Read an input file or range, measure its documents and write their part (an ExtractTask)."""
    stored = _stored_rows(unit, plan)
    if stored is not None:
        return _apply_bounds(*stored, unit, plan, store)
    task: ExtractTask = unit.task
    commit = Commit(unit.name, unit.fingerprint)
    with local_range(task.path, task.byte_range, options=plan.fetch) as path:
        if plan.input.format in ("warc", "wet"):
            commit.result = _extract_web(path, task, commit, plan, store)
        else:
            commit.result = _extract_texts(path, task, commit, plan, store)
        current = fingerprint(task.path) + task.byte_range.name
    if current != unit.fingerprint:
        raise ValueError(
            f"{task.name} changed while it was read (was {unit.fingerprint}, is {current}); "
            "run again"
        )
    return commit


def _extract_texts(
    path: Path, task: ExtractTask, commit: Commit, plan: ExtractPlan, store: Store
) -> ExtractResult:
    """Documents of a JSON or Parquet file; ValueError if it has rows but no document."""
    stats = TextStats()
    result = _write_documents(_text_rows(path, task, plan, stats), commit, plan, store)
    commit.rows_in = sum(commit.counts.values())
    size = path.stat().st_size
    result = replace(result, bytes_in=size, id_type=id_type(path, plan.input))
    return _with_losses(result, task, stats, stats.damage)


def _extract_web(
    path: Path, task: ExtractTask, commit: Commit, plan: ExtractPlan, store: Store
) -> ExtractResult:
    """Documents of a WARC or WET file; ValueError if it holds no WARC record at all."""
    stats, child = ReadStats(), _child(plan)
    started = child.cpu_seconds
    result = _write_documents(_web_rows(path, task, plan, stats), commit, plan, store)
    is_unread = stats.records == stats.skipped["unsupported"]
    if is_unread and (stats.records or stats.damaged_places) and not begins_as_warc(path):
        raise ValueError(
            f"{task.name}: no WARC record in {stats.bytes_total:,} bytes; it holds "
            f"{kind_of_file(path) or 'something else'}; input.format is {plan.input.format}, "
            "should it be jsonl or parquet?"
        )
    commit.rows_in = stats.records
    commit.cpu_seconds = round(child.cpu_seconds - started, 3)
    if no_documents := stats.skipped[_NO_DOCUMENT]:
        commit.counts[f"warc.{_NO_DOCUMENT}"] = no_documents
    result = replace(result, bytes_in=stats.bytes_total, truncated=stats.truncated)
    return _with_losses(result, task, stats)


def _with_losses(
    result: ExtractResult, task: ExtractTask, accounts: Accounts, damage: str = ""
) -> ExtractResult:
    lost, places = accounts.lost_bytes + accounts.unreadable_bytes, accounts.damaged_places
    if places:
        where = damage or f"damaged at {places:,} place{'s' * (places > 1)}"
        name = task.name + task.byte_range.name
        damage = f"{name}: {where}" + f"; {lost:,} bytes could not be read" * (lost > 0)
    return replace(result, lost_bytes=lost, lost_members=places, damage=damage)


def _apply_bounds(
    rows: list[Row], before: Commit, unit: Unit, plan: ExtractPlan, store: Store
) -> Commit:
    """Write rows that an earlier run measured and that were judged by other bounds here."""
    commit = Commit(unit.name, unit.fingerprint, rows_in=before.rows_in)
    commit.counts = {
        rule: count for rule, count in before.counts.items() if rule == f"warc.{_NO_DOCUMENT}"
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


def content_settings(plan: ExtractPlan) -> list[Any]:
    """The settings that decide a page's text and scores: the first half of the stage key.

    Models and lists are not in it by path: the caller adds their digests.
    """
    unused = {
        *("num_cpus", "memory", "parallelism", "batch_size", "keep_rejected_text", "keep_text"),
        *("model", "confidence", *set().union(*_OWN_SETTINGS.values())),
    } - _OWN_SETTINGS[plan.config.engine]
    config = {k: v for k, v in asdict(plan.config).items() if k not in unused}
    measured = [(named.name, named.settings()) for named in plan.filters]
    text_input = asdict(plan.input) | {"paths": None, "base_uri": None}
    del text_input["split_bytes"]  # ranges are in the units' fingerprints
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
        plan.config.confidence,
        plan.license,
        plan.signature,
        plan.config.keep_rejected_text,
        plan.config.keep_text,
        plan.seed,
        NORMALIZER,
    ]


# --- rows -----------------------------------------------------------------------------------------


def _web_rows(path: Path, task: ExtractTask, plan: ExtractPlan, stats: ReadStats) -> Iterator[Row]:
    limit = plan.config.max_html_bytes
    records = read_records(path, max_payload_bytes=limit, stats=stats, byte_range=task.byte_range)
    # requests and metadata records are only counted
    pages = (record for record in records if record.skipped != _NO_DOCUMENT)
    for batch in _batches(pages):
        for record, page in zip(batch, _pages(batch, plan), strict=True):
            row: Row = {
                "doc_id": make_doc_id(task.ordinal, record.index),
                "url": record.url,
                "crawl_date": record.date,
                "warc_file": task.name,
                "warc_offset": record.offset,
                "truncated": record.truncated,
            }
            yield _measured_row(row, page, plan)


def _batches(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Records that the child gets together: one or more, of few bytes."""
    batch: list[Record] = []
    size = 0
    for record in records:
        batch.append(record)
        size += len(record.payload)
        if len(batch) == _RECORDS_AT_ONCE or size >= _BYTES_AT_ONCE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _text_rows(path: Path, task: ExtractTask, plan: ExtractPlan, stats: TextStats) -> Iterator[Row]:
    for record in read_texts(path, plan.input, name=task.name, stats=stats):
        row: Row = {
            "doc_id": make_doc_id(task.ordinal, record.position),
            "url": record.url,
            "source_id": record.source_id,
            "warc_file": task.name,
            "warc_offset": record.position,
        }
        error = Page(rejected_by=f"input.{record.error}") if record.error else None
        page = _blocked(record.url, plan) or error or Page(text=record.text)
        yield _measured_row(row, page, plan)


def _blocked(url: str | None, plan: ExtractPlan) -> Page | None:
    blocked = plan.url_policy.blocked_by(url or "")
    return None if blocked is None else Page(rejected_by=f"url_policy.{blocked.rule}")


def _pages(records: Sequence[Record], plan: ExtractPlan) -> list[Page]:
    pages = [_page_by_policy(record, plan) for record in records]
    documents = [
        (record.payload, record.headers.get("content-type", ""), record.url or "")
        for record, page in zip(records, pages, strict=True)
        if page is None
    ]
    results = iter(_child(plan).results(documents))
    return [
        _extracted(next(results), record) if page is None else page
        for record, page in zip(records, pages, strict=True)
    ]


def _page_by_policy(record: Record, plan: ExtractPlan) -> Page | None:
    """The page of a record that is dropped without a look at its content, or has no HTML."""
    if record.skipped:
        return Page(rejected_by=f"warc.{record.skipped}")
    if blocked := _blocked(record.url, plan):
        return blocked
    signal = in_headers(record.headers)
    if signal and plan.opt_out.reject:
        return Page(rejected_by="opt_out.reject", opt_out=signal)
    if record.kind == "text":
        return Page(text=record.payload.decode("utf-8", "replace").replace("\0", ""))
    return None


def _extracted(result: Page | Loss, record: Record) -> Page:
    if isinstance(result, Loss):
        result = Page(**rejection_columns(*result.rejection("extract")))
    return result._replace(opt_out=result.opt_out or in_headers(record.headers))


def _measured_row(row: Row, page: Page, plan: ExtractPlan) -> Row:
    columns = page._asdict()
    code, plain = columns.pop("code"), columns.pop("plain")
    row |= columns | {"host": host_of(row["url"] or ""), "num_chars": None}
    if page.text is None:
        return row
    length, limit = len(page.text), plan.config.max_text_chars
    if length > limit:
        rejected = rejection_columns("extract.max_text_chars", float(length), (0.0, limit))
        return row | rejected | {"text": None}
    text = page.text
    measured = text if plain is None else plain
    language = plan.language.filter
    if language.identify:
        written = measured if measured.strip() else text
        row["language"], row["language_score"] = language.guess(written)
        share = language.line_share_of(written, row["language"]) if language.measure_lines else None
        row["language_line_share"] = share
    row |= measured_columns(measured, row["language"], plan.filters)
    if measured != text:
        is_edited = row["text"] != measured
        row["text"] = _edited(text, code, row["language"], plan.filters) if is_edited else text
        row["num_chars"] = len(row["text"])
    return _judge(row, plan)


def _edited(
    text: str, code: Sequence[tuple[int, int]], language: str | None, filters: Sequence[NamedFilter]
) -> str:
    """The text as filters that edit lines leave it, but with its code as it is."""
    prose = [TextView(part, language) for part in between(text, code)]
    for filter in (named.of(language) for named in filters):
        if hasattr(filter, "edit"):
            prose = [apply(filter, view)[0] for view in prose]
    parts = [prose[0].text]
    for (start, end), view in zip(code, prose[1:], strict=True):
        parts += [text[start:end].strip("\n"), view.text.strip("\n")]
    return "\n".join(part for part in parts if part)


def _judge(row: Row, plan: ExtractPlan) -> Row:
    """Apply the policy to a measured row: its verdict, and its text only if kept or sampled."""
    failure = _failure(row, plan)
    if failure is None:
        return row | rejection_columns(None)
    row |= rejection_columns(*failure) | {"content_hash": None, "band_keys": None}
    if not sampled(row["doc_id"], share=plan.config.keep_rejected_text, seed=plan.seed):
        row["text"] = None
    return row


def _failure(row: Row, plan: ExtractPlan) -> Rejection | tuple[str] | None:
    """The first rule that a measured row breaks; that of a license has no value and no bound."""
    if failure := _low_confidence(row, plan) or _wrong_language(row, plan):
        return failure
    if not plan.license.allows(row["license"]):
        return ("license.allowed",)
    return first_broken_rule(row, plan.filters)


def _low_confidence(row: Row, plan: ExtractPlan) -> Rejection | None:
    value, bound = row["extract_confidence"], plan.config.confidence
    if value is None or bound is None or bound[0] <= value <= bound[1]:
        return None
    return Rejection("extract.confidence", value, bound)


def _wrong_language(row: Row, plan: ExtractPlan) -> Rejection | None:
    if not plan.language.filter.identify:
        return None
    language = plan.language.of(row["language"])
    if language.allowed and row["language"] not in language.allowed:
        return Rejection("language.allowed", row["language_score"], (-math.inf, math.inf))
    scores = {rule: row[f"language_{rule}"] for rule in rules(language)}
    return first_failure("language", language, scores)


def _add_signatures(rows: list[Row], plan: ExtractPlan) -> None:
    """Content hashes and band keys of the kept rows, all at once."""
    kept = [row for row in rows if row["rejected_by"] is None]
    normalized = [normalize(row["text"]) for row in kept]
    band_keys = minhash.band_keys(normalized, plan.signature)
    for row, words, keys in zip(kept, normalized, band_keys, strict=True):
        row |= {"content_hash": minhash.content_hash(row["text"], words), "band_keys": keys}


# --- writing and re-applying ----------------------------------------------------------------------


def _write_documents(
    rows: Iterable[Row], commit: Commit, plan: ExtractPlan, store: Store
) -> ExtractResult:
    """Write the documents part; counts go to the commit."""
    schema = document_schema(plan.filters, keys=minhash.describe(plan.signature))
    counts: Counter[str] = Counter()
    languages: Counter[str] = Counter()
    tallies = Tallies(plan.filters)
    chars, rows = 0, iter(rows)
    with store.part_writer("documents", commit.unit, schema, commit=commit) as writer:
        while batch := list(islice(rows, plan.config.batch_size)):
            for row in batch:
                counts[row["rejected_by"] or "kept"] += 1
                languages[row["language"] or "unknown"] += 1
                tallies.add(row)
                chars += row["num_chars"] if row["rejected_by"] is None else 0
            _add_signatures(batch, plan)
            if not plan.config.keep_text:
                batch = [row | {"text": None} for row in batch]
            writer.write_table(pa.Table.from_pylist(batch, schema=schema))
    commit.counts |= dict(sorted(counts.items()))
    commit.rows_out = counts["kept"]
    return ExtractResult(
        chars_out=chars, languages=dict(sorted(languages.items())), tallies=tallies.counts
    )


def _stored_rows(unit: Unit, plan: ExtractPlan) -> tuple[list[Row], Commit] | None:
    """Rows of this unit from an earlier run with other bounds, judged again, and its commit.

    None if there is no such run, or if it did not keep a text that is needed now.
    """
    for root in unit.task.reusable_stores:
        store = Store(root, ExtractResult)
        before = store.commit_of(unit.name)
        if before is None or before.fingerprint != unit.fingerprint:
            continue
        rows = [
            # to a row that was rejected before it was measured no bound was applied
            row if row["num_chars"] is None else _judge(row, plan)
            for row in store.read_part(before).to_pylist()
        ]
        if all(row["text"] is not None for row in rows if _keeps_text(row, plan)):
            return rows, before
    return None


def _keeps_text(row: Row, plan: ExtractPlan) -> bool:
    if row["num_chars"] is None:
        return False
    return row["rejected_by"] is None or sampled(
        row["doc_id"], share=plan.config.keep_rejected_text, seed=plan.seed
    )


def _child(plan: ExtractPlan) -> Child:
    config = plan.config
    limits = Limits(config.timeout_seconds, config.child_memory_bytes, config.recycle_after)
    options = ExtractorOptions(config, plan.language.filter, plan.opt_out.reject)
    return shared_child(make_extract, options, limits)
