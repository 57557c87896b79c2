"""Compiles every op on CPU tensors up to the graph that Inductor would get, and prints one JSON line per op.

Ops with kernels of their own for Hopper are compiled with these too, in a line of their own.

Triton itself runs here, not its interpreter, with a driver that only names a target. So this is the compiler's real
view of the kernels: the launches that it sees, and the tensors that they write according to its analysis.
"""

import importlib
import json
import warnings

import torch
import triton
from torch._dynamo.backends.common import aot_autograd
from triton.backends.compiler import GPUTarget

from fastdit.kernels import OPS, runtime


class Driver:
    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0


def main() -> None:
    warnings.simplefilter("ignore")
    triton.runtime.driver.set_active(Driver())
    module = importlib.import_module("fastdit.kernels.attention")
    module.WHOLE_FITS, module.UNVERIFIED = True, 0  # whatever this version makes of it, and at the tests' few tokens
    for name, hopper in [(name, hopper) for name in OPS for hopper in (False, True)]:
        op, runtime.ABSENT_GPU = OPS[name], (9, 0) if hopper else (8, 0)
        if not any(op.writes_hopper if hopper else op.writes):
            continue  # the same, or not for the compiler
        torch._dynamo.reset()
        graphs = []

        def compiler(graph: torch.fx.GraphModule, _: list, graphs: list = graphs):
            """Keeps the graph; returns empty outputs instead of running it."""
            graphs.append(graph)
            metas = [getattr(node, "meta", {}).get("val", node) for node in graph.graph.output_node().args[0]]
            return lambda *_: [
                torch.empty_strided(m.shape, m.stride(), dtype=m.dtype) if torch.is_tensor(m) else m for m in metas
            ]

        kwargs = op.inputs(op.shapes[0] if hopper else op.tiny, torch.bfloat16)
        backend = aot_autograd(fw_compiler=compiler)
        step = torch.compile(lambda kw, op=op: op.triton(**kw), fullgraph=True, backend=backend)
        out = step(kwargs)
        outs = [o for o in (out if isinstance(out, tuple) else (out,)) if o.requires_grad]
        leaves = [v for v in kwargs.values() if isinstance(v, torch.Tensor) and v.requires_grad]
        if leaves:
            torch.autograd.grad(outs, leaves, [torch.ones_like(o) for o in outs])
        calls = [node for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]
        launches = [node for node in calls if "triton_kernel_wrapper" in str(node.target)]
        opaque = [str(node.target) for node in calls if "fastdit" in str(node.target)]
        written = [n.kwargs["tensors_to_clone"] for n in launches]
        print(json.dumps({"op": name, "hopper": hopper, "written": written, "opaque": opaque}))


if __name__ == "__main__":
    main()
