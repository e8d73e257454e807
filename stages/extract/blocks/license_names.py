"""Names of licenses: 'cc-by-sa-4.0' for any of the ways in which pages write it."""

import re
from typing import Final

_MAX_CHARS: Final = 300  # of a declaration; more is prose

_CC_PATH = re.compile(
    r"creativecommons\.org/(?:licen[sc]es/([a-z-]+)|publicdomain/(zero|mark))"
    r"(?:/([0-9]\.[0-9]))?(?![0-9a-z])"
)
_CC_WORDS = re.compile(
    r"(?<![a-z])(?:cc|creative-commons)-(?:by|attribution)(?![a-z])"
    r"((?:-(?:nc|nd|sa|non-?commercial|no-?deriv(?:ative)?s?(?:-works)?|share-?alike)(?![a-z]))*)"
    r"(?:-(?:international|unported|generic|licen[sc]e|public))*(?:-v(?:ersion)?-?|-)?"
    r"([0-9]\.[0-9])?"
)
_CC_ZERO = re.compile(r"(?<![a-z])(?:cc-?0|cc-zero|creative-commons-(?:zero|0|cc0))(?![a-z0-9])")
_FDL = re.compile(
    r"(?:gfdl|gnu-free-documentation-licen[sc]e|gnu\.org-(?:licenses|copyleft)-"
    r"(?:old-licenses-)?fdl)(?:-v?(?:ersion-)?([0-9]\.[0-9]))?"
)
_SPDX_PATH = re.compile(
    r"(?:spdx|opensource)\.org/licenses?/([a-z0-9.+-]+?)(?:\.html|\.php)?/?(?=$|\s)"
)
_APACHE = re.compile(r"apache\.org-licenses-license-2\.0|apache-(?:licen[sc]e-)?(?:version-)?2\.0")
_ELEMENTS = {"by", "nc", "nd", "sa"}


def license_id(declared: str) -> str | None:
    """The license that a URL or the words of a declaration name, None if it is no known one.

    Creative Commons licenses keep their elements and version, not the jurisdiction ('cc-by-nc-3.0',
    'cc-by' without a version, 'cc0-1.0', and 'pdm-1.0' for the Public Domain Mark). Others are
    'gfdl-1.3', 'apache-2.0', and what a URL of SPDX or opensource.org ends with.
    """
    text = declared.strip().lower()
    if len(text) > _MAX_CHARS:
        return None
    if path := _CC_PATH.search(text):
        return _of_path(path[1], path[2], path[3])
    if spdx := _SPDX_PATH.search(text):
        return spdx[1]
    words = re.sub(r"[^a-z0-9.]+", "-", text)
    if "all-rights-reserved" in words:
        return None
    if _CC_ZERO.search(words):
        return "cc0-1.0"
    if match := _CC_WORDS.search(words):
        return _versioned(f"cc-by{_elements(match[1])}", match[2])
    if match := _FDL.search(words):
        return _versioned("gfdl", match[1])
    return "apache-2.0" if _APACHE.search(words) else None


def _of_path(elements: str | None, public_domain: str | None, version: str | None) -> str | None:
    if public_domain:
        return _versioned("cc0" if public_domain == "zero" else "pdm", version or "1.0")
    parts = (elements or "").strip("-").split("-")
    return _versioned("-".join(["cc", *parts]), version) if _ELEMENTS.issuperset(parts) else None


def _elements(words: str) -> str:
    """'-nc-sa' for '-noncommercial-share-alike', in the order that Creative Commons uses."""
    words = re.sub(r"non-?commercial", "nc", words)
    words = re.sub(r"no-?deriv(?:ative)?s?(?:-works)?", "nd", words)
    words = re.sub(r"share-?alike", "sa", words)
    return "".join(f"-{element}" for element in ("nc", "nd", "sa") if f"-{element}" in words)


def _versioned(name: str, version: str | None) -> str:
    return f"{name}-{version}" if version else name
