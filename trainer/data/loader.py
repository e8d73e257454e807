"""Global batches from published generations: verified, in an order that any number of ranks can
take up, read ahead.

plan    which rows the next step takes: counters and a seeded order, the same on every rank (trainer/plan.py)
read    the rows of this rank's micro-batches, two steps ahead, in a thread or in `workers` processes (trainer/data.py)
next    hand out a step's micro-batches; `state_dict` is where the supply stands after them, not after what is read ahead
"""

import itertools
import os
import queue
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch.distributed as dist

from stages.storage.catalog import GenerationError, generation_error, read_catalog
from stages.storage.digests import bytes_sha256
from stages.storage.files import is_local
from trainer.config import DataConfig, SourceConfig
from trainer.data.generations import (
    Manifest,
    Mode,
    folder_of,
    stage,
    verify_generation,
)
from trainer.data.order import (
    I64,
    OrderSlice,
    Position,
    assign_sources,
    epoch_order,
    micro_batches_per_rank,
    next_slices,
)
from trainer.data.prefetch import read_ahead
from trainer.data.rows import Batch, RowRef
from trainer.data.streaming import import_streaming

POLL_SECONDS = 2.0  # between looks at the catalog while waiting
_T = TypeVar("_T")


class RowRange(NamedTuple):
    """What a step took of a generation: places [start, stop) of its order in an epoch (see
    `epoch_order`).
    """

    generation: str
    epoch: int
    start: int
    stop: int


