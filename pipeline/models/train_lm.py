"""Train the language model of the filter `perplexity` with KenLM's `lmplz`.

Text is normalized as the filter does. It streams from its sources into a scratch file for training
and one for held-out documents. A corpus may be larger than memory; the temporary folder ($TMPDIR)
must have room for it about four times, and lmplz sorts in `memory`.
"""

import io
import math
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from filters.model_card import digest
from filters.perplexity import score
from filters.text import ccnet
from pipeline.models.model_card import (
    check_split,
    command_line,
    is_held_out,
    replacing,
    versions,
    write_card,
)
from pipeline.models.training_texts import Source, check_where, fingerprint

MAX_ORDER = 6  # of the package ufal.kenlm, as it was compiled
PERCENTILES = (5, 25, 50, 75, 95)
# the most lines that SentencePiece learns from: limits its time and memory; more was not tried
SAMPLE_LINES = 200_000


def train_lm(
    sources: Sequence[str | Path],
    *,
    output: Path,
    licence: str,
    where: str = "",
    order: int = 5,
    prune: tuple[int, ...] | None = None,
    memory: str = "1G",
    bits: int = 8,
    sentencepiece: int = 0,
    sentencepiece_model: Path | None = None,
    lmplz_options: tuple[str, ...] = (),
    held_out: float = 0.02,
    text_column: str = "text",
    kenlm_bin: Path | None = None,
) -> dict[str, Any]:
    """Train a KenLM model with `lmplz` for the filter `perplexity`; returns its card.

    `where` is an SQL condition on the rows of runs among the sources. `prune` drops n-grams seen at
    most so often, one count per order, the last one for all higher orders; None is 0,0,1 up to
    `order`. The model is a trie, its probabilities and back-offs of `bits` (0: not quantized).
    Tokens are words and punctuation; or pieces of a SentencePiece model, which is trained to a
    vocabulary of `sentencepiece` or given. `held_out` is the share of documents kept out of
    training. `lmplz_options` are passed to lmplz unchanged.
    """
    if sentencepiece and sentencepiece_model:
        raise ValueError("sentencepiece and sentencepiece_model: train one or give one, not both")
    if not 0 <= bits <= 25:
        raise ValueError(f"bits = {bits}: must be 0 (not quantized) to 25")
    prune = _checked_prune(prune, order=order)
    check_where(where, sources)
    kenlm = find_kenlm(kenlm_bin)
    use_pieces = bool(sentencepiece or sentencepiece_model)
    spm = Path(f"{output}.spm")
    with (
        replacing(output, spm, sources=sources) as (model, new_spm),
        tempfile.TemporaryDirectory() as scratch,
    ):
        if sentencepiece_model:
            _check_sentencepiece(sentencepiece_model)
            shutil.copyfile(sentencepiece_model, new_spm)
        readers = [Source(name, text_column=text_column, where=where) for name in sources]
        texts = _write_texts(readers, Path(scratch), held_out=held_out, use_pieces=use_pieces)
        if sentencepiece:
            _train_sentencepiece(texts.train, new_spm, size=sentencepiece)
        texts = _split_into_pieces(texts, new_spm) if use_pieces else texts
        # --discount_fallback acts only where a small text leaves the Kneser-Ney discounts undefined
        estimate = ("-o", order, "-S", memory, "--prune", *prune, "--discount_fallback")
        options = [str(option) for option in (*estimate, *lmplz_options)]
        arpa = Path(scratch, "arpa")
        _call(kenlm.lmplz, *options, "-T", scratch, "--text", texts.train, "--arpa", arpa)
        quantize = ("-q", bits, "-b", bits) if bits else ()
        _call(kenlm.build_binary, *quantize, "-S", memory, "-T", scratch, "trie", arpa, model)
        measured = _measure(texts.held_out, model=model)
        pieces = {"sentencepiece": _describe_sentencepiece(new_spm)} if use_pieces else {}
    arguments = {"output": output, "licence": licence, "where": where or None, "order": order,
                 "prune": prune, "memory": memory, "bits": bits,
                 "sentencepiece": sentencepiece or None, "sentencepiece_model": sentencepiece_model,
                 "lmplz_option": list(lmplz_options), "held_out": held_out,
                 "text_column": text_column}  # fmt: skip
    card = write_card(
        output,
        kind="kenlm",
        normalizer=ccnet.PIECES if use_pieces else ccnet.WORDS,
        licence=licence,
        command=command_line("train-lm", *sources, **arguments),
        versions=versions("ufal.kenlm", *(["sentencepiece"] if use_pieces else [])),
        # it prints no version of its own
        lmplz={"sha256": digest(Path(kenlm.lmplz)), "options": options},
        corpus=fingerprint(texts.sources),
        sources=texts.sources,
        train=texts.counts,
        held_out=measured,
        **pieces,
    )
    _print_summary(card)
    return card


