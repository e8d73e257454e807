"""Commands of the trainer."""

import json
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from pipeline.cli import AsJson, ConfigFile, Overrides, app, fail, out, print_wide, user_errors

command = partial(app.command, rich_help_panel="Training")


@command()
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    ray: Annotated[
        bool,
        typer.Option(
            help="workers of Ray Train, restarted when one dies; --no-ray: this process alone"
        ),
    ] = True,
) -> None:
    """Train a model on published generations, from its last checkpoint if it has one.

    Ranks of torchrun train together.
    """
    from pipeline.config.train import load_training
    from pipeline.report.training import write_training_page
    from trainer.launch import TrainingError, launch

    with user_errors():
        settings = load_training(config, overrides or [])
        try:
            ended = launch(settings, on_ray=ray)
        except TrainingError as error:
            fail(error, 1)
        loss = f"loss {ended.loss:.4f} nats a token"
        out.print(f"{ended.steps:,} steps, {loss}; {ended.reason}", soft_wrap=True)
        if ended.metrics and (page := write_training_page(ended.metrics)):
            out.print(f"plot {escape(str(page))}", soft_wrap=True)


@command("why-step")
def why_step_command(
    directory: Annotated[Path, typer.Argument(help="directory of a training", metavar="TRAINING")],
    step: Annotated[int, typer.Argument(help="the step, as in metrics.jsonl", min=1)],
    as_json: AsJson = False,
) -> None:
    """Print the rows and documents of a training step; of a loss spike by falling loss."""
    from trainer.launch import TrainingError, why_step

    with user_errors():
        try:
            rows = why_step(directory, step)
        except TrainingError as error:
            fail(error, 1)
        if as_json:
            print(
                json.dumps(
                    [
                        row._asdict() | {"documents": [d._asdict() for d in documents]}
                        for row, documents in rows
                    ]
                )
            )
            return
        headings = ("generation", "row", "loss", "tokens", "document", "URL")
        table = Table(*headings, box=None, padding=(0, 2, 0, 0))
        for row, documents in rows:
            for document in documents:
                loss = "" if row.loss is None else f"{row.loss:.3f}"
                location = (row.generation, f"{row.row:,}", loss, f"{document.length:,}")
                table.add_row(*location, str(document.doc_id), escape(document.url or ""))
        print_wide(table)


@command("export-model")
def export_model(
    training: Annotated[
        str, typer.Argument(help="directory of a training, or folder or URL of its checkpoints")
    ],
    output: Annotated[
        str, typer.Argument(help="folder or URL to write config.json and model.safetensors to")
    ],
    step: Annotated[
        int | None, typer.Option(help="step of the checkpoint (default: the newest)")
    ] = None,
) -> None:
    """Write a checkpoint's weights as transformers loads them:
    LlamaForCausalLM.from_pretrained(OUTPUT).
    """
    from trainer.launch import TrainingError, export

    with user_errors():
        try:
            exported = export(training, output, step=step)
        except TrainingError as error:
            fail(error, 1)
        out.print(f"step {exported:,} written to {escape(output)}", soft_wrap=True)
