"""Random numbers by (seed, step) and by image, whatever the processes, the micro-batches and the rest of the batch; the
processes of one command, and their launcher; and the settings of glibc."""

import subprocess
import sys
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

import fastdit
from fastdit import distributed, errors
from fastdit.distributed import ImageRandom, StepRandom, seed_of, step_generator
from fastdit.launcher import launched
from fastdit.lock import started
from helpers.containers import as_process_one
from helpers.runs import Forks, train_here


def draw(rows: slice, step: int = 3) -> list[torch.Tensor]:
    random = StepRandom(step_generator(0, step), rows, 12)
    return [random.randn(2, 2), random.rand(), random.randn(1)]


def test_step_random_cuts_the_same_numbers_for_any_number_of_processes():
    whole = draw(slice(0, 12))
    for world in (2, 3, 4):
        share = 12 // world
        parts = [draw(slice(r * share, (r + 1) * share)) for r in range(world)]
        for i, expected in enumerate(whole):
            assert torch.equal(torch.cat([part[i] for part in parts]), expected)
    assert not torch.equal(draw(slice(0, 12), step=4)[0], whole[0])


def test_step_random_is_standard():
    random = StepRandom(step_generator(1, 2), slice(0, 50_000), 50_000)
    normal, uniform = random.randn(2), random.rand()
    assert abs(normal.mean()) < 0.02 and abs(normal.std() - 1) < 0.02
    assert abs(uniform.mean() - 0.5) < 0.01 and 0 <= uniform.min() and uniform.max() < 1


def test_an_image_draws_the_same_numbers_in_any_batch():
    alone, together = ImageRandom([7]), ImageRandom([5, 6, 7])
    for _ in range(3):  # and goes on drawing its own
        assert torch.equal(alone(torch.empty(1, 4, 2, 2))[0], together(torch.empty(3, 4, 2, 2))[2])


def test_seeds_are_mixed():
    seeds = {seed_of(a, b) for a in range(30) for b in range(30)}
    assert len(seeds) == 900 and all(0 <= seed < 2**63 for seed in seeds)


def test_glibc_takes_the_settings_of_a_process_on_a_cpu(monkeypatch):
    taken = []
    real = distributed._glibc()
    if real is None:
        pytest.skip("the settings are those of glibc")
    noted = SimpleNamespace(mallopt=lambda *setting: taken.append(real.mallopt(*setting)))
    monkeypatch.setattr(distributed, "_glibc", lambda: noted)
    distributed.init("cpu")
    assert taken == [1, 1]  # glibc refuses a threshold above 32 MiB with 0


DIES = "from fastdit.launcher import die_with_parent; die_with_parent(); "
STARTS = "import os, subprocess, sys; os.environ['RANK'] = '0'; child = subprocess.Popen([sys.executable, '-c', {!r}]);"


def test_a_launcher_that_is_process_1_of_a_container_keeps_its_workers():
    """docker run IMAGE torchrun ...: the parent of the workers is process 1, as that of an orphan is elsewhere."""
    assert as_process_one(STARTS.format(f"{DIES}print('works')") + " assert not child.wait()") == "works"


def test_a_worker_ends_with_its_launcher(tmp_path):
    ready = tmp_path / "ready"
    worker = f"{DIES}open({str(ready)!r}, 'w').close(); import time; time.sleep(600)"
    launcher = STARTS.format(worker) + " print(child.pid, flush=True); child.wait()"
    with subprocess.Popen([sys.executable, "-c", launcher], stdout=subprocess.PIPE, text=True) as process:
        pid = int(process.stdout.readline())
        wait_for(ready.exists)
        process.kill()
    wait_for(lambda: started(pid) is None)
    assert started(pid) is None


def test_a_process_is_tied_to_its_launcher_before_it_imports_pytorch():
    """The import takes seconds, in which a launcher may die, and an orphan would wait for the others for 10 minutes."""
    code = "import sys; from fastdit import cli; cli.die_with_parent = lambda: sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", f"{code}; cli.main(['train']); sys.exit(2)"]).returncode == 0
    # a command of one process may outlive the shell that started it, as with nohup
    assert subprocess.run([sys.executable, "-c", f"{code}; cli.main(['configs']); sys.exit(2)"]).returncode == 2


