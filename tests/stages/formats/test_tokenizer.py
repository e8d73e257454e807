"""Every kind of tokenizer against its bare library, and what no text may do."""

import base64
import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from stages.formats.tiktoken_encodings import encode_text, encoding_of_ranks, load_encoding
from stages.formats.tokenizer import TokenizerOptions, json_vocabulary, load_tokenizer
from tests.support.texts import NASTY, PROSE
from tests.support.tokenizer_files import (
    MANY,
    PLAIN,
    TURN,
    byte_level_bpe,
    sentencepiece_model,
)

KINDS = ["cl100k_base", "ranks", "bpe", "unigram", "words", "llama", "sp_bpe", "sp_unigram"]
BYTES = b"".join(b"%s %d\n" % (base64.b64encode(bytes([n])), n) for n in range(256))
texts = st.text() | st.sampled_from([*NASTY, PROSE, *MANY])


def bare(kind, files):
    """The ids of a text by the library alone, told to add nothing and to read no special token."""
    path, _ = files[kind]
    if kind in ("cl100k_base", "ranks"):
        return load_encoding("cl100k_base").encode_ordinary
    if kind.startswith("sp_"):
        return sentencepiece.SentencePieceProcessor(model_file=path).encode
    content = json.loads(open(path).read())
    content["model"].pop("dropout", None)
    library = tokenizers.Tokenizer.from_str(json.dumps(content))
    library.no_padding()
    library.no_truncation()
    library.encode_special_tokens = True
    return lambda text: library.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_the_bare_library(kind, tokenizer_files):
    path, options = tokenizer_files[kind]
    tokenizer, ids_of = load_tokenizer(path, options), bare(kind, tokenizer_files)

    @given(st.lists(texts, max_size=5))
    def check(texts):
        whole = [t.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for t in texts]
        expected = [list(ids_of(text)) for text in whole]
        assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == expected
        documents = tokenizer.encode_documents(texts)
        assert [ids.tolist() for ids in documents] == [
            [*i, tokenizer.end_of_text] for i in expected
        ]
        assert all(ids.dtype == np.uint32 and ids.max() < tokenizer.vocab_size for ids in documents)

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_no_text_has_a_special_token(kind, tokenizer_files):
    path, options = tokenizer_files[kind]
    tokenizer = load_tokenizer(path, options)
    named = ["<|endoftext|>", "<|startoftext|>", "</s>", "<s>", "<unk>", "[EOS]", "[BOS]", "[UNK]"]
    named += ["<|begin|>", "<|fim_prefix|>", TURN, PLAIN]
    special = special_ids(tokenizer, named)
    assert {tokenizer.end_of_text, tokenizer.begin_of_text} - {None} <= special

    @given(st.lists(st.sampled_from([*named, " ", "a", "\n"]), max_size=8).map("".join))
    def check(text):
        unknown = unknown_ids(tokenizer)
        assert not special - unknown & set(tokenizer.encode_batch([text])[0].tolist())

    check()


def special_ids(tokenizer, names):
    library = tokenizer.library
    if tokenizer.kind == "tiktoken":
        return set(library._special_tokens.values())
    if tokenizer.kind == "sentencepiece":
        return {library.piece_to_id(name) for name in names} - {library.unk_id()}
    added = json.loads(tokenizer.file.read_text())["added_tokens"]
    return {token["id"] for token in added if token["content"] in names}


def unknown_ids(tokenizer):
    """An unknown word is the unknown token: that is what it is for."""
    if tokenizer.kind != "tokenizers":
        return set()
    added = json.loads(tokenizer.file.read_text())["added_tokens"]
    return {token["id"] for token in added if token["content"] in ("<unk>", "[UNK]")}


@pytest.mark.parametrize("as_text", [False, True])
def test_a_special_token_that_merges_would_make_is_not_made(as_text, tokenizer_files, tmp_path):
    content = json.loads(open(tokenizer_files["bpe"][0]).read())
    token = max((t for t in content["model"]["vocab"] if t[0] == "Ġ"), key=len)
    id, text = content["model"]["vocab"][token], token.replace("Ġ", " ")
    [before] = load_tokenizer(tokenizer_files["bpe"][0]).encode_batch([text])
    assert before.tolist() == [id]
    declared = content["added_tokens"][0] | {"id": id, "content": token, "special": True}
    content["added_tokens"].append(declared)
    if as_text:
        content["model"]["merges"] = [" ".join(merge) for merge in content["model"]["merges"]]
    (tmp_path / "t.json").write_text(json.dumps(content))
    [ids] = load_tokenizer(str(tmp_path / "t.json")).encode_batch([text])
    assert id not in ids and len(ids) > 1


