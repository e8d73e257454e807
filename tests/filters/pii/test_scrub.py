"""Pii: what is found and what stays, placeholders and their spans, and Presidio's bare recognizers
as the oracle.
"""

import json
import re
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from filters import first_failure
from filters.pii import phones, pieces, recognizers, scores, triggers
from filters.pii.scrub import Pii
from filters.pii.spans import Hit, Span
from filters.pii.surrogates import FORM
from tests.support.examples import at_most

FOUND = [
    ("EMAIL_ADDRESS", "jane.doe+news@mail.example.co.uk"),
    ("EMAIL_ADDRESS", "jürgen@müller.de"),
    ("PHONE_NUMBER", "+44 20 7946 0958"),
    ("PHONE_NUMBER", "(212) 555-0147"),
    ("PHONE_NUMBER", "03.93.92.16.85"),
    ("PHONE_NUMBER", "+45 2012-1934"),  # two years, but for the country code
    ("PHONE_NUMBER", "+45 20.79.46.09"),  # a dotted quad
    ("CREDIT_CARD", "4111 1111 1111 1111"),
    ("CREDIT_CARD", "378282246310005"),
    ("CREDIT_CARD", "2223003122003222"),  # the newer range of Mastercard
    ("IBAN_CODE", "gb82west12345698765432"),
    ("PHONE_NUMBER", "+1-903-140-4508"),  # no exchange is 140, but +1 and ten digits say what it is
    ("PHONE_NUMBER", "98765 43210"),
    ("IBAN_CODE", "DE89 3704 0044 0532 0130 00"),
    ("IBAN_CODE", "GB82WEST12345698765432"),
    ("IP_ADDRESS", "93.184.216.34"),
    ("IP_ADDRESS", "2606:2800:220:1:248:1893:25c8:1946"),
    ("IP_ADDRESS", "2a00:1450:4001:81b::200e"),
    ("IP_ADDRESS", "::ffff:93.184.216.34"),  # as servers log it
    ("PHONE_NUMBER", "1.212.555.0147"),
    ("PHONE_NUMBER", "1 212 555 0147"),
    ("PHONE_NUMBER", "+44.2079460958"),  # as registries of domains write it
    ("US_SSN", "536-22-1234"),
    ("CRYPTO", "1BvBMSEYstWetqTFn5Au4m4GFg7xJaNVN2"),
    ("CRYPTO", "bc1qar0srrr7xfkvy5l643lydnw9re59gtzzwf5mdq"),
    ("PHONE_NUMBER", "(0)20 7946 0958"),
    ("PHONE_NUMBER", "[212] 736-5000"),
    ("IBAN_CODE", "PL61 1090 1014 0000 0712 1981 2874"),  # fours of digits, 0000 among them
    ("IBAN_CODE", "PK36 SCBL 0000 0011 2345 6702"),
]
# a text, and what of it goes
PARTS = [
    (
        "Call (212) 736-5000 (212) 736-5001 (212) 736-5002 (212) 736-5003 (212) 736-5004",
        "Call P P P P P",
    ),
    (
        "212-736-5000 / 212-736-5001 / 212-736-5002 / 212-736-5003 / 212-736-5004",
        "P / P / P / P / P",
    ),
    ("Büro (0171 2345678)", "Büro (P)"),
    (
        "телефон: 8 (495) 123-45-67, ΤΗΛ: 210 123 4567, tlf. 22 34 56 78",
        "телефон: P, ΤΗΛ: P, tlf. P",
    ),
    ("电话：010-65295114，手机 13800138000", "电话：P，手机 P"),
    ("john@acme.com.Please call", "E.Please call"),
    (
        "Phone: CA-415-555-0132, Room 12-(212) 555-0147, DE-030 1234567",
        "Phone: CA-P, Room 12-P, DE-P",
    ),
    (
        "We met in 2019.\n212-555-0147, see section 4:\n(212) 555-0147",
        "We met in 2019.\nP, see section 4:\nP",
    ),
    (
        "Credit card: 4111 1111 1111 1111.2 Next, visa 4111111111111111.2",
        "Credit card: C.2 Next, visa C.2",
    ),
    ("Tel. 0711/685–1234 und Tel.: 089/2180 – 1234", "Tel. P und Tel.: P"),
    ("( 212-555-0147 ), ( 212 ) 555-0147 or (212 ) 555-0147", "( P ), P or P"),
    (
        "联系电话: 13812345678，我的手机13812345678。お電話: 0312345678",
        "联系电话: P，我的手机P。お電話: P",
    ),
    ("4111111111111111:08:27:123 and 4111111111111111|08|27", "C:08:27:123 and C|08|27"),
    ("E-mail: info@firm.comTel: 030 901820", "E-mail: ETel: P"),
    ("info@firm.de-Tel, jim@gmail.comWebsite, a_john@doe.com_backup", "E-Tel, EWebsite, E_backup"),
    ("IPは45.33.32.156です。カード番号は4111111111111111です", "IPはIです。カード番号はCです"),
]
STAYS = [
    "jane@localhost and @jane, at user@host",
    "4111 1111 1111 1112",  # Luhn
    "DE88 3704 0044 0532 0130 00",  # ISO 7064 mod 97
    "1BvBMSEYstWetqTFn5Au4m4GFg7xJaNVN3",  # base58check
    "127.0.0.1, 192.168.1.104/24, 10.0.0.1 and ::1 or fe80::1 are no one's",
    "version 1.2.3.4, section 12.3.2.1 and OID 1.3.6.1.4.1.311.21.20",
    "std::vector<a::b> x; dead::beef(Cafe::Bad); y[1::2] :: z",
    "00:1A:2B:3C:4D:5E and 10:20:30:40",
    "2019-11-12 08:15:30, 12.11.2019, in 1642-1648 and (1644–1912)",
    "ISBN 0-306-40615-7, ISBN-13: 978-0-306-40615-7",
    "3.1415926535, 0.914398530744 and 2147483648 of 6378137",
    "666-12-3456 and 123-45-6789",  # never issued
    "https://1aaa-123-45-678-910.example.net/",
    "<PHONE_NUMBER> <EMAIL_ADDRESS>@<IP_ADDRESS>",
    "3234567890126 and 9111111111111111",  # Luhn holds, no card begins so
    "4152 488 7134 459 523",  # Luhn holds; no card is grouped so, unless a word says it is one
    "(hex) 2/0/4.283.0.0.0.0.0, also 400 / 600/800/1000 ml",
    "62345 67890 12345 67891",  # a row of a table: its halves are numbers in India
    "51 Franklin St, Fifth Floor, Boston, MA 02110-1301, USA",
    "50:06:0b:00:00:c2:62:00 and ::ffff:10.0.0.1",  # the name of a disk
    "1.93.184.216.34, OID 1.2.840.10045 and 1.28.96.928.493",
    "node-93.184.216.34 and a-93.184.216.34",
    "09 10 2014, and 2014 10 09",
    "+35.827384, +23.056012; +35.82738412, +23.05601234",
    "population 1 234 567 890, or 1\xa0754\xa0696\xa0090",
    "4111 1111 1111 1111 4827",  # a table, for all we know
    "foo/93.184.216.34",
    "Chrome/96.0.4664.110, v93.184.216.34, foo-93.184.216.34.tar.gz and build 93.184.216.34",
    # Luhn holds, of parts of fractions
    "x = 0.6358599286615808, (12.4157980000000006 43.9579) and 4111111111111111.25",
    "to_timestamp(1284352323), .format(1234567890), (21549/21549) and (-180.000000, 5",
    "(1729/30–1800), (800/962–1806) and 1265/66–1308",
    "Version: 15.20.4755.22 and id 15.20.4755.22; Mon, 3 Jan",
    "08-00-2b-01-02-03-04-05 and fbbca6db-0333-4582-ba36-bd179de1e3bb",
    "Zip Code: 02110-1301; Boston, MA\n02110-1301",
    "12 34 56 78 90",
    "profile.php?id=100001234567893",  # Luhn holds; UATP has few customers
]
# What stands next to each other on pages, and what is built to be misread once a neighbour is gone.
BITS = st.one_of(
    st.sampled_from([value for _, value in FOUND] + STAYS),
    st.sampled_from(
        [
            "call ",
            "phone:\n",
            "SSN",
            "<CRYPTO>",
            "@",
            "::",
            "-",
            ".",
            "x",
            "0",
            "\n",
            " ",
            "\ud800",
            "\0",
            "\r",
        ]
    ),
    st.sampled_from(
        [
            "ghp_" + "zQWBuTSOoRi4A9spHcVY5ncnsDkxkJ" + "0mLq17",
            "-----BEGIN PRIVATE KEY-----",
            "iB4x/+" * 9,
            "-----END PRIVATE KEY-----",
        ]
    ),
    st.text("0123456789-. ()+:/@aAbcx\n", max_size=25),
    st.text(max_size=8),
)
TEXTS = st.lists(BITS, max_size=12).flatmap(
    lambda bits: st.sampled_from(["", " ", ", "]).map(lambda sep: sep.join(bits))
)


