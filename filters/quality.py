"""Quality by a fastText classifier: the probability that a text is of the class 'good'.

The model's card describes what "good" means. The bundled model tells prose from navigation, indexes
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

# Stored on the card of every model. Any change to `normalize_for_fasttext` needs a new number.
NORMALIZER = "line-lower-1"
PREFIX = "__label__"  # of labels in fastText's files; label names are without it
_LINE_END = "</s>"  # fastText's word, in every model


@dataclass(frozen=True, config=STRICT)
class Quality:
    """Keep documents that a classifier rates as good (DCLM, Li et al. 2024, arXiv:2406.11794).

    `model` is a supervised fastText model with its card beside it; `label` is its good class.
    `score` is that class's probability, in [0, 1]; NaN for a text without a word. `likeliest` is
    the most probable label.
    """

    notes: ClassVar[tuple[str, ...]] = ("likeliest",)
    tallied: ClassVar[tuple[str, ...]] = ("likeliest",)

    model: File = ""
    label: str = "hq"
    score: Bound = (0.0, 1.0)

    def measure(self, view: Any) -> Measured:
        (labels,) = predict([view.text], load(self.model))
        return {
            "score": labels[self.label] if labels else math.nan,
            "likeliest": next(iter(labels), None),
        }

    def check(self, languages: tuple[str, ...]) -> None:
        """ValueError unless the model exists, matches its card and has the label."""
        card = model_card.read_card(self.model, kind="fasttext", normalizers=(NORMALIZER,))
        model_card.check_digest(Path(self.model), card.get("sha256"), model=self.model)
        check_label(self.label, load(self.model), path=self.model)


def probabilities(texts: Sequence[str], model: Any, *, label: str) -> list[float]:
    """Probability of `label` for each text, in [0, 1]; NaN for a text without a word."""
    return [labels.get(label, math.nan) for labels in predict(texts, model)]


def predict(texts: Sequence[str], model: Any) -> list[dict[str, float]]:
    """For each text the labels of a model and their probabilities, in [0, 1], likeliest first.

    Empty for a text without a known word, for which fastText returns what it does for an empty
    line.
    """
    lines = [line if _is_known(line, model) else "" for line in map(normalize_for_fasttext, texts)]
    # a list, because for a single string other builds of fastText fail under NumPy 2
    predicted = zip(*model.predict(lines, k=-1), strict=True) if lines else ()
    return [
        _exact_probabilities(labels, rounded) if line and len(labels) else {}
        for line, (labels, rounded) in zip(lines, predicted, strict=True)
    ]


def _is_known(line: str, model: Any) -> bool:
    """Whether a word of the line, or a part of one, has a vector of its own."""
    return any(len(model.get_subwords(word)[1]) for word in line.split() if word != _LINE_END)


def _exact_probabilities(labels: Sequence[str], rounded: Sequence[float]) -> dict[str, float]:
    """Undo fastText's rounding: it adds 1e-5 in 32 bits, so half of all good pages get the same.

    1 minus the other labels' probabilities is exact to 1e-11 and separates those pages, so that a
    bound can keep the best 5 %.
    """
    exact = {
        label.removeprefix(PREFIX): min(1.0, max(0.0, float(p) - 1e-5))
        for label, p in zip(labels, rounded, strict=True)
    }
    likeliest, *others = exact
    if exact[likeliest] > 0.5:
        exact[likeliest] = max(0.0, 1.0 - sum(exact[label] for label in others))
    return exact


def normalize_for_fasttext(text: str) -> str:
    """The text as one lower-case line without __label__, which fastText would read as a label."""
    text = text.encode("utf-8", "replace").decode().lower().replace("\0", " ").replace(PREFIX, " ")
    return " ".join(text.split())


@lru_cache(maxsize=64)  # a model per language of a run
def load(path: str) -> Any:
    """A model whose card fits this filter; once per process."""
    model_card.read_card(path, kind="fasttext", normalizers=(NORMALIZER,))
    return load_bare(path)


def load_bare(path: str) -> Any:
    """A fastText model, without looking for a card."""
    import fasttext

    fasttext.FastText.eprint = lambda *args: None  # else it warns on stderr at every load
    return fasttext.load_model(path)


def check_label(label: str, model: Any, *, path: str) -> None:
    """ValueError unless the model has the label."""
    known = sorted(name.removeprefix(PREFIX) for name in model.get_labels())
    if label not in known:
        raise ValueError(
            f"model {path}: no label '{label}', only {', '.join(known)}; "
            "set the label to one of them"
        )
