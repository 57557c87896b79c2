"""Configuration: shipped files load, values are converted by annotation, and a mistake names key, value and remedy."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from fastdit.autoencoder.config import AutoencoderConfig
from fastdit.build import resolved
from fastdit.config import assumed, load_config, save_config
from fastdit.data.manifest import Manifest
from fastdit.registry import Choice, bind, build
from fastdit.schema import Config
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


def test_a_config_takes_from_the_shards_what_only_they_tell(world):
    manifest = Manifest.load(world / "latents")
    few = ["training.global_batch=12", "training.epochs=2.5"]
    data, settings = (c := resolved(load_config("sit_s_2", few), manifest)).data, c.training
    assert (data.image_size, data.num_classes, data.vae) == (32, 10, str((world / "vae").resolve()))
    assert settings.steps == 250  # 2.5 x 1198 / 12
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
    with pytest.raises(ValueError, match="data.image_size"):
        load_config("sit_s_2", ["data.image_size=512x"])
