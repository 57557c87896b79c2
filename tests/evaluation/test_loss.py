"""The validation loss against closed forms, and the images that are held out for it."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastdit.cli import main
from fastdit.data.loader import read_moments, sample_keys, split
from fastdit.data.manifest import Manifest
from fastdit.diffusion.objectives import DDPM, FlowMatching
from fastdit.distributed import Ranks
from fastdit.evaluation.loss import BATCH, BINS, IMAGES, stratified, validation_loss
from fastdit.pipeline import Inference
from fastdit.training.state import load_network
from helpers.commands import mistake
from helpers.data import make_shards
from helpers.shards import take

ONE = Ranks(0, 0, 1, torch.device("cpu"))
ZERO = lambda x, t, y: torch.zeros_like(x)  # noqa: E731
LOGIT_NORMAL = FlowMatching(time_distribution="logit_normal")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards") / "latents")


@pytest.mark.parametrize("objective", [FlowMatching(), LOGIT_NORMAL])
def test_the_loss_of_a_network_that_predicts_zero_is_known_in_every_bin(shards, objective):
    """E (eps - x_0)^2 = 1 + E x_0^2, whatever t is."""
    found = validation_loss(objective, ZERO, shards, ONE)
    known = 1 + np.mean(np.square(shards.channel_std) + np.square(shards.channel_mean))
    assert len(found["bins"]) == BINS and found["images"] == IMAGES
    for loss, error in found["bins"]:
        assert abs(loss - known) < 4 * error < 0.2
    assert abs(found["loss"] - known) < 4 * found["loss_error"] < 0.05 and not found["parts"]


@pytest.mark.parametrize("objective", [FlowMatching(), LOGIT_NORMAL, DDPM()])
def test_the_loss_is_that_of_the_times_that_training_draws(shards, objective):
    """For a loss that is t itself: the mean of t, and in each bin a value inside it."""
    fake = SimpleNamespace(sample_t=objective.sample_t, loss=lambda m, x, y, t, n: SimpleNamespace(
        per_sample=t.double(), parts={"a": t, "b": 2 * t}))  # fmt: skip
    found = validation_loss(fake, ZERO, shards, ONE)
    drawn = objective.sample_t((torch.arange(10**5) + 0.5) / 10**5).mean().item()
    assert found["loss"] == pytest.approx(drawn, abs=1e-3)
    assert found["parts"]["b"] == pytest.approx(2 * found["loss"], rel=1e-6)
    for k, (mean, _) in enumerate(found["bins"]):
        assert k / BINS < mean < (k + 1) / BINS + 1e-9
    assert stratified(objective, 3)[0].sum() == pytest.approx(1)


def test_times_that_training_never_draws_have_no_loss_and_ddpm_has_all(shards):
    half = SimpleNamespace(sample_t=lambda u: 0.5 + u / 2, loss=FlowMatching().loss)
    found = validation_loss(half, ZERO, shards, ONE, images=100)
    assert np.isnan(found["bins"][:10]).all() and np.isfinite(found["bins"][10:]).all()
    assert np.isfinite(found["loss"]) and found["images"] == 50
    found = validation_loss(DDPM(), lambda x, t, y: torch.zeros(len(x), 8, 8, 8), shards, ONE)
    assert np.isfinite(found["bins"]).all() and set(found["parts"]) == {"mse", "vlb"}


def test_each_process_takes_some_batches_and_all_get_the_digits_of_one(shards):
    network = lambda x, t, y: x * y[:, None, None, None]  # noqa: E731
    whole = validation_loss(FlowMatching(), network, shards, ONE, images=200)
    ours: list[torch.Tensor] = []
    for rank in (0, 1, 2):  # of three: the last one has one batch less

        class Rank(Ranks):
            def gather(self, values):
                ours.append(values)
                return torch.cat(ours) if len(ours) == 3 else torch.cat([values] * 3)

        found = validation_loss(FlowMatching(), network, shards, Rank(rank, rank, 3, ONE.device), images=200)
    assert found == whole


def test_a_stop_leaves_the_rest_out(shards):
    calls = []
    found = validation_loss(FlowMatching(), ZERO, shards, ONE, on_batch=lambda: calls.append(1) or len(calls) > 2)
    assert len(calls) == 3 and np.isnan(found["loss"]) and np.isfinite(found["bins"][0]).all()
    assert 2 * BATCH == IMAGES // BINS  # so two batches are the first bin


def test_a_damaged_image_is_named(shards, tmp_path):
    copy = make_shards(tmp_path / "latents")
    path = copy.folder / copy.shards[0].name
    data = bytearray(path.read_bytes())
    data[int(copy.index()["offset"][3]) + 10] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="latents: damaged images of the validation loss: .*; copy it again"):
        validation_loss(FlowMatching(), ZERO, copy, ONE)


def test_images_that_are_held_out_are_never_trained_on_and_every_image_is_in_one_part(shards):
    train, held_out = split(shards, 0.2)
    keys = {name: set(part.index()["key"].tolist()) for name, part in (("train", train), ("held out", held_out))}
    assert keys["train"] | keys["held out"] == set(shards.index()["key"].tolist())
    assert not keys["train"] & keys["held out"] and 2 <= len(held_out) <= 15 and len(train) + len(held_out) == 40
    seen = set()
    for step in range(2 * len(train) // 5 + 1):
        seen |= set(sample_keys(train, 7, 5, step))
    assert seen == keys["train"]
    means = {moments[:4].sum().item() for moments in read(train)}
    batches = take(train, 2 * len(train) // 5 + 1, global_batch=5, seed=7, hflip=False)
    drawn = {moments[:4].sum().item() for batch in batches for moments in batch.moments}
    assert drawn == means


def test_the_split_depends_on_the_keys_alone(shards):
    few, many = (set(split(shards, fraction)[1].index()["key"].tolist()) for fraction in (0.1, 0.4))
    assert few < many
    assert set(split(Manifest.load(shards.folder), 0.1)[1].index()["key"].tolist()) == few
    assert split(shards, 0.0) == (shards, None) and split(shards, 0.0)[0].rows is None
    with pytest.raises(ValueError, match="data.val_fraction=1e-06 holds out 0 of the 40 images"):
        split(shards, 1e-6)


def read(manifest):
    return read_moments(manifest, manifest.index())


def test_the_command_prints_the_loss_by_timestep_and_says_how_it_was_measured(trained, tmp_path, capsys):
    out, shards = tmp_path / "losses.jsonl", trained.parent / "latents"
    main(["evaluate", str(trained), "--loss", "--shards", str(shards), "--num-samples", "90", "--out", str(out)])
    said = capsys.readouterr().out.splitlines()
    result = json.loads(out.read_text())
    loss, error = result["values"]["loss"], result["values"]["loss_error"]
    assert said[0] == f"loss         {loss:9.6f}  {error:9.6f}  100 images, ema weights"
    assert said[1].split() == ["t", "loss", "error"] and said[-1].startswith("0.95 - 1.00") and len(said) == 2 + BINS
    made = load_network(trained)
    again = validation_loss(made.objective, Inference(made.model, "fp32", False), Manifest.load(shards), ONE, images=90)
    assert result["values"]["loss"] == again["loss"] and result["bins"] == [list(row) for row in again["bins"]]
    main(["evaluate", "--compare", str(out), str(out)])
    main(["evaluate", str(trained), "--loss", "--shards", str(shards), "--num-samples", "90", "--weights", "model",
          "--out", str(tmp_path / "model.jsonl")])  # fmt: skip
    assert "weights=ema and model" in mistake(capsys, "evaluate", "--compare", out, tmp_path / "model.jsonl")
    said = mistake(capsys, "evaluate", trained, "--loss")
    assert "neither data.val_shards nor data.val_fraction; give --shards" in said
    assert "has no manifest.json" in mistake(capsys, "evaluate", trained, "--loss", "--shards", tmp_path)
    for override, words in (
        ("sampling.cfg_scale=4", "sampling.cfg_scale=4: only objective, model.attention, model.learn_sigma, "),
        ("data.val_shards=a", "data.val_shards=a changes nothing for a validation loss; use --shards a"),
        ("data.val_fraction=0.1", "data.val_fraction=0.1: only objective"),
        ("objective.sample_shift=2", "objective.sample_shift=2 changes nothing for a validation loss; leave it out"),
        ("training.lr=1", "training.lr=1: only objective"),
    ):
        assert words in mistake(capsys, "evaluate", trained, "--loss", "--shards", shards, override), words
    assert "a.jsonl means nothing with --compare" in mistake(capsys, "evaluate", "a.jsonl", "--compare", out, out)
    main(["evaluate", str(trained), "--loss", "--num-samples", "20", "--out", str(tmp_path / "own.jsonl"),
          "data.val_fraction=0.2", "objective.shift=3"])  # fmt: skip
    own = json.loads((tmp_path / "own.jsonl").read_text())["protocol"]
    assert own["objective"]["shift"] == 3 and own["val_fraction"] == 0.2
