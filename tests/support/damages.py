"""Ways to damage a published generation, and the message that names each."""

import json
import os
from pathlib import Path

SHARD = "part-00001/shard.00000.mds"


def folder(run: Path) -> Path:
    return run / "generations" / "gen-0001"


def missing_shard(run: Path) -> None:
    (folder(run) / SHARD).unlink()


def short_shard(run: Path) -> None:
    os.truncate(folder(run) / SHARD, 100)


def flipped_byte(run: Path) -> None:
    path = folder(run) / SHARD
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)


def truncated_index(run: Path) -> None:
    path = folder(run) / "index.json"
    path.write_bytes(path.read_bytes()[:-50])


def missing_index(run: Path) -> None:
    (folder(run) / "index.json").unlink()


def edit_index(run: Path, change) -> None:
    index = json.loads((folder(run) / "index.json").read_text())
    change(index["shards"])
    (folder(run) / "index.json").write_text(json.dumps(index))


def grown_index(run: Path) -> None:
    edit_index(run, lambda shards: shards.append(shards[0]))


def swapped_shards(run: Path) -> None:
    edit_index(run, lambda shards: shards.insert(0, shards.pop(1)))


def other_seq_len(run: Path) -> None:
    edit_index(
        run,
        lambda shards: [
            shard.update(column_encodings=["ndarray:uint32", "ndarray:uint32:8"])
            for shard in shards
        ],
    )


def changed_manifest(run: Path) -> None:
    path = folder(run) / "manifest.json"
    path.write_text(path.read_text().replace('"rows": 20', '"rows": 21'))


def missing_manifest(run: Path) -> None:
    (folder(run) / "manifest.json").unlink()


def catalog_of_other_rows(run: Path) -> None:
    path = run / "catalog.jsonl"
    path.write_text(path.read_text().replace('"rows": 20', '"rows": 24'))


QUICK = {
    missing_shard: rf"{SHARD}: file: expected present, found missing",
    short_shard: rf"{SHARD}: bytes by manifest: expected \d+, found 100",
    truncated_index: "index.json: content: expected an index of MDS shards, found .*cannot be read",
    missing_index: "index.json: file: expected present, found missing",
    grown_index: "index.json: rows: expected 20, found 28",
    swapped_shards: r"index.json: \(shard, rows\): expected \('part-00000/shard.00000.mds', 8\), found \('part-00001",
    other_seq_len: "part-00000/shard.00000.mds: columns: expected .*uint32:16.*found .*uint32:8",
    changed_manifest: r"manifest.json: sha256 in catalog: expected \w{64}, found \w{64}",
    missing_manifest: "manifest.json: expected a readable file, found No such file",
    catalog_of_other_rows: "catalog.jsonl: rows: expected 20, found 24",
}


FULL = {**QUICK, flipped_byte: rf"{SHARD}: sha256 by manifest: expected \w{{64}}, found \w{{64}}"}
