"""Errors of a disk or an object store: which file, during what, and what to do."""

import errno
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import fsspec

_P = ParamSpec("_P")
_T = TypeVar("_T")

_FULL = (errno.ENOSPC, errno.EDQUOT)
_RENEW = "the credentials have expired: renew them, for example with `aws sso login`"
_CLOCK = "the clock of this machine is wrong by more than 15 minutes: set it, for example by NTP"
_REFUSED = (
    "the store does not accept these credentials: check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, "
    "AWS_PROFILE"
)
_DENIED = (
    "access is denied: check which credentials are in use (`aws sts get-caller-identity`), and "
    "what they may do in this bucket"
)
# by S3's error code
_CAUSES = {
    **dict.fromkeys(("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired"), _RENEW),
    **dict.fromkeys(("RequestExpired", "InvalidToken"), _RENEW),
    "RequestTimeTooSkewed": _CLOCK,
    **dict.fromkeys(("InvalidAccessKeyId", "SignatureDoesNotMatch"), _REFUSED),
    **dict.fromkeys(("AccessDenied", "AllAccessDisabled", "Forbidden", "403"), _DENIED),
    "NoSuchBucket": "there is no such bucket: check the name, the region and the endpoint",
}
# by name of botocore's exceptions, which are no OSError
_CLIENT_CAUSES = {
    **dict.fromkeys(
        ("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError"),
        "there are no credentials for this store: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
        "or AWS_PROFILE, or give the machine a role",
    ),
    **dict.fromkeys(
        ("TokenRetrievalError", "SSOTokenLoadError", "UnauthorizedSSOTokenError"), _RENEW
    ),
    "ProfileNotFound": "there is no such profile: check AWS_PROFILE and ~/.aws/config",
    **dict.fromkeys(
        ("EndpointConnectionError", "ConnectTimeoutError", "ReadTimeoutError", "ConnectionError"),
        "the store does not answer: check the network and the endpoint (AWS_ENDPOINT_URL)",
    ),
}


class StorageError(OSError):
    """A store refuses, is full or cannot be used; the message names the URI and says what to do."""


@contextmanager
def explained(uri: str, doing: str) -> Iterator[None]:
    """Say which URI it was, during what and what to do, where an error of the block does not."""
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        cause = _cause(error, uri)
        if cause is None:
            raise
        # callers tell absence, also that of a bucket, from refusal
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else StorageError
        raise kind(f"{doing} {uri}: {cause} ({type(error).__name__}: {error})") from error


def explains(doing: str) -> Callable[[Callable[_P, _T]], Callable[_P, _T]]:
    """A function whose first argument is a URI, within `explained`."""

    def decorate(function: Callable[_P, _T]) -> Callable[_P, _T]:
        @wraps(function)
        def call(*args: _P.args, **kwargs: _P.kwargs) -> _T:
            with explained(str(args[0]), doing):
                return function(*args, **kwargs)

        return call

    return decorate


def _cause(error: Exception, uri: str) -> str | None:
    if isinstance(error, OSError) and error.errno in _FULL:
        return full_disk(uri)
    code = _store_code(error)
    if code in ("400", "403"):
        code = _code_of_get(uri) or code
    kinds = (kind.__name__ for kind in type(error).__mro__ if "botocore" in kind.__module__)
    causes = (_CAUSES.get(code), *map(_CLIENT_CAUSES.get, kinds))
    return next((cause for cause in causes if cause), None)


def _store_code(error: BaseException) -> str:
    """S3's code of an error, or of the one that caused it; "" for none."""
    response: Any = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    return str(response.get("Error", {}).get("Code")) if isinstance(response, dict) else ""


def _code_of_get(uri: str) -> str:
    """Why the store refuses, by a GET: the answer to a HEAD has no room for it."""
    try:
        fs, path = fsspec.core.url_to_fs(uri)
        fs.call_s3("list_objects_v2", Bucket=fs.split_path(path)[0], MaxKeys=1)
    except Exception as error:
        return _store_code(error)
    return ""


def full_disk(uri: str) -> str:
    """That there is no room, where, and what to do."""
    local = uri.removeprefix("file://")
    folder = Path(tempfile.gettempdir() if "://" in local else local)  # what is uploaded is there
    folder = next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())
    free = shutil.disk_usage(folder).free
    return (
        f"no space left on device: the disk of {folder} has {free:,} bytes free; make room, or "
        "name another folder, and run the same command again"
    )
