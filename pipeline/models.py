"""Train the models that `filters.perplexity` and `filters.quality` score with, each with a card that says what it is.

A card lies beside its model as `<model>.json`: what it was trained on (with digests), how the text was normalised,
under which licence, by which command, and how it does on documents held out. It holds no time: the same run makes the
same bytes.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import math
import os
import random
import shlex
import shutil
import subprocess
import tempfile
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import numpy as np

from filters import perplexity, quality

POSITIVE = "__label__hq"
NEGATIVE = "__label__lq"


class Source(NamedTuple):
    """One file of training text: its documents as read, and its entry on the card."""

    documents: list[str]
    entry: dict[str, Any]


def train_lm(
    sources: list[Path],
    *,
    output: Path,
    licence: str,
    order: int = 5,
    prune: tuple[int, ...] = (0, 0, 1),
    memory: str = "1G",
    held_out: float = 0.02,
    text_column: str = "text",
    kenlm_bin: Path | None = None,
) -> dict[str, Any]:
    """Train a KenLM model with `lmplz` for the filter `perplexity`; returns its card.

    `prune` drops n-grams seen at most so often, one count per order, the last one for all higher orders. `held_out` is
    the share of documents kept out of training. The model is a trie with 8-bit probabilities and back-offs.
    """
    lmplz, build_binary = _find_kenlm(kenlm_bin)
    texts = [_read(path, text_column=text_column, count=_normalized_tokens) for path in sources]
    held, train = _split([d for s in texts for d in s.documents], held_out=held_out)
    with _replacing(output) as temporary, tempfile.TemporaryDirectory() as scratch:
        text, arpa = Path(scratch, "text"), Path(scratch, "arpa")
        text.write_text("".join(f"{line}\n" for line in _normalized_lines(train)), encoding="utf-8")
        # --discount_fallback acts only where a small text leaves the Kneser-Ney discounts undefined
        _call(lmplz, "-o", order, "-S", memory, "-T", scratch, "--prune", *prune, "--discount_fallback",
              "--text", text, "--arpa", arpa)  # fmt: skip
        _call(build_binary, "-q", 8, "-b", 8, "-S", memory, "-T", scratch, "trie", arpa, temporary)
        measured = {"held_out": {"documents": len(held), "perplexity": _quantiles(held, model=temporary)}}
    print(f"{output}: held-out perplexity (percentile: value) {measured['held_out']['perplexity']}")
    options = {"output": output, "licence": licence, "order": order, "prune": prune, "memory": memory,
               "held_out": held_out, "text_column": text_column}  # fmt: skip
    return _write_card(
        output,
        kind="kenlm",
        normalizer=perplexity.NORMALIZER,
        licence=licence,
        sources={"sources": [s.entry for s in texts]},
        command=_command("train-lm", *sources, **options),
        measured=measured,
        versions=_versions("ufal.kenlm"),
    )


def train_classifier(
    positive: list[Path],
    negative: list[Path],
    *,
    output: Path,
    licence: str,
    epochs: int = 5,
    learning_rate: float = 0.5,
    dimensions: int = 16,
    word_ngrams: int = 2,
    buckets: int = 200_000,
    features: int = 50_000,
    seed: int = 0,
    held_out: float = 0.1,
    text_column: str = "text",
) -> dict[str, Any]:
    """Train a fastText classifier for the filter `quality`; returns its card.

    The suffix of `output` decides: `.ftz` is product-quantised and cut to its `features` strongest features, `.bin` is
    kept whole. `buckets` hash the word n-grams. `held_out` is the share of documents that precision and recall are
    measured on. On one thread, with a fixed seed: the same texts make the same bytes.
    """
    import fasttext

    if output.suffix not in (".ftz", ".bin"):
        raise ValueError(f"output {output}: must end in .ftz (quantised) or .bin (whole)")
    texts = {
        label: [_read(path, text_column=text_column, count=_words) for path in paths]
        for label, paths in ((POSITIVE, positive), (NEGATIVE, negative))
    }
    held, train = _split(
        [(label, quality.normalize(d)) for label, sources in texts.items() for s in sources for d in s.documents],
        held_out=held_out,
    )
    random.Random(f"{seed} train_classifier").shuffle(train)  # fastText goes through the file in order
    with _replacing(output) as temporary, tempfile.NamedTemporaryFile("w", encoding="utf-8", suffix=".txt") as text:
        text.writelines(f"{label} {line}\n" for label, line in train)
        text.flush()
        model = fasttext.train_supervised(
            text.name, epoch=epochs, lr=learning_rate, dim=dimensions, wordNgrams=word_ngrams, bucket=buckets,
            minCount=2, seed=seed, thread=1, verbose=0,
        )  # fmt: skip
        if output.suffix == ".ftz":
            # a cutoff above the number of features fails inside fastText
            cutoff = min(features, model.get_input_matrix().shape[0] - 1)
            model.quantize(text.name, cutoff=cutoff, retrain=True, qnorm=True, epoch=epochs, lr=learning_rate, thread=1)
        model.save_model(str(temporary))
        measured = {"held_out": _precision_and_recall(held, model=model)}
    print(f"{output}: held out, at score 0.5: {measured['held_out']}")
    options = {"output": output, "licence": licence, "epochs": epochs, "learning_rate": learning_rate,
               "dimensions": dimensions, "word_ngrams": word_ngrams, "buckets": buckets, "features": features,
               "seed": seed, "held_out": held_out, "text_column": text_column}  # fmt: skip
    return _write_card(
        output,
        kind="fasttext",
        normalizer=quality.NORMALIZER,
        licence=licence,
        sources={"positive": [s.entry for s in texts[POSITIVE]], "negative": [s.entry for s in texts[NEGATIVE]]},
        command=_command("train-classifier", positive=positive, negative=negative, **options),
        measured={"labels": {"positive": POSITIVE, "negative": NEGATIVE}, **measured},
        versions=_versions("fasttext-community"),
    )


def documents(path: Path, *, text_column: str = "text") -> Iterator[str]:
    """Documents of a file: .txt (parted by blank lines), .jsonl, each also .gz or .zst, or .parquet."""
    kind = next((s for s in reversed(path.suffixes) if s not in (".gz", ".zst")), "")
    if not path.is_file():
        raise ValueError(f"source {path}: no such file")
    if kind == ".parquet":
        yield from _parquet_documents(path, text_column=text_column)
    elif kind in (".txt", ".jsonl"):
        with fsspec.open(str(path), "rt", compression="infer", encoding="utf-8") as file:
            yield from _blocks(file) if kind == ".txt" else _json_documents(file, path=path, text_column=text_column)
    else:
        raise ValueError(f"source {path}: must be .txt, .jsonl (each also .gz or .zst) or .parquet")


def _blocks(lines: Iterable[str]) -> Iterator[str]:
    block: list[str] = []
    for line in [*lines, ""]:
        if line.strip():
            block.append(line)
        elif block:
            yield "".join(block)
            block = []


def _json_documents(lines: Iterable[str], *, path: Path, text_column: str) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"source {path}, line {number}: not JSON ({error})") from None
        if not isinstance(row, dict) or not isinstance(row.get(text_column), str):
            found = sorted(row) if isinstance(row, dict) else type(row).__name__
            raise ValueError(f"source {path}, line {number}: no text in column '{text_column}', only {found}")
        yield row[text_column]


def _parquet_documents(path: Path, *, text_column: str) -> Iterator[str]:
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path)
    if text_column not in file.schema_arrow.names:
        raise ValueError(f"source {path}: no column '{text_column}', only {file.schema_arrow.names}")
    for batch in file.iter_batches(columns=[text_column]):
        yield from (text for text in batch.column(0).to_pylist() if text is not None)


def _read(path: Path, *, text_column: str, count: Callable[[str], int]) -> Source:
    found = list(documents(path, text_column=text_column))
    words = sum(count(d) for d in found)
    if words == 0:
        raise ValueError(f"source {path}: {len(found)} documents without a word; give a file with text")
    entry = {"path": str(path), "sha256": _sha256(path), "documents": len(found), "words": words}
    return Source(found, entry)


def _split(items: list[Any], *, held_out: float) -> tuple[list[Any], list[Any]]:
    """Parts held out and for training; by hash, so that copies of a document fall on the same side."""
    parts: tuple[list[Any], list[Any]] = ([], [])
    for item in items:
        digest = hashlib.sha256(repr(item).encode()).digest()
        parts[int.from_bytes(digest[:8], "big") >= held_out * 2**64].append(item)
    if not all(parts):
        raise ValueError(
            f"held_out = {held_out}: of {len(items)} documents {len(parts[0])} are held out and {len(parts[1])} left "
            "to train on; both must be some, so give more text or another share"
        )
    return parts


def _normalized_lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        yield from (line for line in map(perplexity.normalize, text.split("\n")) if line)


def _normalized_tokens(text: str) -> int:
    return sum(line.count(" ") + 1 for line in _normalized_lines([text]))


def _words(text: str) -> int:
    return len(quality.normalize(text).split())


def _quantiles(texts: list[str], *, model: Path) -> dict[str, float]:
    import kenlm

    lm = kenlm.Model(str(model))
    scores = [p for p in (perplexity.perplexity(text, lm) for text in texts) if not math.isnan(p)]
    return {str(q): round(float(np.percentile(scores, q)), 1) for q in (5, 25, 50, 75, 95)} if scores else {}


def _precision_and_recall(held: list[tuple[str, str]], *, model: Any) -> dict[str, Any]:
    predicted = [label for (label,) in model.predict([line for _, line in held], k=1)[0]]
    truth = [label for label, _ in held]
    both = sum(t == p == POSITIVE for t, p in zip(truth, predicted, strict=True))
    return {
        "positive": truth.count(POSITIVE),
        "negative": truth.count(NEGATIVE),
        "precision": round(both / predicted.count(POSITIVE), 4) if POSITIVE in predicted else None,
        "recall": round(both / truth.count(POSITIVE), 4) if POSITIVE in truth else None,
    }


def _find_kenlm(folder: Path | None) -> tuple[str, str]:
    """lmplz and build_binary: from the folder given, else $GRISTMILL_KENLM_BIN, else .kenlm/bin, else PATH."""
    named = folder or os.environ.get("GRISTMILL_KENLM_BIN")
    for path in (str(named),) if named else (str(Path(".kenlm", "bin")), None):
        lmplz, build_binary = shutil.which("lmplz", path=path), shutil.which("build_binary", path=path)
        if lmplz and build_binary:
            return lmplz, build_binary
    where = named or ".kenlm/bin and on PATH"
    raise ValueError(
        f"lmplz and build_binary of KenLM: not found in {where}; build them with `make kenlm` "
        "(tools/build_kenlm.sh), or name their folder in $GRISTMILL_KENLM_BIN"
    )


def _call(*command: Any) -> None:
    done = subprocess.run([str(c) for c in command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        end = "\n".join(done.stderr.splitlines()[-10:])
        raise ValueError(f"{Path(str(command[0])).name} ended with status {done.returncode}:\n{end}")


@contextlib.contextmanager
def _replacing(output: Path) -> Iterator[Path]:
    """A temporary path that becomes `output` on success; the old card goes first, so none describes another model."""
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        yield temporary
        _card_path(output).unlink(missing_ok=True)
        temporary.replace(output)
    finally:
        temporary.unlink(missing_ok=True)


def _write_card(output: Path, *, sources: dict[str, Any], measured: dict[str, Any], **facts: Any) -> dict[str, Any]:
    card = {"name": output.name, **facts, **sources, **measured, "sha256": _sha256(output)}
    temporary = output.with_name(f".{output.name}.json.{os.getpid()}")
    temporary.write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(_card_path(output))
    return card


def _card_path(output: Path) -> Path:
    return output.with_name(output.name + ".json")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _versions(package: str) -> dict[str, str]:
    # the normalisers ask Unicode's tables what is a digit, an accent, a word
    return {package: importlib.metadata.version(package), "unicode": unicodedata.unidata_version}


def _command(name: str, *arguments: Any, **options: Any) -> str:
    """The line for a shell: an option is repeated for each item of a list, numbers of a tuple are parted by commas."""
    words = ["gristmill", name, *map(str, arguments)]
    for option, value in options.items():
        for one in value if isinstance(value, list) else [value]:
            text = ",".join(map(str, one)) if isinstance(one, tuple) else str(one)
            words += [f"--{option.replace('_', '-')}", text]
    return shlex.join(words)
