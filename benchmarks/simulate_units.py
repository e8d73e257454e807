"""What the units of a snapshot take, send to the store and leave behind, by phase: the work of
benchmarks.simulate. Loads come from benchmarks.snapshot, requests from what was counted of real runs.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import zstandard

from benchmarks.simulate_cluster import Load
from benchmarks.snapshot import Inputs, snapshot_steps, stored_bytes
from pipeline.config.sections import Config
from stages.dedup import cluster as dedup_cluster
from stages.dedup import keep as dedup_keep
from stages.dedup import minhash
from stages.dedup.keys import KeysResult
from stages.dedup.match import MatchResult
from stages.dedup.shuffle import Layout
from stages.extract.extract import ExtractResult
from stages.pack.pack import PackResult, derive_seed
from stages.refine.refine import RefineResult
from stages.storage.digests import digest
from stages.storage.ledger import Commit, Output, Store, Unit

READERS = 16  # of a merge: ranges read at once
EDGES = 2.36  # per document (benchmarks.dedup_scale)


class Requests(NamedTuple):
    """To the store; `put` are PUT, POST and DELETE."""

    get: float = 0.0
    head: float = 0.0
    put: float = 0.0
    list: float = 0.0

    def times(self, factor: float) -> "Requests":
        return Requests(*(n * factor for n in self))


class Work(NamedTuple):
    """What a unit takes, its requests, and the commit that it leaves."""

    load: Load
    requests: Requests
    commit: Commit


class Snapshot:
    """The units of a snapshot: `work` of each, by phase."""

    def __init__(
        self, measured: dict[str, Any], given: Inputs, config: Config, *, seed: int
    ) -> None:
        self.measured, self.given, self.config, self.seed = measured, given, config, seed
        self.documents: dict[str, float] = {}
        self.groups = 0
        steps = snapshot_steps(measured, given)
        hours = {
            stage: sum(s.core_hours for s in steps if s.stage == stage)
            for stage in ("extract", "refine", "pack")
        }
        self.total_bytes = given.snapshot["files"] * given.snapshot["gzip_bytes_per_file"]
        self.per_byte = hours["extract"] * 3600 / self.total_bytes
        self.per_document = hours["refine"] * 3600 / given.documents
        self.per_kept = hours["pack"] * 3600 / given.documents
        self.requests = requests_of(measured)
        dedup = measured["dedup"]
        self.dedup = {
            name: of["seconds"]
            / (
                of["rows"]
                if name in ("dedup sort", "dedup match", "dedup cluster")
                else dedup["documents"]
            )
            for name, of in dedup["phases"].items()
        }
        self.bytes = stored_bytes(measured, given)

    def work(self, phase: str, units: Sequence[Unit], store: Store) -> list[Work]:
        """In the order of the units."""
        rng = np.random.default_rng(derive_seed(self.seed, "simulate.pages", phase))
        # assumption: WARC files of equal size differ by a tenth in what their pages take
        spread = rng.lognormal(0.0, 0.1, len(units)) if phase == "extract" else np.ones(len(units))
        make: Callable[..., Work] = getattr(self, "_" + phase.replace(" ", "_"))
        if phase == "dedup sort":
            self.groups = len(units)
        return [
            make(unit, Commit(unit.name, unit.fingerprint), store, float(factor), len(units))
            for unit, factor in zip(units, spread, strict=True)
        ]

    def _extract(self, unit: Unit, commit: Commit, store: Store, factor: float, units: int) -> Work:
        share = unit.bytes / self.total_bytes
        pages = round(self.given.snapshot["pages"] * share)
        commit.rows_in, commit.rows_out = pages, round(self.given.candidates * share)
        self.documents[unit.name] = commit.rows_out
        commit.counts = {"kept": commit.rows_out, **{f"rule.{n}": pages // 40 for n in range(30)}}
        size = round(pages * self.bytes.documents_per_page)
        commit.outputs = [_output("documents", f"{unit.name}.parquet", size, unit)]
        commit.result = ExtractResult(bytes_in=unit.bytes, languages={"en": commit.rows_out})
        return self._done(
            unit, commit, "extract", unit.bytes * self.per_byte * factor, unit.bytes + size
        )

    def _dedup_sort(
        self, unit: Unit, commit: Commit, store: Store, factor: float, units: int
    ) -> Work:
        documents, size = self._of_parts(unit.task.parts)
        commit.rows_in = commit.rows_out = round(documents)
        rows = commit.rows_out * self.config.dedup.layout.lanes
        commit.result = KeysResult(rows, minhash.describe(self.config.dedup.signature))
        _write_cells(store, "keys", unit, commit, self.config.dedup.layout, 16 * rows)
        seconds = rows * self.dedup["dedup sort"]
        return self._done(
            unit, commit, "dedup sort", seconds, size + 16 * rows, parts=len(unit.task.parts)
        )

    def _dedup_match(
        self, unit: Unit, commit: Commit, store: Store, factor: float, units: int
    ) -> Work:
        rows = self.given.candidates * self.config.dedup.layout.lanes / units
        commit.rows_in = round(rows)
        commit.rows_out = round(EDGES * self.given.candidates / units)
        commit.result, size = MatchResult(), 16 * commit.rows_out
        commit.outputs = [_output("edges", f"{unit.name}.edges", size, unit)]
        seconds = rows * self.dedup["dedup match"]
        return self._done(
            unit, commit, "dedup match", seconds, 16 * rows / READERS + size, files=self.groups
        )

    def _dedup_cluster(
        self, unit: Unit, commit: Commit, store: Store, factor: float, units: int
    ) -> Work:
        edges = EDGES * self.given.candidates
        commit.rows_in = commit.rows_out = round(0.3 * self.given.candidates)
        layout = dedup_cluster.labels_layout(self.groups)
        _write_cells(store, "labels", unit, commit, layout, 16 * commit.rows_out)
        # both passes over the edges read one file after the other
        size = 2 * 16 * edges + 16 * commit.rows_out
        seconds = edges * self.dedup["dedup cluster"]
        return self._done(unit, commit, "dedup cluster", seconds, size, parts=len(unit.task.edges))

    def _dedup_rank(
        self, unit: Unit, commit: Commit, store: Store, factor: float, units: int
    ) -> Work:
        documents, size = self._of_parts(unit.task.parts)
        commit.rows_in = commit.rows_out = round(0.1 * documents)
        _write_cells(store, "candidates", unit, commit, dedup_keep.CANDIDATES, 56 * commit.rows_out)
        seconds = documents * self.dedup["dedup rank"]
        return self._done(unit, commit, "dedup rank", seconds, size, parts=len(unit.task.parts))

    def _dedup_elect(
        self, unit: Unit, commit: Commit, store: Store, factor: float, units: int
    ) -> Work:
        commit.rows_in = commit.rows_out = round(0.1 * self.given.candidates / units)
        layout = dedup_keep.verdicts_layout(unit.task.groups)
        _write_cells(store, "verdicts", unit, commit, layout, 40 * commit.rows_out)
        commit.result = dedup_keep.ElectResult()
        seconds = self.given.candidates / units * self.dedup["dedup elect"]
        size = 56 * commit.rows_in / READERS + 40 * commit.rows_out
        return self._done(unit, commit, "dedup elect", seconds, size, files=self.groups)

    def _dedup_keep(
        self, unit: Unit, commit: Commit, store: Store, factor: float, units: int
    ) -> Work:
        documents, size = self._of_parts(unit.task.parts)
        commit.rows_in, commit.rows_out = (
            round(documents),
            round(documents * self.given.snapshot["kept_by_dedup"]),
        )
        commit.counts = {"kept": commit.rows_out, "dedup.near": commit.rows_in - commit.rows_out}
        commit.outputs = [
            _output("keep", f"{part.unit}.parquet", round(20 * self.documents[part.unit]), unit)
            for part in unit.task.parts
        ]
        _write_cells(store, "losses", unit, commit, dedup_keep.LOSSES, 3_000_000)
        commit.result = dedup_keep.KeepResult()
        seconds = documents * self.dedup["dedup keep"]
        return self._done(
            unit, commit, "dedup keep", seconds, size + 20 * documents, parts=len(unit.task.parts)
        )

    def _dedup_alarm(
        self, unit: Unit, commit: Commit, store: Store, factor: float, units: int
    ) -> Work:
        commit.result = dedup_keep.AlarmResult()
        seconds = self.given.candidates / units * self.dedup["dedup alarm"]
        return self._done(
            unit,
            commit,
            "dedup alarm",
            seconds,
            3e6 * self.groups / READERS / units,
            files=self.groups,
        )

    def _refine(self, unit: Unit, commit: Commit, store: Store, factor: float, units: int) -> Work:
        documents = self.documents[unit.name] * self.given.snapshot["kept_by_dedup"]
        commit.rows_in = commit.rows_out = round(documents)
        commit.counts = {"kept": commit.rows_out}
        size = round(documents * self.bytes.corpus_per_document)
        commit.outputs = [_output("corpus", f"{unit.name}.parquet", size, unit)]
        commit.result = RefineResult()
        return self._done(
            unit, commit, "refine", documents * self.per_document, unit.bytes + 2 * size
        )

    def _pack(self, unit: Unit, commit: Commit, store: Store, factor: float, units: int) -> Work:
        documents = unit.bytes / self.bytes.corpus_per_document
        tokens = documents * self.given.snapshot["tokens_per_document"]
        # no rows: nothing is published
        commit.result, commit.rows_in = PackResult(tokens=round(tokens)), round(documents)
        size = 4 * tokens / 3  # uint32, compressed
        return self._done(
            unit,
            commit,
            "pack",
            documents * self.per_kept,
            unit.bytes + size,
            parts=len(unit.task.parts),
        )

    def _of_parts(self, parts: Sequence[Any]) -> tuple[float, float]:
        """Documents and bytes of some documents parts."""
        documents = sum(self.documents[part.unit] for part in parts)
        pages = self.given.snapshot["pages"] / self.given.candidates * documents
        return documents, pages * self.bytes.documents_per_page

    def _done(
        self,
        unit: Unit,
        commit: Commit,
        phase: str,
        seconds: float,
        size: float,
        *,
        parts: float = 1,
        files: int = 0,
    ) -> Work:
        """`parts` are read one after the other, ranges of `files` several at once."""
        fixed, each = self.requests[phase]
        requests = Requests(*(a + b * parts for a, b in zip(fixed, each, strict=True)))
        in_turn = sum(requests) + files / READERS
        return Work(
            Load(seconds, in_turn, size), requests._replace(get=requests.get + files), commit
        )


# phases with one unit, which reads all documents parts
_READS_PARTS = ("dedup sort", "dedup rank", "dedup keep", "pack")


def requests_of(measured: dict[str, Any]) -> dict[str, tuple[Requests, Requests]]:
    """What a unit of each phase sends, and what it sends more for each part that it reads."""
    fewer, more = (
        run for _, run in sorted(measured["requests"]["runs"].items(), key=lambda r: int(r[0]))
    )
    parts = [run["units"]["refine"] for run in (fewer, more)]
    found = {}
    for phase, units in more["units"].items():
        of_fewer, of_more = (_kinds(run["requests"][phase]) for run in (fewer, more))
        if phase in _READS_PARTS:
            each = [
                max(0.0, b - a) / (parts[1] - parts[0])
                for a, b in zip(of_fewer, of_more, strict=True)
            ]
            fixed = [max(0.0, b - e * parts[1]) for b, e in zip(of_more, each, strict=True)]
        elif phase == "dedup cluster":  # its parts are the edge files of match
            fixed, each = [0.0] * 4, [n / more["units"]["dedup match"] for n in of_more]
        else:
            fixed, each = [n / units for n in of_more], [0.0] * 4
        found[phase] = Requests(*fixed), Requests(*each)
    return found


def _kinds(counted: dict[str, int]) -> Requests:
    writes = sum(counted.get(kind, 0) for kind in ("PUT", "POST", "DELETE"))
    return Requests(counted.get("GET", 0), counted.get("HEAD", 0), writes, counted.get("LIST", 0))


def _output(kind: str, name: str, size: int, unit: Unit) -> Output:
    return Output(f"{kind}/{name}", size, digest([kind, name, unit.fingerprint]))


def _write_cells(
    store: Store, kind: str, unit: Unit, commit: Commit, layout: Layout, size: int
) -> None:
    """A sorted file's grid, which the driver reads, with no row in it; the rows are only recorded."""
    commit.outputs.append(_output(kind, f"{unit.name}.rows", size, unit))
    with store.create(kind, f"{unit.name}.cells", outputs=commit.outputs) as path:
        path.write_bytes(zstandard.compress(bytes(4 * layout.lanes * layout.cells)))
