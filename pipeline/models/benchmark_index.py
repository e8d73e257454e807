"""Build the index of evaluation sets that `filters.decontamination` compares documents with.

Every text of an evaluation item that has `min_words` words is a passage: the strings of a JSON row,
however deep, the cells of a CSV or Parquet row. Shorter ones (labels, names, most answers) do not
show where they were read, and are left out, as are URLs; but a row of short texts only is
represented by arrangements of its texts, the question with all answers or with one
(`_arrangements`). Two kinds of n-grams are common without being copied, and are left out as well:
templates and instructions, which are in more than `max_items` items of one set, and the n-grams of
the background texts, if any are given (text known to be free of the sets, such as statutes,
scripture, or text older than the sets).

Sets that quote public text match that text: BoolQ's passages are paragraphs of Wikipedia, and an
index with BoolQ rejects the articles. To keep those, leave such a set out.

The same files make the same bytes, in any order and place.
"""

import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from string import ascii_lowercase
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from filters.passage_index import (
    ARRAYS,
    MAGIC,
    PROBES,
    VERSION,
    bitmap_bit,
    fingerprints,
)
from filters.text import ngrams
from filters.text.ngrams import I64, U64
from filters.text.words import NORMALIZER, WITHOUT_SPACES, normalize
from pipeline.models.evaluation_sets import (
    EvaluationFile,
    evaluation_files,
    format_of,
    read_plain_text,
)
from pipeline.models.model_card import check_outputs
from pipeline.models.options import IndexOptions
from stages.storage.digests import file_sha256
from stages.storage.files import write_atomically

# scripts whose words are about half a word each: Burmese, Khmer; Chinese and Japanese, where 13
# characters may be a name
_UNSPACED = "".join(f"{chr(a)}-{chr(b)}" for a, b in WITHOUT_SPACES)
_HALF_WORDS = re.compile(f"[\u1000-\u109f\u1780-\u17ff{_UNSPACED}]+")
# what harnesses write around a question, and the letters of its answers
_HARNESS = re.compile(r"^(question|q) | (answer|a)$")
_LETTER = re.compile("[a-j]")
_URL = re.compile(r"\s*[a-z]+://\S+\s*", re.IGNORECASE)

Bools = npt.NDArray[np.bool_]


def build_index(options: IndexOptions) -> dict[str, Any]:
    """Write the index of the evaluation files (see `evaluation_files`); its header.

    Passages of fewer than `n` words are one n-gram each; two characters of Chinese or Japanese
    count as a word of `min_words`. The header's `files` have for each file, as `by_benchmark` for
    each set, the number of rows, of rows that could not be read (`bad_rows`) or have no passage
    (`empty_rows`), of texts that are too short, of passages, and of those that have only common
    n-grams and are left out. ValueError, before any work, for an output that would overwrite
    anything but an index.
    """
    n, min_words, background = options.n, options.min_words, options.background or []
    if not 1 <= min_words <= n:
        raise ValueError(f"min_words must be between 1 and n = {n}, got {min_words}")
    inputs = [*options.files, *(path.partition("=")[2] for path in options.files), *background]
    check_outputs([options.output], inputs, kind="an index", is_ours=_is_index)
    digests = sorted(file_sha256(Path(path)) for path in background)
    by_name = {file[:3]: file for path in options.files for file in evaluation_files(path)}
    files = [by_name[name] for name in sorted(by_name)]
    passages = [_passages_of(file, min_words=min_words) for file in files]
    file_of = np.repeat(np.arange(len(files)), [len(p.texts) for p in passages])
    row_of = np.array([row for p in passages for row in p.rows], np.int64)
    texts = [text for p in passages for text in p.texts]
    grams = _distinct(_grams_of(texts, n=n, min_words=min_words))
    _, set_of_file = np.unique([file.benchmark for file in files], return_inverse=True)
    item_of = np.cumsum(_starts_of_runs(file_of, row_of))
    sets, items = set_of_file[file_of[grams.passages]], item_of[grams.passages]
    common = _is_template(grams, sets, items, max_items=options.max_items)
    common |= _is_in_background(grams, background, lengths=range(min_words, n + 1))
    kept = grams.select(~common)
    indexed, passage, counts = np.unique(kept.passages, return_inverse=True, return_counts=True)
    if not len(indexed):
        raise ValueError(
            f"{', '.join(options.files)}: no text of {min_words} words or more that is not common, "
            "so nothing to index"
        )
    per_file = (
        np.bincount(numbers, minlength=len(files)).tolist()
        for numbers in (file_of[grams.passages], file_of[kept.passages], file_of[indexed])
    )
    header = {
        "version": VERSION,
        "normalizer": NORMALIZER,
        "n": n,
        "min_words": min_words,
        "max_items": options.max_items,
        "background": digests,
        "files": list(map(_summary, files, passages, *per_file)),
    }
    _write_index(
        options.output,
        header,
        bitmap=_bitmap(kept.heads),
        high=kept.keys >> np.uint64(16),
        low=kept.keys & np.uint64(0xFFFF),
        passage=passage,
        ngrams=counts,
        file=file_of[indexed],
        row=row_of[indexed],
    )
    return header


