"""Kept and dropped pages by host, language, origin and input file."""

from typing import NamedTuple

import pyarrow as pa

from pipeline.report.sample import Ledger, Sample
from pipeline.run.inputs import read_list
from pipeline.run.results import commits_table
from stages.read.fetch import printable

LOST = 0.9  # a host or input file that lost more than this share is pointed out
MANY = 5  # ... if it had at least so many pages: a single dropped page says nothing
SHOWN = 12  # rows of a table of groups
_GROUPED = ("host", "language", "charset_source", "crawl_month", "opt_out")


class Group(NamedTuple):
    """Documents with a value in common: kept so far, dropped, and the rule that dropped most.

    `lost`: whether it had at least MANY and lost over LOST of them.
    """

    name: str
    kept: int
    dropped: int
    total: int
    main_rule: str | None
    lost: bool


class Ranking(NamedTuple):
    """The first groups in some order, and totals of the others."""

    groups: list[Group]
    others: int
    other_pages: int
    other_kept: int


class LicenseCount(NamedTuple):
    """Documents kept so far that declare a license ("" for none), and their characters."""

    name: str
    documents: int
    characters: int


LOST_GROUP = f"kept + dropped >= {MANY} AND dropped > (kept + dropped) * {LOST}::DOUBLE"
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
# exact; copies count as dropped only once refine has read a file
_BY_INPUT = """
CREATE TABLE "by input" AS
WITH extracted AS (
    SELECT *, coalesce(path, 'input ' || unit) AS name FROM commits LEFT JOIN inputs USING (unit)
    WHERE phase = 'extract'),
refined AS (SELECT unit, rows_out FROM commits WHERE phase = 'refine'),
units AS (
    SELECT name, extracted.rows_out AS passed, coalesce(refined.rows_out, passed) AS kept
    FROM extracted LEFT JOIN refined USING (unit)),
fates AS (
    SELECT name, unnest(map_keys(counts)) AS fate, unnest(map_values(counts)) AS n FROM extracted
    UNION ALL
    SELECT name, 'dedup, refine', passed - kept FROM units),
sums AS (SELECT name, fate, sum(n)::BIGINT AS n FROM fates GROUP BY ALL),
drops AS (
    SELECT name, sum(n) AS dropped, min_by(fate, (-n, fate = 'dedup, refine', fate)) AS main_rule
    FROM sums WHERE n > 0 AND fate NOT IN ('kept', 'warc.not_response') GROUP BY name),
keeps AS (SELECT name, sum(kept)::BIGINT AS kept FROM units GROUP BY name)
SELECT name, kept, coalesce(dropped, 0)::BIGINT AS dropped, main_rule
FROM keeps LEFT JOIN drops USING (name)
WHERE kept + coalesce(dropped, 0) > 0"""
_RANKING = """
SELECT *, kept + dropped AS total, {lost} AS lost, count(*) OVER () AS groups,
    sum(kept) OVER ()::BIGINT AS all_kept, sum(total) OVER ()::BIGINT AS all_pages
FROM "by {column}" WHERE {where} ORDER BY {order}, name LIMIT {limit}"""


_LICENSES = """
SELECT coalesce(license, '') AS name, count(*) AS documents, sum(num_chars)::BIGINT AS characters
FROM pages WHERE fate IS NULL GROUP BY ALL ORDER BY documents DESC, name LIMIT {limit}"""


def licenses(sample: Sample) -> list[LicenseCount]:
    """The most frequent licenses of kept documents; [] if none declares any."""
    rows = sample.rows(_LICENSES.format(limit=2 * SHOWN))
    counts = [LicenseCount(**row) for row in rows]
    return counts if any(count.name for count in counts) else []


def rankings(ledger: Ledger, sample: Sample) -> dict[str, Ranking]:
    """Groups by column, the largest first; hosts also by kept and dropped pages and losses.

    Input files are ordered by the share that they lost.
    """
    for column in _GROUPED:
        where = "opt_out IS NOT NULL" if column == "opt_out" else "true"
        sample.connection.execute(_GROUP_BY.format(column=column, where=where)).fetchall()
    inputs = [{"unit": i.unit, "path": printable(i.path)} for i in read_list(ledger.root)]
    schema = pa.schema([("unit", pa.string()), ("path", pa.string())])
    sample.connection.from_arrow(pa.Table.from_pylist(inputs, schema)).create("inputs")
    sample.connection.from_arrow(commits_table(ledger.commits)).create("commits")
    sample.connection.execute(_BY_INPUT).fetchall()
    return {column: _ranking(sample, column) for column in _GROUPED} | {
        "crawl_month": _ranking(sample, "crawl_month", order="name", limit=1_000_000),
        "host by kept": _ranking(sample, "host", order="kept DESC"),
        "host by dropped": _ranking(sample, "host", where="dropped > 0", order="dropped DESC"),
        "host lost": _ranking(sample, "host", where=LOST_GROUP, limit=2 * SHOWN),
        "input": _ranking(sample, "input", order="kept / (kept + dropped), kept + dropped DESC"),
    }


def _ranking(
    sample: Sample,
    column: str,
    *,
    where: str = "true",
    order: str = "kept + dropped DESC",
    limit: int = SHOWN,
) -> Ranking:
    sql = _RANKING.format(column=column, where=where, order=order, limit=limit, lost=LOST_GROUP)
    rows = sample.rows(sql)
    groups = [Group(*(row[name] for name in Group._fields)) for row in rows]
    first = rows[0] if rows else {"groups": 0, "all_pages": 0, "all_kept": 0}
    return Ranking(
        groups,
        first["groups"] - len(groups),
        first["all_pages"] - sum(g.total for g in groups),
        first["all_kept"] - sum(g.kept for g in groups),
    )
