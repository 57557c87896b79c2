"""fastdit train-vae: the same training on any number of processes and after any stop, and what it leaves."""

import json
import os
import re
import shutil
import signal
from functools import partial

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from PIL import Image
from torch._dynamo.backends.debugging import aot_eager

from fastdit.autoencoder import step as step_module
from fastdit.autoencoder.config import AutoencoderConfig
from fastdit.autoencoder.curves import write_curves
from fastdit.autoencoder.loop import train_autoencoder
from fastdit.autoencoder.quality import Quality, own_blocks
from fastdit.cli import main
from fastdit.config import load_config, save_config
from fastdit.data.archives import open_images
from fastdit.data.extract import extract_features
from fastdit.data.images import load_crop, to_pixels
from fastdit.data.latents import LatentCodec
from fastdit.data.pixels import split_rows
from fastdit.distributed import Ranks
from fastdit.kernels import adamw_ema
from fastdit.report import write_report
from fastdit.training import checkpoint, engine
from fastdit.training.guard import EXIT_STOPPED
from fastdit.training.log import Log, read_metrics, read_records
from fastdit.training.weights import read_weights
from fastdit.verify import verify
from helpers.evaluation import use_tiny
from helpers.runs import Forks, run

from .conftest import small

pytestmark = pytest.mark.usefixtures("one_thread")
LAST = "checkpoints/step-0000008"


def losses(run_dir, key="loss"):
    return [record[key] for record in read_metrics(run_dir) if key in record]


def measured(run_dir):
    return [record for record in read_records(run_dir / "metrics.jsonl") if "psnr" in record]


def states(run_dir, step=LAST):
    return {path.name: read_weights(path) for path in sorted((run_dir / step).glob("*.safetensors"))}


def assert_same(one, other, **tolerance):
    assert one.keys() == other.keys() and len(one) == 8
    for file in one:
        assert one[file].keys() == other[file].keys()
        for name, tensor in one[file].items():
            torch.testing.assert_close(other[file][name], tensor, **tolerance)


