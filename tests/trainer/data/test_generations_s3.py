"""Generations on object storage: the batches are those of a disk, whatever the cache, the store and
the kills did. A real S3 server.
"""

import os
import signal
import socket
import subprocess
import threading
import time
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytestmark = pytest.mark.train
torch = pytest.importorskip("torch")
s3fs = pytest.importorskip("s3fs")

import fsspec

from pipeline.config.train import load_training
from stages.formats.errors import ConfigError
from stages.formats.tokenizer import load_tokenizer
from stages.pack.pack import PROVENANCE
from stages.storage.catalog import GenerationError, read_catalog
from tests.support.inline import make_config, run_inline
from tests.support.live_training import run_training
from tests.support.loading import BOTH, data_config, next_when_published, on_two_ranks
from tests.support.paths import ROOT
from tests.support.processes import call_command
from tests.support.shards import publish
from trainer.config import EvaluationConfig, SourceConfig
from trainer.data import (
    generations,
    loader,
)
from trainer.data.generations import (
    folder_of,
    load_generation_tokenizer,
    stage,
    verify_generation,
)
from trainer.data.loader import BatchLoader
from trainer.telemetry.feedback import read_summaries
from trainer.telemetry.records import read_metrics
from trainer.telemetry.why_step import why_step

SHARD = "part-00001/shard.00000.mds"
PATIENCE = 600  # seconds until a test that would hang fails


def files():
    """What another process sees."""
    return fsspec.filesystem("s3", skip_instance_cache=True)


def upload(run, url):
    """What a run on a disk has published, to the store: the catalog last."""
    store = files()
    for path in (*sorted((run / "generations").rglob("*.*")), run / "catalog.jsonl"):
        store.put_file(str(path), f"{url}/{path.relative_to(run)}")


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def url(s3_bucket):
    return f"{s3_bucket}/runs/a"


@pytest.fixture
def cache(tmp_path):
    generations._hashed.clear()
    return tmp_path / "cache"


def batches(data, **options):
    """Rows and tokens of all steps."""
    found = []
    with BatchLoader(data, rank=0, world_size=1, **options) as supplied:
        while batches := next_when_published(supplied, len(found)):
            found.append(
                [
                    (batch.row_ids, batch.tokens.tolist(), batch.documents.tolist())
                    for batch in batches
                ]
            )
    return found


def staged(url, cache, name="gen-0001", mode="full"):
    """The folder of a generation that was copied as a supply does it."""
    [entry] = [entry for entry in read_catalog(url) if entry["name"] == name]
    stage(verify_generation(url, entry, mode=mode, cache=str(cache)), mode=mode, cache=str(cache))
    return folder_of(url, name, str(cache))


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.mds*")
    }


@pytest.fixture
def asked(faults):
    """Start to note the shards that the store is asked for, and return the list; for what is done
    at each, `then`.
    """

    def start(then=lambda shard: None):
        shards = []

        def note(number, method, path):
            if method == "GET" and ".mds" in path:
                shards.append("/".join(path.partition("?")[0].split("/")[-2:]))
                return then(shards[-1])
            return None

        faults(note)
        return shards

    return start


# --- batches --------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("compression", [None, "zstd:3"])
def test_batches_are_those_of_a_disk_and_what_is_read_is_removed(
    run, url, cache, workers, compression
):
    for number, rows in enumerate((21, 3, 24)):
        publish(run, rows, first=1000 * number, compression=compression)
    upload(run, url)
    expected = batches(data_config(run, workers=workers))
    assert len(expected) == 6
    assert batches(data_config(url, workers=workers, cache_dir=str(cache))) == expected
    left = {
        name: contents(folder_of(url, name, str(cache)))
        for name in ("gen-0001", "gen-0002", "gen-0003")
    }
    assert [name for name, there in left.items() if there] == ["gen-0003"]


def test_repeated_generations_stay(run, url, cache, asked):
    publish(run, 16)
    publish(run, 8, first=1000)
    upload(run, url)
    shards, repeated = asked(), {"at_end": "repeat", "max_epochs": 3}
    assert batches(data_config(url, cache_dir=str(cache), **repeated)) == batches(
        data_config(run, **repeated)
    )
    assert len(shards) == 3


