"""Text inputs: every common layout, encoding and compression is read; damage is counted and named."""

import bz2
import gzip
import json
import lzma
import struct
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from stages.read.records import InputConfig, TextRecord, TextStats, columns_of, id_type, read_texts

JSONL = InputConfig(format="jsonl", id_column="id", url_column="url")
PARQUET = InputConfig(format="parquet")
ROWS = [
    {"id": n, "text": f"Text {n}: “quoted”, [brackets] {{}} \\ 语言\n" * 3, "tags": [{"id": n}]}
    for n in range(40)
]


def read(
    folder: Path, data: bytes, config: InputConfig = JSONL
) -> tuple[list[TextRecord], TextStats]:
    path, stats = folder / "input", TextStats()
    path.write_bytes(data)
    return list(read_texts(path, config, name="s3://b/x [1]", stats=stats)), stats


def dumped(rows: list[dict], **options) -> list[str]:
    return [json.dumps(row, ensure_ascii=False, **options) for row in rows]


LAYOUTS = {
    "lines": lambda rows: "\n".join(dumped(rows)),
    "crlf": lambda rows: "".join(f"{row}\r\n\r\n" for row in dumped(rows)),
    "record separators": lambda rows: "".join(f"\x1e{row}\n" for row in dumped(rows)),
    "pretty record separators": lambda rows: "".join(f"\x1e{r}\n" for r in dumped(rows, indent=1)),
    "one array": lambda rows: json.dumps(rows),
    "pretty array": lambda rows: json.dumps(rows, indent=4, ensure_ascii=False),
    "array of lines": lambda rows: "[\n" + ",\n".join(dumped(rows)) + "\n]\n",
    "an array a line": lambda rows: "".join(f"[{row}]\n" for row in dumped(rows)),
    "pretty": lambda rows: "\n".join(dumped(rows, indent=2)),
    "no separator": lambda rows: "".join(dumped(rows)),
    "commas after lines": lambda rows: ",\n".join(dumped(rows)),
}
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"]


def skippable(data: bytes) -> bytes:
    return b"\x53\x2a\x4d\x18" + struct.pack("<I", len(data)) + data


def long_window(data: bytes) -> bytes:
    options = zstandard.ZstdCompressionParameters(window_log=31, enable_ldm=False)
    compressor = zstandard.ZstdCompressor(compression_params=options).compressobj()
    return compressor.compress(data) + compressor.flush()


PACKED = {
    "none": lambda data: data,
    "gzip": gzip.compress,
    "zstd": zstandard.compress,
    "zstd, long window": long_window,
    "xz": lzma.compress,
    "bzip2": bz2.compress,
}


def in_members(name: str, data: bytes, cut: int) -> bytes:
    """As two members, with what may be between and after them."""
    between = {"gzip": b"\0" * 7, "zstd": skippable(b"seek table"), "xz": b"\0" * 8}
    return b"".join(PACKED[name](d) + between.get(name, b"") for d in (data[:cut], data[cut:]))


def texts(records: list[TextRecord]) -> list[str]:
    return [record.text for record in records if record.error is None]


rows = st.lists(
    st.fixed_dictionaries(
        {
            "text": st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")),
            "more": st.lists(st.text() | st.booleans()),
        }
    ),
    min_size=1,
    max_size=5,
)


@given(
    rows,
    st.sampled_from(sorted(LAYOUTS)),
    st.sampled_from(ENCODINGS),
    st.sampled_from(sorted(PACKED)),
    st.floats(0, 1),
)
def test_rows_do_not_depend_on_layout_encoding_and_compression(
    tmp_path_factory, rows, layout, encoding, packed, cut
):
    data = LAYOUTS[layout](rows).encode(encoding)
    folder = tmp_path_factory.getbasetemp()
    for content in (PACKED[packed](data), in_members(packed, data, int(cut * len(data)))):
        if packed == "none":
            content = data
        records, stats = read(folder, content)
        assert texts(records) == [row["text"] for row in rows]
        assert [r.position for r in records] == list(range(len(rows)))
        assert (stats.damaged_places, stats.damage) == (0, "")


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_a_long_file_is_read_in_parts(tmp_path, layout):
    rows = [{"text": f"{n} " * (40_000 if n % 7 == 0 else 100)} for n in range(60)]
    records, _ = read(tmp_path, LAYOUTS[layout](rows).encode())
    assert texts(records) == [row["text"] for row in rows]


