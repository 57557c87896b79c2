"""What is counted of a step without a GPU: host synchronizations, and the code that the compiler generates for one."""

import json
import os
import subprocess
import sys

import pytest
import torch

from bench.static import count
from bench.step.cases import SIZES, Size
from helpers import ROOT

SMALLEST = Size(depth=2, hidden=64, heads=4, latent=8, batch=2, classes=10)


@pytest.mark.parametrize("overrides", [(), ("training.activation_checkpointing=full",), ("training.grad_clip=1",)])
def test_the_host_never_waits_for_the_device_within_a_step(overrides):
    assert not count.host_waits(SMALLEST, overrides)


WAITS = {
    "item": lambda x: x.sum().item(), "a branch": lambda x: bool(x.sum() > 0), "cpu": lambda x: x.cpu(),
    "to cpu": lambda x: x.to("cpu"), "nonzero": lambda x: x.nonzero(), "a mask": lambda x: x[x > 0],
    "tolist": lambda x: x.tolist(), "a number from the host": lambda x: x + torch.tensor([1.0, 2.0]),
    "float": lambda x: float(x[0]), "isnan": lambda x: torch.equal(x, x), "where": lambda x: torch.where(x > 0),
}  # fmt: skip


@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS)
def test_every_wait_is_noticed(wait):
    with count.waits_counted() as found:
        x = torch.linspace(-1, 1, 2, requires_grad=False)
        (x * 2).to(torch.float64).sum()
        assert not found
        wait(x)
    assert found


BLOCK = Size(depth=2, hidden=128, heads=2, latent=32, batch=16, classes=10)
COUNT = """
import json
from bench.static import count, cuda_target
from bench.step.cases import Size

for overrides in {variants}:
    graphs, breaks = count.graphs_of({size}, tuple(overrides))
    kernels = {{kernel.source: kernel for graph in graphs for kernel in graph.kernels}}.values()
    if "training.fp8=true" in overrides:  # those of bf16 have been built
        kernels = [kernel for kernel in kernels if "fp8" in kernel.source]
    print(json.dumps({{
        "graphs": len(graphs), "breaks": breaks, "spills": [k.name for k in kernels if cuda_target.build(k)[1]],
        **{{way: [[c.kind, c.name, c.bytes] for c in g.calls] for way, g in count.middle_block(graphs).items()}},
    }}))
"""


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """A block on a GPU: with the defaults, with a bf16 residual stream, and in addition our attention, FP8, or both.

    In other processes, two at a time, because the kernels of this one are interpreted.
    """
    bf16, folder = "training.residual=bf16", tmp_path_factory.mktemp("count")
    packed, fp8 = [bf16, "model.attention=triton"], "training.fp8=true"
    processes = []
    for i, variants in enumerate(([[], [bf16]], [packed, [bf16, fp8], [*packed, fp8, "training.fp8_attention=true"]])):
        command = [sys.executable, "-c", COUNT.format(size=BLOCK, variants=variants)]
        files = {"stdout": open(folder / f"{i}.out", "w"), "stderr": open(folder / f"{i}.err", "w")}
        processes.append(subprocess.Popen(command, env=os.environ | {"TRITON_INTERPRET": "0"}, cwd=ROOT, **files))
    codes = [process.wait() for process in processes]
    assert codes == [0, 0], [(folder / f"{i}.err").read_text() for i in range(2)]
    lines = [line for i in range(2) for line in (folder / f"{i}.out").read_text().splitlines()]
    return [json.loads(line) for line in lines if line.startswith("{")]


UNIT = BLOCK.batch * 256 * BLOCK.hidden * 2  # bytes of one activation (N, T, D)


def names(calls: list, kind: str) -> list[str]:
    return sorted(name for found, name, _ in calls if found == kind)


def moved(calls: list) -> int:
    return sum(size for *_, size in calls)


