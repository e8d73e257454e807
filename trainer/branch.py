"""Branch a training from a checkpoint of another one: the decay of a "wsd" schedule, for example.

    child: CONFIG with its own directory     parent: RUN, a directory or its checkpoints, at STEP

At its first start a child takes weights, optimizer, position in the data and totals from the
parent's checkpoint, and saves them in its own folder before its first step. From then on it needs
the parent no more: the parent may prune the checkpoint, or be removed. A child that is killed
before that branches again. The parent's folder is only read.
"""

from collections.abc import Mapping
from typing import Any

from stages.storage.digests import bytes_sha256
from stages.storage.files import read_bytes
from trainer.checkpoint import Checkpoints, Saved
from trainer.checkpoint_files import META, checkpoint_folder, committed
from trainer.config import TrainConfig
from trainer.ranks import Ranks
from trainer.telemetry.feedback import Totals


def open_parent(config: TrainConfig, checkpoints: Checkpoints, *, ranks: Ranks) -> Saved:
    """The parent's checkpoint that `config.branch` names, verified by its hashes. Collective.

    `extra` is the parent's but for "parent", which says where the child comes from, and for what
    only grows in "totals": the work of the parent, which the child has not done. ValueError if
    there is no such checkpoint, CheckpointError if it is damaged.
    """
    folder = ranks.on_first(lambda: _parent_folder(config.branch))
    sha256 = ranks.on_first(lambda: bytes_sha256(read_bytes(f"{folder}/{META}")))
    saved = checkpoints.open(folder)
    totals = Totals(**saved.extra["totals"])
    own = totals._replace(tokens_processed=0, useful_seconds=0.0, wall_seconds=0.0, restarts=0)
    record = {
        "branch": config.branch,
        "folder": folder,
        "meta_sha256": sha256,
        "parent": saved.extra.get("parent"),
    }
    extra = {**saved.extra, "totals": own._asdict(), "parent": record}
    return saved._replace(extra=extra)


def check_same_parent(branch: str, record: Mapping[str, Any] | None) -> None:
    """ValueError if a training that resumes was to branch from elsewhere; "" goes on anyway."""
    before = record["branch"] if record else ""
    if branch not in ("", before):
        origin = f"branched from '{before}'" if record else "did not branch"
        raise ValueError(
            f"branch = '{branch}', but the checkpoints here are of a training that {origin}; "
            "restore it, or set another directory and checkpoint.folder"
        )


def _parent_folder(branch: str) -> str:
    training, _, step = branch.rpartition("@")
    folder = checkpoint_folder(training)
    folders = committed(folder)
    if int(step) not in folders:
        raise ValueError(f"{folder} holds checkpoints of the steps {list(folders)}, none of {step}")
    return folders[int(step)]
