"""How good is the text of each engine, and what does it cost?

    python -m benchmarks.extraction [DATA] [--gold EXTRA.jsonl.zst ...] [--profile]

Word-F1 is WCXB's: multiset overlap of the words `\\w+`, lower-cased, of the extracted and the gold
main text, averaged over pages. Snippets are those of trafilatura's evaluation: recall is the share
of the texts that must be there which are, precision the share of those found which must. trafilatura
and resiliparse are called as libraries.

The bundled model of engine "blocks" has seen these pages. So its figures here are those of models
trained on both sets of WCXB without the page's host (cross-validation by host, in
`extractor_training.FOLDS` folds), and, with --gold, on what `tools/extraction_gold.py` writes.

CPU is that of the whole extract stage as configured by default, of this process and of its child,
in a child that is already started. --profile prints that, and the steps of engine "blocks", alone.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import zstandard

from benchmarks.extraction_steps import bare_steps, default_plan, read_pages, stage_cost
from filters.language import Language
from pipeline.models.extractor_training import (
    FOLDS,
    LabeledPage,
    Result,
    fit,
    label,
    result_of,
)
from stages.extract.blocks.labels import word_f1
from stages.extract.blocks.model import ExtractorModel
from stages.extract.blocks.render import render
from stages.read.charset import decode_html
from stages.read.warc import Record

SETS = ("wcxb-500", "wcxb-435")
CONFIDENT = 0.7  # expected F1
COSTLIEST_FIRST = ("trafilatura", "resiliparse", "blocks")

Models = dict[int, ExtractorModel]  # by the fold whose hosts they have not seen
Engine = Callable[[Record], str]


def trafilatura(record: Record) -> str:
    """The text of the bare library."""
    from trafilatura import extract

    return extract(record.payload) or ""


def resiliparse(record: Record) -> str:
    """The main content of the bare library."""
    from resiliparse.extract.html2text import extract_plain_text
    from resiliparse.parse.encoding import bytes_to_str, detect_encoding

    html = bytes_to_str(record.payload, detect_encoding(record.payload))
    return str(extract_plain_text(html, main_content=True, alt_texts=False))


def blocks(models: Models) -> Engine:
    """Engine "blocks" by a model that has not seen the page's host."""

    def text_of(record: Record) -> str:
        page = label(record.url, _html(record), "")
        selection = models[page.fold].select(page.blocks, page.url)
        return render(page.blocks, selection.blocks, markdown=False).text

    return text_of


def _html(record: Record) -> str:
    return decode_html(record.payload, record.headers.get("content-type", "")).text


# --- word-F1 --------------------------------------------------------------------------------------


