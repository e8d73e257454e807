"""URL policy: blocked hosts, URLs and words from list files, checked before a page is opened.

List folders have the format of the UT1 blacklists (Université Toulouse 1 Capitole): a folder per
category, with a file `domains` (one host per line, which blocks its subdomains too) and a file
`urls` (host/path prefixes).
"""

import re
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from pydantic.dataclasses import dataclass

from filters import STRICT, Files

_NOT_WORD = re.compile(r"[^a-z0-9]+")


class Blocked(NamedTuple):
    """Why a URL is blocked: the rule ('host', 'url' or 'word') and the list entry that matched."""

    rule: str
    entry: str


@dataclass(frozen=True, config=STRICT)
class UrlPolicy:
    """Reject URLs by lists.

    `blocked_lists`: UT1 category folders, or files of hosts and URL prefixes. `blocked_words`:
    files of words, one per line, which match whole words of the URL (runs of letters and digits); a
    phrase matches the same words in a row. All matching ignores case.
    """

    blocked_lists: Files = ()
    blocked_words: Files = ()

    def check(self, url: str) -> Blocked | None:
        """The list entry that blocks a URL, or None; defined for every string."""
        if not self.blocked_lists and not self.blocked_words:
            return None
        lists = _load_lists(self.blocked_lists, self.blocked_words)
        host = host_of(url)
        labels = host.split(".")
        for start in range(len(labels)):
            if (name := ".".join(labels[start:])) in lists.hosts:
                return Blocked("host", name)
        return _blocked_path(url, host, lists.urls) or _blocked_word(url, lists.words)


def host_of(url: str) -> str:
    """Lower-case host of a URL without port and user, "" if there is none; never raises."""
    try:
        return (urlsplit(url).hostname or "").rstrip(".")
    except ValueError:  # such as "http://["
        return ""


class _Lists(NamedTuple):
    hosts: frozenset[str]
    urls: frozenset[str]
    words: Any  # an Aho-Corasick automaton over " word " or None


def _blocked_path(url: str, host: str, urls: frozenset[str]) -> Blocked | None:
    # an entry host/a/b blocks itself and everything below it; UT1 omits a leading www.
    path = url.lower().partition("://")[2].partition("/")[2].partition("#")[0]
    parts = re.split(r"[/?]", path) if path else []
    prefix = host.removeprefix("www.")
    for part in parts:
        prefix = f"{prefix}/{part}"
        if prefix.rstrip("/") in urls:
            return Blocked("url", prefix.rstrip("/"))
    return None


def _blocked_word(url: str, words: Any) -> Blocked | None:
    if words is None:
        return None
    spaced = f" {_NOT_WORD.sub(' ', url.lower())} "
    match = next(words.iter(spaced), None)
    return None if match is None else Blocked("word", match[1])


@lru_cache(maxsize=2)
def _load_lists(blocked_lists: tuple[str, ...], blocked_words: tuple[str, ...]) -> _Lists:
    entries = {
        line.removeprefix("www.") for path in blocked_lists for line in _entries(_list_files(path))
    }
    words = sorted(
        {
            " ".join(_NOT_WORD.sub(" ", w).split())
            for w in _entries([Path(p) for p in blocked_words])
        }
        - {""}
    )
    return _Lists(
        hosts=frozenset(e for e in entries if "/" not in e),
        urls=frozenset(e.rstrip("/") for e in entries if "/" in e),
        words=_automaton(words) if words else None,
    )


def _list_files(path: str) -> list[Path]:
    root = Path(path)
    if not root.exists():
        raise ValueError(f"url_policy.blocked_lists: no such file or folder: {path}")
    if not root.is_dir():
        return [root]
    return sorted(p for p in root.rglob("*") if p.name in ("domains", "urls"))


def _entries(files: list[Path]) -> set[str]:
    return {
        line
        for file in files
        for raw in file.read_text(encoding="utf-8", errors="replace").lower().splitlines()
        if (line := raw.strip()) and not line.startswith("#")
    }


def _automaton(words: list[str]) -> Any:
    import ahocorasick

    automaton = ahocorasick.Automaton()
    for word in words:
        automaton.add_word(f" {word} ", word)
    automaton.make_automaton()
    return automaton
