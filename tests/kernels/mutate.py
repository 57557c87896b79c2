"""Plants bugs in copies of the kernels and checks that the tests' comparison catches each one.

    python tests/kernels/mutate.py            every bug
    python tests/kernels/mutate.py --fast     one of each sort

Every launch of every op first runs with one program too few, and with each of its outputs written elsewhere. Then come
the bugs listed here, planted in the source. Exit code 1 if a bug goes unnoticed or the unmodified kernels do not pass.
Runs in its own process, since a mutant registers its ops under the real names. No bug may write past a buffer: that
would crash the interpreter.
"""

import argparse
import importlib.util
import itertools
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from unittest import mock

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
    hopper: bool = False  # with the kernels for compute capability 9, in fp16


HEAD = (2, 2, 67, 72)  # two blocks of keys, the second one partial
TALL, WIDE = (2, 37, 24), (2, 5, 88)  # three chunks of tokens, the last one partial; masked columns
EVEN = (2, 2, 70, 24)  # three blocks of rows, the last one partial
TILES = (131, 72)  # of FP8: several tiles of rows, the last one partial and odd
PLANTS = [
    Plant("wrong sample", "adaln", TALL, "adaln.py", "shift + n * shift_n, D", "shift, D", fast=True),
    Plant("wrong sample", "adaln", TALL, "adaln.py", "load_tiles(x + n * x_n", "load_tiles(x"),
    Plant("wrong sample", "gate_residual_adaln", TALL, "gate_residual_adaln.py", "gate + n * gate_n, D", "gate, D"),
    Plant("wrong sample", "gate_residual_adaln", TALL, "gate_residual_adaln.py", "branch + n * branch_n", "branch"),
    Plant("wrong sample", "qk_norm_rope", (2, 19, 3, 24), "qk_norm_rope.py", "qkv + n * qkv_n", "qkv"),
    Plant("wrong sample", "attention", (2, 2, 17, 24), "attention_kernels.py", "k += n * k_n + head", "k += head",
          fast=True),
    Plant("missing mask", "adaln", WIDE, "tiles.py", "tl.where((A + tl.arange(0, B) < D)[None, :], x_b, 0.0)",
          "x_b", fast=True),
    Plant("missing mask", "attention", (1, 2, 41, 24), "attention_kernels.py", "if T % BLOCK_N:", "if T < 0:",
          fast=True),
    Plant("unreduced chunk", "adaln", TALL, "tiles.py", "(rows < CHUNKS)", "(rows < 1)", fast=True),
    Plant("unreduced chunk", "gate_residual_adaln", TALL, "gate_residual_adaln.py",
          "partial + tl.program_id(0).to(tl.int64) * SUMS", "partial + n * SUMS"),
    Plant("unreduced chunk", "gelu", (2, 150, 24), "activation.py", "partial + chunk * X + cols", "partial + cols"),
    Plant("unreduced chunk", "swiglu", (1, 41, 24), "activation.py", "total_v += d_v", "total_v = d_v"),
    Plant("unreduced chunk", "adaln", TALL, "tiles.py", "sum_a + tl.sum(a, axis=0)", "tl.sum(a, axis=0)"),
    Plant("wrong eps", "adaln", TALL, "tiles.py", "(1.0 / D) + EPS", "(1.0 / D) + 1e-5", fast=True),
    Plant("wrong eps", "qk_norm_rope", (2, 5, 3, 24), "qk_norm_rope.py", "(1.0 / D) + EPS", "(1.0 / D) + 1e-5"),
    Plant("wrong eps", "adamw_ema", (100,), "adamw_ema.py", "LOG_2)) + EPS)",
          "LOG_2) + EPS))"),
    Plant("wrong tensor", "adamw_ema", (100, 40), "adamw_ema.py", "table += tl.load(blocks + tl.program_id(0))",
          "table += 0", fast=True),
    Plant("wrong tensor", "adamw_ema", (1100,), "adamw_ema.py", ".to(tl.int64) * BLOCK", ".to(tl.int64) * 0"),
    Plant("wrong tensor", "adamw_ema", (100,), "adamw_ema.py", "table + 3 * N, start", "table + 4 * N, start"),
    Plant("swapped", "adaln", TALL, "adaln.py", "_op(x, shift, scale, eps", "_op(x, scale, shift, eps", fast=True),
    Plant("swapped", "adaln", TALL, "adaln.py", "d_shift, d_scale = sum_chunks", "d_scale, d_shift = sum_chunks",
          fast=True),
    Plant("swapped", "gate_residual_adaln", TALL, "gate_residual_adaln.py", "(d_gate, d_shift, d_scale), d_bias",
          "(d_gate, d_scale, d_shift), d_bias"),
    Plant("swapped", "swiglu", (1, 9, 24), "swiglu.py", "a, v = (x", "v, a = (x"),
    Plant("swapped", "adamw_ema", (100,), "adamw_ema.py", "LOG_1=logs[0], LOG_2=logs[1]",
          "LOG_1=logs[1], LOG_2=logs[0]"),
    Plant("stale output", "adaln", TALL, "tiles.py",
          "store(base, rows, stride, cols_b, (rows < limit)[:, None] & (cols_b < D)[None, :], b)", "b += 0.0",
          fast=True),
    Plant("stale output", "gate_residual_adaln", TALL, "gate_residual_adaln.py",
          "store_tiles(d_x + n * T * D, rows, D, T, dx_a, dx_b, D, A, B)", "dx_a += 0.0"),
    Plant("stale output", "qk_norm_rope", (2, 5, 3, 24), "qk_norm_rope.py", "if which == 1:", "if which == 2:"),
    Plant("stale output", "gelu", (1, 9, 600), "activation.py", "chunks * cdiv(d, c)", "chunks * cdiv(d, 2 * c)"),
    Plant("lost term", "gate_residual_adaln", TALL, "gate_residual_adaln.py", "(d_gate + bias * sums[3])", "d_gate"),
    Plant("lost term", "gate_residual_adaln", TALL, "gate_residual_adaln.py", "gate * sums[3]", "sums[3]"),
    Plant("lost term", "adaln", TALL, "tiles.py", "(g_a - g_mean[:, None] - ", "(g_a - "),
    Plant("lost term", "gelu", (1, 9, 24), "gelu.py", "gate + u * d_gate", "gate", fast=True),
    Plant("lost term", "adamw_ema", (100,), "adamw_ema.py", "g *= tl.load(grad_scale)",
          "g *= 1 + 0 * tl.load(grad_scale)"),
    Plant("lost term", "adamw_ema", (100,), "adamw_ema.py", "p *= 1.0 - rate * DECAY", "p *= 1.0"),
    Plant("lost term", "attention", (1, 2, 17, 24), "attention_kernels.py", "dk_b * SCALE", "dk_b"),
    Plant("lost term", "attention", (1, 2, 17, 24), "attention_kernels.py", "dp - total[:, None]", "dp"),
    Plant("wrong sample", "attention", HEAD, "attention_kernels.py", "level = tl.load(lse + (n * H + head) * T + rows",
          "level = tl.load(lse + rows", hopper=True),
    Plant("wrong place", "attention", HEAD, "attention_kernels.py", "_load(q + A, rows, q_t, T, D - A, A, 0)",
          "_load(q + A - 8, rows, q_t, T, A, A, 0)", hopper=True),
    Plant("stale output", "attention", HEAD, "attention_kernels.py", "T, D, A, C)", "T, A, A, 0)", hopper=True,
          fast=True),
    Plant("lost term", "attention", HEAD, "attention_kernels.py", "dk_c * SCALE", "dk_c", hopper=True),
    Plant("lost term", "attention", HEAD, "attention_kernels.py", "dp - total[:, None]", "dp", hopper=True),
    Plant("wrong place", "qk_norm_rope", (2, 5, 3, 24), "qk_norm_rope.py", "-sin_a, -sin_b", "sin_a, sin_b"),
    Plant("wrong place", "qk_norm_rope", (2, 5, 3, 24), "qk_norm_rope.py", "cos + n * cos_n + t *",
          "cos + n * cos_n + 0 * t *"),
    Plant("lost term", "fp8_cast", TILES, "fp8.py", "even * scale, odd * scale", "even * scale, odd", fast=True),
    Plant("lost term", "fp8_cast", TILES, "fp8.py", "tl.maximum(tl.abs(even), tl.abs(odd))", "tl.abs(even)"),
    Plant("lost term", "fp8_cast", TILES, "fp8.py", "tl.sum(even + odd, axis=0)", "tl.sum(even, axis=0)"),
    Plant("swapped", "fp8_cast", TILES, "fp8.py", "tl.load(source + stride, mask", "tl.load(source, mask"),
    Plant("missing mask", "fp8_activation", TILES, "activation_fp8.py",
          "tl.where((2 * (pair + at) + 1 < M)[:, None], odd, 0.0)", "odd", fast=True),
    Plant("unreduced chunk", "fp8_activation", TILES, "activation_fp8.py",
          "total += even + odd", "total = even + odd"),
    Plant("lost term", "fp8_activation", TILES, "activation_fp8.py",
          "total_v += d_even + d_odd", "total_v += d_even"),
    Plant("stale output", "fp8_activation", TILES, "activation_fp8.py", "d_odd, rows + D, to", "d_odd, rows, to"),
    Plant("unreduced chunk", "fp8_activation", TILES, "activation_fp8.py",
          "tl.maximum(seen, store_both(even, odd, rows, col", "tl.maximum(0.0, store_both(even, odd, rows, col"),
    Plant("lost term", "fp8_norm", TILES, "tiles.py", "h_a * factor)", "h_a)"),
    Plant("lost term", "fp8_norm", TILES, "gate_residual_adaln.py",
          "seen = tl.maximum(seen, tl.max(seen_b))", "seen = tl.max(seen_b)"),
    Plant("lost term", "fp8_norm", TILES, "fp8.py",
          "(odd.to(tl.int16) << 8), columns", "(even.to(tl.int16) << 8), columns"),
    Plant("lost term", "fp8_attention", EVEN, "attention_kernels.py", "_pairs(x * factor", "_pairs(x", fast=True),
    Plant("lost term", "fp8_attention", EVEN, "attention_kernels.py", "tl.max(tl.abs(x))", "tl.max(x)"),
    Plant("missing mask", "fp8_attention", EVEN, "attention_kernels.py", "if T % BLOCK_M:", "if T < 0:"),
    Plant("missing mask", "fp8_attention", EVEN, "attention_kernels.py", "if T % ROWS:", "if T < 0:"),
    Plant("wrong sample", "fp8_attention", EVEN, "attention_kernels.py", "PAIRS + n * (T // 2)", "PAIRS + 0 * n"),
    Plant("wrong place", "fp8_attention", EVEN, "attention_kernels.py",
          "columns += (part * H + head)", "columns += (0 * part + head)"),
    Plant("unreduced chunk", "fp8_attention", EVEN, "attention_kernels.py", "+ first // ROWS) * 3", "+ 0 * first) * 3"),
]  # fmt: skip


