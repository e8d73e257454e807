"""Render docs/cost.md from benchmarks/costs.json, simulation.json and cost_inputs.toml.

python -m benchmarks.cost_page        also: make cost
"""

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from benchmarks.snapshot import (
    Inputs,
    figures,
    inputs,
    names_step,
    raw_inputs,
    reading_floor,
    snapshot_steps,
    stored_bytes,
)

FOLDER = Path(__file__).parent
PAGE = FOLDER.parent / "docs" / "cost.md"
TITLES = {
    "web": "`configs/web.toml`: engine blocks, FineWeb's rules, dedup, personal data, tokens",
    "web_models": "the same, with perplexity and a quality model",
    "trafilatura": "`configs/commoncrawl.toml`: trafilatura",
}
# the case of simulation.json that the page shows
CUT, CLUSTER = "ranges of 512 MiB", "1,000 nodes"


def main() -> None:
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(render())


def render() -> str:
    """The page."""
    measured, given = figures(), inputs()
    simulated = json.loads((FOLDER / "simulation.json").read_text())
    of_cut = simulated["cases"][CUT]["clusters"]
    steps = snapshot_steps(measured, given)
    total = sum(step.core_hours for step in steps)
    work = of_cut[CLUSTER]["core_hours"]
    environment = Environment(
        loader=FileSystemLoader(FOLDER), undefined=StrictUndefined, keep_trailing_newline=True
    )
    environment.filters["n"] = number
    return environment.get_template("cost.md.j2").render(
        n=number,
        big=big,
        duration=duration,
        s=given.snapshot,
        p=given.prices,
        spot=given.core_hour["spot"],
        documents=given.documents,
        raw=raw_inputs(),
        recipes=measured["recipes"],
        web=measured["recipes"]["web"],
        reading=measured["reading"],
        table=[recipe(name, measured, given) for name in TITLES],
        steps=steps,
        total=total,
        beyond=measured["recipes"]["web"]["seconds"]["extract"]
        / sum(measured["steps"]["seconds"].values()),
        names=names_step(measured, given),
        floor_bytes=reading_floor(measured, given),
        floor_gzip=measured["reading"]["seconds"]
        / measured["reading"]["gzip_bytes"]
        * given.snapshot["files"]
        * given.snapshot["gzip_bytes_per_file"]
        / 3600,
        clusters=of_cut,
        cluster=of_cut[CLUSTER],
        overhead=work["paid"] / total,
        requests=of_cut[CLUSTER]["requests"],
        stored=stored(measured, given) / 1e9,
        sensitivity=sensitivity(measured, given),
    )


def recipe(name: str, measured: dict[str, Any], given: Inputs) -> dict[str, Any]:
    """A row of the first table."""
    hours = sum(step.core_hours for step in snapshot_steps(measured, given, name))
    price = given.core_hour
    spot = hours * price["spot"]
    return {
        "title": TITLES[name],
        "hours": hours,
        "on_demand": hours * price["on_demand"],
        "spot": spot,
        "trillion": spot / given.snapshot["tokens"] * 1e12,
    }


def sensitivity(measured: dict[str, Any], given: Inputs) -> list[dict[str, Any]]:
    """What the recipe costs when one input changes."""
    changes = [
        ("snapshot", "extracted_share", 0.3),
        ("snapshot", "extracted_share", 1.0),
        ("snapshot", "payload_bytes_per_page", 100_000),
        ("snapshot", "payload_bytes_per_page", 200_000),
        ("snapshot", "tokens", 300e9),
        ("prices", "processor_speed", 0.6),
        ("prices", "node_spot", given.prices["node_on_demand"]),
    ]
    base, rows = recipe("web", measured, given)["spot"], []
    for section, name, value in changes:
        old = getattr(given, section)
        changed = given._replace(**{section: old | {name: value}})
        dollars = recipe("web", measured, changed)["spot"]
        rows.append(
            {
                "name": name,
                "old": big(old[name]),
                "new": big(value),
                "dollars": dollars,
                "change": 100 * (dollars / base - 1),
            }
        )
    return rows


def stored(measured: dict[str, Any], given: Inputs) -> float:
    """Bytes of documents, corpus and shards of a snapshot."""
    each = stored_bytes(measured, given)
    return (
        each.documents_per_page * given.snapshot["pages"]
        + each.corpus_per_document * given.documents
        + each.shards_per_token * given.snapshot["tokens"]
    )


def number(value: float) -> str:
    """Three significant digits at least, and no more than whole numbers have."""
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:,.3g}"


def big(value: float) -> str:
    """As `number`, from a million on in millions and more."""
    for limit, word in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if abs(value) >= limit:
            return f"{number(value / limit)} {word}"
    return f"{value:g}" if abs(value) < 1 else number(value)


def duration(seconds: float) -> str:
    """Seconds in the unit that fits."""
    for limit, word in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= limit:
            return f"{seconds / limit:.3g} {word}"
    return f"{seconds / 1e-9:.3g} ns"


if __name__ == "__main__":
    main()