def gold_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a gold file that have a main text."""
    with zstandard.open(path, "rt", encoding="utf-8") as lines:
        yield from (row for row in map(json.loads, lines) if row["main_content"])


class GoldPage(NamedTuple):
    """A page, and what a person takes for its main text."""

    record: Record
    gold: str
    kind: str


def gold_pages(data: Path, name: str) -> list[GoldPage]:
    """The pages of a set of WCXB that have a main text."""
    records = {r.url: r for r in read_pages(data / "warc" / "web" / f"{name}.warc.gz")}
    rows = gold_rows(data / "gold" / f"{name}.jsonl.zst")
    found = [(records.get(row["url"]), row) for row in rows]
    return [GoldPage(r, row["main_content"], row["page_type"]) for r, row in found if r]


def labeled(page: GoldPage) -> LabeledPage:
    return label(page.record.url, _html(page.record), page.gold, kind=page.kind)


def extra_pages(paths: Iterable[Path]) -> list[LabeledPage]:
    """The rows of files of `tools/extraction_gold.py`."""
    return [
        label(row["url"] or "", row["html"], row["main_content"], weight=row["weight"])
        for path in paths
        for row in gold_rows(path)
    ]


def train(pages: Sequence[LabeledPage]) -> Models:
    """A model for each fold, of the pages of the other folds."""
    return {fold: fit([page for page in pages if page.fold != fold]) for fold in range(FOLDS)}


def print_f1(name: str, engine: str, scores: Sequence[float], kinds: Sequence[str]) -> None:
    """The mean of all pages, and that of each type of page."""
    by_kind = defaultdict(list)
    for score, kind in zip(scores, kinds, strict=True):
        by_kind[kind].append(score)
    print(f"{name}, {engine}: word-F1 {_mean(scores):.4f} on {len(scores)} pages")
    for kind, values in sorted(by_kind.items()):
        print(f"{name}, {engine}, {kind}: word-F1 {_mean(values):.4f} on {len(values)} pages")


def print_confidence(name: str, results: Sequence[Result]) -> None:
    """How much the F1 says that engine "blocks" expects."""
    high = [r.f1 for r in results if r.expected_f1 >= CONFIDENT]
    low = [r.f1 for r in results if r.expected_f1 < CONFIDENT]
    print(
        f"{name}, blocks: {len(high) / len(results):.1%} of the pages have an expected F1 of "
        f"{CONFIDENT} or more; word-F1 {_mean(high):.4f} on these, {_mean(low):.4f} on the others"
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def compare_f1(data: Path, extra: Iterable[Path]) -> Models:
    """Print word-F1 on both sets of WCXB; returns the models of engine "blocks"."""
    sets = {name: gold_pages(data, name) for name in SETS}
    pages = {name: [labeled(page) for page in its] for name, its in sets.items()}
    models = train([*(page for its in pages.values() for page in its), *extra_pages(extra)])
    for name, its in sets.items():
        kinds = [page.kind for page in its]
        for library in (trafilatura, resiliparse):
            scores = [word_f1(library(page.record), page.gold) for page in its]
            print_f1(name, f"bare {library.__name__}", scores, kinds)
        results = [result_of(models[page.fold], page) for page in pages[name]]
        print_f1(name, "blocks, cross-validated", [r.f1 for r in results], kinds)
        print_confidence(name, results)
    return models


# --- snippets -------------------------------------------------------------------------------------


class Counts(NamedTuple):
    """Of the snippets that must be in a text those that are and are not, and those that must not
    be there but are.
    """

    found: int
    missed: int
    wrong: int

    def figures(self) -> str:
        """Precision, recall and their harmonic mean."""
        precision = self.found / max(self.found + self.wrong, 1)
        recall = self.found / max(self.found + self.missed, 1)
        f = 2 * self.found / max(2 * self.found + self.missed + self.wrong, 1)
        return f"precision {precision:.4f}, recall {recall:.4f}, F {f:.4f}"


def count_snippets(text: str, snippets: dict[str, list[str]]) -> Counts:
    """Look for the snippets, whatever the white space."""
    text = " ".join(text.split())
    have = [" ".join(snippet.split()) in text for snippet in snippets["with"]]
    wrong = [" ".join(snippet.split()) in text for snippet in snippets["without"]]
    return Counts(sum(have), len(have) - sum(have), sum(wrong))


def compare_snippets(data: Path, models: Models) -> None:
    """Print precision and recall of trafilatura's snippets, of all pages and by language (that of
    trafilatura's text, or of the snippets where it finds none).
    """
    gold = json.loads((data / "gold" / "trafilatura-eval.json").read_text())
    records = read_pages(data / "warc" / "web" / "trafilatura-eval.warc.gz")
    records = [record for record in records if record.url in gold]
    engines = {"bare trafilatura": trafilatura, "bare resiliparse": resiliparse}
    texts = {
        name: [engine(record) for record in records]
        for name, engine in (engines | {"blocks, host not seen": blocks(models)}).items()
    }
    snippets = [gold[record.url] for record in records]
    groups = [
        _language_group(text or " ".join(its["with"]))
        for text, its in zip(texts["bare trafilatura"], snippets, strict=True)
    ]
    for name, its_texts in texts.items():
        counts = list(map(count_snippets, its_texts, snippets))
        for group in ("all", "German", "English", "other languages"):
            chosen = [c for c, g in zip(counts, groups, strict=True) if group in ("all", g)]
            total = Counts(*map(sum, zip(*chosen, strict=True))) if chosen else Counts(0, 0, 0)
            print(f"snippets, {name}, {group}: {total.figures()} on {len(chosen)} pages")


def _language_group(text: str) -> str:
    return {"de": "German", "en": "English"}.get(Language().guess(text).language, "other languages")


# --- costs ----------------------------------------------------------------------------------------


def compare_costs(warc: Path) -> None:
    """Print the CPU of the extract stage with each engine."""
    pages, first = len(read_pages(warc)), None
    for engine in COSTLIEST_FIRST:
        cost = stage_cost(warc, default_plan(engine))
        first = first or cost
        print(
            f"{warc.name}, stage with {engine}: {cost.pages / pages * 1000:.1f} ms of CPU per page, "
            f"{cost.pages / first.pages:.3f} of {COSTLIEST_FIRST[0]}'s; start {cost.start:.1f} s"
        )


def print_profile(warc: Path) -> None:
    """Print the steps of engine "blocks", and how much more the stage takes than their sum."""
    pages, plan = len(read_pages(warc)), default_plan("blocks")
    cost, steps = stage_cost(warc, plan), bare_steps(warc, plan)
    for name, seconds in steps.items():
        print(f"{name:<12} {seconds / pages * 1000:6.2f} ms of CPU per page")
    total = sum(steps.values())
    print(f"{'sum':<12} {total / pages * 1000:6.2f} ms of CPU per page: bare kernels")
    print(f"{'stage':<12} {cost.pages / pages * 1000:6.2f} ms of CPU per page")
    print(f"stage / bare kernels: {cost.pages / total:.3f}")


def main() -> None:
    """Print a line per figure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = Path(__file__).parents[2] / "shared" / "data"
    parser.add_argument("data", type=Path, nargs="?", default=default)
    parser.add_argument("--gold", type=Path, nargs="*", default=[])
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    warc = options.data / "warc" / "web" / "wcxb-500.warc.gz"
    if options.profile:
        print_profile(warc)
        return
    # before the models: a process that loaded LightGBM and then forks can hang
    compare_costs(warc)
    compare_snippets(options.data, compare_f1(options.data, options.gold))


if __name__ == "__main__":
    main()
