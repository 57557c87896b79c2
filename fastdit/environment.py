"""What a program runs on: hardware, versions, commit and command. A run keeps them in environment.jsonl."""

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch

from fastdit import __version__
from fastdit.distributed import Ranks
from fastdit.errors import counted
from fastdit.files import append_json
from fastdit.launcher import under_deepspeed

FILE = "environment.jsonl"
PACKAGES = ("torch", "triton", "diffusers", "transformers", "safetensors", "deepspeed", "flash-attn")


def version(package: str) -> str | None:
    """The installed version of a package; None without it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def hardware(device: torch.device | None = None) -> str:
    """The GPU's name and memory, or the processor's with the number of cores that this process may use."""
    if device.type == "cuda" if device else torch.cuda.is_available():
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {counted(cores(), 'core')}"


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # macOS has none


def commit() -> str | None:
    """The commit of the clone that fastdit runs from, with a + when files differ from it; None where it is no clone."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():  # installed, perhaps within the repository of another project
        return None
    git = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--abbrev=10"]
    try:
        return subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def command() -> str:
    """The command line of this process, without the folder of its program."""
    name = Path(sys.argv[0]).name
    program = ["fastdit"] if name in ("fastdit", "cli.py") else ["python", name] if name.endswith(".py") else [name]
    return shlex.join([*program, *sys.argv[1:]])


def write_environment(run_dir: Path, ranks: Ranks, start: int) -> None:
    """Append one line to run_dir/environment.jsonl: where and how the run goes on from step `start`."""
    versions = {"fastdit": __version__, "python": platform.python_version(), "cuda": torch.version.cuda}
    record = {
        "step": start,
        "command": command(),
        "hardware": hardware(ranks.device),
        "device": ranks.device.type,
        "processes": ranks.world,
        "nodes": max(1, ranks.world // int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world))),
        "deepspeed_launcher": under_deepspeed(),
        "threads": torch.get_num_threads(),
        "kernels": os.environ.get("FASTDIT_KERNELS"),
        "versions": versions | {name: version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S%z"),
    }
    append_json(run_dir / FILE, record)
