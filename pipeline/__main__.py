"""The command line: `gristmill`, also `python -m pipeline`.

Exit codes: 0 well; 1 a fault was found, or the run could not be completed; 2 the command line or the configuration is wrong;
3 the run ended, but some units failed within run.max_failed_share; 4 the run directory is in use; 130 interrupted.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from pipeline.config import ConfigError, absolute_path, load, show
from pipeline.lease import Held

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich", help=__doc__.split("\n\n")[0])
out, err = Console(highlight=False), Console(stderr=True, highlight=False)

Stage = StrEnum("Stage", ["extract", "dedup", "refine", "pack"])
Kind = StrEnum("Kind", ["documents", "keep", "corpus", "rejected"])
Format = StrEnum("Format", ["jsonl", "parquet"])

ConfigFile = Annotated[Path, typer.Argument(help="TOML file, e.g. configs/quickstart.toml")]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value, over the file", metavar="[SECTION.KEY=VALUE]...")]
RunFolder = Annotated[str, typer.Argument(help="run directory (run.directory of the config)", metavar="RUN")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON for scripts")]


@contextmanager
def _told() -> Iterator[None]:
    """Errors that are the user's to mend are told in a line; anything else is ours, and keeps its traceback."""
    from pipeline.catalog import PublishError
    from pipeline.run import RunFailed

    try:
        yield
    except ConfigError as error:
        _fail(error, 2)
    except Held as error:
        _fail(error, 4)
    except (RunFailed, PublishError, OSError, ValueError) as error:
        _fail(error, 1)
    except KeyboardInterrupt:
        _fail("interrupted; what was committed stays: the same command goes on from there", 130)


def _fail(message: object, code: int) -> None:
    err.print(f"[bold red]error[/bold red] {_escaped(str(message))}", soft_wrap=True)
    raise typer.Exit(code)


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


@app.command()
def run(
    config: ConfigFile,
    overrides: Overrides = None,
    only: Annotated[Stage | None, typer.Option(help="run this stage alone; the ones before must be done")] = None,
    first: Annotated[Stage | None, typer.Option("--from", help="begin at this stage; the ones before must be done")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would be done, and stop")] = False,
    address: Annotated[str | None, typer.Option(help="Ray cluster to use (else $RAY_ADDRESS, else this machine)")] = None,
    as_json: AsJson = False,
) -> None:
    """Run a config: extract, dedup, refine, pack, publish. The same command again goes on where it stopped."""
    from pipeline.engine import on_ray
    from pipeline.progress import Bars, funnel_table
    from pipeline.run import execute, plan

    with _told():
        if only and first:
            raise ConfigError("--only and --from exclude each other; give one")
        settings = load(config, overrides or [])
        if dry_run:
            _print_plan(plan(settings, only=only, first=first), as_json)
            return
        with Bars(err) as bars:
            outcome = execute(settings, bars, on_ray(address), only=only, first=first)
        from pipeline.explain import run_funnel
        from pipeline.report import write_report

        rows = run_funnel(settings.run.directory)
        page = write_report(settings.run.directory)
        published = outcome.published
        if as_json:
            generation = {"name": published.name, "uri": published.uri, **_brief(published.manifest)} if published else None
            body = {"funnel": [r.__dict__ for r in rows], "generation": generation, "failed": outcome.failed, "report": page}
            print(json.dumps(body, indent=1))
        else:
            out.print(funnel_table(rows))
            if published:
                state = "published" if published.new else "unchanged, published before:"
                out.print(f"\n[bold]{published.name}[/bold] {state} {published.uri}", soft_wrap=True)
            out.print(f"report {page}", soft_wrap=True)
        _print_alarm(settings.run.directory)
        if outcome.failed:
            raise typer.Exit(3)


@app.command()
def dedup(
    paths: Annotated[
        list[str], typer.Argument(help="JSONL (.gz, .zst) or Parquet files, folders, patterns, s3:// URIs", metavar="PATH...")
    ],
    output: Annotated[
        str, typer.Option("-o", "--output", help="folder for keep.parquet, the report, and the state to resume from")
    ],
    text_column: Annotated[str, typer.Option(help="column of the text")] = "text",
    id_column: Annotated[str, typer.Option(help="column of the id; '' if there is none")] = "id",
    against: Annotated[list[str] | None, typer.Option(help="output of an earlier dedup with dedup.write_index=kept")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="section.key=value, e.g. dedup.num_bands=26", metavar="KEY=VALUE")
    ] = None,
    address: Annotated[str | None, typer.Option(help="Ray cluster to use (else $RAY_ADDRESS, else this machine)")] = None,
    as_json: AsJson = False,
) -> None:
    """Find near-duplicates in JSONL or Parquet files: writes keep.parquet with id, cluster_id, cluster_size, keep."""
    from pipeline.dedup_command import configure, dedup_files
    from pipeline.engine import on_ray
    from pipeline.progress import Bars
    from pipeline.report import write_report

    with _told():
        if not output:
            raise ConfigError("-o is empty: name the folder to write to")
        config = configure(
            [absolute_path(p) for p in paths],
            absolute_path(output),
            text_column=text_column,
            id_column=id_column,
            against=[absolute_path(p) for p in against or []],
            overrides=settings or [],
        )
        with Bars(err) as bars:
            result = dedup_files(config, bars, on_ray(address))
        page = write_report(config.run.directory)
        if as_json:
            print(json.dumps(result._asdict() | {"report": page}, indent=1))
        else:
            total = max(1, sum(result.rows.values()))
            table = Table("rule", "rows", "share", box=None, pad_edge=False)
            for column in table.columns[1:]:
                column.justify = "right"
            for rule, count in sorted(result.rows.items(), key=lambda item: -item[1]):
                table.add_row(rule, f"{count:,}", f"{count / total:.1%}")
            out.print(table)
            out.print(f"{result.clusters:,} clusters\n{result.table}\nreport {page}", soft_wrap=True)
        _print_alarm(config.run.directory)
        if result.failed:
            raise typer.Exit(3)


