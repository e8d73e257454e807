"""Made-up pages, whole and mutilated, for property tests."""

from hypothesis import strategies as st

PIECES = [
    *("<p>", "</p>", "<div>", "</div>", "<div class='linen x'>", "<section>", "</section>"),
    *("<ul>", "</ul>", "<ol>", "</ol>", "<li>", "</li>", "<dl>", "<dt>", "<dd>", "</dl>"),
    *("<table>", "</table>", "<tr>", "<td>", "</td>", "<th>", "<caption>c</caption>", "<tbody>"),
    *("<h1>", "</h1>", "<h3 id=a>", "</h3>", "<blockquote>", "</blockquote>", "<br>", "<br><br>"),
    *("<pre>", "</pre>", "<code class=language-c>", "</code>", "<pre class='brush: js'>"),
    *("<a href=x>", "</a>", "<a rel=license>", "<b>", "</b>", "<i>", "</i>", "<span>", "</span>"),
    *("<custom-tag>", "</custom-tag>", "<select><option>", "</select>", "<button>", "</button>"),
    *("<style>s{}</style>", "<script>s()</script>", "<!-- c -->", "<svg><title>t</title></svg>"),
    *("<textarea>t</textarea>", "<iframe>f</iframe>", "<noscript>", "</noscript>", "<title>t"),
    *("<template>", "</template>", "<math><mi>x</mi></math>", "<img class=tex alt='x|y'>", "<hr>"),
    *("</body>", "</html>", "<head>", "<form>", "</form>", "<p", "<", "&amp;", "&#0;", "&nbsp;"),
    *("\0", "\n", "  ", "\t", "\r\n", "# ", "- ", "1. ", "> ", "```", "~~~", "|", "===", "---"),
    *("one", "two words", " three", "four ", "Ω", "漢字", "\u2028", "\x85", "\ufeff"),
]


def pages() -> st.SearchStrategy[str]:
    """Strings of pieces of HTML in any order, and arbitrary strings."""
    return st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=60).map("".join)
