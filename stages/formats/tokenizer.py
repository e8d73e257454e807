"""Tokenizers of four kinds behind one class: text to token ids, and the ids around documents.

    cl100k_base         an encoding that tiktoken names
    ./vocab.tiktoken    ranks of tiktoken, with `pattern`
    ./tokenizer.json    of Hugging Face's tokenizers
    ./tokenizer.model   of SentencePiece (or ranks of tiktoken, as Llama 3 has under this name)

Strings of special tokens in a text are plain text in all of them: no page can begin a document or a
turn of a dialogue. Special is what a tokenizer declares so, and any other added token in brackets,
such as `<|im_start|>` or `[INST]`. Other added tokens, such as runs of blanks, are read from text.
"""

import codecs
import hashlib
import json
import os
import re
import secrets
from array import array
from collections import ChainMap
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from filters import is_path
from stages.formats.errors import is_panic
from stages.formats.tiktoken_encodings import (
    encode_text,
    encoding_digest,
    encoding_of_ranks,
    load_encoding,
)
from stages.formats.tokens import Tokens

Kind = Literal["tiktoken", "tokenizers", "sentencepiece"]

# usual names; `<|eot|>` is not one of them: it ends a turn
END_OF_TEXT = (
    *("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<EOS>", "[EOS]"),
    *("<｜end▁of▁sentence｜>", "<|end▁of▁sentence|>", "<|endofdocument|>"),
)
BEGIN_OF_TEXT = (
    *("<|begin_of_text|>", "<s>", "<bos>", "<|bos|>", "<BOS>", "[BOS]", "<|startoftext|>"),
    *("<｜begin▁of▁sentence｜>", "<|begin▁of▁sentence|>", "<|beginoftext|>"),
)
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # a model with byte fallback needs these under their names
_IN_BRACKETS = re.compile(r"<[^\s<>]+>|\[[^\s\[\]]+\]")
# at most 16 characters of a word, or of blanks
_PIECE = re.compile(r"\s?\S{1,16}|\s{1,16}")
_RANKS = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")
_USER_DEFINED, _CONTROL = 4, 3  # types of pieces in SentencePiece's model
# begins the names of special tokens while text is encoded; no page can know it. It changes no id
_HIDDEN = "\0" + secrets.token_hex(16)


class TokenizerOptions(NamedTuple):
    """What a tokenizer's file may leave open.

    `pattern` is the regular expression that splits text, for ranks of tiktoken alone. Tokens at the
    end and beginning of a text are looked for by their usual names, or those of the file, if "".
    """

    pattern: str = ""
    end_of_text: str = ""
    begin_of_text: str = ""


