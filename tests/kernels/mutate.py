"""Plants bugs in copies of the kernels and checks that the tests' comparison catches each one.

    python tests/kernels/mutate.py            every plant
    python tests/kernels/mutate.py --fast     one of each sort

Exit code 1 when a plant goes unnoticed or the untouched copy does not pass. Runs apart from other tests: a mutant
registers its ops under the real names. No plant may write past a buffer: that kills the interpreter, not the bug.
"""

import argparse
import importlib.util
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from helpers.kernels import DEVICE, compare  # noqa: E402

KERNELS = ROOT / "kernels"


@dataclass
class Plant:
    sort: str
    op: str
    shape: tuple[int, ...]
    file: str
    old: str
    new: str
    fast: bool = False


TALL, WIDE = (2, 37, 24), (2, 5, 88)  # three chunks of tokens, the last cut; a tail of columns under a mask
PLANTS = [
    Plant("wrong sample", "adaln", TALL, "adaln.py", "shift + n * shift_n, cols_a", "shift, cols_a", fast=True),
    Plant("wrong sample", "adaln", TALL, "adaln.py", "load(x + n * x_n", "load(x"),
    Plant("wrong sample", "gate_residual_adaln", TALL, "gate_residual_adaln.py", "gate + n * gate_n, cols_a",
          "gate, cols_a"),
    Plant("wrong sample", "gate_residual", TALL, "gate_residual_adaln.py", "branch + n * branch_n", "branch"),
    Plant("wrong sample", "qk_norm_rope", (2, 19, 3, 24), "qk_norm_rope.py", "qkv + n * qkv_n", "qkv"),
    Plant("wrong sample", "attention", (2, 2, 17, 24), "attention.py", "k += n * k_n + head", "k += head", fast=True),
    Plant("missing mask", "adaln", WIDE, "tiles.py", "tl.where(in_b[None, :], b - a_to_b(mean, ROWS)[:, None], 0.0)",
          "b - a_to_b(mean, ROWS)[:, None]", fast=True),
    Plant("missing mask", "attention", (1, 2, 41, 24), "attention.py", "if T % BLOCK_N:", "if T < 0:", fast=True),
    Plant("unreduced chunk", "adaln", TALL, "tiles.py", "(rows < CHUNKS)", "(rows < 1)", fast=True),
    Plant("unreduced chunk", "gate_residual_adaln", TALL, "gate_residual_adaln.py",
          "partial + tl.program_id(0).to(tl.int64) * SUMS", "partial + n * SUMS"),
    Plant("unreduced chunk", "gelu", (2, 150, 24), "gelu.py", "partial + chunk * D", "partial + 0 * chunk"),
    Plant("unreduced chunk", "swiglu", (1, 41, 24), "swiglu.py", "total_v += d_v", "total_v = d_v"),
    Plant("unreduced chunk", "adaln", TALL, "adaln.py", "shift_sum_a += tl.sum(dh_a, axis=0)",
          "shift_sum_a = tl.sum(dh_a, axis=0)"),
    Plant("wrong eps", "adaln", TALL, "tiles.py", "(1.0 / D) + eps", "(1.0 / D) + 1e-5", fast=True),
    Plant("wrong eps", "qk_norm_rope", (2, 5, 3, 24), "qk_norm_rope.py", "(1.0 / D) + EPS", "(1.0 / D) + 1e-5"),
    Plant("wrong eps", "adamw_ema", (100,), "adamw_ema.py", "LOG_2)) + EPS)",
          "LOG_2) + EPS))"),
    Plant("swapped", "adaln", TALL, "adaln.py", "_op(x, shift, scale, eps", "_op(x, scale, shift, eps", fast=True),
    Plant("swapped", "adaln", TALL, "adaln.py", "d_shift, d_scale = sum_chunks", "d_scale, d_shift = sum_chunks",
          fast=True),
    Plant("swapped", "gate_residual_adaln", TALL, "gate_residual_adaln.py", "d_gate, (d_shift, d_scale), d_bias",
          "d_gate, (d_scale, d_shift), d_bias"),
    Plant("swapped", "swiglu", (1, 9, 24), "swiglu.py", "a, v = (x", "v, a = (x"),
    Plant("swapped", "adamw_ema", (100,), "adamw_ema.py", "LOG_1=logs[0], LOG_2=logs[1]",
          "LOG_1=logs[1], LOG_2=logs[0]"),
    Plant("stale output", "adaln", TALL, "adaln.py",
          "store(h + n * T * D, rows, D, cols_b, live[:, None] & in_b[None, :], h_b)", "h_b += 0.0", fast=True),
    Plant("stale output", "gate_residual_adaln", TALL, "gate_residual_adaln.py",
          "store(d_x + n * T * D, rows, D, cols_a, live[:, None], dx_a)", "dx_a += 0.0"),
    Plant("stale output", "qk_norm_rope", (2, 5, 3, 24), "qk_norm_rope.py", "if which == 1:", "if which == 2:"),
    Plant("stale output", "gelu", (1, 9, 600), "gelu.py", "FORWARD_TILES) * cdiv(d, c)",
          "FORWARD_TILES) * cdiv(d, 2 * c)"),
    Plant("lost term", "gate_residual_adaln", TALL, "gate_residual_adaln.py", "(sums[0] + bias * sums[-1])", "sums[0]"),
    Plant("lost term", "gate_residual_adaln", TALL, "gate_residual_adaln.py", "gate * sums[-1]", "sums[-1]"),
    Plant("lost term", "adaln", TALL, "adaln.py", "(g_a - g_mean[:, None] - ", "(g_a - "),
    Plant("lost term", "gelu", (1, 9, 24), "gelu.py", "(gate + u * slope)", "gate", fast=True),
    Plant("lost term", "adamw_ema", (100,), "adamw_ema.py", "g *= tl.load(grad_scale)",
          "g *= 1 + 0 * tl.load(grad_scale)"),
    Plant("lost term", "adamw_ema", (100,), "adamw_ema.py", "p *= 1.0 - rate * DECAY", "p *= 1.0"),
    Plant("lost term", "attention", (1, 2, 17, 24), "attention.py", "dk_b * SCALE", "dk_b"),
    Plant("lost term", "attention", (1, 2, 17, 24), "attention.py", "dp - total[:, None]", "dp"),
    Plant("wrong place", "qk_norm_rope", (2, 5, 3, 24), "qk_norm_rope.py", "_turn(g_a, c, -s,", "_turn(g_a, c, s,"),
    Plant("wrong place", "qk_norm_rope", (2, 5, 3, 24), "qk_norm_rope.py", "load_columns(cos + t *",
          "load_columns(cos + 0 * t *"),
]  # fmt: skip