def test_a_block_compiles_whole_for_a_gpu_and_its_kernels_spill_nothing(counted):
    for found in counted:  # graphs: forward and backward, of the first block and of all others
        assert (found["graphs"], found["breaks"], found["spills"]) == (4, {}, [])


def test_a_block_launches_our_kernels_and_products_and_copies_nothing(counted):
    for found, packed in zip(counted[:3], (False, False, True), strict=True):
        attention = [] if packed else ["_scaled_dot_product_cudnn_attention"]
        assert names(found["forward"], "library") == attention + ["addmm"] * 2 + ["mm"] * 3
        attention = [] if packed else ["_scaled_dot_product_cudnn_attention_backward"]
        assert names(found["backward"], "library") == attention + ["mm"] * 10
        expected = ["attention_forward"] * packed + ["gate_residual_adaln_forward"] * 2 + ["gelu_forward"]
        assert names(found["forward"], "ours") == expected
        # the gradients of qkv are packed where attention does not write them so, and summed for the bias
        large = {way: [name for kind, name, size in found[way] if kind == "inductor" and size > UNIT]
                 for way in ("forward", "backward")}  # fmt: skip
        assert large["forward"] == []
        assert ["clone" in name and "sum" not in name for name in large["backward"]] == [True] * (not packed) + [False]


def test_fp8_multiplies_in_fp8_and_reads_an_operand_once(counted):
    fp8, d = counted[3], BLOCK.hidden
    assert [names(fp8[way], "library").count("_scaled_mm") for way in ("forward", "backward")] == [4, 8]
    qkv = UNIT // 2 + 3 * d * d + 3 * UNIT + 2 * 3 * d + 2 * 4  # input and weight a byte each, the rest bf16; scales
    assert ["library", "_scaled_mm", qkv] in fp8["forward"]
    # what no other kernel of ours writes in FP8: forward, the input of proj, and four weights; backward, gradients of
    # qkv, proj and fc2. What the norms wrote is transposed
    casts = {way: [size for _, name, size in fp8[way] if name == "fp8_cast"] for way in ("forward", "backward")}
    assert [len(casts[way]) for way in casts] == [5, 3]
    assert [size for _, name, size in fp8["forward"] if name == "fp8_transpose"] == [UNIT, UNIT]
    least = 2 * UNIT  # bf16 read, a byte written in both layouts; then the largest magnitudes
    assert sum(size >= least for size in casts["forward"]) == 1
    assert sum(casts["backward"]) == pytest.approx(5 * least, rel=0.01)
    for way, factor in (("forward", 4 * (2 + 2)), ("backward", 4 * (2 + 2 + 2))):
        (gelu,) = [size for _, name, size in fp8[way] if name == f"gelu_fp8_{way}"]
        assert gelu == pytest.approx(factor * UNIT / 2, rel=0.02)
    large = [name for kind, name, size in fp8["backward"] if kind == "inductor" and size > UNIT]
    assert len(large) == 1 and "select_backward" in large[0]  # packs the gradients of qkv, which cuDNN returns apart


def test_attention_between_fp8_linears_leaves_no_cast_behind(counted):
    """Neither of its output nor of its gradient; the rest is as without."""
    bf16, other, fp8 = counted[2:]
    for way, casts, kernels in (("forward", 4, ["forward"]), ("backward", 2, ["backward_kv", "backward_q"])):
        ours = names(fp8[way], "ours")
        assert ours.count("fp8_cast") == casts  # weights; gradients of proj and fc2
        assert [name for name in ours if "attention" in name] == [f"attention_{name}" for name in kernels]
        kept = {name for name in names(other[way], "ours") if name != "fp8_cast"}
        assert {name for name in ours if name != "fp8_cast" and "attention" not in name} == kept
        assert not [name for kind, name, size in fp8[way] if kind == "inductor" and size > UNIT]
    beside = [
        sum(size for way in ("forward", "backward") for _, name, size in found[way]
            if size > UNIT / 2 and name not in ("mm", "addmm", "_scaled_mm"))
        for found in (bf16, fp8)
    ]  # fmt: skip
    one_kernel = "attention_backward_whole" in names(bf16["backward"], "ours")  # bf16's on an H200 with Triton 3.6
    assert beside[1] < (1.19 if one_kernel else 1.05) * beside[0]  # bytes of what is not a product


