"""URL policy: blocked hosts, URLs and words from list files, checked before a page is opened.

List folders have the format of the UT1 blacklists (Université Toulouse 1 Capitole): a folder per
category, with a file `domains` (one host per line, which blocks its subdomains too) and a file
`urls` (host/path prefixes).
"""

from typing import NamedTuple
from urllib.parse import urlsplit

from pydantic.dataclasses import dataclass

from filters import STRICT, Files
from filters.url_lists import Lists, ascii_host, host_of, load_lists, url_keys, url_words


class Blocked(NamedTuple):
    """Why a URL is blocked: the rule ('host', 'url' or 'word') and the list entry that matched."""

    rule: str
    entry: str


@dataclass(frozen=True, config=STRICT)
class UrlPolicy:
    """Reject URLs by lists.

    `blocked_lists`: UT1 category folders, or files of hosts and URL prefixes, one or more per line,
    also in the formats of hosts files and ad blockers. `blocked_words`: files of words of any
    language, one per line, which match whole words of the URL; a phrase matches the same words in a
    row. Case, accents of words, percent-encoding and IDNA make no difference.
    """

    blocked_lists: Files = ()
    blocked_words: Files = ()

    def check(self, languages: tuple[str, ...]) -> None:
        """Read the lists. ValueError names file and line of an entry that can never match."""
        load_lists(self.blocked_lists, self.blocked_words)

    def blocked_by(self, url: str) -> Blocked | None:
        """The list entry that blocks a URL, or None; defined for every string."""
        if not self.blocked_lists and not self.blocked_words:
            return None
        lists = load_lists(self.blocked_lists, self.blocked_words)
        return _blocked_address(url, lists) or _blocked_word(url, lists)


def _blocked_address(url: str, lists: Lists) -> Blocked | None:
    host = ascii_host(host_of(url))
    if not host:
        return None
    labels = host.split(".")
    above = [".".join(labels[start:]) for start in range(len(labels))]
    if (name := next((name for name in above if name in lists.hosts), None)) is not None:
        return Blocked("host", name)
    if not lists.urls:
        return None
    parts = urlsplit(url)
    hosts = [host.removeprefix("www."), *(f".{name}" for name in above)]
    for key in url_keys(parts.path, parts.query):
        for name in hosts:
            if f"{name}{key}" in lists.urls:
                return Blocked("url", f"{name}{key}")
    return None


def _blocked_word(url: str, lists: Lists) -> Blocked | None:
    match = None if lists.words is None else next(lists.words.iter(url_words(url)), None)
    return None if match is None else Blocked("word", match[1])