def test_a_state_of_the_disk_goes_on_from_the_store(run, url, cache, s3_bucket):
    """Only what is still to be read is copied, and what need not be any more is removed."""
    for number in range(3):
        publish(run, 16, first=1000 * number)
    upload(run, url)
    whole = batches(data_config(url, cache_dir=str(cache / "whole")))
    with BatchLoader(data_config(url, cache_dir=str(cache)), rank=0, world_size=1) as supplied:
        for step in range(3):
            next_when_published(supplied, step)
        state = supplied.state_dict()
    staged(url, cache / "other")  # by an incarnation that died
    with BatchLoader(
        data_config(url, cache_dir=str(cache / "other")), rank=0, world_size=1, state=state
    ) as supplied:
        rest = [
            [
                (b.row_ids, b.tokens.tolist(), b.documents.tolist())
                for b in next_when_published(supplied, step)
            ]
            for step in (3, 4, 5)
        ]
    assert rest == whole[3:]
    assert contents(folder_of(url, "gen-0001", str(cache / "other"))) == {}


@pytest.mark.parametrize("local_rank", ["0", "1"])
def test_a_generation_appended_later_is_entered_on_every_rank_of_a_node(
    run, url, cache, monkeypatch, local_rank
):
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setattr(loader, "POLL_SECONDS", 0.01)
    publish(run, 12)
    upload(run, url)
    with BatchLoader(
        data_config(url, cache_dir=str(cache), at_end="wait"), rank=0, world_size=1
    ) as supplied:
        found = next_when_published(supplied, 0)
        publish(run, 12, first=1000)
        upload(run, url)
        found += next_when_published(supplied, 1) + next_when_published(supplied, 2)
    assert {place for batch in found for place in batch.row_ids} == {
        (f"gen-000{n}", row) for n in (1, 2) for row in range(12)
    }


def test_the_next_generation_is_copied_while_the_first_is_read(run, url, cache):
    publish(run, 40)
    publish(run, 20, first=1000)
    upload(run, url)
    with BatchLoader(data_config(url, cache_dir=str(cache)), rank=0, world_size=1) as supplied:
        next_when_published(supplied, 0)
        assert {
            name for batch in next_when_published(supplied, 1) for name, _ in batch.row_ids
        } == {"gen-0001"}
        supplied._sources[0].copies.threads[1].join(PATIENCE)
        assert contents(folder_of(url, "gen-0002", str(cache))) == contents(
            run / "generations" / "gen-0002"
        )
        assert {
            name for batch in next_when_published(supplied, 2) for name, _ in batch.row_ids
        } == {"gen-0001"}


def test_two_processes_share_one_copy(run, url, tmp_path, monkeypatch):
    publish(run, 24)
    upload(run, url)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    found = on_two_ranks(tmp_path, url)
    together = [
        [place for batch in a + b for place in batch]
        for a, b in zip(found[0, url], found[1, url], strict=True)
    ]
    assert together == [
        [place for where, *_ in step for place in where] for step in batches(data_config(run))
    ]
    assert len(list(tmp_path.glob("gristmill-*/*/gen-0001/*/*.mds"))) == 3


# --- caches that are not whole --------------------------------------------------------------------


def shorten(folder):
    os.truncate(folder / SHARD, 100)


def remove(folder):
    (folder / SHARD).unlink()


def leave_a_half(folder):
    (folder / SHARD).rename(folder / f"{SHARD}.{socket.gethostname()}.tmp")


def flip(folder, shard=SHARD):
    data = bytearray((folder / shard).read_bytes())
    data[-20] ^= 1
    (folder / shard).write_bytes(data)


def tear_the_index(folder):
    (folder / "index.json").write_bytes(b"")


def forget_the_mark(folder):
    (folder / "manifest.sha256").write_text("")


