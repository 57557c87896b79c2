"""Conversion: every bit arrives, the networks agree, nothing in a file is executed."""

import argparse
import json
import os
import pickle
import re
import sys

import pytest
import torch
from convert_cases import SIZE, golden, golden_weights, moved, training_file
from data_cases import tiny_vae
from safetensors.torch import load_file, save_file

from fastdit import cli
from fastdit.config import load_config
from fastdit.conversion import convert
from fastdit.diffusion.guidance import guided
from fastdit.diffusion.objectives import DDPM, FlowMatching
from fastdit.diffusion.samplers import SAMPLERS
from fastdit.models.convert import architecture
from fastdit.models.diffusers_dit import objective_of, scheduler_of
from fastdit.models.dit import DIT_VARIANTS, create_dit
from fastdit.sampling import load_generator, sample
from fastdit.training import checkpoint


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def quiet(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """vae/, plain.pt, ddpm/ and flow/ (converted to fastdit), ddpm_pipe/ and flow_pipe/ (from these to diffusers)."""
    root = tmp_path_factory.mktemp("convert")
    tiny_vae().save_pretrained(root / "vae")
    torch.save(golden_weights(), root / "plain.pt")
    for name in ("ddpm", "flow"):
        overrides = [f"objective={name}", f"data.vae={root}/vae"]
        convert(root / "plain.pt", "fastdit", root / name, overrides=overrides, heads=4, say=quiet)
        convert(root / name, "diffusers", root / f"{name}_pipe", say=quiet)
    return root


def weights(folder, name="ema"):
    return load_file(folder / f"{name}.safetensors")


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


def test_a_plain_file_goes_there_and_back_bit_for_bit(place, tmp_path):
    assert_same(weights(place / "ddpm"), golden_weights())
    assert_same(weights(place / "ddpm", "model"), golden_weights())
    convert(place / "ddpm", "official", tmp_path / "back.pt", say=quiet)
    assert_same(torch.load(tmp_path / "back.pt", weights_only=True), golden_weights())


def test_a_training_file_keeps_both_sets_and_tells_its_objective(place, tmp_path):
    wrapped = "_orig_mod.module."
    path = training_file(tmp_path / "0400000.pt", wrapped, model="DiT-XL/2", num_classes=10, vae="mse", lr=1e-4)
    heard = []
    convert(path, "fastdit", tmp_path / "run", heads=4, say=heard.append)
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
    convert(tmp_path / "back.pt", "fastdit", tmp_path / "again", heads=4, say=quiet)
    assert_same(weights(tmp_path / "again", "model"), weights(tmp_path / "run", "model"))


def test_a_sit_file_tells_path_prediction_and_weight(tmp_path):
    args = {"model": "SiT-XL/2", "path_type": "GVP", "prediction": "noise", "loss_weight": "likelihood",
            "train_eps": 0.01, "sample_eps": None}  # fmt: skip
    path = training_file(tmp_path / "sit.pt", **args)
    convert(path, "fastdit", tmp_path / "run", heads=4, say=quiet)
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


def test_a_converted_network_gives_the_recorded_outputs(place):
    z, model = golden("dit"), load_generator(place / "ddpm").model
    with torch.no_grad():
        torch.testing.assert_close(model(z["x"], z["t"], z["y"]), z["out"], atol=1e-5, rtol=1e-5)
    sit, generator = golden("sit"), load_generator(place / "flow")
    x, t = sit["x1"], 1 - sit["sit_forward/t"].double()
    velocity = generator.objective.predict(generator.model, x, t, sit["sit_forward/y"]).velocity.detach()
    torch.testing.assert_close(-velocity, sit["sit_forward/out"], atol=1e-5, rtol=1e-5)


def test_a_converted_checkpoint_samples_the_recorded_trajectory_and_images(place, tmp_path):
    z, generator = golden("ddpm"), load_generator(place / "ddpm")
    objective = generator.objective
    denoise = guided(objective, generator.model, z["loop/y"])
    final = SAMPLERS["ddim"](denoise, z["x_T"], objective.timesteps(int(z["loop/steps"])), objective.path)
    torch.testing.assert_close(final, z["loop/ddim/final"], atol=1e-4, rtol=1e-4)
    for name in ("ddpm", "flow"):
        out = sample(place / name, tmp_path / name, 3, overrides=["sampling.steps=3"], device="cpu")
        assert len(list((out / "images").iterdir())) == 3


def exported(place, name, **arguments):
    """What the code block of an exported folder's README.md makes: `pipe`."""
    code = re.search(r"```python\n(.*?)```", (place / f"{name}_pipe" / "README.md").read_text(), re.S)[1]
    scope = {}
    exec(code, scope)
    scope["pipe"].set_progress_bar_config(disable=True)
    return scope["pipe"]


def test_the_exported_transformer_gives_the_official_outputs_at_error_zero(place):
    z, transformer = golden("dit"), exported(place, "ddpm").transformer
    y = torch.where(z["y"] == 10, 1000, z["y"])
    with torch.no_grad():
        for t, out in ((z["t"], z["out"]), (z["t_fractional"], z["out_t_fractional"])):
            assert (transformer(z["x"], timestep=t, class_labels=y).sample - out).abs().max() == 0
        null = torch.full_like(y, 10), torch.full_like(y, 1000)
        ours = load_generator(place / "ddpm").model(z["x"], z["t"], null[0])
        theirs = transformer(z["x"], timestep=z["t"], class_labels=null[1]).sample
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)  # a bias is added in another place


