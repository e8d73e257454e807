"""Perplexity of a document under a KenLM model: how unlike the model's training text it is.

After CCNet (arXiv:1911.00359). Perplexities are comparable only with the same model and normalizer:
set bounds by percentiles of a sample of your own. It detects word salad, foreign languages and
broken encodings, but hardly any boilerplate.
"""

import math
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic.dataclasses import dataclass

from filters import STRICT, Bound, File, Measured, model_card, off_is_none
from filters.text import ccnet

BUNDLED = Path(__file__).parents[1] / "models" / "wiki-en.5gram.bin"
NORMALIZERS = (ccnet.WORDS, ccnet.PIECES)


def _ordered(value: tuple[float, float] | None) -> tuple[float, float] | None:
    if value is not None and not value[0] <= value[1]:
        raise ValueError(
            "head ends at the first number, tail begins after the second: "
            f"got [{value[0]}, {value[1]}]"
        )
    return value


# Not a Bound: it rejects no documents
Buckets = Annotated[
    tuple[float, float] | None, BeforeValidator(off_is_none), AfterValidator(_ordered)
]


@dataclass(frozen=True, config=STRICT)
class Perplexity:
    """Keep documents that are neither too unlikely nor too predictable for a language model.

    `model` is a KenLM binary with its card beside it. `perplexity` is per token, at least 1 except
    for rounding. `worst_window` is that of the worst consecutive lines with `window` tokens, line
    ends included, or of the document if it has fewer: it finds a paragraph of spam in a good page.
    Both are NaN for a text without a token. `buckets` are two perplexities (CCNet: the 33rd and
    66th percentile of a sample); `bucket` is head up to the first, tail above the second, else
    middle (Wenzek et al. 2019).
    """

    notes: ClassVar[tuple[str, ...]] = ("bucket",)
    tallied: ClassVar[tuple[str, ...]] = ("bucket",)
    # buckets may be given as percentiles of this score
    percentiles_of: ClassVar[dict[str, str]] = {"buckets": "perplexity"}

    model: File = ""
    perplexity: Bound = (0.0, math.inf)
    worst_window: Bound = None
    window: Annotated[int, Field(ge=1)] = 64
    buckets: Buckets = None

    def measure(self, view: Any) -> Measured:
        model = load(self.model)
        scored = score(model.normalize(view.text), model.kenlm, window=self.window)
        return {**scored._asdict(), "bucket": self._bucket(scored.perplexity)}

    def check(self, languages: tuple[str, ...]) -> None:
        """ValueError unless the model exists, fits this filter, and matches its card."""
        card = model_card.read_card(self.model, kind="kenlm", normalizers=NORMALIZERS)
        model_card.check_digest(Path(self.model), card.get("sha256"), model=self.model)
        _splitter(self.model, card)

    def _bucket(self, perplexity: float) -> str | None:
        if self.buckets is None or math.isnan(perplexity):
            return None
        low, high = self.buckets
        return "head" if perplexity <= low else "middle" if perplexity <= high else "tail"


class Scored(NamedTuple):
    """Perplexity of a document and of its worst window; NaN without a token."""

    perplexity: float
    worst_window: float


def score(lines: ccnet.Lines, model: Any, *, window: int) -> Scored:
    """10 ** (-sum of the lines' log10 scores / sum of their lengths), as CCNet computes it.

    A line's length is its tokens and its end. Unlike in CCNet, lines without a token are left out:
    they are layout, and very unlikely for a model that never saw an empty line.

    Windows are the shortest runs of lines with `window` tokens, line ends included: one ends with
    each line, and one begins the document, so that every line is in a window.
    """
    score_line = model.score
    log10, length, worst, first = 0.0, 0, math.nan, 0
    sums, lengths = [0.0], [0]  # before each line
    for line, tokens in zip(lines.lines, lines.tokens, strict=True):
        if not tokens:
            continue
        log10 += score_line(line)
        length += tokens + 1
        sums.append(log10)
        lengths.append(length)
        if length < window:
            continue
        if worst != worst:  # the run that begins the document
            worst = -log10 / length
        while length - lengths[first + 1] >= window:
            first += 1
        worst = max(worst, (sums[first] - log10) / (length - lengths[first]))
    if not length:
        return Scored(math.nan, math.nan)
    whole = -log10 / length
    return Scored(10.0**whole, 10.0 ** (whole if worst != worst else worst))


class Loaded(NamedTuple):
    """A model and the normalizer of its texts."""

    kenlm: Any
    normalize: ccnet.Normalizer


# up to a model per language of a run, mapped into memory, which the workers of a machine share
@lru_cache(maxsize=64)
def load(path: str) -> Loaded:
    """A model whose card fits this filter; once per process."""
    import kenlm

    card = model_card.read_card(path, kind="kenlm", normalizers=NORMALIZERS)
    splitter = _splitter(path, card)
    normalize = ccnet.words if splitter is None else partial(ccnet.pieces, splitter=splitter)
    return Loaded(kenlm.Model(path), normalize)


def _splitter(model: str, card: dict[str, Any]) -> ccnet.Splitter | None:
    """The SentencePiece model beside a model of pieces, checked by its digest; None for words."""
    if card["normalizer"] == ccnet.WORDS:
        return None
    path = Path(model + ".spm")
    model_card.check_digest(path, card.get("sentencepiece", {}).get("sha256"), model=model)
    return ccnet.Splitter(str(path))
