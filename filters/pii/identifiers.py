"""Numbers that name a thing and not a person: identifiers of papers, laws, goods, places and files.

Many have the form of a phone or social security number: an NDC 50580-449-05, DOIs that end in
255.14.2144, the ZIP codes 60601-60699. They are known by the label before them, by the path or name
of which they are a part, or by a form of their own.
"""

import re

_NUMBER_WORDS = frozenset(("#", "№", "n°", "no", "nr", "nos", "num", "number", "numbers")) | {
    *("code", "codes", "id", "ids", "range", "nummer", "numéro"),
}
# a word before a number that says what it is …
_LABEL_WORDS = (
    "isbn issn issn-l eissn e-issn p-issn pissn ean gtin upc jan barcode ean-13 isbn-13 isbn-10 "
    "doi oid ndc cas einecs elincs ec e.c pmid pmcid pubmed arxiv e-prints eprints bibcode orcid "
    "isni viaf gnd lccn oclc isrctn actrn eudract cpt icd icd-9 icd-10 loinc rxcui hcpcs genbank "
    "pubchem sku p/n s/n pn mpn oem asin nsn niin hs hts htsus unspsc naics sic cusip isin wkn "
    "lei ein duns d-u-n-s cik abn acn vat gst siren siret cnpj kvk hrb rma zip zips zipcode "
    "zipcodes plz utm mgrs iso iec din en vde ansi astm ul ieee rfc rfcs ece tyc iras hd ngc guid "
    "uuid timestamp epoch uid pid seq etag patent patents pat pats ep wo jp docket u.s.c usc "
    "c.f.r cfr stat ors nrs rcw krs mcl ilcs ars a.r.s ocga o.c.g.a tca t.c.a ksa k.s.a njsa "
    "n.j.s.a crs c.r.s ndcc n.d.c.c sdcl nmsa wac oar statute statutes § §§ section sections sec "
    "secs article articles art chapter chap clause pp pages vol volume issue lines version ver "
    "build release firmware driver revision lat lon latitude longitude coordinates jd mjd isrc "
    "iswc udc ddc ref réf catalog catalogue intrastat mercedes bmw vw ikea lego rs gse "
    "researcherid ccr cep pin eircode ticket invoice fedex ups usps"
)
# … and with a word for number after it: 'to order 800-555-0147' is a phone number
_WITH_NUMBER_WORDS = (
    "part item model serial order stock cat reference product invoice ticket confirmation "
    "tracking job case cases file index charge application appl ser registration registry license "
    "licence permit account acct policy claim lot batch bill tariff customer company charity "
    "report action release scopus drug un vin form document doc contract project proposal grant "
    "award certificate accession specimen sample asset style design parcel shipment bestell "
    "artikel kunden rechnungs author member user tax dealer bulletin question problem exercise "
    "law act code"
)
_LABELS, _WITH_NUMBER = (
    frozenset([*_LABEL_WORDS.split(), "〒"]),
    frozenset(_WITH_NUMBER_WORDS.split()),
)
_WORD = re.compile(r"\d{0,2}[^\W\d_][\w.&/-]*|§+|[#№〒]")
_BETWEEN = re.compile(r"(?:[\s.:()\[\]*=-]|\(s\))*")
# of a list after the label: '10.1, 10.2 and 10.3'
_LISTED = re.compile(r"([\d.–-]+\d)(?:\s*(?:[,;&/]|\b(?:and|or|to|through)\b)\s*(?:§+\s*)?)\Z")
_GERMAN_PHONE = re.compile("tel|fon|fax|ruf|mobil|handy")
_COUNTRY = re.compile(r"[A-Z]{2}|\d\d[A-Z]")  # VAT GB; UTM 33T
_OTHER_WORDS = ("print", "online", "electronic", "hardcover", "and", "or", "to", "registry", "is")
_BARE = ("no", "nos", "nr", "#", "№", "n°")  # with nothing before it

# a name or path: /img_0123-456, 10.1001/jama.255., ?id=; but not 'Tel/Fax:' or 'Room 12-'
_PATH = re.compile(r"[^\W\d][\w%~-]*[/_=.?&]|[/_=?&][^\W\d]|://|\b10\.\d{4,}/|\w_|%2[Ff]|[#@]\w")
_CALLS = re.compile(
    r"tel|fon|phone|fax|call|sms|whatsapp|wa\.me|mob|cell|handy|office|direct|dial|contact|ph\b|t[.:]|т",
    re.I,
)
_NAME_AFTER = re.compile(r"[_=]|-?[^\W\d_]{2,}[\d-]|\.[a-z]{2,4}\b|/[^\W\d_]{2}(?<!/fa)(?<!/te)")
_POINT_BEFORE = re.compile(r"\w\.\Z|\d:\Z")