@pytest.mark.parametrize("entity, value", FOUND)
def test_a_value_becomes_its_placeholder(entity: str, value: str) -> None:
    scrubbed = Pii().scrub(f"Zürich,\nask for {value}, please\n")
    assert scrubbed.text == f"Zürich,\nask for <{entity}>, please\n"
    assert [(s.entity, scrubbed.text[s.start : s.end]) for s in scrubbed.spans] == [
        (entity, f"<{entity}>")
    ]


@pytest.mark.parametrize("text, left", PARTS)
def test_values_are_replaced_and_the_text_beside_them_stays(text: str, left: str) -> None:
    short = {"P": "PHONE_NUMBER", "E": "EMAIL_ADDRESS", "I": "IP_ADDRESS", "C": "CREDIT_CARD"}
    scrubbed = Pii().scrub(text).text
    assert (
        re.sub(r"<([A-Z_]+)>", lambda m: {v: k for k, v in short.items()}[m[1]], scrubbed) == left
    )


def test_a_region_s_own_formats_are_known() -> None:
    for number in (
        "8-800-555-35-35",
        "8 (495) 123-45-67",
        "8(495)123-45-67",
        "8 495 123 45 67",
        "8 916 123-45-67",
    ):
        assert (
            Pii(phone_regions=("RU",)).scrub(f"Москва, {number}").text == "Москва, <PHONE_NUMBER>"
        )


