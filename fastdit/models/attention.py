"""Attention backends by name: non-causal softmax(q k^T / sqrt(d)) v, from q, k, v or from the packed projection.

No backend copies q, k, v out of the packed projection. Backends in PACKED also write its gradient in one piece; the
others return three gradients, which autograd copies into one tensor. `auto` picks the backend that
`bench/kernels/attention.py` measured as fastest for this GPU and shape: attention.json beside this file, shipped with
the results of an H200, which also stand for an H100. Without a measurement it picks FlashAttention on Ampere, cuDNN on
Hopper and newer if the number of tokens is a multiple of 128, and PyTorch's default otherwise. fp32 uses PyTorch's
default: cuDNN and FlashAttention do not support it, and our kernels would not use tensor cores.
"""

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastdit import kernels
from fastdit.registry import check

Backend = Callable[[Tensor, Tensor, Tensor], Tensor]
MEASURED = Path(__file__).with_name("attention.json")  # {"<GPU> d<head_dim> t<tokens>": backend}


def attention(q: Tensor, k: Tensor, v: Tensor, backend: str = "sdpa") -> Tensor:
    """softmax(q k^T / sqrt(d)) v over (N, heads, T, d) -> (N, heads, T, d); `backend` is a key of ATTENTION."""
    return ATTENTION[backend](q, k, v)


def packed_attention(qkv: Tensor, backend: str = "sdpa") -> Tensor:
    """`attention` on the packed projection: (N, T, 3, heads, d) -> (N, T, heads, d)."""
    if backend in PACKED:
        return PACKED[backend](qkv)
    return ATTENTION[backend](*qkv.permute(2, 0, 3, 1, 4)).transpose(1, 2)


def resolve(name: str, *, device: torch.device, head_dim: int, tokens: int) -> str:
    """Return the backend for `name`, a key of ATTENTION or "auto"; ValueError if it does not work here."""
    check(name, ["auto", *ATTENTION], "model.attention")
    if name == "auto":
        return _fastest(device, head_dim, tokens)
    reason = obstacle(name, device=device, head_dim=head_dim, tokens=tokens)
    if reason:
        raise ValueError(f"model.attention={name!r} does not work here: {reason}; use auto or sdpa")
    return name


def obstacle(name: str, *, device: torch.device, head_dim: int, tokens: int) -> str | None:
    """Why a backend cannot run or gives wrong results on this device; None if it works."""
    if name in ("sdpa", "eager"):
        return None
    if name == "cpu":
        return None if device.type == "cpu" else f"it runs only on a CPU, not on {device.type}"
    if device.type != "cuda":
        return f"it needs a GPU, but the device is {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"it needs compute capability 8.0, but this GPU has {capability[0]}.{capability[1]}"
    if name == "triton" and os.environ.get("FASTDIT_KERNELS") == "eager":
        return "FASTDIT_KERNELS=eager"
    if name == "triton" and tokens > kernels.LONGEST:
        return f"it supports at most {kernels.LONGEST} tokens, not {tokens}"
    if name == "sdpa-cudnn" and (head_dim % 8 or head_dim > 128):
        return f"head_dim must be a multiple of 8 and at most 128, not {head_dim}"
    module = {"flash-attn": "flash_attn", "flash-attn-3": "flash_attn_interface", "flash-attn-4": "flash_attn.cute"}
    if name in module:
        try:
            found = importlib.util.find_spec(module[name])
        except ModuleNotFoundError:  # raised for a submodule if its package is missing
            found = None
        if found is None:
            return f"{module[name]} is not installed"
    if name == "flash-attn-3" and capability[0] != 9:
        return "it supports only Hopper"
    if name == "flash-attn-4":
        if capability[0] < 9:
            return "its backward pass rejects GPUs before Hopper"
        if capability[0] == 9 and head_dim % 32:  # kernel and interface pad to different widths; open bug upstream
            return f"its gradient of q is silently wrong at head_dim={head_dim} on Hopper"
    return None


def _fastest(device: torch.device, head_dim: int, tokens: int) -> str:
    if device.type != "cuda":
        return "cpu"
    table = json.loads(MEASURED.read_text()) if MEASURED.is_file() else {}
    known = table.get(table_key(torch.cuda.get_device_name(device), head_dim, tokens))
    if known and not obstacle(known, device=device, head_dim=head_dim, tokens=tokens):
        return known
    major, _ = torch.cuda.get_device_capability(device)
    if major == 8:
        return "sdpa-flash"
    # like PyTorch, avoid cuDNN unless tokens is a multiple of 128: some versions give wrong results (pytorch#169849)
    suits = tokens % 128 == 0 and not obstacle("sdpa-cudnn", device=device, head_dim=head_dim, tokens=tokens)
    return "sdpa-cudnn" if major >= 9 and suits else "sdpa"


def table_key(gpu: str, head_dim: int, tokens: int) -> str:
    return f"{gpu} d{head_dim} t{tokens}"


def _eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (N, heads, T, T)
    return scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v


def _on_cpu(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Short bf16 sequences: with backward, two matmuls take 2 ms, PyTorch's kernel 9 ms (16 x 6 heads, 64 tokens)."""
    short = q.dtype == torch.bfloat16 and q.shape[-2] <= 128
    return _eager(q, k, v) if short else F.scaled_dot_product_attention(q, k, v)


def _in_half_precision(backend: Backend) -> Backend:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v) if q.dtype == torch.float32 else backend(q, k, v)

    return run


def _packed_in_half_precision(backend: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def run(qkv: Tensor) -> Tensor:
        if qkv.dtype != torch.float32:
            return backend(qkv)
        return F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4)).transpose(1, 2)

    return run


def _pinned(backend: SDPBackend) -> Backend:
    @_in_half_precision
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return run


@_in_half_precision
def _flash_attn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn import flash_attn_func

    return flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)  # expects (N, T, heads, d)


@_packed_in_half_precision
def _flash_attn_packed(qkv: Tensor) -> Tensor:
    from flash_attn import flash_attn_qkvpacked_func

    return flash_attn_qkvpacked_func(qkv)


@_in_half_precision
def _flash_attn_3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn_interface import flash_attn_func

    out = flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)))
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)


@_packed_in_half_precision
def _flash_attn_3_packed(qkv: Tensor) -> Tensor:
    from flash_attn_interface import flash_attn_qkvpacked_func

    out = flash_attn_qkvpacked_func(qkv)
    return out[0] if isinstance(out, tuple) else out


@_in_half_precision
def _flash_attn_4(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn.cute import flash_attn_func

    out = flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)))
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)


ATTENTION: dict[str, Backend] = {
    "sdpa": F.scaled_dot_product_attention,  # PyTorch's default
    "sdpa-flash": _pinned(SDPBackend.FLASH_ATTENTION),
    "sdpa-cudnn": _pinned(SDPBackend.CUDNN_ATTENTION),
    "flash-attn": _flash_attn,
    "flash-attn-3": _flash_attn_3,
    "flash-attn-4": _flash_attn_4,
    "triton": _in_half_precision(kernels.attention),
    "cpu": _on_cpu,
    "eager": _eager,
}
PACKED: dict[str, Callable[[Tensor], Tensor]] = {
    "flash-attn": _flash_attn_packed,
    "flash-attn-3": _flash_attn_3_packed,
    "triton": _packed_in_half_precision(kernels.attention_packed),
}