@pytest.mark.parametrize(
    "damage", [shorten, remove, leave_a_half, flip, tear_the_index, forget_the_mark]
)
def test_of_a_cache_that_is_not_whole_only_what_is_wrong_is_copied_again(
    run, url, cache, asked, damage
):
    publish(run, 20)
    upload(run, url)
    folder = staged(url, cache)
    damage(folder)
    generations._hashed.clear()  # as in another process
    shards = asked()
    assert batches(data_config(url, cache_dir=str(cache))) == batches(data_config(run))
    assert sorted(shards) == sorted(
        contents(folder) if damage in (tear_the_index, forget_the_mark) else [SHARD]
    )
    assert contents(folder) == contents(run / "generations" / "gen-0001")


@pytest.mark.parametrize("mode", ["quick", "full"])
def test_another_generation_under_the_same_url_and_name_is_not_read_from_the_old_copy(
    run, url, cache, tmp_path, mode
):
    publish(run, 20)
    upload(run, url)
    staged(url, cache)
    publish(tmp_path / "new", 20, first=500)  # files of the same sizes
    upload(tmp_path / "new", url)
    assert batches(data_config(url, cache_dir=str(cache), verify=mode)) == batches(
        data_config(tmp_path / "new")
    )


def copy_generation(url, cache):
    generation = verify_generation(url, read_catalog(url)[0], mode="full", cache=cache)
    stage(generation, mode="full", cache=cache)


@pytest.mark.kill
def test_a_copy_killed_in_the_middle_is_gone_on_with(run, url, cache, asked):
    publish(run, 40, per_shard=2)
    upload(run, url)
    folder, seen, released = folder_of(url, "gen-0001", str(cache)), [], threading.Event()
    shards = asked(
        lambda shard: (
            seen.append(shard) if len(seen) < 11 else released.wait(PATIENCE) and "no answer"
        )
    )
    process = subprocess.Popen(call_command(copy_generation, url, cache), cwd=ROOT)
    try:
        while len([name for name in contents(folder) if name.endswith(".mds")]) < 11:
            assert process.poll() is None
            time.sleep(0.02)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        released.set()
    there = {name for name in contents(folder) if name.endswith(".mds")}
    assert len(there) == 11
    shards = asked()
    assert batches(data_config(url, cache_dir=str(cache))) == batches(data_config(run))
    # each by one of the two
    assert sorted([*shards, *there]) == sorted(contents(run / "generations" / "gen-0001"))
    assert contents(folder) == contents(run / "generations" / "gen-0001")


# --- a store that fails ---------------------------------------------------------------------------


def flip_on_the_store(url):
    """The path of a shard on the store, and its bytes of before."""
    path = f"{url}/generations/gen-0001/{SHARD}"
    data = files().cat_file(path)
    files().pipe_file(path, data[:-20] + bytes([data[-20] ^ 1]) + data[-19:])
    return path, data


def test_a_flipped_byte_on_the_store_is_asked_for_twice_and_named(run, url, cache, asked):
    publish(run, 20)
    upload(run, url)
    flip_on_the_store(url)
    shards = asked()
    for mode in ("full", "quick"):
        shards.clear()
        with pytest.raises(
            GenerationError,
            match=rf"gen-0001: {SHARD}: expected sha256 \w{{64}}, found \w{{64}}; restore",
        ):
            staged(url, cache, mode=mode)
        assert shards.count(SHARD) == 2
    with (
        pytest.raises(GenerationError, match=rf"gen-0001: {SHARD}: expected sha256"),
        BatchLoader(data_config(url, cache_dir=str(cache)), rank=0, world_size=1) as supplied,
    ):
        next_when_published(supplied, 0)
    assert SHARD not in contents(folder_of(url, "gen-0001", str(cache)))


def test_a_copy_that_went_wrong_is_not_read_because_it_cannot_be_mended(run, url, cache):
    publish(run, 40, per_shard=2)
    upload(run, url)
    folder = staged(url, cache)
    generations._hashed.clear()  # as in another process
    flip(folder)
    flip(folder, "part-00019/shard.00000.mds")  # of those that are looked at after it
    flip_on_the_store(url)
    with (
        pytest.raises(GenerationError, match=rf"gen-0001: {SHARD}: expected sha256"),
        BatchLoader(data_config(url, cache_dir=str(cache)), rank=0, world_size=1) as supplied,
    ):
        next_when_published(supplied, 0)