@pytest.mark.parametrize("text", STAYS)
def test_values_that_belong_to_nobody_stay(text: str) -> None:
    assert Pii().scrub(text) == (text, [])


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Order 2125550147", "Order 2125550147"),
        ("Tel.: 2125550147", "Tel.: <PHONE_NUMBER>"),
        ("Phone:\n2125550147", "Phone:\n<PHONE_NUMBER>"),
        ("2125550147 (fax)", "<PHONE_NUMBER> (fax)"),
        ("part 536221234", "part 536221234"),
        ("her SSN is 536221234", "her SSN is <US_SSN>"),
        ("item 630427373398", "item 630427373398"),
        ("my Maestro: 630427373398", "my Maestro: <CREDIT_CARD>"),
        ("Phone:\n60-56-85-91", "Phone:\n<PHONE_NUMBER>"),
        ("Fax (37) 788-063, 2 pages", "Fax <PHONE_NUMBER>, 2 pages"),
        ("Mobile: 723 813 266", "Mobile: <PHONE_NUMBER>"),
        ("mobile 723 813 266", "mobile 723 813 266"),
        ("call me on 9472 7916", "call me on <PHONE_NUMBER>"),
        ("phone 2011-12-13", "phone 2011-12-13"),
        ("559-4312-4238", "559-4312-4238"),  # grouped as no region does
        ("call 559-4312-4238", "call <PHONE_NUMBER>"),
        *(
            (f"{label} 559-4312-4238",) * 2
            for label in (
                "SKU",
                "part no.",
                "P/N:",
                "Model",
                "item #",
                "Order no:",
                "serial number",
            )
        ),
        ("to order 800-555-0147", "to order <PHONE_NUMBER>"),
    ],
)
def test_bare_digits_need_a_word_near_them(text: str, expected: str) -> None:
    assert Pii().scrub(text).text == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("IP-93.184.216.34", "IP-<IP_ADDRESS>"),
        ("Host/93.184.216.34", "Host/<IP_ADDRESS>"),
        ("tcp/93.184.216.34:443", "tcp/<IP_ADDRESS>:443"),
        ("jane@doe-inc.com联系", "<EMAIL_ADDRESS>联系"),
        ("jane@doe-inc.com으로", "<EMAIL_ADDRESS>으로"),
        ("4111 1111 1111 1111 0827", "<CREDIT_CARD> 0827"),
    ],
)
def test_text_that_touches_a_value_stays(text: str, expected: str) -> None:
    assert Pii().scrub(text).text == expected


def test_spans_count_what_was_replaced_and_not_what_was_there() -> None:
    text, spans = Pii().scrub("<EMAIL_ADDRESS> b@c.org\n93.184.216.34 and d@e.org")
    assert text == "<EMAIL_ADDRESS> <EMAIL_ADDRESS>\n<IP_ADDRESS> and <EMAIL_ADDRESS>"
    assert spans == [
        Span("EMAIL_ADDRESS", 16, 31),
        Span("IP_ADDRESS", 32, 44),
        Span("EMAIL_ADDRESS", 49, 64),
    ]
    assert Counter(span.entity for span in spans) == {"EMAIL_ADDRESS": 2, "IP_ADDRESS": 1}


