"""What is printed: external text comes out as it is, whatever markup it looks like."""

import contextlib
import io

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from rich.console import Console
from typer import Exit
from typer.testing import CliRunner

from pipeline import cli
from pipeline.__main__ import app
from pipeline.cli import progress
from pipeline.engine.units import UnitOutcome
from stages.storage.ledger import Commits

# what rich reads as a tag, an emoji or an escape
PIECES = [
    "[/model/a.jsonl]",
    "[bold]",
    "[/]",
    "[x",
    "]",
    "\\",
    ":smile:",
    "[@click=quit]",
    "a",
    " ",
]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=6).map("".join).map(lambda text: f"<{text}>")


def printed(function, *arguments, **options):
    """What a function of the command line prints to either console."""
    stream = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("out", "err"):
            patch.setattr(cli, name, Console(file=stream, soft_wrap=True, width=999, **cli.PLAIN))
        with contextlib.suppress(Exit):
            function(*arguments, **options)
    return stream.getvalue()


@given(TEXTS)
@example("[/model/2013/a.jsonl]")
def test_errors_and_warnings_show_external_text_as_it_is(text):
    assert printed(cli.fail, text, 1) == f"error {text}\n"
    assert printed(cli.warn, text) == f"warning {text}\n"


@given(TEXTS)
def test_a_failed_unit_is_shown_with_its_error_as_it_is(text):
    bars = progress.Bars()
    stream = io.StringIO()
    bars._bars.live.console = Console(file=stream, soft_wrap=True, width=999, **cli.PLAIN)
    bars.begin("extract", run="", units=1, done=Commits())
    bars.advance("extract", UnitOutcome("000001", None, text))
    assert stream.getvalue() == f"failed extract unit 000001: {text}\n"


@given(TEXTS)
def test_templates_escape_their_values(text):
    fault = {"shard": text, "what": "size", "expected": "[/1]", "actual": "[2]"}
    result = {"path": text, "faults": [fault], "shards": 1, "rows": 1, "tokens": 1}
    console = Console(file=(stream := io.StringIO()), soft_wrap=True, width=999, **cli.PLAIN)
    cli.print_template("verify.txt.j2", console, results=[result])
    assert stream.getvalue().splitlines()[1] == f"  {text}: size: expected [/1], found [2]"
    assert stream.getvalue().startswith(f"{text}: 1 faults;")


def test_cells_of_a_table_are_text(monkeypatch, capsys):
    cli.print_table(("name", "[/x]"), [("[/path]", ":smile:")])
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["name", "[/x]"],
        ["[/path]", ":smile:"],
    ]


def test_an_unexpected_error_is_a_line_and_a_traceback_only_to_debug(monkeypatch, tmp_path):
    from pipeline.run import status

    def broken(root):
        raise KeyError("first line\nZeroDivisionError: last line")

    monkeypatch.setattr(status, "run_status", broken)
    result = CliRunner().invoke(app, ["status", str(tmp_path)])
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert result.stderr.startswith("error KeyError: ") and "--debug shows where" in result.stderr
    for arguments in (["--debug", "status", str(tmp_path)], ["status", str(tmp_path), "--debug"]):
        assert isinstance(CliRunner().invoke(app, arguments).exception, KeyError)
