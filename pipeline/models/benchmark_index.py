"""Build the index of evaluation sets that `filters.decontamination` compares documents with.

Every text of an evaluation item that has `min_words` words is a passage: the strings of a JSON row,
however deep, the cells of a CSV or Parquet row. Shorter ones (labels, names, most answers) say
nothing about where they were read, and are left out, as are addresses; but a row of nothing else is
told by how its texts stand together, the question with all answers or with one (`_arranged`). Two
kinds of n-grams are common without being copied, and are left out as well: templates and
instructions, found in more than `max_items` items of one set, and whatever the background texts
hold, if any are given (text known to be free of the sets, such as statutes, scripture, or text
older than the sets).

Sets that quote public text hold it against that text: BoolQ's passages are paragraphs of Wikipedia,
and an index with BoolQ condemns the articles. Whoever wants to keep those leaves such a set out.

The same files make the same bytes, in whatever order and place they are given.
"""

import csv
import gzip
import io
import json
import os
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath, PurePosixPath
from string import ascii_lowercase
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash
import zstandard

from filters.decontamination import (
    ARRAYS,
    MAGIC,
    NORMALIZER,
    PROBES,
    VERSION,
    Index,
    fingerprints,
    normalize,
    probe,
)
from filters.text import ngrams
from filters.text.ngrams import I64, U64
from stages.read.records import zstd_pieces
from stages.storage.digests import bytes_sha256

N = 13
# texts of 8 words are titles and phrases of law ("the Equal Protection Clause of the Fourteenth
# Amendment", an answer in MMLU), of 9 still "when the Moon passes between Earth and the Sun"; no
# text of 10 or 11 words stood in 56 MB of clean text
MIN_WORDS = 10
# scripts whose words are about half a word each: Burmese, Khmer; Chinese and Japanese, of whose 13
# characters a name may be
_HALF_WORDS = re.compile(
    f"[\u1000-\u109f\u1780-\u17ff{''.join(f'{chr(a)}-{chr(b)}' for a, b in ngrams.WITHOUT_SPACES)}]+"
)
# a reading passage is repeated for each of its questions, up to 8 in LSAT; templates are in
# hundreds of items
MAX_ITEMS = 20

_KINDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
# names that tell a part of a set, and folders that tell nothing
_PART = re.compile(r"(test|train|dev|val|valid|validation|eval)(-\d+-of-\d+)?")
_PLAIN = re.compile(r"data|main|default")
# what harnesses write around a question, and the letters of its answers
_HARNESS = re.compile(r"^(question|q) | (answer|a)$")
_LETTER = re.compile("[a-j]")
# what reading a file that is cut short, damaged or of another kind raises
_UNREADABLE = (OSError, EOFError, tarfile.TarError, zlib.error, zstandard.ZstdError)
_ADDRESS = re.compile(r"\s*[a-z]+://\S+\s*", re.IGNORECASE)


class Source(NamedTuple):
    """An evaluation file: the strings of its rows, in order, None for a row that could not be read."""

    benchmark: str
    name: str
    sha256: str
    rows: list[list[str] | None]


class Grams(NamedTuple):
    """N-grams of passages: fingerprint, hash of the first `min_words` words, and number of the
    passage, each (G,).
    """

    keys: U64
    heads: U64
    passages: I64

    def of(self, rows: npt.NDArray[np.bool_]) -> "Grams":
        return Grams(self.keys[rows], self.heads[rows], self.passages[rows])


class Passages(NamedTuple):
    """Passages of a file, normalised, the row each stands in, from 1, and how many texts are too
    short to be one.
    """

    texts: list[str]
    rows: list[int]
    short: int


