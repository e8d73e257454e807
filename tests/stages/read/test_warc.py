"""Reading WARC files: what is delivered, what is skipped and why, and what a damaged place costs."""

import gzip
import io
import os
import zlib
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import brotli
import pytest
import zstandard
from fastwarc.warc import ArchiveIterator
from hypothesis import given
from hypothesis import strategies as st

from stages.read.http import decode_body
from stages.read.warc import SKIP_REASONS, ReadStats, Record, read_records
from tests.support.damaged_warc import damaged_file, uncounted

LIMIT = 1 << 20
PAGE = b"<!doctype html><html><body>" + b"<p>Good morning.</p>" * 40 + b"</body></html>"


def warc(
    block: bytes,
    kind: str = "response",
    url: str = "http://example.org/",
    eol: str = "\r\n",
    **headers: str,
) -> bytes:
    """One uncompressed record; `headers` names have _ for -; content_length may lie."""
    fields = {
        "WARC-Type": kind,
        "WARC-Target-URI": url,
        "WARC-Date": "2024-05-01T10:00:00Z",
        "Content-Type": "application/http; msgtype=response" if kind == "response" else "text/html",
        "Content-Length": str(len(block)),
    }
    fields |= {
        name.replace("_", "-").title().replace("Warc-", "WARC-"): value
        for name, value in headers.items()
    }
    lines = ["WARC/1.0", *(f"{name}: {value}" for name, value in fields.items()), "", ""]
    return eol.join(lines).encode("latin-1") + block + (eol * 2).encode()


def http(body: bytes = PAGE, status: str = "HTTP/1.1 200 OK", **headers: str) -> bytes:
    fields = {"Content-Type": "text/html"} | {
        name.replace("_", "-").title(): v for name, v in headers.items()
    }
    lines = [status, *(f"{name}: {value}" for name, value in fields.items()), "", ""]
    return "\r\n".join(lines).encode("latin-1") + body


def read(path: Path, data: bytes, limit: int = LIMIT) -> tuple[list[Record], ReadStats]:
    path = path / "file.warc.gz"
    path.write_bytes(data)
    stats = ReadStats()
    records = list(read_records(path, max_payload_bytes=limit, stats=stats))
    assert stats.records == len(records)
    assert stats.bytes_total == len(data)
    assert stats.skipped == Counter(
        record.skipped for record in records if record.skipped is not None
    )
    assert set(stats.skipped) <= set(SKIP_REASONS)
    assert [record.index for record in records] == list(range(len(records)))
    return records, stats


# -- which records count
# -----------------------------------------------------------------------------------------------

