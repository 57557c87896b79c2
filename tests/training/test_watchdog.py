"""A process that stalls or dies is named in one line, with the stack of every process, instead of waiting forever."""

import re
import time

import pytest
import torch

from fastdit.distributed import Ranks
from fastdit.training import watchdog
from fastdit.training.watchdog import Watchdog
from helpers.runs import run

SCRIPT = """
import os, runpy, signal, time
from fastdit.training import loop
from fastdit.training.step import TrainStep

def fault(step):
    if step == 3 and os.environ["RANK"] == "1":
        {fault}

call, on_device = TrainStep.__call__, loop.on_device

def calling(self, step, lr, *given):
    if "{where}" == "compute":
        fault(step)
    return call(self, step, lr, *given)

def reading(batches, device):
    for step, batch in enumerate(on_device(batches, device)):
        if "{where}" == "read":
            fault(step)
        yield batch

TrainStep.__call__, loop.on_device = calling, reading
runpy.run_path("train.py", run_name="__main__")
"""


def said_by(world, tmp_path, fault, where, *overrides, patient=False):
    (tmp_path / "script.py").write_text(SCRIPT.format(fault=fault, where=where))
    common = ["--config", str(world / "config.yaml"), f"run_dir={tmp_path}/run", "training.checkpoint_every=1"]
    with pytest.raises(AssertionError) as error:
        run(str(tmp_path / "script.py"), *common, *overrides, processes=2, patient=patient)
    return str(error.value)


@pytest.mark.parametrize("engine", ["torch", "deepspeed"])
def test_a_process_that_stalls_is_named_with_all_stacks(world, tmp_path, engine):
    overrides = ["training.timeout_s=4", f"training.engine={engine}"]
    said = said_by(world, tmp_path, "time.sleep(100)", "read", *overrides)
    expected = (
        r"error: rank 1 \(process \d+ on \S+\): no progress for 4 s \(training.timeout_s\) while it reads a batch in "
    )
    assert re.search(expected + "step 4; the others wait for it. All stacks: .*/run/stacks. Cont", said), said
    stacks = {path.name: path.read_text() for path in (tmp_path / "run" / "stacks").glob("*.txt")}
    assert stacks.keys() == {"rank-00000.txt", "rank-00001.txt"}
    for name, line in (("rank-00000", "in backward"), ("rank-00001", "in fault")):
        main = stacks[f"{name}.txt"].partition("other threads")[0]
        assert line in main and f"{name}, {main.strip()}" in said
    run("train.py", "--config", str(world / "config.yaml"), f"run_dir={tmp_path}/run", "--resume", processes=2)
    assert not (tmp_path / "run" / "stacks").exists()


def test_where_all_are_in_the_same_place_all_are_named(world, tmp_path):
    said = said_by(world, tmp_path, "time.sleep(100)", "compute", "training.timeout_s=4")
    assert re.search(
        r"error: rank 0 \(process .*\), rank 1 \(.*\): no progress .* while it computes in step 4\. ", said
    ), said
    assert "in fault" in said


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSTOP"])
def test_a_process_that_dies_or_is_stopped_is_named(world, tmp_path, name):
    kill, patient = f"os.kill(os.getpid(), signal.{name})", name == "SIGKILL"  # a stopped process never ends
    said = said_by(world, tmp_path, kill, "compute", "training.timeout_s=4", patient=patient)
    assert re.search(
        r"error: rank 1 \(process .*\): died or does not run; it was last seen before step 5; the", said
    ), said


def test_a_full_disk_does_not_end_the_watch(tmp_path, monkeypatch):
    def full(path, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(watchdog, "replace_text", full)
    with Watchdog(tmp_path, Ranks(0, 0, 1, torch.device("cpu")), timeout_s=0.4) as dog:  # a beat every 20 ms
        end = time.monotonic() + 20
        while dog.beats < 5 and time.monotonic() < end:
            dog.at(1, 0)
            time.sleep(0.01)
        assert dog.beats >= 5 and dog.thread.is_alive()
