"""Read lists of blocked hosts, URLs and words, and bring them and URLs into one form.

An entry is in any common form: example.org, .example.org, *.example.org, 0.0.0.0 example.org (hosts
files), ||example.org^ (ad blockers), https://example.org/path?query; comments begin with # ; or !.
"""

import ipaddress
import re
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, unquote, unquote_to_bytes, urlsplit

import idna

from filters.text.words import normalize


class Lists(NamedTuple):
    """Hosts, which block what is below them too; URLs as `url_keys` gives them, with a dot before
    those that also apply to hosts below; an Aho-Corasick automaton over " word ", or None.
    """

    hosts: frozenset[str]
    urls: frozenset[str]
    words: Any


@lru_cache(maxsize=2)
def load_lists(blocked_lists: tuple[str, ...], blocked_words: tuple[str, ...]) -> Lists:
    """All entries of files. ValueError names file and line of those that can never match."""
    entries: set[str] = set()
    for path in blocked_lists:
        entries.update(_entries(_list_files(path), _addresses))
    words = set(_entries([Path(path) for path in blocked_words], _word))
    urls = frozenset(entry for entry in entries if "/" in entry)
    return Lists(frozenset(entries - urls), urls, _automaton(sorted(words)) if words else None)


# --- URLs -----------------------------------------------------------------------------------------

_PLAIN = re.compile(r"[A-Za-z0-9._~!$'()*+,;=:@-]*")
_PUNYCODE = re.compile(r"xn--([a-z0-9-]+)", re.IGNORECASE)


def host_of(url: str) -> str:
    """Lower-case host of a URL without port and user, "" if there is none; never raises."""
    try:
        return (urlsplit(url).hostname or "").rstrip(".")
    except ValueError:  # such as "http://["
        return ""


def ascii_host(host: str) -> str:
    """A host as it is looked up: in ASCII (IDNA), without a dot at its end; total."""
    if "%" in host:
        host = unquote(host)
    if not host.isascii():
        try:
            host = idna.uts46_remap(host, std3_rules=False)
        except idna.IDNAError:
            host = host.lower()
        host = ".".join(map(_ascii_label, host.split(".")))
    return host.lower().rstrip(".")


def _ascii_label(label: str) -> str:
    if label.isascii():
        return label
    try:
        return idna.encode(label).decode()
    except UnicodeError:  # which IDNAError is: browsers look up more than the standard allows
        return "xn--" + label.encode("punycode", "replace").decode()


def url_keys(path: str, query: str) -> list[str]:
    """What a URL has after its host, and what is above it: /a, /a/b, /a/b?x=1, /a/b?x=1&y=2.

    Case, percent-encoding, empty segments and dots make no difference; %2F is no slash.
    """
    segments: list[str] = []
    for segment in map(_quoted, path.split("/")):
        if segment == "..":
            del segments[-1:]
        elif segment not in ("", "."):
            segments.append(segment)
    keys = ["/" + "/".join(segments[: n + 1]) for n in range(len(segments))] or ["/"]
    mark = "?"
    for parameter in filter(None, query.split("&")):
        keys.append(f"{keys[-1]}{mark}{_quoted(parameter)}")
        mark = "&"
    return keys


def _quoted(part: str) -> str:
    """A part of a URL in lower case, with the fewest possible percent-encoded bytes."""
    if _PLAIN.fullmatch(part):
        return part.lower()
    try:
        encoded = part.encode("utf-8", "surrogateescape")  # what is not UTF-8 in a list
    except UnicodeEncodeError:
        encoded = part.encode("utf-8", "replace")
    text = unquote_to_bytes(encoded).decode("utf-8", "surrogateescape").lower()
    return quote(text.encode("utf-8", "surrogateescape"), safe="!$'()*+,;=:@~")


def url_words(url: str) -> str:
    """The words of a URL as those of lists, in letters of their script, between spaces."""
    return f" {normalize(_PUNYCODE.sub(_from_punycode, unquote(url)))} "


def _from_punycode(match: re.Match[str]) -> str:
    try:
        return match[1].encode().decode("punycode")
    except UnicodeError:
        return match[0]


# --- entries --------------------------------------------------------------------------------------

