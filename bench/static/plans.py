"""Writes docs/plan.md: what `fastdit plan` predicts for DiT-XL/2 on common GPUs.

    python -m bench.static.plans
"""

from bench.record import ROOT
from fastdit.config import load_config
from fastdit.plan import report

HEAD = """# What DiT-XL/2 costs, as `fastdit plan` predicts it

Written by `python -m bench.static.plans`. The bytes that a step moves are within 4% of those counted in the code that a
GPU would run (`bench/static/count.py`), and the activations are those that autograd saves; tests check both. How fast
FLOPs and bytes pass is measured on one H200: `fastdit/cards.py` has the shares of the datasheet, and a test compares
the README's measured rows of fastdit with what is predicted for them (within 5%). For every other card the same shares
are assumed. The other stacks of that table are not predicted.
"""


def main() -> None:
    asked = [
        (f"configs/dit_xl_2{size}.yaml", gpu, gpus, [])
        for size in ("", "_512")
        for gpu in ("A100-80G", "H100", "H200")
        for gpus in (1, 8)
    ]
    for gpu in ("H100", "H200"):
        asked += [("configs/dit_xl_2.yaml", gpu, 1, ["training.residual=bf16"])]
        asked += [("configs/dit_xl_2.yaml", gpu, 1, ["training.residual=bf16", "training.fp8=true"])]
    asked += [("configs/dit_xl_2.yaml", "H100", 8, ["training.engine=deepspeed"])]
    parts = [HEAD]
    for path, gpu, gpus, overrides in asked:
        command = f"fastdit plan --config {path} --gpu {gpu} --gpus {gpus} {' '.join(overrides)}".rstrip()
        parts.append(f"    {command}\n\n{report(load_config(ROOT / path, overrides), gpu, gpus)}\n")
    (ROOT / "docs/plan.md").write_text("\n".join(parts))


if __name__ == "__main__":
    main()
