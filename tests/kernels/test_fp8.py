"""FP8 operands: every fused cast against the cast of what the unfused kernel computes, bit for bit."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastdit import kernels
from fastdit.kernels import (
    OPS,
    attention_fp8_backward,
    attention_fp8_forward,
    fp8_cast,
    fp8_cast_and_sum,
    fp8_transpose,
    gate_residual_adaln_fp8,
    largest,
)
from fastdit.kernels.fp8 import FORWARD, GRADIENT, fp8_cast_eager
from helpers.kernels import DEVICE, DTYPES

ROOT = Path(__file__).parents[2]
FORMATS = (FORWARD, GRADIENT)
SHAPES = [(41, 96), (130, 72), (16, 1152), (1, 16)]  # rows and columns that fill no tile, and one that does
KINDS = {"gelu": 1, "swiglu": 2}  # halves


@pytest.fixture(autouse=True)
def triton_only(monkeypatch):
    monkeypatch.setenv("FASTDIT_KERNELS", "triton")


def wide(m: int, d: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal values over ten orders of magnitude: some vanish in FP8, some exceed its range."""
    rng = torch.Generator().manual_seed(m)
    return (torch.randn(m, d, generator=rng) * torch.logspace(-6, 4, d)).to(DEVICE, dtype)


def at(value: float) -> torch.Tensor:
    return torch.tensor([value], device=DEVICE)