def _print_alarm(root: str) -> None:
    from pipeline.explain import alarm

    message = alarm(root)
    if message is not None:
        err.print(f"[yellow]alarm[/yellow] {message}", soft_wrap=True)


def _brief(manifest: dict[str, Any]) -> dict[str, Any]:
    return {k: manifest[k] for k in ("rows", "tokens", "documents", "seq_len")}


def _print_plan(phases: list[Any], as_json: bool) -> None:
    from pipeline.dedup_plan import OPTIONAL

    rows = [{"phase": p.name, "units": len(p.units), "pending": len(p.pending), "store": p.store.root} for p in phases]
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    table = Table("phase", "units", "done", "to do", box=None)
    table.add_column("folder", overflow="fold")
    for row, phase in zip(rows, phases, strict=True):
        if phase.name in OPTIONAL and not phase.units:
            continue
        done = len(phase.units) - len(phase.pending)
        table.add_row(phase.name, str(row["units"]), str(done), str(row["pending"]), phase.store.root)
    out.print(table)
    if phases and phases[-1].pending and phases[-1].name != "pack":
        out.print("what comes after depends on what these units write; nothing was run")


@app.command("show-config")
def show_config(config: ConfigFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """The resolved configuration, with where each value came from."""
    with _told():
        values = list(show(load(config, overrides or [])))
        if as_json:
            print(json.dumps({key: {"value": value, "origin": origin} for key, value, origin in values}, indent=1))
            return
        width = min(70, max(len(f"{key} = {value}") for key, value, _ in values))
        section = ""
        for key, value, origin in values:
            head = key.split(".")[0]
            if head != section:
                out.print(end="\n" if section else "")
                section = head
            style = "dim" if origin == "default" else "green"
            out.print(f"{_escaped(f'{key} = {value}'.ljust(width))}  [{style}]# {_escaped(origin)}[/{style}]", soft_wrap=True)


@app.command()
def status(run: RunFolder, as_json: AsJson = False) -> None:
    """How far a run is: units done, failed and left per phase, rate, time left. Works while it runs and after."""
    from pipeline.dedup_plan import OPTIONAL
    from pipeline.explain import status as read_status

    with _told():
        state = read_status(absolute_path(run))
        if as_json:
            print(json.dumps(state, indent=1))
            return
        generation = f", generation {state['generation']}" if state["generation"] else ""
        out.print(f"{state['run']}  stage {state['stage']}{generation}", soft_wrap=True)
        table = Table("phase", "done", "failed", "left", "rows in", "rows out", "rows/s", "time left", box=None)
        for phase, s in state["phases"].items():
            if phase in OPTIONAL and not s["done"] + s["failed"] + s["left"]:
                continue
            eta = f"{s['eta_seconds']} s" if s["eta_seconds"] is not None else ""
            rate = f"{s['rows_per_second']:,.0f}" if s["rows_per_second"] else ""
            numbers = (s["done"], s["failed"], s["left"], s["rows_in"], s["rows_out"])
            table.add_row(phase, *(f"{n:,}" for n in numbers), rate, eta)
        out.print(table)
        for phase, s in state["phases"].items():
            for unit, error in s["errors"].items():
                out.print(f"[red]failed[/red] {phase} {unit}: {_escaped(error)}", soft_wrap=True)


@app.command()
def report(run: RunFolder) -> None:
    """Rebuild the HTML report of a run and print its path."""
    from pipeline.report import write_report

    with _told():
        print(write_report(absolute_path(run)))


@app.command()
def why(run: RunFolder, url: Annotated[str, typer.Argument(metavar="URL|ID")], as_json: AsJson = False) -> None:
    """What became of a page, by URL or input's id: rule, value and bound; or cluster and kept copy; or generation and rows."""
    from pipeline.explain import to_json
    from pipeline.explain import why as read_why

    with _told():
        fates = read_why(absolute_path(run), url)
        if as_json:
            print(to_json(fates, indent=1))
        for fate in fates if not as_json else ():
            _print_fate(fate)
        if not fates:
            err.print(f"{_escaped(url)}: this run has no document of that URL (records that are no documents are only counted)")
            raise typer.Exit(1)


def _print_fate(fate: dict[str, Any]) -> None:
    name = fate["url"] or fate["source_id"] or str(fate["doc_id"])
    out.print(f"[bold]{_escaped(name)}[/bold]  doc_id {fate['doc_id']}", soft_wrap=True)
    out.print(f"  read from {_escaped(fate['warc_file'])} at {fate['warc_offset']}", soft_wrap=True)
    if fate["fate"] == "rejected":
        bound = "" if fate["bound"][0] is None else f" outside [{fate['bound'][0]:g}, {fate['bound'][1]:g}]"
        value = "" if fate["value"] is None else f" = {fate['value']:.6g}"
        out.print(f"  [red]rejected[/red] in {fate['stage']} by {fate['rule']}{value}{bound}")
    elif fate["fate"] == "duplicate":
        kept, how = fate["kept_copy"], {"dedup.exact": "exact", "dedup.near": "near"}.get(fate["rule"], "of an earlier batch")
        similar = "" if fate["similarity"] is None else f", similarity {fate['similarity']:.3f}"
        of = f"cluster {fate['cluster_id']} of {fate['cluster_size']} documents{similar}"
        out.print(f"  [yellow]duplicate[/yellow] ({how}): {of}", soft_wrap=True)
        where = f" in {_escaped(kept['documents'])}" if kept["documents"] else ""
        out.print(
            f"  kept copy: {_escaped(str(kept['url'] or kept['source_id']))}  doc_id {kept['doc_id']}{where}", soft_wrap=True
        )
    elif fate["fate"] == "published":
        for g in fate["generations"]:
            out.print(f"  [green]published[/green] in {g['name']}: {g['tokens']} tokens in rows {_ranges(g['rows'])}")
    else:
        out.print(f"  waiting for stage {fate['stage']}")
    if "lines_cut" in fate:
        cut = f"{len(fate['lines_cut']):,} lines or paragraphs ({fate['chars_cut']:,} characters)"
        out.print(f"  lost {cut} that earlier documents have")
    for name, score in fate["scores"].items():
        out.print(f"    {name:<48} {score:.6g}", style="dim")


def _ranges(rows: list[int]) -> str:
    return str(rows[0]) if len(rows) == 1 else f"{min(rows)}-{max(rows)}"


@app.command()
def verify(
    path: Annotated[str, typer.Argument(metavar="PATH", help="a generation, or a run for all of its")], as_json: AsJson = False
) -> None:
    """Re-read the shards of a generation against index and manifest: counts, sizes, hashes. Exit 1 on any fault."""
    from pipeline.verify import verify_path

    with _told():
        results = verify_path(absolute_path(path))
        if as_json:
            print(json.dumps([r._asdict() | {"faults": [f._asdict() for f in r.faults]} for r in results], indent=1))
        for result in results if not as_json else ():
            word = f"[red]{len(result.faults)} faults[/red]" if result.faults else "[green]whole[/green]"
            out.print(
                f"{result.path}: {word}; {result.shards} shards, {result.rows:,} rows, {result.tokens:,} tokens", soft_wrap=True
            )
            for fault in result.faults:
                line = f"  {fault.shard}: {fault.what}: expected {fault.expected}, found {fault.found}"
                out.print(_escaped(line), soft_wrap=True)
        if any(r.faults for r in results):
            raise typer.Exit(1)


@app.command()
def export(
    run: RunFolder,
    stage: Annotated[Kind, typer.Option(help="which documents")],
    format: Annotated[Format, typer.Option(help="file format")] = Format.jsonl,
    output: Annotated[str, typer.Option("-o", "--output", help="file to write")] = "",
) -> None:
    """Write the documents, the keep table, the corpus or the rejected documents of a run to one file."""
    from pipeline.explain import export as write_export

    with _told():
        if not output:
            raise ConfigError("-o PATH is missing: name the file to write")
        count = write_export(absolute_path(run), stage, format=format, output=absolute_path(output))
        err.print(f"{count:,} rows → {_escaped(output)}", soft_wrap=True)


Licence = Annotated[str, typer.Option(help="licence of the sources, for the model's card, e.g. CC-BY-SA-4.0")]


@app.command("train-lm")
def train_lm(
    sources: Annotated[list[Path], typer.Argument(help="texts: .txt, .jsonl[.gz|.zst], .parquet")],
    output: Annotated[Path, typer.Option("-o", "--output", help="model to write; its card lies beside it")],
    licence: Licence,
    order: Annotated[int, typer.Option(help="n-gram order")] = 5,
    prune: Annotated[str, typer.Option(help="drop n-grams seen at most so often, one count per order")] = "0,0,1",
    memory: Annotated[str, typer.Option(help="memory for lmplz, e.g. 4G")] = "1G",
    held_out: Annotated[float, typer.Option(help="share of documents kept out of training")] = 0.02,
    text_column: Annotated[str, typer.Option(help="column of the text in .jsonl and .parquet")] = "text",
) -> None:
    """Train a KenLM model for the filter `perplexity`, with KenLM's lmplz (make kenlm)."""
    from pipeline.models import train_lm as train

    with _told():
        counts = tuple(int(n) for n in prune.split(","))
        train(
            sources,
            output=output,
            licence=licence,
            order=order,
            prune=counts,
            memory=memory,
            held_out=held_out,
            text_column=text_column,
        )


@app.command("train-classifier")
def train_classifier(
    positive: Annotated[list[Path], typer.Option(help="texts to keep; repeat for more")],
    negative: Annotated[list[Path], typer.Option(help="texts to drop; repeat for more")],
    output: Annotated[Path, typer.Option("-o", "--output", help="model to write: .ftz is quantised, .bin whole")],
    licence: Licence,
    epochs: int = 5,
    learning_rate: float = 0.5,
    dimensions: int = 16,
    word_ngrams: int = 2,
    buckets: int = 200_000,
    features: int = 50_000,
    seed: int = 0,
    held_out: Annotated[float, typer.Option(help="share of documents that precision and recall are measured on")] = 0.1,
    text_column: Annotated[str, typer.Option(help="column of the text in .jsonl and .parquet")] = "text",
) -> None:
    """Train a fastText classifier for the filter `quality`. The same texts make the same bytes."""
    from pipeline.models import train_classifier as train

    with _told():
        train(
            positive,
            negative,
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
            text_column=text_column,
        )


def main() -> None:
    """Entry point of `python -m pipeline`."""
    app()


if __name__ == "__main__":
    sys.path.insert(0, os.getcwd())
    main()
