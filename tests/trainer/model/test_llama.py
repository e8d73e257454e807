"""The model against transformers' Llama, against itself without packing, and its loss against plain
autograd.
"""

import itertools
import math
import os
import shutil
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.examples import at_most

torch = pytest.importorskip("torch")

import torch.nn.functional as F

from trainer.config import PRESETS, ModelConfig
from trainer.model import attention, packing
from trainer.model import llama as model_module
from trainer.model import loss as loss_module
from trainer.model.hugging_face import save_hugging_face
from trainer.model.layouts import hugging_face_name
from trainer.model.llama import Transformer, flops_per_token
from trainer.model.loss import loss_and_gradient
from trainer.model.packing import IGNORE, next_tokens, num_targets, packed_documents

pytestmark = [pytest.mark.train, pytest.mark.usefixtures("one_thread")]

VOCAB = 61
SMALL = ModelConfig(vocab_size=VOCAB, dim=32, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=48)
CONFIGS = [
    SMALL,
    replace(SMALL, tie_embeddings=False),
    replace(SMALL, num_kv_heads=4),
    replace(SMALL, num_kv_heads=1),
    replace(SMALL, head_dim=12),
]
# lengths of the documents of a row, then fill
SPANS = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=3)


def build(config, seed=0):
    model = Transformer(config)
    model.init_weights(seed)
    return model


def excited(config):
    """Weights so large that attention is sharp, logits far apart, and norms not 1: mistakes show."""
    model = build(config)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.mul_(
                8
                if parameter.ndim == 2
                else torch.linspace(0.5, 1.5, len(parameter)) + 0.01 * number
            )
    return model


def packed(spans, fill=3):
    """tokens and documents (rows, the longest row + fill)."""
    length = max(map(sum, spans)) + fill
    documents = [[n for n, span in enumerate(row) for _ in range(span)] for row in spans]
    documents = torch.tensor([row + [-1] * (length - len(row)) for row in documents])
    tokens = torch.randint(
        0, VOCAB, documents.shape, generator=torch.Generator().manual_seed(length)
    )
    return tokens, documents


def llama(transformers, folder, model):
    """The model in transformers, by way of an export."""
    state = model.state_dict()

    def read(tensors):
        for name, tensor in tensors.items():
            tensor.copy_(state[name])

    save_hugging_face(folder, model.config, read, dtype="float32", max_positions=64)
    return transformers.LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


@pytest.mark.parametrize("config", CONFIGS)
def test_logits_are_those_of_transformers_with_the_exported_weights(config, transformers, tmp_path):
    model = excited(config)
    theirs = llama(transformers, tmp_path, model)
    tokens = torch.randint(0, VOCAB, (2, 40))
    with torch.no_grad():
        expected, found = theirs(tokens).logits, model(tokens, None)
    assert expected.std() > 1  # logits that say something
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    assert theirs.config.max_position_embeddings == 64
    assert theirs.config.tie_word_embeddings == config.tie_embeddings
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in model.parameters())


def test_gradients_are_those_of_transformers(transformers, tmp_path):
    model = excited(SMALL)
    theirs = llama(transformers, tmp_path, model)
    tokens = torch.randint(0, VOCAB, (2, 20))
    model.loss(tokens, None).sum.backward()
    logits = theirs(tokens).logits[:, :-1]
    torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum"
    ).backward()
    expected = {hugging_face_name(name): p.grad for name, p in model.named_parameters()}
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(
            expected[name], parameter.grad, rtol=1e-3, atol=1e-4 * parameter.grad.abs().max().item()
        )


