"""Checkpoints from and for transformers: its models give our logits, and ours theirs."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.config.train import load_training
from stages.formats.errors import ConfigError
from stages.formats.tokenizer import load_tokenizer
from stages.storage.files import open_fs
from tests.support.live_training import run_training
from tests.support.ranks import run_ranks

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file

from tests.support.checkpoints import NOW
from trainer.checkpoint import Checkpoints
from trainer.config import ModelConfig, OptimizerConfig, ParallelConfig
from trainer.launch import export
from trainer.model.hugging_face import export_hugging_face
from trainer.model.layouts import config_json, hugging_face_name, model_settings
from trainer.model.llama import Transformer
from trainer.model.optim import make_optimizer
from trainer.model.parallel import make_mesh, parallelize
from trainer.model.pretrained import check_same_init, load_pretrained
from trainer.ranks import Ranks

pytestmark = [pytest.mark.train, pytest.mark.usefixtures("one_thread")]

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# name: class of the config, settings
LAYOUTS = {
    "llama2": ("LlamaConfig", {"num_key_value_heads": 4}),
    "llama3": ("LlamaConfig", {"rope_scaling": LLAMA3_ROPE, "rope_theta": 5e5}),
    "llama3_tied": ("LlamaConfig", {"rope_scaling": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "llama_head_dim": ("LlamaConfig", {"head_dim": 12}),
    "qwen2": ("Qwen2Config", {"rms_norm_eps": 1e-5}),
    "qwen2_tied": ("Qwen2Config", {"tie_word_embeddings": True, "rope_theta": 1e6}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "qwen3_tied": ("Qwen3Config", {"head_dim": 8, "tie_word_embeddings": True}),
}


def save_theirs(folder, layout, *, dtype="float32", **options):
    """A model of transformers with random weights, none of which is 0 or 1, saved; it itself."""
    name, settings = LAYOUTS[layout]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**{**SIZES, **settings})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.to(getattr(torch, dtype)).save_pretrained(folder, **options)
    return model.eval()


def from_theirs(folder, **changes):
    config = ModelConfig(**{**model_settings(str(folder)), **changes}, init=str(folder))
    model = Transformer(config)
    record = load_pretrained(model, seed=3, ranks=Ranks())
    return model, record


def tokens():
    return torch.randint(0, 61, (2, 200), generator=torch.Generator().manual_seed(1))


def assert_same_logits(model, theirs):
    with torch.no_grad():
        expected, found = theirs(tokens()).logits, model(tokens(), None)
    assert expected.std() > 0.5  # logits that say something
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def saved(model, folder, record=None):
    """A checkpoint of ours; its folder."""
    checkpoints = Checkpoints(folder, NOW)
    optimizer = make_optimizer(model, OptimizerConfig())
    checkpoints.save(0, model, optimizer, {"supply": {"seq_len": 64}, "init": record})
    return checkpoints.latest().folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- start from a checkpoint of theirs ------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_model_of_theirs_has_its_logits_here(layout, tmp_path):
    theirs = save_theirs(tmp_path, layout)
    model, record = from_theirs(tmp_path)
    assert_same_logits(model, theirs)
    assert record["max_positions"] == 256 and record["path"] == str(tmp_path)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_of_16_bits_in_several_files_become_float32_exactly(dtype, tmp_path):
    theirs = save_theirs(tmp_path, "qwen3", dtype=dtype, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    model, _ = from_theirs(tmp_path)
    expected = {name: value.float() for name, value in theirs.state_dict().items()}
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, expected[hugging_face_name(name)])


def test_rows_of_a_larger_vocabulary_are_those_of_the_seed(tmp_path):
    theirs = save_theirs(tmp_path, "llama3")
    model, _ = from_theirs(tmp_path, vocab_size=64)
    drawn = Transformer(model.config)
    drawn.init_weights(3)
    assert torch.equal(model.embedding.weight[:61], theirs.model.embed_tokens.weight)
    for ours, expected in ((model.embedding, drawn.embedding), (model.head, drawn.head)):
        assert torch.equal(ours.weight[61:], expected.weight[61:])


def _load_on_rank(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=3
    )
    config = ModelConfig(**model_settings(folder), init=folder)
    config = replace(config, vocab_size=67)
    with torch.device("meta"):
        model = Transformer(config)
    fp32 = ParallelConfig(precision="fp32")
    parallelize(model, fp32, make_mesh(fp32, device="cpu"))
    model.to_empty(device="cpu")
    record = load_pretrained(model, seed=3, ranks=Ranks())
    weights = {name: p.full_tensor().detach() for name, p in model.named_parameters()}
    torch.save((record, weights), f"{folder}/seen-{rank}.pt")


def test_each_rank_reads_its_rows(tmp_path):
    """Of 67 rows, 6 drawn; on three ranks the last has fewer."""
    save_theirs(tmp_path, "qwen2")
    alone, record = from_theirs(tmp_path, vocab_size=67)
    run_ranks(_load_on_rank, str(tmp_path), ranks=3)
    for rank in range(3):
        seen_record, weights = torch.load(tmp_path / f"seen-{rank}.pt", weights_only=False)
        assert seen_record == record
        for name, parameter in alone.named_parameters():
            assert torch.equal(weights[name], parameter), name


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "mistral"),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("use_sliding_window", True),
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("partial_rotary_factor", 0.5),
        ("quantization_config", {"bits": 4}),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
        ("num_hidden_layers", None),
    ],
)
def test_a_model_that_ours_is_not_is_refused_by_the_name_of_its_key(key, value, tmp_path):
    save_theirs(tmp_path, "llama3")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(ValueError, match=rf"config\.json: {key}"):
        model_settings(str(tmp_path))


# what the config.json of published models has, as far as it concerns the model
LLAMA_32_1B = {
    "model_type": "llama",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "vocab_size": 128256,
}
QWEN_25_05B = {
    "model_type": "qwen2",
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 24,
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN_3_06B = {
    "model_type": "qwen3",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


@pytest.mark.parametrize(
    ("values", "changes", "parameters"),
    [
        (LLAMA_32_1B, {"rope_factor": 32.0}, 1_235_814_400),
        (QWEN_25_05B, {"qkv_bias": True}, 494_032_768),
        (QWEN_3_06B, {"qk_norm": True, "head_dim": 128}, 596_049_920),
    ],
)
def test_published_models_have_their_published_sizes(values, changes, parameters, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = ModelConfig(**model_settings(str(tmp_path)))
    assert all(getattr(config, key) == value for key, value in changes.items())
    with torch.device("meta"):
        model = Transformer(config)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_settings_of_transformers_5_are_those_of_4(tmp_path):
    save_theirs(tmp_path, "llama3")
    before = model_settings(str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    config["rope_parameters"] = config.pop("rope_scaling") | {
        "rope_theta": config.pop("rope_theta")
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert model_settings(str(tmp_path)) == before
    assert before["rope_theta"] == 5e5 and before["rope_factor"] == 8


def _edit_weights(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def _cut(folder):
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 1)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: _edit_weights(f, lambda t: t.pop("model.norm.weight")), r"missing: model\.norm"),
        (lambda f: _edit_weights(f, lambda t: t.update(x=torch.ones(2))), "does not have: x"),
        (
            lambda f: _edit_weights(f, lambda t: t.update({"model.norm.weight": torch.ones(5)})),
            r"model\.norm\.weight has the shape \[5\], expected \[32\]",
        ),
        (
            lambda f: _edit_weights(
                f, lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)})
            ),
            r"model\.norm\.weight is of I8; only F32, F16, BF16",
        ),
        (_cut, "expected .* bytes, found .*; copy it again"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 100), "no safetensors file"),
        (lambda f: (f / "model.safetensors").unlink(), "pickles are not read"),
        (lambda f: (f / "config.json").unlink(), "holds no config.json"),
    ],
)
def test_a_damaged_checkpoint_is_refused(damage, message, tmp_path):
    save_theirs(tmp_path, "llama2")
    config = ModelConfig(**model_settings(str(tmp_path)), init=str(tmp_path))
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_pretrained(Transformer(config), seed=0, ranks=Ranks())


def test_tables_and_a_tied_head_in_the_files_are_ignored(tmp_path):
    theirs = save_theirs(tmp_path, "llama3_tied")
    extra = {
        "lm_head.weight": torch.ones(61, 32),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }
    _edit_weights(tmp_path, lambda tensors: tensors.update(extra))
    assert_same_logits(from_theirs(tmp_path)[0], theirs)


def test_another_checkpoint_is_refused_when_a_training_resumes(tmp_path):
    save_theirs(tmp_path / "a", "llama2")
    _, record = from_theirs(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "moved")
    check_same_init(str(tmp_path / "a"), record, ranks=Ranks())  # not read
    check_same_init(str(tmp_path / "moved"), record, ranks=Ranks())
    _edit_weights(tmp_path / "moved", lambda tensors: tensors["model.norm.weight"].mul_(2))
    for other in (str(tmp_path / "moved"), ""):
        with pytest.raises(ValueError, match=r"this training started from '.*/a'; restore it"):
            check_same_init(other, record, ranks=Ranks())
    with pytest.raises(ValueError, match="this training started from ''; restore it"):
        check_same_init(str(tmp_path / "moved"), None, ranks=Ranks())


# --- the configuration ----------------------------------------------------------------------------


def test_the_sizes_of_model_init_need_not_be_given_and_may_not_differ(tmp_path):
    save_theirs(tmp_path / "hf", "qwen3")
    file = tmp_path / "train.toml"
    file.write_text(f'directory = "{tmp_path}/t"\n[model]\ninit = "{tmp_path}/hf"\n')
    model = load_training(file, ["model.vocab_size=64", "model.num_layers=2"]).model
    assert model == ModelConfig(
        **model_settings(f"{tmp_path}/hf") | {"vocab_size": 64}, init=model.init
    )
    for override, message in (
        ("model.dim=64", r"model\.dim = 64: .*hf has 32; leave the key out"),
        ("model.vocab_size=60", r"model\.vocab_size = 60: .*hf has 61"),
        ("model.preset=tiny", r"model\.preset: model\.init has the sizes"),
        (f"model.init={tmp_path}", r"model\.init: .*holds no config\.json"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_training(file, [override])


# --- export ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_export_started_from_and_exported_again_has_the_same_bytes(layout, dtype, tmp_path):
    save_theirs(tmp_path / "theirs", layout)
    first, again = tmp_path / "first", tmp_path / "again"
    for source, target in ((tmp_path / "theirs", first), (first, again)):
        checkpoint = saved(
            *from_theirs(source)[:1], f"{target}-checkpoints", from_theirs(source)[1]
        )
        export_hugging_face(checkpoint, target, dtype=dtype, shard_bytes=10_000)
    assert contents(first) == contents(again)
    assert len(contents(first)) > 5
    if dtype == "float32":
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
        assert_same_logits(from_theirs(again)[0], theirs)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"tie_embeddings": False},
        {"qkv_bias": True},
        {"qk_norm": True},
        {"head_dim": 20},
        {"rope_factor": 4.0, "rope_original_positions": 64},
    ],
)
def test_config_json_has_every_setting_of_a_model(change, tmp_path):
    config = replace(ModelConfig(), **change)
    special = {"bos_token_id": None, "eos_token_id": 5}
    data = config_json(config, dtype="bfloat16", max_positions=128, special_tokens=special)
    (tmp_path / "config.json").write_bytes(data)
    assert ModelConfig(**model_settings(str(tmp_path))) == config


def test_a_model_that_no_architecture_has_is_not_exported(tmp_path):
    config = replace(ModelConfig(**_small(tmp_path)), qkv_bias=True, qk_norm=True)
    model = Transformer(config)
    model.init_weights(0)
    with pytest.raises(ValueError, match="both qkv_bias and qk_norm"):
        export_hugging_face(saved(model, tmp_path / "checkpoints"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _small(tmp_path):
    save_theirs(tmp_path / "sizes", "llama2")
    return model_settings(str(tmp_path / "sizes"))


@pytest.mark.parametrize("kind", ["folder", "URL"])
def test_an_export_removes_the_files_of_an_earlier_one(kind, tmp_path):
    """Else a reader would take the earlier one's weights, which come first in its names."""
    save_theirs(tmp_path / "theirs", "llama2")
    model, record = from_theirs(tmp_path / "theirs")
    checkpoint = saved(model, tmp_path / "checkpoints", record)
    output = {"folder": str(tmp_path / "out"), "URL": f"memory://{tmp_path.name}/out"}[kind]
    export_hugging_face(checkpoint, output)
    export_hugging_face(checkpoint, output, shard_bytes=5_000)
    export_hugging_face(checkpoint, output)
    fs, path = open_fs(output)
    assert {name.rpartition("/")[2] for name in fs.find(path)} == {
        ".gristmill-export",
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }
    if kind == "folder":
        assert all(file.stat().st_mode & 0o044 == 0o044 for file in Path(output).iterdir())


