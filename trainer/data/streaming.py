"""Import mosaicml-streaming, also where torchvision is missing or broken."""

import importlib
import sys
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from types import ModuleType
from typing import Any


def import_streaming() -> Any:
    """The module `streaming`, also where torchvision is absent or does not match torch. Takes 6-20
    s the first time.

    `import streaming` loads its vision datasets, and these load torchvision. With CPU torch and a
    CUDA wheel of torchvision that raises "operator torchvision::nms does not exist". We read no
    images: where the real torchvision does not import, empty modules stand in for it while
    streaming is imported, and no longer, so that nothing else in the process takes them for the
    real ones.
    """
    if "streaming" in sys.modules:
        return sys.modules["streaming"]
    try:
        importlib.import_module("torchvision")
    except (
        ImportError,
        RuntimeError,
        OSError,
    ):  # absent; another torch's operators; another CUDA's libraries
        with_stand_ins = _torchvision_stand_ins()
    else:
        with_stand_ins = {}
    sys.modules.update(with_stand_ins)
    try:
        return importlib.import_module("streaming")
    finally:
        for name in with_stand_ins:
            del sys.modules[name]


def _torchvision_stand_ins() -> dict[str, ModuleType]:
    """Just the names that streaming 0.13.0's vision/base.py imports."""
    names = (
        "torchvision",
        "torchvision.datasets",
        "torchvision.transforms",
        "torchvision.transforms.functional",
    )
    modules = {
        name: module_from_spec(ModuleSpec(name, None)) for name in names
    }  # transformers asks for a __spec__
    modules["torchvision.datasets"].VisionDataset = type("VisionDataset", (), {})  # type: ignore[attr-defined]
    modules["torchvision.transforms.functional"].to_tensor = None  # type: ignore[attr-defined]
    return modules
