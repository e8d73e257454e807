"""Store the labeled texts that a classifier is trained and measured on, without near-duplicates.

A text under two labels teaches nothing, and one that is both in training and held out flatters the
figures. So clusters of near-duplicates are cut to one copy, and those that span labels are dropped
from all of them. They are found by their band keys, as in dedup (stages/dedup/minhash.py), without
comparing the texts: a few that are merely similar are dropped too.
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
from filters.text.words import normalize
from pipeline.models.model_card import is_held_out
from pipeline.models.training_texts import Source
from stages.dedup import minhash
from stages.dedup.components import dense_components
from stages.dedup.config import DedupConfig

SIGNATURE = DedupConfig().signature
BATCH = 1000  # documents hashed at once

U64 = npt.NDArray[np.uint64]


class LabeledTexts:
    """Normalized texts by number, each a line of a file, without those that have no words.

    A text takes 300 bytes of memory.
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
        """The texts with these numbers."""
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
                pairs = [
                    (text, line) for text in batch if (line := quality.normalize_for_fasttext(text))
                ]
                normalized = [normalize(text) for text, _ in pairs]
                self.bands += minhash.band_keys(normalized, SIGNATURE)
                for (text, line), key in zip(pairs, normalized, strict=True):
                    words += line.count(" ") + 1
                    self.contents.append(minhash.content_hash(text, key))
                    self._ends.append(self._ends[-1] + file.write(line.encode() + b"\n"))
                    self.labels.append(number)
                    self.is_held_out.append(is_held_out(line, share=held_out))
        self.sources[label].append(source.entry(words=words))


def write_texts(
    sources: Mapping[str, Sequence[Source]], path: Path, *, held_out: float
) -> LabeledTexts:
    """Read all sources, in order of labels."""
    texts = LabeledTexts(path, list(sources))
    for label, of_label in sources.items():
        for source in of_label:
            texts.append(source, label=label, held_out=held_out)
    return texts


class Distinct(NamedTuple):
    """Numbers of the texts that are kept, ascending, and what was dropped.

    `copies` counts texts dropped for an earlier one with the same label, `shared` those of several
    labels, by pairs of labels.
    """

    kept: list[int]
    copies: int
    shared: list[dict[str, Any]]


def distinct(texts: LabeledTexts) -> Distinct:
    """The first text of each cluster of near-duplicates; none of a cluster with several labels."""
    roots = _cluster_roots(texts.contents, texts.bands)
    labels = np.array(texts.labels, np.uint16)
    is_mixed = np.zeros(len(texts), bool)
    is_mixed[roots[labels != labels[roots]]] = True
    dropped = is_mixed[roots]
    kept = np.flatnonzero((roots == np.arange(len(roots))) & ~dropped)
    copies = len(texts) - len(kept) - int(dropped.sum())
    return Distinct(kept.tolist(), copies, _shared(roots[dropped], labels[dropped], texts))


def _cluster_roots(contents: Sequence[bytes], bands: Sequence[bytes]) -> npt.NDArray[np.int64]:
    """For each text the first one of its cluster, (n,)."""
    numbers = np.arange(len(contents), dtype=np.uint64)
    with_bands = np.array([i for i, keys in enumerate(bands) if keys], np.uint64)
    # 64 of the 128 bits: among a million texts one false pair in 40 million runs
    content = np.frombuffer(b"".join(contents), "<u8").reshape(-1, 2)[:, 0]
    keys = np.frombuffer(b"".join(bands), "<u8").reshape(len(with_bands), SIGNATURE.num_bands)
    columns = [(content, numbers), *((column, with_bands) for column in keys.T)]
    nodes, node_roots = dense_components(lambda: (_edges(*column) for column in columns))
    roots = numbers.astype(np.int64)
    roots[nodes.astype(np.int64)] = node_roots.astype(np.int64)
    return roots


def _edges(keys: U64, ids: U64) -> U64:
    """Edges between ids with equal keys, (m, 2): from each to the next one."""
    order = np.argsort(keys, kind="stable")
    is_equal = keys[order][1:] == keys[order][:-1]
    return np.column_stack([ids[order][:-1][is_equal], ids[order][1:][is_equal]])


def _shared(
    roots: npt.NDArray[np.int64], labels: npt.NDArray[np.uint16], texts: LabeledTexts
) -> list[dict[str, Any]]:
    """Per pair of labels: the clusters with both, and each label's texts in them, as count and as
    share of the label.
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
