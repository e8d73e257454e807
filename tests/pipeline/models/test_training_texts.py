"""Documents of files and of rows of a run; errors name the source and say what to do."""

import gzip
import hashlib
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from pipeline.models.training_texts import Source, check_where, documents, fingerprint, run_rows
from stages.read import compression
from tests.support.inline import make_config, run_inline
from tests.support.paths import ROOT

TEXTS = [
    "The river rises in the mountains and flows west.",
    "Its valley has been settled since the Bronze Age.",
    "short",
    "Most of its towns still hold a weekly market, on the square before the church.",
]


def _damaged() -> bytes:
    """A Parquet file with a sound footer over broken pages."""
    sink = io.BytesIO()
    pq.write_table(
        pa.table({"text": TEXTS * 100}), sink, compression="snappy", use_dictionary=False
    )
    data = bytearray(sink.getvalue())
    data[300:-400] = b"\xff" * len(data[300:-400])
    return bytes(data)


PACKED = {
    "gz": gzip.compress(" ".join(TEXTS).encode(), mtime=0),
    "zst": zstandard.compress("\n\n".join(TEXTS).encode()),
}
DAMAGED = _damaged()


def test_every_format_gives_the_same_documents(tmp_path: Path) -> None:
    found = ["one two\nthree", "four"]
    lines = "".join(json.dumps({"text": d, "n": 1}) + "\n" for d in found).encode()
    blocks = b"\n\none two\nthree\n \n\nfour\n"
    bom = "\ufeff".encode()
    files = {
        "a.txt": blocks,
        "bom.txt": bom + blocks.strip(),
        "a.txt.gz": gzip.compress(blocks, mtime=0),
        "a.jsonl": lines,
        "blank.jsonl": lines.replace(b"\n", b"\n\n \r\n"),
        "bom.jsonl": bom + lines,
        "null.jsonl": b'{"text": null}\n' + lines,
        "a.jsonl.gz": gzip.compress(bom + lines, mtime=0),
        "a.jsonl.zst": zstandard.compress(lines),
        "frames.jsonl.zst": b"".join(map(zstandard.compress, (lines[:9], b"", lines[9:]))),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    types = [
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.dictionary(pa.int32(), pa.string()),
    ]
    for number, type in enumerate(types):
        pq.write_table(
            pa.table({"text": pa.array([None, *found], type)}), tmp_path / f"{number}.parquet"
        )
    for name in [*files, *(f"{number}.parquet" for number in range(len(types)))]:
        assert [d.strip() for d in documents(tmp_path / name)] == found, name


def test_a_zst_file_larger_than_a_piece_is_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compression, "_CHUNK", 7)
    texts = [f"{n} of many" for n in range(20_000)]
    data = "".join(json.dumps({"text": t}) + "\n" for t in texts).encode()
    packed = zstandard.compress(data[:50_000]) + zstandard.compress(data[50_000:])
    (tmp_path / "a.jsonl.zst").write_bytes(packed)
    assert list(documents(tmp_path / "a.jsonl.zst")) == texts


