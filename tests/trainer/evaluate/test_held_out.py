"""Held-out loss and cloze against slow reckonings, on one rank and two, and a training that
evaluation leaves untouched.
"""

import json
import math
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

torch = pytest.importorskip("torch")

import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from pipeline.run import publish as publishing
from stages.formats import mds
from stages.formats.errors import ConfigError
from stages.formats.tiktoken_encodings import load_encoding
from stages.formats.tokenizer import load_tokenizer
from stages.pack.pack import (
    CorpusPart,
    PackConfig,
    PackPlan,
    PackTask,
    pack_unit,
)
from stages.storage.catalog import GenerationError
from stages.storage.ledger import (
    Store,
    Unit,
)
from tests.support.ranks import run_ranks
from tests.support.shards import (
    SEQ_LEN,
    publish,
)
from trainer import loop
from trainer.config import (
    DataConfig,
    EvaluationConfig,
    HeldOutConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    SourceConfig,
    TrainConfig,
)
from trainer.data.rows import RowRef, read_batch
from trainer.evaluate import held_out as evaluate
from trainer.evaluate.cloze import ClozeScore, read_questions
from trainer.evaluate.held_out import EvalRows, Evaluation, Scores, pack_endings, rank_batches
from trainer.model.llama import Transformer

pytestmark = [pytest.mark.train, pytest.mark.usefixtures("one_thread")]

SMALL = ModelConfig(
    vocab_size=100_352, dim=8, num_layers=1, num_heads=2, num_kv_heads=1, ffn_dim=16
)
QUESTIONS = [
    {"query": "Question: Which is wet?", "choices": ["fire", "sea water", "a stone"], "gold": 1},
    {"query": "Ice is", "choices": ["cold", "uncommonly hot to the touch"], "gold": 0},
    {
        "query": "A story so long that its beginning has no place in a row, which is the case here, ends",
        "choices": ["well", "no"],
        "gold": 0,
    },
    {
        "query": "Two and two are",
        "choices": ["four", "five", "the colour of the sky", "x"],
        "gold": 0,
    },
]


@pytest.fixture
def data(tmp_path):
    """Two runs: one holds out 11 rows, but not of its first generation; the other 5."""
    publish(tmp_path / "a", 4)
    publish(tmp_path / "a", 4, held_out=11)
    publish(tmp_path / "a", 4, first=100, held_out=3)
    publish(tmp_path / "b", 4, first=30, held_out=5, compression="zstd")
    return DataConfig(
        sources=tuple(SourceConfig(str(tmp_path / run)) for run in "ab"), micro_batch_rows=2
    )


@pytest.fixture
def config(tmp_path):
    file = tmp_path / "asked.jsonl"
    file.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    return EvaluationConfig(every_steps=1, held_out_rows=9, cloze=(str(file),))


def build():
    return loop.build(
        TrainConfig(
            directory="unused",
            model=SMALL,
            parallel=ParallelConfig("fp32"),
            optimizer=OptimizerConfig(lr=0.1),
        ),
        "cpu",
    )


def plain():
    """The same weights without FSDP, in float64."""
    model = Transformer(SMALL)
    model.init_weights(0)
    return model.double()


def evaluation(config, data):
    return Evaluation(config, data, device="cpu")


def held_out(run, generation, rows, split="/held_out"):
    """Tokens and spans of the first rows, as they lie in the shards."""
    folder = f"{run}/generations/{generation}{split}"
    shards = [entry["zip_data"] or entry["raw_data"] for entry in mds.read_index(folder)["shards"]]
    return [row for shard in shards for row in mds.read_shard(f"{folder}/{shard['basename']}")][
        :rows
    ]


@torch.no_grad()
def slow_loss(rows):
    """(nats, targets): every document passed through the model by itself, in float64."""
    model, nats, targets = plain(), 0.0, 0
    for row in rows:
        ends = np.cumsum(row["spans"])
        for start, end in zip(ends - row["spans"], ends, strict=True):
            tokens = torch.from_numpy(row["tokens"][start:end].astype(np.int64))
            chances = model(tokens[None], None)[0].log_softmax(-1)
            nats -= float(chances[:-1].gather(1, tokens[1:, None]).sum())
            targets += len(tokens) - 1
    return nats, targets


