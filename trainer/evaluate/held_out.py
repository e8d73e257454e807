"""Evaluation during training: the loss on rows that `pack` held out, and multiple-choice questions
(trainer/cloze.py).

Every forward pass is a collective under FSDP, so all ranks make the same number of them, some of
fill alone.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stages.formats.errors import ConfigError
from stages.storage.catalog import read_catalog
from trainer.config import DataConfig, EvaluationConfig, SourceConfig
from trainer.data.generations import verify_generation, verify_held_out
from trainer.data.rows import RowRef, read_batch
from trainer.evaluate.cloze import ClozeScore, Question, read_questions, score_answers
from trainer.model.llama import Transformer
from trainer.model.packing import next_tokens
from trainer.model.parallel import from_rank_0, sum_over_ranks

_LOG = logging.getLogger(__name__)


class Scores(NamedTuple):
    """Loss in nats a held-out target, over all sources (None: nothing is held out) and by run;
    cloze by the name of its file.
    """

    loss: float | None
    sources: dict[str, float]
    cloze: dict[str, ClozeScore]

    def figures(self) -> dict[str, float]:
        """For telemetry: held_out/loss, held_out/perplexity, held_out/RUN/loss, cloze/NAME/accuracy
        and Cloze's other fields.
        """
        found = {f"held_out/{run.lstrip('/')}/loss": loss for run, loss in self.sources.items()}
        if self.loss is not None:
            found |= {
                "held_out/loss": self.loss,
                "held_out/perplexity": float(np.exp(np.float64(self.loss))),
            }
        return found | {
            f"cloze/{name}/{key}": x
            for name, cloze in self.cloze.items()
            for key, x in cloze._asdict().items()
        }


class EvalRows(NamedTuple):
    """int64 [rows, seq_len]: two as in a Batch, and the number of the ending whose token comes
    next, -1 for none.
    """

    tokens: Tensor
    documents: Tensor
    endings: Tensor


class Evaluation:
    """What a run is judged by, read and checked once, by rank 0. Making one is a collective, as is
    `run`.

    As long as a source has published nothing, what is held out and the tokenizer are looked up at
    the next `run` instead. ConfigError for a file of questions that cannot be asked,
    GenerationError for rows that are not what was published.
    """

    def __init__(
        self, config: EvaluationConfig, data: DataConfig, *, rank: int, world_size: int, device: str
    ) -> None:
        self._config, self._data, self._device = config, data, device
        self._rank, self._world = rank, world_size
        self._questions = from_rank_0(lambda: read_questions(config.cloze, config.cloze_questions))
        self._rows = self._prepared()

    def _prepared(self) -> "_Prepared | None":
        made = from_rank_0(lambda: _prepare(self._config, self._data, self._questions))
        if made and self._rank == 0 and self._config.held_out_rows and not made.held_out:
            _LOG.warning(
                "no source has held anything out: there is no held-out loss; set pack.held_out"
            )
        return made

    @torch.no_grad()
    def run(self, model: Transformer) -> Scores:
        """The scores of a model; its weights, gradients and mode, and the random state, stay as
        they are.
        """
        self._rows = self._rows or self._prepared()
        if self._rows is None:
            return Scores(None, {}, {})
        training = model.training
        model.eval()
        sums = [x for rows in self._rows.held_out.values() for x in self._nats(model, rows)]
        cloze = {
            name: self._cloze(model, rows, self._questions[name])
            for name, rows in self._rows.cloze.items()
        }
        model.train(training)
        if not sums:
            return Scores(None, {}, cloze)
        nats, targets = sum_over_ranks(*sums, device=self._device).cpu().view(-1, 2).unbind(1)
        sources = dict(zip(self._rows.held_out, (nats / targets).tolist(), strict=True))
        return Scores(float(nats.sum() / targets.sum()), sources, cloze)

    def _nats(self, model: Transformer, rows: EvalRows) -> Tensor:
        """This rank's nats and targets, float64 (2,)."""
        sums = torch.zeros(2, dtype=torch.float64, device=self._device)
        for tokens, documents, _ in self._mine(rows, size=self._data.micro_batch_rows):
            loss = model.loss(tokens, documents)
            sums += torch.stack([loss.sum, loss.targets])
        return sums

    def _cloze(
        self, model: Transformer, rows: EvalRows, questions: Sequence[Question]
    ) -> ClozeScore:
        likelihoods = torch.zeros(
            sum(len(q.endings) for q in questions), dtype=torch.float64, device=self._device
        )
        # a row at a time: its logits exist all at once, 0.8 GB for 2,048 tokens in float32
        for tokens, documents, endings in self._mine(rows, size=1):
            logits_BSV, asked = model(tokens, documents), endings >= 0
            nats = F.cross_entropy(
                logits_BSV[asked].float(), next_tokens(tokens, documents)[asked], reduction="none"
            )
            likelihoods.index_add_(0, endings[asked], -nats.double())
        return score_answers(questions, sum_over_ranks(*likelihoods, device=self._device).tolist())

    def _mine(self, rows: EvalRows, *, size: int) -> Iterator[EvalRows]:
        # one shape for each use, and never `packed_documents`: of a compiled block every other kind of
        # batch is a graph more
        for batch in rank_batches(rows, size=size, rank=self._rank, world_size=self._world):
            yield EvalRows(*(part.to(self._device) for part in batch))


