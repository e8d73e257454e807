"""The heuristics on real pages: time per document, agreement with the slow reference and with
datatrove's classes.

    python benchmarks/heuristics.py [DATA] [--peer-python PATH]

DATA is the corpus (default ../shared/data); its wcxb-500 pages are extracted once with trafilatura
and kept in the temporary folder. PATH is the Python of an environment that holds datatrove and
spaCy.

Where datatrove decides otherwise it is for one of these reasons:

blank      datatrove counts lines of nothing but spaces, so that their repetition is duplicate lines; for us they are no
           lines. All differences in gopher_repetition, and the reason that they stay.
words      spaCy's English tokenizer against one regular expression (filters/text.py says where they part). It shows in
           source code and TeX, where we cut off more marks: alpha_word_ratio falls below 0.8 by up to 0.02. All
           differences in gopher_quality.
symbols    datatrove counts a lone "•", "→" or "€" as a word, because its list of punctuation does not hold them.
join       datatrove joins n-grams without a space, so that "a bc" and "ab c" are one.
curly      datatrove looks for "{" and "lorem ipsum" before it drops policy lines, we look at what C4 leaves.
sentences  spaCy's splitter against one regular expression.

The last four are there in principle; none of them decided a document of wcxb-500.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from filters import first_failure, rules
from filters.c4 import C4
from filters.fineweb import Fineweb
from filters.gopher_quality import GopherQuality
from filters.gopher_repetition import GopherRepetition
from filters.text.view import TextView
from tests.support import heuristics_reference

# the order in which FineWeb runs them; C4 edits the text that FineWeb's own rules see
HEURISTICS: dict[str, Any] = {
    "gopher_repetition": GopherRepetition(),
    "gopher_quality": GopherQuality(),
    "c4": C4(),
    "fineweb": Fineweb(),
}

# run by the peer's Python: text per line in, per line out the verdict of each filter and its
# seconds
PEER = """
import json, sys, time
from datatrove.data import Document
from datatrove.pipeline.filters import (
    C4QualityFilter, FineWebQualityFilter, GopherQualityFilter, GopherRepetitionFilter
)
filters = {
    "gopher_repetition": GopherRepetitionFilter(), "gopher_quality": GopherQualityFilter(),
    "c4": C4QualityFilter(filter_no_terminal_punct=False), "fineweb": FineWebQualityFilter(),
}
GopherQualityFilter().filter(Document(text="warm up the tokenizer", id=""))
for line in sys.stdin:
    document, answer = Document(text=json.loads(line), id=""), {}
    for name, filter in filters.items():
        before, start = document.text, time.process_time()
        result = filter.filter(document)
        answer[name] = [None if result is True else result[1], time.process_time() - start]
        if name == "c4" and result is not True:  # datatrove then leaves the text unedited; no pipeline would go on
            document.text = before
    print(json.dumps(answer))
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "data", nargs="?", type=Path, default=Path(__file__).parents[2] / "shared" / "data"
    )
    parser.add_argument("--peer-python", type=Path)
    args = parser.parse_args()

    texts = extracted(args.data / "warc" / "web" / "wcxb-500.warc.gz")
    chars = sum(map(len, texts))
    seconds = [min(times) for times in zip(*(times_of(texts) for _ in range(5)), strict=True)]
    print(f"documents {len(texts)}, mean {chars / len(texts):,.0f} characters")
    print(f"all heuristics: {sum(seconds) / len(texts) * 1e3:.2f} ms per document")
    print(f"all heuristics: {sum(seconds) / chars * 9_000 * 1e3:.2f} ms per 9,000 characters")
    print(f"all heuristics: {statistics.median(seconds) * 1e3:.2f} ms for the median document")

    ours = [verdicts(text) for text in texts]
    slow = [reference_verdicts(text) for text in texts]
    print(
        f"agreement with the reference, keep or drop: {agreement(map(kept, ours), map(kept, slow)):.2%}"
    )
    if args.peer_python is not None:
        compare(texts, ours, ask_peer(args.peer_python, texts))


