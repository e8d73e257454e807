"""Write the selected blocks of a page as text or as Markdown, with their structure.

A line is a paragraph, a heading, a list item or a table row; blank lines separate what readers see
as separate, but not the items of a list or the rows of a table: they are one paragraph to the
filters. Text differs from Markdown in what a rule or a word count would take for content:

- Cells are separated by tabs, and list items have no marks, only an indentation where lists are
  nested: "|" and "-" would be words without letters. With them 5 more of 200 pages of wcxb-500 fail
  `gopher_quality.alpha_word_ratio`. Numbers of items would be words: of 239 ordered lists in the
  gold texts of WCXB 67 have them.
- Headings, quotations and code have no marks.

Neither format adds words, except the numbers and the languages of code in Markdown.
"""

import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from stages.extract.blocks.walk import FLAGS, Blocks

# Larger cells are parts of a layout, not of a table
MAX_CELL_BLOCKS: Final = 4
MAX_CELL_CHARS: Final = 500

_PRE = 1 << FLAGS.index("pre")
_HEADINGS = frozenset(("h1", "h2", "h3", "h4", "h5", "h6"))
_LISTS = frozenset(("ul", "ol", "menu", "dir", "dl"))
_ITEMS = frozenset(("li", "dt", "dd"))
_CELLS = frozenset(("td", "th"))
_PLACED = _HEADINGS | _LISTS | _ITEMS | _CELLS | {"blockquote", "table", "caption"}
# within an item these begin a new paragraph; other blocks are its next line
_PARAGRAPHS = frozenset(("p", "pre", "blockquote"))

# At the start of a line these would swallow the rest of the document or turn it into a heading. A
# line that begins with "- ", "1." or ">" is left as its author typed it: a list or a quotation.
_ACCIDENTS = re.compile(r"^(?=#{1,6}(?:\s|$)|```|~~~|(?:=+|-{2,})\s*$)", re.MULTILINE)
_BACKTICKS = re.compile(r"`{3,}")
# by Sphinx, GitHub, Pandoc and the scripts that color code
_CLASS = (
    r"(?:^|\s)(?:language-|highlight-source-|highlight-(?=\S+\s+notranslate)"
    r"|sourceCode\s+(?:number\w+\s+)?(?!cb\d){})([\w+#.-]+)"
)
_LANGUAGE = re.compile(_CLASS.format(r"|lang-|lang:|brush:\s*|hljs\s+(?!lang)"))
_LANGUAGE_OF_WRAPPER = re.compile(_CLASS.format(""))
_NO_LANGUAGES = frozenset(("default", "none", "notranslate", "nohighlight", "plaintext", "text"))
_INDENT = 2  # spaces by which lists within lists are indented in text
_MAX_NESTING = 16  # lists and quotations that are nested deeper are parts of the one around them
_WRAPPERS = 3  # elements around <pre> whose class may name the language


class Rendered(NamedTuple):
    """A text, and the ranges of its characters that come from <pre>, in order. In Markdown a range
    includes the fence.
    """

    text: str
    code: tuple[tuple[int, int], ...]


def render(page: Blocks, selected: Sequence[int], *, markdown: bool) -> Rendered:
    """The text of some blocks of a page, given by their indices in ascending order."""
    parts: list[str] = []
    code: list[tuple[int, int]] = []
    length = 0
    before: _Chunk | None = None
    for chunk in _Layout(page, markdown).chunks(selected):
        if before is not None:
            separator = _separator(before, chunk, markdown)
            parts.append(separator)
            length += len(separator)
        parts.append(chunk.text)
        if chunk.kind == "code":
            code.append((length, length + len(chunk.text)))
        length += len(chunk.text)
        before = chunk
    return Rendered("".join(parts), tuple(code))


class _Place(NamedTuple):
    """What surrounds an element; -1 is none."""

    # quotations and list items, outermost first, with their tags
    containers: tuple[tuple[int, str], ...] = ()
    outer_list: int = -1  # the outermost list
    table: int = -1
    cell: int = -1
    heading: str = ""


