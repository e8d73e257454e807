"""Surrogates: of the right kind, no one's by the standards' own words, the same for the same key
only.
"""

import ipaddress
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from filters.pii.recognizers import recognizer
from filters.pii.surrogates import _AREAS, _FORMS, FORM, inert, surrogate

KEY, OTHER = b"the key of a test", b"another key of it"
VALUES = {
    "EMAIL_ADDRESS": "jane@doe-inc.org",
    "PHONE_NUMBER": "+44 20 7946 0958",
    "IP_ADDRESS": "93.184.216.34",
    "CREDIT_CARD": "4111 1111 1111 1111",
    "IBAN_CODE": "DE89 3704 0044 0532 0130 00",
    "US_SSN": "536-22-1234",
    "CRYPTO": "1BvBMSEYstWetqTFn5Au4m4GFg7xJaNVN2",
}


def test_every_entity_is_tested() -> None:
    assert set(VALUES) == set(_FORMS)


@pytest.mark.parametrize("entity", VALUES)
@given(data=st.data())
def test_a_surrogate_has_the_form_that_is_never_taken_for_a_value(
    entity: str, data: st.DataObject
) -> None:
    value = (
        str(ipaddress.ip_address(data.draw(st.integers(0, 2**32 - 1))))
        if entity == "IP_ADDRESS"
        else data.draw(st.text())
    )
    assert re.fullmatch(_FORMS[entity], surrogate(entity, value, key=KEY))


@pytest.mark.parametrize("entity, value", VALUES.items())
def test_another_key_gives_another_surrogate(entity: str, value: str) -> None:
    one = surrogate(entity, value, key=KEY)
    assert one == surrogate(entity, value, key=KEY) != surrogate(entity, value, key=OTHER)


@pytest.mark.parametrize(
    "entity, writings",
    [
        ("EMAIL_ADDRESS", ["Jane@Doe-Inc.org", "jane@doe-inc.ORG"]),
        (
            "PHONE_NUMBER",
            ["+44 20 7946 0958", "020 7946 0958", "0044 (0)20-79460958", "020 7946 0958 ext. 12"],
        ),
        ("CREDIT_CARD", ["4111 1111 1111 1111", "4111-1111-1111-1111", "4111111111111111"]),
        ("IBAN_CODE", ["DE89 3704 0044 0532 0130 00", "de89370400440532013000"]),
        ("IP_ADDRESS", ["2A00:1450::200E", "2a00:1450:0:0:0:0:0:200e", "2a00:1450::200e/64"]),
        ("IP_ADDRESS", ["93.184.216.34", "::ffff:93.184.216.34"]),
        ("US_SSN", ["536-22-1234", "536 22 1234", "536221234"]),
    ],
)
def test_the_format_of_a_value_makes_no_difference(entity: str, writings: list[str]) -> None:
    assert len({surrogate(entity, value, key=KEY) for value in writings}) == 1


def test_surrogates_belong_to_nobody() -> None:
    for i in range(300):
        assert surrogate("EMAIL_ADDRESS", f"{i}@b.org", key=KEY).split("@")[1] in (
            "example.com",
            "example.net",
            "example.org",
        )
        address = ipaddress.ip_address(surrogate("IP_ADDRESS", f"93.184.1.{i % 256}", key=KEY))
        assert not address.is_global and any(
            address in ipaddress.ip_network(net)
            for net in ("192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24")
        )
        assert ipaddress.ip_address(
            surrogate("IP_ADDRESS", f"2a00::{i + 1:x}", key=KEY)
        ) in ipaddress.ip_network("2001:db8::/32")
        area, exchange, line = surrogate("PHONE_NUMBER", f"212 555 {i:04}", key=KEY).split("-")
        assert (
            exchange == "555"
            and 100 <= int(line) <= 199
            and not area.endswith("11")
            and area[1] != "9"
        )
    # the recognizers' own validation rejects the others
    for entity in ("IBAN_CODE", "US_SSN", "CRYPTO"):
        assert (
            recognizer(entity, ()).analyze(
                f" {surrogate(entity, VALUES[entity], key=KEY)} ", [entity]
            )
            == []
        )
    assert surrogate("CREDIT_CARD", VALUES["CREDIT_CARD"], key=KEY).startswith("0")


def test_area_800_is_left_out_as_only_one_of_its_numbers_is_kept() -> None:
    assert "800" not in _AREAS and len(_AREAS) == 711
    assert not FORM.fullmatch("800-555-0150") and FORM.fullmatch("801-555-0150")


def test_a_secret_gets_its_type() -> None:
    assert surrogate("SECRET", "ghp_1", key=KEY) == "<SECRET>"


def covered(text: str) -> str:
    """What `inert` should give: every match of FORM from every position, blanked one by one."""
    blank = set[int]()
    for start in range(len(text)):
        if match := FORM.match(text, start):
            blank.update(range(*match.span()))
    return "".join("<" if i in blank else c for i, c in enumerate(text))


@given(
    st.lists(
        st.sampled_from(
            [
                "202-555-0120",
                "2-555-0123",
                "192.0.2.7",
                "user-0123456789ab@example.org",
                "0000 1234 5678 9012",
                "666-12-",
                "1234",
                " ",
                "x",
            ]
        ),
        max_size=8,
    )
)
def test_inert_hides_every_surrogate_also_where_two_overlap(bits: list[str]) -> None:
    text = "".join(bits)
    assert inert(text) == covered(text)
