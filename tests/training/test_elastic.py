"""A run continues on another number of processes, ZeRO stage or engine with its moments, batches and losses."""

import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from fastdit.data.manifest import Manifest
from fastdit.data.order import permutation
from fastdit.distributed import seed_of
from fastdit.report.facts import read_run
from fastdit.training import checkpoint
from helpers.runs import losses, run

pytestmark = pytest.mark.usefixtures("one_thread")
TORCH = ["training.engine=torch"]
FOUR = ["training.precision=fp32", "training.checkpoint_every=4", "training.keep_checkpoints=0"]


def zero(stage):
    return ["training.engine=deepspeed", f"training.zero_stage={stage}"]


@pytest.fixture(scope="module")
def plain(world, tmp_path_factory):
    """A run of one process and the plain engine, never interrupted, with a checkpoint after every four steps."""
    run_dir = tmp_path_factory.mktemp("plain")
    run("train.py", "--config", str(world / "config.yaml"), f"run_dir={run_dir}", *FOUR, "training.steps=20")
    return run_dir


@pytest.mark.parametrize(
    "legs",  # (options, number of processes) of each leg of four steps
    [
        [(zero(1), 2), (zero(1), 4), (zero(1), 1), (zero(3), 2), (zero(2), 3)],
        [(zero(2), 2), (TORCH, 1), (zero(3), 3), (TORCH, 2)],
    ],
    ids=["stages", "engines"],
)
def test_any_number_of_processes_stage_and_engine_continue_a_run(world, plain, tmp_path, legs):
    run_dir, common = tmp_path / "run", ["--config", str(world / "config.yaml"), "--resume", *FOUR]
    for leg, (options, processes) in enumerate(legs, start=1):
        run("train.py", *common, f"run_dir={run_dir}", f"training.steps={4 * leg}", *options, processes=processes)
    assert losses(run_dir) == pytest.approx(losses(plain)[: 4 * leg], rel=1e-4)
    saved = checkpoint.checkpoints(plain)[:leg]
    assert [folder.name for folder in checkpoint.checkpoints(run_dir)] == [folder.name for folder in saved]
    for theirs in saved:
        ours = run_dir / "checkpoints" / theirs.name
        for name in ("model", "ema", "exp_avg", "exp_avg_sq"):  # moments are carried over, not begun again
            expected = load_file(theirs / f"{name}.safetensors")
            for key, value in load_file(ours / f"{name}.safetensors").items():
                near = {"rtol": 2e-2, "atol": 1e-3 * float(expected[key].abs().max())}
                torch.testing.assert_close(value, expected[key], **near, msg=f"{ours.name}/{name}: {key}")
        assert torch.equal(*(load_file(f / "progress.safetensors")["updates"] for f in (ours, theirs)))


SCRIPT = """
import runpy, torch
from safetensors.torch import load_file
from fastdit.training.state import TrainingState

load = TrainingState.load

def loading(self, folder):
    step = load(self, folder)
    for name, own in self.snapshot().items():
        stored = load_file(folder / f"{name}.safetensors")
        assert own.keys() == stored.keys() and all(torch.equal(own[key], stored[key]) for key in own), name
        print("equal:", name)
    return step

TrainingState.load = loading
runpy.run_path("train.py", run_name="__main__")
"""


@pytest.mark.parametrize("options, processes", [(TORCH, 2), (zero(1), 3), (zero(2), 1), (zero(3), 3)])
def test_what_another_engine_loads_is_what_was_saved(world, plain, tmp_path, options, processes):
    """Bit for bit, with partitions that do not divide the parameters evenly."""
    shutil.copytree(plain, tmp_path / "run")
    (tmp_path / "script.py").write_text(SCRIPT)
    arguments = ["--config", str(world / "config.yaml"), f"run_dir={tmp_path}/run", "training.steps=21", "--resume"]
    said = run(str(tmp_path / "script.py"), *arguments, *options, processes=processes)
    assert said.count("equal:") == 5


@pytest.mark.parametrize("processes", [1, 2])
def test_damaged_samples_are_named_and_counted_whichever_process_reads_them(world, tmp_path, processes):
    shutil.copytree(world / "latents", tmp_path / "latents")
    manifest = Manifest.load(tmp_path / "latents")
    index = manifest.index()
    damaged = permutation(seed_of(0, 1), 0, len(index))[:48:3]  # of the first four steps
    with open(tmp_path / "latents" / manifest.shards[0].name, "r+b") as file:
        for start in index["offset"][damaged].tolist():
            for view in (0, 8 * 8 * 8 * 2):  # both orientations: (8, 8, 8) values of 2 bytes
                file.seek(start + view + 100)
                file.write(b"damage")
    arguments = ["--config", str(world / "config.yaml"), f"run_dir={tmp_path}/run", f"data.shards={manifest.folder}"]
    for more in (["training.steps=2"], ["training.steps=4", "--resume"]):
        run("train.py", *arguments, "data.skip_damaged=true", "data.prefetch=0", *more, processes=processes)
    named = re.findall(r"^sample (\d{9}) of .* is damaged", (tmp_path / "run" / "train.log").read_text(), re.MULTILINE)
    assert {int(key) for key in named} == set(index["key"][damaged].tolist())
    assert read_run(tmp_path / "run").damaged == 16