def test_in_float64_the_two_networks_agree_to_the_last_fp32_bit(place):
    z, ours, theirs = golden("dit"), load_generator(place / "ddpm").model.double(), exported(place, "ddpm").transformer
    theirs.double()
    ours.t_embedder.mlp.register_forward_pre_hook(lambda module, inputs: inputs[0].double())
    with torch.no_grad():
        out = ours(z["x"].double(), z["t"], z["y"])
        other = theirs(z["x"].double(), timestep=z["t"], class_labels=torch.where(z["y"] == 10, 1000, z["y"])).sample
    assert out.dtype == other.dtype == torch.float64 and (out.float() - other.float()).abs().max() == 0


def test_what_an_export_says_is_true(place):
    """Without the README's line the frequencies are diffusers' own, and the output is off by what it says."""
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
def test_the_pipeline_makes_the_images_of_the_own_sampler(place, name, sampler, scale):
    classes, steps = [3, 7], 10
    pipe, generator = exported(place, name), load_generator(place / name)
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
        checkpoint.read_meta(tmp_path / "run")["latents"]["codec"] == load_generator(place / "ddpm").codec.fingerprint
    )
    assert any("frequency shift 1" in line for line in heard)


def test_a_flow_folder_comes_back_as_the_same_function(place, tmp_path):
    convert(place / "flow_pipe", "fastdit", tmp_path / "run", say=quiet)
    ours, theirs = weights(tmp_path / "run"), golden_weights()
    changed = {name for name in theirs if not torch.equal(ours[name], theirs[name])}
    assert changed == {"t_embedder.mlp.0.weight"}  # on t in [0, 1] a few directions of it say everything
    ours, theirs = load_generator(tmp_path / "run").model, load_generator(place / "flow").model
    x, t = torch.randn(32, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.linspace(0, 1, 32)
    with torch.no_grad():
        out = [model(x, t, torch.arange(32) % 11) for model in (ours, theirs)]
    torch.testing.assert_close(*out, atol=5e-6, rtol=5e-6)


def strip(folder):
    """The folder as diffusers' own users have it: without fastdit's files, classes filling the label table."""
    for path in folder.glob("fastdit.*"):
        path.unlink()


def test_a_folder_of_someone_else_tells_its_objective_by_its_scheduler(place, tmp_path):
    import shutil

    shutil.copytree(place / "ddpm_pipe", tmp_path / "pipe")
    strip(tmp_path / "pipe")
    convert(tmp_path / "pipe", "fastdit", tmp_path / "run", heads=4, say=quiet)
    config, state = load_config(tmp_path / "run" / "config.yaml"), weights(tmp_path / "run")
    assert (config.objective.name, config.data.num_classes) == ("ddpm", 1000)
    assert torch.equal(
        state["y_embedder.embedding_table.weight"][-1], golden_weights()["y_embedder.embedding_table.weight"][-1]
    )
    overrides = ["data.num_classes=10"]
    convert(tmp_path / "pipe", "fastdit", tmp_path / "ten", heads=4, overrides=overrides, say=quiet)
    assert_same(weights(tmp_path / "ten"), golden_weights())


@pytest.mark.parametrize("schedule", ["linear", "cosine", "scaled_linear", "zero_terminal_snr"])
@pytest.mark.parametrize("prediction", ["x_0", "v"])
@pytest.mark.parametrize("learned", [True, False])
def test_a_scheduler_says_what_was_learned(schedule, prediction, learned):
    fixed = {} if learned else {"variance": "fixed_small", "loss_type": "mse"}
    objective = DDPM(schedule, prediction, **fixed)
    written = lambda objective: json.loads(scheduler_of(objective).to_json_string())  # noqa: E731
    assert objective_of(written(objective), learned) == objective
    flow = FlowMatching(shift=3.0)
    assert objective_of(written(flow), learned) == flow
    assert objective_of({"_class_name": "EulerDiscreteScheduler", "beta_schedule": "linear"}, learned) is None


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
        load_generator(tmp_path / "back", ["sampling.sampler=ddim", "sampling.steps=2"]).model.null_label
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


class Evil:
    """A pickle that runs a command when it is loaded."""

    def __reduce__(self):
        return os.system, (f"touch {os.environ['EVIL']}",)


@pytest.mark.parametrize("kind", ["zip", "legacy", "bare", "args", "diffusers"])
def test_a_malicious_pickle_is_refused_and_not_executed(place, tmp_path, monkeypatch, kind):
    import shutil

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


def without(state, *names):
    return {key: value for key, value in state.items() if key not in names}


HEAD = {"weight": (48,), "bias": ()}
MISTAKES = {
    "no objective": (golden_weights, [], ["cannot be told from its weights", "objective=flow"]),
    "unknown width": (golden_weights, ["objective=ddpm", "--heads", "0"], ["hidden size 48", "--heads"]),
    "heads": (golden_weights, ["objective=ddpm", "--heads", "5"], ["--heads=5 does not divide the hidden size 48"]),
    "objective": (golden_weights, ["objective=ddmp"], ["objective.name='ddmp'", "did you mean 'ddpm'"]),
    "an option": (golden_weights, ["objective=flow", "objective.path=gvp"], ["objective.path='gvp'", "did you mean"]),
    "classes": (golden_weights, ["objective=ddpm", "data.num_classes=7"], ["num_classes=7", "11 rows", "use 10"]),
    "pixels": (golden_weights, ["objective=ddpm", "data.image_size=64"], ["image_size=64", "16 px images"]),
    "variant": (golden_weights, ["objective=ddpm", "model.variant=DiT-S/2"], ["DiT-S/2", "holds DiT-2x48x4/2"]),
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
    "no state dict": (lambda: {"epoch": 3, "lr": 1e-4}, ["objective=ddpm"], ["holds epoch, lr", "{model, ema, opt"]),
    "narrow head": (
        lambda: golden_weights() | {f"final_layer.linear.{k}": torch.zeros(16, *s) for k, s in HEAD.items()},
        ["objective=ddpm"],
        ["4 output channels", "needs 8", "objective.variance=fixed_small"],
    ),
    "channels": (
        lambda: golden_weights() | {"x_embedder.proj.weight": torch.zeros(48, 8, 2, 2)},
        ["objective=flow"],
        ["4 latent channels, the network 8", "data.vae=FOLDER"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_end_in_one_line_and_leave_nothing(place, tmp_path, capsys, monkeypatch, name):
    state, arguments, words = MISTAKES[name]
    torch.save(state(), tmp_path / "in.pt")
    size = [] if "--heads" in arguments else SIZE
    fixed = ["convert", str(tmp_path / "in.pt"), "--to", "fastdit", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["fastdit", *fixed, *size, *arguments, f"data.vae={place}/vae"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and error.startswith("error: "), error
    assert all(word in error for word in words), error
    assert [path.name for path in tmp_path.iterdir()] == ["in.pt"]


def test_files_that_are_none_of_ours(place, tmp_path):
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "cut.pt").write_bytes((place / "plain.pt").read_bytes()[:5000])
    (tmp_path / "cut.safetensors").write_bytes(b"x" * 100)
    (tmp_path / "empty").mkdir()
    for name, word in [("text.pt", "damaged"), ("cut.pt", "damaged"), ("cut.safetensors", "damaged"),
                       ("empty", "holds no whole checkpoint"), ("gone.pt", "does not exist")]:  # fmt: skip
        with pytest.raises(ValueError, match=word):
            convert(tmp_path / name, "fastdit", tmp_path / "out", overrides=["objective=ddpm"], say=quiet)
    with pytest.raises(ValueError, match="exists; choose another name"):
        convert(place / "plain.pt", "fastdit", place / "ddpm", say=quiet)
    with pytest.raises(ValueError, match="brings its own config"):
        convert(place / "ddpm", "official", tmp_path / "out.pt", config=place / "ddpm" / "config.yaml", say=quiet)
    with pytest.raises(ValueError, match=r"objective.name='flow', but .* was trained with ddpm"):
        path = training_file(tmp_path / "dit.pt", model="DiT-XL/2")
        convert(path, "fastdit", tmp_path / "out", overrides=["objective=flow"], heads=4, say=quiet)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "overrides, word",
    [
        (["objective={name: flow, interpolant: gvp}"], "objective.interpolant='gvp' has no scheduler for DiTPipeline"),
        (["objective={name: flow, prediction: x_0}"], "objective.prediction='x_0' has no scheduler"),
    ],
)
def test_what_diffusers_has_no_slot_for_is_refused_by_name(place, tmp_path, overrides, word):
    with pytest.raises(ValueError, match=re.escape(word)):
        convert(place / "flow", "diffusers", tmp_path / "out", overrides=overrides, say=quiet)
    assert not list(tmp_path.iterdir())


def test_a_table_that_is_not_the_fixed_one_and_too_many_classes_have_no_slot(place, tmp_path):
    state = golden_weights()
    torch.save(state | {"pos_embed": state["pos_embed"] + 0.1}, tmp_path / "learned.pt")
    many = torch.zeros(1201, 48)
    torch.save(state | {"y_embedder.embedding_table.weight": many}, tmp_path / "many.pt")
    for name, word in (("learned", "pos_embed is not the fixed"), ("many", "data.num_classes=1200: DiTPipeline")):
        overrides = ["objective=ddpm", f"data.vae={place}/vae"]
        convert(tmp_path / f"{name}.pt", "fastdit", tmp_path / name, overrides=overrides, heads=4, say=quiet)
        with pytest.raises(ValueError, match=word):
            convert(tmp_path / name, "diffusers", tmp_path / "out", say=quiet)


def test_embedders_that_grew_apart_have_no_counterpart(place, tmp_path):
    import shutil

    shutil.copytree(place / "ddpm_pipe", tmp_path / "pipe")
    path = tmp_path / "pipe" / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    state["transformer_blocks.1.norm1.emb.timestep_embedder.linear_2.bias"] += 1
    save_file(state, path, {"format": "pt"})
    with pytest.raises(ValueError, match="linear_2.bias differs from block 0's"):
        convert(tmp_path / "pipe", "fastdit", tmp_path / "out", say=quiet)
    save_file(without(state, "proj_out_2.bias"), path, {"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 weights, proj_out_2.bias first"):
        convert(tmp_path / "pipe", "fastdit", tmp_path / "out", say=quiet)
