"""What the models that users can train are worth, and what they cost.

    python -m benchmarks.models {lm,classifier,refine} [DATA]      one line a figure: name, value, unit

lm          Held-out perplexity by our trainer and filter, against plain lmplz and query on the same lines. How well perplexity
            parts clean text, web text, boilerplate and shuffled words (AUC: how often a text of the second kind is the more
            surprising). A spam paragraph in a good page: what the worst window sees of it. Speed against a bare loop over
            kenlm.Model.score, on lines that are already normalised.
classifier  Clean text (Wikipedia, gold main texts) against whole pages as they come: AUC, precision, speed; twice the same bytes.
refine      What each step of refine costs on the main texts of the 500 pages, and its share of the whole. Names, which are a
            phase of their own, on every tenth page.

The text to train on: leads of Wikipedia, two packages of documentation in prose, 20 MB; for the
speed of a larger model all documentation, 5-grams kept if seen once. The web text: the 500 pages of
WCXB. Seconds are of CPU.
"""

import argparse
import contextlib
import io
import json
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.heuristics import extracted
from benchmarks.texts import documentation, leads, lines, seeded
from filters import perplexity, quality
from filters.decontamination import Decontamination
from filters.perplexity import Perplexity
from filters.pii.ner import Ner
from filters.pii.scrub import Pii
from filters.quality import Quality
from filters.text import ccnet
from filters.text.view import TextView
from filters.toxicity import Toxicity
from pipeline.models.benchmark_index import build_index
from pipeline.models.model_card import is_held_out
from pipeline.models.options import ClassifierOptions, IndexOptions, LmOptions
from pipeline.models.train_classifier import auc, train_classifier
from pipeline.models.train_lm import find_kenlm, train_lm

MB = 1_000_000
ROUNDS = 5
PROSE = ("anarchism", "git-doc")
PIECES = 16_000
TURN = 20  # documents
WINDOWS = (32, 64, 128)


class Page(NamedTuple):
    """A web page: its main text as annotated, and all its text."""

    url: str
    main: str
    whole: str

    @property
    def boilerplate(self) -> str:
        """The lines of the page that its main text does not hold."""
        main = " ".join(self.main.split())
        return "\n".join(
            line for line in self.whole.splitlines() if " ".join(line.split()) not in main
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=BENCHMARKS)
    default = Path(os.environ.get("GRISTMILL_DATA", Path(__file__).parents[2] / "shared" / "data"))
    parser.add_argument("data", nargs="?", type=Path, default=default)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        BENCHMARKS[args.what](args.data, Path(folder))


def figure(name: str, value: float, unit: str, digits: int = 3) -> None:
    print(f"{name} {value:,.{digits}f} {unit}", flush=True)


# --- language models ------------------------------------------------------------------------------


def lm(data: Path, folder: Path) -> None:
    """Equality with KenLM's own programs, separation, speed."""
    seen, unseen = fifth(leads(data))
    wiki, prose = folder / "wiki.jsonl", folder / "prose.jsonl"
    figure("text.wiki", write(wiki, seen) / MB, "MB")
    figure("text.prose", write(prose, documentation(data, PROSE)) / MB, "MB")
    equality(wiki, folder)

    found = pages(data)
    models = {
        "words": train([wiki, prose], folder / "words.bin"),
        "pieces": train([wiki, prose], folder / "pieces.bin", sentencepiece=PIECES),
    }
    for name, model in models.items():
        separation(name, model, clean=unseen, web=found)
        spam(name, model, found)
    everything = folder / "everything.jsonl"
    figure("text.everything", write(everything, [*seen, *documentation(data)]) / MB, "MB")
    models |= {
        "large": train([everything], folder / "large.bin", prune="0"),
        "bundled": str(perplexity.BUNDLED),
    }
    for name, model in models.items():
        for kind, texts in (("web", [page.main for page in found]), ("wiki", unseen)):
            speed(f"{name}.{kind}", model, texts)


def train(sources: Sequence[Path], output: Path, **options: Any) -> str:
    start = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        paths = [str(source) for source in sources]
        card = train_lm(LmOptions(sources=paths, output=output, licence="none", **options))
    figure(f"train.{output.stem}.python", time.process_time() - start, "s", 1)
    figure(f"train.{output.stem}.size", output.stat().st_size / MB, "MB", 1)
    figure(f"train.{output.stem}.held_out", card["held_out"]["perplexity"], "perplexity", 1)
    return str(output)


