"""Typing mistakes are answered with what was meant."""

import pytest

from fastdit.config import all_keys, load_config, suggest

MISTAKES = {
    "lr": "training.lr",
    "training.learning_rate": "training.lr",
    "training.lrr": "training.lr",
    "learning-rate": "training.lr",
    "trainin.lr": "training.lr",
    "model.lr": "training.lr",
    "batch_size": "training.global_batch",
    "training.batch_size": "training.global_batch",
    "cfg_scale": "sampling.cfg_scale",
    "cfg-scale": "sampling.cfg_scale",
    "sampling.cfg": "sampling.cfg_scale",
    "guidance_scale": "sampling.cfg_scale",
    "sampler": "sampling.sampler",
    "steps": "training.steps",
    "training.max_steps": "training.steps",
    "image_size": "data.image_size",
    "data.resolution": "data.image_size",
    "num_classes": "data.num_classes",
    "data.classes": "data.num_classes",
    "shards": "data.shards",
    "data_path": "data.shards",
    "vae": "data.vae",
    "variant": "model.variant",
    "model.attenton": "model.attention",
    "compile": "training.compile",
    "fp8": "training.fp8",
    "precision": "training.precision",
    "mixed_precision": "training.precision",
    "ema_decay": "training.ema_decay",
    "training.ema": "training.ema_decay",
    "grad_clip": "training.grad_clip",
    "max_grad_norm": "training.grad_clip",
    "rundir": "run_dir",
    "out": "run_dir",
    "results_dir": "run_dir",
    "global_seed": "seed",
    "training.seed": "seed",
    "objectiv": "objective",
    "training.checkpoint_evry": "training.checkpoint_every",
    "training.zero": "training.zero_stage",
    "epochs": "training.epochs",
}


@pytest.mark.parametrize("key", MISTAKES)
def test_a_mistyped_key_is_answered_with_the_right_one(key):
    assert suggest(key) == MISTAKES[key] and MISTAKES[key] in all_keys()
    with pytest.raises(ValueError, match=f"{key}=1 is not a known key; did you mean '{MISTAKES[key]}'"):
        load_config("sit_s_2", [f"{key}=1"])


def test_nothing_is_suggested_for_what_is_nothing_alike():
    assert suggest("xyzzy") == ""


NAMES = [("sit_s2", "sit_s_2"), ("dit-xl-2", "dit_xl_2"), ("sit_xl_2_512.yml", "sit_xl_2_512")]


@pytest.mark.parametrize("name, near", NAMES)
def test_an_included_config_is_found_by_name_and_its_misspellings_are_answered(name, near):
    assert load_config(near) == load_config(f"configs/{near}.yaml") == load_config(f"{near}.yaml")
    with pytest.raises(ValueError, match=f"{name} does not exist; did you mean {near}"):
        load_config(name)
