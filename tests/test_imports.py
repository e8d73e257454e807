"""Who may import whom: the rules of the design, kept by reading the source.

Nothing is imported here.
"""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.paths import ROOT

OURS = {"filters", "stages", "pipeline", "trainer"}

# Packages from the bottom up: each may import itself and those before it in its own row.
LAYERS = (
    ("filters.text", "filters", "filters.pii"),
    ("stages.formats", "stages.storage", "stages.read", "stages.isolation"),
    ("stages.dedup", "stages.extract", "stages.refine", "stages.pack"),
    (
        *("pipeline.controller", "pipeline.config", "pipeline.engine", "pipeline.run"),
        *("pipeline.batches", "pipeline.report", "pipeline.inspect", "pipeline.study"),
        *("pipeline.models", "pipeline.cli", "pipeline"),
    ),
)
# what a package may import besides: rows above, or single modules of the trainer
BELOW = {
    "filters": (),
    "stages": ("filters",),
    "pipeline": (
        "filters",
        "stages",
        "trainer.telemetry.feedback",
        "trainer.telemetry.records",
        "trainer.launch",
        "trainer.config",
        "trainer.model.layouts",
    ),
}
# the trainer imports these of ours, and nothing else
TRAINER = ("trainer", "stages.formats", "stages.storage")
# loaded on every curation node, by tests and by the trainer: cheap to import, and free of the
# engines
FORMATS = (
    *("filters", "stages/formats", "stages/storage"),
    *("trainer/telemetry/feedback.py", "trainer/config.py", "trainer/telemetry/devices.py"),
    "trainer/telemetry/records.py",
    *("trainer/launch.py", "trainer/model/layouts.py"),
)


class Import(NamedTuple):
    module: str  # dotted; for `from a import b` it is 'a.b', so that a submodule is seen
    line: int
    at_import: bool  # runs when the file is imported, as opposed to inside a function


def imports(source: str, module: str) -> Iterator[Import]:
    """Every import of a file, relative ones resolved against `module`, those under TYPE_CHECKING
    left out.
    """

    def visit(node: ast.AST, at_import: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, at_import) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(module.split(".")[: -node.level]) if node.level else ""
            source = ".".join(filter(None, [base, node.module]))
            yield from (
                Import(f"{source}.{alias.name}", node.lineno, at_import) for alias in node.names
            )
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:
                yield from visit(child, at_import)
        else:
            inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for child in ast.iter_child_nodes(node):
                yield from visit(child, at_import and not inside)

    return visit(ast.parse(source), True)


def is_under(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(f"{prefix}.")


def sources(*under: str) -> list[Path]:
    paths = [ROOT / name for name in under]
    return sorted(
        p for path in paths for p in ([path] if path.suffix else path.rglob("*.py")) if p.exists()
    )


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imports_of(path: Path) -> list[Import]:
    return list(imports(path.read_text(), module_of(path)))


def package_of(module: str) -> str:
    """The package of LAYERS that a module lies in: the longest name that fits."""
    names = [name for row in LAYERS for name in row if is_under(module, name)]
    return max(names, key=len, default=module.split(".")[0])


def allowed(package: str) -> tuple[str, ...]:
    """Prefixes of our modules that a package may import."""
    if package == "trainer":
        return TRAINER
    row = next(row for row in LAYERS if package in row)
    before = row[: row.index(package) + 1]
    first = LAYERS[: LAYERS.index(row)]
    return (*before, *(name for other in first for name in other), *BELOW[package.split(".")[0]])


PACKAGES = [name for row in LAYERS for name in row] + ["trainer"]


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_what_lies_below_it(package):
    files = [p for p in sources(package.replace(".", "/")) if package_of(module_of(p)) == package]
    assert files
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in files
        for module, line, _ in imports_of(path)
        if module.split(".")[0] in OURS and not is_allowed(module, package)
    ]
    assert wrong == []


def is_allowed(module: str, package: str) -> bool:
    """Prefixes alone would let `filters.text` import `filters`' other packages: the package counts."""
    if package != "trainer" and module.split(".")[0] != "trainer":
        return package_of(module) in allowed(package) or module.split(".")[0] in allowed(package)
    return any(is_under(module, prefix) for prefix in allowed(package))


def test_formats_and_filters_load_neither_ray_nor_torch():
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in sources(*FORMATS)
        for module, line, at_import in imports_of(path)
        if at_import and module.split(".")[0] in {"ray", "torch"}
    ]
    assert wrong == []


def test_a_trainer_asks_for_a_tokenizer_only_where_it_has_text():
    found = [
        i
        for path in sources("trainer")
        for i in imports_of(path)
        if is_under(i.module, "stages.formats.tokens")
    ]
    assert found and not [i for i in found if i.at_import]


def test_curation_never_imports_torch_or_streaming():
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in sources("filters", "stages", "pipeline")
        for module, line, _ in imports_of(path)
        if module.split(".")[0] in {"torch", "torchvision", "streaming"}
    ]
    assert wrong == []


@pytest.mark.parametrize(
    "source, expected",
    [
        ("import a.b as c, d", [("a.b", True), ("d", True)]),
        ("from a import b, c", [("a.b", True), ("a.c", True)]),
        ("from . import b", [("stages.pack.b", True)]),
        ("from .mds import MDSWriter", [("stages.pack.mds.MDSWriter", True)]),
        ("def f():\n  import torch", [("torch", False)]),
        ("class A:\n  import torch", [("torch", True)]),
        ("try:\n  import ray\nexcept ImportError:\n  import b", [("ray", True), ("b", True)]),
        ("if TYPE_CHECKING:\n  import torch\nelse:\n  import a", [("a", True)]),
    ],
)
def test_every_form_of_import_is_seen(source, expected):
    assert [
        (found.module, found.at_import) for found in imports(source, "stages.pack.pack")
    ] == expected
