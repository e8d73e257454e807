"""Commands of the trainer."""

from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from pipeline.cli import AsJson, ConfigFile, Overrides, app, out, print_json, print_table

command = partial(app.command, rich_help_panel="Training")


@command()
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    ray: Annotated[
        bool,
        Option(help="workers of Ray Train, restarted when one dies; --no-ray: this process alone"),
    ] = True,
    branch: Annotated[
        str | None,
        Option(
            help="start from a checkpoint of another training, its directory or checkpoints",
            metavar="RUN@STEP",
        ),
    ] = None,
    profile: Annotated[
        bool,
        Option(help="profile three steps: a trace, and on GPUs a memory snapshot, in profile/"),
    ] = False,
) -> None:
    """Train a model on published generations, from its last checkpoint if it has one.

    Ranks of torchrun train together.
    """
    from pipeline.config.train import load_training
    from pipeline.report.training import write_training_page
    from trainer.launch import launch

    changes = [
        *(overrides or []),
        *([f"branch={branch}"] if branch else []),
        *(["telemetry.profile_steps=3"] if profile else []),
    ]
    ended = launch(load_training(config, changes), on_ray=ray)
    loss = f"loss {ended.loss:.4f} nats a token"
    out.print(f"{ended.steps:,} steps, {loss}; {ended.reason}")
    if ended.metrics and (page := write_training_page(ended.metrics)):
        out.print(f"plot {page}")


@command("why-step")
def why_step_command(
    directory: Annotated[Path, Argument(help="directory of a training", metavar="TRAINING")],
    step: Annotated[int, Argument(help="the step, as in metrics.jsonl", min=1)],
    as_json: AsJson = False,
) -> None:
    """Print the rows and documents of a training step; of a loss spike by falling loss."""
    from trainer.launch import why_step

    rows = why_step(directory, step)
    if as_json:
        print_json([row._asdict() | {"documents": d} for row, d in rows], indent=None)
        return
    print_table(
        ("generation", "row", "loss", "tokens", "document", "URL"),
        (
            (
                row.generation,
                f"{row.row:,}",
                "" if row.loss is None else f"{row.loss:.3f}",
                f"{document.length:,}",
                str(document.doc_id),
                document.url or "",
            )
            for row, documents in rows
            for document in documents
        ),
        text_columns=6,
    )


@command("export-model")
def export_model(
    training: Annotated[
        str, Argument(help="directory of a training, or folder or URL of its checkpoints")
    ],
    output: Annotated[str, Argument(help="folder or URL to write config.json and safetensors to")],
    step: Annotated[int | None, Option(help="step of the checkpoint (default: the newest)")] = None,
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"],
        Option(help="kind of the numbers; the checkpoint's are float32"),
    ] = "bfloat16",
    shard_gb: Annotated[
        float, Option(help="GB of weights in a file, which is also the memory it takes", min=0.001)
    ] = 5.0,
) -> None:
    """Write a checkpoint's weights as transformers loads them:
    AutoModelForCausalLM.from_pretrained(OUTPUT).
    """
    from trainer.launch import export

    shard_bytes = int(shard_gb * 1e9)
    exported = export(training, output, step=step, dtype=dtype, shard_bytes=shard_bytes)
    out.print(f"step {exported:,} written to {output}")
