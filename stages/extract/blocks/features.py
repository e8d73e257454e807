"""Describe every block of a page by numbers for the model, vectorized over its blocks."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise, repeat
from typing import Any, Final
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from stages.extract.blocks.walk import FLAGS, Blocks

Floats = NDArray[np.float32]

_LEVELS: Final = range(5)  # the element of a block, and its ancestors from the nearest on
_WINDOWS: Final = (3, 8, 20)  # blocks before and after
_LONG: Final = 15  # words of a block that is text and not a label
_CONTAINERS: Final = (0.15, 0.4)  # shares of a page's words
_FLAGS: Final = (
    *("nav", "header", "footer", "aside", "main", "article", "form", "table", "figure", "hidden"),
    *("li", "td", "p", "caption", "dialog"),
)
_TAG_COUNTS: Final = (
    *("p", "li", "h1", "h2", "h3", "article", "form", "button", "table", "pre", "td"),
)
_TYPES: Final = ("article", "newsarticle", "product", "organization", "service", "webpage")

NAMES: Final = (
    *("words", "chars", "lines", "sentence_marks", "score", "score_sum", "title_share"),
    *("title_recall", "link_share", "strong_share", "copies", "ends_sentence", "heading"),
    *("depth", "lowest_name", "highest_name", "sum_of_names"),
    *(f"in_{name}" for name in _FLAGS),
    *(
        f"{name}_{level}"
        for level in _LEVELS
        for name in (
            *("words", "words_share", "words_per_block", "link_share", "score", "punctuation"),
            *("tag", "lowest", "highest", "alike", "words_alike"),
        )
    ),
    *(
        f"{name}_of_{share:.0%}"
        for share in _CONTAINERS
        for name in (
            *("words_share", "words_per_block", "link_share", "score", "punctuation", "lowest"),
            *("highest", "levels", "blocks_since_begin", "blocks_to_end"),
        )
    ),
    *("index", "index_from_end", "words_before", "from_title", "words_from_title"),
    *("from_heading", "heading_words", "long_before", "from_long", "to_long"),
    *(
        f"{name}_{side}_{width}"
        for width in _WINDOWS
        for side in ("before", "after")
        for name in ("words", "links", "score")
    ),
    *("page_words", "page_blocks", "page_words_per_block", "page_link_share", "page_score"),
    *("page_punctuation", "page_elements"),
    *(f"page_{tag}" for tag in _TAG_COUNTS),
    *(f"type_{name}" for name in _TYPES),
    *("og_type", "url_parts", "url_last_words", "url_digits"),
)


@dataclass(frozen=True)
class Lexicon:
    """What training learned of words: the log-odds, against the average, that a block with this
    word is main content. Words that are not listed count 0.

    `words` are words of the text, `names` those of the classes and ids of the elements around it,
    `tags` the tags of the innermost elements.
    """

    words: dict[str, float] = field(default_factory=dict)
    names: dict[str, float] = field(default_factory=dict)
    tags: dict[str, float] = field(default_factory=dict)

    @cached_property
    def scores(self) -> dict[bytes, float]:
        """Of words in UTF-8, and a number of its own for the border between blocks."""
        words = {word.encode("utf-8", "surrogatepass"): x for word, x in self.words.items()}
        return words | {_BORDER.encode("utf-8", "surrogatepass"): _AT_BORDER}

    @cached_property
    def _ranges(self) -> dict[str, tuple[float, float]]:
        return {}

    def range_of(self, name: str) -> tuple[float, float]:
        """The lowest and the highest score among the words of an element's names."""
        known = self._ranges.get(name)
        if known is None:
            if len(self._ranges) > 50_000:
                self._ranges.clear()
            scores = list(map(self.names.get, name_words(name), repeat(0.0))) or [0.0]
            known = self._ranges[name] = (min(scores), max(scores))
        return known


# Between blocks; no character of a text
_BORDER: Final = "\ud800"
_AT_BORDER: Final = 1e9

_NAME_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
_MAX_NAME = 500  # characters


def name_words(name: str) -> list[str]:
    """The words of a class attribute and an id, lower-case: "postBody-2" has post and body."""
    words = _NAME_WORD.findall(name[:_MAX_NAME])
    return words if name.islower() else [word.lower() for word in words]


def features(page: Blocks, url: str, lexicon: Lexicon) -> Floats:
    """A column of numbers per block, (len(NAMES), blocks). Finite for every page and URL."""
    if not page.texts:
        return np.zeros((len(NAMES), 0), np.float32)
    text = _Text.of(page, lexicon)
    elements = _Elements.of(page, text, lexicon)
    rows = [
        _text_rows(page, text, elements),
        *_element_rows(page, text, elements),
        *_position_rows(text, elements),
        *_window_rows(text),
        _page_rows(page, url, text),
    ]
    return np.concatenate(rows, dtype=np.float32, casting="same_kind")


