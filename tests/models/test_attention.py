"""Attention backends agree where they run, and are refused with a reason where they cannot."""


import pytest
import torch
import torch.nn.functional as F

from bench.kernels.attention import inputs, run
from fastdit import kernels
from fastdit.models import attention as room
from fastdit.models.attention import ATTENTION, PACKED, attention, obstacle, packed_attention, resolve, table_key
from fastdit.models.layers import Attention
from fastdit.schema import NetworkOptions

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture
def gpu(monkeypatch):
    """Pretend to be a GPU with a given name and compute capability, and every package installed."""

    def pretend(name, capability, installed=True):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
        monkeypatch.setattr(room.importlib.util, "find_spec", lambda module: object() if installed else None)

    return pretend


def test_backends_agree_with_eager_in_output_and_gradient_on_packed_views():
    for shape in ((3, 2, 41, 72), (1, 3, 64, 64)):
        qkv, grad = inputs(*shape, "cpu")
        qkv, grad = qkv.detach().float().requires_grad_(), grad.float()
        for name in ("sdpa", "cpu"):
            for ours, wanted in zip(run(name, qkv, grad), run("eager", qkv, grad), strict=True):
                torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-5)


def test_the_networks_attention_runs_our_kernel(monkeypatch):
    """In Triton's interpreter if there is no GPU. The gradient of the packed q, k, v is compared too."""
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    monkeypatch.setenv("FASTDIT_KERNELS", "triton")
    torch.manual_seed(0)
    layer = Attention(144, 2, NetworkOptions()).to(device, torch.float16)  # two heads of 72
    x = torch.randn(2, 19, 144, device=device, dtype=torch.float16, requires_grad=True)
    results = {}
    for layer.backend in ("eager", "triton"):
        out, bias = layer(x)
        results[layer.backend] = out, *torch.autograd.grad((out + bias).square().sum(), (x, layer.qkv.weight))
    for ours, wanted in zip(results["triton"], results["eager"], strict=True):
        torch.testing.assert_close(ours, wanted, atol=2e-3, rtol=2e-3)
        assert not torch.equal(ours, wanted)


@pytest.mark.parametrize("backend", sorted({*ATTENTION, *PACKED} - {"cpu", "eager"}))
def test_fp32_runs_in_pytorchs_attention(monkeypatch, backend):
    """The others do not support it, or, as our kernels, use no tensor cores."""
    monkeypatch.setenv("FASTDIT_KERNELS", "triton")
    monkeypatch.setattr(kernels.runtime.wrap_triton, "_launch", lambda *_, **__: pytest.fail("launched"))
    qkv = torch.randn(2, 5, 3, 2, 8)
    expected = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4)).transpose(1, 2)
    assert torch.equal(packed_attention(qkv, backend), expected)
    assert torch.equal(attention(*qkv.permute(2, 0, 3, 1, 4), backend).transpose(1, 2), expected)


def test_our_kernel_is_refused_where_it_cannot_run(gpu, monkeypatch):
    gpu("NVIDIA H200", (9, 0))
    assert obstacle("triton", device=CUDA, head_dim=72, tokens=1024) is None
    assert "at most 1024 tokens" in obstacle("triton", device=CUDA, head_dim=72, tokens=4096)
    monkeypatch.setenv("FASTDIT_KERNELS", "eager")
    assert obstacle("triton", device=CUDA, head_dim=72, tokens=256) == "FASTDIT_KERNELS=eager"


@pytest.mark.parametrize("name", [name for name in ATTENTION if name not in ("sdpa", "cpu", "eager")])
def test_gpu_backends_are_refused_on_a_cpu(name):
    with pytest.raises(ValueError, match=f"model.attention='{name}' does not work here: .* use auto or sdpa"):
        resolve(name, device=CPU, head_dim=64, tokens=256)
    assert resolve("auto", device=CPU, head_dim=64, tokens=256) == "cpu"


