"""MDS shards: our bytes against mosaicml-streaming's, our reader against both, and every fault that
verify must see.
"""

import copy
import re
import uuid
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.formats.mds import (
    HASHES,
    MDSWriter,
    Mismatch,
    merge_indexes,
    read_index,
    read_shard,
    write_index,
)
from stages.formats.mds_verify import verify
from tests.support.examples import at_most

COLUMNS = {"tokens": "ndarray:uint32:2048", "spans": "ndarray:uint32"}
COMPRESSIONS = [None, "zstd", "zstd:3", "zstd:19"]
HASH_LISTS = [
    [],
    ["sha1", "xxh64"],
    ["sha256"],
    ["blake2b", "md5", "sha3_256", "xxh128", "xxh3_64"],
]


@pytest.fixture(scope="module")
def streaming() -> Any:
    pytest.importorskip("torch")
    from trainer.data.order import import_streaming

    return import_streaming()


def rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Packed rows as pack writes them: 2048 tokens and the lengths of a few spans."""
    rng = np.random.default_rng(seed)
    return [
        {
            "tokens": rng.integers(0, 1 << 32, 2048, dtype=np.uint32),
            "spans": rng.integers(0, 2048, int(rng.integers(1, 300)), dtype=np.uint32),
        }
        for _ in range(count)
    ]


def write(
    out: Path, samples: list[dict[str, Any]], columns: Mapping[str, str] = COLUMNS, **options: Any
) -> Path:
    with MDSWriter(out, columns=columns, **options) as writer:
        for sample in samples:
            writer.write(sample)
    return out


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def assert_same_bytes(
    streaming: Any, samples: list[dict[str, Any]], columns: dict[str, str], **options: Any
) -> None:
    with TemporaryDirectory() as scratch:
        with streaming.MDSWriter(out=f"{scratch}/theirs", columns=columns, **options) as writer:
            for sample in samples:
                writer.write(sample)
        write(Path(scratch, "ours"), samples, columns, **options)
        ours, theirs = files(Path(scratch, "ours")), files(Path(scratch, "theirs"))
        assert list(ours) == list(theirs)
        for name in theirs:
            assert ours[name] == theirs[name], name


def equal(left: Mapping[str, Any], right: Mapping[str, Any]) -> bool:
    return left.keys() == right.keys() and all(
        np.array_equal(left[key], right[key])
        and np.asarray(left[key]).dtype == np.asarray(right[key]).dtype
        for key in left
    )


# The same bytes as streaming


@pytest.mark.train
@at_most(50)
@given(
    count=st.integers(0, 40),
    seed=st.integers(0, 1 << 16),
    compression=st.sampled_from(COMPRESSIONS),
    hashes=st.sampled_from(HASH_LISTS),
    size_limit=st.integers(1, 100_000) | st.sampled_from([1, 8192, 1 << 26, (1 << 32) - 1]),
)
def test_packed_rows_give_the_bytes_of_streaming(
    streaming, count, seed, compression, hashes, size_limit
):
    options = {"compression": compression, "hashes": hashes, "size_limit": size_limit}
    assert_same_bytes(streaming, rows(count, seed), COLUMNS, **options)


@pytest.mark.train
@pytest.mark.parametrize("offset", range(-2, 3))
def test_the_shard_boundary_is_that_of_streaming(streaming, offset, tmp_path):
    samples = rows(6)
    # `size_limit` is itself in the header: five digits, as here
    index = read_index(write(tmp_path / "ours", samples[:3], size_limit=99_999))
    whole = index["shards"][0]["raw_data"]["bytes"]
    assert_same_bytes(streaming, samples, COLUMNS, size_limit=whole + offset)


@st.composite
def arrays(draw: st.DrawFn) -> tuple[str, list[np.ndarray]]:
    """An encoding and a few arrays for it; lengths on both sides of one byte and of two."""
    lengths = st.integers(1, 4) | st.sampled_from([255, 256, 65_535, 65_536])
    sizes = draw(st.lists(lengths, min_size=1, max_size=4))
    dtype = draw(st.sampled_from([np.dtype("uint16"), np.dtype("uint32")]))
    encoding = f"ndarray:{dtype}"
    if draw(st.booleans()):
        sizes, encoding = sizes[:1] * len(sizes), f"ndarray:{dtype}:{sizes[0]}"
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    return encoding, [np.frombuffer(rng.bytes(dtype.itemsize * size), dtype) for size in sizes]


@pytest.mark.train
@given(arrays(), st.text(min_size=1, max_size=5), st.sampled_from([1, 500, 1 << 26]))
def test_every_array_encoding_gives_the_bytes_of_streaming(streaming, case, name, size_limit):
    encoding, values = case
    tail = f"{name}~"
    samples = [{name: value, tail: np.full(1, i, np.uint32)} for i, value in enumerate(values)]
    columns = {tail: "ndarray:uint32:1", name: encoding}
    assert_same_bytes(streaming, samples, columns, size_limit=size_limit, hashes=["xxh64"])


@pytest.mark.train
@pytest.mark.parametrize("compression", ["zstd:1", "zstd:3"])
def test_large_shards_compress_to_the_bytes_of_streaming(streaming, compression):
    # from a few MB on, zstd's single- and multi-threaded paths cut the data differently
    draws = np.random.default_rng(0).integers(0, 50_000, 6_000_000).astype(np.uint32)
    samples = [{"tokens": draws[i : i + 2048]} for i in range(0, len(draws) - 2048, 2048)]
    columns = {"tokens": "ndarray:uint32:2048"}
    assert_same_bytes(streaming, samples, columns, compression=compression, hashes=["sha256"])


@pytest.mark.train
def test_we_have_the_hashes_of_streaming(streaming):
    from streaming.base.hashing import get_hashes

    assert set(HASHES) == get_hashes()


# Reading


@given(arrays())
def test_arrays_read_back(case):
    encoding, values = case
    with TemporaryDirectory() as scratch:
        out = write(Path(scratch), [{"a": value} for value in values], {"a": encoding})
        found = [sample["a"] for sample in read_shard(out / "shard.00000.mds")]
    assert [(a.dtype, a.shape, a.tobytes()) for a in found] == [
        (a.dtype, a.shape, a.tobytes()) for a in values
    ]


@pytest.mark.train
@pytest.mark.parametrize(
    "encoding, value",
    [("str", "text"), ("uint32", 7), ("ndarray:int16:2", np.ones(2, np.int16)), ("pkl", ())],
)
def test_a_shard_with_a_foreign_column_is_refused_by_name(streaming, tmp_path, encoding, value):
    columns = {"a": "ndarray:uint32:1", "b": encoding}
    with streaming.MDSWriter(out=str(tmp_path), columns=columns) as writer:
        writer.write({"a": np.ones(1, np.uint32), "b": value})
    expected = "ndarray:uint32 or ndarray:uint32:N, or of uint16"
    assert verify(tmp_path) == [
        Mismatch("shard.00000.mds", "encoding of column 'b'", expected, encoding)
    ]
    with pytest.raises(
        ValueError,
        match=rf"mds: encoding of column 'b': expected {expected}, found {encoding}; rerun",
    ):
        next(read_shard(tmp_path / "shard.00000.mds"))


@pytest.mark.parametrize("compression", [None, "zstd:3"])
def test_rows_read_back_in_order_over_all_shards(tmp_path, compression):
    samples = rows(50)
    out = write(tmp_path / "out", samples, compression=compression, size_limit=60_000)
    names = [
        shard["zip_data" if compression else "raw_data"]["basename"]
        for shard in read_index(out)["shards"]
    ]
    found = [sample for name in names for sample in read_shard(out / name)]
    assert len(names) > 3 and len(found) == 50
    assert all(map(equal, found, samples))


@pytest.mark.train
@pytest.mark.filterwarnings(
    "ignore:divide by zero:RuntimeWarning"
)  # streaming, at the empty shard 0 of size_limit 1
@pytest.mark.parametrize("compression", [None, "zstd:3"])
@pytest.mark.parametrize("size_limit", [1, 30_000])
def test_streaming_reads_a_merged_dataset_in_our_order(
    streaming, tmp_path, compression, size_limit
):
    # streaming names its locks after the folder: a used name may hang
    root = tmp_path / uuid.uuid4().hex
    samples = rows(24)
    options: dict[str, Any] = {
        "compression": compression,
        "size_limit": size_limit,
        "hashes": ["sha1"],
    }
    write(root / "part-00000", samples[:15], **options)
    write(root / "part-00001", [], **options)
    write(root / "part-00002", samples[15:], **options)
    parts = ["part-00000", "part-00001", "part-00002"]
    write_index(root, merge_indexes({part: read_index(root / part) for part in parts}))
    assert verify(root) == []
    # its shared memory is freed when this process ends; with DataLoader workers it would outlive a
    # kill
    found = list(streaming.StreamingDataset(local=str(root), shuffle=False, batch_size=1))
    assert len(found) == 24
    assert all(map(equal, found, samples))


# Writing that fails


def test_an_exception_leaves_no_index(tmp_path):
    with (
        pytest.raises(RuntimeError, match="task died"),
        MDSWriter(tmp_path, columns=COLUMNS, size_limit=1) as writer,
    ):
        for sample in rows(3):
            writer.write(sample)
        raise RuntimeError("task died")
    assert files(tmp_path) and "index.json" not in files(tmp_path)
    assert verify(tmp_path) == [Mismatch("index.json", "file", "present", "missing")]


def test_a_failing_last_shard_leaves_no_index(tmp_path):
    writer = MDSWriter(tmp_path, columns=COLUMNS)
    (tmp_path / "shard.00000.mds").mkdir()
    with pytest.raises(IsADirectoryError), writer:
        writer.write(rows(1)[0])
    assert not (tmp_path / "index.json").exists()


def test_a_folder_that_holds_anything_is_refused_and_kept(tmp_path):
    before = files(write(tmp_path / "out", rows(2)))
    with pytest.raises(FileExistsError, match="out is not empty"):
        MDSWriter(tmp_path / "out", columns=COLUMNS)
    assert files(tmp_path / "out") == before


@pytest.mark.parametrize(
    "encoding, value, message",
    [
        ("ndarray:uint32:4", np.zeros(3, np.uint32), r"\(4,\), got uint32 of shape \(3,\)"),
        ("ndarray:uint32:4", np.zeros((4, 1), np.uint32), r"got uint32 of shape \(4, 1\)"),
        ("ndarray:uint32:4", np.zeros(4, np.int64), "must be uint32 of shape .*, got int64"),
        ("ndarray:uint16:4", np.zeros(4, np.uint32), "must be uint16 of shape .*, got uint32"),
        ("ndarray:uint32", np.zeros(4, ">u4"), "must be uint32 of shape .*, got >u4"),
        ("ndarray:uint32", np.zeros(0, np.uint32), r"\(n,\), got uint32 of shape \(0,\)"),
        ("ndarray:uint32", np.array(3, np.uint32), r"\(n,\), got uint32 of shape \(\)"),
        ("ndarray:uint32", np.ones((1, 2), np.uint32), r"\(n,\), got uint32 of shape \(1, 2\)"),
    ],
)
def test_a_value_that_does_not_fit_is_named_and_left_out(tmp_path, encoding, value, message):
    columns = {"bad": encoding, "row": "ndarray:uint32:1"}
    with (
        MDSWriter(tmp_path, columns=columns) as writer,
        pytest.raises(ValueError, match=f"column 'bad': .*({message})"),
    ):
        writer.write({"bad": value, "row": np.ones(1, np.uint32)})
    assert read_index(tmp_path)["shards"] == []


# Merging


def test_merging_leaves_the_parts_alone(tmp_path):
    index = read_index(write(tmp_path, rows(3), compression="zstd", size_limit=20_000))
    before = copy.deepcopy(index)
    merge_indexes({"a": index, "b": index})
    assert index == before


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "7", '{"shards": [{}]}', '{"shards": 3}', '{"shards": [[]]}']
)
def test_an_unreadable_index_is_an_error_and_a_fault(tmp_path, text):
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(ValueError, match=r"index\.json"):
        read_index(tmp_path)
    assert [(fault.shard, fault.what) for fault in verify(tmp_path)] == [("index.json", "content")]


# Verifying


@pytest.fixture(params=[None, "zstd:3"])
def part(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write(
        tmp_path / "part",
        rows(30),
        compression=request.param,
        size_limit=80_000,
        hashes=["sha1", "xxh64"],
    )


def shard_paths(part: Path) -> list[Path]:
    return sorted(part.glob("shard.*"))


def test_a_whole_dataset_has_no_faults(part):
    assert verify(part) == []


@pytest.mark.parametrize("position", [0, 4, 9, 200, -1])
def test_a_flipped_byte_names_the_shard(part, position):
    path = shard_paths(part)[1]
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(data)
    faults = verify(part)
    assert {fault.shard for fault in faults} == {path.name}
    assert {"sha1", "xxh64"} <= {fault.what for fault in faults}


def test_a_truncated_shard_is_named_with_its_sizes(part):
    path = shard_paths(part)[2]
    data = path.read_bytes()
    path.write_bytes(data[:-100])
    faults = verify(part)
    assert Mismatch(path.name, "bytes", len(data), len(data) - 100) in faults
    assert {fault.shard for fault in faults} == {path.name}
    with pytest.raises(ValueError, match=path.name):
        next(read_shard(path))


def test_a_missing_shard_is_named(part):
    path = shard_paths(part)[0]
    path.unlink()
    assert verify(part) == [Mismatch(path.name, "file", "present", "missing")]


def test_a_wrong_count_in_the_index_is_seen(part):
    index = read_index(part)
    right = index["shards"][1]["samples"]
    index["shards"][1]["samples"] = right + 1
    write_index(part, index)
    assert verify(part) == [
        Mismatch(shard_paths(part)[1].name, "samples in header", right + 1, right)
    ]


def test_a_shard_listed_twice_is_seen(part):
    index = read_index(part)
    write_index(part, {**index, "shards": [*index["shards"], index["shards"][0]]})
    assert verify(part) == [Mismatch(shard_paths(part)[0].name, "times in index", 1, 2)]


def test_a_wrong_hash_of_the_decompressed_shard_is_seen(tmp_path):
    index = read_index(write(tmp_path, rows(2), compression="zstd", hashes=["sha1"]))
    hashes = index["shards"][0]["raw_data"]["hashes"]
    right, hashes["sha1"] = hashes["sha1"], "0" * 40
    write_index(tmp_path, index)
    assert verify(tmp_path) == [Mismatch("shard.00000.mds.zstd", "sha1", "0" * 40, right)]


@pytest.mark.parametrize(
    "damage, found",
    [(lambda data: data[:-1], "a frame cut short"), (lambda data: data + b"x", "after")],
)
def test_more_or_less_than_one_frame_is_refused(tmp_path, damage, found):
    path = write(tmp_path, rows(2), compression="zstd") / "shard.00000.mds.zstd"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=f"zstd: expected one whole frame, found .*{found}"):
        next(read_shard(path))


@pytest.mark.parametrize(
    "position, value, what",
    [
        (0, 1 << 30, "bytes, to hold 1,073,741,824 offsets"),
        (0, 2, "last offset, the end of the file"),
        (4, 0, "header"),
        (8, 1 << 31, "offset 2"),
        (12, 0, "offset 2"),
        (16, 10_000, "last offset, the end of the file"),
        (20, 0, "header"),
        (
            -14,
            1,
            "bytes of sample 2 by its columns",
        ),  # its size: the last sample is uint32 6, then shape and value of a, then b
    ],
)
def test_each_part_of_the_layout_is_checked(tmp_path, position, value, what):
    sample = {"a": np.ones(1, np.uint32), "b": np.full(1, 7, np.uint32)}
    out = write(tmp_path, [sample] * 3, {"a": "ndarray:uint32", "b": "ndarray:uint32:1"})
    path = out / "shard.00000.mds"
    data = bytearray(path.read_bytes())
    at = position % len(data)
    data[at : at + 4] = value.to_bytes(4, "little")
    path.write_bytes(data)
    assert [(fault.shard, fault.what) for fault in verify(out)] == [(path.name, what)]


@given(
    position=st.integers(0, 1 << 20),
    value=st.binary(min_size=1, max_size=8),
    cut=st.integers(0, 20),
)
@pytest.mark.parametrize("compression", [None, "zstd"])
def test_even_without_hashes_what_verify_passes_can_be_read(compression, position, value, cut):
    columns = {"a": "ndarray:uint32", "b": "ndarray:uint32"}
    samples = [
        {"a": np.ones(n, np.uint32), "b": np.arange(n * n).astype(np.uint32)} for n in range(1, 6)
    ]
    with TemporaryDirectory() as scratch:
        out = write(Path(scratch), samples, columns, compression=compression)
        (path,) = shard_paths(out)
        data = bytearray(path.read_bytes())
        at = position % len(data)
        data[at : at + len(value)] = value
        path.write_bytes(data[: len(data) - cut])
        if not verify(out):
            try:
                assert len(list(read_shard(path))) == 5
            except ValueError as error:  # the shape of an array is part of its value
                assert re.search("column '[ab]': shape does not fit in", str(error))
