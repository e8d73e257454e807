"""Train the language model that `filters.perplexity` scores with: KenLM's own `lmplz`, on text
normalised as the filter does.

Texts stream: from their sources through the normaliser into a scratch file for training and one for
what is held out. A corpus may be larger than memory; the temporary folder ($TMPDIR) must hold it
about four times, and lmplz sorts in `memory`.
"""

import io
import math
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

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
from pipeline.models.training_texts import Source, fingerprint

MAX_ORDER = 6  # of the package ufal.kenlm, as it was compiled
PERCENTILES = (5, 25, 50, 75, 95)
# what SentencePiece learns from at most: bounds its time and memory; more was not tried
SAMPLE_LINES = 200_000


def train_lm(
    sources: Sequence[str | Path],
    *,
    output: Path,
    licence: str,
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

    `prune` drops n-grams seen at most so often, one count per order, the last one for all higher
    orders; None is 0,0,1 up to `order`. The model is a trie, its probabilities and back-offs of
    `bits` (0: not quantised). Tokens are words and marks; or pieces, of a SentencePiece model that
    is trained to a vocabulary of `sentencepiece`, or given. `held_out` is the share of documents
    kept out of training. `lmplz_options` are handed to lmplz as they stand.
    """
    if sentencepiece and sentencepiece_model:
        raise ValueError("sentencepiece and sentencepiece_model: train one or give one, not both")
    if not 0 <= bits <= 25:
        raise ValueError(f"bits = {bits}: 1 to 25 quantise, 0 does not")
    if not 2 <= order <= MAX_ORDER:
        raise ValueError(f"order = {order}: must be from 2 to {MAX_ORDER}, which KenLM can load")
    prune = (0, 0, 1)[:order] if prune is None else prune
    if not 1 <= len(prune) <= order or min(prune) < 0 or list(prune) != sorted(prune):
        counts = ",".join(map(str, prune))
        raise ValueError(
            f"prune = {counts}: for order = {order} give 1 to {order} counts, 0 or more, none below the one before"
        )
    lmplz, build_binary = find_kenlm(kenlm_bin)
    in_pieces = bool(sentencepiece or sentencepiece_model)
    spm = Path(f"{output}.spm")
    with (
        replacing(output, spm, sources=sources) as (model, new_spm),
        tempfile.TemporaryDirectory() as scratch,
    ):
        if sentencepiece_model:
            _check_pieces(sentencepiece_model)
            shutil.copyfile(sentencepiece_model, new_spm)
        written = _write_texts(
            sources, Path(scratch), text_column=text_column, held_out=held_out, in_pieces=in_pieces
        )
        if sentencepiece:
            _train_pieces(written.train, new_spm, size=sentencepiece)
        written = _cut(written, new_spm) if in_pieces else written
        # --discount_fallback acts only where a small text leaves the Kneser-Ney discounts undefined
        options = (
            "-o",
            order,
            "-S",
            memory,
            "--prune",
            *prune,
            "--discount_fallback",
            *lmplz_options,
        )
        arpa = Path(scratch, "arpa")
        _call(lmplz, *options, "-T", scratch, "--text", written.train, "--arpa", arpa)
        quantised = ("-q", bits, "-b", bits) if bits else ()
        _call(build_binary, *quantised, "-S", memory, "-T", scratch, "trie", arpa, model)
        measured = _measure(written.held, model=model)
        pieces = {"sentencepiece": _describe(new_spm)} if in_pieces else {}
    given = {
        "output": output,
        "licence": licence,
        "order": order,
        "prune": prune,
        "memory": memory,
        "bits": bits,
        "sentencepiece": sentencepiece or None,
        "sentencepiece_model": sentencepiece_model,
        # fmt: skip
        "lmplz_option": list(lmplz_options),
        "held_out": held_out,
        "text_column": text_column,
    }
    card = write_card(
        output,
        kind="kenlm",
        normalizer=ccnet.PIECES if in_pieces else ccnet.WORDS,
        licence=licence,
        command=command_line("train-lm", *sources, **given),
        versions=versions("ufal.kenlm", *(["sentencepiece"] if in_pieces else [])),
        # it knows no version of its own
        lmplz={"sha256": digest(Path(lmplz)), "options": [str(option) for option in options]},
        corpus=fingerprint(written.sources),
        sources=written.sources,
        train=written.counts,
        held_out=measured,
        **pieces,
    )
    _show(card)
    return card


class Written(NamedTuple):
    """Scratch files of lines, and what is in them; blank lines part the documents of `held`."""

    train: Path
    held: Path
    counts: dict[str, int]
    sources: list[dict[str, Any]]


def _write_texts(
    sources: Sequence[str | Path],
    scratch: Path,
    *,
    text_column: str,
    held_out: float,
    in_pieces: bool,
) -> Written:
    """Read and normalise everything once. Lines in pieces are not yet cut: what would cut them
    learns from them first.
    """
    normalize = ccnet.plain if in_pieces else ccnet.words
    train, held = scratch / "train", scratch / "held"
    counts = {"documents": 0, "lines": 0, "tokens": 0}
    entries, num_held = [], 0
    with train.open("wb") as train_file, held.open("wb") as held_file:
        for source in (Source(name, text_column=text_column) for name in sources):
            words = 0
            for text in source:
                normalized = normalize(text)
                lines, tokens = _filled(normalized), sum(normalized.tokens)
                words += tokens
                if is_held_out(text, share=held_out):
                    held_file.writelines([*lines, b"\n"])
                    num_held += 1
                else:
                    train_file.writelines(lines)
                    _add(counts, documents=1, lines=len(lines), tokens=tokens)
            entries.append(source.entry(words=words))
    check_split(num_held, counts["documents"], held_out=held_out, sources=sources)
    return Written(train, held, counts, entries)


def _filled(normalized: ccnet.Lines) -> list[bytes]:
    return [
        line.strip() + b"\n"
        for line, tokens in zip(normalized.lines, normalized.tokens, strict=True)
        if tokens
    ]


def _add(counts: dict[str, int], **more: int) -> None:
    for name, count in more.items():
        counts[name] += count


# --- SentencePiece --------------------------------------------------------------------------------


def _check_pieces(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"sentencepiece_model {path}: no such file")
    try:
        _describe(path)
    except RuntimeError as error:
        raise ValueError(f"sentencepiece_model {path}: no SentencePiece model ({error})") from None


def _train_pieces(text: Path, output: Path, *, size: int) -> None:
    """A unigram model of at most `size` pieces on a sample of the lines; on one thread, from
    memory: the same bytes.
    """
    import sentencepiece

    made = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sample(text, lines=SAMPLE_LINES)), model_writer=made, model_type="unigram", vocab_size=size,
            hard_vocab_limit=False, normalization_rule_name="identity", max_sentence_length=1 << 16, num_threads=1,
            minloglevel=2,
        )  # fmt: skip
    except RuntimeError as error:
        raise ValueError(
            f"sentencepiece = {size}: {error}; give more text or a smaller vocabulary"
        ) from None
    output.write_bytes(made.getvalue())


def sample(text: Path, *, lines: int) -> list[str]:
    """About half of `lines` up to `lines` of a file's lines, or all it has: those whose hash lies
    below a limit.

    The limit is halved whenever too many are held, so that one pass and the memory of the sample
    suffice.
    """
    limit, held = 1 << 64, list[tuple[int, str]]()
    with text.open("rb") as file:
        for number, line in enumerate(file):
            # the number, so that a line that is found everywhere is drawn as often as others
            place = xxhash.xxh3_64_intdigest(line, seed=number)
            if place >= limit:
                continue
            held.append((place, line.decode().rstrip("\n")))
            while len(held) > lines:
                limit //= 2
                held = [(p, line) for p, line in held if p < limit]
    return [line for _, line in held]


def _cut(written: Written, spm: Path) -> Written:
    """The same lines in pieces."""
    splitter = ccnet.Splitter(str(spm))
    train, held = (path.with_name(f"{path.name}.pieces") for path in (written.train, written.held))
    with train.open("wb") as output:
        tokens = sum(_copy_pieces(written.train, output, splitter))
    with held.open("wb") as output:
        for _ in _copy_pieces(written.held, output, splitter):
            pass
    written.train.unlink()
    written.held.unlink()
    return written._replace(train=train, held=held, counts=written.counts | {"tokens": tokens})


def _copy_pieces(text: Path, output: BinaryIO, splitter: ccnet.Splitter) -> Iterator[int]:
    with text.open("rb") as file:
        for line in file:
            cut = b" ".join(map(splitter.__getitem__, line.split()))
            if cut or line == b"\n":  # a SentencePiece model that was given may drop all of a line
                output.write(cut + b"\n")
                yield len(cut.split())


def _describe(spm: Path) -> dict[str, Any]:
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(spm)).get_piece_size()
    return {"sha256": digest(spm), "pieces": pieces}


# --- KenLM ----------------------------------------------------------------------------------------


def find_kenlm(folder: Path | None) -> tuple[str, str]:
    """lmplz and build_binary: from the folder given, else $GRISTMILL_KENLM_BIN, else .kenlm/bin,
    else PATH.
    """
    named = folder or os.environ.get("GRISTMILL_KENLM_BIN")
    for path in (str(named),) if named else (str(Path(".kenlm", "bin")), None):
        lmplz, build_binary = (
            shutil.which("lmplz", path=path),
            shutil.which("build_binary", path=path),
        )
        if lmplz and build_binary:
            return lmplz, build_binary
    where = named or ".kenlm/bin and on PATH"
    raise ValueError(
        f"lmplz and build_binary of KenLM: not found in {where}; build them with `make kenlm` "
        "(tools/build_kenlm.sh), or name their folder in $GRISTMILL_KENLM_BIN"
    )


def _call(*command: Any) -> None:
    done = subprocess.run(
        [str(c) for c in command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    if done.returncode:
        end = "\n".join(done.stderr.splitlines()[-10:])
        raise ValueError(
            f"{Path(str(command[0])).name} ended with status {done.returncode}:\n{end}"
        )


# --- what is held out -----------------------------------------------------------------------------


def _measure(held: Path, *, model: Path) -> dict[str, Any]:
    """Perplexity of all tokens held out together, and percentiles of the documents' own."""
    import kenlm

    lm = kenlm.Model(str(model))
    documents, tokens, lines, log10 = list[float](), 0, 0, 0.0
    for document in read_held(held):
        scored = score(document, lm, window=1)
        length = sum(document.tokens) + len(document.tokens)
        documents.append(scored.perplexity)
        tokens, lines = tokens + sum(document.tokens), lines + len(document.tokens)
        log10 -= length * math.log10(scored.perplexity)
    if not documents:
        return {"documents": 0, "lines": 0, "tokens": 0, "perplexity": None, "percentiles": {}}
    found = np.percentile(documents, PERCENTILES)
    return {
        "documents": len(documents),
        "lines": lines,
        "tokens": tokens,
        "perplexity": round(float(10.0 ** (-log10 / (tokens + lines))), 4),
        "percentiles": {
            str(p): round(float(v), 1) for p, v in zip(PERCENTILES, found, strict=True)
        },
    }


def read_held(path: Path) -> Iterator[ccnet.Lines]:
    """The documents of a scratch file, those that hold a token."""
    lines: list[bytes] = []
    with path.open("rb") as file:
        for line in file:
            if line != b"\n":
                lines.append(line)
            elif lines:
                yield ccnet.Lines(lines, [len(line.split()) for line in lines])
                lines = []


def _show(card: dict[str, Any]) -> None:
    held, train = card["held_out"], card["train"]
    print(
        f"{card['name']}: {train['tokens']:,} tokens in {train['lines']:,} lines of {train['documents']:,} documents"
    )
    print(
        f"  held out: perplexity {held['perplexity']}; of {held['documents']:,} documents {held['percentiles']}"
    )