# forms that unlabeled phone numbers do not have
_FORM = re.compile(
    r"[\d ]{0,5}\((?:1[89]|20)\d\d\).*"  # (1998) 386-411: a year, pages
    r"|(?:0[1-9]|1\d|2\d)(?:0[1-9]|1[0-2])\.\d{4,5}"  # arXiv
    r"|\d{4}\.\d{4}\.\d{4}"  # MAC
    r"|\d\d \d\d \d\d\.\d.*"  # of a star
    r"|\d\d([-./])\d\d\1(?:\d\d|\d{4}) \d\d[.:]\d\d.*"  # day and time
    r"|\d{3,4}[-–]\d{3,4}[-–]\d{1,2}|\d{5}-\d{3}-\d\d|\d{5}-\d{4}-\d{1,2}"  # NDC
    r"|\d{2,7}-\d\d-\d"  # CAS
    r"|\d{4}-\d{4}|\d{4}-\d\d-\d{3}-\d{4}"  # ISSN; NSN
    r"|[2-4]\d\d-\d{3}-\d"  # EC
)
_PAGES = re.compile(r"\(\d{1,2}\) ?\d{1,4}[-–]\d{1,4}")  # after a volume
_RANGE = re.compile(r"(\d{3,5}) ?[-–] ?(\d{3,5})")
_GRID_PAIR, _GRID_LETTERS = re.compile(r"\d{5} \d{5}"), re.compile(r"\b[A-Z]{2} ?\Z")
_UNIT_AFTER = re.compile(
    r"\s*(?:[°′″º]|['\"]\s*[NSEWO]\b|[NSEWO]\b(?!-)|(?:mm|cm|km|px|nm)\b)|\s*x\s*\d"
    # 442 Main St
    r"|(?: [A-Z]\w+){1,2} (?:St|Street|Ave|Avenue|Rd|Road|Blvd|Dr|Drive|Lane|Ln|Way|Court|Ct)\b"
)
_UNIT_BEFORE = re.compile(r"(?:\b[NSEW]|[°′″º]|[×±<>=$€£]|\d\s?x)\s*\Z")


def is_named(line: str, start: int, end: int) -> bool:
    """Whether line[start:end] has the label of an identifier, or is a part of a name or a path."""
    return has_label(line, start, end) or _is_in_name(line, start, end)


def has_own_form(line: str, start: int, end: int) -> bool:
    """Whether line[start:end] is written as identifiers are, or as a measure."""
    value, before, after = line[start:end], line[max(0, start - 12) : start], line[end : end + 40]
    return (
        _FORM.fullmatch(value) is not None
        or _is_range(value)
        or (_PAGES.fullmatch(value) is not None and before.rstrip()[-1:].isdigit())
        or (value[0] == "(" and before[-1:].isdigit())
        or _UNIT_AFTER.match(after) is not None
        or _UNIT_BEFORE.search(before) is not None
        or (_GRID_PAIR.fullmatch(value) is not None and _GRID_LETTERS.search(before) is not None)
        or _POINT_BEFORE.search(before) is not None
    )


def _is_range(value: str) -> bool:
    """Of ZIP codes, pages or sections; one in twenty unlabeled Indian numbers is taken for one."""
    match = _RANGE.fullmatch(value)
    if match is None:
        return False
    first, last = match[1], match[2]
    return 0 < int(last) - int(first) < 1000 or (first[0] == last[0] and first < last)


def has_label(line: str, start: int, end: int) -> bool:
    """Whether the label of an identifier stands before line[start:end], or before its list."""
    before, shape = line[max(0, start - 60) : start], _shape(line[start:end])
    while (listed := _LISTED.search(before)) and _shape(listed[1]) == shape:
        before = before[: listed.start()]
    numbered, name, end = False, "", len(before)
    for word in reversed(list(_WORD.finditer(before))):
        if not _BETWEEN.fullmatch(before, word.end(), end):
            return False
        name, end = word[0].rstrip(".-/").lower(), word.start()
        if name in _NUMBER_WORDS:
            numbered = True
        elif name in _LABELS or (numbered and name in _WITH_NUMBER):
            return True
        elif name.endswith(("nummer", "-nr")):
            return not _GERMAN_PHONE.search(name)
        elif name not in _OTHER_WORDS and not _COUNTRY.fullmatch(word[0].rstrip("-")):
            return False
    return name in _BARE


def _shape(value: str) -> str:
    return re.sub(r"\d", "0", value).replace("–", "-").strip()


def _is_in_name(line: str, start: int, end: int) -> bool:
    low = max(line.rfind(mark, max(0, start - 200), start) for mark in ' \t<>,;|"')
    token = line[max(low + 1, start - 200) : start].lstrip("([{'“‘*•-")
    if _CALLS.search(token):
        return False
    return _PATH.search(token) is not None or _NAME_AFTER.match(line, end) is not None
