"""Speed, recall and false positives of filters.pii against Presidio's bare recognisers, on the same text in one run.

    python -m benchmarks.pii [FOLDER]        one line a figure: name, value, unit

FOLDER is the corpus (default $GRISTMILL_DATA, then ../shared/data). The text: 1 MB each of Wikipedia leads,
documentation, and the main text of web pages.
"""

import io
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import zstandard

from filters.pii import Pii, _recognizer, counts

MB = 1_000_000
CONFIG = Pii()


def main(corpus: Path) -> None:
    text = web_text(corpus)
    size = sum(len(page.encode()) for page in text)
    scrub_bare("warm up: jane@example.org 93.184.216.34 (212) 555-0147")  # imports, compiled expressions
    CONFIG.scrub("warm up: jane@example.org 93.184.216.34 (212) 555-0147")

    seconds = timed(CONFIG.scrub, text)
    bare_seconds = timed(scrub_bare, text)
    print(f"text {size / MB:.2f} MB")
    print(f"speed.gristmill {size / MB / seconds:.2f} MB/s")
    print(f"speed.presidio {size / MB / bare_seconds:.2f} MB/s")

    ours, bare = Counter[str](), Counter[str]()
    for page in text:
        ours.update(counts(CONFIG.scrub(page).spans))
        bare.update(entity for entity, _, _ in scrub_bare(page))
    for entity in CONFIG.entities:  # public addresses and real numbers among them: look before calling them false
        print(f"found.gristmill.{entity} {ours[entity] / size * MB:.2f} per MB")
        print(f"found.presidio.{entity} {bare[entity] / size * MB:.2f} per MB")

    for name, ratio in annotated(corpus).items():
        print(f"{name} {ratio:.3f} ratio")


def web_text(corpus: Path) -> list[str]:
    sources = [
        (lead["extract"] for lead in json.load(unpacked(corpus / "text/wiki/ovos_summaries_en.json.zst")).values()),
        (page["text"] for name in ("anarchism", "git-doc", "postfix-doc") for page in docs(corpus, name)),
        (json.loads(line)["main_content"] or "" for line in unpacked(corpus / "gold/wcxb-500.jsonl.zst")),
    ]
    return [text for source in sources for text in first_megabyte(source)]


def docs(corpus: Path, name: str) -> list[dict[str, str]]:
    """A third of a megabyte of one documentation package, so that three make one."""
    pages, size = [], 0
    for line in unpacked(corpus / f"text/docs/{name}.jsonl.zst"):
        pages.append(json.loads(line))
        size += len(line)
        if size > MB // 3:
            break
    return pages


def first_megabyte(texts: Iterator[str]) -> Iterator[str]:
    left = MB
    for text in texts:
        yield text
        left -= len(text.encode())
        if left < 0:
            return


def scrub_bare(text: str) -> list[tuple[str, int, int]]:
    """What Presidio does without a prefilter: each recogniser on the whole text, results above the same score."""
    return [
        (entity, hit.start, hit.end)
        for entity in CONFIG.entities
        for hit in _recognizer(entity, CONFIG.phone_regions).analyze(text, [entity])
        if hit.score >= CONFIG.min_score
    ]


def annotated(corpus: Path) -> dict[str, float]:
    """Recall and precision by entity on presidio-research; found = a placeholder, and the value is gone."""
    gold, right, replaced, bare_right, bare_found = (Counter[str]() for _ in range(5))
    for file in sorted((corpus / "pii/presidio-research").glob("*.json")):
        for sample in json.loads(file.read_text()):
            text, scrubbed = sample["full_text"], CONFIG.scrub(sample["full_text"])
            found = counts(scrubbed.spans)
            hits = scrub_bare(text)
            replaced.update(found)
            bare_found.update(entity for entity, _, _ in hits)
            for entity in CONFIG.entities:
                spans = [s for s in sample["spans"] if s["entity_type"] == entity]
                gold[entity] += len(spans)
                right[entity] += min(found.get(entity, 0), sum(s["entity_value"] not in scrubbed.text for s in spans))
                bare_right[entity] += sum(
                    any(e == entity and start < s["end_position"] and s["start_position"] < end for e, start, end in hits)
                    for s in spans
                )
    return {
        f"{figure}.{peer}.{entity}": part[entity] / whole[entity]
        for peer, ok, all_found in (("gristmill", right, replaced), ("presidio", bare_right, bare_found))
        for figure, part, whole in (("recall", ok, gold), ("precision", ok, all_found))
        for entity in CONFIG.entities
        if whole[entity]
    }


def unpacked(file: Path) -> io.TextIOWrapper:
    return io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(file.open("rb")), encoding="utf-8")


def timed(function: Callable[[str], object], texts: list[str]) -> float:
    start = time.perf_counter()
    for text in texts:
        function(text)
    return time.perf_counter() - start


if __name__ == "__main__":
    default = os.environ.get("GRISTMILL_DATA", Path(__file__).parents[2] / "shared/data")
    main(Path(sys.argv[1] if len(sys.argv) > 1 else default))
