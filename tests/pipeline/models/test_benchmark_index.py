"""Reading evaluation files, what is indexed and counted, and that equal files give equal bytes."""

import gzip
import io
import json
import re
import shutil
import tarfile
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from filters.decontamination import coverage
from filters.passage_index import find_matches, load_index
from filters.text.words import NORMALIZER
from pipeline.models.benchmark_index import build_index, by_benchmark
from pipeline.models.evaluation_sets import benchmark_of, evaluation_files
from pipeline.models.options import IndexOptions

QUESTION = "How many bags of flour does the old mill at the river grind in a day of rain?"
SECOND = "Which of the two stones has to be dressed more often, the runner or the bed stone?"
ROW = {
    "question": QUESTION,
    "meta": {"choices": ["ten", "twelve"], "hints": [{"text": SECOND}]},
    "gold": 1,
    "none": None,
}
STRINGS = [QUESTION, "ten", "twelve", SECOND]
JSONL = (json.dumps(ROW) + "\n").encode()


def parquet() -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([ROW]), sink)
    return sink.getvalue()


def tarred(name: str, data: bytes) -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as archive:
        for member, content in ((name, data), ("README.md", b"# read me")):
            info = tarfile.TarInfo(member)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return raw.getvalue()


def index_of(
    tmp_path: Path, *rows: object, name: str = "mill.jsonl", **options
) -> tuple[dict, str]:
    folder = tmp_path / "sets"
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    header = build(folder, output=tmp_path / "index", **options)
    load_index.cache_clear()
    return header, str(tmp_path / "index")


def build(*files: object, **options: object) -> dict:
    return build_index(IndexOptions(files=[str(file) for file in files], **options))


def best(text: str, path: str) -> float:
    index = load_index(path)
    return float(coverage(find_matches(text, index), index).shares.max(initial=0.0))


