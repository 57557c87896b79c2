"""The class token of REG: where it lies in the state, its loss, its gradients, and a run with it to samples."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import layer_norm

from fastdit.api import load
from fastdit.convert import convert, read_initial
from fastdit.data.extract import extract_features
from fastdit.data.features import FeatureManifest, class_token_of
from fastdit.data.loader import latent_batches, read_class_tokens
from fastdit.data.manifest import Manifest
from fastdit.diffusion.entangled import EntangledFlow
from fastdit.diffusion.objectives import FlowMatching
from fastdit.distributed import Ranks
from fastdit.evaluation.features import FEATURES
from fastdit.likelihood import likelihood
from fastdit.models.class_token import channels_of, join, split
from fastdit.models.dit import DiT
from fastdit.report import write_report
from fastdit.sampling import load_pipeline
from fastdit.training import checkpoint
from fastdit.training.log import read_metrics, read_records
from fastdit.training.posthoc import rebuild
from fastdit.training.validation import loss_of_run
from fastdit.verify import verify
from helpers.checkpoints import quiet
from helpers.data import edit_manifest
from helpers.evaluation import tiny
from helpers.extraction import TinyEncoder
from helpers.networks import small
from helpers.runs import losses, run, train_here

pytestmark = pytest.mark.usefixtures("one_thread")
SHORT = ["training.steps=4", "training.checkpoint_every=2", "training.precision=fp32"]
TOKEN = ["model.class_token=6"]
SIZES = {"input_size": (4, 6), "in_channels": 3, "hidden_size": 16, "depth": 2, "num_heads": 2, "num_classes": 4,
         "attention": "eager"}  # fmt: skip


@pytest.mark.parametrize("dim", [1, 23, 24, 25, 100])
def test_a_token_fills_as_many_channels_as_it_needs(dim):
    latents, token = torch.randn(2, 3, 4, 6), torch.randn(2, dim)
    state = join(latents, token)
    assert state.shape == (2, 3 + channels_of(dim, (4, 6)), 4, 6) and channels_of(dim, (4, 6)) == math.ceil(dim / 24)
    assert all(map(torch.equal, split(state, dim), (latents, token)))
    assert small(**SIZES, class_token=dim).state_shape == state.shape[1:]


@pytest.mark.parametrize("options", [{}, {"prediction": "x_0"}, {"cosine_weight": 0.5}], ids=str)
def test_the_loss_is_the_latents_plus_the_weighted_tokens(options):
    torch.manual_seed(0)
    latents, token, t = torch.randn(2, 3, 4, 6), torch.randn(2, 30), torch.tensor([0.3, 0.8], dtype=torch.float64)
    x_0, noise, output = join(latents, token), torch.randn(2, 5, 4, 6), torch.randn(2, 5, 4, 6)
    made = EntangledFlow(**options, token_dim=30, class_token_weight=0.07).loss(lambda *a: output, x_0, None, t, noise)
    plain = FlowMatching(**options)
    own, of_noise = (split(x, 30) for x in (output, noise))
    of_latent = plain.loss(lambda *a: own[0], latents, None, t, of_noise[0])
    made_of_token, as_image = own[1][..., None, None], token[..., None, None]  # (N, D, 1, 1)
    of_token = plain.loss(lambda *a: made_of_token, as_image, None, t, of_noise[1][..., None, None])
    torch.testing.assert_close(made.per_sample, of_latent.per_sample + 0.07 * of_token.per_sample)
    torch.testing.assert_close(made.parts["class_token"], of_token.per_sample)
    if not options:  # in closed form: SiT's network points from noise to data
        wanted = ((-own[1] - (of_noise[1] - token)) ** 2).mean(1)
        torch.testing.assert_close(made.parts["class_token"], wanted)


def test_the_network_reads_the_token_and_ignores_what_is_left_of_its_channels():
    model = small(**SIZES, class_token=30, registers=2)
    assert model.tokens == 6 + 2 + 1
    state, t, y = torch.randn(2, *model.state_shape, requires_grad=True), torch.tensor([0.2, 0.7]), torch.tensor([0, 3])
    out = model(state, t, y)
    assert out.shape == state.shape
    latents, token = split(out, 30)
    for part in (latents, token):  # each depends on both
        (gradient,) = torch.autograd.grad(part.square().sum(), state, retain_graph=True)
        assert all(g.abs().sum() > 0 for g in split(gradient, 30))
        assert not gradient.flatten(1)[:, 3 * 24 + 30 :].any()
    assert not out.flatten(1)[:, 3 * 24 + 30 :].any()


@pytest.mark.parametrize("block", ["adaln_zero", "adaln", "in_context", "cross_attention"])
@pytest.mark.parametrize("more", [{}, {"position": "rope", "registers": 1}], ids=str)
def test_every_block_takes_it_and_its_head_starts_at_zero(block, more):
    options = {**SIZES, "block": block, "class_token": 7, **more}
    model = DiT(**options)
    assert not model(torch.randn(2, *model.state_shape), torch.rand(2), torch.tensor([0, 1])).any()
    moved = small(**options)
    moved(torch.randn(2, *moved.state_shape), torch.rand(2), torch.tensor([0, 1])).sum().backward()
    assert all(parameter.grad is not None for parameter in moved.class_token.parameters())


def test_batches_have_the_class_token_of_the_image_and_validation_reads_the_same(featured):
    folder = Path(featured.partition("=")[2])
    manifest, features = Manifest.load(folder), FeatureManifest.load(folder / "features")
    batch = next(latent_batches(manifest, global_batch=8, seed=0, hflip=False, features=features))
    wanted = batch.features.float().mean((1, 2))  # TinyEncoder's class token
    torch.testing.assert_close(batch.class_token.float(), wanted, atol=2e-3, rtol=1e-3)
    images, _ = manifest.order(0)(torch.arange(8).numpy())
    again = read_class_tokens(features, manifest.index()["key"][images])
    torch.testing.assert_close(again, layer_norm(batch.class_token.float(), (6,)))
    torch.testing.assert_close(class_token_of(batch.features), layer_norm(wanted, (6,)))  # of an encoder without one


def test_a_run_learns_it_samples_and_resumes_exactly(world, featured, tmp_path):
    options = [*SHORT, featured, *TOKEN, "training.align=[{name: repa, width: 16}]", "data.val_fraction=0.05",
               "training.validate_images=40", "training.sample_every=2", "training.route=0.5",
               "training.route_ends=[1,1]", "training.ema_stds=[0.05,0.1]"]  # fmt: skip
    whole = train_here(world, tmp_path / "whole", *options)
    train_here(world, tmp_path / "halves", *options, "training.steps=2")
    halves = train_here(world, tmp_path / "halves", *options, resume=True)
    assert losses(tmp_path / "halves") == losses(tmp_path / "whole")
    for name in ("model", "ema"):
        ours, theirs = load_file(whole / f"{name}.safetensors"), load_file(halves / f"{name}.safetensors")
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    records = read_metrics(tmp_path / "whole")
    assert all(record["class_token"] > 0 for record in records)
    assert len(load(tmp_path / "whole", device="cpu").sample(n=2, steps=2)) == 2
    pipeline = load_pipeline(tmp_path / "whole", ["sampling.clip=static", "sampling.steps=2"])
    seen = []
    x_0 = pipeline.latents([0, 1], torch.tensor([1, 2]), 0, on_step=lambda t, x_t, made: seen.append(made.x_0))
    assert x_0.shape[1:] == pipeline.spec.shape
    assert all(made[:, :4].abs().max() <= 1 < made[:, 4:].abs().max() for made in seen)  # the token is not clipped
    assert verify(whole, say=quiet) == []
    page = write_report([tmp_path / "whole"], overrides=["sampling.steps=2"]).read_text()
    assert "No samples" not in page and "No loss per timestep" not in page
    wide, copy = rebuild(tmp_path / "whole", [0.07], tmp_path / "wide", say=quiet), tmp_path / "copy"
    convert(tmp_path / "whole", "fastdit", copy, say=quiet)
    for folder in (checkpoint.find(tmp_path / "wide/std-0.070"), checkpoint.find(copy)):  # the encoder is remembered
        assert checkpoint.read_meta(folder)["features"] == checkpoint.read_meta(whole)["features"], wide
    for call, words in (
        (lambda: convert(tmp_path / "whole", "official", tmp_path / "out.pt"), "class_token"),
        (lambda: convert(tmp_path / "whole", "diffusers", tmp_path / "out"), "class_token"),
        (lambda: likelihood(tmp_path / "whole", world / "latents", num_images=2), "class_token=6, so a likelihood"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_a_run_is_evaluated_and_guided_by_a_weaker_one(world, featured, tmp_path, monkeypatch):
    monkeypatch.setitem(FEATURES, "efficientnet-lite0", tiny)
    train_here(world, tmp_path / "run", *SHORT, featured, *TOKEN, "training.evaluate_every=4",
               "training.evaluate_images=20", f"training.reference={world / 'images'}")  # fmt: skip
    [result] = read_records(tmp_path / "run" / "evaluations.jsonl")
    assert result["step"] == 4
    labels, ids = [0, 1], torch.tensor([1, 2])
    made = {}
    for scale in (1, 2):
        weak = f"sampling.weak_checkpoint={tmp_path / 'run' / 'checkpoints' / 'step-0000002'}"
        pipeline = load_pipeline(tmp_path / "run", [weak, f"sampling.cfg_scale={scale}", "sampling.steps=2"])
        made[scale] = pipeline.latents(labels, ids, 0)
    assert made[2].isfinite().all() and not torch.equal(made[1], made[2])
    train_here(world, tmp_path / "plain", *SHORT)
    with pytest.raises(ValueError, match="model.class_token=0.*6; a weak model must be trained on the same task"):
        load_pipeline(tmp_path / "run", [f"sampling.weak_checkpoint={tmp_path / 'plain'}"])


def test_without_it_nothing_changes_and_with_it_only_the_token_is_added(world, featured, tmp_path):
    """The first loss on the latent is near a plain run's: heads start at zero; posteriors and times are the same."""
    train_here(world, tmp_path / "plain", *SHORT, featured, "training.steps=1")
    train_here(world, tmp_path / "token", *SHORT, featured, *TOKEN, "training.steps=1")
    plain, token = (read_metrics(tmp_path / name)[0] for name in ("plain", "token"))
    assert token["loss"] == pytest.approx(token["mse"] + 0.03 * token["class_token"], rel=1e-5)
    assert token["class_token"] == pytest.approx(2, rel=0.4)  # variance 1 of the token, and 1 of the noise
    assert token["mse"] == pytest.approx(plain["loss"], rel=0.1)  # other noise