DEFAULTS = TokenizerOptions()


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer that was loaded. `name` is tiktoken's, or that of the file, without its folder.

    `vocab_size` is the largest id + 1, `begin_of_text` None where there is no such token. `digest`
    is the sha256 of the file; of an encoding of tiktoken, that of its ranks, pattern and special
    tokens. `options` are complete: they name the tokens that were found. `library` is the object of
    the library that encodes.
    """

    name: str
    kind: Kind
    digest: str
    vocab_size: int
    end_of_text: int
    begin_of_text: int | None
    file: Path | None
    options: TokenizerOptions
    library: Any = field(repr=False, compare=False)
    encode: Callable[[Sequence[str]], list[Tokens]] = field(repr=False, compare=False)

    @property
    def dtype(self) -> Literal["uint16", "uint32"]:
        """The narrowest type that has room for all ids."""
        return "uint16" if self.vocab_size <= 1 << 16 else "uint32"

    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        """Token ids of each text, none of them special; on one thread. Lone surrogates are U+FFFD.

        Arrays may be read-only.
        """
        try:
            return self.encode(texts)
        except (TypeError, RuntimeError, UnicodeError):  # what the libraries say of surrogates
            whole = [_without_surrogates(text) for text in texts]
            if whole == list(texts):
                raise
            return self.encode(whole)

    def encode_documents(
        self, texts: Sequence[str], *, begin_of_text: bool = False
    ) -> list[Tokens]:
        """Token ids of each text, end-of-text last and, if asked, begin-of-text first."""
        begin = self.begin_of_text if begin_of_text else None
        return [self._document(ids, begin) for ids in self.encode_batch(texts)]

    def _document(self, ids: Tokens, begin: int | None) -> Tokens:
        first = int(begin is not None)
        document = np.empty(first + len(ids) + 1, np.uint32)  # less work than np.concatenate
        if begin is not None:
            document[0] = begin
        document[first:-1] = ids
        document[-1] = self.end_of_text
        return document


def is_ranks(tokenizer: str) -> bool:
    """Whether this is a file of ranks of tiktoken; False for one that cannot be read."""
    try:
        with open(tokenizer, "rb") as file:
            return bool(is_path(tokenizer) and _RANKS.match(file.read(1024)))
    except OSError:
        return False


def load_tokenizer(
    tokenizer: str, options: TokenizerOptions = DEFAULTS, *, vocabulary_dir: str = ""
) -> Tokenizer:
    """Load an encoding of tiktoken by name, or a local file; what a file is, its content says.

    ValueError, which names the tokenizer, if it cannot be read, or has no special token for the
    end of a text, or several of usual names. `vocabulary_dir` as for `load_encoding`.
    """
    if not is_path(tokenizer):
        if options.pattern:
            raise ValueError(f"{tokenizer}: tiktoken's encodings have a pattern; leave it out")
        return _of_tiktoken(load_encoding(tokenizer, vocabulary_dir), None, options)
    try:
        stat = os.stat(tokenizer)
        return _load_file(Path(tokenizer), options, (stat.st_size, stat.st_mtime_ns))
    except OSError as error:
        raise ValueError(f"{tokenizer}: cannot be read: {error.strerror or error}") from error


@lru_cache(maxsize=4)
def _load_file(file: Path, options: TokenizerOptions, version: tuple[int, int]) -> Tokenizer:
    """`version` is the file's size and time: one that was replaced is loaded again."""
    data = file.read_bytes()
    if _RANKS.match(data):
        return _of_ranks(file, data, options)
    if options.pattern:
        raise ValueError(f"{file}: a pattern belongs to ranks of tiktoken alone; leave it out")
    is_json = data.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"{"
    return (_of_json if is_json else _of_sentencepiece)(file, data, options)


# --- tiktoken -------------------------------------------------------------------------------------


def _of_tiktoken(encoding: Any, file: Path | None, options: TokenizerOptions) -> Tokenizer:
    return _checked(
        kind="tiktoken",
        name=file.name if file else encoding.name,
        digest=encoding_digest(encoding),
        special=[encoding._special_tokens],
        vocab_size=encoding.n_vocab,
        file=file,
        options=options,
        library=encoding,
        encode=partial(_encode_tiktoken, encoding),
    )


def _encode_tiktoken(encoding: Any, texts: Sequence[str]) -> list[Tokens]:
    return [encode_text(text, encoding) for text in texts]


def _of_ranks(file: Path, data: bytes, options: TokenizerOptions) -> Tokenizer:
    if not options.pattern:
        raise ValueError(
            f"{file}: ranks of tiktoken need the regular expression that splits text; "
            "set pack.pattern"
        )
    end = options.end_of_text or END_OF_TEXT[0]
    special = [options.begin_of_text, end] if options.begin_of_text else [end]
    encoding = encoding_of_ranks(file.name, data, pattern=options.pattern, special=special)
    return _of_tiktoken(encoding, file, options)


# --- tokenizers -----------------------------------------------------------------------------------


def _of_json(file: Path, data: bytes, options: TokenizerOptions) -> Tokenizer:
    # one unit has one processor; `tokenizers` reads this when it first encodes a batch
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from tokenizers import Tokenizer as Library

    try:
        content = json.loads(data)
        vocabulary, around = json_vocabulary(content), _tokens_around(content)
        plain = _plain_json(content, options, hidden=_HIDDEN)
        library = Library.from_str(json.dumps(plain, ensure_ascii=False))
        loaded = Library.from_str(data.decode("utf-8-sig")).get_vocab(with_added_tokens=True)
    except Exception as error:  # it raises Exception itself for JSON of another shape
        raise ValueError(f"{file}: not a tokenizer.json of tokenizers: {error!r}") from error
    _require_same_vocabulary(file, vocabulary, loaded)
    library.encode_special_tokens = True  # as plain text
    return _checked(
        kind="tokenizers",
        name=file.name,
        digest=hashlib.sha256(data).hexdigest(),
        special=around,
        vocab_size=max(vocabulary.values(), default=-1) + 1,
        file=file,
        options=options,
        library=library,
        encode=partial(_encode_tokenizers, library, file.name),
    )