def test_a_folder_of_other_files_is_not_exported_to(tmp_path):
    """It may be the checkpoint that the training started from."""
    save_theirs(tmp_path / "theirs", "llama2")
    before = contents(tmp_path / "theirs")
    model, record = from_theirs(tmp_path / "theirs")
    checkpoint = saved(model, tmp_path / "checkpoints", record)
    with pytest.raises(ValueError, match="files and no earlier export; name another folder"):
        export_hugging_face(checkpoint, tmp_path / "theirs")
    assert contents(tmp_path / "theirs") == before


def test_an_export_has_the_tokenizer_of_the_rows(config, tmp_path, caplog):
    """In a plain process: text in, text out."""
    config = replace(config, model=replace(config.model, vocab_size=100_352), max_steps=4)
    run_training(config)
    assert export(config.directory, str(tmp_path / "out"), step=None) == 4
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (settings["eos_token_id"], settings["bos_token_id"]) == (100_257, None)
    encoding = load_tokenizer("cl100k_base")
    text = "Größe: 1234 naïve 中文\n\n"
    expected = encoding.encode_batch([text])[0].tolist()
    assert in_plain_process(TOKENIZES, tmp_path / "out", text) == f"{expected} {text!r}\n"
    again = tmp_path / "again"
    export(config.directory, str(again), step=None)
    assert contents(tmp_path / "out") == contents(again)
    shutil.rmtree(config.data.sources[0].run)
    export(config.directory, str(again), step=None)
    assert "exported without a tokenizer" in caplog.text and "gen-0001" in caplog.text
    assert not list(again.glob("tokenizer*"))


TOKENIZES = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
inputs = tokenizer(sys.argv[2], return_tensors="pt")
ids = inputs["input_ids"][0].tolist()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
new = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3)[0].tolist()
assert new[:-3] == ids
print(ids, repr(tokenizer.decode(ids)))
"""


def in_plain_process(code, *arguments):
    """What a Python that has not imported anything of ours prints."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd="/", timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert "incorrect" not in ended.stderr, ended.stderr
    return ended.stdout


PLAIN_PROCESS = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
assert model.dtype == torch.bfloat16, model.dtype
print(model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False).shape[1])
"""


@pytest.mark.parametrize("layout", ["llama3_tied", "qwen2", "qwen3"])
def test_transformers_loads_and_generates_in_a_plain_process(layout, tmp_path):
    """In the project's own environment, without any preparation (see the Makefile, torchvision)."""
    save_theirs(tmp_path / "theirs", layout)
    model, record = from_theirs(tmp_path / "theirs")
    export_hugging_face(saved(model, tmp_path / "checkpoints", record), tmp_path / "out")
    shutil.rmtree(tmp_path / "theirs")
    assert in_plain_process(PLAIN_PROCESS, tmp_path / "out") == "7\n"
