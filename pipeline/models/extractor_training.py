"""Fit the model of engine "blocks" to labeled pages, and measure it on hosts that it has not seen.

What a word says of main content is learned from other pages than those that the trees learn from
(out of fold): otherwise the trees would trust it too much.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from filters.url_lists import host_of
from stages.extract.blocks.features import Lexicon, features, name_words, word_counts, words_in
from stages.extract.blocks.labels import gold_shares, word_f1
from stages.extract.blocks.model import ExtractorModel
from stages.extract.blocks.render import render
from stages.extract.blocks.trees import Trees
from stages.extract.blocks.walk import Blocks, walk
from stages.storage.digests import digest

FOLDS: Final = 5
TREES: Final = {
    "objective": "cross_entropy",
    "num_leaves": 31,
    "learning_rate": 0.09,
    "min_data_in_leaf": 100,
    "feature_fraction": 0.3,
    "bagging_fraction": 0.5,
    "bagging_freq": 1,
    "lambda_l2": 15.0,
    "max_bin": 63,
    "seed": 1,
    "num_threads": 1,
    "deterministic": True,
    "force_col_wise": True,
    "verbose": -1,
}
NUM_TREES: Final = 120
# of a word's log-odds: pages it must be on, pages' worth of the average added, words that are kept
_MIN_PAGES, _PRIOR_PAGES, _MAX_WORDS = 4, 3.0, 6000

Shares = NDArray[np.float64]


class LabeledPage(NamedTuple):
    """A page, and the share of each block's words that its gold text has.

    `fold` is its host's, `source` the file of the gold text.
    """

    url: str
    fold: int
    blocks: Blocks
    shares: Shares
    gold: str
    kind: str
    weight: float
    source: str


def label(
    url: str, html: str, gold: str, *, kind: str = "", weight: float = 1.0, source: str = ""
) -> LabeledPage:
    """A page to train on, from its HTML and its main text."""
    page = walk(html)
    host = (host_of(url) or "").removeprefix("www.")
    fold = int(digest(host), 16) % FOLDS
    shares = np.array(gold_shares(page.texts, gold))
    return LabeledPage(url, fold, page, shares, gold, kind, weight, source)


def fit(pages: Sequence[LabeledPage]) -> ExtractorModel:
    """Train a model. The same pages in the same order give the same model."""
    observed = [_observed(page) for page in pages]
    return _fit(pages, observed)


class Result(NamedTuple):
    """How a model did on a page: the word-F1 of its text, and the one that it expected."""

    page: LabeledPage
    f1: float
    expected_f1: float


def cross_validate(
    pages: Sequence[LabeledPage], *, share: float = 1.0, folds: Iterable[int] = range(FOLDS)
) -> Iterator[Result]:
    """Results on each page of a model trained without its host, on `share` of the other pages."""
    observed = [_observed(page) for page in pages]
    for fold in folds:
        train = [i for i, page in enumerate(pages) if page.fold != fold]
        train = train[:: round(1 / share)]
        model = _fit([pages[i] for i in train], [observed[i] for i in train])
        for page in pages:
            if page.fold == fold:
                yield result_of(model, page)


def result_of(model: ExtractorModel, page: LabeledPage) -> Result:
    """Compare a model's text of a page with its gold text."""
    blocks, expected = model.select(page.blocks, page.url)
    text = render(page.blocks, blocks, markdown=False).text
    return Result(page, word_f1(text, page.gold), expected)


# --- the lexicon ----------------------------------------------------------------------------------


class _Observed(NamedTuple):
    """Of a page: the mean share of main content of the blocks with a word, by word."""

    words: Mapping[str, float]
    names: Mapping[str, float]
    tags: Mapping[str, float]


