"""Train the fastText classifier of the filter `quality`, measure and calibrate it."""

import math
import random
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from filters import quality
from filters.suggest import did_you_mean
from pipeline.models.labeled_texts import SIGNATURE, LabeledTexts, distinct, write_texts
from pipeline.models.model_card import check_split, command_line, replacing, versions, write_card
from pipeline.models.options import ClassifierOptions
from pipeline.models.training_texts import Source, check_where, fingerprint
from stages.dedup import minhash
from stages.formats.errors import ConfigError

BATCH = 1000  # documents predicted at once
PERCENTILES = tuple(range(1, 100))

Floats = npt.NDArray[np.float64]


def train_classifier(options: ClassifierOptions) -> dict[str, Any]:
    """Train a fastText classifier for the filter `quality`; returns its card.

    On one thread, with a fixed seed: the same texts give the same bytes.
    """
    sources = _sources(options)
    where = _conditions(options, sources)
    keep_best = _percentages(options.keep_best)
    _check_options(options, sources, keep_best)
    inputs = [*chain.from_iterable(sources.values()), *filter(None, [options.sample])]
    with (
        replacing(options.output, sources=inputs) as (temporary,),
        tempfile.TemporaryDirectory() as scratch,
    ):
        readers = {
            label: [
                Source(name, text_column=options.text_column, where=where.get(label, ""))
                for name in names
            ]
            for label, names in sources.items()
        }
        texts = write_texts(readers, Path(scratch, "texts"), held_out=options.held_out)
        unique = distinct(texts)
        train = [i for i in unique.kept if not texts.is_held_out[i]]
        test = [i for i in unique.kept if texts.is_held_out[i]]
        train_counts = _label_counts(texts, train)
        _check_splits(options, sources, _label_counts(texts, test), train_counts)
        model = _fit(options, texts, train, Path(scratch, "train.txt"))
        model.save_model(str(temporary))
        # of two labels the curve of the other one mirrors the first one's
        measured_labels = texts.names if len(texts.names) > 2 else texts.names[:1]
        measured = _curves(texts, test, model, labels=measured_labels)
        calibration = {}
        if options.sample:
            sample = Source(
                options.sample, text_column=options.text_column, where=options.sample_where
            )
            calibration = {"calibration": _calibrate(sample, model, measured_labels, keep_best)}
    shown = options if options.sample else replace(options, keep_best="")
    return write_card(
        options.output,
        kind="fasttext",
        normalizer=quality.NORMALIZER,
        licence=options.licence,
        command=command_line("train-classifier", shown),
        versions=versions("fasttext-community"),
        labels=texts.names,
        corpus=fingerprint(chain.from_iterable(texts.sources.values())),
        sources=texts.sources,
        near_duplicates={
            "found_by": minhash.describe(SIGNATURE),
            "copies": unique.copies,
            "shared": unique.shared,
        },
        train=train_counts,
        held_out=measured,
        **calibration,
    )


def _sources(options: ClassifierOptions) -> dict[str, list[str]]:
    """The sources of each label."""
    named = [f"hq={path}" for path in options.positive or ()]
    named += [f"lq={path}" for path in options.negative or ()]
    return _by_label("--source", [*named, *(options.source or ())], "sports=sports.jsonl")


def _conditions(options: ClassifierOptions, sources: Mapping[str, list[str]]) -> dict[str, str]:
    """The SQL condition of each label that has one, checked."""
    where = _by_label("--where", options.where or (), "hq='\"quality.score\" > 0.9'")
    for label, conditions in where.items():
        if len(conditions) > 1:
            raise ConfigError(f"--where {label}={conditions[1]}: a second one; join them by AND")
        if label not in sources:
            suggestion = did_you_mean(label, sources)
            raise ValueError(
                f"where {label}={conditions[0]}: no label '{label}'{suggestion}; write LABEL=SQL"
            )
        check_where(conditions[0], sources[label])
    check_where(options.sample_where, [options.sample] if options.sample else [])
    return {label: conditions[0] for label, conditions in where.items()}


