"""Commands that train models and build indexes of evaluation sets."""

import inspect
import signal
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

from pipeline.cli import app, err, out, print_table, print_template
from pipeline.models.options import (
    BpeOptions,
    ClassifierOptions,
    ExtractorOptions,
    IndexOptions,
    LmOptions,
)

Options = TypeVar("Options")


def command(
    name: str, options: Callable[..., Options]
) -> Callable[[Callable[[Options], None]], None]:
    """A command whose arguments are the fields of a dataclass; the function takes an instance."""

    def add(run: Callable[[Options], None]) -> None:
        @wraps(run)
        def run_with_fields(**fields: Any) -> None:
            run(options(**fields))

        # Typer reads the parameters from here
        vars(run_with_fields)["__signature__"] = inspect.signature(options)
        app.command(name, rich_help_panel="Models")(run_with_fields)

    return add


def _end_on_sigterm() -> None:
    """Turn SIGTERM into SystemExit, so that scratch files, perhaps four corpora, are deleted."""

    def end(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_IGN)  # a second signal must not interrupt the deletion
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, end)


@command("train-lm", LmOptions)
def _train_lm(options: LmOptions) -> None:
    """Train a KenLM model for the filter `perplexity`, with KenLM's lmplz (make kenlm)."""
    from pipeline.models.train_lm import train_lm

    _end_on_sigterm()
    print_template("train_lm.txt.j2", card=train_lm(options))


@command("train-classifier", ClassifierOptions)
def _train_classifier(options: ClassifierOptions) -> None:
    """Train a fastText classifier for the filter `quality`, with two labels or more.

    The same texts make the same bytes.
    """
    from pipeline.models.train_classifier import train_classifier

    _end_on_sigterm()
    card = train_classifier(options)
    print_template("near_duplicates.txt.j2", err, shared=card["near_duplicates"]["shared"])
    print_template("train_classifier.txt.j2", card=card)


@command("train-tokenizer", BpeOptions)
def _train_tokenizer(options: BpeOptions) -> None:
    """Train a tokenizer for `pack.tokenizer`, byte-level BPE, from the corpus of a run.

    The same texts make the same bytes. Compare it with others by `gristmill tokenizers`.
    """
    from pipeline.models.train_tokenizer import train_tokenizer

    _end_on_sigterm()
    print_template("train_tokenizer.txt.j2", card=train_tokenizer(options))


@command("train-extractor", ExtractorOptions)
def _train_extractor(options: ExtractorOptions) -> None:
    """Train the model of `extract.engine = "blocks"` on pages and their main text.

    The same pages make the same bytes. Needs the extra `extractor`.
    """
    from pipeline.models.train_extractor import train_extractor

    _end_on_sigterm()
    print_template("train_extractor.txt.j2", card=train_extractor(options))


@command("index-benchmarks", IndexOptions)
def _index_benchmarks(options: IndexOptions) -> None:
    """Build the index of evaluation sets for the filter `decontamination`."""
    from pipeline.models.benchmark_index import build_index, by_benchmark

    header = build_index(options)
    columns = ("rows", "bad_rows", "empty_rows", "passages", "common_passages", "ngrams")
    print_table(
        ("benchmark", *columns),
        (
            (name, *(f"{sums[column]:,}" for column in columns))
            for name, sums in sorted(by_benchmark(header).items())
        ),
    )
    out.print(f"{options.output}  {options.output.stat().st_size:,} bytes")
