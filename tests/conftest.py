"""Shared fixtures: where the real corpus lies, the one Ray session, and an S3 server."""

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.support.paths import CORPUS
from tests.support.s3 import FaultyProxy, forget_clients, s3_process

# The examples of each property test: 25 in `make test`, 500 in `make test-all`, which selects its
# profile by --hypothesis-profile. No deadline: machines differ. In CI the examples are the same
# each time, elsewhere every run tries new ones.
for name, count in {"quick": 25, "thorough": 500}.items():
    settings.register_profile(
        name, max_examples=count, deadline=None, derandomize=bool(os.environ.get("CI"))
    )
settings.load_profile("quick")


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Names binary parameters by their length: gzip writes the time, and the names of the tests must
    be the same on all workers.
    """
    if isinstance(val, bytes) and not (val.isascii() and val.decode().isprintable()):
        return f"{argname}-{len(val)}"
    return None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Under `pytest -n 2 --dist loadgroup` the tests of a module stay on one worker.

    So module-scoped fixtures are made once. The tests that need Ray all share one worker and its
    session. Those that kill processes take minutes each and come first, so that no worker is left
    with one at the end.
    """
    items.sort(key=lambda item: item.get_closest_marker("kill") is None)
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            ray = "ray_session" in getattr(item, "fixturenames", ())
            item.add_marker(pytest.mark.xdist_group("ray" if ray else item.nodeid.split("::")[0]))


@pytest.fixture(scope="session")
def corpus() -> Path:
    """Folder of real pages with ground truth; tests that ask for it carry the marker `corpus`."""
    if not CORPUS.is_dir():
        pytest.skip(f"no corpus at {CORPUS}: set GRISTMILL_DATA")
    return CORPUS


@pytest.fixture(scope="session")
def tokenizer_files(tmp_path_factory):
    """(path or name, options) of a small tokenizer of every kind."""
    from tests.support.tokenizer_files import write_all

    return write_all(tmp_path_factory.mktemp("tokenizers"))


@pytest.fixture(scope="session")
def ray_session(s3_server):
    """The one Ray of the test session; after the S3 server, whose address its workers then inherit."""
    from pipeline.engine import cluster

    cluster.start(None)
    yield
    import ray

    ray.shutdown()


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory) -> Iterator[str]:
    """Endpoint of the one S3 server of the session. The environment names it: s3fs and pyarrow.fs
    take s3:// URLs as they are.
    """
    pytest.importorskip("s3fs")
    pytest.importorskip("moto")
    with (
        s3_process(tmp_path_factory.mktemp("s3")) as (_, endpoint),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.delenv("AWS_PROFILE", raising=False)
        for name, value in {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "no_proxy": "127.0.0.1,localhost",
        }.items():
            patch.setenv(name, value)
        yield endpoint


@pytest.fixture
def s3_bucket(s3_server) -> str:
    """URL of an empty bucket, s3://…, for one test."""
    import fsspec

    name = f"test-{uuid.uuid4().hex}"
    fsspec.filesystem("s3").mkdir(name)
    return f"s3://{name}"


@pytest.fixture
def faults(s3_server, monkeypatch):
    """Start a proxy with faults; from then on this process's clients go through it."""
    started = []

    def start(fault):
        proxy = FaultyProxy(s3_server, fault)
        started.append(proxy)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.server_port}")
        forget_clients()
        return proxy

    yield start
    for proxy in started:
        proxy.shutdown()
        proxy.server_close()
    monkeypatch.undo()
    forget_clients()