def _summary(
    file: EvaluationFile, passages: "Passages", all_ngrams: int, ngrams: int, num_indexed: int
) -> dict[str, Any]:
    """The header's entry for a file."""
    bad = file.rows.count(None)
    counts = {
        "rows": len(file.rows),
        "bad_rows": bad,
        "empty_rows": len(file.rows) - bad - len(set(passages.rows)),
        "short_texts": passages.num_short,
        "passages": len(passages.texts),
        "common_passages": len(passages.texts) - num_indexed,
        "ngrams": ngrams,
        "common_ngrams": all_ngrams - ngrams,
    }
    names = {"benchmark": file.benchmark, "name": file.name, "sha256": file.sha256}
    return {**names, "counts": counts}


def by_benchmark(header: dict[str, Any]) -> dict[str, Counter[str]]:
    """The counts in an index's header, summed per evaluation set; `files` is their number."""
    sums: dict[str, Counter[str]] = {}
    for file in header["files"]:
        sums.setdefault(file["benchmark"], Counter()).update({"files": 1, **file["counts"]})
    return sums


# --- passages -------------------------------------------------------------------------------------


class Passages(NamedTuple):
    """Normalized passages of a file, the row of each, from 1, and how many texts are too short."""

    texts: list[str]
    rows: list[int]
    num_short: int


def _passages_of(file: EvaluationFile, *, min_words: int) -> Passages:
    """Passages of a file; a text that a row repeats is one."""
    passages = Passages([], [], 0)
    num_short = 0
    for row, strings in enumerate(file.rows, start=1):
        normalized = dict.fromkeys(
            normalize(string) for string in strings or () if not _URL.fullmatch(string)
        )
        normalized.pop("", None)
        long = [text for text in normalized if _is_long(text, min_words)]
        num_short += len(normalized) - len(long)
        long = long or list(dict.fromkeys(_arrangements(list(normalized), min_words=min_words)))
        passages.texts.extend(long)
        passages.rows.extend([row] * len(long))
    return passages._replace(num_short=num_short)


def _arrangements(short: list[str], *, min_words: int) -> Iterator[str]:
    """The texts of a row as pages have them: a question with all answers or one, plain or "a) one
    b) two", and a filled blank.

    The question is the first text or, in rows of ARC, the last; in rows of Winograd the last text
    is what follows the blank.
    """
    texts = [text for text in short if not _LETTER.fullmatch(text)]
    bare = [text for text in (_HARNESS.sub("", text) for text in texts) if text]
    for strings in (strings for strings in (texts, bare) if len(strings) > 1):
        *others, last = strings
        for question, *answers in (strings, [last, *others]):
            for shown in (answers, *([answer] for answer in answers)):
                plain = " ".join([question, *shown])
                if _is_long(plain, min_words):
                    yield plain
                    lettered = zip(ascii_lowercase, shown, strict=False)
                    yield " ".join([question, *(f"{letter} {text}" for letter, text in lettered)])
        yield from (filled for text in others if _is_long(filled := f"{text} {last}", min_words))


def _is_long(normalized: str, min_words: int) -> bool:
    return _num_words(normalized) - len(_HALF_WORDS.findall(normalized)) / 2 >= min_words


def _num_words(normalized: str) -> int:
    return normalized.count(" ") + 1 if normalized else 0


# --- n-grams --------------------------------------------------------------------------------------


class Grams(NamedTuple):
    """N-grams of passages, each array (G,): fingerprint, hash of the first `min_words` words, and
    number of the passage.
    """

    keys: U64
    heads: U64
    passages: I64

    def select(self, rows: Bools | I64) -> "Grams":
        return Grams(self.keys[rows], self.heads[rows], self.passages[rows])


