"""Decontamination: planted test items found, clean pages taken for test items, speed, and what the
index costs.

    python -m benchmarks.decontamination [DATA] [--n 13] [--show]      one line a figure: name, value, unit

Items of every evaluation set, ITEMS a set at most, are planted whole, each in the middle of a web
page, as they are or changed. Found: the page's coverage exceeds the bound. `indexed` leaves out
items without a text long enough for a passage; those that are long enough together are all looked
for in `short`, arranged as pages have them. --n is the length of n-grams; --show prints matches on
clean text above 0.1, for a look.
"""

import argparse
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.texts import documentation, leads, seeded, web_pages
from filters import decontamination, passage_index
from filters.decontamination import Decontamination
from filters.passage_index import Index
from filters.text.view import TextView
from filters.text.words import normalize
from pipeline.models.benchmark_index import build_index, by_benchmark
from pipeline.models.evaluation_sets import evaluation_files
from pipeline.models.options import IndexOptions

MB = 1_000_000
ITEMS = 20
BOUNDS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7)
DEFAULT = 0.2  # of Decontamination.coverage
CHANGES: dict[str, Callable[[str, np.random.Generator], str]] = {
    "verbatim": lambda text, rng: text,
    "re-cased": lambda text, rng: text.upper(),
    "re-spaced": lambda text, rng: re.sub(
        r"\s+", lambda gap: rng.choice(["\n", "  ", "\u00a0", " \t"]), text
    ),
    "punctuation": lambda text, rng: re.sub(
        r"[^\w\s]", lambda mark: {"'": "’", '"': "”", "-": " – "}.get(mark[0], ";"), text
    ),
    "word in 20": lambda text, rng: exchanged(text, 20, rng),
    "word in 10": lambda text, rng: exchanged(text, 10, rng),
}


# of these sets the question is a row's last text, of the others the first
QUESTION_LAST = {"arc_easy", "arc_challenge", "piqa"}
ARRANGED: dict[str, Callable[[str, list[str]], str]] = {
    "a line each": lambda question, answers: "\n".join([question, *answers]),
    "lettered": lambda question, answers: "\n".join(
        [question, *(f"{c}. {a}" for c, a in zip("ABCDEFGH", answers, strict=False))]
    ),
    "one answer": lambda question, answers: f"{question} {answers[-1]}",
    "Q and A": lambda question, answers: f"Q: {question}\nA: {answers[-1]}",
}
N, MIN_WORDS = IndexOptions.n, IndexOptions.min_words


class Item(NamedTuple):
    """A test item: all its strings, a line each, and whether one of them is long enough to be a
    passage.
    """

    benchmark: str
    text: str
    indexed: bool


def main(data: Path, *, n: int, show: bool) -> None:
    """Print the figures."""
    archive = str(data / "benchmarks" / "decontam-all.tar.zst")
    pages, wiki = web_pages(data), leads(data)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "index")
        options = IndexOptions(files=[archive], output=path, n=n, min_words=min(n, MIN_WORDS))
        seconds, header = timed(lambda: build_index(options))
        totals = sum(by_benchmark(header).values(), start=Counter[str]())
        print(f"build {seconds:.1f} s CPU")
        for name, count in totals.items():
            print(f"index.{name} {count:,} number")
        print(f"index.size {path.stat().st_size / MB:.1f} MB")
        print(f"index.per_ngram {path.stat().st_size / totals['ngrams']:.2f} bytes")
        index = passage_index.load_index(str(path))
        items = list(sample(archive))
        recall(items, pages, index)
        short(archive, index)
        trimmed(items, pages, str(path))
        docs = list(documentation(data, ["anarchism", "debian-handbook"]))
        for name, texts in (("wcxb-500", pages), ("wiki leads", wiki), ("debian docs", docs)):
            false_positives(name, texts, str(path), show=show)
        speed(pages, wiki, index, naive(archive))


def sample(archive: str) -> Iterator[Item]:
    for name, rows in rows_by_benchmark(archive).items():
        rng = seeded("decontamination", name)
        for place in rng.permutation(len(rows))[:ITEMS].tolist():
            strings = list(dict.fromkeys(rows[place]))
            indexed = any(len(normalize(s).split()) >= MIN_WORDS for s in strings)
            yield Item(name, "\n".join(strings), indexed)


def rows_by_benchmark(archive: str) -> dict[str, list[list[str]]]:
    rows: dict[str, list[list[str]]] = {}
    for source in evaluation_files(archive):
        rows.setdefault(source.benchmark, []).extend(row for row in source.rows if row)
    return rows


def exchanged(text: str, every: int, rng: np.random.Generator) -> str:
    """One word in so many exchanged for another, at random places."""
    words = re.split(r"(\s+)", text)
    for place in range(0, len(words), 2):
        if rng.random() < 1 / every:
            words[place] = str(rng.choice(["quern", "hopper", "sluice", "bolter", "tailrace"]))
    return "".join(words)


