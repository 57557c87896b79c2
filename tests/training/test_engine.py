"""What TorchEngine does on a GPU: AdamW and EMA in one kernel, against PyTorch's optimizer, and weights that the kernel
rounds to bf16, against autocast, which rounds them in every forward pass."""

import copy

import pytest
import torch
from torch import nn

from fastdit.distributed import Ranks
from fastdit.kernels.runtime import HAS_TRITON
from fastdit.training import engine
from fastdit.training.ema import EMA
from fastdit.training.engine import TorchEngine, moments_of, set_moments, total_norm
from helpers.networks import each_option, small

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BAD = {2: "loss", 4: "gradient"}  # steps that are skipped, and why


class Net(nn.Module):
    """Weights of awkward sizes."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(7, 411), nn.Linear(411, 3)

    def forward(self, x, t, y):
        return self.second(self.first(x).tanh()) + t[:, None]


class Run:
    """An engine with its EMA after `init`, in one pass or with PyTorch's optimizer."""

    def __init__(self, monkeypatch, one_pass: bool, grad_clip: float, other: "Run | None" = None):
        torch.manual_seed(0)
        monkeypatch.setenv("FASTDIT_KERNELS", "triton" if one_pass else "eager")
        self.net = (copy.deepcopy(other.net) if other else Net()).to(DEVICE)
        ranks = Ranks(0, 0, 1, DEVICE)
        options = dict(betas=(0.8, 0.95), weight_decay=0.1, precision="fp32", accumulation=1, grad_clip=grad_clip)
        self.engine = TorchEngine(self.net, ranks, **options)
        self.ema = EMA(self.engine.master_parameters(), 0.9, warmup=True)
        self.monkeypatch, self.one_pass = monkeypatch, one_pass
        assert self.engine.one_pass == one_pass
        if other:  # as a checkpoint does
            moments, updates = moments_of(other.engine)
            set_moments(self.engine, moments, updates)
            self.ema.load(other.ema.average)

    def steps(self, start: int, stop: int) -> "Run":
        self.monkeypatch.setenv("FASTDIT_KERNELS", "triton" if self.one_pass else "eager")
        for step in range(start, stop):
            rng = torch.Generator().manual_seed(step)
            x, t, y = (torch.randn(5, *size, generator=rng).to(DEVICE) for size in ((7,), (), (3,)))
            loss = (self.engine(x, t, y) - y).square().mean()
            self.engine.backward(loss * (torch.inf if BAD.get(step) == "gradient" else 1))
            bad = torch.tensor(BAD.get(step) == "loss", device=DEVICE)
            norm, skipped = self.engine.step(0.01 / (1 + step), bad, self.ema, step + 1)
            assert bool(skipped) == (step in BAD) and norm.isfinite() == (BAD.get(step) != "gradient")
            assert all(p.grad is None for p in self.net.parameters())
        return self

    def state(self) -> list[torch.Tensor]:
        moments, updates = moments_of(self.engine)
        weights = [weight.detach() for weight in self.engine.master_parameters()]
        rows = [weights, self.ema.average, *moments.values(), [torch.tensor(updates)]]
        return [tensor.clone() for row in rows for tensor in row]


@pytest.mark.parametrize("grad_clip", [0.0, 0.3])
def test_one_pass_follows_pytorchs_optimizer(monkeypatch, grad_clip):
    ours, theirs = (Run(monkeypatch, one_pass, grad_clip).steps(0, 7) for one_pass in (True, False))
    assert ours.state()[-1] == theirs.state()[-1] == 7 - len(BAD)
    for mine, expected in zip(ours.state(), theirs.state(), strict=True):
        torch.testing.assert_close(mine, expected, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("bad", BAD)
def test_a_skipped_step_changes_nothing(monkeypatch, bad):
    run = Run(monkeypatch, True, 0.3).steps(0, bad)
    before = run.state()
    assert all(map(torch.equal, before, run.steps(bad, bad + 1).state()))
    assert not torch.equal(before[0], run.steps(bad + 1, bad + 2).state()[0])


@pytest.mark.parametrize("before, after", [(True, True), (True, False), (False, True)])
def test_a_run_continues_from_the_others_moments(monkeypatch, before, after):
    """Bit for bit with the same optimizer."""
    whole = Run(monkeypatch, before, 0.3).steps(0, 3)
    resumed = Run(monkeypatch, after, 0.3, whole).steps(3, 7).state()
    exactly = before == after
    for mine, expected in zip(resumed, whole.steps(3, 7).state(), strict=True):
        torch.testing.assert_close(mine, expected, rtol=0 if exactly else 2e-6, atol=0 if exactly else 2e-7)


@each_option
def test_weights_rounded_by_the_optimizer_give_the_bits_of_autocast(monkeypatch, options):
    """Losses, weights, moments and averages; the op's definition rounds, since the interpreter truncates."""
    monkeypatch.setattr(engine, "use_triton", lambda *_: True)
    found = []
    for rounds in (True, False):
        if not rounds:
            monkeypatch.setattr(engine, "rounded_weights", lambda model: set())
        model = small(**options).train()
        if options and model.options.block == "adaln_zero":
            model.join_modulations()
        torch_engine = TorchEngine(model, Ranks(0, 0, 1, torch.device("cpu")), betas=(0.9, 0.95), weight_decay=0.1,
                                   precision="bf16", accumulation=1, grad_clip=0.0)  # fmt: skip
        assert {p.dtype for p in model.parameters()} == {torch.float32, *[torch.bfloat16] * rounds}
        assert {p.dtype for p in torch_engine.master_parameters()} == {torch.float32}
        ema = EMA(torch_engine.master_parameters(), 0.9)
        for step in range(3):
            torch.manual_seed(step)
            height, width = (side * model.patch_size for side in model.grid)
            x, t, y = torch.randn(3, 4, height, width), torch.rand(3), torch.randint(0, 6, (3,))
            loss = torch_engine(x, t, y if model.num_classes else None).square().mean()
            torch_engine.backward(loss)
            torch_engine.step(0.01, torch.tensor(step == 1), ema, step + 1)
            found.append(loss.detach())
        moments, _ = moments_of(torch_engine)
        rows = (torch_engine.master_parameters(), ema.average, *moments.values())
        found += [tensor.detach() for row in rows for tensor in row]
        for p, master in zip(model.parameters(), torch_engine.master_parameters(), strict=True):
            assert torch.equal(p, master.to(p.dtype))
    half = len(found) // 2
    assert all(map(torch.equal, found[:half], found[half:]))


def test_the_norm_of_bf16_gradients_is_not_rounded_to_bf16():
    gradients = [torch.randn(1000).bfloat16(), torch.randn(30), torch.randn(77).bfloat16()]
    expected = torch.cat([gradient.double() for gradient in gradients]).norm()
    assert total_norm(gradients).item() == pytest.approx(expected.item(), rel=1e-6)
