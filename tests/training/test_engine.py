"""AdamW and EMA in one kernel, as TorchEngine runs them on a GPU, against PyTorch's optimizer, as it runs elsewhere."""

import copy

import pytest
import torch
from torch import nn

from fastdit.distributed import Ranks
from fastdit.kernels.runtime import HAS_TRITON
from fastdit.training.ema import EMA
from fastdit.training.engine import TorchEngine, moments_of, set_moments

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
