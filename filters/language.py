"""Identify the language of a text with a fastText model.

The default is lid.176 (Joulin et al. 2016, arXiv:1612.03651).
"""

import re
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from filters import STRICT, Bound, File
from filters.suggest import did_you_mean

BUNDLED = Path(__file__).parent / "lid.176.ftz"
# fastText's guess no longer changes after a few thousand characters
MAX_CHARS = 10_000
# In lines shorter than this lid.176 often takes names and product codes for another language. In
# bytes of UTF-8, as a Chinese character carries more than a letter.
MIN_LINE_BYTES = 40
MAX_LINES_CHARS = 100_000  # the shares of lines are those of the beginning of a document
_LETTER = re.compile(r"[^\W\d_]")


class Guess(NamedTuple):
    """A language (ISO 639, as the model names it; 'und' without letters) and its probability."""

    language: str
    score: float


@dataclass(frozen=True, config=STRICT)
class Language:
    """Keep documents in the allowed languages.

    `model` is a fastText file (GlotLID, OpenLID), "" for the bundled lid.176.ftz; `allowed` lists
    languages as the model names them, () for all; `score` bounds the probability of the guess, in
    [0, 1] (0.65: FineWeb, arXiv:2406.17557). With `measure_lines`, `line_share` is the share of
    lines in the document's language among those with at least MIN_LINE_BYTES bytes and a letter; 1
    if there are none. Without `identify` texts have no language and none of this can be bounded.
    """

    identify: bool = True
    model: File = ""
    allowed: tuple[Annotated[str, Field(min_length=2)], ...] = ("en",)
    measure_lines: bool = False
    score: Bound = (0.65, 1.0)
    line_share: Bound = None

    @model_validator(mode="after")
    def _bounds_need_a_language(self) -> "Language":
        if not self.identify and (self.allowed or self.score is not None):
            raise ValueError(
                'identify = false leaves nothing to choose by: set allowed = [] and score = "off"'
            )
        if self.line_share is not None and not (self.identify and self.measure_lines):
            raise ValueError(
                "line_share is bounded but not measured: set language.measure_lines = true"
            )
        return self

    def check(self, languages: tuple[str, ...]) -> None:
        """ValueError if the model does not know one of the languages."""
        if not self.identify or (languages == ("en",) and not self.model):
            return  # the bundled model knows the default language
        labels = [label.removeprefix("__label__") for label in self._classifier.get_labels()]
        for name in languages:
            if name not in labels:
                raise ValueError(
                    f"the model {self.model or 'lid.176.ftz'} has no language '{name}'"
                    f"{did_you_mean(name, labels)}"
                )

    def guess(self, text: str) -> Guess:
        """Identify a text; defined for every string."""
        return self.guesses(text, k=1)[0]

    def guesses(self, text: str, *, k: int, max_chars: int = MAX_CHARS) -> list[Guess]:
        """The k most likely languages, likeliest first; [Guess('und', 0.0)] without letters."""
        line = " ".join(text[:max_chars].split()).encode("utf-8", "replace").decode()
        guesses = []
        if _LETTER.search(line):
            labels, scores = self._classifier.predict(line, k=k)
            guesses = [
                Guess(label.removeprefix("__label__"), min(1.0, float(score)))
                for label, score in zip(labels, scores, strict=True)
            ]
        return guesses or [Guess("und", 0.0)]

    def line_share_of(self, text: str, language: str) -> float:
        """Share of the lines in `language`, in [0, 1], among those long enough and with a letter.

        1 if there are none.
        """
        beginning = text[:MAX_LINES_CHARS].encode("utf-8", "replace").decode()
        lines = [" ".join(line.split()) for line in beginning.split("\n")]
        lines = [x for x in lines if len(x.encode()) >= MIN_LINE_BYTES and _LETTER.search(x)]
        if not lines:
            return 1.0
        labels, _ = self._classifier.predict(lines)
        return sum(list(best)[:1] == [f"__label__{language}"] for best in labels) / len(lines)

    def probability_allowed(self, guesses: list[Guess]) -> float:
        """Probability in [0, 1] that a text is in an allowed language; 1 if all are allowed."""
        if not self.allowed:
            return 1.0
        return min(1.0, sum(g.score for g in guesses if g.language in self.allowed))

    @property
    def _classifier(self) -> Any:
        return _load(self.model or str(BUNDLED))


@lru_cache(maxsize=4)
def _load(path: str) -> Any:
    import fasttext

    fasttext.FastText.eprint = lambda *args: None  # else it warns on stderr at every load
    return fasttext.load_model(path)
