"""Muon: its update, what it leaves to AdamW, skipped steps, exact resume and processes."""

from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from fastdit.distributed import Ranks
from fastdit.memory import memory_bytes, muon_flops
from fastdit.training.ema import EMA
from fastdit.training.engine import TorchEngine, moments_of
from fastdit.training.muon import Muon
from helpers.networks import small
from helpers.runs import losses, run, train_here

pytestmark = pytest.mark.usefixtures("one_thread")
MUON = ["training.optimizer=muon", "training.steps=6", "training.checkpoint_every=3", "training.precision=fp32",
        "training.weight_decay=0.1"]  # fmt: skip


def engine_of(optimizer: str) -> TorchEngine:
    model = small(input_size=8, in_channels=3, hidden_size=16, num_heads=2, num_classes=4, learn_sigma=False)
    return TorchEngine(model, Ranks(0, 0, 1, torch.device("cpu")), betas=(0.9, 0.99), weight_decay=0.1,
                       precision="fp32", accumulation=1, grad_clip=0.0, optimizer=optimizer)  # fmt: skip


def step(engine: TorchEngine, ema: EMA, number: int, bad: bool = False) -> dict[str, torch.Tensor]:
    """One step on random data; returns the gradients."""
    torch.manual_seed(number)
    loss = engine(torch.randn(4, 3, 8, 8), torch.rand(4), torch.tensor([0, 1, 2, 4])).square().mean()
    engine.backward(loss)
    gradients = {name: p.grad.clone() for name, p in engine.module.named_parameters()}
    _, skipped = engine.step(0.01, torch.tensor(bad), ema, number)
    assert bool(skipped) == bad
    return gradients


def test_matrices_of_the_blocks_move_along_the_orthogonalized_momentum_and_the_rest_as_with_adamw():
    muon, adamw = engine_of("muon"), engine_of("adamw")
    before = {name: p.detach().clone() for name, p in muon.module.named_parameters()}
    for engine in (muon, adamw):
        gradients = step(engine, EMA(engine.master_parameters(), 0.9), 1)
    theirs = dict(adamw.module.named_parameters())
    matrices = 0
    for name, p in muon.module.named_parameters():
        if not (name.startswith("blocks.") and p.ndim == 2 and "adaLN" not in name):
            assert torch.equal(p, theirs[name]), name
            continue
        matrices += 1
        update = (before[name] * (1 - 0.01 * 0.1) - p.detach()) / 0.01 / (0.2 * max(p.shape) ** 0.5)
        u, s, v = torch.linalg.svd(update.double(), full_matrices=False)
        a, _, b = torch.linalg.svd(gradients[name].double(), full_matrices=False)
        kept = torch.linalg.svdvals(gradients[name].double()) > 1e-2 * torch.linalg.svdvals(gradients[name].double())[0]
        assert ((s[: int(kept.sum())] > 0.5) & (s[: int(kept.sum())] < 1.4)).all(), (name, s)  # Newton-Schulz's range
        overlap = torch.trace(a[:, kept].T @ update.double() @ b[kept].T) / kept.sum()
        assert overlap > 0.6, (name, overlap)  # the same singular vectors
    assert matrices == 8


def test_updates_equal_those_of_pytorchs_muon():
    torch.manual_seed(0)
    start = [torch.randn(shape) for shape in [(24, 8)] * 3 + [(8, 8), (8, 24)]]
    found = []
    for make in (partial(torch.optim.Muon, lr=0.0, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
                 partial(Muon, ranks=Ranks(0, 0, 1, torch.device("cpu")), weight_decay=0.1)):  # fmt: skip
        weights = [torch.nn.Parameter(weight.clone()) for weight in start]
        optimizer = make(weights)
        for number in range(3):
            optimizer.param_groups[0]["lr"] = 0.01 * (number + 1)
            for i, weight in enumerate(weights):
                weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(10 * number + i))
            optimizer.step()
        found.append(weights + [optimizer.state[weight]["momentum_buffer"] for weight in weights])
    theirs, ours = found
    moved = 0.2 * 24**0.5 * 0.06  # of the learning rates' sum, at most
    for a, b in zip(theirs, ours, strict=True):
        assert (a - b).abs().max() < moved * 2**-7, a.shape  # the products are in bf16


def test_the_plan_counts_the_flops_and_the_memory_of_muon():
    engine = engine_of("muon")
    for parameter in engine.module.parameters():
        parameter.grad = torch.randn_like(parameter)
    with FlopCounterMode(display=False) as counter:
        engine.muon.step()
    assert muon_flops(engine.module, world=1) == counter.get_total_flops()
    assert muon_flops(engine.module, world=3) == counter.get_total_flops() / 2  # of the two matrices of a shape, one
    kept = sum(tensor.numel() for state in engine.muon.state.values() for tensor in state.values())
    rest = sum(2 * p.numel() for p in engine.adam.param_groups[0]["params"])
    assert memory_bytes(engine.module, 1, "none", muon=True)["optimizer"] == 4 * (kept + rest)


def test_a_step_that_is_not_finite_changes_nothing():
    engine = engine_of("muon")
    ema = EMA(engine.master_parameters(), 0.9)
    step(engine, ema, 1, bad=True)
    moments, updates = moments_of(engine)
    assert updates == 0 and all(not tensor.any() for tensors in moments.values() for tensor in tensors)
    step(engine, ema, 2)
    before = [tensor.clone() for tensor in (*engine.masters, *moments_of(engine)[0]["exp_avg"])]
    step(engine, ema, 3, bad=True)
    after = [*engine.masters, *moments_of(engine)[0]["exp_avg"]]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_resume_is_exact_and_three_processes_give_the_same_run(world, tmp_path):
    whole = train_here(world, tmp_path / "whole", *MUON)
    train_here(world, tmp_path / "halves", *MUON, "training.steps=3")
    halves = train_here(world, tmp_path / "halves", *MUON, resume=True)
    assert losses(tmp_path / "halves") == losses(tmp_path / "whole")
    for path in whole.glob("*.safetensors"):
        ours, theirs = load_file(path), load_file(halves / path.name)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours), path.name
    common = ["--config", str(world / "config.yaml"), *MUON]
    run("train.py", *common, f"run_dir={tmp_path}/three", processes=3)  # the third has none of a shape's two matrices
    assert losses(tmp_path / "three") == pytest.approx(losses(tmp_path / "whole"), rel=1e-3)


@pytest.mark.parametrize("change, words", [
    (["training.engine=deepspeed"], "training.optimizer=muon needs whole matrices, but ZeRO partitions them"),
    (["training.cuda_graph=true"], "training.cuda_graph=True is out of range; use false with training.optimizer=muon"),
    (["training.optimizer=moun"], "training.optimizer='moun' is unknown; did you mean 'muon'?"),
], ids=str)  # fmt: skip
def test_what_does_not_compose_is_refused_in_words(world, tmp_path, change, words):
    with pytest.raises(ValueError) as error:
        train_here(world, tmp_path / "run", *MUON, *change)
    assert words in str(error.value)
