"""A page's blocks: nothing visible is lost or doubled, and formulas and code keep their source."""

import gc
import time

import pytest
import turbohtml
from hypothesis import given
from hypothesis import strategies as st

from stages.extract.blocks.walk import FLAGS, MAX_DEPTH, walk
from tests.stages.extract.blocks.pages import pages

NOT_SHOWN = {
    *("script", "style", "title", "svg", "math", "iframe", "object", "embed", "applet", "video"),
    *("audio", "canvas", "map", "textarea", "datalist", "noembed", "noframes", "frameset"),
}


def letters(text):
    return "".join(text.split())


def visible_letters(html):
    """By the tree: the text nodes that are in no element of NOT_SHOWN, nor in buttons of code."""
    found = []

    def visit(node, in_pre):
        tag = getattr(node, "tag", None)
        if tag in NOT_SHOWN or (tag == "button" and in_pre):
            return
        if isinstance(node, turbohtml.Text):
            found.append(letters(node.data))
        for child in getattr(node, "children", ()):
            visit(child, in_pre or tag == "pre")

    visit(turbohtml.parse(html), False)
    return "".join(found)


def without_formulas(html):
    return html.replace("<math>", "<svg>").replace("</math>", "</svg>").replace("alt=", "x=")


@given(pages() | st.text())
def test_every_visible_character_is_in_exactly_one_block(html):
    html = without_formulas(html)
    assert letters("".join(walk(html).texts)) == visible_letters(html)


@given(pages(), st.sampled_from([1, 2, 5, 10**6]), st.sampled_from([1, 2, 5, 10**6]))
def test_full_pages_keep_every_visible_character(html, max_blocks, max_elements):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stages.extract.blocks.walk.MAX_BLOCKS", max_blocks)
        patch.setattr("stages.extract.blocks.walk.MAX_ELEMENTS", max_elements)
        page, visible = walk(html), visible_letters(without_formulas(html))
        assert letters("".join(walk(without_formulas(html)).texts)) == visible
    assert len(page.tags) <= max_elements + 1
    assert len(page.texts) <= max_blocks + MAX_DEPTH
    assert_blocks_lie_in_elements(page)


@pytest.mark.parametrize(
    "html, texts",
    [
        ("<p>a<p>b<p>c d<p>e  e<br>f<br><br>g", ["a", "b", "c d\ne e\nf\ng"]),
        ("<ul><li>a<li>b<li>c<li>d</ul>e<p>f", ["a", "b", "c\nd", "e\nf"]),
        ("<div>a<p>b<pre>c\n  c</pre>d</div>", ["a", "b", "c c\nd"]),
        ("<a href=x>a</a><p>b<p><a href=x>cc</a><p>d", ["a", "b", "cc\nd"]),
    ],
)
def test_behind_the_last_block_texts_are_lines_of_the_element_around_them(html, texts, monkeypatch):
    monkeypatch.setattr("stages.extract.blocks.walk.MAX_BLOCKS", 2)
    assert walk(html).texts == texts


@given(pages())
def test_blocks_lie_in_the_elements_that_hold_them(html):
    assert_blocks_lie_in_elements(walk(html))


def assert_blocks_lie_in_elements(page):
    n = len(page.texts)
    assert {len(column) for column in (page.owners, page.link_chars, page.strong_chars)} == {n}
    for block, owner in enumerate(page.owners):
        assert page.texts[block].strip("\n")
        assert page.first_block[owner] <= block < page.end_block[owner]
        assert 0 <= page.link_chars[block] <= len(page.texts[block])
    for element, parent in enumerate(page.parents):
        assert parent < element or element == 0
        assert page.first_block[parent] <= page.first_block[element]
        assert page.end_block[element] <= page.end_block[parent]


@pytest.mark.parametrize(
    "html, texts",
    [
        ("", []),
        ("<p>a<p>b", ["a", "b"]),
        ("a <b>b</b>\n c<p>d</p>e", ["a b c", "d", "e"]),
        ("<p>a<br>b<br><br>c", ["a\nb", "c"]),
        ("<p>a<br> <br><br>", ["a"]),
        ("<div>a<custom-x>b</custom-x>c</div>", ["abc"]),
        ("<dl><dt>t<dd>d</dl>", ["t", "d"]),
        ("<figure><img alt=x><figcaption>c</figcaption></figure>", ["c"]),
        ("<details><summary>s</summary>d</details>", ["s", "d"]),
        ("<p>a<script>x</script><style>y</style>b", ["ab"]),
        ("<ruby>漢<rt>kan</rt></ruby>", ["漢kan"]),
    ],
)
def test_blocks_end_where_browsers_begin_a_line(html, texts):
    assert walk(html).texts == texts


