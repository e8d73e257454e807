"""Share of made-up identifiers in which filters.pii replaces anything, by kind: all are mistakes.

    python -m benchmarks.pii_identifiers [COUNT]     300 of each kind; one line a kind

Numbers are drawn from the ranges that a kind really has, and written as papers, shops, laws and
tables write them. None is anybody's, so the target is 0; below 1 % is what issue 14 asks for.
"""

import random
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise

from filters.pii.scrub import Pii

Roll = random.Random
COUNT = 300


def main(count: int) -> None:
    for kind, share, example in shares(count):
        print(f"replaced.{kind} {share:.4f} ratio{f'  e.g. {example}' if example else ''}")


def shares(count: int) -> Iterator[tuple[str, float, str]]:
    """(kind, share of its lines that are changed, the first of them) for each kind."""
    pii = Pii()
    for kind, make in KINDS.items():
        roll = Roll(kind)
        lines = [make(roll) for _ in range(count)]
        changed = [line for line in lines if pii.scrub(line).spans]
        yield kind, len(changed) / count, changed[0] if changed else ""


def _number(roll: Roll, *lengths: int) -> str:
    """Digits; of several lengths one is drawn."""
    length = roll.choice(lengths)
    return f"{roll.randrange(10**length):0{length}}"


def _pattern(roll: Roll, *patterns: str) -> str:
    """One of the patterns, with # replaced by digits, @ by capital letters, % by hex digits."""
    draw = {"#": "0123456789", "@": "ABCDEFGHJKLMNPRSTUVWXYZ", "%": "0123456789abcdef"}
    return "".join(roll.choice(draw[c]) if c in draw else c for c in roll.choice(patterns))


def _jama(roll: Roll) -> str:
    journal = roll.choice(["jama", "archneur", "archinte", "archderm", "archpsyc", "archsurg"])
    place = f"{roll.randint(190, 330)}.{roll.randint(1, 24)}.{roll.randint(1000, 3999)}"
    before = roll.choice(["doi:", "https://doi.org/", "DOI: ", "http://dx.doi.org/", ""])
    return f"{before}10.1001/{journal}.{place}"


def _doi(roll: Roll) -> str:
    suffix = _pattern(
        roll,
        *("10.1016/S####-####(0#)#####-#", "10.1016/j.cell.20##.0#.0##", "10.1103/PhysRevD.##.######"),
        *("10.1007/978-3-###-#####-#_##", "10.1093/brain/###.#.###", "10.1088/0004-637X/###/1/###"),
        *("10.1017/S##########00####", "10.1002/(SICI)1097-0258(199#0##5)1#:1<1##::AID-SIM##>3.0.CO;2-#"),
        *("10.1111/j.1365-2966.20##.#####.x", "10.3109/#######.20##.######", "10.1186/1471-2105-#-###"),
        *("10.1177/##########1######", "10.1080/##########1#######", "10.4103/####-####.######"),
    )  # fmt: skip
    return roll.choice(["doi:", "https://doi.org/", "doi.org/", "DOI ", "", "see "]) + suffix


def _month(roll: Roll, first: int, last: int) -> str:
    return f"{roll.randint(first, last) % 100:02}{roll.randint(1, 12):02}"


def _arxiv(roll: Roll) -> str:
    new, old = _month(roll, 2015, 2025) + "." + _number(roll, 5), _month(roll, 2007, 2014)
    name = roll.choice([new, *[f"{old}.{_number(roll, 4)}"] * 3])
    forms = ("arXiv:{}", "arXiv:{}v2", "arxiv {}", "(arXiv: {} [hep-th])", "arXiv e-prints, {}")
    return roll.choice(forms).format(name)


def _arxiv_url(roll: Roll) -> str:
    name = f"{_month(roll, 2007, 2014)}.{_number(roll, 4)}"
    forms = (
        "https://arxiv.org/abs/{}",
        "http://arxiv.org/pdf/{}v1",
        "arxiv.org/abs/{}.",
        "<a>arxiv.org/pdf/{}.pdf</a>",
    )
    return roll.choice(forms).format(name)  # fmt: skip


