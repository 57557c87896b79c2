"""Loss-aware times in training: exact after resuming, the same on two processes, and off by default."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastdit.training import checkpoint
from fastdit.training.state import below
from helpers.runs import losses, run, train_here

BOUND = ["objective={name: ddpm, variance: fixed_small, loss_type: kl}", "training.precision=fp32"]
ON = [*BOUND, "training.loss_aware_times=true"]


pytestmark = pytest.mark.usefixtures("one_thread")


def history(folder):
    return below(load_file(folder / "progress.safetensors"), "times.")


@pytest.fixture(scope="module")
def warm(world):
    """Step 5 of a run that has seen every index ten times, index i with losses of about (i + 1) / 100."""
    folder = train_here(world, world / "loss_aware", *ON, "training.steps=5")
    assert int(history(folder)["counts"].sum()) == 5 * 12  # every loss of the global batch is on record
    grown = torch.linspace(0.01, 10, 1000, dtype=torch.float64)[:, None].expand(1000, 10).clone()
    progress = load_file(folder / "progress.safetensors")
    progress |= {"times.losses": grown, "times.counts": torch.full((1000,), 10)}
    save_file(progress, folder / "progress.safetensors")
    meta = json.loads((folder / checkpoint.META).read_text())
    checkpoint.write_meta(folder, {key: value for key, value in meta.items() if key != "sha256"})
    return world / "loss_aware"


def copy(warm, place):
    import shutil

    shutil.copytree(warm, place)
    return place


def test_a_resume_is_exact_with_its_history(world, warm, tmp_path):
    through, split = copy(warm, tmp_path / "through"), copy(warm, tmp_path / "split")
    train_here(world, through, *ON, "training.steps=11", resume=True)
    train_here(world, split, *ON, "training.steps=8", "training.checkpoint_every=3", resume=True)
    train_here(world, split, *ON, "training.steps=11", resume=True)
    assert losses(split) == losses(through) and len(losses(through)) == 11
    ours, theirs = history(checkpoint.find(split)), history(checkpoint.find(through))
    assert torch.equal(ours["losses"], theirs["losses"]) and torch.equal(ours["counts"], theirs["counts"])
    ours, theirs = (load_file(checkpoint.find(place) / "model.safetensors") for place in (split, through))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_times_follow_the_losses_of_the_past(world, warm, tmp_path):
    """Index i has a probability proportional to i + 1, so the mean of the new indices is near 2 / 3 of the range."""
    place = copy(warm, tmp_path / "run")
    folder = train_here(world, place, *ON, "training.steps=25", resume=True)
    seen = history(folder)["counts"].double() - 10
    assert int(seen.sum()) == 20 * 12
    mean = float((seen * torch.arange(1000)).sum() / seen.sum())
    assert mean == pytest.approx(667, abs=4 * 236 / 240**0.5)  # four standard errors; uniform times have 500


def test_micro_batches_change_nothing_but_rounding(world, warm, tmp_path):
    for name, micro in (("whole", 12), ("parts", 4)):
        place = copy(warm, tmp_path / name)
        train_here(world, place, *ON, f"training.micro_batch={micro}", "training.steps=8", resume=True)
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    ours, theirs = (history(checkpoint.find(tmp_path / name)) for name in ("parts", "whole"))
    assert torch.equal(ours["counts"], theirs["counts"])  # the very same times
    torch.testing.assert_close(ours["losses"], theirs["losses"], rtol=1e-4, atol=1e-6)


def test_two_processes_keep_one_history(world, warm, tmp_path):
    for processes in (1, 2):
        place = copy(warm, tmp_path / str(processes))
        overrides = [f"run_dir={place}", "training.steps=8", *ON]
        run("train.py", "--config", str(world / "config.yaml"), *overrides, "--resume", processes=processes)
    assert losses(tmp_path / "2") == pytest.approx(losses(tmp_path / "1"), rel=1e-5)
    ours, theirs = (history(checkpoint.find(tmp_path / name)) for name in ("2", "1"))
    assert torch.equal(ours["counts"], theirs["counts"])
    torch.testing.assert_close(ours["losses"], theirs["losses"], rtol=1e-4, atol=1e-6)


def test_until_every_index_is_known_the_losses_are_those_of_uniform_times(world, tmp_path):
    train_here(world, tmp_path / "on", *ON, "training.steps=3")
    folder = train_here(world, tmp_path / "off", *BOUND, "training.steps=3")
    assert losses(tmp_path / "on") == pytest.approx(losses(tmp_path / "off"), rel=1e-6)
    assert not history(folder)


def test_loss_aware_times_are_refused_with_flow_matching(world, tmp_path):
    with pytest.raises(ValueError, match="loss_aware_times=True needs a discrete schedule; use objective=ddpm"):
        train_here(world, tmp_path / "run", "training.loss_aware_times=true")
    assert not (tmp_path / "run").exists()
