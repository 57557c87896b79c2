"""One JSON line per measured figure, with the hardware, the commit and the date it belongs to."""

import datetime
import json
import os
import platform
import subprocess
from pathlib import Path

import torch


def hardware() -> str:
    """The GPU's name, or the processor's with the cores this process may use."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def record(bench: str, **figures) -> None:
    """Prints one line: what was measured, where, when, at which commit (+ when files differ from it)."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--abbrev=10"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    about = {"hardware": hardware(), "torch": torch.__version__, "commit": commit, "date": date}
    print(json.dumps({"bench": bench, **figures, **about}), flush=True)