def word_counts(page: Blocks) -> NDArray[np.float64]:
    """The number of words of each block; two characters of a script without spaces are one."""
    return _Text.of(page, Lexicon()).words if page.texts else np.zeros(0)


# --- texts ----------------------------------------------------------------------------------------

_ENDS_SENTENCE = frozenset(".!?…。！？؟।\"”'’)")
# ASCII but for letters, digits and "_" separates words; so the words are found at C's speed
_SEPARATORS = "".join(chr(c) for c in range(128) if not (chr(c).isalnum() or c == ord("_")))
_TO_SPACES = bytes.maketrans(_SEPARATORS.encode(), b" " * len(_SEPARATORS))


def words_in(text: str) -> list[bytes]:
    """The lower-case words of a text, in UTF-8."""
    return _words(_lowered(text))


def _lowered(text: str) -> bytes:
    return text.lower().encode("utf-8", "surrogatepass")


def _words(data: bytes) -> list[bytes]:
    return data.translate(_TO_SPACES).split()


_PART: Final = 4_000_000  # bytes; what a page takes in memory beyond its text is that of a part


def _words_in_parts(data: bytes) -> Iterator[list[bytes]]:
    begin = 0
    while begin < len(data):
        end = data.find(b" ", begin + _PART)
        end = len(data) if end < 0 else end
        yield _words(data[begin:end])
        begin = end


def _joined(texts: list[str]) -> bytes:
    """The texts in lower case, as UTF-8, with a border between them."""
    joined = f" {_BORDER} ".join(texts)
    if joined.count(_BORDER) >= len(texts):
        joined = f" {_BORDER} ".join(text.replace(_BORDER, " ") for text in texts)
    # lower() takes 12 bytes a character for the time being
    return b"".join(_lowered(joined[i : i + _PART]) for i in range(0, len(joined), _PART))


_STOP, _COMMA, _IDEOGRAPH = 1, 2, 3  # classes of bytes in UTF-8


def _class_table() -> NDArray[np.uint8]:
    table = np.zeros(256, np.uint8)
    table[[ord(c) for c in ".!?"]] = _STOP
    table[[ord(c) for c in ",;"]] = _COMMA
    table[0xE3:0xEA] = _IDEOGRAPH  # first bytes of kana and Chinese characters
    return table


_CLASSES = _class_table()

# What a range of blocks holds is a difference between two sums from the beginning of the page.
_WORDS, _CHARS, _LINKED, _MARKS, _SCORE, _BLOCKS = range(6)


@dataclass(slots=True)
class _Text:
    """Of each block: `words` (two characters of a script without spaces are one), `chars`,
    `stops`, `score` (per word), `title_words` that it has; `sums`, (6, blocks + 1).
    """

    words: Any
    chars: Any
    stops: Any
    score: Any
    title_words: Any
    num_title_words: int
    sums: Any

    @classmethod
    def of(cls, page: Blocks, lexicon: Lexicon) -> "_Text":
        texts = page.texts
        data = _joined(texts)
        title = set(words_in(page.head.title))
        count, score_sum, title_words = np.zeros((3, len(texts)))
        text = 0
        for words in _words_in_parts(data):
            size = len(words)
            scores = np.fromiter(map(lexicon.scores.get, words, repeat(0.0)), np.float64, size)
            borders = np.flatnonzero(scores == _AT_BORDER)
            scores[borders] = 0
            in_title = np.fromiter(map(title.__contains__, words), np.float64, size)
            begin = np.concatenate(([0], borders + 1))
            end = np.append(borders, size)
            at = slice(text, text + len(begin))
            count[at] += end - begin
            for held, values in ((score_sum, scores), (title_words, in_title)):
                sums = np.concatenate(([0.0], np.cumsum(values)))
                held[at] += sums[end] - sums[begin]
            text += len(borders)
        marks = _mark_counts(data, len(texts))
        chars = np.fromiter(map(len, texts), np.float64, len(texts))
        num_words = count + marks[_IDEOGRAPH] / 2
        linked = np.asarray(page.link_chars, np.float64)
        sums = np.zeros((6, len(texts) + 1))
        held = [num_words, chars, linked, marks[_COMMA] + marks[_STOP], score_sum]
        np.cumsum([*held, np.ones(len(texts))], axis=1, out=sums[:, 1:])
        score = score_sum / np.maximum(num_words, 1)
        return cls(num_words, chars, marks[_STOP], score, title_words, len(title), sums)


