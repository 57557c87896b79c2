"""Conversion of official files: every bit is kept, mistakes are named, nothing in a file is executed."""

import argparse
import os
import pickle
import shutil
import sys

import pytest
import torch

from fastdit import cli
from fastdit.config import load_config
from fastdit.convert import convert
from fastdit.convert.official import architecture
from fastdit.diffusion.guidance import guided
from fastdit.diffusion.samplers import SAMPLERS
from fastdit.models.dit import DIT_VARIANTS, create_dit
from fastdit.sampling import load_pipeline, sample
from fastdit.training import checkpoint
from helpers.checkpoints import (
    SIZE,
    assert_same,
    golden,
    golden_weights,
    moved,
    quiet,
    training_file,
    weights,
    without,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_plain_file_survives_the_round_trip_bit_for_bit(place, tmp_path):
    assert_same(weights(place / "ddpm"), golden_weights())
    assert_same(weights(place / "ddpm", "model"), golden_weights())
    convert(place / "ddpm", "official", tmp_path / "back.pt", say=quiet)
    back = torch.load(tmp_path / "back.pt", weights_only=True)  # `ema` is what the official scripts read
    assert_same(back["ema"], golden_weights())
    assert_same(back["model"], golden_weights())


def test_a_training_file_keeps_model_and_ema_and_names_its_objective(place, tmp_path):
    wrapped = "_orig_mod.module."
    path = training_file(tmp_path / "0400000.pt", wrapped, model="DiT-2x48x4/2", num_classes=10, vae="mse", lr=1e-4)
    convert(path, "fastdit", tmp_path / "run", say=quiet)
    assert_same(weights(tmp_path / "run"), golden_weights())
    assert_same(weights(tmp_path / "run", "model"), moved(golden_weights(), 0.25))
    config, meta = load_config(tmp_path / "run" / "config.yaml"), checkpoint.read_meta(tmp_path / "run")
    assert (config.objective.name, config.model.variant, config.data.num_classes) == ("ddpm", "DiT-2x48x4/2", 10)
    assert meta["step"] == 400_000
    # the autoencoder is known by name alone: Stable Diffusion's, whose scale and factor are published
    assert meta["latents"]["vae"] == "stabilityai/sd-vae-ft-mse" and meta["latents"]["codec"] == ""
    assert (meta["latents"]["scale"], meta["latents"]["image_size"]) == (0.18215, 64)
    convert(tmp_path / "run", "official", tmp_path / "back.pt", say=quiet)
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert_same(back["ema"], golden_weights())
    assert_same(back["model"], moved(golden_weights(), 0.25))
    convert(tmp_path / "back.pt", "fastdit", tmp_path / "again", say=quiet)
    assert_same(weights(tmp_path / "again", "model"), weights(tmp_path / "run", "model"))


def test_a_sit_file_names_path_prediction_and_weight(tmp_path):
    args = {"model": "SiT-2x48x4/2", "path_type": "GVP", "prediction": "noise", "loss_weight": "likelihood",
            "train_eps": 0.01, "sample_eps": None}  # fmt: skip
    path = training_file(tmp_path / "sit.pt", **args)
    convert(path, "fastdit", tmp_path / "run", say=quiet)
    config = load_config(tmp_path / "run" / "config.yaml")
    assert config.objective.name == "flow" and config.model.learn_sigma is True
    wanted = {"interpolant": "gvp", "prediction": "eps", "weight": "likelihood", "train_eps": 0.01}
    assert config.objective.options == wanted
    assert_same(weights(tmp_path / "run"), golden_weights())  # the head's idle half too


@pytest.mark.parametrize("variant", [v for v in DIT_VARIANTS if not v.startswith("DiT-Ti")])
def test_the_architecture_of_every_known_size_is_read_off_its_shapes(variant):
    with torch.device("meta"):
        for options in ({}, {"class_dropout": 0.0}, {"learn_sigma": False, "num_classes": 7, "input_size": 64}):
            state = create_dit(variant, **options).state_dict()
            classes, null = options.get("num_classes", 1000), options.get("class_dropout", 0.1) > 0
            shape = architecture(state, "it", num_classes=None if null else classes)
            assert (shape.variant, shape.num_classes, shape.null_row) == (variant, classes, null)
            assert shape.input_size == options.get("input_size", 32)
            assert shape.learn_sigma == options.get("learn_sigma", True)
        assert architecture(create_dit(variant, num_classes=0).state_dict(), "it").num_classes == 0


def released(depth: int, d: int, tokens: int, classes: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a released file: latents of 4 channels, patches of 2, learned variance, a null label."""
    block = {
        "attn.qkv": (3 * d, d), "attn.proj": (d, d), "mlp.fc1": (4 * d, d), "mlp.fc2": (d, 4 * d),
        "adaLN_modulation.1": (6 * d, d),
    }  # fmt: skip
    linears = {"t_embedder.mlp.0": (d, 256), "t_embedder.mlp.2": (d, d)}
    linears |= {f"blocks.{i}.{name}": shape for i in range(depth) for name, shape in block.items()}
    linears |= {"final_layer.linear": (2 * 4 * 2 * 2, d), "final_layer.adaLN_modulation.1": (2 * d, d)}
    linears |= {"x_embedder.proj": (d, 4, 2, 2)}
    shapes = {f"{name}.weight": shape for name, shape in linears.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in linears.items()}
    return shapes | {"pos_embed": (1, tokens, d), "y_embedder.embedding_table.weight": (classes + 1, d)}


@pytest.mark.parametrize("size", [256, 512])
def test_a_file_with_the_layout_of_the_released_xl_2_fits_the_network_exactly(size):
    recorded = {name: tuple(tensor.shape) for name, tensor in golden_weights().items()}
    assert released(2, 48, 16, 10) == recorded  # the table is right: the official code wrote these
    side = size // 8
    layout = released(28, 1152, (side // 2) ** 2, 1000)
    file = {name: torch.empty(shape, device="meta") for name, shape in layout.items()}
    shape = architecture(file, "DiT-XL-2.pt")
    assert (shape.variant, shape.input_size, shape.num_classes) == ("DiT-XL/2", side, 1000)
    with torch.device("meta"):
        network = create_dit(shape.variant, input_size=shape.input_size, learn_sigma=shape.learn_sigma)
    assert {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()} == layout
    network.load_state_dict(file, strict=True, assign=True)
    assert sum(map(torch.numel, file.values())) == network.parameter_count() == 675_129_632 + 1152 * (size == 512) * 768


def test_a_converted_network_gives_the_recorded_outputs(place):
    z, model = golden("dit"), load_pipeline(place / "ddpm").model
    with torch.no_grad():
        torch.testing.assert_close(model(z["x"], z["t"], z["y"]), z["out"], atol=1e-5, rtol=1e-5)
    sit, generator = golden("sit"), load_pipeline(place / "flow")
    x, t = sit["x1"], 1 - sit["sit_forward/t"].double()
    velocity = generator.objective.predict(generator.model, x, t, sit["sit_forward/y"]).velocity.detach()
    torch.testing.assert_close(-velocity, sit["sit_forward/out"], atol=1e-5, rtol=1e-5)


def test_a_converted_checkpoint_samples_the_recorded_trajectory_and_images(place, tmp_path):
    z, generator = golden("ddpm"), load_pipeline(place / "ddpm")
    objective = generator.objective
    denoise = guided(objective, generator.model, z["loop/y"])
    final = SAMPLERS["ddim"](denoise, z["x_T"], objective.timesteps(int(z["loop/steps"])), objective.path)
    torch.testing.assert_close(final, z["loop/ddim/final"], atol=1e-4, rtol=1e-4)
    for name in ("ddpm", "flow"):
        out = sample(place / name, tmp_path / name, 3, overrides=["sampling.steps=3"], device="cpu")
        assert len(list((out / "images").iterdir())) == 3


class Evil:
    """A pickle that runs a command when it is loaded."""

    def __reduce__(self):
        return os.system, (f"touch {os.environ['EVIL']}",)


@pytest.mark.parametrize("kind", ["zip", "legacy", "bare", "args", "diffusers"])
def test_a_malicious_pickle_is_refused_and_not_executed(place, tmp_path, monkeypatch, kind):
    monkeypatch.setenv("EVIL", str(tmp_path / "pwned"))
    path = tmp_path / "evil.pt"
    if kind == "bare":
        path.write_bytes(pickle.dumps(Evil(), protocol=2))
    elif kind == "args":
        torch.save({"ema": golden_weights(), "args": argparse.Namespace(model="DiT-XL/2", lr=Evil())}, path)
    elif kind == "diffusers":
        shutil.copytree(place / "ddpm_pipe", tmp_path / "pipe")
        path = tmp_path / "pipe"
        (path / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
        torch.save({"x": Evil()}, path / "transformer" / "diffusion_pytorch_model.bin")
    else:
        torch.save({"ema": Evil()}, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(ValueError, match=r"posix\.system|cannot be read|not a PyTorch checkpoint") as error:
        convert(path, "fastdit", tmp_path / "out", overrides=["objective=ddpm"], heads=4, say=quiet)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "pwned").exists() and not (tmp_path / "out").exists()
    if kind in ("zip", "args"):
        torch.load(path, weights_only=False)  # the trap does work
        assert (tmp_path / "pwned").exists()


HEAD = {"weight": (48,), "bias": ()}
MISTAKES = {
    "no objective": (golden_weights, [], ["do not show the objective", "objective=flow"]),
    "unknown width": (golden_weights, ["objective=ddpm"], ["hidden size 48, not one of 64,", "with --heads"]),
    "no heads": (golden_weights, ["objective=ddpm", "--heads", "0"], ["--heads=0 does not divide"]),
    "heads": (golden_weights, ["objective=ddpm", "--heads", "5"], ["--heads=5 does not divide the hidden size 48"]),
    "objective": (golden_weights, ["objective=ddmp"], ["objective.name='ddmp'", "did you mean 'ddpm'"]),
    "an option": (golden_weights, ["objective=flow", "objective.path=gvp"], ["objective.path='gvp'", "did you mean"]),
    "classes": (golden_weights, ["objective=ddpm", "data.num_classes=7"], ["num_classes=7", "11 rows", "use 10"]),
    "pixels": (golden_weights, ["objective=ddpm", "data.image_size=64"], ["image_size=64", "16 px images"]),
    "variant": (golden_weights, ["objective=ddpm", "model.variant=DiT-S/2"], ["DiT-S/2", "contains DiT-2x48x4/2"]),
    "target": (golden_weights, ["objective=ddpm", "--to", "onnx"], ["--to='onnx'", "fastdit, official, diffusers"]),
    "a missing tensor": (
        lambda: without(golden_weights(), "blocks.1.mlp.fc2.bias"),
        ["objective=ddpm"],
        ["blocks.1.mlp.fc2.bias is missing"],
    ),
    "a tensor too many": (
        lambda: golden_weights() | {"blocks.0.attn.q_norm.weight": torch.ones(12)},
        ["objective=ddpm"],
        ["blocks.0.attn.q_norm.weight has no place"],
    ),
    "no DiT": (lambda: {"conv.weight": torch.zeros(3)}, ["objective=ddpm"], ["x_embedder.proj.weight", "conv.weight"]),
    "no state dict": (lambda: {"epoch": 3, "lr": 1e-4}, ["objective=ddpm"], ["contains epoch, lr", "{model, ema, opt"]),
    "narrow head": (
        lambda: golden_weights() | {f"final_layer.linear.{k}": torch.zeros(16, *s) for k, s in HEAD.items()},
        ["objective=ddpm"],
        ["4 output channels", "needs 8", "objective.variance=fixed_small"],
    ),
    "channels": (
        lambda: golden_weights() | {"x_embedder.proj.weight": torch.zeros(48, 8, 2, 2)},
        ["objective=flow"],
        ["4 latent channels, but the network has 8", "data.vae=FOLDER"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_end_in_one_line_and_leave_nothing(place, tmp_path, capsys, monkeypatch, name):
    state, arguments, words = MISTAKES[name]
    torch.save(state(), tmp_path / "in.pt")
    size = [] if "--heads" in arguments or name == "unknown width" else SIZE
    fixed = ["convert", str(tmp_path / "in.pt"), "--to", "fastdit", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["fastdit", *fixed, *size, *arguments, f"data.vae={place}/vae"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and error.startswith("error: "), error
    assert all(word in error for word in words), error
    assert [path.name for path in tmp_path.iterdir()] == ["in.pt"]


def test_files_that_are_not_checkpoints_are_refused(place, tmp_path):
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "cut.pt").write_bytes((place / "plain.pt").read_bytes()[:5000])
    (tmp_path / "cut.safetensors").write_bytes(b"x" * 100)
    (tmp_path / "empty").mkdir()
    for name, word in [("text.pt", "damaged"), ("cut.pt", "damaged"), ("cut.safetensors", "damaged"),
                       ("empty", "holds no complete checkpoint"), ("gone.pt", "does not exist")]:  # fmt: skip
        with pytest.raises(ValueError, match=word):
            convert(tmp_path / name, "fastdit", tmp_path / "out", overrides=["objective=ddpm"], say=quiet)
    with pytest.raises(ValueError, match="exists; choose another name"):
        convert(place / "plain.pt", "fastdit", place / "ddpm", say=quiet)
    with pytest.raises(ValueError, match="has its own config"):
        convert(place / "ddpm", "official", tmp_path / "out.pt", config=place / "ddpm" / "config.yaml", say=quiet)
    with pytest.raises(ValueError, match=r"objective.name='flow', but .* was trained with ddpm"):
        path = training_file(tmp_path / "dit.pt", model="DiT-2x48x4/2")
        convert(path, "fastdit", tmp_path / "out", overrides=["objective=flow"], say=quiet)
    assert not (tmp_path / "out").exists()
