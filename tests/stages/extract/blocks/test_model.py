"""The selection of blocks, and the model as a file."""

import gzip
import json
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.extract.blocks.features import NAMES, Lexicon, features
from stages.extract.blocks.model import BUNDLED, ExtractorModel, best_f1, load_extractor
from stages.extract.blocks.trees import Trees
from stages.extract.blocks.walk import walk
from tests.stages.extract.blocks.pages import pages

# as rounded as the model's
PROBABILITIES = st.integers(0, 10**6).map(lambda millionths: millionths / 10**6)
BLOCKS = st.lists(st.tuples(PROBABILITIES, st.integers(0, 50)), max_size=10)


def expected_f1(chosen, blocks):
    """Of a set of blocks, the words expected to be main content, twice, of all that either has."""
    found = sum(p * w for (p, w), is_in in zip(blocks, chosen, strict=True) if is_in)
    size = sum(w for (_, w), is_in in zip(blocks, chosen, strict=True) if is_in)
    whole = size + sum(p * w for p, w in blocks)
    return 2 * found / whole if whole else 0.0


def select(blocks, **options):
    probabilities, words = np.array(blocks, float).reshape(-1, 2).T
    return best_f1(probabilities, words, **options)


@given(BLOCKS)
def test_no_set_of_blocks_has_a_better_expected_f1(blocks):
    best = max(expected_f1(chosen, blocks) for chosen in product((0, 1), repeat=len(blocks)))
    selection = select(blocks)
    chosen = [i in selection.blocks for i in range(len(blocks))]
    assert selection.expected_f1 == pytest.approx(best, abs=1e-6)
    assert expected_f1(chosen, blocks) == pytest.approx(best, abs=1e-9)
    assert selection.blocks == sorted(set(selection.blocks))


@given(BLOCKS, st.floats(1, 2))
def test_caution_only_leaves_blocks_out(blocks, caution):
    cautious, best = select(blocks, caution=caution), select(blocks)
    assert set(cautious.blocks) <= set(best.blocks)
    assert bool(cautious.blocks) == bool(best.blocks)
    kept_out = [p for i, (p, w) in enumerate(blocks) if i in set(best.blocks) - set(cautious.blocks)]  # fmt: skip
    assert all(p <= blocks[i][0] for p in kept_out for i in cautious.blocks)


@given(pages() | st.text(), st.text())
def test_the_bundled_model_selects_some_blocks_of_any_page(html, url):
    page = walk(html)
    selection = load_extractor("").select(page, url)
    assert set(selection.blocks) <= set(range(len(page.texts)))
    assert 0 <= selection.expected_f1 <= 1
    # calibrated, what is expected of some blocks may be nothing
    assert selection.blocks or selection.expected_f1 == 0


# --- the file -------------------------------------------------------------------------------------

SCORES = st.dictionaries(st.text(max_size=5), st.floats(-9, 9), max_size=5)


@st.composite
def models(draw):
    shape = nodes, trees = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    thresholds = np.where(rng.random(shape) < 0.2, np.inf, rng.normal(size=shape))
    return ExtractorModel(
        Lexicon(draw(SCORES), draw(SCORES), draw(SCORES)),
        Trees(
            rng.integers(0, len(NAMES), shape),
            thresholds.astype(np.float32),
            rng.integers(-(2**31), 2**31, shape).astype(np.int32),
            rng.normal(size=(trees, 32)),
        ),
    )


@given(models())
def test_a_model_is_the_same_after_writing_and_reading(model):
    data = model.to_bytes()
    read = ExtractorModel.from_bytes(data)
    assert read.lexicon == model.lexicon
    for name, array in vars(model.trees).items():
        other = getattr(read.trees, name)
        assert other.dtype == array.dtype and other.tolist() == array.tolist()
    assert read.to_bytes() == data


def test_the_bundled_model_selects_the_same_after_writing_and_reading():
    model = ExtractorModel.from_bytes(BUNDLED.read_bytes())
    page = walk("<nav><a href=x>Menu</a></nav><article><h1>Mill</h1><p>The wheel turns.</article>")
    columns = features(page, "", model.lexicon)
    read = ExtractorModel.from_bytes(model.to_bytes())
    assert (features(page, "", read.lexicon) == columns).all()
    assert read.trees.probabilities(columns).tolist() == model.trees.probabilities(columns).tolist()


def edited(**changes):
    content = json.loads(gzip.decompress(BUNDLED.read_bytes())) | changes
    return gzip.compress(json.dumps(content).encode())


OTHER_FEATURES = (
    "trained for other features than this version computes; train it again with gristmill"
)


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "not a model of gristmill train-extractor"),
        (b"[]", "not a model"),
        (gzip.compress(b"[]"), "not a model"),
        (gzip.compress(b"{}"), "not a model"),
        (gzip.compress(b"[" * 100_000), "not a model"),
        (BUNDLED.read_bytes()[:1000], "not a model"),
        (BUNDLED.read_bytes()[:500] + b"?" * 500, "not a model"),
        (edited(lexicon={"words": {}, "verbs": {}}), "not a model"),
        (edited(trees={"feature": [[2**70]]}), "not a model"),
        (edited(features=list(NAMES[:-1])), OTHER_FEATURES),
        (edited(features=list(NAMES[::-1])), OTHER_FEATURES),
    ],
)
def test_other_files_are_refused(data, message, tmp_path):
    path = tmp_path / "model.json.gz"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"^{path}: .*{message}"):
        load_extractor(str(path))


@given(st.integers(0, 10**9), st.binary(min_size=1, max_size=4))
def test_a_damaged_file_is_a_value_error(place, piece):
    data = bytearray(BUNDLED.read_bytes())
    place %= len(data)
    data[place : place + len(piece)] = piece
    try:
        ExtractorModel.from_bytes(bytes(data))
    except ValueError as error:
        assert "model" in str(error)