def test_only_the_configured_entities_are_replaced() -> None:
    scrubbed = Pii(entities=("EMAIL_ADDRESS",)).scrub("a@b.org 93.184.216.34")
    assert scrubbed.text == "<EMAIL_ADDRESS> 93.184.216.34"


def test_a_higher_min_score_requires_a_context_word() -> None:
    text = "(212) 555-0147 is the shop. At night, call (212) 555-0148."
    assert (
        Pii(min_score=0.7).scrub(text).text
        == "(212) 555-0147 is the shop. At night, call <PHONE_NUMBER>."
    )


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"entities": ("EMAIL_ADRESS",)},
            "unknown entity 'EMAIL_ADRESS'; did you mean 'EMAIL_ADDRESS'",
        ),
        ({"entities": ("phone",)}, "did you mean 'PHONE_NUMBER'"),
        ({"phone_regions": ("UK",)}, "unknown phone region 'UK'"),
        ({"min_score": 2}, "less than or equal to 1"),
        ({"entity": ()}, "entity"),
        ({"mode": "hash"}, "mode"),
    ],
)
def test_a_wrong_setting_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pii(**settings)


@pytest.fixture(scope="session")
def surrogates(tmp_path_factory: pytest.TempPathFactory) -> Pii:
    key = tmp_path_factory.mktemp("key") / "pii.key"
    key.write_text("a key of the tests, kept by no one\n")
    return Pii(mode="surrogate", key_file=str(key))


@given(TEXTS)
def test_scrubbing_twice_changes_nothing_and_spans_hold_placeholders(text: str) -> None:
    scrubbed = Pii().scrub(text)
    assert Pii().scrub(scrubbed.text) == (scrubbed.text, [])
    assert all(scrubbed.text[s.start : s.end] == f"<{s.entity}>" for s in scrubbed.spans)
    assert scrubbed.spans == sorted(scrubbed.spans, key=lambda s: s.start)


def test_a_label_exposed_by_a_replacement_counts_on_the_line_below() -> None:
    scrubbed = Pii().scrub("DE89 3704 0044 0532 0130 00phone:\n1.212.555.01470")
    assert scrubbed.text == "<IBAN_CODE>phone:\n<PHONE_NUMBER>"


@pytest.mark.parametrize("entity, value", FOUND)
def test_surrogates_replace_the_same_values_as_placeholders(
    surrogates: Pii, entity: str, value: str
) -> None:
    scrubbed = surrogates.scrub(f"Zürich,\nask for {value}, please\n")
    assert [span.entity for span in scrubbed.spans] == [entity] and value not in scrubbed.text


@given(TEXTS)
def test_scrubbing_twice_changes_nothing_with_surrogates(surrogates: Pii, text: str) -> None:
    scrubbed = surrogates.scrub(text)
    assert surrogates.scrub(scrubbed.text) == (scrubbed.text, [])
    for span in scrubbed.spans:
        assert span.entity == "SECRET" or FORM.fullmatch(scrubbed.text[span.start : span.end]), span
    assert scrubbed.spans == sorted(scrubbed.spans, key=lambda s: s.start)


@at_most(50)
@given(TEXTS)
def test_the_text_between_the_spans_is_unchanged(text: str) -> None:
    scrubbed = Pii().scrub(text)
    rest, at = [], 0
    for span in scrubbed.spans:
        rest.append(scrubbed.text[at : span.start])
        at = span.end
    position = 0
    for part in [*rest, scrubbed.text[at:]]:
        position = text.index(part, position) + len(part)


@pytest.mark.parametrize("entity, value", FOUND)
def test_a_value_always_becomes_the_same_surrogate(
    surrogates: Pii, entity: str, value: str
) -> None:
    one, other = (
        surrogates.scrub(f"ask for {value}, please"),
        surrogates.scrub(f"Zürich,\n\n{value}"),
    )
    values = [s.text[s.spans[0].start : s.spans[0].end] for s in (one, other)]
    assert [span.entity for span in one.spans + other.spans] == [entity, entity]
    assert values[0] == values[1] != value
    assert one.text == f"ask for {values[0]}, please"


