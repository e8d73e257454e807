"""Evaluation during training: loss on rows that `pack` held out, on other named sets of rows, and
multiple-choice questions.

Every forward pass is a collective under FSDP, so all ranks make the same number of them, some with
nothing but fill.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from stages.formats.errors import ConfigError
from stages.formats.tokenizer import Tokenizer
from stages.storage.catalog import entries_to_read, read_catalog
from trainer.config import DataConfig, EvaluationConfig, HeldOutConfig
from trainer.data.generations import (
    Manifest,
    documents_from,
    load_generation_tokenizer,
    verify_generation,
    verify_held_out,
    verify_whole,
)
from trainer.data.rows import Batch, RowRef, read_batch
from trainer.evaluate.cloze import ClozeScore, Question, read_questions, score_answers
from trainer.model.llama import Transformer
from trainer.ranks import Ranks

_LOG = logging.getLogger(__name__)


class Scores(NamedTuple):
    """Results of an evaluation.

    `loss` in nats per held-out target over all sources, over the named sets where no source has
    held anything out (None if there are none either). `sources` by run, `sets` by name, `cloze` by
    the name of the file of questions.
    """

    loss: float | None
    sources: dict[str, float]
    sets: dict[str, float]
    cloze: dict[str, ClozeScore]

    def figures(self) -> dict[str, float]:
        """For telemetry: held_out/loss, held_out/perplexity, held_out/RUN/loss and NAME/loss,
        cloze/NAME/…
        """
        losses = {run.lstrip("/"): loss for run, loss in self.sources.items()} | self.sets
        figures = {f"held_out/{name}/loss": loss for name, loss in losses.items()}
        if self.loss is not None:
            figures["held_out/loss"] = self.loss
            figures["held_out/perplexity"] = float(np.exp(np.float64(self.loss)))
        return figures | {
            f"cloze/{name}/{key}": value
            for name, score in self.cloze.items()
            for key, value in score._asdict().items()
        }


class EvalRows(NamedTuple):
    """int64 [rows, seq_len] each: `tokens` and `documents` as in a Batch.

    `endings` is the number of the ending to which the next token belongs, -1 for none.
    """

    tokens: Tensor
    documents: Tensor
    endings: Tensor


class Evaluation:
    """Evaluates a model on rows and questions that rank 0 reads and checks once. All is collective.

    If a source has not published anything yet, rows and tokenizer are read at a later `run`.
    `begun` are the generations of each run that the training reads, whatever supersedes them.
    ConfigError for a wrong file of questions, GenerationError for rows that are not what was
    published.
    """

    def __init__(
        self,
        config: EvaluationConfig,
        data: DataConfig,
        *,
        device: str,
        begun: Mapping[str, Sequence[str]] = MappingProxyType({}),
    ) -> None:
        self._config, self._data, self._device, self._begun = config, data, device, begun
        self._ranks = Ranks()
        self._questions = self._ranks.on_first(
            partial(read_questions, config.cloze, config.cloze_questions)
        )
        self._rows = self._read_rows()

    def _read_rows(self) -> "_RowSets | None":
        rows = self._ranks.on_first(
            partial(_read_row_sets, self._config, self._data, self._questions, self._begun)
        )
        if rows and self._ranks.leads and self._config.held_out_rows and not rows.sources:
            _LOG.warning(
                "no source has held anything out: there is no held-out loss; set pack.held_out"
            )
        return rows

    @torch.no_grad()
    def run(self, model: Transformer) -> Scores:
        """Score a model; its weights, gradients and mode and the random state do not change."""
        self._rows = rows = self._rows or self._read_rows()
        if rows is None:
            return Scores(None, {}, {}, {})
        training = model.training
        model.eval()
        sums = [self._sum_loss(model, r) for r in (*rows.sources.values(), *rows.sets.values())]
        cloze = {
            name: self._score_cloze(model, of_file, self._questions[name])
            for name, of_file in rows.cloze.items()
        }
        model.train(training)
        if not sums:
            return Scores(None, {}, {}, cloze)
        total = torch.stack(sums)
        dist.all_reduce(total)
        nats, targets = total.cpu().unbind(1)
        losses, num_sources = (nats / targets).tolist(), len(rows.sources)
        whole = slice(num_sources or None)
        return Scores(
            float(nats[whole].sum() / targets[whole].sum()),
            dict(zip(rows.sources, losses, strict=False)),
            dict(zip(rows.sets, losses[num_sources:], strict=True)),
            cloze,
        )

    def _sum_loss(self, model: Transformer, rows: EvalRows) -> Tensor:
        """This rank's nats and targets, float64 (2,)."""
        sums = torch.zeros(2, dtype=torch.float64, device=self._device)
        for tokens, documents, _ in self._rank_batches(rows):
            loss = model.loss(tokens, documents)
            sums += torch.stack([loss.sum, loss.targets])
        return sums

    def _score_cloze(
        self, model: Transformer, rows: EvalRows, questions: Sequence[Question]
    ) -> ClozeScore:
        likelihoods = torch.zeros(
            sum(len(q.endings) for q in questions), dtype=torch.float64, device=self._device
        )
        for tokens, documents, endings in self._rank_batches(rows):
            # the next token of these positions belongs to an ending
            nats = model.loss(tokens, documents).nats.double() * (endings >= 0)
            likelihoods.index_add_(0, endings.clamp(min=0).flatten(), -nats.flatten())
        dist.all_reduce(likelihoods)
        return score_answers(questions, likelihoods.tolist())

    def _rank_batches(self, rows: EvalRows) -> Iterator[EvalRows]:
        # one shape, and never `packed_documents`: a compiled block needs another graph for every
        # other kind of batch
        size, ranks = self._data.micro_batch_rows, self._ranks
        for batch in rank_batches(rows, size=size, rank=ranks.rank, world_size=ranks.count):
            yield EvalRows(*(part.to(self._device) for part in batch))