RECORDS = {
    "html": (warc(http()), None),
    "resource": (warc(PAGE, "resource"), None),
    "xhtml": (warc(http(content_type="application/xhtml+xml; charset=utf-8")), None),
    "identified html": (
        warc(http(content_type="text/plain"), warc_identified_payload_type="text/html"),
        None,
    ),
    "identified pdf": (warc(http(), warc_identified_payload_type="application/pdf"), "not_html"),
    "sniffed": (warc(http(content_type="application/octet-stream")), None),
    "sniffed, no type": (warc(b"HTTP/1.1 200 OK\r\n\r\n" + PAGE), None),
    "sniffed, none found": (warc(http(b"{}", content_type="")), "not_html"),
    "type without ;": (warc(http(content_type="text/html charset=utf-8")), None),
    "type in quotes": (warc(http(content_type='"text/html"')), None),
    "charset alone": (warc(http(content_type="charset=utf-8")), None),
    "short type": (warc(http(content_type="text/htm")), None),
    "xml with a page": (warc(http(content_type="application/xml")), None),
    "feed": (
        warc(http(b"<?xml version='1.0'?><rss><title>News</title>", content_type="text/xml")),
        "not_html",
    ),
    "png sent as html": (warc(http(b"\x89PNG\r\n\x1a\n" + PAGE)), "not_html"),
    "json": (warc(http(b"{}", content_type="application/json")), "not_html"),
    "request": (warc(b"GET / HTTP/1.1\r\n\r\n", "request"), "not_response"),
    "warcinfo": (warc(b"a: b", "warcinfo"), "not_response"),
    "wat": (warc(b"{}", "metadata", content_type="application/json"), "not_response"),
    "segment": (warc(PAGE, "continuation", warc_segment_number="2"), "not_response"),
    "of no known type": (warc(PAGE, "poem"), "not_response"),
    "revisit": (warc(http(b""), "revisit"), "revisit"),
    "without url": (warc(http(), url=""), "no_url"),
    "without url, empty": (warc(PAGE, "resource", url=" <> "), "no_url"),
    "text without url": (warc(b"text", "conversion", url="", content_type="text/plain"), "no_url"),
    "dns": (
        warc(
            b"20240501\nexample.org. 1 IN A 1.2.3.4", url="dns:example.org", content_type="text/dns"
        ),
        "not_http",
    ),
    "http without its type": (warc(http(), content_type="text/html"), None),
    "body only": (warc(PAGE, content_type="text/html"), "bad_http_header"),
    "long header": (warc(http(x="y" * 400_000)), "bad_http_header"),
    "no status": (warc(http(status="HTTP/1.1 OK")), "bad_http_header"),
    "status without text": (warc(http(status="HTTP/1.1 200")), None),
    "status of one digit": (warc(http(status="HTTP/1.1 0 Odd")), "http_status"),
    "http/2": (warc(http(status="HTTP/2 200")), None),
    "icy": (warc(http(status="ICY 200 OK")), None),
    "interim": (warc(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + http()), None),
    "interims": (warc(b"HTTP/1.1 100 Continue\r\n\r\n" * 3 + http()), None),
    "interim alone": (warc(b"HTTP/1.1 100 Continue\r\n\r\n"), "http_status"),
    "proxy": (warc(b"HTTP/1.0 200 Connection established\r\n\r\n" + http()), None),
    "not found": (warc(http(status="HTTP/1.1 404 Not Found")), "http_status"),
    "redirect": (warc(http(status="HTTP/1.1 301 Moved")), "http_status"),
    "empty": (warc(http(b"")), "empty_payload"),
    "blank": (warc(http(b" \r\n")), "empty_payload"),
    "no block": (warc(b""), "bad_http_header"),
    "large": (warc(http(PAGE + b" " * LIMIT)), "too_large"),
    "large once decoded": (
        warc(http(gzip.compress(PAGE + b" " * LIMIT), content_encoding="gzip")),
        "too_large",
    ),
    "noise as gzip": (warc(http(bytes(range(256)), content_encoding="gzip")), "bad_encoding"),
    "noise as sdch": (warc(http(bytes(range(256)), content_encoding="sdch")), "bad_encoding"),
    "conversion": (warc(b"Good morning.", "conversion", content_type="text/plain"), None),
    "conversion to pdf": (warc(b"%PDF", "conversion", content_type="application/pdf"), "not_text"),
}


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_each_record_is_delivered_or_skipped_for_its_reason(tmp_path, name, pack):
    data, reason = RECORDS[name]
    records, stats = read(tmp_path, pack(data))
    assert [record.skipped for record in records] == [reason]
    assert bool(records[0].payload) == (reason is None)
    assert (_lost(stats), stats.damaged_places) == (0, 0)


def test_record_carries_the_headers_of_warc_and_http(tmp_path):
    block = http(status="HTTP/1.1 203 Hm", content_type="text/html; charset=x", x_odd="\xe9")
    [record], _ = read(tmp_path, warc(block, warc_truncated="length"))
    assert record.kind == "html"
    assert record.status == 203
    assert record.url == "http://example.org/"
    assert record.date == datetime(2024, 5, 1, 10, tzinfo=UTC)
    assert record.headers == {"content-type": "text/html; charset=x", "x-odd": "é"}
    assert record.payload == PAGE
    assert record.truncated


def test_wet_text_is_delivered_as_it_is(tmp_path):
    [record], _ = read(
        tmp_path, warc("Grüß Gott\n".encode(), "conversion", content_type="text/plain")
    )
    assert (record.kind, record.payload, record.status) == ("text", "Grüß Gott\n".encode(), None)


@pytest.mark.parametrize(
    "written, url",
    [
        ("<http://a/>", "http://a/"),
        ("http://a/b c", "http://a/b%20c"),
        ("http://[", "http://["),
        ("\xe9", "�"),
    ],
)
def test_odd_urls_are_kept(tmp_path, written, url):
    [record], _ = read(tmp_path, warc(http(), url=written))
    assert record.url == url
    assert record.skipped is None