def load(folder: Path, name: str) -> ModuleType:
    """The kernels in this folder as a package of their own."""
    where = {"location": folder / "__init__.py", "submodule_search_locations": [str(folder)]}
    spec = importlib.util.spec_from_file_location(name, **where)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fp8_complaints(package: ModuleType, op: str, shape: tuple[int, ...]) -> list[str]:
    """What differs between a fused cast and the cast of what the unfused kernels of this package compute."""
    rng, fp8 = torch.Generator().manual_seed(0), package.fp8
    (m, d), scale, found = shape[-2:], torch.tensor([16.0], device=DEVICE), []

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=rng).to(DEVICE)

    def differ(name: str, got: tuple, value: torch.Tensor, dtype: torch.dtype) -> None:
        expected = fp8.fp8_cast_eager(value, scale, dtype)
        same = [torch.equal(a.float(), b.float()) for a, b in zip(got[:2], expected[:2], strict=True)]
        same.append(bool(torch.isclose(got[2].max(), expected[2].max())))
        parts = zip(("rows", "columns", "largest"), same, strict=True)
        found.extend(f"{name}: {part}" for part, equal in parts if not equal)

    if op == "fp8_cast":
        x = normal(m, d)
        *got, total = fp8.fp8_cast_and_sum(x, scale, fp8.GRADIENT)
        differ("cast", got, x, fp8.GRADIENT)
        found += [] if torch.allclose(total, x.sum(0), atol=1e-4) else ["cast: sum"]
    elif op == "fp8_attention":
        qkv = normal(shape[0], shape[2], 3, shape[1], shape[3]).requires_grad_()
        out, lse = package.attention_fp8.launch_forward(*qkv.detach().permute(2, 0, 3, 1, 4), shape[3] ** -0.5)
        d_out = normal(*out.shape)
        package.OPS["attention_packed"].triton(qkv).backward(d_out)
        with torch.no_grad():
            differ("forward", package.attention_fp8_forward(qkv, scale)[2:], out.flatten(0, 1).flatten(1), fp8.FORWARD)
            sharp = torch.ones_like(qkv)  # all queries attend to a key of value 0; a row past the end has the mean
            sharp[:, 0, 1], sharp[:, 0, 2] = 9, 0
            peaked, _, *got = package.attention_fp8_forward(sharp, scale)
            differ("sharp", got, peaked.flatten(0, 1).flatten(1), fp8.FORWARD)
            *got, total = package.attention_fp8_backward(d_out, qkv, out, lse, scale)
            d_qkv = qkv.grad.flatten(0, 1).flatten(1)
            differ("backward", got, d_qkv, fp8.GRADIENT)
            found += [] if torch.allclose(total, d_qkv.sum(0), atol=1e-4) else ["backward: sum"]
    elif op == "fp8_norm":
        values = package.OPS["gate_residual_adaln"].inputs((1, m, d), torch.float32, DEVICE)
        values = {name: value.detach() for name, value in values.items()}
        h = package.OPS["gate_residual_adaln"].triton(**values)[1][0]
        _, _, rows, most = package.gate_residual_adaln_fp8(**values, factor=scale, eps=1e-6, rms=False)
        differ("norm", (rows, package.fp8_transpose(rows), most), h, fp8.FORWARD)
    else:
        for name, halves in (("gelu", 1), ("swiglu", 2)):
            x, bias, d_y = normal(m, halves * d).requires_grad_(), normal(halves * d).requires_grad_(), normal(m, d)
            y = package.OPS[name].triton(x, bias)
            y.backward(d_y)
            fused = getattr(package, f"{name}_fp8")
            with torch.no_grad():
                differ(name, fused.forward(x, bias, scale), y, fp8.FORWARD)
                rows, columns, d_bias, most = fused.backward(d_y, x, bias, scale)
            differ(f"{name} backward", (rows, columns, most), x.grad, fp8.GRADIENT)
            found += [] if torch.allclose(d_bias, bias.grad, atol=1e-4) else [f"{name}: d_bias"]
    return found