def test_curves_name_a_loss_that_is_alone_on_a_panel_for_two(tmp_path, monkeypatch):
    """"reconstruction and perceptual loss" is the reconstruction loss where there is no perceptual one."""
    named, legend = [], Axes.legend
    monkeypatch.setattr(Axes, "legend", lambda self, **settings: named.append(
        [text.get_text() for text in legend(self, **settings).get_texts()]))  # fmt: skip
    rows = [{"step": 1, "reconstruction": 0.5, "psnr": 20.0}, {"step": 2, "reconstruction": 0.4, "psnr": 21.0}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    write_curves(tmp_path)
    assert named == [["reconstruction"]]


def test_a_run_learns_measures_and_leaves_a_folder_for_extract(images, whole, tmp_path):
    assert len(losses(whole)) == 8 and losses(whole, "reconstruction")[-1] < losses(whole, "reconstruction")[0]
    assert len(losses(whole, "discriminator")) == 6 and losses(whole, "adversarial_weight")[0] == 0
    assert all(0 < w <= 5e3 for w in losses(whole, "adversarial_weight")[1:])
    first, last = measured(whole)
    assert (first["step"], last["step"]) == (4, 8) and last["psnr"] > first["psnr"] > 5
    assert Image.open(whole / "monitor/step-0000008.png").size == (4 * 18 - 2, 3 * 18 - 2)
    assert min(Image.open(whole / "monitor/strip.png").size) > 30 and (whole / "curves.png").stat().st_size > 5000
    codec = LatentCodec.load(whole / "vae")
    ema = read_weights(whole / LAST / "ema.safetensors")
    assert all(torch.equal(tensor, ema[name]) for name, tensor in codec.vae.state_dict().items())
    assert codec.scale == pytest.approx(1 / last["latent_std_all"])
    manifest = extract_features(images=images, out=tmp_path / "latents", vae=whole / "vae", image_size=16)
    assert manifest.latents.shape == (3, 8, 8) and not manifest.scale_remarks()


def test_the_measured_psnr_is_that_of_the_held_out_images(images, whole):
    config = load_config(whole / "config.yaml", schema=AutoencoderConfig)
    files = sorted(images.rglob("*.png"))
    source = open_images(images)
    rows, held = split_rows(source, config.data.val_fraction, "data.val_fraction")
    assert len(rows) + len(held) == len(files) and not set(rows) & set(held) and 15 < len(held) < 40
    about = json.loads((whole / "vae/about.json").read_text())
    config = small(images, whole, f"training.evaluate_images={len(held)}")
    pictures = np.stack([load_crop(source.open(int(i)), 16) for i in held])
    ranks = Ranks(0, 0, 1, torch.device("cpu"))
    codec = LatentCodec.load(whole / "vae")
    quality = Quality(own_blocks(lambda i: pictures[i], np.arange(len(held)), ranks), len(held), ranks, None, None)
    found, *_ = quality(codec.vae)
    with torch.no_grad():
        mean = codec.vae.encode(to_pixels(torch.from_numpy(pictures))).latent_dist.mean
        output = (127.5 * codec.vae.decode(mean).sample + 128).clamp(0, 255).floor().movedim(1, -1).numpy()
    exact = 20 * np.log10(255) - 10 * np.log10(np.square(output - pictures).mean())
    assert found["psnr"] == pytest.approx(exact, abs=1e-3) and found["psnr"] == pytest.approx(about["psnr"], abs=2)
    np.testing.assert_allclose(found["latent_mean"], mean.mean((0, 2, 3)), atol=0.2)


@pytest.mark.parametrize("step", [2, 5])
def test_a_killed_run_resumes_exactly(images, whole, tmp_path, step):
    """Before the discriminator's first step, and between two checkpoints."""
    config = small(images, tmp_path / "run")
    save_config(config, tmp_path / "run.yaml")
    run("fastdit/cli.py", "train-vae", str(tmp_path / "run.yaml"), "--device", "cpu", kill=(step, 0))
    before = checkpoint.checkpoints(tmp_path / "run")
    assert len(before) < 4
    train_autoencoder(config, resume=True, device="cpu")
    assert_same(states(whole), states(tmp_path / "run"), rtol=0, atol=0)
    assert losses(tmp_path / "run") == losses(whole)
    keys = ("step", "psnr", "ssim", "latent_mean", "latent_std")
    one, two = ([[r[key] for key in keys] for r in measured(d)] for d in (whole, tmp_path / "run"))
    assert one == two
    digests = [checkpoint.sha256(d / "vae/diffusion_pytorch_model.safetensors") for d in (whole, tmp_path / "run")]
    assert digests[0] == digests[1]


def test_two_processes_and_micro_batches_equal_one(images, tmp_path):
    """The measurements, too, with a Frechet distance in made-up features.

    The discriminator learns slowly: Adam's first step follows the sign even of a gradient that is rounding alone, as
    that of the last bias is.
    """
    for name, processes, changes in (("two", 2, ["training.micro_batch=2"]), ("one", 1, [])):
        changes += ["training.evaluate_features=efficientnet-lite0", "training.evaluate_images=60",
                    "data.crop=random", "data.crop_fraction=0.5"]  # fmt: skip
        config = small(images, tmp_path / name, "discriminator.lr=1e-5", *changes)
        save_config(config, tmp_path / f"{name}.yaml")
        options = "train-vae", str(tmp_path / f"{name}.yaml"), "--device", "cpu"
        with Forks("fastdit/cli.py", *options, processes=processes, before=use_tiny) as forks:
            assert set(forks.wait()) == {0}, forks.said()
    for key in ("loss", "discriminator", "adversarial_weight", "grad_norm"):
        assert losses(tmp_path / "two", key) == pytest.approx(losses(tmp_path / "one", key), rel=1e-3), key
    one, two = (measured(tmp_path / name)[-1] for name in ("one", "two"))
    for key in ("psnr", "ssim", "frechet", "latent_std_all"):
        assert two[key] == pytest.approx(one[key], rel=1e-3), key


def test_a_signal_saves_and_stops(images, whole, tmp_path, monkeypatch):
    def step(self):
        self.count = getattr(self, "count", 0) + 1
        if self.count == 5:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Log, "step", step)
    with pytest.raises(SystemExit) as stopped:
        train_autoencoder(small(images, tmp_path / "run", "training.checkpoint_every=100"), device="cpu")
    assert stopped.value.code == EXIT_STOPPED
    monkeypatch.undo()
    train_autoencoder(small(images, tmp_path / "run", "training.checkpoint_every=100"), resume=True, device="cpu")
    assert_same(states(whole), states(tmp_path / "run"), rtol=0, atol=0)