def _grams_of(passages: list[str], *, n: int, min_words: int) -> Grams:
    """N-grams of normalized passages, without those of numbers only; a passage of fewer than `n`
    words is one n-gram.
    """
    raw = "".join(f"{text} " for text in passages).encode("utf-8", "surrogatepass")
    starts, ends = ngrams.words(raw)
    hashes = ngrams.word_hashes(raw, starts, ends)
    # words so far that begin with a letter
    num_lettered = np.append(0, np.cumsum(np.frombuffer(raw, np.uint8)[starts] > ord("9")))
    num_words = np.array([_num_words(text) for text in passages], np.int64)
    first = np.cumsum(num_words) - num_words
    parts = []
    for length in range(min_words, n + 1):
        numbers = np.flatnonzero(np.minimum(num_words, n) == length)
        counts = num_words[numbers] - length + 1
        numbers, begin = np.repeat(numbers, counts), np.repeat(np.cumsum(counts) - counts, counts)
        at = first[numbers] + np.arange(len(numbers)) - begin
        has_letters = num_lettered[at + length] > num_lettered[at]
        at, numbers = at[has_letters], numbers[has_letters]
        heads = ngrams.extended(hashes[at], (hashes[at + k] for k in range(1, min_words)))
        joined = ngrams.extended(heads.copy(), (hashes[at + k] for k in range(min_words, length)))
        parts.append(Grams(fingerprints(joined), heads, numbers))
    return Grams(*map(np.concatenate, zip(*parts, strict=True)))


def _distinct(grams: Grams) -> Grams:
    """Sorted by fingerprint, then passage; an n-gram that a passage repeats, once."""
    grams = grams.select(np.lexsort((grams.passages, grams.keys)))
    return grams.select(_starts_of_runs(grams.keys, grams.passages))


def _starts_of_runs(*columns: npt.NDArray[Any]) -> Bools:
    """Whether each row differs in any column from the row before it."""
    is_start = np.zeros(len(columns[0]), bool)
    is_start[:1] = True
    for column in columns:
        is_start[1:] |= column[1:] != column[:-1]
    return is_start


def _is_template(grams: Grams, sets: I64, items: npt.NDArray[Any], *, max_items: int) -> Bools:
    """Which n-grams are in more than `max_items` items of one set, each its row of a file.

    `grams` ascend by key, then passage; `sets` and `items` are those of the n-grams.
    """
    starts = np.flatnonzero(_starts_of_runs(grams.keys, sets))
    is_new_item = _starts_of_runs(grams.keys, items)
    is_frequent = np.add.reduceat(is_new_item.astype(np.int64), starts) > max_items
    return np.isin(grams.keys, grams.keys[starts[is_frequent]])


def _is_in_background(grams: Grams, paths: Sequence[str], *, lengths: range) -> Bools:
    """Which n-grams the background texts contain; `grams` ascend by key."""
    is_first_match = np.zeros(len(grams.keys), bool)
    for text in (text for path in paths for text in _background_texts(path)):
        raw = (normalize(text) + " ").encode("utf-8", "surrogatepass")
        hashes = ngrams.word_hashes(raw, *ngrams.words(raw))
        for length in (length for length in lengths if length <= len(hashes)):
            keys = fingerprints(ngrams.ngram_hashes(hashes, length))
            first = np.searchsorted(grams.keys, keys)
            is_first_match[first[grams.keys.take(first, mode="clip") == keys]] = True
    return np.isin(grams.keys, grams.keys[is_first_match])


def _background_texts(path: str) -> Iterator[str]:
    """Texts of a file: the whole of a .txt file, which may be compressed, else all its strings."""
    if format_of(Path(path)) == ".txt":
        yield read_plain_text(path)
    else:
        yield from (t for file in evaluation_files(path) for row in file.rows for t in row or ())


# --- writing --------------------------------------------------------------------------------------


def _bitmap(heads: U64) -> npt.NDArray[np.uint8]:
    """Two bits for each hash of first words, in 16 to 32 bits of room.

    Below 2 % of other words look like one of them.
    """
    size = 1 << max(3, (2 * len(np.unique(heads)) - 1).bit_length())
    bitmap = np.zeros(size, np.uint8)
    for which in PROBES:
        byte, mask = bitmap_bit(heads, size=size, which=which)
        np.bitwise_or.at(bitmap, byte, mask)
    return bitmap


def _write_index(output: Path, header: dict[str, Any], **columns: npt.NDArray[Any]) -> None:
    arrays = {name: columns[name].astype(dtype) for name, dtype in ARRAYS.items()}
    lengths = {name: len(array) for name, array in arrays.items()}
    encoded = json.dumps(header | {"lengths": lengths}, sort_keys=True).encode()
    rest = io.BytesIO()
    rest.write(len(encoded).to_bytes(8, "little") + encoded)
    for array in arrays.values():
        rest.write(bytes(-rest.tell() % 8) + array.tobytes())
    content = rest.getvalue()
    write_atomically(str(output), MAGIC + xxhash.xxh3_64_digest(content) + content)


def _is_index(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC
