"""Import mosaicml-streaming, also where torchvision is missing or broken."""

import importlib
import sys
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from types import ModuleType
from typing import Any


def import_streaming() -> Any:
    """The module `streaming`, also if torchvision is missing or does not fit torch.

    Takes 6-20 s the first time. `import streaming` loads its vision datasets, which load
    torchvision; with CPU torch and a CUDA wheel of torchvision that raises "operator
    torchvision::nms does not exist". We read no images: if the real torchvision does not import,
    empty modules replace it while streaming is imported, and only then, so that no other code takes
    them for the real ones.
    """
    if "streaming" in sys.modules:
        return sys.modules["streaming"]
    stand_ins: dict[str, ModuleType] = {}
    try:
        importlib.import_module("torchvision")
    # missing; operators of another torch; libraries of another CUDA
    except (ImportError, RuntimeError, OSError):
        stand_ins = _torchvision_stand_ins()
    sys.modules.update(stand_ins)
    try:
        return importlib.import_module("streaming")
    finally:
        for name in stand_ins:
            del sys.modules[name]


def _torchvision_stand_ins() -> dict[str, ModuleType]:
    """The names that streaming 0.13.0's vision/base.py imports."""
    names = (
        "torchvision",
        "torchvision.datasets",
        "torchvision.transforms",
        "torchvision.transforms.functional",
    )
    # with a spec, which transformers looks at
    modules = {name: module_from_spec(ModuleSpec(name, None)) for name in names}
    modules["torchvision.datasets"].VisionDataset = type("VisionDataset", (), {})  # type: ignore[attr-defined]
    modules["torchvision.transforms.functional"].to_tensor = None  # type: ignore[attr-defined]
    return modules
