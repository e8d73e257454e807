"""Write the files of a trained model, and the card that describes it.

The files are written under temporary names, then renamed together, the card last. A card lies
beside its model as `<model>.json`: what it was trained on (with digests), how the text was
normalized, the license, the command, and how it does on held-out documents. It has no time in it:
the same run makes the same bytes.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import re
import shlex
import tempfile
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from stages.storage.digests import file_sha256
from stages.storage.files import write_atomically

_KINDS = ("kenlm", "fasttext", "blocks", "tokenizer")


def card_path(model: Path) -> Path:
    return Path(f"{model}.json")


@contextlib.contextmanager
def replacing(*outputs: Path, sources: Sequence[str | Path]) -> Iterator[tuple[Path, ...]]:
    """Temporary paths; those that were written become `outputs`, which are in one folder, on
    success. The first is the model.

    ValueError at once if that would replace a source, or anything but a model that has a card. The
    old card is deleted before anything is replaced, so that no card describes another model.
    """
    card = _card_beside(outputs[0])
    check_outputs(
        (*outputs, card_path(outputs[0])),
        sources,
        kind="a model with a card of ours",
        is_ours=lambda path: bool(card) and ("sentencepiece" in card or path not in outputs[1:]),
    )
    folder = outputs[0].parent
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=folder) as scratch:
        temporary = tuple(Path(scratch, output.name) for output in outputs)
        yield temporary
        card_path(outputs[0]).unlink(missing_ok=True)
        for written, output in zip(temporary, outputs, strict=True):
            if written.exists():
                written.replace(output)
            else:
                output.unlink(missing_ok=True)


def check_outputs(
    outputs: Sequence[Path],
    sources: Sequence[str | Path],
    *,
    kind: str,
    is_ours: Callable[[Path], bool],
) -> None:
    """ValueError if to write `outputs` would replace a source, or anything but what `is_ours`, of
    this `kind`.
    """
    model = outputs[0]
    if re.match(r"[A-Za-z][\w+.-]*:/", str(model)):
        url = str(model).replace(":/", "://", 1)  # pathlib made one slash of them
        raise ValueError(
            f"output {url}: is a URL; filters read it from a path that every worker has"
        )
    if model.is_dir():
        raise ValueError(f"output {model}: is a folder; name a file in it")
    for path in filter(Path.exists, outputs):
        for source in filter(os.path.exists, sources):
            if path.samefile(source):
                raise ValueError(
                    f"output {path}: is the source {source}, which it would replace; "
                    "choose another name"
                )
        if path.is_dir() or not is_ours(path):
            raise ValueError(
                f"output {path}: exists, and is not {kind}; remove it or choose another name"
            )


def _card_beside(model: Path) -> dict[str, Any]:
    """The card of a model; empty if there is none, or it is not ours."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        card = json.loads(card_path(model).read_text(encoding="utf-8"))
        if isinstance(card, dict) and card.get("kind") in _KINDS:
            return card
    return {}


def write_card(model: Path, **facts: Any) -> dict[str, Any]:
    """Write the card of a model that is in place; returns it."""
    card = {"name": model.name, **facts, "sha256": file_sha256(model)}
    text = _compact(json.dumps(card, indent=2, ensure_ascii=False)) + "\n"
    write_atomically(str(card_path(model)), text.encode())
    return card


def _compact(text: str) -> str:
    """Lists of numbers on one line each; no string in JSON holds a line break."""
    return re.sub(
        r"\[\n[^\[\]{}\"]*\]",
        lambda m: re.sub(r"\s+", " ", m[0]).replace("[ ", "[").replace(" ]", "]"),
        text,
    )


def versions(*packages: str) -> dict[str, str]:
    # the normalizers use Unicode's tables of digits, accents and letters
    return {p: importlib.metadata.version(p) for p in packages} | {
        "unicode": unicodedata.unidata_version
    }


def is_held_out(text: str, *, share: float) -> bool:
    """Whether a document is kept out of training; by its hash, so that equal ones stay together."""
    # repr, because lone surrogates cannot be encoded
    return int.from_bytes(hashlib.sha256(repr(text).encode()).digest()[:8], "big") < share * 2**64


def check_split(
    num_held_out: int,
    num_train: int,
    *,
    held_out: float,
    sources: Iterable[str | Path],
    of: str = "",
) -> None:
    """ValueError unless there are documents on both sides."""
    if not num_held_out or not num_train:
        in_txt = any(".txt" in Path(source).suffixes for source in sources)
        raise ValueError(
            f"held_out = {held_out}: of {num_held_out + num_train} documents{of} {num_held_out} "
            f"are held out and {num_train} left to train on; both need some, so add text or choose "
            "another share" + ("; documents in .txt are separated by blank lines" if in_txt else "")
        )


def command_line(name: str, options: Any) -> str:
    """The command for a shell, from the dataclass of its options; empty ones are left out."""
    words = ["gristmill", name]
    for option, value in vars(options).items():
        for item in value if isinstance(value, list) else [value]:
            flag = option.replace("_", "-")
            if option in ("sources", "pages"):
                words += [str(item)] if item is not None else []
            elif isinstance(item, bool):
                words.append(f"--{flag}" if item else f"--no-{flag}")
            elif item not in (None, ""):
                words += [f"--{flag}", str(item)]
    return shlex.join(words)
