"""The directions of imports that docs/architecture.md draws, and that private names stay private."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("aligncurate", "aligntrain")
LAYERS = [  # a module imports from its own folder or from a later line
    {"aligntrain.cli"},
    {"aligntrain.tools"},
    {"aligntrain.training"},
    {"aligntrain.auto"},
    {"aligntrain.data"},
    {"aligntrain.inputs"},
    {"aligntrain.model"},
    {"aligntrain.stage"},
    {"aligncurate.demo"},
    {"aligncurate.cli"},
    {"aligncurate.verbs"},
    {"aligncurate.scoring"},
    {"aligncurate.engines"},
    {"aligncurate.encoders"},
    {"aligncurate.sources"},
    {"aligncurate.images"},
    {"aligncurate.dataset"},
    {"aligncurate.levels"},
    {"aligncurate.io"},
    {"aligncurate.settings"},
    {"aligncurate.progress"},
    {"aligncurate.errors"},
]
EXEMPT = {  # import from above, lazily
    "aligncurate/__init__.py",
    "aligncurate/__main__.py",
    "aligncurate/cli/app.py",  # adds the commands of aligntrain when they are called
    "aligntrain/__init__.py",
}


def modules() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """(module, name) of everything that a file imports from the two packages, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if (node.module or "").partition(".")[0] in (*PACKAGES, "pipelines", "benchmarks", "tests"):
                yield from ((node.module or "", alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names if alias.name.partition(".")[0] in PACKAGES)


def layer_of(module: str) -> int | None:
    place = ".".join(module.split(".")[:2])
    return next((number for number, layer in enumerate(LAYERS) if place in layer), None)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    name = str(path.relative_to(ROOT))
    own = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    for module, imported in imports(path):
        top = module.partition(".")[0]
        assert top in PACKAGES, f"{name} imports {module}"
        full = f"{module}.{imported}" if layer_of(module) is None else module
        if name not in EXEMPT:
            assert top == "aligncurate" or own.startswith("aligntrain"), f"{name} imports {module}"
            mine, theirs = layer_of(own), layer_of(full)
            assert mine is not None, f"{own} is in no layer"
            if theirs is not None:
                assert mine <= theirs, f"{name} imports {full}, which is above it"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_private_names_stay_private(path: Path) -> None:
    for module, imported in imports(path):
        private = [part for part in (*module.split("."), imported) if part.startswith("_") and part != "__version__"]
        assert not private, f"{path.relative_to(ROOT)} imports {module}.{imported}"