def load(folder: Path, name: str) -> ModuleType:
    """The kernels in this folder as a package of their own."""
    where = {"location": folder / "__init__.py", "submodule_search_locations": [str(folder)]}
    spec = importlib.util.spec_from_file_location(name, **where)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def complaints(package: ModuleType, op: str, shape: tuple[int, ...]) -> list[str]:
    try:
        return compare(package.OPS[op], package.OPS[op].inputs(shape, torch.float32, DEVICE))
    except Exception as error:
        return [f"{type(error).__name__}: {str(error)[:80]}"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="one plant of each sort")
    plants = [plant for plant in PLANTS if plant.fast or not parser.parse_args().fast]
    missed = 0
    with tempfile.TemporaryDirectory() as scratch:
        untouched = load(KERNELS, "untouched")
        for op, shape in sorted({(plant.op, plant.shape) for plant in plants}):
            if found := complaints(untouched, op, shape):
                print(f"untouched {op} {shape}: {found}")
                missed += 1
        for index, plant in enumerate(plants):
            folder = Path(scratch) / f"mutant{index}"
            shutil.copytree(KERNELS, folder, ignore=shutil.ignore_patterns("__pycache__"))
            text = (folder / plant.file).read_text()
            if plant.old not in text:
                raise ValueError(f"{plant.file} no longer holds {plant.old!r}; bring the plant up to date")
            (folder / plant.file).write_text(text.replace(plant.old, plant.new))
            found = complaints(load(folder, f"mutant{index}"), plant.op, plant.shape)
            missed += not found
            verdict = f"caught: {found[0]}" if found else "MISSED"
            print(f"{plant.sort} in {plant.op} ({plant.old[:40]} -> {plant.new[:40]}): {verdict}", flush=True)
    print(f"{len(plants)} plants, {missed} missed")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
