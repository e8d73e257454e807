"""The sample of an estimate: whole input files, or a share of the records of a few.

With many inputs, the sample is whole files. Otherwise it is an even share of the records of each
file, written as new files: one per input, or `UNITS` parts if there are fewer inputs.
"""

import json
import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from pipeline.config.sections import Config
from pipeline.run.inputs import Input
from stages.formats.errors import ConfigError
from stages.pack.pack import derive_seed
from stages.read.fetch import local_copy, printable
from stages.read.records import InputConfig, TextStats, read_texts
from stages.read.warc import ReadStats, read_records
from stages.storage.files import write_atomically

UNITS = 10  # least files or parts in a sample: intervals come from how they differ


class Sample(NamedTuple):
    """Files of a sample, whole or written from a share of the records, and their shares of all
    input: by bytes if the sizes of all inputs are known before they are read, else by files.
    """

    paths: list[str]
    shares: list[float]
    is_whole: bool


def parse_share(text: str) -> float:
    """0.001 from "0.1%". ConfigError for anything but a percentage above 0 and at most 100."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?%", text.strip(), re.ASCII)
    if not match or not 0 < float(match[1]) <= 100:
        raise ConfigError(f"--sample {text}: write a percentage above 0% and at most 100%, as 0.1%")
    return float(match[1]) / 100


def draw(config: Config, inputs: Sequence[Input], *, share: float, folder: str) -> Sample:
    """Draw a share of all input by the run's seed; parts of files are written to `folder`.

    ValueError if no record is drawn.
    """
    seed = derive_seed(config.run.seed, "estimate")
    count = min(len(inputs), max(UNITS, round(share * len(inputs))))
    within = min(1.0, share * len(inputs) / count)
    files, weights = sorted(random.Random(seed).sample(list(inputs), count)), _weights(inputs)
    if count >= UNITS and math.isclose(within, 1.0, rel_tol=1 / count):
        sample = Sample([i.path for i in files], [weights[i.ordinal] for i in files], True)
    else:
        sample = _draw_records(config, files, weights, share=within, folder=folder)
    if not any(sample.shares):
        raise ValueError(
            f"a sample of {share:.4%} of {len(inputs)} inputs holds no record; raise --sample"
        )
    return sample


def _draw_records(
    config: Config,
    files: Sequence[Input],
    weights: dict[int, float],
    *,
    share: float,
    folder: str,
) -> Sample:
    parts, shares = defaultdict[int, list[bytes]](list), defaultdict[int, float](float)
    taken = 0
    for number, file in enumerate(files):
        start = random.Random(
            derive_seed(config.run.seed, "records", printable(file.path))
        ).random()
        with local_copy(file.path, options=config.fetch) as path:
            sizes, total = Counter[int](), 0
            for i, record in enumerate(_records(path, config.input, name=printable(file.path))):
                total += len(record)
                if is_drawn(i, share=share, start=start):
                    part = number if len(files) >= UNITS else taken % UNITS
                    parts[part].append(record)
                    sizes[part] += len(record)
                    taken += 1
        for part, size in sizes.items():
            shares[part] += weights[file.ordinal] * size / total
    paths = [write_part(folder, f"part-{part}", parts[part], config) for part in parts]
    return Sample(paths, [shares[part] for part in parts], False)


def is_drawn(i: int, *, share: float, start: float) -> bool:
    """Whether number `i` is in an even sample: every (1 / share)-th, after a random `start` in
    [0, 1) of a step.
    """
    return math.floor(start + (i + 1) * share) > math.floor(start + i * share)


def _weights(inputs: Sequence[Input]) -> dict[int, float]:
    """The share of all input that each file is, by its number."""
    known = [size for i in inputs if (size := i.bytes) is not None]
    sizes = known if len(known) == len(inputs) and any(known) else [1] * len(inputs)
    return {i.ordinal: size / sum(sizes) for i, size in zip(inputs, sizes, strict=True)}


def _records(path: Path, config: InputConfig, *, name: str) -> Iterator[bytes]:
    """The records of a file as bytes: gzip members or plain records of a WARC, else JSON lines."""
    if config.format in ("jsonl", "parquet"):
        for row in read_texts(path, config, name=name, stats=TextStats()):
            columns = {
                config.url_column: row.url,
                config.id_column: row.source_id,
                config.text_column: row.text,
            }
            line = {k: v for k, v in columns.items() if k and not row.error}
            yield json.dumps(line).encode() + b"\n"
        return
    # with a limit of one byte: only where records begin is needed
    starts = sorted({r.offset for r in read_records(path, max_payload_bytes=1, stats=ReadStats())})
    with open(path, "rb") as stream:
        for start, end in pairwise([*starts, path.stat().st_size]):
            stream.seek(start)
            yield stream.read(end - start)


def write_part(folder: str, name: str, records: Sequence[bytes], config: Config) -> str:
    """Write records to a file of the sample and return its URI."""
    uri = f"{folder}/{name}.{'warc' if config.input.format in ('warc', 'wet') else 'jsonl'}"
    write_atomically(uri, b"".join(records))
    return uri