class BatchLoader:
    """The global batches of a run, as the micro-batches of one rank.

    All ranks make a BatchLoader with the same config and state and call `next` in step: new generations
    are looked up and hashed by rank 0, checked quickly by the others, and each rank learns every
    verdict, so a fault on one is raised on all and none hangs. For that they exchange a few bytes
    (`gather`: this rank's value → those of all ranks; torch.distributed's when it is initialised).
    Reading takes no exchange: a row that cannot be read ends its rank, and the launcher ends the
    others.

    A generation is hashed before its first row is read; that stops the training for as long as it
    takes when it was published after the start. Compressed shards are unpacked beside themselves
    when first read. From an object store each node copies a generation before its first row is
    planned (`next` gives nothing meanwhile), the one after it, if known by then, while it is read,
    and removes it when all its rows are handed out, unless they are to be repeated; a run resumed
    from before that copies it again.

    `taken` is what the last step took of each run, on all ranks together. ValueError for a config
    or state that does not fit, GenerationError for data that does not. `close` it, or use it as a
    context.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        rank: int,
        world_size: int,
        state: Mapping[str, Any] | None = None,
        gather: Callable[[Any], list[Any]] | None = None,
    ) -> None:
        self._micro = micro_batches_per_rank(
            config.global_batch_rows, config.micro_batch_rows, world_size
        )
        if not config.sources or min(source.weight for source in config.sources) <= 0:
            raise ValueError("data.sources needs at least one source, each with a weight above 0")
        self._config, self._rank, self._world = config, rank, world_size
        self._gather = gather or _gather
        alone = len(self._gather(None)) == 1  # as in tests: then every rank looks for itself
        self._leads = rank == 0 or alone
        self._sources = [_Source(source) for source in config.sources]
        self._step = 0
        self._shape: tuple[int, str] | None = (
            None  # seq_len and tokenizer, of all generations alike
        )
        self._planned: deque[_Plan] = deque()  # steps that are being read
        self._loader: Iterator[Batch] | None = None
        self._closed = False
        self._empty_since: float | None = None
        self._awaited: tuple[_Source, int] | None = (
            None  # the generation that is copied before anything else can be read
        )
        self.row_ranges: dict[str, list[RowRange]] = {}
        import_streaming()  # seconds, and before there are workers that would each take them
        if state is not None:
            self._load(state)
        for source in self._sources:
            if not self._extend(source) and config.at_end != "wait":
                raise GenerationError(
                    f"{source.config.run}: expected generations in catalog.jsonl, found none; run the pipeline"
                )
        if state is not None:
            self._agreed(partial(self._check_orders, state))
        self._state = self._state_at(self._step)

    def __enter__(self) -> "BatchLoader":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop reading ahead; `next` raises from now on.

        A thread that hangs in a read is left to end with the process.
        """
        self._loader, self._closed = None, True

    def next(self, step: int) -> list[Batch]:
        """The micro-batches of this rank for `step`, counted from 0; [] when the supply has ended,
        on all ranks alike.

        Then nothing of an unfinished global batch is used up: its rows open the next one when the
        run goes on with more data. GenerationError when a row cannot be read, or is not there
        within `batch_timeout_seconds`.
        """
        if self._closed:
            raise ValueError(
                "this supply is closed, and rows that it had planned are gone; make one from its state_dict()"
            )
        if step != self._step:
            raise ValueError(
                f"asked for step {step}, but the supply stands at {self._step}; make one from the state of that step"
            )
        self._leave()
        # twice: what was published after the end was met, while reading ahead, is found by the
        # second
        batches = self._collect() or self._collect()
        if batches:
            plan = self._planned.popleft()
            self._step, self._state, self.row_ranges, self._empty_since = (
                step + 1,
                plan.state,
                plan.taken,
                None,
            )
        return batches

    def should_wait(self) -> bool:
        """After a `next` that gave nothing: whether to wait for a copy or, by config and the clock
        of rank 0, a generation.
        """
        if self._awaited:
            return True
        if self._config.at_end != "wait":
            return False
        self._empty_since = self._empty_since or time.monotonic()
        waited = time.monotonic() - self._empty_since
        return self._agreed(lambda: waited < self._config.wait_seconds)

    def poll(self) -> bool:
        """Look for what is awaited, after a pause of POLL_SECONDS; if it is there, `next` gives
        more.
        """
        time.sleep(POLL_SECONDS)
        if self._awaited:
            return not self._under_way(*self._awaited)
        return any(
            [self._extend(source) for source in self._sources]
        )  # a list: every rank asks for every source

    @property
    def seq_len(self) -> int | None:
        """Tokens of a row, None before the first generation is known."""
        return self._shape[0] if self._shape else None

    def state_dict(self) -> dict[str, Any]:
        """Where the supply stands after the last step handed out, for JSON: the same on every rank
        and for any number of them.
        """
        return self._state

    # --- plan -------------------------------------------------------------------------------------

    def _plans(self) -> Iterator[list[RowRef]]:
        """The micro-batches of this rank, step after step, until the supply known today ends."""
        while (plan := self._plan()) is not None:
            self._planned.append(plan)
            yield from plan.micro

    def _plan(self) -> "_Plan | None":
        rows, sources = self._config.global_batch_rows, self._sources
        owners = assign_sources(
            [s.config.weight for s in sources], [s.drawn for s in sources], rows
        )
        picked, positions = np.empty((rows, 2), np.int64), []
        taken: dict[str, list[RowRange]] = {source.config.run: [] for source in sources}
        for number, source in enumerate(sources):
            found = self._take(source, int((owners == number).sum()))
            if found is None:
                return None
            if not all(self._entered(source, stretch.gen_index) for stretch in found[0]):
                return None
            picked[owners == number], position = self._rows(source, found[0]), found[1]
            positions.append(position)
            taken[source.config.run] += [
                RowRange(source.known[s.gen_index].name, s.epoch, s.start, s.stop) for s in found[0]
            ]
        for source, position, count in zip(
            sources, positions, np.bincount(owners, minlength=len(sources)), strict=True
        ):
            source.position, source.drawn = position, source.drawn + int(count)
        mine = range(self._rank * rows // self._world, (self._rank + 1) * rows // self._world)
        places = [
            sources[owners[i]].place(*picked[i].tolist(), self._config.cache_dir) for i in mine
        ]
        size = self._config.micro_batch_rows
        micro = [places[i : i + size] for i in range(0, len(places), size)]
        return _Plan(micro, taken, self._state_at(self._step + len(self._planned) + 1))

    def _take(self, source: "_Source", count: int) -> tuple[list[OrderSlice], Position] | None:
        """Where the next rows of a source lie, and its position after them, without moving it."""
        position = source.position
        found = next_slices(source.sizes, position, count, epochs=position.epoch + 1)
        while found is None and self._extend(source):
            found = next_slices(source.sizes, position, count, epochs=position.epoch + 1)
        if found is None and self._config.at_end == "repeat":
            found = next_slices(source.sizes, position, count, epochs=self._config.max_epochs)
        return found

    def _rows(self, source: "_Source", found: list[OrderSlice]) -> I64:
        """(generation's place in the list, row) [rows, 2]."""
        picked = [np.empty((0, 2), np.int64)]
        for epoch, at, start, stop in found:
            rows = self._order(source, at, epoch)[start:stop]
            picked.append(np.stack([np.full(len(rows), at), rows], axis=1))
        return np.concatenate(picked)

    def _order(self, source: "_Source", at: int, epoch: int) -> I64:
        """The rows of a generation in this epoch's order; the last one of a source is kept, 8 bytes
        a row.
        """
        if source.order is None or source.order_of != (at, epoch):
            order = epoch_order(
                source.known[at],
                epoch,
                seed=self._config.shuffle_seed,
                nodes=self._config.canonical_nodes,
            )
            source.order, source.order_of = order, (at, epoch)
            source.order_digest = bytes_sha256(order.tobytes())[:16]
        return source.order

    # --- generations ------------------------------------------------------------------------------

    def _extend(self, source: "_Source") -> bool:
        """Take up the generations that the catalog lists beyond those known; False when there is
        none.
        """
        entries = self._agreed(lambda: self._listed(source) if self._leads else [])
        new = entries[len(source.known) :]
        for entry in new:
            # what a resumed run has left behind is not hashed again
            unread = (
                len(source.known) >= source.position.gen_index or self._config.at_end == "repeat"
            )
            mode = self._config.verify if self._leads and unread else "quick"
            verify = partial(
                verify_generation, source.config.run, entry, mode=mode, cache=self._config.cache_dir
            )
            manifest = self._agreed(verify)
            self._check_shape(manifest)
            source.known.append(manifest)
        return bool(new)

    def _listed(self, source: "_Source") -> list[dict[str, Any]]:
        """The entries that this source reads; GenerationError when one that it has read from is not
        what it was.
        """
        entries, names = read_catalog(source.config.run), source.config.generations
        if names:
            by_name = {entry["name"]: entry for entry in entries}
            missing = [name for name in names if name not in by_name]
            if missing and self._config.at_end != "wait":
                listed = ", ".join(by_name) or "none"
                raise generation_error(
                    missing[0],
                    "catalog.jsonl",
                    expected="its entry",
                    found=listed,
                    do="correct `generations`, or publish it",
                )
            entries = [by_name[name] for name in itertools.takewhile(by_name.__contains__, names)]
        for at, (name, sha256) in enumerate(source.seen()):
            found = [f"{e['name']} with {e['manifest_sha256']}" for e in entries[at : at + 1]]
            if found != [f"{name} with {sha256}"]:
                expected = f"{name} with {sha256}, as this run has read it"
                do = "put the published one back, or train anew: another order would repeat rows and lose others"
                raise generation_error(
                    name,
                    "manifest_sha256 in catalog.jsonl",
                    expected=expected,
                    found=found or "none",
                    do=do,
                )
        return entries

    def _check_shape(self, manifest: Manifest) -> None:
        shape = manifest.seq_len, manifest.tokenizer
        self._shape = self._shape or shape
        if shape != self._shape:
            expected, found = (
                f"seq_len {seq_len} and tokenizer {tokenizer}"
                for seq_len, tokenizer in (self._shape, shape)
            )
            do = "leave it out of `generations`, or pack it like those before"
            raise generation_error(
                manifest.name,
                "manifest.json",
                expected=f"{expected}, as in this run so far",
                found=found,
                do=do,
            )

    def _entered(self, source: "_Source", at: int) -> bool:
        """Whether every node has the shards of a generation; if not they are being copied, and
        `grows` tells when that ends.
        """
        if at in source.staged or is_local(source.config.run):
            return True
        copying = self._copying(
            source, at, again=self._awaited is None
        )  # what failed while the one before was read
        if copying:
            copying.join(POLL_SECONDS)
        self._awaited = (source, at) if self._under_way(source, at) else None
        if self._awaited:
            return False
        self._agreed(partial(_require_copied, copying, source.known[at], self._config.cache_dir))
        source.staged.add(at)
        return True

    def _under_way(self, source: "_Source", at: int) -> bool:
        copying = source.copying.get(at)
        return any(self._gather(copying is not None and copying.is_alive()))

    def _copying(self, source: "_Source", at: int, *, again: bool = False) -> "_Copying | None":
        """What copies, or has copied, a generation, `again` if that failed; None where the launcher
        says another rank does.
        """
        if os.environ.get("LOCAL_RANK", "0") != "0":
            return None
        before = source.copying.get(at)
        if before is None or (again and before.failure is not None):
            source.copying[at] = _Copying(
                source.known[at], mode=self._config.verify, cache=self._config.cache_dir
            )
            source.copying[at].start()
        return source.copying[at]

    def _leave(self) -> None:
        """Remove copies that no rank reads any more, also those of an earlier incarnation; then
        there is room to copy the next.

        All ranks have handed out the step before, as they have exchanged gradients.
        """
        for source, state in zip(self._sources, self._state["sources"], strict=True):
            if is_local(source.config.run):
                continue
            current = len(state["generations"]) - 1
            for manifest in (
                source.known[source.left : current] if self._config.at_end != "repeat" else ()
            ):
                shutil.rmtree(
                    folder_of(manifest.run, manifest.name, self._config.cache_dir),
                    ignore_errors=True,
                )
            source.left = max(source.left, current)
            if (
                current in source.staged
                and current + 1 < len(source.known)
                and current + 1 not in source.copying
            ):
                self._copying(source, current + 1)

    def _agreed(self, action: Callable[[], _T]) -> _T:
        """Rank 0's result of what all ranks do; if it fails on any of them, the first failure,
        raised on every rank.
        """
        answer, failure = None, None
        try:
            answer = action()
        except Exception as error:  # whatever it is: the other ranks wait for ours
            # what is no verdict on the data may be over the next time: a store that does not
            # answer, say
            failure = (
                error
                if isinstance(error, GenerationError | ValueError)
                else OSError(f"rank {self._rank}: {error!r}")
            )
        answers = self._gather((answer, failure))
        for _, failed in answers:
            if failed is not None:
                raise failed
        first: _T = answers[0][0]
        return first

    # --- state ------------------------------------------------------------------------------------

    def _state_at(self, step: int) -> dict[str, Any]:
        config, shape = self._config, self._shape or (None, None)
        return {
            "step": step,
            "shuffle_seed": config.shuffle_seed,
            "canonical_nodes": config.canonical_nodes,
            "seq_len": shape[0],
            "tokenizer": shape[1],
            "sources": [source.state() for source in self._sources],
        }

    def _load(self, state: Mapping[str, Any]) -> None:
        for key in ("shuffle_seed", "canonical_nodes"):
            if state[key] != getattr(self._config, key):
                raise ValueError(
                    f"the checkpoint's order has {key}={state[key]}, the config {getattr(self._config, key)}; restore it"
                )
        if len(state["sources"]) != len(self._sources):
            raise ValueError(
                f"the checkpoint has {len(state['sources'])} sources, the config {len(self._sources)}; restore them"
            )
        self._step = state["step"]
        self._shape = None if state["seq_len"] is None else (state["seq_len"], state["tokenizer"])
        for source, saved in zip(self._sources, state["sources"], strict=True):
            source.load(saved)
        if any(
            source.config.weight != saved["weight"]
            for source, saved in zip(self._sources, state["sources"], strict=True)
        ):
            for source in self._sources:
                source.drawn = (
                    0  # new shares hold from here on; they do not make up for the old ones
                )

    def _check_orders(self, state: Mapping[str, Any]) -> None:
        """Refuse to go on in another order than the one that was begun: another NumPy or streaming
        may draw differently.
        """
        for source, saved in zip(self._sources, state["sources"], strict=True):
            if saved["order"] is not None:
                self._order(source, source.position.gen_index, source.position.epoch)
                if source.order_digest != saved["order"]:
                    do = "resume with the versions of numpy and streaming that the run began with"
                    raise generation_error(
                        saved["generation"],
                        "order of rows",
                        expected=saved["order"],
                        found=source.order_digest,
                        do=do,
                    )

    # --- read -------------------------------------------------------------------------------------

    def _collect(self) -> list[Batch]:
        """The micro-batches of the next step, [] when the supply known today has ended."""
        batches: list[Batch] = []
        try:
            if self._loader is None:
                timeout, workers = self._config.batch_timeout_seconds, self._config.workers
                self._loader = read_ahead(
                    self._plans(), ahead=2 * self._micro, workers=workers, timeout=timeout
                )
            while len(batches) < self._micro:
                batches.append(next(self._loader))
        except StopIteration:
            self._loader = None
        except GenerationError as error:
            self.close()
            # without the frames that hold torch's loader: it is gone now, and its workers with it;
            # as part of a cycle, which torch makes of the error, it would be left to the garbage
            # collector, where its end takes 10 s
            raise error.with_traceback(None) from None
        except (queue.Empty, RuntimeError) as error:  # as read_ahead says
            if not self._planned:
                raise  # of the exchange between ranks, before anything was asked for
            late = self._late(self._planned[0].micro[len(batches)], error)
            self.close()
            error.with_traceback(None)
            raise late from error
        return batches

    def _late(self, places: list[RowRef], error: Exception) -> GenerationError:
        rows = ", ".join(f"{place.generation}:{place.row}" for place in places[:4]) + (
            ", ..." if len(places) > 4 else ""
        )
        seconds, found = self._config.batch_timeout_seconds, str(error) or "none"
        do = "look whether its disk answers, or raise batch_timeout_seconds"
        return generation_error(
            places[0].generation,
            f"rows {rows}",
            expected=f"a batch within {seconds:g} s",
            found=found,
            do=do,
        )


class _Copying(threading.Thread):
    """Copies a generation to this node; `failure` is why it could not."""

    def __init__(self, manifest: Manifest, *, mode: Mode, cache: str) -> None:
        super().__init__(name="copy", daemon=True)
        self.failure: Exception | None = None
        self._stage = partial(stage, manifest, mode=mode, cache=cache)

    def run(self) -> None:
        try:
            self._stage()
        except Exception as error:
            self.failure = error


def _require_copied(copying: _Copying | None, manifest: Manifest, cache: str) -> None:
    if copying is None:
        stage(manifest, mode="quick", cache=cache)  # the rank beside this one has copied it
    elif copying.failure:
        raise copying.failure


class _Plan(NamedTuple):
    micro: list[list[RowRef]]  # of this rank
    taken: dict[str, list[RowRange]]
    state: dict[str, Any]  # of the supply after the step


@dataclass
class _Source:
    """A source, how far it is planned, and what the checkpoint says it has read."""

    config: SourceConfig
    known: list[Manifest] = field(default_factory=list)
    position: Position = field(default_factory=Position)
    drawn: int = 0
    saved: list[tuple[str, str]] = field(
        default_factory=list
    )  # (name, sha256 of manifest) of generations begun
    order: I64 | None = None
    order_of: tuple[int, int] | None = None  # (place in the list, epoch)
    order_digest: str | None = None
    copying: dict[int, _Copying] = field(
        default_factory=dict
    )  # by place in the list, from an object store
    staged: set[int] = field(
        default_factory=set
    )  # of those in the list, which were copied to this node
    left: int = 0  # of those in the list, how many need no copy any more

    @property
    def sizes(self) -> list[int]:
        return [manifest.rows for manifest in self.known]

    def seen(self) -> list[tuple[str, str]]:
        return max(
            self.saved, [(manifest.name, manifest.sha256) for manifest in self.known], key=len
        )

    def place(self, at: int, row: int, cache: str) -> RowRef:
        manifest = self.known[at]
        return RowRef(self.config.run, manifest.name, manifest.rows, row, cache)

    def state(self) -> dict[str, Any]:
        epoch, at, rows = self.position
        begun = [[m.name, m.sha256] for m in self.known[: at + 1]]
        name, sha256 = begun[-1] if begun else (None, None)
        order = self.order_digest if self.order_of == (at, epoch) else None
        counters = {"epoch": epoch, "rows": rows, "drawn": self.drawn, "weight": self.config.weight}
        return {
            "generation": name,
            "manifest_sha256": sha256,
            "order": order,
            "generations": begun,
            **counters,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        self.saved = [(name, sha256) for name, sha256 in state["generations"]]
        self.position = Position(state["epoch"], max(0, len(self.saved) - 1), state["rows"])
        self.drawn = state["drawn"]


def _gather(value: Any) -> list[Any]:
    """A value of every rank, by rank. With NCCL the device of this rank must be set before."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
