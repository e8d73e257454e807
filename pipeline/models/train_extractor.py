"""Train the model of engine "blocks" on pages and their main text, and measure it."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from filters.suggest import did_you_mean
from filters.url_lists import host_of
from pipeline.models.extractor_training import (
    FOLDS,
    TREES,
    LabeledPage,
    Result,
    cross_validate,
    fit,
    label,
)
from pipeline.models.model_card import command_line, replacing, versions, write_card
from pipeline.models.options import ExtractorOptions
from pipeline.models.training_texts import fingerprint, json_objects
from stages.extract.blocks.features import NAMES
from stages.extract.blocks.labels import words_of
from stages.extract.blocks.model import ExtractorModel
from stages.extract.config import ExtractConfig
from stages.formats.errors import ConfigError
from stages.read.charset import decode_html
from stages.read.warc import ReadStats, begins_as_warc, clean_url, read_records
from stages.storage.digests import file_sha256

CURVE: Final = (1 / 8, 1 / 4, 1 / 2)  # shares of the training pages; all of them come with it
SURE: Final = 0.7  # expected F1 from which on a text is good
BINS: Final = 10


def train_extractor(options: ExtractorOptions) -> dict[str, Any]:
    """Train a model for `extract.model`; returns its card.

    The same pages and gold texts in the same order give the same bytes, on any number of threads.
    ValueError if the sources cannot be read, contradict each other, or leave nothing to train on.
    """
    _check_lightgbm()
    warcs = options.pages or []
    weights = _weights(options)
    if not str(options.output).endswith(".json.gz"):
        raise ValueError(f"output {options.output}: must end in .json.gz")
    with replacing(options.output, sources=[*warcs, *options.gold]) as (temporary,):
        gold = _read_gold(options.gold, weights)
        warc_entries = [_read_pages(path, gold) for path in warcs]
        pages = [row.page for row in gold.rows if row.page is not None]
        _check_pages(pages, gold, options)
        measured = _measured(pages, options) if options.cross_validate else {}
        model = fit(pages)
        if not _num_nodes(model):
            raise ValueError(f"{len(pages)} pages are too few: no tree learned anything of them")
        temporary.write_bytes(model.to_bytes())
    entries = [file.entry() for file in gold.files]
    return write_card(
        options.output,
        kind="blocks",
        licence=options.licence,
        command=command_line("train-extractor", options),
        versions=versions("lightgbm", "numpy", "turbohtml"),
        corpus=fingerprint([*warc_entries, *entries]),
        pages=warc_entries,
        gold=entries,
        train=_sizes(pages),
        **measured,
        features=len(NAMES),
        words_scored={name: len(words) for name, words in vars(model.lexicon).items()},
        trees={"trees": model.trees.feature.shape[1], "nodes": _num_nodes(model), **TREES},
        bytes=options.output.stat().st_size,
    )


def _check_lightgbm() -> None:
    try:
        import lightgbm  # noqa: F401
    except ImportError:
        raise ValueError(
            "training needs LightGBM, which is not installed: pip install 'gristmill[extractor]'"
        ) from None
    except OSError as error:  # a wheel without the system's library
        raise ValueError(
            f"LightGBM, of the extra 'extractor', cannot be loaded ({error}); it needs the "
            "system's OpenMP library: apt-get install libgomp1"
        ) from None


# --- gold texts -----------------------------------------------------------------------------------


@dataclass
class _GoldFile:
    """A file of gold texts, and the counts of its rows."""

    path: Path
    weight: float
    rows: int = 0
    without_text: int = 0
    with_page: int = 0
    licenses: Counter[str] = field(default_factory=Counter)

    def entry(self) -> dict[str, Any]:
        """Its entry on the card."""
        licenses = {"licenses": dict(sorted(self.licenses.items()))} if self.licenses else {}
        return {
            "path": str(self.path),
            "sha256": file_sha256(self.path),
            "weight": self.weight,
            "rows": self.rows,
            "without_text": self.without_text,
            "without_page": self.rows - self.without_text - self.with_page,
            "pages": self.with_page,
            **licenses,
        }


@dataclass
class _GoldRow:
    """The main text of a page, and the page once it has been read."""

    file: _GoldFile
    place: str
    text: str
    kind: str
    weight: float
    page: LabeledPage | None = None
    html: int = 0  # the hash of the page's HTML

    def add(self, url: str, html: str, *, source: str) -> None:
        """Label the page. ValueError if there was another one."""
        if self.page is None:
            path = str(self.file.path)
            self.page = label(url, html, self.text, kind=self.kind, weight=self.weight, source=path)
            self.html = hash(html)
            self.file.with_page += 1
        elif self.html != hash(html):
            raise ValueError(
                f"{source}: a second, different page {url}, and one gold text, in "
                f"{self.file.path}, {self.place}; remove one of the pages"
            )


class _Gold(NamedTuple):
    """Gold texts in order of files and rows; `textless` are URLs without main text."""

    files: list[_GoldFile]
    rows: list[_GoldRow]
    by_url: dict[str, _GoldRow]
    textless: set[str]


def _weights(options: ExtractorOptions) -> dict[Path, float]:
    """The weight of each gold file for which there is one."""
    weights: dict[Path, float] = {}
    for value in options.weight or ():
        name, _, number = value.rpartition("=")
        path = Path(name)
        if not name or (weight := _positive(number)) is None:
            raise ConfigError(
                f"--weight {value}: write GOLD=NUMBER, above 0, e.g. --weight extra.jsonl=0.4"
            )
        if path not in options.gold:
            suggestion = did_you_mean(name, map(str, options.gold))
            raise ConfigError(f"--weight {value}: no such file in --gold{suggestion}")
        weights[path] = weight
    return weights


def _positive(value: Any) -> float | None:
    """A finite number above 0, else None."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if 0 < number < math.inf else None


