"""Kept and dropped pages by host, language, origin and input file."""

import json
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from pipeline.report.sample import Ledger, Sample
from stages.storage.files import exists, read_bytes
from stages.storage.parts import unit_name

LOST = 0.9  # a host or input file that lost more than this share is pointed out
MANY = 5  # ... if it had at least so many pages: a single dropped page says nothing
SHOWN = 12  # rows of a table of groups
_GROUPED = ("host", "language", "charset_source", "crawl_month", "opt_out")


class Group(NamedTuple):
    """Documents with a value in common: kept so far, dropped, and the rule that dropped most."""

    name: str
    kept: int
    dropped: int
    main_rule: str | None = None

    @property
    def total(self) -> int:
        return self.kept + self.dropped

    @property
    def lost(self) -> bool:
        """Whether a group of at least MANY lost over LOST of its documents."""
        return self.total >= MANY and self.dropped > LOST * self.total


class Ranking(NamedTuple):
    """The first groups in some order, and totals of the others."""

    groups: list[Group]
    others: int = 0
    other_pages: int = 0
    other_kept: int = 0

    @classmethod
    def of(cls, groups: Sequence[Group], limit: int) -> "Ranking":
        """The first `limit` of ordered groups."""
        rest = groups[limit:]
        return cls(
            list(groups[:limit]), len(rest), sum(g.total for g in rest), sum(g.kept for g in rest)
        )


# of rules that dropped equally many, the last by name counts
_GROUP_BY = """
CREATE TABLE "by {column}" AS
WITH fates AS (
    SELECT coalesce({column}, '') AS name, fate, count(*) AS n
    FROM pages WHERE {where} GROUP BY ALL)
SELECT name,
    coalesce(sum(n) FILTER (fate IS NULL), 0)::BIGINT AS kept,
    coalesce(sum(n) FILTER (fate IS NOT NULL), 0)::BIGINT AS dropped,
    max_by(fate, (n, fate)) FILTER (fate IS NOT NULL) AS main_rule
FROM fates GROUP BY name"""
_RANKING = """
SELECT *, count(*) OVER () AS groups, sum(kept) OVER ()::BIGINT AS all_kept,
    sum(kept + dropped) OVER ()::BIGINT AS all_pages
FROM "by {column}" WHERE {where} ORDER BY {order}, name LIMIT {limit}"""


def rankings(sample: Sample) -> dict[str, Ranking]:
    """Groups by column, the largest first; hosts also by kept and dropped pages and losses."""
    for column in _GROUPED:
        where = "opt_out IS NOT NULL" if column == "opt_out" else "true"
        sample.connection.execute(_GROUP_BY.format(column=column, where=where)).fetchall()
    lost = f"kept + dropped >= {MANY} AND dropped > (kept + dropped) * {LOST}::DOUBLE"
    return {column: _ranking(sample, column) for column in _GROUPED} | {
        "crawl_month": _ranking(sample, "crawl_month", order="name", limit=1_000_000),
        "host by kept": _ranking(sample, "host", order="kept DESC"),
        "host by dropped": _ranking(sample, "host", where="dropped > 0", order="dropped DESC"),
        "host lost": _ranking(sample, "host", where=lost, limit=2 * SHOWN),
    }


def _ranking(
    sample: Sample,
    column: str,
    *,
    where: str = "true",
    order: str = "kept + dropped DESC",
    limit: int = SHOWN,
) -> Ranking:
    rows = sample.rows(_RANKING.format(column=column, where=where, order=order, limit=limit))
    groups = [Group(r["name"], r["kept"], r["dropped"], r["main_rule"]) for r in rows]
    if not rows:
        return Ranking(groups)
    return Ranking(
        groups,
        rows[0]["groups"] - len(groups),
        rows[0]["all_pages"] - sum(g.total for g in groups),
        rows[0]["all_kept"] - sum(g.kept for g in groups),
    )


def input_files(ledger: Ledger) -> list[Group]:
    """Pages by input file, exact, largest losses first.

    Copies count as lost only once refine has read a file.
    """
    paths = _input_paths(ledger.root)
    refined = {c.unit: c.rows_out for c in ledger.commits["refine"]}
    groups = []
    for commit in ledger.commits["extract"]:
        pages = Counter(
            {r: n for r, n in commit.counts.items() if r not in ("warc.not_response", "kept")}
        )
        kept = refined.get(commit.unit, commit.rows_out)
        after = commit.rows_out - kept
        main = min(pages, key=lambda r: (-pages[r], r)) if pages else None
        if after and (main is None or after > pages[main]):
            main = "dedup, refine"
        name = paths.get(commit.unit, f"input {commit.unit}")
        groups.append(Group(name, kept, pages.total() + after, main))
    return sorted(
        (g for g in groups if g.total), key=lambda g: (g.kept / g.total, -g.total, g.name)
    )


def _input_paths(root: str) -> dict[str, str]:
    uri = f"{root}/inputs.jsonl"
    lines = read_bytes(uri).splitlines() if exists(uri) else []
    return {unit_name(record["ordinal"]): record["path"] for record in map(json.loads, lines)}
