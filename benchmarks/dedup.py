"""Near-duplicates: how fast are signatures, how many copies are found, what does it cost at scale,
what does the peer find?

    python -m benchmarks.dedup [signatures|recall|scale|peer|all] [DATA] [--peer-python PY] [--plot
    FILE] ...

signatures   documents of 500 words, one core: ours, datasketch 2, datatrove's first step, rensa
recall       pairs of shared/data/dups against their truth; planted copies against the S-curve; unrelated pages found
scale        synthetic keys through all dedup phases, each in processes of their own, and through Ray Data (dedup_scale.py)
peer         datatrove's four steps and `gristmill dedup` on the same documents (dedup_peer.py)

PY is the Python of an environment that holds datatrove 0.10.1, spaCy and rensa. Times are CPU
seconds, since a machine may be shared, unless a line says wall. benchmarks/README.md says what
follows from the figures for 10^9 and 10^11 documents.
"""

import argparse
import json
import os
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import combinations, islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from benchmarks.texts import cut, documentation, jaccard, leads, plant, seeded, shingles, web_pages
from filters.text.words import normalize
from stages.dedup import minhash
from stages.dedup.config import DedupConfig
from stages.dedup.minhash import Signature

PARTS = ("signatures", "recall", "scale", "peer")
SCHEMES: tuple[minhash.Scheme, ...] = ("affine32", "affine64")
WORDS = 500
BINS = [round(0.5 + 0.05 * n, 2) for n in range(10)]
_FIVE_HUNDRED = ("anarchism", "postgresql-doc-15", "python3.11-doc")

# run by the peer's Python: a document per line in; out, in the end, CPU seconds per document by
# what was measured
PEER_SIGNATURES = """
import json, sys, tempfile, time
documents = [json.loads(line) for line in sys.stdin]

def best(call):
    times = []
    for _ in range(3):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return min(times) / len(documents)

answer = {}
try:
    from datatrove.data import Document
    from datatrove.pipeline.dedup import MinhashDedupSignature
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.utils.hashing import HashConfig
    from datatrove.utils.text import simplify_text
    from loguru import logger
    config = MinhashConfig(n_grams=5, num_buckets=14, hashes_per_bucket=8, hash_config=HashConfig(64, "xxhash"))
    texts = [Document(text=d["text"], id=str(n)) for n, d in enumerate(documents)]
    logger.remove()  # after its import, which sets one up
    step = MinhashDedupSignature(tempfile.mkdtemp(), config=config, language="eng")
    step.run(iter(texts[:5]), 1)  # loads the tokenizer
    answer["datatrove's MinhashDedupSignature, raw text to sorted signature files"] = best(lambda: step.run(iter(texts), 0))
    words = lambda: [step.word_tokenizer.word_tokenize(simplify_text(d["text"], config.norm_config)) for d in documents]
    answer["of that: datatrove's simplify_text and word tokenizer"] = best(words)
except ImportError as error:
    print(f"no datatrove: {error}", file=sys.stderr)
try:
    from rensa import CMinHash, RMinHash
    def grams():
        words = (d["normalized"].split(" ") for d in documents)
        return [[" ".join(w[i : i + 5]) for i in range(len(w) - 4)] for w in words]
    answer["n-grams"] = best(grams)
    given = grams()
    answer["rensa RMinHash"] = best(lambda: RMinHash.digest_matrix_from_token_sets(given, 112, 1))
    answer["rensa CMinHash"] = best(lambda: CMinHash.digests_from_token_sets(given, 112, 1))
except ImportError as error:
    print(f"no rensa: {error}", file=sys.stderr)
print(json.dumps(answer))
"""


def main() -> None:
    """Run the parts asked for; each prints a line per figure."""
    from benchmarks import dedup_peer, dedup_scale

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", nargs="?", choices=[*PARTS, "all"], default="all")
    parser.add_argument(
        "data", nargs="?", type=Path, default=Path(__file__).parents[2] / "shared" / "data"
    )
    parser.add_argument(
        "--peer-python", help="Python of the peers' environment; without it they are left out"
    )
    parser.add_argument("--signature-documents", type=int, default=2000)
    parser.add_argument("--pairs", type=int, default=500, help="planted pairs per bin")
    parser.add_argument("--peer-documents", type=int, default=20_000)
    dedup_scale.add_arguments(parser)
    args = parser.parse_args()
    for part in PARTS if args.part == "all" else [args.part]:
        if part == "signatures":
            signatures(args.data, args.peer_python, args.signature_documents)
        elif part == "recall":
            recall(args.data, args.pairs)
        elif part == "scale":
            dedup_scale.scale(dedup_scale.options(args))
        elif args.peer_python:
            dedup_peer.peer(args.data, args.peer_python, args.peer_documents)
        else:
            print("peer: left out, it needs --peer-python")


# --- signatures -----------------------------------------------------------------------------------