def _reference(roll: Roll) -> str:
    journal = roll.choice(
        ["Phys. Rev. D", "Astrophys. J.", "J. Chem. Phys.", "Nature", "Ann. Phys. (N.Y.)", "Z. Phys.", "Am J Med"]
    )  # fmt: skip
    volume, issue, year = roll.randint(1, 900), roll.randint(1, 24), roll.randint(1950, 2023)
    first = roll.randint(1, 3000)
    pages = f"{first}{roll.choice('-–')}{first + roll.randint(1, 60)}"
    return roll.choice(
        [
            *[f"{journal} {volume} ({year}) {pages}"] * 3,
            f"{journal} {volume}, {pages} ({year})",
            f"{journal} {year};{volume}({issue}):{pages}.",
            f"{journal} {year}; {volume}: {pages}",
            f"{journal}, vol. {volume}, no. {issue}, pp. {pages}, {year}",
            f"{journal} {volume}({issue}), {pages}.",
            f"{journal} {volume}/{issue} ({year}), S. {pages}",
            f"[{volume}] {journal} {volume}.{issue} ({year}): {pages}",
            f"{journal} {volume} ({year}) no.{issue}, {first:06}",
        ]
    )


def _issn(roll: Roll) -> str:
    number = _pattern(roll, "####-####", "####-###X")
    forms = ("ISSN {}", "eISSN {}", "(ISSN {})", "ISSN: {}", "{} (Print)", "{} (online)", "p-ISSN: {}", "E-ISSN {}", "ISSN-L {}", "Print ISSN: {} | Online ISSN: {}")  # fmt: skip
    return roll.choice(forms).format(number, _pattern(roll, "####-####"))


def _isbn(roll: Roll) -> str:
    number = _pattern(
        roll,
        *("978-0-###-#####-#", "978-3-####-####-#", "979-1-##-######-#", "0-###-#####-#", "3-##-######-#"),
        *("978 0 ### ##### #", "978##########", "1-####-####-#", "0 ### ##### #", "##########", "99#-##-####-#"),
    )  # fmt: skip
    forms = (
        "ISBN {}",
        "ISBN: {}",
        "ISBN-13: {}",
        "(ISBN {})",
        "ISBN-10 {}",
        "hardcover, ISBN {}, $20",
    )
    return roll.choice(forms).format(number)


def _zip(roll: Roll) -> str:
    first = roll.randint(1000, 99000)
    near, plus4 = f"{first + roll.randint(1, 200):05}", f"{first:05}-{_number(roll, 4)}"
    return roll.choice(
        [
            *[f"ZIP codes {first:05}{roll.choice('-–')}{near}"] * 2,
            f"{first:05}-{near}",
            f"| Boston | {first:05}–{near} | MA |",
            f"zip code(s): {first:05}-{near}, {first + 300:05}-{first + 340:05}",
            f"Boston, MA {plus4}",
            f"P.O. Box {_number(roll, 4)}, Denver, CO {plus4}",
            f"Washington, D.C. {plus4}",
        ]
    )


def _ndc(roll: Roll) -> str:
    number = _pattern(roll, "####-####-##", "#####-###-##", "#####-####-#", "#####-####-##")
    forms = ("NDC {}", "NDC: {}", "NDC# {}", "NDC {} (bottle of 30)", "NDC Code {}", "{} NDC", "(NDC {})", "NDC\u00a0{}", "National Drug Code {}", "NDC No. {}, carton")  # fmt: skip
    return roll.choice(forms).format(number)


def _statute(roll: Roll) -> str:
    a, b = roll.randint(1, 700), roll.randint(100, 900)
    c, d = b + roll.randint(1, 90), roll.randint(1, 99)
    return roll.choice(
        [
            f"ORS {a}.{b:03} to {a}.{c:03}",
            f"NRS {a}.{b:03}-{a}.{c:03}",
            f"RCW {a % 90}.{d:02}.{b:03}",
            f"RCW {a % 90}.{d:02}.{b:03}-.{c:03}",
            f"Minn. Stat. §§ {a}.{b:03}-{a}.{c:03}",
            f"Fla. Stat. § {a}.{b}",
            f"42 U.S.C. §§ {b * 10}-{c * 10}",
            f"42 U.S.C. {b * 10}–{c * 10}",
            f"29 C.F.R. § {a + 1000}.{b + 1000}",
            f"Cal. Civ. Code §§ {b + 1000}-{c + 1000}",
            f"Md. Code, Crim. Law § {a % 20}-{b}.1",
            f"N.J.S.A. {a % 60}:{d}-{b}",
            f"K.S.A. {d:02}-{b + 1000}",
            f"Ohio Rev. Code {b + 1000}.{d:02}-{b + 1000}.{d + 10:02}",
            f"I.C. {d:02}-{a % 90}-{d:02}-{b}",
            f"Wis. Stat. {a}.{d:02}({a % 9})-{a}.{d + 3:02}",
            f"Sections {b + 1000}-{c + 1000} of the Code",
            f"Pub. L. {a % 117}-{b}, {a % 130} Stat. {b + 1000}",
            f"NDCC {d:02}-{a % 90:02}-{b % 90:02}",
            f"Tenn. Code Ann. § {d:02}-{a % 90}-{b + 1000}",
        ]
    )


