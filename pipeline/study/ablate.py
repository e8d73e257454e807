"""`gristmill ablate`: what a run would have kept under other bounds, from the scores that it
stored, in seconds.

Nothing is extracted or measured again, and dedup's choices stand: what it dropped stays dropped,
what it kept is judged anew. Documents that extract rejected were never seen by dedup and refine:
those that other bounds would let through are counted apart. Texts stay as the filters that edit
them left them, so that dropping C4 brings none of its lines back.

Of a large run the parts are a sample, spread evenly (pipeline.sample); all counts are of the parts
that were read.
"""

import dataclasses
import difflib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from filters import derived, rules, settings
from pipeline.config.digests import IRRELEVANT_KEYS, file_digests, general_key
from pipeline.config.sections import Config, section_of
from pipeline.config.show import show
from pipeline.report.sample import Ledger, part_uri, read_ledger, spread
from pipeline.run.publish import published_to
from stages.formats.document import NamedFilter, score_columns
from stages.formats.errors import ConfigError
from stages.storage.catalog import read_catalog
from stages.storage.parts import read_columns, score_names

Bools = npt.NDArray[np.bool_]
HOSTS = 10


class Side(NamedTuple):
    """What one configuration keeps, and what it loses by rule, each document to the first that it
    breaks.

    `unmeasured`: documents that the run rejected in extract and this configuration would hand to
    dedup, or may: pages that the gate turned away as they seemed to be in no wanted language, if
    this configuration wants others.
    """

    documents: int
    chars: int
    tokens: int | None
    losses: dict[str, int]
    unmeasured: int


class Host(NamedTuple):
    """A host whose documents the two configurations keep in different numbers."""

    host: str
    before: int
    after: int


class Ablation(NamedTuple):
    """Two configurations over the same scores. `jaccard` is both / (both + only_before +
    only_after), 1 for two empty sets.

    Tokens are characters times `tokens_per_char`, as measured on the run's shards; None while there
    are none. `parts` are those that were read, and all.
    """

    before: Side
    after: Side
    both: int
    only_before: int
    only_after: int
    jaccard: float
    hosts: list[Host]
    tokens_per_char: float | None
    parts: tuple[int, int]


def without(config: Config, dropped: Sequence[str]) -> Config:
    """The configuration without filters ('c4') or single rules of them ('c4.sentence_count');
    ConfigError for any it lacks.
    """
    for name in dropped:
        section, _, rule = name.partition(".")
        used = {*config.extract.filters, *config.refine.filters}
        known = (
            {"language": config.language}
            | {n: config.filters[n] for n in used}
            | {"pii": config.pii}
        )
        if section not in known or (rule and rule not in rules(known[section])):
            close = difflib.get_close_matches(
                name,
                [*known, *(f"{n}.{r}" for n, f in known.items() for r in rules(f))],
                1,
                cutoff=0.5,
            )
            hint = f"did you mean '{close[0]}'?" if close else f"its filters are {', '.join(known)}"
            raise ConfigError(f"--drop {name}: no filter or rule of this config; {hint}")
        config = _opened(config, section, [rule] if rule else list(rules(known[section])))
    return config


def _opened(config: Config, section: str, names: Sequence[str]) -> Config:
    def opened(filter: Any) -> Any:
        return dataclasses.replace(filter, **dict.fromkeys(names))

    variants = {
        language: opened(filter)
        for language, filter in config.per_language.get(section, {}).items()
    }
    config = dataclasses.replace(config, per_language=config.per_language | {section: variants})
    if section in config.filters:
        return dataclasses.replace(
            config, filters=config.filters | {section: opened(config.filters[section])}
        )
    return dataclasses.replace(config, **{section: opened(getattr(config, section))})


def ablate(before: Config, after: Config) -> Ablation:
    """Judge the scores that the run of `before` stored by both configurations.

    FileNotFoundError when there is no run, ValueError when it lacks the scores that a configuration
    asks for.
    """
    ledger = read_ledger(before.run.directory)
    for config in (before, after):
        _require_measured(config, ledger)
    refined = {c.unit for c in ledger.commits["refine"]}
    extracted = [c for c in ledger.commits["extract"] if c.unit in refined]
    if not extracted:
        raise ValueError(
            f"{ledger.root}: stage refine has no unit done, so there are no scores to judge; run it first"
        )
    chosen = spread(extracted, rows=lambda c: sum(c.counts.values()))
    ratio = _tokens_per_char(ledger)
    tally = _Tally()
    for commit in chosen:
        tally.add(_part(ledger, commit.unit), before, after)
    union = tally.both + tally.only[0] + tally.only[1]
    return Ablation(
        before=tally.side(0, ratio),
        after=tally.side(1, ratio),
        both=tally.both,
        only_before=tally.only[0],
        only_after=tally.only[1],
        jaccard=tally.both / union if union else 1.0,
        hosts=tally.changed(HOSTS),
        tokens_per_char=ratio,
        parts=(len(chosen), len(extracted)),
    )


