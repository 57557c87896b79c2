"""What the benchmarks share: JSON lines with hardware, versions, commit and date; rates in rotation; tables."""

import argparse
import datetime
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fastdit.environment import commit, hardware, version

ROOT = Path(__file__).resolve().parents[1]


def parser(description: str) -> argparse.ArgumentParser:
    """A parser with the option `--out`, the folder whose results.jsonl gets the lines (None: they are only printed)."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, help="folder; lines are appended to its results.jsonl")
    return made


def about() -> dict[str, str | None]:
    """Hardware, versions, commit (with a + when files differ from it; else $COMMIT) and date of a measurement."""
    source = commit() or os.environ.get("COMMIT", "unknown")
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    versions = {"torch": torch.__version__, "triton": version("triton")}
    return {"hardware": hardware(), **versions, "commit": source, "date": date}


def record(bench: str, out: Path | None = None, *, name: str = "results.jsonl", **figures) -> dict:
    """Print one JSON line with the figures and what `about` says; append it to `name` in the folder `out`, if given."""
    line = {"bench": bench, **figures, **about()}
    print(json.dumps(line), flush=True)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        with open(out / name, "a") as lines:
            lines.write(json.dumps(line) + "\n")
    return line


def rotate(
    runs: dict[str, Callable[[], float]], rounds: int, deadline: float = math.inf
) -> dict[str, list[float]]:
    """What each run returns, once per round; complete rounds only if the deadline (time.monotonic()) ends it early."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            if time.monotonic() > deadline:
                complete = min(map(len, found.values()))
                return {name: each[:complete] for name, each in found.items()}
            found[name].append(run())
    return found


def compared(rates: dict[str, list[float]]) -> dict[str, dict]:
    """By name: median images/s, their spread, and the ratio `over` each other: the median of the rounds' ratios."""

    def over(ours: list[float], theirs: list[float]) -> float:  # of an even number the geometric mean of the middle two
        return round(math.exp(statistics.median(math.log(a / b) for a, b in zip(ours, theirs, strict=False))), 3)

    return {
        name: {"images_per_s": significant(statistics.median(each)),
               "spread": [significant(min(each)), significant(max(each))],
               "over": {other: over(each, theirs) for other, theirs in rates.items() if other != name},
               "rounds": len(each)}
        for name, each in rates.items()
    }  # fmt: skip


def significant(value: float) -> float:
    return float(f"{value:.4g}")


def markdown(rows: list[list], rule: str = "---") -> str:
    """A table whose first row is the header; `rule` aligns all columns but the first, as "---:" to the right."""
    rows = [rows[0], ["---"] + [rule] * (len(rows[0]) - 1), *rows[1:]]
    return "".join("| " + " | ".join(map(str, row)) + " |\n" for row in rows)


PRODUCT_SIDE = {"cuda": 8192, "cpu": 1024}


def product_tflops(device: torch.device) -> float:
    """TFLOP/s of a large bf16 matrix product of random numbers, measured now: the median of five timings."""
    size, rounds, each = PRODUCT_SIDE[device.type], 5, 10 if device.type == "cuda" else 1
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
