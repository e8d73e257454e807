"""Functions of test modules, called in processes of their own."""

import sys
from collections.abc import Callable
from typing import Any


def call_command(function: Callable, *arguments: Any) -> list[str]:
    """The command that calls a top-level function with `arguments`, as strings, in a new Python."""
    module, name = function.__module__, function.__name__
    code = f"import sys; from {module} import {name}; {name}(*sys.argv[1:])"
    return [sys.executable, "-c", code, *map(str, arguments)]
