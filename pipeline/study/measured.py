"""Whether a configuration can be judged by the scores that a run stored: only bounds may differ."""

import os

from filters import derived, rules, settings
from pipeline.config.digests import IRRELEVANT_KEYS, file_digests
from pipeline.config.sections import Config, general_key, section_of
from pipeline.config.show import show, to_toml
from pipeline.report.sample import Ledger

# besides bounds, these sections and these keys of others change no document
_FREE_SECTIONS = {"run", "fetch", "pack", "ner"}
_FREE_KEYS = {"filters", "allowed", *IRRELEVANT_KEYS}


def require_measured(config: Config, ledger: Ledger) -> None:
    """ValueError unless the run measured what this configuration needs, in the same way."""
    measured = {*ledger.setting("extract.filters", []), *ledger.setting("refine.filters", [])}
    for name in (*config.extract.filters, *config.refine.filters):
        if name not in measured:
            scores = ", ".join(sorted(measured))
            raise ValueError(f"{ledger.root} did not measure '{name}'; it has scores of {scores}")
    now = {key: value for key, value, _ in show(config)}
    then = {key: to_toml(setting.value) for key, setting in ledger.state.config.items()}
    for key in sorted(now.keys() | {key for key in then if key.startswith("per_language.")}):
        # a language without a value of its own has the value for all
        before, after = (values.get(key, values.get(general_key(key))) for values in (then, now))
        if before is None or after is None or _portable(before) == _portable(after):
            continue
        if _changes_scores(key, config):
            raise ValueError(
                f"{ledger.root} measured with {key} = {before}, not {after}: only bounds can be "
                "changed without running it"
            )
    measured_by = ledger.state.files
    for key, content in file_digests(config).items():
        if section_of(key) not in _FREE_SECTIONS and measured_by.get(key, content) != content:
            raise ValueError(
                f"{ledger.root} measured with another file than {now.get(key, key)} now is ({key});"
                " run it again with this one"
            )


def _portable(value: str) -> str:
    """A value as a Ray job has it that was submitted with this directory."""
    return value.replace(f'"{os.getcwd()}/', '"')


def _changes_scores(key: str, config: Config) -> bool:
    name, field = section_of(key), key.rpartition(".")[2]
    if name in _FREE_SECTIONS or field in _FREE_KEYS:
        return False
    section = config.filters.get(name) or getattr(config, name)
    if field in derived(section):
        return False
    return field not in rules(section) or field in settings(section)