def test_dates_are_in_utc(tmp_path):
    [record], _ = read(tmp_path, warc(http(), warc_date="2024-05-01T01:30:00+02:00"))
    assert record.date is not None
    assert record.date.isoformat() == "2024-04-30T23:30:00+00:00"


@pytest.mark.parametrize(
    "date", ["", "2009-03-65T08:43:19-0800", "yesterday", "0001-01-01T00:00:00+12:00"]
)
def test_an_impossible_date_is_none(tmp_path, date):
    [record], _ = read(tmp_path, warc(http(), warc_date=date))
    assert record.date is None
    assert record.skipped is None


# -- HTTP's encodings
# --------------------------------------------------------------------------------------------------


def chunked(body: bytes, size: int = 100) -> bytes:
    pieces = [body[i : i + size] for i in range(0, len(body), size)]
    return b"".join(b"%x;ext=1\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


def deflate_bare(body: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(body) + packer.flush()


ENCODERS = {
    "gzip": gzip.compress,
    "x-gzip": gzip.compress,
    "deflate": zlib.compress,
    "Deflate": deflate_bare,
    "br": brotli.compress,
    "zstd": zstandard.compress,
    "br, gzip": lambda body: gzip.compress(brotli.compress(body)),
    "identity": bytes,
}


@pytest.mark.parametrize("encoding", ENCODERS)
def test_encodings_are_undone(encoding):
    headers = {"content-encoding": encoding, "transfer-encoding": "chunked"}
    assert decode_body(chunked(ENCODERS[encoding](PAGE)), headers, limit=LIMIT) == (PAGE, None)


@pytest.mark.parametrize("encoding", [*ENCODERS, "compress"])
def test_headers_that_lie_leave_the_body_alone(encoding):
    headers = {"content-encoding": encoding, "transfer-encoding": "chunked"}
    assert decode_body(PAGE, headers, limit=LIMIT) == (PAGE, None)


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "Deflate", "br", "zstd"])
def test_a_bomb_is_cut_at_the_limit(encoding):
    bomb = ENCODERS[encoding](b"\0" * (20 << 20))
    body = decode_body(bomb, {"content-encoding": encoding}, limit=1000)
    assert len(body.data) == 1001


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br"])
def test_a_stream_that_was_cut_gives_what_it_held(encoding):
    text = os.urandom(9000).hex().encode()
    body = decode_body(
        ENCODERS[encoding](text)[:-2000], {"content-encoding": encoding}, limit=LIMIT
    )
    assert text.startswith(body.data)
    assert len(body.data) > 1000


@pytest.mark.parametrize(
    "body, decoded",
    [
        (b"5\r\nhello", b"hello"),
        (b"5\r\nhel", b"hel"),
        (b"3\r\nhello\r\n0\r\n\r\n", b"hello\r\n0\r\n\r\n"),
        (b"3\nhel\n2\nlo\n0\n\n", b"hello"),
        (b"0\r\n\r\n", b""),
        (b"fffffffff\r\nx", b"fffffffff\r\nx"),
        (b"", b""),
    ],
)
def test_wrong_chunks_are_tolerated(body, decoded):
    assert decode_body(body, {"transfer-encoding": "chunked"}, limit=LIMIT) == (decoded, None)


@given(
    st.binary(max_size=300),
    st.sampled_from(["gzip", "deflate", "br", "zstd", "gzip, br", "?"]),
    st.booleans(),
)
def test_decode_body_is_total(body, encoding, chunk):
    headers = {"content-encoding": encoding} | ({"transfer-encoding": "chunked"} if chunk else {})
    data, problem = decode_body(body, headers, limit=1000)
    assert len(data) <= 1001
    assert problem in (None, "bad_encoding")


# -- shapes of files
# ---------------------------------------------------------------------------------------------------

PAGES = [PAGE + str(i).encode() * (50 * i) for i in range(6)]
PLAIN = [warc(http(page), url=f"http://example.org/{i}") for i, page in enumerate(PAGES)]
MEMBERS = [gzip.compress(record, mtime=0) for record in PLAIN]


def _lost(stats: ReadStats) -> int:
    return stats.lost_bytes + stats.unreadable_bytes


