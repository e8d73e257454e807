"""Models of engine "blocks" are the same bytes twice, their cards are true, bad sources are named."""

import builtins
import gzip
import hashlib
import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline.__main__ import app
from pipeline.models import train_extractor as module
from pipeline.models.extractor_training import TREES, Result, label
from pipeline.models.options import ExtractorOptions
from pipeline.models.train_extractor import train_extractor
from stages.extract.blocks.features import NAMES
from stages.extract.blocks.labels import word_f1
from stages.extract.blocks.model import ExtractorModel
from stages.extract.config import ExtractConfig
from stages.extract.engines import make_engine

pytest.importorskip("lightgbm", exc_type=ImportError)

WORDS = ("river", "stone", "light", "winter", "garden", "market", "letter", "engine", "harbor")
NUM_PAGES = 24


def page(number: int) -> dict:
    """A page of one of eight hosts: menu, article, teasers, footer; and its main text."""
    draw = random.Random(number)

    def words(count: int) -> str:
        return " ".join(draw.choices(WORDS, k=count)).capitalize()

    menu = "".join(f"<li><a href=/{i}>{words(1)}</a></li>" for i in range(10))
    paragraphs = [f"{words(draw.randint(15, 40))}." for _ in range(10)]
    teasers = "".join(f"<div class=teaser><a href=x>{words(5)}</a></div>" for _ in range(8))
    html = (
        f"<title>Page</title><nav><ul>{menu}</ul></nav><article>"
        + "".join(f"<p>{p}</p>" for p in paragraphs)
        + f"</article><aside>{teasers}</aside><footer>All rights reserved, {words(4)}</footer>"
    )
    return {
        "url": f"https://host{number % 8}.example/{number}",
        "html": html,
        "main_content": "\n".join(paragraphs),
        "page_type": "article" if number % 2 else None,
    }


PAGES = [page(number) for number in range(NUM_PAGES)]


def without_html(rows: Sequence[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if key != "html"} for row in rows]


def write_gold(path: str, rows: Sequence[object]) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    Path(path).write_bytes(gzip.compress(lines, mtime=0) if path.endswith(".gz") else lines)


