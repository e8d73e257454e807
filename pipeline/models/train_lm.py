"""Train the language model of the filter `perplexity` with KenLM's `lmplz`.

Text is normalized as the filter does. It streams from its sources into a scratch file for training
and one for held-out documents. A corpus may be larger than memory; the temporary folder ($TMPDIR)
must have room for it about four times, and lmplz sorts in `memory`.
"""

import io
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

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
from pipeline.models.options import LmOptions
from pipeline.models.training_texts import Source, check_where, fingerprint
from stages.formats.errors import ConfigError
from stages.storage.digests import file_sha256

MAX_ORDER = 6  # of the package ufal.kenlm, as it was compiled
PERCENTILES = (5, 25, 50, 75, 95)
# the most lines that SentencePiece learns from: limits its time and memory; more was not tried
SAMPLE_LINES = 200_000


def train_lm(options: LmOptions) -> dict[str, Any]:
    """Train a KenLM model with `lmplz` for the filter `perplexity`; returns its card."""
    if options.sentencepiece and options.sentencepiece_model:
        raise ValueError("sentencepiece and sentencepiece_model: train one or give one, not both")
    if not 0 <= options.bits <= 25:
        raise ValueError(f"bits = {options.bits}: must be 0 (not quantized) to 25")
    prune = _prune_counts(options)
    check_where(options.where, options.sources)
    lmplz, build_binary = find_kenlm()
    use_pieces = bool(options.sentencepiece or options.sentencepiece_model)
    spm = Path(f"{options.output}.spm")
    with (
        replacing(options.output, spm, sources=options.sources) as (model, new_spm),
        tempfile.TemporaryDirectory() as scratch,
    ):
        if options.sentencepiece_model:
            _check_sentencepiece(options.sentencepiece_model)
            shutil.copyfile(options.sentencepiece_model, new_spm)
        texts = _write_texts(options, Path(scratch), use_pieces=use_pieces)
        if options.sentencepiece:
            _train_sentencepiece(texts.train, new_spm, size=options.sentencepiece)
        if use_pieces:
            splitter = ccnet.Splitter(str(new_spm))
            texts.counts["tokens"] = _split_into_pieces(texts.train, splitter)
            _split_into_pieces(texts.held_out, splitter)
        # --discount_fallback acts only where a small text leaves the Kneser-Ney discounts undefined
        estimate = ("-o", options.order, "-S", options.memory, "--prune", *prune.split(","))
        lmplz_options = [*map(str, estimate), "--discount_fallback", *(options.lmplz_option or ())]
        arpa = Path(scratch, "arpa")
        _call(lmplz, *lmplz_options, "-T", scratch, "--text", texts.train, "--arpa", arpa)
        quantize = ("-q", options.bits, "-b", options.bits) if options.bits else ()
        place = ("-S", options.memory, "-T", scratch)
        _call(build_binary, *quantize, *place, "trie", arpa, model)
        measured = _measure(texts.held_out, model=model)
        pieces = {"sentencepiece": _describe_sentencepiece(new_spm)} if use_pieces else {}
    return write_card(
        options.output,
        kind="kenlm",
        normalizer=ccnet.PIECES if use_pieces else ccnet.WORDS,
        licence=options.licence,
        command=command_line("train-lm", replace(options, prune=prune)),
        versions=versions("ufal.kenlm", *(["sentencepiece"] if use_pieces else [])),
        # it prints no version of its own
        lmplz={"sha256": file_sha256(Path(lmplz)), "options": lmplz_options},
        corpus=fingerprint(texts.sources),
        sources=texts.sources,
        train=texts.counts,
        held_out=measured,
        **pieces,
    )


def _prune_counts(options: LmOptions) -> str:
    """The counts of `prune`, checked; the default is cut to the order."""
    order, prune = options.order, options.prune
    if not 2 <= order <= MAX_ORDER:
        raise ValueError(f"order = {order}: must be from 2 to {MAX_ORDER}, which KenLM can load")
    if prune is None:
        return "0,0" if order == 2 else "0,0,1"
    if not re.fullmatch(r"\d+(,\d+)*", prune, re.ASCII):
        raise ConfigError(f"--prune {prune}: write whole numbers, 0 or more, separated by commas")
    counts = [int(count) for count in prune.split(",")]
    if len(counts) > order or counts != sorted(counts):
        raise ValueError(
            f"prune = {prune}: must be 1 to {order} counts for order = {order}, 0 or more, "
            "none below the one before"
        )
    return prune


