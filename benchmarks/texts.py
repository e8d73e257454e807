"""Texts for the benchmarks of dedup: real ones, copies planted among them, and how similar two are."""

import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import xxhash
import zstandard

from filters.text.words import normalize
from stages.dedup import minhash


def lines(path: Path) -> Iterator[dict[str, str]]:
    """The rows of a .jsonl.zst file."""
    with open(path, "rb") as raw:
        yield from map(
            json.loads, io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(raw), "utf-8")
        )


def web_pages(data: Path) -> list[str]:
    """The main texts of WCXB's pages."""
    return [
        row["main_content"]
        for row in lines(data / "gold" / "wcxb-500.jsonl.zst")
        if row["main_content"]
    ]


def documentation(data: Path, names: Iterable[str] = ()) -> Iterator[str]:
    """Pages of documentation packages, all of them if none is named."""
    folder = data / "text" / "docs"
    for path in [folder / f"{name}.jsonl.zst" for name in names] or sorted(
        folder.glob("*.jsonl.zst")
    ):
        yield from (row["text"] for row in lines(path))


def leads(data: Path) -> list[str]:
    """The first paragraphs of English Wikipedia's articles, a different article each."""
    raw = (
        zstandard.ZstdDecompressor()
        .stream_reader(open(data / "text" / "wiki" / "ovos_summaries_en.json.zst", "rb"))
        .read()
    )
    return [article["extract"] for article in json.loads(raw).values()]


def cut(texts: Iterable[str], words: int) -> Iterator[str]:
    """Documents of so many words each, as they stand: with their punctuation, case and line breaks."""
    for text in texts:
        ends = [0, *(m.end() for m in re.finditer(r"\S+\s*", text))][::words]
        yield from (text[a:b] for a, b in pairwise(ends))


def plant(text: str, target: float, filler: Sequence[str], rng: np.random.Generator) -> str:
    """A copy with words exchanged, here and there or in one run, so that about `target` of the
    shingles' union is common.
    """
    words = text.split()
    # shingles: of n on either side k differ, (n - k) / (n + k) are common
    changed = len(words) * (1 - target) / (1 + target)
    if rng.random() < 0.5:
        places = rng.choice(len(words), max(1, round(changed / 5)), replace=False)
    else:
        length = max(1, round(changed) - 4)
        places = np.arange(length) + rng.integers(0, max(1, len(words) - length))
    for place, other in zip(
        places.tolist(), rng.integers(0, len(filler), len(places)).tolist(), strict=True
    ):
        words[place] = filler[other]
    return " ".join(words)


def seeded(*purpose: object) -> np.random.Generator:
    """Random numbers that depend on nothing but the names given."""
    return np.random.default_rng(xxhash.xxh64_intdigest("/".join(map(str, purpose))))


def shingles(text: str, ngram: int = 5) -> minhash.U64:
    """The distinct shingles of a raw text."""
    return minhash.shingle_hashes(normalize(text), ngram=ngram)


def jaccard(a: minhash.U64, b: minhash.U64) -> float:
    """Of two ascending arrays without repeats; 0 if both are empty."""
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / max(1, len(a) + len(b) - common)
