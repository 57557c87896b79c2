"""What the compiler made of each kernel, without a GPU: built ahead of time for sm_80, sm_90 and sm_100.

Every launch that an op's forward and backward would make at a real shape is recorded on meta tensors, compiled with the
hints that the JIT would give (16-divisible pointers, sizes and strides), and read back: registers, stack and shared
memory from the cubin, access widths from the SASS, bytes moved from the TTGIR (elements of every global load and store
times the trips of its loops times the programs).
"""

import dataclasses
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
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int64: "i64", torch.int32: "i32", torch.float64: "fp64"}
TARGETS = (80, 90, 100)
SIZES = {"bf16": 2, "f16": 2, "f32": 4, "i32": 4, "i64": 8, "i1": 1, "f64": 8}
ACCESS = re.compile(
    r"\b(tt\.load|tt\.store|ttg\.async_copy_global_to_local)\b"
    r".*: (?:tensor<([\dx]*)x!tt\.ptr<(\w+)>|!tt\.ptr<(\w+)>)"
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
    widths: dict[str, int]  # SASS: "load 128" -> count of instructions in device memory
    read: int  # bytes of the whole launch
    written: int

    @property
    def spills(self) -> int:
        return self.stack + self.widths.get("local", 0)

    @property
    def warps_per_sm(self) -> int:
        """Resident warps a multiprocessor, as registers (64k) and shared memory (100 kB is safe everywhere) allow."""
        by_registers = 65536 // (-(-max(self.registers, 1) // 8) * 8 * 32 * self.warps)
        by_shared = 100_000 // self.shared if self.shared else 32
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
    read, written = traffic(compiled.asm["ttgir"])
    return Built(
        kernel.__name__.lstrip("_"), sm, compiled.metadata.num_warps, programs, number["REG"],
        number["STACK"] + number["LOCAL"], compiled.metadata.shared, dict(widths(sass)), read * programs,
        written * programs,
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


def traffic(ttgir: str) -> tuple[int, int]:
    """Bytes that one program loads and stores, loops counted by their constant trips."""
    constants = {n: int(v) for n, v in re.findall(r"(%[\w\-]+) = arith\.constant (-?\d+) : (?:i32|i64|index)", ttgir)}
    trips, read, written = [1], 0, 0
    for line in ttgir.splitlines():
        if loop := re.search(r"scf\.for \S+ = (%[\w\-]+) to (%[\w\-]+) step (%[\w\-]+)", line):
            low, high, step = (constants[name] for name in loop.groups())
            trips.append(trips[-1] * -(-(high - low) // step))
        elif re.search(r"\bscf\.(if|while)\b", line) or line.rstrip().endswith("({"):
            trips.append(trips[-1])
        elif line.strip().startswith("}") and len(trips) > 1 and "else" not in line:
            trips.pop()
        access = ACCESS.search(line)
        if access and (access[1] != "ttg.async_copy_global_to_local" or len(trips) > 1):
            # of a pipelined load the prologue's copies are not counted: the loop's last trips skip as many
            elements = 1
            for extent in (access[2] or "1").split("x"):
                elements *= int(extent)
            size = elements * SIZES[access[3] or access[4]] * trips[-1]
            read, written = (read + size, written) if access[1] != "tt.store" else (read, written + size)
    return read, written