@pytest.mark.parametrize(
    "content, message", [(None, "No such file"), (b"  short \n", "5 bytes, at least 16")]
)
def test_surrogates_need_a_key(tmp_path: Path, content: bytes | None, message: str) -> None:
    key = tmp_path / "key"
    if content is not None:
        key.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        Pii(mode="surrogate", key_file=str(key)).check(())
    with pytest.raises(ValueError, match=r"pii\.key_file"):
        Pii(mode="surrogate").check(())
    Pii().check(())


def test_a_document_of_many_values_breaks_the_bound_on_their_count() -> None:
    spans = Pii().scrub("a@b.org, c@d.org and 93.184.216.34").spans
    rejection = first_failure("pii", Pii(count=(0, 2)), {"count": len(spans)})
    assert rejection is not None and rejection.rule == "pii.count"
    assert first_failure("pii", Pii(), {"count": len(spans)}) is None


def test_a_value_hidden_by_its_neighbor_is_found() -> None:
    # the phone number makes the ten digits part of a table; the address makes the key a part of a
    # word
    key = "ghp_" + "zQWBuTSOoRi4A9spHcVY5ncnsDkxkJ0mLq17"
    once = Pii().scrub(f"+44 20 7946 0958 98765 43210 and x@example.org{key}")
    assert Pii().scrub(once.text) == (once.text, [])


def test_an_error_does_not_quote_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    class Careless:
        context: tuple[str, ...] = ()

        def analyze(self, text: str, entities: list[str]) -> None:
            raise KeyError(text)

    monkeypatch.setattr(recognizers, "recognizer", lambda *args: Careless())
    with pytest.raises(RuntimeError, match=r"KeyError in test_scrub\.py:\d+;") as caught:
        Pii().scrub("@".join(["ja" + "ne", "doe-inc.org!"]))
    shown = "".join(traceback.format_exception(caught.value))
    assert caught.value.__context__ is None and "jane" not in shown


def by_trigger(line: str, above: str) -> set[Hit]:
    return set(Pii()._find(line, above, frozenset(Pii()._present(line))))


def by_every_recognizer(line: str, above: str) -> set[Hit]:
    """Every recognizer on every line, whole; then the same policy."""
    found = set()
    for entity in triggers.TRIGGERS:
        recognizer = recognizers.recognizer(entity, Pii().phone_regions)
        is_phone = entity == "PHONE_NUMBER"
        words = Pii().phone_context if is_phone else recognizers.context_words(entity)
        shown = phones.blank_non_phones(line) if is_phone else line
        raws = [
            raw
            for text in recognizers.variants(entity, shown)
            for raw in recognizer.analyze(text, [entity])
        ]
        hits = [Hit(entity, raw.start, raw.end, raw.score) for raw in raws]
        if is_phone:
            regions = Pii().phone_regions
            hits = [h._replace(score=scores.written_score(h, line, above, regions)) for h in hits]
            hits = [
                h._replace(start=phones.skip_unclosed_bracket(line, h.start, h.end)) for h in hits
            ]
            hits += [Hit(entity, *span, 0.75) for span in phones.labeled_numbers(shown, above)]
            hits += [Hit(entity, *span, 0.4) for span in phones.international_numbers(shown)]
        for hit in hits:
            score = scores.score(hit, line, above, words)
            if score >= Pii().min_score:
                found.add(hit._replace(score=score))
    return found


@given(TEXTS | st.text("0٣７1aZ１bcDE12 -‐.()\xa0／:@é，日\ud800", max_size=60))
def test_hinted_entities_miss_no_trigger(text: str) -> None:
    assert {
        entity for entity in triggers.TRIGGERS if triggers.is_triggered(entity, text)
    } <= triggers.hinted_entities(text)


@pytest.mark.parametrize(
    "shortest", ["1" + "a" * 25, "a@b", "ab12 cdef", "1234567", "1 2 3 4 5 6 7", "1111 1111 1111 1"]
)
def test_hinted_entities_include_the_shortest_trigger(shortest: str) -> None:
    found = {entity for entity in triggers.TRIGGERS if triggers.is_triggered(entity, shortest)}
    assert found and found <= triggers.hinted_entities(shortest)


def test_every_decimal_digit_is_known_by_its_first_byte() -> None:
    digits = [c for c in map(chr, range(128, 0x110000)) if c.isdecimal()]
    assert len(digits) > 500 and {c.encode()[0] for c in digits} == set(triggers.DIGIT_LEAD_BYTES)


