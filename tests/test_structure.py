"""The rules of the code base: imports go only downwards, and a file has one topic and a docstring."""

import ast
import importlib
from pathlib import Path

import pytest

from helpers import ROOT

FILES = sorted([*(ROOT / "fastdit").rglob("*.py"), *(ROOT / "kernels").glob("*.py")])

# a room may import the rooms of lower rank, and itself
RANK = {
    "registry": 0, "errors": 0, "files": 0, "lock": 1, "sheets": 1, "distributed": 0, "kernels": 0, "config": 1,
    "environment": 1, "data": 2, "diffusion": 2, "models": 2, "build": 3, "cards": 3, "memory": 4, "pipeline": 4,
    "evaluation": 5, "training": 6, "autoencoder": 7, "sampling": 7, "likelihood": 7, "plan": 7, "gallery": 8,
    "listings": 8, "doctor": 8, "sweep": 8, "api": 9, "commands": 10, "convert": 8, "verify": 8, "report": 8,
    "quickstart": 9, "cli": 11,
}  # fmt: skip


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def imports(path: Path) -> set[str]:
    """Absolute modules that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_only_downwards(path):
    own = "kernels" if path.parent.name == "kernels" else room(".".join(path.relative_to(ROOT).with_suffix("").parts))
    if own in ("", "__init__"):
        return
    for module in imports(path):
        if module.startswith("fastdit."):
            other = room(module)
            if other == "__version__":
                continue
            assert other == own or RANK[other] < RANK[own], f"{own} imports {module}"


@pytest.mark.parametrize("path", sorted((ROOT / "fastdit/diffusion").glob("*.py")), ids=lambda p: p.name)
def test_diffusion_knows_torch_alone(path):
    for module in imports(path):
        top = module.split(".")[0]
        assert top in {"torch", "scipy", "torchdiffeq", "fastdit", "math", "functools", "itertools",
                       "dataclasses", "collections", "typing"}, module  # fmt: skip
        assert top != "fastdit" or module.startswith(("fastdit.diffusion", "fastdit.registry")), module


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_is_one_thing_and_says_which(path):
    assert len(path.read_text().splitlines()) <= 400
    assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no docstring"


def test_every_table_of_make_chaos_can_be_imported_and_run(monkeypatch):
    """They run by hand only, and a name that is missing would show after twenty minutes."""
    monkeypatch.syspath_prepend(str(ROOT / "tests"))
    for name in importlib.import_module("chaos.__main__").TABLES:
        assert callable(importlib.import_module(f"chaos.{name}").run), name