def test_the_decoder_alone_keeps_the_latents(images, whole, tmp_path):
    out = train_autoencoder(
        small(images, tmp_path / "run", f"training.init_from={whole}/vae", "training.decoder_only=true",
              "model.channels=[8,8,8]", "training.steps=4", "training.evaluate_every=0"),
        device="cpu",
    )  # fmt: skip
    before, after = LatentCodec.load(whole / "vae"), LatentCodec.load(out)
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    assert torch.equal(before.encode(x), after.encode(x)) and before.scale == after.scale
    assert not torch.equal(before.decode(x[:, :, :8, :8]), after.decode(x[:, :, :8, :8]))
    assert load_config(tmp_path / "run/config.yaml", schema=AutoencoderConfig).model.channels == (4, 8)
    assert "loss" in read_metrics(tmp_path / "run")[-1]
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    more = [f"run_dir={tmp_path}/again", "training.steps=5", "model.scaling_factor=null"]
    config = load_config(tmp_path / "run/config.yaml", more, AutoencoderConfig)
    resumed = LatentCodec.load(train_autoencoder(config, resume=True, device="cpu"))
    assert read_metrics(tmp_path / "again")[-1]["step"] == 5 and resumed.scale == before.scale


def check_said(run, alone):
    """The log's warning and the table of the report are of latents with the scale and shift that extract would use."""
    codec, found = LatentCodec.load(run / "vae"), json.loads((run / "vae/about.json").read_text())
    mean = (np.array(found["latent_mean"]) - np.array(codec.shift)) * np.array(codec.scale)
    std = np.array(found["latent_std"]) * np.array(codec.scale)
    page, log = write_report([run]).read_text(), (run / "train.log").read_text()
    for c in range(3):
        assert f"channel {c}</th><td>mean {mean[c]:.2f}, deviation {std[c]:.2f}</td>" in page
    warned = re.findall("warning: the standard deviations of the scaled latents are (.*?), far from", log)
    assert warned == ([" ".join(f"{value:.2f}" for value in std)] if alone else [])
    assert not alone or f"scaling_factor {codec.scale[2]:g} to {codec.scale[0]:g} by channel" in log


@pytest.mark.parametrize("alone", [False, True])
def test_a_scale_per_channel_is_kept_with_the_encoder_and_else_measured_anew(images, whole, tmp_path, alone):
    shutil.copytree(whole / "vae", tmp_path / "vae")
    known = json.loads((tmp_path / "vae/config.json").read_text())
    known |= {"latents_mean": [1.0, 2.0, 3.0], "latents_std": [4.0, 5.0, 6.0]}
    (tmp_path / "vae/config.json").write_text(json.dumps(known))
    chosen = [f"training.init_from={tmp_path}/vae", f"training.decoder_only={alone}", "discriminator.weight=0"]
    train_autoencoder(small(images, tmp_path / "run", *chosen, "training.steps=1"), device="cpu")
    check_said(tmp_path / "run", alone)
    config = load_config(tmp_path / "run/config.yaml", ["training.steps=2"], AutoencoderConfig)
    codec = LatentCodec.load(train_autoencoder(config, resume=True, device="cpu"))
    if alone:  # the latents stay as they are
        before = LatentCodec.load(tmp_path / "vae")
        assert (codec.scale, codec.shift) == (before.scale, before.shift)
        assert codec.encoder == before.encoder and codec.fingerprint != before.fingerprint
    else:
        measured = json.loads((tmp_path / "run/vae/about.json").read_text())["latent_std_all"]
        assert codec.scale == pytest.approx(1 / measured) and codec.shift == 0


