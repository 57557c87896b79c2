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

    def step(
        params, grads, exp_avgs, exp_avg_sqs, emas, copies, step, lr, ema_weight, skip, grad_scale, weight_decay
    ):  # fmt: skip
        grads, steps = [grad.float() for grad in grads], [step.clone() for _ in params]
        torch._fused_adamw_(params, grads, exp_avgs, exp_avg_sqs, [], steps, lr=lr, beta1=0.9, beta2=0.999,
                            weight_decay=weight_decay, eps=1e-8, amsgrad=False, maximize=False, grad_scale=None,
                            found_inf=skip.float())  # fmt: skip
        torch._foreach_lerp_(emas, params, 0.01)  # ema_weight, which the host must not wait for
        torch._foreach_copy_(copies, params)

    return step


PEERS: dict[str, dict[str, Callable[[], Callable]]] = {
    "adaln": {"liger": _liger_adaln},
    "swiglu": {"liger": _liger_swiglu},
    "adamw_ema": {"torch_fused": _torch_fused_adamw},
}