def _checked_prune(prune: tuple[int, ...] | None, *, order: int) -> tuple[int, ...]:
    if not 2 <= order <= MAX_ORDER:
        raise ValueError(f"order = {order}: must be from 2 to {MAX_ORDER}, which KenLM can load")
    prune = (0, 0, 1)[:order] if prune is None else prune
    if not 1 <= len(prune) <= order or min(prune) < 0 or list(prune) != sorted(prune):
        counts = ",".join(map(str, prune))
        raise ValueError(
            f"prune = {counts}: must be 1 to {order} counts for order = {order}, 0 or more, "
            "none below the one before"
        )
    return prune


# --- texts ----------------------------------------------------------------------------------------


class ScratchTexts(NamedTuple):
    """Scratch files of lines, and their counts; blank lines separate documents in `held_out`."""

    train: Path
    held_out: Path
    counts: dict[str, int]
    sources: list[dict[str, Any]]


def _write_texts(
    sources: Sequence[Source], scratch: Path, *, held_out: float, use_pieces: bool
) -> ScratchTexts:
    """Read and normalize everything once. Lines are not yet split into pieces: the SentencePiece
    model may have to learn from them first.
    """
    normalize = ccnet.plain if use_pieces else ccnet.words
    train, held = scratch / "train", scratch / "held_out"
    documents = num_lines = num_tokens = num_held_out = 0
    entries = []
    with train.open("wb") as train_file, held.open("wb") as held_out_file:
        for source in sources:
            words = 0
            for text in source:
                normalized = normalize(text)
                lines, tokens = _filled_lines(normalized), sum(normalized.tokens)
                words += tokens
                if is_held_out(text, share=held_out):
                    held_out_file.writelines([*lines, b"\n"])
                    num_held_out += 1
                else:
                    train_file.writelines(lines)
                    documents += 1
                    num_lines += len(lines)
                    num_tokens += tokens
            entries.append(source.entry(words=words))
    names = [source.name for source in sources]
    check_split(num_held_out, documents, held_out=held_out, sources=names)
    counts = {"documents": documents, "lines": num_lines, "tokens": num_tokens}
    return ScratchTexts(train, held, counts, entries)


def _filled_lines(normalized: ccnet.Lines) -> list[bytes]:
    return [
        line.strip() + b"\n"
        for line, tokens in zip(normalized.lines, normalized.tokens, strict=True)
        if tokens
    ]


# --- SentencePiece --------------------------------------------------------------------------------


def _check_sentencepiece(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"sentencepiece_model {path}: no such file")
    try:
        _describe_sentencepiece(path)
    except RuntimeError as error:
        raise ValueError(
            f"sentencepiece_model {path}: not a SentencePiece model ({error})"
        ) from None


def _train_sentencepiece(text: Path, output: Path, *, size: int) -> None:
    """Train a unigram model of at most `size` pieces on a sample of the lines.

    On one thread, from memory: the same text gives the same bytes.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sample_lines(text, limit=SAMPLE_LINES)), model_writer=model,
            model_type="unigram", vocab_size=size, hard_vocab_limit=False,
            normalization_rule_name="identity", max_sentence_length=1 << 16, num_threads=1,
            minloglevel=2,
        )  # fmt: skip
    except RuntimeError as error:
        raise ValueError(
            f"sentencepiece = {size}: {error}; give more text or a smaller vocabulary"
        ) from None
    output.write_bytes(model.getvalue())


def sample_lines(text: Path, *, limit: int) -> list[str]:
    """At most `limit` lines of a file, all if it has no more, else about half of `limit` or more.

    A line is drawn if its hash lies below a threshold, which is halved whenever too many are kept:
    one pass and the memory of the sample suffice.
    """
    threshold, sample = 1 << 64, list[tuple[int, str]]()
    with text.open("rb") as file:
        for number, line in enumerate(file):
            # seeded by the number, so that a repeated line is not drawn more often or less
            hash_ = xxhash.xxh3_64_intdigest(line, seed=number)
            if hash_ >= threshold:
                continue
            sample.append((hash_, line.decode().rstrip("\n")))
            while len(sample) > limit:
                threshold //= 2
                sample = [(h, line) for h, line in sample if h < threshold]
    return [line for _, line in sample]


def _split_into_pieces(texts: ScratchTexts, spm: Path) -> ScratchTexts:
    splitter = ccnet.Splitter(str(spm))
    train, held_out = (path.with_name(f"{path.name}.pieces") for path in texts[:2])
    tokens = _copy_in_pieces(texts.train, train, splitter)
    _copy_in_pieces(texts.held_out, held_out, splitter)
    counts = texts.counts | {"tokens": tokens}
    return texts._replace(train=train, held_out=held_out, counts=counts)


def _copy_in_pieces(source: Path, target: Path, splitter: ccnet.Splitter) -> int:
    """Write the lines of `source` in pieces to `target`, and delete `source`; number of pieces."""
    count = 0
    with source.open("rb") as lines, target.open("wb") as output:
        for line in lines:
            pieces = b" ".join(map(splitter.__getitem__, line.split()))
            if pieces or line == b"\n":  # a given SentencePiece model may drop all of a line
                output.write(pieces + b"\n")
                count += len(pieces.split())
    source.unlink()
    return count


def _describe_sentencepiece(spm: Path) -> dict[str, Any]:
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(spm)).get_piece_size()
    return {"sha256": digest(spm), "pieces": pieces}


# --- KenLM ----------------------------------------------------------------------------------------


class Kenlm(NamedTuple):
    """Paths of KenLM's programs."""

    lmplz: str
    build_binary: str