@pytest.mark.parametrize("kind", ["bpe", "llama", "sp_bpe"])
def test_added_tokens_without_brackets_are_read_as_their_author_meant(kind, tokenizer_files):
    tokenizer = load_tokenizer(*tokenizer_files[kind])
    blanks = bare(kind, tokenizer_files)("a   b")
    assert tokenizer.encode_batch(["a   b"])[0].tolist() == blanks and len(blanks) <= 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "text",
    ["x" + " " * 1_000_000 + "y", "a" * 1_000_000, "ก" * 300_000, "\0" * 100_000, "\n" * 1_000_000],
    ids=["blanks", "one word", "Thai", "NUL", "lines"],
)
def test_a_hostile_text_has_tokens_and_spoils_no_other(kind, text, tokenizer_files):
    tokenizer = load_tokenizer(*tokenizer_files[kind])
    [alone] = tokenizer.encode_batch([PROSE])
    first, hostile, last = tokenizer.encode_batch([PROSE, text, PROSE])
    assert first.tolist() == last.tolist() == alone.tolist()
    if kind in ("cl100k_base", "ranks"):
        assert tokenizer.library.decode(hostile.tolist()) == text


def test_files_say_what_they_are(tokenizer_files):
    expected = {
        "cl100k_base": ("tiktoken", 100_277, "<|endoftext|>", "", "uint32"),
        "ranks": ("tiktoken", 100_258, "<|endoftext|>", "<|begin|>", "uint32"),
        "bpe": ("tokenizers", 602, "<|endoftext|>", "<|startoftext|>", "uint16"),
        "words": ("tokenizers", 302, "[EOS]", "[BOS]", "uint16"),
        "llama": ("tokenizers", 702, "</s>", "<s>", "uint16"),
        "sp_bpe": ("sentencepiece", 900, "</s>", "<s>", "uint16"),
    }
    for kind, (library, size, end, begin, dtype) in expected.items():
        tokenizer = load_tokenizer(*tokenizer_files[kind])
        options = tokenizer.options
        assert (tokenizer.kind, tokenizer.vocab_size, tokenizer.dtype) == (library, size, dtype)
        assert (options.end_of_text, options.begin_of_text) == (end, begin)


def test_begin_of_text_comes_first_if_asked(tokenizer_files):
    tokenizer = load_tokenizer(*tokenizer_files["sp_bpe"])
    [ids] = tokenizer.encode_documents(["a mill"], begin_of_text=True)
    assert ids.tolist() == [1, *tokenizer.library.encode("a mill"), 2]


def test_ranks_in_a_file_called_model_are_ranks(tokenizer_files, tmp_path):
    path, options = tokenizer_files["ranks"]
    (tmp_path / "tokenizer.model").write_bytes(open(path, "rb").read())
    moved = load_tokenizer(str(tmp_path / "tokenizer.model"), options)
    assert moved.digest == load_tokenizer(path, options).digest and moved.kind == "tiktoken"


