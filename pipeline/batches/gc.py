"""Files in a run directory or series that nothing refers to any more, and their removal.

Never removed: generations in the catalog; the stores of the current keys; what later batches match
against (documents, keep table and index). Removed, by reason:

    superseded      stores of keys of other configurations; returning to one repeats their work
    unpublished     generations that are not in the catalog: a crash before their line was written
    scratch         what estimates and interrupted writers left
    intermediate    (on request) refine and pack of published batches; `why` then ends at dedup
"""

import json
from collections.abc import Iterator
from typing import NamedTuple

from pipeline.batches.batch import batches, is_series
from pipeline.engine.lease import is_held, lease
from pipeline.run.phases import STAGES
from pipeline.run.state import read_state
from stages.storage.catalog import read_catalog
from stages.storage.files import exists, names_in, open_fs, read_bytes, remove_tree


class Garbage(NamedTuple):
    """A folder or file that can be removed, its size, and the Unix time of its newest file (None:
    unknown).
    """

    uri: str
    reason: str
    bytes: int
    modified: float | None


def find(
    root: str, *, intermediate: bool = False, older_than: float | None = None
) -> list[Garbage]:
    """What can be removed, in a safe order: after a crash half-way the run goes on.

    `older_than` is a Unix time: newer files, and those of unknown age, stay. FileNotFoundError if
    there is no run.
    """
    if is_series(root):
        # a batch that was cut off before its run began has no run.json, and nothing else
        begun = [b for b in batches(root) if exists(f"{b.directory}/run.json")]
        garbage = [g for b in begun for g in (*_superseded(b.directory), *_scratch(b.directory))]
        if intermediate:
            garbage += [g for b in begun if b.done for g in _intermediate(b.directory)]
    else:
        garbage = list(_superseded(root))
    garbage += [*_scratch(root), *_unpublished(root)]
    if older_than is None:
        return garbage
    return [g for g in garbage if g.modified is not None and g.modified < older_than]


def collect(
    root: str, *, intermediate: bool = False, older_than: float | None = None
) -> list[Garbage]:
    """Remove it, and return what was removed. Raises Held while a run or scheduler works there."""
    with lease(root):
        garbage = find(root, intermediate=intermediate, older_than=older_than)
        for item in garbage:
            remove_tree(item.uri)
    return garbage


def _superseded(root: str) -> Iterator[Garbage]:
    keys = {*read_state(root).keys.values(), *_index_keys(root)}
    for stage in STAGES:
        for key in names_in(f"{root}/{stage}"):
            uri = f"{root}/{stage}/{key}"
            if key in keys:
                yield from _interrupted_writes(uri)
            else:
                yield _measure(uri, "superseded")


def _scratch(root: str) -> Iterator[Garbage]:
    for name in names_in(root):
        if ".tmp-" in name or (name.startswith("estimate-") and not is_held(f"{root}/{name}")):
            yield _measure(f"{root}/{name}", "scratch")


def _interrupted_writes(store: str) -> Iterator[Garbage]:
    """Files under the temporary names of writers that were killed."""
    fs, path = open_fs(store)
    for name, info in fs.find(path, detail=True).items():
        if ".tmp-" in name.rpartition("/")[2]:
            uri = store + name.removeprefix(path)
            yield Garbage(uri, "scratch", info["size"] or 0, _modified(info))


def _index_keys(root: str) -> Iterator[str]:
    """Keys of the stores that the published index names: older ones, until a run under another
    configuration has finished.
    """
    if exists(f"{root}/index.json"):
        entry = json.loads(read_bytes(f"{root}/index.json"))
        yield from (entry[name].split("/")[1] for name in ("root", "documents", "keep"))


def _intermediate(root: str) -> Iterator[Garbage]:
    keys = read_state(root).keys.values()
    for stage in ("refine", "pack"):
        for key in names_in(f"{root}/{stage}"):
            if key in keys:
                yield _measure(f"{root}/{stage}/{key}", "intermediate")


def _unpublished(root: str) -> Iterator[Garbage]:
    published = {entry["name"] for entry in read_catalog(root)}
    for name in names_in(f"{root}/generations"):
        if name not in published:
            yield _measure(f"{root}/generations/{name}", "unpublished")


def _measure(uri: str, reason: str) -> Garbage:
    fs, path = open_fs(uri)
    files = list(fs.find(path, detail=True).values()) if fs.isdir(path) else [fs.info(path)]
    times = [time for file in files if (time := _modified(file)) is not None]
    return Garbage(uri, reason, sum(file["size"] or 0 for file in files), max(times, default=None))


def _modified(info: dict[str, object]) -> float | None:
    """Unix time from a file's info: local disks give seconds, object stores a date."""
    value = info.get("mtime") or info.get("LastModified")
    if isinstance(value, int | float):
        return float(value)
    return float(value.timestamp()) if hasattr(value, "timestamp") else None
