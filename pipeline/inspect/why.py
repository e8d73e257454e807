"""The fate of a page: the rule that dropped it, or the training rows that it became."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.report.sample import (
    Ledger,
    Sample,
    open_sample,
    part_uri,
    parts_of,
    read_ledger,
)
from pipeline.run import publish, query
from pipeline.run.results import result_schemas
from stages.storage.catalog import read_catalog
from stages.storage.files import exists
from stages.storage.ledger import Store
from stages.storage.parts import documents, schema_of, unit_of


def why(root: str, url: str) -> list[dict[str, Any]]:
    """The fate of every document with this URL, or this id in the input; [] if the run has none.

    `percentiles` has, for each of the `scores`, the percentage of the run's measured documents
    below it.
    """
    ledger = read_ledger(root)
    fates = [_fate(ledger, row) for row in _documents_of(ledger, url)]
    if not fates:
        return []
    with open_sample(ledger) as sample:
        return [f | {"percentiles": _percentiles(sample, f["scores"])} for f in fates]


def _documents_of(ledger: Ledger, url: str) -> Iterator[dict[str, Any]]:
    units = [c.unit for c in ledger.commits["extract"]]
    parts = {"documents": parts_of(ledger, "extract", "documents", units)}
    sql = (
        "SELECT doc_id FROM documents WHERE list_contains($urls, url) OR source_id = $id "
        "ORDER BY doc_id"
    )
    with query.connect(parts, result_schemas(parts)) as connection:
        ids = query.table(connection, sql, {"urls": _variants(url), "id": url})["doc_id"]
    for doc_id in ids.to_pylist():
        row = _row(ledger, "extract", "documents", doc_id)
        if row is not None:
            yield row


def _variants(url: str) -> list[str]:
    bare = url.strip().rstrip("/")
    hosts = [bare] if "://" in bare else [f"https://{bare}", f"http://{bare}"]
    return [h + end for h in hosts for end in ("", "/")]


def _fate(ledger: Ledger, row: dict[str, Any]) -> dict[str, Any]:
    identity = ("doc_id", "url", "source_id", "warc_file", "warc_offset", "crawl_date")
    fate = {
        k: row[k]
        for k in (*identity, "charset", "charset_source", "language", "language_score", "opt_out")
    }
    fate |= _measured(row)
    if row["rejected_by"] is not None:
        return fate | {"fate": "rejected", "stage": "extract", **_verdict(row), "text": row["text"]}
    return fate | _after_extract(ledger, row["doc_id"])


def _measured(row: dict[str, Any]) -> dict[str, Any]:
    """Scores (numbers) and notes (strings) of filters."""
    named = {k: v for k, v in row.items() if "." in k and v is not None}
    notes = {k: v for k, v in named.items() if isinstance(v, str)}
    return {"scores": {k: v for k, v in named.items() if k not in notes}, "notes": notes}


def _verdict(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "rule": row["rejected_by"],
        "value": row["rejected_value"],
        "bound": [row["rejected_low"], row["rejected_high"]],
    }


def _after_extract(ledger: Ledger, doc_id: int) -> dict[str, Any]:
    keep = _row(ledger, "dedup keep", "keep", doc_id)
    if keep is None:
        return {"fate": "pending", "stage": "dedup"}
    cluster = {"cluster_id": keep["cluster_id"], "cluster_size": keep["cluster_size"]}
    if not keep["keep"]:
        cluster |= {"rule": keep["rule"], "similarity": keep["similarity"]}
        kept_copy = _kept_copy(ledger, keep)
        return {"fate": "duplicate", "stage": "dedup", **cluster, "kept_copy": kept_copy}
    cuts = _row(ledger, "dedup cuts", "cuts", doc_id)
    if cuts is not None:
        cluster |= {"lines_cut": cuts["cut"], "chars_cut": cuts["chars_cut"]}
    return _after_dedup(ledger, doc_id, cluster)


def _after_dedup(ledger: Ledger, doc_id: int, cluster: dict[str, Any]) -> dict[str, Any]:
    rejected = _row(ledger, "refine", "rejected", doc_id)
    if rejected is not None:
        fate = {"fate": "rejected", "stage": "refine", **cluster}
        return {**fate, **_verdict(rejected), **_measured(rejected)}
    corpus = _row(ledger, ledger.corpus_phase, "corpus", doc_id)
    if corpus is None:
        return {"fate": "pending", "stage": "refine", **cluster}
    kept = {**cluster, **_measured(corpus), "text": corpus["text"]}
    generations = list(_generations(publish.published_to(ledger.root, ledger.state), doc_id))
    if not generations:
        return {"fate": "pending", "stage": "pack", **kept}
    return {"fate": "published", "stage": "pack", **kept, "generations": generations}


def _generations(root: str, doc_id: int) -> Iterator[dict[str, Any]]:
    """The rows of a document in each generation: in its training part, or in its held-out part."""
    for entry in read_catalog(root):
        folder = f"{root}/generations/{entry['name']}"
        for held_out in (False, True):
            uri = (
                f"{folder}/held_out/provenance.parquet"
                if held_out
                else f"{folder}/provenance.parquet"
            )
            spans = _spans(uri, doc_id) if not held_out or exists(uri) else []
            if spans:
                yield {
                    "name": entry["name"],
                    "held_out": held_out,
                    "rows": [span["row"] for span in spans],
                    "tokens": sum(span["length"] for span in spans),
                }


def _spans(uri: str, doc_id: int) -> list[dict[str, Any]]:
    sql = "SELECT row, length FROM spans WHERE doc_id = $id"
    with query.connect({"spans": [uri]}, {}) as connection:
        rows: list[dict[str, Any]] = query.table(connection, sql, {"id": doc_id}).to_pylist()
    return rows


def _row(ledger: Ledger, phase: str, kind: str, doc_id: int) -> dict[str, Any] | None:
    uri = part_uri(ledger, phase, kind, unit_of(doc_id))
    return _row_of_part(uri, doc_id) if uri else None


def _row_of_part(uri: str, doc_id: int) -> dict[str, Any] | None:
    columns = [name for name in schema_of(uri).names if name != "doc_id"]
    return documents(uri, [doc_id], columns).get(doc_id)


def _kept_copy(ledger: Ledger, keep: dict[str, Any]) -> dict[str, Any]:
    """The copy that stays, of this run or of an earlier batch, whose `documents` are then named."""
    doc_id = keep["kept_id"]
    if keep["kept_in"] is None:
        row, store = _row(ledger, "extract", "documents", doc_id), None
    else:
        earlier = ledger.state.indexes[keep["kept_in"]]
        store = earlier.documents
        # an index of all documents may name one that was itself dropped for another
        verdict = _row_of_batch(earlier.keep, "keep", doc_id)
        if verdict and verdict["kept_in"] is None:
            doc_id = verdict["kept_id"]
        row = _row_of_batch(store, "documents", doc_id)
    named = {name: row and row[name] for name in ("url", "source_id")}
    return {"doc_id": doc_id, **named, "documents": store}


def _row_of_batch(store: str, kind: str, doc_id: int) -> dict[str, Any] | None:
    uri = Store(store).uri(kind, f"{unit_of(doc_id)}.parquet")
    return _row_of_part(uri, doc_id) if exists(uri) else None


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
