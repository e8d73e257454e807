"""The catalog and manifests of generations, and what differs between them and the files."""

import json

import pytest

from stages.formats import mds
from stages.formats.mds import Mismatch
from stages.storage.catalog import (
    GenerationError,
    generation_uri,
    hash_mismatches,
    index_mismatches,
    manifest_mismatches,
    raise_first,
    read_catalog,
    read_manifest,
    size_mismatches,
    split_mismatches,
    splits,
)
from tests.support.shards import SEQ_LEN, publish

SHARD = "part-00001/shard.00000.mds"


@pytest.fixture
def run(tmp_path):
    publish(tmp_path, 20, held_out=3)
    return tmp_path


@pytest.fixture
def folder(run):
    return run / "generations/gen-0001"


@pytest.fixture
def manifest(run):
    return read_manifest(str(run), read_catalog(str(run))[0])


@pytest.mark.parametrize("line", ["{", "[]", '{"name": "gen-0002"}', "null"])
def test_a_broken_catalog_names_its_line(run, line):
    with open(run / "catalog.jsonl", "a") as stream:
        stream.write(line + "\n")
    with pytest.raises(GenerationError, match=r"catalog.jsonl: line 2 is not an entry"):
        read_catalog(str(run))


def test_no_catalog_is_no_generation(tmp_path):
    assert read_catalog(str(tmp_path)) == []


def test_a_manifest_is_the_one_that_the_catalog_lists(run, folder, manifest):
    [entry] = read_catalog(f"{run}/")
    assert generation_uri(f"{run}/", "gen-0001") == str(folder)
    data = (folder / "manifest.json").read_bytes()
    assert manifest == json.loads(data) and manifest_mismatches(entry, data) == []
    assert manifest_mismatches(entry | {"rows": 24}, data) == [
        Mismatch("catalog.jsonl", "rows", 20, 24)
    ]
    [mismatch] = manifest_mismatches(entry, data + b" ")
    assert mismatch[:3] == ("manifest.json", "sha256 in catalog", entry["manifest_sha256"])


def test_a_whole_generation_has_no_mismatches(folder, manifest):
    assert list(splits(manifest)) == ["", "held_out/"]
    for prefix, split in splits(manifest).items():
        assert split_mismatches(folder / prefix, split) == []
    assert list(splits({"held_out": None})) == list(splits({})) == [""]


@pytest.mark.parametrize(
    "change, mismatch",
    [
        ({"rows": 21}, Mismatch("index.json", "rows", 21, 20)),
        ({"tokens": 321}, Mismatch("manifest.json", "tokens", 321, "room for 320")),
    ],
)
def test_totals_that_differ_from_the_manifest_are_named(folder, manifest, change, mismatch):
    assert split_mismatches(folder, manifest | change) == [mismatch]
    assert index_mismatches(folder, manifest | {"tokens": 20 * SEQ_LEN}) == []


def test_other_columns_than_the_manifest_s_are_named_by_shard(folder, manifest):
    mismatches = split_mismatches(folder, manifest | {"seq_len": 17})
    assert [(m.shard[:4], m.what) for m in mismatches] == [("part", "columns")] * 3
    assert "uint32:17" in mismatches[0].expected and "uint32:16" in mismatches[0].actual


def test_shards_that_differ_from_the_manifest_are_named(folder, manifest):
    first, second, third = manifest["shards"]
    size, sha256 = first["bytes"], second["sha256"]
    first["bytes"] += 1
    second["sha256"] = "0" * 64
    (folder / third["basename"]).unlink()
    missing = Mismatch(third["basename"], "file", "present", "missing")
    assert split_mismatches(folder, manifest) == [
        missing,
        Mismatch(first["basename"], "bytes by manifest", size + 1, size),
        Mismatch(second["basename"], "sha256 by manifest", "0" * 64, sha256),
    ]
    assert size_mismatches(folder, [third]) == [missing]
    with pytest.raises(GenerationError, match=f"^generation g: {SHARD}: sha256 by .*; restore the"):
        raise_first("g", hash_mismatches(folder, [first, second]))


@pytest.mark.parametrize(
    "change, expected, actual",
    [
        (lambda shards: shards.pop(), "('part-00002/shard.00000.mds', 4)", "none"),
        (lambda shards: shards[1].update(rows=9), f"('{SHARD}', 9)", f"('{SHARD}', 8)"),
        (lambda shards: shards.append(shards[0]), "none", "('part-00000/shard.00000.mds', 8)"),
        (
            lambda shards: shards.insert(0, shards.pop(1)),
            "('part-00000/shard.00000.mds', 8)",
            f"('{SHARD}', 8)",
        ),
    ],
)
def test_the_first_shard_that_index_and_manifest_do_not_share_is_named(
    folder, manifest, change, expected, actual
):
    if "9" in expected:
        change(manifest["shards"])
    else:
        index = mds.read_index(folder)
        change(index["shards"])
        mds.write_index(folder, index)
    mismatches = index_mismatches(folder, manifest)
    assert mismatches[-1] == Mismatch("index.json", "(shard, rows)", expected, actual)


def test_an_index_that_is_missing_or_broken_is_one_mismatch(folder, manifest):
    path = folder / "index.json"
    path.write_bytes(path.read_bytes()[:-50])
    [broken] = split_mismatches(folder, manifest)
    assert broken[:3] == ("index.json", "content", "an index of MDS shards")
    path.unlink()
    assert split_mismatches(folder, manifest) == [
        Mismatch("index.json", "file", "present", "missing")
    ]