def nan_loss(loss, *arguments):
    return loss(*arguments) * float("nan")


def nan_gradient(loss, output, other):
    output.register_hook(lambda gradient: gradient * float("nan"))
    return loss(output, other)


@pytest.mark.parametrize(("name", "at_call", "failing"), [
    ("reconstruction_loss", 4, nan_loss),
    ("discriminator_loss", 2, nan_gradient),  # the discriminator starts at step 3; its loss is finite
])  # fmt: skip
def test_a_step_that_is_not_finite_changes_nothing(images, tmp_path, monkeypatch, name, at_call, failing):
    loss, calls = getattr(step_module, name), []

    def called(*arguments):
        calls.append(1)
        return failing(loss, *arguments) if len(calls) == at_call else loss(*arguments)

    monkeypatch.setattr(step_module, name, called)
    config = small(images, tmp_path / "run", "training.steps=4", "training.checkpoint_every=1")
    train_autoencoder(config, device="cpu")
    third, fourth = (states(tmp_path / "run", f"checkpoints/step-{n:07d}") for n in (3, 4))
    for file in third.keys() - {"progress.safetensors"}:
        assert all(torch.equal(tensor, fourth[file][name]) for name, tensor in third[file].items()), file
    [skipped] = read_records(tmp_path / "run/skipped.jsonl")
    assert skipped["step"] == 4 and len(set(skipped["keys"])) == 8


def test_compiled_blocks_and_bf16_give_nearly_the_same_losses(images, whole, tmp_path, monkeypatch):
    sizes = []

    def backend(graph, inputs):  # Inductor on a CPU fails on sizes that are not numbers
        sizes.extend(size for value in inputs if isinstance(value, torch.Tensor) for size in value.shape)
        return aot_eager(graph, inputs)

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    train_autoencoder(small(images, tmp_path / "run", "training.compile=true", "training.steps=4"), device="cpu")
    assert sizes and all(type(size) is int for size in sizes) and torch._dynamo.config.recompile_limit >= 64
    assert losses(tmp_path / "run") == pytest.approx(losses(whole)[:4], rel=1e-4)
    train_autoencoder(small(images, tmp_path / "bf16", "training.precision=bf16", "training.steps=4"), device="cpu")
    assert losses(tmp_path / "bf16")[:3] == pytest.approx(losses(whole)[:3], rel=2e-2)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_optimizers_one_pass_takes_the_channels_last_weights(images, tmp_path, monkeypatch, precision):
    """As on a GPU, on which it is the real kernel; elsewhere it is the definition in PyTorch."""
    device, strides = "cuda" if torch.cuda.is_available() else "cpu", []

    def noted(params, *others):
        strides.extend(param.stride() for param in params)
        adamw_ema(params, *others)

    monkeypatch.setattr(engine, "adamw_ema", noted)
    for one_pass in (True, False):
        monkeypatch.setattr(engine, "use_triton", lambda *_, one_pass=one_pass: one_pass)
        options = (f"training.precision={precision}", "training.steps=4", "model.attention=true")
        vae = train_autoencoder(small(images, tmp_path / f"{one_pass}", *options), device=device)
        stored = states(tmp_path / f"{one_pass}", "checkpoints/step-0000004")["model.safetensors"]
        weights = [*stored.values(), *LatentCodec.load(vae).vae.parameters()]
        assert all(weight.dtype == torch.float32 for weight in weights)  # not those that the optimizer rounds
    assert (72, 1, 24, 8) in strides and (72, 9, 3, 1) not in strides  # of (n, 8, 3, 3)
    exact = precision == "fp32" and device == "cpu"
    assert losses(tmp_path / "True") == pytest.approx(losses(tmp_path / "False"), rel=1e-5 if exact else 1e-2)