def json_vocabulary(content: Mapping[str, Any]) -> dict[str, int]:
    """Token → id of a tokenizer.json, added tokens included."""
    vocab = content["model"]["vocab"]
    if isinstance(vocab, list):  # of Unigram: (token, score)
        vocab = {token: id for id, (token, _) in enumerate(vocab)}
    added = {token["content"]: token["id"] for token in content["added_tokens"]}
    return {**vocab, **added}


def _require_same_vocabulary(
    file: Path, in_file: Mapping[str, int], in_library: Mapping[str, int]
) -> None:
    """ValueError if the library gives a token another id than the file."""
    for token in (*in_file, *in_library):
        ids = in_file.get(token), in_library.get(token)
        if ids[0] != ids[1]:
            raise ValueError(
                f"{file}: '{token}' has the id {ids[0]} in the file but {ids[1]} in the package "
                "tokenizers, which numbers added tokens after the vocabulary; save the file with "
                "that package"
            )


def _tokens_around(content: Mapping[str, Any]) -> tuple[dict[str, int], dict[str, int]]:
    """Tokens that can stand around a text: those declared special, and other added tokens.

    An unknown word becomes the unknown token, and an unknown character its bytes.
    """
    declared: dict[str, int] = {}
    others: dict[str, int] = {}
    model = content["model"]
    unknown = model.get("unk_token")
    if model.get("unk_id") is not None:  # of Unigram
        unknown = model["vocab"][model["unk_id"]][0]
    for token in content["added_tokens"]:
        if token["content"] != unknown and not _BYTE.fullmatch(token["content"]):
            (declared if token["special"] else others)[token["content"]] = token["id"]
    return declared, others


def special_tokens(content: Mapping[str, Any], options: TokenizerOptions) -> set[str]:
    """The added tokens of a tokenizer.json that no text may hold."""
    around = {options.end_of_text, options.begin_of_text, *END_OF_TEXT, *BEGIN_OF_TEXT}
    return {
        token["content"]
        for token in content["added_tokens"]
        if token["special"]
        or token["content"] in around
        or _IN_BRACKETS.fullmatch(token["content"])
    }


def _plain_json(
    content: dict[str, Any], options: TokenizerOptions, *, hidden: str
) -> dict[str, Any]:
    """A tokenizer.json that gives the ids of the text and nothing else, always the same ones.

    Special tokens get names that begin with `hidden`, which no text has: a model (Unigram,
    WordLevel) reads from text whatever its vocabulary has.
    """
    special = special_tokens(content, options)
    names = {token: token if _BYTE.fullmatch(token) else hidden + token for token in special}
    added = [
        token | {"content": names[token["content"]], "special": True}
        if token["content"] in names
        else token
        for token in content["added_tokens"]
    ]
    model = dict(content["model"])
    if isinstance(model["vocab"], list):
        model["vocab"] = [[names.get(token, token), score] for token, score in model["vocab"]]
    else:
        model["vocab"] = {names.get(token, token): id for token, id in model["vocab"].items()}
    if "merges" in model:
        model["merges"] = list(_merges_without(names, model["merges"]))
    if model.get("unk_token"):
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    if "dropout" in model:
        model["dropout"] = None
    off = {"truncation": None, "padding": None, "post_processor": None}
    return content | off | {"added_tokens": added, "model": model}


def _merges_without(
    special: Collection[str], merges: Sequence[str | Sequence[str]]
) -> Iterator[Sequence[str]]:
    """The merges of BPE that neither need nor give a special token; older files write 'a b'."""
    for merge in merges:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        if not any(token in special for token in (left, right, left + right)):
            yield left, right


def _encode_tokenizers(library: Any, name: str, texts: Sequence[str]) -> list[Tokens]:
    try:
        encodings = library.encode_batch_fast(list(texts), add_special_tokens=False)
    except BaseException as error:
        if not is_panic(error):
            raise
        return [_encode_after_panic(library, name, text) for text in texts]
    # array.array reads a list of integers in half the time of np.array
    return [np.frombuffer(array("I", encoding.ids), np.uint32) for encoding in encodings]


