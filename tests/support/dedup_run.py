"""The dedup phases over documents parts that a test makes up, in this process and without
extraction.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.run.phase import Phase, PlanContext
from pipeline.run.phases import PHASES
from stages.dedup import minhash
from stages.formats.document import document_schema
from stages.storage.ledger import Commit, Store


class Doc(NamedTuple):
    """What dedup sees of a document; `keys` are 64-bit integers, one a band, or none."""

    doc_id: int
    content: str = ""
    keys: tuple[int, ...] = ()
    num_chars: int = 1
    rejected_by: str | None = None
    text: str | None = None
    host: str | None = None


def write_parts(folder: Path, parts, signature) -> Phase:
    """An extract phase of parts of documents; the part's number is its documents' input."""
    store = Store(str(folder / "extract"))
    phase = Phase("extract", store, [])
    schema = document_schema((), keys=minhash.describe(signature))
    for number, docs in enumerate(parts):
        rows = [
            doc._asdict()
            | {
                "content_hash": minhash.content_hash(doc.content, doc.content),
                "band_keys": np.array(doc.keys, "<u8").tobytes(),
            }
            | {"warc_file": f"input-{number}"}
            for doc in docs
        ]
        commit = Commit(f"{number:06d}", "", rows_out=sum(d.rejected_by is None for d in docs))
        with store.create("documents", f"{number:06d}.parquet", outputs=commit.outputs) as path:
            pq.write_table(
                pa.Table.from_pylist(
                    [{k: r.get(k) for k in schema.names} for r in rows], schema=schema
                ),
                path,
            )
        phase.units.append(_unit(commit.unit))
        phase.add(commit)
    return phase


def _unit(name):
    from stages.storage.ledger import Unit

    return Unit(name, "", None)


def run_dedup(folder: Path, parts, config, *, against=()):
    """All dedup phases; the phases by name."""
    phases = {"extract": write_parts(folder, parts, config.signature)}
    settings = SimpleNamespace(dedup=config, run=SimpleNamespace(seed=0))
    for spec in PHASES:
        if spec.stage != "dedup":
            continue
        name = spec.name
        phase = phases[name] = Phase(
            name, Store(str(folder / name.replace(" ", "/")), spec.result), []
        )
        while True:
            context = PlanContext(settings, (), phases, phase, against)
            phase.units, phase.prepare, _ = spec.list_units(context)
            if not phase.pending:
                break
            for step in phase.prepare:
                step()
            for unit in phase.pending:
                commit = spec.work(unit, config, phase.store)
                phase.store.commit(commit)
                phase.add(commit)
        phase.store.list_units(phase.units)
    return phases


def keep_rows(phases):
    """The keep table as {doc_id: row}."""
    store, extract = phases["dedup keep"].store, phases["extract"]
    return {
        row["doc_id"]: row
        for commit in extract.ordered()
        for row in pq.read_table(store.uri("keep", f"{commit.unit}.parquet")).to_pylist()
    }
