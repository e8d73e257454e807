"""Speed, recall and false positives of filters.pii and filters.names against bare Presidio, on the
same text in one run.

    python -m benchmarks.pii [FOLDER]        one line a figure: name, value, unit

FOLDER is the corpus (default $GRISTMILL_DATA, then ../shared/data). The text: 1 MB each of
Wikipedia leads, documentation, and the main text of web pages; then made-up tables of numbers,
which is where phone numbers are slow. Speeds are of CPU time on one core. Names only where the
spaCy model is installed.
"""

import io
import json
import os
import random
import string
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import zstandard

from filters.pii import secrets
from filters.pii.ner import Ner
from filters.pii.recognizers import recognizer
from filters.pii.scrub import Pii
from filters.pii.spans import Scrubbed

MB = 1_000_000
CONFIG = Pii()
PATTERNS = tuple(entity for entity in CONFIG.entities if entity != "SECRET")
# what bare Presidio has
SAME = Pii(entities=PATTERNS)
WARM_UP = "jane@doe-inc.org 93.184.216.34 (212) 555-0147 4111 1111 1111 1111 536-22-1234 GB82WEST12345698765432"


def main(corpus: Path) -> None:
    scrub_bare(WARM_UP)  # imports, compiled expressions
    CONFIG.scrub(WARM_UP)
    text = web_text(corpus)
    report_speed("text", text)
    for name, page in tables().items():
        report_speed(name, [page])

    size = sum(len(page.encode()) for page in text)
    ours, bare = Counter[str](), Counter[str]()
    for page in text:
        ours.update(span.entity for span in CONFIG.scrub(page).spans)
        bare.update(entity for entity, _, _ in scrub_bare(page))
    for (
        entity
    ) in PATTERNS:  # public addresses and real numbers among them: look before calling them false
        print(f"found.gristmill.{entity} {ours[entity] / size * MB:.2f} per MB")
        print(f"found.presidio.{entity} {bare[entity] / size * MB:.2f} per MB")

    for name, ratio in annotated(corpus).items():
        print(f"{name} {ratio:.3f} ratio")
    report_secrets(corpus)
    if find_spec(Ner().model):
        report_names(corpus, text)


def report_speed(name: str, pages: list[str]) -> None:
    size = sum(len(page.encode()) for page in pages)
    timed(CONFIG.scrub, pages)  # warm
    seconds, same, bare = (timed(scrub, pages) for scrub in (CONFIG.scrub, SAME.scrub, scrub_bare))
    print(f"size.{name} {size / MB:.3f} MB")
    print(f"speed.gristmill.{name} {size / MB / same:.3f} MB/s")
    print(f"speed.gristmill_and_secrets.{name} {size / MB / seconds:.3f} MB/s")
    print(f"speed.presidio.{name} {size / MB / bare:.3f} MB/s")


def tables() -> dict[str, str]:
    """Pages of a hundred to two hundred rows of numbers, of kinds that pages have."""
    roll = random.Random(0)

    def day() -> str:
        return f"{roll.randint(1990, 2024)}-{roll.randint(1, 12):02}-{roll.randint(1, 28):02}"

    rows: dict[str, Callable[[], str]] = {
        "integers": lambda: " ".join(str(roll.randint(0, 99_999)) for _ in range(10)),
        "decimals": lambda: "  ".join(f"{roll.uniform(0, 1000):.2f}" for _ in range(8)),
        "cells": lambda: " | ".join(
            f"{roll.randint(0, 10 ** roll.randint(1, 9)):,}" for _ in range(7)
        ),
        "prices": lambda: (
            f"A-{roll.randint(1000, 99_999)} Bolt {roll.randint(1, 40)} x {roll.uniform(1, 99):.2f} {roll.randint(10**5, 10**8)}"
        ),
        "log": lambda: (
            f"{day()} {roll.randint(0, 23):02}:00:59.{roll.randint(0, 999):03} {roll.randint(10**9, 10**10)} 127"
        ),
        "oids": lambda: (
            "1.3.6.1.4.1."
            + ".".join(str(roll.randint(0, 40_000)) for _ in range(4))
            + f" v{roll.randint(1, 9)}.0.{roll.randint(0, 20)}"
        ),
    }
    pages = {f"tables.{name}": "\n".join(row() for _ in range(150)) for name, row in rows.items()}
    pages["tables.all"] = "\n".join(pages.values())
    pages["tables.all_and_a_phone_number"] = pages["tables.all"] + "\nCall (212) 555-0147"
    return pages


