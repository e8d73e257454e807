"""Which generations a run replaces, so that trainers read no document twice.

A rerun over the inputs of a published generation supersedes it; batches and other runs add to the
catalog. Inputs are compared, not configurations: they decide whether documents come twice.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from stages.formats.errors import ConfigError
from stages.storage.catalog import MANIFEST, current_entries, generation_uri
from stages.storage.files import names_in, read_many

_BATCHES = "batches/"
_DO = "set another run.directory, or give --new-lineage to publish beside it"


@dataclass(frozen=True)
class Origin:
    """What a generation is made of.

    `run` is the run's directory as the catalog names it: "." for the catalog's own, a path below
    it, or a URI. `inputs` are paths, `listing` a digest of what the configuration names them by.
    """

    run: str
    inputs: frozenset[str]
    listing: str = ""
    new_lineage: bool = False


class Succession(NamedTuple):
    """The generations that a new one supersedes, its lineage ("" begins one), and warnings."""

    supersedes: tuple[str, ...]
    lineage: str
    warnings: tuple[str, ...] = ()


def run_name(root: str, catalog: str) -> str:
    """A run's directory as a catalog names it."""
    return "." if root == catalog else root.removeprefix(f"{catalog}/")


def succession(catalog: str, entries: Sequence[Mapping[str, Any]], origin: Origin) -> Succession:
    """What a generation of this origin supersedes.

    Those whose inputs are all among its own; or else, if files of the same listing are gone, those
    of that listing. ConfigError, unless `origin.new_lineage`, if documents would come twice, or if
    the run's directory has generations of other inputs only.
    """
    newest = [e for e in current_entries(entries) if not _adds(e, origin)]
    inputs = _inputs_by_name(catalog, newest)
    if origin.new_lineage:
        shared = {name: known & origin.inputs for name, known in inputs.items()}
        return Succession((), "", tuple(_twice(n, s) for n, s in shared.items() if s))
    own = [e for e in newest if e["name"] in inputs and e.get("run", ".") == origin.run]
    covered = _covered(inputs, origin.inputs)
    superseded = covered or _of_listing(own, inputs, origin)
    known = frozenset[str]().union(*(inputs[name] for name in superseded))
    for name, others in inputs.items():
        if name not in superseded and (shared_now := (origin.inputs - known) & others):
            raise ConfigError(
                f"{catalog}: {_twice(name, shared_now)}; name all inputs of {name}, {_DO}"
            )
    if own and not superseded:
        raise _other_inputs(catalog, own[-1]["name"], inputs[own[-1]["name"]], origin.inputs)
    lineages = [str(e.get("lineage", e["name"])) for e in newest if e["name"] in superseded]
    gone = tuple(_gone(name, inputs[name] - origin.inputs) for name in superseded if not covered)
    return Succession(tuple(superseded), next(iter(lineages), ""), gone)


def _adds(entry: Mapping[str, Any], origin: Origin) -> bool:
    """Whether both are batches, which take different inputs of a listing: no need to compare."""
    run = entry.get("run", "")
    return run != origin.run and run.startswith(_BATCHES) and origin.run.startswith(_BATCHES)


def _inputs_by_name(
    catalog: str, entries: Sequence[Mapping[str, Any]]
) -> dict[str, frozenset[str]]:
    """Inputs of each generation by its manifest, but of those that were removed since."""
    there = set(names_in(f"{catalog}/generations")) if entries else set()
    names = [e["name"] for e in entries if e["name"] in there]
    manifests = read_many([f"{generation_uri(catalog, name)}/{MANIFEST}" for name in names])
    inputs = [frozenset(json.loads(manifest).get("sources", ())) for manifest in manifests]
    return dict(zip(names, inputs, strict=True))


def _covered(inputs_by_name: Mapping[str, frozenset[str]], inputs: frozenset[str]) -> list[str]:
    """Generations of exactly these inputs; if there is none, of some of them."""
    equal = [name for name, others in inputs_by_name.items() if others == inputs]
    return equal or [name for name, others in inputs_by_name.items() if others and others < inputs]


def _of_listing(
    own: Sequence[Mapping[str, Any]],
    inputs_by_name: Mapping[str, frozenset[str]],
    origin: Origin,
) -> list[str]:
    """Generations of the same listing that share inputs with it."""
    names = [e["name"] for e in own if origin.listing and e.get("listing") == origin.listing]
    return [name for name in names if inputs_by_name[name] & origin.inputs]


def _gone(name: str, gone: frozenset[str]) -> str:
    return (
        f"{len(gone)} inputs of {name} are no longer listed, first: {min(gone)}; the generation "
        "that supersedes it has no documents of them"
    )


def _twice(name: str, shared: frozenset[str]) -> str:
    return (
        f"{len(shared)} inputs of this config are in {name} as well, first: {min(shared)}: "
        "trainers that read both would train on their documents twice"
    )


def _other_inputs(
    catalog: str, name: str, inputs: frozenset[str], ours: frozenset[str]
) -> ConfigError:
    return ConfigError(
        f"{catalog}: {name} has other inputs ({len(inputs)}, first: {min(inputs, default='none')}) "
        f"than this config ({len(ours)}, first: {min(ours, default='none')}); a rerun would "
        f"supersede it: {_DO}"
    )
