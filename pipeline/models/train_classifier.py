"""Train the fastText classifier of the filter `quality`, measure and calibrate it."""

import random
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from filters import quality
from filters.suggest import did_you_mean
from pipeline.models.labeled_texts import SIGNATURE, LabeledTexts, distinct, write_texts
from pipeline.models.model_card import check_split, command_line, replacing, versions, write_card
from pipeline.models.training_texts import Source, check_where, fingerprint
from stages.dedup import minhash

BATCH = 1000  # documents predicted at once
PERCENTILES = tuple(range(1, 100))
PRINTED_PERCENTILES = (1, 10, 25, 50, 75, 90, 99)

Floats = npt.NDArray[np.float64]


def train_classifier(
    sources: Mapping[str, Sequence[str | Path]],
    *,
    output: Path,
    licence: str,
    where: Mapping[str, str] | None = None,
    epochs: int = 5,
    learning_rate: float = 0.5,
    dimensions: int = 16,
    word_ngrams: int = 2,
    buckets: int = 200_000,
    features: int = 50_000,
    seed: int = 0,
    held_out: float = 0.1,
    sample: str | Path | None = None,
    sample_where: str = "",
    keep_best: tuple[float, ...] = (5.0, 10.0, 20.0, 50.0),
    text_column: str = "text",
) -> dict[str, Any]:
    """Train a fastText classifier for the filter `quality`; returns its card.

    `sources` are those of each label; of two labels the first one is the one to look for. `where`
    has SQL conditions, by label, on the rows of runs among its sources. The suffix of `output`
    decides: `.ftz` is product-quantized and cut to its `features` strongest features, `.bin` is
    kept whole. `buckets` hash the word n-grams. `held_out` is the share of documents that the
    curves are measured on. `sample` is a source that resembles what will be filtered: on it the
    scores are found that keep the best `keep_best` percent. On one thread, with a fixed seed: the
    same texts give the same bytes.
    """
    sizes = {"epochs": epochs, "dimensions": dimensions, "word_ngrams": word_ngrams,
             "buckets": buckets, "features": features}  # fmt: skip
    where = where or {}
    _check_arguments(
        sources,
        output=output,
        keep_best=keep_best,
        learning_rate=learning_rate,
        seed=seed,
        **sizes,
    )
    _check_conditions(sources, where, sample, sample_where)
    inputs = [source for names in sources.values() for source in names]
    inputs += [sample] if sample else []
    with (
        replacing(output, sources=inputs) as (temporary,),
        tempfile.TemporaryDirectory() as scratch,
    ):
        readers = {
            label: [Source(n, text_column=text_column, where=where.get(label, "")) for n in names]
            for label, names in sources.items()
        }
        texts = write_texts(readers, Path(scratch, "texts"), held_out=held_out)
        unique = distinct(texts)
        _warn_of_shared(unique.shared)
        test = [i for i in unique.kept if texts.is_held_out[i]]
        train = [i for i in unique.kept if not texts.is_held_out[i]]
        counts = _label_counts(texts, test), _label_counts(texts, train)
        for label, names in sources.items():
            of = f" of label '{label}' that no other label has"
            check_split(*(c[label] for c in counts), held_out=held_out, sources=names, of=of)
        # fastText reads the file in order
        random.Random(f"{seed} train_classifier").shuffle(train)
        training_file = Path(scratch, "train.txt")
        _write_training_file(training_file, texts, train)
        model = _fit(
            training_file,
            quantized_features=features if output.suffix == ".ftz" else None,
            epoch=epochs,
            lr=learning_rate,
            dim=dimensions,
            wordNgrams=word_ngrams,
            bucket=buckets,
            seed=seed,
        )
        model.save_model(str(temporary))
        # of two labels the curve of the other one mirrors the first one's
        measured_labels = texts.names if len(texts.names) > 2 else texts.names[:1]
        measured = _curves(texts, test, model, labels=measured_labels)
        extra = {}
        if sample:
            source = Source(sample, text_column=text_column, where=sample_where)
            extra["calibration"] = _calibrate(source, model, measured_labels, keep_best)
    conditions = [f"{label}={condition}" for label, condition in where.items()]
    arguments = {"output": output, "licence": licence, "where": conditions, "epochs": epochs,
                 "learning_rate": learning_rate, "dimensions": dimensions,
                 "word_ngrams": word_ngrams, "buckets": buckets, "features": features,
                 "seed": seed, "held_out": held_out, "sample": sample or None,
                 "sample_where": sample_where or None, "keep_best": keep_best if sample else None,
                 "text_column": text_column}  # fmt: skip
    card = write_card(
        output,
        kind="fasttext",
        normalizer=quality.NORMALIZER,
        licence=licence,
        command=command_line("train-classifier", **_source_options(sources), **arguments),
        versions=versions("fasttext-community"),
        labels=texts.names,
        corpus=fingerprint(entry for entries in texts.sources.values() for entry in entries),
        sources=texts.sources,
        near_duplicates={
            "found_by": minhash.describe(SIGNATURE),
            "copies": unique.copies,
            "shared": unique.shared,
        },
        train=counts[1],
        held_out=measured,
        **extra,
    )
    _print_summary(card)
    return card