def pack(parts: list[bytes], shape: str) -> bytes:
    """A file of records: not compressed, or with a gzip member for each, or with one for all."""
    whole = b"".join(parts)
    if shape == "plain":
        return whole
    return gzip.compress(whole) if shape == "one member" else b"".join(map(gzip.compress, parts))


def payloads(records: list[Record]) -> list[bytes]:
    return [record.payload for record in records]


@pytest.mark.parametrize(
    "data",
    [
        b"".join(MEMBERS),
        b"".join(PLAIN),
        gzip.compress(b"".join(PLAIN)),
        gzip.compress(b"".join(PLAIN[:3])) + b"".join(MEMBERS[3:]),
        b"".join(map(zstandard.compress, PLAIN)),
        b"".join(gzip.compress(b"".join(PLAIN)[i : i + 500]) for i in range(0, 20_000, 500)),
        b"".join(gzip.compress(record.rstrip()) for record in PLAIN),
        b"".join(MEMBERS[:3]) + gzip.compress(b"") + b"".join(MEMBERS[3:]),
        b"".join(MEMBERS[:3]) + b"\0" * 600 + b"".join(MEMBERS[3:]) + b"\0" * 512,
        b"\r\n\r\n".join(PLAIN),
        b"".join(PLAIN).rstrip(),
        b"".join(warc(http(page), eol="\n") for page in PAGES),
        gzip.compress(b"".join(warc(http(page), eol="\n") for page in PAGES)),
    ],
    ids=[
        "members",
        "plain",
        "one",
        "mixed",
        "zstd",
        "blocks",
        "nothing after records",
        "empty member",
        "zeros",
        "blank lines",
        "bare end",
        "lf",
        "lf gzip",
    ],
)
def test_every_shape_of_a_whole_file_gives_every_page_and_no_loss(tmp_path, data):
    records, stats = read(tmp_path, data)
    assert payloads(records) == PAGES
    assert (_lost(stats), stats.damaged_places) == (0, 0)


def test_offset_is_where_the_member_or_record_starts(tmp_path):
    records, _ = read(tmp_path, b"".join(MEMBERS))
    assert [r.offset for r in records] == [sum(map(len, MEMBERS[:i])) for i in range(6)]
    records, _ = read(tmp_path, b"".join(PLAIN))
    assert [r.offset for r in records] == [sum(map(len, PLAIN[:i])) for i in range(6)]


@pytest.mark.parametrize(
    "head", [b"filedesc://x.arc 0.0.0.0 2008 text/plain 1\n", b"\x04\x22\x4d\x18...", b"BZh9..."]
)
@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_unsupported_files_say_so(tmp_path, head, pack):
    records, stats = read(tmp_path, pack(head))
    assert [record.skipped for record in records] == ["unsupported"]
    assert stats.damaged_places == 0


def test_a_zstd_window_may_be_long(tmp_path):
    options = zstandard.ZstdCompressionParameters(window_log=31, enable_ldm=False)
    compressor = zstandard.ZstdCompressor(compression_params=options).compressobj()
    records, stats = read(tmp_path, compressor.compress(warc(http())) + compressor.flush())
    assert [r.payload for r in records] == [PAGE] and stats.damaged_places == 0


def test_an_empty_file_holds_nothing(tmp_path):
    assert read(tmp_path, b"") == ([], ReadStats())


def test_a_zstd_file_is_read_with_its_dictionary(tmp_path):
    dictionary = zstandard.train_dictionary(4000, PLAIN * 50)
    compress = zstandard.ZstdCompressor(dict_data=dictionary).compress
    raw = dictionary.as_bytes()
    first = b"\x5d\x2a\x4d\x18" + len(raw).to_bytes(4, "little") + raw
    records, stats = read(tmp_path, first + b"".join(map(compress, PLAIN)))
    assert payloads(records) == PAGES
    assert (_lost(stats), stats.damaged_places) == (0, 0)


@pytest.mark.parametrize(
    "raw", [b"\x28\xb5\x2f\xfd" + b"\xff" * 30, b"\x37\xa4\x30\xec" + b"\xff" * 40]
)
def test_frames_of_a_damaged_dictionary_are_counted_as_unreadable(tmp_path, raw):
    dictionary = zstandard.train_dictionary(4000, PLAIN * 50)
    frames = b"".join(map(zstandard.ZstdCompressor(dict_data=dictionary).compress, PLAIN))
    first = b"\x5d\x2a\x4d\x18" + len(raw).to_bytes(4, "little") + raw
    records, stats = read(tmp_path, first + frames)
    assert (records, stats.unreadable_bytes, stats.damaged_places) == ([], len(frames), 1)


