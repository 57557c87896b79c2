"""Time every attention backend forward and backward on this GPU and write the table that `model.attention=auto` reads.

    python -m bench.kernels.attention      # prints JSON lines, updates fastdit/models/attention.json

A backend is timed only if its output and gradients agree with fp32 eager to bf16 accuracy in the same run. The table is
written after every shape, DiT-XL/2 at 256 px first; an entry changes only when all backends were timed at its shape.
"""

import json
import sys
import time
from pathlib import Path

import torch

from bench.record import parser, record
from fastdit.models.attention import ATTENTION, MEASURED, obstacle, packed_attention, table_key

SHAPES = [(256, 16, 256, 72), (256, 12, 256, 64), (64, 16, 1024, 72), (64, 16, 1024, 64)]  # N, heads, T, head_dim
TOLERANCE = 0.02  # of the largest value: bf16 has three digits


def inputs(n: int, heads: int, tokens: int, head_dim: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The packed projection (N, T, 3, heads, d), as the network makes it, and a gradient of the output."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (n, tokens, 3, heads, head_dim)
    qkv = torch.randn(shape, device=device, generator=generator, dtype=torch.bfloat16).requires_grad_()
    grad = torch.randn((n, heads, tokens, head_dim), device=device, generator=generator, dtype=torch.bfloat16)
    return qkv, grad


def run(name: str, qkv: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    out = packed_attention(qkv, name).transpose(1, 2)
    return out, torch.autograd.grad(out, qkv, grad)[0]


def error(name: str, heads: int, tokens: int, head_dim: int, device: str) -> float:
    """Largest deviation of output and gradient from fp32 eager, relative to the largest value, on two samples."""
    qkv, grad = inputs(2, heads, tokens, head_dim, device)
    wanted = run("eager", qkv.detach().float().requires_grad_(), grad.float())
    pairs = zip(run(name, qkv, grad), wanted, strict=True)
    return float(torch.stack([(a.float() - exact).abs().max() / exact.abs().max() for a, exact in pairs]).max())


def milliseconds(name: str, shape: tuple[int, int, int, int], deadline: float, out: Path | None) -> float | None:
    """Forward and backward, recorded; None, with the reason recorded, if the backend must not be used."""
    from triton.testing import do_bench

    n, heads, tokens, head_dim = shape
    about = {"backend": name, "batch": n, "heads": heads, "tokens": tokens, "head_dim": head_dim}
    reason = obstacle(name, device=torch.device("cuda"), head_dim=head_dim, tokens=tokens)
    if time.monotonic() > deadline:
        raise TimeoutError
    try:
        wrong = None if reason else error(name, heads, tokens, head_dim, "cuda")
        if reason or not wrong <= TOLERANCE:  # also true for NaN
            record("attention", out, **about, skipped=reason or f"error {wrong:.3f}")
            return None
        qkv, grad = inputs(n, heads, tokens, head_dim, "cuda")
        ms = do_bench(lambda: run(name, qkv, grad), return_mode="median")
    except Exception as failure:  # no kernel for the shape, out of memory, or an error of the compiler
        record("attention", out, **about, skipped=f"{type(failure).__name__}: {failure}".splitlines()[0][:200])
        return None
    tflops = 14 * n * heads * tokens**2 * head_dim / ms / 1e9  # forward 4, backward 10
    record("attention", out, **about, ms=round(ms, 4), tflops=round(tflops, 1), error=round(wrong, 5))
    return ms


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--budget-s", type=float, default=600.0, help="seconds, after which no backend begins")
    arguments = options.parse_args()
    deadline = time.monotonic() + arguments.budget_s
    if not torch.cuda.is_available():
        sys.exit("error: there is no GPU to measure; `model.attention=auto` takes its defaults")
    table = json.loads(MEASURED.read_text()) if MEASURED.is_file() else {}
    backends = [name for name in ATTENTION if name != "cpu"]  # that one is what `auto` means without a GPU
    for shape in SHAPES:
        _, _, tokens, head_dim = shape
        try:
            times = {name: milliseconds(name, shape, deadline, arguments.out) for name in backends}
        except TimeoutError:
            sys.exit(f"the budget of {arguments.budget_s:.0f} s was used up before {shape} was done")
        times = {name: ms for name, ms in times.items() if ms is not None}
        if times:
            table[table_key(torch.cuda.get_device_name(), head_dim, tokens)] = min(times, key=times.get)
            MEASURED.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
