"""Digests of the models and lists that a configuration names, and of what scores depend on."""

import dataclasses
import glob
from collections.abc import Iterator
from pathlib import Path

from filters import derived, files
from pipeline.config.sections import Config, general_key, section_of
from pipeline.config.show import show
from stages.storage.digests import digest, file_sha256

# keys that change no document: resources, and what a phase keeps or reports beside its work
IRRELEVANT_KEYS = frozenset(
    [
        *("num_cpus", "memory", "parallelism", "batch_size", "recycle_after", "keep_text"),
        *("keep_rejected_text", "verify_share", "alarm_share", "write_index"),
        *("documents_per_unit", "partition_bytes", "cluster_memory"),
    ]
)


def files_of(config: Config) -> Iterator[tuple[str, str]]:
    """(key, path) of every model and list that this configuration uses."""
    for name, section in config.in_use():
        for field, paths in files(section).items():
            for path in paths:
                yield f"{name}.{field}", path


def file_digests(config: Config) -> dict[str, str]:
    """Digest of the content of every model and list in use by key: a stage whose model changed
    under its name must run again.
    """
    digests: dict[str, str] = {}
    for key, path in files_of(config):
        if key == "pack.tokenizer":  # its file alone, and whole: pack compares it
            digests[key] = file_sha256(Path(path))
        else:
            digests[key] = digest([digests.get(key), *_named_hashes(Path(path))])
    for name, variants in config.per_language.items():
        for language, variant in variants.items():
            for field in files(variant):
                digests.setdefault(f"per_language.{language}.{name}.{field}", "")
    # a language that differs only in its bounds reads the same files: nothing is measured again
    return {
        key: content
        for key, content in digests.items()
        if content != digests.get(general_key(key), "")
    }


def measured_with(config: Config, name: str) -> str:
    """Digest of what a filter's scores depend on: its settings and files, by language, and the
    filters that edit the text before it.
    """
    chain = [*config.extract.filters, *config.refine.filters]
    before = chain[: chain.index(name)] if name in chain else []
    edits = [[n, config.named(n).settings()] for n in before if hasattr(config.filters[n], "edit")]
    digests = {
        key: content
        for key, content in file_digests(config).items()
        if section_of(key) in (name, *(n for n, _ in edits))
    }
    named = config.named(name)
    return digest([named.settings(without=derived(named.filter)), edits, digests])


def texts_made_with(config: Config) -> str:
    """Digest of the settings that make the texts which filters measure."""
    engine = config.extract.engine
    if engine == "blocks":
        model = file_digests(config).get("extract.model")
        return digest([engine, model, config.extract.format, config.dedup.line_level])
    options = dataclasses.asdict(getattr(config.extract, engine))
    return digest([engine, options, config.dedup.line_level])


def selection_settings(config: Config) -> dict[str, str]:
    """The settings that select the documents which reach refine, as `show` prints them."""
    sections = {"input", "extract", "url_policy", "opt_out", "language", "license", "dedup"}
    sections |= {*config.extract.filters}
    return {
        key: value
        for key, value, _ in show(config)
        if section_of(key) in sections and key.rpartition(".")[2] not in IRRELEVANT_KEYS
    }


def _named_hashes(root: Path) -> list[tuple[str, str]]:
    """(name, sha256) of a file and those beside it that its name begins, such as a model's card and
    its SentencePiece model; or of every file of a folder, whose names have a meaning, such as a
    language.
    """
    if root.is_dir():
        paths = sorted(path for path in root.rglob("*") if path.is_file())
        return [(path.relative_to(root).as_posix(), file_sha256(path)) for path in paths]
    paths = [root, *sorted(root.parent.glob(f"{glob.escape(root.name)}.*"))]
    return [(path.name.removeprefix(root.name), file_sha256(path)) for path in paths]
