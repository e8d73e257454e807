"""What all commands share: the application, common arguments, output, and user errors.

Importing the command line loads no heavy library: each command imports what it needs when it runs.
"""

import io
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer import Argument, Exit, Option, Typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    from pipeline.config.sections import Config
    from pipeline.engine.units import RunUnits


class _Commands(TyperGroup):
    """The commands; each prints user errors in one line."""

    def invoke(self, ctx: Any) -> Any:
        # file names and crawled text may hold what is no Unicode
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")
        with user_errors(debug=bool(ctx.meta.get("debug"))):
            return super().invoke(ctx)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Take --debug from anywhere on the command line."""
        ours = args[: args.index("--")] if "--" in args else args
        ctx.meta["debug"] = "--debug" in ours
        return super().parse_args(ctx, [a for a in ours if a != "--debug"] + args[len(ours) :])


app = Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Web archives to training data: curate, train, and size the next batch from the trainer's "
    "throughput. --debug, anywhere, shows the traceback of an error.",
)
# columns that a table of numbers needs; a narrower terminal wraps its lines rather than lose digits
WIDE = 140
INTERRUPTED = 130  # exit code
# a terminal wraps a line, but no line break is added to it
# paths, URLs and errors are printed as they are: what has a style is a Text or a template
PLAIN: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False}
out = Console(soft_wrap=True, **PLAIN)
err = Console(soft_wrap=True, stderr=True, **PLAIN)

Stage = Literal["extract", "dedup", "refine", "pack"]
Kind = Literal["documents", "keep", "corpus", "rejected"]
Format = Literal["jsonl", "parquet"]
Log = Literal["bars", "json"]


def absolute_path(path: str) -> str:
    """`pipeline.config.paths.absolute_path`, imported when it is needed."""
    from pipeline.config import paths

    return paths.absolute_path(path)


ConfigFile = Annotated[Path, Argument(help="TOML file, e.g. configs/quickstart.toml")]
Overrides = Annotated[
    list[str] | None,
    Argument(help="section.key=value, overrides the file", metavar="[SECTION.KEY=VALUE]..."),
]
RunFolder = Annotated[
    str,
    Argument(
        help="run directory (run.directory of the config)", metavar="RUN", callback=absolute_path
    ),
]
Address = Annotated[
    str | None,
    Option(help="Ray cluster to use (default: $RAY_ADDRESS, or else this machine)"),
]
Dashboard = Annotated[
    bool,
    Option(
        "--dashboard",
        help="print the URL of Ray's dashboard, which is started on this machine (extra 'cluster')",
    ),
]
LogAs = Annotated[
    Log,
    Option(
        "--log",
        envvar="GRISTMILL_LOG",
        help="progress on stderr: bars on a terminal, or a JSON line for each unit",
    ),
]
NewLineage = Annotated[
    bool,
    Option(
        "--new-lineage",
        help="publish beside the generations of other inputs that are in the directory",
    ),
]
AsJson = Annotated[bool, Option("--json", help="print JSON for scripts")]


def load_config(
    file: Path | None, overrides: Sequence[str] | None, *, calibrated: bool = True
) -> "Config":
    """`pipeline.config.load.load`, imported when it is needed."""
    from pipeline.config.build import ALIASES
    from pipeline.config.load import load

    config = load(file, overrides or [], calibrated=calibrated)
    for old, new in ALIASES.items():
        if old in config.origins:
            warn(f"{config.origins[old]}: {old} is an old name: write {new}", kind="hint")
    return config


def ray_units(address: str | None, dashboard: bool) -> "RunUnits":
    """Runs units on Ray; prints the URL of its dashboard, if asked, when Ray starts."""
    from pipeline.engine.dispatch import on_ray

    return on_ray(address, show_dashboard=_print_dashboard if dashboard else None)


def _print_dashboard(url: str) -> None:
    where = (
        f"{url} (it asks for what `ray get-auth-token` prints)" if url else "this cluster has none"
    )
    err.print(Text.assemble(("dashboard", "bold"), f" {where}"))


@contextmanager
def user_errors(*, debug: bool = False) -> Iterator[None]:
    """Print errors in one line, and exit with their code; with a traceback only to debug."""
    try:
        yield
    except KeyboardInterrupt:
        fail("interrupted; committed units stay, and the same command resumes", INTERRUPTED)
    except Exception as error:
        # of the command line itself: wrong arguments, exit codes
        if debug or type(error).__module__.startswith("typer"):
            raise
        code = _exit_code(error)
        if code is None:
            fail(f"{_unexpected(error)}; --debug shows where", 1)
        fail(error, code)


def _unexpected(error: Exception) -> str:
    """An error that no message was written for, in a line: Ray's have a traceback in their text."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else 'without a message'}"


def _exit_code(error: Exception) -> int | None:
    """The exit code of a user error; None for any other."""
    from pipeline.engine.lease import Held
    from pipeline.run.execute import RunFailed
    from pipeline.run.publish import PublishError
    from stages.formats.errors import ConfigError
    from trainer.launch import TrainingError

    if isinstance(error, ConfigError):
        return 2
    if isinstance(error, Held):
        return 4
    failures = (RunFailed, PublishError, TrainingError, OSError, ValueError)
    return 1 if isinstance(error, failures) else None


def fail(message: object, code: int) -> NoReturn:
    """Print an error and exit."""
    err.print(Text.assemble(("error", "bold red"), f" {message}"))
    raise Exit(code)


def warn(message: str, *, kind: str = "warning") -> None:
    """Print a warning."""
    err.print(Text.assemble((kind, "yellow"), f" {message}"))


def print_json(value: Any, *, indent: int | None = 1) -> None:
    """Print a value for scripts."""
    from stages.formats.json_output import to_json

    print(to_json(value, indent=indent))


def print_template(name: str, console: Console = out, **values: Any) -> None:
    """Print a template of this package. Only the template has markup: values are plain text."""
    from jinja2 import Environment, StrictUndefined

    from pipeline.report.page import duration, size

    environment = Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
        finalize=lambda value: str(value).translate(_HIDDEN),
    )
    environment.filters |= {"commas": "{:,}".format, "duration": duration, "size": size}
    text = Path(__file__).with_name("templates").joinpath(name).read_text(encoding="utf-8")
    rendered = environment.from_string(text).render(**values)
    styled = Text.from_markup(rendered, emoji=False)
    for code, hidden in _HIDDEN.items():
        styled.plain = styled.plain.replace(hidden, chr(code))
    console.print(styled, end="")


# what starts markup, as noncharacters: rich's own escape() loses backslashes
_HIDDEN = {ord("["): "\ufdd0", ord("\\"): "\ufdd1"}


def print_table(
    headings: Sequence[str], rows: Iterable[Sequence[str | Text]], *, text_columns: int = 1
) -> None:
    """Print a table whose columns after the first `text_columns` hold numbers."""
    table = Table(*headings, box=None, pad_edge=False)
    for column in table.columns[text_columns:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*row)
    print_wide(table)


def print_wide(table: Table) -> None:
    """Print a table without cutting its numbers in a narrow terminal."""
    Console(width=max(out.width, WIDE), **PLAIN).print(table)
