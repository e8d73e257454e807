"""Blocklists: an entry in any common form blocks its URLs in any form, or is an error."""

from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from filters.url_lists import Lists, _addresses, ascii_host, load_lists
from filters.url_policy import UrlPolicy, _blocked_address


def policy(folder: Path, lists: str | bytes = "", words: str | bytes = "") -> UrlPolicy:
    load_lists.cache_clear()  # the files have the same names as in other tests
    for name, content in (("lists", lists), ("words", words)):
        data = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
        (folder / name).write_bytes(data)
    return UrlPolicy((str(folder / "lists"),), (str(folder / "words"),))


LISTS = """\ufefffirst.example\r
plain.example
0.0.0.0 hosts.example other.example # both
.dotted.example
*.star.example
inline.example # reason
münchen.example
||ads.example^
||ads.site.example/banner^
https://www.Full.example:8080/
FE80::1%lo0 local.example
192.0.2.7
[2001:db8::1]
site.example/~user
site.example/q?id=1
.site.example/below
latin.example/caf\xe9
site.example/a b/*
! of ad blockers
; and others
"""


@pytest.mark.parametrize(
    "url, rule",
    [
        ("http://first.example/", "host"),
        ("http://plain.example./", "host"),
        ("http://other.example/", "host"),
        ("http://a.dotted.example/", "host"),
        ("http://a.star.example/", "host"),
        ("http://inline.example/", "host"),
        ("http://xn--mnchen-3ya.example/", "host"),
        ("http://b.MÜNCHEN.example/", "host"),
        ("http://m%C3%BCnchen.example/", "host"),
        ("http://ads.example/x", "host"),
        ("http://ads.site.example/banner/1", "url"),
        ("http://full.example/", "host"),
        ("http://local.example/", "host"),
        ("http://192.0.2.7:80/", "host"),
        ("http://[2001:DB8::1]/", "host"),
        ("http://site.example/%7Euser/x", "url"),
        ("http://site.example//./~USER", "url"),
        ("http://site.example/x/../~user", "url"),
        ("http://site.example/%7euser?x", "url"),
        ("http://site.example/~user2", None),
        ("http://site.example/q/?id=1&x=2", "url"),
        ("http://site.example/q?id=12", None),
        ("http://site.example/q", None),
        ("http://a.site.example/below/x", "url"),
        ("http://a.site.example/~user", None),
        ("http://latin.example/caf%E9", "url"),
        ("http://latin.example/caf%C3%A9", None),
        ("http://site.example/a%20b/c", "url"),
        ("http://site.example/a%2Fb", None),
        ("http://notplain.example/", None),
        ("http://w.example/%D0%BF%D0%BB%D0%BE%D1%85%D0%BE/", "word"),
        ("http://w.example/очень-Плохо", "word"),
        ("http://xn--k1agab6a.example/", "word"),
        ("http://w.example/плохой", None),
        ("http://w.example/%E8%B5%8C%E5%8D%9A%E7%BD%91%E7%AB%99", "word"),
        ("http://w.example/दिल-से", "word"),
        ("http://w.example/दाल", None),
        ("http://w.example/free%20money", "word"),
    ],
)
def test_entries_in_every_form_block_urls_in_every_form(tmp_path, url, rule):
    lists = LISTS.encode().replace(b"caf\xc3\xa9", b"caf\xe9")
    blocked = policy(tmp_path, lists, "\ufeffплохо\r\n赌博 # reason\nदिल\nfree money\n").blocked_by(
        url
    )
    assert (blocked and blocked.rule) == rule


labels = st.text("abcxyz0189-_", min_size=1, max_size=8) | st.sampled_from(
    ["münchen", "пример", "例え"]
)
hosts = st.lists(labels, min_size=2, max_size=4).map(".".join)
parts = st.text(
    st.characters(exclude_categories=["Cs", "Cc", "Z"], exclude_characters="/?#&*^|"),
    min_size=1,
    max_size=8,
)
FORMS = ["{}", ".{}", "*.{}", "||{}^", "http://{}", "//www.{}", "{} # reason", "{}\r", "  {}"]


@given(
    hosts,
    st.lists(parts, max_size=3),
    st.sampled_from(FORMS),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["", "www.", "sub."]),
)
def test_a_url_is_blocked_however_it_and_the_entry_are_written(
    tmp_path_factory, host, path, form, upper, encoded, prefix
):
    path = [part for part in path if part.strip("%. ")]
    entry = form.format(
        "/".join([host, *(quote(part) if "%" in part or "@" in part else part for part in path)])
    )
    rules = policy(tmp_path_factory.getbasetemp(), entry)
    try:
        rules.check(())
    except ValueError as error:
        assert "lists, line 1: " in str(error)  # a label that is no host's
        return
    segments = [quote(part, safe="") if encoded else quote(part) for part in path]
    name = ascii_host(host) if encoded else host
    blocked = rules.blocked_by(
        "https://" + "/".join([name.upper() if upper else name, *segments]) + "/x?y#z"
    )
    assert blocked is not None and blocked.rule == ("url" if path else "host")
    below = rules.blocked_by("https://" + "/".join([prefix + name, *segments]))
    assert (below is not None) == (not path or prefix != "sub." or form in (".{}", "*.{}"))
    assert rules.blocked_by("https://not" + "/".join([name, *segments])) is None


@given(st.text() | st.text("ab.:/?#*@|^$[]% \xe9", max_size=12))
@example("example.org:http")
@example("[::1")
def test_a_line_blocks_a_url_or_is_an_error_or_a_comment(entry):
    try:
        addresses = _addresses(entry) if entry.split() else []
    except ValueError as error:
        assert str(error)
        return
    for address in addresses:
        lists = Lists(frozenset({address} - {""}), frozenset({address}), None)
        host, slash, rest = address.removeprefix(".").partition("/")
        url = f"http://{f'[{host}]' if ':' in host else host}{slash}{rest}"
        assert _blocked_address(url, lists) == (("url" if slash else "host"), address)


@pytest.mark.parametrize(
    "entry",
    [
        *(
            "two words",
            "user@mail.example",
            "ex*mple.org",
            "*ads.example",
            "a.example/*/b",
            "/^ads/",
        ),
        *(
            "@@||good.example^",
            "||a.example^$third-party",
            "a.example##.ad",
            "host:port",
            "http://",
            ".",
        ),
        *(
            "a..example",
            "caf\udce9.example",
            f"{'a' * 64}.example",
            "<html>",
            "domain,category",
        ),
    ],
)
def test_an_entry_that_can_never_match_is_an_error_with_its_line(tmp_path, entry):
    rules = policy(tmp_path, f"good.example\n\n{entry}\n".encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"can never match: .*; correct or remove") as error:
        rules.check(())
    assert str(error.value).startswith(f"{tmp_path}/lists, line 3: ")


def test_all_faults_are_counted(tmp_path):
    with pytest.raises(ValueError, match=r"(?s)lists, line 1: .*line 5: .*\nand 3 more; correct"):
        policy(tmp_path, "a b\n" * 8).check(())
    with pytest.raises(ValueError, match=r"words, line 2: .* no letter or digit"):
        policy(tmp_path, "", "good\n***\n").check(())
    with pytest.raises(ValueError, match=r"words, line 1: .* not UTF-8"):
        policy(tmp_path, "", b"caf\xe9\n").check(())
    with pytest.raises(ValueError, match="no file 'domains' or 'urls' in"):
        UrlPolicy((str(tmp_path),)).check(())