def _coordinates(roll: Roll) -> str:
    h, m, s = roll.randint(0, 23), roll.randint(0, 59), roll.uniform(0, 59)
    d, sign = roll.randint(0, 89), roll.choice("+-−")
    lat, lon = roll.uniform(-90, 90), roll.uniform(-180, 180)
    return roll.choice(
        [
            *[f"{h:02} {m:02} {s:05.2f} {sign}{d:02} {m:02} {s:04.1f}"] * 3,
            f"{h:02}:{m:02}:{s:05.2f} {sign}{d:02}:{m:02}:{s:04.1f}",
            f"{h:02}h {m:02}m {s:05.2f}s, {sign}{d:02}° {m:02}′ {s:04.1f}″",
            f"{lat:.4f}, {lon:.4f}",
            f"{lat:.6f},{lon:.6f}",
            f"{lat:.5f} {lon:.5f}",
            f"({abs(lat):.7f}, {lon:.7f})",
            f"N {d:02} {m:02}.{_number(roll, 3)} W {h + 90:03} {m:02}.{_number(roll, 3)}",
            f"{d:02}°{m:02}'{int(s):02}\"N {h + 60:03}°{m:02}'{int(s):02}\"W",
            f"{d:02} {m:02} {int(s):02} N {h + 60:03} {m:02} {int(s):02} W",
            f"UTM 33T {_number(roll, 6)} {_number(roll, 7)}",
            f"grid ref. SU {_number(roll, 5)} {_number(roll, 5)}",
        ]
    )


def _version(roll: Roll) -> str:
    number = _pattern(roll, "#.0.####.####", "10.0.1####.####", "#.##.#.####", "4.15.0-###.###", "#.#.#-rc#", "1##.0.####.##", "20##.#.#.####", "1#.###.####.#", "5.10.0-#-amd64", "3.0.0####.####")  # fmt: skip
    forms = ("version {}", "Version {}", "v{}", "Chrome/{}", "build {}", "release {}", "driver {}", "update to {}", "{} released", "firmware {}", "foo-{}.tar.gz")  # fmt: skip
    return roll.choice(forms).format(number)


def _date(roll: Roll) -> str:
    y, m, d = roll.randint(1900, 2025), roll.randint(1, 12), roll.randint(1, 28)
    time = f"{roll.randint(0, 23):02}:{roll.randint(0, 59):02}"
    return roll.choice(
        [
            f"{y}-{m:02}-{d:02} {time}:{d:02}",
            f"{d:02}-{m:02}-{y} {time}",
            f"{d:02}.{m:02}.{y} - {d:02}.{m:02}.{y + 1}",
            f"{m:02}/{d:02}/{y}-{m:02}/{d:02}/{y + 1}",
            f"{y}{m:02}{d:02}{time.replace(':', '')}00",
            f"{y}-{m:02}-{d:02}T{time}:00.000Z",
            f"{y}{m:02}{d:02}-{time.replace(':', '')}",
            f"({y}-{y + 40}) and {y}/{(y + 1) % 100:02}",
            f"{d:02} {m:02} {y}",
            f"{y}.{m:02}.{d:02} {time}",
            f"{d:02}-{m:02}-{y % 100:02} {time.replace(':', '.')}",
            f"{y}-{m:02}-{d:02}_{time.replace(':', '-')}-{d:02}",
            f"{y}-{y + 1}, {y + 2}-{y + 3}",
            f"{d:02}-{m:02}-{y}",
            f"{y} {m:02} {d:02} {time}",
        ]
    )


