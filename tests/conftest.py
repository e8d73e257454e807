"""Shared fixtures: where the real corpus lies, and the one Ray session."""

import os
from pathlib import Path

import pytest

CORPUS = Path(os.environ.get("GRISTMILL_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(scope="session")
def corpus() -> Path:
    """Folder of real pages with ground truth; tests that ask for it carry the marker `corpus`."""
    if not CORPUS.is_dir():
        pytest.skip(f"no corpus at {CORPUS}: set GRISTMILL_DATA")
    return CORPUS
