"""What became of a page: from its record to the rows of its tokens, or to the rule that dropped it."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.report.charts import Floats
from pipeline.report.sample import Ledger, part_uri, read_ledger, spread
from pipeline.run import publish
from pipeline.run.results import corpus_phase, store_of
from stages.storage.catalog import read_catalog
from stages.storage.files import exists
from stages.storage.ledger import Store
from stages.storage.parts import read_columns, score_names, unit_of


def why(root: str, url: str) -> list[dict[str, Any]]:
    """What became of every document of this URL, or of this id in the input, stage by stage; []
    when the run never saw it.

    `percentiles` has, for each of the `scores`, the share of the run's measured documents that lie
    below it, in percent.
    """
    ledger = read_ledger(root)
    state = ledger.state
    store = store_of(root, state, "extract")
    found = []
    for commit in store.listed_commits():
        uri = store.uri(commit.outputs[0]["path"])
        names = read_columns(uri, ["url", "source_id"])
        is_url = pc.is_in(names["url"], value_set=pa.array(_variants(url)))
        is_id = pc.fill_null(pc.equal(names["source_id"], url), False)
        rows = pc.indices_nonzero(pc.or_(is_url, is_id)).to_pylist()
        if rows:
            table = read_columns(uri, None).take(rows).drop_columns(["band_keys", "content_hash"])
            found += [_fate(root, state, commit.unit, row) for row in table.to_pylist()]
    ranks = _Ranks(ledger)
    return [fate | {"percentiles": ranks.of(fate["scores"])} for fate in found]


def _variants(url: str) -> list[str]:
    bare = url.strip().rstrip("/")
    hosts = [bare] if "://" in bare else [f"https://{bare}", f"http://{bare}"]
    return [h + end for h in hosts for end in ("", "/")]


def _fate(root: str, state: dict[str, Any], unit: str, row: dict[str, Any]) -> dict[str, Any]:
    identity = ("doc_id", "url", "source_id", "warc_file", "warc_offset", "crawl_date")
    fate = {
        k: row[k]
        for k in (*identity, "charset", "charset_source", "language", "language_score", "opt_out")
    }
    fate |= _measured(row)
    if row["rejected_by"] is not None:
        return fate | {"fate": "rejected", "stage": "extract", **_verdict(row), "text": row["text"]}
    return fate | _after_extract(root, state, unit, row)


def _measured(row: dict[str, Any]) -> dict[str, Any]:
    """Scores, numbers all, and the notes that filters left beside them."""
    named = {k: v for k, v in row.items() if "." in k and v is not None}
    notes = {k: v for k, v in named.items() if isinstance(v, str)}
    return {"scores": {k: v for k, v in named.items() if k not in notes}, "notes": notes}


def _verdict(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "rule": row["rejected_by"],
        "value": row["rejected_value"],
        "bound": [row["rejected_low"], row["rejected_high"]],
    }


def _after_extract(
    root: str, state: dict[str, Any], unit: str, row: dict[str, Any]
) -> dict[str, Any]:
    keep = _row(store_of(root, state, "dedup keep").uri("keep", f"{unit}.parquet"), row["doc_id"])
    if keep is None:
        return {"fate": "pending", "stage": "dedup"}
    cluster = {"cluster_id": keep["cluster_id"], "cluster_size": keep["cluster_size"]}
    if not keep["keep"]:
        cluster |= {"rule": keep["rule"], "similarity": keep["similarity"]}
        return {
            "fate": "duplicate",
            "stage": "dedup",
            **cluster,
            "kept_copy": _kept_copy(root, state, keep),
        }
    cuts = _row(store_of(root, state, "dedup cuts").uri("cuts", f"{unit}.parquet"), row["doc_id"])
    if cuts is not None:
        cluster |= {"lines_cut": cuts["cut"], "chars_cut": cuts["chars_cut"]}
    store = store_of(root, state, "refine")
    rejected = _row(store.uri("rejected", f"{unit}.parquet"), row["doc_id"])
    if rejected is not None:
        return {
            "fate": "rejected",
            "stage": "refine",
            **cluster,
            **_verdict(rejected),
            **_measured(rejected),
        }
    corpus = _row(
        store_of(root, state, corpus_phase(root, state)).uri("corpus", f"{unit}.parquet"),
        row["doc_id"],
    )
    if corpus is None:
        return {"fate": "pending", "stage": "refine", **cluster}
    kept_scores = _measured(corpus) | {"text": corpus["text"]}
    placed = list(_generations(publish.published_to(root, state), row["doc_id"]))
    if not placed:
        return {"fate": "pending", "stage": "pack", **cluster, **kept_scores}
    return {"fate": "published", "stage": "pack", **cluster, **kept_scores, "generations": placed}


def _generations(root: str, doc_id: int) -> Iterator[dict[str, Any]]:
    """Where a document lies in each generation: rows of its training part, or of its held-out part."""
    for entry in read_catalog(root):
        uri = f"{root}/generations/{entry['name']}"
        parts = {False: uri, True: f"{uri}/held_out"} if exists(f"{uri}/held_out") else {False: uri}
        for held_out, folder in parts.items():
            table = read_columns(f"{folder}/provenance.parquet", None)
            spans = table.filter(
                pc.equal(table["doc_id"], pa.scalar(doc_id, pa.uint64()))
            ).to_pylist()
            if spans:
                tokens = sum(s["length"] for s in spans)
                yield {
                    "name": entry["name"],
                    "held_out": held_out,
                    "rows": [s["row"] for s in spans],
                    "tokens": tokens,
                }


def _row(uri: str, doc_id: int) -> dict[str, Any] | None:
    if not exists(uri):
        return None
    table = read_columns(uri, None)
    rows: list[dict[str, Any]] = table.filter(
        pc.equal(table["doc_id"], pa.scalar(doc_id, pa.uint64()))
    ).to_pylist()
    return rows[0] if rows else None


def _kept_copy(root: str, state: dict[str, Any], keep: dict[str, Any]) -> dict[str, Any]:
    """Who the copy is that stays: a document of this run, or of the earlier batch whose `documents`
    are named.
    """
    doc_id, store = keep["kept_id"], store_of(root, state, "extract")
    earlier = None if keep["kept_in"] is None else state["indexes"][keep["kept_in"]]
    if earlier is not None:
        store = Store(earlier["documents"])
        # an index of all documents may name one that was itself dropped for another
        there = _row(Store(earlier["keep"]).uri("keep", f"{unit_of(doc_id)}.parquet"), doc_id)
        doc_id = there["kept_id"] if there and there["kept_in"] is None else doc_id
    row = _row(store.uri("documents", f"{unit_of(doc_id)}.parquet"), doc_id) or {}
    named = {"doc_id": doc_id, "url": row.get("url"), "source_id": row.get("source_id")}
    return named | {"documents": earlier and earlier["documents"]}


class _Ranks:
    """Where scores lie among those of the run's measured documents: all of them, or of a large run
    a sample of the parts.
    """

    def __init__(self, ledger: Ledger) -> None:
        commits = spread(ledger.commits["extract"], rows=lambda c: sum(c.counts.values()))
        places = (("extract", "documents"), ("refine", "corpus"), ("refine", "rejected"))
        uris = [part_uri(ledger, phase, kind, c.unit) for phase, kind in places for c in commits]
        # refine's parts repeat the scores of extract, for its documents only: a score is looked up
        # where it was measured
        self._extract = [uri for uri in uris[: len(commits)] if uri]
        self._refine = [uri for uri in uris[len(commits) :] if uri]

    def of(self, scores: Mapping[str, float]) -> dict[str, float]:
        """Percent of the measured documents below each score, in [0, 100]; of those that have just
        this value, half count.
        """
        return {
            name: rank
            for name, value in scores.items()
            if (rank := _rank(value, self._values(name))) is not None
        }

    def _values(self, name: str) -> Floats:
        parts = [uri for uri in self._extract if name in score_names(uri)]
        parts = parts or [uri for uri in self._refine if name in score_names(uri)]
        columns = [read_columns(uri, [name])[name].drop_null().to_numpy() for uri in parts]
        return np.concatenate([np.empty(0), *columns])


def _rank(value: float, values: Floats) -> float | None:
    finite = values[np.isfinite(values)]
    if not len(finite) or not np.isfinite(value):
        return None
    return 100 * float((finite < value).mean() + (finite == value).mean() / 2)