def _mark_counts(data: bytes, texts: int) -> NDArray[np.int64]:
    """The number of bytes of each class in each text, (4, texts); those of no class are not
    counted.
    """
    codes = np.frombuffer(data, np.uint8)
    # no other character has these three bytes
    borders = np.flatnonzero(codes[:-2] == 0xED)
    borders = borders[(codes[borders + 1] == 0xA0) & (codes[borders + 2] == 0x80)]
    counts = np.zeros(4 * texts, np.int64)
    for begin in range(0, len(data), _PART):
        classes = _CLASSES[codes[begin : begin + _PART]]
        places = np.flatnonzero(classes)
        text = np.searchsorted(borders, places + begin)
        counts += np.bincount(text * 4 + classes[places], minlength=4 * texts)
    return counts.reshape(-1, 4).T


def _text_rows(page: Blocks, text: _Text, elements: "_Elements") -> Any:
    n = len(page.texts)
    copies = Counter(page.texts)
    return np.array(
        [
            text.words,
            text.chars,
            [block.count("\n") for block in page.texts],
            text.stops,
            text.score,
            text.score * text.words,
            text.title_words / np.maximum(text.words, 1),
            text.title_words / max(text.num_title_words, 1),
            np.asarray(page.link_chars) / text.chars,
            np.asarray(page.strong_chars) / text.chars,
            [copies[block] for block in page.texts],
            np.fromiter((block[-1] in _ENDS_SENTENCE for block in page.texts), float, n),
            elements.headings,
        ]
    )


# --- elements -------------------------------------------------------------------------------------

_HEADINGS = {f"h{level}": level for level in range(1, 7)}


@dataclass(slots=True)
class _Elements:
    """Of each element: what it holds, `rows` as NAMES lists them per level, and of its names along
    with its ancestors' the `lowest` and `highest` score and their `sums`. `owners` is of blocks.
    """

    owners: Any
    parents: Any
    first: Any
    end: Any
    words: Any
    rows: Any
    depths: Any
    lowest: Any
    highest: Any
    sums: Any
    headings: Any  # levels of the blocks' own elements, 0 for others

    @classmethod
    def of(cls, page: Blocks, text: _Text, lexicon: Lexicon) -> "_Elements":
        owners, parents = np.asarray(page.owners), np.asarray(page.parents)
        first, end = np.asarray(page.first_block), np.asarray(page.end_block)
        held = text.sums[:, end] - text.sums[:, first]
        words = held[_WORDS]
        name, unique_names = _numbered(page.names)
        tag, unique_tags = _numbered(page.tags)
        names = np.array([lexicon.range_of(x) for x in unique_names])[name].T
        tags = np.array([lexicon.tags.get(x, 0.0) for x in unique_tags])[tag]
        keys = (parents * len(unique_tags) + tag) * len(unique_names) + name
        _, kind, alike = np.unique(keys, return_inverse=True, return_counts=True)
        words_alike = np.bincount(kind, weights=words) / alike
        rows = np.array(
            [
                words,
                words / max(words[0], 1),
                words / np.maximum(held[_BLOCKS], 1),
                held[_LINKED] / np.maximum(held[_CHARS], 1),
                held[_SCORE] / np.maximum(words, 1),
                held[_MARKS] / np.maximum(words, 1),
                tags,
                names[0],
                names[1],
                alike[kind],
                words_alike[kind],
            ],
            np.float32,
        )
        depths, lowest, highest, sums = _along_ancestors(page.parents, parents, names)
        levels = np.array([_HEADINGS.get(x, 0) for x in unique_tags])[tag]
        return cls(
            *(owners, parents, first, end, words, rows, depths, lowest, highest, sums),
            levels[owners],
        )


def _numbered(values: list[str]) -> tuple[NDArray[np.int64], list[str]]:
    """For each value its number among the distinct ones, and those, in order."""
    numbers = {value: number for number, value in enumerate(dict.fromkeys(values))}
    return np.fromiter(map(numbers.__getitem__, values), np.int64, len(values)), list(numbers)


def _along_ancestors(parent_list: list[int], parents: Any, names: Any) -> Any:
    """Depths, and the lowest, highest and summed scores of each element and its ancestors."""
    depth = [0] * len(parent_list)
    for element in range(1, len(parent_list)):
        depth[element] = depth[parent_list[element]] + 1
    depths = np.asarray(depth)
    lowest, highest, sums = names[0].copy(), names[1].copy(), names.sum(0)
    order = np.argsort(depths, kind="stable")
    starts = np.searchsorted(depths[order], np.arange(1, depths.max() + 2))
    for begin, end in pairwise(starts):
        at = order[begin:end]
        above = parents[at]
        lowest[at] = np.minimum(lowest[at], lowest[above])
        highest[at] = np.maximum(highest[at], highest[above])
        sums[at] += sums[above]
    return depths, lowest, highest, sums


