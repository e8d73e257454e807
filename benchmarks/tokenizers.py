"""Speed of each kind of tokenizer in pack against the bare library's batch call, on the same real
text in one run; bytes per token and tokens per word by language; the same bytes from two trainings.

    python -m benchmarks.tokenizers [FOLDER]        one line a figure: name, value, unit

FOLDER is the corpus (default $GRISTMILL_DATA, then ../shared/data). Our own tokenizers, of 32,768
tokens, are trained on nine tenths of the texts and everything is measured on the others. Speeds are
of CPU time on one core, the best of several rounds, ours and the library's in turns.
"""

import io
import itertools
import json
import os
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import zstandard

from benchmarks.texts import documentation, web_pages
from pipeline.models.model_card import is_held_out
from pipeline.models.options import BpeOptions
from pipeline.models.train_tokenizer import train_tokenizer
from pipeline.study.fertility import measure
from stages.formats.tokenizer import Tokenizer, load_tokenizer
from stages.storage.digests import file_sha256

MB = 1_000_000
SIZE = 4 * MB  # of each kind of text, bytes
HELD_OUT = 0.1
VOCAB_SIZE = 32_768
ROUNDS = 7
BATCH = 256  # texts, as pack.batch_size


def main(data: Path) -> None:
    texts = {name: list(limited(of_kind, SIZE)) for name, of_kind in kinds(data)}
    held_out = {
        name: [text for text in of_kind if is_held_out(text, share=HELD_OUT)]
        for name, of_kind in texts.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, file in train_all(Path(folder), list(itertools.chain(*texts.values()))):
            tokenizer = load_tokenizer(str(file))
            report_speed(name, tokenizer, list(itertools.chain(*held_out.values())))
            report_fertility(name, tokenizer, held_out)


# --- texts ----------------------------------------------------------------------------------------


def kinds(data: Path) -> Iterator[tuple[str, Iterator[str]]]:
    """Web pages and documentation in English, Wikipedia leads, and a text in 388 languages."""
    yield "web", iter(web_pages(data))
    yield "docs", documentation(data)
    for language in ("en", "fr-fr", "es-es"):
        file = data / "text" / "wiki" / f"ovos_summaries_{language}.json.zst"
        with zstandard.open(file, "rt", encoding="utf-8") as stream:
            articles = json.load(stream)
        yield f"wiki-{language[:2]}", (article["extract"] for article in articles.values())
    for script, languages in SCRIPTS.items():
        yield f"udhr-{script}", declaration(data, languages)


# files of udhr.zip; a text is cut into its lines, since there is one for each language
SCRIPTS = {
    "Latin": ("deu_1901", "fra", "spa", "vie", "swh", "tur"),
    "Cyrillic": ("rus", "ukr", "bul"),
    "Chinese": ("cmn_hans", "cmn_hant", "jpn"),
    "Indic": ("hin", "ben", "tam"),
    "Arabic": ("arb", "pes_1", "urd"),
    "Thai": ("tha", "lao", "khm"),
}


def declaration(data: Path, languages: Sequence[str]) -> Iterator[str]:
    with zipfile.ZipFile(data / "text" / "udhr.zip") as archive:
        for language in languages:
            text = archive.read(f"udhr2/{language}.txt").decode()
            yield from filter(None, map(str.strip, text.split("\n")))


def limited(texts: Iterator[str], size: int) -> Iterator[str]:
    """The first texts of together about `size` bytes."""
    for text in texts:
        if size <= 0:
            return
        size -= len(text.encode())
        yield text


# --- tokenizers -----------------------------------------------------------------------------------


def train_all(folder: Path, texts: Sequence[str]) -> Iterator[tuple[str, str | Path]]:
    """A tokenizer of every kind by its name: a path, or a name of tiktoken's."""
    yield "tiktoken", "cl100k_base"
    source = folder / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    files = [folder / "tokenizers.json", folder / "again.json"]
    for file in files:
        began = time.process_time()
        train_tokenizer(
            BpeOptions(
                sources=[str(source)],
                output=file,
                licence="mixed",
                vocab_size=VOCAB_SIZE,
                held_out=HELD_OUT,
            )
        )
        print(f"train_tokenizer {time.process_time() - began:.1f} s of CPU")
    same = file_sha256(files[0]) == file_sha256(files[1])
    print(f"train_tokenizer.same_bytes_twice {same} bool")
    yield "tokenizers", files[0]
    train = [text for text in texts if not is_held_out(text, share=HELD_OUT)]
    for kind in ("bpe", "unigram"):
        yield f"sentencepiece-{kind}", train_sentencepiece(folder, train, kind)


def train_sentencepiece(folder: Path, texts: Sequence[str], kind: str) -> Path:
    """As Llama 2: bytes for what it has no piece for, text as it is, single digits."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=itertools.chain.from_iterable(text.split("\n") for text in texts),
        model_writer=model,
        model_type=kind,
        vocab_size=VOCAB_SIZE,
        byte_fallback=True,
        character_coverage=0.9995,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        input_sentence_size=100_000,
        max_sentence_length=1 << 16,
        minloglevel=2,
    )
    file = folder / f"{kind}.model"
    file.write_bytes(model.getvalue())
    return file


# --- figures --------------------------------------------------------------------------------------


def report_speed(name: str, tokenizer: Tokenizer, texts: list[str]) -> None:
    batches = [texts[n : n + BATCH] for n in range(0, len(texts), BATCH)]
    size = sum(len(text.encode()) for text in texts)
    ours, bare = best_seconds([tokenizer.encode_documents, bare_batch(tokenizer)], batches)
    print(f"speed.gristmill.{name} {size / MB / ours:.2f} MB/s")
    print(f"speed.bare.{name} {size / MB / bare:.2f} MB/s")
    print(f"speed.ratio.{name} {bare / ours:.3f} ratio")


def bare_batch(tokenizer: Tokenizer) -> Callable[[list[str]], Any]:
    """The library's own call for several texts, on one thread."""
    library = tokenizer.library
    if tokenizer.kind == "tiktoken":
        return lambda texts: library.encode_ordinary_batch(texts, num_threads=1)
    if tokenizer.kind == "sentencepiece":
        return lambda texts: library.encode(texts, out_type=int, num_threads=1)
    return lambda texts: [
        encoding.ids for encoding in library.encode_batch_fast(texts, add_special_tokens=False)
    ]


def best_seconds(
    calls: Sequence[Callable[[list[str]], Any]], batches: list[list[str]]
) -> list[float]:
    """Seconds of CPU of each call on all batches, the least of some rounds."""
    best = [float("inf")] * len(calls)
    for _ in range(ROUNDS):
        for n, call in enumerate(calls):
            began = time.process_time()
            for batch in batches:
                call(batch)
            best[n] = min(best[n], time.process_time() - began)
    return best


def report_fertility(name: str, tokenizer: Tokenizer, texts: dict[str, list[str]]) -> None:
    print(f"vocab_size.{name} {tokenizer.vocab_size} tokens")
    for kind, of_kind in texts.items():
        fertility = measure(of_kind, tokenizer)
        print(f"bytes_per_token.{name}.{kind} {fertility.bytes_per_token:.3f} bytes")
        print(f"tokens_per_word.{name}.{kind} {fertility.tokens_per_word:.3f} tokens")


if __name__ == "__main__":
    default = os.environ.get("GRISTMILL_DATA", Path(__file__).parents[2] / "shared" / "data")
    main(Path(sys.argv[1] if len(sys.argv) > 1 else default))