def assert_same(got: tuple, expected: tuple, alike: bool = False) -> None:
    """Rows, columns and largest magnitude; -0 counts as 0 in the padding alone.

    `alike`: the values may come from another kernel, in which a GPU contracts other products and sums: one in a
    thousand may then be rounded to the other neighbor.
    """
    m = len(expected[0])
    if alike and DEVICE == "cuda":
        for a, b in ((got[0], expected[0]), (got[1][:, :m], expected[1][:, :m])):
            assert (a.view(torch.uint8) != b.view(torch.uint8)).float().mean() < 1e-3
            torch.testing.assert_close(a.float(), b.float(), rtol=0.3, atol=1e-3)
        torch.testing.assert_close(got[2].max(), expected[2].max())
        return
    for a, b in zip(got[:2], expected[:2], strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
    assert torch.equal(got[0].view(torch.uint8), expected[0].view(torch.uint8))
    assert torch.equal(got[1][:, :m].contiguous().view(torch.uint8), expected[1][:, :m].contiguous().view(torch.uint8))
    assert not got[1][:, m:].float().any()
    assert got[2].max() == expected[2].max()


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_casts_as_the_definition_does(shape, source, dtype):
    x = wide(*shape, source)
    assert_same(fp8_cast(x, at(4.0), dtype), fp8_cast_eager(x, at(4.0), dtype))


@pytest.mark.parametrize("dtype", FORMATS)
def test_casts_views(dtype):
    x = wide(41, 96)
    expected = fp8_cast_eager(x, at(0.5), dtype)
    for view in (torch.nn.functional.pad(x, (3, 5))[:, 3:-5], x.T.contiguous().T):
        assert_same(fp8_cast(view, at(0.5), dtype), expected)


@pytest.mark.parametrize("dtype", FORMATS)
def test_nan_stays_and_infinity_saturates_but_is_seen(dtype):
    x = torch.ones(3, 16, device=DEVICE)
    x[0, 1], x[1, 2], x[2, 3] = math.nan, math.inf, -math.inf
    for cast in (fp8_cast, fp8_cast_eager):
        rows, columns, most = cast(x, at(1.0), dtype)
        for values in (rows.float(), columns.float().T[:3]):
            assert values[0, 1].isnan() and values.isnan().sum() == 1
            assert values[1, 2] == -values[2, 3] == torch.finfo(dtype).max
        assert cast(x[1:], at(1.0), dtype)[2].max() == math.inf


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_an_activation_casts_what_it_would_return(kind, shape, bias):
    """Forward and backward: the same bits as the unfused kernel in fp32, then the cast; and the same bias gradient."""
    (m, d), halves = shape, KINDS[kind]
    x = wide(m, halves * d).clamp(-20, 20).requires_grad_()
    bias = torch.linspace(-1, 1, halves * d, device=DEVICE).requires_grad_() if bias else None
    d_y = wide(m, d).flip(1) * 1e-4
    activation, fused = getattr(kernels, kind), getattr(kernels, f"{kind}_fp8")
    y = activation(x, bias)
    y.backward(d_y)
    with torch.no_grad():
        assert_same(fused.forward(x, bias, at(16.0)), fp8_cast_eager(y, at(16.0), FORWARD), alike=True)
        rows, columns, d_bias, most = fused.backward(d_y, x, bias, at(2.0**18))
        assert_same((rows, columns, most), fp8_cast_eager(x.grad, at(2.0**18), GRADIENT), alike=True)
        if bias is not None:
            torch.testing.assert_close(d_bias, bias.grad)
        else:
            assert d_bias is None


@pytest.mark.parametrize("kind", KINDS)
def test_the_eager_definition_is_the_cast_of_eager(kind, monkeypatch):
    """What a CPU computes without Triton: the same, up to the rounding of the activation in fp32."""
    halves = KINDS[kind]
    x, bias = wide(41, halves * 96).clamp(-20, 20).requires_grad_(), torch.ones(halves * 96, device=DEVICE)
    d_y, fused = wide(41, 96).flip(1) * 1e-4, getattr(kernels, f"{kind}_fp8")
    OPS[kind].eager(x, bias).backward(d_y)
    monkeypatch.setenv("FASTDIT_KERNELS", "eager")
    with torch.no_grad():
        assert_same(fused.forward(x, bias, at(16.0)), fp8_cast_eager(OPS[kind].eager(x, bias), at(16.0), FORWARD))
        rows, _, d_bias, most = fused.backward(d_y, x, bias, at(2.0**18))
    expected = fp8_cast_eager(x.grad, at(2.0**18), GRADIENT)
    assert (rows.view(torch.uint8) != expected[0].view(torch.uint8)).float().mean() < 1e-3
    torch.testing.assert_close(d_bias, x.grad.sum(0))
    torch.testing.assert_close(most.max(), expected[2].max())


def test_the_largest_magnitudes_of_a_linear():
    parts = [torch.rand(size, device=DEVICE) for size in (1, 5000, 97)]
    assert largest(*parts).tolist() == [part.max().item() for part in parts]


@pytest.mark.parametrize("shape", SHAPES)
def test_casts_and_sums(shape, monkeypatch):
    x = wide(*shape)
    *parts, total = fp8_cast_and_sum(x, at(4.0), GRADIENT)
    assert_same(tuple(parts), fp8_cast(x, at(4.0), GRADIENT))
    exact, rounding = x.double().sum(0), 1e-6 * x.double().abs().sum(0)
    monkeypatch.setenv("FASTDIT_KERNELS", "eager")
    for found in (total, fp8_cast_and_sum(x, at(4.0), GRADIENT)[3]):
        assert ((found - exact).abs() <= rounding).all()


@pytest.mark.parametrize("options", [{}, {"norm": "rms", "eps": 1e-2}, {"bias": None}], ids=str)
@pytest.mark.parametrize("shape", OPS["gate_residual_adaln"].shapes)
def test_the_norm_casts_what_it_would_return(shape, options):
    op = OPS["gate_residual_adaln"]
    values = op.inputs(shape, torch.float32, DEVICE) | options
    with torch.no_grad():
        x, h = op.triton(**values)
    rms, eps = values.pop("norm", "layer") == "rms", values.pop("eps", 1e-6)
    values = {name: None if value is None else value.detach() for name, value in values.items()}
    own_x, _, rows, most = gate_residual_adaln_fp8(**values, factor=at(32.0), eps=eps, rms=rms)
    assert torch.equal(own_x, x)
    assert_same((rows, fp8_transpose(rows), most), fp8_cast_eager(h.flatten(0, 1), at(32.0), FORWARD), alike=True)


ROUNDED_TWICE = {torch.float32: 0, torch.float16: 0.01, torch.bfloat16: 0.05}  # the share of values, through its dtype


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(2, 2, 42, 72), (1, 3, 64, 64), (3, 1, 38, 24), (1, 2, 2, 8)] + [(4, 16, 256, 72)] * (DEVICE == "cuda")
)
def test_attention_casts_what_it_would_return(shape, dtype):
    """Forward and backward, and the sums for the bias. Its sums in fp32 are rounded to FP8, not what it stores."""
    n, heads, tokens, head_dim = shape
    qkv = OPS["attention_packed"].inputs(shape, dtype, DEVICE)["qkv"]
    out, lse = torch.ops.fastdit.attention_packed(qkv, head_dim**-0.5)
    d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    d_out = (d_out * torch.logspace(-2, 2, head_dim, device=DEVICE)).to(dtype)
    out.backward(d_out)
    with torch.no_grad():
        own, own_lse, *parts = attention_fp8_forward(qkv, at(16.0))
        assert torch.equal(own_lse, lse) and torch.equal(own, out)
        gradient = attention_fp8_backward(d_out, qkv, out, lse, at(2.0**8))
    for got, value, factor, low in ((parts, out, 16.0, FORWARD), (gradient, qkv.grad, 2.0**8, GRADIENT)):
        value = value.reshape(n * tokens, -1)
        expected = fp8_cast_eager(value, at(factor), low)
        if dtype == torch.float32:
            assert_same(got[:3], expected, alike=True)
            continue
        assert_same((got[0], got[1], expected[2]), (got[0], fp8_transposed(got[0]), expected[2]))
        assert (got[0].float() != expected[0].float()).float().mean() <= ROUNDED_TWICE[dtype]
        torch.testing.assert_close(got[0].float(), expected[0].float(), rtol=0.3, atol=1e-4)
        torch.testing.assert_close(got[2].max(), expected[2].max(), rtol=torch.finfo(dtype).eps, atol=0)
    rounding = 1e-6 + 2 * torch.finfo(dtype).eps * qkv.grad.double().abs().reshape(n * tokens, -1).sum(0)
    assert ((gradient[3] - qkv.grad.double().reshape(n * tokens, -1).sum(0)).abs() <= rounding).all()