def find_kenlm(folder: Path | None) -> Kenlm:
    """KenLM's programs in `folder`, else $GRISTMILL_KENLM_BIN, else .kenlm/bin, else on PATH."""
    chosen = folder or os.environ.get("GRISTMILL_KENLM_BIN")
    for path in (str(chosen),) if chosen else (str(Path(".kenlm", "bin")), None):
        lmplz, build_binary = (shutil.which(name, path=path) for name in Kenlm._fields)
        if lmplz and build_binary:
            return Kenlm(lmplz, build_binary)
    raise ValueError(
        f"KenLM's lmplz and build_binary: not found in {chosen or '.kenlm/bin and on PATH'}; build "
        "them with `make kenlm` (tools/build_kenlm.sh), or set $GRISTMILL_KENLM_BIN to their folder"
    )


def _call(*command: Any) -> None:
    done = subprocess.run(
        list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    if done.returncode:
        last_lines = "\n".join(done.stderr.splitlines()[-10:])
        name = Path(str(command[0])).name
        raise ValueError(f"{name} ended with status {done.returncode}:\n{last_lines}")


# --- held-out documents ---------------------------------------------------------------------------


def _measure(held_out: Path, *, model: Path) -> dict[str, Any]:
    """Perplexity of all held-out tokens together, and percentiles of the documents' own."""
    import kenlm

    lm = kenlm.Model(str(model))
    perplexities, tokens, lines, log10 = list[float](), 0, 0, 0.0
    for document in _held_out_documents(held_out):
        scored = score(document, lm, window=1)
        num_tokens, num_lines = sum(document.tokens), len(document.tokens)
        perplexities.append(scored.perplexity)
        tokens, lines = tokens + num_tokens, lines + num_lines
        log10 -= (num_tokens + num_lines) * math.log10(scored.perplexity)
    counts = {"documents": len(perplexities), "lines": lines, "tokens": tokens}
    if not perplexities:
        return counts | {"perplexity": None, "percentiles": {}}
    percentiles = zip(PERCENTILES, np.percentile(perplexities, PERCENTILES), strict=True)
    return counts | {
        "perplexity": round(float(10.0 ** (-log10 / (tokens + lines))), 4),
        "percentiles": {str(p): round(float(value), 1) for p, value in percentiles},
    }


def _held_out_documents(path: Path) -> Iterator[ccnet.Lines]:
    """The documents of a scratch file that hold a token."""
    lines: list[bytes] = []
    with path.open("rb") as file:
        for line in file:
            if line != b"\n":
                lines.append(line)
            elif lines:
                yield ccnet.Lines(lines, [len(line.split()) for line in lines])
                lines = []


def _print_summary(card: dict[str, Any]) -> None:
    held_out, train = card["held_out"], card["train"]
    print(
        f"{card['name']}: {train['tokens']:,} tokens in {train['lines']:,} lines of "
        f"{train['documents']:,} documents"
    )
    print(
        f"  held out: perplexity {held_out['perplexity']}; percentiles of "
        f"{held_out['documents']:,} documents {held_out['percentiles']}"
    )
