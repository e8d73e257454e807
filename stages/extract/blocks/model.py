"""The model of engine "blocks": which blocks of a page are its main content."""

import gzip
import json
import zlib
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from stages.extract.blocks.features import NAMES, Lexicon, features
from stages.extract.blocks.trees import Trees
from stages.extract.blocks.walk import Blocks

BUNDLED: Final = Path(__file__).parent / "extractor-en.json.gz"
_UNREADABLE: Final = (
    *(OSError, EOFError, zlib.error, ValueError, KeyError, TypeError, OverflowError),
    RecursionError,
)
_DECIMALS: Final = 6  # of probabilities: the last bits of exp() differ between processors


# Blocks are not independent: where one is wrong, its neighbors are. In cross-validation a factor of
# 1.15 costs .001 of F1 and gains 1.3 points of precision on the snippets of trafilatura's
# evaluation; 1.3 costs .0015 more.
CAUTION: Final = 1.2


class Selection(NamedTuple):
    """The blocks of the main text in ascending order, and the word-F1 that it is expected to have
    against a perfect one, in [0, 1].
    """

    blocks: list[int]
    expected_f1: float


@dataclass(frozen=True)
class ExtractorModel:
    """Scores blocks by `trees` over the features that `lexicon` completes."""

    lexicon: Lexicon
    trees: Trees

    def select(self, page: Blocks, url: str) -> Selection:
        """The set of blocks with the best expected F1."""
        columns = features(page, url, self.lexicon)
        probabilities = np.round(self.trees.probabilities(columns), _DECIMALS)
        return best_f1(probabilities, columns[NAMES.index("words")], caution=CAUTION)

    def to_bytes(self) -> bytes:
        """The model as a file: JSON, compressed. The same model gives the same bytes."""
        trees = {name: array.tolist() for name, array in vars(self.trees).items()}
        content = {"features": NAMES, "lexicon": asdict(self.lexicon), "trees": trees}
        return gzip.compress(json.dumps(content, separators=(",", ":")).encode(), mtime=0)

    @classmethod
    def from_bytes(cls, data: bytes) -> "ExtractorModel":
        """Read `to_bytes`. ValueError if it is no such file or for other features."""
        try:
            content: dict[str, Any] = json.loads(gzip.decompress(data))
            names = content["features"]
            lexicon, trees = Lexicon(**content["lexicon"]), content["trees"]
            arrays = Trees(
                np.array(trees["feature"], np.int64),
                np.array(trees["threshold"], np.float32),
                np.array(trees["left"], np.int32),
                np.array(trees["leaves"], np.float64),
            )
        except _UNREADABLE as error:
            raise ValueError(
                f"not a model of gristmill train-extractor: {type(error).__name__}: {error}"
            ) from None
        if names != list(NAMES):
            raise ValueError(
                "the model was trained for other features than this version computes; train it "
                "again with gristmill train-extractor"
            )
        return cls(lexicon, arrays)


def best_f1(
    probabilities: NDArray[np.float64], words: NDArray[Any], *, caution: float = 1.0
) -> Selection:
    """The blocks with the best expected F1, if blocks are independent, and their expected F1.

    They are those above a threshold at half of the F1 that can be reached (Lipton et al. 2014,
    arXiv:1402.1892), so it is enough to try the blocks in the order of their probabilities.
    `caution` raises the threshold by a factor. A page without words has no blocks and 0.
    """
    order = np.argsort(-probabilities, kind="stable")
    ranked = probabilities[order]
    found = np.cumsum(ranked * words[order])
    if not len(found) or found[-1] <= 0:
        return Selection([], 0.0)
    f1 = 2 * found / (np.cumsum(words[order]) + found[-1])
    best = int(np.argmax(f1))
    if caution != 1:
        above = np.searchsorted(-ranked, -caution * f1[best] / 2, side="right")
        best = max(min(best, int(above) - 1), 0)
    return Selection(np.sort(order[: best + 1]).tolist(), round(float(f1[best]), _DECIMALS))


@lru_cache(maxsize=2)
def load_extractor(path: str) -> ExtractorModel:
    """Read a model file, "" for the bundled one; ValueError names the file if it is none."""
    try:
        return ExtractorModel.from_bytes(Path(path or BUNDLED).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path or BUNDLED}: {error}") from None