@given(TEXTS)
def test_triggers_lose_no_value(text: str) -> None:
    for line in text.split("\n"):
        assert by_trigger(line, "") == by_every_recognizer(line, "")


def test_a_long_line_is_cut_between_words_only() -> None:
    line = " ".join(f"and then {value} came to mind" for _, value in FOUND * 20)
    assert len(line) > 4 * pieces.MAX_PIECE
    assert by_trigger(line, "") == by_every_recognizer(line, "")


def test_many_values_on_one_line_take_linear_time() -> None:
    text = " ".join(f"u{i}@example.org" for i in range(5_000))  # quadratic in any step: minutes
    assert Counter(span.entity for span in Pii().scrub(text).spans) == {"EMAIL_ADDRESS": 5_000}


# one without a gap, whose end no top-level domain is, and which a cut may give one; and values that
# touch a cut
GLUED = [
    "user-0123456789ab@example.com",
    "a@b.com1@c.com2@d.com",
    "jane@doe-inc.org|",
    "93.184.216.34,",
    "x@y.org;x",
]


@pytest.mark.parametrize("glued", GLUED)
def test_text_without_gaps_is_read_only_a_few_times(
    glued: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = 0
    piece = pieces.cut_piece

    def counted(line: str, start: int) -> pieces.Piece:
        nonlocal read
        cut = piece(line, start)
        read += cut.end - start
        return cut

    monkeypatch.setattr(pieces, "cut_piece", counted)
    # if each round cut elsewhere: 100 rounds, and more on longer ones
    Pii().scrub((glued * 100_000)[:100_000])
    assert read <= 4 * 100_000


@at_most(15)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([*GLUED, *(value for _, value in FOUND)]) | BITS, st.integers(1, 150)
        ),
        max_size=4,
    )
)
def test_scrubbing_a_long_line_twice_changes_nothing(
    surrogates: Pii, runs: list[tuple[str, int]]
) -> None:
    line = "".join(bit.replace("\n", "") * count for bit, count in runs)
    for scrubber in (Pii(), surrogates):
        once = scrubber.scrub(line)
        assert scrubber.scrub(once.text) == (once.text, [])


def test_a_value_that_a_cut_goes_through_is_found_whole() -> None:
    for before in range(pieces.MAX_PIECE - 40, pieces.MAX_PIECE + 1):
        text = "," * before + "jane@doe-inc.com,+442079460958" + "," * pieces.MAX_PIECE
        assert Pii().scrub(text).text.strip(",") == "<EMAIL_ADDRESS>,<PHONE_NUMBER>", before


@pytest.mark.corpus
def test_triggers_lose_no_value_on_pages_and_annotated_texts(corpus: Path) -> None:
    texts = [
        x["full_text"]
        for x in json.loads((corpus / "pii/presidio-research/generated_small.json").read_text())
    ]
    samples = (
        (corpus / "text/web-samples/dj_redpajama-cc-2023-06-refined.jsonl").read_text().splitlines()
    )
    texts += [json.loads(line)["text"] for line in samples]
    for text in texts:
        for line in text.split("\n"):
            assert by_trigger(line, "") == by_every_recognizer(line, "")


@pytest.mark.corpus
def test_recall_equals_presidio_s_and_phone_numbers_are_more_precise(
    corpus: Path,
) -> None:
    bare: Counter[str] = Counter()
    ours: Counter[str] = Counter()
    bare_wrong = wrong = 0
    for sample in json.loads((corpus / "pii/presidio-research/synth_dataset_v2.json").read_text()):
        text, scrubbed = sample["full_text"], Pii().scrub(sample["full_text"])
        for entity in triggers.TRIGGERS:
            gold = [s for s in sample["spans"] if s["entity_type"] == entity]
            hits = recognizers.recognizer(entity, Pii().phone_regions).analyze(text, [entity])
            bare[entity] += sum(
                any(h.start < s["end_position"] and s["start_position"] < h.end for h in hits)
                for s in gold
            )
            replaced = sum(span.entity == entity for span in scrubbed.spans)
            ours[entity] += min(replaced, sum(s["entity_value"] not in scrubbed.text for s in gold))
            if entity == "PHONE_NUMBER":
                bare_wrong += max(0, len(hits) - len(gold))
                wrong += max(0, replaced - len(gold))
    assert bare["EMAIL_ADDRESS"] == 49 and bare["PHONE_NUMBER"] > 50
    assert all(ours[entity] >= bare[entity] for entity in bare), (ours, bare)
    assert wrong <= 2 and bare_wrong >= 15
