"""run.json: what a run directory holds, for status, report and other readers.

It can be derived from the configuration and the ledger; resuming never relies on it. It is written
and decoded here and nowhere else.
"""

import dataclasses
import json
import os
import socket
import time
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, TypeAdapter, ValidationError
from pydantic_core import to_json

from stages.storage.files import exists, read_bytes, write_atomically

VERSION = 2  # 1 stored the settings as TOML text
_HISTORY = 100  # invocations that are kept


def _from_json(value: Any) -> Any:
    """A setting, with the infinities that strict JSON writes as strings."""
    if isinstance(value, list):
        return [_from_json(v) for v in value]
    # "inf" was written before "Infinity"
    return float(value) if value in ("Infinity", "-Infinity", "inf", "-inf") else value


@dataclass(frozen=True)
class Setting:
    """A value of the configuration (None for "off"), and where it came from."""

    value: Annotated[Any, BeforeValidator(_from_json)]
    origin: str


@dataclass(frozen=True)
class IndexRef:
    """Stores of an earlier batch that dedup compared with: its documents and its keep table."""

    documents: str
    keep: str


@dataclass(frozen=True)
class Invocation:
    """One call of the command: its id, when it started (Unix seconds), and the keys it used."""

    invocation: str
    started: float
    keys: dict[str, str]


@dataclass(frozen=True)
class Process:
    """The process that is running, by host and id."""

    host: str
    pid: int


@dataclass(frozen=True)
class RunState:
    """The content of run.json.

    `keys` are the stage keys used last, `files` digests of models and lists by configuration key.
    `stage` is the phase that is running, or "done"; `last` is the stage the run was asked to reach.
    """

    invocation: str = ""
    keys: dict[str, str] = dataclasses.field(default_factory=dict)
    config: dict[str, Setting] = dataclasses.field(default_factory=dict)
    files: dict[str, str] = dataclasses.field(default_factory=dict)
    indexes: tuple[IndexRef, ...] = ()
    history: tuple[Invocation, ...] = ()
    stage: str = ""
    last: str = "pack"
    generation: str | None = None
    process: Process | None = None

    def setting(self, key: str, default: Any = None) -> Any:
        """A value of the run's configuration; None for "off"."""
        return self.config[key].value if key in self.config else default

    @property
    def started(self) -> float | None:
        """When the last invocation started, in Unix seconds."""
        return self.history[-1].started if self.history else None

    def at_work(self, **changes: Any) -> "RunState":
        """This state with changes, and with this process as the one that is running."""
        return dataclasses.replace(
            self, process=Process(socket.gethostname(), os.getpid()), **changes
        )

    def begun(self, invocation: str, keys: dict[str, str]) -> "RunState":
        """This state with a new invocation in its history."""
        entry = Invocation(invocation, round(time.time(), 3), keys)
        history = (*self.history[1 - _HISTORY :], entry)
        return dataclasses.replace(self, invocation=invocation, keys=keys, history=history)


def read_state(root: str) -> RunState:
    """The run.json of a run directory. FileNotFoundError with advice if it is none.

    ValueError names the file if it is of another version.
    """
    uri = f"{root.rstrip('/')}/run.json"
    try:
        record = json.loads(read_bytes(uri))
        if record.get("version", 1) == 1:
            record |= _from_version_1(record)
        return _STATE.validate_python(record)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{root} is not a run directory (it has no run.json); give the config's run.directory"
        ) from None
    except (KeyError, TypeError, ValidationError) as error:
        raise ValueError(f"{uri} is not a run.json of this version: {error}") from error


def state_or_new(root: str) -> RunState:
    """The run.json of a run directory, or an empty state if it has none yet."""
    return read_state(root) if exists(f"{root}/run.json") else RunState()


def write_state(root: str, state: RunState) -> None:
    """Replace the run.json of a run directory."""
    record = dataclasses.asdict(state) | {"version": VERSION}
    # strict JSON has no word for infinity
    write_atomically(f"{root}/run.json", to_json(record, indent=1, inf_nan_mode="strings"))


_STATE: TypeAdapter[RunState] = TypeAdapter(RunState)


def _from_version_1(record: Mapping[str, Any]) -> dict[str, Any]:
    config = {}
    for key, entry in record.get("config", {}).items():
        value = tomllib.loads(f"value = {entry['value']}")["value"]
        config[key] = {**entry, "value": None if value == "off" else value}
    history = [
        {"invocation": "", **entry, "keys": _with_ner_key(entry.get("keys", {}))}
        for entry in record.get("history", [])
    ]
    return {
        "config": config,
        "keys": _with_ner_key(record.get("keys", {})),
        "history": history,
        "process": record.get("pid"),
    }


def _with_ner_key(keys: Mapping[str, str]) -> dict[str, str]:
    return {"ner" if name == "names" else name: key for name, key in keys.items()}
