"""Identifiers of things stay; numbers that people are called at go, with or without a label."""

import pytest

from benchmarks.pii_identifiers import KINDS, Roll, shares
from filters.pii.scrub import Pii


def test_identifiers_of_each_kind_stay():
    found = list(shares(60))
    assert len(found) == len(KINDS) >= 25
    assert [(kind, example) for kind, share, example in found if share > 0] == []


def test_identifiers_are_many():
    """A kind that made the same line again and again would prove nothing."""
    for kind, make in KINDS.items():
        roll = Roll(kind)
        assert len({make(roll) for _ in range(60)}) >= 30, kind


@pytest.mark.parametrize(
    "text",
    [
        "doi:10.1001/archneur.265.24.2468",
        "arXiv:0712.2965 and https://arxiv.org/abs/0910.5634",
        "Phys. Rev. D 841 (2018) 386-411",
        "doi:10.1016/S0949-4732(08)94860-5",
        "Annals of Grain (eISSN 0524-5585)",
        "seen at 05 55 39.68 -88 06 00.4",
        "ZIP codes 60601-60699, 60701-60799 and 60801-60827",
        "ORS 163.305 to 163.479; NDC 50580-449-05",
        "id 00000000-0000-1234-5678-901234567890",
        "rows 12 123 45 6789 4 and 34 115 32 9582 7252",
        "messages to 1 234 567 users, call centers in 1 200 000 homes",
        "Mo 08.30 - 12.00 Uhr, versions: current (18) / 17 / 16 / 15 / 14",
        "ZIP+4 95384-4126, Mombetsu, Hokkaido 094-0011, Apartado 0815-00507",
        "Gov. Code 65000-66499, JAMA 279.18.2368, PII S2675-3673(05)96758-8, 〒034-1524",
        "No. 212-555-0147",
        "your order number is 212-555-0147",
    ],
)
def test_an_identifier_or_a_quantity_stays(text):
    assert Pii().scrub(text) == (text, [])


@pytest.mark.parametrize(
    "text, expected",
    [
        ("They're not answering at 71-33-52-22", "They're not answering at P"),
        ("stop receiving messages to 699 956 915", "stop receiving messages to P"),
        ("on my registered 668 5702. Could you", "on my registered P. Could you"),
        ("781 1704 office\n(37) 788-063-Office\\,07700 063 966-Fax", "P office\nP-Office\\,P-Fax"),
        ("My number is 78 651 450", "My number is P"),
        ("Contact the desk on 416 60 039, or dial 99 668472", "Contact the desk on P, or dial P"),
        ("Number: 212-555-0147", "Number: P"),
        ("to order 800-555-0147, Phone No. 212-555-0147", "to order P, Phone No. P"),
        ("Tickets: 212-555-0147 / Tel/Fax:0711 6851234", "Tickets: P / Tel/Fax:P"),
        ("from='+15017122661', Service:+49 6123 9238-253Allgemein", "from='P', Service:PAllgemein"),
        ("(05121) 89-0 or 034202-3090-0 or 1 (646) 547-14-46", "P or P or P"),
        ("0664 1183226\t0800 58 88 642, +41 41 462 97 00 E-Mail", "P\tP, P E-Mail"),
        ("01 51 / 74 55 69 99, Group 15756 (530) 924-5564", "P, Group 15756 P"),
        ("Jane Doe\n2270-66-1551", "Jane Doe\nP"),
        ("Contact: 624-6456; 225-8452; 225-8458", "Contact: P; P; P"),
        ("new number: 98609152. Hotline 918-2596", "new number: P. Hotline P"),
        ("Rufnummer 030 901820, Telefonnummer: 030-901820", "Rufnummer P, Telefonnummer: P"),
    ],
)
def test_a_phone_number_goes(text, expected):
    assert Pii().scrub(text).text.replace("<PHONE_NUMBER>", "P") == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("10.1.2.3, 192.168.1.1, 172.16.0.9 and 100.64.3.2", "I, I, I and I"),
        ("fe80::1 and fd12:3456::1", "I and I"),
        ("127.0.0.1, ::1, 0.0.0.0, 255.255.255.0, 224.0.0.1", None),
        ("version 10.1.2.3, section 10.1.2.3 and 192.0.2.1", None),
    ],
)
def test_private_addresses_go_only_if_asked_for(text, expected):
    assert Pii().scrub(text).text == text
    scrubbed = Pii(ip_addresses="all").scrub(text).text.replace("<IP_ADDRESS>", "I")
    assert scrubbed == (expected or text)
