"""Quality by a fastText classifier: the probability that a text is of the kind the model was shown as good.

What "good" means is the model's card's to say. The one bundled tells prose from navigation, indexes and listings.
"""

import math
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic.dataclasses import dataclass

from filters import STRICT, Bound
from filters.perplexity import read_card

BUNDLED = Path(__file__).parents[1] / "models" / "quality-en.ftz"

# Stored on the card of every model trained on text of `normalize`. Any change to what it returns needs a new number.
NORMALIZER = "line-lower-1"


@dataclass(frozen=True, config=STRICT)
class Quality:
    """Keep documents that a classifier takes for good ones (as DCLM, Li et al. 2024, arXiv:2406.11794).

    `model` is a supervised fastText model with its card beside it, "" the bundled English one; `label` names its good
    class. `score` is that class's probability, in [0, 1]; NaN for a text without a word.
    """

    model: str = ""
    label: str = "__label__hq"
    score: Bound = (0.0, 1.0)

    def measure(self, view: Any) -> dict[str, float]:
        model = _load(self.model or str(BUNDLED), self.label)
        return {"score": probability(view.text, model, label=self.label)}


def probability(text: str, model: Any, *, label: str) -> float:
    """Probability of `label`, in [0, 1]; NaN for a text without a word."""
    line = normalize(text)
    if not line:
        return math.nan
    # a list, because for a single string other builds of fastText fail under NumPy 2
    labels, scores = model.predict([line], k=-1)
    found = dict(zip(labels[0], scores[0], strict=True))
    # fastText's sums come out a little over 1
    return min(1.0, float(found[label])) if found else math.nan


def normalize(text: str) -> str:
    """The text as one lower-case line: fastText reads a document per line, and takes words on __label__ for labels."""
    text = text.encode("utf-8", "replace").decode().lower().replace("\0", " ").replace("__label__", " ")
    return " ".join(text.split())


@lru_cache(maxsize=4)
def _load(path: str, label: str) -> Any:
    import fasttext

    read_card(path, kind="fasttext", normalizer=NORMALIZER)
    fasttext.FastText.eprint = lambda *args: None  # it warns on stderr at every load
    model = fasttext.load_model(path)
    if label not in model.get_labels():
        raise ValueError(f"model {path}: no label '{label}', only {', '.join(model.get_labels())}; set quality.label")
    return model