def test_a_byte_that_is_wrong_once_is_right_when_asked_for_again(run, url, cache, asked):
    publish(run, 20)
    upload(run, url)
    store, (path, data), seen = files(), flip_on_the_store(url), []
    store.info(path)  # it connects now, not through what comes before the store

    def restore(shard):
        seen.append(shard)
        if seen.count(SHARD) == 2:
            store.pipe_file(path, data)

    asked(restore)
    assert contents(staged(url, cache)) == contents(run / "generations" / "gen-0001")
    assert seen.count(SHARD) == 2


@pytest.mark.parametrize(
    "lost, told",
    [
        (SHARD, rf"gen-0001: {SHARD}: expected a readable file"),
        ("index.json", "gen-0001: index.json: expected a readable file"),
        ("manifest.json", "gen-0001: manifest.json: expected a readable file"),
    ],
)
def test_what_the_store_has_lost_is_named(run, url, cache, lost, told):
    publish(run, 20)
    upload(run, url)
    files().rm_file(f"{url}/generations/gen-0001/{lost}")
    with pytest.raises(GenerationError, match=told):
        staged(url, cache)


def test_an_index_that_was_torn_is_read_again_once_it_is_restored(run, url, cache):
    publish(run, 20)
    upload(run, url)
    files().pipe_file(f"{url}/generations/gen-0001/index.json", b'{"version": 2, "sha')
    with pytest.raises(
        GenerationError, match=r"index\.json: content: expected an index of MDS shards"
    ):
        staged(url, cache)
    upload(run, url)
    assert contents(staged(url, cache)) == contents(run / "generations" / "gen-0001")


def test_copies_come_through_faults_of_every_kind(run, url, cache, faults):
    publish(run, 40, per_shard=2)
    upload(run, url)
    kinds = iter([500, 503, "no answer", "half answer"])
    proxy = faults(lambda number, method, path: next(kinds, None) if ".mds" in path else None)
    assert contents(staged(url, cache)) == contents(run / "generations" / "gen-0001")
    assert (
        proxy.done[500]
        == proxy.done[503]
        == proxy.done["no answer"]
        == proxy.done["half answer"]
        == 1
    )


def test_a_copy_that_failed_in_the_background_is_made_when_it_is_wanted(
    run, url, cache, faults, monkeypatch
):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    publish(run, 40)
    publish(run, 20, first=1000)
    upload(run, url)
    broken = [True]
    proxy = faults(lambda number, method, path: 500 if broken and "gen-0002/part" in path else None)
    with BatchLoader(data_config(url, cache_dir=str(cache)), rank=0, world_size=1) as supplied:
        found = [next_when_published(supplied, step) for step in range(2)]
        supplied._sources[0].copies.threads[1].join(PATIENCE)
        assert proxy.done[500] and not contents(folder_of(url, "gen-0002", str(cache)))
        broken.clear()
        found += [next_when_published(supplied, step) for step in range(2, 7)]
    assert [[batch.row_ids for batch in step] for step in found] == [
        [where for where, *_ in step] for step in batches(data_config(run))
    ]


def test_while_a_copy_is_under_way_the_supply_is_empty_but_not_at_its_end(
    run, url, cache, faults, monkeypatch
):
    """So the loop goes on to tell that it waits, and to hear that it should stop; also where the
    end would end the training.
    """
    monkeypatch.setattr(loader, "POLL_SECONDS", 0.05)
    publish(run, 12)
    upload(run, url)
    answered = threading.Event()
    faults(
        lambda number, method, path: answered.wait(PATIENCE) and None if "/part" in path else None
    )
    with BatchLoader(
        data_config(url, cache_dir=str(cache), at_end="stop"), rank=0, world_size=1
    ) as supplied:
        told = supplied.next(0), supplied.should_wait(), supplied.poll(), supplied.should_wait()
        answered.set()
        assert told == ([], True, False, True) and next_when_published(supplied, 0)


