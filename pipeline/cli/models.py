"""Commands that train models and build indexes of evaluation sets."""

import re
import signal
from collections.abc import Iterable, Iterator
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
    str, typer.Option(help="license of the sources, for the model's card, e.g. CC-BY-SA-4.0")
]
SOURCE = "text: .txt, .jsonl[.gz|.zst], .parquet, or rows of a run: RUN:corpus, RUN:rejected"
TextColumn = Annotated[str, typer.Option(help="column of the text in .jsonl and .parquet")]


def _parse_percentages(option: str, value: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in value.split(","))
    except ValueError:
        raise ConfigError(f"{option} {value}: write numbers, separated by commas") from None


def _parse_counts(option: str, value: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d+(,\d+)*", value, re.ASCII):
        raise ConfigError(f"{option} {value}: write whole numbers, 0 or more, separated by commas")
    return tuple(map(int, value.split(",")))


def _by_label(option: str, values: Iterable[str], example: str) -> dict[str, list[str]]:
    """Values of an option LABEL=…, in order of labels."""
    labels: dict[str, list[str]] = {}
    for value in values:
        label, equals, rest = value.partition("=")
        if not equals or not label or not rest:
            raise ConfigError(f"{option} {value}: write LABEL=…, e.g. {option} {example}")
        labels.setdefault(label, []).append(rest)
    return labels


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Turn SIGTERM into SystemExit, so that scratch files, perhaps four corpora, are deleted."""

    def end(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_IGN)  # a second signal must not interrupt the deletion
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
        Path, typer.Option("-o", "--output", help="model to write; its card is put beside it")
    ],
    licence: Licence,
    where: Annotated[str, typer.Option(help="SQL condition on rows of a run", metavar="SQL")] = "",
    order: Annotated[int, typer.Option(help="n-gram order")] = 5,
    prune: Annotated[
        str | None,
        typer.Option(
            help="drop n-grams seen at most this often, one count per order",
            show_default="0,0,1, as far as the order goes",
        ),
    ] = None,
    memory: Annotated[str, typer.Option(help="memory for lmplz, e.g. 4G")] = "1G",
    bits: Annotated[
        int, typer.Option(help="of quantized probabilities and back-offs; 0: not quantized")
    ] = 8,
    sentencepiece: Annotated[
        int, typer.Option(help="train SentencePiece to this vocabulary; 0: words")
    ] = 0,
    sentencepiece_model: Annotated[
        Path | None, typer.Option(help="or use this SentencePiece model")
    ] = None,
    lmplz_option: Annotated[
        list[str] | None, typer.Option(help="passed to lmplz unchanged; repeat for more")
    ] = None,
    held_out: Annotated[float, typer.Option(help="share of documents kept out of training")] = 0.02,
    text_column: TextColumn = "text",
) -> None:
    """Train a KenLM model for the filter `perplexity`, with KenLM's lmplz (make kenlm)."""
    from pipeline.models.train_lm import train_lm as train

    with user_errors(), _ended_by_sigterm():
        train(
            sources,
            output=output,
            licence=licence,
            where=where,
            order=order,
            prune=None if prune is None else _parse_counts("--prune", prune),
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
        Path, typer.Option("-o", "--output", help="model to write: .ftz is quantized, .bin whole")
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
    where: Annotated[
        list[str] | None,
        typer.Option(
            help="SQL condition on rows of runs among the sources of a label; --positive is hq, "
            "--negative lq",
            metavar="LABEL=SQL",
        ),
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
    sample_where: Annotated[
        str, typer.Option(help="SQL condition on rows of a run that are the sample", metavar="SQL")
    ] = "",
    keep_best: Annotated[
        str, typer.Option(help="percentages of the sample to find thresholds for")
    ] = "5,10,20,50",
    text_column: TextColumn = "text",
) -> None:
    """Train a fastText classifier for the filter `quality`, with two labels or more.

    The same texts make the same bytes.
    """
    from pipeline.models.train_classifier import train_classifier as train

    with user_errors(), _ended_by_sigterm():
        named = [f"hq={path}" for path in positive or []]
        named += [f"lq={path}" for path in negative or []]
        labels = _by_label("--source", named + (source or []), "sports=sports.jsonl")
        conditions = _by_label("--where", where or [], "hq='\"quality.score\" > 0.9'")
        for label, of_label in conditions.items():
            if len(of_label) > 1:
                raise ConfigError(f"--where {label}={of_label[1]}: a second one; join them by AND")
        train(
            labels,
            output=output,
            licence=licence,
            where={label: of_label[0] for label, of_label in conditions.items()},
            epochs=epochs,
            learning_rate=learning_rate,
            dimensions=dimensions,
            word_ngrams=word_ngrams,
            buckets=buckets,
            features=features,
            seed=seed,
            held_out=held_out,
            sample=sample or None,
            sample_where=sample_where,
            keep_best=_parse_percentages("--keep-best", keep_best),
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
        typer.Option(help="clean text whose n-grams do not count as a match; repeat for more"),
    ] = None,
    n: Annotated[int, typer.Option(help="words of an n-gram")] = 13,
    min_words: Annotated[
        int, typer.Option(help="shorter texts are no passages by themselves")
    ] = 10,
    max_items: Annotated[
        int, typer.Option(help="n-grams in more items of a set than this are its template")
    ] = 20,
) -> None:
    """Build the index of evaluation sets for the filter `decontamination`."""
    from pipeline.models.benchmark_index import build_index, by_benchmark

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
    out.print(f"{output}  {output.stat().st_size:,} bytes")
