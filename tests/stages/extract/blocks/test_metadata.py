"""What a page says about itself, and what it does not say."""

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.extract.blocks.license_names import license_id
from stages.extract.blocks.metadata import Metadata, iso_day, metadata, parse_json_ld
from stages.extract.blocks.walk import Head, walk

URL = "https://mill.example/blog/wheels?page=2"
BY_SA = "https://creativecommons.org/licenses/by-sa/4.0/"
BY = "http://creativecommons.org/licenses/by/3.0/us/deed.en"


def of(html, url=URL):
    return metadata(walk(html).head, url)


def ld(value):
    text = value if isinstance(value, str) else json.dumps(value)
    return f'<script type="application/ld+json">{text}</script>'


def test_a_page_that_says_nothing():
    assert of("<p>text") == Metadata()


def test_a_page_that_says_everything():
    html = f"""<html lang="pt_BR"><title> The  old
      wheel </title><link rel="canonical" href="/blog/wheels"><meta name=author content="A. Miller">
      <meta property="article:published_time" content="2024-02-29T23:30:00-05:00">
      <link rel=license href="{BY_SA}">{ld({"@type": ["Article", "http://schema.org/Thing"]})}"""
    assert of(html) == Metadata(
        title="The old wheel",
        canonical_url="https://mill.example/blog/wheels",
        author="A. Miller",
        published="2024-02-29",
        declared_language="pt-br",
        schema_types=("Article", "Thing"),
        license="cc-by-sa-4.0",
    )


@pytest.mark.parametrize(
    "html, field, value",
    [
        ("<meta property=og:title content=Wheels>", "title", "Wheels"),
        ("<meta property=og:title content=''>", "title", None),
        ("<meta property=og:title>", "title", None),
        ("<link rel=canonical href='http://['>", "canonical_url", None),
        ("<link rel=canonical href='javascript:x'>", "canonical_url", None),
        (f"<link rel=canonical href='/{'x' * 3000}'>", "canonical_url", None),
        (
            "<link rel=canonical><meta property=og:url content=//m.example/a>",
            "canonical_url",
            "https://m.example/a",
        ),
        ("<meta property=article:author content=https://face.example/me>", "author", None),
        ("<meta name=DC.Creator content='B. Smith'>", "author", "B. Smith"),
        (ld({"author": {"name": "C.  Weaver"}}), "author", "C. Weaver"),
        (ld({"author": [{"name": "A"}, "B", {"name": "A"}, {"name": 5}]}), "author", "A; B"),
        (
            ld({"@graph": [{"author": {"@id": "#p"}}, {"@id": "#p", "name": "P"}]}),
            "author",
            "P",
        ),
        (ld({"author": {"name": "\ud800\0a"}}), "author", "? a"),
        (ld({"datePublished": "2021-03-05"}), "published", "2021-03-05"),
        (ld({"datePublished": 1614902400}), "published", None),
        ("<meta itemprop=datePublished content=2021-3-5>", "published", "2021-03-05"),
        ("<meta name=dc.date content='5 March 2021'>", "published", None),
        ("<html lang=''><meta http-equiv=content-language content=DE>", "declared_language", "de"),
        ("<html lang='{{lang}}'>", "declared_language", None),
        (
            ld([{"@graph": [{"@type": "WebPage"}]}, {"@type": "Person"}]),
            "schema_types",
            ("Person", "WebPage"),
        ),
    ],
)
def test_fields(html, field, value):
    assert getattr(of(html), field) == value


@pytest.mark.parametrize(
    "html, license",
    [
        (f"<a rel='nofollow license' href='{BY}'>x</a>", "cc-by-3.0"),
        ("<a rel=license href=/terms>x</a>", "https://mill.example/terms"),
        ("<a rel=license href='#x'>x</a>", None),
        (f"<link itemprop=license href='{BY}'>", "cc-by-3.0"),
        (f"<p>See <a href='{BY_SA}'>this license</a>.", None),  # it only writes about it
        (f"<p>Under <a href='{BY}'>A</a><footer>{BY_SA}</footer>", None),
        (f"<footer><p><a href='{BY_SA}'>license</a></footer>", "cc-by-sa-4.0"),
        (f"<div id=site-footer><p>By <b><a href='{BY_SA}'>l</a></b></div>", "cc-by-sa-4.0"),
        (f"<div class=copyright><a href='{BY_SA}'>l</a></div>", "cc-by-sa-4.0"),
        (f"<div class=nonfooter><a href='{BY_SA}'>l</a></div>", None),
        ("<footer><a href='https://creativecommons.org/about'>l</a></footer>", None),
        # a gallery: each image has its own
        (f"<a rel=license href='{BY}'>a</a><a rel=license href='{BY_SA}'>b</a>", None),
        (f"<figure><a rel=license href='{BY}'>photo</a></figure>", None),
        (ld({"@type": "ImageObject", "license": BY}), None),
        (ld({"@type": "Article", "license": {"@id": BY}}), "cc-by-3.0"),
        (ld({"@type": "Article", "license": "All mine"}), None),
        ("<meta name=DC.rights content='CC BY-NC-ND 4.0'>", "cc-by-nc-nd-4.0"),
        ("<meta name=dc.rights content='Copyright 2020, the mill'>", None),
        (f"<template><link rel=license href='{BY}'></template>", None),
        (f"<a rel=license href='{BY}'></a><footer><a href='{BY_SA}'></a></footer>", "cc-by-3.0"),
    ],
)
def test_the_license_that_a_page_declares_for_itself(html, license):
    assert of(html).license == license