def test_a_scale_that_does_not_fit_is_warned_of_and_kept(images, tmp_path, capsys):
    config = small(images, tmp_path / "run", "model.scaling_factor=0.001", "training.steps=4")
    out = train_autoencoder(config, device="cpu")
    assert "warning: the standard deviations of the scaled latents are" in capsys.readouterr().out
    assert LatentCodec.load(out).scale == 0.001


def test_verify_knows_these_checkpoints(whole, tmp_path):
    assert verify(whole, lambda line: None) == []
    shutil.copytree(whole, tmp_path / "run")
    file = tmp_path / "run" / LAST / "discriminator.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    assert any("discriminator.safetensors has" in problem for problem in verify(tmp_path / "run", lambda line: None))


def test_an_average_with_decay_0_is_the_weights_and_no_fault(images, tmp_path):
    train_autoencoder(
        small(images, tmp_path / "run", "training.ema_decay=0", "training.steps=100", "training.checkpoint_every=100",
              "training.evaluate_every=0", "training.global_batch=2", "discriminator.weight=0"),
        device="cpu",
    )  # fmt: skip
    assert verify(tmp_path / "run") == []


def test_a_resume_says_what_was_changed(images, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    config = small(images, tmp_path / "run", "training.steps=9", "data.crop=random", "discriminator.lr=1e-5")
    train_autoencoder(config, resume=True, device="cpu")
    said = (tmp_path / "run" / "train.log").read_text()
    for change in ("training.steps=8 -> 9", "data.crop='center' -> 'random'", "discriminator.lr=None -> 1e-05"):
        assert change in said.split("changed since step 8: ")[1]


def test_a_resume_refuses_other_images_of_the_same_number(images, whole, tmp_path):
    """Which ones are held out would change."""
    shutil.copytree(images, tmp_path / "images")
    shutil.copytree(whole, tmp_path / "run")
    train_autoencoder(small(tmp_path / "images", tmp_path / "run", "training.steps=9"), resume=True, device="cpu")
    first = sorted((tmp_path / "images" / "3").iterdir())[0]
    first.rename(first.with_name("9999.png"))
    with pytest.raises(ValueError, match="was trained on other images than data.images=.*images has now; restore them"):
        train_autoencoder(small(tmp_path / "images", tmp_path / "run", "training.steps=10"), resume=True, device="cpu")


def test_a_resume_counts_images_that_were_replaced_in_place(images, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    shutil.copytree(images, tmp_path / "images")
    later = (tmp_path / "run" / LAST / "checkpoint.json").stat().st_mtime_ns + 1
    for path in sorted(tmp_path.glob("images/*/*.png"))[:3]:
        os.utime(path, ns=(later, later))
    for step in (9, 10):  # the checkpoint of step 9 is younger than they are
        config = small(tmp_path / "images", tmp_path / "run", f"training.steps={step}")
        train_autoencoder(config, resume=True, device="cpu")
        told = f"warning: 3 files of {tmp_path}/images changed after step 8 was saved\n"
        assert (tmp_path / "run" / "train.log").read_text().count("images changed after") == 1
        assert told in (tmp_path / "run" / "train.log").read_text()


def test_a_resume_refuses_other_settings(images, whole, tmp_path):
    for change, message in (
        ("training.global_batch=4", "has training.global_batch=8, this run 4; make them equal to resume"),
        ("model.layers=2", "has model.layers=1, this run 2; make them equal to resume"),
        ("data.val_fraction=0.2", "has images="),
        ("seed=1", "has seed=0, this run 1"),
        ("training.steps=7", "training.steps=7 is less than the 8 steps of .*; use more to resume"),
        ("discriminator.weight=0", "has discriminator.weight=0.5, this run 0.0; a resume can change it, but neither"),
    ):
        with pytest.raises(ValueError, match=message):
            train_autoencoder(small(images, whole, change), resume=True, device="cpu")
    with pytest.raises(ValueError, match="is not empty; continue with --resume"):
        train_autoencoder(small(images, whole), device="cpu")


def test_commands_for_runs_of_a_network_name_the_folder_to_use(whole, capsys):
    with pytest.raises(SystemExit):
        main(["sample", str(whole)])
    assert "is of an autoencoder" in capsys.readouterr().err
