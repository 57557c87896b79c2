"""A folder to train in (digits, an untrained autoencoder, their latents), and how tests run the scripts in it.

A new interpreter takes five to ten seconds to import torch, diffusers and DeepSpeed. `run` therefore forks its
processes from one that has imported them. `run_command` starts new interpreters, where the command itself is tested.
"""

import multiprocessing
import os
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path

import torch
from torch.distributed import TCPStore

from fastdit.config import load_config
from fastdit.training.log import read_metrics
from fastdit.training.loop import train
from helpers import ROOT

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["fastdit.training.loop", "fastdit.sampling", "fastdit.data.extract", "torch.utils.tensorboard"]
    + ["diffusers.models.autoencoders.autoencoder_kl", "diffusers.models.transformers.dit_transformer_2d"]
    + ["deepspeed.runtime.zero.muon.muon_optimizer"]  # DeepSpeed imports it when a run begins
)


def make_world(root: Path) -> Path:
    """Write root/{images,held_out,vae,latents} and root/config.yaml, for a run of twenty short steps."""
    from fastdit.data.extract import extract_features
    from fastdit.quickstart.digits import write_digits
    from helpers.data import small_vae

    write_digits(root, 32)
    small_vae(32, seed=1).save_pretrained(root / "vae")
    extract_features(images=root / "images", out=root / "latents", vae=root / "vae", image_size=32)
    (root / "config.yaml").write_text(f"""
run_dir: {root}/run
data: {{shards: {root}/latents, image_size: 32, num_classes: 10, vae: {root}/vae}}
model: {{variant: DiT-Ti/4}}
objective: {{name: flow}}
training: {{steps: 20, global_batch: 12, lr: 1e-3, compile: false, log_every: 1, checkpoint_every: 5, engine: torch,
           report: false}}
sampling: {{sampler: heun, steps: 4, cfg_scale: 1.5, batch_size: 4}}
""")
    return root


def train_here(world: Path, run_dir: Path, *overrides: str, resume: bool = False, read_initial=None) -> Path:
    """Train in this process, with the world's config; returns the last checkpoint."""
    config = load_config(world / "config.yaml", [f"run_dir={run_dir}", *overrides])
    return train(config, resume=resume, read_initial=read_initial)


def losses(run_dir: Path) -> list[float]:
    """The loss of every step."""
    return [record["loss"] for record in read_metrics(run_dir)]


def run_command(*command: str | Path, **environment: str) -> subprocess.CompletedProcess:
    """Run a command in a new process; the exit code is not checked."""
    return subprocess.run(command, env={**ENVIRONMENT, **environment}, capture_output=True, text=True)


def rendezvous() -> tuple[TCPStore, dict[str, str]]:
    """A TCP store, served while the caller holds a reference, and the environment in which processes use it.

    torchrun does the same for its workers. The port is chosen when it is bound, so no other process can take it first.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return store, {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }


class Forks:
    """A script of the repository in forked processes, with `before()` called in each; leaving `with` kills them.

    `last`: further arguments of the last process.
    """

    def __init__(
        self, script: str, *arguments: str, processes: int = 1, before: Callable[[], None] | None = None,
        last: tuple[str, ...] = (),
    ):  # fmt: skip
        self.store, world = rendezvous()
        world |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        self.folder = tempfile.TemporaryDirectory()
        self.outputs = [Path(self.folder.name) / str(rank) for rank in range(processes)]
        self.forks = []
        for rank, output in enumerate(self.outputs):
            environment = world | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
            own = arguments + last * (rank == processes - 1)
            target = (str(ROOT / script), own, environment, output, before)
            self.forks.append(FORKS.Process(target=forked, args=target))
            self.forks[-1].start()

    def __enter__(self) -> "Forks":
        return self

    def __exit__(self, *_) -> None:
        self.wait(0)
        self.folder.cleanup()

    @property
    def running(self) -> list:
        return [fork for fork in self.forks if fork.exitcode is None]

    def wait(self, seconds: float = 1e6, patient: bool = False) -> list[int]:
        """The exit codes, when all have ended, `seconds` have passed or, unless `patient`, one has failed.

        What still runs is killed.
        """
        end = time.monotonic() + seconds
        while (running := self.running) and time.monotonic() < end:
            if any(fork.exitcode for fork in self.forks) and not patient:
                break  # the others would wait for the one that failed
            wait([fork.sentinel for fork in running], max(end - time.monotonic(), 0))
        for fork in self.forks:
            fork.kill()
            fork.join()
        return [fork.exitcode for fork in self.forks]

    def said(self) -> str:
        return "\n".join(output.read_text() for output in self.outputs if output.exists())


def run(
    script: str, *arguments: str, processes: int = 1, kill: tuple[int, float] | None = None, patient: bool = False
) -> str:
    """Run a script of the repository in forked processes and return what they printed.

    kill = (step, seconds): the process is killed that many seconds after it has logged that step. patient: after a
    failure, wait for the end of the others instead of killing them.
    """
    before = partial(kill_after, *kill) if kill else None
    with Forks(script, *arguments, processes=processes, before=before) as forks:
        codes, said = set(forks.wait(patient=patient)), forks.said()
    assert codes == {-signal.SIGKILL if kill else 0}, f"{script} {arguments}: {codes}\n{said}"
    return said


def forked(script: str, arguments: tuple, environment: dict, output: Path, before: Callable[[], None] | None) -> None:
    """The body of each process of `Forks`."""
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ |= ENVIRONMENT | environment
    torch.set_num_threads(1)
    if before:
        before()
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file of this process can grow beyond `size` bytes: writing fails with EFBIG, as on a full disk with ENOSPC."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def kill_after(step: int, seconds: float) -> None:
    """Have SIGKILL end this process `seconds` after it has logged `step`, or at its end if that comes first."""
    from fastdit.training.log import Log

    write = Log.write

    def die() -> None:
        time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGKILL)

    def writing(self, at: int, *values, **record) -> None:
        write(self, at, *values, **record)
        if at == step:
            threading.Thread(target=die).start()  # not a daemon: the process cannot end before it

    Log.write = writing