@at_most(30)
@given(
    spans=SPANS, kv_heads=st.sampled_from([1, 2, 4]), attention=st.sampled_from(["sdpa", "flex"])
)
def test_a_packed_document_gives_the_logits_it_gives_alone(spans, kv_heads, attention):
    model = excited(replace(SMALL, num_kv_heads=kv_heads, attention=attention))
    tokens, documents = packed(spans)
    with torch.no_grad():
        found = model(tokens, documents)
        assert found.isfinite().all()  # also in fill
        for row, lengths in enumerate(spans):
            parts = [*lengths, tokens.shape[1] - sum(lengths)]
            for alone, logits in zip(
                tokens[row].split(parts), found[row].split(parts), strict=True
            ):
                torch.testing.assert_close(
                    logits, model(alone[None], None)[0], rtol=1e-4, atol=1e-4
                )


def test_a_token_changes_no_logit_before_it_or_in_another_document():
    model = excited(SMALL)
    tokens, documents = packed([[5, 6]], fill=2)
    other = tokens.clone()
    other[0, 7] = (tokens[0, 7] + 1) % VOCAB
    with torch.no_grad():
        changed = (model(tokens, documents) != model(other, documents)).any(-1)[0]
    assert changed.nonzero().flatten().tolist() == [7, 8, 9, 10]


def documents_of(lengths, length):
    """Documents of these lengths, over and over, in a row of `length` tokens and 3 of fill."""
    ids = itertools.chain.from_iterable(
        [n] * size for n, size in enumerate(itertools.cycle(lengths))
    )
    row = list(itertools.islice(ids, max(0, length - 3)))
    return [*row, *[-1] * (length - len(row))]


LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=8)


@at_most(40)
@given(rows=st.lists(LENGTHS, min_size=1, max_size=2), length=st.integers(1, 520))
def test_flex_attention_is_sdpa_with_a_dense_mask_forward_and_backward(rows, length):
    """Over several blocks of 128. FlexAttention's backward pass is not open to users on CPUs: here
    its uncompiled operators, the definition that its kernels are tested against, are.
    """
    starts = packing.document_starts(torch.tensor([documents_of(row, length) for row in rows]))
    q, k, v = (
        torch.randn(len(rows), heads, length, 8, dtype=torch.float64, requires_grad=True)
        for heads in (4, 2, 2)
    )
    weights, found = torch.randn(len(rows), 4, length, 8, dtype=torch.float64), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
        for kernel in ("sdpa", "flex"):
            out = attention.attend(q, k, v, attention.attention_mask(starts, kernel))
            found[kernel] = [out, *torch.autograd.grad(out, (q, k, v), weights)]
    torch.testing.assert_close(found["flex"], found["sdpa"], rtol=1e-9, atol=1e-9)