@pytest.mark.parametrize(
    "html, code",
    [
        ("<pre>\n  a\n\n    b  \n</pre>", "  a\n\n    b"),
        ("<pre>a<br>\tb</pre>", "a\n\tb"),
        ("<pre>if:\n\xa0 \xa0x</pre>", "if:\n   x"),
        ("<pre><div>a</div><div>b</div></pre>", "a\nb"),
        ("<pre><span class=ln>1</span>a\n<span class='x lnt'>2</span>b</pre>", "a\nb"),
        ("<pre><code><table><tr><td class=hljs-ln-numbers>1<td>a</table></code></pre>", "a"),
        ("<pre>a<button>Copy</button></pre>", "a"),
        ("<table><tr><td class=linenos><pre>1\n2</pre><td><pre>a\nb</pre></table>", "a\nb"),
        (
            "<pre><table><tr><td class='rouge-gutter gl'><pre>1</pre><td><pre>a</pre></table></pre>",
            "a",
        ),
    ],
)
def test_code_keeps_its_indentation_but_not_its_line_numbers(html, code):
    assert walk(html).texts == [code]


def test_line_number_names_hide_nothing_else():
    texts = walk("<div class='outline gutter'>a</div><td class=gutter>b<p class=line>c").texts
    assert texts == ["a", "b", "c"]


@pytest.mark.parametrize(
    "html, names",
    [
        ("<pre><code class='language-c x'>a</code></pre>", "language-c x"),
        ("<pre class=a><code data-lang=go>a</code></pre>", "a  language-go"),
        ("<pre data-language=go>a</pre>", " language-go"),
    ],
)
def test_classes_of_code_are_names_of_its_pre(html, names):
    page = walk(html)
    assert page.names[page.owners[0]].split() == names.split()


KATEX = (
    "<span class='katex'><span class='katex-mathml'><math><semantics><mrow><mi>x</mi></mrow>"
    "<annotation encoding='application/x-tex'>x^2</annotation></semantics></math></span>"
    "<span class='katex-html' aria-hidden='true'><span class='base'>x2</span></span></span>"
)
MATHJAX_2 = (
    "<span class='MathJax_Preview'>x2</span><span class='MathJax' id='M-1'><nobr>x2</nobr>"
    "<span class='MJX_Assistive_MathML'><math><mi>x</mi></math></span></span>"
    "<script type='math/tex'>x^2</script>"
)
MATHJAX_3 = (
    "<mjx-container class='MathJax' jax='CHTML'><mjx-math><mjx-c class='mjx-c1D465'></mjx-c>"
    "</mjx-math><mjx-assistive-mml><math><mi>x</mi><mo>+</mo><mi>y</mi></math>"
    "</mjx-assistive-mml></mjx-container>"
)
WIKIPEDIA = (
    "<span class='mwe-math-element'><span style='display: none;'>"
    "<math alttext='{\\displaystyle x^{2}}'><semantics><mi>x</mi>"
    "<annotation encoding='application/x-tex'>{\\displaystyle x^{2}}</annotation></semantics></math>"
    "</span><img class='mwe-math-fallback-image-inline' alt='{\\displaystyle x^{2}}'></span>"
)
LATEXML = (
    "<math alttext='x^%\n2' display='block'><semantics><mi>x</mi>"
    "<annotation-xml encoding='MathML-Content'><ci>ignored</ci></annotation-xml>"
    "<annotation encoding='application/x-llamapun'>italic x</annotation></semantics></math>"
)


