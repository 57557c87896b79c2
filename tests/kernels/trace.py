"""Compiles every op, on CPU tensors, up to the graph that Inductor would get; prints one JSON line an op.

Triton itself runs here (not its interpreter), behind a driver that only names a target, so that the compiler's view of
the kernels is the real one: the launches it sees, and which tensors it finds them to write.
"""

import json
import warnings

import torch
import triton
from torch._dynamo.backends.common import aot_autograd
from triton.backends.compiler import GPUTarget

from fastdit.kernels import OPS


class Driver:
    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0


def main() -> None:
    warnings.simplefilter("ignore")
    triton.runtime.driver.set_active(Driver())
    for name, op in OPS.items():
        torch._dynamo.reset()
        graphs = []

        def compiler(graph: torch.fx.GraphModule, _: list, graphs: list = graphs):
            """Keeps the graph and returns empty outputs in place of running it."""
            graphs.append(graph)
            metas = [getattr(node, "meta", {}).get("val", node) for node in graph.graph.output_node().args[0]]
            return lambda *_: [
                torch.empty_strided(m.shape, m.stride(), dtype=m.dtype) if torch.is_tensor(m) else m for m in metas
            ]

        kwargs = op.inputs(op.tiny, torch.bfloat16)
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
        print(json.dumps({"op": name, "written": [n.kwargs["tensors_to_clone"] for n in launches], "opaque": opaque}))


if __name__ == "__main__":
    main()
