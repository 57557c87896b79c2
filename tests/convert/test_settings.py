"""What a source states is read; what fastdit does not understand is refused by name, and nothing is written."""

import inspect
import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastdit.build import build_objective
from fastdit.config import load_config
from fastdit.convert import command, convert, loaded, pipeline, read_initial
from fastdit.convert.diffusers import make_exact
from fastdit.diffusion.objectives import DDPM, FlowMatching
from fastdit.sampling import load_pipeline
from fastdit.training import checkpoint
from helpers.checkpoints import (
    assert_same,
    golden_weights,
    make_checkpoint,
    quiet,
    training_file,
    weights,
)
from helpers.data import tiny_vae

pytestmark = pytest.mark.usefixtures("one_thread")
FILES = {"transformer": "transformer/config.json", "scheduler": "scheduler/scheduler_config.json",
         "vae": "vae/config.json", "index": "model_index.json"}  # fmt: skip
# settings with no effect on the weights, the objective or the latents, or only on how they are sampled
NO_EFFECT = {
    "transformer": {"dropout", "norm_num_groups", "upcast_attention", "use_linear_projection"},
    "scheduler": {"timestep_spacing", "steps_offset", "set_alpha_to_one", "dynamic_thresholding_ratio",
                  "sample_max_value"},
}  # fmt: skip
OTHERS = {"activation_fn": "gelu", "prediction_type": "v_prediction", "norm_type": "ada_norm", "norm_eps": 1e-3,
          "timestep_spacing": "trailing", "beta_schedule": "squaredcos_cap_v2", "trained_betas": [0.01] * 1000,
          "variance_type": "fixed_large", "attention_type": "gated", "num_embeds_ada_norm": 17}  # fmt: skip


@pytest.fixture(scope="module")
def foreign(place, tmp_path_factory):
    """A DiTPipeline folder without fastdit's own files."""
    folder = tmp_path_factory.mktemp("foreign") / "pipe"
    shutil.copytree(place / "ddpm_pipe", folder)
    for path in folder.glob("fastdit.*"):
        path.unlink()
    return folder


def edited(source, target, part, **changes):
    """A copy of a folder with other settings in one of its configs; a value of ... removes the key."""
    shutil.copytree(source, target)
    path = target / FILES[part]
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
    return target


def another(key, default):
    if key in OTHERS:
        return OTHERS[key]
    if isinstance(default, bool) or default is None:
        return not default
    return default * 2 if isinstance(default, int | float) else ["other"] if isinstance(default, tuple) else "other"


def keys_of(part):
    import diffusers

    classes = {"transformer": ["DiTTransformer2DModel", "Transformer2DModel"],
               "scheduler": ["DDIMScheduler", "DDPMScheduler", "FlowMapEulerDiscreteScheduler"]}  # fmt: skip
    for name in classes[part]:
        for key, parameter in inspect.signature(getattr(diffusers, name)).parameters.items():
            yield name, key, parameter.default


READ = {  # what a setting becomes: objective, config, checkpoint.json
    "prediction_type": lambda objective, config, meta: (objective.schedule, objective.prediction) == ("linear", "v"),
    "beta_schedule": lambda objective, config, meta: (objective.schedule, objective.prediction) == ("cosine", "eps"),
    "variance_type": lambda objective, config, meta: objective.variance == "fixed_large",
    "clip_sample": lambda objective, config, meta: config.sampling.clip == "static",
    "shift": lambda objective, config, meta: objective == FlowMatching(sample_shift=2.0),
    "activation_fn": lambda objective, config, meta: config.model.mlp == "gelu",
    "sample_size": lambda objective, config, meta: meta["latents"]["shape"] == [4, 16, 16],
}
IN_SHAPES = {"num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "num_layers", "patch_size",
             "attention_bias", "num_embeds_ada_norm"}  # fmt: skip