def equality(source: Path, folder: Path) -> None:
    """The same lines through lmplz and query by hand: no trie, no quantisation, no Python."""
    with contextlib.redirect_stdout(io.StringIO()):
        ours = {
            bits: train_lm(
                LmOptions(
                    sources=[str(source)], output=folder / f"{bits}.bin", licence="none", bits=bits
                )
            )["held_out"]
            for bits in (0, 8)
        }
    texts = [row["text"] for row in map(json.loads, source.open())]
    sides = [folder / name for name in ("train", "held")]
    for held, path in enumerate(sides):
        side = [text for text in texts if is_held_out(text, share=0.02) == held]
        path.write_text(
            "".join(
                f"{ccnet.normalize_line(line)}\n"
                for text in side
                for line in text.split("\n")
                if ccnet.normalize_line(line)
            )
        )
    lmplz = find_kenlm()[0]
    arpa = folder / "arpa"
    command = [
        lmplz,
        "-o",
        "5",
        "-S",
        "1G",
        "--prune",
        "0",
        "0",
        "1",
        "--text",
        str(sides[0]),
        "--arpa",
        str(arpa),
    ]
    subprocess.run(command, check=True, capture_output=True)
    query = [str(Path(lmplz).with_name("query")), "-v", "summary", str(arpa)]
    said = subprocess.run(query, stdin=sides[1].open("rb"), check=True, capture_output=True)
    theirs = float(re.findall(rb"including OOVs:\s*([\d.e+]+)", said.stdout + said.stderr)[0])
    figure("equal.query", theirs, "perplexity", 4)
    figure("equal.train_lm", ours[0]["perplexity"], "perplexity", 4)
    figure("equal.difference", abs(ours[0]["perplexity"] / theirs - 1), "relative", 8)
    figure("equal.difference_8_bits", abs(ours[8]["perplexity"] / theirs - 1), "relative", 8)


def separation(name: str, model: str, *, clean: Sequence[str], web: Sequence[Page]) -> None:
    main_texts = [page.main for page in web]
    kinds = {
        "clean": clean,
        "web": main_texts,
        "boilerplate": [page.boilerplate for page in web],
        "shuffled": [shuffled(text, i) for i, text in enumerate(main_texts)],
    }
    scores = {kind: scores_of(model, texts)[0] for kind, texts in kinds.items()}
    for kind, found in scores.items():
        figure(f"{name}.median.{kind}", float(np.median(found)), "perplexity", 0)
    for lower, higher in (
        ("clean", "web"),
        ("web", "boilerplate"),
        ("web", "shuffled"),
        ("clean", "boilerplate"),
    ):
        figure(f"{name}.{lower}_{higher}", auc(scores[higher], scores[lower]), "AUC")


def spam(name: str, model: str, web: Sequence[Page]) -> None:
    """60 shuffled words of another page as a paragraph of its own, in the middle of a page."""
    main_texts = [page.main for page in web if page.main.count("\n") >= 4]
    spammed = []
    for i, text in enumerate(main_texts):
        paragraphs = text.split("\n")
        paragraphs.insert(
            len(paragraphs) // 2, " ".join(shuffled(main_texts[i - 1], i).split()[:60])
        )
        spammed.append("\n".join(paragraphs))
    for window in WINDOWS:
        clean, dirty = scores_of(model, main_texts, window), scores_of(model, spammed, window)
        if window == WINDOWS[0]:
            figure(f"{name}.spam.perplexity", auc(dirty[0], clean[0]), "AUC")
        figure(f"{name}.spam.worst_window_{window}", auc(dirty[1], clean[1]), "AUC")


def scores_of(model: str, texts: Iterable[str], window: int = 64) -> tuple[Any, Any]:
    """Perplexities of the texts that hold a token, and of their worst windows."""
    filter = Perplexity(model=model, window=window)
    found = [filter.measure(TextView(text)) for text in texts]
    pairs = np.array(
        [(f["perplexity"], f["worst_window"]) for f in found if f["perplexity"] == f["perplexity"]]
    )
    return pairs[:, 0], pairs[:, 1]