def build_index(
    paths: Sequence[str],
    *,
    output: Path,
    background: Sequence[str] = (),
    n: int = N,
    min_words: int = MIN_WORDS,
    max_items: int = MAX_ITEMS,
) -> dict[str, Any]:
    """Write the index of the evaluation files at `paths` (see `sources`); returns its header.

    Passages of fewer than `n` words are one n-gram each; two characters of Chinese or Japanese
    count as a word of `min_words`. The header's `files` tell of each file, as `by_benchmark` does
    of each set, how many rows it has, how many of them could not be read (`bad_rows`) or have no
    passage (`empty_rows`), how many texts are too short, how many passages there are, and how many
    of those have only common n-grams and are left out. ValueError, before any work, for an output
    that would write over anything but an index.
    """
    if not 1 <= min_words <= n:
        raise ValueError(f"min_words must be between 1 and n = {n}, got {min_words}")
    _check_output(output, [*paths, *background])
    digests = sorted(bytes_sha256(_read(path)) for path in background)
    by_name = {
        (source.benchmark, source.name, source.sha256): source
        for path in paths
        for source in sources(path)
    }
    found = [by_name[name] for name in sorted(by_name)]
    passages = [_passages(source, min_words=min_words) for source in found]
    file = np.repeat(np.arange(len(found)), [len(p.texts) for p in passages])
    row = np.array([row for p in passages for row in p.rows], np.int64)
    grams = _distinct(
        _grams([text for p in passages for text in p.texts], n=n, min_words=min_words)
    )
    common = _templates(grams, file, row, [s.benchmark for s in found], max_items=max_items)
    common |= _in_background(grams, background, lengths=range(min_words, n + 1))
    kept = grams.of(~common)
    indexed, passage, counts = np.unique(kept.passages, return_inverse=True, return_counts=True)
    if not len(indexed):
        raise ValueError(
            f"{', '.join(paths)}: no text of {min_words} words or more that is not common, so nothing to index"
        )
    header = {
        "version": VERSION,
        "normalizer": NORMALIZER,
        "n": n,
        "min_words": min_words,
        "max_items": max_items,
        "background": digests,
        "files": _summaries(
            found, passages, file[grams.passages], file[kept.passages], file[indexed]
        ),
    }
    index = Index(
        header,
        bitmap=_bitmap(kept.heads),
        high=(kept.keys >> np.uint64(16)).astype(np.uint32),
        low=(kept.keys & np.uint64(0xFFFF)).astype(np.uint16),
        passage=passage.astype(np.uint32),
        ngrams=counts.astype(np.uint32),
        file=file[indexed].astype(np.uint32),
        row=row[indexed].astype(np.uint32),
    )
    _write(output, index)
    return header


def by_benchmark(header: dict[str, Any]) -> dict[str, Counter[str]]:
    """What the header of an index counts, per evaluation set; `files` is the number of its files."""
    sums: dict[str, Counter[str]] = {}
    for file in header["files"]:
        sums.setdefault(file["benchmark"], Counter()).update({"files": 1, **file["counts"]})
    return sums


def sources(path: str) -> Iterator[Source]:
    """The evaluation files at a path: a .jsonl, .json, .csv, .tsv or .parquet file, a folder or a
    .tar archive of them.

    Any may be packed as .gz or .zst. A file is a set called by its name without suffixes; but
    gsm8k/test.jsonl belongs to gsm8k, and all files like mmlu/data/test/anatomy_test.csv to mmlu.
    'NAME=PATH' makes one set, NAME, of all at a path.
    """
    name, _, named = path.partition("=")
    if not named or Path(path).exists():
        name, named = "", path
    try:
        members = list(_members(Path(named)))
    except _UNREADABLE as error:
        raise ValueError(
            f"{named}: cannot be read ({error}); is it whole, and what its name says?"
        ) from None
    if not members:
        kinds = f"{', '.join(_KINDS)}, or with .gz or .zst behind"
        raise ValueError(
            f"{named}: holds no evaluation file; they end in {kinds}; name a .tar archive itself, not its folder"
        )
    for place, data in members:
        rows = list(_rows(place, data))
        if not any(row is not None for row in rows):
            raise ValueError(
                f"{named}: of the {len(rows)} rows of {place} none could be read; is it what its name says?"
            )
        yield Source(name or benchmark_of(place), place.name, bytes_sha256(data), rows)


def benchmark_of(place: PurePosixPath) -> str:
    """The set that a file belongs to: by its name, or by its folder's where the file's name only
    tells a part of a set.
    """
    *folders, stem = *place.parts[:-1], place.name.split(".")[0]
    inside = [
        folder for folder in folders if not _PART.fullmatch(folder) and not _PLAIN.fullmatch(folder)
    ]
    in_part = folders and _PART.fullmatch(folders[-1]) and stem.endswith(f"_{folders[-1]}")
    return inside[-1] if inside and (in_part or _PART.fullmatch(stem)) else stem


