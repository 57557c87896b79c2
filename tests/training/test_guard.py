"""Steps that are not finite change nothing, and whatever asks a run to stop leaves a checkpoint to continue from."""

import json
import math
import os
import shutil
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import fastdit.training.guard
import fastdit.training.loop
import fastdit.training.step
from fastdit.config import load_config
from fastdit.data.loader import sample_keys
from fastdit.data.manifest import Manifest
from fastdit.distributed import seed_of
from fastdit.training import checkpoint
from fastdit.training.guard import EXIT_STOPPED
from fastdit.training.log import Log, read_metrics, read_records
from fastdit.training.loop import ORDER, train
from helpers.runs import run

pytestmark = pytest.mark.usefixtures("one_thread")
SHORT = ["training.steps=8", "training.checkpoint_every=1", "training.keep_checkpoints=0", "training.precision=fp32"]


def config_of(world, run_dir, *overrides):
    return load_config(world / "config.yaml", [f"run_dir={run_dir}", *SHORT, *overrides])


def poison(monkeypatch, *steps: int) -> None:
    """One NaN in the latents of these steps, counted from 1."""
    original, calls = fastdit.training.step.sample_latents, iter(range(1, 10_000))

    def sample_latents(*arguments):
        x_0 = original(*arguments)
        if next(calls) in steps:
            x_0[3, 0, 1, 1] = torch.nan
        return x_0

    monkeypatch.setattr(fastdit.training.step, "sample_latents", sample_latents)


