"""Which charset a page declares for itself, and what only looks like a declaration."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.read.prescan import declared_labels


@pytest.mark.parametrize(
    "page, label",
    [
        (b"<meta charset=koi8-r>", "koi8-r"),
        (b"<META CharSet = 'koi8-r' />", "koi8-r"),
        (b"<meta/charset=koi8-r>", "koi8-r"),
        (b'<meta name=x\ncharset="koi8-r" charset=utf-8>', "koi8-r"),
        (b"<meta http-equiv=Content-Type content='text/html; charset=koi8-r'>", "koi8-r"),
        (b"<meta content='text/html;charset = \"koi8-r\"' http-equiv='content-type'>", "koi8-r"),
        (b"<meta http-equiv=content-type content='charset charset=koi8-r; x'>", "koi8-r"),
        (b"<meta http-equiv=refresh content='charset=koi8-r'>", None),
        (b"<meta name=description content='charset=koi8-r'>", None),
        (b"<meta name=description content='a > b'><meta charset=koi8-r>", "koi8-r"),
        (b"<metadata charset=utf-8>", None),
        (b"<meta name='charset' content='utf-8'>", None),
        (b"<link charset=utf-8><meta charset=koi8-r>", "koi8-r"),
        (b"<a title='<meta charset=utf-8>'><meta charset=koi8-r>", "koi8-r"),
        (b"<a title=don't><meta charset=koi8-r>'", "koi8-r"),
        (b"<!-->--><meta charset=koi8-r>", "koi8-r"),
        (b"<!--> <meta charset=koi8-r>", "koi8-r"),
        (b"<!doctype html><meta charset=koi8-r>", "koi8-r"),
        (b"<!-- <meta charset=utf-8>", None),
        (b"<script>'</scripts><meta charset=utf-8>'</script ><meta charset=koi8-r>", "koi8-r"),
        (b"<noscript><meta charset=koi8-r></noscript>", "koi8-r"),
        (b"<?xml version='1.0' encoding='koi8-r'?><meta name=x>", "koi8-r"),
        (b"<?xml version='1.0' encoding='utf-8'?><meta charset=koi8-r>", "koi8-r"),
        (b"<p><?xml version='1.0' encoding='utf-8'?>", None),
        (b"<meta charset=koi8-r", "koi8-r"),
        (b"", None),
    ],
)
def test_first_label(page, label):
    assert next(declared_labels(page), None) == label


DECOYS = [
    b"<!-- <meta charset=utf-8> -->",
    b"<!--><!-- - <meta charset=utf-8>-->",
    b"<script>var t='<meta charset=utf-8>';</script>",
    b"<STYLE><meta charset=utf-8></style>",
    b"<title><meta charset=utf-8></title>",
    b"<textarea><meta charset=utf-8></TEXTAREA>",
    b"<meta name=description content='<meta charset=utf-8>'>",
    b"<a href=\"?charset=utf-8\" onclick='x > y'>charset=utf-8</a>",
    b"<script src=x charset=utf-8></script>",
    b"<form accept-charset=utf-8>",
    b"a < b && c > d <3 </ > <>",
    b"\xa4\xa2 caf\xe9",
]


@given(
    st.lists(st.sampled_from(DECOYS)), st.lists(st.sampled_from(DECOYS)), st.integers(0, 100_000)
)
def test_only_the_meta_element_counts(before, after, padding):
    text = b"".join([*before, b" " * padding])
    assert list(declared_labels(text + b"".join(after))) == []
    real = text + b"<meta charset=koi8-r>" + b"".join(after)
    assert list(declared_labels(real)) == ["koi8-r"]


@given(
    st.binary(max_size=200)
    | st.lists(st.sampled_from([*DECOYS, b"<", b"'", b"=", b"<meta "])).map(b"".join)
)
def test_any_bytes_have_labels_or_none(payload):
    assert all(isinstance(label, str) for label in declared_labels(payload))
