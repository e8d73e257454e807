"""Write a tokenizer for Hugging Face's transformers.

Ranks of tiktoken become a tokenizer.json of the same vocabulary: any two neighboring pieces merge
whose text together is a token, that of the lowest rank first; so a token has a merge for every way
to cut it in two. A SentencePiece model is copied: `tokenizers` sums the scores of its pieces in
another precision, and normalizes some scripts differently, so a few words had other ids.
"""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from stages.formats.tokenizer import Tokenizer, special_tokens

# what splitting patterns tell apart; there are no special tokens in it
_SAMPLE = (
    *("", " ", "a", "Hello world", "  two  blanks ", "\ttab\n\nlines \r\n end\n", "it's I'LL we'ſ"),
    *("1234567890 ١٢٣ ½", "Größe, naïve, ﬁ, ǅ", "中文和日本語のテキスト", "ภาษาไทย", "e\u0301 क्षि"),
    *(
        "😀👩‍👩‍👧 🇫🇷",
        "a\u00a0b\u2003c\u3000d\u200be\u0085f\x0bg\x1ch",
        "x = {'a': [1, 2]};  # no\n",
    ),
    *("\0\ufeff\ue000\U000e0001", "aaaaaaaaaaaaaaaa", "<0x0A> ▁ ##", "…---===///***"),
)


def save_hugging_face_tokenizer(tokenizer: Tokenizer, folder: Path | str) -> None:
    """Write what `AutoTokenizer.from_pretrained(folder)` loads; the folder is made if absent.

    It gives the ids of `Tokenizer.encode_batch`, but reads special tokens from text unless
    `split_special_tokens` is set; a tokenizer.json of Unigram or WordLevel reads those that are in
    its model's vocabulary even then. ValueError if it would give other ids: nothing is written
    then.
    """
    if tokenizer.kind == "sentencepiece":
        name, data = "spiece.model", tokenizer.library.serialized_model_proto()
        settings = _slow_class(tokenizer.library)
    else:
        name = "tokenizer.json"
        data = json.dumps(hugging_face_json(tokenizer), ensure_ascii=False, indent=1).encode()
        settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings |= {
        "clean_up_tokenization_spaces": False,
        "eos_token": tokenizer.options.end_of_text,
        "bos_token": tokenizer.options.begin_of_text or None,
        "model_max_length": int(1e30),  # how transformers writes that there is no limit
        # by default also token_type_ids, which `generate` of a decoder refuses
        "model_input_names": ["input_ids", "attention_mask"],
    }
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, name).write_bytes(data)
    Path(folder, "tokenizer_config.json").write_text(json.dumps(settings, indent=1))


def hugging_face_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of a tokenizer.json: its own, without dropout, or that of ranks of tiktoken."""
    if tokenizer.kind == "tiktoken":
        content = _of_tiktoken(tokenizer.library)
        _require_same_ids(tokenizer, content)
        return content
    assert tokenizer.file is not None
    content = dict(json.loads(tokenizer.file.read_bytes()))
    special = special_tokens(content, tokenizer.options)
    for token in content["added_tokens"]:
        token["special"] = token["content"] in special
    if "dropout" in content["model"]:
        content["model"]["dropout"] = None
    return content


def _slow_class(library: Any) -> dict[str, Any]:
    """The class of transformers that passes text to SentencePiece as it is. It adds nothing once
    the tokens that it has by default are unset.
    """
    unknown = library.id_to_piece(library.unk_id())
    unset = {"pad_token": None, "sep_token": None}
    return {"tokenizer_class": "BertGenerationTokenizer", "unk_token": unknown, **unset}


def _require_same_ids(tokenizer: Tokenizer, content: dict[str, Any]) -> None:
    from tokenizers import Tokenizer as Library

    try:
        library = Library.from_str(json.dumps(content, ensure_ascii=False))
    except Exception as error:  # it raises Exception itself
        raise ValueError(
            f"{tokenizer.name}: the pattern does not compile for transformers: {error}; export "
            "ranks with one that both can read"
        ) from error
    for text, ids in zip(_SAMPLE, tokenizer.encode_batch(_SAMPLE), strict=True):
        exported = library.encode(text, add_special_tokens=False).ids
        if exported != ids.tolist():
            raise ValueError(
                f"{tokenizer.name}: transformers would give {text!r} the ids {exported}, and not "
                f"{ids.tolist()}: its regular expressions read the pattern otherwise. Export ranks "
                "with one that both read alike, without possessive counts such as {1,3}+"
            )


# --- tiktoken -------------------------------------------------------------------------------------


def _of_tiktoken(encoding: Any) -> dict[str, Any]:
    characters = _byte_characters()
    ranks = sorted(encoding._mergeable_ranks.items(), key=lambda item: item[1])
    tokens = ["".join(map(characters.__getitem__, token)) for token, _ in ranks]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    split = {
        "type": "Split",
        "pattern": {"Regex": for_oniguruma(encoding._pat_str)},
        "behavior": "Isolated",
        "invert": False,
    }
    special = sorted(encoding._special_tokens.items(), key=lambda item: item[1])
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added_token(id, token) for token, id in special],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [split, byte_level | {"use_regex": False}],
        },
        "post_processor": None,
        "decoder": byte_level | {"use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,  # tiktoken looks up a whole piece before it merges
            # special tokens too, or they would get the next ids, and tiktoken leaves some out
            "vocab": {token: rank for token, (_, rank) in zip(tokens, ranks, strict=True)}
            | dict(special),
            "merges": list(_all_merges(tokens)),
        },
    }


def _added_token(id: int, token: str) -> dict[str, Any]:
    off = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": id, "content": token, **off, "special": True}


def _all_merges(tokens: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Every way to put two tokens together to a third, in the order of the third."""
    known = set(tokens)
    for token in tokens:
        for cut in range(1, len(token)):
            if token[:cut] in known and token[cut:] in known:
                yield token[:cut], token[cut:]


def _byte_characters() -> list[str]:
    """The character for each byte in a byte-level vocabulary (Radford et al. 2019, GPT-2).

    Printable ones of Latin-1 are themselves; the others follow from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def for_oniguruma(pattern: str) -> str:
    """A pattern of tiktoken in the syntax of `tokenizers`, where `$` is the end of a line, and
    `{1,3}+` repeats what it would only make possessive.
    """
    pattern = re.sub(r"(\\.|\[(?:\\.|[^\]\\])*\])|\$", lambda m: m[1] or r"\z", pattern)
    return re.sub(r"(\{\d+(?:,\d*)?\})\+", r"\1", pattern)
