"""The table that percentiles in a configuration are looked up in, and whether it still applies."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from pipeline.config import percentiles
from pipeline.config.digests import measured_with, texts_made_with
from pipeline.config.paths import absolute_path
from pipeline.config.sections import Config, RunConfig
from stages.formats.errors import ConfigError
from stages.storage.files import read_bytes

CALIBRATED = "of `gristmill calibrate`"  # ends the origin of a bound that is a percentile


class Calibration(NamedTuple):
    """A table of percentiles and where it lies; without one, percentiles are an error if
    `required`, and bound nothing if not.
    """

    uri: str
    table: percentiles.Table | None
    required: bool

    @property
    def languages(self) -> list[str]:
        """The languages that have percentiles of their own."""
        return self.table.languages if self.table else []


def read_calibration(run: RunConfig, *, required: bool) -> Calibration:
    """The calibration of a run; without its table if there is none, or if not `required`."""
    uri = absolute_path(run.calibration) or f"{absolute_path(run.directory)}/calibration.json"
    if not required:
        return Calibration(uri, None, required)
    try:
        return Calibration(uri, percentiles.parse(read_bytes(uri)), required)
    except FileNotFoundError:
        if run.calibration:
            raise ConfigError(
                f"run.calibration: no such file: {uri}; write it with `gristmill calibrate`"
            ) from None
        return Calibration(uri, None, required)
    except ValueError as error:
        raise ConfigError(f"{uri}: {error}") from None


def check_calibration(
    config: Config, calibration: Calibration, raw: Iterable[dict[str, Any]]
) -> None:
    """ConfigError if percentiles are used whose table was measured in another way.

    `raw` are the sections as written, for all documents and for each language.
    """
    if calibration.table is None:
        return
    names = {
        name
        for sections in raw
        for name, section in sections.items()
        if isinstance(section, dict) and percentiles.keys_with_percentiles(section)
    }
    made_with = calibration.table.made_with
    for name in sorted(names & {"language", *config.extract.filters, *config.refine.filters}):
        if made_with.get(name) != measured_with(config, name):
            raise ConfigError(
                f"{calibration.uri} was measured with other settings or another model of '{name}'; "
                "run `gristmill calibrate` again"
            )
    if names and made_with.get("texts", texts := texts_made_with(config)) != texts:
        raise ConfigError(
            f"{calibration.uri} was measured on texts of another extract.engine (or its options) "
            "or dedup.line_level; run `gristmill calibrate` again"
        )
