"""Commands that make models, and indexes of evaluation sets."""

import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from pipeline.cli import app, out, print_wide, user_errors
from stages.formats.errors import ConfigError

command = partial(app.command, rich_help_panel="Models")
Licence = Annotated[
    str, typer.Option(help="licence of the sources, for the model's card, e.g. CC-BY-SA-4.0")
]
SOURCE = "text: .txt, .jsonl[.gz|.zst], .parquet, or rows of a run: RUN:corpus, RUN:rejected:quality.score<0.1"


def _numbers(option: str, given: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in given.split(","))
    except ValueError:
        raise ConfigError(f"{option} {given}: write numbers, parted by commas") from None


def _counts(option: str, given: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d+(,\d+)*", given, re.ASCII):
        raise ConfigError(f"{option} {given}: write whole numbers, 0 or more, parted by commas")
    return tuple(map(int, given.split(",")))


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM becomes SystemExit, so that scratch files go, which may be four times the corpus."""

    def end(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_IGN)  # a second one must not cut the removal short
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@command("train-lm")
def train_lm(
    sources: Annotated[list[str], typer.Argument(help=SOURCE)],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="model to write; its card lies beside it")
    ],
    licence: Licence,
    order: Annotated[int, typer.Option(help="n-gram order")] = 5,
    prune: Annotated[
        str | None,
        typer.Option(
            help="drop n-grams seen at most so often, one count per order",
            show_default="0,0,1, cut to the order",
        ),
    ] = None,
    memory: Annotated[str, typer.Option(help="memory for lmplz, e.g. 4G")] = "1G",
    bits: Annotated[
        int, typer.Option(help="of quantised probabilities and back-offs; 0: not quantised")
    ] = 8,
    sentencepiece: Annotated[
        int, typer.Option(help="train SentencePiece to this vocabulary; 0: words")
    ] = 0,
    sentencepiece_model: Annotated[
        Path | None, typer.Option(help="or use this SentencePiece model")
    ] = None,
    lmplz_option: Annotated[
        list[str] | None, typer.Option(help="passed to lmplz as it stands; repeat for more")
    ] = None,
    held_out: Annotated[float, typer.Option(help="share of documents kept out of training")] = 0.02,
    text_column: Annotated[
        str, typer.Option(help="column of the text in .jsonl and .parquet")
    ] = "text",
) -> None:
    """Train a KenLM model for the filter `perplexity`, with KenLM's lmplz (make kenlm)."""
    from pipeline.models.train_lm import train_lm as train

    with user_errors(), _ended_by_sigterm():
        train(
            sources,
            output=output,
            licence=licence,
            order=order,
            prune=None if prune is None else _counts("--prune", prune),
            memory=memory,
            bits=bits,
            sentencepiece=sentencepiece,
            sentencepiece_model=sentencepiece_model,
            lmplz_options=tuple(lmplz_option or ()),
            held_out=held_out,
            text_column=text_column,
        )


@command("train-classifier")
def train_classifier(
    output: Annotated[
        Path, typer.Option("-o", "--output", help="model to write: .ftz is quantised, .bin whole")
    ],
    licence: Licence,
    positive: Annotated[
        list[str] | None, typer.Option(help=f"the same as --source hq={SOURCE}")
    ] = None,
    negative: Annotated[list[str] | None, typer.Option(help="the same as --source lq=…")] = None,
    source: Annotated[
        list[str] | None,
        typer.Option(help="texts of a label, LABEL=…; repeat for more", metavar="LABEL=SOURCE"),
    ] = None,
    epochs: int = 5,
    learning_rate: float = 0.5,
    dimensions: int = 16,
    word_ngrams: int = 2,
    buckets: int = 200_000,
    features: int = 50_000,
    seed: int = 0,
    held_out: Annotated[
        float, typer.Option(help="share of documents that precision and recall are measured on")
    ] = 0.1,
    sample: Annotated[
        str, typer.Option(help="texts like those to be filtered, to calibrate the threshold on")
    ] = "",
    keep_best: Annotated[
        str, typer.Option(help="percentages of the sample to find thresholds for")
    ] = "5,10,20,50",
    text_column: Annotated[
        str, typer.Option(help="column of the text in .jsonl and .parquet")
    ] = "text",
) -> None:
    """Train a fastText classifier for the filter `quality`, with two labels or more.

    The same texts make the same bytes.
    """
    from pipeline.models.train_classifier import train_classifier as train

    with user_errors(), _ended_by_sigterm():
        named = (
            [f"hq={path}" for path in positive or []]
            + [f"lq={path}" for path in negative or []]
            + (source or [])
        )
        labels: dict[str, list[str]] = {}
        for one in named:
            label, equals, path = one.partition("=")
            if not equals or not label or not path:
                raise ConfigError(
                    f"--source {one}: write LABEL=SOURCE, e.g. --source sports=sports.jsonl"
                )
            labels.setdefault(label, []).append(path)
        train(
            labels,
            output=output,
            licence=licence,
            epochs=epochs,
            learning_rate=learning_rate,
            dimensions=dimensions,
            word_ngrams=word_ngrams,
            buckets=buckets,
            features=features,
            seed=seed,
            held_out=held_out,
            sample=sample or None,
            keep_best=_numbers("--keep-best", keep_best),
            text_column=text_column,
        )


@command("index-benchmarks")
def index_benchmarks(
    files: Annotated[
        list[str],
        typer.Argument(help="evaluation sets: .jsonl, .json, .csv, .parquet, folders, .tar[.zst]"),
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="index to write, for decontamination.index")
    ],
    background: Annotated[
        list[str] | None,
        typer.Option(help="clean text whose n-grams are no evidence; repeat for more"),
    ] = None,
    n: Annotated[int, typer.Option(help="words of an n-gram")] = 13,
    min_words: Annotated[int, typer.Option(help="a shorter text is no passage by itself")] = 10,
    max_items: Annotated[
        int, typer.Option(help="n-grams of more items of a set than this are its template")
    ] = 20,
) -> None:
    """Build the index of evaluation sets that the filter `decontamination` compares documents with."""
    from pipeline.models.benchmark_index import build_index, by_benchmark

    with user_errors():
        header = build_index(
            files,
            output=output,
            background=background or [],
            n=n,
            min_words=min_words,
            max_items=max_items,
        )
        columns = ("rows", "bad_rows", "empty_rows", "passages", "common_passages", "ngrams")
        table = Table("benchmark", *columns, box=None, pad_edge=False)
        for column in table.columns[1:]:
            column.justify = "right"
        for name, sums in sorted(by_benchmark(header).items()):
            table.add_row(escape(name), *(f"{sums[c]:,}" for c in columns))
        print_wide(table)
        out.print(f"{output}  {output.stat().st_size:,} bytes", soft_wrap=True)
