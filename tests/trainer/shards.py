"""Small published generations: what `pipeline.catalog.publish` leaves, without the pipeline."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from stages import mds

SEQ_LEN = 16


def publish(run: Path, rows: int, *, seq_len: int = SEQ_LEN, per_shard: int = 8, first: int = 0, **options: Any) -> str:
    """Publish the next generation of `run`: row i begins with token `first` + i and has spans of 5, 4, …, fill at its end."""
    catalog = run / "catalog.jsonl"
    number = len(catalog.read_text().splitlines()) + 1 if catalog.exists() else 1
    name = f"gen-{number:04d}"
    folder = run / "generations" / name
    parts = [range(start, min(start + per_shard, rows)) for start in range(0, rows, per_shard)]
    names = [f"part-{part:05}" for part in range(len(parts))]
    indexes = []
    for part, numbers in zip(names, parts, strict=True):
        columns = {"tokens": f"ndarray:uint32:{seq_len}", "spans": "ndarray:uint32"}
        with mds.MDSWriter(folder / part, columns=columns, size_limit=None, **options) as writer:
            for i in numbers:
                spans = np.array([5, 4][: 1 + i % 2], np.uint32)
                tokens = np.arange(seq_len, dtype=np.uint32) + np.uint32(first + i)
                writer.write({"tokens": tokens, "spans": spans})
        indexes.append(mds.read_index(folder / part))
        (folder / part / mds.INDEX).unlink()
    folder.mkdir(parents=True, exist_ok=True)
    mds.write_index(folder, mds.merge_indexes(names, indexes))
    write_manifest(run, name, seq_len=seq_len)
    return name


def write_manifest(run: Path, name: str, *, seq_len: int = SEQ_LEN) -> None:
    """The manifest of what lies in the folder, and its line in the catalog: a new one, or in place of the old one."""
    folder, shards = run / "generations" / name, []
    for entry in mds.read_index(folder)["shards"]:
        basename = (entry["zip_data"] or entry["raw_data"])["basename"]
        data = (folder / basename).read_bytes()
        sha256 = hashlib.sha256(data).hexdigest()
        shards.append({"basename": basename, "bytes": len(data), "sha256": sha256, "rows": entry["samples"]})
    rows = sum(shard["rows"] for shard in shards)
    manifest = {"name": name, "identity": "0", "rows": rows, "tokens": rows * 5, "seq_len": seq_len, "tokenizer": "cl100k_base"}
    text = json.dumps({**manifest, "shards": shards})
    (folder / "manifest.json").write_text(text)
    entry = {**manifest, "manifest_sha256": hashlib.sha256(text.encode()).hexdigest()}
    catalog = run / "catalog.jsonl"
    others = [json.loads(line) for line in catalog.read_text().splitlines()] if catalog.exists() else []
    known = {e["name"]: e for e in others} | {name: entry}
    catalog.write_text("".join(json.dumps(e) + "\n" for e in known.values()))
