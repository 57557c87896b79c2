"""Random numbers by (seed, step) and by image, whatever the processes, the micro-batches and the rest of the batch; and
the settings of glibc; workers and their launcher."""

import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from fastdit import distributed
from fastdit.distributed import ImageRandom, StepRandom, seed_of, step_generator
from fastdit.lock import started
from helpers.containers import as_process_one


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


DIES = "from fastdit.distributed import die_with_parent; die_with_parent(); "
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


def wait_for(holds, seconds=120):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)
