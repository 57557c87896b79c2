"""Processes and random numbers: rank, world size and device of this process, and the random numbers of each step."""

import ctypes
import os
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fastdit.errors import OtherFailed
from fastdit.launcher import MASTER, REMEDY, die_with_parent, launched

MEET_S = 600  # how long a process waits for the others to start
TIMEOUT_S = 24 * 3600  # of a collective: the shares of a sampling or an evaluation may end hours apart


@dataclass(frozen=True)
class Ranks:
    """This process: its rank, its rank on this machine, the number of processes, and its device."""

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
        """On every process: whether `flag` is True on at least one process."""
        if self.world == 1:
            return flag
        value = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return bool(value)

    def mean(self, value: Tensor) -> Tensor:
        """Mean of `value` over all processes."""
        if self.world > 1:
            value = value.clone()
            dist.all_reduce(value)
            value /= self.world
        return value

    def max(self, values: Tensor) -> Tensor:
        """The largest of each value over all processes."""
        if self.world > 1:
            values = values.clone()
            dist.all_reduce(values, dist.ReduceOp.MAX)
        return values

    def gather(self, values: Tensor) -> Tensor:
        """Concatenates the values (n, ...) of all processes in rank order: (world * n, ...)."""
        if self.world == 1:
            return values
        parts = [torch.empty_like(values) for _ in range(self.world)]
        dist.all_gather(parts, values.contiguous())
        return torch.cat(parts)

    def blocks(self, own: Tensor) -> Tensor:
        """Joins blocks of rows, of which block b is that of process b mod world: (share, n, ...) on each process ->
        (world * share * n, ...)."""
        every = self.gather(own.to(self.device)).unflatten(0, (self.world, -1))  # (world, share, n, ...)
        return every.transpose(0, 1).flatten(0, 2)

    def agree(self, facts: Mapping[str, Any]) -> None:
        """ValueError unless `facts`, all that determines the result, are those of the main process; a collective call.

        Otherwise the processes would mix the results of several commands, and nothing would show it.
        """
        if self.world == 1:
            return
        received = [dict(facts)]
        dist.broadcast_object_list(received, src=0)
        theirs = received[0]
        unlike = next((key for key in {**theirs, **facts} if facts.get(key) != theirs.get(key)), None)
        if self.any(unlike is not None):
            if unlike is None:
                raise OtherFailed("another process was started with other settings; see its message")
            raise ValueError(f"{unlike}={facts.get(unlike)!r} on rank {self.rank} ({socket.gethostname()}), but "
                             f"{theirs.get(unlike)!r} on rank 0; start every process with the same command, files and "
                             "version of fastdit")  # fmt: skip


def init(device: str | None = None, timeout_s: float = TIMEOUT_S) -> Ranks:
    """Joins the process group if torchrun or the deepspeed launcher started this process.

    A collective that waits longer than `timeout_s` fails. ValueError where the environment is not that of a launcher,
    or the processes do not meet.
    """
    die_with_parent()
    rank, local_rank, world = launched()
    if device is None:
        on_cpu = os.environ.get("DS_ACCELERATOR") == "cpu"  # DeepSpeed's own switch, honored by every command
        device = "cuda" if torch.cuda.is_available() and not on_cpu else "cpu"
    if device == "cuda":
        device = f"cuda:{local_rank}"
        if torch.cuda.is_available() and local_rank >= (count := torch.cuda.device_count()):
            raise ValueError(f"LOCAL_RANK={local_rank}, but this machine has {count} GPUs; start as many processes")
    chosen = named_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    make_fast(chosen)
    if world > 1 and not dist.is_initialized():
        backend, place = "nccl" if chosen.type == "cuda" else "gloo", [os.environ.get(key) for key in MASTER]
        try:
            store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=MEET_S)))
            timeout = timedelta(seconds=timeout_s)
            dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
        except (RuntimeError, ValueError) as error:  # of a port in use, and of missing processes
            reason = str(error).splitlines()[0]
            raise ValueError(f"the {world} processes do not meet at MASTER_ADDR={place[0]}, MASTER_PORT={place[1]} "
                             f"({reason}); {REMEDY}") from error  # fmt: skip
    return Ranks(rank, local_rank, world, chosen)