@pytest.mark.parametrize(
    "declared, name",
    [
        (BY_SA, "cc-by-sa-4.0"),
        ("https://creativecommons.org/licenses/by/", "cc-by"),
        ("https://creativecommons.org/publicdomain/zero/1.0/", "cc0-1.0"),
        ("https://creativecommons.org/publicdomain/mark/1.0/deed.de", "pdm-1.0"),
        ("https://creativecommons.org/licenses/", None),
        ("https://creativecommons.org/licenses/sampling+/1.0/", None),
        ("Creative Commons Attribution-ShareAlike 4.0 International License", "cc-by-sa-4.0"),
        ("Creative Commons Attribution License (CC BY 4.0)", "cc-by"),
        ("CC BY-NC-SA", "cc-by-nc-sa"),
        ("CC Attribution - NonCommercial - NoDerivatives v3.0", "cc-by-nc-nd-3.0"),
        ("https://en.wikipedia.org/wiki/Wikipedia:Text_of_the_Creative_Commons_Attribution-ShareAlike_4.0_International_License", "cc-by-sa-4.0"),
        ("CC0", "cc0-1.0"),
        ("http://www.gnu.org/licenses/fdl-1.3.html", "gfdl-1.3"),
        ("GNU Free Documentation License 1.2", "gfdl-1.2"),
        ("https://www.apache.org/licenses/LICENSE-2.0.html", "apache-2.0"),
        ("https://opensource.org/licenses/MIT", "mit"),
        ("https://spdx.org/licenses/BSD-3-Clause.html", "bsd-3-clause"),
        ("Photos CC BY 4.0, all rights reserved", None),
        ("the cc bypass", None),
        ("", None),
    ],
)  # fmt: skip
def test_names_of_licenses(declared, name):
    assert license_id(declared) == name


@pytest.mark.parametrize(
    "text, day",
    [
        ("2024-02-30", None),
        ("2024/2/9 10:00", "2024-02-09"),
        ("20240209T10", "2024-02-09"),
        ("1614902400", None),
        ("0001-01-01", None),
        ("２０２４-02-09", None),
        (None, None),
    ],
)
def test_days(text, day):
    assert iso_day(text) == day


@pytest.mark.parametrize(
    "script, values",
    [
        ('/*<![CDATA[*/ {"a": 1} /*]]>*/', [{"a": 1}]),
        ('<!-- {"a": 1} -->', [{"a": 1}]),
        ('//<![CDATA[\n{"a": "http://b/*c"}\n//]]>', [{"a": "http://b/*c"}]),
        ('{"a": [1, 2,],}', [{"a": [1, 2]}]),
        ('{"a": 1}{"b": 2},\n[3];', [{"a": 1}, {"b": 2}, [3]]),
        ('{"a": "line\nbreak"}', [{"a": "line\nbreak"}]),
        ("{&quot;a&quot;: 1}", [{"a": 1}]),
        ('{"a": 1 /* one */ }', [{"a": 1}]),
        ('{"a": 1} garbage', [{"a": 1}]),
        ("", []),
        ("nonsense", []),
    ],
)
def test_dirty_json_ld(script, values):
    assert parse_json_ld(script) == values


@pytest.mark.parametrize(
    "script",
    [
        "[" * 200_000,
        '{"@graph":' * 20_000,
        '{"@graph":' * 900 + "1" + "}" * 900,
        "/*" * 100_000,
        "," * 200_000,
        ", \n" * 60_000 + "x",
        "1 " * 100_000,
        "9" * 200_000,
        "<!--" * 50_000,
        "//" * 100_000,
        "[" + '{"author":{"@id":"x"}},' * 9_000 + "1]",
    ],
)
def test_hostile_json_ld_takes_no_time(script):
    start = time.process_time()
    metadata(Head(json_ld=[script] * 3))
    assert time.process_time() - start < 3.0


@pytest.mark.parametrize(
    "html",
    [
        "<meta name=author content=x>" * 200_000,
        "".join(f"<meta name=dc.rights content={'cc-by ' * 40}{i}>" for i in range(50_000)),
        "".join(f"<a rel=license href=https://a.example/{i}>" for i in range(100_000)),
        f"<footer>{f'<a href={BY}>' * 100_000}",
        "<div>" * 50_000 + f"<p><a href={BY}>" * 50_000,
        f"<link rel=canonical href={'x/' * 1_000_000}><title>{'t ' * 1_000_000}</title>",
        f"<html lang={'en-' * 500_000}><meta name=dc.date content={'2' * 1_000_000}>",
    ],
    ids=["authors", "rights", "licenses", "footer", "deep", "long", "tags"],
)
def test_hostile_heads_take_no_time(html):
    head = walk(html).head
    start = time.process_time()
    metadata(head, URL)
    assert time.process_time() - start < 2.0


@given(st.recursive(st.none() | st.integers() | st.text(max_size=9), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["@type", "@id", "@graph", "author", "name", "license", "datePublished"]), inner, max_size=4), max_leaves=12))  # fmt: skip
def test_metadata_is_total(value):
    head = Head(json_ld=[json.dumps(value)], links=[("license", str(value)[:50])])
    assert isinstance(metadata(head, "http://["), Metadata)


@given(st.text())
def test_metadata_is_total_for_any_text(text):
    metas = [
        {"name": name, "content": text}
        for name in ("author", "dc.date", "license", "og:url", "og:title", "og:locale", "")
    ]
    head = Head("", text, metas, [("license", text), ("canonical", text)], [text])
    said = metadata(head, text)
    for value in (said.title, said.author, said.license, said.canonical_url):
        assert value is None or (value.encode("utf-8") and "\0" not in value)