def _by_label(option: str, values: Iterable[str], example: str) -> dict[str, list[str]]:
    """Values of an option LABEL=…, in order of labels."""
    labels: dict[str, list[str]] = {}
    for value in values:
        label, _, rest = value.partition("=")
        if not label or not rest:
            raise ConfigError(f"{option} {value}: write LABEL=…, e.g. {option} {example}")
        labels.setdefault(label, []).append(rest)
    return labels


def _percentages(keep_best: str) -> list[float]:
    try:
        return [float(part) for part in keep_best.split(",")]
    except ValueError:
        raise ConfigError(f"--keep-best {keep_best}: write numbers, separated by commas") from None


def _check_options(
    options: ClassifierOptions, sources: Mapping[str, list[str]], keep_best: Sequence[float]
) -> None:
    if options.output.suffix not in (".ftz", ".bin"):
        raise ValueError(f"output {options.output}: must end in .ftz (quantized) or .bin (whole)")
    if len(sources) < 2:
        raise ValueError(
            f"labels: only {', '.join(sources) or 'none'}; "
            "a classifier needs two or more, each with its sources"
        )
    for label in sources:
        if not re.fullmatch(r"[\w.-]+", label) or label.startswith(quality.PREFIX):
            raise ValueError(
                f"label '{label}': must be letters, digits, '_', '.' or '-', "
                f"and is named without {quality.PREFIX}"
            )
    for name in ("epochs", "dimensions", "word_ngrams", "buckets", "features"):
        if not 1 <= (value := getattr(options, name)) < 1 << 31:
            raise ValueError(f"{name} = {value}: must be 1 or more")
    if not 0 < options.learning_rate <= 10:
        raise ValueError(f"learning_rate = {options.learning_rate}: must be above 0 and up to 10")
    if not 0 <= options.seed < 1 << 31:
        raise ValueError(f"seed = {options.seed}: must be from 0 to {(1 << 31) - 1}")
    if not all(0 < share <= 100 for share in keep_best):
        raise ValueError(
            f"keep_best = {options.keep_best}: must be percentages, above 0 and up to 100"
        )


def _check_splits(
    options: ClassifierOptions,
    sources: Mapping[str, list[str]],
    test_counts: Mapping[str, int],
    train_counts: Mapping[str, int],
) -> None:
    for label, names in sources.items():
        check_split(
            test_counts[label],
            train_counts[label],
            held_out=options.held_out,
            sources=names,
            of=f" of label '{label}' that no other label has",
        )


def _label_counts(texts: LabeledTexts, numbers: Sequence[int]) -> dict[str, int]:
    counts = Counter(texts.labels[i] for i in numbers)
    return {name: counts[i] for i, name in enumerate(texts.names)}


def _fit(options: ClassifierOptions, texts: LabeledTexts, numbers: list[int], path: Path) -> Any:
    """A fastText model of the texts with these numbers, which are written to `path`."""
    import fasttext

    # fastText reads the file in order
    random.Random(f"{options.seed} train_classifier").shuffle(numbers)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for number, line in zip(numbers, texts.lines(numbers), strict=True):
            file.write(f"{quality.PREFIX}{texts.names[texts.labels[number]]} {line}\n")
    shared = {"epoch": options.epochs, "lr": options.learning_rate, "thread": 1}
    try:
        model = fasttext.train_supervised(
            str(path),
            minCount=2,
            verbose=0,
            dim=options.dimensions,
            wordNgrams=options.word_ngrams,
            bucket=options.buckets,
            seed=options.seed,
            **shared,
        )
    except RuntimeError as error:  # training diverged
        raise ValueError(
            f"fastText: {error} Try a smaller learning rate than {options.learning_rate}"
        ) from None
    if options.output.suffix == ".ftz":
        # a cutoff above the number of features fails inside fastText
        cutoff = min(options.features, model.get_input_matrix().shape[0] - 1)
        model.quantize(str(path), cutoff=cutoff, retrain=True, qnorm=True, **shared)
    return model


