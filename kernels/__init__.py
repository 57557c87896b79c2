"""Fused Triton kernels, imported as `fastdit.kernels` (setup.py maps this folder)."""
# ruff: noqa: F401

if __name__ == "kernels":
    # Imported from the repository root by a library that means Hugging Face's package `kernels`: load that one instead.
    import sys
    from importlib import machinery, util
    from pathlib import Path

    _root = Path(__file__).resolve().parent.parent
    _spec = machinery.PathFinder.find_spec("kernels", [p for p in sys.path if Path(p or ".").resolve() != _root])
    if _spec is not None and _spec.loader is not None:
        sys.modules["kernels"] = util.module_from_spec(_spec)
        _spec.loader.exec_module(sys.modules["kernels"])
    else:  # not installed: look like an empty namespace package, which Hugging Face's checks treat as absent
        __file__, __path__ = None, []

else:
    # One line per op file; OPS collects the ops that are imported here.
    from .adaln import ADALN, adaln
    from .adamw_ema import ADAMW_EMA, adamw_ema
    from .attention import ATTENTION, ATTENTION_PACKED, LONGEST, attention, attention_packed
    from .attention_fp8 import attention_fp8_backward, attention_fp8_forward
    from .fp8 import fp8_cast, fp8_cast_and_sum, fp8_transpose, largest
    from .gate_residual_adaln import (
        GATE_RESIDUAL_ADALN,
        gate_residual_adaln,
        gate_residual_adaln_backward,
        gate_residual_adaln_fp8,
    )
    from .gelu import GELU, GELU_LINEAR, gelu, gelu_fp8, gelu_linear
    from .qk_norm_rope import QK_NORM_ROPE, qk_norm_rope, rope_2d
    from .runtime import Op, choice
    from .swiglu import SWIGLU, SWIGLU_LINEAR, swiglu, swiglu_fp8, swiglu_linear

    OPS: dict[str, Op] = {op.name: op for op in list(globals().values()) if isinstance(op, Op)}