@torch.no_grad()
def slow_likelihoods(seq_len):
    """Every ending by itself after its context, the two tokenized as one text, in float64."""
    encoding, model, found = load_encoding("cl100k_base"), plain(), []
    for question in QUESTIONS:
        asked = question["query"] + ("\nAnswer:" if "Question:" in question["query"] else "")
        for choice in question["choices"]:
            tokens = torch.tensor(encoding.encode_ordinary(f"{asked} {choice}")[-seq_len:])
            count = len(encoding.encode_ordinary(f" {choice}"))
            chances = model(tokens[None], None)[0].log_softmax(-1)
            found.append(float(chances[-count - 1 : -1].gather(1, tokens[-count:, None]).sum()))
    return found


def test_held_out_loss_is_that_of_each_document_alone_in_float64(config, data, group_of_one):
    scores = evaluation(config, data).run(build()[0])
    (a, b) = (source.run for source in data.sources)
    sums = {a: slow_loss(held_out(a, "gen-0002", 9)), b: slow_loss(held_out(b, "gen-0001", 9))}
    # 5 + 4 spans of 4 and 3: nine rows, five rows
    assert [targets for _, targets in sums.values()] == [
        48,
        26,
    ]
    assert scores.sources == pytest.approx(
        {run: nats / targets for run, (nats, targets) in sums.items()}, rel=1e-6
    )
    assert scores.loss == pytest.approx(sum(n for n, _ in sums.values()) / 74, rel=1e-6)


def test_likelihoods_are_those_of_each_ending_alone_in_float64(
    config, data, group_of_one, monkeypatch
):
    seen, choose = [], evaluate.score_answers
    monkeypatch.setattr(
        evaluate,
        "score_answers",
        lambda questions, found: seen.append(found) or choose(questions, found),
    )
    scores = evaluation(config, data).run(build()[0])
    assert seen == [pytest.approx(slow_likelihoods(SEQ_LEN), rel=1e-6)]
    [questions] = read_questions(config.cloze, 9).values()
    assert scores.cloze == {"asked": choose(questions, slow_likelihoods(SEQ_LEN))}
    assert scores.cloze["asked"][2:] == (4, pytest.approx((1 / 3 + 1 / 2 + 1 / 2 + 1 / 4) / 4))


def test_what_stage_pack_holds_out_is_what_is_scored(tmp_path, group_of_one):
    published = pack_with_urls(tmp_path, [None], 0.3)
    scores = evaluation(EvaluationConfig(), DataConfig(sources=(SourceConfig(str(tmp_path)),))).run(
        build()[0]
    )
    rows = held_out(tmp_path, "gen-0001", 256)
    nats, targets = slow_loss(rows)
    assert scores.loss == pytest.approx(nats / targets, rel=1e-6)
    part = published.manifest["held_out"]
    assert (len(rows), sum(int(row["spans"].sum()) for row in rows)) == (
        part["rows"],
        part["tokens"],
    )
    assert len(rows) > 5


# --- named sets -----------------------------------------------------------------------------------


def named(data, **sets):
    """Losses of named sets, and over all sources."""
    config = EvaluationConfig(held_out_rows=9, held_out=sets)
    return evaluation(config, data).run(build()[0])


def mean(*sums):
    return pytest.approx(sum(n for n, _ in sums) / sum(t for _, t in sums), rel=1e-6)


def test_named_sets_have_their_own_losses_and_leave_that_over_the_sources_alone(
    data, tmp_path, group_of_one
):
    publish(tmp_path / "curated", 6, first=500)
    a, curated = str(tmp_path / "a"), str(tmp_path / "curated")
    scores = named(
        data,
        late=HeldOutConfig(a, generations=("gen-0003",)),
        early=HeldOutConfig(a, rows=2),
        curated=HeldOutConfig(curated, split="training", rows=5),
    )
    assert scores.sets == {
        "late": mean(slow_loss(held_out(a, "gen-0003", 9))),
        "early": mean(slow_loss(held_out(a, "gen-0002", 2))),
        "curated": mean(slow_loss(held_out(curated, "gen-0001", 5, split=""))),
    }
    without = named(data)
    assert (scores.loss, scores.sources) == (without.loss, without.sources)
    assert without.sets == {} and scores.figures()["held_out/late/loss"] == scores.sets["late"]


