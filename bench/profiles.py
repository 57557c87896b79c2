"""Where a step's time goes, by kind of kernel, from torch.profiler's events."""

import re
from collections import defaultdict
from collections.abc import Iterable

KINDS = [  # first match wins; kernels' names on a GPU, operators' on a CPU
    ("attention", r"flash|fmha|attention|sdpa|cudnn.*(mha|attn)"),
    ("optimiser", r"adam|multi_tensor|lerp|_update|optimizer"),
    ("GEMM", r"gemm|nvjet|cutlass|wgmma|xmma|cublas|\bmm\b|addmm|\bbmm\b|linear|conv|matmul|splitk"),
    ("norm", r"layer_norm|native_layer_norm|adaln|welford|^_(forward|backward)(_\d+)?$"),
    ("copy", r"memcpy|memset|copy_|_to_copy"),
    ("random", r"distribution|philox|randn?_|normal_|uniform_|random_"),
]
OTHER, GAP = "elementwise", "gap"


def kind_of(name: str) -> str:
    """The kind of one kernel: what matches none of KINDS is elementwise (or a reduction fused with some)."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE)), OTHER)


def breakdown(events: Iterable, seconds: float, device: str) -> dict[str, float]:
    """Seconds by kind, largest first; `gap` is what is left of `seconds`: the device waits, or the host's own code."""
    kinds: dict[str, float] = defaultdict(float)
    spans = []
    for event in events:
        if device == "cuda":
            marked = event.is_user_annotation or event.name.startswith(("##", "Torch-Compiled", "ProfilerStep"))
            if str(event.device_type).endswith("CUDA") and not marked:
                kinds[kind_of(event.name)] += event.time_range.elapsed_us() / 1e6
                spans.append((event.time_range.start, event.time_range.end))
        else:
            kinds[kind_of(event.name)] += event.self_cpu_time_total / 1e6
    busy = covered(spans) / 1e6 if device == "cuda" else sum(kinds.values())
    kinds[GAP] = max(seconds - busy, 0.0)
    return dict(sorted(kinds.items(), key=lambda pair: -pair[1]))


def covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of intervals: kernels on several streams overlap."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total
