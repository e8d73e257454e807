"""Reading a WARC file in ranges gives what reading the whole file gives."""

import gzip
import random
from itertools import pairwise
from pathlib import Path
from unittest import mock

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from stages.read import ranges
from stages.read.fetch import FetchError, FetchOptions
from stages.read.ranges import ByteRange, equal_ranges, local_range
from stages.read.warc import ReadStats, Record, read_records
from stages.storage.files import write_atomically
from tests.support.damaged_warc import SHAPES, damage, damaged_file, pack, record

QUICK = FetchOptions(attempts=2, backoff_seconds=0)
SEEDS = st.integers(0, 1 << 60)


def read(path: Path, part: ByteRange = ranges.WHOLE) -> tuple[list[Record], ReadStats]:
    stats = ReadStats()
    records = list(read_records(path, max_payload_bytes=1 << 20, stats=stats, byte_range=part))
    assert [r.index for r in records] == list(range(len(records)))
    return records, stats


def parts_of(size: int, cuts: list[int]) -> list[ByteRange]:
    ends = [0, *sorted({cut % (size + 2) for cut in cuts} - {0}), None]
    return [ByteRange(*pair) for pair in pairwise(ends)]


def assert_add_up(path: Path, parts: list[ByteRange]) -> None:
    """What `read_records` promises of ranges that cover a file."""
    whole, expected = read(path)
    results = [read(path, part) for part in parts]
    together = [r for records, _ in results for r in records]
    assert [r._replace(index=0) for r in together] == [r._replace(index=0) for r in whole]
    stats = [s for _, s in results]
    for name in ("records", "truncated", "bytes_total", "framed_bytes", "lost_bytes",
                 "unreadable_bytes"):  # fmt: skip
        assert sum(getattr(s, name) for s in stats) == getattr(expected, name), name
    assert sum((s.skipped for s in stats), type(expected.skipped)()) == expected.skipped
    places = sum(s.damaged_places for s in stats)
    bounds = sum(s.bytes_total > 0 for s in stats) - 1
    assert expected.damaged_places <= places <= expected.damaged_places + max(0, bounds)


@given(
    seed=SEEDS,
    cuts=st.lists(st.integers(0, 1 << 20), max_size=4),
    look_back=st.sampled_from([0, 400, ranges.LOOK_BACK]),
)
def test_ranges_of_a_damaged_file_add_up(tmp_path_factory, seed, cuts, look_back):
    path = tmp_path_factory.getbasetemp() / "damaged.warc"
    path.write_bytes(damaged_file(seed).data)
    with mock.patch.object(ranges, "LOOK_BACK", look_back):
        assert_add_up(path, parts_of(path.stat().st_size, cuts))


@pytest.mark.parametrize("shape", SHAPES)
@given(seed=SEEDS, cuts=st.lists(st.integers(0, 1 << 20), max_size=4))
def test_ranges_of_an_undamaged_file_add_up(tmp_path_factory, shape, seed, cuts):
    path = tmp_path_factory.getbasetemp() / "whole.warc"
    rng = random.Random(seed)
    pages = [rng.randbytes(rng.randint(1, 900)).hex().encode() for _ in range(rng.randint(0, 9))]
    path.write_bytes(pack([record(page, i, b"\r\n") for i, page in enumerate(pages)], shape))
    for look_back in (0, ranges.LOOK_BACK):
        with mock.patch.object(ranges, "LOOK_BACK", look_back):
            assert_add_up(path, parts_of(path.stat().st_size, cuts))
    assert read(path)[1].damaged_places == 0


# -- archives inside the archive
# -----------------------------------------------------------------------------------------------


def nesting_archive(rng: random.Random) -> bytes:
    """Members, one of which is stored and contains an archive: its members can be seen in it.

    The crawler may have cut it short.
    """
    inner = pack([record(b"inner %d" % i, i, b"\r\n") for i in range(20)], "members")
    inner = inner[: rng.choice((len(inner), rng.randrange(len(inner))))]
    pages = [rng.randbytes(rng.randint(1, 300)).hex().encode() for _ in range(6)]
    members = [gzip.compress(record(page, i, b"\r\n"), mtime=0) for i, page in enumerate(pages)]
    members.insert(rng.randrange(7), gzip.compress(record(inner, 9, b"\r\n"), 0, mtime=0))
    return b"".join(members)


