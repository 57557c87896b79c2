"""What a fused op must satisfy; shared by the tests, the planted-bug script and the benchmark."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fill fresh memory with NaN, so that an unwritten element cannot pass as an old, correct result."""

    def poison(make: Callable) -> Callable:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            out = make(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out.fill_(123456789)

        return made

    with mock.patch.object(torch, "empty", poison(torch.empty)):
        with mock.patch.object(torch, "empty_like", poison(torch.empty_like)):
            yield


def cast(kwargs: dict[str, Any], dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Detached copies of the arguments, floating tensors in dtype (None: their own, strides kept)."""

    def one(value: Tensor) -> Tensor:
        wanted, value = value.requires_grad, value.detach()
        return value.to(dtype or value.dtype).requires_grad_(wanted) if value.is_floating_point() else value

    return tree_map_only(Tensor, one, kwargs)


def run(fn: Callable, kwargs: dict[str, Any], seed: int = 1) -> dict[str, Tensor]:
    """Outputs, and gradients of the differentiated arguments for fixed random output gradients."""
    outs = fn(**kwargs)
    outs = outs if isinstance(outs, tuple) else (outs,)
    found = {f"out{i}": out.detach() for i, out in enumerate(outs)}
    leaves = {k: v for k, v in kwargs.items() if isinstance(v, Tensor) and v.requires_grad}
    outs = [out for out in outs if out.requires_grad]
    if leaves:
        device = outs[0].device
        rng = torch.Generator(device).manual_seed(seed)
        seeds = [torch.randn(o.shape, generator=rng, dtype=torch.float64, device=device) for o in outs]
        # values that every tested dtype represents exactly, so that the reference gets the same ones
        seeds = [(s * 64).round().div(64).to(o.dtype) for s, o in zip(seeds, outs, strict=True)]
        grads = torch.autograd.grad(outs, list(leaves.values()), seeds)
        found |= {f"d_{k}": g for k, g in zip(leaves, grads, strict=True)}
    return found


def errors(actual: Tensor, reference: Tensor) -> tuple[float, float]:
    """Relative error in the 2-norm, and the largest error over the largest value."""
    difference = actual.double() - reference
    return (difference.norm() / reference.norm()).item(), (difference.abs().max() / reference.abs().max()).item()


def compare(op: Any, kwargs: dict[str, Any]) -> list[str]:
    """Complaints about op.triton on these arguments; none if it is as exact as eager in the same dtype.

    The error against fp64 eager, in norm, is at most twice that of eager in the same dtype. Where eager is exact, a
    result within rounding of its dtype (error under 0.3 of its spacing) passes. The worst element, a noisier figure, is
    within four times eager's: a single wrong element exceeds that by orders of magnitude.
    """
    reference = run(op.eager, cast(kwargs, torch.float64))
    eager = run(op.eager, cast(kwargs))
    with poisoned():
        fused = run(op.triton, cast(kwargs))
    complaints = []
    for key, ref in reference.items():
        if fused[key].shape != ref.shape or fused[key].dtype != eager[key].dtype:
            complaints.append(f"{key}: {fused[key].shape} {fused[key].dtype}, not {ref.shape} {eager[key].dtype}")
            continue
        if not fused[key].numel():
            continue
        spacing = torch.finfo(fused[key].dtype).eps
        ours, theirs = errors(fused[key], ref), errors(eager[key], ref)
        for what, times, a, b in zip(("norm", "worst"), (2, 4), ours, theirs, strict=True):
            if not a <= max(times * b, 0.15 * times * spacing):  # NaN never passes
                complaints.append(f"{key}: {what} error {a:.2e}, eager's {b:.2e}")
    return complaints
