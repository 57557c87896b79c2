"""The GPUs that predictions know: datasheets, and the shares of them that a training step was measured to reach."""

from dataclasses import dataclass, replace

import torch

from fastdit import distributed
from fastdit.registry import check

GIB = 2**30


@dataclass(frozen=True)
class Efficiency:
    """What a step reaches, as shares of the datasheet. Each is the work of one part over its time in a profile.

    For DiT-XL/2 at 256 px and batch 256, in the table of `python -m bench.step --profile`:
    products: FLOPs of the linears (175.3 T) over the time of GEMM. attention: FLOPs of attention (6.5 T) over its time
    beyond that of its bytes. fp8: how many times faster the blocks' products are in FP8. memory: bytes of norms, gates,
    activation and the bias of qkv over their time. fp8_operands: bytes (`moved_bytes` with FP8 minus without) over the
    time of preparing operands, and what the activation takes longer. weights: 40 bytes a parameter over the time of the
    norm of the gradients, AdamW and EMA. small_s: what is left of the step as a CUDA graph, which is short kernels.
    launch_s: the time without a running kernel where the step is not a CUDA graph.
    """

    products: float
    attention: float
    fp8: float
    memory: float
    fp8_operands: float
    weights: float
    small_s: float
    launch_s: float
    source: str


H200 = Efficiency(
    products=0.688, attention=0.24, fp8=1.88, memory=0.78, fp8_operands=0.45, weights=0.87, small_s=0.003,
    launch_s=0.006, source="one H200 (commit 7504ac9, 2026-11-26)",
)  # fmt: skip


@dataclass(frozen=True)
class GPU:
    """Datasheet: dense bf16 TFLOP/s, memory bandwidth in TB/s, memory in GiB."""

    tflops: float
    bandwidth: float
    gib: float
    has_fp8: bool = True
    efficiency: Efficiency = H200  # of a card that was not measured: the H200's shares


GPUS = {
    "A100-80G": GPU(312, 2.04, 80, has_fp8=False),
    "H100": GPU(989, 3.35, 80),
    "H200": GPU(989, 4.80, 141),
    "B200": GPU(2250, 8.00, 180),
    "L40S": GPU(362, 0.86, 48),
    "L4": GPU(121, 0.30, 24),
    "A10": GPU(125, 0.60, 24, has_fp8=False),
    "RTX 5090": GPU(209, 1.79, 32),
    "RTX 4090": GPU(165, 1.01, 24),
    "RTX 3090": GPU(71, 0.94, 24, has_fp8=False),
}
NO_BF16 = ("T4", "V100", "P100", "RTX 2080")


def card_name(gpu: str) -> str:
    """The name in GPUS for --gpu, in any case and also without "RTX"; ValueError for an unknown GPU."""
    names = {_plain(name): name for name in GPUS} | {"a100": "A100-80G"}
    if _plain(gpu) in map(_plain, NO_BF16):
        raise ValueError(f"--gpu={gpu!r} has no bf16, which fastdit trains in; use a GPU from Ampere on")
    check(names.get(_plain(gpu), gpu), GPUS, "--gpu")
    return names[_plain(gpu)]


def _plain(name: str) -> str:
    return name.lower().replace("rtx", "").replace(" ", "").replace("-", "")


def card_of(device: torch.device) -> GPU | None:
    """The GPUS entry of a device, with the memory that it really has; None where the table has none."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    found = [card for known, card in GPUS.items() if known.split("-")[0] in name]
    return replace(found[0], gib=distributed.memory_of(device) / GIB) if found else None