def planted(item: Item, page: str, change: str) -> tuple[str, str]:
    """The page with the changed item between two of its lines, and the changed item."""
    text = CHANGES[change](item.text, seeded(change, item.text))
    lines = page.split("\n")
    return "\n".join([*lines[: len(lines) // 2], text, *lines[len(lines) // 2 :]]), text


def recall(items: list[Item], pages: list[str], index: Index) -> None:
    """Shares of the planted items whose page is found, by kind of change and bound."""
    print(f"planted {len(items)} items, of which indexed {sum(item.indexed for item in items)}")
    for change in CHANGES:
        shares = np.array(
            [
                best(planted(item, pages[k % len(pages)], change)[0], index)
                for k, item in enumerate(items)
            ]
        )
        indexed = np.array([item.indexed for item in items])
        for bound in BOUNDS:
            print(
                f"recall.{change}.above {bound}.indexed {np.mean(shares[indexed] > bound):.3f} share"
            )
        print(f"recall.{change}.above {DEFAULT}.all {np.mean(shares > DEFAULT):.3f} share")


def short(archive: str, index: Index) -> None:
    """Shares found of the rows that have no passage but MIN_WORDS words together: as in their
    files, and as pages have them.
    """
    found: dict[str, list[bool]] = {}
    for name, rows in rows_by_benchmark(archive).items():
        for row in rows:
            counts = [len(normalize(text).split()) for text in dict.fromkeys(row)]
            if max(counts) >= MIN_WORDS or sum(counts) < MIN_WORDS:
                continue
            *rest, last = (text for text in dict.fromkeys(row) if not re.fullmatch("[A-E]", text))
            if not rest:
                continue
            question, *answers = (last, *rest) if name in QUESTION_LAST else (*rest, last)
            bare = re.sub(r"^(Question|Q):\s*|\s*(Answer|A):\s*$", "", question)
            texts = {
                "as in the file": "\n".join(row),
                **{how: arrange(bare, answers) for how, arrange in ARRANGED.items()},
            }
            for how, text in texts.items():
                found.setdefault(how, []).append(best(text, index) > DEFAULT)
    for how, hits in found.items():
        print(f"short.{how}.above {DEFAULT} {np.mean(hits):.3f} of {len(hits)} rows")


def best(text: str, index: Index) -> float:
    return float(
        decontamination.coverage(passage_index.find_matches(text, index), index).shares.max(
            initial=0.0
        )
    )


def trimmed(items: list[Item], pages: list[str], path: str) -> None:
    """What trimming leaves of the planted items, and takes of the pages around them, by characters."""
    cut = Decontamination(index=path, action="trim", cut_share=None)
    left = taken = of_items = of_pages = 0
    for k, item in enumerate(items):
        page, text = planted(item, pages[k % len(pages)], "verbatim")
        rest = cut.edit(TextView(page))[0].text
        if item.indexed and rest != page:
            gone = len(page) - len(rest)
            of_items, of_pages = of_items + len(text), of_pages + len(page) - len(text)
            left, taken = left + max(0, len(text) - gone), taken + max(0, gone - len(text))
    print(f"trim.item_left {left / of_items:.3f} share of characters")
    print(f"trim.page_taken {taken / of_pages:.4f} share of characters")


def false_positives(name: str, texts: list[str], path: str, *, show: bool) -> None:
    measured = [Decontamination(index=path).measure(TextView(text)) for text in texts]
    for bound in BOUNDS:
        print(
            f"clean.{name}.above {bound} {sum(m['coverage'] > bound for m in measured)} of {len(texts)} documents"
        )
    for m in sorted(measured, key=lambda m: -m["coverage"]) if show else ():
        if m["coverage"] > 0.1:
            print(f"    {m['coverage']:.2f} {m['benchmark']} {m['evidence']}")


def naive(archive: str) -> Callable[[str], bool]:
    """A set of tuples of words, texts shorter than a tuple left out. Its bytes: tuples and their
    table, the words not counted.
    """
    held = {
        gram
        for rows in rows_by_benchmark(archive).values()
        for row in rows
        for text in row
        for gram in tuples(text)
    }
    print(
        f"set_of_tuples.per_ngram {sys.getsizeof(held) / len(held) + sys.getsizeof((None,) * N):.0f} bytes"
    )
    return lambda text: not held.isdisjoint(tuples(text))


def tuples(text: str) -> Iterable[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return zip(*(words[k:] for k in range(N)), strict=False)


def speed(pages: list[str], wiki: list[str], index: Index, peer: Callable[[str], bool]) -> None:
    """CPU time of both on the same texts, by turns."""
    for name, texts in (("web", pages), ("wiki leads", wiki[:3000])):
        size = sum(len(text.encode()) for text in texts) / MB
        rounds = [
            (
                timed(lambda texts=texts: [passage_index.find_matches(t, index) for t in texts])[0],
                timed(lambda texts=texts: [peer(t) for t in texts])[0],
            )
            for _ in range(3)
        ]
        ours, theirs = (min(column) for column in zip(*rounds, strict=True))
        print(f"speed.{name}.gristmill {size / ours:.1f} MB/s/core")
        print(f"speed.{name}.set_of_tuples {size / theirs:.1f} MB/s/core")
        print(f"speed.{name}.per_document {ours / len(texts) * 1000:.2f} ms")


def timed(work: Callable[[], object]) -> tuple[float, object]:
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Figures of decontamination.")
    parser.add_argument(
        "data", nargs="?", type=Path, default=Path(__file__).parents[2] / "shared" / "data"
    )
    parser.add_argument("--n", type=int, default=N)
    parser.add_argument("--show", action="store_true")
    arguments = parser.parse_args()
    main(arguments.data, n=arguments.n, show=arguments.show)