def complaints(package: ModuleType, op: str, shape: tuple[int, ...], hopper: bool = False) -> list[str]:
    gpu, dtype = ((9, 0), torch.float16) if hopper else ((8, 0), torch.float32)
    try:
        if op.startswith("fp8"):
            with mock.patch.dict(os.environ, FASTDIT_KERNELS="triton"):
                return fp8_complaints(package, op, shape)
        with mock.patch.object(package.runtime, "ABSENT_GPU", gpu):
            return compare(package.OPS[op], package.OPS[op].inputs(shape, dtype, DEVICE))
    except Exception as error:
        return [f"{type(error).__name__}: {str(error)[:80]}"]


def launches(package: ModuleType, name: str, fast: bool, hopper: bool) -> list[tuple[str, list[str]]]:
    """(bug, complaints) for bugs in the launches of this op: the last program missing, an output written elsewhere."""
    found, op = [], package.OPS[name]
    launch = package.runtime.wrap_triton._launch
    shape, kernels = (op.shapes[0], " on Hopper") if hopper else (op.tiny, "")
    for index, written in enumerate(op.writes_hopper if hopper else op.writes):
        for output in (None, *(written[:1] if fast else written)):
            calls = itertools.count()

            def wrong(self, grid, *args, index=index, output=output, calls=calls, **kwargs):
                if next(calls) == index:
                    if output is None:
                        grid = (grid[0] - 1, *grid[1:])
                    else:
                        at = self.kernel.arg_names.index(output)
                        args = (*args[:at], args[at].clone(), *args[at + 1 :])
                launch(self, grid, *args, **kwargs)

            with mock.patch.object(package.runtime.wrap_triton, "_launch", wrong):
                bug = f"{output} written elsewhere" if output else "last program missing"
                found.append((f"{bug} in launch {index} of {name}{kernels}", complaints(package, name, shape, hopper)))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="one plant of each sort")
    fast = parser.parse_args().fast
    for plant in PLANTS:
        if plant.old not in (KERNELS / plant.file).read_text():
            raise ValueError(f"{plant.file} no longer holds {plant.old!r}; update the plant")
    plants = [plant for plant in PLANTS if plant.fast or not fast]
    bugs = missed = 0
    with tempfile.TemporaryDirectory() as scratch:
        untouched = load(KERNELS, "untouched")
        for op, shape, hopper in sorted({(plant.op, plant.shape, plant.hopper) for plant in plants}):
            if found := complaints(untouched, op, shape, hopper):
                print(f"untouched {op} {shape}: {found}")
                missed += 1
        kinds = [(name, hopper) for name in untouched.OPS for hopper in (False, True)]
        for bug, found in (pair for name, hopper in kinds for pair in launches(untouched, name, fast, hopper)):
            bugs += 1
            missed += not found
            print(f"{bug}: {f'caught: {found[0]}' if found else 'MISSED'}", flush=True)
        for index, plant in enumerate(plants):
            folder = Path(scratch) / f"mutant{index}"
            shutil.copytree(KERNELS, folder, ignore=shutil.ignore_patterns("__pycache__"))
            text = (folder / plant.file).read_text()
            (folder / plant.file).write_text(text.replace(plant.old, plant.new))
            found = complaints(load(folder, f"mutant{index}"), plant.op, plant.shape, plant.hopper)
            missed += not found
            verdict = f"caught: {found[0]}" if found else "MISSED"
            print(f"{plant.sort} in {plant.op} ({plant.old[:40]} -> {plant.new[:40]}): {verdict}", flush=True)
    print(f"{bugs + len(plants)} bugs, {missed} missed")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