@at_most(40)
@given(lengths=LENGTHS, length=st.integers(1, 700))
def test_blocks_of_scores_are_computed_where_something_is_visible_and_only_there(lengths, length):
    starts = packing.document_starts(torch.tensor([documents_of(lengths, length)]))
    mask, size = attention.block_mask(starts), -(-length // attention.BLOCK)
    visible = torch.zeros(size * 128, size * 128, dtype=torch.bool)
    visible[:length, :length] = attention.attention_mask(starts, "sdpa")[0, 0]
    blocks = visible.view(size, 128, size, 128).transpose(1, 2).flatten(2)
    assert mask.to_dense()[0, 0].bool().equal(blocks.any(-1))
    unmasked = torch.zeros(size, size, dtype=torch.bool)
    for query, count in enumerate(mask.full_kv_num_blocks[0, 0].tolist()):
        unmasked[query, mask.full_kv_indices[0, 0, query, :count].long()] = True
    # all that can be: a block that is alone in a row of its own is not worth a special case
    assert unmasked.equal(blocks.all(-1) & (torch.arange(size)[:, None] > torch.arange(size)))


def test_flex_attention_compiled_is_sdpa():
    """The forward pass, which is all that CPUs have of it; on accelerators it trains."""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("torch compiles for CPUs by a C++ compiler, and there is none")
    _, documents = packed([[40, 30, 50], [100]], fill=8)
    q, k, v = (torch.randn(2, heads, documents.shape[1], 16) for heads in (4, 2, 2))
    starts = packing.document_starts(documents)
    expected = attention.attend(q, k, v, attention.attention_mask(starts, "sdpa"))
    mask = attention.attention_mask(starts, "flex")
    found = attention.compiled(attention.flex_attention)(q, k, v, block_mask=mask, enable_gqa=True)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@at_most(30)
@given(
    spans=SPANS,
    tied=st.booleans(),
    chunk=st.sampled_from([1, 3, 8, 4096]),
    scale=st.sampled_from([1.0, 0.25]),
)
def test_the_chunked_loss_and_its_gradients_are_those_of_the_whole_logits(
    spans, tied, chunk, scale
):
    tokens, documents = packed(spans)
    model, oracle = (
        excited(replace(SMALL, tie_embeddings=tied)),
        excited(replace(SMALL, tie_embeddings=tied)),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(loss_module.LOGITS_BYTES, "cpu", chunk * 4 * VOCAB)
        found = model.loss(tokens, documents)
        with torch.no_grad():
            # evaluation takes another way
            torch.testing.assert_close(model.loss(tokens, documents), found)
    logits = oracle(tokens, documents).log_softmax(-1)
    targets = slow_targets(documents)
    expected = -sum([logits[row, at, tokens[row, at + 1]] for row, at in targets], torch.zeros(()))
    torch.testing.assert_close(found.sum, expected, rtol=1e-5, atol=1e-4)
    assert found.targets == len(targets) == num_targets(documents)
    by_row = [
        -sum(
            [logits[row, at, tokens[row, at + 1]] for row, at in targets if row == r],
            torch.zeros(()),
        )
        for r in range(len(tokens))
    ]
    torch.testing.assert_close(found.nats.sum(1), torch.stack(by_row), rtol=1e-5, atol=1e-4)
    assert not found.nats.requires_grad
    if targets:
        (found.sum * scale).backward()
        (expected * scale).backward()
        for mine, theirs in zip(model.parameters(), oracle.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-4)


def slow_targets(documents):
    """(row, position) of each token whose next is of the same document."""
    rows, length = documents.shape
    return [
        (r, t)
        for r in range(rows)
        for t in range(length - 1)
        if documents[r, t] == documents[r, t + 1] >= 0
    ]


def test_a_batch_of_fill_has_no_targets_and_no_gradient():
    model = build(SMALL)
    loss = model.loss(torch.zeros(2, 5, dtype=torch.int64), torch.full((2, 5), -1))
    loss.sum.backward()
    assert (loss.sum, loss.targets) == (0, 0)
    assert all((p.grad == 0).all() for p in model.parameters())


@given(spans=SPANS)
def test_targets_are_the_next_tokens_of_the_document(spans):
    tokens, documents = packed(spans)
    expected = torch.full_like(tokens, IGNORE)
    for row, at in slow_targets(documents):
        expected[row, at] = tokens[row, at + 1]
    assert next_tokens(tokens, documents).equal(expected)


@given(spans=SPANS)
def test_documents_start_where_their_first_token_is(spans):
    _, documents = packed(spans, fill=2)
    expected, visible = [], []
    for row in spans:
        starts = [sum(row[:n]) for n in range(len(row) + 1)]
        lengths = [*row, documents.shape[1] - sum(row)]
        expected.append([start for start, n in zip(starts, lengths, strict=True) for _ in range(n)])
        visible.append([at + 1 for n in row for at in range(n)] + [0] * lengths[-1])
    assert packing.document_starts(documents).tolist() == expected
    assert packing.visible_positions(documents).tolist() == visible


@pytest.mark.parametrize(
    ("documents", "whole"),
    [([[0, 0], [0, 0]], True), ([[0, 0], [0, -1]], False), ([[0, 1]], False)],
)
def test_only_rows_of_one_document_without_fill_take_the_plain_causal_kernel(documents, whole):
    assert (packed_documents(torch.tensor(documents)) is None) == whole


@pytest.mark.parametrize("ignored", [False, True])
def test_z_loss_changes_the_gradient_and_not_the_loss_that_is_reported(ignored):
    logits = torch.randn(20, VOCAB, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, VOCAB, (20,))
    if ignored:
        targets[::2] = IGNORE
    plain, _ = loss_and_gradient(logits.detach().float(), targets)
    found, gradient = loss_and_gradient(logits.detach().float(), targets, z_loss=0.01)
    squares = 0.01 * logits.logsumexp(-1) ** 2
    expected = F.cross_entropy(logits, targets, reduction="none", ignore_index=IGNORE)
    (expected + squares * (targets != IGNORE)).sum().backward()
    assert found.equal(plain)
    torch.testing.assert_close(gradient.double(), logits.grad, rtol=1e-5, atol=1e-6)


@given(length=st.integers(1, 40), chunk=st.integers(1, 50))
def test_chunks_of_the_loss_have_one_shape(length, chunk):
    hidden, targets, shapes = torch.randn(length, 8), torch.arange(length) % VOCAB, []

    def kernel(logits, target):
        shapes.append(logits.shape)
        return loss_and_gradient(logits, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(loss_module.LOGITS_BYTES, "cpu", chunk * 4 * VOCAB)
        hidden.requires_grad_()
        _, nats = loss_module.chunked_loss(hidden, torch.randn(VOCAB, 8), targets, kernel)
    assert len(set(shapes)) == 1 and shapes[0][0] <= chunk and len(nats) == length
    assert len(shapes) == math.ceil(length / chunk)


def test_bfloat16_logits_give_a_float32_loss_and_a_bfloat16_gradient():
    logits = torch.randn(20, VOCAB, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(0, VOCAB, (20,))
    targets[3] = IGNORE
    found, gradient = loss_and_gradient(logits.detach(), targets)
    found = found.sum()
    expected = torch.nn.functional.cross_entropy(
        logits.float(), targets, ignore_index=IGNORE, reduction="sum"
    )
    expected.backward()
    assert (found.dtype, gradient.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient, logits.grad)


def test_rotary_tables_stay_exact_far_into_a_document():
    cos, _ = model_module._rotations(torch.zeros(1, 4000, dtype=torch.int64), None, SMALL)
    assert cos.dtype == torch.float32
    assert (
        abs(cos[0, 3999, 0, 0].item() - torch.tensor(3999.0, dtype=torch.float64).cos().item())
        < 1e-5
    )


def test_weights_depend_on_seed_and_name_alone():
    with torch.device("meta"):
        late = Transformer(SMALL)
    late.to_empty(device="cpu").init_weights(7)
    torch.manual_seed(5)
    early = build(SMALL, seed=7)
    deeper = build(replace(SMALL, num_layers=3), seed=7)
    assert all(p.equal(q) for p, q in zip(late.parameters(), early.parameters(), strict=True))
    assert deeper.blocks[1].attention.query.weight.equal(early.blocks[1].attention.query.weight)
    assert not build(SMALL, seed=8).embedding.weight.equal(early.embedding.weight)
    assert not early.blocks[0].mlp.up.weight.equal(early.blocks[0].mlp.gate.weight)


def test_initial_scales():
    config = replace(SMALL, dim=256, ffn_dim=512, num_layers=8)
    model = build(config)
    stds = {name: p.std().item() for name, p in model.named_parameters() if p.ndim == 2}
    for name, std in stds.items():
        to_stream = name.endswith(("attention.out.weight", "mlp.down.weight"))
        assert std == pytest.approx(0.02 / 4 if to_stream else 0.02, rel=0.05), name
    assert all((p == 1).all() for p in model.parameters() if p.ndim == 1)


def test_weights_of_the_meta_device_are_refused():
    with torch.device("meta"):
        model = Transformer(SMALL)
    with pytest.raises(ValueError, match="call to_empty"):
        model.init_weights(0)


@pytest.mark.parametrize(
    ("name", "billions"), [("125M", 0.16), ("350M", 0.41), ("1B", 1.18), ("3B", 3.13), ("8B", 7.80)]
)
def test_presets_have_about_their_names_sizes(name, billions):
    with torch.device("meta"):
        model = Transformer(PRESETS[name])
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, rel=0.05)


def test_flops_are_those_of_every_matmul_forward_and_backward():
    """Counted by torch's own counter, which knows matmuls and attention's two products; the norms'
    weights are in N too.
    """
    from torch.utils.flop_counter import FlopCounterMode

    config = replace(SMALL, tie_embeddings=False)
    model, tokens = build(config), torch.zeros(1, 24, dtype=torch.int64)
    documents = torch.zeros_like(tokens)
    with (
        FlopCounterMode(display=False) as counter,
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        model(tokens, documents).sum().backward()
    norms = 6 * sum(p.numel() for p in model.parameters() if p.ndim == 1)
    assert flops_per_token(model, 24) - norms == counter.get_total_flops() / 24
    tied = build(replace(config, tie_embeddings=True))
    assert flops_per_token(tied, 24) == flops_per_token(model, 24)


def test_flops_count_heads_by_their_own_size():
    small, wide = (build(replace(SMALL, head_dim=size)) for size in (8, 16))
    added = sum(p.numel() for p in wide.parameters()) - sum(p.numel() for p in small.parameters())
    more = flops_per_token(wide, 24) - flops_per_token(small, 24)
    assert more == 6 * added + 12 * SMALL.num_layers * SMALL.num_heads * 8 * 24


def test_queries_and_keys_are_normalized_by_head_before_they_are_rotated():
    """Against the definition, written out with loops for one head after the other."""
    model = excited(replace(SMALL, qk_norm=True))
    attention_module, x = model.blocks[0].attention, torch.randn(1, 5, SMALL.dim)
    tables = model_module._rotations(torch.zeros(1, 5, dtype=torch.int64), None, SMALL)

    def heads(project, norm):
        each = project(x)[0].split(8, dim=-1)
        scaled = [h / (h.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight for h in each]
        return [model_module._rotate(h[None, :, None], *tables)[0, :, 0] for h in scaled]

    queries = heads(attention_module.query, attention_module.query_norm)
    keys = heads(attention_module.key, attention_module.key_norm)
    values = attention_module.value(x)[0].split(8, dim=-1)
    causal = torch.full((5, 5), -torch.inf).triu(1)
    outputs = [
        (query @ keys[n // 2].T / 8**0.5 + causal).softmax(-1) @ values[n // 2]
        for n, query in enumerate(queries)
    ]
    expected = attention_module.out(torch.cat(outputs, dim=-1))
    found = attention_module(x, *tables, None)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert replace(SMALL, qk_norm=False) == SMALL  # off by default


def test_biases_start_at_zero_and_new_vectors_are_not_decayed():
    from trainer.config import OptimizerConfig
    from trainer.model.optim import make_optimizer

    model = build(replace(SMALL, qkv_bias=True, qk_norm=True))
    parameters = dict(model.named_parameters())
    assert not parameters["blocks.0.attention.key.bias"].any()
    assert (parameters["blocks.1.attention.key_norm.weight"] == 1).all()
    decayed, others = make_optimizer(model, OptimizerConfig()).param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in parameters.items()}
    assert not any("norm" in names[id(p)] or "bias" in names[id(p)] for p in decayed["params"])


@pytest.mark.parametrize(
    "change",
    [
        {"num_heads": 5},
        {"num_kv_heads": 3},
        {"dim": 36, "num_heads": 12, "num_kv_heads": 12},
        {"head_dim": 7},
    ],
)
def test_sizes_that_do_not_divide_are_refused(change):
    with pytest.raises(ValueError, match="dim must be a multiple of 2 num_heads"):
        Transformer(replace(SMALL, **change))
