"""The rules of the code base: imports go only downwards, and a file has one topic and a docstring."""

import ast
import importlib
import importlib.metadata
import re
import sys
from pathlib import Path

import pytest

from helpers import ROOT

FILES = sorted([*(ROOT / "fastdit").rglob("*.py"), *(ROOT / "kernels").glob("*.py")])

# a room may import the rooms of lower rank, and itself
RANK = {
    "registry": 0, "errors": 0, "files": 0, "launcher": 0, "lock": 1, "sheets": 1, "distributed": 1, "kernels": 0,
    "schema": 1, "classes": 2, "config": 2, "environment": 2, "data": 3, "diffusion": 3, "models": 3, "build": 4,
    "cards": 4, "unused": 4, "memory": 5, "pipeline": 5, "evaluation": 6, "training": 7, "autoencoder": 8,
    "sampling": 8, "likelihood": 8, "plan": 8, "gallery": 9, "listings": 9, "doctor": 9, "sweep": 9, "api": 10,
    "commands": 11, "convert": 9, "verify": 9, "report": 9, "quickstart": 10, "cli": 12,
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


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line[0] != "#")


TRITON_OF_TORCH = {"2.13.0": "3.7.1"}  # what the release on PyPI requires on Linux; CPU builds require none


def test_the_constraints_can_be_installed_with_pypis_torch():
    """Its Linux release requires one exact Triton; beside another one, the README's first command would fail."""
    versions = constraints()
    assert versions["triton"] == TRITON_OF_TORCH[versions["torch"]]
    required = [line for line in importlib.metadata.requires("torch") or [] if line.startswith("triton==")]
    if importlib.metadata.version("torch") == versions["torch"] and required:
        assert required[0].startswith(f"triton=={versions['triton']}")


def test_the_tests_import_only_what_make_test_installs():
    """A package that happens to be there would hide that it is missing everywhere else."""
    listed = constraints()
    own = {path.stem for path in (ROOT / "tests").iterdir()} | {"fastdit", "bench", "attention", "setup"}
    sources = importlib.metadata.packages_distributions()
    for path in (ROOT / "tests").rglob("*.py"):
        for name in {module.split(".")[0] for module in imports(path)} - own - set(sys.stdlib_module_names):
            packages = {re.sub("[-_.]+", "-", package).lower() for package in sources.get(name, [])}
            wanted = {re.sub("[-_.]+", "-", package).lower() for package in listed}
            assert packages & wanted, f"{path.relative_to(ROOT)} imports {name}, which constraints.txt does not list"