def _element_rows(page: Blocks, text: _Text, elements: _Elements) -> list[Any]:
    owners = elements.owners
    bits = np.array([[FLAGS.index(name)] for name in _FLAGS])
    rows = [
        np.array([x[owners] for x in (elements.depths, elements.lowest, elements.highest)]),
        elements.sums[None, owners],
        (np.asarray(page.flags)[None, owners] >> bits) & 1,
    ]
    element = owners
    for _ in _LEVELS:
        rows.append(elements.rows[:, element])
        element = elements.parents[element]
    index = np.arange(len(owners))
    for share in _CONTAINERS:
        element = _container(elements, share * elements.words[0])
        extra = [
            elements.lowest[element],
            elements.highest[element],
            elements.depths[owners] - elements.depths[element],
            index - elements.first[element],
            elements.end[element] - index,
        ]
        rows += [elements.rows[1:6, element], np.array(extra)]
    return rows


def _container(elements: _Elements, words: float) -> Any:
    """The innermost ancestor of each block that holds so many words."""
    element = elements.owners
    while True:
        is_small = (elements.words[element] < words) & (element > 0)
        if not is_small.any():
            return element
        element = np.where(is_small, elements.parents[element], element)


# --- places ---------------------------------------------------------------------------------------


def _position_rows(text: _Text, elements: _Elements) -> list[Any]:
    n = len(text.words)
    index, level = np.arange(n), elements.headings
    words_before = text.sums[_WORDS, :-1] / max(text.sums[_WORDS, -1], 1)
    likeness = text.title_words / np.maximum(text.words, 1)
    title = int(np.argmax(np.where(level > 0, 1 + likeness + (level == 1), 0)))
    heading = np.maximum.accumulate(np.where(level > 0, index, -1))
    is_long = text.words >= _LONG
    num_long = np.cumsum(is_long)
    last_long = np.maximum.accumulate(np.where(is_long, index, -1))
    next_long = np.minimum.accumulate(np.where(is_long, index, n + 999)[::-1])[::-1]
    rows = [
        index,
        n - index,
        words_before,
        index - title if level[title] else np.full(n, -999),
        words_before - words_before[title] if level[title] else np.full(n, -9),
        np.where(heading >= 0, index - heading, 999),
        np.where(heading >= 0, text.words[heading], 0),
        num_long / max(num_long[-1], 1),
        index - last_long,
        next_long - index,
    ]
    return [np.array(rows)]


def _window_rows(text: _Text) -> list[Any]:
    n = len(text.words)
    index, rows = np.arange(n), []
    for width in _WINDOWS:
        before, after = np.maximum(index - width, 0), np.minimum(index + 1 + width, n)
        for begin, end in ((before, index), (index + 1, after)):
            held = text.sums[:, end] - text.sums[:, begin]
            links = held[_LINKED] / np.maximum(held[_CHARS], 1)
            score = held[_SCORE] / np.maximum(held[_WORDS], 1)
            rows.append(np.array([held[_WORDS] / width, links, score]))
    return rows


# --- the page -------------------------------------------------------------------------------------

_TYPE = re.compile(r'"@type"\s*:\s*\[?\s*"(\w+)"')
_MAX_TYPES_TEXT = 50_000  # characters
_OG_TYPES = {"": 0.0, "article": 1.0, "website": 2.0, "product": 3.0}
_LETTERS = re.compile(r"[a-z]+")


def _page_rows(page: Blocks, url: str, text: _Text) -> Any:
    total = np.maximum(text.sums[:, -1], 1)
    tags = Counter(page.tags)
    head = page.head
    types = {t.lower() for t in _TYPE.findall(" ".join(head.json_ld)[:_MAX_TYPES_TEXT])}
    og_type = next((m.get("content", "") for m in head.metas if m.get("property") == "og:type"), "")
    try:
        path = urlsplit(url).path.lower()
    except ValueError:
        path = ""
    parts = [part for part in path.split("/") if part]
    values = [
        *(total[_WORDS], total[_BLOCKS], total[_WORDS] / total[_BLOCKS]),
        *(total[_LINKED] / total[_CHARS], total[_SCORE] / total[_WORDS]),
        *(total[_MARKS] / total[_WORDS], len(page.tags)),
        *(tags[tag] for tag in _TAG_COUNTS),
        *(name in types for name in _TYPES),
        _OG_TYPES.get(og_type, 4.0),
        *(len(parts), len(_LETTERS.findall(parts[-1])) if parts else 0),
        sum(c.isdigit() for c in path),
    ]
    column = np.array(values, np.float32)[:, None]
    return np.broadcast_to(column, (len(values), len(page.texts)))