@pytest.mark.parametrize(
    "html, text",
    [
        (KATEX, "$x^2$"),
        ("<span class='katex-html'>x2</span>", "x2"),
        (MATHJAX_2, "$x^2$"),
        ("<script type='math/tex; mode=display'>x^2</script>", "$$x^2$$"),
        (MATHJAX_3, "x+y"),
        (WIKIPEDIA, "$x^{2}$"),
        (f"{WIKIPEDIA} is {WIKIPEDIA}", "$x^{2}$ is $x^{2}$"),
        (LATEXML, "$$x^2$$"),
        ("<math><mi>x</mi><annotation encoding='StarMath 5.0'>s</annotation></math>", "x"),
        ("<math data-latex='x^2'><mi>x</mi></math>", "$x^2$"),
        ("<math><semantics><annotation encoding=TeX>a</annotation></semantics></math>", "$a$"),
        ("<img class=latex alt='a'> <img class=latex alt='b'>", "$a$ $b$"),
        ("<img src='https://s0.wp.com/latex.php?latex=a' alt='a'>", "$a$"),
        ("<img class=latex alt='$a$'>", "$a$"),
        ("<img eeimg=1 alt='a'><span class=ztext-math data-tex='b^2'>b2</span>", "$a$$b^2$"),
        ("<img class=math-logo alt='Math Club'>x<img class=math alt=Equation>", "x"),
        ("<span class='math inline'>\\(x\\)</span>", "\\(x\\)"),
        ("<span class=math-container>$x$</span>", "$x$"),
        ("<img class=tex alt='{\\displaystyle a} + {b}'>", "${\\displaystyle a} + {b}$"),
    ],
)
def test_formulas_are_their_source_once(html, text):
    assert walk(f"<p>{html}").texts == [text]


@pytest.mark.parametrize(
    "html, text",
    [
        ("10<sup>-6</sup> m<sup>2</sup>", "10^-6 m^2"),
        ("f(x)<sup>2</sup>", "f(x)^2"),
        ("claim<sup>2</sup> 1<sup>st</sup> <sup>3</sup>", "claim2 1st 3"),
        ("at 5<sup><a href=n>3</a></sup> <a href=x>km<sup>2</sup></a>", "at 53 km^2"),
        ("H<sub>2</sub>O", "H2O"),
        ("<pre>a<sup>2</sup></pre>", "a2"),
    ],
)
def test_powers_are_not_digits(html, text):
    assert walk(html).texts == [text]


def test_links_are_counted_in_the_block_that_they_begin():
    page = walk(
        "<div><a href=x><img></a></div><p>a <a href=y>b</a> c</p><a href=z><div>d d</div></a>"
    )
    assert page.links == [0 + 1, 1]
    assert page.link_chars == [1, 3]


def test_head_is_what_the_page_says_about_itself():
    head = walk(
        "<html lang=en><title> a\nb </title><meta name=x content=y><link rel=Canonical href=u>"
        "<script type='application/ld+json'>{}</script><a rel='license' href=v>w</a>"
        "<title>second</title>"
    ).head
    assert head.title == "a b"
    assert head.language == "en"
    assert head.metas == [{"name": "x", "content": "y"}]
    assert head.json_ld == ["{}"]
    assert head.links == [("canonical", "u"), ("license", "v")]


@pytest.mark.parametrize("html", ["<p a\ud800=b>x", "<p\ud800>x", "<p a=\ud800>x", "<!\ud800>x"])
def test_lone_surrogates_are_no_error(html):
    assert walk(html).texts == ["x"]


def test_deep_pages_keep_their_text_and_a_bounded_tree():
    page = walk("<div>" * 5_000 + "<p>x</p>" + "</div>" * 5_000)
    assert page.texts == ["x"]
    assert len(page.tags) <= MAX_DEPTH + 1


def test_flags_of_an_element_hold_for_what_is_in_it():
    page = walk("<nav><div role=main><p style='display : none'>x</p></div></nav>")
    flags = page.flags[page.owners[0]]
    assert {name for i, name in enumerate(FLAGS) if flags >> i & 1} == {
        "nav",
        "main",
        "p",
        "hidden",
    }


def test_a_page_is_freed_without_the_garbage_collector():
    gc.collect()
    gc.disable()
    try:
        before = len(gc.get_objects())
        for _ in range(20):
            walk("<p>a <a href=b>b</a></p>" * 10)
        assert len(gc.get_objects()) < before + 20
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "html",
    [
        "x<sup>" + "<sup>" * 30_000 + "y<b></b>" * 30_000 + "</sup>" * 30_000,
        "<pre>" + "<code class='language-c'>" * 30_000,
        "<p><img class=tex alt=a>" + "<b> </b><img class=tex alt=a>" * 30_000,
        "<pre><img class=tex alt=a>" + "<b> </b><img class=tex alt=a>" * 30_000,
        "<p>" + "a<br>" * 100_000,
        "<math>" + "<annotation encoding=tex>" * 30_000 + "x",
        f"<img class='{'tex-' * 500_000}' alt=a>",
        "<img class=tex alt='" + "{\\displaystyle " * 100_000 + "'>",
        "<img class=tex alt='" + "% \n" * 500_000 + "'>",
    ],
    ids=lambda html: html[:24],
)
def test_walking_takes_linear_time(html):
    start = time.process_time()
    walk(html)
    assert time.process_time() - start < 5
