"""Time every attention backend forward and backward on this GPU, and write the table that `model.attention=auto` reads.

    python bench/attention.py            # prints JSON lines, updates fastdit/models/attention.json

A backend is timed only after its output and gradients agree with fp32 eager to bf16 accuracy in the same run.
"""

import argparse
import json

import torch
from record import record

from fastdit.models.attention import ATTENTION, MEASURED, obstacle, packed_attention, table_key

SHAPES = [(256, 16, 256, 72), (256, 12, 256, 64), (64, 16, 1024, 72), (64, 16, 1024, 64)]  # N, heads, T, head_dim
TOLERANCE = 0.02  # of the largest value: bf16 keeps three digits


def inputs(n: int, heads: int, tokens: int, head_dim: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The packed projection (N, T, 3, heads, d), as the network makes it, and a gradient for the output."""
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
    return max(float((ours.float() - exact).abs().max() / exact.abs().max()) for ours, exact in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("error: bench/attention.py measures a GPU, and there is none; auto takes its defaults")
    from triton.testing import do_bench

    device = torch.device("cuda")
    table = json.loads(MEASURED.read_text()) if MEASURED.is_file() else {}
    for n, heads, tokens, head_dim in SHAPES:
        times = {}
        for name in ATTENTION:
            shape = {"backend": name, "batch": n, "heads": heads, "tokens": tokens, "head_dim": head_dim}
            reason = obstacle(name, device=device, head_dim=head_dim, tokens=tokens)
            try:
                wrong = None if reason else error(name, heads, tokens, head_dim, "cuda")
                if reason or wrong > TOLERANCE:
                    record("attention", **shape, skipped=reason or f"error {wrong:.3f}")
                    continue
                qkv, grad = inputs(n, heads, tokens, head_dim, "cuda")
                times[name] = do_bench(lambda b=name, q=qkv, g=grad: run(b, q, g), return_mode="median")
            except RuntimeError as failure:  # a backend without a kernel for the shape, or out of memory
                record("attention", **shape, skipped=str(failure).splitlines()[0][:200])
                continue
            tflops = 14 * n * heads * tokens**2 * head_dim / times[name] / 1e9  # forward 4, backward 10
            record("attention", **shape, ms=round(times[name], 4), tflops=round(tflops, 1), error=round(wrong, 5))
        table[table_key(torch.cuda.get_device_name(), head_dim, tokens)] = min(times, key=times.get)
    MEASURED.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
