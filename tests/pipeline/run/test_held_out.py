"""A part of a run that is held out of training: published beside it, verified, counted and
explained. Without Ray.
"""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from pipeline.__main__ import app
from pipeline.engine.units import in_process
from pipeline.inspect import export, why
from pipeline.inspect.verify import verify_path
from pipeline.report.report import write_report
from pipeline.run import publish, results
from pipeline.run.execute import execute
from pipeline.run.state import read_state
from stages.formats.mds import read_index
from stages.pack.pack import PackConfig
from stages.storage.catalog import read_catalog
from tests.support.inline import Silent, make_config, run_inline

# copies stay, each input is a unit of pack: so a text comes in several units
OPTIONS = (
    "input.format=jsonl",
    "input.url_column=url",
    "extract.filters=[]",
    "refine.filters=[]",
    "dedup.enabled=false",
)
PACKING = ("language.allowed=[]", "language.score=off", "pack.seq_len=32", "pack.group_bytes=1")
TEXTS = [
    f"The old mill by the river has ground wheat for house number {n}. " * (n % 4 + 1)
    for n in range(16)
]


def make(folder, *, texts=TEXTS, held_out=0.4, each=4):
    """A config over inputs of `each` documents, of which every text comes twice, in another input
    each time.
    """
    rows = [
        {"text": t, "url": f"https://a.example/{n}"} for n, t in enumerate([*texts, *texts[::-1]])
    ]
    inputs = [folder / f"{n:02d}.jsonl" for n in range(0, len(rows), each)]
    for n, path in zip(range(0, len(rows), each), inputs, strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows[n : n + each]))
    return make_config(folder, inputs, *OPTIONS, *PACKING, f"pack.held_out={held_out}")


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished run: its config and outcome."""
    config = make(tmp_path_factory.mktemp("held"))
    return config, run_inline(config)


def ids_of(folder):
    return {*pq.read_table(Path(folder) / "provenance.parquet")["doc_id"].to_pylist()}


def corpus_of(config):
    return {
        r["doc_id"]: r for t in export.tables(config.run.directory, "corpus") for r in t.to_pylist()
    }


def test_training_and_held_out_rows_share_no_document_and_no_text(done):
    config, outcome = done
    uri, corpus = outcome.published.uri, corpus_of(config)
    training, held_out = ids_of(uri), ids_of(f"{uri}/held_out")
    assert (
        training and held_out and not training & held_out and training | held_out == corpus.keys()
    )
    assert not {corpus[i]["text"] for i in training} & {corpus[i]["text"] for i in held_out}


def test_what_is_held_out_is_shaped_like_a_generation_and_counted_apart(done):
    _, outcome = done
    manifest, uri = outcome.published.manifest, outcome.published.uri
    held_out = manifest["held_out"]
    assert held_out.keys() == {
        "rows",
        "tokens",
        "documents",
        "seq_len",
        "dtype",
        "provenance_sha256",
        "shards",
    }
    for folder, side in ((uri, manifest), (f"{uri}/held_out", held_out)):
        index = [(s["raw_data"]["basename"], s["samples"]) for s in read_index(folder)["shards"]]
        spans = pq.read_table(f"{folder}/provenance.parquet").to_pylist()
        assert index == [(s["basename"], s["rows"]) for s in side["shards"]]
        assert {s["row"] for s in spans} == set(range(side["rows"])) and sum(
            n for _, n in index
        ) == side["rows"]
        assert (
            sum(s["length"] for s in spans) == side["tokens"]
            and len(ids_of(folder)) == side["documents"]
        )


def test_the_funnel_and_the_report_say_what_was_held_out(done):
    config, outcome = done
    held_out = outcome.published.manifest["held_out"]
    rows = [
        (r.rule or r.unit, r.count)
        for r in results.run_funnel(config.run.directory)
        if r.stage == "pack"
    ]
    rest = [(name, outcome.published.manifest[name]) for name in ("tokens", "rows")]
    assert rows == [
        ("pack.held_out", held_out["documents"]),
        *rest,
        ("held-out tokens", held_out["tokens"]),
    ]
    assert held_out["documents"] + outcome.published.manifest["documents"] == 32
    page = Path(write_report(config.run.directory)).read_text()
    assert f"held out {held_out['documents']} documents, {held_out['tokens']:,} tokens" in page


def test_the_order_in_which_units_are_done_changes_no_byte(done, tmp_path):
    def backwards(name, task, units, resources):
        return in_process(name, task, units[::-1], resources)

    _, outcome = done
    again = execute(make(tmp_path), Silent(), backwards)
    first, second = (
        {
            p.relative_to(uri): p.read_bytes()
            for p in sorted(Path(uri).rglob("*"))
            if p.is_file() and p.name != "manifest.json"
        }
        for uri in (outcome.published.uri, again.published.uri)
    )
    assert first == second and Path("held_out/index.json") in first


def test_other_inputs_of_the_same_texts_hold_out_the_same_texts(done, tmp_path):
    config, outcome = done
    other = make(tmp_path, texts=TEXTS[3:] + TEXTS[:3])
    sides = []
    for conf, published in ((config, outcome.published), (other, run_inline(other).published)):
        corpus = corpus_of(conf)
        sides.append({corpus[i]["text"] for i in ids_of(f"{published.uri}/held_out")})
    assert sides[0] == sides[1]


@pytest.mark.parametrize("wrong", ["shard", "index", "provenance", "missing"])
def test_verify_finds_what_is_wrong_with_the_held_out_part(done, tmp_path, wrong):
    _, outcome = done
    generation = tmp_path / "gen-0001"
    shutil.copytree(outcome.published.uri, generation)
    assert [r.faults for r in verify_path(str(generation))] == [[]]
    held_out = generation / "held_out"
    names = {"shard": next(held_out.rglob("*.mds")), "index": held_out / "index.json"}
    file = names.get(wrong, held_out / "provenance.parquet")
    if wrong == "missing":
        shutil.rmtree(held_out)
        expected = {("held_out/index.json", "file"), ("held_out/provenance.parquet", "file")}
    else:
        data = file.read_bytes()
        file.write_bytes(
            data[:-1] if wrong == "index" else data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]
        )
        what = {"shard": "sha256 by manifest", "index": "content", "provenance": "sha256"}[wrong]
        expected = {(str(file.relative_to(generation)), what)}
    [result] = verify_path(str(generation))
    assert expected <= {(f.shard, f.what) for f in result.faults} and all(
        f.shard.startswith("held_out/") for f in result.faults
    )


def test_verify_counts_the_tokens_held_out(done, tmp_path):
    _, outcome = done
    shutil.copytree(outcome.published.uri, tmp_path / "g")
    manifest = outcome.published.manifest
    held_out = manifest["held_out"] | {"tokens": manifest["held_out"]["tokens"] - 1}
    (tmp_path / "g" / "manifest.json").write_text(json.dumps(manifest | {"held_out": held_out}))
    [result] = verify_path(str(tmp_path / "g"))
    found = [(f.shard, f.what, f.actual) for f in result.faults]
    assert found == [
        (n, "held_out/tokens", held_out["tokens"] + 1)
        for n in ("manifest.json", "held_out/provenance.parquet")
    ]


def test_publish_refuses_a_held_out_shard_that_is_not_what_was_written(tmp_path):
    config = make(tmp_path)
    run_inline(config)
    store = results.store_of(config.run.directory, read_state(config.run.directory), "pack")
    shard = next(Path(store.uri("held_out")).rglob("*.mds"))
    data = shard.read_bytes()
    shard.unlink()  # the generation holds a link to the same bytes
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(publish.PublishError, match=r"held_out/part-\d{5}/shard.00000.mds"):
        publish.publish(
            str(tmp_path / "other"),
            store,
            store.listed_commits(),
            PackConfig(seq_len=32),
            sources={},
        )
    assert (
        read_catalog(str(tmp_path / "other")) == []
        and not (tmp_path / "other/generations/gen-0001").exists()
    )


@pytest.mark.parametrize(
    "part, words", [("held_out", "held out in gen-0001"), ("", "published in gen-0001")]
)
def test_why_says_on_which_side_a_document_is(done, part, words):
    config, outcome = done
    folder = Path(outcome.published.uri, part)
    doc = min(ids_of(folder))
    url = corpus_of(config)[doc]["url"]
    spans = [
        s for s in pq.read_table(folder / "provenance.parquet").to_pylist() if s["doc_id"] == doc
    ]
    [fate] = why.why(config.run.directory, url)
    tokens = sum(s["length"] for s in spans)
    place = {
        "name": "gen-0001",
        "held_out": part != "",
        "rows": [s["row"] for s in spans],
        "tokens": tokens,
    }
    assert fate["fate"] == "published" and fate["generations"] == [place]
    shown = CliRunner().invoke(app, ["why", config.run.directory, url]).stdout
    assert words in shown and ("of its held-out part" in shown) == (part != "")


def test_units_that_are_all_held_out_or_not_at_all_make_a_whole_generation(tmp_path):
    config = make(tmp_path, texts=TEXTS[:4], each=1)
    outcome = run_inline(config)
    commits = results.all_commits(config.run.directory, read_state(config.run.directory))["pack"]
    held_out = {f"part-{c.unit}" for c in commits if "pack.held_out" in c.counts}
    assert {"part-" + c.unit for c in commits if not c.counts["kept"]} == held_out and 0 < len(
        held_out
    ) < len(commits) == 8
    assert {p.name for p in Path(outcome.published.uri, "held_out").glob("part-*")} == held_out
    assert verify_path(config.run.directory)[0].faults == []
    assert (
        ids_of(outcome.published.uri) | ids_of(f"{outcome.published.uri}/held_out")
        == corpus_of(config).keys()
    )


def test_a_run_that_holds_out_everything_publishes_nothing(tmp_path):
    config = make(tmp_path, texts=TEXTS[:4], held_out=0.9999999999)
    assert run_inline(config).published is None
    assert "pack.held_out" in {r.rule for r in results.run_funnel(config.run.directory)}
    assert write_report(config.run.directory)


def test_without_a_share_nothing_is_held_out_and_the_manifest_says_so(tmp_path):
    published = run_inline(make(tmp_path, texts=TEXTS[:4], held_out=0.0)).published
    assert published.manifest["held_out"] is None and not Path(published.uri, "held_out").exists()
    assert verify_path(published.uri)[0].faults == []
