"""`gristmill ablate`: what a run would have kept under other bounds, from the scores it stored.

Nothing is extracted or measured again, and dedup's choices stay: what it dropped stays dropped, and
what it kept is judged again. Documents that extract rejected were never seen by dedup and refine:
those that other bounds would let through are counted separately. Texts stay as the filters that
edit them left them: dropping C4 brings none of its lines back.

Of a large run, only a sample of the parts is read, spread evenly (pipeline.report.sample); all
counts are of these parts.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from filters import derived, rules, settings
from filters.suggest import did_you_mean
from pipeline.config.digests import IRRELEVANT_KEYS, file_digests
from pipeline.config.sections import Config, section_of
from pipeline.config.show import changed, show, to_toml
from pipeline.report.sample import Ledger, read_ledger, spread
from pipeline.run import query
from pipeline.run.publish import published_to
from pipeline.run.query import quoted
from stages.formats.document import NamedFilter, score_columns
from stages.formats.errors import ConfigError
from stages.storage.catalog import read_catalog

if TYPE_CHECKING:
    import duckdb

HOSTS = 10


@dataclass(frozen=True)
class Outcome:
    """What one configuration keeps, and its losses by the first rule that each document breaks.

    `tokens` are characters times `tokens_per_char`. `unmeasured` are documents that the run
    rejected in extract and this configuration would pass to dedup, or may: they include pages that
    the gate rejected by language, if this configuration allows other languages.
    """

    documents: int
    chars: int
    tokens: int | None
    losses: dict[str, int]
    unmeasured: int


@dataclass(frozen=True)
class Host:
    """A host of which the two configurations keep different numbers of documents."""

    host: str
    before: int
    after: int


@dataclass(frozen=True)
class Ablation:
    """Two configurations over the same scores.

    `jaccard` is both / (both + only_before + only_after), 1 for two empty sets. `tokens_per_char`
    is measured on the run's shards, None if there are none. `parts` are those that were read, and
    all.
    """

    before: Outcome
    after: Outcome
    both: int
    only_before: int
    only_after: int
    jaccard: float
    hosts: list[Host]
    tokens_per_char: float | None
    parts: tuple[int, int]


def switched_off(config: Config, dropped: Sequence[str]) -> Iterator[str]:
    """Overrides without the bounds of filters ("c4") or of single rules ("c4.sentence_count").

    ConfigError for names that the configuration does not have.
    """
    names = {*config.extract.filters, *config.refine.filters}
    known = {"language": config.language, "pii": config.pii}
    known |= {name: filter for name, filter in config.filters.items() if name in names}
    all_rules = {name: [f"{name}.{rule}" for rule in rules(known[name])] for name in known}
    choices = all_rules | {rule: [rule] for of_filter in all_rules.values() for rule in of_filter}
    for name in dropped:
        if name not in choices:
            hint = did_you_mean(name, choices)
            raise ConfigError(f"--drop {name}: this config has no such filter or rule{hint}")
        for rule in choices[name]:
            yield f"{rule}='off'"
            for language in config.per_language.get(section_of(rule), {}):
                yield f"per_language.{language}.{rule}='off'"


def ablate(before: Config, after: Config) -> Ablation:
    """Judge the scores that the run of `before` stored by both configurations.

    FileNotFoundError if there is no run, ValueError if it lacks scores that a configuration needs.
    """
    ledger = read_ledger(before.run.directory)
    for config in (before, after):
        require_measured(config, ledger)
    refined = {c.unit for c in ledger.commits["refine"]}
    extracted = [c for c in ledger.commits["extract"] if c.unit in refined]
    if not extracted:
        raise ValueError(
            f"{ledger.root}: stage refine has done no unit, so there are no scores; run it first"
        )
    chosen = [c.unit for c in spread(extracted, rows=lambda c: sum(c.counts.values()))]
    parts = {
        kind: [ledger.store(stage).uri(kind, f"{unit}.parquet") for unit in chosen]
        for stage, kind in (("extract", "documents"), ("refine", "corpus"), ("refine", "rejected"))
    }
    ratio = _tokens_per_char(ledger)
    with query.connect(parts, {}) as connection:
        connection.execute(_judged(connection, before, after)).fetchall()
        outcomes: dict[str, Any] = {
            side: _outcome(connection, side, ratio, _allows_more(config, ledger))
            for side, config in (("before", before), ("after", after))
        }
        both, only_before, only_after, jaccard = _rows(connection, _OVERLAP)[0]
        hosts = [Host(*row) for row in _rows(connection, _CHANGED_HOSTS)]
    return Ablation(
        **outcomes,
        both=both,
        only_before=only_before,
        only_after=only_after,
        jaccard=jaccard,
        hosts=hosts,
        tokens_per_char=ratio,
        parts=(len(chosen), len(extracted)),
    )


def _tokens_per_char(ledger: Ledger) -> float | None:
    name = ledger.state.generation
    chars = sum(c.result.chars_out for c in ledger.commits["refine"])
    catalog = read_catalog(published_to(ledger.root, ledger.state))
    tokens = next((entry["tokens"] for entry in catalog if entry["name"] == name), None)
    return tokens / chars if tokens is not None and chars else None


def _allows_more(config: Config, ledger: Ledger) -> bool:
    """Whether pages that the gate rejected by language may pass."""
    measured, allowed = ledger.setting("language.allowed", []), config.language.allowed
    return bool(measured) and not (allowed and {*measured}.issuperset(allowed))


# --- judging --------------------------------------------------------------------------------------

# the measured documents of extract, each with its row of refine if it has one; documents of which
# no filter left any text are not judged again
_JUDGED = """
    CREATE TEMP TABLE judged AS
    WITH refined AS (
        SELECT * FROM (SELECT * FROM corpus UNION ALL BY NAME SELECT * FROM rejected)
        WHERE rejected_by IS NULL OR rejected_by NOT IN ('dedup.lines', 'refine.empty_text')
    )
    SELECT coalesce(d.host, '') AS host, r.num_chars AS chars, {before} AS before, {after} AS after
    FROM documents AS d LEFT JOIN refined AS r USING (doc_id)
    WHERE d.num_chars IS NOT NULL"""
# what became of a document: the rule that it breaks, 'kept', or 'unmeasured'
_LOSS = """
    CASE {extract}
    WHEN d.rejected_by IS NOT NULL THEN 'unmeasured' WHEN r.doc_id IS NULL THEN 'dedup'
    {refine} ELSE 'kept' END"""
_OVERLAP = """
    SELECT count(*) FILTER (before = 'kept' AND after = 'kept') AS "both",
        count(*) FILTER (before = 'kept' AND after <> 'kept') AS only_before,
        count(*) FILTER (before <> 'kept' AND after = 'kept') AS only_after,
        coalesce("both" / nullif("both" + only_before + only_after, 0), 1.0) AS jaccard
    FROM judged"""
_CHANGED_HOSTS = f"""
    SELECT host, count(*) FILTER (before = 'kept') AS b, count(*) FILTER (after = 'kept') AS a
    FROM judged GROUP BY host HAVING a <> b ORDER BY abs(a - b) DESC, host LIMIT {HOSTS}"""
_GATED = "SELECT count(*) FROM documents WHERE rejected_by = 'gate.language_probability'"


def _judged(connection: "duckdb.DuckDBPyConnection", before: Config, after: Config) -> str:
    columns = {
        table: {row[0] for row in _rows(connection, f"DESCRIBE {view}")}
        for table, view in (("d", "documents"), ("r", "corpus"))
    }

    def loss(config: Config) -> str:
        allowed = config.language.allowed if config.language.identify else ()
        languages = ", ".join(map(quoted, allowed))
        extract = [f"WHEN coalesce(d.language, '') NOT IN ({languages}) THEN 'language.allowed'"]
        chain = [config.named("language"), *config.chain(config.extract.filters)]
        scrub = [NamedFilter("pii", config.pii)] if config.refine.scrub_pii else []
        refine = [*config.chain(config.refine.filters), *scrub]
        return _LOSS.format(
            extract=" ".join([*(extract if allowed else ()), *_broken("d", chain, columns["d"])]),
            refine=" ".join(_broken("r", refine, columns["r"])),
        )

    return _JUDGED.format(before=loss(before), after=loss(after))


def _broken(table: str, chain: Sequence[NamedFilter], columns: set[str]) -> Iterator[str]:
    """A WHEN clause for each rule of a chain of filters, in order."""
    for named in chain:
        for rule in score_columns([named]):
            column = rule.replace("language.", "language_") if named.name == "language" else rule
            if column not in columns:
                continue
            value = f"{table}.{quoted(column, chr(34))}::DOUBLE"
            # null is not measured or not scrubbed, and passes; of other filters it is NaN: rejected
            passes = "TRUE" if named.name in ("pii", "language") else "FALSE"
            tests = {
                language: _in_bound(value, rules(filter)[rule.partition(".")[2]], passes)
                for language, filter in named.all()
            }
            all_languages = tests.pop("")
            by_language = "".join(f"WHEN {quoted(n)} THEN {test} " for n, test in tests.items())
            if by_language:
                all_languages = f"CASE {table}.language {by_language}ELSE {all_languages} END"
            yield f"WHEN NOT ({all_languages}) THEN {quoted(rule)}"


def _in_bound(value: str, bound: tuple[float, float] | None, null: str) -> str:
    if bound is None:
        return "TRUE"
    # NaN is larger than all numbers
    low, high = (f"'{limit!r}'::DOUBLE" for limit in map(float, bound))
    return f"coalesce({value} >= {low} AND {value} <= {high} AND NOT isnan({value}), {null})"


def _outcome(
    connection: "duckdb.DuckDBPyConnection", side: str, ratio: float | None, allows_more: bool
) -> Outcome:
    sql = f"SELECT {side}, count(*), coalesce(sum(chars), 0)::BIGINT FROM judged GROUP BY ALL"
    counts = {loss: (count, chars) for loss, count, chars in _rows(connection, sql)}
    documents, chars = counts.pop("kept", (0, 0))
    unmeasured, _ = counts.pop("unmeasured", (0, 0))
    if allows_more:
        unmeasured += _rows(connection, _GATED)[0][0]
    tokens = None if ratio is None else round(chars * ratio)
    losses = {loss: count for loss, (count, _) in counts.items()}
    return Outcome(documents, chars, tokens, losses, unmeasured)


def _rows(connection: "duckdb.DuckDBPyConnection", sql: str) -> list[tuple[Any, ...]]:
    return connection.execute(sql).fetchall()


def comparison(ablation: Ablation) -> Iterator[tuple[str, int | None, int | None]]:
    """The differences, line by line: (label, before, after)."""
    before, after = ablation.before, ablation.after
    yield "documents", before.documents, after.documents
    yield "characters", before.chars, after.chars
    yield "tokens (estimated)", before.tokens, after.tokens
    pairs = {
        rule: (before.losses.get(rule, 0), after.losses.get(rule, 0))
        for rule in {*before.losses, *after.losses}
    }
    for rule, pair in sorted(pairs.items(), key=lambda item: (-max(item[1]), item[0])):
        yield f"lost to {rule}", *pair
    yield "past extract, never measured", before.unmeasured, after.unmeasured


# --- what a run has measured ----------------------------------------------------------------------

# besides bounds, these sections and these keys of others change no document
_FREE_SECTIONS = {"run", "fetch", "pack", "ner"}
_FREE_KEYS = {"filters", "allowed", *IRRELEVANT_KEYS}


def require_measured(config: Config, ledger: Ledger) -> None:
    """ValueError unless the run measured what this configuration needs, in the same way."""
    measured = {*ledger.setting("extract.filters", []), *ledger.setting("refine.filters", [])}
    for name in (*config.extract.filters, *config.refine.filters):
        if name not in measured:
            scores = ", ".join(sorted(measured))
            raise ValueError(f"{ledger.root} did not measure '{name}'; it has scores of {scores}")
    now = {key: value for key, value, _ in show(config)}
    then = {key: to_toml(setting.value) for key, setting in ledger.state.config.items()}
    for key, before, after in changed(then, now):
        if _portable(before) != _portable(after) and _changes_scores(key, config):
            raise ValueError(
                f"{ledger.root} measured with {key} = {before}, not {after}: only bounds can be "
                "changed without running it"
            )
    measured_by = ledger.state.files
    for key, content in file_digests(config).items():
        if section_of(key) not in _FREE_SECTIONS and measured_by.get(key, content) != content:
            raise ValueError(
                f"{ledger.root} measured with another file than {now.get(key, key)} now is ({key});"
                " run it again with this one"
            )


def _portable(value: str) -> str:
    """A value as a Ray job has it that was submitted with this directory."""
    return value.replace(f'"{os.getcwd()}/', '"')


def _changes_scores(key: str, config: Config) -> bool:
    name, field = section_of(key), key.rpartition(".")[2]
    if name in _FREE_SECTIONS or field in _FREE_KEYS:
        return False
    section = config.filters.get(name) or getattr(config, name)
    if field in derived(section):
        return False
    return field not in rules(section) or field in settings(section)