def named_device(name: str) -> torch.device:
    """The device of --device; ValueError for one that PyTorch cannot use here."""
    try:
        device = torch.device("cuda" if name == "gpu" else name)
        if device.type not in ("cpu", "cuda"):
            raise ValueError
    except (RuntimeError, ValueError):
        raise ValueError(f"--device={name!r} cannot be used; use cpu, cuda or cuda:0") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device={name!r}, but PyTorch {torch.__version__} finds no GPU here; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        raise ValueError(f"--device={name!r}, but this machine has no more than "
                         f"{', '.join(f'cuda:{i}' for i in range(count))}; use one of them")  # fmt: skip
    return device


def make_fast(device: torch.device) -> None:
    """PyTorch's settings for a device: TF32 for fp32 matrix products on a GPU, `keep_freed_memory` on a CPU."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    else:
        keep_freed_memory()


def keep_freed_memory() -> None:
    """Have glibc keep freed blocks of up to 32 MiB, for the next tensors of that size.

    By default glibc gives them back to the system, which clears the pages before they are used again. Clearing can take
    nearly half the time of a small autoencoder on a CPU. Larger blocks are still given back.
    """
    m_trim_threshold, m_mmap_threshold = -1, -3
    if libc := _glibc():
        libc.mallopt(m_mmap_threshold, 1 << 25)  # the most that glibc allows
        libc.mallopt(m_trim_threshold, -1)


def return_freed_memory() -> None:
    """Give freed memory that this process keeps back to the system now."""
    if libc := _glibc():
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):  # musl has none
        return libc
    return None


def close() -> None:
    """Leaves the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """Uses a single thread on a CPU: the number of threads changes the last bits of sums, and so the files written."""
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def memory_of(device: torch.device) -> int:
    """Total memory of a device in bytes: the GPU's, or the machine's for a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def seed_of(*parts: int) -> int:
    """Hashes several integers, such as (seed, step) or (seed, image), to a 63-bit seed."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


def step_generator(seed: int, step: int, device: torch.device | str = "cpu") -> torch.Generator:
    """The generator of all random numbers of a step."""
    return torch.Generator(device).manual_seed(seed_of(seed, step))


class StepRandom:
    """The random numbers of a training step, a pure function of (seed, step) and the position in the global batch.

    They are drawn for the whole global batch; `rows` selects those of this process's (micro-)batch. So the loss does
    not depend on the number of processes or the micro-batch, and a run resumes from its step number alone. Drawing
    for the whole batch takes microseconds on a GPU: 256 latents of 4 x 32 x 32 are a million numbers.
    """

    def __init__(self, generator: torch.Generator, rows: slice, global_batch: int):
        """`generator`: from `step_generator`."""
        self.generator, self.rows, self.global_batch = generator, rows, global_batch

    def rand(self, *shape: int) -> Tensor:
        """Uniforms (n, *shape) in [0, 1)."""
        return torch.rand(self.global_batch, *shape, generator=self.generator, device=self.generator.device)[self.rows]

    def randn(self, *shape: int) -> Tensor:
        """Standard normals (n, *shape)."""
        return torch.randn(self.global_batch, *shape, generator=self.generator, device=self.generator.device)[self.rows]


class ImageRandom:
    """Standard normals for a batch of images, with one generator per image: image i depends only on its own seed.

    `draw`: of one image's numbers, in place of torch.randn.
    """

    def __init__(self, seeds: list[int], draw: Callable[..., Tensor] = torch.randn):
        # always on the CPU, so that the numbers do not depend on the device
        self.generators, self.draw = [torch.Generator().manual_seed(seed) for seed in seeds], draw

    def __call__(self, like: Tensor) -> Tensor:
        """Standard normals in the shape, dtype and device of `like` (N, ...); sample i is from generator i."""
        noise = torch.stack([self.draw(like.shape[1:], generator=g) for g in self.generators])
        # the copy from pinned memory is asynchronous: the CPU can launch the next evaluation meanwhile
        return (noise.pin_memory() if like.is_cuda else noise).to(like, non_blocking=True)
