"""FP8 products for the linears of the blocks (Micikevicius et al. 2022, arXiv 2209.05433), by torchao.

Inputs and weights are rounded to e4m3 and gradients to e5m2, each tensor scaled by its largest value at that moment.
Weights, their gradients and moments stay fp32, so a checkpoint does not show it. A CPU emulates the rounding, slowly:
for a look at the losses.
"""

import functools

import torch
from torch import Tensor

from fastdit.models.dit import DiT
from fastdit.models.layers import Linear


def use_fp8(model: DiT) -> None:
    """Let attention's and the MLP's linears multiply in FP8; ValueError where that cannot be.

    Modulations, embedders and the final layer stay as they are: small, and worth their digits.
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
    # one object for all linears: equal blocks share what the compiler makes of them
    multiply = functools.partial(_multiply, settings.linear_mm_config, config)
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            rows, columns = module.weight.shape
            if rows % 16 or columns % 16:
                raise ValueError(f"training.fp8=true needs multiples of 16; {name} is {columns} x {rows}; use false")
            module.multiply = multiply


def _multiply(kind, config, x: Tensor, weight: Tensor) -> Tensor:
    from torchao.float8.float8_linear import matmul_with_hp_or_float8_args

    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return matmul_with_hp_or_float8_args.apply(x, weight.t(), kind, config)
