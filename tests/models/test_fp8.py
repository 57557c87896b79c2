"""FP8 products: torchao's rounding where it should be, and losses that stay beside bf16's."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastdit.models.dit import create_dit
from fastdit.models.layers import Linear
from helpers.runs import losses, train_here

pytest.importorskip("torchao", reason="training.fp8 needs torchao")
from fastdit.models.fp8 import use_fp8  # noqa: E402


def rounded(x, dtype=torch.float8_e4m3fn):
    """x as an FP8 tensor with one scale holds it."""
    scale = torch.finfo(dtype).max / x.abs().max()
    return (x * scale).to(dtype).to(x.dtype) / scale


@pytest.fixture
def model():
    torch.manual_seed(0)
    made = create_dit("DiT-2x64x4/2", input_size=8, num_classes=10)
    for parameter in made.parameters():  # gates and head start at zero
        nn.init.normal_(parameter, std=0.1)
    use_fp8(made)
    return made


def test_output_and_gradients_are_those_of_rounded_operands(model):
    linear = model.blocks[0].attn.qkv
    x = torch.randn(3, 16, 64, requires_grad=True)
    grad = torch.randn(3, 16, 192)
    linear(x).backward(grad)
    with torch.no_grad():
        w, rows, d = rounded(linear.weight), rounded(x).flatten(0, 1), rounded(grad, torch.float8_e5m2).flatten(0, 1)
        torch.testing.assert_close(linear(x).flatten(0, 1), F.linear(rows, w, linear.bias), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(x.grad.flatten(0, 1), d @ w, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(linear.weight.grad, d.T @ rows, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(linear(x), F.linear(x, linear.weight, linear.bias), atol=1e-2)


def test_the_blocks_linears_and_no_other_multiply_in_fp8(model):
    fp8 = {name for name, m in model.named_modules() if getattr(m, "multiply", None) is not None}
    of_a_block = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert fp8 == {f"blocks.{i}.{name}" for i in range(2) for name in of_a_block}
    assert fp8 == {name for name, m in model.named_modules() if isinstance(m, Linear)}
    plain = create_dit("DiT-2x64x4/2", input_size=8, num_classes=10)
    assert list(model.state_dict()) == list(plain.state_dict())


def test_blocks_compile_whole_to_the_same_values(model):
    """One of them without Inductor, which takes long."""
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 700.0]), torch.tensor([1, 10])
    with torch.autocast("cpu", torch.bfloat16):
        eager = model(x, t, y).float()
        for block, backend in zip(model.blocks, ("inductor", "aot_eager"), strict=True):
            block.compile(fullgraph=True, backend=backend)
        torch.testing.assert_close(model(x, t, y).float(), eager, atol=0.05, rtol=0.05)


def test_losses_on_digits_stay_beside_bf16s(world, tmp_path, one_thread):
    runs = {}
    for fp8 in (False, True):
        train_here(world, tmp_path / str(fp8), f"training.fp8={fp8}")
        runs[fp8] = losses(tmp_path / str(fp8))
    assert runs[True] != runs[False]
    assert runs[True] == pytest.approx(runs[False], rel=0.01)


@pytest.mark.parametrize("wrong", [
    ("training.fp8=true training.precision=fp32", "use training.precision=bf16 with it"),
    ("training.fp8=true training.zero_stage=3", "use training.zero_stage=1 or 2 with it"),
    ("training.fp8=true model.variant=DiT-2x40x2/2", "multiples of 16, but blocks.0.attn.qkv is 40 x 120; use false"),
])  # fmt: skip
def test_what_fp8_cannot_do_is_refused(world, tmp_path, wrong):
    overrides, message = wrong
    with pytest.raises(ValueError, match=message):
        train_here(world, tmp_path / "run", *overrides.split())


def test_gpus_before_ada_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    on_gpu = SimpleNamespace(parameters=lambda: iter([SimpleNamespace(device=torch.device("cuda"))]))
    with pytest.raises(ValueError, match="needs compute capability 8.9"):
        use_fp8(on_gpu)
