"""Hashes that identify content: sha256 of bytes, files and streams, and of JSON values."""

import hashlib
import json
from io import BufferedIOBase
from pathlib import Path
from typing import Any


def digest(value: Any) -> str:
    """Short stable hash of a JSON-able value, for stage keys and fingerprints: 16 hex digits."""
    return bytes_sha256(json.dumps(value, sort_keys=True, default=str).encode())[:16]


def bytes_sha256(data: bytes) -> str:
    """Hex sha256 of bytes."""
    return hashlib.sha256(data).hexdigest()


def stream_sha256(stream: BufferedIOBase) -> str:
    """Hex sha256 of what is left to read in a binary stream."""
    return hashlib.file_digest(stream, "sha256").hexdigest()


def file_sha256(path: Path) -> str:
    """Hex sha256 of a local file."""
    with open(path, "rb") as stream:
        return stream_sha256(stream)
