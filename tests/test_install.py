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
    """Runs `python -c code`, which has `cwd` first on the import path and `path` after it; returns what it prints."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("place", ["repository", "elsewhere"])
def test_diffusers_and_the_kernels_import_together(tmp_path, place):
    code = "from diffusers import AutoencoderKL; import fastdit.kernels; print(fastdit.kernels.__name__)"
    assert python(code, ROOT if place == "repository" else tmp_path) == "fastdit.kernels"


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


def test_without_hugging_face_kernels_the_folder_counts_as_absent():
    code = (
        "from transformers.utils import is_kernels_available; import importlib.metadata as m; "
        "there = any(d.name == 'kernels' for d in m.distributions()); print(there or not is_kernels_available())"
    )
    assert python(code, ROOT) == "True"


def test_import_is_quick_and_pulls_in_no_heavy_library():
    code = """
import sys, time, torch
before, start = set(sys.modules), time.perf_counter()
import fastdit
seconds = time.perf_counter() - start
import fastdit.config, fastdit.data.extract, fastdit.distributed
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(seconds < 2, sorted(new & {"deepspeed", "diffusers", "transformers", "triton", "webdataset"}))
"""
    assert python(code, ROOT) == "True []"


def test_the_wheel_holds_the_kernels_under_fastdit_alone(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(ROOT / "fastdit", source / "fastdit", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "kernels", source / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, source)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        ".",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [wheel] = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"fastdit/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")} <= names
    assert {f"fastdit/{path.relative_to(ROOT / 'fastdit')}" for path in (ROOT / "fastdit").rglob("*.py")} <= names
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"fastdit"}