def test_a_file_that_was_replaced_is_loaded_again(tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(sentencepiece_model("bpe"))
    first = load_tokenizer(str(path))
    path.write_bytes(sentencepiece_model("unigram"))
    assert load_tokenizer(str(path)).digest != first.digest


@pytest.mark.parametrize(
    "content, options, message",
    [
        (b"", {}, "neither a tokenizer.json, ranks of tiktoken nor a SentencePiece model"),
        (b"junk\0\1", {}, "neither a tokenizer.json, ranks"),
        (b'{"model": 1}', {}, "not a tokenizer.json of tokenizers"),
        (b"{", {}, "not a tokenizer.json of tokenizers"),
        (b"YQ== 0\n", {}, "set pack.pattern"),
        (b"YQ== 0\n", {"pattern": "."}, "no rank for byte 0x00"),
        (b"YQ== 0\n%%% x\n", {"pattern": "."}, "line 2 is not 'BASE64 RANK'"),
    ],
)
def test_a_file_that_is_no_tokenizer_is_refused(content, options, message, tmp_path):
    (tmp_path / "t.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(str(tmp_path / "t.json"), TokenizerOptions(**options))


def test_wrong_settings_are_refused(tokenizer_files, tmp_path):
    def refused(message, path, **options):
        with pytest.raises(ValueError, match=message):
            load_tokenizer(str(path), TokenizerOptions(**options))

    bpe, ranks = tokenizer_files["bpe"][0], tokenizer_files["ranks"][0]
    refused(r"has no special token '<eod>'.*set pack.end_of_text", bpe, end_of_text="<eod>")
    refused(r"has no special token '<b>'.*set pack.begin_of_text", bpe, begin_of_text="<b>")
    refused("leave it out", bpe, pattern=".")
    refused("leave it out", "cl100k_base", pattern=".")
    refused("does not compile", ranks, pattern="(")
    refused("cannot be read: No such file", tmp_path / "absent.json")
    refused("unknown encoding 'nope'", "nope")
    no_end = byte_level_bpe()
    no_end.save(str(tmp_path / "t.json"))
    content = (tmp_path / "t.json").read_text().replace("<|endoftext|>", "<|stop|>")
    (tmp_path / "t.json").write_text(content)
    refused("has no special token of a usual name for the end", tmp_path / "t.json")
    assert load_tokenizer(
        str(tmp_path / "t.json"), TokenizerOptions(end_of_text="<|stop|>")
    ).end_of_text == content_id(content, "<|stop|>")


@pytest.mark.parametrize(
    "kind, token",
    [
        *(("bpe", "the"), ("words", "[UNK]"), ("unigram", "<unk>"), ("llama", "<0x0A>")),
        *(("sp_bpe", "<unk>"), ("sp_bpe", "   "), ("sp_bpe", "<0x0A>"), ("sp_unigram", "▁the")),
    ],
)
@pytest.mark.parametrize("key", ["end_of_text", "begin_of_text"])
def test_a_token_that_text_can_have_is_refused(kind, token, key, tokenizer_files):
    path, options = tokenizer_files[kind]
    with pytest.raises(ValueError, match=f"documents may have any other token; set pack.{key}"):
        load_tokenizer(path, options._replace(**{key: token}))


def with_added_tokens(path, file, **special):
    """A copy of a tokenizer.json with further added tokens, special or not, at the end."""
    content = json.loads(open(path).read())
    size = max(json_vocabulary(content).values()) + 1
    for number, (name, is_special) in enumerate(special.items()):
        token = content["added_tokens"][0] | {"content": name, "special": is_special}
        content["added_tokens"].append(token | {"id": size + number})
    file.write_text(json.dumps(content))
    return str(file)


def without_usual_names(path, file):
    content = open(path).read()
    for name in ("endoftext", "startoftext"):
        content = content.replace(f"<|{name}|>", f"<|{name}0|>")
    file.write_text(content)
    return str(file)


def test_usual_names_are_those_of_declared_special_tokens(tokenizer_files, tmp_path):
    path = without_usual_names(tokenizer_files["bpe"][0], tmp_path / "none.json")
    tags = {"</s>": False, "<s>": False}

    def around(**tokens):
        file = with_added_tokens(path, tmp_path / "t.json", **tokens)
        return load_tokenizer(file).options[1:]

    # as in Gemma's file, where `<s>` is an HTML tag
    assert around(**tags, **{"<eos>": True, "<bos>": True}) == ("<eos>", "<bos>")
    assert around(**{"<eos>": True}, **tags) == ("<eos>", "<s>")
    assert around(**tags) == ("</s>", "<s>")


@pytest.mark.parametrize("special", [True, False])
def test_several_usual_names_are_refused(special, tokenizer_files, tmp_path):
    path = without_usual_names(tokenizer_files["bpe"][0], tmp_path / "none.json")
    for key, names in (("end_of_text", ("</s>", "<eos>")), ("begin_of_text", ("<s>", "<bos>"))):
        tokens = {"[EOS]": True} if key == "begin_of_text" else {}
        tokens |= dict.fromkeys(names, special)
        file = with_added_tokens(path, tmp_path / f"{key}.json", **tokens)
        with pytest.raises(ValueError, match=f"{', '.join(names)}; set pack.{key}"):
            load_tokenizer(file)
        chosen = TokenizerOptions(**{"end_of_text": "[EOS]"} | {key: names[1]})
        assert getattr(load_tokenizer(file, chosen).options, key) == names[1]


@pytest.mark.parametrize("id", [100, 70_000])
@pytest.mark.parametrize("special", [True, False])
def test_ids_that_the_library_would_change_are_refused(id, special, tokenizer_files, tmp_path):
    path = with_added_tokens(tokenizer_files["bpe"][0], tmp_path / "t.json", tool_call=special)
    content = json.loads(open(path).read())
    content["added_tokens"][-1]["id"] = id
    (tmp_path / "t.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"'tool_call' has the id {id} in the file but 602 in"):
        load_tokenizer(path)


def test_a_byte_order_mark_is_skipped(tokenizer_files, tmp_path):
    path = tokenizer_files["bpe"][0]
    (tmp_path / "t.json").write_bytes(b"\xef\xbb\xbf" + open(path, "rb").read())
    marked, tokenizer = load_tokenizer(str(tmp_path / "t.json")), load_tokenizer(path)
    assert marked.encode_batch([PROSE])[0].tolist() == tokenizer.encode_batch([PROSE])[0].tolist()
    assert marked.digest == hashlib.sha256((tmp_path / "t.json").read_bytes()).hexdigest()


def test_a_text_that_makes_the_library_panic_has_the_tokens_of_its_words(tokenizer_files, tmp_path):
    def load(regex):
        content = json.loads(open(tokenizer_files["bpe"][0]).read())
        split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated"}
        parts = [split | {"invert": False}, content["pre_tokenizer"]]
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": parts}
        (tmp_path / "t.json").write_text(json.dumps(content))
        return load_tokenizer(str(tmp_path / "t.json"))

    tokenizer = load("(x+x+)+y")  # takes 2^n steps for n times x
    hostile = f"{PROSE}\n\n  {'x' * 1000} <|endoftext|> é\u3000 " * 3
    [alone] = tokenizer.encode_batch([PROSE])
    first, ids, last = tokenizer.encode_batch([PROSE, hostile, PROSE])
    assert first.tolist() == last.tolist() == alone.tolist()
    assert tokenizer.library.decode(ids.tolist()) == hostile
    assert tokenizer.end_of_text not in ids and ids.dtype == np.uint32
    with pytest.raises(ValueError, match=r"t.json: its regular expressions fail even for single"):
        load("x*" * 16 + "z(?<=yz)").encode_batch(["x" * 15 + "z"])


@pytest.mark.parametrize("pattern", ["a*", r"\p{L}*|.", r"\s+|$|.", "(?=3)|.", "", "(?!x)"])
def test_a_pattern_with_empty_matches_is_refused(pattern):
    with pytest.raises(ValueError, match=r"t: the pattern '.*' matches an empty string"):
        encoding_of_ranks("t", BYTES, pattern=pattern, special=["<e>"])


def test_an_empty_match_that_no_probe_showed_adds_no_token():
    encoding = encoding_of_ranks("t", BYTES, pattern="(?s:.)|(?<=qqq)$", special=["<e>"])
    assert encode_text("a qqq", encoding).tolist() == list(b"a qqq")


@pytest.mark.parametrize("rank", ["-1", "4294967295", "4294967294", "99999999999999999999"])
def test_ranks_out_of_range_are_refused(rank):
    with pytest.raises(ValueError, match=f"t: line 257: rank {rank} is not in 0 to 2147483647"):
        encoding_of_ranks("t", BYTES + f"dGg= {rank}\n".encode(), pattern=".", special=["<e>"])


def content_id(content, token):
    return next(t["id"] for t in json.loads(content)["added_tokens"] if t["content"] == token)


@pytest.mark.parametrize("parallel", ["true", "false"])
def test_ids_do_not_depend_on_threads(parallel, tokenizer_files):
    path, _ = tokenizer_files["bpe"]
    code = (
        "import sys; from stages.formats.tokenizer import load_tokenizer\n"
        "print([i.tolist() for i in load_tokenizer(sys.argv[1]).encode_batch(['a mill'] * 200)])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, path],
        env=os.environ | {"RAYON_NUM_THREADS": "4", "TOKENIZERS_PARALLELISM": parallel},
        capture_output=True,
        text=True,
    )
    expected = load_tokenizer(path).encode_batch(["a mill"])[0].tolist()
    assert json.loads(done.stdout) == [expected] * 200 and not done.stderr