def _require_measured(config: Config, ledger: Ledger) -> None:
    measured = {*ledger.setting("extract.filters", []), *ledger.setting("refine.filters", [])}
    for name in (*config.extract.filters, *config.refine.filters):
        if name not in measured:
            raise ValueError(
                f"{ledger.root} did not measure '{name}'; it has scores of {', '.join(sorted(measured))}"
            )
    now = {key: value for key, value, _ in show(config)}
    then = {key: entry["value"] for key, entry in ledger.state["config"].items()}
    for key in sorted(now.keys() | {key for key in then if key.startswith("per_language.")}):
        # what is not said for a language is as for all
        known, wanted = (values.get(key, values.get(general_key(key))) for values in (then, now))
        if known is None or wanted is None or _portable(known) == _portable(wanted):
            continue
        if _is_measured_with(key, config):
            raise ValueError(
                f"{ledger.root} measured with {key} = {known}, not {wanted}: only bounds can be changed without running it"
            )
    measured_by = ledger.state.get("files", {})
    for key, content in file_digests(config).items():
        if section_of(key) not in _FREE_SECTIONS and measured_by.get(key, content) != content:
            raise ValueError(
                f"{ledger.root} measured with another file than {now.get(key, key)} now is ({key}); run it again with this one"
            )


def _portable(value: str) -> str:
    """A value as a Ray job that was sent with this directory has it."""
    return value.replace(f'"{os.getcwd()}/', '"')


# beside bounds, what changes no document: these sections, and these keys of others
_FREE_SECTIONS = {"run", "fetch", "pack", "ner"}
_FREE_KEYS = {"filters", "allowed", *IRRELEVANT_KEYS}


def _is_measured_with(key: str, config: Config) -> bool:
    name, field = section_of(key), key.rpartition(".")[2]
    if name in _FREE_SECTIONS or field in _FREE_KEYS:
        return False
    named = config.filters.get(name) or getattr(config, name)
    return field not in derived(named) and (field not in rules(named) or field in settings(named))


def _tokens_per_char(ledger: Ledger) -> float | None:
    name = ledger.state.get("generation")
    chars = sum(c.totals.get("chars_out", 0) for c in ledger.commits["refine"])
    entry = next(
        (e for e in read_catalog(published_to(ledger.root, ledger.state)) if e["name"] == name),
        None,
    )
    return entry["tokens"] / chars if entry and chars else None


# --- judging --------------------------------------------------------------------------------------


class _Part(NamedTuple):
    """The measured documents of a unit, how far the run let each come, and refine's rows, whose
    places `at` gives.
    """

    documents: pa.Table
    extracted: Bools
    refined: pa.Table
    at: npt.NDArray[np.int64]
    # pages whose main text was never looked for, as they seemed to be in none of the languages
    # `allowed`
    gated: int
    allowed: frozenset[str]


def _part(ledger: Ledger, unit: str) -> _Part:
    uri = ledger.store("extract").uri("documents", f"{unit}.parquet")
    columns = [
        "doc_id",
        "host",
        "num_chars",
        "rejected_by",
        "language",
        "language_score",
        "language_line_share",
    ]
    documents = read_columns(uri, [*columns, *score_names(uri)])
    gated = pc.sum(pc.equal(documents["rejected_by"], "gate.language_probability")).as_py() or 0
    documents = documents.filter(pc.is_valid(documents["num_chars"]))
    tables = []
    for kind in ("corpus", "rejected"):
        uri = str(part_uri(ledger, "refine", kind, unit))
        wanted = ["doc_id", "num_chars", "language", "rejected_by", *score_names(uri)]
        tables.append(read_columns(uri, wanted))
    refined = pa.concat_tables(tables)
    # of what no filter left a word no bound has a say
    empty = pc.is_in(
        refined["rejected_by"], value_set=pa.array(["dedup.lines", "refine.empty_text"])
    )
    refined = refined.filter(pc.invert(empty))
    at = (
        pc.index_in(refined["doc_id"], value_set=documents["doc_id"].combine_chunks())
        .to_numpy()
        .astype(np.int64)
    )
    extracted = pc.is_null(documents["rejected_by"]).to_numpy()
    return _Part(
        documents, extracted, refined, at, gated, frozenset(ledger.setting("language.allowed", []))
    )


class _Verdict(NamedTuple):
    """Per document of a part: kept by a configuration or not; characters; losses by rule, and
    documents it cannot tell of.
    """

    kept: Bools
    chars: int
    losses: Counter[str]
    unmeasured: int


