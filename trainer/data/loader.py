"""Step 3 of a row's way to the loss: global batches, read ahead, for each rank of a training.

plan    which rows the next step takes, the same on every rank (`order`, `source`)
read    the rows of this rank's micro-batches, two steps ahead (`rows`)
next    hand out a step's micro-batches to the loop, which passes them to `model.step`
"""

import queue
import time
from collections import deque
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from stages.storage.catalog import GenerationError, generation_error
from trainer.config import DataConfig
from trainer.data.generations import Manifest, RowShape
from trainer.data.order import (
    OrderSlice,
    Position,
    assign_sources,
    import_streaming,
    micro_batches_per_rank,
    next_slices,
)
from trainer.data.rows import Batch, RowRange, RowRef, read_ahead
from trainer.data.source import Source
from trainer.ranks import Ranks

POLL_SECONDS = 2.0  # between looks at the catalog while waiting


class BatchLoader:
    """The global batches of a run, as the micro-batches of one rank.

    All ranks create one with the same config and state and call its methods in step: rank 0 looks
    up and hashes new generations, the others check them quickly, and a fault on one rank is raised
    on all (`Ranks`). Reading needs no exchange: a row that cannot be read ends its rank, and the
    launcher ends the others.

    A generation is hashed before its first row is read, which stops training for that long if it
    was published after the start. Compressed shards are unpacked beside themselves when first read.
    From an object store each node copies a generation before its first row is planned (until then
    `next` returns nothing), copies the next one while it is read, and removes it once all its rows
    are handed out, unless they will be repeated.

    All generations must have the same `RowShape`. `row_ranges` are the rows that the last step took
    of each run, over all ranks. ValueError for a config or state that does not fit, GenerationError
    for data that does not. Close it, or use it as a context manager.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        rank: int,
        world_size: int,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        global_rows, micro_rows = config.global_batch_rows, config.micro_batch_rows
        self._micro_batches = micro_batches_per_rank(global_rows, micro_rows, world_size)
        if not config.sources:
            raise ValueError("data.sources needs at least one source")
        self._config = config
        self._ranks = Ranks(rank)
        self._sources = [Source(source, config, self._ranks) for source in config.sources]
        self._shape = RowShape()  # of all generations
        self._max_vocab_size: int | None = None
        self._planned: deque[_Plan] = deque()  # steps that are being read
        self._batches: Iterator[Batch] | None = None
        self._closed = False
        self._empty_since: float | None = None
        self.row_ranges: dict[str, list[RowRange]] = {s.run: [] for s in config.sources}
        import_streaming()  # takes seconds: before workers start, each of which would import it
        if state is not None:
            self._load(state)
        for source in self._sources:
            if not self._extend(source) and config.at_end != "wait":
                raise GenerationError(
                    f"{source.run}: expected generations in catalog.jsonl, found none; "
                    "run the pipeline"
                )
        if state is not None:
            self._ranks.agree(partial(self._check_orders, state))
        self._state = self._state_at(0 if state is None else state["step"])

    def __enter__(self) -> "BatchLoader":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop reading ahead; a thread that hangs in a read stays until the process ends."""
        self._batches, self._closed = None, True

    def next(self, step: int) -> list[Batch]:
        """The micro-batches of this rank for `step`, counted from 0; [] on all ranks at the end.

        Rows that do not fill a global batch stay unused: they open the next one when the run goes
        on with more data. GenerationError if a row cannot be read within `batch_timeout_seconds`.
        """
        if self._closed:
            raise ValueError("this loader is closed; create one from its state_dict()")
        if step != self._state["step"]:
            raise ValueError(
                f"asked for step {step}, but the loader stands at {self._state['step']}; "
                "create one from the state of that step"
            )
        for source, state in zip(self._sources, self._state["sources"], strict=True):
            source.copies.advance(len(state["generations"]) - 1)
        # twice: the second finds generations published after the first, reading ahead, met the end
        batches = self._collect() or self._collect()
        if batches:
            plan = self._planned.popleft()
            self._empty_since = None
            self._state, self.row_ranges = plan.state, plan.row_ranges
        return batches

    def should_wait(self) -> bool:
        """After `next` returned nothing: whether to wait for a copy or a new generation.

        For a generation only if `at_end` says so, up to `wait_seconds` by rank 0's clock.
        Collective.
        """
        if self._awaited_source():
            return True
        if self._config.at_end != "wait":
            return False
        self._empty_since = self._empty_since or time.monotonic()
        waited = time.monotonic() - self._empty_since
        return self._ranks.agree(lambda: waited < self._config.wait_seconds)

    def poll(self) -> bool:
        """Sleep for POLL_SECONDS; then whether `next` may return more. Collective."""
        time.sleep(POLL_SECONDS)
        if source := self._awaited_source():
            assert source.copies.waiting_for is not None
            return not source.copies.is_copying(source.copies.waiting_for)
        # a list, not a generator: every rank has to ask for every source
        return any([self._extend(source) for source in self._sources])

    def begun(self) -> dict[str, list[str]]:
        """Names of the generations of each run that this training reads, as far as it knows."""
        return {s.run: [manifest.name for manifest in s.generations] for s in self._sources}

    def left_out(self) -> list[str]:
        """Sentences on generations that this training does not read; on rank 0."""
        return [sentence for source in self._sources for sentence in source.left_out.values()]

    @property
    def seq_len(self) -> int | None:
        """Tokens of a row, None before the first generation is known."""
        return self._shape.seq_len

    @property
    def vocab_size(self) -> int | None:
        """Above all ids of tokens; None before the first generation is known."""
        return self._shape.vocab_size

    def limit_vocabulary(self, size: int) -> None:
        """Have a model of `size` tokens: GenerationError for a larger vocabulary, now or later."""
        self._max_vocab_size = size
        names = [manifest.name for source in self._sources for manifest in source.generations]
        self._check_vocabulary(", ".join(names))

    def state_dict(self) -> dict[str, Any]:
        """The position after the last step handed out (not after what is read ahead), as JSON.

        It is the same on every rank and for any number of ranks.
        """
        return self._state

    # --- plan -------------------------------------------------------------------------------------

    def _plan_batches(self) -> Iterator[list[RowRef]]:
        """The micro-batches of this rank, step by step, until the known generations end."""
        while (plan := self._plan_step()) is not None:
            self._planned.append(plan)
            yield from plan.micro_batches

    def _plan_step(self) -> "_Plan | None":
        """The rows of the next step, or None if they are not published or not copied yet."""
        sources, rows = self._sources, self._config.global_batch_rows
        owners = assign_sources([s.weight for s in sources], [s.num_planned for s in sources], rows)
        counts = np.bincount(owners, minlength=len(sources)).tolist()
        planned = []
        for source, count in zip(sources, counts, strict=True):
            result = self._next_slices(source, count)
            if result is None or not all(
                source.copies.complete(s.gen_index, timeout=POLL_SECONDS) for s in result[0]
            ):
                return None
            planned.append(result)
        row_ranges: dict[str, list[RowRange]] = {source.run: [] for source in sources}
        queues = []
        for source, count, (slices, position) in zip(sources, counts, planned, strict=True):
            source.position, source.num_planned = position, source.num_planned + count
            row_ranges[source.run] += source.row_ranges(slices)
            queues.append(source.row_refs(slices))
        refs = [next(queues[owner]) for owner in owners]
        size = self._config.micro_batch_rows
        rank_rows = self._micro_batches * size
        first = self._ranks.rank * rank_rows
        micro_batches = [refs[i : i + size] for i in range(first, first + rank_rows, size)]
        state = self._state_at(self._state["step"] + len(self._planned) + 1)
        return _Plan(micro_batches, row_ranges, state)

    def _next_slices(self, source: Source, count: int) -> tuple[list[OrderSlice], Position] | None:
        """The next rows of a source and its position after them, without moving it."""

        def slices(epochs: int) -> tuple[list[OrderSlice], Position] | None:
            sizes = [generation.rows for generation in source.generations]
            return next_slices(sizes, source.position, count, epochs=epochs)

        epochs = source.position.epoch + 1
        while (result := slices(epochs)) is None and self._extend(source):
            pass
        if result is None and self._config.at_end == "repeat":
            result = slices(self._config.max_epochs)
        return result

    def _awaited_source(self) -> Source | None:
        """The source whose copy has to end before rows can be planned."""
        return next((s for s in self._sources if s.copies.waiting_for is not None), None)

    def _extend(self, source: Source) -> bool:
        """Add newly published generations to a source; whether there were any. Collective."""
        new = source.extend()
        for manifest in new:
            self._check_shape(manifest)
        return bool(new)

    def _check_shape(self, manifest: Manifest) -> None:
        """GenerationError unless a generation is like those before, and fits the model."""
        shape = manifest.shape
        if different := self._shape.differences(shape):
            raise generation_error(
                manifest.name,
                "manifest.json",
                expected=f"{self._shape.describe(different)}, as in this run so far",
                found=shape.describe(different),
                do="leave it out of `generations`, or pack it like those before",
            )
        self._shape = self._shape.completed(shape)
        self._check_vocabulary(manifest.name)

    def _check_vocabulary(self, name: str) -> None:
        size, limit = self._shape.vocab_size, self._max_vocab_size
        if size is not None and limit is not None and size > limit:
            raise generation_error(
                name,
                "manifest.json",
                expected=f"at most model.vocab_size = {limit} tokens",
                found=f"{size} of tokenizer {self._shape.tokenizer}",
                do="enlarge it, or leave it out: then it is that of the generation",
            )

    # --- read -------------------------------------------------------------------------------------

    def _collect(self) -> list[Batch]:
        """The micro-batches of the next step, [] at the end of the known generations."""
        config, batches = self._config, list[Batch]()
        try:
            if self._batches is None:  # not `or`: torch's iterator has no length
                self._batches = read_ahead(
                    self._plan_batches(),
                    ahead=2 * self._micro_batches,
                    workers=config.workers,
                    timeout=config.batch_timeout_seconds,
                )
            while len(batches) < self._micro_batches:
                batches.append(next(self._batches))
        except StopIteration:
            self._batches = None
        except GenerationError as error:
            self.close()
            # Drop the frames, which hold torch's loader: it is gone now, and its workers with it.
            # In a reference cycle, which torch makes of the error, the garbage collector would end
            # it, which takes 10 s.
            raise error.with_traceback(None) from None
        except (queue.Empty, RuntimeError) as error:  # see read_ahead
            if not self._planned:
                raise  # an exchange between ranks failed, before anything was read
            timeout = self._timeout_error(self._planned[0].micro_batches[len(batches)], error)
            self.close()
            error.with_traceback(None)
            raise timeout from error
        return batches

    def _timeout_error(self, refs: list[RowRef], error: Exception) -> GenerationError:
        rows = [f"{ref.generation}:{ref.row}" for ref in refs]
        return generation_error(
            refs[0].generation,
            f"rows {', '.join(rows[:4] + ['...'] * (len(rows) > 4))}",
            expected=f"a batch within {self._config.batch_timeout_seconds:g} s",
            found=str(error) or "none",
            do="check that the disk responds, or raise batch_timeout_seconds",
        )

    # --- state ------------------------------------------------------------------------------------

    def _state_at(self, step: int) -> dict[str, Any]:
        return {
            "step": step,
            "shuffle_seed": self._config.shuffle_seed,
            "canonical_nodes": self._config.canonical_nodes,
            **self._shape._asdict(),
            "sources": [source.state() for source in self._sources],
        }

    def _load(self, state: Mapping[str, Any]) -> None:
        for key in ("shuffle_seed", "canonical_nodes"):
            value = getattr(self._config, key)
            if state[key] != value:
                raise ValueError(
                    f"the checkpoint's order has {key}={state[key]}, the config {value}; restore it"
                )
        saved = state["sources"]
        if len(saved) != len(self._sources):
            raise ValueError(
                f"the checkpoint has {len(saved)} sources, the config {len(self._sources)}; "
                "restore them"
            )
        # a checkpoint of an earlier version has only the first two
        self._shape = RowShape(*map(state.get, RowShape._fields))
        for source, values in zip(self._sources, saved, strict=True):
            source.load(values)
        if [source.weight for source in self._sources] != [values["weight"] for values in saved]:
            for source in self._sources:
                source.num_planned = 0  # new shares do not make up for the old ones

    def _check_orders(self, state: Mapping[str, Any]) -> None:
        for source, values in zip(self._sources, state["sources"], strict=True):
            source.check_order(values)


class _Plan(NamedTuple):
    """A step that is being read: this rank's rows, those of all ranks, and the state after it."""

    micro_batches: list[list[RowRef]]
    row_ranges: dict[str, list[RowRange]]
    state: dict[str, Any]