def speed(name: str, model: str, texts: Sequence[str]) -> None:
    """The filter on documents, and its scoring of lines already normalised, against KenLM alone on
    the same lines.

    In turn, a few documents each time and not the same ones, so that what else the machine does
    slows both alike.
    """
    loaded, filter = perplexity.load(model), Perplexity(model=model)
    normalized = [loaded.normalize(text) for text in texts]
    ready = [
        [" ".join(line.decode().split()) for line, t in zip(*n, strict=True) if t]
        for n in normalized
    ]
    views = [TextView(text) for text in texts]
    seconds = {"kenlm": 0.0, "filter": 0.0, "scoring": 0.0, "normalizer": 0.0}
    for start in range(0, len(texts) * ROUNDS, TURN):
        starts = [start + shift * len(texts) // 4 for shift in range(4)]
        here, there, later, last = (
            [(first + k) % len(texts) for k in range(TURN)] for first in starts
        )
        seconds["kenlm"] += cpu(
            lambda numbers=here: [loaded.kenlm.score(line) for i in numbers for line in ready[i]]
        )
        seconds["filter"] += cpu(lambda numbers=there: [filter.measure(views[i]) for i in numbers])
        seconds["scoring"] += cpu(
            lambda ns=later: [perplexity.score(normalized[i], loaded.kenlm, window=64) for i in ns]
        )
        seconds["normalizer"] += cpu(
            lambda numbers=last: [loaded.normalize(texts[i]) for i in numbers]
        )
    size = sum(len(text.encode("utf-8", "replace")) for text in texts) * ROUNDS / MB
    for what, spent in seconds.items():
        figure(f"speed.{name}.{what}", size / spent, "MB/s", 1)
    for what in ("filter", "scoring"):
        figure(f"speed.{name}.ratio.{what}", seconds["kenlm"] / seconds[what], "of KenLM")


# --- classifiers ----------------------------------------------------------------------------------


def classifier(data: Path, folder: Path) -> None:
    """A third of the pages give gold texts to train on, a third whole pages, a third are for
    judging; of the leads 4/5 train.
    """
    found = pages(data)
    gold, ordinary, judged = (
        [page for i, page in enumerate(found) if i % 3 == part] for part in range(3)
    )
    seen, unseen = fifth(leads(data))
    sources = {"hq": folder / "hq.jsonl", "lq": folder / "lq.jsonl"}
    write(sources["hq"], [*seen[:1000], *(page.main for page in gold)])
    write(sources["lq"], [page.whole for page in ordinary])
    made = []
    for _ in range(2):
        start = time.process_time()
        with contextlib.redirect_stdout(io.StringIO()):
            train_classifier(
                ClassifierOptions(
                    positive=[str(sources["hq"])],
                    negative=[str(sources["lq"])],
                    output=folder / "q.bin",
                    licence="none",
                )
            )
        made.append((folder / "q.bin").read_bytes())
    figure("train", time.process_time() - start, "s", 1)
    figure("train.same_bytes_twice", made[0] == made[1], "of 1", 0)
    for name, path in {"trained": folder / "q.bin", "bundled": quality.BUNDLED}.items():
        judge(name, quality.load(str(path)), wiki=unseen, pages=judged)
    prediction(quality.load(str(folder / "q.bin")), [page.whole for page in found])


def judge(name: str, model: Any, *, wiki: Sequence[str], pages: Sequence[Page]) -> None:
    """As many leads as pages; the best tenth of all texts is kept."""

    def score(texts: Iterable[str]) -> Any:
        found = np.array(quality.probabilities(list(texts), model, label="hq"))
        return np.where(np.isnan(found), 0.0, found)

    ordinary = score(page.whole for page in pages)
    clean = {"wiki": score(wiki[: len(pages)]), "gold": score(page.main for page in pages)}
    for kind, scores in {**clean, "both": np.concatenate([*clean.values()])}.items():
        figure(f"{name}.{kind}", auc(scores, ordinary), "AUC")
        everything = np.concatenate([scores, ordinary])
        best = np.argsort(-everything, kind="stable")[: round(len(everything) / 10)]
        figure(
            f"{name}.{kind}.precision_at_10_percent",
            float((best < len(scores)).mean()),
            f"({len(scores)} of {len(everything)})",
        )


def prediction(model: Any, texts: Sequence[str]) -> None:
    batch = min(cpu(lambda: quality.predict(texts, model)) for _ in range(ROUNDS))
    single = min(
        cpu(lambda: [quality.predict([text], model) for text in texts]) for _ in range(ROUNDS)
    )
    figure("predict.mean_size", sum(map(len, texts)) / len(texts), "characters", 0)
    figure("predict.batch", len(texts) / batch, "documents/s", 0)
    figure("predict.one_by_one", len(texts) / single, "documents/s", 0)


# --- texts ----------------------------------------------------------------------------------------


def pages(data: Path) -> list[Page]:
    """WCXB's pages that have a main text, with all the text that resiliparse finds in them."""
    from fastwarc.warc import ArchiveIterator, WarcRecordType
    from resiliparse.extract.html2text import extract_plain_text
    from resiliparse.parse.encoding import bytes_to_str, detect_encoding

    gold = {
        row["url"]: row["main_content"]
        for row in lines(data / "gold" / "wcxb-500.jsonl.zst")
        if row["main_content"]
    }
    with (data / "warc" / "web" / "wcxb-500.warc.gz").open("rb") as stream:
        found = []
        for record in ArchiveIterator(stream, record_types=WarcRecordType.response):
            url, body = record.headers["WARC-Target-URI"], record.reader.read()
            if url in gold:
                found.append(
                    Page(
                        url,
                        gold[url],
                        extract_plain_text(bytes_to_str(body, detect_encoding(body) or "utf-8")),
                    )
                )
    return found


def fifth(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Four fifths to be seen in training, and one that is not."""
    return [text for i, text in enumerate(texts) if i % 5], list(texts[::5])


def write(path: Path, texts: Iterable[str]) -> int:
    """One text a row; returns their size in bytes."""
    texts = list(texts)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return sum(len(text.encode("utf-8", "replace")) for text in texts)


def shuffled(text: str, number: int) -> str:
    """The words of each line anywhere in the text."""
    words = text.split()
    order: Iterator[int] = iter(seeded("shuffled", number).permutation(len(words)))
    return "\n".join(
        " ".join(words[next(order)] for _ in line.split()) for line in text.splitlines()
    )


def cpu(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


# --- the steps of refine --------------------------------------------------------------------------


def refine(data: Path, folder: Path) -> None:
    """Milliseconds per document and share of the total of every step; all benchmarks in the index,
    all English words listed.
    """
    views = [TextView(text, "en") for text in extracted(data / "warc" / "web" / "wcxb-500.warc.gz")]
    archive = str(data / "benchmarks" / "decontam-all.tar.zst")
    build_index(IndexOptions(files=[archive], output=folder / "index"))
    steps: dict[str, Callable[[TextView], object]] = {
        "perplexity": Perplexity(model=str(perplexity.BUNDLED)).measure,
        "quality": Quality(model=str(quality.BUNDLED)).measure,
        "toxicity": Toxicity(lists=str(data / "lists" / "badwords")).measure,
        "decontamination": Decontamination(index=str(folder / "index")).measure,
        "pii": lambda view: Pii().scrub(view.text),
    }
    costs = {name: per_document(step, views) for name, step in steps.items()}
    figure("documents", len(views), "", 0)
    figure("mean_size", sum(len(view.text) for view in views) / len(views), "characters", 0)
    for name, cost in costs.items():
        figure(f"{name}.cost", cost, "ms a document")
        figure(f"{name}.share", 100 * cost / sum(costs.values()), "%", 1)
    figure(
        "names.cost",
        per_document(lambda view: Ner(enabled=True).scrub(view.text), views[::10]),
        "ms a document",
        1,
    )


def per_document(step: Callable[[TextView], object], views: Sequence[TextView]) -> float:
    """Milliseconds of CPU; models are loaded before."""
    step(TextView("Write to jane@example.net, or call +1 212 555 0147. The quick brown fox.", "en"))
    start = time.process_time()
    for view in views:
        step(TextView(view.text, view.language))
    return (time.process_time() - start) / len(views) * 1000


BENCHMARKS: dict[str, Callable[[Path, Path], None]] = {
    "lm": lm,
    "classifier": classifier,
    "refine": refine,
}

if __name__ == "__main__":
    main()
