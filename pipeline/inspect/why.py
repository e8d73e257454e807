"""The fate of a page: the rule that dropped it, or the training rows that it became."""

import math
from collections.abc import Mapping

from pipeline.report.sample import Ledger, Row, Sample, earlier_row, open_sample, read_ledger
from pipeline.run import query
from pipeline.run.publish import published_to
from pipeline.run.results import result_schemas
from stages.storage.catalog import generation_uri, read_catalog
from stages.storage.files import exists


def why(root: str, url: str) -> list[Row]:
    """The fate of every document with this URL, with this id in the input, or read from a place,
    FILE:OFFSET (the file's path or name; bytes, or the row of a text input); [] if there is none.

    `percentiles` has, for each of the `scores`, the percentage of the run's measured documents
    below it.
    """
    ledger = read_ledger(root)
    pages = [ledger.row("extract", "documents", doc_id) for doc_id in _doc_ids(ledger, url)]
    fates = [_fate(ledger, page) for page in pages if page]
    if not fates:
        return []
    with open_sample(ledger) as sample:
        return [f | {"percentiles": _percentiles(sample, f["scores"])} for f in fates]


_DOC_IDS = """
SELECT doc_id FROM documents
WHERE list_contains($urls, url) OR source_id = $id OR (
    warc_offset = TRY_CAST($offset AS BIGINT)
    AND (warc_file = $file OR suffix(warc_file, '/' || $file))
) ORDER BY doc_id"""


def _doc_ids(ledger: Ledger, url: str) -> list[int]:
    bare = url.strip().rstrip("/")
    hosts = [bare] if "://" in bare else [f"https://{bare}", f"http://{bare}"]
    urls = [host + end for host in hosts for end in ("", "/")]
    documents = {"documents": ledger.parts["documents"]}
    with query.connect(documents, result_schemas(ledger.parts)) as connection:
        file, _, offset = url.rpartition(":")
        values = {"urls": urls, "id": url, "file": file, "offset": offset}
        table = query.table(connection, _DOC_IDS, values)
    ids: list[int] = table["doc_id"].to_pylist()
    return ids


_SHOWN = (
    *("doc_id", "url", "source_id", "warc_file", "warc_offset", "crawl_date"),
    *("truncated", "charset", "charset_source", "language", "language_score", "opt_out"),
    *("title", "canonical_url", "author", "published", "declared_language", "license"),
    "extract_confidence",
)


def _fate(ledger: Ledger, page: Row) -> Row:
    """Follow a document of extract through the stages, up to the last that has seen it."""
    doc_id = page["doc_id"]
    fate = {name: page.get(name) for name in _SHOWN} | _measured(page)
    if page["rejected_by"] is not None:
        rejected = {"fate": "rejected", "stage": "extract", **_verdict(page)}
        return fate | rejected | {"text": page["text"]}
    keep = ledger.row("dedup keep", "keep", doc_id)
    if keep is None:
        return fate | {"fate": "pending", "stage": "dedup"}
    cluster = {name: keep[name] for name in ("cluster_id", "cluster_size")}
    if not keep["keep"]:
        cluster |= {"rule": keep["rule"], "similarity": keep["similarity"]}
        duplicate = {"fate": "duplicate", "stage": "dedup", **cluster}
        return fate | duplicate | {"kept_copy": _kept_copy(ledger, keep)}
    if cuts := ledger.row("dedup cuts", "cuts", doc_id):
        cluster |= {"lines_cut": cuts["cut"], "chars_cut": cuts["chars_cut"]}
    if row := ledger.row("refine", "rejected", doc_id):
        rejected = {"fate": "rejected", "stage": "refine", **cluster}
        return fate | rejected | _verdict(row) | _measured(row)
    corpus = ledger.row(ledger.corpus_phase, "corpus", doc_id)
    if corpus is None:
        return fate | {"fate": "pending", "stage": "refine"} | cluster
    fate |= {"fate": "pending", "stage": "pack", **cluster, **_measured(corpus)}
    fate["text"] = corpus["text"]
    if generations := _generations(published_to(ledger.root, ledger.state), doc_id):
        fate |= {"fate": "published", "generations": generations}
    return fate


def _measured(row: Row) -> Row:
    """Scores (numbers) and notes (strings) of filters."""
    named = {k: v for k, v in row.items() if "." in k and v is not None}
    notes = {k: v for k, v in named.items() if isinstance(v, str)}
    return {"scores": {k: v for k, v in named.items() if k not in notes}, "notes": notes}


def _verdict(row: Row) -> Row:
    return {
        "rule": row["rejected_by"],
        "value": row["rejected_value"],
        "bound": [row["rejected_low"], row["rejected_high"]],
    }


_ROWS = """
SELECT list(row ORDER BY file_row_number) AS rows, sum(length)::BIGINT AS tokens
FROM spans WHERE doc_id = $id HAVING count(*) > 0"""


def _generations(root: str, doc_id: int) -> list[Row]:
    """The rows of a document in each generation: in its training part, or in its held-out part."""
    generations, entries = [], read_catalog(root)
    superseded = {name: e["name"] for e in entries for name in e.get("supersedes", ())}
    for entry in entries:
        name = entry["name"]
        later = {"superseded_by": superseded[name]} if name in superseded else {}
        for split in ("", "held_out/"):
            uri = f"{generation_uri(root, name)}/{split}provenance.parquet"
            if split and not exists(uri):
                continue
            with query.connect({"spans": [uri]}, {}) as connection:
                for row in query.table(connection, _ROWS, {"id": doc_id}).to_pylist():
                    generations.append({"name": name, "held_out": bool(split), **row, **later})
    return generations


def _kept_copy(ledger: Ledger, keep: Row) -> Row:
    """The copy that stays, of this run or of an earlier batch, whose `documents` are then named."""
    doc_id, kept_in, store = keep["kept_id"], keep["kept_in"], None
    if kept_in is not None:
        earlier = ledger.state.indexes[kept_in]
        store = earlier.documents
        # an index of all documents may name one that was itself dropped for another
        verdict = earlier_row(earlier.keep, "keep", doc_id, "kept_id", "kept_in")
        if verdict and verdict["kept_in"] is None:
            doc_id = verdict["kept_id"]
    row = ledger.document(doc_id, kept_in, "url", "source_id") or {}
    return {
        "doc_id": doc_id,
        "url": row.get("url"),
        "source_id": row.get("source_id"),
        "documents": store,
    }


# --- percentiles ----------------------------------------------------------------------------------

_RANK = """
SELECT 100 * (avg(({score} < $value)::INT) + avg(({score} = $value)::INT) / 2) AS rank
FROM {table} WHERE isfinite({score})"""


def _percentiles(sample: Sample, scores: Mapping[str, float]) -> dict[str, float]:
    """Percentage of measured documents below each score; those equal to it count half."""
    # refine repeats the scores of extract, for its documents only: a score is ranked where it was
    # measured first
    tables = {name: table for table in ("refined", "pages") for name in sample.scores(table)}
    ranks = {
        name: _rank(sample, tables[name], name, value)
        for name, value in scores.items()
        if name in tables and math.isfinite(value)
    }
    return {name: rank for name, rank in ranks.items() if rank is not None}


def _rank(sample: Sample, table: str, name: str, value: float) -> float | None:
    sql = _RANK.format(score=query.quoted(name, '"') + "::DOUBLE", table=table)
    rank: float | None = sample.rows(sql, value=float(value))[0]["rank"]
    return rank