@pytest.mark.parametrize("packed", sorted(PACKED.keys() - {"none"}))
@pytest.mark.parametrize("layout", ["lines", "pretty"])
def test_a_cut_keeps_the_rows_before_it_and_is_counted(tmp_path, packed, layout):
    whole = PACKED[packed](LAYOUTS[layout](ROWS).encode())
    expected = [row["text"] for row in ROWS]
    for cut in {11, len(whole) // 3, len(whole) // 2, len(whole) - 9, len(whole) - 1}:
        try:
            records, stats = read(tmp_path, whole[:cut])
        except ValueError as error:
            assert "s3://b/x [1]: none of 1 rows" in str(error) and f"{cut:,}" in str(error)
            continue
        assert [r.error for r in records[-1:]] == ["damaged"] and stats.damaged_places == 1
        assert f"cut short at byte {cut:,}" in stats.damage
        assert texts(records) == expected[: len(texts(records))]
        assert {r.error for r in records[:-1]} <= {None}


@pytest.mark.parametrize("packed", ["gzip", "zstd", "xz", "bzip2"])
def test_what_follows_the_data_is_counted(tmp_path, packed):
    whole = PACKED[packed](LAYOUTS["lines"](ROWS).encode())
    records, stats = read(tmp_path, whole + b"\n<!-- cached -->")
    assert len(texts(records)) == 40 and records[-1].error == "damaged"
    assert stats.unreadable_bytes == 16 and f"at byte {len(whole):,}" in stats.damage
    assert read(tmp_path, whole + bytes(1000))[1].damaged_places == 0


@given(st.sampled_from(["gzip", "xz", "bzip2", "zstd"]), st.data())
def test_a_wrong_byte_is_reported_unless_all_rows_are_right(tmp_path_factory, packed, data):
    compress = zstandard.ZstdCompressor(write_checksum=True).compress
    whole = bytearray(
        (compress if packed == "zstd" else PACKED[packed])(LAYOUTS["lines"](ROWS).encode())
    )
    whole[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        records, stats = read(tmp_path_factory.getbasetemp(), bytes(whole))
    except ValueError as error:
        assert str(error).startswith("s3://b/x [1]: ")
        return
    assert stats.damaged_places or texts(records) == [row["text"] for row in ROWS]


# -- rows that are wrong
# ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layout",
    ["lines", "crlf", "pretty", "pretty array", "array of lines", "record separators", "one array"],
)
@pytest.mark.parametrize("number", [0, 7, 39])
def test_a_damaged_row_costs_that_row(tmp_path, layout, number):
    number = number or int(layout == "one array")  # nothing tells its first row from what is in it
    text = LAYOUTS[layout](ROWS)
    key = f'"id": {number},'
    at = text.index(key)
    records, _ = read(tmp_path, (text[:at] + '"id" ' + text[at + len(key) :]).encode())
    assert texts(records) == [row["text"] for row in ROWS if row["id"] != number]
    assert [r.error for r in records if r.error] == ["bad_json"]


@pytest.mark.parametrize("layout", ["lines", "pretty", "pretty array"])
def test_bytes_that_are_not_utf_8_cost_their_row(tmp_path, layout):
    data = LAYOUTS[layout](ROWS).encode().replace("Text 9: “".encode(), b"Text 9: \x93", 1)
    records, _ = read(tmp_path, data)
    assert len(texts(records)) == 39 and records[9].error == "bad_json"


def test_an_array_without_its_end_is_counted(tmp_path):
    records, _ = read(tmp_path, LAYOUTS["array of lines"](ROWS).encode()[:-5])
    assert len(texts(records)) == 39 and records[-1].error == "bad_json"
    records, _ = read(tmp_path, LAYOUTS["array of lines"](ROWS).encode()[:-3])
    assert len(texts(records)) == 40 and "ends inside an array" in records[-1].details


def test_a_line_may_be_nested_or_long(tmp_path, monkeypatch):
    monkeypatch.setattr("stages.read.json_rows._MAX_ROW", 100_000)
    odd = ['{"text": ' + "[" * 40_000, '{"text": "' + "x" * 200_000 + '"}', '{"text": "good"}']
    for lines in (odd, odd[::-1]):
        records, _ = read(tmp_path, "\n".join(lines).encode())
        assert texts(records) == ["good"]
        assert [r.error for r in records if r.error] == ["bad_json"] * 2


@pytest.mark.parametrize(
    "data, message",
    [
        (b"id,text\n1,a\n2,b\n", "none of 3 rows can be read; line 1: Expecting value"),
        (b"{'text': 'a'}\n", "none of 1 rows can be read; line 1: Expecting property name"),
        (b'["a", "b"]', "none of 2 rows can be read; line 1: str, not an object"),
        (b'{"body": "x"}\n' * 2, "no column 'text'; it has body"),
        (b"PK\x03\x04" + bytes(40), "holds a zip archive"),
        (gzip.compress(b"a.jsonl".ljust(257, b"\0") + b"ustar"), "holds a tar archive"),
        (gzip.compress(gzip.compress(b'{"text": "a"}')), "holds gzip data"),
        (b"PAR1" + bytes(40) + b"PAR1", "holds a Parquet file"),
        (b"<!DOCTYPE html><html>", "holds HTML"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"\x04\x22\x4d\x18" + bytes(20), "lz4"),
        (bytes(1000), "holds zeros"),
        (b"WARC/1.0\r\n", "holds a WARC file"),
        (
            gzip.compress(b"x" * 1000)[:11],
            "none of 1 rows can be read; gzip data cut short at byte 11",
        ),
    ],
)
def test_what_holds_no_document_is_refused_by_name(tmp_path, data, message):
    with pytest.raises(ValueError) as error:
        read(tmp_path, data)
    assert str(error.value).startswith("s3://b/x [1]: ") and message in str(error.value)


def test_a_file_that_cannot_be_opened_is_named(tmp_path):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(
            ValueError, match=r"s3://b: cannot be read \(\[Errno \d+\] .*; is it whole"
        ):
            list(read_texts(path, JSONL, name="s3://b", stats=TextStats()))


def test_null_texts_and_empty_files_are_no_fault(tmp_path):
    assert [r.error for r in read(tmp_path, b'{"text": null}\n{"text": 1}')[0]] == ["no_text"] * 2
    for data in (b"", gzip.compress(b""), lzma.compress(b""), bz2.compress(b""), b"\n\n", b"[]"):
        assert read(tmp_path, data)[0] == []


def test_columns_and_type_of_the_id_are_those_of_the_first_good_row(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(lzma.compress(b"[broken,\n" + LAYOUTS["pretty array"](ROWS).encode()[1:]))
    assert columns_of(path, JSONL, name="x") == ["id", "text", "tags"]
    assert id_type(path, JSONL) == "int64"


# -- Parquet
# ---------------------------------------------------------------------------------------


def parquet(folder: Path, table: pa.Table) -> bytes:
    pq.write_table(table, folder / "table")
    return (folder / "table").read_bytes()


def test_parquet_strings_that_are_not_utf_8_are_replaced(tmp_path):
    strings = pa.Array.from_buffers(
        pa.string(), 2, pa.array([b"caf\xe9", b"good"], pa.binary()).buffers()
    )
    records, _ = read(tmp_path, parquet(tmp_path, pa.table({"text": strings})), PARQUET)
    assert texts(records) == ["caf\ufffd", "good"]


@pytest.mark.parametrize(
    "column",
    [pa.array(["a"]).dictionary_encode(), pa.array([b"a"]), pa.array(["a"], pa.large_string())],
)
def test_parquet_texts_have_many_types(tmp_path, column):
    assert texts(read(tmp_path, parquet(tmp_path, pa.table({"text": column})), PARQUET)[0]) == ["a"]


def test_parquet_files_that_cannot_be_read_are_named(tmp_path):
    whole = parquet(tmp_path, pa.table({"text": ["a text"] * 1000}))
    for data, message in [
        (whole[:-20], "cannot be read"),
        (b'{"text": "a"}\n', "cannot be read"),
        (gzip.compress(whole), "is it gzip data?"),
        (parquet(tmp_path, pa.table({"body": ["a"]})), "no column 'text'; it has body"),
        (parquet(tmp_path, pa.table({"text": [1]})), "column 'text' holds int64"),
    ]:
        with pytest.raises(ValueError) as error:
            read(tmp_path, data, PARQUET)
        assert str(error.value).startswith("s3://b/x [1]: ") and message in str(error.value)
