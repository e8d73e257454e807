"""What all commands share: the application, the words of the command line, and how errors are told."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from pipeline.config.sections import Config
from pipeline.engine.lease import Held
from stages.formats.errors import ConfigError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Web archives to training data: curate, train, and let what is eaten size the next batch.",
)
# columns that a table of numbers needs; a narrower terminal wraps its lines rather than lose digits
WIDE = 140
out, err = Console(highlight=False), Console(stderr=True, highlight=False)

Stage = StrEnum("Stage", ["extract", "dedup", "refine", "pack"])
Kind = StrEnum("Kind", ["documents", "keep", "corpus", "rejected"])
Format = StrEnum("Format", ["jsonl", "parquet"])
Log = StrEnum("Log", ["bars", "json"])

ConfigFile = Annotated[Path, typer.Argument(help="TOML file, e.g. configs/quickstart.toml")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="section.key=value, over the file", metavar="[SECTION.KEY=VALUE]..."),
]
RunFolder = Annotated[
    str, typer.Argument(help="run directory (run.directory of the config)", metavar="RUN")
]
Address = Annotated[
    str | None, typer.Option(help="Ray cluster to use (else $RAY_ADDRESS, else this machine)")
]
LogAs = Annotated[
    Log,
    typer.Option(
        "--log",
        envvar="GRISTMILL_LOG",
        help="on stderr: bars on a terminal, or a JSON line for each unit",
    ),
]
INTERRUPTED = 130
AsJson = Annotated[bool, typer.Option("--json", help="print JSON for scripts")]


@contextmanager
def told() -> Iterator[None]:
    """Errors that are the user's to mend are told in a line; anything else is ours, and keeps its
    traceback.
    """
    from pipeline.run.execute import RunFailed
    from pipeline.run.publish import PublishError

    try:
        yield
    except ConfigError as error:
        fail(error, 2)
    except Held as error:
        fail(error, 4)
    except (RunFailed, PublishError, OSError, ValueError) as error:
        fail(error, 1)
    except KeyboardInterrupt:
        fail(
            "interrupted; what was committed stays: the same command goes on from there",
            INTERRUPTED,
        )


def fail(message: object, code: int) -> None:
    err.print(f"[bold red]error[/bold red] {escaped(str(message))}", soft_wrap=True)
    raise typer.Exit(code)


def warn(message: str) -> None:
    err.print(f"[yellow]warning[/yellow] {escaped(message)}", soft_wrap=True)


def escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def progress_of(settings: Config, log: Log) -> Any:
    from pipeline.cli.progress import Bars, JsonLog

    return JsonLog(sys.stderr, settings.run.directory) if log == Log.json else Bars(err)


def print_wide(table: Table) -> None:
    """Print a table of numbers."""
    Console(highlight=False, width=max(out.width, WIDE)).print(table)
