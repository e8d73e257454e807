"""Cut a web page into blocks of text, in one pass over the events of its parse.

A block is the text between two boundaries: the start or end of an element that browsers lay out as
a block, or two line breaks in a row. The same pass collects what the page says about itself
(`Head`). turbohtml builds the tree as the HTML standard says, iteratively, and drops nothing, at
any depth.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from turbohtml.saxparse import SaxHandler, sax_parse

# elements nested deeper than this belong to their ancestor at this depth
MAX_DEPTH: Final = 200
# The largest of 1,188 real pages has 42,000 elements and 21,000 blocks. Beyond either of these a
# page is full: elements belong to the innermost one that was recorded, and the text of that one, up
# to its end, is one block, with a line for each of the blocks that it would have been.
MAX_ELEMENTS: Final = 100_000
MAX_BLOCKS: Final = 50_000
FOOTER: Final = "footer"
_LINE: Final = "\r"  # ends a line within a block of a full page
_MAX_JSON_LD = 200_000  # characters
_MAX_TEX = 10_000  # characters of a formula
_MAX_NAMES = 1_000  # characters of the classes of code

Attributes = tuple[tuple[str, str | None], ...]

# --- kinds of elements ----------------------------------------------------------------------------

_PRE_TAGS = ("pre", "listing", "xmp")
# Elements without a kind are blocks, but for custom elements (their names have a hyphen): browsers
# lay those out in line unless a style sheet says otherwise.
_KINDS: dict[str, str] = {
    **dict.fromkeys(
        [
            "abbr",
            "acronym",
            "bdi",
            "bdo",
            "big",
            "cite",
            "data",
            "del",
            "dfn",
            "font",
            "ins",
            "kbd",
            "label",
            "mark",
            "nobr",
            "q",
            "rb",
            "rp",
            "rt",
            "rtc",
            "ruby",
            "s",
            "samp",
            "small",
            "strike",
            "sub",
            "time",
            "tt",
            "u",
            "var",
            "wbr",
            "picture",
            "output",
            "meter",
            "progress",
            "slot",
            "head",
            "body",
        ],
        "inline",
    ),
    **dict.fromkeys(("b", "strong", "em", "i"), "strong"),
    **dict.fromkeys(
        [
            "style",
            "iframe",
            "object",
            "embed",
            "applet",
            "video",
            "audio",
            "canvas",
            "svg",
            "map",
            "textarea",
            "input",
            "source",
            "track",
            "param",
            "datalist",
            "noembed",
            "noframes",
            "frameset",
            "frame",
        ],
        "skip",
    ),
    **dict.fromkeys(("meta", "link", "html"), "head"),
    **dict.fromkeys(_PRE_TAGS, "pre"),
    "a": "link",
    "br": "break",
    "code": "code",
    "sup": "sup",
    "title": "title",
    "script": "script",
    "math": "math",
    "img": "image",
    "span": "span",
}

# What an element or one of its ancestors is, as bits.
FLAGS: Final = (
    *("nav", "header", "footer", "aside", "main", "article", "section", "form", "table", "ul"),
    *("ol", "dl", "figure", "hidden", "li", "blockquote", "pre", "heading", "button", "select"),
    *("dialog", "details", "noscript", "template", "link", "td", "th", "caption", "p", "address"),
)
_BIT = {name: 1 << i for i, name in enumerate(FLAGS)}
_BITS_OF_TAG = {
    **{tag: bit for tag, bit in _BIT.items() if tag not in ("hidden", "link", "heading")},
    **dict.fromkeys(("h1", "h2", "h3", "h4", "h5", "h6"), _BIT["heading"]),
    **dict.fromkeys(("dt", "dd"), _BIT["li"]),
    "menu": _BIT["ul"],
    "option": _BIT["select"],
    "optgroup": _BIT["select"],
    "figcaption": _BIT["caption"],
    "listing": _BIT["pre"],
    "xmp": _BIT["pre"],
}
_BITS_OF_ROLE = {
    "navigation": _BIT["nav"],
    "menu": _BIT["nav"],
    "menubar": _BIT["nav"],
    "tablist": _BIT["nav"],
    "banner": _BIT["header"],
    "contentinfo": _BIT["footer"],
    "complementary": _BIT["aside"],
    "search": _BIT["form"],
    "main": _BIT["main"],
    "article": _BIT["article"],
    "dialog": _BIT["dialog"],
    "alertdialog": _BIT["dialog"],
    "alert": _BIT["dialog"],
    "button": _BIT["button"],
    "heading": _BIT["heading"],
    "listbox": _BIT["select"],
}
_FIGURE = _BIT["figure"] | _BIT["caption"]
_FOOTER_NAME = re.compile(r"(?:^|[^a-z])(?:footer|colophon|copyright)", re.IGNORECASE)
_LINK, _HIDDEN = _BIT["link"], _BIT["hidden"]
_HIDDEN_STYLE = re.compile(r"display\s*:\s*none|visibility\s*:\s*hidden", re.IGNORECASE)
# Pygments, highlight.js, Prism, GitHub, Rouge, react-syntax-highlighter, Octopress
_LINE_NUMBERS = {
    *("linenos", "linenodiv", "lineno", "hljs-ln-numbers", "line-numbers-rows", "blob-num"),
    *("rouge-gutter", "linenumber", "line-number"),
}
_LINE_NUMBERS_IN_PRE = _LINE_NUMBERS | {"ln", "lnt", "gutter"}  # Chroma; too common elsewhere

# --- formulas -------------------------------------------------------------------------------------

_RENDERED_MATH = ("MathJax", "mjx-chtml")  # by MathJax 2, of which a script holds the source
_TEX = re.compile(r"\b(?:la)?tex\b", re.IGNORECASE)  # in encodings of annotations
_TEX_CLASS = re.compile(
    r"(?<!\S)(?:tex|latex|math|texrender|mwe-math-fallback-\S*|ql-img-\S*)(?!\S)"
)
_TEX_SERVER = re.compile(r"latex\.php|codecogs\.com|equation\?tex=|(?:mime|math)tex\.cgi|/texvc")
_NOT_TEX = {"equation", "formula", "image", "latex", "math", "tex"}  # alt texts
_STYLED = re.compile(r"\{\\(?:display|text)style\s*(.*)\}", re.DOTALL)
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_LINE_END = re.compile(r"(?<!\\)%[ \t]*\n\s*")  # LaTeXML breaks long lines behind a comment sign
# x², 10⁻⁶, m², f(x)²; a raised number behind a longer word is a note
_POWER = re.compile(r"[-+−–]?\d{1,4}")
_BASE = re.compile(r"(?:[\d)]|\b[^\W\d_]{1,2})\Z")


@dataclass(slots=True)
class Head:
    """What a page says about itself: `metas` are the attributes of its meta elements, `links` pairs
    of rel and href of link elements (of those without a rel, of itemprop) and of anchors with a
    rel, `json_ld` the texts of such scripts. A rel of FOOTER is a link to a Creative Commons
    license in the page's footer, one of "" is an anchor in a figure, which is about the image.
    """

    title: str = ""
    language: str = ""
    metas: list[dict[str, str]] = field(default_factory=list)
    links: list[tuple[str, str]] = field(default_factory=list)
    json_ld: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Blocks:
    """The blocks of a page and the elements that hold them, as parallel lists in document order.

    Of block i: `texts[i]`, with white space collapsed but line breaks kept, and as it stands in
    <pre>; `owners[i]`, the innermost recorded element; `link_chars[i]` and `strong_chars[i]`, its
    characters in links and in emphasis; `links[i]`, the number of links that begin in it.
    Of element e: `tags[e]`, `parents[e]` (0 is the root, its own parent), `names[e]` (class and
    id), `flags[e]` (bits of FLAGS, its ancestors' included), and the blocks it holds,
    `first_block[e]` to `end_block[e]` (exclusive).
    """

    texts: list[str] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)
    link_chars: list[int] = field(default_factory=list)
    strong_chars: list[int] = field(default_factory=list)
    links: list[int] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    flags: list[int] = field(default_factory=list)
    first_block: list[int] = field(default_factory=list)
    end_block: list[int] = field(default_factory=list)
    head: Head = field(default_factory=Head)


def walk(html: str) -> Blocks:
    """The blocks of a page; defined for every string."""
    page = Blocks(tags=["html"], parents=[0], names=[""], flags=[0], first_block=[0], end_block=[0])
    handler = _Walk(page)
    try:
        sax_parse(html, handler)
    except UnicodeDecodeError:  # a lone surrogate in a name
        return walk(html.encode("utf-8", "replace").decode())
    handler.finish()
    return page


class _Walk(SaxHandler):
    """Receives the events of a parse. The parser closes every element that it opens, in order."""

    __slots__ = (
        *("page", "texts", "end_block", "flags", "stack"),
        *("pieces", "lines", "chars_in_links", "chars_in_strong", "links_begun"),
        *("link_depth", "strong_depth", "pre_depth", "raised_at", "skipped", "skipped_kind"),
        *("captured", "tex", "annotation", "annotation_at", "encoding", "attributes"),
        *("license_links", "is_full"),
    )

    def __init__(self, page: Blocks) -> None:
        self.page = page
        self.texts, self.end_block, self.flags = page.texts, page.end_block, page.flags
        self.stack = [0]  # recorded elements that are open
        self.pieces: list[str] = []  # text of the line that is being read
        self.lines: list[str] = []  # lines of the block before it
        self.chars_in_links = self.chars_in_strong = self.links_begun = 0  # of the block
        self.link_depth = self.strong_depth = self.pre_depth = 0
        self.raised_at = 0  # the piece that <sup> begins
        self.skipped = 0  # depth within an element whose text is not the page's
        self.skipped_kind = ""
        self.captured: list[str] | None = None  # text of such an element that is used otherwise
        self.tex: str | None = None  # source of the formula that is being read
        self.annotation = self.annotation_at = 0  # depth of an annotation of it; its first piece
        self.encoding = ""
        self.attributes: Attributes = ()
        self.license_links: list[tuple[int, str]] = []  # innermost element, URL
        self.is_full = False  # has MAX_ELEMENTS or MAX_BLOCKS

    def start_element(self, tag: str, attrs: Attributes) -> None:
        """Begin an element."""
        if self.skipped:
            self._start_within_skipped(tag, attrs)
            return
        kind = _KINDS.get(tag)
        if kind is None:
            if "-" not in tag:
                self._start_block(tag, attrs)
        elif kind != "inline":
            _STARTS[kind](self, tag, attrs)

    def end_element(self, tag: str) -> None:
        """End an element."""
        if self.skipped:
            self._end_within_skipped()
            return
        kind = _KINDS.get(tag)
        if kind is None:
            if "-" not in tag:
                self._end_block(False)
        elif kind == "link":
            self.link_depth -= 1
        elif kind == "strong":
            self.strong_depth -= 1
        elif kind == "sup":
            self._end_raised()
        elif kind == "pre":
            self._end_block(True)

    def characters(self, data: str) -> None:
        """Read text."""
        pieces = self.pieces
        if self.skipped:
            if self.captured is not None:
                self.captured.append(data)
        elif self.pre_depth:
            pieces.append(data)
        elif data.isspace():
            if pieces:
                pieces.append(" ")
        else:
            pieces.append(data)
            if self.link_depth or self.strong_depth:
                length = len(data.strip())
                if self.link_depth:
                    self.chars_in_links += length
                if self.strong_depth:
                    self.chars_in_strong += length

    # --- blocks -----------------------------------------------------------------------------------

    def finish(self) -> None:
        """End the text that is in no element but the body."""
        self._end_text()
        self.end_block[0] = len(self.texts)
        if self.license_links:
            self._keep_licenses_of_footer()

    def _keep_licenses_of_footer(self) -> None:
        page = self.page
        inside: list[bool] = []
        for parent, name, flags in zip(page.parents, page.names, page.flags, strict=True):
            is_footer = bool(flags & _BIT["footer"] or (name and _FOOTER_NAME.search(name)))
            inside.append(is_footer or (parent < len(inside) and inside[parent]))
        page.head.links += [(FOOTER, href) for e, href in self.license_links if inside[e]]

    def _start_block(self, tag: str, attributes: Attributes) -> None:
        if self.pre_depth:
            self._start_block_in_pre(tag, attributes)
            return
        if self.is_full:
            self.pieces.append(_LINE)
            self.stack.append(self.stack[-1])
            return
        if self.pieces or self.lines:
            self._end_text()
        name, bits = _described(attributes) if attributes else ("", 0)
        stack = self.stack
        parent = stack[-1]
        if len(stack) >= MAX_DEPTH:
            stack.append(parent)
            return
        if self.link_depth:
            bits |= _LINK
        page = self.page
        stack.append(len(page.tags))
        page.tags.append(tag)
        if len(page.tags) >= MAX_ELEMENTS:
            self.is_full = True
        page.parents.append(parent)
        page.names.append(name)
        self.flags.append(bits | _BITS_OF_TAG.get(tag, 0) | self.flags[parent])
        page.first_block.append(len(self.texts))
        self.end_block.append(0)

    def _start_pre(self, tag: str, attributes: Attributes) -> None:
        if not self.pre_depth and self._is_column_of_numbers(attributes):
            self._start_skipped(tag, ())
            return
        self._start_block(tag, attributes)
        if not self.pre_depth:
            self._name_language(attributes)
        self.pre_depth += 1

    def _is_column_of_numbers(self, attributes: Attributes) -> bool:
        """If a <pre> beside that of the code has the numbers of its lines: by its own class, or by
        those of the cell around it.
        """
        names = [_described(attributes)[0], *(self.page.names[e] for e in self.stack[-2:])]
        return not _LINE_NUMBERS.isdisjoint(" ".join(names).split())

    def _start_block_in_pre(self, tag: str, attributes: Attributes) -> None:
        if tag == "button" or _holds_line_numbers(attributes):
            self._start_skipped(tag, ())
            return
        self._new_line_of_code()
        self.stack.append(self.stack[-1])

    def _end_block(self, is_pre: bool) -> None:
        if self.pre_depth > is_pre:
            self._new_line_of_code()
            self.pre_depth -= is_pre
            self.stack.pop()
            return
        if self.is_full and self.stack[-1] == self.stack[-2]:
            self.pieces.append(_LINE)
            self.pre_depth = 0
            self.stack.pop()
            return
        if self.pieces or self.lines:
            self._end_text()
        self.links_begun = self.pre_depth = 0
        self.end_block[self.stack.pop()] = len(self.texts)

    def _new_line_of_code(self) -> None:
        if self.pieces and not self.pieces[-1].endswith("\n"):
            self.pieces.append("\n")

    def _break(self, tag: str, attributes: Attributes) -> None:
        if self.pre_depth:
            self.pieces.append("\n")
            return
        if self.is_full:
            self.pieces.append(_LINE)
            return
        line = " ".join("".join(self.pieces).split())
        self.pieces.clear()
        if line:
            self.lines.append(line)
        elif self.lines:
            self._end_text()

    def _end_text(self) -> None:
        text = "".join(self.pieces)
        self.pieces.clear()
        if self.pre_depth:
            text = text.replace("\xa0", " ")  # an indentation for browsers, an error for compilers
            text = "\n".join([line.rstrip() for line in text.split("\n")]).strip("\n")
        else:
            text = text.strip()
            if not text.isprintable() or "  " in text:  # most texts are clean: cheaper than a split
                text = _joined_lines(text) if self.is_full else " ".join(text.split())
            if self.lines:
                text = "\n".join([*self.lines, text] if text else self.lines)
                self.lines.clear()
        if text:
            page = self.page
            self.texts.append(text)
            if len(self.texts) >= MAX_BLOCKS:
                self.is_full = True
            page.owners.append(self.stack[-1])
            page.links.append(self.links_begun)
            if self.chars_in_links or self.chars_in_strong:
                page.link_chars.append(min(self.chars_in_links, len(text)))
                page.strong_chars.append(min(self.chars_in_strong, len(text)))
            else:
                page.link_chars.append(0)
                page.strong_chars.append(0)
        self.chars_in_links = self.chars_in_strong = self.links_begun = 0

    # --- within the line --------------------------------------------------------------------------

    def _start_link(self, tag: str, attributes: Attributes) -> None:
        self.link_depth += 1
        self.links_begun += 1
        self.raised_at = 0  # a raised link is a note, not a power
        relation = address = ""
        for name, value in attributes:
            if name == "href":
                address = value or ""
            elif name == "rel" and value:
                relation = value.lower()
        if relation:
            is_image_credit = self.flags[self.stack[-1]] & _FIGURE
            self.page.head.links.append(("" if is_image_credit else relation, address))
        if "creativecommons.org/" in address:
            self.license_links.append((self.stack[-1], address))

    def _start_strong(self, tag: str, attributes: Attributes) -> None:
        self.strong_depth += 1

    def _start_span(self, tag: str, attributes: Attributes) -> None:
        for name, value in attributes:
            if not value:
                continue
            if name == "class":
                if value.startswith(_RENDERED_MATH) or (
                    value.startswith("katex-html") and self._piece_before().endswith("$")
                ):
                    self._start_skipped(tag, ())
                    return
            elif name == "data-tex" or name == "data-latex":
                self.pieces.append(_formula(value, display=False))
                self._start_skipped(tag, ())
                return
        if self.pre_depth and attributes and _holds_line_numbers(attributes):
            self._start_skipped(tag, ())

    def _start_code(self, tag: str, attributes: Attributes) -> None:
        if self.pre_depth and attributes:
            self._name_language(attributes)

    def _name_language(self, attributes: Attributes) -> None:
        """Add the classes of code, and the language that a data attribute declares, to the names of
        its <pre>.
        """
        element, page = self.stack[-1], self.page
        names = page.names[element]
        if page.tags[element] not in _PRE_TAGS or len(names) > _MAX_NAMES:
            return
        for key, value in attributes:
            if value and key == "class" and value not in names:
                names = f"{names} {value}".lstrip()
            elif value and key in ("data-lang", "data-language"):
                names = f"{names} language-{value}".lstrip()
        page.names[element] = names

    def _start_raised(self, tag: str, attributes: Attributes) -> None:
        self.raised_at = len(self.pieces)

    def _end_raised(self) -> None:
        at, pieces = self.raised_at, self.pieces
        if (
            0 < at < len(pieces) < at + 4
            and not self.pre_depth
            and _POWER.fullmatch("".join(pieces[at:]).strip())
            and _BASE.search(pieces[at - 1][-3:])
        ):
            pieces.insert(at, "^")

    def _image(self, tag: str, attributes: Attributes) -> None:
        values = dict(attributes)
        source, name = values.get("alt"), values.get("class") or ""
        server = (values.get("src") or "")[:100]
        if not source or source.lower() in _NOT_TEX:
            return
        if (
            "eeimg" in values  # Zhihu
            or (("tex" in name or "math" in name) and _TEX_CLASS.search(name))
            or ("tex" in server and _TEX_SERVER.search(server))
        ):
            formula = _formula(source, display="display" in name or "block" in name)
            # Wikipedia has such an image behind the MathML of the same formula
            if self._piece_before().strip("$") != formula.strip("$"):
                self.pieces.append(formula)

    def _piece_before(self) -> str:
        return next((piece for piece in self.pieces[:-4:-1] if not piece.isspace()), "")

    # --- elements whose text is not the page's ----------------------------------------------------

    def _start_skipped(self, tag: str, attributes: Attributes) -> None:
        self.skipped, self.skipped_kind, self.attributes = 1, _KINDS.get(tag, "skip"), attributes
        if self.skipped_kind in ("title", "script", "math"):
            self.captured = []

    def _start_within_skipped(self, tag: str, attributes: Attributes) -> None:
        self.skipped += 1
        if self.captured is not None and not self.annotation and tag.startswith("annotation"):
            self.annotation, self.annotation_at = self.skipped, len(self.captured)
            self.encoding = dict(attributes).get("encoding") or ""

    def _end_within_skipped(self) -> None:
        if self.annotation == self.skipped and self.captured is not None:
            if self.tex is None and _TEX.search(self.encoding):
                self.tex = "".join(self.captured[self.annotation_at :])
            del self.captured[self.annotation_at :]
            self.annotation = 0
        self.skipped -= 1
        if self.skipped == 0 and self.captured is not None:
            self._use_captured("".join(self.captured))
            self.captured = self.tex = None

    def _use_captured(self, text: str) -> None:
        values, head = dict(self.attributes), self.page.head
        if self.skipped_kind == "title":
            head.title = head.title or " ".join(text.split())
        elif self.skipped_kind == "math":
            tex = self.tex or values.get("data-latex") or values.get("alttext")
            is_display = values.get("display") == "block"
            self.pieces.append(_formula(tex, display=is_display) if tex else " ".join(text.split()))
        else:
            use = (values.get("type") or "").lower()
            if use == "application/ld+json":
                head.json_ld.append(text[:_MAX_JSON_LD])
            elif use.startswith("math/tex"):
                self.pieces.append(_formula(text, display="display" in use))

    def _read_head(self, tag: str, attributes: Attributes) -> None:
        if self.flags[self.stack[-1]] & _BIT["template"]:
            return
        values, head = {name: value or "" for name, value in attributes}, self.page.head
        if tag == "meta":
            head.metas.append(values)
        elif tag == "link":
            rel = values.get("rel") or values.get("itemprop", "")
            head.links.append((rel.lower(), values.get("href", "")))
        else:
            head.language = values.get("lang") or values.get("xml:lang", "")


# not of the object: it would refer to itself, and stay until the garbage collector comes
_STARTS: dict[str, Callable[[_Walk, str, Attributes], None]] = {
    "link": _Walk._start_link,
    "strong": _Walk._start_strong,
    "break": _Walk._break,
    "skip": _Walk._start_skipped,
    "head": _Walk._read_head,
    "title": _Walk._start_skipped,
    "script": _Walk._start_skipped,
    "math": _Walk._start_skipped,
    "image": _Walk._image,
    "span": _Walk._start_span,
    "pre": _Walk._start_pre,
    "code": _Walk._start_code,
    "sup": _Walk._start_raised,
}


def _joined_lines(text: str) -> str:
    """Collapse the white space of each line, and leave out empty lines."""
    lines = (" ".join(line.split()) for line in text.split(_LINE))
    return "\n".join(filter(None, lines))


def _described(attributes: Attributes) -> tuple[str, int]:
    """Class and id of an element, and the flags that its attributes give it."""
    names, bits = "", 0
    for name, value in attributes:
        if name == "class" or name == "id":
            if value:
                names = f"{names} {value}" if names else value
        elif name == "style":
            if value and _HIDDEN_STYLE.search(value):
                bits |= _HIDDEN
        elif name == "role":
            bits |= _BITS_OF_ROLE.get((value or "").lower(), 0)
        elif name == "hidden" or (name == "aria-hidden" and value == "true"):
            bits |= _HIDDEN
    return names, bits


def _holds_line_numbers(attributes: Attributes) -> bool:
    """If an element within <pre> does, by its class."""
    names = (dict(attributes).get("class") or "").split()
    return not _LINE_NUMBERS_IN_PRE.isdisjoint(names)


def _formula(source: str, *, display: bool) -> str:
    """A formula between dollars, as most of the web writes TeX."""
    source = _LINE_END.sub("", source[:_MAX_TEX]).strip()
    if (styled := _STYLED.fullmatch(source)) and _is_balanced(styled[1]):
        source = styled[1].strip()
    if not source or source.startswith(("$", "\\(", "\\[")):
        return source
    dollars = "$$" if display else "$"
    return f"{dollars}{source}{dollars}"


def _is_balanced(tex: str) -> bool:
    depth = 0
    for brace in _BRACE.findall(tex):
        depth += (brace == "{") - (brace == "}")
        if depth < 0:
            return False
    return depth == 0
