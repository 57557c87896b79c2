"""One JSON line per measured figure, with the hardware, the commit and the date it belongs to."""

import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import time
from pathlib import Path

import torch


def hardware() -> str:
    """The GPU's name, or the processor's with the cores this process may use."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def record(bench: str, *, file: Path | None = None, **figures) -> dict:
    """Prints one line: what was measured, where, when, at which commit (+ when files differ from it).

    `file` gets the line too, at its end. Returns what the line holds.
    """
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--abbrev=10"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or os.environ.get("COMMIT", "unknown")
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    about = {"hardware": hardware(), "torch": torch.__version__, "triton": version("triton"), "commit": commit}
    line = {"bench": bench, **figures, **about, "date": date}
    print(json.dumps(line), flush=True)
    if file is not None:
        with open(file, "a") as lines:
            lines.write(json.dumps(line) + "\n")
    return line


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def product_tflops(device: torch.device) -> float:
    """TFLOP/s of a large bf16 matrix product of random numbers here and now: the median of many."""
    size, rounds, each = (8192, 5, 10) if device.type == "cuda" else (1024, 5, 1)
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, device=device, generator=generator).bfloat16() for _ in range(2))
    seconds = []
    for _ in range(rounds + 1):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(each):
            a @ b
        synchronize(device)
        seconds.append((time.perf_counter() - start) / each)
    return 2 * size**3 / statistics.median(seconds[1:]) / 1e12


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
