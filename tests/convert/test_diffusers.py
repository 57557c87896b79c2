"""diffusers folders: the networks agree, the pipelines make the same images, and converting back restores every bit."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastdit.config import load_config
from fastdit.convert import convert
from fastdit.convert.scheduler import scheduler_of, settings_of
from fastdit.diffusion.guidance import guided
from fastdit.diffusion.objectives import DDPM, FlowMatching
from fastdit.diffusion.samplers import SAMPLERS
from fastdit.models.dit import create_dit
from fastdit.sampling import load_pipeline
from fastdit.training import checkpoint
from helpers.checkpoints import (
    assert_same,
    golden,
    golden_weights,
    make_checkpoint,
    quiet,
    weights,
    without,
)
from helpers.data import tiny_vae

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
pytestmark = pytest.mark.usefixtures("one_thread")


def exported(place, name, **arguments):
    """`pipe`, as the code block in the README.md of an exported folder makes it."""
    code = re.search(r"```python\n(.*?)```", (place / f"{name}_pipe" / "README.md").read_text(), re.S)[1]
    scope = {}
    exec(code, scope)
    scope["pipe"].set_progress_bar_config(disable=True)
    return scope["pipe"]


def test_the_exported_transformer_gives_the_recorded_outputs_and_ours(place):
    z, transformer, model = golden("dit"), exported(place, "ddpm").transformer, load_pipeline(place / "ddpm").model
    y = torch.where(z["y"] == 10, 1000, z["y"])
    with torch.no_grad():
        for t, out in ((z["t"], z["out"]), (z["t_fractional"], z["out_t_fractional"])):
            theirs = transformer(z["x"], timestep=t, class_labels=y).sample
            torch.testing.assert_close(theirs, out, **CLOSE)  # recorded on another processor
            # the same machine: what is left is that a bias is added in another place
            torch.testing.assert_close(model(z["x"], t, z["y"]), theirs, atol=1e-6, rtol=1e-6)
        null = torch.full_like(y, 10), torch.full_like(y, 1000)
        ours, theirs = model(z["x"], z["t"], null[0]), transformer(z["x"], timestep=z["t"], class_labels=null[1]).sample
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


def test_in_float64_the_two_networks_agree_far_below_fp32(place):
    z, ours, theirs = golden("dit"), load_pipeline(place / "ddpm").model.double(), exported(place, "ddpm").transformer
    theirs.double()
    ours.t_embedder.mlp.register_forward_pre_hook(lambda module, inputs: inputs[0].double())
    with torch.no_grad():
        out = ours(z["x"].double(), z["t"], z["y"])
        other = theirs(z["x"].double(), timestep=z["t"], class_labels=torch.where(z["y"] == 10, 1000, z["y"])).sample
    assert out.dtype == other.dtype == torch.float64
    torch.testing.assert_close(out, other, atol=1e-12, rtol=1e-12)


def test_the_readme_of_an_export_is_true(place):
    """Without the line in the README, diffusers uses its own frequencies: the output is off by as much as it says."""
    from diffusers import DiTTransformer2DModel

    text = (place / "ddpm_pipe" / "README.md").read_text()
    assert "IMPORTANT" in text and "downscale_freq_shift = 0" in text
    loaded = DiTTransformer2DModel.from_pretrained(place / "ddpm_pipe" / "transformer")
    assert all(block.norm3.eps == 1e-6 for block in loaded.transformer_blocks)  # the config carries it
    z = golden("dit")
    with torch.no_grad():
        out = loaded(z["x"], timestep=z["t"], class_labels=torch.where(z["y"] == 10, 1000, z["y"])).sample
    said = float(re.search(r"off by ([\d.e-]+) of", text)[1])
    assert (out - z["out"]).abs().max() > 0.1 and said > 0.1
    assert "downscale_freq_shift" not in (place / "flow_pipe" / "README.md").read_text()  # folded into the weights


@pytest.mark.parametrize("name, sampler", [("ddpm", "ddim"), ("flow", "euler")])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_pipeline_makes_the_same_images_as_our_sampler(place, name, sampler, scale):
    classes, steps = [3, 7], 10
    pipe, generator = exported(place, name), load_pipeline(place / name)
    draw = lambda: [torch.Generator().manual_seed(i) for i in (0, 1)]  # noqa: E731
    theirs = pipe(classes, scale, draw(), num_inference_steps=steps, output_type="pt").images
    x_1 = torch.stack([torch.randn(1, 4, 8, 8, generator=g)[0] for g in draw()])
    objective = generator.objective
    denoise = guided(objective, generator.model, torch.tensor(classes), scale)
    ts = objective.timesteps(f"ddim{steps}" if name == "ddpm" else steps)
    x_0 = SAMPLERS[sampler](denoise, x_1, ts, objective.path)
    ours = (generator.codec.decode(x_0) / 2 + 0.5).clamp(0, 1)
    assert theirs.std() > 0.01
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)


def test_a_diffusers_folder_comes_back_bit_for_bit(place, tmp_path):
    heard = []
    convert(place / "ddpm_pipe", "fastdit", tmp_path / "run", say=heard.append)
    assert_same(weights(tmp_path / "run"), golden_weights())
    ours, theirs = load_config(tmp_path / "run" / "config.yaml"), load_config(place / "ddpm" / "config.yaml")
    assert (ours.model, ours.objective, ours.sampling) == (theirs.model, theirs.objective, theirs.sampling)
    assert (
        checkpoint.read_meta(tmp_path / "run")["latents"]["codec"] == load_pipeline(place / "ddpm").codec.fingerprint
    )
    assert any(re.search(r"difference from diffusers .*: \d.\de-0[78] of", line) for line in heard)


def test_a_flow_folder_comes_back_as_the_same_function(place, tmp_path):
    convert(place / "flow_pipe", "fastdit", tmp_path / "run", say=quiet)
    ours, theirs = weights(tmp_path / "run"), golden_weights()
    changed = {name for name in theirs if not torch.equal(ours[name], theirs[name])}
    assert changed == {"t_embedder.mlp.0.weight"}  # on t in [0, 1] a few directions of it say everything
    ours, theirs = load_pipeline(tmp_path / "run").model, load_pipeline(place / "flow").model
    x, t = torch.randn(32, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.linspace(0, 1, 32)
    with torch.no_grad():
        out = [model(x, t, torch.arange(32) % 11) for model in (ours, theirs)]
    torch.testing.assert_close(*out, atol=5e-6, rtol=5e-6)


def strip(folder):
    """Remove fastdit's own files, which folders written by others do not have."""
    for path in folder.glob("fastdit.*"):
        path.unlink()


