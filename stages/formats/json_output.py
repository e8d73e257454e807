"""Strict JSON for scripts."""

import dataclasses
import json
import math
from typing import Any


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Strict JSON: open bounds and NaN, which JSON has no word for, become null; bytes hex; dates
    ISO 8601; dataclasses and named tuples objects.
    """
    return json.dumps(_plain(value), ensure_ascii=False, indent=indent, allow_nan=False)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        value = vars(value)
    elif hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, bytes):
        return value.hex()
    return value if isinstance(value, str | int | float | None) else str(value)
