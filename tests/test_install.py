"""`kernels/` is installed as fastdit.kernels, and Hugging Face's package `kernels` keeps its name."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from helpers import ROOT


def python(code: str, cwd: Path, *path: Path) -> str:
    """Run `python -c code` with `cwd` first on the import path and `path` after it, and return what it prints."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("place", ["repository", "elsewhere"])
def test_diffusers_and_the_kernels_import_together(tmp_path, place):
    """transformers does not take the folder `kernels/` for Hugging Face's package."""
    code = """
import importlib.metadata, fastdit.kernels
from diffusers import AutoencoderKL
from transformers.utils import is_kernels_available
there = any(package.name == "kernels" for package in importlib.metadata.distributions())
print(fastdit.kernels.__name__, there or not is_kernels_available())
"""
    assert python(code, ROOT if place == "repository" else tmp_path) == "fastdit.kernels True"


HUGGING_FACE = 'from .layer import kernelize\n__version__ = "9.0"\n'


def test_hugging_face_kernels_wins_over_the_folder(tmp_path):
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text(HUGGING_FACE)
    (package / "layer.py").write_text("def kernelize(): return 'theirs'\n")
    code = (
        "import fastdit.kernels; import kernels; from kernels.layer import kernelize; "
        "print(kernels.__version__, kernels.__file__, kernelize(), fastdit.kernels.__file__)"
    )
    theirs, ours = package / "__init__.py", ROOT / "kernels" / "__init__.py"
    assert python(code, ROOT, tmp_path) == f"9.0 {theirs} theirs {ours}"


def test_the_package_alone_imports_no_library_and_its_commands_no_heavy_one():
    code = """
import sys
before = set(sys.modules)
import fastdit
alone = {name.partition(".")[0] for name in set(sys.modules) - before}
import torch
before = set(sys.modules)
import fastdit.config, fastdit.data.extract, fastdit.distributed
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(alone - sys.stdlib_module_names, new & {"deepspeed", "diffusers", "transformers", "triton", "webdataset"})
"""
    assert python(code, ROOT) == "{'fastdit'} set()"


def test_the_wheel_holds_the_kernels_under_fastdit_alone(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(ROOT / "fastdit", source / "fastdit", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "kernels", source / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, source)
    options = ["--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path)]
    command = [sys.executable, "-m", "pip", "wheel", ".", *options]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [wheel] = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"fastdit/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")} <= names
    assert {f"fastdit/{path.relative_to(ROOT / 'fastdit')}" for path in (ROOT / "fastdit").rglob("*.py")} <= names
    assert {"fastdit/models/attention.json", "fastdit/report/page.css"} <= names
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"fastdit"}