def _part(roll: Roll) -> str:
    number = _pattern(
        roll,
        *("###-####-###", "##-###-####", "###-####-####", "####-####", "##-####-##", "####-###-###"),
        *("#####-#####", "##-######-##", "###-###-####", "@@-####-###", "###.###.##", "##########"),
    )  # fmt: skip
    labels = ("P/N", "Part No.", "Part number:", "part #", "SKU:", "SKU", "Model No.", "Item #", "Item No:", "Serial No.", "S/N", "Cat. No.", "Catalog #", "MPN:", "Order code", "Stock No.", "Ref.", "Article no.", "Art.-Nr.", "OEM", "Product code:", "Réf.")  # fmt: skip
    return f"{roll.choice(labels)} {number}"


def _gtin(roll: Roll) -> str:
    number = _pattern(
        roll, "############", "#############", "# ##### ##### #", "########", "# ###### ######"
    )
    return f"{roll.choice(['UPC', 'EAN', 'UPC:', 'GTIN', 'EAN-13:', 'Barcode', 'UPC code', 'JAN'])} {number}"


def _patent(roll: Roll) -> str:
    return _pattern(
        roll,
        *("U.S. Pat. No. #,###,###", "US #######", "U.S. Patent #,###,###, #,###,### and #,###,###"),
        *("EP 0 ### ### B1", "EP #######", "WO 20##/######", "US 20##/####### A1", "DE 10 20## ### ### A1"),
        *("Pat. Nos. #######, #######", "JP ####-######", "application Ser. No. ##/###,###", "WO ##/#####"),
        *("DE-OS 2# ## ###", "FR 2 ### ###", "U.S. Ser. No. ##/###,###", "RU 2 ### ### C1"),
    )  # fmt: skip


def _hex(roll: Roll) -> str:
    return _pattern(
        roll,
        *("%%%%%%%%-%%%%-%%%%-%%%%-%%%%%%%%%%%%", "########-####-####-####-############"),
        *("%%-%%-%%-%%-%%-%%", "##-##-##-##-##-##", "%%%%.%%%%.%%%%", "##:##:##:##:##:##", "0x########"),
        *("sha1 %%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%", "{########-####-####-%%%%-############}"),
        *("########-####-1###-####-############", "####.####.####", "GUID ########-####-####-####-############"),
    )  # fmt: skip


def _oid(roll: Roll) -> str:
    return _pattern(
        roll,
        *("1.3.6.1.4.1.###.##.#.#", "OID 1.2.840.113549.1.#.##", "2.16.840.1.113730.#.#", "1.2.840.10045.#.#"),
        *("oid: 1.2.826.0.1.#######.#", "2.16.840.1.101.#.#.##", "OID 1.2.840.######", "1.3.12.2.1107.5.#.#"),
    )  # fmt: skip


def _person_id(roll: Roll) -> str:
    return _pattern(
        roll,
        *("ORCID 0000-000#-####-####", "https://orcid.org/0000-000#-####-###X", "ISNI 0000 0001 #### ####"),
        *("orcid.org/0000-000#-####-####", "VIAF ########", "GND 1########", "LCCN n ########", "ResearcherID @-####-20##"),
        *("Scopus Author ID ##########", "Scopus ID: ###########", "LCCN 20########", "OCLC #########"),
    )  # fmt: skip


def _medical(roll: Roll) -> str:
    return _pattern(
        roll,
        *("PMID: ########", "PMID ########; PMCID: PMC#######", "NCT########", "ISRCTN########", "PubMed ########"),
        *("EudraCT 20##-######-##", "CPT 9####-9####", "ICD-10 ###.##", "EudraCT Number: 20##-######-##"),
        *("ClinicalTrials.gov number, NCT########", "MeSH D######", "LOINC #####-#", "GenBank @@######.#", "GSE######"),
        *("ACTRN126##########", "(PMID ########)", "UniProt P#####", "rs##########", "ENSG00000######", "RxCUI #######"),
    )  # fmt: skip


def _chemical(roll: Roll) -> str:
    return _pattern(
        roll,
        *("CAS ####-##-#", "CAS No. ######-##-#", "CAS Registry Number: #######-##-#", "[#####-##-#]", "CAS# #####-##-#"),
        *("EC 2##-###-#", "EINECS 2##-###-#", "EC number: 4##-###-#", "EC No 2##-###-#", "####-##-# (CAS)"),
        *("UN ####", "E.C. #.#.##.##", "EC 3.4.21.##", "PubChem CID #########", "(CAS: #######-##-#)"),
    )  # fmt: skip


