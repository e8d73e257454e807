"""Train a tokenizer for `pack.tokenizer`: byte-level BPE by the package `tokenizers`.

Text is split as cl100k_base splits it, numbers into groups of three digits, and every byte is a
token, so that any text has one. Sources are read twice, first to count them: what is learned from
is a sample by the hash of a text, and of that only its distinct words are held in memory.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import xxhash

from pipeline.models.model_card import (
    check_split,
    command_line,
    is_held_out,
    replacing,
    versions,
    write_card,
)
from pipeline.models.options import BpeOptions
from pipeline.models.training_texts import Source, check_where, fingerprint
from pipeline.study.fertility import measure
from stages.formats.tiktoken_encodings import load_encoding
from stages.formats.tokenizer import Tokenizer, TokenizerOptions, load_tokenizer
from stages.formats.tokenizer_export import for_oniguruma
from stages.pack.pack import derive_seed
from stages.storage.files import scratch_folder

MEASURED_BYTES = 20_000_000  # of held-out text, the first that is read: enough for three digits
# pairs seen once are typing errors and names
MIN_FREQUENCY = 2


def train_tokenizer(options: BpeOptions) -> dict[str, Any]:
    """Train a tokenizer.json; returns its card. The same texts and options give the same bytes,
    on any number of threads.
    """
    options = replace(options, sources=[_rows_of_run(name) for name in options.sources])
    check_where(options.where, options.sources)
    _check(options)
    with replacing(options.output, sources=options.sources) as (file,):
        entries, size = _count(options)
        share = min(1.0, options.sample_bytes / max(1, size))
        texts = _Texts(options, share=share)
        library = _train(iter(texts), options)
        check_split(
            len(texts.held_out),
            texts.counts["documents"],
            held_out=options.held_out,
            sources=options.sources,
        )
        tokenizer = _save(library, file, options)
        fertility = measure(texts.held_out, tokenizer)
    return write_card(
        options.output,
        kind="tokenizer",
        licence=options.licence,
        command=command_line("train-tokenizer", options),
        versions=versions("tokenizers"),
        corpus=fingerprint(entries),
        sources=entries,
        sample_share=round(share, 6),
        train=texts.counts,
        vocab_size=tokenizer.vocab_size,
        end_of_text=tokenizer.options.end_of_text,
        begin_of_text=tokenizer.options.begin_of_text or None,
        held_out=fertility._asdict()
        | {
            "bytes_per_token": round(fertility.bytes_per_token or 0, 4),
            "tokens_per_word": round(fertility.tokens_per_word or 0, 4),
        },
    )


def _check(options: BpeOptions) -> None:
    """ValueError for options that no text can meet: tried without text, before any is read."""
    special = _special_tokens(options)
    least = 256 + len(special)
    for name, number, lowest in (
        ("vocab_size", options.vocab_size, least),
        ("sample_bytes", options.sample_bytes, 1),
    ):
        if number < lowest:
            raise ValueError(f"{name} = {number}: must be {lowest} or more")
    if not options.end_of_text:
        raise ValueError("end_of_text is empty: name the token after each document")
    with scratch_folder("gristmill-tokenizer") as folder:
        untrained = _train(iter(()), options)
        if untrained.get_vocab_size() < least:
            raise ValueError(
                f"special tokens {', '.join(special)}: give each once, with two characters or more"
            )
        _save(untrained, folder / options.output.name, options)


def _save(library: Any, file: Path, options: BpeOptions) -> Tokenizer:
    """Write a tokenizer to a temporary file; what it is when it is loaded."""
    library.save(str(file))
    around = TokenizerOptions(end_of_text=options.end_of_text, begin_of_text=options.begin_of_text)
    try:
        return load_tokenizer(str(file), around)
    except ValueError as error:
        raise ValueError(str(error).replace(str(file), str(options.output))) from error


def _rows_of_run(source: str) -> str:
    """A run alone stands for its corpus."""
    return f"{source}:corpus" if Path(source, "run.json").is_file() else source


def _sources(options: BpeOptions) -> Iterator[Source]:
    for name in options.sources:
        yield Source(name, text_column=options.text_column, where=options.where)


def _count(options: BpeOptions) -> tuple[list[dict[str, Any]], int]:
    """The card's entries of the sources, and their size in bytes."""
    entries, size = [], 0
    for source in _sources(options):
        words = 0
        for text in source:
            words += len(text.split())
            size += len(_encode(text))
        entries.append(source.entry(words=words))
    return entries, size


class _Texts:
    """The texts to learn from, drawn by their hash; filled while they are read: their `counts`, and
    what is `held_out`.
    """

    def __init__(self, options: BpeOptions, *, share: float) -> None:
        self._options, self._share = options, share
        self.counts, self.held_out = Counter[str](), list[str]()

    def __iter__(self) -> Iterator[str]:
        self.counts, self.held_out, room = Counter(), [], MEASURED_BYTES
        seed = derive_seed(0, "train_tokenizer.sample")
        for source in _sources(self._options):
            for text in source:
                data = _encode(text)
                if is_held_out(text, share=self._options.held_out):
                    if room > 0:
                        self.held_out.append(text)
                        room -= len(data)
                elif xxhash.xxh64_intdigest(data, seed=seed) < self._share * 2.0**64:
                    self.counts.update(documents=1, bytes=len(data))
                    yield data.decode("utf-8", "replace")


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _special_tokens(options: BpeOptions) -> Sequence[str]:
    """In the order of their ids, from 0 on."""
    return [*filter(None, (options.end_of_text, options.begin_of_text)), *(options.special or ())]


def _train(texts: Iterator[str], options: BpeOptions) -> Any:
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Library

    pattern = for_oniguruma(load_encoding("cl100k_base")._pat_str)
    tokenizer = Library(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=options.vocab_size,
        min_frequency=MIN_FREQUENCY,
        special_tokens=list(_special_tokens(options)),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