def _members(path: Path) -> Iterator[tuple[PurePosixPath, bytes]]:
    """Evaluation files, unpacked, with their places: inside the folder or archive, that folder's
    own name in front.
    """
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            if file.is_file() and _kind(file) in _KINDS:
                yield (
                    PurePosixPath(path.resolve().name, *file.relative_to(path).parts),
                    _unpacked(file.name, file.read_bytes()),
                )
        return
    data = _unpacked(path.name, path.read_bytes())
    if _kind(path) == ".tar":
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            for member in archive:
                if member.isfile() and _kind(PurePosixPath(member.name)) in _KINDS:
                    content = archive.extractfile(member)
                    assert content is not None  # it is a file
                    yield PurePosixPath(member.name), _unpacked(member.name, content.read())
    elif _kind(path) in _KINDS:
        yield PurePosixPath(path.resolve()), data


def _kind(path: PurePath) -> str:
    """The suffix that says what is inside, that of the packing left out."""
    return next((s for s in reversed(path.suffixes) if s not in (".gz", ".zst")), "").replace(
        ".tgz", ".tar"
    )


def _unpacked(name: str, data: bytes) -> bytes:
    if name.endswith((".gz", ".tgz")):
        return gzip.decompress(data)
    if name.endswith(".zst"):
        return b"".join(zstd_pieces(io.BytesIO(data)))
    return data


def _rows(place: PurePosixPath, data: bytes) -> Iterator[list[str] | None]:
    """The strings of each row, None for one that cannot be read."""
    kind = _kind(place)
    if kind == ".parquet":
        yield from (_strings(row) for row in _parquet(place, data))
    elif kind in (".csv", ".tsv"):
        yield from _csv(
            data.decode("utf-8-sig", "replace"), delimiter="," if kind == ".csv" else "\t"
        )
    elif kind == ".json" and (value := _json(data)) is not None:
        yield from map(_strings, _json_rows(value))
    else:  # .json files of many lines are common too
        for line in data.split(b"\n"):
            if line.strip():
                value = _json(line)
                yield None if value is None else _strings(value)


def _json(data: bytes) -> Any:
    """None for what is not JSON; null stands for no row as well."""
    try:
        return json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None


def _json_rows(value: Any) -> list[Any]:
    """The rows of a file that is one JSON value: a list, an object's lists ({"train": [...],
    "test": [...]}) or columns.
    """
    if isinstance(value, list):
        return value
    lists = [v for v in value.values() if isinstance(v, list)] if isinstance(value, dict) else []
    if (
        len(lists) > 1
        and len({len(v) for v in lists}) == 1
        and not all(isinstance(row, dict) for v in lists for row in v)
    ):
        return [list(row) for row in zip(*lists, strict=True)]
    return [row for rows in lists for row in rows] if lists else [value]


def _csv(text: str, *, delimiter: str) -> Iterator[list[str] | None]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    while True:
        try:
            yield next(reader)
        except StopIteration:
            return
        except csv.Error:  # a cell of more than 128 kB, which an open quote makes
            yield None


