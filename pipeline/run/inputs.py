"""The inputs of a run: its append-only list, from whose numbers document ids are made."""

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from stages.read.listing import expand_inputs, fingerprint
from stages.read.records import InputConfig
from stages.storage.files import exists, read_bytes, write_atomically
from stages.storage.parts import unit_name


class Input(NamedTuple):
    """An input file: its number in the run's list, its path, and what identifies its content."""

    ordinal: int
    path: str
    fingerprint: str

    @property
    def unit(self) -> str:
        """Name of the units that this input makes."""
        return unit_name(self.ordinal)

    @property
    def bytes(self) -> int | None:
        """Size of a file or object; None for an http address, which would have to be requested."""
        size = self.fingerprint.partition(":")[0]
        return int(size) if size.isdecimal() else None


def list_inputs(root: str, config: InputConfig, *, extend: bool) -> list[Input]:
    """The inputs that the configuration names, numbered; new ones join the list if `extend`."""
    numbers = input_numbers(root)
    paths = expand_inputs(list(config.paths), base_uri=config.base_uri)
    paths = [p for p in paths if not p.startswith(f"{root}/")]  # a run does not read its own output
    for path in paths:
        numbers.setdefault(path, len(numbers))
    if extend:
        write_numbers(root, numbers)
    with ThreadPoolExecutor(32) as pool:
        fingerprints = list(pool.map(_fingerprint, paths))
    return [Input(numbers[p], p, f) for p, f in zip(paths, fingerprints, strict=True)]


def input_numbers(root: str) -> dict[str, int]:
    """Number of each input that was ever listed, by path; none if there is no list."""
    uri = f"{root}/inputs.jsonl"
    if not exists(uri):
        return {}
    return {r["path"]: r["ordinal"] for r in map(json.loads, read_bytes(uri).splitlines())}


def write_numbers(root: str, numbers: Mapping[str, int]) -> None:
    """Replace the list of inputs: the number of each, by path."""
    lines = [json.dumps({"ordinal": n, "path": p}) + "\n" for p, n in numbers.items()]
    write_atomically(f"{root}/inputs.jsonl", "".join(lines).encode())


def _fingerprint(path: str) -> str:
    try:
        return fingerprint(path)
    except FileNotFoundError:
        return "missing"  # its unit will fail and say so; the others go on
