"""Train the classifier that `filters.quality` scores with: fastText, on near-duplicate-free texts,
measured and calibrated.
"""

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
from pipeline.models.labelled_texts import SIGNATURE, Texts, distinct, write_texts
from pipeline.models.model_card import check_split, command_line, replacing, versions, write_card
from pipeline.models.training_texts import Source, fingerprint
from stages.dedup import minhash

BATCH = 1000  # documents predicted at once
PERCENTILES = tuple(range(1, 100))
SHOWN = (1, 10, 25, 50, 75, 90, 99)

Floats = npt.NDArray[np.float64]


def train_classifier(
    sources: Mapping[str, Sequence[str | Path]],
    *,
    output: Path,
    licence: str,
    epochs: int = 5,
    learning_rate: float = 0.5,
    dimensions: int = 16,
    word_ngrams: int = 2,
    buckets: int = 200_000,
    features: int = 50_000,
    seed: int = 0,
    held_out: float = 0.1,
    sample: str | Path | None = None,
    keep_best: tuple[float, ...] = (5.0, 10.0, 20.0, 50.0),
    text_column: str = "text",
) -> dict[str, Any]:
    """Train a fastText classifier for the filter `quality`; returns its card.

    `sources` are those of each label; of two labels the first one is the one to look for. The
    suffix of `output` decides: `.ftz` is product-quantised and cut to its `features` strongest
    features, `.bin` is kept whole. `buckets` hash the word n-grams. `held_out` is the share of
    documents that the curves are measured on. `sample` is a source as like what will be filtered as
    can be: on it the scores are found that keep the best `keep_best` percent. On one thread, with a
    fixed seed: the same texts make the same bytes.
    """
    counts = {
        "epochs": epochs,
        "dimensions": dimensions,
        "word_ngrams": word_ngrams,
        "buckets": buckets,
        "features": features,
    }
    _check_arguments(
        sources,
        output=output,
        keep_best=keep_best,
        learning_rate=learning_rate,
        seed=seed,
        **counts,
    )
    read = [source for names in sources.values() for source in names] + ([sample] if sample else [])
    with replacing(output, sources=read) as (temporary,), tempfile.TemporaryDirectory() as scratch:
        texts = write_texts(
            sources, Path(scratch, "texts"), text_column=text_column, held_out=held_out
        )
        found = distinct(texts)
        _warn(found.shared)
        held = [i for i in found.kept if texts.is_held_out[i]]
        train = [i for i in found.kept if not texts.is_held_out[i]]
        for label, (of_held, of_train) in _per_label(texts, held, train).items():
            of = f" of label '{label}' that no other label has"
            check_split(of_held, of_train, held_out=held_out, sources=sources[label], of=of)
        random.Random(f"{seed} train_classifier").shuffle(
            train
        )  # fastText goes through the file in order
        text = Path(scratch, "train.txt")
        _write_labelled(text, texts, train)
        options = {"epoch": epochs, "lr": learning_rate, "thread": 1}
        model = _fit(
            text, **options, dim=dimensions, wordNgrams=word_ngrams, bucket=buckets, seed=seed
        )
        if output.suffix == ".ftz":
            # a cutoff above the number of features fails inside fastText
            cutoff = min(features, model.get_input_matrix().shape[0] - 1)
            model.quantize(str(text), cutoff=cutoff, retrain=True, qnorm=True, **options)
        model.save_model(str(temporary))
        judged = texts.names if len(texts.names) > 2 else texts.names[:1]
        measured = _curves(texts, held, model, judged=judged)
        calibrated = (
            _calibrate(Source(sample, text_column=text_column), model, judged, keep_best)
            if sample
            else None
        )
    given = {"output": output, "licence": licence, "epochs": epochs, "learning_rate": learning_rate,
             "dimensions": dimensions, "word_ngrams": word_ngrams, "buckets": buckets, "features": features,
             "seed": seed, "held_out": held_out, "sample": sample or None,
             "keep_best": keep_best if sample else None, "text_column": text_column}  # fmt: skip
    card = write_card(
        output,
        kind="fasttext",
        normalizer=quality.NORMALIZER,
        licence=licence,
        command=command_line("train-classifier", **_named(sources), **given),
        versions=versions("fasttext-community"),
        labels=texts.names,
        corpus=fingerprint(entry for entries in texts.sources.values() for entry in entries),
        sources=texts.sources,
        near_duplicates={
            "found_by": minhash.describe(SIGNATURE),
            "copies": found.copies,
            "shared": found.shared,
        },
        train={label: of_train for label, (_, of_train) in _per_label(texts, held, train).items()},
        held_out=measured,
        **({"calibration": calibrated} if calibrated else {}),
    )
    _show(card)
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
        raise ValueError(f"output {output}: must end in .ftz (quantised) or .bin (whole)")
    if len(sources) < 2:
        raise ValueError(
            f"labels: only {', '.join(sources) or 'none'}; a classifier needs two or more, each with its sources"
        )
    for label, names in sources.items():
        if not re.fullmatch(r"[\w.-]+", label) or label.startswith(quality.PREFIX):
            raise ValueError(
                f"label '{label}': must be letters, digits, '_', '.' or '-', and is named without {quality.PREFIX}"
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


def _named(sources: Mapping[str, Sequence[str | Path]]) -> dict[str, list[str]]:
    """The sources as options of the command."""
    if list(sources) == ["hq", "lq"]:
        return {
            "positive": [str(s) for s in sources["hq"]],
            "negative": [str(s) for s in sources["lq"]],
        }
    return {"source": [f"{label}={source}" for label, names in sources.items() for source in names]}


def _warn(shared: Iterable[dict[str, Any]]) -> None:
    for row in shared:
        both = " and ".join(
            f"{n:,} texts of '{label}' ({row['share'][label]:.1%})"
            for label, n in row["documents"].items()
        )
        print(
            f"warning: {both} are near-duplicates of each other; left out of both", file=sys.stderr
        )


def _per_label(
    texts: Texts, held: Sequence[int], train: Sequence[int]
) -> dict[str, tuple[int, int]]:
    of_held, of_train = (Counter(texts.labels[i] for i in part) for part in (held, train))
    return {name: (of_held[i], of_train[i]) for i, name in enumerate(texts.names)}


def _write_labelled(path: Path, texts: Texts, numbers: Sequence[int]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for number, line in zip(numbers, texts.lines(numbers), strict=True):
            file.write(f"{quality.PREFIX}{texts.names[texts.labels[number]]} {line}\n")


def _fit(text: Path, **options: Any) -> Any:
    import fasttext

    try:
        return fasttext.train_supervised(str(text), minCount=2, verbose=0, **options)
    except RuntimeError as error:  # it ran away from the minimum
        raise ValueError(
            f"fastText: {error} Try a smaller learning rate than {options['lr']}"
        ) from None


# --- what is held out, and the sample -------------------------------------------------------------


def _scores(lines: Iterable[str], model: Any, labels: Sequence[str]) -> Floats:
    """Probabilities of some labels, (documents, labels); NaN for a text without a word that the
    model knows.
    """
    rows, left = list[Floats](), iter(lines)
    while batch := list(islice(left, BATCH)):
        found = quality.predict(batch, model)
        rows.append(
            np.array([[of.get(label, np.nan) for label in labels] for of in found], np.float64)
        )
    return np.concatenate(rows) if rows else np.empty((0, len(labels)))


def _curves(
    texts: Texts, held: Sequence[int], model: Any, *, judged: Sequence[str]
) -> dict[str, Any]:
    """Each label against the rest."""
    scores = _scores(texts.lines(held), model, judged)
    truth = np.array([texts.labels[i] for i in held])
    return {
        label: curve(scores[:, column], truth == texts.names.index(label))
        for column, label in enumerate(judged)
    }


def curve(scores: Floats, truth: npt.NDArray[np.bool_]) -> dict[str, Any]:
    """AUC; and precision and recall of what scores at least as the percentiles 1 to 99 of all
    documents do. NaN counts as 0.
    """
    scores = np.nan_to_num(scores, nan=0.0)
    ascending = np.sort(scores)
    best = np.cumsum(
        truth[np.argsort(-scores, kind="stable")]
    )  # right ones among the best 1, 2, ...
    thresholds = np.percentile(ascending, PERCENTILES, method="lower")
    kept = len(scores) - np.searchsorted(ascending, thresholds)
    right = best[kept - 1]
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
    """Probability that one of `higher` is above one of `lower`, equal ones counting half; in [0,
    1], NaN if one is empty.
    """
    if not len(higher) or not len(lower):
        return float("nan")
    ascending = np.sort(lower)
    below = np.searchsorted(ascending, higher, "left") + np.searchsorted(ascending, higher, "right")
    return float(below.mean() / 2 / len(lower))


def _calibrate(
    source: Source, model: Any, judged: Sequence[str], keep_best: Sequence[float]
) -> dict[str, Any]:
    """The scores that keep the best so many percent of a sample; `kept` is what they keep, more
    where scores are equal.
    """
    words = 0

    def counted() -> Iterator[str]:
        nonlocal words
        for text in source:
            words += len(quality.normalize(text).split())
            yield text

    scores = _scores(counted(), model, judged)
    entry = source.entry(words=words)
    thresholds = {
        label: [threshold(scores[:, i], percent) for percent in keep_best]
        for i, label in enumerate(judged)
    }
    return {"sample": entry, "thresholds": thresholds}


def threshold(scores: Floats, percent: float) -> dict[str, float]:
    """The score that the best `percent` of documents have at least; one without a known word (NaN)
    is never among them.
    """
    descending = -np.sort(-scores[~np.isnan(scores)])
    if not len(descending):
        raise ValueError(
            f"sample: none of its {len(scores)} documents has a word that the model knows"
        )
    number = min(max(1, round(len(scores) * percent / 100)), len(descending))
    found = float(descending[number - 1])
    return {
        "percent": percent,
        "threshold": found,
        "kept": round(float((descending >= found).sum() / len(scores) * 100), 2),
    }


def _show(card: dict[str, Any]) -> None:
    for label, found in card["held_out"].items():
        print(
            f"{card['name']}: held out, '{label}' {found['documents']:,}, others {found['others']:,}, AUC {found['auc']:.4f}"
        )
        print("  score at least  keeps   precision  recall")
        for at in map(PERCENTILES.index, SHOWN):
            row = (found[name][at] for name in ("thresholds", "kept", "precision", "recall"))
            print("  {:<14.6g}  {:<6.1%}  {:<9.4f}  {:.4f}".format(*row))
    for label, rows in card.get("calibration", {}).get("thresholds", {}).items():
        for row in rows:
            cut = f"{label} >= {row['threshold']!r} (keeps {row['kept']:g} %)"
            print(f"  to keep the best {row['percent']:g} % of the sample: {cut}")
