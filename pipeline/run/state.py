"""run.json: what a run directory holds, for status, report and other readers."""

import json
from typing import Any, NamedTuple

from stages.storage.files import read_bytes


class Input(NamedTuple):
    """An input file: its number in the run's append-only list, its path, and what identifies its
    content.
    """

    ordinal: int
    path: str
    fingerprint: str

    @property
    def bytes(self) -> int | None:
        """Size of a file or an object; None of an http address, which would have to be asked."""
        size = self.fingerprint.partition(":")[0]
        return int(size) if size.isdecimal() else None


def read_state(root: str) -> dict[str, Any]:
    """The run.json of a run directory. FileNotFoundError with advice if it is none."""
    try:
        state: dict[str, Any] = json.loads(read_bytes(f"{root.rstrip('/')}/run.json"))
        return state
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{root} is not a run directory (it has no run.json); give the config's run.directory"
        ) from None
