"""Processes and randomness: who am I among how many, on which device, and which random numbers belong to a step."""

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

TIMEOUT_S = 600  # a collective that waits longer means that a process is gone


@dataclass(frozen=True)
class Ranks:
    """This process: its rank among `world`, its index on this machine, its device."""

    rank: int
    local_rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def any(self, flag: bool) -> bool:
        """True on every process when `flag` is on one of them."""
        if self.world == 1:
            return flag
        value = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return bool(value)

    def all_reduce_any(self, flag: Tensor) -> Tensor:
        """The same for a 0-dim bool on the device; nothing waits for it."""
        if self.world == 1:
            return flag
        value = flag.float()
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return value > 0

    def mean(self, value: Tensor) -> Tensor:
        """Mean of `value` over all processes."""
        if self.world > 1:
            value = value.clone()
            dist.all_reduce(value)
            value /= self.world
        return value

    def gather(self, rows: Tensor) -> Tensor:
        """The rows (n, ...) of all processes, in the order of the ranks: (world n, ...)."""
        if self.world == 1:
            return rows
        parts = [torch.empty_like(rows) for _ in range(self.world)]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)


def init(device: str | None = None) -> Ranks:
    """Join the process group that torchrun or the deepspeed launcher describes in the environment, if one does."""
    die_with_parent()
    rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    if device is None:
        device = "cuda" if torch.cuda.is_available() and not _cpu_wanted() else "cpu"
    if device == "cuda":
        device = f"cuda:{local_rank}"
    chosen = torch.device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        torch.set_float32_matmul_precision("high")  # TF32 for what is left in fp32
    if world > 1 and not dist.is_initialized():
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=TIMEOUT_S))
    return Ranks(rank, local_rank, world, chosen)


def die_with_parent() -> None:
    """Under a launcher on Linux, ask the kernel for a SIGTERM when it dies: no worker trains on as an orphan."""
    if "RANK" not in os.environ or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1: PR_SET_PDEATHSIG
    if os.getppid() == 1:  # it died before this call
        os.kill(os.getpid(), signal.SIGTERM)


def close() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def under_deepspeed() -> bool:
    """True in a process that the `deepspeed` launcher started."""
    return "CROSS_RANK" in os.environ


def _cpu_wanted() -> bool:
    return os.environ.get("DS_ACCELERATOR") == "cpu"  # DeepSpeed's own switch, honoured by every command


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """On a CPU, compute with one thread: the number of threads changes a sum's last bits, and so a file's bytes."""
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def memory_of(device: torch.device) -> int:
    """Bytes of memory that a device has: the GPU's own, or the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def seed_of(*parts: int) -> int:
    """One 63-bit seed from several integers, well mixed: (seed, step), (seed, image), ..."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


def step_generator(seed: int, step: int, device: torch.device | str = "cpu") -> torch.Generator:
    """The generator of all of a step's random numbers."""
    return torch.Generator(device).manual_seed(seed_of(seed, step))


class StepRandom:
    """The random numbers of one training step, a pure function of (seed, step) and of the row in the global batch.

    They are drawn for the whole global batch and cut to `rows`, this process's (micro-)batch: so neither the number
    of processes nor the micro-batch changes a loss, and a run resumes from its step number alone. Drawing all rows
    costs microseconds on a GPU: 256 latents of 4 x 32 x 32 are a million numbers.
    """

    def __init__(self, generator: torch.Generator, rows: slice, global_batch: int):
        """`generator` as `step_generator` makes it."""
        self.generator, self.rows, self.global_batch = generator, rows, global_batch

    def rand(self) -> Tensor:
        """(n,) uniforms in [0, 1)."""
        return torch.rand(self.global_batch, generator=self.generator, device=self.generator.device)[self.rows]

    def randn(self, *shape: int) -> Tensor:
        """(n, *shape) standard normals."""
        return torch.randn(self.global_batch, *shape, generator=self.generator, device=self.generator.device)[self.rows]


class ImageRandom:
    """Standard normals for a batch of samples, one generator per image: image i is a function of its seed alone."""

    def __init__(self, seeds: list[int]):
        # on the CPU whatever the device is: the same numbers everywhere
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, like: Tensor) -> Tensor:
        """Standard normals of the shape, type and device of `like` (N, ...), row i from generator i."""
        rows = torch.stack([torch.randn(like.shape[1:], generator=g) for g in self.generators])
        # from pinned memory the copy waits for its turn on the GPU while the next evaluation is being launched
        return (rows.pin_memory() if like.is_cuda else rows).to(like, non_blocking=True)
