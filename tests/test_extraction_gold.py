"""Gold text from packages of other extractors: selectors of a site, and the text they give."""

import pytest
import turbohtml

from tools.extraction_gold import (
    Rules,
    begins_with_any,
    element_text,
    keep_distinct,
    parse_rules,
    parse_test,
    selected_text,
    tidy,
    without_buttons,
)

EXTRACTOR = """
export const ExampleExtractor = {
  domain: 'www.example.com',
  title: {
    selectors: ['h1', ['meta[name="og:title"]', 'value']],
  },
  content: {
    selectors: [
      ['header figure', "div[class='body']"], // with a "picture"
      'a[href^="http://x"]',
      'article',
    ],

    // selectors: ['commented out'],
    transforms: {
      figure: $node => $node.attr('src').replace(/('|")/g, ''),
    },
    clean: ['.ad', '.related', ['.of', '.two']],
  },
  dek: {
    selectors: ['.dek'],
    clean: ['.no'],
  },
};
"""

SITE_TEST = r"""
describe('initial test case', () => {
  url =
    'http://www.example.com/1?a=b';
  const html = fs.readFileSync(
    './fixtures/www.example.com/1.html'
  );
  it('returns the content', async () => {
    const first13 = excerptContent($('*').first().text(), 13);
    assert.equal(
      first13,
      'It wasn\'t the first time'
    );
  });
});
describe('another', () => {
  url = 'http://www.example.com/2';
  const html = fs.readFileSync('./fixtures/www.example.com/2.html');
  const again = fs.readFileSync('./fixtures/www.example.com/1.html');
  assert.equal(first13, "The second");
});
"""

PAGE = """
<header><h1>Title</h1></header>
<article>
  <h2>Rivers  of
    Europe</h2>
  <div class="ad-box share">Share this</div>
  <p>One <a href="/">line</a>,<br>another.<!-- no --></p><script>no</script>
  <p style="color: red; display : none">hidden</p>
  <table><tr><th>Name<td>Length<tr><th>Rhine<td>1,233 km</table>
  <pre>
for river in rivers:
    flow()
</pre>
  <article>inside</article>
  <p class="cut">cut</p>after
</article>
"""


def test_selectors_are_those_of_the_content():
    rules = parse_rules(EXTRACTOR)
    pair = ["header figure", "div[class='body']"]
    assert rules.selectors == [pair, 'a[href^="http://x"]', "article"]
    assert rules.clean == [".ad", ".related"]


def test_an_extractor_without_selectors_has_none():
    assert parse_rules("  content: {\n    clean: [],\n  },\n") == Rules([], [])


def test_a_site_test_pairs_pages_and_addresses():
    test = parse_test(SITE_TEST)
    assert test.pages == [
        ("fixtures/www.example.com/1.html", "http://www.example.com/1?a=b"),
        ("fixtures/www.example.com/2.html", "http://www.example.com/2"),
    ]
    assert test.first_words == ["It wasn't the first time", "The second"]


def test_text_has_a_line_per_block():
    rules = Rules([["article", "aside"], "article"], [".cut", "not a selector.", "h1"])
    assert selected_text(turbohtml.parse(PAGE), rules).split("\n") == [
        "Rivers of Europe",
        "One line,",
        "another.",
        "Name Length",
        "Rhine 1,233 km",
        "for river in rivers:",
        "    flow()",
        "inside",
        "after",
    ]


def test_no_match_is_no_text():
    assert selected_text(turbohtml.parse(PAGE), Rules(["aside"], [])) == ""


def test_text_of_deeply_nested_elements():
    page = turbohtml.parse("<div>" * 20_000 + "deep")
    assert element_text(page.select("div")[0]) == "deep"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It was  the\nfirst time in years", True),
        ("By a reporter. It was the first time in years", True),
        ("x" * 600 + "It was the first time", False),
        ("", False),
    ],
)
def test_first_words(text, expected):
    assert begins_with_any(text, ["It was the first time", "It"]) is expected


def test_buttons_are_whole_lines():
    assert without_buttons("Share\nShare on Facebook\nShare your view\nPrint ") == "Share your view"


def test_tidy_keeps_indentation():
    assert tidy("a \n\n \t\n    code\n\tb") == "a\n    code\nb"


def test_short_placeholder_and_repeated_texts_are_dropped():
    text = "The river rises in the mountains and flows west. " * 12
    texts = [text, "short", "Lorem ipsum. " + text, text.upper(), text + "more", "x" + text]
    rows = [{"url": f"https://a.example/{i}", "main_content": t} for i, t in enumerate(texts)]
    rows.append({"url": "https://a.example/0", "main_content": "Another text. " * 50})
    kept = [row["main_content"] for row in keep_distinct(rows)]
    assert kept == [text, text.upper(), "x" + text]