@given(seed=SEEDS, cuts=st.lists(st.integers(0, 1 << 20), max_size=4))
def test_ranges_that_meet_in_an_archive_inside_the_archive_add_up(tmp_path_factory, seed, cuts):
    path = tmp_path_factory.getbasetemp() / "nested.warc.gz"
    path.write_bytes(nesting_archive(random.Random(seed)))
    assert_add_up(path, parts_of(path.stat().st_size, cuts))


@given(seed=SEEDS, cuts=st.lists(st.integers(0, 1 << 20), min_size=1, max_size=4))
def test_an_inner_archive_that_is_too_large_is_an_error_and_never_a_document(
    tmp_path_factory, seed, cuts
):
    path = tmp_path_factory.getbasetemp() / "nested.warc.gz"
    path.write_bytes(nesting_archive(random.Random(seed)))
    with mock.patch.object(ranges, "LOOK_BACK", 0):
        try:
            assert_add_up(path, parts_of(path.stat().st_size, cuts))
        except ValueError as error:
            assert "cannot be read in ranges" in str(error)
            assert "input.split_bytes = 0" in str(error)


def test_the_error_of_an_inner_archive_says_where(tmp_path):
    inner = pack([record(b"inner %d" % i, i, b"\r\n") for i in range(20)], "members")
    outer = gzip.compress(record(inner, 9, b"\r\n"), 0, mtime=0)
    (tmp_path / "a.warc.gz").write_bytes(outer * 2)
    with mock.patch.object(ranges, "LOOK_BACK", 0):
        at = outer.index(b"\x1f\x8b\x08", 500)
        with pytest.raises(ValueError, match=f"byte {at:,}, .* goes on to byte {len(outer):,};"):
            read(tmp_path / "a.warc.gz", ByteRange(0, 500))


# -- files that cannot be divided
# -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["plain", "one member", "one frame"])
@pytest.mark.parametrize("look_back", [0, ranges.LOOK_BACK])
def test_what_has_no_members_to_divide_is_all_in_the_first_range(
    tmp_path, monkeypatch, shape, look_back
):
    monkeypatch.setattr(ranges, "LOOK_BACK", look_back)
    pages = [random.Random(i).randbytes(500).hex().encode() for i in range(5)]
    path = tmp_path / "a.warc"
    path.write_bytes(pack([record(page, i, b"\n") for i, page in enumerate(pages)], shape))
    counts = [len(read(path, p)[0]) for p in equal_ranges(path.stat().st_size, 1000)]
    assert counts == [5] + [0] * (len(counts) - 1) and len(counts) > 2


def test_an_unsupported_file_is_one_record_whatever_its_ranges(tmp_path):
    path = tmp_path / "a.arc.gz"
    path.write_bytes(gzip.compress(b"filedesc://a.arc 0.0.0.0 20090101\n") * 9)
    assert_add_up(path, equal_ranges(path.stat().st_size, 100))


def test_ranges_of_frames_with_a_dictionary_add_up(tmp_path):
    records = [record(b"words of page %d" % i * 9, i, b"\r\n") for i in range(40)]
    dictionary = zstandard.train_dictionary(2000, records)
    compress = zstandard.ZstdCompressor(dict_data=dictionary).compress
    raw = zstandard.compress(dictionary.as_bytes())
    head = b"\x5d\x2a\x4d\x18" + len(raw).to_bytes(4, "little") + raw
    path = tmp_path / "a.warc.zst"
    path.write_bytes(head + b"".join(map(compress, records)))
    assert_add_up(path, equal_ranges(path.stat().st_size, 700))
    assert len(read(path)[0]) == 40


