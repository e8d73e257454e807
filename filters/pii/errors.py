"""Errors that do not quote the text in which they occurred."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

_T = TypeVar("_T")


def hide_text(what: str, function: Callable[..., _T], *args: Any) -> _T:
    """Call function(*args); raise a RuntimeError with an exception's type and place only."""
    try:
        return function(*args)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of Rust is no Exception
        traceback = error.__traceback__
        while traceback is not None and traceback.tb_next is not None:
            traceback = traceback.tb_next
        place = "an unknown place"
        if traceback:
            place = f"{Path(traceback.tb_frame.f_code.co_filename).name}:{traceback.tb_lineno}"
        cause = f"{type(error).__name__} in {place}"
    raise RuntimeError(
        f"{what}: {cause}; its message is withheld, as it may quote the text"
    ) from None
