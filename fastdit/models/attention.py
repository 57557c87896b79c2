"""Attention through one function: non-causal softmax(q k^T / sqrt(d)) v, the backend chosen by name."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


def attention(q: Tensor, k: Tensor, v: Tensor, backend: str = "sdpa") -> Tensor:
    """softmax(q k^T / sqrt(d)) v over (N, heads, T, d) -> (N, heads, T, d); `backend` is a key of ATTENTION."""
    return ATTENTION[backend](q, k, v)


def _eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (N, heads, T, T)
    return scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v


def _pinned(backend: SDPBackend) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return run


ATTENTION: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "sdpa": F.scaled_dot_product_attention,  # PyTorch's own choice
    "sdpa-flash": _pinned(SDPBackend.FLASH_ATTENTION),
    "sdpa-cudnn": _pinned(SDPBackend.CUDNN_ATTENTION),
    "eager": _eager,
}
