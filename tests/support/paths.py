"""Where the repository and the corpus of real pages are."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
CORPUS = Path(os.environ.get("GRISTMILL_DATA", ROOT.parent / "shared" / "data"))
