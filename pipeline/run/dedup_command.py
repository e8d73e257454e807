"""`gristmill dedup`: the dedup stage alone, over JSONL or Parquet files, with one table as its
result.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.config.load import load
from pipeline.config.sections import Config
from pipeline.engine.units import RunUnits
from pipeline.run.execute import Progress, execute
from pipeline.run.results import all_commits, store_of
from pipeline.run.state import RunState, read_state
from stages.formats.errors import ConfigError
from stages.read.fetch import FetchOptions, local_copy, printable
from stages.read.listing import JSON_SUFFIXES, expand_inputs
from stages.read.records import InputConfig, columns_of
from stages.storage.ledger import Commit, Store
from stages.storage.parts import read_columns

FORMATS = {"jsonl": JSON_SUFFIXES, "parquet": (".parquet",)}
_ALONE = (
    "extract.filters=[]",
    "language.identify=false",
    "language.allowed=[]",
    "language.score=off",
    "extract.gate.enabled=false",
    "opt_out.reject=false",
    "extract.max_text_chars=1_000_000_000",
    "extract.keep_text=false",
)


class Result(NamedTuple):
    """Rows by rule ("kept" for null), clusters of more than one document, failed inputs, table."""

    rows: dict[str, int]
    clusters: int
    failed: list[str]
    table: str


def configure(
    paths: Sequence[str],
    output: str,
    *,
    text_column: str,
    id_column: str,
    against: Sequence[str],
    overrides: Sequence[str],
) -> Config:
    """The configuration of a dedup of files; `overrides` as on the command line come last."""
    files = _files(paths, output)
    settings = {
        "run.directory": output,
        "input.paths": list(paths),
        "input.format": _format(files),
        "input.text_column": text_column,
        "input.id_column": id_column,
        "dedup.against": list(against),
    }
    options = [*(f"{key}={json.dumps(value)}" for key, value in settings.items()), *overrides]
    dedup = load(None, options).dedup
    if dedup.line_level != "off":
        raise ConfigError(
            "dedup.line_level changes texts, and gristmill dedup writes none; use gristmill run"
        )
    verified = ["extract.keep_text=true"] if dedup.verify_share else []
    config = load(None, [*_ALONE, *verified, *options])
    _require_columns(files[0], config.input)
    return config


def _files(paths: Sequence[str], output: str) -> list[str]:
    """The inputs, without what an earlier run wrote into the output folder."""
    files = [f for f in expand_inputs(list(paths), base_uri="") if not f.startswith(f"{output}/")]
    if not files:
        raise ConfigError(
            f"no input: {', '.join(paths)} holds only files of the output folder {output}"
        )
    return files


def _format(files: Sequence[str]) -> str:
    """The format of all inputs, by their names."""
    formats = {}
    for path in files:
        name = next((f for f, suffixes in FORMATS.items() if path.lower().endswith(suffixes)), None)
        if name is None:
            raise ConfigError(
                f"{path}: not .jsonl (which may be compressed) or .parquet; "
                "gristmill run reads WARC files"
            )
        formats[name] = path
    if len(formats) > 1:
        raise ConfigError(
            f"inputs of two formats: {' and '.join(formats.values())}; convert one, or run them "
            "one against the other"
        )
    return next(iter(formats))


def _require_columns(path: str, config: InputConfig) -> None:
    """ConfigError if the first file lacks the text or id column."""
    with local_copy(path, options=FetchOptions()) as local:
        names = columns_of(local, config, name=printable(path))
    for option, column in (("text", config.text_column), ("id", config.id_column)):
        if names and column and column not in names:
            none = ", or '' if there is none" if option == "id" else ""
            raise ConfigError(
                f"{path}: no column '{column}'; it has {', '.join(names)}; "
                f"set --{option}-column{none}"
            )


def dedup_files(config: Config, progress: Progress, run_units: RunUnits) -> Result:
    """Deduplicate, and write `keep.parquet`: a row for every input row, files as first seen.

    Columns: id, cluster_id (the smallest document number of the cluster), cluster_size, keep, rule
    (dedup.exact, dedup.near, dedup.earlier, input.* for a row without text, null if kept), path,
    row. Raises what `execute` raises.
    """
    outcome = execute(config, progress, run_units, last="dedup")
    root = config.run.directory
    state = read_state(root)
    commits = all_commits(root, state)
    with Store(root).create("keep.parquet", outputs=[]) as temporary:
        _write(temporary, root, commits, state)
    rows: Counter[str] = Counter()
    for commit in commits["extract"]:
        rows.update(commit.counts)
    del rows["kept"]  # dedup counts these
    for commit in commits["dedup keep"]:
        rows.update(commit.counts)
    clusters = sum(
        n
        for c in commits["dedup elect"]
        for size, n in c.result.cluster_sizes.items()
        if size != "1"
    )
    failed = [error for errors in outcome.failed.values() for error in errors]
    return Result(dict(sorted(rows.items())), clusters, failed, f"{root}/keep.parquet")


def _write(path: Path, root: str, commits: Mapping[str, Sequence[Commit]], state: RunState) -> None:
    documents, kept = (store_of(root, state, phase) for phase in ("extract", "dedup keep"))
    uris = {c.unit: documents.uri(c.output().path) for c in commits["extract"]}
    schema = pa.schema(
        {
            "id": _id_type(commits["extract"], uris.values()),
            "cluster_id": pa.uint64(),
            "cluster_size": pa.int64(),
            "keep": pa.bool_(),
            "rule": pa.string(),
            "path": pa.string(),
            "row": pa.int64(),
        }
    )
    columns = ["doc_id", "source_id", "warc_file", "warc_offset", "rejected_by"]
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for unit, uri in uris.items():
            keep = read_columns(kept.uri("keep", f"{unit}.parquet"), ["doc_id", *schema.names[1:5]])
            writer.write_table(_joined(read_columns(uri, columns), keep, schema))


def _joined(rows: pa.Table, keep: pa.Table, schema: pa.Schema) -> pa.Table:
    """Rows of an input with their keep rows, if they have any; both are in order of doc_id."""
    verdicts = keep.take(pc.index_in(rows["doc_id"], value_set=keep["doc_id"].combine_chunks()))
    columns = [
        rows["source_id"].cast(schema.field("id").type),
        verdicts["cluster_id"],
        verdicts["cluster_size"],
        pc.fill_null(verdicts["keep"], False),
        pc.coalesce(rows["rejected_by"], verdicts["rule"]),
        rows["warc_file"],
        rows["warc_offset"],
    ]
    return pa.table(columns, schema=schema)


def _id_type(extracted: Sequence[Commit], uris: Iterable[str]) -> pa.DataType:
    """The ids' type: integers stay integers of the inputs' type, so that tables can be joined."""
    types = {commit.result.id_type or "string" for commit in extracted}
    id_type = pa.type_for_alias(types.pop()) if len(types) == 1 else pa.string()
    if not pa.types.is_integer(id_type):
        return pa.string()
    ids = (read_columns(uri, ["source_id"])["source_id"] for uri in uris)
    return id_type if all(_are_integers(column, id_type) for column in ids) else pa.string()


def _are_integers(ids: pa.ChunkedArray, of: pa.DataType) -> bool:
    try:
        return bool(ids.cast(of).cast(pa.string()).equals(ids))
    except pa.ArrowInvalid:
        return False
