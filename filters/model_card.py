"""The card beside a model, `<model>.json`: what it is, how text is normalised for it, and the
digests of its files.

No filter reads a model without its card: the same number means another thing under another
normaliser.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

_TRAINER = {"kenlm": "gristmill train-lm", "fasttext": "gristmill train-classifier"}


def read_card(model: str, *, kind: str, normalizers: tuple[str, ...]) -> dict[str, Any]:
    """The card of a model; ValueError unless it says that the model is of this kind and normalised
    in one of these ways.
    """
    trainer = _TRAINER[kind]
    if not model:
        raise ValueError(
            f"no model is named; train one with `{trainer}`, or name one of those in models/"
        )
    if not Path(model).is_file():
        raise ValueError(f"model {model}: no such file; train one with `{trainer}`")
    card_path = Path(model + ".json")
    if not card_path.is_file():
        raise ValueError(
            f"model {model}: no card at {card_path}, so how its text was normalised is unknown; "
            f"train it with `{trainer}`, which writes the card"
        )
    card = _parsed(card_path)
    if card.get("kind") != kind or card.get("normalizer") not in normalizers:
        found = {name: card.get(name) for name in ("kind", "normalizer")}
        raise ValueError(
            f"model {model}: its card says {found}, this filter needs kind '{kind}' and normalizer "
            f"{' or '.join(map(repr, normalizers))}; retrain it with `{trainer}` or name another model"
        )
    return card


def check_digest(path: Path, expected: Any, *, model: str) -> None:
    """ValueError unless the file holds what the model's card says; reads the whole file."""
    if not path.is_file():
        raise ValueError(
            f"model {model}: {path} is missing, which its card names; put it back or train the model again"
        )
    found = digest(path)
    if found != expected:
        raise ValueError(
            f"model {model}: the sha256 of {path} is {found[:12]}…, its card says {str(expected)[:12]}…: one of them was "
            "replaced; copy model and card together, or train the model again"
        )


def digest(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _parsed(path: Path) -> dict[str, Any]:
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"card {path}: not JSON ({error}); train the model again") from None
    if not isinstance(card, dict):
        raise ValueError(
            f"card {path}: must be an object, is {type(card).__name__}; train the model again"
        )
    return card
