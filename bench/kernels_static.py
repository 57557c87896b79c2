"""What the compiler made of each kernel, without a GPU: built ahead of time for sm_80, sm_90 and sm_100.

Every launch that an op's forward and backward would make at a real shape is recorded on meta tensors, compiled with the
hints that the JIT would give (16-divisible pointers, sizes and strides), and read back: registers, stack and shared
memory from the cubin, access widths from the SASS, bytes moved from the TTGIR (elements of every global load and store
times the trips of its loops times the programs).
"""

import concurrent.futures
import dataclasses
import multiprocessing
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int64: "i64", torch.int32: "i32",
         torch.float64: "fp64"}  # fmt: skip
TARGETS = (80, 90, 100)
SIZES = {"bf16": 2, "f16": 2, "f32": 4, "i32": 4, "i64": 8, "i1": 1, "f64": 8}
SHARED = {80: 164, 90: 228, 100: 228}  # KiB a multiprocessor
ACCESS = re.compile(
    r"\b(tt\.load|tt\.store|ttg\.async_copy_global_to_local)\b"
    r".*: (?:tensor<([\dx]*)x!tt\.ptr<(\w+)>, (?:#ttg\.slice<.*parent = )?(#\w+)|!tt\.ptr<(\w+)>)"
)


@dataclasses.dataclass
class Built:
    """One kernel of one launch, compiled for one target."""

    kernel: str
    sm: int
    warps: int
    programs: int
    registers: int
    stack: int
    shared: int
    widths: dict[str, int]  # SASS: "load 128" -> count of instructions in device memory; "local" for spills
    read: int  # bytes of the whole launch
    written: int
    wide: float  # fraction of the bytes whose layout gives each thread 16 bytes at once
    wide_expected: int  # 128-bit instructions that those layouts make of one pass over the code

    @property
    def spills(self) -> int:
        return self.stack + self.widths.get("local", 0)

    @property
    def wide_found(self) -> int:
        return self.widths.get("load 128", 0) + self.widths.get("store 128", 0)

    @property
    def warps_per_sm(self) -> int:
        """Resident warps a multiprocessor, as registers (64k), shared memory and the limit of 64 allow."""
        by_registers = 65536 // (-(-max(self.registers, 1) // 8) * 8 * 32 * self.warps)
        by_shared = SHARED[self.sm] * 1024 // (self.shared + 1024)
        return min(by_registers, by_shared, 32, 64 // self.warps) * self.warps


def record(op: Any, shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> tuple[list[tuple], list[tuple]]:
    """Launches of the forward and of the backward pass, from meta tensors."""
    from fastdit.kernels import runtime

    with runtime.record_launches() as forward:
        kwargs = op.inputs(shape, dtype, "meta")
        out = op.triton(**kwargs)
    outs = [o for o in (out if isinstance(out, tuple) else (out,)) if o is not None and o.requires_grad]
    wanted = [v for v in kwargs.values() if isinstance(v, torch.Tensor) and v.requires_grad]
    with runtime.record_launches() as backward:
        if wanted:
            torch.autograd.grad(outs, wanted, [torch.empty_like(o) for o in outs])
    return forward, backward


def source(kernel: Any, args: tuple, kwargs: dict) -> tuple[ASTSource, dict]:
    """The ASTSource that the JIT would build for this call, and its compile options."""
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


def build(launch: tuple, sm: int) -> Built:
    kernel, grid, args, kwargs = launch
    src, options = source(kernel, args, kwargs)
    compiled = triton.compile(src, target=GPUTarget("cuda", sm, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True).stdout
        sass = subprocess.run([TOOLS / "cuobjdump", "-sass", file.name], capture_output=True, text=True).stdout
    number = {key: int(re.search(rf"{key}:(\d+)", usage).group(1)) for key in ("REG", "STACK", "LOCAL")}
    programs = 1
    for extent in grid:
        programs *= extent
    read, written, wide, expected = traffic(compiled.asm["ttgir"], compiled.metadata.num_warps)
    return Built(
        kernel.__name__.lstrip("_"), sm, compiled.metadata.num_warps, programs, number["REG"],
        number["STACK"] + number["LOCAL"], compiled.metadata.shared, dict(widths(sass)), read * programs,
        written * programs, wide / (read + written), expected,
    )  # fmt: skip


def widths(sass: str) -> Counter:
    """Count global accesses by width in bits, and local ones."""
    found: Counter = Counter()
    for name, suffix in re.findall(r"\b(LDGSTS|LDG|STG|LDL|STL)((?:\.[\w:]+)*)", sass):
        if name in ("LDL", "STL"):
            found["local"] += 1
            continue
        width = next((part for part in ("128", "64", "U16", "S16", "U8", "S8") if f".{part}" in suffix), "32")
        found[f"{'store' if name == 'STG' else 'load'} {width.strip('US')}"] += 1
    return found


def traffic(ttgir: str, warps: int) -> tuple[int, int, int, int]:
    """Of one program, loops counted by their constant trips: bytes loaded, stored, bytes moved 16 at a time by each
    thread, and the 128-bit instructions that those take where nothing is unrolled.
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
            continue  # the prologue of a pipelined load: the loop's last trips skip as many
        moved = elements * size * trips[-1]
        wide += moved * sixteen
        read, written = (read, written + moved) if access[1] == "tt.store" else (read + moved, written)
    return read, written, wide, instructions


_work: list[tuple] = []


def _build_pass(index: int) -> list[Built]:
    _, _, _, sm, launches, _ = _work[index]
    return [build(launch, sm) for launch in launches]


def table(ops: dict[str, Any], targets: tuple[int, ...] = TARGETS, workers: int = 2) -> list[dict]:
    """A row for each kernel of each op, shape, direction and target; `ratio`: bytes of its pass over the minimum."""
    passes = []
    for name, op in ops.items():
        for shape in op.real:
            for way, launches, minimum in zip(
                ("forward", "backward"), record(op, shape), op.minimum_bytes(shape, 2), strict=True
            ):
                passes += [(name, shape, way, sm, launches, minimum) for sm in targets if launches]
    _work[:] = passes
    context = multiprocessing.get_context("fork")  # a launch, its meta tensors and kernel, is inherited, not pickled
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        built = list(pool.map(_build_pass, range(len(passes))))
    rows = []
    for (name, shape, way, sm, _, minimum), kernels in zip(passes, built, strict=True):
        ratio = sum(k.read + k.written for k in kernels) / minimum
        for k in kernels:
            rows.append({"op": name, "shape": list(shape), "pass": way, "sm": sm} | dataclasses.asdict(k) | {
                "spills": k.spills, "wide_found": k.wide_found, "warps_per_sm": k.warps_per_sm, "minimum": minimum,
                "ratio": ratio})  # fmt: skip
    return rows


def markdown(rows: list[dict]) -> str:
    """The table as committed."""
    lines = ["| op | shape | pass | kernel | sm | registers | spills | shared | warps/SM | 16-byte | bytes / minimum |",
             "|---|---|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for r in rows:
        shape = "x".join(map(str, r["shape"]))
        lines.append(
            f"| {r['op']} | {shape} | {r['pass']} | {r['kernel']} | {r['sm']} | {r['registers']} | {r['spills']} | "
            f"{r['shared']} | {r['warps_per_sm']} | {r['wide']:.0%} | {r['ratio']:.3f} |"
        )
    return "\n".join(lines)