# --- measuring and calibrating --------------------------------------------------------------------


def _scores(lines: Iterable[str], model: Any, labels: Sequence[str]) -> Floats:
    """Probabilities of some labels, (documents, labels); NaN for a text without a known word."""
    rest = iter(lines)
    batches = iter(lambda: list(islice(rest, BATCH)), [])
    predicted = chain.from_iterable(quality.predict(batch, model) for batch in batches)
    scores = [[p.get(label, math.nan) for label in labels] for p in predicted]
    return np.array(scores, float).reshape(-1, len(labels))


def _curves(
    texts: LabeledTexts, numbers: Sequence[int], model: Any, *, labels: Sequence[str]
) -> dict[str, Any]:
    """The curve of each label against the rest."""
    scores = _scores(texts.lines(numbers), model, labels)
    truth = np.array([texts.labels[i] for i in numbers])
    return {
        label: curve(scores[:, column], truth == texts.names.index(label))
        for column, label in enumerate(labels)
    }


def curve(scores: Floats, truth: npt.NDArray[np.bool_]) -> dict[str, Any]:
    """AUC, and precision and recall with percentiles 1 to 99 of all scores as thresholds.

    NaN counts as 0.
    """
    scores = np.nan_to_num(scores, nan=0.0)
    ascending = np.sort(scores)
    hits = np.cumsum(truth[np.argsort(-scores, kind="stable")])  # among the best 1, 2, ...
    thresholds = np.percentile(ascending, PERCENTILES, method="lower")
    kept = len(scores) - np.searchsorted(ascending, thresholds)
    right = hits[kept - 1]
    return {
        "documents": int(truth.sum()),
        "others": int((~truth).sum()),
        "auc": round(auc(scores[truth], scores[~truth]), 6),
        "thresholds": thresholds.tolist(),
        "kept": (kept / len(scores)).round(4).tolist(),
        "precision": (right / kept).round(4).tolist(),
        "recall": (right / truth.sum()).round(4).tolist(),
    }


def auc(higher: Floats, lower: Floats) -> float:
    """Probability that one of `higher` is above one of `lower`, equal ones counting half.

    In [0, 1]; NaN if either is empty.
    """
    if not len(higher) or not len(lower):
        return float("nan")
    ascending = np.sort(lower)
    below = np.searchsorted(ascending, higher, "left") + np.searchsorted(ascending, higher, "right")
    return float(below.mean() / 2 / len(lower))


def _calibrate(
    source: Source, model: Any, labels: Sequence[str], keep_best: Sequence[float]
) -> dict[str, Any]:
    """The scores that keep the best percentages of a sample, and what they keep.

    That is more where scores are equal.
    """
    words = 0

    def counted_texts() -> Iterator[str]:
        nonlocal words
        for text in source:
            words += len(quality.normalize_for_fasttext(text).split())
            yield text

    scores = _scores(counted_texts(), model, labels)
    entry = source.entry(words=words)
    thresholds = {
        label: [threshold(scores[:, i], percent) for percent in keep_best]
        for i, label in enumerate(labels)
    }
    return {"sample": entry, "thresholds": thresholds}


def threshold(scores: Floats, percent: float) -> dict[str, float]:
    """The score that the best `percent` of documents reach; NaN, no known word, never does."""
    descending = -np.sort(-scores[~np.isnan(scores)])
    if not len(descending):
        raise ValueError(
            f"sample: none of its {len(scores)} documents has a word that the model knows"
        )
    number = min(max(1, round(len(scores) * percent / 100)), len(descending))
    score = float(descending[number - 1])
    kept = round(float((descending >= score).sum() / len(scores) * 100), 2)
    return {"percent": percent, "threshold": score, "kept": kept}