def write_warc(path: str, rows: Sequence[dict]) -> None:
    records = []
    for row in rows:
        body = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n" + row["html"].encode()
        head = (
            "WARC/1.0\r\nWARC-Type: response\r\nContent-Type: application/http\r\n"
            f"WARC-Target-URI: {row['url']}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        records.append(gzip.compress(head.encode() + body + b"\r\n\r\n", mtime=0))
    Path(path).write_bytes(b"".join(records))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`gold.jsonl` with all pages; `text.jsonl.gz` without HTML, and `pages.warc.gz` for it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pipeline.models.extractor_training.NUM_TREES", 8)
    monkeypatch.setitem(TREES, "learning_rate", 0.5)
    write_gold("gold.jsonl", PAGES)
    write_gold("text.jsonl.gz", without_html(PAGES))
    write_warc("pages.warc.gz", PAGES)
    return tmp_path


def train(*gold: str, pages: Sequence[str] = (), output: str = "m.json.gz", **options) -> dict:
    options = {"licence": "CC0-1.0", "cross_validate": False} | options
    paths = [Path(p) for p in pages] or None
    return train_extractor(
        ExtractorOptions(
            pages=paths,
            gold=[Path(g) for g in gold or ("gold.jsonl",)],
            output=Path(output),
            **options,
        )
    )


# --- the model ------------------------------------------------------------------------------------


def test_model_and_card_are_the_same_bytes_twice(folder: Path) -> None:
    first = train(cross_validate=True, learning_curve=True)
    written = [Path(name).read_bytes() for name in ("m.json.gz", "m.json.gz.json")]
    assert train(cross_validate=True, learning_curve=True) == first
    assert [Path(name).read_bytes() for name in ("m.json.gz", "m.json.gz.json")] == written


def test_number_of_threads_changes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = []
    for threads in (1, 2, 5):
        monkeypatch.setitem(TREES, "num_threads", threads)
        train()
        models.append(Path("m.json.gz").read_bytes())
    assert models[0] == models[1] == models[2]


def test_pages_of_warc_files_are_those_of_rows_with_html(folder: Path) -> None:
    train("text.jsonl.gz", pages=["pages.warc.gz"], output="warc.json.gz")
    train("gold.jsonl")
    assert Path("warc.json.gz").read_bytes() == Path("m.json.gz").read_bytes()


def test_engine_takes_the_model(folder: Path) -> None:
    train()
    engine = make_engine(ExtractConfig(engine="blocks", model=str(folder / "m.json.gz")))
    unseen = page(1000)
    text = engine(label("", unseen["html"], "").blocks, unseen["html"], unseen["url"]).text
    assert text is not None and word_f1(text, unseen["main_content"]) > 0.9


def test_weights_change_the_model(folder: Path) -> None:
    write_gold(
        "more.jsonl", [page(n) | {"url": f"https://more.example/{n}"} for n in range(50, 60)]
    )
    models = []
    for weight in ([], ["more.jsonl=1"], ["more.jsonl=0.2"]):
        train("gold.jsonl", "more.jsonl", weight=weight)
        models.append(Path("m.json.gz").read_bytes())
    assert models[0] == models[1] != models[2]
    write_gold("more.jsonl", [
        page(n) | {"url": f"https://more.example/{n}", "weight": 0.4} for n in range(50, 60)
    ])  # fmt: skip
    train("gold.jsonl", "more.jsonl", weight=["more.jsonl=0.5"])
    assert Path("m.json.gz").read_bytes() == models[2]


# --- the card -------------------------------------------------------------------------------------


def test_card_describes_the_model(folder: Path) -> None:
    card = train("text.jsonl.gz", pages=["pages.warc.gz"], cross_validate=True)
    assert json.loads(Path("m.json.gz.json").read_text()) == card
    data = Path("m.json.gz").read_bytes()
    model = ExtractorModel.from_bytes(data)
    assert (card["kind"], card["licence"]) == ("blocks", "CC0-1.0")
    assert (card["sha256"], card["bytes"]) == (hashlib.sha256(data).hexdigest(), len(data))
    assert card["command"] == (
        "gristmill train-extractor pages.warc.gz --gold text.jsonl.gz --output m.json.gz "
        "--licence CC0-1.0 --cross-validate --no-learning-curve"
    )
    assert {"lightgbm", "numpy"} <= card["versions"].keys()
    assert (
        card["train"].items() >= {"pages": NUM_PAGES, "hosts": 8, "blocks": 29 * NUM_PAGES}.items()
    )
    assert card["features"] == len(NAMES)
    assert card["words_scored"]["tags"] == len(model.lexicon.tags)
    assert 0 < card["trees"]["nodes"] <= 8 * 30
    figures = card["cross_validation"]
    assert figures["pages"] == NUM_PAGES and figures["f1"] > 0.9
    assert {name: row["pages"] for name, row in figures["by_page_type"].items()} == {
        "article": NUM_PAGES // 2,
        "none": NUM_PAGES // 2,
    }
    assert figures["by_gold"]["text.jsonl.gz"]["f1"] == figures["f1"]
    assert sum(row["pages"] for row in figures["calibration"]) == NUM_PAGES


def test_card_counts_what_was_left_out(folder: Path) -> None:
    rows = [
        *without_html(PAGES[:20]),
        {"url": "https://a.example/", "main_content": None},
        {"url": PAGES[20]["url"], "main_content": " \n"},
        {"url": "https://gone.example/", "main_content": "Some text.", "license": "CC0-1.0"},
    ]
    rows.append({"url": None, "html": PAGES[23]["html"], "main_content": "Some text."})
    write_gold("some.jsonl", rows)
    card = train("some.jsonl", pages=["pages.warc.gz"])
    [gold], [warc] = card["gold"], card["pages"]
    counts = {"rows": 24, "without_text": 2, "without_page": 1, "pages": 21}
    assert gold.items() >= (counts | {"weight": 1.0, "licenses": {"CC0-1.0": 1}}).items()
    assert warc.items() >= {"pages": NUM_PAGES, "without_gold": 3, "without_text": 1}.items()
    assert gold["sha256"] == hashlib.sha256(Path("some.jsonl").read_bytes()).hexdigest()
    assert "cross_validation" not in card


def test_learning_curve_ends_with_all_pages(folder: Path) -> None:
    card = train(cross_validate=True, learning_curve=True)
    curve = card["learning_curve"]
    assert [point["pages"] for point in curve] == [2, 5, 10, 19]
    assert curve[-1]["f1"] == card["cross_validation"]["f1"] >= curve[0]["f1"]


def test_figures_are_means_of_groups() -> None:
    def result(f1: float, expected: float) -> Result:
        blank = label("https://a.example/", "<p>x", "x", kind="forum")
        return Result(blank, f1, expected)

    results = [result(0.9, 0.95), result(0.8, 0.7), result(0.3, 0.5), result(0.1, 0.5)]
    figures = module._figures(results)
    assert figures["f1"] == 0.525
    assert figures["by_page_type"] == {"forum": {"pages": 4, "f1": 0.525}}
    assert figures["confidence"] == {"at_least": 0.7, "share": 0.5, "f1": 0.85, "f1_of_others": 0.2}
    bins = {row["from"]: row for row in figures["calibration"] if row["pages"]}
    assert bins == {
        0.5: {"from": 0.5, "pages": 2, "expected": 0.5, "measured": 0.2},
        0.7: {"from": 0.7, "pages": 1, "expected": 0.7, "measured": 0.8},
        0.9: {"from": 0.9, "pages": 1, "expected": 0.95, "measured": 0.9},
    }
    assert module._calibration(*map(module.np.array, ([1.0], [1.0])))[-1]["pages"] == 1


def test_command_prints_the_figures(folder: Path) -> None:
    arguments = [
        "pages.warc.gz",
        "--gold",
        "text.jsonl.gz",
        "-o",
        "m.json.gz",
        "--license",
        "CC0-1.0",
    ]
    result = CliRunner().invoke(app, ["train-extractor", *arguments])
    assert result.exit_code == 0, result.stderr
    assert f"m.json.gz: {NUM_PAGES} pages of 8 hosts" in result.stdout
    assert f"text.jsonl.gz: {NUM_PAGES} of {NUM_PAGES} rows" in result.stdout
    assert "hosts not seen: word-F1 " in result.stdout


# --- what is refused ------------------------------------------------------------------------------

ROW = {"url": "https://a.example/", "main_content": "Some text."}


@pytest.mark.parametrize(
    "rows, message",
    [
        (["no object"], "bad.jsonl, line 1: not a JSON object but str"),
        ([{"main_content": "x"}], r"line 1: neither url nor html, only \['main_content'\]"),
        ([ROW | {"url": 7}], "line 1: url is int, not a text"),
        ([ROW | {"main_content": ["x"]}], "line 1: main_content is list, not a text"),
        ([ROW | {"weight": 0}], "line 1: weight = 0: must be a number above 0"),
        ([ROW | {"weight": "heavy"}], "line 1: weight = 'heavy': must be a number above 0"),
        ([ROW, ROW], r"line 2: a second text of https://a.example/; .* in bad.jsonl, line 1"),
        ([ROW, ROW | {"main_content": ""}], "line 2: a second text of https://a.example/"),
        ([ROW, {"url": "x"}], "of 2 gold rows 1 have no main_content, and 1 no page"),
        ([], "nothing to train on: of 0 gold rows"),
        ([ROW | {"html": "<p>Some text."}], "match 100% of the blocks of 1 pages"),
    ],
)
def test_bad_rows_are_named(folder: Path, rows: list, message: str) -> None:
    write_gold("bad.jsonl", rows)
    with pytest.raises(ValueError, match=message):
        train("bad.jsonl")
    assert not Path("m.json.gz").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"output": "m.bin"}, r"output m\.bin: must end in \.json\.gz"),
        (
            {"output": "mine.json.gz"},
            "mine.json.gz: exists, and is not a model with a card of ours",
        ),
        ({"weight": ["gold.jsonl"]}, "weight gold.jsonl: write GOLD=NUMBER, above 0"),
        ({"weight": ["gold.jsonl=nan"]}, "gold.jsonl=nan: write GOLD=NUMBER, above 0"),
        ({"weight": ["gld.jsonl=1"]}, "no such file in --gold; did you mean 'gold.jsonl'"),
        ({"pages": ["gone.warc.gz"]}, "source gone.warc.gz: no such file"),
        ({"pages": ["gold.jsonl"]}, "source gold.jsonl: is no WARC file"),
        ({"pages": ["empty.warc"]}, "source empty.warc: is no WARC file"),
    ],
)
def test_bad_options_are_named(folder: Path, options: dict, message: str) -> None:
    Path("mine.json.gz").write_text("mine")
    Path("empty.warc").write_text("")
    with pytest.raises(ValueError, match=message):
        train(**options)
    assert Path("mine.json.gz").read_text() == "mine"


