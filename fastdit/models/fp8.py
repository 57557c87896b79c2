"""FP8 matmuls in the linears of the blocks (Micikevicius et al. 2022, arXiv 2209.05433), using torchao.

Inputs and weights are rounded to e4m3 and gradients to e5m2, with dynamic scaling per tensor. Weights, their gradients
and the optimizer state stay fp32, so checkpoints do not change. On CPU the rounding is emulated, slowly, to check the
losses.
"""

import functools

import torch
from torch import Tensor

from fastdit.models.dit import DiT
from fastdit.models.layers import Linear


def use_fp8(model: DiT) -> None:
    """Use FP8 matmuls in the linears of attention and MLP, in place; ValueError if that is not possible.

    Modulations, embedders and the final layer do not change: they are small and need the precision.
    """
    device = next(model.parameters()).device
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise ValueError("training.fp8=true needs compute capability 8.9 (Ada, Hopper or newer); use false")
    try:
        from torchao.float8 import Float8LinearConfig
        from torchao.float8.float8_linear import Float8Linear
    except ImportError as error:
        raise ValueError("training.fp8=true needs torchao: pip install 'fastdit[gpu]'") from error
    config = Float8LinearConfig(emulate=device.type != "cuda", pad_inner_dim=True)
    with torch.device("meta"):
        settings = Float8Linear(16, 16, bias=False, config=config)
    # one object for all linears, so that equal blocks share compiled code
    multiply = functools.partial(_multiply, settings.linear_mm_config, config)
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            d_out, d_in = module.weight.shape
            if d_out % 16 or d_in % 16:
                raise ValueError(f"training.fp8=true needs multiples of 16, but {name} is {d_in} x {d_out}; use false")
            module.multiply = multiply


def _multiply(kind, config, x: Tensor, weight: Tensor) -> Tensor:
    from torchao.float8.float8_linear import matmul_with_hp_or_float8_args

    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return matmul_with_hp_or_float8_args.apply(x, weight.t(), kind, config)
