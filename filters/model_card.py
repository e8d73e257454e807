"""Read the card beside a model, `<model>.json`: its kind, its normalizer and its files' digests.

No filter reads a model without its card, as scores depend on how the text was normalized.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

_TRAINER = {"kenlm": "gristmill train-lm", "fasttext": "gristmill train-classifier"}


def read_card(model: str, *, kind: str, normalizers: tuple[str, ...]) -> dict[str, Any]:
    """The card of a model; ValueError unless it has this kind and one of these normalizers."""
    trainer = _TRAINER[kind]
    if not model:
        raise ValueError(f"no model is named; train one with `{trainer}`, or name one in models/")
    if not Path(model).is_file():
        raise ValueError(f"model {model}: no such file; train one with `{trainer}`")
    card_path = Path(model + ".json")
    if not card_path.is_file():
        raise ValueError(
            f"model {model}: no card at {card_path}, so its normalizer is unknown; "
            f"train it with `{trainer}`, which writes the card"
        )
    card = _parse_card(card_path)
    if card.get("kind") != kind or card.get("normalizer") not in normalizers:
        actual = {name: card.get(name) for name in ("kind", "normalizer")}
        raise ValueError(
            f"model {model}: its card says {actual}, this filter needs kind '{kind}' and "
            f"normalizer {' or '.join(map(repr, normalizers))}; "
            f"retrain it with `{trainer}` or name another model"
        )
    return card


def check_digest(path: Path, expected: Any, *, model: str) -> None:
    """ValueError unless the file has the sha256 on the model's card; reads the whole file."""
    if not path.is_file():
        raise ValueError(
            f"model {model}: {path} is missing, which its card names; "
            "put it back or train the model again"
        )
    actual = digest(path)
    if actual != expected:
        raise ValueError(
            f"model {model}: the sha256 of {path} is {actual[:12]}…, its card says "
            f"{str(expected)[:12]}…: one of them was replaced; "
            "copy model and card together, or train the model again"
        )


def digest(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _parse_card(path: Path) -> dict[str, Any]:
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"card {path}: not JSON ({error}); train the model again") from None
    if not isinstance(card, dict):
        raise ValueError(
            f"card {path}: must be an object, is {type(card).__name__}; train the model again"
        )
    return card
