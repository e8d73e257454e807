"""Label the blocks of a page by its gold text, to train and to measure the model."""

import re
from collections import Counter

_WORD = re.compile(r"\w+")


def words_of(text: str) -> list[str]:
    """The words that word-F1 compares: lower-case runs of letters, digits and underscores."""
    return _WORD.findall(text.lower())


def word_f1(text: str, gold: str) -> float:
    """Word-level F1 of two texts as multisets, in [0, 1], as WCXB defines it."""
    a, b = Counter(words_of(text)), Counter(words_of(gold))
    common = (a & b).total()
    return 2 * common / (a.total() + b.total()) if common else 0.0


def gold_shares(texts: list[str], gold: str) -> list[float]:
    """The share of each block's words, in [0, 1], that are part of the gold text.

    The words of page and gold text are aligned in order (longest common subsequence). A word counts
    if a neighbor is matched, too, side by side in both texts, or if the whole block is: single
    words are found everywhere.
    """
    words, ends = [], []
    for text in texts:
        words += words_of(text)
        ends.append(len(words))
    gold_words = words_of(gold)
    matches = _aligned(words, gold_words)
    shares, start = [], 0
    for end in ends:
        at = matches[start:end]
        found = sum(
            place >= 0
            and (
                (i > 0 and at[i - 1] == place - 1 and place > 0)
                or (i + 1 < len(at) and at[i + 1] == place + 1)
            )
            for i, place in enumerate(at)
        )
        if len(at) == 1 or (len(at) and all(place >= 0 for place in at)):
            found = sum(place >= 0 for place in at)
        shares.append(found / len(at) if at else 0.0)
        start = end
    return shares


def _aligned(words: list[str], gold: list[str]) -> list[int]:
    """The place in `gold` of each word in a longest common subsequence, -1 for those outside.

    Bit-parallel (Hyyrö 2004, "Bit-parallel LCS-length computation revisited"): a row of the table
    is an integer with a zero bit where the length grows.
    """
    places: dict[str, int] = {}
    for i, word in enumerate(gold):
        places[word] = places.get(word, 0) | 1 << i
    full = (1 << len(gold)) - 1
    row, rows = full, []
    for word in words:
        matched = row & places.get(word, 0)
        row = ((row + matched) | (row - matched)) & full
        rows.append(row)
    matches, end = [-1] * len(words), len(gold)
    for i in range(len(words) - 1, -1, -1):
        below = (1 << end) - 1
        before = rows[i - 1] if i else full
        lengths = ~rows[i] & below
        if lengths.bit_count() > (~before & below).bit_count():
            end = matches[i] = lengths.bit_length() - 1
    return matches