def signatures(data: Path, peer_python: str | None, count: int) -> None:
    """CPU time per document of 500 words, ours and the peers', and the ratios."""
    documents = list(
        islice(cut([*web_pages(data), *documentation(data, _FIVE_HUNDRED)], WORDS), count)
    )
    normalized = [normalize(text) for text in documents]
    words = sum(text.count(" ") + 1 for text in normalized)
    print(
        f"signatures: {len(documents):,} documents of {WORDS} words, {words / len(documents):.0f} once normalised,",
        end=" ",
    )
    print(
        f"{sum(map(len, documents)) / len(documents):,.0f} characters; CPU time of one core, best of 3"
    )
    ours = {}
    for scheme in SCHEMES:
        config = DedupConfig(scheme=scheme).signature
        ours[scheme] = _per_document(lambda c=config: _ours(documents, c), len(documents))  # type: ignore[misc]
        _print_rate(f"ours, {scheme}, raw text to content hash and band keys", ours[scheme])
        with tempfile.TemporaryDirectory() as folder:
            path = f"{folder}/keys.parquet"
            spent = _per_document(
                lambda c=config, p=path: _write_keys(_ours(documents, c), p), len(documents)
            )  # type: ignore[misc]
        _print_rate(f"ours, {scheme}, the same with the keys written to Parquet", spent)
    reading = _per_document(lambda: [normalize(text) for text in documents], len(documents))
    _print_rate("of that: normalising", reading)
    grams = [_grams(text) for text in normalized]
    joining = _per_document(lambda: [_grams(text) for text in normalized], len(documents))
    for scheme in SCHEMES:
        sketch = _per_document(lambda s=scheme: _datasketch(grams, s), len(documents))  # type: ignore[misc]
        _print_rate(f"datasketch, {scheme}, xxhash, n-grams given", sketch, ours["affine32"])
        _print_rate(
            f"datasketch, {scheme}, raw text: normalised as ours, n-grams joined",
            reading + joining + sketch,
            ours["affine32"],
        )
    if peer_python is None:
        print("signatures: datatrove and rensa left out, they need --peer-python")
        return
    answer = _ask_peer(peer_python, documents, normalized)
    joining = answer.pop("n-grams", 0.0)
    for name, spent in answer.items():
        rensa = name.startswith("rensa")
        _print_rate(f"{name}, n-grams given" if rensa else name, spent, ours["affine32"])
        if rensa:
            _print_rate(
                f"{name}, raw text: normalised as ours, n-grams joined",
                reading + joining + spent,
                ours["affine32"],
            )


def _print_rate(name: str, spent: float, ours: float | None = None) -> None:
    ratio = "" if ours is None else f"; ours in affine32 is {spent / ours:.2f} times as fast"
    print(
        f"{name}: {spent * 1e3:.3f} ms a document, {1 / spent:,.0f} documents/s/core{ratio}",
        flush=True,
    )


def _per_document(call: Callable[[], object], count: int) -> float:
    times = []
    for _ in range(3):
        start = time.process_time()  # not the clock on the wall: the machine is shared
        call()
        times.append(time.process_time() - start)
    return min(times) / count


def _ours(documents: Sequence[str], scheme: Signature) -> tuple[list[bytes], list[bytes]]:
    """Content hashes and band keys, in batches as the extract stage makes them."""
    hashes, keys = [], []
    for first in range(0, len(documents), 256):
        batch = documents[first : first + 256]
        normalized = [normalize(text) for text in batch]
        hashes += [
            minhash.content_hash(text, words) for text, words in zip(batch, normalized, strict=True)
        ]
        keys += minhash.band_keys(normalized, scheme)
    return hashes, keys


def _write_keys(columns: tuple[list[bytes], list[bytes]], path: str) -> None:
    pq.write_table(
        pa.table({"content_hash": pa.array(columns[0], pa.binary(16)), "band_keys": columns[1]}),
        path,
    )


def _grams(normalized: str) -> list[bytes]:
    words = normalized.encode().split(b" ")
    return [b" ".join(words[i : i + 5]) for i in range(len(words) - 4)]


def _datasketch(grams: Sequence[Sequence[bytes]], scheme: str) -> list[bytes]:
    """Bands of 8 minima as bytes; by `bulk`, which draws the permutations once and calls
    update_batch for each document.
    """
    from datasketch import MinHash

    hashfunc = xxhash.xxh32_intdigest if scheme == "affine32" else xxhash.xxh64_intdigest
    sketches = MinHash.bulk(grams, num_perm=112, seed=1, scheme=scheme, hashfunc=hashfunc)
    return [
        b"".join(xxhash.xxh64_digest(band.tobytes()) for band in m.hashvalues.reshape(14, 8))
        for m in sketches
    ]


