"""Who may import whom: the rules of the design, kept by reading the source. Nothing is imported here."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
OURS = {"filters", "stages", "pipeline", "trainer"}

# package → prefixes of our modules that it may import
ALLOWED = {
    "filters": ("filters",),
    "stages": ("stages", "filters"),
    "trainer": ("trainer", "stages.mds", "stages.tokens"),
    "pipeline": ("pipeline", "stages", "filters", "trainer.feedback", "trainer.launch"),
}
# loaded on every curation node, by tests and by the trainer: cheap to import, and free of the engines
FORMATS = (
    *("filters", "stages/mds.py", "stages/document.py", "stages/ledger.py"),
    *("trainer/feedback.py", "trainer/config.py", "trainer/devices.py", "trainer/launch.py"),
)


class Import(NamedTuple):
    module: str  # dotted; for `from a import b` it is 'a.b', so that a submodule is seen
    line: int
    at_import: bool  # runs when the file is imported, as opposed to inside a function


def imports(source: str, module: str) -> Iterator[Import]:
    """Every import of a file, relative ones resolved against `module`, those under TYPE_CHECKING left out."""

    def visit(node: ast.AST, at_import: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, at_import) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(module.split(".")[: -node.level]) if node.level else ""
            source = ".".join(filter(None, [base, node.module]))
            yield from (Import(f"{source}.{alias.name}", node.lineno, at_import) for alias in node.names)
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
    return sorted(p for path in paths for p in ([path] if path.suffix else path.rglob("*.py")) if p.exists())


def imports_of(path: Path) -> list[Import]:
    relative = path.relative_to(ROOT).with_suffix("")
    return list(imports(path.read_text(), ".".join(relative.parts)))


@pytest.mark.parametrize("package", ALLOWED)
def test_a_package_imports_only_what_lies_below_it(package):
    assert sources(package)
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in sources(package)
        for module, line, _ in imports_of(path)
        if module.split(".")[0] in OURS and not any(is_under(module, allowed) for allowed in ALLOWED[package])
    ]
    assert wrong == []


def test_formats_and_filters_load_neither_ray_nor_torch():
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in sources(*FORMATS)
        for module, line, at_import in imports_of(path)
        if at_import and module.split(".")[0] in {"ray", "torch"}
    ]
    assert wrong == []


def test_a_trainer_asks_for_a_tokenizer_only_where_it_has_text():
    found = [i for path in sources("trainer") for i in imports_of(path) if is_under(i.module, "stages.tokens")]
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
        ("from . import b", [("stages.b", True)]),
        ("from .mds import MDSWriter", [("stages.mds.MDSWriter", True)]),
        ("def f():\n  import torch", [("torch", False)]),
        ("class A:\n  import torch", [("torch", True)]),
        ("try:\n  import ray\nexcept ImportError:\n  import b", [("ray", True), ("b", True)]),
        ("if TYPE_CHECKING:\n  import torch\nelse:\n  import a", [("a", True)]),
    ],
)
def test_every_form_of_import_is_seen(source, expected):
    assert [(found.module, found.at_import) for found in imports(source, "stages.pack")] == expected