def rank_batches(rows: EvalRows, *, size: int, rank: int, world_size: int) -> Iterator[EvalRows]:
    """A rank's micro-batches of `size` rows, as many for every rank, padded with rows of fill."""
    padding = -len(rows.tokens) % (size * world_size)
    parts = (
        F.pad(part, (0, 0, 0, padding), value=fill)
        for part, fill in zip(rows, (0, -1, -1), strict=True)
    )
    return map(EvalRows, *(torch.split(part, size)[rank::world_size] for part in parts))


class _RowSets(NamedTuple):
    sources: dict[str, EvalRows]  # held out, by run
    sets: dict[str, EvalRows]  # by name
    cloze: dict[str, EvalRows]  # by name


def _read_row_sets(
    config: EvaluationConfig,
    data: DataConfig,
    questions: Mapping[str, Sequence[Question]],
    begun: Mapping[str, Sequence[str]],
) -> _RowSets | None:
    """None if a source has not published anything yet."""
    cache = data.cache_dir
    entries_by_run = {
        s.run: _catalog_entries(s.run, s.generations, begun.get(s.run, ())) for s in data.sources
    }
    if not all(entries_by_run.values()):
        return None
    sources = {}
    if config.held_out_rows:
        for run, entries in entries_by_run.items():
            if split := _first_split(run, "held_out", entries, cache=cache):
                sources[run] = _first_rows(split, config.held_out_rows, cache=cache)
    run, entries = next(iter(entries_by_run.items()))
    first = verify_generation(run, entries[0], mode="quick", cache=cache)
    sets = {
        name: _read_set(f"evaluation.held_out.{name}", rows, first, cache=cache)
        for name, rows in config.held_out.items()
    }
    if not questions:
        return _RowSets(sources, sets, {})
    tokenizer = load_generation_tokenizer(run, entries[0], cache=cache)
    begin = bool(first.shape.add_begin_of_text)
    pack = partial(pack_endings, tokenizer=tokenizer, begin_of_text=begin, seq_len=first.seq_len)
    cloze = {name: pack(name, of_file) for name, of_file in questions.items()}
    return _RowSets(sources, sets, cloze)


