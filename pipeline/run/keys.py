"""Stage keys: a hash of everything that can change a stage's output."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from filters import is_path, rules, settings
from pipeline.config.digests import file_digests
from pipeline.config.sections import Config, section_of
from pipeline.run.phase import Index
from pipeline.run.phases import extract_plan
from stages.dedup.config import VERSION as DEDUP_VERSION
from stages.extract import extract
from stages.formats.tiktoken_encodings import SHIPPED
from stages.pack import pack
from stages.refine import ner, refine
from stages.storage.digests import digest

RESOURCES = {"num_cpus", "memory", "parallelism", "batch_size"}


def stage_keys(
    config: Config, indexes: Sequence[Index], files: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Key of each stage: a hash of the stage above, the stage's version and its settings.

    "graph" is the key of the dedup phases that do not depend on which copy stays, "ner" that of
    entity recognition. The extract key has two halves, content and policy: parts with the same
    content under another policy can be judged again from their stored scores. `files` are the
    configuration's `file_digests`, if they are known already.
    """
    contents = file_digests(config) if files is None else files

    def files_of(*sections: str) -> dict[str, str]:
        return {key: content for key, content in contents.items() if section_of(key) in sections}

    extracting = extract_plan(config)
    read = files_of("extract", "language", "url_policy", *config.extract.filters)
    content = digest([extract.content_settings(extracting), read])
    keys = {"extract": content[:8] + digest(extract.policy_settings(extracting))[:8]}
    earlier = [[c.digest for c in index.commits] for index in indexes]
    graph = [keys["extract"], DEDUP_VERSION, config.dedup.enabled, config.dedup.signature, earlier]
    keys["graph"] = digest(graph)
    policy = [config.dedup.keep_rule, config.dedup.verify_share]
    keys["dedup"] = digest([graph, policy, config.run.seed])
    chain = [
        (named.name, [(language, settings(f), rules(f)) for language, f in named.all()])
        for named in config.chain(config.refine.filters)
    ]
    scrubbing = [settings(config.pii), rules(config.pii), files_of("pii", *config.refine.filters)]
    refining = [_section(config.refine), chain, scrubbing, config.dedup.line_level, config.run.seed]
    keys["refine"] = digest([keys["dedup"], refine.VERSION, *refining])
    keys["ner"] = keys["refine"]
    if config.ner.enabled:
        recognition = [ner.VERSION, settings(config.ner), config.ner.version]
        keys["ner"] = digest([keys["refine"], *recognition])
    packing = _packing(config.pack, files_of("pack"))
    keys["pack"] = digest([keys["ner"], pack.VERSION, packing, config.run.seed])
    return keys


def _packing(config: pack.PackConfig, files: Mapping[str, str]) -> dict[str, Any]:
    """What changes packed rows. Settings that are younger than `pack.VERSION` are left out where
    they change nothing, and a tokenizer has its old name: rows of earlier runs stay.
    """
    values = _section(config)
    name = values.pop("tokenizer")
    values["encoding"] = "" if is_path(name) else name
    for key in ("pattern", "end_of_text", "begin_of_text", "add_begin_of_text"):
        if not values[key]:
            del values[key]
    if not is_path(name) and name not in SHIPPED:  # small vocabularies, once stored as uint32
        values["dtype"] = "narrowest"
    return values | {"vocabulary_dir": files}


def _section(section: Any) -> dict[str, Any]:
    return {k: v for k, v in dataclasses.asdict(section).items() if k not in RESOURCES}