@pytest.mark.parametrize("part", ["transformer", "scheduler"])
def test_every_setting_of_diffusers_is_read_or_refused(foreign, place, tmp_path, part):
    """Each key of each class with another value: it has no effect, it is read, or it is refused by name."""
    seen = set()
    for i, (name, key, default) in enumerate(keys_of(part)):
        source = place / "flow_pipe" if name.startswith("Flow") else foreign
        plain = json.loads((source / FILES[part]).read_text())
        changes = {"_class_name": name, key: another(key, plain.get(key, default))}
        pipe, out = edited(source, tmp_path / f"{i}", part, **changes), tmp_path / f"{i}_run"
        if part == "scheduler":
            index = json.loads((pipe / FILES["index"]).read_text()) | {"scheduler": ["diffusers", name]}
            (pipe / FILES["index"]).write_text(json.dumps(index))
        for path in pipe.glob("fastdit.*"):
            path.unlink()
        try:
            convert(pipe, "fastdit", out, overrides=["data.num_classes=10"], from_official=True, say=quiet)
        except ValueError as error:
            assert not out.exists() and "\n" not in str(error)
            assert key not in NO_EFFECT[part] | READ.keys(), error
            assert re.search(rf"\b{key}=", str(error)) or key in IN_SHAPES, (key, error)  # the weights do not fit
            continue
        seen.add(key)
        config = load_config(out / "config.yaml")
        if key in READ:
            assert READ[key](build_objective(config), config, checkpoint.read_meta(out)), (name, key, config)
        else:
            assert key in NO_EFFECT[part], (name, key)
            assert_same(weights(out), golden_weights())
    assert seen >= NO_EFFECT[part]


def refuse(pipe, tmp_path, message, **arguments):
    with pytest.raises(ValueError, match=message):
        convert(pipe, "fastdit", tmp_path / "run", say=quiet, **arguments)
    assert not (tmp_path / "run").exists() and not list(tmp_path.glob("*.partial"))


def test_the_heads_are_those_of_the_source(foreign, tmp_path):
    """Only the config knows them: the shapes of the weights are the same."""
    pipe = edited(foreign, tmp_path / "pipe", "transformer", num_attention_heads=2, attention_head_dim=24)
    convert(pipe, "fastdit", tmp_path / "run", from_official=True, say=quiet)
    assert load_config(tmp_path / "run/config.yaml").model.variant == "DiT-2x48x2/2"
    shutil.rmtree(tmp_path / "run")
    refuse(pipe, tmp_path, "--heads=4, but .*pipe says 2; omit it", heads=4, from_official=True)


def test_a_folder_that_does_not_say_its_frequencies_is_not_guessed(foreign, place, tmp_path):
    gap = r"frequency shift 1, DiT with 0, which changes the output by 0.\d+ of .*add --from-official"
    refuse(foreign, tmp_path, gap)
    flow = edited(place / "flow_pipe", tmp_path / "flow", "transformer", norm_eps=1e-5)
    refuse(flow, tmp_path, "norm_eps=1e-05 cannot be converted; DiT has 1e-06")
    heard = []
    read_initial(str(foreign), load_config(place / "ddpm/config.yaml"), heard.append)
    assert any("converted from the official DiT" in line for line in heard)


