"""Language of a text by a fastText model (lid.176 of Joulin et al. 2016, arXiv:1612.03651, unless another is named)."""

from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from filters import STRICT, Bound

BUNDLED = Path(__file__).parent / "lid.176.ftz"
# fastText's own guess settles within a few thousand characters; more only costs time
MAX_CHARS = 10_000


class Guess(NamedTuple):
    """The most likely language (ISO 639, as the model names it; 'und' for a text without letters) and its probability."""

    language: str
    score: float


@dataclass(frozen=True, config=STRICT)
class Language:
    """Keep documents in the wanted languages, identified with enough certainty.

    `model` is a fastText file, "" the bundled lid.176.ftz; `allowed` names the wanted languages, empty for all;
    `score` bounds the probability of the guess, in [0, 1] (0.65: FineWeb, arXiv:2406.17557). Without `identify` texts have
    no language, and nothing can be asked of it.
    """

    identify: bool = True
    model: str = ""
    allowed: tuple[Annotated[str, Field(min_length=2)], ...] = ("en",)
    score: Bound = (0.65, 1.0)

    @model_validator(mode="after")
    def _bounds_need_a_language(self) -> "Language":
        if not self.identify and (self.allowed or self.score is not None):
            raise ValueError('identify = false leaves nothing to choose by: set allowed = [] and score = "off"')
        return self

    def guess(self, text: str) -> Guess:
        """Identify a text; total on every string."""
        return self.guesses(text, k=1)[0]

    def guesses(self, text: str, *, k: int, max_chars: int = MAX_CHARS) -> list[Guess]:
        """The k most likely languages, likeliest first; [Guess('und', 0.0)] when the text holds nothing to go by."""
        line = " ".join(text[:max_chars].split()).encode("utf-8", "replace").decode()
        labels, scores = _load(self.model or str(BUNDLED)).predict(line, k=k) if line else ((), ())
        found = [Guess(a.removeprefix("__label__"), min(1.0, float(b))) for a, b in zip(labels, scores, strict=True)]
        return found or [Guess("und", 0.0)]

    def probability_allowed(self, guesses: list[Guess]) -> float:
        """Probability in [0, 1] that a text is in one of the wanted languages; 1 when all are wanted."""
        if not self.allowed:
            return 1.0
        return min(1.0, sum(g.score for g in guesses if g.language in self.allowed))


@lru_cache(maxsize=4)
def _load(path: str) -> Any:
    import fasttext

    fasttext.FastText.eprint = lambda *args: None  # it warns on stderr at every load
    return fasttext.load_model(path)