def test_flash_attention_4_is_refused_where_its_gradients_are_wrong(gpu):
    gpu("NVIDIA H200", (9, 0))
    assert "silently wrong at head_dim=72" in obstacle("flash-attn-4", device=CUDA, head_dim=72, tokens=256)
    assert obstacle("flash-attn-4", device=CUDA, head_dim=64, tokens=256) is None
    gpu("NVIDIA A100", (8, 0))
    assert "rejects" in obstacle("flash-attn-4", device=CUDA, head_dim=64, tokens=256)
    assert "Hopper" in obstacle("flash-attn-3", device=CUDA, head_dim=64, tokens=256)
    gpu("NVIDIA H200", (9, 0), installed=False)
    assert obstacle("flash-attn", device=CUDA, head_dim=64, tokens=256) == "flash_attn is not installed"


def test_auto_takes_what_was_measured_and_else_the_gpus_default(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(room, "MEASURED", tmp_path / "attention.json")
    gpu("NVIDIA H200", (9, 0))
    assert resolve("auto", device=CUDA, head_dim=72, tokens=256) == "sdpa-cudnn"
    (tmp_path / "attention.json").write_text(f'{{"{table_key("NVIDIA H200", 72, 256)}": "sdpa-flash"}}')
    assert resolve("auto", device=CUDA, head_dim=72, tokens=256) == "sdpa-flash"
    assert resolve("auto", device=CUDA, head_dim=72, tokens=1024) == "sdpa-cudnn"
    # a register more, or heads that cuDNN has no kernel for, are PyTorch's to choose for
    assert resolve("auto", device=CUDA, head_dim=72, tokens=260) == "sdpa"
    assert resolve("auto", device=CUDA, head_dim=144, tokens=1024) == "sdpa"
    gpu("NVIDIA A100", (8, 0))
    assert resolve("auto", device=CUDA, head_dim=72, tokens=256) == "sdpa-flash"


@pytest.mark.parametrize("name", ["NVIDIA H200", "NVIDIA H100 80GB HBM3"])
def test_auto_knows_hopper_from_the_table_that_is_shipped(gpu, name):
    gpu(name, (9, 0))
    for head_dim, tokens in ((64, 256), (72, 256), (64, 1024), (72, 1024)):
        assert resolve("auto", device=CUDA, head_dim=head_dim, tokens=tokens) == "triton"
    assert resolve("auto", device=CUDA, head_dim=72, tokens=4096) == "sdpa-cudnn"


@pytest.mark.parametrize("name", [name for name in ATTENTION if name.startswith(("sdpa-", "flash-"))])
def test_half_precision_kernels_leave_fp32_to_pytorch(name):
    """Sampling and the likelihood compute in fp32 by default, whatever backend was used in training."""
    q, k, v = torch.randn(3, 2, 3, 41, 72).unbind()
    wanted = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(attention(q, k, v, name), wanted)
    packed = torch.stack([q, k, v]).permute(1, 3, 0, 2, 4)  # (N, T, 3, heads, d)
    torch.testing.assert_close(packed_attention(packed, name), wanted.transpose(1, 2))


@pytest.mark.parametrize(("name", "head_dim"), [("cpu", 64), ("sdpa-cudnn", 36), ("sdpa-cudnn", 144)])
def test_what_a_gpu_has_no_kernel_for_is_refused_there(gpu, name, head_dim):
    gpu("NVIDIA H200", (9, 0))
    with pytest.raises(ValueError, match=f"model.attention='{name}' does not work here: .* use auto or sdpa"):
        resolve(name, device=CUDA, head_dim=head_dim, tokens=256)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_backends_that_run_on_this_gpu_are_right():
    from attention import TOLERANCE, error

    ran = [name for name in ATTENTION if not obstacle(name, device=CUDA, head_dim=72, tokens=256)]
    assert "sdpa-flash" in ran
    for name in ran:
        assert error(name, 16, 256, 72, "cuda") < TOLERANCE, name
