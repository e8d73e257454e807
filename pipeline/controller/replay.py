"""Decide logged batches again, to find where this version decides differently."""

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple

from pipeline.controller.decide import decide
from pipeline.controller.records import Decision, Record, from_json


class Mismatch(NamedTuple):
    """A line, counted from 1, that cannot be read or that this version decides differently."""

    line: int
    what: str


def replay(lines: Iterable[bytes]) -> list[Mismatch]:
    """Decide each Record again and compare all figures; the wording of reasons may differ."""
    mismatches = []
    names = [field.name for field in dataclasses.fields(Decision) if field.name != "reasons"]
    for number, line in enumerate(lines, 1):
        try:
            record = from_json(Record, line)
            again = decide(record.inputs, record.policy)
        # arithmetic fails on numbers that only a broken line has
        except (ValueError, ArithmeticError) as error:
            what = f"cannot be read: {' '.join(str(error).split())[:200]}"
            mismatches.append(Mismatch(number, what))
            continue
        for name in names:
            before, now = getattr(record.decision, name), getattr(again, name)
            if before != now:
                mismatches.append(Mismatch(number, f"{name} was {before!r}, is {now!r}"))
    return mismatches