def _verdict(part: _Part, config: Config) -> _Verdict:
    first = _first_broken(
        part.documents, [config.named("language"), *config.chain(config.extract.filters)], config
    )
    passed = first == ""
    losses = Counter(first[~passed].tolist())
    scrubbing = [NamedFilter("pii", config.pii)] if config.refine.scrub_pii else []
    second = _first_broken(part.refined, [*config.chain(config.refine.filters), *scrubbing], None)
    survives = (second == "") & passed[part.at]
    losses.update(second[passed[part.at] & (second != "")].tolist())
    reached = np.zeros(len(passed), bool)
    reached[part.at] = True
    losses["dedup"] = int((passed & part.extracted & ~reached).sum())
    kept = np.zeros(len(passed), bool)
    kept[part.at[survives]] = True
    chars = int(part.refined["num_chars"].to_numpy()[survives].sum())
    is_wider = bool(part.allowed) and not (
        config.language.allowed and part.allowed.issuperset(config.language.allowed)
    )
    return _Verdict(
        kept, chars, losses, int((passed & ~part.extracted).sum()) + part.gated * is_wider
    )


def _first_broken(
    rows: pa.Table, chain: Sequence[NamedFilter], identified: Config | None
) -> npt.NDArray[np.object_]:
    """The first rule that each row breaks, "" for none; `identified` says which languages are
    wanted, None: not asked.
    """
    language = pc.fill_null(rows["language"], "").to_numpy().astype(object)
    broken = np.full(rows.num_rows, "", dtype=object)
    if identified is not None and identified.language.identify and identified.language.allowed:
        broken[~np.isin(language.astype(str), identified.language.allowed)] = "language.allowed"
    for named in chain:
        for column in score_columns([named]):
            name = (
                column.replace("language.", "language_", 1) if named.name == "language" else column
            )
            if name not in rows.column_names:
                continue
            values = rows[name].to_numpy().astype(np.float64)
            outside = _outside(values, language, named, column.partition(".")[2])
            if named.name in (
                "pii",
                "language",
            ):  # null: not scrubbed, not measured; of other filters NaN: it rejects
                outside &= pc.is_valid(rows[name]).to_numpy()
            broken[outside & (broken == "")] = column
    return broken


def _outside(
    values: npt.NDArray[np.float64], language: npt.NDArray[Any], named: NamedFilter, rule: str
) -> Bools:
    outside = np.zeros(len(values), bool)
    for name, filter in named.all():
        bound = rules(filter)[rule]
        here = language == name if name else np.ones(len(values), bool)
        outside[here] = (
            False if bound is None else ~((values[here] >= bound[0]) & (values[here] <= bound[1]))
        )
    return outside


# --- sums -----------------------------------------------------------------------------------------


class _Tally:
    """Sums over parts."""

    def __init__(self) -> None:
        self.both, self.only = 0, [0, 0]
        self._sides: list[list[_Verdict]] = [[], []]
        self._hosts: tuple[Counter[str], Counter[str]] = (Counter(), Counter())

    def add(self, part: _Part, before: Config, after: Config) -> None:
        verdicts = _verdict(part, before), _verdict(part, after)
        self.both += int((verdicts[0].kept & verdicts[1].kept).sum())
        hosts = pc.fill_null(part.documents["host"], "")
        for i, verdict in enumerate(verdicts):
            self.only[i] += int((verdict.kept & ~verdicts[1 - i].kept).sum())
            self._sides[i].append(verdict)
            counted = pc.value_counts(hosts.filter(pa.array(verdict.kept))).to_pylist()
            self._hosts[i].update({c["values"]: c["counts"] for c in counted})

    def side(self, i: int, ratio: float | None) -> Side:
        losses: Counter[str] = Counter()
        for verdict in self._sides[i]:
            losses.update(verdict.losses)
        chars = sum(v.chars for v in self._sides[i])
        documents = sum(int(v.kept.sum()) for v in self._sides[i])
        tokens = None if ratio is None else round(chars * ratio)
        return Side(
            documents, chars, tokens, dict(+losses), sum(v.unmeasured for v in self._sides[i])
        )

    def changed(self, limit: int) -> list[Host]:
        before, after = self._hosts
        found = [
            Host(host, before[host], after[host])
            for host in {*before, *after}
            if before[host] != after[host]
        ]
        return sorted(found, key=lambda h: (-abs(h.after - h.before), h.host))[:limit]


def rows_of(found: Ablation) -> Iterator[tuple[str, int | None, int | None]]:
    """What changes, line by line: (what, before, after)."""
    before, after = found.before, found.after
    yield "documents", before.documents, after.documents
    yield "characters", before.chars, after.chars
    yield "tokens (estimated)", before.tokens, after.tokens
    for rule in sorted(
        {*before.losses, *after.losses},
        key=lambda r: -max(before.losses.get(r, 0), after.losses.get(r, 0)),
    ):
        yield f"lost to {rule}", before.losses.get(rule, 0), after.losses.get(rule, 0)
    yield "past extract, never measured", before.unmeasured, after.unmeasured
