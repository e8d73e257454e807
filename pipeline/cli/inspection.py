"""Commands that only read: a configuration, a run, the history of a document."""

import csv
import itertools
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.table import Table
from rich.text import Text
from typer import Argument, Exit, Option

from pipeline.cli import (
    AsJson,
    ConfigFile,
    Format,
    Kind,
    Overrides,
    RunFolder,
    absolute_path,
    app,
    err,
    load_config,
    out,
    print_json,
    print_table,
    print_template,
    print_wide,
)
from stages.formats.errors import ConfigError

if TYPE_CHECKING:
    from pipeline.run.status import RunStatus

command = partial(app.command, rich_help_panel="Looking")


@command("show-config")
def show_config(config: ConfigFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Show the resolved configuration, and where each value comes from."""
    from pipeline.config.show import by_key, show

    settings = list(show(load_config(config, overrides)))
    if as_json:
        print_json(by_key(settings))
        return
    width = min(70, max(len(f"{key} = {value}") for key, value, _ in settings))
    section = ""
    for key, value, origin in settings:
        if key.split(".")[0] != section:
            out.print(end="\n" if section else "")
            section = key.split(".")[0]
        style = "dim" if origin == "default" else "green"
        line = f"{key} = {value}".ljust(width)
        out.print(Text.assemble(f"{line}  ", (f"# {origin}", style)))


@command()
def status(run: RunFolder, as_json: AsJson = False) -> None:
    """Show how far a run is: units done, failed and left per phase, rate, time left.

    Of a series, show its batches and the one in progress.
    """
    from pipeline.batches.batch import is_series
    from pipeline.run.status import run_status

    in_progress = _series_status(run, as_json) if is_series(run) else run
    if in_progress is None:
        return
    state = run_status(in_progress)
    if as_json:
        print_json(_status_json(state))
    else:
        _print_status(state)


def _print_status(state: "RunStatus") -> None:
    from pipeline.run.phases import SPECS

    generation = f", generation {state.generation}" if state.generation else ""
    out.print(f"{state.run}  stage {state.stage}{generation}")
    phases = {name: p for name, p in state.phases.items() if p.units or not SPECS[name].optional}
    print_table(
        ("phase", "done", "failed", "left", "rows in", "rows out", "rows/s", "time left"),
        (
            (
                name,
                *(f"{n:,}" for n in (p.done, p.failed, p.left, p.rows_in, p.rows_out)),
                f"{p.rows_per_second:,.0f}" if p.rows_per_second else "",
                "" if p.eta_seconds is None else f"{p.eta_seconds:.0f} s",
            )
            for name, p in phases.items()
        ),
    )
    for name, p in phases.items():
        for unit, error in p.errors.items():
            out.print(Text.assemble(("failed", "red"), f" {name} {unit}: {error}"))
        for unit, damage in p.damage.items():
            out.print(Text.assemble(("damaged", "yellow"), f" {name} {unit}: {damage}"))


def _status_json(state: "RunStatus") -> dict[str, Any]:
    status = asdict(state)
    for phase in status["phases"].values():
        last_commit = phase["last_commit"]
        phase["last_commit_age_seconds"] = last_commit and round(time.time() - last_commit)
    return status


def _series_status(root: str, as_json: bool) -> str | None:
    """Print the batches of a series; return the directory of the one in progress to print next."""
    from pipeline.report.series import gather

    data = gather(root)
    consumed = {name: curve[-1][1] if curve else 0.0 for name, curve in data.curves.items()}
    if as_json:
        rows = [{**r._asdict(), "begun": r.begun.isoformat()} for r in data.rows]
        consumed = {name: n for name, n in consumed.items() if data.curves[name]}
        print_json({"series": root, "batches": rows, "consumed": consumed}, indent=None)
        return None
    out.print(root)
    print_table(
        ("batch", "begun (UTC)", "decided", "inputs", "tokens", "generation"),
        (
            (
                str(r.number),
                f"{r.begun:%Y-%m-%d %H:%M}",
                r.state,
                f"{r.taken:,}",
                "" if r.tokens is None else f"{r.tokens:,}",
                "in progress" if r.seconds is None else r.generation or "nothing kept",
            )
            for r in data.rows
        ),
        text_columns=6,
    )
    print_template("series.txt.j2", consumed=consumed, last=data.last)
    in_progress = data.rows and data.rows[-1].seconds is None
    return f"{root}/batches/{data.rows[-1].number:04d}" if in_progress else None


@command()
def report(run: RunFolder) -> None:
    """Rebuild the HTML report of a run or of a series of batches, and print its path."""
    from pipeline.batches.batch import is_series
    from pipeline.report.report import write_report
    from pipeline.report.series import write_report as write_series_report

    print(write_series_report(run) if is_series(run) else write_report(run))


@command()
def why(
    run: RunFolder,
    url: Annotated[str, Argument(metavar="URL|ID|FILE:OFFSET")],
    as_json: AsJson = False,
) -> None:
    """Show what happened to a page, found by URL, by the id in its input, or by where it was read:
    a file of the input and the offset that other commands show.

    Prints the rule, value and bound; or the cluster and the kept copy; or generation and rows.
    """
    from pipeline.inspect.why import why as read_why

    fates = read_why(run, url)
    if as_json:
        print_json(fates)
    else:
        print_template("why.txt.j2", fates=fates)
    if not fates:
        err.print(
            f"{url}: this run has no document of that URL, id or place "
            "(records that are no documents are only counted)"
        )
        raise Exit(1)


@command()
def ablate(
    config: ConfigFile,
    overrides: Overrides = None,
    drop: Annotated[
        list[str] | None,
        Option(help="filter or rule to leave out, e.g. c4 or c4.sentence_count"),
    ] = None,
    settings: Annotated[
        list[str] | None,
        Option("--set", help="section.key=value for the second side", metavar="KEY=VALUE"),
    ] = None,
    against: Annotated[
        Path | None, Option(help="the config of the second side, if it is another file")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare what other bounds would keep, by the scores that the run stored. Runs nothing.

    Prints documents, tokens, losses by rule, overlap and hosts.
    """
    from pipeline.study.ablate import ablate as compare
    from pipeline.study.ablate import comparison, switched_off

    before = load_config(config, overrides)
    changed = [*(overrides or []), *(settings or [])]
    after = load_config(against or config, changed)
    if drop:
        after = load_config(against or config, [*changed, *switched_off(after, drop)])
    result = compare(before, after)
    if as_json:
        print_json(result)
        return
    print_table(
        ("", "before", "after", "change"),
        (
            (label, f"{left:,}", f"{right:,}", f"{right - left:+,}" if left != right else "")
            for label, left, right in comparison(result)
            if left is not None and right is not None
        ),
    )
    print_template("ablate.txt.j2", result=result)


@command()
def tokenizers(
    run: RunFolder,
    names: Annotated[
        list[str],
        Argument(metavar="TOKENIZER...", help="names of tiktoken's, or files, as pack.tokenizer"),
    ],
    pattern: Annotated[str, Option(help="for ranks of tiktoken, as pack.pattern")] = "",
    end_of_text: Annotated[str, Option(help="as pack.end_of_text, for all of them")] = "",
    seq_len: Annotated[int, Option(help="tokens of a row", min=2)] = 2048,
    sample_chars: Annotated[
        int, Option(help="characters of the corpus to tokenize, about", min=1)
    ] = 20_000_000,
    as_json: AsJson = False,
) -> None:
    """Compare tokenizers on the corpus of a run: bytes per token, tokens per word, and rows, of all
    and by language and input file.

    The more bytes in a token, the less a text costs to train on. It reads a sample of the corpus,
    the same one each time.
    """
    from pipeline.study.fertility import compare, to_json
    from stages.formats.tokenizer import TokenizerOptions, is_ranks, load_tokenizer

    options = TokenizerOptions(end_of_text=end_of_text)
    loaded = [
        # as it was given: the files of several tokenizers may have the same name
        replace(
            load_tokenizer(name, options._replace(pattern=pattern if is_ranks(name) else "")),
            name=name,
        )
        for name in names
    ]
    comparison = compare(run, loaded, sample_chars=sample_chars)
    if as_json:
        print_json(to_json(comparison, loaded, seq_len=seq_len))
        return
    print_table(
        ("", "", "tokenizer", "documents", "MB", "bytes/token", "tokens/word", "rows"),
        (
            (
                *((kind, name.rpartition("/")[2]) if n == 0 else ("", "")),
                f"{tokenizer.name} ({tokenizer.vocab_size:,})",
                *((f"{group.documents:,}", f"{group.bytes / 1e6:,.2f}") if n == 0 else ("", "")),
                _ratio(group.of(n).bytes_per_token),
                _ratio(group.of(n).tokens_per_word),
                f"{group.of(n).rows(seq_len):,}",
            )
            for (kind, name), group in comparison.groups.items()
            for n, tokenizer in enumerate(loaded)
        ),
        text_columns=3,
    )
    err.print(f"{comparison.share:.2%} of the characters, in rows of {seq_len:,} tokens")


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


@command()
def verify(
    path: Annotated[
        str,
        Argument(
            metavar="PATH", help="a generation, or a run for all of its", callback=absolute_path
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """Read the shards of a generation again, and compare counts, sizes and hashes with its index
    and manifest.

    Exit 1 on any fault.
    """
    from pipeline.inspect.verify import verify_path

    results = verify_path(path)
    if as_json:
        print_json(results)
    else:
        print_template("verify.txt.j2", results=results)
    if any(result.faults for result in results):
        raise Exit(1)


@command()
def export(
    run: RunFolder,
    stage: Annotated[Kind, Option(help="which documents")],
    format: Annotated[Format, Option(help="file format")] = "jsonl",
    output: Annotated[str, Option("-o", "--output", help="file to write")] = "",
) -> None:
    """Write documents, keep table, corpus or rejected documents of a run to one file."""
    from pipeline.inspect.export import export as write_export

    if not output:
        raise ConfigError("-o PATH is missing: name the file to write")
    count = write_export(run, stage, format=format, output=absolute_path(output))
    err.print(f"{count:,} rows → {output}")


@command()
def sql(
    run: RunFolder,
    query: Annotated[str, Argument(metavar="SELECT", help="one SELECT in DuckDB's SQL")],
    as_json: AsJson = False,
    as_csv: Annotated[bool, Option("--csv", help="print CSV with a header")] = False,
    rows: Annotated[int, Option(help="rows of the table to print; the rest is cut")] = 50,
) -> None:
    """Query a run with SQL: the views documents, keep, corpus, rejected and commits. It reads only.

    documents: every page that was read, with scores; keep: what dedup decided; corpus: clean texts;
    rejected: what extract and refine dropped, and why; commits: the work done, one row per unit.
    --json and --csv print all rows. Quote names with a dot: "c4.sentence_count".
    """
    from pipeline.run.query import select
    from pipeline.run.results import open_results

    with open_results(run) as connection, select(connection, query) as reader:
        records = (row for batch in reader for row in batch.to_pylist(maps_as_pydicts="strict"))
        if as_json:
            _print_json_rows(records)
        elif as_csv:
            writer = csv.writer(sys.stdout, lineterminator="\n")
            writer.writerow(reader.schema.names)
            writer.writerows(map(_cell, row.values()) for row in records)
        else:
            _print_rows(records, reader.schema, rows)


def _print_json_rows(records: Iterator[dict[str, Any]]) -> None:
    from stages.formats.json_output import to_json

    separator = "["
    for row in records:
        print(separator, to_json(row), sep="\n", end="")
        separator = ","
    print("[]" if separator == "[" else "\n]")


def _print_rows(records: Iterator[dict[str, Any]], schema: Any, limit: int) -> None:
    table = Table(*schema.names, box=None, pad_edge=False)
    for column, field in zip(table.columns, schema, strict=True):
        column.overflow = "fold"
        column.justify = "right" if str(field.type).startswith(_NUMBERS) else "left"
    for row in itertools.islice(records, limit):
        table.add_row(*(_short(_cell(value)) for value in row.values()))
    print_wide(table)
    if next(records, None) is not None:
        err.print(f"the first {limit:,} rows; --rows N prints more, --csv and --json print all")


_NUMBERS = ("int", "uint", "float", "double", "decimal")


def _cell(value: Any) -> str:
    """A value as text: nested ones as JSON, bytes as hex, null as nothing."""
    from stages.formats.json_output import to_json

    if isinstance(value, dict | list | bool):
        return to_json(value)
    if isinstance(value, bytes):
        return value.hex()
    return "" if value is None else str(value)


def _short(text: str, limit: int = 80) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"