def _ask_peer(python: str, documents: Sequence[str], normalized: Sequence[str]) -> dict[str, float]:
    pairs = zip(documents, normalized, strict=True)
    given = "".join(json.dumps({"text": text, "normalized": words}) + "\n" for text, words in pairs)
    environment = os.environ | {"RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [python, "-c", PEER_SIGNATURES],
        input=given,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    if done.returncode != 0:
        raise SystemExit(f"{python}: the peers failed with exit code {done.returncode}")
    answer: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return answer


# --- recall ---------------------------------------------------------------------------------------


def recall(data: Path, pairs: int) -> None:
    """Pairs with a band in common against truth files, against the S-curve, and among unrelated
    pages.
    """
    for size in (100, 1000):
        articles(data / "dups" / "minhash_articles", size)
    sources = [t for t in (*web_pages(data), *documentation(data)) if 100 <= len(t.split()) <= 3000]
    print(
        f"planted: copies of {len(sources):,} pages of 100 to 3,000 words, {pairs} of them per bin"
    )
    planted = plant_pairs(sources, pairs)
    for scheme in SCHEMES:
        s_curve(planted, DedupConfig(scheme=scheme).signature)
    unrelated([*web_pages(data), *leads(data)])


def articles(folder: Path, size: int) -> None:
    """News texts with planted copies: a line is an id and a text."""
    rows = (
        line.split(" ", 1)
        for line in (folder / f"articles_{size}.train").read_text("utf-8").splitlines()
        if line
    )
    texts = dict(rows)
    truth = {
        frozenset(line.split())
        for line in (folder / f"articles_{size}.truth").read_text().splitlines()
        if line
    }
    ids = list(texts)
    found = {
        frozenset((ids[a], ids[b])) for a, b in matches([normalize(t) for t in texts.values()])
    }
    missed, extra = len(truth - found), len(found - truth)
    print(
        f"articles_{size}: {len(found & truth)} of {len(truth)} pairs found, {missed} missed, {extra} extra"
    )
    for pair in sorted(map(sorted, truth ^ found)):
        kind, (a, b) = "missed" if frozenset(pair) in truth else "extra", pair
        print(
            f"articles_{size}: {kind} {a} {b}, true Jaccard {jaccard(shingles(texts[a]), shingles(texts[b])):.3f}"
        )


def matches(normalized: Sequence[str], scheme: Signature | None = None) -> set[tuple[int, int]]:
    """Pairs of documents that have a key in common, in at least one band."""
    buckets: defaultdict[tuple[int, bytes], list[int]] = defaultdict(list)
    for document, keys in enumerate(
        minhash.band_keys(normalized, scheme or DedupConfig().signature)
    ):
        for at in range(0, len(keys), 8):
            buckets[at, keys[at : at + 8]].append(document)
    return {pair for bucket in buckets.values() for pair in combinations(bucket, 2)}


class _Planted(list[tuple[str, str, float]]):
    """Pairs of normalised texts with their true Jaccard similarity."""


def plant_pairs(sources: Sequence[str], count: int) -> dict[float, _Planted]:
    """By bin, `count` pairs whose true similarity rounds to it; a page is used in a bin only once."""
    filler = sorted({word for text in sources[:200] for word in text.split()})
    by_bin: dict[float, _Planted] = {}
    for target in BINS:
        rng, found = seeded("planted", target), _Planted()
        for place in rng.permutation(len(sources)).tolist():
            a, b = (
                normalize(t) for t in (sources[place], plant(sources[place], target, filler, rng))
            )
            true = jaccard(minhash.shingle_hashes(a, ngram=5), minhash.shingle_hashes(b, ngram=5))
            if abs(true - target) <= 0.025:
                found.append((a, b, true))
            if len(found) == count:
                break
        by_bin[target] = found
    return by_bin


def s_curve(planted: dict[float, _Planted], scheme: Signature) -> None:
    """Share of planted pairs found, against 1 - (1 - s^rows)^bands averaged over the pairs' own
    similarities s.
    """
    for target, pairs in planted.items():
        keys = minhash.band_keys([text for a, b, _ in pairs for text in (a, b)], scheme)
        size = 8 * scheme.num_bands
        both = np.frombuffer(b"".join(keys), "<u8").reshape(len(pairs), 2, size // 8)
        found = float((both[:, 0] == both[:, 1]).any(axis=1).mean())
        chance = (
            1 - (1 - np.array([s for *_, s in pairs]) ** scheme.rows_per_band) ** scheme.num_bands
        )
        error = float(np.sqrt((chance * (1 - chance)).sum())) / len(pairs)
        expected = float(chance.mean())
        sigmas = abs(found - expected) / error
        print(
            f"planted, {scheme.scheme}, Jaccard {target:.2f}: {found:.1%} of {len(pairs)} pairs found, S-curve {expected:.1%}"
            f" ± {error:.1%}, {sigmas:.1f} sigma off: {'within 3 sigma' if sigmas <= 3 else 'NOT WITHIN 3 SIGMA'}"
        )


def unrelated(texts: Sequence[str]) -> None:
    """Pairs found among different web pages and encyclopedia articles, by how similar they truly
    are.
    """
    normalized = [normalize(text) for text in texts]
    found = matches(normalized)
    true = np.array([jaccard(shingles(texts[a]), shingles(texts[b])) for a, b in sorted(found)])
    total = len(texts) * (len(texts) - 1) // 2
    print(
        f"unrelated: {len(texts):,} different pages and articles, {total:,} pairs; {len(found)} have a band in common:",
        end=" ",
    )
    below = [int((true < limit).sum()) for limit in (0.3, 0.5)]
    print(
        f"{below[0]} below true Jaccard 0.3, {below[1]} below 0.5, {len(true) - below[1]} at or above"
    )


if __name__ == "__main__":
    main()
