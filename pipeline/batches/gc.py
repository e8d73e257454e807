"""What a run directory or series holds that nothing refers to any more, and its removal.

Never touched: generations that the catalog lists, whoever reads them; the stores of the current
keys; what later batches match against (documents, keep table and index). Removed are, by reason:

    superseded      stores of keys that another configuration had; a return to it would do their work again
    unpublished     folders of generations that the catalog does not list: a crash before its line
    scratch         what estimates and cut-off writers have left
    intermediate    (only if asked for) refine and pack of published batches; `why` then ends at dedup for their documents
"""

import json
from collections.abc import Iterator
from typing import NamedTuple

from pipeline.batches.batch import batches, is_series
from pipeline.engine.lease import is_held, lease
from pipeline.run.execute import STAGES
from pipeline.run.state import read_state
from stages.storage.catalog import read_catalog
from stages.storage.files import exists, names_in, open_fs, read_bytes, remove_tree

_MATCHED_AGAINST = ("extract", "dedup")


class Garbage(NamedTuple):
    """A folder or file that can go: where it lies, why, its bytes, and the Unix time of its newest
    part (None: unknown).
    """

    uri: str
    reason: str
    bytes: int
    modified: float | None


def find(root: str, *, intermediate: bool = False) -> list[Garbage]:
    """What can go, in the order in which it may: a crash half-way leaves a run that goes on.

    FileNotFoundError for no run.
    """
    if not is_series(root):
        return [*_of_run(root), *_scratch(root), *_unpublished(root)]
    # a batch that was cut off before its run began has no run.json, and nothing else
    begun = [batch for batch in batches(root) if exists(f"{batch.directory}/run.json")]
    found = [
        item for batch in begun for item in (*_of_run(batch.directory), *_scratch(batch.directory))
    ]
    if intermediate:
        found += [item for batch in begun if batch.done for item in _intermediate(batch.directory)]
    return [*found, *_scratch(root), *_unpublished(root)]


def collect(
    root: str, *, intermediate: bool = False, older_than: float | None = None
) -> list[Garbage]:
    """Remove it, and return what was removed. Held when a run or scheduler is at work there.

    `older_than` is a Unix time: what is newer, or of unknown age, stays.
    """
    with lease(root):
        gone = []
        for item in find(root, intermediate=intermediate):
            if older_than is None or (item.modified is not None and item.modified < older_than):
                remove_tree(item.uri)
                gone.append(item)
        return gone


def _of_run(root: str) -> Iterator[Garbage]:
    keys = {*read_state(root)["keys"].values(), *_matched_against(root)}
    for stage in STAGES:
        for key in names_in(f"{root}/{stage}"):
            if key not in keys:
                yield _weighed(f"{root}/{stage}/{key}", "superseded")
            else:
                yield from _cut_off(f"{root}/{stage}/{key}")


def _scratch(root: str) -> Iterator[Garbage]:
    for name in names_in(root):
        if ".tmp-" in name or (name.startswith("estimate-") and not is_held(f"{root}/{name}")):
            yield _weighed(f"{root}/{name}", "scratch")


def _cut_off(store: str) -> Iterator[Garbage]:
    """Files under the temporary names of writers that were killed."""
    fs, path = open_fs(store)
    for name, info in fs.find(path, detail=True).items():
        if ".tmp-" in name.rpartition("/")[2]:
            yield Garbage(
                store + name.removeprefix(path), "scratch", info["size"] or 0, _modified(info)
            )


def _matched_against(root: str) -> Iterator[str]:
    """Keys of the stores that the published index names: older ones, while a run under another
    configuration is not done.
    """
    if exists(f"{root}/index.json"):
        entry = json.loads(read_bytes(f"{root}/index.json"))
        yield from (entry[name].split("/")[1] for name in ("root", "documents", "keep"))


def _intermediate(root: str) -> Iterator[Garbage]:
    keys = set(read_state(root)["keys"].values())
    for stage in STAGES:
        for key in names_in(f"{root}/{stage}"):
            if stage not in _MATCHED_AGAINST and key in keys:
                yield _weighed(f"{root}/{stage}/{key}", "intermediate")


def _unpublished(root: str) -> Iterator[Garbage]:
    listed = {entry["name"] for entry in read_catalog(root)}
    for name in names_in(f"{root}/generations") if exists(f"{root}/generations") else ():
        if name not in listed:
            yield _weighed(f"{root}/generations/{name}", "unpublished")


def _weighed(uri: str, reason: str) -> Garbage:
    fs, path = open_fs(uri)
    files = fs.find(path, detail=True).values() if fs.isdir(path) else [fs.info(path)]
    times = [found for file in files if (found := _modified(file)) is not None]
    return Garbage(uri, reason, sum(file["size"] or 0 for file in files), max(times, default=None))


def _modified(info: dict[str, object]) -> float | None:
    """Local disks tell seconds, object stores a date."""
    value = info.get("mtime") or info.get("LastModified")
    if isinstance(value, int | float):
        return float(value)
    return float(value.timestamp()) if hasattr(value, "timestamp") else None