def _observed(page: LabeledPage) -> _Observed:
    blocks = page.blocks
    words, names, tags = _Means(), _Means(), _Means()
    along: dict[int, frozenset[str]] = {}
    for element, parent in enumerate(blocks.parents):
        its = frozenset(name_words(blocks.names[element]))
        along[element] = its | along[parent] if element else its
    counts = word_counts(blocks)
    for text, owner, share, count in zip(
        blocks.texts, blocks.owners, page.shares, counts, strict=True
    ):
        for word in set(words_in(text)):
            words.add(word.decode("utf-8", "surrogatepass"), share, 1.0)
        for name in along[owner]:
            names.add(name, share, count)
        tags.add(blocks.tags[owner], share, count)
    return _Observed(words.means(), names.means(), tags.means())


class _Means:
    """Weighted means by word."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.weights: dict[str, float] = {}

    def add(self, word: str, value: float, weight: float) -> None:
        """Count a value."""
        self.sums[word] = self.sums.get(word, 0.0) + value * weight
        self.weights[word] = self.weights.get(word, 0.0) + weight

    def means(self) -> dict[str, float]:
        """The mean of each word whose weights are not all 0."""
        return {word: self.sums[word] / w for word, w in self.weights.items() if w > 0}


def _lexicon(observed: Iterable[_Observed]) -> Lexicon:
    observed = list(observed)
    return Lexicon(
        _log_odds(page.words for page in observed),
        _log_odds(page.names for page in observed),
        _log_odds(page.tags for page in observed),
    )


def _log_odds(pages: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Log-odds of main content against the average, of the words that matter most."""
    counts: dict[str, int] = defaultdict(int)
    sums: dict[str, float] = defaultdict(float)
    for page in pages:
        for word, mean in page.items():
            counts[word] += 1
            sums[word] += mean
    if not counts:
        return {}
    prior = min(max(sum(sums.values()) / sum(counts.values()), 0.01), 0.99)
    odds = {}
    for word, count in counts.items():
        if count >= _MIN_PAGES:
            rate = (sums[word] + _PRIOR_PAGES * prior) / (count + _PRIOR_PAGES)
            odds[word] = round(math.log(rate / (1 - rate)) - math.log(prior / (1 - prior)), 4)
    ranked = sorted(odds, key=lambda word: (-abs(odds[word]) * math.sqrt(counts[word]), word))
    return {word: odds[word] for word in ranked[:_MAX_WORDS]}


# --- the trees ------------------------------------------------------------------------------------


def _fit(pages: Sequence[LabeledPage], observed: Sequence[_Observed]) -> ExtractorModel:
    columns: list[Any] = [None] * len(pages)
    for fold in range(FOLDS):
        lexicon = _lexicon(
            seen for seen, page in zip(observed, pages, strict=True) if page.fold != fold
        )
        for i, page in enumerate(pages):
            if page.fold == fold:
                columns[i] = features(page.blocks, page.url, lexicon)
    shares = np.concatenate([page.shares for page in pages])
    if not 0 < shares.mean() < 1:
        raise ValueError(
            f"the gold texts match {shares.mean():.0%} of the blocks of {len(pages)} pages: there "
            "is nothing to learn; are they the texts of these pages?"
        )
    weights = np.concatenate([_weights(page) for page in pages])
    dump = _boost(np.concatenate(columns, axis=1).T, shares, weights)
    return ExtractorModel(_lexicon(observed), Trees.of_lightgbm(dump))


def _weights(page: LabeledPage) -> Shares:
    """Every page counts the same, whatever its length, and long blocks more than short ones."""
    roots = np.sqrt(np.maximum(word_counts(page.blocks), 1))
    weights: Shares = page.weight * roots / max(roots.sum(), 1)
    return weights


def _boost(rows: Any, shares: Shares, weights: Shares) -> Any:
    import lightgbm  # only here: a process that loaded it and then forks can hang

    data = lightgbm.Dataset(rows, label=shares, weight=weights * len(weights) / weights.sum())
    return lightgbm.train(dict(TREES), data, NUM_TREES).dump_model()
