"""The command line: `gristmill`, also `python -m pipeline`.

Exit codes: 0 success; 1 a fault was found, the run could not be completed, or nothing was
published; 2 the command line or the configuration is wrong, or does not fit the inputs; 3 the run
ended, but some units failed within what the configuration allows; 4 the run directory is in use;
130 interrupted.
"""

import os
import sys

# each adds its commands to the application
from pipeline.cli import app, batches, inspection, models, runs, training  # noqa: F401


def main() -> None:
    """Entry point of `python -m pipeline`."""
    app()


if __name__ == "__main__":
    sys.path.insert(0, os.getcwd())
    main()