def wait_for(holds, seconds=120):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize(
    "environment, says",
    [
        ({"RANK": "1"}, "WORLD_SIZE=1, but RANK=1"),  # it would train on images beyond the batch
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, "WORLD_SIZE=2, but RANK=2"),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, "WORLD_SIZE=2, but no RANK"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "1"}, "WORLD_SIZE=2, but no MASTER_ADDR"),
        ({"WORLD_SIZE": "two", "RANK": "0"}, "WORLD_SIZE='two' in the environment is not a number"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK='-1' in the environment is not a number"),
    ],
)
def test_an_environment_that_is_not_a_launchers_is_refused(monkeypatch, environment, says):
    for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(key, raising=False)
    assert launched() == (0, 0, 1)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(ValueError, match=f"{says}.*fastdit launch"):
        distributed.init("cpu")


@pytest.mark.parametrize("begin", [distributed.init, lambda device: fastdit.load("absent", device=device)])
def test_every_way_to_a_gpu_turns_tf32_on(monkeypatch, begin):
    """Also from Python, whose samples are those of the command."""
    chosen = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", chosen.append)
    monkeypatch.setattr(distributed, "named_device", lambda name: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    with pytest.raises(ValueError, match="absent") if begin is not distributed.init else nullcontext():
        begin("cuda")
    assert chosen == ["high"]


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(distributed, "launched", lambda: (2, 2, 3))
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    with pytest.raises(ValueError, match="LOCAL_RANK=2, but this machine has 2 GPUs"):
        distributed.init()


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    """A run of two steps."""
    run_dir = tmp_path_factory.mktemp("agree") / "run"
    train_here(world, run_dir, "training.steps=2")
    return run_dir


CLI = "fastdit/cli.py"


@pytest.mark.parametrize(
    "script, arguments, last, says",
    [
        ("train.py", "--config {world}/config.yaml run_dir={tmp}/run", "training.lr=0.01", "training.lr=0.01"),
        ("train.py", "--config {world}/config.yaml run_dir={tmp}/run", "seed=1", "seed=1"),
        ("sample_ddp.py", "{run} --out {tmp}/out --num-samples 8", "--weights model", "weights='model'"),
        (CLI, "evaluate {run} --reference {world}/held_out --num-samples 8", "sampling.steps=3", "sampling.steps='3'"),
        (CLI, "evaluate {run} --loss --shards {world}/latents --num-samples 20", "--weights model", "sha256="),
        (CLI, "extract --images {world}/held_out --out {tmp}/out --vae {world}/vae --image-size 32", "--batch-size 5",
         "batch_size=5"),
    ],
    ids=["lr", "seed", "sample", "evaluate", "loss", "extract"],
)  # fmt: skip
def test_processes_with_different_settings_do_not_mix_their_results(
    world, trained, tmp_path, script, arguments, last, says
):
    places = {"world": world, "run": trained, "tmp": tmp_path}
    given = [word.format(**places) for word in arguments.split()]
    with Forks(script, *given, processes=2, last=tuple(last.split())) as forks:
        assert 2 in forks.wait()
        assert f"error: {says}" in forks.said() and "on rank 1" in forks.said()
    assert not list(tmp_path.rglob("*.png")) + list(tmp_path.rglob("*.tar")) + list(tmp_path.rglob("step-*"))


def speak_at_once() -> None:
    errors.LAST_S = 0.0


def test_a_process_says_in_one_line_that_another_one_has_ended(world, tmp_path):
    arguments = "--config", str(world / "config.yaml"), f"run_dir={tmp_path}/run"
    with Forks("train.py", *arguments, processes=2, last=("data.shards=/nowhere",), before=speak_at_once) as forks:
        assert forks.wait(patient=True) == [2, 2]
        said = [line for line in forks.said().splitlines() if line and "WARNING" not in line]
    assert len(said) == 2 and said[0].startswith("error: communication between the processes failed (Connection")
    assert said[1].startswith("error: /nowhere has no manifest.json")


def test_a_command_waits_for_a_process_with_a_longer_share(monkeypatch):
    """By default gloo and NCCL give up after some minutes, and the samples of a slower GPU would be for nothing."""
    taken = {}
    monkeypatch.setattr(distributed, "launched", lambda: (0, 0, 2))
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda url, timeout: iter([(None, 0, 2)]))
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **options: taken.update(options))
    distributed.init("cpu")
    assert taken["timeout"].total_seconds() >= 12 * 3600
    distributed.init("cpu", 20)  # as training does, which has a watchdog
    assert taken["timeout"].total_seconds() == 20
