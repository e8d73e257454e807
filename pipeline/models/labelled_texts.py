"""Texts under labels, on disk, and which of them are near-duplicates: what a classifier is trained
and judged on.

A text that is under two labels teaches nothing, and one that is in training and held out flatters.
So clusters of near-duplicates are cut to one copy, and those that span labels go from all of them.
They are found as dedup finds them, by band keys (stages/minhash.py), without looking at the texts
again: a few that are merely alike go too.
"""

import mmap
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from filters import quality
from pipeline.models.model_card import is_held_out
from pipeline.models.training_texts import Source
from stages.dedup import minhash
from stages.dedup.components import dense_components
from stages.dedup.dedup import DedupConfig

SIGNATURE = DedupConfig().signature
BATCH = 1000  # documents hashed at once

U64 = npt.NDArray[np.uint64]


class Texts:
    """Normalised texts by number, a line each in a file; in memory one takes 300 bytes.

    Texts without a word are left out.
    """

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        self.names = list(names)
        self.sources: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        self.labels = array("H")
        self.is_held_out = bytearray()
        self.contents: list[bytes] = []  # hashes of the whole text
        self.bands: list[bytes] = []  # band keys; b"" for a text too short to have any
        self._ends = array("Q", [0])
        self._path = path

    def __len__(self) -> int:
        return len(self.labels)

    def lines(self, numbers: Iterable[int]) -> Iterator[str]:
        """The texts of these numbers."""
        with (
            self._path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        ):
            for number in numbers:
                yield mapped[self._ends[number] : self._ends[number + 1] - 1].decode()

    def append(self, source: Source, *, label: str, held_out: float) -> None:
        """Read a source to its end."""
        number, words, documents = self.names.index(label), 0, iter(source)
        with self._path.open("ab") as file:
            while batch := list(islice(documents, BATCH)):
                found = [(text, line) for text in batch if (line := quality.normalize(text))]
                words += sum(line.count(" ") + 1 for _, line in found)
                normalized = [minhash.normalize(text) for text, _ in found]
                self.contents += [
                    minhash.content_hash(text, n)
                    for (text, _), n in zip(found, normalized, strict=True)
                ]
                self.bands += minhash.band_keys(normalized, SIGNATURE)
                for _, line in found:
                    self._ends.append(self._ends[-1] + file.write(line.encode() + b"\n"))
                    self.labels.append(number)
                    self.is_held_out.append(is_held_out(line, share=held_out))
        self.sources[label].append(source.entry(words=words))


def write_texts(
    sources: Mapping[str, Sequence[str | Path]], path: Path, *, text_column: str, held_out: float
) -> Texts:
    """Read all sources, in order of labels."""
    texts = Texts(path, list(sources))
    for label, names in sources.items():
        for name in names:
            texts.append(Source(name, text_column=text_column), label=label, held_out=held_out)
    return texts


class Distinct(NamedTuple):
    """Numbers of the texts that stay, ascending; how many copies went; and what pairs of labels
    shared.
    """

    kept: list[int]
    copies: int
    shared: list[dict[str, Any]]


def distinct(texts: Texts) -> Distinct:
    """One text of each cluster of near-duplicates, the first; none of a cluster that has several
    labels.
    """
    roots = _roots(texts.contents, texts.bands)
    labels = np.frombuffer(texts.labels, np.uint16) if len(texts) else np.empty(0, np.uint16)
    mixed = np.zeros(len(texts), bool)
    mixed[roots[labels != labels[roots]]] = True
    gone = mixed[roots]
    kept = np.flatnonzero((roots == np.arange(len(roots))) & ~gone)
    copies = len(texts) - len(kept) - int(gone.sum())
    return Distinct(kept.tolist(), copies, _shared(roots[gone], labels[gone], texts))


def _roots(contents: Sequence[bytes], bands: Sequence[bytes]) -> npt.NDArray[np.int64]:
    """For each text the first one of its cluster, (n,)."""
    everyone = np.arange(len(contents), dtype=np.uint64)
    long = np.array([i for i, keys in enumerate(bands) if keys], np.uint64)
    # 64 of the 128 bits: among a million texts one false pair in 40 million runs
    content = np.frombuffer(b"".join(contents), "<u8").reshape(-1, 2)[:, 0]
    keys = np.frombuffer(b"".join(bands), "<u8").reshape(len(long), SIGNATURE.num_bands)
    nodes, found = dense_components(
        lambda: iter(
            [
                _equal(content, everyone),
                *(_equal(keys[:, b], long) for b in range(SIGNATURE.num_bands)),
            ]
        )
    )
    roots = everyone.astype(np.int64)
    roots[nodes.astype(np.int64)] = found.astype(np.int64)
    return roots


def _equal(keys: U64, ids: U64) -> U64:
    """Edges between ids of equal keys, (m, 2): each to the next one."""
    order = np.argsort(keys, kind="stable")
    same = keys[order][1:] == keys[order][:-1]
    return np.column_stack([ids[order][:-1][same], ids[order][1:][same]])


def _shared(
    roots: npt.NDArray[np.int64], labels: npt.NDArray[np.uint16], texts: Texts
) -> list[dict[str, Any]]:
    """Per pair of labels the clusters that have both, and the texts of either label in them, also
    as shares of the label's.
    """
    clusters: dict[int, Counter[str]] = {}
    for root, label in zip(roots.tolist(), labels.tolist(), strict=True):
        clusters.setdefault(root, Counter())[texts.names[label]] += 1
    totals = Counter(texts.names[label] for label in texts.labels)
    rows = []
    for pair in combinations(texts.names, 2):
        both = [cluster for cluster in clusters.values() if all(cluster[label] for label in pair)]
        if both:
            documents = {label: sum(cluster[label] for cluster in both) for label in pair}
            share = {label: round(documents[label] / totals[label], 6) for label in pair}
            rows.append({"clusters": len(both), "documents": documents, "share": share})
    return rows