def web_text(corpus: Path) -> list[str]:
    sources = [
        (
            lead["extract"]
            for lead in json.load(
                unpacked(corpus / "text/wiki/ovos_summaries_en.json.zst")
            ).values()
        ),
        (
            page["text"]
            for name in ("anarchism", "git-doc", "postfix-doc")
            for page in docs(corpus, name)
        ),
        (
            json.loads(line)["main_content"] or ""
            for line in unpacked(corpus / "gold/wcxb-500.jsonl.zst")
        ),
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
    """What Presidio does without a prefilter: each recogniser on the whole text, results above the
    same score.
    """
    return [
        (entity, hit.start, hit.end)
        for entity in PATTERNS
        for hit in bare_recognizer(entity).analyze(text, [entity])
        if hit.score >= CONFIG.min_score
    ]


@lru_cache
def bare_recognizer(entity: str) -> Any:
    if entity == "CREDIT_CARD":  # ours knows more ranges
        from presidio_analyzer.predefined_recognizers import CreditCardRecognizer

        return CreditCardRecognizer()
    return recognizer(entity, CONFIG.phone_regions)


def annotated(corpus: Path) -> dict[str, float]:
    """Recall, precision and F2 by entity on presidio-research; found = a placeholder, and the value
    is gone.
    """
    gold, right, replaced, bare_right, bare_found = (Counter[str]() for _ in range(5))
    for sample in research(corpus):
        text, scrubbed = sample["full_text"], CONFIG.scrub(sample["full_text"])
        found = Counter(span.entity for span in scrubbed.spans)
        hits = scrub_bare(text)
        replaced.update(found)
        bare_found.update(entity for entity, _, _ in hits)
        for entity in PATTERNS:
            spans = [s for s in sample["spans"] if s["entity_type"] == entity]
            gold[entity] += len(spans)
            right[entity] += min(
                found.get(entity, 0), sum(s["entity_value"] not in scrubbed.text for s in spans)
            )
            bare_right[entity] += overlaps(spans, [hit for hit in hits if hit[0] == entity])
    figures = {}
    for peer, ok, all_found in (
        ("gristmill", right, replaced),
        ("presidio", bare_right, bare_found),
    ):
        for entity in PATTERNS:
            if gold[entity]:
                figures[f"recall.{peer}.{entity}"] = recall = ok[entity] / gold[entity]
                figures[f"precision.{peer}.{entity}"] = precision = ok[entity] / max(
                    1, all_found[entity]
                )
                figures[f"f2.{peer}.{entity}"] = (
                    5 * precision * recall / max(1e-9, 4 * precision + recall)
                )
    return figures


def research(corpus: Path) -> Iterator[dict[str, Any]]:
    for file in sorted((corpus / "pii/presidio-research").glob("*.json")):
        yield from json.loads(file.read_text())


def overlaps(gold: list[dict[str, Any]], hits: list[tuple[str, int, int]]) -> int:
    return sum(
        any(start < s["end_position"] and s["start_position"] < end for _, start, end in hits)
        for s in gold
    )


def report_secrets(corpus: Path) -> None:
    """Secrets found on pages (look before calling them false: documentation shows keys), and found
    of those planted.
    """
    found = size = 0
    files = sorted((corpus / "text/docs").glob("*.zst"))
    pages = [
        json.loads(line)["main_content"] or ""
        for line in unpacked(corpus / "gold/wcxb-500.jsonl.zst")
    ]
    for page in [*pages, *(json.loads(line)["text"] for file in files for line in unpacked(file))]:
        found += len(secrets.find_secrets(page))
        size += len(page)
    print(f"found.SECRET {found / size * MB:.3f} per MB")
    keys = list(planted())
    print(
        f"recall.SECRET {sum(secrets.find_secrets(f'key: {key}, and so on') != [] for key in keys) / len(keys):.3f} ratio"
    )


def planted() -> Iterator[str]:
    """A hundred keys of each of some kinds, as their services make them, but for checksums."""
    roll, base62 = random.Random(0), string.digits + string.ascii_letters
    kinds = [
        ("AKIA", string.ascii_uppercase + "234567", 16),
        *((prefix, base62, 36) for prefix in ("ghp_", "gho_", "npm_")),
        ("glpat-", base62 + "-_", 20),
        ("sk_live_", base62, 24),
        ("AIza", base62 + "-_", 35),
        ("sk-proj-", base62 + "-_", 120),
        ("sk-ant-api03-", base62 + "-_", 95),
        ("hf_", string.ascii_letters, 34),
        ("SK", "0123456789abcdef", 32),
        ("123456789:AA", base62 + "-_", 33),
        ("-----BEGIN PRIVATE KEY-----\n", base62 + "+/", 64),
        ("eyJhbGciOiJIUzI1NiJ9.eyJpZCI6", base62 + "-_", 20),
    ]
    for prefix, letters, length in kinds:
        for _ in range(100):
            key = prefix + "".join(roll.choices(letters, k=length))
            yield (
                key + "." + "".join(roll.choices(letters, k=43))
                if prefix.startswith("eyJ")
                else key
            )


def report_names(corpus: Path, text: list[str]) -> None:
    """Names against Presidio's analyser with the same model and only its recogniser of names."""
    from presidio_analyzer import AnalyzerEngine, RecognizerRegistry
    from presidio_analyzer.nlp_engine import NlpEngineProvider
    from presidio_analyzer.predefined_recognizers import SpacyRecognizer

    names = Ner()
    names.scrub("Jane Doe met Angela Merkel in Berlin.")
    models = [{"lang_code": "en", "model_name": names.model}]
    engine = NlpEngineProvider(
        nlp_configuration={"nlp_engine_name": "spacy", "models": models}
    ).create_engine()
    registry = RecognizerRegistry(recognizers=[SpacyRecognizer()], supported_languages=["en"])
    bare = AnalyzerEngine(registry=registry, nlp_engine=engine, supported_languages=["en"])

    pages = [page for page in text[-500::25] if len(page) < 20_000][:15]
    size = sum(map(len, pages))
    seconds = timed(lambda _: names.scrub_batch([Scrubbed(page, []) for page in pages]), [""])
    bare_seconds = timed(lambda page: bare.analyze(page, "en", list(names.entities)), pages)
    print(f"speed.gristmill.names {size / 1000 / seconds:.1f} kB/s")
    print(f"speed.presidio.names {size / 1000 / bare_seconds:.1f} kB/s")

    gold = ours = theirs = 0
    for sample in list(research(corpus))[:300]:
        people = [s for s in sample["spans"] if s["entity_type"] == "PERSON"]
        scrubbed = names.scrub(sample["full_text"])
        gold += len(people)
        ours += sum(s["entity_value"] not in scrubbed.text for s in people)
        hits = [
            ("PERSON", hit.start, hit.end)
            for hit in bare.analyze(sample["full_text"], "en", ["PERSON"])
        ]
        theirs += overlaps(people, hits)
    print(f"recall.gristmill.PERSON {ours / gold:.3f} ratio")
    print(f"recall.presidio.PERSON {theirs / gold:.3f} ratio")


def unpacked(file: Path) -> io.TextIOWrapper:
    return io.TextIOWrapper(
        zstandard.ZstdDecompressor().stream_reader(file.open("rb")), encoding="utf-8"
    )


def timed(function: Callable[[str], object], texts: list[str]) -> float:
    start = time.process_time()
    for text in texts:
        function(text)
    return time.process_time() - start


if __name__ == "__main__":
    default = os.environ.get("GRISTMILL_DATA", Path(__file__).parents[2] / "shared/data")
    main(Path(sys.argv[1] if len(sys.argv) > 1 else default))