# --- texts ----------------------------------------------------------------------------------------


class ScratchTexts(NamedTuple):
    """Scratch files of lines, and their counts; blank lines separate documents in `held_out`."""

    train: Path
    held_out: Path
    counts: Counter[str]
    sources: list[dict[str, Any]]


def _write_texts(options: LmOptions, scratch: Path, *, use_pieces: bool) -> ScratchTexts:
    """Read and normalize everything once. Lines are not yet split into pieces: the SentencePiece
    model may have to learn from them first.
    """
    normalize = ccnet.plain if use_pieces else ccnet.words
    texts = ScratchTexts(scratch / "train", scratch / "held_out", Counter(), [])
    num_held_out = 0
    with texts.train.open("wb") as train_file, texts.held_out.open("wb") as held_out_file:
        for name in options.sources:
            words, source = 0, Source(name, text_column=options.text_column, where=options.where)
            for text in source:
                normalized = normalize(text)
                lines, tokens = _filled_lines(normalized), sum(normalized.tokens)
                words += tokens
                if is_held_out(text, share=options.held_out):
                    held_out_file.writelines([*lines, b"\n"])
                    num_held_out += 1
                else:
                    train_file.writelines(lines)
                    texts.counts.update(documents=1, lines=len(lines), tokens=tokens)
            texts.sources.append(source.entry(words=words))
    num_train = texts.counts["documents"]
    check_split(num_held_out, num_train, held_out=options.held_out, sources=options.sources)
    return texts


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


def _split_into_pieces(path: Path, splitter: ccnet.Splitter) -> int:
    """Replace the lines of a scratch file by their pieces; returns the number of pieces."""
    count, target = 0, path.with_suffix(".pieces")
    with path.open("rb") as lines, target.open("wb") as output:
        for line in lines:
            pieces = b" ".join(map(splitter.__getitem__, line.split()))
            if pieces or line == b"\n":  # a given SentencePiece model may drop all of a line
                output.write(pieces + b"\n")
                count += len(pieces.split())
    target.replace(path)
    return count


def _describe_sentencepiece(spm: Path) -> dict[str, Any]:
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(spm)).get_piece_size()
    return {"sha256": file_sha256(spm), "pieces": pieces}


# --- KenLM ----------------------------------------------------------------------------------------


def find_kenlm() -> list[str]:
    """KenLM's lmplz and build_binary: in $GRISTMILL_KENLM_BIN, else .kenlm/bin, else on PATH."""
    chosen = os.environ.get("GRISTMILL_KENLM_BIN")
    for path in (chosen,) if chosen else (str(Path(".kenlm", "bin")), None):
        programs = [shutil.which(name, path=path) for name in ("lmplz", "build_binary")]
        if all(programs):
            return list(filter(None, programs))
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
    scored = [
        (score(document, lm, window=1).perplexity, sum(document.tokens), len(document.tokens))
        for document in _held_out_documents(held_out)
    ]
    perplexities, tokens, lines = np.array(scored).reshape(-1, 3).T
    counts = {"documents": len(scored), "lines": int(lines.sum()), "tokens": int(tokens.sum())}
    if not scored:
        return counts | {"perplexity": None, "percentiles": {}}
    mean_log10 = np.average(np.log10(perplexities), weights=tokens + lines)
    percentiles = zip(PERCENTILES, np.percentile(perplexities, PERCENTILES), strict=True)
    return counts | {
        "perplexity": round(float(10.0**mean_log10), 4),
        "percentiles": {str(p): round(float(value), 1) for p, value in percentiles},
    }


def _held_out_documents(path: Path) -> Iterator[ccnet.Lines]:
    """The documents of a scratch file that hold a token."""
    with path.open("rb") as file:
        for is_blank, group in groupby(file, key=b"\n".__eq__):
            if not is_blank:
                lines = list(group)
                yield ccnet.Lines(lines, [len(line.split()) for line in lines])