def test_a_record_cut_in_its_http_header_hides_none_that_fills_its_block(tmp_path):
    start = b"HTTP/1.1 200 OK\r\nCon"
    cut = warc(start, content_length=str(len(start) + len(PLAIN[1]))).removesuffix(b"\r\n\r\n")
    records, stats = read(tmp_path, cut + PLAIN[1] + PLAIN[2])
    assert payloads(records)[-2:] == PAGES[1:3] and stats.damaged_places == 1


def test_a_segment_is_marked_as_a_part_of_a_page(tmp_path):
    [record], stats = read(tmp_path, warc(http(), warc_segment_number="1"))
    assert record.truncated and stats.truncated == 1


def test_a_warc_file_that_was_downloaded_is_one_record(tmp_path):
    records, stats = read(
        tmp_path, warc(http(b"".join(PLAIN), content_type="text/html")) + PLAIN[0]
    )
    assert payloads(records) == [b"".join(PLAIN), PAGES[0]] and stats.damaged_places == 0


# -- damage
# ------------------------------------------------------------------------------------------------------------

GAP = b"?" * 30
DAMAGED = {  # what is left of six records, and which of them come out; losses are in bytes
    "noise between members": ([*MEMBERS[:3], GAP, *MEMBERS[3:]], [0, 1, 2, 3, 4, 5], 30),
    "noise before": ([GAP, *MEMBERS], [0, 1, 2, 3, 4, 5], 30),
    "noise behind": ([*MEMBERS, GAP], [0, 1, 2, 3, 4, 5], 30),
    "half a member": ([*MEMBERS[:2], MEMBERS[2][:90], *MEMBERS[3:]], [0, 1, 3, 4, 5], 90),
    "no trailer": (
        [*MEMBERS[:2], MEMBERS[2][:-3], *MEMBERS[3:]],
        [0, 1, 3, 4, 5],
        len(MEMBERS[2]) - 3,
    ),
    "no magic": (
        [*MEMBERS[:2], b"?" + MEMBERS[2][1:], *MEMBERS[3:]],
        [0, 1, 3, 4, 5],
        len(MEMBERS[2]),
    ),
    "a strange member": (
        [*MEMBERS[:2], gzip.compress(GAP), *MEMBERS[2:]],
        [0, 1, 2, 3, 4, 5],
        30,
    ),
    "noise between plain": ([*PLAIN[:3], GAP, *PLAIN[3:]], [0, 1, 2, 3, 4, 5], 30),
    "noise before plain": ([GAP, *PLAIN], [0, 1, 2, 3, 4, 5], 30),
    "plain block too long": ([*PLAIN[:3], PLAIN[3] + GAP, *PLAIN[4:]], [0, 1, 2, 3, 4, 5], 30),
    "one byte too many": ([*MEMBERS, b"\x1f"], [0, 1, 2, 3, 4, 5], 1),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_reading_goes_on_behind_a_damaged_place(tmp_path, name):
    parts, left, lost = DAMAGED[name]
    records, stats = read(tmp_path, b"".join(parts))
    assert payloads(records) == [PAGES[i] for i in left]
    assert stats.damaged_places == 1
    # plain records end in two line feeds, which belong to the gap
    assert lost <= _lost(stats) <= lost + 4


def lying(length: int) -> bytes:
    return warc(http(PAGES[2]), content_length=str(length))


@pytest.mark.parametrize(
    "length",
    [
        str(len(http(PAGES[2])) + 2000),
        str(len(http(PAGES[2])) + 4 + len(PLAIN[3])),  # ends exactly where another record does
        *(str(10**9), "9" * 400, "", "x", "-1"),
    ],
)
@pytest.mark.parametrize("shape", ["plain", "members", "one member"])
def test_a_wrong_length_costs_no_record_and_is_marked(tmp_path, length, shape):
    parts = [*PLAIN[:2], warc(http(PAGES[2]), content_length=length), *PLAIN[3:]]
    records, stats = read(tmp_path, pack(parts, shape))
    assert payloads(records) == PAGES
    assert [record.truncated for record in records] == [i == 2 for i in range(6)]
    assert (stats.damaged_places, stats.truncated, _lost(stats)) == (1, 1, 0)


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.replace(b"WARC-Date", b"WARC-Type: response\r\nWARC-Date"),
        lambda record: record.replace(b"WARC-Type: response\r\n", b""),
        lambda record: record[:-100] + b"\0" * 100,  # what a crashed machine leaves
    ],
    ids=["two types", "no type", "zeros at the end"],
)
def test_a_record_that_is_not_right_counts_as_damage(tmp_path, change):
    _, stats = read(tmp_path, PLAIN[0] + change(PLAIN[1]))
    assert (stats.records, stats.damaged_places, _lost(stats)) == (2, 1, 0)


