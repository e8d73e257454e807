"""Keep pages by the license that they declare for themselves."""

from fnmatch import fnmatchcase

from pydantic.dataclasses import dataclass

from filters import STRICT


@dataclass(frozen=True, config=STRICT)
class License:
    """Keep pages whose declared license matches one of the patterns `allowed`, () for all pages.

    A pattern is a name as in the column `license` ('cc-by-4.0', 'cc0-1.0', 'gfdl-1.3', a URL for
    licenses without a name) with the wildcards of file names: 'cc-by-sa*'. 'cc-by*' also matches
    the non-commercial ones, 'cc-by-[0-9]*' does not. A page that declares none matches no pattern.
    """

    allowed: tuple[str, ...] = ()

    def allows(self, license: str | None) -> bool:
        """Whether a page with this license is kept; defined for every string."""
        if not self.allowed:
            return True
        name = (license or "").lower()
        return bool(name) and any(fnmatchcase(name, pattern.lower()) for pattern in self.allowed)