@pytest.mark.parametrize(
    "part, changes, message",
    [
        ("transformer", {"qk_norm": "rms"}, "config.json: qk_norm='rms' is a setting that fastdit does not know"),
        ("transformer", {"norm_type": ...}, "norm_type='layer_norm' cannot be converted; fastdit supports 'ada_norm_z"),
        ("scheduler", {"_class_name": "EulerDiscreteScheduler"}, "_class_name='EulerDiscreteScheduler' cannot be conv"),
        ("scheduler", {"beta_end": 0.03}, "beta_end=0.03 is none of the schedules that fastdit has: linear, cosine"),
        ("scheduler", {"num_train_timesteps": 500}, "num_train_timesteps=500 cannot be converted; fastdit supports 10"),
        ("index", {"_class_name": "SanaPipeline"}, "_class_name='SanaPipeline' cannot be converted"),
        ("index", {"scheduler": ["diffusers", "DDPMScheduler"]}, "scheduler=.*'DDPMScheduler'.* cannot be converted"),
        ("index", {"safety_checker": ["x", "Y"]}, "safety_checker=.* is a setting that fastdit does not know"),
        ("index", {"id2label": {"0": "a", "2": "c"}}, "id2label has 2 names, but none for label 1"),
        ("vae", {"shift_factor": 0.1}, "shift_factor=0.1 is ignored by DiTPipeline, but not by fastdit"),
        ("vae", {"latents_std": [2.0] * 4}, r"latents_std=\[2.0, .*\] is ignored by DiTPipeline, but not by fastdit"),
        ("vae", {"patch_size": 2}, "patch_size=2 is a setting that fastdit does not know"),
    ],
)  # fmt: skip
def test_settings_that_are_not_understood_are_refused_by_name(foreign, tmp_path, part, changes, message):
    if changes.get("norm_type"):
        changes = changes | {"_class_name": "Transformer2DModel"}  # whose default it is
    pipe = edited(foreign, tmp_path / "pipe", part, **changes)
    if part == "scheduler":
        pipe = edited(pipe, tmp_path / "other", "index", scheduler=...)
    refuse(pipe, tmp_path, message, from_official=True)


def test_what_a_folder_states_is_kept_and_cannot_be_contradicted(foreign, tmp_path):
    names = {str(label): f"class {label}" for label in range(10)}
    pipe = edited(foreign, tmp_path / "pipe", "vae", scaling_factor=0.5)
    edited(pipe, tmp_path / "named", "index", id2label=names)
    convert(tmp_path / "named", "fastdit", tmp_path / "run", from_official=True, say=quiet)
    meta = checkpoint.read_meta(tmp_path / "run")
    assert meta["class_names"] == list(names.values()) and meta["num_classes"] == 10  # the other rows are padding
    assert meta["latents"]["scale"] == 0.5 and load_config(tmp_path / "run/config.yaml").sampling.sampler.name == "ddim"
    assert_same(weights(tmp_path / "run"), golden_weights())
    shutil.rmtree(tmp_path / "run")
    for override, message in (
        ("objective=flow", "objective.name='flow', but .* was trained with ddpm"),
        ("objective={name: ddpm, schedule: cosine}", "objective.schedule='cosine', but .* was trained with 'linear'"),
        ("model.mlp=gelu", "model.mlp='gelu', but .* was trained with 'gelu_tanh'"),
        ("data.num_classes=3", "has a row for label 9 that is not zero and would be lost"),
        ("data.image_size=64", "data.image_size=64, but the latents of .* have side 8"),
    ):
        refuse(pipe, tmp_path, message, overrides=[override], from_official=True)
    tiny_vae(seed=1).save_pretrained(tmp_path / "other")
    refuse(pipe, tmp_path, "have scale 0.5", overrides=[f"data.vae={tmp_path}/other"], from_official=True)


def test_an_exported_folder_that_was_changed_is_refused(place, tmp_path):
    for i, (part, changes, message) in enumerate([
        ("scheduler", {"prediction_type": "v_prediction"}, "objective.prediction='eps', but the other configs .* 'v'"),
        ("transformer", {"activation_fn": "gelu"}, "model.mlp='gelu_tanh', but the other configs .* say 'gelu'"),
        ("vae", {"scaling_factor": 0.5}, "scale"),
    ]):  # fmt: skip
        refuse(edited(place / "ddpm_pipe", tmp_path / f"{i}", part, **changes), tmp_path, message)
    pipe = edited(place / "ddpm_pipe", tmp_path / "pipe", "index")
    path = pipe / "transformer/diffusion_pytorch_model.safetensors"
    save_file(load_file(path) | {"transformer_blocks.0.attn1.norm_q.weight": torch.ones(12)}, path, {"format": "pt"})
    refuse(pipe, tmp_path, "has 1 weight that DiT does not have, transformer_blocks.0.attn1.norm_q.weight first")
    for i, (name, text) in enumerate([("fastdit.json", "[]"), ("fastdit.json", "{}"), ("fastdit.yaml", "a: [")]):
        damaged = edited(place / "ddpm_pipe", tmp_path / f"damaged{i}", "index")
        (damaged / name).write_text(text)
        refuse(damaged, tmp_path, f"{name} is damaged")
    for i, name in enumerate(("latents", "step", "class_names", "empty_classes")):
        damaged = edited(place / "ddpm_pipe", tmp_path / f"lacking{i}", "index")
        facts = json.loads((damaged / "fastdit.json").read_text())
        del facts[name]
        (damaged / "fastdit.json").write_text(json.dumps(facts))
        refuse(damaged, tmp_path, f"{damaged}/fastdit.json is damaged .KeyError: '{name}'.; export it again")