@pytest.mark.parametrize(
    "name, data, message",
    [
        (
            "a.jsonl",
            b'{"text": "a"}\n{"body": "b"}\n',
            r"a.jsonl, line 2: no text in column 'text', only \['body'\]",
        ),
        ("a.jsonl", b'\n{"text": ["b"]}\n', "line 2: no text in column 'text', only list"),
        ("a.jsonl", b"null\n", "line 1: no text in column 'text', only NoneType"),
        ("a.jsonl", b"[1]\n", "line 1: no text in column 'text', only int"),
        ("a.jsonl", b"{", "a.jsonl, line 1: not JSON"),
        ("a.jsonl", b"[" * 100_000, r"a.jsonl, line 1: not JSON \(the file ends inside an array"),
        ("a.jsonl", b"1" * 5000, r"a.jsonl, line 1: not JSON \(Exceeds the limit"),
        ("a.txt", b"caf\xe9", r"source .*a\.txt: not UTF-8"),
        (
            "a.txt.gz",
            PACKED["gz"][:-9],
            r"source .*a\.txt\.gz: cannot be read \(gzip data cut short at byte \d+\); is it whole",
        ),
        (
            "a.txt.gz",
            PACKED["gz"][:20] + b"\xff" * 20,
            r"source .*a\.txt\.gz: cannot be read \(gzip data damaged after byte 0 \(Error -1",
        ),
        (
            "a.txt.zst",
            PACKED["zst"][: len(PACKED["zst"]) // 2],
            r"source .*a\.txt\.zst: cannot be read \(zstd data cut short at byte \d+",
        ),
        (
            "a.txt.zst",
            PACKED["zst"] + PACKED["zst"][:-1],
            r"source .*a\.txt\.zst: cannot be read \(zstd data cut short at byte \d+",
        ),
        (
            "a.txt.zst",
            PACKED["zst"][:-60] + b"\xff" * 60,
            r"source .*a\.txt\.zst: cannot be read \(zstd data damaged after byte 0 \(zstd decompress",
        ),
        (
            "a.parquet",
            b"plain text",
            r"source .*a\.parquet: cannot be read \(Parquet magic bytes not found",
        ),
        ("a.parquet", DAMAGED, r"source .*a\.parquet: cannot be read \(Corrupt snappy"),
        ("a.csv", b"text\na\n", "a.csv: must be .txt, .jsonl"),
    ],
)
def test_bad_file_is_named(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        list(documents(tmp_path / name))


@pytest.mark.parametrize(
    "values, type",
    [
        ([1], "int"),
        ([b"a"], "bytes"),
        ([["a"]], "list"),
        ([{"a": "b"}], "dict"),
    ],
)
def test_a_parquet_column_without_text_is_named_with_its_type(
    tmp_path: Path, values: list, type: str
) -> None:
    pq.write_table(pa.table({"text": values}), tmp_path / "a.parquet")
    with pytest.raises(
        ValueError, match=rf"source .*a\.parquet, row 1: no text in column 'text', only {type}$"
    ):
        list(documents(tmp_path / "a.parquet"))


def test_parquet_without_the_column_is_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: no column 'text'; it has body; set"):
        list(documents(tmp_path / "a.parquet"))


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gone\.txt: no such file; .*RUN:corpus"):
        list(documents(tmp_path / "gone.txt"))


def test_a_text_without_words_has_no_entry(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" \n\n")
    source = Source(tmp_path / "a.txt")
    assert list(source) == []
    with pytest.raises(ValueError, match=r"a\.txt: 0 documents without a word"):
        source.entry(words=0)


@pytest.mark.parametrize(
    "source, expected",
    [
        ("runs/a:corpus", ("runs/a", "corpus")),
        ("s3://bucket/a:documents", ("s3://bucket/a", "documents")),
        ("texts/a.jsonl", None),
        ("s3://bucket/a.jsonl", None),
    ],
)
def test_rows_of_a_run_are_distinguished_from_files(source: str, expected: tuple | None) -> None:
    assert run_rows(source) == expected


def test_a_condition_without_rows_of_a_run_is_refused() -> None:
    check_where("language = 'en'", ["a.txt", "runs/a:corpus"])
    check_where("", ["a.txt"])
    with pytest.raises(
        ValueError, match=r"where x: selects rows of a run, and no source is one: a"
    ):
        check_where("x", ["a.txt"])


def test_a_file_is_a_file_whatever_its_name(tmp_path: Path) -> None:
    (tmp_path / "a:b.txt").mkdir()
    (tmp_path / "a:corpus").write_text("x")
    assert run_rows(str(tmp_path / "a:corpus")) is None


# --- rows of a run --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run up to refine over four texts; extract rejects the short one, refine scores the rest."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "in.jsonl").write_text(
        "".join(
            json.dumps({"text": t, "url": f"https://a.org/{i}"}) + "\n" for i, t in enumerate(TEXTS)
        )
    )
    config = make_config(
        folder,
        [folder / "in.jsonl"],
        "input.format=jsonl",
        "input.url_column=url",
        'extract.filters=["gopher_quality"]',
        "extract.keep_rejected_text=1.0",
        *(
            f'gopher_quality.{rule}="off"'
            for rule in ("alpha_word_ratio", "stop_word_count", "mean_word_length")
        ),
        "gopher_quality.word_count=[5, 1000]",
        "language.allowed=[]",
        'language.score="off"',
        'refine.filters=["quality"]',
        f'quality.model="{ROOT / "models" / "quality-en.ftz"}"',
    )
    run_inline(config, until="refine")
    return config.run.directory


def test_rows_of_a_run(run: str) -> None:
    long = [text for text in TEXTS if text != "short"]
    assert sorted(documents(f"{run}:corpus")) == sorted(long)
    assert list(documents(f"{run}:rejected")) == ["short"]
    assert sorted(documents(f"{run}:documents")) == sorted(TEXTS)


@pytest.mark.parametrize(
    "where, count",
    [
        ('"quality.score" >= 0', 3),
        ('"quality.score" > 2', 0),
        ('"quality.score" > 2 OR true', 3),
        ('"gopher_quality.word_count" <= 10 -- and a comment', 2),
        ("url = 'https://a.org/3'", 1),
        ("url != 'https://a.org/3'", 2),
        ("num_chars = 48", 1),
    ],
)
def test_a_condition_selects_rows(run: str, where: str, count: int) -> None:
    assert len(list(documents(f"{run}:corpus", where=where))) == count


def test_a_column_that_some_parts_lack_is_null_there(run: str) -> None:
    rejected = f"{run}:rejected"
    where = "rejected_by = 'gopher_quality.word_count' AND \"quality.score\" IS NULL"
    assert list(documents(rejected, where=where)) == ["short"]
    assert list(documents(rejected, where="rejected_by = 'quality.score'")) == []


def test_the_entry_of_selected_rows_has_the_condition(run: str) -> None:
    source = Source(f"{run}:corpus", where="url = 'https://a.org/3'")
    assert list(source) == [TEXTS[3]]
    entry = source.entry(words=5)
    assert (entry["where"], entry["documents"]) == ("url = 'https://a.org/3'", 1)
    assert "where" not in Source(f"{run}:corpus").entry(words=5)


def test_a_condition_does_not_apply_to_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    source = Source(tmp_path / "a.txt", where="url = 'x'")
    assert len(list(source)) == 2 and "where" not in source.entry(words=2)


def test_the_entry_of_rows_is_their_texts_digest(run: str) -> None:
    source = Source(f"{run}:rejected")
    for _ in range(2):  # reading twice counts once
        assert list(source) == ["short"]
    digest = hashlib.sha256(b"short\0").hexdigest()
    assert source.entry(words=1) == {
        "path": f"{run}:rejected",
        "sha256": digest,
        "documents": 1,
        "words": 1,
    }
    assert fingerprint([source.entry(words=1)]) == hashlib.sha256(digest.encode()).hexdigest()


@pytest.mark.parametrize(
    "rest, message",
    [
        (":corpsu", r"no rows 'corpsu' in a run; did you mean 'corpus'\?"),
        (":keep", r"no rows 'keep' in a run; known: corpus, rejected, documents"),
        ("", r"is a run; name a kind of its rows: .*:corpus"),
    ],
)
def test_bad_rows_are_named(run: str, rest: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(documents(run + rest))


@pytest.mark.parametrize(
    "where, message",
    [
        ('"quality.socre" >= 0.9', r"quality\.socre.*quality\.score"),
        ("quality.score >= 0.9", r'quality.*a column with a dot is quoted: "quality.score"'),
        ("num_chars >= 'high'", "Could not convert string 'high'"),
        ("num_chars >=", "syntax error"),
        ("true) UNION SELECT 'x' --", "syntax error|Parser Error"),
        ("(COPY (SELECT 1) TO 'x.csv')", "syntax error"),
    ],
)
def test_bad_conditions_are_errors_with_the_source(run: str, where: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"source .*:corpus: (?s:.*)({message})") as error:
        list(documents(f"{run}:corpus", where=where))
    assert f"in --where {where}" in str(error.value)


def test_no_such_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere:corpus: .*nowhere is not a run directory"):
        list(documents(f"{tmp_path}/nowhere:corpus"))
