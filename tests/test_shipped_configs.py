"""The included configs: the commands at their top run as written, at a reduced size, and their costs are the plan's."""

import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastdit.autoencoder.config import AutoencoderConfig
from fastdit.build import build_objective
from fastdit.cli import main
from fastdit.config import load_config, shipped_config, shipped_names
from fastdit.evaluation import features
from fastdit.listings import COMMAND
from fastdit.plan import plan
from helpers import ROOT, sources
from helpers.data import tiny_vae
from helpers.evaluation import tiny
from helpers.wandb import fake_wandb

pytestmark = pytest.mark.usefixtures("one_thread")
FEW = ["training.steps=2", "training.global_batch=4", "training.compile=false", "training.engine=torch",
       "training.report=false", "training.sample_images=2", "training.validate_images=20", "sampling.steps=2",
       "sampling.batch_size=4"]  # fmt: skip
WHERE_SET = {"training.sample_every": 2, "training.micro_batch": 0, "data.val_fraction": 0.3, "data.image_size": 32}
COST = re.compile(r"(\d+)M parameters, (\d+) GFLOP per image and training step; (\d+)k steps take about "
                  r"([\d.]+) H100 hours \(fastdit plan, estimated\)")  # fmt: skip


def celebahq(root):
    """A flat folder of JPEGs, as CelebAMask-HQ has them, of another size than the config's."""
    (root / "CelebAMask-HQ" / "CelebA-HQ-img").mkdir(parents=True)
    for i in range(12):
        image = Image.fromarray(sources.PIXELS[i]).resize((64, 64))
        image.save(root / "CelebAMask-HQ" / "CelebA-HQ-img" / f"{i}.jpg")


def imagenet(root):
    """The three tars, and ADM's reference, of 32 px."""
    sources.make_imagenet(root)
    sources.make_imagenet_val(root)
    tiny_vae().save_pretrained(root / "vae")
    for name in ("VIRTUAL_imagenet256_labeled", "VIRTUAL_imagenet512"):
        np.savez(root / f"{name}.npz", arr_0=sources.PIXELS)


MAKE = {"cifar10": sources.make_cifar10, "cifar10_latents": sources.make_cifar10, "celebahq_128": celebahq,
        "celebahq_128_flow": celebahq, "dit_xl_2": imagenet, "sit_xl_2_512": imagenet, "dit_2b_2": imagenet,
        "synthetic": lambda root: None}  # fmt: skip
REDUCED = {r"--image-size \d+": "--image-size 32", r"configs/(\w+).yaml": r"\1", "stabilityai/sd-vae-ft-ema": "vae",
           " --features inception-v3=weights.pth": "", r"--labels [\d,]+": "--labels 0,2",
           r"--classes [\d,]+": "--classes 0,2", "--seeds 0-9": "--seeds 0-1",
           r"--num-samples \d+": "--num-samples 8"}  # fmt: skip


def header(name: str) -> list[str]:
    return [line for line in shipped_config(name).read_text().splitlines() if line.startswith("#")]


def commands(name: str) -> list[list[str]]:
    """The words of each command at the top of a config, without what launches it."""
    found = []
    for line in filter(COMMAND.match, header(name)):
        words = shlex.split(line[2:])
        launched = {"launch": 4, "train.py": 1}.get(words[1], 1)
        found.append([word.replace("train.py", "train") for word in words[launched:]])
    return found


def value_of(config, key: str):
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


def reduced(words: list[str]) -> list[str]:
    """A command on few images and a small network, with the config's options and patch size."""
    line = shlex.join(words)
    for large, small in REDUCED.items():
        line = re.sub(large, small, line)
    words = shlex.split(line)
    if words[0] == "train":
        name = words[words.index("--config") + 1 if "--config" in words else 1]
        config = load_config(name, [word for word in words if "=" in word])
        words += [*FEW, f"model.variant=DiT-2x32x2/{config.model.variant.rpartition('/')[2]}"]
        words += [f"{key}={value}" for key, value in WHERE_SET.items() if value_of(config, key)]
        if config.data.val_shards or config.data.val_fraction:
            words.append("training.validate_every=2")
    elif words[0] == "evaluate":
        words += ["--num-samples", "20"] if "--loss" in words else ["--metrics", "frechet"]
    return words if words[0] == "plan" else [*words, "--device", "cpu"]


@pytest.mark.parametrize("name", MAKE)
def test_the_commands_of_a_config_run_one_after_the_other(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(features.FEATURES, "efficientnet-lite0", tiny)
    monkeypatch.chdir(tmp_path)
    MAKE[name](tmp_path)
    tiny_vae()  # diffusers looks for wandb when it is imported, and a stand-in would confuse it
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb())
    before = {path for path in tmp_path.iterdir() if path.suffix}
    for words in commands(name):
        if words[0] == "train-vae":  # tests/autoencoder has it; this stands for its result
            tiny_vae().save_pretrained(words[-1].removeprefix("run_dir=") + "/vae")
        else:
            main(reduced(words))
    run_dir = load_config(name).run_dir
    main(["verify", run_dir])
    said = capsys.readouterr().out
    assert f"next: fastdit sample {run_dir}" in said and "0.95 - 1.00" in said and "all is well" in said
    pictures = [words for words in commands(name) if "--seeds" in words or "--trajectory" in words]
    assert said.count(f"{run_dir}/sheet.png") + said.count(f"{run_dir}/trajectory.gif") == len(pictures)
    assert {path for path in tmp_path.iterdir() if path.suffix} == before  # nothing is unpacked


def test_the_listing_names_a_file_with_the_commands_and_ends_with_some_that_run(capsys):
    """NAME alone was no command: many configs need latents of their own size, and train for 400k steps."""
    main(["configs"])
    paragraphs, own = capsys.readouterr().out.split("\n\n")
    intro, *lines = own.splitlines()
    place = re.search(r"at the top of (.*)/NAME.yaml", intro)[1]
    assert all((Path(place) / f"{name}.yaml").is_file() and f"{name} " in paragraphs for name in shipped_names())
    readme = (ROOT / "README.md").read_text()
    assert re.sub(" +", " ", readme).count(lines[0]) == readme.count(lines[1]) == 1
    _, _, name, *overrides = lines[1].split()
    assert load_config(name, overrides).training.epochs == 100
    _, _, name, *overrides = lines[2].split()
    assert load_config(name, overrides, AutoencoderConfig).data.images == "images"


def test_celebahq_has_a_fixed_variance_and_the_steps_of_the_original():
    config = load_config("celebahq_128")
    objective = build_objective(config)
    assert objective.out_channels(4) == 4 and len(objective.timesteps(config.sampling.steps)) == 1001
    assert config.training.steps * config.training.global_batch == 500 * 30_000 and not config.training.ema_decay


@pytest.mark.parametrize("name", shipped_names())
def test_the_cost_of_a_config_is_that_of_the_plan(name):
    found = COST.search(" ".join(line.removeprefix("# ") for line in header(name)))
    if not found:
        pytest.skip("states no plan")
    planned = next((words for words in commands(name) if words[0] == "plan"), [])
    config = load_config(name, [word for word in planned if "=" in word])
    model, (best, *_) = plan(config, "H100")
    parameters, gflop, steps, hours = map(float, found.groups())
    assert parameters == round(model.parameter_count() / 1e6) and steps == round(config.training.steps / 1000)
    assert gflop == round(3 * model.flops_per_image() / 1e9)
    assert hours == pytest.approx(config.training.steps * best.step_s / 3600, rel=0.1)
