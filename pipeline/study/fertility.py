"""What tokenizers make of a run's corpus: tokens per byte and word, by language and by input file.

Without a run of its own: it tokenizes a sample of the corpus, drawn by the documents' ids.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pyarrow as pa

from pipeline.run.query import select
from pipeline.run.results import open_results
from stages.formats.tokenizer import Tokenizer

GROUPS = 10  # languages, and input files, that have rows of their own; the rest are together
REST = "(others)"
_DRAWN = "md5_number_lower('tokenizers/' || doc_id) < {share} * 2.0 ** 64"


class Fertility(NamedTuple):
    """Counts of some texts: UTF-8 bytes, words between white space, and tokens of one tokenizer
    without those around a text.

    Of languages without blanks `tokens_per_word` says little. Both figures are None for no text.
    """

    documents: int
    bytes: int
    words: int
    tokens: int

    @property
    def bytes_per_token(self) -> float | None:
        """The higher, the less a model has to compute for a text."""
        return self.bytes / self.tokens if self.tokens else None

    @property
    def tokens_per_word(self) -> float | None:
        """What is called fertility (Rust et al. 2021, arXiv:2012.15613)."""
        return self.tokens / self.words if self.words else None

    def rows(self, seq_len: int) -> int:
        """Rows of `seq_len` tokens, with an end-of-text for each document, packed without a gap."""
        return -(-(self.tokens + self.documents) // seq_len)


@dataclass
class Group:
    """Texts of a language or file; `tokens` by the position of the tokenizer."""

    documents: int = 0
    bytes: int = 0
    words: int = 0
    tokens: Counter[int] = field(default_factory=Counter)

    def add(self, other: "Group") -> None:
        self.documents += other.documents
        self.bytes += other.bytes
        self.words += other.words
        self.tokens.update(other.tokens)

    def of(self, tokenizer: int) -> Fertility:
        return Fertility(self.documents, self.bytes, self.words, self.tokens[tokenizer])


class Comparison(NamedTuple):
    """Groups by kind ("all", "language", "file") and name, the largest first; `share` of the
    corpus's characters was sampled, in [0, 1].
    """

    share: float
    groups: dict[tuple[str, str], Group]


def compare(run: str, tokenizers: Sequence[Tokenizer], *, sample_chars: int) -> Comparison:
    """Tokenize about `sample_chars` characters of a run's corpus; ValueError if it has none.

    The same documents are drawn each time, and of a larger sample those of a smaller one too.
    """
    groups: dict[tuple[str, str], Group] = {}
    with open_results(run) as connection:
        with select(connection, "SELECT coalesce(sum(num_chars), 0) AS n FROM corpus") as totals:
            total = int(totals.read_all()["n"][0].as_py())
        share = min(1.0, sample_chars / total) if total else 1.0
        sql = f"SELECT language, warc_file, text FROM corpus WHERE {_DRAWN.format(share=share)}"
        with select(connection, sql, rows=256) as batches:
            for batch in batches:
                for keys, texts in _texts_by_group(batch):
                    group = _measure(texts, tokenizers)
                    for key in keys:
                        groups.setdefault(key, Group()).add(group)
    if not groups:
        raise ValueError(f"{run}: no text in the sample of the corpus; run refine, or enlarge it")
    return Comparison(share, _largest(groups))


def _texts_by_group(
    batch: pa.RecordBatch,
) -> Iterator[tuple[list[tuple[str, str]], list[str]]]:
    """The texts of each language and file of a batch, with the keys of the groups they are in."""
    texts: dict[tuple[str, str], list[str]] = {}
    for row in batch.to_pylist():
        names = row["language"] or "(unknown)", row["warc_file"] or "(unknown)"
        texts.setdefault(names, []).append(row["text"])
    for (language, file), of_both in texts.items():
        yield [("all", ""), ("language", language), ("file", file)], of_both


def _measure(texts: Sequence[str], tokenizers: Sequence[Tokenizer]) -> Group:
    return Group(
        documents=len(texts),
        bytes=sum(len(text.encode("utf-8", "surrogatepass")) for text in texts),
        words=sum(len(text.split()) for text in texts),
        tokens=Counter({n: sum(map(len, t.encode_batch(texts))) for n, t in enumerate(tokenizers)}),
    )


def measure(texts: Sequence[str], tokenizer: Tokenizer) -> Fertility:
    """What a tokenizer makes of some texts."""
    return _measure(texts, [tokenizer]).of(0)


def _largest(groups: dict[tuple[str, str], Group]) -> dict[tuple[str, str], Group]:
    """The groups of each kind in order of bytes, all after the first GROUPS together."""
    kept: dict[tuple[str, str], Group] = {}
    for kind in ("all", "language", "file"):
        of_kind = sorted(
            ((key, group) for key, group in groups.items() if key[0] == kind),
            key=lambda item: (-item[1].bytes, item[0]),
        )
        kept.update(of_kind[:GROUPS])
        for _, group in of_kind[GROUPS:]:
            kept.setdefault((kind, REST), Group()).add(group)
    return kept


def to_json(
    comparison: Comparison, tokenizers: Sequence[Tokenizer], *, seq_len: int
) -> dict[str, Any]:
    """The comparison for scripts: by tokenizer, kind and name of the group."""
    return {
        "share": comparison.share,
        "seq_len": seq_len,
        "tokenizers": [
            {
                "name": tokenizer.name,
                "sha256": tokenizer.digest,
                "vocab_size": tokenizer.vocab_size,
                "dtype": tokenizer.dtype,
                "groups": [
                    {"kind": kind, "name": name, **_figures(group.of(n), seq_len)}
                    for (kind, name), group in comparison.groups.items()
                ],
            }
            for n, tokenizer in enumerate(tokenizers)
        ],
    }


def _figures(fertility: Fertility, seq_len: int) -> dict[str, Any]:
    return {
        **fertility._asdict(),
        "bytes_per_token": fertility.bytes_per_token,
        "tokens_per_word": fertility.tokens_per_word,
        "rows": fertility.rows(seq_len),
    }
