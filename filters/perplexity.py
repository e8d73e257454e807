"""Perplexity of a document under a KenLM model: how unlike the model's own text it reads (CCNet, arXiv:1911.00359).

A perplexity means something only with the model and the normaliser it came from: cut at percentiles of a sample of your
own. It sees word salad, foreign languages and broken encodings; it hardly sees boilerplate.
"""

import json
import math
import re
import unicodedata
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic.dataclasses import dataclass

from filters import STRICT, Bound

BUNDLED = Path(__file__).parents[1] / "models" / "wiki-en.5gram.bin"

# Stored on the card of every model trained on text of `normalize`. Any change to what it returns needs a new number.
NORMALIZER = "ccnet-words-1"

# CCNet's table; its entry for the full-width 1, a slip there, can never apply: digits are replaced first
_PUNCTUATION = str.maketrans(
    dict.fromkeys("„”“«»」「《》", '"')
    | dict.fromkeys("´’", "'")
    | dict.fromkeys("，、", ",")
    | dict.fromkeys("∶：", ":")
    | dict.fromkeys("–━►", "-")
    | {"。": ".", "．": ". ", "…": "...", "—": " - ", "？": "?", "！": "!", "；": ";", "～": "~", "％": "%"}
    | {"（": "(", "）": ")", "〈": "<", "〉": ">", "【": "[", "】": "]"}
    # CCNet deletes control characters, which glues the words around a tab together
    | dict.fromkeys([*range(32), *range(127, 160)], " ")
)
_DIGIT = re.compile(r"\d")
_WORD_OR_MARK = re.compile(r"\w+(?:'\w+)*|[^\w\s]")


@dataclass(frozen=True, config=STRICT)
class Perplexity:
    """Keep documents that a language model finds neither too strange nor too predictable (Wenzek et al. 2019).

    `model` is a KenLM binary with its card beside it, "" the bundled English one. `perplexity` is per word and mark,
    at least 1 but for rounding; NaN for a text without any.
    """

    model: str = ""
    perplexity: Bound = (0.0, math.inf)

    def measure(self, view: Any) -> dict[str, float]:
        return {"perplexity": perplexity(view.text, _load(self.model or str(BUNDLED)))}


def perplexity(text: str, model: Any) -> float:
    """10 ** (-sum of the lines' log10 scores / sum of their lengths), a line's length being its tokens and its end.

    As CCNet computes it, but for lines without a word or mark, which are left out: they are layout, and a model that
    never saw an empty line would find it most surprising. NaN if no line is left.
    """
    log10, length = 0.0, 0
    for line in text.split("\n"):
        tokens = normalize(line)
        if tokens:
            log10 += model.score(tokens)
            length += tokens.count(" ") + 2
    if not length:
        return math.nan
    return float(10.0 ** (-log10 / length))


def normalize(line: str) -> str:
    """A line as CCNet normalises it, then cut into words and marks, which single spaces part.

    Lower case, accents off, digits 0, Unicode punctuation as ASCII. CCNet hands that to SentencePiece; here it
    stays words.
    """
    line = line.lower()
    if not line.isascii():
        # lone surrogates cannot be encoded for KenLM
        line = unicodedata.normalize("NFD", line.encode("utf-8", "replace").decode())
        line = "".join(c for c in line if c.isascii() or unicodedata.category(c) != "Mn")
    line = _DIGIT.sub("0", line).translate(_PUNCTUATION)
    return " ".join(_WORD_OR_MARK.findall(line))


def read_card(model: str, *, kind: str, normalizer: str) -> dict[str, Any]:
    """The card beside a model; ValueError unless it is there and says that the model is one this filter can use."""
    if not Path(model).is_file():
        raise ValueError(f"model {model}: no such file; train one with `gristmill train-{_TRAINER[kind]}`")
    card_path = Path(model + ".json")
    if not card_path.is_file():
        raise ValueError(
            f"model {model}: no card at {card_path}, so how its text was normalised is unknown; "
            f"train it with `gristmill train-{_TRAINER[kind]}`, which writes the card"
        )
    card: dict[str, Any] = json.loads(card_path.read_text(encoding="utf-8"))
    found = {"kind": card.get("kind"), "normalizer": card.get("normalizer")}
    if found != {"kind": kind, "normalizer": normalizer}:
        raise ValueError(
            f"model {model}: its card says {found}, this filter needs kind '{kind}' and normalizer '{normalizer}'; "
            f"retrain it with `gristmill train-{_TRAINER[kind]}` or name another model"
        )
    return card


_TRAINER = {"kenlm": "lm", "fasttext": "classifier"}


@lru_cache(maxsize=4)
def _load(path: str) -> Any:
    import kenlm

    read_card(path, kind="kenlm", normalizer=NORMALIZER)
    return kenlm.Model(path)
