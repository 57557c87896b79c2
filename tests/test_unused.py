"""Settings that change nothing are named when a run starts."""

import pytest

from fastdit.autoencoder.config import AutoencoderConfig
from fastdit.autoencoder.config import NetworkConfig as Network
from fastdit.autoencoder.network import not_taken
from fastdit.config import load_config, shipped_names
from fastdit.schema import Config
from fastdit.unused import NEEDS, unused
from helpers.runs import train_here

CASES = [  # schema, the setting, what makes it count
    (Config, "training.residual=bf16", "training.precision=bf16", ["training.precision=fp32"]),
    (Config, "training.fp8_history=4", "training.fp8=true", []),
    (Config, "training.fp8_margin=4.0", "training.fp8=true", []),
    (Config, "training.route_ends=[1, 1]", "training.route=0.5", []),
    (Config, "training.route_full_steps=5", "training.route=0.5", []),
    (Config, "training.sample_images=4", "training.sample_every=5", []),
    (Config, "training.reference=x", "training.evaluate_every=5", []),
    (Config, "training.evaluate_images=5", "training.reference=x", ["training.evaluate_every=5"]),
    (Config, "training.evaluate_features=inception-v3=x", "training.reference=x", ["training.evaluate_every=5"]),
    (Config, "objective.weight=likelihood", "objective.prediction=score", ["objective=flow"]),
    (Config, "objective.time_mean=0.5", "objective.time_distribution=logit_normal", ["objective=flow"]),
    (Config, "objective.time_scale=0.5", "objective.time_distribution=mode", ["objective=flow"]),
    (Config, "objective.class_token_weight=0.1", "model.class_token=768", ["objective=flow"]),
    (AutoencoderConfig, "discriminator.start=5", "discriminator.weight=0.5", []),
    (AutoencoderConfig, "discriminator.channels=5", "discriminator.weight=0.5", ["training.steps=60000"]),
    (AutoencoderConfig, "discriminator.layers=2", "discriminator.weight=0.5", ["training.steps=60000"]),
    (AutoencoderConfig, "discriminator.lr=0.5", "discriminator.weight=0.5", ["training.steps=60000"]),
    (AutoencoderConfig, "loss.perceptual_weight=0.5", "loss.perceptual=lpips", []),
    (AutoencoderConfig, "loss.vgg=x", "loss.perceptual=lpips", []),
]


@pytest.mark.parametrize(("schema", "setting", "need", "beside"), CASES, ids=[case[1] for case in CASES])
def test_a_setting_without_the_one_that_it_belongs_to_is_named(tmp_path, schema, setting, need, beside):
    path = tmp_path / "config.yaml"
    path.write_text("{}")
    [line] = unused(load_config(path, [*beside, setting], schema))
    key, _, value = setting.partition("=")
    assert line.startswith(f"{key}={value} changes nothing without ")
    assert not unused(load_config(path, [*beside, need, setting], schema))


def test_every_rule_is_tested_and_no_included_config_breaks_one():
    tested = {case[1].partition("=")[0] for case in CASES}
    assert NEEDS.keys() == tested | {"training.zero_stage", "training.deepspeed"}
    for schema in (Config, AutoencoderConfig):
        for name in shipped_names(schema):
            given = ["training.reference=x", "training.evaluate_every=5"] * (name == "quickstart")  # it sets both
            assert not unused(load_config(name, given, schema)), name


def test_a_run_names_them(world, tmp_path, capsys):
    """torchrun with training.zero_stage=2 shards nothing."""
    train_here(world, tmp_path / "run", "training.zero_stage=2", "training.steps=1", "training.deepspeed={foo: 1}")
    said = capsys.readouterr().out
    for key in ("training.zero_stage=2", "training.deepspeed.foo=1"):
        assert f"warning: {key} changes nothing without training.engine=deepspeed, or the deepspeed launcher" in said
    given = Config()
    assert not unused(given) and not unused(given, zero=True)


def test_a_run_says_at_its_start_that_its_average_will_be_noise(world, tmp_path, capsys):
    noise = ["training.ema_decay=0.9999", "training.ema_warmup=false"]
    train_here(world, tmp_path / "run", *noise, "training.steps=1")
    said = capsys.readouterr().out
    warned = said.index("after 1 step at training.ema_decay=0.9999 the EMA is still 100% random")
    assert 0 < warned < said.index("step 1/1")


def test_an_autoencoder_to_start_from_decides_its_network():
    loaded = Network(channels=(32, 64), latent_channels=4)
    assert not_taken(Network(channels=(32, 64), scaling_factor=0.5), loaded) == []
    assert not_taken(Network(channels=(32, 64), latent_channels=16), loaded) == [
        "model.latent_channels=16 changes nothing: the autoencoder of training.init_from has 4"
    ]
