"""Small published generations: what `pipeline.run.publish` leaves, without the pipeline."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from stages.formats import mds

SEQ_LEN = 16


def publish(
    run: Path,
    rows: int,
    *,
    seq_len: int = SEQ_LEN,
    per_shard: int = 8,
    first: int = 0,
    held_out: int = 0,
    **options: Any,
) -> str:
    """Publish the next generation of `run`: row i begins with token `first` + i and has spans of 5,
    4, …, fill at its end.

    The rows held out beside them, if any, go on where these end.
    """
    catalog = run / "catalog.jsonl"
    number = len(catalog.read_text().splitlines()) + 1 if catalog.exists() else 1
    name = f"gen-{number:04d}"
    folder = run / "generations" / name
    _write(folder, range(first, first + rows), seq_len=seq_len, per_shard=per_shard, **options)
    if held_out:
        numbers = range(first + rows, first + rows + held_out)
        _write(folder / "held_out", numbers, seq_len=seq_len, per_shard=per_shard, **options)
    write_manifest(run, name, seq_len=seq_len)
    return name


def _write(folder: Path, firsts: range, *, seq_len: int, per_shard: int, **options: Any) -> None:
    """Rows that begin with the tokens `firsts`, in parts of one shard, and their index."""
    parts = [firsts[start : start + per_shard] for start in range(0, len(firsts), per_shard)]
    names = [f"part-{part:05}" for part in range(len(parts))]
    indexes = []
    for part, numbers in zip(names, parts, strict=True):
        columns = mds.columns_of_rows(seq_len)
        with mds.MDSWriter(folder / part, columns=columns, **options) as writer:
            for first in numbers:
                spans = np.array([5, 4][: 1 + (first - firsts[0]) % 2], np.uint32)
                writer.write(
                    {
                        "tokens": np.arange(seq_len, dtype=np.uint32) + np.uint32(first),
                        "spans": spans,
                    }
                )
        indexes.append(mds.read_index(folder / part))
        (folder / part / mds.INDEX).unlink()
    folder.mkdir(parents=True, exist_ok=True)
    mds.write_index(folder, mds.merge_indexes(dict(zip(names, indexes, strict=True))))


def write_manifest(run: Path, name: str, *, seq_len: int = SEQ_LEN) -> None:
    """The manifest of what lies in the folder, and its line in the catalog: a new one, or in place
    of the old one.
    """
    folder = run / "generations" / name
    rows, shards = _listed(folder)
    manifest = {
        "name": name,
        "identity": "0",
        "lineage": name,
        "supersedes": [],
        "rows": rows,
        "tokens": rows * 5,
        "seq_len": seq_len,
        "tokenizer": "cl100k_base",
        "vocab_size": 64,
    }
    held_out = None
    if (folder / "held_out").exists():
        rows, listed = _listed(folder / "held_out")
        held_out = {
            "rows": rows,
            "tokens": rows * 5,
            "documents": rows,
            "seq_len": seq_len,
            "shards": listed,
        }
    text = json.dumps({**manifest, "shards": shards, "held_out": held_out})
    (folder / "manifest.json").write_text(text)
    entry = {**manifest, "manifest_sha256": hashlib.sha256(text.encode()).hexdigest()}
    catalog = run / "catalog.jsonl"
    others = (
        [json.loads(line) for line in catalog.read_text().splitlines()] if catalog.exists() else []
    )
    known = {e["name"]: e for e in others} | {name: entry}
    new = run / "catalog.jsonl.new"
    new.write_text("".join(json.dumps(e) + "\n" for e in known.values()))
    # as the pipeline does it: whoever looks at this moment sees the one or the other
    new.replace(catalog)


def _listed(folder: Path) -> tuple[int, list[dict[str, Any]]]:
    """Rows, and the shards as the manifest lists them, of what lies in the folder."""
    shards = []
    for entry in mds.read_index(folder)["shards"]:
        basename = (entry["zip_data"] or entry["raw_data"])["basename"]
        data = (folder / basename).read_bytes()
        sha256 = hashlib.sha256(data).hexdigest()
        shards.append(
            {"basename": basename, "bytes": len(data), "sha256": sha256, "rows": entry["samples"]}
        )
    return sum(shard["rows"] for shard in shards), shards