def test_where_no_source_holds_anything_out_the_loss_is_over_the_named_sets(
    data, tmp_path, group_of_one
):
    publish(tmp_path / "c", 4)
    only_c = DataConfig(sources=(SourceConfig(str(tmp_path / "c")),), micro_batch_rows=2)
    a, b = (HeldOutConfig(source.run) for source in data.sources)
    scores = named(only_c, a=a, b=b)
    sums = slow_loss(held_out(a.run, "gen-0002", 99)), slow_loss(held_out(b.run, "gen-0001", 99))
    assert (scores.loss, scores.sources) == (mean(*sums), {})
    assert scores.sets == {"a": mean(sums[0]), "b": mean(sums[1])}


HOSTS = ["en.wikipedia.org", "wikipedia.org", "notwikipedia.org", "EN.Wikipedia.ORG:8080", "x.org"]


def pack_with_urls(tmp_path, urls, held_out):
    """A generation of 40 documents from these URLs in turn."""
    texts = [f"Document {n} of the mill: " + "it grinds wheat, " * (n % 9) for n in range(40)]
    schema = pa.schema([("doc_id", pa.uint64()), ("url", pa.string()), ("text", pa.large_string())])
    columns = [list(range(40)), [urls[n % len(urls)] for n in range(40)], texts]
    pq.write_table(pa.table(columns, schema=schema), tmp_path / "corpus.parquet")
    settings = PackConfig(seq_len=32, shard_bytes=2048, held_out=held_out)
    store = Store(str(tmp_path / "pack"))
    part = CorpusPart("000000", str(tmp_path / "corpus.parquet"), 1, "")
    commit = pack_unit(Unit("00000", "f", PackTask((part,))), PackPlan(settings, 0), store)
    return publishing.publish(str(tmp_path), store, [commit], settings, sources={})


@pytest.mark.parametrize("rows", [2, 256])
def test_a_set_of_hosts_is_of_their_documents_alone(tmp_path, group_of_one, rows):
    """Oracle: each document of the split by itself, those of other hosts left out."""
    urls = [f"https://{host}/page" for host in HOSTS] + [None, "http://["]
    pack_with_urls(tmp_path, urls, 0.5)
    run, folder = str(tmp_path), tmp_path / "generations" / "gen-0001" / "held_out"
    data = DataConfig(sources=(SourceConfig(run),), micro_batch_rows=2)
    scores = named(data, wiki=HeldOutConfig(run, rows=rows, hosts=("wikipedia.org",)))
    spans = pq.read_table(folder / "provenance.parquet").to_pylist()
    lines = held_out(run, "gen-0001", 10**6)
    wiki, tokens = [], 0
    for span in spans:
        if span["url"] in (urls[0], urls[1], urls[3]) and tokens < rows * 32:
            piece = lines[span["row"]]["tokens"][span["start"] : span["start"] + span["length"]]
            wiki.append({"tokens": piece, "spans": np.array([len(piece)], np.uint32)})
            tokens += len(piece)
    assert 0 < len(wiki) < len(spans) / 2
    assert scores.sets == {"wiki": mean(slow_loss(wiki))}


def test_named_sets_of_a_run_on_an_object_store_are_those_of_a_disk(
    tmp_path, s3_bucket, group_of_one
):
    pack_with_urls(tmp_path, ["https://x.org", "https://y.org"], 0.5)
    run, url = str(tmp_path), f"{s3_bucket}/run"
    store = pytest.importorskip("fsspec").filesystem("s3")
    for path in (*sorted((tmp_path / "generations").rglob("*.*")), tmp_path / "catalog.jsonl"):
        store.put_file(str(path), f"{url}/{path.relative_to(tmp_path)}")
    source = SourceConfig(run)
    data = DataConfig(sources=(source,), cache_dir=str(tmp_path / "cache"), micro_batch_rows=2)
    here, there = (
        named(data, x=HeldOutConfig(r, hosts=("x.org",)), y=HeldOutConfig(r, "training", rows=3))
        for r in (run, url)
    )
    assert here.sets == there.sets and len(here.sets) == 2


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"run": "absent"}, "no generation of .*absent has rows in its split 'held_out'$"),
        (
            {"run": "c"},
            "no generation of .*c has rows.*; of a run .*, split = 'training' takes all",
        ),
        ({"run": "a", "generations": ("gen-0001",)}, "no generation of .* 'held_out'; of a run"),
        (
            {"run": "long"},
            ".*long was packed with seq_len 32, the sources with seq_len 16: losses cannot be",
        ),
        ({"run": "packed", "hosts": ("no.org",)}, r"\.hosts: gen-0001/held_out .* no document"),
    ],
)
def test_a_named_set_without_comparable_rows_is_refused(
    data, tmp_path, group_of_one, changed, message
):
    publish(tmp_path / "c", 4)
    publish(tmp_path / "long", 4, seq_len=32, held_out=2)
    (tmp_path / "packed").mkdir()
    pack_with_urls(tmp_path / "packed", ["https://x.org"], 0.5)
    wrong = HeldOutConfig(**changed | {"run": str(tmp_path / changed["run"])})
    if changed["run"] == "packed":
        data = DataConfig(sources=(SourceConfig(wrong.run),))
    with pytest.raises(ConfigError, match=f"^evaluation.held_out.x(: )?{message}"):
        evaluation(EvaluationConfig(held_out={"x": wrong}), data)