def fp8_transposed(rows: torch.Tensor) -> torch.Tensor:
    """The columns that belong to these rows."""
    padding = -len(rows) % 16
    return torch.nn.functional.pad(rows.view(torch.uint8).T, (0, padding)).contiguous().view(rows.dtype)


def test_rows_past_the_end_do_not_count_in_attentions_largest_magnitude():
    """They would have the mean of the values. Here all queries attend to a key with a value of 0."""
    qkv = torch.ones(1, 2, 3, 1, 8, device=DEVICE)
    qkv[:, 0, 1], qkv[:, 0, 2] = 9, 0
    out, _, _, _, most = attention_fp8_forward(qkv, at(1.0))
    assert most.max() == out.abs().max() < 1e-3


def test_attention_for_fp8_refuses_sequences_that_are_too_long():
    with pytest.raises(ValueError, match="exceeds 1024"):
        attention_fp8_forward(torch.empty(1, 1026, 3, 1, 8, device=DEVICE), at(1.0))


STATIC = """
import json, re
import torch
from bench.static import kernels as static
from bench.static.cuda_target import cuobjdump
from fastdit.kernels import OPS, fp8_transpose, runtime
from fastdit.kernels.fp8 import FORWARD, GRADIENT

def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")

built = []
compile = static.triton.compile

def keep(*args, **kwargs):
    built.append(compile(*args, **kwargs))
    return built[-1]

static.triton.compile = keep
m, d, one, ops = 65536, 1152, meta(1, dtype=torch.float32), torch.ops.fastdit
with runtime.record_launches() as launches:
    ops.fp8_cast(meta(m, 3 * d), one, GRADIENT, True)
    ops.fp8_cast(meta(4 * d, d, dtype=torch.float32), one, FORWARD, False)
    fp8_transpose(meta(m, d, dtype=FORWARD))
    for name, wide in (("gelu", 1), ("swiglu", 2)):
        x, bias = meta(m, wide * 3072), meta(wide * 3072, dtype=torch.float32)
        getattr(ops, f"{name}_fp8")(x, bias, one)
        getattr(ops, f"{name}_backward_fp8")(meta(m, 3072), x, bias, one)
    values = OPS["gate_residual_adaln"].inputs((256, 256, d), torch.bfloat16, "meta")
    values = {name: value.detach() for name, value in values.items()}
    ops.gate_residual_adaln_fp8(**values, factor=one, eps=1e-6, rms=False)
    qkv, out = meta(256, 256, 3, 16, 72), meta(256, 256, 16, 72)
    ops.attention_fp8(qkv, one)
    ops.attention_backward_fp8(out, qkv, out, meta(256, 16, 256, dtype=torch.float32), one)
for launch, sm in ((launch, sm) for sm in (90, 100) for launch in launches):
    if "sum_chunks" not in launch[0].__name__:
        row = static.build(launch, sm)
        sass = cuobjdump(built[-1].asm["cubin"], "-sass")
        row["merged"] = re.findall(r"(?:F2FP|PRMT)[^;]*\\bR1\\b[^;]*", sass)
        row["widths"] = dict(row["widths"])
        print(json.dumps(row))
"""


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU the values themselves are compared")
def test_the_code_for_hopper_and_blackwell_spills_nothing_and_merges_no_value_with_the_stack_pointer():
    """ptxas 12.8 did the latter, with FP8 values that were stored both whole and in parts: the bytes were wrong."""
    env = os.environ | {"TRITON_INTERPRET": "0", "FASTDIT_KERNELS": "triton"}
    done = subprocess.run([sys.executable, "-c", STATIC], env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [row["sm"] for row in rows] == [90] * 11 + [100] * 11
    for row in rows:
        assert (row["spills"], row["merged"]) == (0, []), row
        assert row["widths"]["load 128"] > 0 and row["widths"]["store 128"] > 0, row