def _parquet(place: PurePosixPath, data: bytes) -> list[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows: list[dict[str, Any]] = pq.read_table(pa.BufferReader(data)).to_pylist()
    except pa.ArrowException as error:
        raise ValueError(f"{place}: cannot be read as Parquet ({error})") from None
    return rows


def _strings(value: Any) -> list[str]:
    """All strings in a row, in reading order; the keys of objects are none."""
    found, waiting = [], [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            found.append(value)
        elif isinstance(value, dict | list):
            waiting.extend(reversed(list(value.values()) if isinstance(value, dict) else value))
    return found


def _passages(source: Source, *, min_words: int) -> Passages:
    """A row that says the same twice has it once."""
    texts: list[str] = []
    rows: list[int] = []
    short = 0
    for row, strings in enumerate(source.rows, start=1):
        normalized = dict.fromkeys(
            normalize(string) for string in strings or () if not _ADDRESS.fullmatch(string)
        )
        normalized.pop("", None)
        long = [text for text in normalized if _says_enough(text, min_words)]
        short += len(normalized) - len(long)
        long = long or list(dict.fromkeys(_arranged(list(normalized), min_words=min_words)))
        texts += long
        rows += [row] * len(long)
    return Passages(texts, rows, short)


def _arranged(short: list[str], *, min_words: int) -> Iterator[str]:
    """The texts of a row as pages have them: a question with all answers or one, plain or "a) one
    b) two", and a blank filled.

    The question is the first text or, as ARC's rows have it, the last; Winograd's have what follows
    the blank there.
    """
    texts = [text for text in short if not _LETTER.fullmatch(text)]
    bare = [text for text in (_HARNESS.sub("", text) for text in texts) if text]
    for strings in (strings for strings in (texts, bare) if len(strings) > 1):
        *others, last = strings
        for question, *answers in (strings, [last, *others]):
            for told in (answers, *([answer] for answer in answers)):
                plain = " ".join([question, *told])
                if _says_enough(plain, min_words):
                    yield plain
                    lettered = zip(ascii_lowercase, told, strict=False)
                    yield " ".join(
                        [question, *(f"{letter} {answer}" for letter, answer in lettered)]
                    )
        yield from (
            filled for text in others if _says_enough(filled := f"{text} {last}", min_words)
        )


def _says_enough(normalized: str, min_words: int) -> bool:
    return _num_words(normalized) - len(_HALF_WORDS.findall(normalized)) / 2 >= min_words


def _num_words(normalized: str) -> int:
    return normalized.count(" ") + 1 if normalized else 0


def _summaries(
    found: list[Source], passages: list[Passages], before: I64, after: I64, indexed: I64
) -> list[dict[str, Any]]:
    """What the header tells of each file; `before` and `after` are the files of all n-grams and of
    those in the index.
    """
    every, kept, held = (
        np.bincount(files, minlength=len(found)).tolist() for files in (before, after, indexed)
    )
    rows = []
    for number, (source, (texts, places, short)) in enumerate(zip(found, passages, strict=True)):
        bad = source.rows.count(None)
        counts = {
            "rows": len(source.rows),
            "bad_rows": bad,
            "empty_rows": len(source.rows) - bad - len(set(places)),
            "short_texts": short,
            "passages": len(texts),
            "common_passages": len(texts) - held[number],
            "ngrams": kept[number],
            "common_ngrams": every[number] - kept[number],
        }
        rows.append(
            {
                "benchmark": source.benchmark,
                "name": source.name,
                "sha256": source.sha256,
                "counts": counts,
            }
        )
    return rows


def _grams(passages: list[str], *, n: int, min_words: int) -> Grams:
    """N-grams of normalised passages but for those of numbers only; a passage of fewer than `n`
    words is one.
    """
    raw = "".join(f"{text} " for text in passages).encode("utf-8", "surrogatepass")
    starts, ends = ngrams.words(raw)
    hashes = ngrams.word_hashes(raw, starts, ends)
    lettered = np.append(
        0, np.cumsum(np.frombuffer(raw, np.uint8)[starts] > ord("9"))
    )  # words that begin with a letter, so far
    num_words = np.array([_num_words(text) for text in passages], np.int64)
    first = np.cumsum(num_words) - num_words
    parts = [Grams(np.empty(0, np.uint64), np.empty(0, np.uint64), np.empty(0, np.int64))]
    for length in range(min_words, n + 1):
        numbers = np.flatnonzero(np.minimum(num_words, n) == length)
        counts = num_words[numbers] - length + 1
        numbers, begin = np.repeat(numbers, counts), np.repeat(np.cumsum(counts) - counts, counts)
        at = first[numbers] + np.arange(len(numbers)) - begin
        told = lettered[at + length] > lettered[at]
        at, numbers = at[told], numbers[told]
        heads = ngrams.extended(hashes[at], (hashes[at + k] for k in range(1, min_words)))
        joined = ngrams.extended(heads.copy(), (hashes[at + k] for k in range(min_words, length)))
        parts.append(Grams(fingerprints(joined), heads, numbers))
    keys, all_heads, passage = zip(*parts, strict=True)
    return Grams(np.concatenate(keys), np.concatenate(all_heads), np.concatenate(passage))


def _distinct(grams: Grams) -> Grams:
    """In order of fingerprint, then passage; an n-gram that a passage repeats, once."""
    order = np.lexsort((grams.passages, grams.keys))
    keys, passages = grams.keys[order], grams.passages[order]
    new = np.ones(len(keys), bool)
    new[1:] = (keys[1:] != keys[:-1]) | (passages[1:] != passages[:-1])
    return Grams(keys[new], grams.heads[order][new], passages[new])


def _templates(
    grams: Grams, file: I64, row: I64, benchmarks: list[str], *, max_items: int
) -> npt.NDArray[np.bool_]:
    """Which n-grams stand in more than `max_items` items of one set; `grams` ascend by key, then
    passage.
    """
    if not len(grams.keys):
        return np.empty(0, bool)
    numbers = {name: number for number, name in enumerate(dict.fromkeys(benchmarks))}
    sets = np.array([numbers[name] for name in benchmarks])[file[grams.passages]]
    in_set = np.append(True, (grams.keys[1:] != grams.keys[:-1]) | (sets[1:] != sets[:-1]))
    files, rows = file[grams.passages], row[grams.passages]
    new_item = in_set | np.append(True, (files[1:] != files[:-1]) | (rows[1:] != rows[:-1]))
    starts = np.flatnonzero(in_set)
    many = np.add.reduceat(new_item.astype(np.int64), starts) > max_items
    return np.isin(grams.keys, grams.keys[starts[many]])


def _in_background(grams: Grams, paths: Sequence[str], *, lengths: range) -> npt.NDArray[np.bool_]:
    """Which n-grams the background texts hold; `grams` ascend by key."""
    held = np.zeros(len(grams.keys), bool)
    for text in (text for path in paths for text in _background(path)):
        raw = (normalize(text) + " ").encode("utf-8", "surrogatepass")
        hashes = ngrams.word_hashes(raw, *ngrams.words(raw))
        for length in (length for length in lengths if length <= len(hashes)):
            keys = fingerprints(ngrams.ngram_hashes(hashes, length))
            first = np.searchsorted(grams.keys, keys)
            held[first[grams.keys.take(first, mode="clip") == keys]] = True
    # marked at the first of its rows, so for all of them
    return np.isin(grams.keys, grams.keys[held])


def _background(path: str) -> Iterator[str]:
    """Texts of a file: the whole of a .txt file, also packed; all strings of any other kind."""
    if _kind(Path(path)) == ".txt":
        try:
            yield _unpacked(path, _read(path)).decode("utf-8", "replace")
        except _UNREADABLE as error:
            raise ValueError(
                f"background {path}: cannot be read ({error}); is it whole, and what its name says?"
            ) from None
    else:
        yield from (text for source in sources(path) for row in source.rows for text in row or ())


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"background {path}: cannot be read ({error}); give a file") from None


def _bitmap(heads: U64) -> npt.NDArray[np.uint8]:
    """Two bits for each hash of first words, in 16 to 32 bits of room: below 2 % of other words
    look like one.
    """
    size = 1 << max(3, (2 * len(np.unique(heads)) - 1).bit_length())
    bitmap = np.zeros(size, np.uint8)
    for which in PROBES:
        byte, mask = probe(heads, size=size, which=which)
        np.bitwise_or.at(bitmap, byte, mask)
    return bitmap


def _write(output: Path, index: Index) -> None:
    arrays = {name: getattr(index, name).astype(dtype) for name, dtype in ARRAYS.items()}
    header = index.header | {"lengths": {name: len(array) for name, array in arrays.items()}}
    encoded = json.dumps(header, sort_keys=True).encode()
    rest = io.BytesIO()
    rest.write(len(encoded).to_bytes(8, "little") + encoded)
    for array in arrays.values():
        rest.write(bytes(-rest.tell() % 8) + array.tobytes())
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.{os.getpid()}")
    temporary.write_bytes(MAGIC + xxhash.xxh3_64_digest(rest.getbuffer()) + rest.getbuffer())
    temporary.replace(output)


def _check_output(output: Path, inputs: Sequence[str]) -> None:
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(output)):
        raise ValueError(
            f"output {output}: is an address; write the index to a local file, and copy that"
        )
    if output.is_dir():
        raise ValueError(
            f"output {output}: is a folder; name the file to write, such as {output / 'benchmarks.idx'}"
        )
    named = [path for given in inputs for path in (given, given.partition("=")[2]) if path]
    if output.resolve() in (Path(path).resolve() for path in named):
        raise ValueError(
            f"output {output}: is one of the files to read; give the index a file of its own"
        )
    if output.exists() and not _is_index(output):
        raise ValueError(
            f"output {output}: there is a file that is no index of ours; name another, or remove it first"
        )


def _is_index(path: Path) -> bool:
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC
