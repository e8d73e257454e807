"""Quality by a fastText classifier: the probability that a text is of the kind the model was shown
as good.

What "good" means is the model's card's to say. The one bundled tells prose from navigation, indexes
and listings. A model may have any labels: topics, toxicity, levels.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

from pydantic.dataclasses import dataclass

from filters import STRICT, Bound, File, Measured, model_card

BUNDLED = Path(__file__).parents[1] / "models" / "quality-en.ftz"

# Stored on the card of every model trained on text of `normalize`. Any change to what it returns
# needs a new number.
NORMALIZER = "line-lower-1"
PREFIX = "__label__"  # by which fastText knows a label; names are without it
_LINE_END = "</s>"  # fastText's word for it, which every model has


@dataclass(frozen=True, config=STRICT)
class Quality:
    """Keep documents that a classifier takes for good ones (as DCLM, Li et al. 2024,
    arXiv:2406.11794).

    `model` is a supervised fastText model with its card beside it; `label` names its good class.
    `score` is that class's probability, in [0, 1]; NaN for a text without a word. `likeliest` is
    the most probable label.
    """

    notes: ClassVar[tuple[str, ...]] = ("likeliest",)
    tallied: ClassVar[tuple[str, ...]] = ("likeliest",)

    model: File = ""
    label: str = "hq"
    score: Bound = (0.0, 1.0)

    def measure(self, view: Any) -> Measured:
        (found,) = predict([view.text], load(self.model))
        return {
            "score": found[self.label] if found else math.nan,
            "likeliest": next(iter(found), None),
        }

    def check(self, languages: tuple[str, ...]) -> None:
        """That the model is there, is the one that its card describes, and has the label."""
        card = model_card.read_card(self.model, kind="fasttext", normalizers=(NORMALIZER,))
        model_card.check_digest(Path(self.model), card.get("sha256"), model=self.model)
        check_label(self.label, load(self.model), path=self.model)


def probabilities(texts: Sequence[str], model: Any, *, label: str) -> list[float]:
    """Probability of `label` for each text, in [0, 1]; NaN for a text without a word."""
    return [found.get(label, math.nan) for found in predict(texts, model)]


def predict(texts: Sequence[str], model: Any) -> list[dict[str, float]]:
    """The labels of a model, likeliest first, and their probabilities, in [0, 1], for each text.

    None for a text without a word that the model knows: of such fastText would say what it says of
    an empty line.
    """
    lines = [line if _is_known(line, model) else "" for line in map(normalize_for_fasttext, texts)]
    # a list, because for a single string other builds of fastText fail under NumPy 2
    predicted = zip(*model.predict(lines, k=-1), strict=True) if lines else ()
    return [
        _probabilities(labels, found) if line and len(labels) else {}
        for line, (labels, found) in zip(lines, predicted, strict=True)
    ]


def _is_known(line: str, model: Any) -> bool:
    """Whether a word of the line, or a part of one, has a vector of its own."""
    return any(len(model.get_subwords(word)[1]) for word in line.split() if word != _LINE_END)


def _probabilities(labels: Sequence[str], found: Sequence[float]) -> dict[str, float]:
    """fastText adds 1e-5 to each, in 32 bits, so that half of all good pages have the same one,
    near 1.

    What the others leave is exact to 1e-11, and tells those pages apart: the best 5 % can be cut
    off.
    """
    exact = {
        label.removeprefix(PREFIX): min(1.0, max(0.0, float(p) - 1e-5))
        for label, p in zip(labels, found, strict=True)
    }
    likeliest, *others = exact
    if exact[likeliest] > 0.5:
        exact[likeliest] = max(0.0, 1.0 - sum(exact[label] for label in others))
    return exact


def normalize_for_fasttext(text: str) -> str:
    """The text as one lower-case line: fastText reads a document per line, and takes words on
    __label__ for labels.
    """
    text = text.encode("utf-8", "replace").decode().lower().replace("\0", " ").replace(PREFIX, " ")
    return " ".join(text.split())


@lru_cache(maxsize=64)  # a model per language of a run
def load(path: str) -> Any:
    """A model that its card says can be used; once per process."""
    model_card.read_card(path, kind="fasttext", normalizers=(NORMALIZER,))
    return load_bare(path)


def load_bare(path: str) -> Any:
    import fasttext

    fasttext.FastText.eprint = lambda *args: None  # it warns on stderr at every load
    return fasttext.load_model(path)


def check_label(label: str, model: Any, *, path: str) -> None:
    """ValueError unless the model has the label."""
    known = sorted(found.removeprefix(PREFIX) for found in model.get_labels())
    if label not in known:
        raise ValueError(
            f"model {path}: no label '{label}', only {', '.join(known)}; set the label to one of them"
        )
