"""Rendered text: every selected block once, with the structure that its readers see."""

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.extract.blocks.labels import words_of
from stages.extract.blocks.render import MAX_CELL_CHARS, render
from stages.extract.blocks.walk import FLAGS, walk
from tests.stages.extract.blocks.pages import pages

PRE = 1 << FLAGS.index("pre")


def rendered(html, *, markdown, leave_out=()):
    page = walk(html)
    selected = [i for i, text in enumerate(page.texts) if text not in leave_out]
    return render(page, selected, markdown=markdown)


def text(html, **options):
    return rendered(html, markdown=False, **options).text


def markdown(html, **options):
    return rendered(html, markdown=True, **options).text


def letters(text):
    """Without what the formats add or escape."""
    return re.sub(r"[\s\\|>#`~:¶-]|\d", "", text)


@given(pages(), st.data())
def test_selected_blocks_are_rendered_once_in_order(html, data):
    page = walk(html)
    chosen = [i for i in range(len(page.texts)) if data.draw(st.booleans())]
    plain = render(page, chosen, markdown=False).text
    assert letters(plain) == letters("".join(page.texts[i] for i in chosen))
    assert words_of(plain) == words_of("\n".join(page.texts[i] for i in chosen))
    marked = letters(render(page, chosen, markdown=True).text)
    for i in chosen:
        block = letters(page.texts[i])
        assert block in marked
        marked = marked[marked.index(block) + len(block) :]


@given(pages())
def test_code_ranges_are_the_pre_blocks(html):
    page = walk(html)
    everything = range(len(page.texts))
    code = [page.texts[i] for i in everything if page.flags[page.owners[i]] & PRE]
    plain = render(page, everything, markdown=False)
    assert [plain.text[start:end] for start, end in plain.code] == code
    marked = render(page, everything, markdown=True)
    assert len(marked.code) == len(code)
    for (start, end), block in zip(marked.code, code, strict=True):
        assert letters(block) in letters(marked.text[start:end])
        assert marked.text[:start].endswith("\n") or start == 0
        assert marked.text[end:].startswith("\n") or end == len(marked.text)


def test_nothing_selected_is_no_text():
    assert render(walk("<p>a"), [], markdown=True) == ("", ())


@pytest.mark.parametrize(
    "html, plain, marked",
    [
        ("<h2>A¶</h2><p>b<p>c", "A\n\nb\n\nc", "## A\n\nb\n\nc"),
        ("<h1><div>A<br>B</div></h1>c", "A B\n\nc", "# A B\n\nc"),
        ("<p>a<br>b", "a\nb", "a\nb"),
        ("<p># a<p>#b<p>- c<p>2. d", "# a\n\n#b\n\n- c\n\n2. d", "\\# a\n\n#b\n\n- c\n\n2. d"),
        ("x<ul><li>a<li>b</ul>y", "x\n\na\nb\n\ny", "x\n\n- a\n- b\n\ny"),
        ("<ul><li>a<ul><li>b</ul><li>c</ul>", "a\n  b\nc", "- a\n  - b\n- c"),
        ("<ol><li>a<li>b<ol><li>c</ol></ol>", "a\nb\n  c", "1. a\n2. b\n   1. c"),
        ("<ul><li>a<p>b</p></li><li>c</ul>", "a\n\nb\n\nc", "- a\n\n  b\n\n- c"),
        ("<ul><li>a<div>b</div><li>c</ul>", "a\nb\nc", "- a\n  b\n- c"),
        ("<ul><li><ul><li>a<br>b</ul></ul>", "a\nb", "- a\n  b"),
        ("<ul><li><h3>a</h3>b</ul>", "a\n\nb", "- ### a\n\n  b"),
        ("<dl><dt>t<dd>d<dt>u<dd>e</dl>", "t\nd\nu\ne", "t\n: d\nu\n: e"),
        (
            "<blockquote><p>a<p>b<blockquote>c</blockquote></blockquote>d",
            "a\n\nb\n\nc\n\nd",
            "> a\n>\n> b\n>\n> > c\n\nd",
        ),
        (
            "<blockquote><ul><li>a<li>b</ul></blockquote>",
            "a\nb",
            "> - a\n> - b",
        ),
    ],
)
def test_structure(html, plain, marked):
    assert text(html) == plain
    assert markdown(html) == marked