@pytest.mark.parametrize("options, processes", [([], 2), (["training.engine=deepspeed"], 2)], ids=["ddp", "zero1"])
def test_engines_and_processes_give_the_same_run(world, featured, tmp_path, options, processes):
    common = ["--config", str(world / "config.yaml"), *SHORT, featured, *TOKEN]
    run("train.py", *common, f"run_dir={tmp_path}/one")
    run("train.py", *common, *options, f"run_dir={tmp_path}/other", processes=processes)
    assert losses(tmp_path / "other") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


@pytest.mark.parametrize("options", [
    ["training.micro_batch=4"], ["training.activation_checkpointing=full"], ["training.joint_adaln=true"],
], ids=str)  # fmt: skip
def test_options_of_the_step_change_only_rounding(world, featured, tmp_path, options):
    train_here(world, tmp_path / "plain", *SHORT, featured, *TOKEN)
    train_here(world, tmp_path / "other", *SHORT, featured, *TOKEN, *options)
    assert losses(tmp_path / "other") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)


@pytest.mark.parametrize("options, words", [
    (["model.class_token=7"], "model.class_token=7, but the features in .* have 6 values; use 6"),
    (["model.class_token=-1"], "model.class_token=-1 is out of range; use the width of the encoder's features"),
    ([*TOKEN, "objective=ddpm"], "model.class_token=6 is denoised by flow matching, but objective=ddpm"),
    ([*TOKEN, "model.decoder_blocks=1"], "model.class_token=6 has no place in the decoder"),
    ([*TOKEN, "sampling.cfg_rescale=0.5"], "sampling.cfg_rescale=0.5 would mix the deviations"),
    ([*TOKEN, "objective.class_token_weight=-1"], "class_token_weight=-1.* is out of range; use 0.03"),
    ([*TOKEN, "data.features=nowhere"], "nowhere has no manifest.json; write features there with"),
], ids=str)  # fmt: skip
def test_mistakes_are_found_before_a_run_begins(world, featured, tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        train_here(world, tmp_path / "run", *SHORT, featured, *options)
    assert not (tmp_path / "run").exists()


def test_validation_needs_features_of_the_same_encoder_and_of_its_images(world, featured, tmp_path):
    place = Path(featured.partition("=")[2])
    options = [*SHORT, featured, *TOKEN, "training.steps=1", f"data.val_shards={tmp_path / 'held'}"]
    extract_features(images=world / "held_out", out=tmp_path / "held", vae=world / "vae", image_size=32)
    with pytest.raises(ValueError, match="held has none; add them with"):
        train_here(world, tmp_path / "run", *options)
    shutil.copytree(place / "features", tmp_path / "held/features")
    with pytest.raises(ValueError, match="are of other images"):
        train_here(world, tmp_path / "run", *options)
    shutil.rmtree(tmp_path / "held/features")
    extract_features(images=world / "held_out", out=tmp_path / "held", vae=world / "vae", image_size=32,
                     encoder=TinyEncoder())  # fmt: skip
    last = train_here(world, tmp_path / "run", *options)
    found = loss_of_run(last, Ranks(0, 0, 1, torch.device("cpu")), num_samples=40)
    assert found["values"]["class_token"] > 0
    edit_manifest(tmp_path / "held/features", weights="6" * 64)
    with pytest.raises(ValueError, match="held/features have weights=6+, but the run's 5+; extract them with the same"):
        loss_of_run(last, Ranks(0, 0, 1, torch.device("cpu")), num_samples=40)


def test_a_run_starts_from_one_without_it(world, featured, tmp_path, capsys):
    train_here(world, tmp_path / "plain", *SHORT, featured)
    train_here(world, tmp_path / "token", *SHORT, featured, *TOKEN, "training.steps=1",
               f"training.init_from={tmp_path}/plain", read_initial=read_initial)  # fmt: skip
    assert "except for class_token.embed.weight, class_token.embed.bias" in capsys.readouterr().out
    with pytest.raises(ValueError, match="class_token.embed.bias has no place in this network"):
        train_here(world, tmp_path / "again", *SHORT, featured, f"training.init_from={tmp_path}/token",
                   read_initial=read_initial)  # fmt: skip


def test_shards_without_features_are_named(world, tmp_path):
    with pytest.raises(ValueError, match="model.class_token needs features, but .*latents has none; add them with"):
        train_here(world, tmp_path / "run", *SHORT, *TOKEN)