@pytest.mark.parametrize(
    "args, message",
    [
        ({"model": "DiT-XL/2"}, "model.variant=DiT-XL/2, but .* contains DiT-2x48x"),
        ({"model": "DiT-H/2"}, "model='DiT-H/2', which fastdit does not understand; set its number of heads"),
        ({"image_size": 256}, "data.image_size=256, but the latents of .* have side 8, which means 64 px"),
        ({"num_classes": 7}, "num_classes=7, but the label table .* has 11 rows"),
        ({"vae": "sdxl"}, "vae='sdxl', which fastdit does not understand; name the autoencoder with data.vae=FOLDER"),
        ({"path_type": "cubic"}, "path_type='cubic', which fastdit does not understand; expected 'Linear' or 'GVP'"),
        ({"path_type": "GVP", "prediction": "x"}, "prediction='x', which fastdit does not understand; expected 'v"),
        ({"use_rmsnorm": True}, "use_rmsnorm='True', which fastdit does not understand; if it has no effect"),
    ],
)
def test_args_that_are_not_understood_are_refused_by_name(tmp_path, args, message):
    args = {"model": "DiT-2x48x4/2", "results_dir": "results", **args}
    refuse(training_file(tmp_path / "x.pt", **args), tmp_path, message)


def test_args_are_read_and_cannot_be_contradicted(place, tmp_path):
    args = {"model": "SiT-2x48x4/2", "path_type": "VP", "prediction": "score", "loss_weight": "velocity", "epochs": 80,
            "sample_eps": 0.02, "train_eps": None, "image_size": 64, "num_classes": 10, "vae": "ema", "global_seed": 3,
            "global_batch_size": 128, "wandb": True, "use_rmsnorm": False}  # fmt: skip
    path = training_file(tmp_path / "x.pt", **args)
    convert(path, "fastdit", tmp_path / "run", say=quiet)
    config = load_config(tmp_path / "run/config.yaml")
    wanted = FlowMatching("vp", "score", weight="velocity", sample_eps=0.02)
    assert build_objective(config) == wanted and (config.seed, config.training.global_batch) == (3, 128)
    assert config.data.vae == "stabilityai/sd-vae-ft-ema"
    shutil.rmtree(tmp_path / "run")
    refuse(path, tmp_path, "--heads=6, but .* says 4; omit it", heads=6)
    refuse(path, tmp_path, "objective.interpolant='gvp', but .* 'vp'", overrides=["objective.interpolant=gvp"])
    few = training_file(tmp_path / "few.pt", model="DiT-2x48x4/2", image_size=64, num_classes=10)
    convert(few, "fastdit", tmp_path / "few", say=quiet)  # the scripts of DiT have one objective
    assert isinstance(build_objective(load_config(tmp_path / "few/config.yaml")), DDPM)
    double = {name: tensor.double() + 1e-12 for name, tensor in golden_weights().items()}
    torch.save({"ema": double}, tmp_path / "double.pt")
    refuse(tmp_path / "double.pt", tmp_path, "is float64, and its values are not exact", overrides=["objective=ddpm"])


