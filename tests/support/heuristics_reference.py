"""The heuristics again, slow and plain, as an oracle: written from the papers with strings, sets
and Counters.

Shared with the fast version: only how a text falls into words and sentences
(tests/filters/test_text.py holds that).
"""

import re
from collections import Counter

from filters.c4 import C4
from filters.fineweb import Fineweb
from filters.gopher_quality import GopherQuality
from filters.text.view import SENTENCE_TERMINAL, TextView


def lines_of(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip() != ""]


def share(part: float, whole: float) -> float:
    return 0.0 if whole == 0 else part / whole


def duplicates(parts: list[str]) -> list[str]:
    return [part for place, part in enumerate(parts) if part in parts[:place]]


def gopher_quality(text: str, filter: GopherQuality) -> dict[str, float]:
    words, lines = TextView(text).words, lines_of(text)
    plain = [word for word in words if any(char.isalnum() for char in word)]
    bullets = [line for line in lines if line.strip()[0] in "•-"]
    trailing = [
        line for line in lines if line.strip().endswith("...") or line.strip().endswith("…")
    ]
    return {
        "word_count": len(plain),
        "mean_word_length": share(len("".join(plain)), len(plain)),
        "hash_ratio": share(text.count("#"), len(words)),
        "ellipsis_ratio": share(len(re.findall(r"\.\.\.|…", text)), len(words)),
        "bullet_line_ratio": share(len(bullets), len(lines)),
        "ellipsis_line_ratio": share(len(trailing), len(lines)),
        "alpha_word_ratio": share(
            len([word for word in words if any(char.isalpha() for char in word)]), len(words)
        ),
        "stop_word_count": len([word for word in filter.stop_words if word in words]),
    }


def gopher_repetition(text: str) -> dict[str, float]:
    words, lines = TextView(text).words, lines_of(text)
    paragraphs = [part for part in re.split("\n\n+", text.strip()) if part]
    scores = {
        "duplicate_line_ratio": share(len(duplicates(lines)), len(lines)),
        "duplicate_paragraph_ratio": share(len(duplicates(paragraphs)), len(paragraphs)),
        "duplicate_line_char_ratio": share(len("".join(duplicates(lines))), len(text)),
        "duplicate_paragraph_char_ratio": share(len("".join(duplicates(paragraphs))), len(text)),
    }
    for n in (2, 3, 4):
        ngrams = Counter(" ".join(words[i : i + n]) for i in range(len(words) - n + 1))
        # the first of equals
        top, count = max(ngrams.items(), key=lambda item: item[1], default=("", 0))
        scores[f"top_{n}gram_char_ratio"] = share(len(top) * count, len(text))
    for n in range(5, 11):
        seen: set[str] = set()
        chars = i = 0
        while i + n <= len(words):
            ngram = " ".join(words[i : i + n])
            if ngram in seen:
                chars += len("".join(words[i : i + n]))
                i += n
            else:
                seen.add(ngram)
                i += 1
        scores[f"duplicate_{n}gram_char_ratio"] = share(chars, len(text))
    return scores


def c4_edit(text: str, filter: C4) -> str:
    kept = []
    for line in text.splitlines():
        line = line.strip()
        words = line.split()
        if len(words) < filter.min_line_words or not words:
            continue
        if any(len(word) > filter.max_word_length for word in words):
            continue
        line = re.sub(r"\[edit\]|\[citation needed\]|\[[0-9]*\]", "", line)
        if filter.require_terminal_punctuation and (
            line[-1:] not in tuple(".?!\"'") or line[-3:] == "..."
        ):
            continue
        if any(phrase in line.lower() for phrase in filter.line_phrases):
            continue
        kept.append(line)
    return "\n".join(kept).strip()


def c4(edited: str) -> dict[str, float]:
    return {
        "sentence_count": TextView(edited).sentence_count,
        "lorem_ipsum_count": len(re.findall("lorem ipsum", edited.lower())),
        "curly_bracket_count": len([char for char in edited if char == "{"]),
    }


def fineweb(text: str, filter: Fineweb) -> dict[str, float]:
    lines = lines_of(text)
    return {
        "line_punct_ratio": share(
            len([s for s in lines if re.match(f"[{SENTENCE_TERMINAL}]", s[-1])]), len(lines)
        ),
        "short_line_ratio": share(
            len([s for s in lines if len(s) <= filter.short_line_length]), len(lines)
        ),
        "duplicate_line_char_ratio": share(
            len("".join(duplicates(lines))), len(text.replace("\n", ""))
        ),
        "newline_ratio": share(text.count("\n"), len(TextView(text).words)),
    }