def worker(rank, folder, config, data):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=2)
    seen = []
    evaluate.score_answers = lambda questions, found: seen.append(found) or ClozeScore(0, 0, 1, 0)
    scores = evaluation(config, data).run(build()[0])
    if rank == 0:
        os.remove(config.cloze[0])
    try:
        evaluation(config, data)
    except ConfigError as error:
        torch.save((scores, seen[0], str(error)), f"{folder}/seen.{rank}")
    dist.barrier()
    dist.destroy_process_group()


def test_two_ranks_score_as_one_and_hear_of_the_same_fault(config, data, tmp_path, group_of_one):
    """Neither the 9 and 5 rows held out, by two, nor those of questions are even over 2 ranks: some
    of them get fill alone.
    """
    [cloze] = (judge := evaluation(config, data))._rows.cloze.values()
    assert len(cloze.tokens) % 2 == 1
    one = judge.run(build()[0])
    run_ranks(worker, tmp_path, config, data, ranks=2)
    seen = [torch.load(tmp_path / f"seen.{rank}", weights_only=False) for rank in (0, 1)]
    assert seen[0] == seen[1]
    scores, likelihoods, why = seen[0]
    assert (scores.loss, scores.sources) == (
        pytest.approx(one.loss, rel=1e-6),
        pytest.approx(one.sources, rel=1e-6),
    )
    assert likelihoods == pytest.approx(slow_likelihoods(SEQ_LEN), rel=1e-6)
    assert "asked.jsonl: No such file" in why


def trained(data, between):
    """Weights after 3 steps of 2 micro-batches; `between` is called with the model before, amid and
    after each step.
    """
    torch.manual_seed(5)
    model, optimizer = build()
    for step in range(3):
        between(model)
        for row in (0, 1):
            batch = read_batch([RowRef(data.sources[0].run, "gen-0001", 4, step + row)])
            model.set_requires_gradient_sync(row == 1)
            model.loss(batch.tokens, batch.documents).sum.backward()
            between(model)
        optimizer.step()
        optimizer.zero_grad()
    between(model)
    return [p.full_tensor() for p in model.parameters()], torch.get_rng_state(), model.training


def test_a_training_with_evaluation_is_bit_for_bit_the_one_without(config, data, group_of_one):
    judge, losses = evaluation(config, data), []
    without, state, training = trained(data, lambda model: None)
    weights, state_after, still_training = trained(
        data, lambda model: losses.append(judge.run(model).loss)
    )
    assert all(map(torch.equal, weights, without))
    assert torch.equal(state, state_after) and training and still_training
    # it saw the first weights, and those of each update
    assert len(losses) == 10 and len(set(losses)) == 4


@pytest.mark.parametrize("right", [True, False])
def test_a_model_taught_the_answers_has_them_all_right_or_wrong(
    config, data, group_of_one, tmp_path, right
):
    [questions] = read_questions(config.cloze, 9).values()
    taught = [
        q._replace(endings=(q.endings[q.answer if right else q.answer - 1],), answer=0)
        for q in questions
    ]
    rows = pack_endings("taught", taught, load_tokenizer("cl100k_base"), seq_len=SEQ_LEN)
    model, optimizer = build()
    for _ in range(20):
        model.loss(rows.tokens, rows.documents).sum.backward()
        optimizer.step()
        optimizer.zero_grad()
    cloze = evaluation(config, data).run(model).cloze["asked"]
    assert (cloze.accuracy, cloze.accuracy_norm) == (float(right), float(right))