def extracted(warc: Path) -> list[str]:
    cache = Path(tempfile.gettempdir()) / "gristmill-heuristics.jsonl"
    if not cache.exists():
        import trafilatura
        from fastwarc.warc import ArchiveIterator, WarcRecordType

        with warc.open("rb") as stream:
            records = ArchiveIterator(stream, record_types=WarcRecordType.response)
            texts = [trafilatura.extract(record.reader.read()) for record in records]
        cache.write_text("".join(json.dumps(text) + "\n" for text in texts if text), "utf-8")
    return [json.loads(line) for line in cache.read_text("utf-8").splitlines()]


def scores(text: str) -> dict[str, dict[str, float]]:
    view, result = TextView(text), {}
    for name, heuristic in HEURISTICS.items():
        view = heuristic.edit(view)[0] if name == "c4" else view
        result[name] = heuristic.measure(view)
    return result


def times_of(texts: list[str]) -> list[float]:
    seconds = []
    for text in texts:
        start = time.process_time()  # not the clock on the wall: the machine is shared
        scores(text)
        seconds.append(time.process_time() - start)
    return seconds


def failures(measured: dict[str, dict[str, float]]) -> dict[str, list[str]]:
    """By filter every rule that is broken, the one that rejects first."""
    broken: dict[str, list[str]] = {}
    for name, heuristic in HEURISTICS.items():
        first = first_failure(name, heuristic, measured[name])
        rejecting = [first.rule.split(".")[1]] if first else []
        for rule, bound in rules(heuristic).items():
            if (
                bound is not None
                and not bound[0] <= measured[name][rule] <= bound[1]
                and rule not in rejecting
            ):
                rejecting.append(rule)
        broken[name] = rejecting
    return broken


def verdicts(text: str) -> dict[str, list[str]]:
    return failures(scores(text))


def reference_verdicts(text: str) -> dict[str, list[str]]:
    edited = heuristics_reference.c4_edit(text, HEURISTICS["c4"])
    return failures(
        {
            "gopher_repetition": heuristics_reference.gopher_repetition(text),
            "gopher_quality": heuristics_reference.gopher_quality(
                text, HEURISTICS["gopher_quality"]
            ),
            "c4": heuristics_reference.c4(edited),
            "fineweb": heuristics_reference.fineweb(edited, HEURISTICS["fineweb"]),
        }
    )


def kept(verdict: dict[str, list[str]]) -> bool:
    return not any(verdict.values())


def agreement(left: Any, right: Any) -> float:
    pairs = list(zip(left, right, strict=True))
    return sum(a == b for a, b in pairs) / len(pairs)


def ask_peer(python: Path, texts: list[str]) -> list[dict[str, tuple[str | None, float]]]:
    lines = "".join(json.dumps(text) + "\n" for text in texts)
    done = subprocess.run([python, "-c", PEER], input=lines, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{python}: datatrove failed\n{done.stderr}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def compare(
    texts: list[str],
    ours: list[dict[str, list[str]]],
    peers: list[dict[str, tuple[str | None, float]]],
) -> None:
    seconds = sum(spent for peer in peers for _, spent in peer.values())
    print(
        f"datatrove: {seconds / sum(map(len, texts)) * 9_000 * 1e3:.2f} ms per 9,000 characters (stops at a failure)"
    )
    # without C4's verdict datatrove hands FineWeb's rules the unedited text: compare those where
    # both keep
    for name in HEURISTICS:
        chosen = [
            (a[name], b[name][0])
            for a, b in zip(ours, peers, strict=True)
            if name != "fineweb" or not b["c4"][0]
        ]
        same = sum((not rejecting) == (reason is None) for rejecting, reason in chosen)
        print(f"agreement with datatrove, {name}: {same / len(chosen):.2%} of {len(chosen)}")
        differences = Counter(
            f"we drop for {', '.join(rejecting)}" if rejecting else f"it drops for {reason}"
            for rejecting, reason in chosen
            if (not rejecting) != (reason is None)
        )
        for difference, number in differences.most_common():
            print(f"    {number} x {difference}")
    both = [
        (kept(a), all(reason is None for reason, _ in b.values()))
        for a, b in zip(ours, peers, strict=True)
    ]
    print(f"agreement with datatrove, keep or drop: {sum(a == b for a, b in both) / len(both):.2%}")
    print(f"kept: {sum(a for a, _ in both)} here, {sum(b for _, b in both)} by datatrove")


if __name__ == "__main__":
    main()