@pytest.mark.parametrize(
    "size, split_bytes, expected",
    [
        (None, 10, [(0, None)]),
        (100, 0, [(0, None)]),
        (0, 10, [(0, None)]),
        (10, 10, [(0, None)]),
        (11, 10, [(0, 5), (5, None)]),
        (100, 30, [(0, 25), (25, 50), (50, 75), (75, None)]),
    ],
)
def test_ranges_are_equal_and_as_few_as_allowed(size, split_bytes, expected):
    assert equal_ranges(size, split_bytes) == expected


# -- objects
# -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large_file() -> bytes:
    """Five MB in members of 10 kB on average, of which some are damaged."""
    rng = random.Random(1)
    pages = [rng.randbytes(rng.randint(1, 10_000)).hex().encode() for _ in range(500)]
    members = [pack([record(page, i, b"\r\n")], "members") for i, page in enumerate(pages)]
    return b"".join(b"".join(damage(rng, members[i : i + 50])[0]) for i in range(0, 500, 50))


def object_of(bucket: str, data: bytes) -> str:
    uri = f"{bucket}/a.warc.gz"
    write_atomically(uri, data)
    return uri


def test_of_an_object_only_the_range_is_fetched_and_read_as_in_a_local_file(
    tmp_path, s3_bucket, monkeypatch, large_file
):
    monkeypatch.setattr(ranges, "LOOK_BACK", 1 << 18)
    monkeypatch.setattr("stages.read.fetch._PIECE", 300_000)
    path, uri = tmp_path / "a.warc.gz", object_of(s3_bucket, large_file)
    path.write_bytes(large_file)
    for part in equal_ranges(len(large_file), 1 << 20):
        with local_range(uri, part, options=QUICK) as copy:
            assert read(copy, part) == read(path, part)
            fetched = copy.stat().st_blocks * 512
        assert not copy.exists()
        assert fetched < part.size(len(large_file)) + (1 << 18) + (2 << 20) + (1 << 17)


def test_of_an_object_as_much_is_fetched_as_its_last_member_has(tmp_path, s3_bucket, large_file):
    path = tmp_path / "a.warc.gz"
    path.write_bytes(pack([record(b"a", 1, b"\n"), large_file, record(b"b", 2, b"\n")], "members"))
    uri = object_of(s3_bucket, path.read_bytes())
    for part in (ByteRange(0, 1000), ByteRange(1000, 2000), ByteRange(2000, None)):
        with local_range(uri, part, options=QUICK) as copy:
            assert read(copy, part) == read(path, part)


def test_the_dictionary_of_an_object_is_fetched(tmp_path, s3_bucket, monkeypatch):
    monkeypatch.setattr(ranges, "LOOK_BACK", 100)
    rng = random.Random(0)
    raw = rng.randbytes(100_000)
    compress = zstandard.ZstdCompressor(dict_data=zstandard.ZstdCompressionDict(raw)).compress
    pages = [raw[i : i + 90_000] + rng.randbytes(20_000) for i in range(200)]
    frames = [compress(record(page, i, b"\n")) for i, page in enumerate(pages)]
    path = tmp_path / "a.warc.zst"
    head = b"\x5d\x2a\x4d\x18" + len(raw).to_bytes(4, "little") + raw
    path.write_bytes(head + b"".join(frames))
    uri = object_of(s3_bucket, path.read_bytes())
    parts = equal_ranges(path.stat().st_size, 1 << 20)
    for part in parts:
        with local_range(uri, part, options=QUICK) as copy:
            records, stats = read(copy, part)
        assert (records, stats) == read(path, part)
        assert records and not stats.damaged_places


def test_a_range_of_an_object_that_is_absent_or_became_shorter(s3_bucket):
    with (
        pytest.raises(FetchError, match=r"none\.warc"),
        local_range(f"{s3_bucket}/none.warc", ByteRange(5, 9), options=QUICK),
    ):
        pass
    uri = object_of(s3_bucket, gzip.compress(b"WARC/1.0\r\n"))
    with local_range(uri, ByteRange(500, 900), options=QUICK) as copy:
        assert read(copy, ByteRange(500, 900))[0] == []
