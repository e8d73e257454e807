"""Shared fixtures: where the real corpus lies, and the one Ray session."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

# machines differ, and no test asserts a time
settings.register_profile("house", deadline=None)
# a clean checkout passes or fails the same way each time; searching anew is for the desk
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "house")

CORPUS = Path(os.environ.get("GRISTMILL_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(scope="session")
def corpus() -> Path:
    """Folder of real pages with ground truth; tests that ask for it carry the marker `corpus`."""
    if not CORPUS.is_dir():
        pytest.skip(f"no corpus at {CORPUS}: set GRISTMILL_DATA")
    return CORPUS


@pytest.fixture(scope="session")
def ray_session():
    """The one Ray of the test session."""
    from pipeline import engine

    engine.start(None)
    yield
    import ray

    ray.shutdown()