def test_a_fastdit_checkpoint_cannot_be_contradicted(place, tmp_path):
    source = make_checkpoint(place, tmp_path / "source", {"name": "flow", "shift": 2.0}, norm="rms")
    for override, message in (
        ("model.norm=layer", "model.norm='layer', but .* was trained with 'rms'; omit it"),
        ("objective=ddpm", "objective.name='ddpm', but .* was trained with 'flow'"),
        ("objective.shift=3", "objective.shift=3.0, but .* was trained with 2.0"),
        ("data.num_classes=6", "data.num_classes=6, but .* was trained with 5"),
        ("model.variant=DiT-2x32x4/4", "model.variant=.*, but .* was trained with"),
    ):
        refuse(source, tmp_path, message, overrides=[override])
    convert(source, "fastdit", tmp_path / "run", overrides=["objective.sample_shift=3"], say=quiet)


@pytest.mark.parametrize("name", ["ddpm", "flow"])
@pytest.mark.parametrize("way", ["read", "write"])
def test_outputs_that_differ_are_refused(place, tmp_path, monkeypatch, name, way):
    """Whatever the reason: here diffusers computes another function than fastdit believes."""

    def wrong(transformer):
        transformer.proj_out_2.bias.data += 1e-2
        return make_exact(transformer)

    monkeypatch.setattr(pipeline, "make_exact", wrong)
    if name == "flow":  # which needs no such change
        change = pipeline.to_pipeline_clock
        monkeypatch.setattr(pipeline, "to_pipeline_clock", lambda state, back=False: change(state, back=not back))
    source, to = (place / f"{name}_pipe", "fastdit") if way == "read" else (place / name, "diffusers")
    with pytest.raises(ValueError, match=r"is not converted: the outputs of fastdit differ by \S+ of"):
        convert(source, to, tmp_path / "out", say=quiet)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", command.WRITERS)
@pytest.mark.parametrize("what", ["weights", "step", "config"])
def test_what_does_not_read_back_as_it_was_is_not_written(place, tmp_path, monkeypatch, to, what):
    """A writer that loses the last bit of a weight, the step or a setting."""
    write, finish = command.WRITERS[to]

    def lossy(source, *rest):
        if what == "weights":
            bias = torch.nextafter(source.ema["final_layer.linear.bias"], torch.tensor(torch.inf))
            source = loaded.replace(source, ema=source.ema | {"final_layer.linear.bias": bias})
        elif what == "step":
            source = loaded.replace(source, step=source.step + 1)
        else:
            source = loaded.replace(source, config=loaded.replace(source.config, seed=5))
        return write(source, *rest)

    monkeypatch.setitem(command.WRITERS, to, (lossy, finish))
    out = tmp_path / ("out.pt" if to == "official" else "out")
    word = {"weights": "other values of final_layer.linear.bias in", "step": "step=1 instead of 0", "config": "seed=5"}
    with pytest.raises(ValueError, match=rf"{out.name} is not written, because it would read back with {word[what]}"):
        convert(place / "flow", to, out, say=quiet)
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_finite_are_not_converted(place, tmp_path):
    state = golden_weights()
    state["blocks.0.mlp.fc1.bias"][3] = torch.inf
    torch.save(state, tmp_path / "bad.pt")
    refuse(tmp_path / "bad.pt", tmp_path, "blocks.0.mlp.fc1.bias of ema has values that are not finite",
           overrides=["objective=ddpm"], heads=4)  # fmt: skip