def _check_arguments(
    sources: Mapping[str, Sequence[str | Path]],
    *,
    output: Path,
    keep_best: tuple[float, ...],
    learning_rate: float,
    seed: int,
    **counts: int,
) -> None:
    if output.suffix not in (".ftz", ".bin"):
        raise ValueError(f"output {output}: must end in .ftz (quantized) or .bin (whole)")
    if len(sources) < 2:
        raise ValueError(
            f"labels: only {', '.join(sources) or 'none'}; "
            "a classifier needs two or more, each with its sources"
        )
    for label, names in sources.items():
        if not re.fullmatch(r"[\w.-]+", label) or label.startswith(quality.PREFIX):
            raise ValueError(
                f"label '{label}': must be letters, digits, '_', '.' or '-', "
                f"and is named without {quality.PREFIX}"
            )
        if not names:
            raise ValueError(f"label '{label}': no source; name one or more")
    for name, value in counts.items():
        if not 1 <= value < 1 << 31:
            raise ValueError(f"{name} = {value}: must be 1 or more")
    if not 0 < learning_rate <= 10:
        raise ValueError(f"learning_rate = {learning_rate}: must be above 0 and up to 10")
    if not 0 <= seed < 1 << 31:
        raise ValueError(f"seed = {seed}: must be from 0 to {(1 << 31) - 1}")
    if not all(0 < share <= 100 for share in keep_best):
        raise ValueError(f"keep_best = {keep_best}: must be percentages, above 0 and up to 100")


def _check_conditions(
    sources: Mapping[str, Sequence[str | Path]],
    where: Mapping[str, str],
    sample: str | Path | None,
    sample_where: str,
) -> None:
    for label, condition in where.items():
        if label not in sources:
            suggestion = did_you_mean(label, sources)
            raise ValueError(
                f"where {label}={condition}: no label '{label}'{suggestion}; write LABEL=SQL"
            )
        check_where(condition, sources[label])
    check_where(sample_where, [sample] if sample else [])


def _source_options(sources: Mapping[str, Sequence[str | Path]]) -> dict[str, list[str]]:
    """The sources as options of the command."""
    if list(sources) == ["hq", "lq"]:
        options = {"hq": "positive", "lq": "negative"}
        return {options[label]: [str(s) for s in names] for label, names in sources.items()}
    return {"source": [f"{label}={source}" for label, names in sources.items() for source in names]}


def _warn_of_shared(shared: Iterable[dict[str, Any]]) -> None:
    for row in shared:
        both = " and ".join(
            f"{n:,} texts of '{label}' ({row['share'][label]:.1%})"
            for label, n in row["documents"].items()
        )
        print(
            f"warning: {both} are near-duplicates of each other; left out of both", file=sys.stderr
        )


def _label_counts(texts: LabeledTexts, numbers: Sequence[int]) -> dict[str, int]:
    counts = Counter(texts.labels[i] for i in numbers)
    return {name: counts[i] for i, name in enumerate(texts.names)}


def _write_training_file(path: Path, texts: LabeledTexts, numbers: Sequence[int]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for number, line in zip(numbers, texts.lines(numbers), strict=True):
            file.write(f"{quality.PREFIX}{texts.names[texts.labels[number]]} {line}\n")


def _fit(text: Path, *, quantized_features: int | None, **options: Any) -> Any:
    """A fastText model; with `quantized_features` cut to as many features and quantized."""
    import fasttext

    try:
        model = fasttext.train_supervised(str(text), minCount=2, verbose=0, thread=1, **options)
    except RuntimeError as error:  # training diverged
        raise ValueError(
            f"fastText: {error} Try a smaller learning rate than {options['lr']}"
        ) from None
    if quantized_features is not None:
        # a cutoff above the number of features fails inside fastText
        cutoff = min(quantized_features, model.get_input_matrix().shape[0] - 1)
        retrain = {"epoch": options["epoch"], "lr": options["lr"], "thread": 1}
        model.quantize(str(text), cutoff=cutoff, retrain=True, qnorm=True, **retrain)
    return model


# --- measuring and calibrating --------------------------------------------------------------------


def _scores(lines: Iterable[str], model: Any, labels: Sequence[str]) -> Floats:
    """Probabilities of some labels, (documents, labels); NaN for a text without a known word."""
    rows, rest = list[Floats](), iter(lines)
    while batch := list(islice(rest, BATCH)):
        predicted = quality.predict(batch, model)
        rows.append(
            np.array([[p.get(label, np.nan) for label in labels] for p in predicted], float)
        )
    return np.concatenate(rows) if rows else np.empty((0, len(labels)))


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


def _print_summary(card: dict[str, Any]) -> None:
    for label, figures in card["held_out"].items():
        print(
            f"{card['name']}: held out, '{label}' {figures['documents']:,}, "
            f"others {figures['others']:,}, AUC {figures['auc']:.4f}"
        )
        print("  score at least  keeps   precision  recall")
        for at in map(PERCENTILES.index, PRINTED_PERCENTILES):
            row = (figures[name][at] for name in ("thresholds", "kept", "precision", "recall"))
            print("  {:<14.6g}  {:<6.1%}  {:<9.4f}  {:.4f}".format(*row))
    for label, rows in card.get("calibration", {}).get("thresholds", {}).items():
        for row in rows:
            cut = f"{label} >= {row['threshold']!r} (keeps {row['kept']:g} %)"
            print(f"  to keep the best {row['percent']:g} % of the sample: {cut}")