@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 4))
def test_rows_are_dealt_once_and_evenly(count, size, ranks):
    rows = EvalRows(*(torch.arange(count * 3).reshape(count, 3) for _ in range(3)))
    hands = [
        list(rank_batches(rows, size=size, rank=rank, world_size=ranks)) for rank in range(ranks)
    ]
    assert len({len(hand) for hand in hands}) == 1
    parts = [part for hand in hands for part in hand]
    assert {tuple(t.shape) for part in parts for t in part} == {(size, 3)}
    dealt = [
        tuple(row.tolist())
        for part in parts
        for row, of in zip(part.tokens, part.documents, strict=True)
        if of[0] >= 0
    ]
    assert sorted(dealt) == [tuple(row) for row in rows.tokens.tolist()]
    fill = [part for part in parts if (part.documents < 0).all()]
    assert all((part.endings == -1).all() and (part.tokens == 0).all() for part in fill)


@given(st.text(min_size=1).map(str.rstrip).filter(bool), st.text(min_size=1).filter(str.strip))
def test_a_context_and_its_ending_have_the_tokens_of_the_whole(context, ending):
    encoding = load_encoding("cl100k_base")
    apart = encoding.encode_ordinary(context) + encoding.encode_ordinary(f" {ending}")
    assert apart == encoding.encode_ordinary(f"{context} {ending}")


def flipped(folder):
    path = folder / "part-00000" / "shard.00000.mds"
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "flipped byte": (
        flipped,
        r"part-00000/shard.00000.mds: sha256 by manifest: expected \w{64}, found \w{64}",
    ),
    "short shard": (
        lambda f: os.truncate(f / "part-00000" / "shard.00000.mds", 99),
        "bytes by manifest: expected [0-9]+, found 99",
    ),
    "missing shard": (
        lambda f: (f / "part-00001" / "shard.00000.mds").unlink(),
        "part-00001/.*: file: expected present, found missing",
    ),
    "other index": (
        lambda f: (f / "index.json").write_text((f.parent / "index.json").read_text()),
        "rows: expected 11, found 4",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_to_what_is_held_out_is_named(config, data, damage):
    harm, message = DAMAGE[damage]
    harm(Path(data.sources[0].run, "generations", "gen-0002", "held_out"))
    with pytest.raises(
        GenerationError,
        match=f"^generation gen-0002/held_out: .*{message}.*; restore the generation",
    ):
        evaluation(config, data)


def test_only_generations_that_are_named_are_asked(config, data, group_of_one):
    def score(generations):
        return evaluation(
            config, DataConfig(sources=(SourceConfig(data.sources[0].run, 1.0, generations),))
        ).run(model)

    model, _ = build()
    assert score(("gen-0001",)).loss is None
    assert score(("gen-0001", "gen-0003")).loss == score(("gen-0003",)).loss != score(()).loss


def test_what_is_not_published_yet_is_found_by_a_later_run(config, tmp_path, group_of_one):
    run, (model, _) = tmp_path / "late", build()
    judge = evaluation(config, DataConfig(sources=(SourceConfig(str(run)),)))
    assert judge.run(model) == Scores(None, {}, {}, {})
    publish(run, 2, held_out=1)
    assert judge.run(model).sources.keys() == {str(run)}
    no_rows = evaluation(EvaluationConfig(held_out_rows=0, cloze=config.cloze), judge._data).run(
        model
    )
    assert no_rows.loss is None and no_rows.cloze.keys() == {"asked"}


def test_an_ending_longer_than_a_row_is_refused(config, data, tmp_path):
    row = {"query": "a", "choices": ["b", " ".join(["word"] * SEQ_LEN)], "gold": 0}
    (tmp_path / "asked.jsonl").write_text(json.dumps(QUESTIONS[0]) + "\n" + json.dumps(row))
    with pytest.raises(
        ConfigError, match="asked: question 2 has an ending longer than a row, 16 tokens"
    ):
        evaluation(config, data)


def test_figures_are_flat_and_leave_out_what_is_absent():
    cloze = {"arc_easy": ClozeScore(0.5, 0.25, 8, 0.2)}
    figures = Scores(2.0, {"/runs/a": 1.5}, {"wiki": 1.25}, cloze).figures()
    assert figures == {
        "held_out/loss": 2.0,
        "held_out/perplexity": pytest.approx(math.exp(2)),
        "held_out/runs/a/loss": 1.5,
        "held_out/wiki/loss": 1.25,
        "cloze/arc_easy/accuracy": 0.5,
        "cloze/arc_easy/accuracy_norm": 0.25,
        "cloze/arc_easy/questions": 8,
        "cloze/arc_easy/chance": 0.2,
    }
    assert Scores(None, {}, {}, {}).figures() == {}