def _read_set(key: str, config: HeldOutConfig, sources: Manifest, *, cache: str) -> EvalRows:
    """The rows of a named set. ConfigError, which names its `key`, if it has none or other ones
    than `sources`, a generation of those trained on.
    """
    run, split_name = config.run, config.split
    entries = _catalog_entries(run, config.generations, ())
    split = _first_split(run, split_name, entries, cache=cache)
    if split is None:
        hint = "; of a run that is not trained on, split = 'training' takes all rows"
        raise ConfigError(
            f"{key}: no generation of {run} has rows in its split {split_name!r}"
            f"{hint if entries and split_name == 'held_out' else ''}"
        )
    if different := split.shape.differences(sources.shape):
        theirs, ours = split.shape.describe(different), sources.shape.describe(different)
        raise ConfigError(
            f"{key}: {run} was packed with {theirs}, the sources with {ours}: losses cannot be "
            "compared; pack it again"
        )
    if not config.hosts:
        return _first_rows(split, config.rows, cache=cache)
    documents = _first_documents(split, config, cache=cache)
    if not documents:
        raise ConfigError(f"{key}.hosts: {split.name} of {run} has no document from them")
    return _pack(documents, [0] * len(documents), seq_len=split.seq_len)


def _first_split(
    run: str, split: str, entries: Sequence[dict[str, Any]], *, cache: str
) -> Manifest | None:
    """That split, verified, of the first generation that has rows in it; None if none has."""
    verify = verify_held_out if split == "held_out" else verify_whole
    return next(filter(None, (verify(run, entry, cache=cache) for entry in entries)), None)


def _first_rows(split: Manifest, limit: int, *, cache: str) -> EvalRows:
    batch = _read(split, range(min(limit, split.rows)), cache=cache)
    return EvalRows(batch.tokens, batch.documents, torch.full_like(batch.tokens, -1))


def _first_documents(split: Manifest, config: HeldOutConfig, *, cache: str) -> list[Any]:
    """Tokens of documents from `hosts`, as many as fill `rows` rows; a document that was cut is as
    many as its pieces.
    """
    found, left = list[Any](), config.rows * split.seq_len
    for row, spans in groupby(documents_from(split.run, split.name, config.hosts), lambda d: d.row):
        tokens = _read(split, [row], cache=cache).tokens[0].numpy()
        for span in spans:
            found.append(tokens[span.start : span.start + span.length])
            left -= span.length
            if left <= 0:
                return found
    return found


def _read(split: Manifest, rows: Iterable[int], *, cache: str) -> Batch:
    return read_batch([RowRef(split.run, split.name, split.rows, row, cache) for row in rows])


def _catalog_entries(
    run: str, generations: Sequence[str], begun: Sequence[str]
) -> list[dict[str, Any]]:
    """As the loader reads them: what one generation holds out may be in another's training."""
    entries = read_catalog(run)
    if not generations:
        return entries_to_read(entries, begun)
    by_name = {entry["name"]: entry for entry in entries}
    return [by_name[name] for name in generations if name in by_name]


def pack_endings(
    name: str,
    questions: Sequence[Question],
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    begin_of_text: bool = False,
) -> EvalRows:
    """Pack each ending after its context as one document, as in training.

    A context that is too long is cut at its beginning. An ending is the tokens of both texts
    together after as many as the context alone has; a vocabulary that splits before spaces gives
    the context the same ones. ConfigError for an ending that does not fit in a row.
    """
    documents, lengths = list[Any](), list[int]()
    for number, question in enumerate(questions, 1):
        texts = [question.context, *(f"{question.context} {e}" for e in question.endings)]
        context, *wholes = tokenizer.encode_documents(texts, begin_of_text=begin_of_text)
        for document in wholes:
            length = max(1, len(document) - len(context))
            if length >= seq_len:
                raise ConfigError(
                    f"evaluation.cloze: {name}: question {number} has an ending longer than a row, "
                    f"{seq_len} tokens"
                )
            documents.append(document[:-1][-seq_len:])  # what comes next is not asked
            lengths.append(length)
    return _pack(documents, lengths, seq_len=seq_len, fill=tokenizer.end_of_text)


def _pack(
    documents: Sequence[Any], endings: Sequence[int], *, seq_len: int, fill: int = 0
) -> EvalRows:
    """Rows of documents, of which the last `endings` tokens are one, each."""
    from stages.formats.tokens import best_fit

    packed = list(best_fit(documents, seq_len=seq_len, fill=fill))
    tokens = np.stack([row.tokens for row in packed]).astype(np.int64)
    document_of, ending_of = np.full_like(tokens, -1), np.full_like(tokens, -1)
    for n, row in enumerate(packed):
        for document, span in enumerate(row.spans):
            end = span.start + span.length
            document_of[n, span.start : end] = document
            ending_of[n, end - endings[span.document] - 1 : end - 1] = span.document
    return EvalRows(*map(torch.from_numpy, (tokens, document_of, ending_of)))