def _read_gold(paths: Sequence[Path], weights: Mapping[Path, float]) -> _Gold:
    gold = _Gold([], [], {}, set())
    for path in paths:
        file = _GoldFile(path, weights.get(path, 1.0))
        gold.files.append(file)
        for place, row in json_objects(path):
            file.rows += 1
            _add_row(gold, file, f"source {path}, {place}", place, row)
    return gold


def _add_row(gold: _Gold, file: _GoldFile, source: str, place: str, row: dict[str, Any]) -> None:
    url, html = clean_url(_string(row, "url", source)), _string(row, "html", source)
    if not url and not html:
        raise ValueError(f"{source}: neither url nor html, only {sorted(row)}")
    if (first := gold.by_url.get(url)) is not None:
        raise ValueError(
            f"{source}: a second text of {url}; the first one is in {first.file.path}, "
            f"{first.place}; remove one of them"
        )
    text = _string(row, "main_content", source)
    own_weight = row.get("weight")
    weight = 1.0 if own_weight is None else _positive(own_weight)
    if weight is None:
        raise ValueError(f"{source}: weight = {own_weight!r}: must be a number above 0")
    if not words_of(text):
        file.without_text += 1
        gold.textless.add(url)
        return
    added = _GoldRow(file, place, text, _string(row, "page_type", source), weight * file.weight)
    gold.rows.append(added)
    if url:
        gold.by_url[url] = added
    file.licenses.update(filter(None, [_string(row, "license", source)]))
    if html:
        added.add(url, html, source=source)


def _string(row: Mapping[str, Any], name: str, source: str) -> str:
    """A value that is a string or null, which is "" here."""
    value = row.get(name)
    if not isinstance(value, str | None):
        raise ValueError(f"{source}: {name} is {type(value).__name__}, not a text")
    return value or ""


# --- pages ----------------------------------------------------------------------------------------


def _read_pages(path: Path, gold: _Gold) -> dict[str, Any]:
    """Label the pages of a WARC file that have a gold text; returns the file's entry."""
    if not path.is_file():
        raise ValueError(f"source {path}: no such file")
    if path.stat().st_size == 0 or not begins_as_warc(path):
        raise ValueError(
            f"source {path}: is no WARC file; pages that are HTML files go into the column html of "
            "their gold rows"
        )
    counts = Counter(dict.fromkeys(("pages", "without_gold", "without_text"), 0))
    limit = ExtractConfig().max_html_bytes
    for record in read_records(path, max_payload_bytes=limit, stats=ReadStats()):
        if record.kind != "html" or record.skipped is not None:
            continue
        counts["pages"] += 1
        if (row := gold.by_url.get(record.url)) is not None:
            html = decode_html(record.payload, record.headers.get("content-type", "")).text
            row.add(record.url, html, source=f"source {path}")
        else:
            counts["without_text" if record.url in gold.textless else "without_gold"] += 1
    return {"path": str(path), "sha256": file_sha256(path), **counts}