def state(run_dir, step):
    folder = run_dir / "checkpoints" / f"step-{step:07d}"
    parts = ("model", "ema", "exp_avg", "exp_avg_sq")
    state = {f"{part}.{k}": v for part in parts for k, v in load_file(folder / f"{part}.safetensors").items()}
    return state | {"updates": load_file(folder / "progress.safetensors")["updates"]}


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_a_step_that_is_not_finite_changes_nothing_and_is_named(world, tmp_path, monkeypatch):
    poison(monkeypatch, 3, 6)
    run = tmp_path / "run"
    train(config_of(world, run, "training.ema_decay=0.5"), device="cpu")
    for bad in (3, 6):
        assert_equal(state(run, bad), state(run, bad - 1))
        assert not torch.equal(state(run, bad + 1)["ema.final_layer.linear.weight"],
                               state(run, bad)["ema.final_layer.linear.weight"])  # fmt: skip
    records = [json.loads(line) for line in (run / "skipped.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [3, 6]
    manifest = Manifest.load(world / "latents")
    for record in records:
        assert len(record["keys"]) == len(set(record["keys"])) == 12 and set(record["keys"]) <= set(
            range(len(manifest) * 2)
        )
        assert all(0 <= t <= 1 for t in record["times"]) and len(record["times"]) == 12

    def no_constant(name):
        raise AssertionError(f"{name} is not JSON")

    lines = [json.loads(line, parse_constant=no_constant) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["loss"] is None] == [3, 6]


def test_the_named_times_and_keys_are_those_of_the_step(world, tmp_path, monkeypatch):
    seen = {}
    original = fastdit.training.step.TrainStep.run

    def run(self, generator, step, lr, *given):
        sample_t = type(self.objective).sample_t
        with monkeypatch.context() as patch:
            patch.setattr(type(self.objective), "sample_t", lambda own, u: seen.setdefault(step, sample_t(own, u)))
            return original(self, generator, step, lr, *given)

    monkeypatch.setattr(fastdit.training.step.TrainStep, "run", run)
    poison(monkeypatch, 2)
    train(config_of(world, tmp_path / "run", "training.steps=3"), device="cpu")
    [record] = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert record["times"] == pytest.approx(seen[1].tolist(), abs=0)


def test_what_was_read_instead_of_damaged_samples_is_named_too(world, tmp_path, monkeypatch):
    config = config_of(world, tmp_path / "run", "data.skip_damaged=true", "training.steps=3",
                       f"data.shards={shutil.copytree(world / 'latents', tmp_path / 'latents')}")  # fmt: skip
    manifest = Manifest.load(tmp_path / "latents")
    index, first = manifest.index(), sample_keys(manifest, seed_of(config.seed, ORDER), 12, 1)[0]
    row = index["key"].tolist().index(first)
    with open(manifest.folder / manifest.shards[index["shard"][row]].name, "r+b") as file:
        file.seek(int(index["offset"][row]))
        file.write(b"damaged!" * math.prod(manifest.latents.shape))  # mean and std of two orientations, 2 bytes each
    poison(monkeypatch, 2)
    train(config, device="cpu")
    [record] = read_records(tmp_path / "run" / "skipped.jsonl")
    assert record["keys"][0] == first and record["replaced"] == {str(first): index["key"][(row + 1) % len(index)]}


def test_a_run_of_bad_steps_ends_with_every_checkpoint_finite_and_resumes(world, tmp_path, monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        poison(patch, 4, 5, 6)
        with pytest.raises(ValueError, match="not finite in 3 steps in a row .* up to step 6; .* training.lr"):
            train(config_of(world, run), device="cpu")
    assert [c.name for c in checkpoint.checkpoints(run)][-1] == "step-0000005"
    for step in range(1, 6):
        assert all(value.isfinite().all() for value in state(run, step).values())
    train(config_of(world, run), resume=True, device="cpu")
    assert [m["step"] for m in read_metrics(run)] == list(range(1, 9))


def test_a_diverging_run_stores_nothing_that_is_not_finite(world, tmp_path):
    wild = ["training.lr=1e30", "training.warmup_steps=0", "training.steps=20"]
    with pytest.raises(ValueError, match="not finite in 3 steps in a row"):
        train(config_of(world, tmp_path / "run", *wild), device="cpu")
    for folder in checkpoint.checkpoints(tmp_path / "run"):
        assert all(value.isfinite().all() for value in state(tmp_path / "run", int(folder.name[5:])).values())


@pytest.mark.parametrize("stage", [1, 3])  # DeepSpeed has one optimizer for stages 1 and 2; the next test runs stage 2
def test_under_zero_too_a_diverging_run_stops_and_stores_nothing_that_is_not_finite(world, tmp_path, stage):
    wild = ["training.lr=1e30", "training.engine=deepspeed", f"training.zero_stage={stage}"]
    arguments = [f"run_dir={tmp_path}/run", *SHORT, "training.steps=20", *wild]
    with pytest.raises(AssertionError, match="not finite in 3 steps in a row"):
        run("train.py", "--config", str(world / "config.yaml"), *arguments, processes=2)
    found = checkpoint.checkpoints(tmp_path / "run")
    assert found
    for folder in found:
        for name in ("model", "ema"):
            assert all(value.isfinite().all() for value in load_file(folder / f"{name}.safetensors").values())


@pytest.mark.parametrize("engine", ["torch", "deepspeed training.zero_stage=2", "deepspeed training.zero_stage=3"])
def test_a_loss_that_is_not_finite_is_skipped_even_if_its_gradient_is_finite(world, tmp_path, engine):
    """On one of two processes, at the third step."""
    (tmp_path / "script.py").write_text("""
import os, runpy
from dataclasses import replace
from fastdit.diffusion.objectives import FlowMatching

original, calls = FlowMatching.loss, []

def loss(self, *arguments):
    calls.append(original(self, *arguments))
    bad = len(calls) == 3 and os.environ["RANK"] == "1"
    return replace(calls[-1], per_sample=calls[-1].per_sample + (float("nan") if bad else 0))

FlowMatching.loss = loss
runpy.run_path("train.py", run_name="__main__")
""")
    arguments = [f"run_dir={tmp_path}/run", *SHORT, "training.steps=4", *f"training.engine={engine}".split()]
    run(str(tmp_path / "script.py"), "--config", str(world / "config.yaml"), *arguments, processes=2)
    assert_equal(state(tmp_path / "run", 3), state(tmp_path / "run", 2))
    assert [m["loss"] is None for m in read_metrics(tmp_path / "run")] == [False, False, True, False]
    assert [json.loads(line)["step"] for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()] == [3]


@pytest.mark.parametrize("stage", [1, 2])
def test_under_zero_too_an_infinity_that_fp8_saturates_is_skipped(world, tmp_path, stage):
    """The loss and the gradients are finite."""
    (tmp_path / "script.py").write_text("""
import runpy
from fastdit.models.fp8 import Fp8

def collect(self, collect=Fp8.collect, calls=[]):
    collect(self)
    calls.append(0)
    if len(calls) == 3:
        self.seen[0, 0] = float("inf")

Fp8.collect = collect
runpy.run_path("train.py", run_name="__main__")
""")
    zero = ["training.engine=deepspeed", f"training.zero_stage={stage}", "training.fp8=true", "training.compile=false"]
    arguments = [f"run_dir={tmp_path}/run", *SHORT, "training.steps=4", "training.precision=bf16", *zero]
    run(str(tmp_path / "script.py"), "--config", str(world / "config.yaml"), *arguments)
    before, after, later = (state(tmp_path / "run", step) for step in (2, 3, 4))
    assert_equal(before, after)
    assert not torch.equal(after["model.x_embedder.proj.weight"], later["model.x_embedder.proj.weight"])
    assert [json.loads(line)["step"] for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()] == [3]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "stop file", "time limit"])
def test_what_asks_a_run_to_stop_leaves_a_checkpoint_that_continues_exactly(world, tmp_path, monkeypatch, name):
    train(config_of(world, tmp_path / "whole", "training.checkpoint_every=8"), device="cpu")
    run, original, steps = tmp_path / "run", Log.step, iter(range(1, 100))

    def step(self):
        original(self)
        if next(steps) == 3:
            if name == "stop file":
                (run / "stop").touch()
                monkeypatch.setattr("fastdit.training.guard.time.monotonic", lambda: 1e9)
            elif name == "time limit":
                monkeypatch.setattr("fastdit.training.guard.time.monotonic", lambda: 1e9)
            else:
                os.kill(os.getpid(), getattr(signal, name))

    limit = ["training.time_limit=1:30"] if name == "time limit" else []
    with monkeypatch.context() as patch:
        patch.setattr(Log, "step", step)
        with pytest.raises(SystemExit) as stopped:
            train(config_of(world, run, "training.checkpoint_every=100", *limit), device="cpu")
    assert stopped.value.code == EXIT_STOPPED == 75
    assert [c.name for c in checkpoint.checkpoints(run)] == ["step-0000004"]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL and not (run / "stop").exists()
    monkeypatch.undo()
    torch.set_num_threads(1)
    train(config_of(world, run, "training.checkpoint_every=8"), resume=True, device="cpu")
    assert_equal(state(run, 8), state(tmp_path / "whole", 8))


def test_a_signal_that_the_launcher_passes_on_as_well_is_one_request_and_a_later_one_ends_the_process(tmp_path):
    """torchrun and deepspeed pass on a signal that SLURM or a terminal has sent to the workers too."""
    codes = []
    for again_s in (60, 0):
        if (child := os.fork()) == 0:
            fastdit.training.guard.AGAIN_S = again_s
            with fastdit.training.guard.Requests(tmp_path, 0, 0) as requests:
                for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
                    os.kill(os.getpid(), number)
                os._exit(requests.poll()[0] and requests.reason == "SIGINT")
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    assert codes == [1, -signal.SIGTERM]


def test_checkpoints_are_also_saved_by_the_clock(world, tmp_path, monkeypatch):
    clock = iter(range(0, 100_000, 31))  # seconds: half a minute passes between any two looks
    fake = SimpleNamespace(monotonic=lambda: float(next(clock)), perf_counter=time.perf_counter)
    for module in ("guard", "upkeep"):
        monkeypatch.setattr(f"fastdit.training.{module}.time", fake)
    overrides = ["training.checkpoint_every=100", "training.checkpoint_minutes=1"]
    train(config_of(world, tmp_path / "run", *overrides), device="cpu")
    names = [c.name for c in checkpoint.checkpoints(tmp_path / "run")]
    assert 3 <= len(names) < 8 and names[-1] == "step-0000008"


@pytest.mark.parametrize("value", ["1:5h", "1:75", "1:300", "1:30:75", "1:5", "1:2:3:4", "1:30:", "soon", "-3", "1e2"])
def test_a_time_limit_is_hours_and_minutes(world, tmp_path, value):
    with pytest.raises(ValueError, match="training.time_limit='.*' is out of range; use HH:MM, HH:MM:SS or minutes"):
        config_of(world, tmp_path, f"training.time_limit='{value}'")
    for text, seconds in (
        ("1:30", 5400), ("01:30", 5400), ("90", 5400), ("090", 5400), ("0:02", 120), ("''", 0),
        ("1:30:00", 5400), ("01:30:00", 5400), ("12:00:00", 43_200), ("0:00:30", 30), ("120:00", 432_000),
    ):  # fmt: skip
        assert config_of(world, tmp_path, f"training.time_limit={text}").training.time_limit_s == seconds


def test_the_time_limit_includes_the_preparation_of_the_run(world, tmp_path, monkeypatch):
    build = fastdit.training.loop.build_network
    monkeypatch.setattr(fastdit.training.loop, "build_network", lambda *given: [time.sleep(1), build(*given)][1])
    with pytest.raises(SystemExit, match=str(EXIT_STOPPED)):
        train(config_of(world, tmp_path / "run", "training.time_limit=0:00:01"), device="cpu")
    assert [c.name for c in checkpoint.checkpoints(tmp_path / "run")] == ["step-0000001"]


@pytest.mark.parametrize(("limit", "words"), [("1:30", "1:30:00"), ("30:00", "1 day, 6:00:00"), ("30", "0:30:00")])
def test_the_log_says_what_the_time_limit_means(world, tmp_path, limit, words):
    train(config_of(world, tmp_path / "run", f"training.time_limit='{limit}'", "training.steps=1"), device="cpu")
    assert f"training.time_limit={limit}: saves and stops after {words}\n" in (tmp_path / "run/train.log").read_text()
