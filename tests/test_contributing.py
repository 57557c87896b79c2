"""CONTRIBUTING is true: its diffs apply and the suite tests what they add, and its paths through the code exist."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import ROOT

TEXT = (ROOT / "CONTRIBUTING.md").read_text()
DIFFS = re.findall(r"```diff\n(.*?)```", TEXT, re.DOTALL)
ADDED = {  # what each diff adds: how many tests, at least, must run it
    "midpoint": 2,
    "parabola": 30,
    "huber_flow": 4,
    "relu2": 4,
    "silu": 8,
}
SUITE = ["diffusion/test_objectives.py", "diffusion/test_identities.py", "diffusion/test_samplers.py",
         "models/test_variants.py", "kernels/test_kernels.py"]  # fmt: skip


def apply(diff: str, root: Path) -> None:
    """Replace the - lines before each run of + lines, or insert the run before the context line after it."""
    for header, lines in re.findall(r"^--- a/(.*)\n((?:(?!---).*\n)+)", diff, re.MULTILINE):
        path = root / header
        text = path.read_text() if path.is_file() else "\n"
        for removed, added, context in re.findall(r"((?:-.*\n)*)((?:\+.*\n)+)( .*\n)?", lines):
            old, new, after = (
                "".join(line[1:] + "\n" for line in part.splitlines()) for part in (removed, added, context)
            )
            anchor = old or after
            assert text.count("\n" + anchor) == 1, anchor
            text = text.replace("\n" + anchor, "\n" + new + ("" if old else after))
        path.write_text(text)


def test_the_diffs_are_short_and_the_suite_takes_them_up(tmp_path):
    assert len(DIFFS) == len(ADDED)
    shutil.copytree(ROOT / "fastdit", tmp_path / "fastdit", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "kernels", tmp_path / "fastdit" / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "bench", tmp_path / "bench", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "kernels").symlink_to(tmp_path / "fastdit" / "kernels")
    for diff in DIFFS:
        assert len(re.findall(r"^[+-](?!--)", diff, re.MULTILINE)) < 42
        apply(diff, tmp_path)
    options = ["addopts=--import-mode=importlib", "pythonpath=."]
    command = [sys.executable, "-m", "pytest", "-v", "--rootdir=.", "-p", "no:cacheprovider", *SUITE]
    command += [word for option in options for word in ("-o", option)]
    done = subprocess.run(
        [*command, "-k", "parabola or huber_flow or (midpoint and linear and not ddpm) or relu2 or silu"],
        cwd=tmp_path / "tests", capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    for name, least in ADDED.items():
        assert len(re.findall(rf"::.*{name}.* PASSED", done.stdout)) >= least, name


@pytest.mark.parametrize("title", ["From `train.py` to the loss:", "From `sample_ddp.py` to the PNG:"])
def test_the_paths_through_the_code_exist_and_visit_no_file_twice(title):
    section = TEXT[TEXT.index(title) :].split("\n\n")[1]
    steps = re.findall(r"^\d+\. `(.+):(.+)`$", section, re.MULTILINE)
    assert len(steps) == len(section.splitlines()) == len({path for path, _ in steps})
    for path, name in steps:
        scope = ast.parse((ROOT / path).read_text()).body
        for part in name.split("."):
            [node] = [n for n in scope if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name == part]
            scope = node.body