def test_an_export_says_what_the_official_scripts_and_the_pipeline_do_otherwise(place, tmp_path):
    objective = {"name": "ddpm", "schedule": "cosine", "variance": "fixed_small", "loss_type": "mse"}
    source, heard = make_checkpoint(place, tmp_path / "a", objective), []
    convert(source, "official", tmp_path / "a.pt", say=heard.append)
    call = r"create_diffusion\(..., noise_schedule='squaredcos_cap_v2', learn_sigma=False, sigma_small=True\)"
    assert re.search(call, "\n".join(heard)) and any("scale 0.18215 and no shift; use" in line for line in heard)
    source = make_checkpoint(place, tmp_path / "c", vae="stabilityai/sd-vae-ft-ema")
    other = command.read(source, command.Stated(), quiet)
    (said,) = command.official_remarks(other, other, tmp_path, tmp_path)
    assert "use stabilityai/sd-vae-ft-ema with scale 0.3 and shift 0, where latents are x_0 / scale + shift" in said
    latents = loaded.replace(other.latents, scale=(1.0, 2.0, 3.0, 4.0), shift=(0.0, 0.5, -0.5, 1.0))
    (said,) = command.official_remarks(loaded.replace(other, latents=latents), other, tmp_path, tmp_path)
    assert "with scale 1 to 4 by channel and shift -0.5 to 1 by channel" in said
    model = loaded.replace(other.config.model, class_dropout=0.0)
    other = loaded.replace(other, config=loaded.replace(other.config, model=model))
    said = command.official_remarks(other, other, tmp_path, tmp_path)[0]
    assert "has no null label, which the official scripts expect; build it with class_dropout_prob=0" in said
    source = make_checkpoint(place, tmp_path / "b", {"name": "flow", "interpolant": "gvp", "prediction": "score"})
    convert(source, "official", tmp_path / "b.pt", say=heard.append)
    assert any("--path-type GVP --prediction score" in line for line in heard)
    overrides = ["sampling.clip=static", "sampling.cfg_rescale=0.5"]
    convert(place / "ddpm", "diffusers", tmp_path / "pipe", overrides=overrides, say=heard.append)
    assert all(f"DiTPipeline has no {override}; fastdit.yaml keeps it." in heard for override in overrides)
    assert load_config(tmp_path / "pipe/fastdit.yaml").sampling.clip == "static"
    for name in ("x.safetensors", "x"):
        with pytest.raises(ValueError, match="the official format is a PyTorch file; use a name with .pt"):
            convert(place / "ddpm", "official", tmp_path / name, say=quiet)
    with pytest.raises(ValueError, match="x.pt: --to diffusers writes a folder; use a name without .pt"):
        convert(place / "ddpm", "diffusers", tmp_path / "x.pt", say=quiet)
    plain = tmp_path / "plain"
    plain.touch()  # with the permissions that the umask asks for
    assert {path.stat().st_mode for path in tmp_path.rglob("*") if path.is_file()} == {plain.stat().st_mode}
    convert(tmp_path / "pipe", "fastdit", tmp_path / "run", say=quiet)
    assert load_pipeline(tmp_path / "run").config.data.vae == str((tmp_path / "pipe").resolve())
    assert json.loads((tmp_path / "pipe/fastdit.json").read_text())["latents"]["vae"]


def test_a_source_of_initial_weights_with_other_heads_or_options_is_refused(place, foreign, tmp_path):
    config = load_config(place / "ddpm/config.yaml")
    two = edited(foreign, tmp_path / "pipe", "transformer", num_attention_heads=2, attention_head_dim=24)
    gelu = edited(foreign, tmp_path / "gelu", "transformer", activation_fn="gelu")
    for source, message in (
        (two, "has 2 attention heads"),
        (training_file(tmp_path / "x.pt", model="DiT-2x48x6/2", results_dir="x"), "has 6 attention heads"),
        (gelu, "has model.mlp='gelu', this run 'gelu_tanh'"),
    ):
        with pytest.raises(ValueError, match=message):
            read_initial(str(source), config, quiet)
    rms = make_checkpoint(place, tmp_path / "rms", norm="rms")
    with pytest.raises(ValueError, match="has model.norm='rms', this run 'layer'"):
        read_initial(str(rms), load_config(rms / "config.yaml", ["model.norm=layer"]), quiet)
    decoder = make_checkpoint(place, tmp_path / "decoder", decoder_blocks=1)
    with pytest.raises(ValueError, match="has model.decoder_blocks=1, this run 2; make them equal"):
        read_initial(str(decoder), load_config(decoder / "config.yaml", ["model.decoder_blocks=2"]), quiet)
    heard = []
    [state, *_] = read_initial(str(place / "flow_pipe"), config, heard.append)  # the time convention is the folder's
    torch.testing.assert_close(state["final_layer.linear.bias"], golden_weights()["final_layer.linear.bias"])
    assert any("trained with objective={'name': 'flow'" in line for line in heard)