def test_files_that_are_no_json_are_named(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"source gone\.jsonl: no such file"):
        train("gone.jsonl")
    Path("bad.jsonl").write_text('{"url": "x"}\n{"url": \n')
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 2: not JSON"):
        train("bad.jsonl")
    Path("cut.jsonl.gz").write_bytes(Path("text.jsonl.gz").read_bytes()[:200])
    with pytest.raises(ValueError, match=r"cut\.jsonl\.gz: cannot be read \(gzip data cut short"):
        train("cut.jsonl.gz")


def test_a_url_with_two_pages_is_named_and_the_same_page_twice_is_one(folder: Path) -> None:
    write_warc("again.warc.gz", PAGES)
    train("text.jsonl.gz", pages=["pages.warc.gz", "again.warc.gz"])
    write_warc("again.warc.gz", [PAGES[0] | {"html": "<p>Something else"}])
    with pytest.raises(
        ValueError, match=r"again\.warc\.gz: a second, different page https://host0"
    ):
        train("text.jsonl.gz", pages=["pages.warc.gz", "again.warc.gz"])


def test_pages_of_one_host_cannot_be_cross_validated(folder: Path) -> None:
    write_gold(
        "one.jsonl", [row | {"url": f"https://a.example/{i}"} for i, row in enumerate(PAGES)]
    )
    with pytest.raises(ValueError, match="too few hosts for cross-validation"):
        train("one.jsonl", cross_validate=True)
    assert train("one.jsonl")["train"]["hosts"] == 1


def test_pages_that_no_tree_learns_from_are_too_few(folder: Path) -> None:
    write_gold("few.jsonl", PAGES[:1])
    with pytest.raises(ValueError, match="1 pages are too few"):
        train("few.jsonl")


@pytest.mark.parametrize(
    "error, message",
    [
        (
            ModuleNotFoundError("No module named 'lightgbm'"),
            r"pip install 'gristmill\[extractor\]'",
        ),
        (OSError("libgomp.so.1: cannot open shared object file"), "apt-get install libgomp1"),
    ],
)
def test_missing_lightgbm_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    original = builtins.__import__

    def fail(name: str, *args: object, **kwargs: object) -> object:
        if name == "lightgbm":
            raise error
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fail)
    with pytest.raises(ValueError, match=message):
        train()
