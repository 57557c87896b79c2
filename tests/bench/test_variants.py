"""The table of variants: every value that an option can take has a row, and a row is trained, sampled and judged."""

import typing

import pytest
import torch

from bench.quality import variants
from fastdit.config import load_config, shipped_config
from fastdit.diffusion.objectives import OBJECTIVES
from fastdit.quickstart.digits import read_folder
from fastdit.quickstart.judge import Judge
from fastdit.registry import build
from fastdit.schema import ModelConfig


def overrides_of(rows) -> set[str]:
    return {override for overrides in rows.values() for override in overrides}


def test_every_option_of_the_network_has_a_row():
    stated = {override.partition("=")[0] for override in overrides_of(variants.NETWORKS)}
    # how it is computed; what the objective asks; what needs an encoder's features (bench.quality.methods)
    apart = {"attention", "learn_sigma", "class_token"}
    for name, hint in typing.get_type_hints(ModelConfig).items():
        assert name in apart or f"model.{name}" in stated, name
        if typing.get_origin(hint) is typing.Literal:
            for value in typing.get_args(hint):
                default = getattr(ModelConfig, name) == value
                assert default or f"model.{name}={value}" in overrides_of(variants.NETWORKS), f"{name}={value}"


@pytest.mark.parametrize("rows", [variants.DIFFUSIONS, variants.FLOWS])
def test_every_row_is_a_config_that_can_be_sampled(rows):
    for overrides in rows.values():
        config = load_config(shipped_config("quickstart"), overrides)
        ts = build(OBJECTIVES, config.objective, "objective").timesteps(config.sampling.steps)
        assert len(ts) > 20 and (ts.diff() < 0).all(), overrides


def test_the_tables_rows_are_what_they_say_and_all_but_the_bound_reach_nine_tenths():
    lines = variants.newest_lines()
    assert all(line["overrides"] == variants.ROWS[name] for name, line in lines.items() if name != variants.REAL)
    below = [name for name, line in lines.items() if line["accuracy"] < 0.9]
    assert below == ["ddpm, loss_type=kl, loss-aware times"]


def test_a_row_is_trained_sampled_and_judged(world):
    threads = torch.get_num_threads()
    images, labels = read_folder(world / "held_out", 32)
    judge = Judge(images[::4], labels[::4])
    own = variants.World(world, judge, judge.features(images))
    line = variants.measure("registers=4", own, ["training.steps=2", "sampling.steps=2", "training.global_batch=8"], 10)
    torch.set_num_threads(threads)
    assert line["steps"] == 2 and 0 <= line["accuracy"] <= 1 and line["frechet"] > 0
    assert line["parameters"] == 331_536 + 4 * 64
    assert "| registers=4 | 2 |" in variants.table(["registers=4"], {"registers=4": line}, networks=True)
    assert own.real()["accuracy"] > 0.5