def test_fp8_moves_a_twentieth_more_than_bf16_at_most_in_what_is_not_a_product():
    lines = map(json.loads, (ROOT / "bench/results/count.jsonl").read_text().splitlines())
    by_kind = {tuple(line["overrides"]): line["mb_per_image_by"] for line in lines}
    ours = ("training.residual=bf16", "model.attention=triton")
    fp8 = by_kind[ours[0], "training.fp8=true", ours[1], "training.fp8_attention=true"]
    bf16 = by_kind[ours]
    assert sum(fp8.values()) - fp8["products"] <= 1.05 * (sum(bf16.values()) - bf16["products"])


def test_bytes_of_calls_are_those_worked_out_by_hand(counted):
    from fastdit.kernels import OPS

    n, d, bf16 = BLOCK.batch, BLOCK.hidden, counted[1]
    calls = {(name, size) for way in ("forward", "backward") for _, name, size in bf16[way]}
    assert ("addmm", 4 * UNIT + 2 * (3 * d * d + 3 * d)) in calls  # qkv
    assert ("mm", 5 * UNIT + 2 * 4 * d * d) in calls  # fc1, fc2
    assert ("_scaled_dot_product_cudnn_attention", 4 * UNIT + 4 * n * BLOCK.heads * 256 + 16) in calls  # and logsumexp
    for op, shape in (("gate_residual_adaln", (n, 256, d)), ("gelu", (n, 256, 4 * d))):
        for way, least in zip(("forward", "backward"), OPS[op].minimum_bytes(shape, 2), strict=True):
            sizes = {size for name, size in calls if name == f"{op}_{way}"}
            assert sizes and all(least <= size < 1.12 * least for size in sizes), (op, way)  # partial sums in fp32


def test_a_block_moves_little_more_than_it_must(counted):
    plain, bf16 = ([moved(found[way]) for way in ("forward", "backward")] for found in counted[:2])
    least = BLOCK.batch * sum(count.least_bytes(BLOCK).values())
    assert least < sum(bf16) < 1.25 * least
    # of each of the two additions: x read and written, its gradient read and written and x read again, at 2 bytes less
    assert [a - b for a, b in zip(plain, bf16, strict=True)] == [2 * 2 * UNIT, 2 * 3 * UNIT]


def test_least_bytes_are_the_published_ones_and_eager_bytes_are_counted():
    xl = {name: 28 * value / 1e6 for name, value in count.least_bytes(SIZES["XL/2"]).items()}
    assert xl["attention"] == pytest.approx(198, rel=0.01) and xl["GELU"] == pytest.approx(132 + 198, rel=0.01)
    assert xl["gate, residual, norm, modulate"] == pytest.approx(132 + 198, rel=0.01)
    a, b = torch.ones(100), torch.ones(100)
    with count.Bytes() as moved:
        torch.add(a, b).view(10, 10)
    assert moved.total == 3 * 400
    with count.Bytes() as moved:
        torch._foreach_lerp_([a], [b], 0.5)
    assert moved.total == 3 * 400


@pytest.mark.parametrize("precision, one_pass, expected", [("fp32", False, 44), ("fp32", True, 40), ("bf16", True, 38)])
def test_the_optimizer_reads_the_gradients_and_leaves_them(one_thread, precision, one_pass, expected):
    """Weight, moments, gradient: 28; norm: 4; average: 8 in the same pass, else 12 with the weight read again. In bf16
    the gradient and its norm are 4 less, and the weight's copy is 2 more."""
    overrides = [f"training.precision={precision}"] + ["training.grad_clip=1"] * one_pass
    bytes_, parameters = count.optimizer_bytes(SMALLEST, tuple(overrides), one_pass)
    assert round(bytes_ / parameters) == expected