def test_a_store_that_stays_away_is_no_verdict_on_the_generation(
    run, url, cache, faults, monkeypatch
):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    publish(run, 12)
    upload(run, url)
    monkeypatch.setattr("s3fs.S3FileSystem.retries", 1)
    faults(lambda number, method, path: 503 if "/part" in path else None)
    with (
        BatchLoader(data_config(url, cache_dir=str(cache)), rank=0, world_size=1) as supplied,
        pytest.raises(OSError, match=r"^rank 0: "),
    ):
        next_when_published(supplied, 0)
    faults(lambda number, method, path: 503)
    with pytest.raises(OSError, match=r"^rank 0: "):
        BatchLoader(data_config(url, cache_dir=str(cache)), rank=0, world_size=1)


# --- a training -----------------------------------------------------------------------------------


def test_a_training_reads_evaluates_and_tells_on_the_store(config, tmp_path, url, cache):
    run = tmp_path / "stored"
    publish(run, 40, held_out=8)
    spans = [(row, row, 0, 16, 0, f"https://mill.example/{row}") for row in range(40)]
    table = pa.table([list(column) for column in zip(*spans, strict=True)], schema=PROVENANCE)
    pq.write_table(table, run / "generations/gen-0001/provenance.parquet")
    upload(run, url)
    told = []
    for name, where in (("disk", str(run)), ("store", url)):
        data = replace(config.data, sources=(SourceConfig(where),), cache_dir=str(cache))
        directory = tmp_path / name
        judged = EvaluationConfig(every_steps=6)
        run_training(
            replace(config, directory=str(directory), data=data, evaluation=judged),
            device="cpu",
        )
        losses = [
            (r["loss"], r.get("held_out/loss")) for r in read_metrics(directory / "metrics.jsonl")
        ]
        blamed = [(b.row.row, [d.url for d in b.documents]) for b in why_step(directory, 7)]
        [summary] = read_summaries(f"{where}/feedback").summaries
        told.append(
            (losses, blamed, summary.report.tokens_total, list(summary.report.sources.values()))
        )
    assert told[0] == told[1]
    assert told[1][1][0][1] == [f"https://mill.example/{told[1][1][0][0]}"] and losses[5][1]
    assert read_summaries(f"{url}/feedback").summaries[0].report.sources.keys() == {url}


def test_the_cache_is_a_local_folder_below_the_training_unless_told(tmp_path):
    file = tmp_path / "train.toml"
    file.write_text(f'directory = "{tmp_path}/t"\n[data]\nsources = [{{run = "s3://b/r"}}]')
    assert (
        load_training(file).data.cache_dir == f"{tmp_path}/t/cache"
        and load_training(file).data.sources[0].run == "s3://b/r"
    )
    assert load_training(file, ["data.cache_dir=/scratch"]).data.cache_dir == "/scratch"
    with pytest.raises(ConfigError, match=r"data\.cache_dir = 's3://b/c': give a local folder"):
        load_training(file, ["data.cache_dir=s3://b/c"])


def test_a_tokenizer_is_read_from_the_store_and_verified(url, cache, tmp_path, tokenizer_files):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a mill by the river", "url": "https://a.example/"}\n')
    settings = ["input.format=jsonl", "input.url_column=url", "extract.filters=[]"]
    settings += ["refine.filters=[]", "language.allowed=[]", "language.score=off"]
    settings += ["pack.seq_len=16", f"pack.tokenizer='{tokenizer_files['bpe'][0]}'"]
    run_inline(make_config(tmp_path, [rows], *settings))
    upload(tmp_path / "run", url)
    [entry] = read_catalog(url)
    loaded = load_generation_tokenizer(url, entry, cache=str(cache))
    assert replace(loaded, file=None) == replace(
        load_tokenizer(tokenizer_files["bpe"][0]), file=None
    )
    manifest = verify_generation(url, entry, mode="full", cache=str(cache))
    stage(manifest, mode="full", cache=str(cache))
    name = "tokenizer/bpe.json"
    assert (folder_of(url, manifest.name, str(cache)) / name).exists()
    files().pipe_file(f"{url}/generations/gen-0001/{name}", b"{}")
    with pytest.raises(GenerationError, match=rf"gen-0001: {name}: bytes by manifest"):
        load_generation_tokenizer(url, entry, cache=str(cache))
