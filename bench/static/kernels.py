"""What the compiler makes of each kernel, without a GPU: built ahead of time for sm_80, sm_90 and sm_100.

    python -m bench.static.kernels [--ops OP ...] [--out DIR]      a table; rows as JSON into DIR/kernels_static.jsonl

Every launch of an op's forward and backward passes at a real shape is recorded on meta tensors and compiled with the
hints that the JIT would add (pointers, sizes and strides divisible by 16). Registers, stack and shared memory are read
from the cubin, access widths from the SASS, bytes moved from the TTGIR (elements of every global load and store, times
the trips of its loops, times the programs). The exit code is 1 if a kernel spills.
"""

import concurrent.futures
import json
import math
import multiprocessing
import re
import sys
from collections import Counter
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.record import markdown, parser
from bench.static.cuda_target import cuobjdump, resources
from fastdit.kernels import OPS, runtime

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int64: "i64", torch.int32: "i32",
         torch.float64: "fp64", torch.bool: "i1", torch.int16: "i16", torch.uint8: "u8",
         torch.float8_e4m3fn: "fp8e4nv", torch.float8_e5m2: "fp8e5"}  # fmt: skip
TARGETS = (80, 90, 100)
SIZES = {"bf16": 2, "f16": 2, "f32": 4, "i32": 4, "i64": 8, "i1": 1, "i8": 1, "f64": 8, "i16": 2,
         "f8E4M3FN": 1, "f8E5M2": 1}  # fmt: skip
SHARED = {80: 164, 90: 228, 100: 228}  # KiB per multiprocessor
ACCESS = re.compile(
    r"\b(tt\.load|tt\.store|ttg\.async_copy_global_to_local)\b"
    r".*: (?:tensor<([\dx]*)x!tt\.ptr<(\w+)>, (?:#ttg\.slice<.*parent = )?(#\w+)|!tt\.ptr<(\w+)>)"
)


def launches_of(op: Any, shape: tuple[int, ...], sm: int) -> tuple[list[tuple], list[tuple]]:
    """Launches of the forward and of the backward pass in bf16 on this target, from meta tensors."""
    with mock.patch.object(runtime, "ABSENT_GPU", divmod(sm, 10)):
        return _launches_of(op, shape)


def _launches_of(op: Any, shape: tuple[int, ...]) -> tuple[list[tuple], list[tuple]]:
    with runtime.record_launches() as forward:
        kwargs = op.inputs(shape, torch.bfloat16, "meta")
        out = op.triton(**kwargs)
    outs = [o for o in (out if isinstance(out, tuple) else (out,)) if o is not None and o.requires_grad]
    wanted = [v for v in kwargs.values() if isinstance(v, torch.Tensor) and v.requires_grad]
    with runtime.record_launches() as backward:
        if wanted:
            torch.autograd.grad(outs, wanted, [torch.empty_like(o) for o in outs])
    return forward, backward


def source(kernel: Any, args: tuple, kwargs: dict) -> tuple[ASTSource, dict]:
    """The ASTSource that the JIT would build for this call, and the compile options."""
    options = {key: kwargs[key] for key in ("num_warps", "num_stages") if key in kwargs}
    values = dict(zip(kernel.arg_names, args, strict=False)) | {k: v for k, v in kwargs.items() if k not in options}
    constants = {p.name for p in kernel.params if p.is_constexpr}
    signature, constexprs, attrs = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        value = values[name]
        divisible = False
        if name in constants or value is None or (isinstance(value, int) and value == 1):
            signature[name], constexprs[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], divisible = "*" + NAMES[value.dtype], value.storage_offset() * value.itemsize % 16 == 0
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name], divisible = ("i32" if abs(value) < 2**31 else "i64"), value % 16 == 0
        if divisible:
            attrs[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constexprs, attrs), options