_NOWHERE = _Place()


class _Chunk(NamedTuple):
    """A part of the text that is not cut: a block, or the rows of a table."""

    text: str
    kind: str  # text, heading, code or table
    place: _Place
    begins_item: bool = False
    tag: str = ""


def _separator(before: _Chunk, chunk: _Chunk, markdown: bool) -> str:
    """A line break within a list, a blank line elsewhere."""
    a, b = before.place, chunk.place
    if b.outer_list >= 0 and a.outer_list == b.outer_list and before.kind == chunk.kind == "text":
        # an item begins behind a blank line if the one before has paragraphs
        last = before if chunk.begins_item else chunk
        if last.begins_item or last.tag not in _PARAGRAPHS:
            return "\n"
    if not markdown or not a.containers or not b.containers:
        return "\n\n"
    shared = ""
    for (element, tag), (other, _) in zip(a.containers, b.containers, strict=False):
        if element != other:
            break
        shared += "> " if tag == "blockquote" else "  "
    return f"\n{shared.rstrip()}\n"


class _Layout:
    """Where the blocks of a page stand, and what has been written of its lists."""

    def __init__(self, page: Blocks, markdown: bool) -> None:
        self.page, self.markdown = page, markdown
        self.places: dict[int, _Place] = {0: _NOWHERE}
        self.begun: dict[int, int] = {}  # widths of the markers of the items that have begun
        self.ordinals: dict[int, int] | None = None

    def chunks(self, selected: Sequence[int]) -> Iterator[_Chunk]:
        """The text in parts, in order."""
        owners, not_grids = self.page.owners, set[int]()
        i = 0
        while i < len(selected):
            owner = owners[selected[i]]
            place = self.places.get(owner) or self._place(owner)
            table = place.table
            if table >= 0 and table not in not_grids:
                end = bisect_left(selected, self.page.end_block[table], i)
                cells = self._cells(table, selected[i:end])
                if cells is not None:
                    yield self._table(cells, self._place(table))
                    i = end
                    continue
                not_grids.add(table)
            yield self._block(selected[i], owner, place)
            i += 1

    def _place(self, element: int) -> _Place:
        """Where an element stands; recursive, but elements are nested no deeper than MAX_DEPTH."""
        parent, tag = self.page.parents[element], self.page.tags[element]
        place = self.places.get(parent) or self._place(parent)
        if tag in _PLACED:
            place = _within(place, element, tag)
        self.places[element] = place
        return place

    # --- blocks -----------------------------------------------------------------------------------

    def _block(self, block: int, owner: int, place: _Place) -> _Chunk:
        page = self.page
        text, tag, kind = page.texts[block], page.tags[owner], "text"
        if page.flags[owner] & _PRE:
            kind = "code"
            if not self.markdown:
                return _Chunk(text, kind, place, tag=tag)
            text = _fenced(text, self._language(owner))
        elif place.heading:
            kind = "heading"
            text = text.replace("\n", " ").removesuffix("¶").rstrip()  # manuals: a link to itself
            if self.markdown:
                text = f"{'#' * int(place.heading[1])} {text}"
        elif self.markdown and (text[0] in "#`~=-" or "\n" in text):
            text = _ACCIDENTS.sub(r"\\", text)
        if not place.containers:
            return _Chunk(text, kind, place, tag=tag)
        first, rest, begins = self._prefixes(place)
        text = first + text.replace("\n", f"\n{rest}")
        return _Chunk(text, kind, place, begins, tag)

    def _prefixes(self, place: _Place) -> tuple[str, str, bool]:
        """What the first and the other lines of a block begin with, and if it begins an item.

        The items around it that have no text so far, as in lists that are layouts, do not indent.
        """
        first = rest = ""
        begins = False
        innermost = next((e for e, tag in reversed(place.containers) if tag != "blockquote"), -1)
        for element, tag in place.containers:
            if tag == "blockquote":
                mark = filler = "> " if self.markdown else ""
            elif element in self.begun:
                is_same = element == innermost and not self.markdown
                mark = filler = "" if is_same else " " * self.begun[element]
            elif element == innermost:
                mark, begins = self._marker(element, tag) if self.markdown else "", True
                filler = " " * len(mark)
                self.begun[element] = len(mark) if self.markdown else _INDENT
            else:
                continue
            first += mark
            rest += filler
        return first, rest, begins

    def _marker(self, element: int, tag: str) -> str:
        if tag == "dt":
            return ""
        if tag == "dd":
            return ": "
        if self.page.tags[self.page.parents[element]] == "ol":
            return f"{self._ordinal(element)}. "
        return "- "

    def _ordinal(self, element: int) -> int:
        """The place of a list item or a cell among its siblings, from 1."""
        if self.ordinals is None:
            self.ordinals, numbers = {}, dict[int, int]()
            parents = self.page.parents
            for other, tag in enumerate(self.page.tags):
                if tag == "li" or tag in _CELLS:
                    number = numbers.get(parents[other], 0) + 1
                    self.ordinals[other] = numbers[parents[other]] = number
        return self.ordinals[element]

    def _language(self, element: int) -> str:
        """The language of a block of code, as its class or that of a wrapper names it, or ""."""
        pattern = _LANGUAGE
        for _ in range(1 + _WRAPPERS):
            for name in pattern.findall(self.page.names[element]):
                if name.lower() not in _NO_LANGUAGES:
                    return str(name).lower()
            pattern, element = _LANGUAGE_OF_WRAPPER, self.page.parents[element]
        return ""

    # --- tables -----------------------------------------------------------------------------------

    def _cells(self, table: int, blocks: Sequence[int]) -> dict[int, dict[int, str]] | None:
        """The texts of a table by row and column; None if it is the layout of something else."""
        page, sizes = self.page, dict[int, int]()
        rows: dict[int, dict[int, str]] = {}
        for block in blocks:
            owner = page.owners[block]
            place, text = self.places.get(owner) or self._place(owner), page.texts[block]
            cell = place.cell
            if place.table != table or cell < 0 or place.heading or page.flags[owner] & _PRE:
                return None
            sizes[cell] = sizes.get(cell, 0) + 1
            row = rows.setdefault(page.parents[cell], {})
            column = self._ordinal(cell)
            row[column] = f"{row[column]} {text}" if column in row else text
            if sizes[cell] > MAX_CELL_BLOCKS or len(row[column]) > MAX_CELL_CHARS:
                return None
        return rows if any(len(row) > 1 for row in rows.values()) else None

    def _table(self, rows: dict[int, dict[int, str]], place: _Place) -> _Chunk:
        columns = sorted({column for row in rows.values() for column in row})
        grid = [[row.get(c, "").replace("\n", " ") for c in columns] for row in rows.values()]
        first, rest, begins = self._prefixes(place)
        if self.markdown and len(grid) > 1:
            lines = ["| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in grid]
            lines.insert(1, "|" + " --- |" * len(columns))
        else:
            lines = ["\t".join(row).rstrip("\t") for row in grid]
        return _Chunk(first + f"\n{rest}".join(lines), "table", place, begins)


def _within(place: _Place, element: int, tag: str) -> _Place:
    containers, outer_list, table, cell, heading = place
    if tag in _HEADINGS:
        heading = tag
    elif tag == "table":
        table, cell = element, -1
    elif tag == "caption":  # a line before the table
        table = cell = -1
    elif tag in _CELLS:
        cell = element
    else:
        if tag not in _LISTS and len(containers) < _MAX_NESTING:
            containers = (*containers, (element, tag))
        if tag != "blockquote" and outer_list < 0:
            outer_list = element
    return _Place(containers, outer_list, table, cell, heading)


def _fenced(text: str, language: str) -> str:
    longest = max(map(len, _BACKTICKS.findall(text)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"
