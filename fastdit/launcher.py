"""The launcher of this process (torchrun, deepspeed, `fastdit launch`): its environment, and what its end does.

This file does not import PyTorch, which takes seconds: a process is tied to its launcher before that.
"""

import ctypes
import os
import signal
import sys

MASTER = "MASTER_ADDR", "MASTER_PORT"
REMEDY = "start several processes with fastdit launch or torchrun, and unset RANK and WORLD_SIZE for a single one"


def die_with_parent() -> None:
    """Under a launcher on Linux, ask the kernel for a SIGTERM when it dies: no worker trains on as an orphan.

    Call it as early as possible: the death of a launcher before the call goes unnoticed. The parent is then process 1,
    which in a container may be the launcher itself.
    """
    if "RANK" not in os.environ or sys.platform != "linux":
        return
    parent = os.getppid()  # may be process 1: in a container, the launcher often is
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1: PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it ended before that call
        os.kill(os.getpid(), signal.SIGTERM)


def launched() -> tuple[int, int, int]:
    """(rank, rank on this machine, number of processes) that the launcher says, (0, 0, 1) without one."""
    numbers = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1}
    for key in numbers.keys() & os.environ.keys():
        if not os.environ[key].isdecimal():
            raise ValueError(f"{key}={os.environ[key]!r} in the environment is not a number; {REMEDY}")
        numbers[key] = int(os.environ[key])
    rank, local_rank, world = numbers.values()
    missing = [key for key in ("RANK", *MASTER) if world > 1 and key not in os.environ]
    if missing or rank >= world:
        but = f"no {missing[0]}" if missing else f"RANK={rank}"
        raise ValueError(f"the environment has WORLD_SIZE={world}, but {but}; {REMEDY}")
    return rank, local_rank, world


def under_deepspeed() -> bool:
    """Whether the `deepspeed` launcher started this process."""
    return "CROSS_RANK" in os.environ