def test_a_foreign_folders_objective_is_read_from_its_scheduler(place, tmp_path):
    shutil.copytree(place / "ddpm_pipe", tmp_path / "pipe")
    strip(tmp_path / "pipe")
    convert(tmp_path / "pipe", "fastdit", tmp_path / "run", from_official=True, say=quiet)
    config, state = load_config(tmp_path / "run" / "config.yaml"), weights(tmp_path / "run")
    assert (config.objective.name, config.data.num_classes) == ("ddpm", 1000)
    assert torch.equal(
        state["y_embedder.embedding_table.weight"][-1], golden_weights()["y_embedder.embedding_table.weight"][-1]
    )
    overrides = ["data.num_classes=10"]
    convert(tmp_path / "pipe", "fastdit", tmp_path / "ten", from_official=True, overrides=overrides, say=quiet)
    assert_same(weights(tmp_path / "ten"), golden_weights())


@pytest.mark.parametrize("schedule", ["linear", "cosine", "scaled_linear", "zero_terminal_snr"])
@pytest.mark.parametrize("prediction", ["x_0", "v"])
@pytest.mark.parametrize("learned", [True, False])
def test_a_scheduler_says_what_was_learned(schedule, prediction, learned):
    fixed = {} if learned else {"variance": "fixed_small", "loss_type": "mse"}
    objective = DDPM(schedule, prediction, **fixed)

    def read(objective):
        said = settings_of(json.loads(scheduler_of(objective).to_json_string()), learned, "it")
        assert said.pop("objective.name") == ("ddpm" if isinstance(objective, DDPM) else "flow")
        return {key.removeprefix("objective."): value for key, value in said.items() if key.startswith("objective.")}

    assert DDPM(**read(objective)) == objective
    assert FlowMatching(**read(FlowMatching(shift=3.0))) == FlowMatching(sample_shift=3.0)


@pytest.mark.parametrize("options", [{"class_dropout": 0.0}, {"num_classes": 0}, {"learn_sigma": False}])
def test_networks_without_null_label_classes_or_variance_survive_diffusers(place, tmp_path, options):
    torch.manual_seed(0)
    model = create_dit("DiT-2x32x2/4", input_size=8, **{"num_classes": 5, **options})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    torch.save(model.state_dict(), tmp_path / "odd.pt")
    overrides = ["objective=ddpm", f"data.vae={place}/vae"]
    overrides += ["data.num_classes=5"] if "class_dropout" in options else []
    overrides += ["objective.variance=fixed_small", "objective.loss_type=mse"] if "learn_sigma" in options else []
    convert(tmp_path / "odd.pt", "fastdit", tmp_path / "run", overrides=overrides, heads=2, say=quiet)
    convert(tmp_path / "run", "diffusers", tmp_path / "pipe", say=quiet)
    convert(tmp_path / "pipe", "fastdit", tmp_path / "back", say=quiet)
    assert_same(weights(tmp_path / "back"), model.state_dict())
    assert (
        load_pipeline(tmp_path / "back", ["sampling.sampler=ddim", "sampling.steps=2"]).model.null_label
        == model.null_label
    )


