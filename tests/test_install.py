"""`kernels/` is installed as fastdit.kernels, and Hugging Face's package `kernels` keeps its name."""

import json
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


def test_importing_fastdit_sets_how_threads_wait_unless_the_user_did(tmp_path, monkeypatch):
    code = "import fastdit, os; print(os.environ.get('OMP_WAIT_POLICY'), os.environ.get('GOMP_SPINCOUNT'))"
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    assert python(code, ROOT) == "PASSIVE 1000"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert python(code, ROOT) == "ACTIVE None"
    monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    assert python(code, ROOT) == "None 7"


MACOS = """
import json, os, pathlib, resource, sys
import diffusers, deepspeed, torch, torch.utils.tensorboard
read, usage = pathlib.Path.read_text, resource.getrusage
def read_text(self, *args, **options):
    if str(self).startswith("/proc"):
        raise FileNotFoundError(str(self))
    return read(self, *args, **options)
class InBytes:
    def __init__(self, who):
        self.ru_maxrss = 1024 * usage(who).ru_maxrss
exists = pathlib.Path.exists
pathlib.Path.read_text = read_text
pathlib.Path.exists = lambda self, **options: not str(self).startswith("/proc") and exists(self, **options)
resource.getrusage = InBytes
for name in ("sched_getaffinity", "sched_setaffinity", "posix_fadvise", "memfd_create", "copy_file_range"):
    if hasattr(os, name):
        delattr(os, name)
sys.platform = "darwin"
from fastdit.cli import main
for words in json.load(sys.stdin):
    main(words)
"""


def test_everything_runs_without_what_only_linux_has(world, tmp_path):
    """A run, its samples and their measurement on a machine like macOS: no /proc, no affinity, peak memory in bytes."""
    few = ["training.steps=2", "training.global_batch=8", "training.log_every=1", "training.precision=fp32",
           "training.compile=false", "sampling.steps=2", "sampling.batch_size=4"]  # fmt: skip
    where = [f"data.shards={world / 'latents'}", "run_dir=run"]
    images = str(world / "held_out")
    commands = [
        ["extract", "--images", images, "--out", "latents", "--vae", str(world / "vae"), "--image-size", "32"],
        ["train", "sit_s_2", "model.variant=DiT-1x32x2/2", *where, *few],
        ["train", "sit_s_2", "model.variant=DiT-1x32x2/2", *where, *few, "training.steps=3", "--resume"],
        ["sample", "run", "--out", "samples", "--num-samples", "8"],
        ["evaluate", "samples", "--reference", "samples", "--metrics", "frechet"],
        ["verify", "run"],
        ["report", "run"],
        ["doctor"],
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", MACOS], cwd=tmp_path, env=environment, input=json.dumps(commands),
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert all((tmp_path / name).exists() for name in ("latents/manifest.json", "samples/grid.png", "run/report.html"))
    peaks = [line for line in (tmp_path / "run/train.log").read_text().splitlines() if "peak" in line]
    assert peaks and all(0.1 < float(line.partition("peak ")[2].split()[0]) < 20 for line in peaks)