def _docket(roll: Roll) -> str:
    return _pattern(
        roll,
        *("Case No. #:##-cv-#####", "No. ##-####", "Docket No. ##-####-###", "Case No. ###-###-####", "Nos. ##-####, ##-####"),
        *("Civil Action No. ##-####-###", "Index No. ######/20##", "Docket Nos. 50-###, 50-###", "File No. 333-######"),
        *("EEOC Charge No. ###-####-#####", "Release No. 34-#####", "Docket No. FDA-20##-N-####", "B-######.#, B-######.#"),
        *("(C.D. Cal. No. ##-####-@@)", "Bill No. ####-####", "Application no. #####/##", "OJ L ###, #.#.20##, p. ##–##"),
    )  # fmt: skip


def _finance(roll: Roll) -> str:
    return _pattern(
        roll,
        *("CUSIP #########", "CUSIP ######-##-#", "ISIN US##########", "LEI 5493##############", "EIN ##-#######", "WKN ######"),
        *("SIC ####-####", "DUNS ##-###-####", "D-U-N-S Number: ##-###-####", "$#,###,###.##", "€ ###.###.###,##"),
        *("Rs. ##,##,##,###", "CIK 000#######", "ABN ## ### ### ###", "VAT GB ### #### ##", "ACN ### ### ###", "EIN: ##-#######"),
        *("SIREN ### ### ###", "SIRET ### ### ### #####", "USt-IdNr. DE#########", "CNPJ ##.###.###/0001-##", "KvK ########"),
        *("Handelsregister HRB ######", "P.IVA ###########", "Company No. ########", "Charity No. #######", "GST ## ### ###"),
    )  # fmt: skip


def _order(roll: Roll) -> str:
    return _pattern(
        roll,
        *("Order #11#-#######-#######", "Order No. 11#-#######-#######", "tracking number 1Z 999 @@1 01 #### ####"),
        *("Tracking: 94## #### #### #### #### ##", "Invoice ####-####-####", "Ticket #######-######", "confirmation no. ###-###-####"),
        *("Order ID ###-#######", "Invoice No. ###-####", "RMA ###-###-####", "eBay item number: 1##########", "Job ID ###-####-##"),
        *("Kundennummer ###-####-###", "Reference number ##-####-####", "Bestellnummer ###.###.##", "FedEx #### #### ####"),
    )  # fmt: skip


def _stock(roll: Roll) -> str:
    return _pattern(
        roll,
        *("NSN ####-##-###-####", "####-00-###-####", "HS code ####.##.####", "HTS ####.##.##.##", "HTSUS ####.##.####"),
        *("tariff ####.##.##", "UNSPSC ########", "NAICS ######, ######", "NIIN 00-###-####", "NSN: ####-01-###-####"),
        *("IKEA ###.###.##", "LEGO ####-#", "Mercedes ### ### ## ##", "BMW ## ## # ### ###", "VW ### ### ### @", "Intrastat ## ## ## ##"),
    )  # fmt: skip


def _standard(roll: Roll) -> str:
    return _pattern(
        roll,
        *("ISO 8601:20##", "IEC 61###-#:20##", "DIN EN 1####-#", "ISO/IEC 14###-##:20##", "ASTM D####-##", "MIL-STD-###"),
        *("IEEE 802.11-20##", "RFC ####, RFC ####", "ANSI ###.##-20##", "BS EN ISO ####-#:20##", "RFCs ####-####", "UL ####-##-####"),
        *("ECE R##.####", "EN 1####-#-#:20##", "VDE 0###-###-#", "DIN VDE 0100-###:20##-##", "ISO 10993-1:20##/####"),
    )  # fmt: skip


def _astronomy(roll: Roll) -> str:
    return _pattern(
        roll,
        *("2MASS J0#######+#######", "SDSS J######.##+######.#", "PSR J05##+22##", "GRB 0#####", "IRAS 0####-####"),
        *("HD ######", "TYC ####-####-1", "UCAC4 ###-######", "Gaia DR2 ###################", "USNO-B1.0 0###-#######"),
        *("WISE J0#####.##-######.#", "NGC ####-####", "(######) 20## @@##", "MJD #####.####", "JD 24#####.####", "TYC ###-####-1"),
    )  # fmt: skip


