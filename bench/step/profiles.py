"""A step's time by kind of kernel, from torch.profiler's events."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

# the first match wins; names of kernels on a GPU, of operators on a CPU
OURS = [  # kernels/*.py; the compiler may append a number
    ("attention", r"_attention_(forward|backward_q|backward_kv)"),
    ("norm", r"_((gate_residual_)?adaln|qk_norm_rope)_(forward|backward)|_sum_chunks"),
    ("activation", r"_(gelu|swiglu)_(fp8_)?(forward|backward)"),
    ("optimizer", r"_adamw_ema"),
    ("FP8 operands", r"_fp8_(cast|transpose)|_largest"),
]  # fmt: skip
FUSED = [  # Inductor's, named after the fused operators; products and attention are never among them
    ("optimizer", r"adam|lerp"),
    ("norm", r"layer_norm|rms_norm|rsqrt|welford"),
    ("activation", r"gelu|tanh|sigmoid|silu"),
    ("random", r"rand|philox|seed"),
]
KINDS = [
    ("attention", r"flash|fmha|attention|sdpa|cudnn.*(mha|attn)"),
    ("optimizer", r"adam|multi_tensor|lerp|optimizer"),
    ("GEMM", r"gemm|gemv|nvjet|cutlass|wgmma|xmma|cublas|\bmm\b|addmm|\bbmm\b|linear|conv|matmul|splitk|triton_tem"),
    ("norm", r"layer_norm|welford|rms_norm"),
    ("activation", r"gelu|silu"),
    ("copy", r"memcpy|memset|copy_|_to_copy|direct_copy"),
    ("random", r"distribution|philox|randn?_|normal_|uniform_|random_"),
]
OTHER, GAP = "elementwise", "gap"


def kind_of(name: str) -> str:
    """The kind of a kernel. What matches nothing is elementwise, or a reduction fused with elementwise operators."""
    fused = re.match(r"triton_(poi|red|per|for)_", name)  # pointwise, reductions, foreach
    if fused is None and re.fullmatch(rf"({'|'.join(pattern for _, pattern in OURS)})(_\d+)*", name):
        kinds = OURS
    else:
        kinds = FUSED if fused else KINDS
    return next((kind for kind, pattern in kinds if re.search(pattern, name, re.IGNORECASE)), OTHER)


def breakdown(events: Iterable, seconds: float, device: str) -> dict[str, float]:
    """Seconds by kind, largest first; `gap` is the rest of `seconds`: an idle device, or the host's own code."""
    kinds: dict[str, float] = defaultdict(float)
    spans = []
    for event in filter(runs_on(device), events):
        kinds[kind_of(event.name)] += seconds_of(event, device)
        spans.append((event.time_range.start, event.time_range.end))
    busy = covered(spans) / 1e6 if device == "cuda" else sum(kinds.values())
    kinds[GAP] = max(seconds - busy, 0.0)
    return dict(sorted(kinds.items(), key=lambda pair: -pair[1]))


def largest(events: Iterable, steps: int, device: str, count: int = 30) -> dict[str, tuple[float, float]]:
    """(milliseconds, calls) of a step by name of the kernel, the `count` largest first."""
    found: dict[str, list[float]] = defaultdict(list)
    for event in filter(runs_on(device), events):
        found[event.name].append(seconds_of(event, device))
    names = sorted(found, key=lambda name: -sum(found[name]))[:count]
    return {name: (1000 * sum(found[name]) / steps, len(found[name]) / steps) for name in names}


def runs_on(device: str) -> Callable[[Any], bool]:
    """Which events are work of the device: on a GPU its kernels and copies, without the marks of ranges."""

    def on_gpu(event) -> bool:
        marked = event.is_user_annotation or event.name.startswith(("##", "Torch-Compiled", "ProfilerStep"))
        return str(event.device_type).endswith("CUDA") and not marked

    return on_gpu if device == "cuda" else lambda event: True


def seconds_of(event, device: str) -> float:
    return (event.time_range.elapsed_us() if device == "cuda" else event.self_cpu_time_total) / 1e6


def covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of the intervals: kernels on several streams overlap."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total