def _check_pages(pages: Sequence[LabeledPage], gold: _Gold, options: ExtractorOptions) -> None:
    if not pages:
        rows = sum(file.rows for file in gold.files)
        without_text = sum(file.without_text for file in gold.files)
        raise ValueError(
            f"nothing to train on: of {rows} gold rows {without_text} have no main_content, and "
            f"{rows - without_text} no page: their url must be a page's WARC-Target-URI, or they "
            "need html"
        )
    if options.cross_validate and len({page.fold for page in pages}) < 2:
        raise ValueError(
            f"{len(pages)} pages, of too few hosts for cross-validation: add pages of others, or "
            "train with --no-cross-validate"
        )


def _num_nodes(model: ExtractorModel) -> int:
    """Number of conditions in all trees; those that only fill up a tree have no finite bound."""
    return int(np.isfinite(model.trees.threshold).sum())


# --- what the card says ---------------------------------------------------------------------------


def _sizes(pages: Sequence[LabeledPage]) -> dict[str, int]:
    return {
        "pages": len(pages),
        "hosts": len({host_of(page.url) for page in pages}),
        "blocks": sum(len(page.blocks.texts) for page in pages),
        "gold_words": sum(len(words_of(page.gold)) for page in pages),
    }


def _measured(pages: Sequence[LabeledPage], options: ExtractorOptions) -> dict[str, Any]:
    results = list(cross_validate(pages))
    found: dict[str, Any] = {"cross_validation": _figures(results)}
    if options.learning_curve:
        curve = [_point(pages, share, cross_validate(pages, share=share)) for share in CURVE]
        found["learning_curve"] = [*curve, _point(pages, 1.0, results)]
    return found


def _figures(results: Sequence[Result]) -> dict[str, Any]:
    """Figures on pages of hosts that the model has not seen; F1 is that of words, in [0, 1]."""
    expected = np.array([result.expected_f1 for result in results])
    f1 = np.array([result.f1 for result in results])
    sure = expected >= SURE
    return {
        "folds_by_host": FOLDS,
        "pages": len(results),
        "f1": _mean(f1),
        "by_page_type": _by(results, lambda page: page.kind or "none"),
        "by_gold": _by(results, lambda page: page.source),
        "confidence": {
            "at_least": SURE,
            "share": _mean(sure),
            "f1": _mean(f1[sure]),
            "f1_of_others": _mean(f1[~sure]),
        },
        "calibration": _calibration(expected, f1),
    }


def _by(results: Sequence[Result], key: Callable[[LabeledPage], str]) -> dict[str, Any]:
    groups: dict[str, list[float]] = {}
    for result in results:
        groups.setdefault(key(result.page), []).append(result.f1)
    return {
        name: {"pages": len(f1), "f1": _mean(np.array(f1))} for name, f1 in sorted(groups.items())
    }


def _calibration(expected: Any, f1: Any) -> list[dict[str, Any]]:
    """The expected and the measured F1 of pages by the expected one, in BINS equal bins."""
    bins = np.minimum((expected * BINS).astype(int), BINS - 1)
    return [
        {
            "from": i / BINS,
            "pages": int((bins == i).sum()),
            "expected": _mean(expected[bins == i]),
            "measured": _mean(f1[bins == i]),
        }
        for i in range(BINS)
    ]


def _mean(values: Any) -> float | None:
    """The mean, rounded; None of nothing."""
    return round(float(values.mean()), 4) if len(values) else None


def _point(pages: Sequence[LabeledPage], share: float, results: Iterable[Result]) -> dict[str, Any]:
    """A point of the learning curve: the pages that a model of it was trained on, and its F1."""
    trained = round(len(pages) * (FOLDS - 1) / FOLDS * share)
    return {"pages": trained, "f1": _mean(np.array([result.f1 for result in results]))}
