"""The pytest plugin of `make unit`: Ray and torch cannot be imported, as where they are not
installed.
"""

import sys

for name in ("ray", "torch", "transformers"):
    sys.modules[name] = None  # type: ignore[assignment]