def _encode_after_panic(library: Any, name: str, text: str) -> Tokens:
    """The ids of one text; of its words, each by itself, if the whole makes the library panic.

    It does if its regular expressions need too many steps for a match (Oniguruma's
    retry-limit-in-match): pieces of a few characters do not. ValueError if they do too.
    """
    for texts in ([text], _PIECE.findall(text)):
        try:
            encodings = library.encode_batch_fast(texts, add_special_tokens=False)
            return np.array([id for encoding in encodings for id in encoding.ids], np.uint32)
        except BaseException as error:
            if not is_panic(error):
                raise
            panic = error
    raise ValueError(
        f"{name}: its regular expressions fail even for single words: {panic}; choose another "
        "tokenizer"
    ) from panic


# --- SentencePiece --------------------------------------------------------------------------------


def _of_sentencepiece(file: Path, data: bytes, options: TokenizerOptions) -> Tokenizer:
    import sentencepiece

    try:
        library = sentencepiece.SentencePieceProcessor(model_proto=_plain_pieces(data))
    except Exception as error:  # DecodeError of protobuf, RuntimeError of sentencepiece
        raise ValueError(
            f"{file}: neither a tokenizer.json, ranks of tiktoken nor a SentencePiece model: "
            f"{error}"
        ) from error
    ends = (("end_of_text", library.eos_id()), ("begin_of_text", library.bos_id()))
    declared = {key: library.id_to_piece(id) for key, id in ends if id >= 0}
    chosen = {key: value for key, value in options._asdict().items() if value}
    size = library.get_piece_size()
    return _checked(
        kind="sentencepiece",
        name=file.name,
        digest=hashlib.sha256(data).hexdigest(),
        special=[{library.id_to_piece(id): id for id in range(size) if library.is_control(id)}],
        vocab_size=size,
        file=file,
        options=TokenizerOptions(**declared | chosen),
        library=library,
        encode=partial(_encode_sentencepiece, library),
    )


def _plain_pieces(data: bytes) -> bytes:
    """A model without user-defined pieces in brackets: they become control pieces, which
    SentencePiece never reads from text.
    """
    from sentencepiece import sentencepiece_model_pb2

    model: Any = vars(sentencepiece_model_pb2)["ModelProto"].FromString(data)
    if not model.pieces:
        raise ValueError("it has no pieces")
    for piece in model.pieces:
        if piece.type == _USER_DEFINED and _IN_BRACKETS.fullmatch(piece.piece):
            piece.type = _CONTROL
    plain: bytes = model.SerializeToString()
    return plain


def _encode_sentencepiece(library: Any, texts: Sequence[str]) -> list[Tokens]:
    arrays = library.encode_as_numpy(list(texts), num_threads=1)  # int32
    return [ids.view(np.uint32) for ids in arrays]


# --- tokens around a text -------------------------------------------------------------------------


def _checked(
    *, special: Sequence[dict[str, int]], options: TokenizerOptions, **fields: Any
) -> Tokenizer:
    """A Tokenizer with the tokens around a text that `options` names, else those of usual names.

    `special` are the ids of tokens that no text has; a usual name in the first mapping goes before
    one in the second. ValueError if there is none for the end, or several.
    """
    where = fields["file"] or fields["name"]
    end = _find_token(where, special, "end_of_text", options.end_of_text, END_OF_TEXT)
    begin = _find_token(where, special, "begin_of_text", options.begin_of_text, BEGIN_OF_TEXT)
    if end is None:
        raise ValueError(
            f"{where}: has no special token of a usual name for the end of a text "
            f"({', '.join(END_OF_TEXT)}); set pack.end_of_text to its token"
        )
    ids = ChainMap(*special)
    return Tokenizer(
        end_of_text=ids[end],
        begin_of_text=None if begin is None else ids[begin],
        options=options._replace(end_of_text=end, begin_of_text=begin or ""),
        **fields,
    )


def _find_token(
    where: object,
    special: Sequence[dict[str, int]],
    key: str,
    chosen: str,
    usual: Sequence[str],
) -> str | None:
    if chosen and chosen not in ChainMap(*special):
        raise ValueError(
            f"{where}: has no special token '{chosen}', and documents may have any other token; "
            f"set pack.{key} to a special one"
        )
    if chosen:
        return chosen
    names = next(filter(None, ([n for n in usual if n in tokens] for tokens in special)), [])
    if len(names) > 1:
        raise ValueError(
            f"{where}: has several special tokens of usual names, {', '.join(names)}; set "
            f"pack.{key} to the one that is meant"
        )
    return names[0] if names else None


def _without_surrogates(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
