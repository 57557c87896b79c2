"""Configuration: shipped files load, values are converted by annotation, and a mistake names key, value and remedy."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import yaml

from fastdit.api import _settings
from fastdit.autoencoder.config import AutoencoderConfig
from fastdit.build import resolved, with_steps
from fastdit.config import assumed, config_from, load_config, save_config, to_tree
from fastdit.convert.settings import Stated
from fastdit.data.manifest import Manifest
from fastdit.files import parse_yaml, yaml_line
from fastdit.registry import Choice, bind, build
from fastdit.schema import Config, LoopConfig
from helpers import ROOT

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.fixture
def write(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_shipped_configs_load_and_survive_a_round_trip(path, tmp_path):
    schema = AutoencoderConfig if path.stem.startswith("vae_") else Config
    config = load_config(path, schema=schema)
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml", schema=schema) == config
    assert (tmp_path / "saved.yaml").read_text() == yaml.safe_dump(to_tree(config), sort_keys=False)


def test_values_are_converted_by_their_annotations(write):
    path = write("training: {lr: 1e-4, steps: 4e5, betas: [0.9, 0.95]}\nsampling: {steps: 50}\nobjective: flow\n")
    config = load_config(path, ["training.weight_decay=3e-2", "data.hflip=false", "objective.time=logit_normal"])
    assert config.training.lr == 1e-4 and isinstance(config.training.lr, float)
    assert config.training.steps == 400_000 and isinstance(config.training.steps, int)
    assert config.training.betas == (0.9, 0.95) and config.training.weight_decay == 0.03
    assert config.sampling.steps == "50" and config.data.hflip is False


def test_overrides_reach_a_choice_and_its_options(write):
    path = write("objective: {name: flow}\n")
    assert load_config(path, ["objective.sigma=2"]).objective == Choice("flow", {"sigma": 2})
    assert load_config(path, ["objective=ddpm"]).objective == Choice("ddpm")


@pytest.mark.parametrize("key, words, wanted", [
    ("objective", "objective.shift=3 objective=flow", {"name": "flow", "shift": 3}),
    ("objective", "objective.shift=3 objective.name=ddpm objective=flow", {"name": "flow", "shift": 3}),
    ("objective", "objective.shift=2 objective=ddpm objective=flow objective.shift=3", {"name": "flow", "shift": 3}),
    ("objective", "objective=flow objective.name=ddpm", {"name": "ddpm"}),
    ("objective", 'objective={"name":"ddpm","schedule":"cosine"} objective=ddpm', {"name": "ddpm"}),
    ("sampling.sampler", "sampling.sampler.eta=1 sampling.sampler=ddim", {"name": "ddim", "eta": 1}),
    ("training.lr_schedule", "training.lr_schedule.final=0.1 training.lr_schedule=cosine",
     {"name": "cosine", "final": 0.1}),
])  # fmt: skip
def test_a_choice_and_its_options_come_in_any_order_and_the_last_of_one_key_counts(key, words, wanted):
    found = to_tree(load_config("sit_s_2", words.split(" ")))
    for part in key.split("."):
        found = found[part]
    assert found == wanted


# text: as a number of steps, if it is one
def test_a_section_on_the_command_line_changes_only_the_keys_that_it_names(write):
    path = write("objective: {name: flow, prediction: noise}\ntraining: {steps: 20, lr: 1e-3}\nsampling: {steps: 9}")
    given = ["training={lr: 2e-4}", "training={grad_clip: 1}", "training.ema_decay=0.9", "sampling={cfg_scale: 4}"]
    config = load_config(path, given)
    wanted = {"steps": 20, "lr": 2e-4, "grad_clip": 1.0, "ema_decay": 0.9}
    assert {key: getattr(config.training, key) for key in wanted} == wanted
    assert (config.sampling.steps, config.sampling.cfg_scale) == ("9", 4.0)
    assert load_config(path, ["objective={name: flow}"]).objective == Choice("flow")  # a choice with its options
    for empty in ("training=", "training=null"):
        with pytest.raises(ValueError, match=f"override '{empty}' has no value; use training={{key: value}}, or "):
            load_config(path, [empty])
    with pytest.raises(ValueError, match=r"train\(\) got training=None; leave it out, or give its keys"):
        _settings(path, {"training": None}, {}, "train()", Config)
    assert Stated(write("training:\nobjective: flow")).lines == ("objective.name=flow",)


WRITTEN = {"2026_11_27": 20261127, "010": 10, "08": 8, "1.10": 1.1, "0100": 100, "1e5": 100_000, "1e-4": 0.0001,
           "1_000": 1000, "0x1F": 31, "0o17": 15, "+5": 5, ".5": 0.5, "50": 50, "0.5": 0.5,
           **dict.fromkeys(["1:30:00", "2026-11-27", "on", "a #b", "#b", "5 #b", "&a b", "=", "<<", "it's"])}


@pytest.mark.parametrize("text", WRITTEN)
def test_text_is_as_it_was_written_and_a_number_decimal(write, tmp_path, text):
    quoted = f"'{text}'" if set(text) & set("#&'") else text  # in a file, # begins a comment
    quoted = quoted.replace("it's", "it''s")
    config = load_config(write(f"run_dir: {quoted}\ndata: {{shards: {quoted}}}\ntraining: {{init_from: {quoted}}}"))
    given = load_config("sit_s_2", [f"run_dir={text}", f"data.shards={text}", f"training.init_from={text}"])
    python = _settings({}, {"training": {"init_from": text}}, {"run_dir": text, "data.shards": text}, "", Config)
    stated = Stated(write(f"data: {{vae: {quoted}}}"), (f"data={{shards: {quoted}}}",)).lines
    assert config_from({}, "", stated).data.vae == config_from({}, "", stated).data.shards == text
    save_config(config, tmp_path / "saved.yaml")
    tree = yaml.safe_load((tmp_path / "saved.yaml").read_text())  # as any other program reads it
    assert tree["run_dir"] == tree["training"]["init_from"] == text and load_config(tmp_path / "saved.yaml") == config
    for found in (config, given, python):
        assert found.run_dir == found.data.shards == found.training.init_from == text
    for value in (text, parse_yaml(quoted), [text], {"a": {"b": text}}):
        assert parse_yaml(yaml_line(value)) == value and str(parse_yaml(yaml_line(value))) == str(value)
    number = WRITTEN[text]
    if number is None:
        with pytest.raises(ValueError, match="must be a number"):
            load_config("sit_s_2", [f"training.weight_decay={text}"])
        return
    parts = [f"weight_decay={text}", f"deepspeed={{a: [{text}]}}", f"lr_schedule={{name: wsd, decay: {text}}}"]
    settings = load_config("sit_s_2", [f"training.{part}" for part in parts]).training
    found = [settings.weight_decay, settings.deepspeed["a"][0], settings.lr_schedule.options["decay"]]
    assert found == [number] * 3 and {type(value) for value in found} <= {int, float}
    if isinstance(number, int):
        found = load_config("sit_s_2", [f"seed={text}", f"data.image_size={text}", f"training.route_ends=[{text},2]"])
        assert (found.seed, found.data.image_size, found.training.route_ends) == (number, number, (number, 2))


def test_yes_and_off_are_booleans_where_a_key_is_one_and_else_text():
    config = load_config("sit_s_2", ["data.hflip=no", "training.fp8=Yes", "training.compile=off", "run_dir=on"])
    assert (config.data.hflip, config.training.fp8, config.training.compile) == (False, True, False)
    assert config.run_dir == "on"
    with pytest.raises(ValueError, match="training.wandb='off' is out of range; use the name of a project, or "):
        load_config("sit_s_2", ["training.wandb=off"])


@pytest.mark.parametrize(
    "text, overrides, words",
    [
        ("training: {lrr: 1}", [], ["training.lrr=1", "did you mean 'training.lr'"]),
        ("trainin: {lr: 1}", [], ["trainin.lr=1", "did you mean 'training.lr'"]),
        ("", ["training.lr=fast"], ["training.lr='fast'", "a number"]),
        ("", ["training.steps=2.5"], ["training.steps=2.5", "whole number"]),
        ("", ["training.compile=1"], ["training.compile=1", "Known: True, False, whole"]),
        ("", ["training.fp8=1"], ["training.fp8=1", "true or false"]),
        ("", ["training.precision=fp16"], ["training.precision='fp16'", "bf16, fp32"]),
        ("", ["training.lr=-1"], ["training.lr=-1.0", "positive"]),
        ("", ["sampling.steps=1000000000000"], ["sampling.steps='1000000000000' is out of range"]),
        ("", ["sampling.cfg_scale=-1"], ["sampling.cfg_scale=-1.0 is out of range; use 0 or more"]),
        ("", ["sampling.cfg_scale=.nan"], ["sampling.cfg_scale=nan is out of range"]),  # black images, without an error
        ("", ["training.betas=[0.9,1]"], ["training.betas=[0.9, 1.0] is out of range; use two in [0, 1)"]),
        ("", ["model.registers=1e308"], ["model.registers=1", "out of range"]),
        ("", ["model.mlp_ratio=1e308"], ["model.mlp_ratio=1e+308 is out of range"]),
        ("", ["data.num_classes=1e308"], ["data.num_classes=1", "out of range"]),
        ("", ["training.lr"], ["section.key=value"]),
        ("", ["training.lr="], ["training.lr has no value, but must be a number"]),
        ("", ["training.init_from="], ["training.init_from has no value", """use 'training.init_from=""'"""]),
        ("", ["training=3"], ["training=3", "section with keys steps, epochs"]),
        ("training: {betas: 0.9}", [], ["training.betas=0.9", "list of 2"]),
        ("- a", [], ["sections"]),
        ("a: [", [], ["not valid YAML"]),
        ("training: {lr: 1e-4}\ndata: {}\ntraining: {steps: 5}", [], ["training is there twice"]),
    ],
)
def test_mistakes_name_file_key_value_and_remedy(write, text, overrides, words):
    with pytest.raises(ValueError) as error:
        load_config(write(text), overrides)
    assert all(word in str(error.value) for word in words), error


def test_a_file_is_read_before_an_included_config_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("sit_s_2", "sit_s_2.yaml", "./sit_s_2.yaml"):
        assert load_config(name).training.lr == 1e-4
    (tmp_path / "sit_s_2.yaml").write_text("training: {lr: 0.123}\n")
    for name in ("sit_s_2.yaml", "./sit_s_2.yaml"):
        assert load_config(name).training.lr == 0.123
    assert load_config("sit_s_2").training.lr == 1e-4  # a name alone is that of an included one


def test_a_missing_file_says_where_the_shipped_ones_are():
    with pytest.raises(ValueError, match="no.yaml does not exist; fastdit configs lists"):
        load_config("no.yaml")


@dataclass(frozen=True)
class Ball:
    radius: float = 1.0
    color: str = "red"


def throw(ball: Ball, *, speed: float = 1.0, wind=None) -> float:
    return ball.radius * speed


def test_a_choice_is_built_from_its_own_signature():
    assert build({"ball": Ball}, Choice("ball", {"radius": "2e0"}), "toy") == Ball(2.0)
    assert bind({"throw": throw}, Choice("throw", {"speed": 3}), "act")(Ball(2.0)) == 6.0
    with pytest.raises(ValueError, match="toy.radios=1 is not a known key; did you mean 'radius'"):
        build({"ball": Ball}, Choice("ball", {"radios": 1}), "toy")
    with pytest.raises(ValueError, match="toy.name='bal' is unknown; did you mean 'ball'"):
        build({"ball": Ball}, Choice("bal"), "toy")
    with pytest.raises(ValueError, match="act.wind"):
        bind({"throw": throw}, Choice("throw", {"wind": 1}), "act")


def test_steps_of_the_command_replace_the_epochs_of_the_file(tmp_path):
    """The config.yaml of a run has both: the epochs that were asked for, and the steps that they came to."""
    save_config(load_config("sit_s_2", ["training.epochs=100"]), file := tmp_path / "config.yaml")
    lengths = {"": (400_000, 100), "training.steps=20": (20, 0), "training.epochs=2": (400_000, 2)}
    for override, (steps, epochs) in lengths.items():
        settings = load_config(file, [override] if override else []).training
        assert (settings.steps, settings.epochs) == (steps, epochs), override
    assert load_config(file, ["training.steps=20", "training.epochs=0"]).training.steps == 20
    for given in (["training.steps=20", "training.epochs=2"], ["training.epochs=2", "training.steps=20"]):
        with pytest.raises(ValueError, match="training.steps=20 and training.epochs=2 both set the length of the run"):
            load_config(file, given)
    python = partial(_settings, file, places={}, where="train()", schema=Config)
    assert python({"training": {"steps": 20}}).training.epochs == 0
    with pytest.raises(ValueError, match="training.steps=20 and training.epochs=2 both set"):
        python({"training": {"steps": 20, "epochs": 2}})
    with pytest.raises(ValueError, match="training=3 must be a section"):
        python({"training": 3})


def test_a_config_takes_from_the_shards_what_only_they_tell(world):
    manifest = Manifest.load(world / "latents")
    few = ["training.global_batch=12", "training.epochs=2.5"]
    data, settings = (c := resolved(load_config("sit_s_2", few), manifest)).data, c.training
    assert (data.image_size, data.num_classes, data.vae) == (32, 10, str((world / "vae").resolve()))
    assert settings.steps == 250  # 2.5 x 1198 / 12
    for epochs, images, steps in ((1.1, 10, 11), (1.1, 11, 13), (0.07, 100, 7), (3.0, 10, 30)):  # 1.1 x 10 > 11 in fp64
        assert with_steps(LoopConfig(epochs=epochs, global_batch=1), images).steps == steps
    assert resolved(load_config("sit_s_2", [*few, "data.num_classes=0"]), manifest).data.num_classes == 0
    for override, words in [
        ("data.image_size=64", "image_size=64, but the latents in .* are from 32 px images; set 32"),
        ("data.num_classes=7", "num_classes=7, but the latents in .* have labels 0 to 9; set 10"),
    ]:
        with pytest.raises(ValueError, match=words):
            resolved(load_config("sit_s_2", [*few, override]), manifest)
    data = assumed(load_config("dit_xl_2_512")).data
    assert (data.image_size, data.num_classes, data.vae) == (512, 1000, "stabilityai/sd-vae-ft-ema")


def test_an_image_size_is_also_written_as_a_command_line_takes_it():
    assert load_config("sit_s_2", ["data.image_size=512x256"]).data.image_size == (512, 256)
    for size in ("512x", "0x64"):
        with pytest.raises(ValueError, match="data.image_size"):
            load_config("sit_s_2", [f"data.image_size={size}"])
    assert load_config("sit_s_2", ["data.image_size= '64'", "run_dir= ' a'", "data.vae= b "]).run_dir == " a"