# --- reading --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, data",
    [
        ("mill.jsonl", JSONL + b"\n"),
        ("mill.jsonl", b"\xef\xbb\xbf" + JSONL),
        ("mill.jsonl.gz", gzip.compress(JSONL)),
        ("mill.jsonl.zst", zstandard.compress(JSONL[:9]) + zstandard.compress(JSONL[9:])),
        ("mill.json", json.dumps([ROW]).encode()),
        ("mill.json", json.dumps({"version": 1, "data": [ROW]}).encode()),
        ("mill.json", json.dumps(ROW).encode()),
        ("mill.json", json.dumps({"train": [ROW], "test": [], "dev": []}).encode()),
        ("mill.json", json.dumps({key: [value] for key, value in ROW.items()}).encode()),
        ("mill.parquet", parquet()),
        ("all.tar", tarred("mill.jsonl", JSONL)),
        ("all.tar.zst", zstandard.compress(tarred("sets/mill.jsonl", JSONL))),
        ("all.tgz", gzip.compress(tarred("mill.jsonl.gz", gzip.compress(JSONL)))),
    ],
)
def test_every_kind_of_file_gives_the_strings_of_its_rows(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    (source,) = evaluation_files(str(tmp_path / name))
    assert source.benchmark == "mill"
    assert source.rows == [STRINGS]


def test_null_in_a_list_is_a_row_without_texts(tmp_path):
    (tmp_path / "mill.json").write_text(json.dumps([None, ROW]))
    (source,) = evaluation_files(str(tmp_path / "mill.json"))
    assert source.rows == [[], STRINGS]


def test_all_splits_of_an_object_are_read(tmp_path):
    (tmp_path / "mill.json").write_text(json.dumps({"train": [ROW, ROW], "test": [ROW]}))
    (source,) = evaluation_files(str(tmp_path / "mill.json"))
    assert source.rows == [STRINGS] * 3


def test_json_of_many_lines_is_read_as_such(tmp_path):
    (tmp_path / "mill.json").write_bytes(JSONL * 2)
    (source,) = evaluation_files(str(tmp_path / "mill.json"))
    assert source.rows == [STRINGS] * 2


@pytest.mark.parametrize("name, mark", [("mill.csv", ","), ("mill.tsv", "\t")])
def test_cells_of_a_table_are_texts(tmp_path, name, mark):
    (tmp_path / name).write_text(f'"{QUESTION}\n(in bags)"{mark}ten{mark}"{SECOND}"\r\n')
    (source,) = evaluation_files(str(tmp_path / name))
    assert source.rows == [[f"{QUESTION}\n(in bags)", "ten", SECOND]]


def test_rows_that_cannot_be_read_are_counted(tmp_path):
    (tmp_path / "mill.jsonl").write_bytes(
        JSONL + b'{"question": \n\xff\n' + b"[" * 100_000 + b"\n" + JSONL
    )
    header = build(tmp_path / "mill.jsonl", output=tmp_path / "index")
    assert by_benchmark(header)["mill"]["rows"] == 5
    assert by_benchmark(header)["mill"]["bad_rows"] == 3


@pytest.mark.parametrize(
    "name, data, reason",
    [
        ("mill.jsonl", b"", r"mill\.jsonl: of the 0 rows .* none could be read"),
        ("mill.jsonl", b"{\n", r"mill\.jsonl: of the 1 rows .* none could be read"),
        (
            "mill.jsonl.gz",
            gzip.compress(JSONL)[:-9],
            r"mill\.jsonl\.gz: cannot be read .*is it whole",
        ),
        (
            "mill.jsonl.zst",
            zstandard.compress(JSONL * 99)[:-9],
            r"mill\.jsonl\.zst: cannot be read \(zstd data cut short at byte",
        ),
        ("mill.parquet", parquet()[:-9], r"mill\.parquet: cannot be read as Parquet"),
        ("all.tar", b"x" * 2000, r"all\.tar: cannot be read .*is it whole"),
        (
            "all.tar",
            tarred("mill.txt", b"x"),
            r"all\.tar: holds no evaluation file; they end in \.jsonl",
        ),
        ("mill.txt", b"x", r"mill\.txt: holds no evaluation file"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, data, reason):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=reason):
        list(evaluation_files(str(tmp_path / name)))


def test_hidden_and_unfinished_files_are_no_sets(tmp_path):
    names = ("._mill.jsonl", ".cache/mill.jsonl", "__MACOSX/mill.jsonl", "new.tmp/mill.jsonl")
    folder = tmp_path / "sets"
    for name in (*names, "mill.jsonl"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(JSONL if name == "mill.jsonl" else b"\0\5\x16\7")
    with tarfile.open(tmp_path / "sets.tar", mode="w") as archive:
        archive.add(folder, ".")
    for path in (folder, tmp_path / "sets.tar"):
        assert [file.name for file in evaluation_files(str(path))] == ["mill.jsonl"]


def test_a_path_without_a_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.jsonl: cannot be read \(.*No such file"):
        list(evaluation_files(str(tmp_path / "nowhere.jsonl")))


@pytest.mark.parametrize(
    "place, benchmark",
    [
        ("gsm8k.jsonl.gz", "gsm8k"),
        ("home/data/gsm8k.jsonl", "gsm8k"),
        ("evals/test/gsm8k.jsonl", "gsm8k"),
        ("gsm8k/main/test-00000-of-00001.parquet", "gsm8k"),
        ("./mmlu/data/test/anatomy_test.csv", "mmlu"),
        ("test/anatomy_test.csv", "anatomy_test"),
        ("test.jsonl", "test"),
    ],
)
def test_the_set_of_a_file(place, benchmark):
    assert benchmark_of(PurePosixPath(place)) == benchmark


def test_a_name_before_the_path_makes_one_set(tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_bytes(JSONL)
    assert [s.benchmark for s in evaluation_files(f"mills={tmp_path}")] == ["mills", "mills"]
    (tmp_path / "x=y.jsonl").write_bytes(JSONL)
    assert [s.benchmark for s in evaluation_files(str(tmp_path / "x=y.jsonl"))] == ["x=y"]


# --- what is indexed ------------------------------------------------------------------------------


def test_the_counts_of_what_is_indexed_and_what_is_not(tmp_path):
    header, _ = index_of(
        tmp_path,
        ROW,
        {"question": "too short"},
        {"question": QUESTION, "again": QUESTION.upper()},
        5,
        "",
    )
    assert by_benchmark(header)["mill"] == {
        "files": 1,
        "rows": 5,
        "bad_rows": 0,
        "empty_rows": 3,
        "short_texts": 3,  # ten, twelve, too short
        "passages": 3,
        "common_passages": 0,
        "ngrams": 6 + 5 + 6,  # 18 words, 17, 18
        "common_ngrams": 0,
    }


COPA = [
    "The man turned on the faucet, therefore",
    "the toilet filled with water.",
    "water flowed from the spout.",
]
ARC = [
    "0 degrees Celsius",
    "32 degrees Celsius",
    "100 degrees Celsius",
    "Question: At which temperature does water freeze?",
]
WINOGRAD = [
    "Tom threw his bag down to Ray after Tom",
    "Tom threw his bag down to Ray after Ray",
    "reached the top.",
]
MMLU = [
    "Which of the following religions developed first?",
    "Buddhism",
    "Christianity",
    "Hinduism",
    "C",
]
TRIVIA = [
    "Question: What is the Turkish national sport?\nAnswer:",
    "Oil and grease wrestling (Yagli)",
]


@pytest.mark.parametrize(
    "row, page",
    [
        (COPA, "\n".join(COPA)),
        (
            COPA,
            "Q: The man turned on the faucet, therefore …\n(a) the toilet filled with water\n(b) water flowed from the spout",
        ),
        (COPA, "The man turned on the faucet, therefore water flowed from the spout."),
        (
            ARC,
            "At which temperature does water freeze? 0 degrees Celsius, 32 degrees Celsius, 100 degrees Celsius",
        ),
        (
            ARC,
            "At which temperature does water freeze?\nA) 0 degrees Celsius\nB) 32 degrees Celsius\nC) 100 degrees Celsius",
        ),
        (WINOGRAD, "Tom threw his bag down to Ray after Ray reached the top."),
        (
            MMLU,
            "Which of the following religions developed first? Buddhism. Christianity. Hinduism.",
        ),
        (
            MMLU,
            "Which of the following religions developed first?\nA. Buddhism\nB. Christianity\nC. Hinduism\nAnswer: C",
        ),
        (TRIVIA, "What is the Turkish national sport? Oil and grease wrestling (Yagli)."),
        (TRIVIA, "Q: What is the Turkish national sport?\nA: Oil and grease wrestling (Yagli)"),
    ],
)
def test_a_row_of_short_texts_is_matched_by_their_arrangements(tmp_path, row, page):
    header, path = index_of(tmp_path, row)
    assert by_benchmark(header)["mill"]["empty_rows"] == 0
    assert best(f"Before it: {page} And after it.", path) > 0.2
    assert best("\n\nIn between. ".join(row), path) == 0


def test_a_row_with_a_passage_is_matched_by_that_alone(tmp_path):
    header, path = index_of(tmp_path, [*COPA, QUESTION])
    assert by_benchmark(header)["mill"]["passages"] == 1
    assert best("\n".join(COPA), path) == 0


def test_urls_and_numbers_are_not_indexed(tmp_path):
    address = "https://example.org/one/two/three/four/five/six/seven/eight/nine/ten/eleven"
    _, path = index_of(
        tmp_path, ROW, {"source": address, "test": "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14"}
    )
    assert best(f"See {address}: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15", path) == 0


def test_ngrams_of_many_items_are_not_indexed(tmp_path):
    template = (
        "Is the following statement true or false, and why? Output T for true and F for false."
    )
    rows = [
        {
            "query": f"{template} Statement {k} says that {k} mills grind {k} bags of flour in {k} days."
        }
        for k in range(4)
    ]
    header, path = index_of(tmp_path, *rows, {"query": template}, max_items=3)
    counts = by_benchmark(header)["mill"]
    # the template's 17 words are five 13-grams, and the one that adds 'Statement' stands in four
    # items
    assert (counts["common_ngrams"], counts["common_passages"]) == (5 * 5 + 4, 1)
    assert best(template, path) == 0
    assert best(rows[2]["query"], path) == 1
    _, path = index_of(tmp_path, *rows, {"query": template}, max_items=5)
    assert best(template, path) == 1


def test_ngrams_of_the_background_are_not_indexed(tmp_path):
    (tmp_path / "empty.txt").write_text("* * *")
    (tmp_path / "law.txt.gz").write_bytes(
        gzip.compress(f"It reads:\n{SECOND.upper()} So it reads.".encode())
    )
    header, path = index_of(
        tmp_path,
        ROW,
        {"again": SECOND},
        background=[str(tmp_path / name) for name in ("empty.txt", "law.txt.gz")],
    )
    assert by_benchmark(header)["mill"]["common_ngrams"] == 2 * 5
    assert best(SECOND, path) == 0 and best(QUESTION, path) == 1


def test_a_background_that_cannot_be_read_is_named(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere.txt"):
        with pytest.raises(OSError, match=re.escape(str(path))):
            index_of(tmp_path, ROW, background=[str(path)])


def test_nothing_to_index_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"sets: no text of 10 words or more that is not common"):
        index_of(tmp_path, {"question": "too short"})
    with pytest.raises(ValueError, match=r"min_words must be between 1 and n = 5, got 8"):
        index_of(tmp_path, ROW, n=5, min_words=8)


def test_a_damaged_background_is_named(tmp_path):
    text = f"{SECOND}\n".encode() * 99
    cut = {
        "cut.txt.gz": (gzip.compress(text)[:-9], "gzip data cut short at byte"),
        "cut.txt.zst": (zstandard.compress(text)[:-9], "zstd data cut short at byte"),
        "bad.txt.gz": (gzip.compress(text)[:10] + b"\xff" * 40, "gzip data damaged after byte 0"),
        "bad.txt.zst": (zstandard.compress(text)[:9] + text, "zstd data damaged after byte 0"),
        "cut.jsonl.gz": (gzip.compress(JSONL)[:-9], "gzip data cut short at byte"),
    }
    for name, (data, reason) in cut.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(
            ValueError, match=rf"{re.escape(name)}: cannot be read \({reason}.*is it whole"
        ):
            index_of(tmp_path, ROW, background=[str(tmp_path / name)])
    assert not (tmp_path / "index").exists()


@pytest.mark.parametrize(
    "output, reason",
    [
        ("mill.jsonl", r"mill\.jsonl: is the source mill\.jsonl"),
        ("sets/../mill.jsonl", r"mill\.jsonl: is the source mill\.jsonl"),
        ("named.jsonl", r"named\.jsonl: is the source named\.jsonl"),
        ("law.txt", r"law\.txt: is the source .*law\.txt"),
        ("sets/mill.jsonl", r"mill\.jsonl: exists, and is not an index"),
        ("notes.md", r"notes\.md: exists, and is not an index"),
        ("sets", r"sets: is a folder; name a file in it"),
        ("s3://bucket/index", r"s3://bucket/index: is a URL"),
    ],
)
def test_an_output_that_would_overwrite_something_else_is_refused_before_any_work(
    tmp_path, monkeypatch, output, reason
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sets").mkdir()
    for name in ("mill.jsonl", "named.jsonl", "sets/mill.jsonl"):
        (tmp_path / name).write_bytes(JSONL)
    for name in ("law.txt", "notes.md"):
        (tmp_path / name).write_text(SECOND)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    inputs = ["mill.jsonl", "set=named.jsonl", "sets", "nowhere.jsonl"]
    with pytest.raises(ValueError, match=reason):
        build(*inputs, output=Path(output), background=[str(tmp_path / "law.txt")])
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_an_index_may_be_written_again(tmp_path):
    assert index_of(tmp_path, ROW) == index_of(tmp_path, ROW)


# --- bytes ----------------------------------------------------------------------------------------


def test_the_same_files_make_the_same_bytes_in_any_order_and_place(tmp_path):
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "mill.jsonl").write_bytes(JSONL)
        (tmp_path / place / "stone.csv").write_text(f'"{SECOND}"\n"{QUESTION} Or not?"\n')
    shutil.copy(tmp_path / "here" / "mill.jsonl", tmp_path / "copy.jsonl")
    indexes = []
    for number, paths in enumerate(
        (
            ["here"],
            ["there/stone.csv", "there/mill.jsonl"],
            ["here/mill.jsonl", "there"],
            ["there", "mill=copy.jsonl"],
        )
    ):
        output = tmp_path / f"index{number}"
        build(
            *(
                path.replace("copy", f"{tmp_path}/copy") if "=" in path else tmp_path / path
                for path in paths
            ),
            output=output,
        )
        indexes.append(output.read_bytes())
    assert indexes[0] == indexes[1] == indexes[2]
    assert indexes[0] != indexes[3]  # a file of another name


def test_the_header_says_what_the_index_was_built_from(tmp_path):
    header, path = index_of(tmp_path, ROW)
    stored = load_index(path).header
    assert {name: stored[name] for name in header} == header
    assert stored["normalizer"] == NORMALIZER and (
        stored["n"],
        stored["min_words"],
    ) == (13, 10)
    assert str(tmp_path) not in json.dumps(stored)
