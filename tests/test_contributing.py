"""CONTRIBUTING's diffs are true: under 20 lines each, they apply, and the suite tests what they add without an edit."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from helpers import ROOT

DIFFS = re.findall(r"```diff\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
SUITE = ["diffusion/test_objectives.py", "diffusion/test_identities.py", "diffusion/test_samplers.py"]


def apply(diff: str, root: Path) -> None:
    """Put each run of + lines in place of the - lines before it, or in front of the line of the file after it."""
    header, *lines = diff.splitlines()
    path = root / header.removeprefix("--- a/")
    text = path.read_text()
    for removed, added, context in re.findall(r"((?:-.*\n)*)((?:\+.*\n)+)( .*\n)?", "\n".join(lines) + "\n"):
        old, new, after = ("".join(line[1:] + "\n" for line in part.splitlines()) for part in (removed, added, context))
        anchor = old or after
        assert text.count("\n" + anchor) == 1, anchor
        text = text.replace("\n" + anchor, "\n" + new + ("" if old else after))
    path.write_text(text)


def test_the_diffs_are_short_and_the_suite_takes_them_up(tmp_path):
    assert [re.search(r"fastdit/.*\.py", diff)[0] for diff in DIFFS] == [
        f"fastdit/diffusion/{name}.py" for name in ("samplers", "paths", "objectives")
    ]
    shutil.copytree(ROOT / "fastdit", tmp_path / "fastdit", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "kernels", tmp_path / "fastdit" / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    for diff in DIFFS:
        assert len(re.findall(r"^[+-](?!--)", diff, re.MULTILINE)) < 20
        apply(diff, tmp_path)
    options = ["addopts=--import-mode=importlib", "pythonpath=."]
    command = [sys.executable, "-m", "pytest", "-v", "--rootdir=.", "-p", "no:cacheprovider", *SUITE]
    command += [word for option in options for word in ("-o", option)]
    done = subprocess.run(
        [*command, "-k", "parabola or huber_flow or (midpoint and linear and not ddpm)"],
        cwd=tmp_path / "tests", capture_output=True, text=True, timeout=240,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    for name, least in (("parabola", 30), ("huber_flow", 4), ("midpoint", 2)):
        assert len(re.findall(rf"::.*{name}.* PASSED", done.stdout)) >= least, name