_LABEL = re.compile(r"[a-z0-9_-]{1,63}")
# most lines of most lists: a host, or a URL of letters and digits
_SIMPLE = re.compile(r"(?:[a-z0-9_-]{1,63}\.)+[a-z0-9_-]{1,63}(?:/[a-z0-9_~-][a-z0-9._~-]*)*/?")
_SCHEME = re.compile(r"^(?:[a-z][a-z0-9+.-]*:)?//", re.IGNORECASE)
_COMMENT_MARK = re.compile(r"[#;!\[]")
_COMMENT = re.compile(r"(?:^|\s+)[#;!].*|^\[Adblock.*", re.IGNORECASE)
_AD_RULE = re.compile(r"^@@|^\||#[@?$]?#|\^")
_NOT_UTF_8 = re.compile("[\udc80-\udcff]")
_SHOWN_FAULTS = 5


def _list_files(path: str) -> list[Path]:
    root = Path(path)
    if not root.exists():
        raise ValueError(f"url_policy.blocked_lists: no such file or folder: {path}")
    if not root.is_dir():
        return [root]
    files = sorted(p for p in root.rglob("*") if p.name in ("domains", "urls"))
    if not files:
        raise ValueError(f"url_policy.blocked_lists: no file 'domains' or 'urls' in {path}")
    return files


def _entries(files: Sequence[Path], parse: Callable[[str], list[str]]) -> Iterator[str]:
    faults = []
    for file in files:
        text = file.read_text(encoding="utf-8-sig", errors="surrogateescape")
        for number, line in enumerate(text.split("\n"), start=1):
            entry = line.strip()
            if _COMMENT_MARK.search(entry):
                entry = _COMMENT.sub("", entry)
            try:
                if entry:
                    yield from parse(entry)
            except ValueError as error:
                faults.append(f"{file}, line {number}: {entry!r} can never match: {error}")
    if faults:
        more = f"\nand {len(faults) - _SHOWN_FAULTS:,} more" * (len(faults) > _SHOWN_FAULTS)
        raise ValueError("\n".join(faults[:_SHOWN_FAULTS]) + f"{more}; correct or remove them")


def _word(entry: str) -> list[str]:
    if not (word := normalize(entry)) or _NOT_UTF_8.search(entry):
        raise ValueError("no letter or digit, or not UTF-8")
    return [word]


def _addresses(entry: str) -> list[str]:
    """The hosts and URLs of a line. ValueError says why it is none."""
    if _SIMPLE.fullmatch(entry):
        return [entry.removeprefix("www.").removesuffix("/")]
    first, *others = entry.split()
    if _is_ip(first):  # hosts files say where names lead to
        return [_address(other) for other in others] or [first.strip("[]").lower()]
    if others and "/" not in first:
        raise ValueError("several words")
    return [_address(entry)]


def _address(entry: str) -> str:
    if entry.startswith("||"):
        entry = entry[2:].removesuffix("|").removesuffix("^")
    if _AD_RULE.search(entry):
        raise ValueError(
            "of the rules of ad blockers, only ||host^ and ||host/path^ are understood"
        )
    bare = _SCHEME.sub("", entry) if "//" in entry else entry
    below, bare = bare.startswith((".", "*.")), bare.removeprefix("*.").removeprefix(".")
    parts = urlsplit("//" + (bare[:-1] if bare.endswith("/*") else bare))
    host = ascii_host(parts.hostname or "").removeprefix("www.")
    if "*" in parts.netloc + parts.path:
        raise ValueError(
            "* can only be at the start, as in *.example.org, or the end, as in /path/*"
        )
    is_odd = "@" in parts.netloc or parts.port == 0 or _NOT_UTF_8.search(parts.netloc)
    if is_odd or not (_is_host(host) or _is_ip(host)):
        raise ValueError(f"{parts.netloc!r} is no host")
    keys = url_keys(parts.path, parts.query)
    if keys == ["/"]:
        return host
    return f"{'.' * below}{host}{keys[-1]}"


def _is_host(host: str) -> bool:
    return len(host) < 254 and all(map(_LABEL.fullmatch, host.split(".")))


def _is_ip(text: str) -> bool:
    try:
        ipaddress.ip_address(text.strip("[]"))
        return True
    except ValueError:
        return False


def _automaton(words: list[str]) -> Any:
    import ahocorasick

    automaton = ahocorasick.Automaton()
    for word in words:
        automaton.add_word(f" {word} ", word)
    automaton.make_automaton()
    return automaton