@pytest.mark.parametrize(
    "html, plain, marked",
    [
        (
            "<table><caption>c</caption><tr><th>a<th>b|c<tr><td>1<td>2<br>3</table>",
            "c\n\na\tb|c\n1\t2 3",
            "c\n\n| a | b\\|c |\n| --- | --- |\n| 1 | 2 3 |",
        ),
        # cells without text keep the columns, columns without text are none
        (
            "<table><tr><td>a<td><td>b<tr><td><td><td>c</table>",
            "a\tb\n\tc",
            "| a | b |\n| --- | --- |\n|  | c |",
        ),
        ("<table><tr><td>E = m<td>(1)</table>", *["E = m\t(1)"] * 2),
        (
            "<table><tr><td>a<td><ul><li>x<li>y</ul><tr><td>b<td>c</table>",
            "a\tx y\nb\tc",
            "| a | x y |\n| --- | --- |\n| b | c |",
        ),
        # layouts
        ("<table><tr><td>a<tr><td>b</table>", *["a\n\nb"] * 2),
        ("<table><tr><td>a<td><h2>b</h2></table>", "a\n\nb", "a\n\n## b"),
        ("<table><tr><td>a<td><pre>b</pre></table>", "a\n\nb", "a\n\n```\nb\n```"),
        ("<table><tr><td>a<td><p>1<p>2<p>3<p>4<p>5</table>", *["a\n\n1\n\n2\n\n3\n\n4\n\n5"] * 2),
        (
            "<table><tr><td><table><tr><td>a<td>b</table><td>c</table>",
            *["a\tb\n\nc"] * 2,
        ),
        (
            f"<table><tr><td>a<td>{'b' * MAX_CELL_CHARS}c</table>",
            *[f"a\n\n{'b' * MAX_CELL_CHARS}c"] * 2,
        ),
        (
            "<ul><li>x<table><tr><td>a<td>b<tr><td>c<td>d</table></ul>",
            "x\n\na\tb\nc\td",
            "- x\n\n  | a | b |\n  | --- | --- |\n  | c | d |",
        ),
    ],
)
def test_tables(html, plain, marked):
    assert text(html) == plain
    assert markdown(html) == marked


def test_what_is_not_selected_leaves_no_trace():
    html = "<table><tr><td>a<td>b<tr><td>c<td>d</table><ol><li>x<li>y<ul><li>z</ul></ol>"
    assert markdown(html, leave_out={"b", "d", "y"}) == "a\n\nc\n\n1. x\n- z"
    assert text(html, leave_out={"a", "c", "y"}) == "b\n\nd\n\nx\nz"


@pytest.mark.parametrize(
    "html, language",
    [
        ("<pre>x</pre>", ""),
        ("<pre><code class='hljs language-Python'>x</code></pre>", "python"),
        ("<pre><code class='hljs python'>x</code></pre>", "python"),
        ("<pre class='lang-py s-code-block'>x</pre>", "py"),
        ("<pre class='brush: php; title: ; notranslate'>x</pre>", "php"),
        ("<pre><code data-lang=go>x</code></pre>", "go"),
        ("<div class='highlight highlight-source-c++'><pre>x</pre></div>", "c++"),
        ("<div class='highlight-python3 notranslate'><div class=highlight><pre>x</pre>", "python3"),
        ("<div class='highlight-default notranslate'><div class=highlight><pre>x</pre>", ""),
        ("<div class=sourceCode id=cb1><pre class='sourceCode r'><code>x</code></pre>", "r"),
        ("<div class=sourceCode id=cb1><pre class=sourceCode>x</pre></div>", ""),
        ("<div class='language-ruby highlighter-rouge'><div><pre>x</pre></div></div>", "ruby"),
        ("<div class=lang-en><pre>x</pre></div>", ""),
        ("<pre class=language-none>x</pre>", ""),
    ],
)
def test_language_of_code(html, language):
    assert markdown(html) == f"```{language}\nx\n```"


def test_code_in_lists_and_quotations():
    html = "<ol><li>a<pre>b\n  c</pre></ol><blockquote><pre>d</pre></blockquote>"
    assert text(html) == "a\n\nb\n  c\n\nd"
    assert markdown(html) == "1. a\n\n   ```\n   b\n     c\n   ```\n\n> ```\n> d\n> ```"


def test_a_fence_is_longer_than_what_it_holds():
    assert markdown("<pre>````\n```</pre>") == "`````\n````\n```\n`````"


@pytest.mark.parametrize("line", ["```", "~~~~ x", "###### a", "#", "---", "=", "---- "])
def test_lines_become_no_structure_by_accident(line):
    assert markdown(f"<p>a<br>{line}<br>b") == f"a\n\\{line.strip()}\nb"


@pytest.mark.parametrize(
    "html",
    [
        "<ul><li>a" * 150 + "<li>b" * 50_000,
        "<blockquote>a" * 150 + "<p>b" * 50_000,
        "<table><tr><td>a<td>b" * 60 + "<tr><td>c" * 50_000,
        "<ol>" * 150 + "<li>b" * 50_000,
        "<pre>" + "`" * 1_000_000,
    ],
    ids=lambda html: html[:24],
)
@pytest.mark.parametrize("marked", [False, True])
def test_rendering_takes_linear_time(html, marked):
    page = walk(html)
    start = time.process_time()
    rendered = render(page, range(len(page.texts)), markdown=marked)
    assert time.process_time() - start < 5
    assert len(rendered.text) < 200 * 50_000
