"""Language of a text by a fastText model (lid.176 of Joulin et al.

2016, arXiv:1612.03651, unless another is named).
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
# fastText's own guess settles within a few thousand characters; more only costs time
MAX_CHARS = 10_000
# Of a line shorter than this lid.176 often takes names and product codes for some other language;
# in bytes of UTF-8, as a Chinese character says more than a letter. And a document is judged by its
# first lines, as many as these characters hold.
MIN_LINE_BYTES = 40
MAX_LINES_CHARS = 100_000
_LETTER = re.compile(r"[^\W\d_]")


class Guess(NamedTuple):
    """The most likely language (ISO 639, as the model names it; 'und' for a text without letters)
    and its probability.
    """

    language: str
    score: float


@dataclass(frozen=True, config=STRICT)
class Language:
    """Keep documents in the wanted languages, identified with enough certainty.

    `model` is a fastText file (GlotLID, OpenLID, ...), "" the bundled lid.176.ftz; `allowed` names
    the wanted languages as the model names them, empty for all; `score` bounds the probability of
    the guess, in [0, 1] (0.65: FineWeb, arXiv:2406.17557). With `measure_lines`, `line_share` is
    the share of the lines, of those with at least MIN_LINE_BYTES bytes and a letter, that are in
    the document's language; 1 when there is none. Without `identify` texts have no language, and
    nothing can be asked of it.
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
        """ValueError when a language is wanted that the model does not know."""
        if not self.identify or (languages == ("en",) and not self.model):
            return  # what is bundled knows what is the default
        labels = [
            label.removeprefix("__label__")
            for label in _load(self.model or str(BUNDLED)).get_labels()
        ]
        for name in languages:
            if name not in labels:
                raise ValueError(
                    f"the model {self.model or 'lid.176.ftz'} has no language '{name}'"
                    f"{did_you_mean(name, labels)}"
                )

    def guess(self, text: str) -> Guess:
        """Identify a text; total on every string."""
        return self.guesses(text, k=1)[0]

    def guesses(self, text: str, *, k: int, max_chars: int = MAX_CHARS) -> list[Guess]:
        """The k most likely languages, likeliest first; [Guess('und', 0.0)] when the text holds
        nothing to go by.
        """
        line = " ".join(text[:max_chars].split()).encode("utf-8", "replace").decode()
        labels, scores = (
            _load(self.model or str(BUNDLED)).predict(line, k=k)
            if _LETTER.search(line)
            else ((), ())
        )
        found = [
            Guess(a.removeprefix("__label__"), min(1.0, float(b)))
            for a, b in zip(labels, scores, strict=True)
        ]
        return found or [Guess("und", 0.0)]

    def line_share_of(self, text: str, language: str) -> float:
        """Share of the lines in `language`, in [0, 1]; too short ones and those without a letter
        are left out; 1 if all are.
        """
        lines = [
            " ".join(line.split())
            for line in text[:MAX_LINES_CHARS].encode("utf-8", "replace").decode().split("\n")
        ]
        told = [
            line for line in lines if len(line.encode()) >= MIN_LINE_BYTES and _LETTER.search(line)
        ]
        if not told:
            return 1.0
        labels, _ = _load(self.model or str(BUNDLED)).predict(told)
        return sum(found[:1] == [f"__label__{language}"] for found in map(list, labels)) / len(told)

    def probability_allowed(self, guesses: list[Guess]) -> float:
        """Probability in [0, 1] that a text is in one of the wanted languages; 1 when all are
        wanted.
        """
        if not self.allowed:
            return 1.0
        return min(1.0, sum(g.score for g in guesses if g.language in self.allowed))


@lru_cache(maxsize=4)
def _load(path: str) -> Any:
    import fasttext

    fasttext.FastText.eprint = lambda *args: None  # it warns on stderr at every load
    return fasttext.load_model(path)
