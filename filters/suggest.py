"""Suggest the nearest known name for a misspelled one."""

import difflib
from collections.abc import Iterable

_MAX_LISTED = 30  # a longer list of known names is cut


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error message: "; did you mean 'x'?", or "; known: a, b" if none is similar.

    Case does not matter. Of dotted names the last parts are compared: 'c4.sentense_count' is near
    'c4.sentence_count' although all names start with 'c4.'.
    """
    names = list(dict.fromkeys(known))
    last_parts = {_last_part(known_name): known_name for known_name in reversed(names)}
    if close := difflib.get_close_matches(_last_part(name), last_parts, 1, cutoff=0.5):
        return f"; did you mean '{last_parts[close[0]]}'?"
    listed = ", ".join(names[:_MAX_LISTED]) + (", …" if len(names) > _MAX_LISTED else "")
    return f"; known: {listed}" if names else ""


def _last_part(name: str) -> str:
    return name.rpartition(".")[2].casefold()