def _table(roll: Roll) -> str:
    numbers = [roll.uniform(0, 10 ** roll.randint(1, 5)) for _ in range(8)]
    return roll.choice(
        [
            "  ".join(f"{x:.2f}" for x in numbers),
            " ".join(f"{x:.0f}" for x in numbers),
            " | ".join(f"{x:,.0f}" for x in numbers),
            "\t".join(f"{x:.3f}" for x in numbers),
            f"{numbers[0]:.0f}-{numbers[0] + numbers[1]:.0f} of {sum(numbers):.0f}",
            ", ".join(f"{x:.0f}-{x + 20:.0f}" for x in numbers),
            " ".join(f"{x:.1f}±{x / 10:.1f}" for x in numbers),
            " ".join(f"({x:.2f}, {y:.2f})" for x, y in pairwise(numbers)),
        ]
    )  # fmt: skip


def _score(roll: Roll) -> str:
    return _pattern(
        roll,
        *("#-#, #-#, #-#", "#-# #-# #-#", "21-##, 21-##, 21-##", "won ##-##-##", "1##-1##-1## record", "(#-#) (##-##)"),
        *("1## x ## x ## mm", "19## x 1080 px", "3##-3## nm", "Psalm 1##:#-##", "Gen. ##:##-##:##", "###x###x##"),
        *("### 1/2-### 3/4", "1#:## 2#:## 3#:##", "record ##-##-#-###", "DIN A4 210 x 297", "lines ####-####, ####-####"),
        *("pp. ####–####", "pages ###-###, ###-###", "fol. ###-###", "Nos. ####-####", "§§ ###-###", "numbers ####-#####"),
    )  # fmt: skip


def _url(roll: Roll) -> str:
    return _pattern(
        roll,
        *("https://example.org/news/20##/##/##/###-####", "http://www.example.com/id=###-###-####", "/p/###-##-####.html"),
        *("https://example.org/article/#######-###-####", "https://shop.example.com/dp/##########", "img_####-####-###.jpg"),
        *("http://example.com/viewtopic.php?t=##########", "https://example.org/10.####/###.##.####", "example.com/###.###.####"),
        *("https://example.com/a/0###.####", "DSC_####_###-####.JPG", "https://example.com/?p=###-###-####&x=1", "doc-##-###-####.pdf"),
        *("https://example.org/0##-###-####/x", "https://www.ncbi.nlm.nih.gov/pubmed/########", "file_2##-###-####_1.png"),
    )  # fmt: skip


def _time(roll: Roll) -> str:
    return _pattern(
        roll,
        *("timestamp 16########", "16########.######", "16##########", "epoch 15########", "[1####.######] usb 1-1", "seq 1#########"),
        *("pid ##### tid ###-####", "Message-ID: <#########.########>", "log 20##-0#-1# 0#:##:##,###", "0#:##:##.### --> 0#:##:##.###"),
        *("UTC−0#:00 (20##)", "+0#00 20##", "0x%%%%%%%% ########", "ETag ########-####", "uid=##########", "T+## ##:##:##"),
    )  # fmt: skip


KINDS: dict[str, Callable[[Roll], str]] = {
    "doi_jama": _jama,
    "doi": _doi,
    "arxiv": _arxiv,
    "arxiv_url": _arxiv_url,
    "journal_reference": _reference,
    "issn": _issn,
    "isbn": _isbn,
    "zip_range": _zip,
    "ndc": _ndc,
    "statute": _statute,
    "coordinates": _coordinates,
    "version": _version,
    "date": _date,
    "part_number": _part,
    "gtin": _gtin,
    "patent": _patent,
    "uuid_mac_hash": _hex,
    "oid": _oid,
    "author_or_library_id": _person_id,
    "medical_id": _medical,
    "chemical_id": _chemical,
    "docket": _docket,
    "finance_id": _finance,
    "order": _order,
    "stock_number": _stock,
    "standard": _standard,
    "astronomical_object": _astronomy,
    "table_row": _table,
    "score_or_size": _score,
    "url": _url,
    "timestamp": _time,
}


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else COUNT)
