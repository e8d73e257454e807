"""A tokenizer in transformers: the same ids, whatever library it came from."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.formats.tokenizer import TokenizerOptions, load_tokenizer
from stages.formats.tokenizer_export import save_hugging_face_tokenizer
from tests.stages.formats.test_tiktoken_encodings import PIECES
from tests.support.texts import NASTY, PROSE
from tests.support.tokenizer_files import MANY, ranks

pytestmark = pytest.mark.train
KINDS = ["cl100k_base", "o200k_base", "bpe", "unigram", "words", "llama", "sp_bpe", "sp_unigram"]
whole_texts = st.text(st.characters(exclude_categories=["Cs"]))
texts = whole_texts | st.sampled_from([*(t for t in NASTY if t.isprintable()), PROSE, *MANY])
pieces = st.lists(st.sampled_from([p for p in PIECES if p != "\ud800"])).map("".join)


def exported(tokenizer, folder, transformers):
    save_hugging_face_tokenizer(tokenizer, folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_gives_the_same_ids(kind, tokenizer_files, tmp_path, transformers):
    path, options = tokenizer_files.get(kind, (kind, TokenizerOptions()))
    tokenizer = load_tokenizer(path, options)
    theirs = exported(tokenizer, tmp_path / "exported", transformers)
    assert theirs.eos_token_id == tokenizer.end_of_text
    assert theirs.bos_token_id == tokenizer.begin_of_text

    @given(texts | pieces)
    def check(text):
        ids = theirs(
            text, add_special_tokens=False, split_special_tokens=True, truncation=False
        ).input_ids
        assert ids == tokenizer.encode_batch([text])[0].tolist()

    check()


@pytest.mark.parametrize(
    "pattern, message",
    [
        # a possessive count gives nothing back, so "90" is two pieces; a greedy one does
        (r"\p{N}{1,3}+\p{N}|[\s\S]", "transformers would give '1234567890 "),
        (r"(?s:.)", "does not compile for transformers"),
    ],
)
def test_ranks_whose_pattern_transformers_reads_otherwise_are_refused(pattern, message, tmp_path):
    (tmp_path / "t.tiktoken").write_bytes(ranks())
    tokenizer = load_tokenizer(str(tmp_path / "t.tiktoken"), TokenizerOptions(pattern))
    with pytest.raises(ValueError, match=message):
        save_hugging_face_tokenizer(tokenizer, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()
