"""The peers of the whole job, each in an environment of its own (see README.md): what they cost."""

import gzip
import json
import os
from pathlib import Path
from typing import NamedTuple

from benchmarks.watch import Cost, cost_of

# two tasks run on two cores, beside the language model's actor: Curator's fastest settings there
CURATOR_TUNED = {"TUNED": "1", "LID_CPUS": "0.1"}


class Side(NamedTuple):
    """What a program took for a set of pages, and the URLs of the documents that it wrote."""

    name: str
    cost: Cost
    urls: list[str]


def datatrove(python: str, script: str, pages: Path, out: Path, *, lid: Path) -> Side:
    """datatrove's FineWeb recipe: extraction, heuristics, MinHash dedup, PII; two workers."""
    command = [python, script, str(pages), str(out), str(lid), "2"]
    cost = _cost_of_peer(command, out.with_suffix(".log"), {})
    urls = []
    for file in (out / "final").glob("*.gz"):
        with gzip.open(file, "rt") as lines:
            urls += [json.loads(line)["metadata"]["url"] for line in lines]
    return Side("datatrove", cost, urls)


def curator(python: str, script: str, engine: str, pages: Path, out: Path, *, lid: Path) -> Side:
    """NeMo Curator's extraction, language and heuristics: no dedup, so copies are among the URLs."""
    command = [python, script, str(pages), str(out), str(lid), engine]
    cost = _cost_of_peer(command, out.with_suffix(".log"), CURATOR_TUNED)
    urls = []
    for file in out.glob("*.jsonl"):
        with open(file) as lines:
            urls += [json.loads(line)["url"] for line in lines]
    return Side(f"NeMo Curator with {engine}", cost, urls)


def _cost_of_peer(command: list[str], log: Path, environment: dict[str, str]) -> Cost:
    # our modules are none of theirs
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return cost_of(command, env=inherited | environment, log=log)
