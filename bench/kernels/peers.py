"""Public kernels with the keywords of our ops; each is imported only when used, so a missing one affects no other."""

from collections.abc import Callable

import torch
from torch import Tensor


def _liger_swiglu() -> Callable:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    def swiglu(x: Tensor, bias: Tensor) -> Tensor:
        a, v = (x + bias).chunk(2, dim=-1)
        return LigerSiLUMulFunction.apply(a.contiguous(), v.contiguous())

    return swiglu


def _liger_adaln() -> Callable:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    def adaln(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        ones, zeros = torch.ones(x.shape[-1], device=x.device), torch.zeros(x.shape[-1], device=x.device)
        return LigerLayerNormFunction.apply(x, ones.to(x), zeros.to(x), 1e-6) * (1 + scale[:, None]) + shift[:, None]

    return adaln


def _torch_fused_adamw() -> Callable:
    """PyTorch's fused AdamW, then the EMA and the copy as separate passes."""

    def step(param, grad, exp_avg, exp_avg_sq, ema, copy, step, lr, ema_decay, grad_scale, weight_decay):
        torch._fused_adamw_([param], [grad.float()], [exp_avg], [exp_avg_sq], [], [step.float()], lr=lr, beta1=0.9,
                            beta2=0.999, weight_decay=weight_decay, eps=1e-8, amsgrad=False, maximize=False,
                            grad_scale=None, found_inf=None)  # fmt: skip
        ema.lerp_(param, (1 - ema_decay).float())
        copy.copy_(param)
        return (param,)

    return step


PEERS: dict[str, dict[str, Callable[[], Callable]]] = {
    "adaln": {"liger": _liger_adaln},
    "swiglu": {"liger": _liger_swiglu},
    "adamw_ema": {"torch_fused": _torch_fused_adamw},
}