@pytest.mark.parametrize("data", [b"".join(MEMBERS), b"".join(PLAIN)], ids=["gzip", "plain"])
@pytest.mark.parametrize("cut", [1, 8, 20, 150, 200])
def test_a_file_that_was_cut_off_gives_its_last_page_as_far_as_it_goes(tmp_path, data, cut):
    records, stats = read(tmp_path, data[:-cut])
    assert payloads(records)[:5] == PAGES[:5]
    for record in records[5:]:
        assert PAGES[5].startswith(record.payload)
        assert record.truncated == (record.payload != PAGES[5])
    blank_end_only = data == b"".join(PLAIN) and cut == 1
    assert stats.damaged_places == (0 if blank_end_only else 1)


def test_a_changed_byte_in_a_stored_block_is_caught_by_the_checksum(tmp_path):
    parts = [gzip.compress(record, compresslevel=0) for record in PLAIN]
    parts[3] = parts[3].replace(b"Good", b"Food", 1)
    records, stats = read(tmp_path, b"".join(parts))
    assert payloads(records) == [PAGES[i] for i in (0, 1, 2, 4, 5)]
    assert (stats.damaged_places, _lost(stats)) == (1, len(parts[3]))


def test_a_damaged_member_of_many_records_costs_only_its_rest(tmp_path):
    noise = [
        warc(http(PAGE + os.urandom(1 << 18).hex().encode()), url=f"http://{i}/") for i in range(8)
    ]
    member = bytearray(gzip.compress(b"".join(noise)))
    member[len(member) // 2 : len(member) // 2 + 2000] = b"\xff" * 2000
    records, stats = read(tmp_path, bytes(member) + MEMBERS[0])
    assert [record.url for record in records[:3]] == ["http://0/", "http://1/", "http://2/"]
    assert records[-1].payload == PAGES[0]
    assert len(member) // 3 < _lost(stats) < len(member) * 3 // 4


PADDING = b"\0\r\n\t "


def unpacks(member: bytes) -> bytes | None:
    """The slow oracle: what Python's gzip makes of a member; None if it is damaged."""
    try:
        return gzip.decompress(member)
    except (OSError, EOFError, zlib.error):
        return None


@given(index=st.integers(0, 5), place=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_a_changed_byte_costs_one_member_at_most(tmp_path_factory, index, place, flip):
    parts = list(MEMBERS)
    damaged = bytearray(parts[index])
    damaged[int(place * len(damaged))] ^= flip
    parts[index] = bytes(damaged)
    records, stats = read(tmp_path_factory.getbasetemp(), b"".join(parts))
    expected = [page for i, page in enumerate(PAGES) if i != index]
    if unpacks(parts[index]) == PLAIN[index]:
        assert [page for page in payloads(records) if page != PAGES[index]] == expected
    else:
        # in the last member a changed byte can look like a file that was cut off: its page is
        # delivered as truncated, and what is missing are bytes of the page
        in_part = index == 5 and len(records) == 6
        assert (payloads(records)[:5] if in_part else payloads(records)) == expected
        assert stats.damaged_places == 1
        if in_part:
            assert records[-1].truncated and stats.lost_bytes < len(PLAIN[5])
        else:
            rest = damaged.lstrip(PADDING)  # a changed first byte may be padding
            assert _lost(stats) == len(rest)


@given(data=st.data())
def test_what_was_not_cut_out_is_recovered(tmp_path_factory, data):
    whole = b"".join(MEMBERS)
    a, b = sorted(data.draw(st.tuples(st.integers(0, len(whole)), st.integers(0, len(whole)))))
    records, stats = read(tmp_path_factory.getbasetemp(), whole[:a] + whole[b:])
    starts = [sum(map(len, MEMBERS[:i])) for i in range(7)]
    # members begin with the same bytes: cutting [1, 227) leaves the same file as cutting the whole
    # first member, [0, 226)
    for start in starts:
        if whole[:start] + whole[start + b - a :] == whole[:a] + whole[b:]:
            a, b = start, start + b - a
            break
    untouched = [i for i in range(6) if starts[i + 1] <= a or starts[i] >= b or a == b]
    expected = [PAGES[i] for i in untouched]
    # a page that was cut short may equal a shorter one
    whole_pages = payloads([record for record in records if not record.truncated])
    assert [page for page in whole_pages if page in expected] == expected
    first = max((s for s in starts if s <= a), default=0)
    last = min((s for s in starts if s >= b), default=len(whole))
    rest = (whole[first:a] + whole[b:last]).lstrip(PADDING)  # a file may be padded
    assert (stats.damaged_places > 0) == (rest != b"")
    if last < len(whole):  # else the file is cut off, and its last page is delivered in part
        # members begin alike, so what is left of one may complete the next one
        completed = [i for i in range(6) if i not in untouched and PAGES[i] in whole_pages]
        assert stats.unreadable_bytes == len(rest) - sum(len(MEMBERS[i]) for i in completed)


@given(st.integers(0, 1 << 60))
def test_no_damage_makes_a_record_disappear_uncounted(tmp_path_factory, seed):
    assert uncounted(damaged_file(seed), tmp_path_factory.getbasetemp()) is None


@given(
    data=st.binary(max_size=200)
    | st.binary(max_size=100).map(lambda tail: MEMBERS[0] + tail + PLAIN[1])
)
def test_no_bytes_crash_the_reader(tmp_path_factory, data):
    _, stats = read(tmp_path_factory.getbasetemp(), data)
    assert _lost(stats) <= len(data)


# -- the real thing
# ----------------------------------------------------------------------------------------------------


def warc_files(corpus: Path) -> list[Path]:
    folders = [corpus / "warc" / name for name in ("real", "edge", "web")]
    return sorted(path for folder in folders for path in folder.iterdir() if path.suffix != ".tsv")


@pytest.mark.corpus
def test_the_whole_corpus_is_read_without_a_crash(corpus):
    delivered, damaged = 0, set()
    for path in warc_files(corpus):
        stats = ReadStats()
        for record in read_records(path, max_payload_bytes=8 << 20, stats=stats):
            assert (record.skipped is None) == (record.payload != b"")
        delivered += stats.records - stats.skipped.total()
        damaged |= {path.name.partition("__")[2]} if stats.damaged_places else set()
    assert delivered > 2400
    # the samples and the segment were rewritten with other line ends, and kept their lengths
    rewritten = {"sample.warc", "sample.warc.gz", "sample.wet.gz", "ccnews-segment1.warc.gz"}
    assert damaged == {"clipped.warc.gz", "missing-status-text.warc"} | rewritten


@pytest.mark.corpus
def test_whole_files_give_the_records_that_fastwarc_gives(corpus):
    for path in (corpus / "warc" / "real").glob("*.gz"):
        bare = sum(1 for _ in ArchiveIterator(io.BytesIO(path.read_bytes()), parse_http=False))
        stats = ReadStats()
        assert sum(1 for _ in read_records(path, max_payload_bytes=8 << 20, stats=stats)) == bare


@pytest.mark.parametrize(
    "name, values", [("X-Robots-Tag", "noai noindex"), ("TDM-Reservation", "1 0")]
)
def test_a_repeated_header_keeps_every_refusal(tmp_path, name, values):
    first, second = values.split()
    repeated = f"\r\n{name}: {first}\r\n{name}: {second}\r\n\r\n".encode()
    block = http().replace(b"\r\n\r\n", repeated, 1)
    (tmp_path / "a.warc").write_bytes(warc(block))
    [record] = read_records(tmp_path / "a.warc", max_payload_bytes=LIMIT, stats=ReadStats())
    assert record.headers[name.lower()] == f"{first}, {second}"
