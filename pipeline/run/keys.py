"""Stage keys: a hash of everything that can change a stage's output, and the folders named after
them.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from filters import rules, settings
from pipeline.config.digests import file_digests
from pipeline.config.sections import Config, section_of
from pipeline.run import dedup_plan
from stages.dedup import dedup
from stages.extract import extract
from stages.pack import pack
from stages.refine import ner, refine
from stages.storage.digests import digest

RESOURCES = {"num_cpus", "memory", "parallelism", "batch_size"}


# the phases of dedup that know nothing of who stays: a change of the policy leaves them as they are
_GRAPH = ("dedup sort", "dedup match", "dedup star", "dedup cluster")


_POLICY = ("keep_rule", "verify_share")


def stage_keys(
    config: Config, indexes: Sequence[dedup_plan.Index], files: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Key of each stage: a hash of the stage above, the stage's version and every setting that can
    change its output.

    `files` are config.file_digests, if known already.

    The extract key has two halves, content and policy: parts of the same content under another
    policy can be judged anew from their stored scores.
    """
    plan = extract_plan(config)
    read = file_digests(config) if files is None else files

    def read_by(*sections: str) -> dict[str, str]:
        return {key: content for key, content in read.items() if section_of(key) in sections}

    content = digest(
        [extract.content_settings(plan), read_by("language", "url_policy", *config.extract.filters)]
    )
    keys = {"extract": content[:8] + digest(extract.policy_settings(plan))[:8]}
    earlier = [[c.digest for c in index.commits] for index in indexes]
    graph = [keys["extract"], dedup.VERSION, config.dedup.enabled, config.dedup.signature, earlier]
    keys["graph"] = digest(graph)
    keys["dedup"] = digest(
        [graph, [getattr(config.dedup, name) for name in _POLICY], config.run.seed]
    )
    chain = [
        (named.name, [(language, settings(f), rules(f)) for language, f in named.all()])
        for named in config.chain(config.refine.filters)
    ]
    scrubbing = [settings(config.pii), rules(config.pii), read_by("pii", *config.refine.filters)]
    refining = [_section(config.refine), chain, scrubbing, config.dedup.line_level, config.run.seed]
    keys["refine"] = digest([keys["dedup"], refine.VERSION, *refining])
    keys["names"] = keys["refine"]
    if config.ner.enabled:
        keys["names"] = digest(
            [keys["refine"], ner.VERSION, settings(config.ner), config.ner.version]
        )
    packing = _section(config.pack) | {"vocabulary_dir": read_by("pack")}
    keys["pack"] = digest([keys["names"], pack.VERSION, packing, config.run.seed])
    return keys


def store_uri(root: str, keys: dict[str, str], phase: str) -> str:
    """Where a phase keeps its units: RUN/<stage>/<key>, one folder deeper for a phase that is not
    the whole stage.
    """
    stage, _, part = phase.partition(" ")
    key = "graph" if phase in _GRAPH else "names" if phase == "refine names" else stage
    return "/".join(filter(None, [root, stage, keys[key], part]))


def _section(section: Any) -> dict[str, Any]:
    return {k: v for k, v in dataclasses.asdict(section).items() if k not in RESOURCES}


def extract_plan(config: Config, reusable_stores: tuple[str, ...] = ()) -> extract.ExtractPlan:
    """What the extract stage's workers need of a configuration."""
    return extract.ExtractPlan(
        config=config.extract,
        input=config.input,
        fetch=config.fetch,
        url_policy=config.url_policy,
        opt_out=config.opt_out,
        language=config.named("language"),
        filters=config.chain(config.extract.filters),
        signature=config.dedup.signature,
        seed=config.run.seed,
        reusable_stores=reusable_stores,
    )


def refine_plan(config: Config) -> refine.RefinePlan:
    """What the refine stage's workers need of a configuration."""
    return refine.RefinePlan(
        config.refine,
        config.chain(config.refine.filters),
        config.pii,
        config.run.seed,
        config.dedup.line_level,
    )