def rank_batches(rows: EvalRows, *, size: int, rank: int, world_size: int) -> Iterator[EvalRows]:
    """A rank's micro-batches, all of `size` rows, and as many for every rank: what is short is
    fill.
    """
    short = -len(rows.tokens) % (size * world_size)
    parts = (
        F.pad(part, (0, 0, 0, short), value=fill)
        for part, fill in zip(rows, (0, -1, -1), strict=True)
    )
    return map(EvalRows, *(torch.split(part, size)[rank::world_size] for part in parts))


class _Prepared(NamedTuple):
    held_out: dict[str, EvalRows]  # by run
    cloze: dict[str, EvalRows]  # by name


def _prepare(
    config: EvaluationConfig, data: DataConfig, questions: Mapping[str, Sequence[Question]]
) -> _Prepared | None:
    """None as long as a source has published nothing."""
    listed = {source.run: _listed(source) for source in data.sources}
    if not all(listed.values()):
        return None
    held_out = {}
    for run, entries in listed.items() if config.held_out_rows > 0 else ():
        part = next(
            filter(None, (verify_held_out(run, entry, cache=data.cache_dir) for entry in entries)),
            None,
        )
        if part:
            count = min(config.held_out_rows, part.rows)
            batch = read_batch(
                [RowRef(run, part.name, part.rows, row, data.cache_dir) for row in range(count)]
            )
            held_out[run] = EvalRows(
                batch.tokens, batch.documents, torch.full_like(batch.tokens, -1)
            )
    cloze = {}
    if questions:
        from stages.formats.tokens import (
            load_encoding,  # for questions alone a trainer needs tiktoken
        )

        run, entries = next(iter(listed.items()))
        shape = verify_generation(run, entries[0], mode="quick", cache=data.cache_dir)
        encoding = load_encoding(shape.tokenizer)
        cloze = {
            name: pack_endings(name, asked, encoding, seq_len=shape.seq_len)
            for name, asked in questions.items()
        }
    return _Prepared(held_out, cloze)


def _listed(source: SourceConfig) -> list[dict[str, Any]]:
    named = {entry["name"]: entry for entry in read_catalog(source.run)}
    return [named[name] for name in source.generations or named if name in named]


def pack_endings(
    name: str, questions: Sequence[Question], encoding: Any, *, seq_len: int
) -> EvalRows:
    """Each ending after its context as a document of its own, packed as in training; a long context
    loses its beginning.

    Context and ending are tokenised apart: by a vocabulary that splits before spaces they have the
    same tokens together. ConfigError for an ending that does not fit in a row.
    """
    from stages.formats.tokens import best_fit

    documents, lengths = list[Any](), list[int]()
    for number, question in enumerate(questions, 1):
        context = encoding.encode_ordinary(question.context)
        for ending in (encoding.encode_ordinary(f" {ending}") for ending in question.endings):
            if len(ending) >= seq_len:
                raise ConfigError(
                    f"evaluation.cloze: {name}: question {number} has an ending longer than a row, {seq_len} tokens"
                )
            documents.append(np.array([*context, *ending][-seq_len:], np.uint32))
            lengths.append(len(ending))
    packed = list(best_fit(documents, seq_len=seq_len, fill=encoding.eot_token))
    tokens = np.stack([row.tokens for row in packed]).astype(np.int64)
    document_of, endings = np.full_like(tokens, -1), np.full_like(tokens, -1)
    for n, row in enumerate(packed):
        for document, span in enumerate(row.spans):
            end = span.start + span.length
            document_of[n, span.start : end] = document
            endings[n, end - lengths[span.document] - 1 : end - 1] = span.document
    return EvalRows(*map(torch.from_numpy, (tokens, document_of, endings)))
