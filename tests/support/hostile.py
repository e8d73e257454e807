"""Work that fails as native code on crawled text does, for children and stages."""

import ctypes
import os
import re
import signal
from pathlib import Path

from stages.formats.tiktoken_encodings import load_encoding


def make_hostile(plan):
    """What returns a document in capitals, or does what its first word says."""
    if plan == "broken":
        raise ValueError("no such model")
    if plan == "killed":  # while it loads
        os.kill(os.getpid(), signal.SIGKILL)
    return lambda text: ACTIONS.get(text.split(" ")[0], str.upper)(text)


def catastrophe(text):
    return re.fullmatch(r"(a|aa)+", "a" * 60 + "b")


def panic(text):
    return load_encoding("o200k_base").encode_ordinary(" " * 1_000_000)


def killed_at_first(text):
    """Kill this process, unless the file that the text names is there."""
    if not Path(text.split(" ")[1]).exists():
        Path(text.split(" ")[1]).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return text.upper()


ACTIONS = {
    "killed": lambda text: os.kill(os.getpid(), signal.SIGKILL),
    "once": killed_at_first,
    "hang": catastrophe,
    "segfault": lambda text: ctypes.string_at(0),
    "abort": lambda text: os.abort(),
    "allocate": lambda text: bytearray(10**12),
    "panic": panic,
    "raise": lambda text: 1 // 0,
    "exit": lambda text: os.sys.exit(0),
}
LOSSES = {
    "hang": "timeout",
    "segfault": "crash",
    "abort": "crash",
    "allocate": "memory",
    "panic": "error",
    "raise": "error",
    "exit": "error",
}
