"""The cost of one Common Crawl snapshot, by arithmetic from measured figures (benchmarks/costs.json) and
stated inputs (benchmarks/cost_inputs.toml). docs/cost.md shows it; benchmarks/simulate.py spreads it over
units.

A step costs per byte of HTML, per page, per document, per character or per token; whatever it was
measured on, a snapshot has its own number of these.
"""

import json
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).parent
# of the steps of extract (benchmarks.extraction_steps): what each pays for
OF_ALL_HTML = ("read", "decode", "walk", "gate")
OF_EXTRACTED_HTML = ("metadata", "features", "trees", "selection", "render")
OF_EXTRACTED_PAGES = ("language", "heuristics")


class Inputs(NamedTuple):
    """Values of cost_inputs.toml by name."""

    snapshot: dict[str, float]
    prices: dict[str, float]

    def scaled(self, share: float) -> "Inputs":
        """A part of the snapshot."""
        sizes = {name: share * self.snapshot[name] for name in ("files", "pages", "tokens")}
        return self._replace(snapshot=self.snapshot | sizes)

    @property
    def documents(self) -> float:
        """Documents of a snapshot after dedup."""
        return self.snapshot["tokens"] / self.snapshot["tokens_per_document"]

    @property
    def candidates(self) -> float:
        """Documents of a snapshot before dedup."""
        return self.documents / self.snapshot["kept_by_dedup"]

    @property
    def characters(self) -> float:
        """Characters of the documents after dedup."""
        return self.snapshot["tokens"] * self.snapshot["characters_per_token"]

    @property
    def core_hour(self) -> dict[str, float]:
        """$ per hour of a core like the measured one, on demand and spot."""
        cores = self.prices["node_processors"] * self.prices["processor_speed"]
        return {kind: self.prices[f"node_{kind}"] / cores for kind in ("on_demand", "spot")}


class Step(NamedTuple):
    """A step of a stage: core-seconds per item, and a snapshot's items."""

    stage: str
    name: str
    seconds: float
    unit: str
    items: float

    @property
    def core_hours(self) -> float:
        """Of the whole snapshot."""
        return self.seconds * self.items / 3600


def figures() -> dict[str, Any]:
    """The measured figures."""
    measured: dict[str, Any] = json.loads((FOLDER / "costs.json").read_text())
    return measured


def raw_inputs() -> dict[str, dict[str, dict[str, Any]]]:
    """The inputs with units and sources."""
    return tomllib.loads((FOLDER / "cost_inputs.toml").read_text())


def inputs() -> Inputs:
    """The inputs, values alone."""
    return Inputs(
        **{
            section: {name: entry["value"] for name, entry in entries.items()}
            for section, entries in raw_inputs().items()
        }
    )


def reading_floor(measured: dict[str, Any], given: Inputs) -> float:
    """Core-hours of gunzip and framing alone."""
    of = measured["reading"]
    per_byte = of["seconds"] / of["payload_bytes"]
    return per_byte * _html(given) / 3600


def snapshot_steps(measured: dict[str, Any], given: Inputs, recipe: str = "web") -> list[Step]:
    """All steps of a recipe (`benchmarks.costs.RECIPES`), in order."""
    of = measured["recipes"][recipe]
    return [
        *_extract(measured, given, recipe),
        Step("dedup", "all phases", _dedup(measured), "document", given.candidates),
        Step(
            "refine",
            "personal data" if recipe != "web_models" else "personal data, perplexity, quality",
            of["seconds"]["refine"] / _refined_characters(of),
            "character",
            given.characters,
        ),
        Step(
            "pack",
            "tokens, rows",
            of["seconds"]["pack"] / of["tokens"],
            "token",
            given.snapshot["tokens"],
        ),
    ]


class StoredBytes(NamedTuple):
    """Bytes that a run stores, for a snapshot's pages and texts."""

    documents_per_page: float
    corpus_per_document: float
    shards_per_token: float


def stored_bytes(measured: dict[str, Any], given: Inputs) -> StoredBytes:
    """By the recipe web: texts by their characters, rows without text by the page."""
    recipes = measured["recipes"]
    of = recipes["web"]
    per_character = of["bytes"]["corpus"] / _refined_characters(of)
    rows = max(0.0, of["bytes"]["documents"] - of["characters"] * per_character)
    per_document = given.characters / given.documents * per_character
    return StoredBytes(
        rows / recipes["pages"] + per_document * given.candidates / given.snapshot["pages"],
        per_document,
        of["bytes"]["shards"] / of["tokens"],
    )


def names_step(measured: dict[str, Any], given: Inputs) -> Step:
    """Entity recognition, which few runs have."""
    of = measured["names"]
    return Step("refine", "names", of["seconds"] / of["characters"], "character", given.characters)


def _extract(measured: dict[str, Any], given: Inputs, recipe: str) -> list[Step]:
    """The steps of extract, each with its part of what the stage takes beyond their sum: the child
    process, batches, garbage collection.
    """
    bare, web = measured["steps"]["seconds"], measured["recipes"]["web"]
    beyond = web["seconds"]["extract"] / sum(bare.values())
    pages, payload = measured["recipes"]["pages"], measured["recipes"]["payload_bytes"]
    extracted_payload = payload * web["pages_extracted"] / pages
    html, share = _html(given), given.snapshot["extracted_share"]
    counts = {
        **{name: ("byte of HTML", payload, html) for name in OF_ALL_HTML},
        **{name: ("byte of HTML", extracted_payload, html * share) for name in OF_EXTRACTED_HTML},
        **{
            name: ("extracted page", web["pages_extracted"], given.snapshot["pages"] * share)
            for name in OF_EXTRACTED_PAGES
        },
        "signatures": ("document", web["documents"], given.candidates),
        "write": ("page", pages, given.snapshot["pages"]),
    }
    steps = [
        Step("extract", name, seconds * beyond / counts[name][1], counts[name][0], counts[name][2])
        for name, seconds in bare.items()
    ]
    if recipe != "trafilatura":
        return steps
    # blocks are cut for the gate by every engine; trafilatura takes the place of the other steps
    other = sum(bare[name] for name in bare if name not in OF_EXTRACTED_HTML[1:]) * beyond
    of = measured["recipes"][recipe]
    seconds = (of["seconds"]["extract"] - other) / (payload * of["pages_extracted"] / pages)
    kept = [step for step in steps if step.name not in OF_EXTRACTED_HTML[1:]]
    return [*kept, Step("extract", "trafilatura", seconds, "byte of HTML", html * share)]


def _html(given: Inputs) -> float:
    return given.snapshot["pages"] * given.snapshot["payload_bytes_per_page"]


def _dedup(measured: dict[str, Any]) -> float:
    of = measured["dedup"]
    seconds: float = sum(phase["seconds"] for phase in of["phases"].values())
    return seconds / of["documents"]


def _refined_characters(of: dict[str, Any]) -> float:
    per_document = of["characters"] / of["documents"]
    return float(per_document * of["documents_refined"])
