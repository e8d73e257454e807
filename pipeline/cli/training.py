"""Commands of the trainer."""

import json
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from pipeline.cli import AsJson, ConfigFile, Overrides, app, escaped, fail, out, print_wide, told

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
    from trainer.launch import TrainingError, launch

    with told():
        try:
            ended = launch(load_training(config, overrides or []), on_ray=ray)
        except TrainingError as error:
            fail(error, 1)
        out.print(
            f"{ended.steps:,} steps, loss {ended.loss:.4f} nats a token; {ended.reason}",
            soft_wrap=True,
        )
        if ended.plot:
            out.print(f"plot {escaped(str(ended.plot))}", soft_wrap=True)


@command("why-step")
def why_step_command(
    directory: Annotated[Path, typer.Argument(help="directory of a training", metavar="TRAINING")],
    step: Annotated[int, typer.Argument(help="the step, as its figures name it", min=1)],
    as_json: AsJson = False,
) -> None:
    """Print the rows and documents that a training step was taken on; of a spike by falling loss."""
    from trainer.launch import TrainingError, why_step

    with told():
        try:
            blamed = why_step(directory, step)
        except TrainingError as error:
            fail(error, 1)
        if as_json:
            print(
                json.dumps(
                    [
                        row._asdict() | {"documents": [d._asdict() for d in documents]}
                        for row, documents in blamed
                    ]
                )
            )
            return
        table = Table(
            "generation", "row", "loss", "tokens", "document", "URL", box=None, padding=(0, 2, 0, 0)
        )
        for row, documents in blamed:
            for document in documents:
                loss = "" if row.loss is None else f"{row.loss:.3f}"
                where = (row.generation, f"{row.row:,}", loss, f"{document.length:,}")
                table.add_row(*where, str(document.doc_id), escaped(document.url or ""))
        print_wide(table)


@command("export-model")
def export_model(
    training: Annotated[
        str, typer.Argument(help="directory of a training, or folder or URL of its checkpoints")
    ],
    output: Annotated[
        str, typer.Argument(help="folder or URL to write config.json and model.safetensors to")
    ],
    step: Annotated[int | None, typer.Option(help="a checkpoint's step (else the newest)")] = None,
) -> None:
    """Write a checkpoint's weights as transformers loads them:
    LlamaForCausalLM.from_pretrained(OUTPUT).
    """
    from trainer.launch import TrainingError, export

    with told():
        try:
            exported = export(training, output, step=step)
        except TrainingError as error:
            fail(error, 1)
        out.print(f"step {exported:,} written to {escaped(output)}", soft_wrap=True)