def build(launch: tuple, sm: int) -> dict:
    """One kernel of one launch, compiled for one target."""
    kernel, grid, args, kwargs = launch
    src, options = source(kernel, args, kwargs)
    compiled = triton.compile(src, target=GPUTarget("cuda", sm, 32), options=options)
    registers, stack = resources(compiled.asm["cubin"])
    sass = cuobjdump(compiled.asm["cubin"], "-sass")
    widths = access_widths(sass)
    warps, shared, programs = compiled.metadata.num_warps, compiled.metadata.shared, math.prod(grid)
    read, written, wide, wide_expected = traffic(compiled.asm["ttgir"], warps)
    by_registers = 65536 // (-(-max(registers, 1) // 8) * 8 * 32 * warps)  # resident programs per multiprocessor
    by_shared = SHARED[sm] * 1024 // (shared + 1024)
    return {
        "kernel": kernel.__name__.lstrip("_"), "sm": sm, "warps": warps, "programs": programs, "registers": registers,
        "stack": stack, "shared": shared, "widths": widths, "read": read * programs, "written": written * programs,
        "wide": wide / (read + written), "wide_expected": wide_expected,
        "wide_found": widths["load 128"] + widths["store 128"], "spills": stack + widths["local"],
        "hgmma": len(re.findall(r"\bHGMMA\b", sass)),
        "warps_per_sm": min(by_registers, by_shared, 32, 64 // warps) * warps,
    }  # fmt: skip


def access_widths(sass: str) -> Counter:
    """Number of instructions by width in bits, as "load 128", in global memory; "local" for spills."""
    found: Counter = Counter()
    for name, suffix in re.findall(r"\b(LDGSTS|LDG|STG|LDL|STL)((?:\.[\w:]+)*)", sass):
        if name in ("LDL", "STL"):
            found["local"] += 1
            continue
        width = next((part for part in ("128", "64", "U16", "S16", "U8", "S8") if f".{part}" in suffix), "32")
        found[f"{'store' if name == 'STG' else 'load'} {width.strip('US')}"] += 1
    return found


def traffic(ttgir: str, warps: int) -> tuple[int, int, int, int]:
    """Of one program, with the constant trip counts of its loops: bytes loaded, bytes stored, bytes whose layout gives
    each thread 16 at once, and the 128-bit instructions that those take without unrolling.
    """
    constants = {n: int(v) for n, v in re.findall(r"(%[\w\-]+) = arith\.constant (-?\d+) : (?:i32|i64|index)", ttgir)}
    per_thread = {}
    for name, sizes, order in re.findall(r"(#\w+) = #ttg\.blocked<{sizePerThread = \[(.*?)\].*order = \[(\d)", ttgir):
        per_thread[name] = int(sizes.split(",")[int(order)])
    trips, read, written, wide, instructions = [1], 0, 0, 0, 0
    for line in ttgir.splitlines():
        if loop := re.search(r"scf\.for \S+ = (%[\w\-]+) to (%[\w\-]+) step (%[\w\-]+)", line):
            low, high, step = (constants[name] for name in loop.groups())
            trips.append(trips[-1] * -(-(high - low) // step))
        elif re.search(r"\bscf\.(if|while)\b", line) or line.rstrip().endswith("({"):
            trips.append(trips[-1])
        elif line.strip().startswith("}") and len(trips) > 1 and "else" not in line:
            trips.pop()
        if not (access := ACCESS.search(line)):
            continue
        elements = 1
        for extent in (access[2] or "1").split("x"):
            elements *= int(extent)
        size = SIZES[access[3] or access[5]]
        if sixteen := access[4] in per_thread and per_thread[access[4]] * size >= 16:
            instructions += elements * size // (warps * 32 * 16)
        if access[1] == "ttg.async_copy_global_to_local" and len(trips) == 1:
            continue  # prologue of a pipelined load: the loop skips as many in its last trips
        moved = elements * size * trips[-1]
        wide += moved * sixteen
        read, written = (read, written + moved) if access[1] == "tt.store" else (read + moved, written)
    return read, written, wide, instructions


_passes: list[tuple] = []


def _build_pass(index: int) -> list[dict]:
    """Rows of the kernels of one op, shape, direction and target; `ratio`: bytes of the pass over the minimum."""
    op, shape, way, sm, launches, minimum = _passes[index]
    rows = [build(launch, sm) for launch in launches]
    ratio = sum(row["read"] + row["written"] for row in rows) / minimum
    return [{"op": op, "shape": list(shape), "pass": way, **row, "minimum": minimum, "ratio": ratio} for row in rows]


def rows_of(ops: dict[str, Any], targets: tuple[int, ...] = TARGETS, workers: int = 2) -> list[dict]:
    """A row for each kernel of each op, shape, direction and target."""
    _passes[:] = [
        (name, shape, way, sm, launches, minimum)
        for name, op in ops.items()
        for shape in op.real
        for sm in targets
        for way, launches, minimum in zip(
            ("forward", "backward"), launches_of(op, shape, sm), op.minimum_bytes(shape, 2), strict=True
        )
        if launches
    ]
    context = multiprocessing.get_context("fork")  # launches, with meta tensors and kernels, are inherited, not pickled
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        return [row for rows in pool.map(_build_pass, range(len(_passes))) for row in rows]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--ops", nargs="*", choices=list(OPS), default=list(OPS), metavar="OP")
    arguments = options.parse_args()
    rows = rows_of({name: OPS[name] for name in arguments.ops})
    header = ["op", "shape", "pass", "kernel", "sm", "registers", "spills", "shared", "warps/SM", "16-byte",
              "bytes / minimum"]  # fmt: skip
    print(markdown([header] + [
        [r["op"], "x".join(map(str, r["shape"])), r["pass"], r["kernel"], r["sm"], r["registers"], r["spills"],
         r["shared"], r["warps_per_sm"], f"{r['wide']:.0%}", f"{r['ratio']:.3f}"] for r in rows
    ]), end="")  # fmt: skip
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "kernels_static.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sys.exit(any(row["spills"] for row in rows))


if __name__ == "__main__":
    main()
