"""Run the tables and write the page of their figures.

    PYTHONPATH=.:tests python -m chaos [TABLE ...] [--seed N] [--out docs/reliability.md]

Exits with 1 if anything failed. All random choices follow from the seed, so a failure can be repeated.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, as in tests/conftest.py
os.environ |= {"HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}

import fastdit  # noqa: F401, I001  before torch: it sets how OpenMP's threads wait

import argparse
import importlib
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

from bench.record import about
from chaos.table import Table
from helpers.runs import make_world

# each has `run(place: Path, seed: int) -> Table`; `place` is a world of helpers.runs.make_world that all tables share:
# they read it, and write into folders of their own in it
TABLES = ["kills", "flips", "signals", "elastic", "faults", "hostile", "fuzz", "overhead"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"of {', '.join(TABLES)} (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="the page to write")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it, and so would the runs
    tables = []
    with tempfile.TemporaryDirectory(prefix="chaos") as folder:
        place = make_world(Path(folder))
        for name in arguments.tables or TABLES:
            start = time.perf_counter()
            try:
                table = importlib.import_module(f"chaos.{name}").run(place, arguments.seed)
            except Exception as error:  # a run that ended by itself, for example: the other tables still count
                traceback.print_exc()
                table = Table(name, "It ended early.", ["-"], failures=[f"{type(error).__name__}: {error}"])
            table.seconds = time.perf_counter() - start
            tables.append(table)
            print(f"\n{table.markdown()}", flush=True)
    failures = sum(len(table.failures) for table in tables)
    if arguments.out:
        arguments.out.write_text(page(tables, failures, arguments.seed))
    print(f"{failures} failures in {sum(table.seconds for table in tables):.0f} s")
    return int(failures > 0)


def page(tables: list, failures: int, seed: int) -> str:
    at = about()
    return "\n".join([
        "# Reliability\n",
        "What happens when runs are killed, files damaged, disks full and gradients poisoned. `make chaos` writes this "
        "page and fails if any of these checks fails.\n",
        f"Measured {at['date']} at commit {at['commit']}, seed {seed}: {at['hardware']}, Python "
        f"{sys.version.split()[0]}, torch {at['torch']}, {sum(table.seconds for table in tables) / 60:.0f} minutes. "
        + ("**All checks passed.**\n" if not failures else f"**{failures} checks FAILED.**\n"),
        *(table.markdown() for table in tables),
    ])  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