def test_an_autoencoder_that_is_no_local_folder_is_passed_by_the_user(place, tmp_path):
    from diffusers import DiTPipeline

    overrides = ["objective=ddpm", "data.vae=stabilityai/sd-vae-ft-ema"]
    convert(place / "plain.pt", "fastdit", tmp_path / "run", overrides=overrides, heads=4, say=quiet)
    heard = []
    convert(tmp_path / "run", "diffusers", tmp_path / "pipe", say=heard.append)
    assert any("was not copied" in line for line in heard) and not (tmp_path / "pipe" / "vae").exists()
    pipe = DiTPipeline.from_pretrained(tmp_path / "pipe", vae=tiny_vae())
    pipe.set_progress_bar_config(disable=True)
    assert pipe([1], 1.0, num_inference_steps=2, output_type="pt").images.shape == (1, 3, 16, 16)


@pytest.mark.parametrize("options", [{"mlp": "gelu"}, {"qkv_bias": False}, {"mlp": "gelu", "qkv_bias": False}])
def test_options_that_diffusers_supports_survive_the_round_trip(place, tmp_path, options):
    source = make_checkpoint(place, tmp_path / "odd", **options)
    convert(source, "diffusers", tmp_path / "pipe", say=quiet)  # which compares the two networks
    for name in ("pipe", "stripped"):
        if name == "stripped":
            shutil.copytree(tmp_path / "pipe", tmp_path / name)
            strip(tmp_path / name)
        foreign = {"overrides": ["data.num_classes=5"], "from_official": True} if name == "stripped" else {}
        convert(tmp_path / name, "fastdit", tmp_path / f"{name}_back", say=quiet, **foreign)
        assert_same(weights(tmp_path / f"{name}_back"), weights(source))
        model = load_config(tmp_path / f"{name}_back" / "config.yaml").model
        assert {key: getattr(model, key) for key in options} == options
    with pytest.raises(ValueError, match=f"model.{next(iter(options))}=.* is not supported by the official DiT"):
        convert(source, "official", tmp_path / "back.pt", say=quiet)


@pytest.mark.parametrize("to", ["diffusers", "official"])
def test_rectangular_latents_are_refused(place, tmp_path, to):
    source = make_checkpoint(place, tmp_path / "odd", shape=(4, 8, 32))  # 16 patches, which would also make a square
    with pytest.raises(ValueError, match="latents of 8 x 32 are not square"):
        convert(source, to, tmp_path / ("out.pt" if to == "official" else "out"), say=quiet)


def test_another_position_table_and_too_many_classes_are_refused(place, tmp_path):
    state = golden_weights()
    torch.save(state | {"pos_embed": state["pos_embed"] + 0.1}, tmp_path / "learned.pt")
    many = torch.zeros(1201, 48)
    torch.save(state | {"y_embedder.embedding_table.weight": many}, tmp_path / "many.pt")
    for name, word in (("learned", "pos_embed is not the fixed"), ("many", "data.num_classes=1200 is too large")):
        overrides = ["objective=ddpm", f"data.vae={place}/vae"]
        convert(tmp_path / f"{name}.pt", "fastdit", tmp_path / name, overrides=overrides, heads=4, say=quiet)
        with pytest.raises(ValueError, match=word):
            convert(tmp_path / name, "diffusers", tmp_path / "out", say=quiet)


def test_embedders_that_differ_between_blocks_are_refused(place, tmp_path):
    shutil.copytree(place / "ddpm_pipe", tmp_path / "pipe")
    path = tmp_path / "pipe" / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    state["transformer_blocks.1.norm1.emb.timestep_embedder.linear_2.bias"] += 1
    save_file(state, path, {"format": "pt"})
    with pytest.raises(ValueError, match="linear_2.bias differs from block 0's"):
        convert(tmp_path / "pipe", "fastdit", tmp_path / "out", say=quiet)
    save_file(without(state, "proj_out_2.bias"), path, {"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 weight, proj_out_2.bias first"):
        convert(tmp_path / "pipe", "fastdit", tmp_path / "out", say=quiet)
