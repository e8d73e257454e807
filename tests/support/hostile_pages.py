"""Pages that are built to cost time or memory, or to break a parser, each by one means.

A page is a function of its size in bytes, so that the same means can be tried cheaply at 1 MB and
in earnest at the largest page that the stage accepts. Every page has the same prose first: without
it the gate would drop most of them before the engine sees them.
"""

from collections.abc import Callable
from typing import Final

PROSE: Final = " ".join(
    f"The miller of the {word} valley said that the river had never been so high in spring."
    for word in ("first", "second", "third", "green", "narrow", "wide", "old", "far", "low", "last")
)
_HEAD = f"<html><head><title>The mill</title></head><body><article><p>{PROSE}</p>"

Maker = Callable[[int], str]


def _filled(unit: str, size: int) -> str:
    return unit * (size // len(unit.encode()))


def _repeated(unit: str, *, before: str = "", after: str = "") -> Maker:
    return lambda size: _HEAD + before + _filled(unit, size) + after


def _numbered(unit: str, *, before: str = "", after: str = "") -> Maker:
    """Units that all differ; "{0}" is the number."""

    def make(size: int) -> str:
        number = size // (len(unit.encode()) + 4)
        return _HEAD + before + "".join(map(unit.format, range(number))) + after

    return make


def _head_only(unit: str, *, before: str, after: str) -> Maker:
    """Before the body, in the head."""
    return lambda size: f"<html><head>{before}{_filled(unit, size)}{after}</head>{_HEAD}"


def _nested(tag: str, *, attributes: str = "", inside: str = "") -> Maker:
    """A depth of a tenth of the bytes, up to 100,000; text at the bottom and behind."""
    opening = f"<{tag}{attributes}>{inside}"

    def make(size: int) -> str:
        depth = min(size // 10, 100_000)
        return f"{_HEAD}{opening * depth}<p>{PROSE}</p>{f'</{tag}>' * depth}<p>{PROSE}</p>"

    return make


_NESTED_TAGS: Final = (
    *("div", "p", "span", "b", "a", "font", "ul", "li", "table", "td", "blockquote", "section"),
    *("form", "select", "pre", "code", "sup", "center", "custom-element", "math", "svg", "object"),
    *("template", "button", "nobr", "dl", "details", "h1", "ruby", "frameset", "noscript"),
)
_CONTROLS = "".join(map(chr, (*range(32), *range(127, 160), 0xAD, 0x200B, 0x202E, 0xFEFF, 0xFFFE)))
_ENTITIES = "&amp;&lt;&#x41;&#65;&notit;&NotEqualTilde;&#0;&#xD800;&#xDFFF;&#x110000;&#99999999;& "

PAGES: Final[dict[str, Maker]] = {
    **{f"nested-{tag}": _nested(tag) for tag in _NESTED_TAGS},
    "nested-with-text": _nested("div", inside="word "),
    "nested-with-classes": _nested("div", attributes=" class='a b c' id=d"),
    "nested-hidden": _nested("div", attributes=" style='display:none'"),
    "nested-mixed": _repeated("<div><ul><li><table><tr><td><b><a href=x>", after=PROSE),
    "nested-inline": _repeated("<b><i><u><em>", after=PROSE),
    "nested-lists": _repeated("<ul><li>word"),
    "nested-tables": _repeated("<table><tr><td>word"),
    "nested-quotations": _repeated("<blockquote>word"),
    "misnested": _repeated("<b><p></b><i></p>"),
    "misnested-links": _repeated("<a href=x><div>word</a>"),
    "unclosed": _repeated("<p"),
    "unclosed-attribute": _repeated("word ", before="<p class='"),
    "unclosed-comment": _repeated("word ", before="<!-- "),
    "unclosed-script": _repeated("word ", before="<script>"),
    "unclosed-textarea": _repeated("<p>", before="<textarea>"),
    "end-tags": _repeated("</p></b></div>"),
    "less-than": _repeated("<"),
    "doctypes": _repeated("<!doctype html>"),
    "cdata": _repeated("<![CDATA[x]]>"),
    "tiny-blocks": _repeated("<p>x"),
    "tiny-words": _repeated("<p>a b"),
    "identical-blocks": _repeated(
        "<p>The same line again and again, a hundred thousand times.</p>"
    ),
    "distinct-blocks": _numbered("<p>Line {0} is not like any other line of the page.</p>"),
    "siblings": _repeated("<div></div>"),
    "siblings-with-text": _repeated("<div>word</div>"),
    "line-breaks": _repeated("<br>"),
    "lines": _repeated("x<br>"),
    "pairs-of-lines": _repeated("x<br><br>"),
    "rules": _repeated("<hr>x"),
    "links": _repeated("<a>"),
    "links-with-text": _repeated("<a href=x>word</a> "),
    "links-with-rel": _repeated("<a rel=license href=x></a>"),
    "links-to-licenses": _repeated("<a href=https://creativecommons.org/licenses/by/4.0/></a>"),
    "headings": _repeated("<h1>The mill</h1>"),
    "headings-and-text": _numbered("<h2>Head {0}</h2><p>some words of text"),
    "options": _repeated("<option>word", before="<select>"),
    "cells": _repeated("<td>x", before="<table><tr>"),
    "rows": _repeated("<tr><td>x<td>y", before="<table>"),
    "items": _repeated("<li>x", before="<ul>"),
    "numbered-items": _repeated("<li>x", before="<ol>"),
    "definitions": _repeated("<dt>x<dd>y", before="<dl>"),
    "code": _repeated("  x = [1, 2]\n", before="<pre>"),
    "code-of-tags": _repeated("<span class=k>if</span> ", before="<pre>"),
    "blocks-of-code": _repeated("<pre>x</pre>"),
    "code-of-breaks": _repeated("x<br>", before="<pre>"),
    "fences": _repeated("`", before="<pre>"),
    "fence-lines": _repeated("```<br>", before="<p>"),
    "formulas": _repeated("<math alttext='x^2'><mi>x</mi></math> "),
    "formula-images": _repeated("<img class=tex alt='x^2'>"),
    "powers": _repeated("10<sup>2</sup> "),
    "long-attribute": _repeated("word ", before="<p title='", after="'>x"),
    "long-class": _repeated("x", before="<p class='", after=f"'>{PROSE}"),
    "many-classes": _numbered("c{0} ", before="<p class='", after=f"'>{PROSE}"),
    "distinct-classes": _numbered("<p class=c{0}>x"),
    "distinct-ids": _numbered("<div id=item-{0}>x</div>"),
    "distinct-tags": _numbered("<t{0}>x</t{0}>"),
    "many-attributes": _numbered(" a{0}=b", before="<p", after=f">{PROSE}"),
    "long-style": _repeated("display : ", before="<p style='", after=f"'>{PROSE}"),
    "text": _repeated("The wheel of the mill turns day and night. "),
    "text-without-spaces": _repeated("x"),
    "short-words": _repeated("we go to a mill on it "),
    "text-and-an-emoji": _repeated("The wheel of the mill turns. ", before="👍"),
    "text-of-marks": _repeated("."),
    "text-of-digits": _repeated("7"),
    "text-of-blanks": _repeated(" "),
    "text-of-newlines": _repeated("\n"),
    "text-of-hard-spaces": _repeated("&nbsp;"),
    "paragraphs": _repeated(
        "<p>The wheel of the mill turns day and night, and the river is high.</p>\n"
    ),
    "chinese": _repeated("北京的秋天总是来得很快，街道两旁的银杏树变成金黄色。"),
    "chinese-blocks": _repeated("<p>北京"),
    "hebrew": _repeated("שלום עולם \u202e\u202d\u2066 "),
    "combining-marks": _repeated("\u0301"),
    "capital-i-with-dot": _repeated("İ"),
    "emoji": _repeated("👩‍👩‍👧 "),
    "ligatures": _repeated("ﷺ"),  # 18 characters each under compatibility normalization
    "entities": _repeated(_ENTITIES),
    "surrogate-entities": _repeated("&#xD800;"),
    "ampersands": _repeated("&"),
    "nuls": _repeated("\0"),
    "controls": _repeated(_CONTROLS),
    "control-entities": _repeated("".join(f"&#{i};" for i in range(160))),
    "title": _head_only("word ", before="<title>", after="</title>"),
    "long-word-title": _head_only("x", before="<title>", after="</title>"),
    "titles": _head_only("<title>x</title>", before="", after=""),
    "json-ld": _head_only(
        '{"@type": "Article", "name": "x"},',
        before='<script type="application/ld+json">[',
        after='{"@type": "Article"}]</script>',
    ),
    "json-ld-nested": _head_only(
        "[", before='<script type="application/ld+json">', after="</script>"
    ),
    "json-ld-objects": _head_only(
        '{"@graph":', before='<script type="application/ld+json">', after="</script>"
    ),
    "json-ld-comments": _head_only(
        "/*", before='<script type="application/ld+json">', after="</script>"
    ),
    "json-ld-scripts": _head_only(
        '<script type="application/ld+json">{"@type": "Article"}</script>', before="", after=""
    ),
    "metas": _head_only("<meta name=a content=b>", before="", after=""),
    "authors": _head_only("<meta name=author content=b>", before="", after=""),
    "link-elements": _head_only("<link rel=license href=x>", before="", after=""),
    "styles": _head_only("<style>a{}</style>", before="", after=""),
    "charsets": _head_only("<meta charset=utf-8>", before="", after=""),
}
