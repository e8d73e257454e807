"""Shared fixtures: where the real corpus lies, the one Ray session, and an S3 server."""

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.support.paths import CORPUS
from tests.support.s3 import FaultyProxy, forget_clients, s3_process

# machines differ, and no test asserts a time
settings.register_profile("house", deadline=None)
# a clean checkout passes or fails the same way each time; searching anew is for the desk
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "house")


@pytest.fixture(scope="session")
def corpus() -> Path:
    """Folder of real pages with ground truth; tests that ask for it carry the marker `corpus`."""
    if not CORPUS.is_dir():
        pytest.skip(f"no corpus at {CORPUS}: set GRISTMILL_DATA")
    return CORPUS


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
