"""The command: one parser style, everything in one line where it is wrong; and the same from Python."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import fastdit
from fastdit.cli import main
from fastdit.commands import COMMANDS
from fastdit.config import all_keys, shipped_names
from fastdit.registry import Choice
from helpers import ROOT
from helpers.commands import mistake
from helpers.runs import run

pytestmark = pytest.mark.usefixtures("one_thread")


MISTAKES = {
    "trian sit_s_2": "fastdit trian is not a command; did you mean train?",
    "train": "name one config, such as sit_s_2; see fastdit train --help",
    "train sit_s_2 dit_s_2": "unexpected argument 'dit_s_2'",
    "train sit-s-2": "--config sit-s-2 does not exist; did you mean sit_s_2?",
    "train sit_s_2 --lr 1e-4": "--lr is not an option of fastdit train; did you mean training.lr=1e-4?",
    "train sit_s_2 --learning_rate=1e-4": (
        "--learning-rate is not an option of fastdit train; did you mean training.lr=1e-4"
    ),
    "train sit_s_2 lr=1e-4": "lr=1e-4 is not a known key; did you mean 'training.lr'?",
    "train sit_s_2 --resum --batch-size 4": (
        "--batch-size is not an option of fastdit train; did you mean training.global_batch=4?"
    ),
    "train sit_s_2 --out runs": "--out is not an option of fastdit train; did you mean run_dir=runs?",
    "train sit_s_2 --xyzzy": "--xyzzy is not an option of fastdit train; see fastdit train --help",
    "train sit_s_2 --device gpu": "--device='gpu', but PyTorch",
    "train sit_s_2 --device cuda:7": "finds no GPU here; use --device cpu",
    "train sit_s_2 --device gqu": "--device='gqu' cannot be used; use cpu, cuda or cuda:0",
    "train sit_s_2 --device mps": "--device='mps' cannot be used; use cpu, cuda or cuda:0",
    "sample": "name one run; see fastdit sample --help",
    "sample nowhere": "checkpoint nowhere does not exist",
    "sample a --checkpoint b": "name one run, not a and b",
    "sample runs/mine cfg_scale=4": "checkpoint runs/mine does not exist",
    "sample runs/mine --cfg_scale 4": "checkpoint runs/mine does not exist",
    "sample runs/mine --cfg_rescale 0.7": (
        "--cfg-rescale is not an option of fastdit sample; did you mean sampling.cfg_rescale=0.7?"
    ),
    "sample runs/mine --num_sampels 4": "--num-sampels is not an option of fastdit sample; did you mean --num-samples?",
    "sample runs/mine --weights best": "argument --weights: invalid choice: 'best'",
    "extract --images a --out b": "the following arguments are required: --vae",
    "extract --images a --out b --vae c --image_sise 256": (
        "--image-sise is not an option of fastdit extract; did you mean --image-size?"
    ),
    "extract --images a --out b --vae c --feature-dtype int8": "--feature-dtype=int8 is for the features of --encoder",
    "quickstart --out a --seed 1 seed=3": "--seed=1 and seed=3 are the same; give one",
    "plan dit_xl_2 --gpu h1000": "--gpu='h1000' is unknown; did you mean 'H100'?",
    "plan dit_xl_2 model.variant=DiT-XL": "model.variant='DiT-XL' has no patch size; did you mean 'DiT-XL/2'?",
    "verify nowhere": "nowhere",
    "verify a b": "unexpected argument 'b'",
    "launch train": "the following arguments are required: --gpus",
    "launch --gpus 2 verify x": "name extract, train, train-vae, sample, evaluate or neighbors after the options",
    "launch --gpus 8 --nodes 2 train sit_s_2": "several nodes need --master HOST:PORT",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_answered_in_one_line(capsys, line):
    assert MISTAKES[line] in mistake(capsys, *line.split())


def test_underscores_are_hyphens_and_gpus_have_any_case(capsys):
    main(["plan", "sit_s_2", "--gpu", "h100", "training.global_batch=32"])
    assert "1 x H100" in capsys.readouterr().out


def test_every_command_has_help_that_names_its_options(capsys):
    for name in COMMANDS:
        with pytest.raises(SystemExit, match="0"):
            main([name, "--help"])
        assert f"fastdit {name}" in capsys.readouterr().out


def test_configs_and_keys_are_listed(capsys):
    main(["configs"])
    text = capsys.readouterr().out
    assert all(name in text for name in shipped_names()) and "FID-50K 19.5" in text
    main(["train", "--help-config"])
    text = capsys.readouterr().out
    assert all(f"{key} = " in text for key in all_keys()) and "0 trains an unconditional network" in text


def test_doctor_names_what_there_is(capsys):
    main(["doctor"])
    text = capsys.readouterr().out
    assert all(word in text for word in ("torch ", "deepspeed", "attention     auto is", "sdpa: works", "launchers"))


def test_images_become_a_model_and_samples_in_two_commands(world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").symlink_to(world / "images")
    few = ["training.steps=3", "training.global_batch=8", "training.precision=fp32", "training.compile=false"]
    few += ["run_dir=my run", "--device", "cpu"]
    small = ["model.variant=DiT-Ti/4", f"data.vae={world}/vae", "data.image_size=32"]
    main(["train", "sit_s_2", "--images", "images", *small, *few])
    said = capsys.readouterr().out
    assert "extracting the latents of images to images_latents_32" in said and "from random weights" in said
    assert "step 3/3 (100%)" in said and "next: fastdit sample 'my run' --num-samples" in said
    assert (tmp_path / "my run" / "train.log").read_text() == said.partition("\n")[2]
    main(["sample", "my run", "--num-samples", "4", "sampling.sampler=heun", "sampling.steps=2", "--device", "cpu"])
    assert "4 images in my run/samples; see my run/samples/grid.png" in capsys.readouterr().out
    main(["train", "sit_s_2", "--images", "images", *small, *few, "training.steps=4", "--resume"])
    assert "extracting" not in capsys.readouterr().out

    model = fastdit.load("my run", device="cpu")
    images = model.sample(n=4, sampler="heun", steps=2)
    main(["sample", "my run", "--out", "again", "--num-samples", "4", "sampling.sampler=heun", "sampling.steps=2"])
    for i, image in enumerate(images):
        assert np.array_equal(np.asarray(image), np.asarray(Image.open(tmp_path / f"again/images/{i:06d}.png")))


def test_the_api_trains_loads_and_samples_every_format(world, tmp_path):
    settings = {"model": {"variant": "DiT-Ti/4"}, "objective": "flow", "sampling": {"sampler": "heun", "steps": 2}}
    quick = {"steps": 2, "global_batch": 8, "compile": False, "precision": "fp32"}
    last = fastdit.train(settings, shards=world / "latents", run_dir=tmp_path / "run", training=quick, device="cpu")
    assert last.name == "step-0000002"
    model = fastdit.load(tmp_path / "run")
    assert model.class_names == tuple("0123456789") and model.config.training.steps == 2
    images = model.sample(classes=["3", 4], n=3, seed=5, cfg_scale=2)
    assert [image.size for image in images] == [(32, 32)] * 3
    for to, name in (("diffusers", "pipe"), ("official", "model.pt")):
        fastdit.api.convert(tmp_path / "run", to, tmp_path / name, say=lambda line: None)
        other = fastdit.load(tmp_path / name, **{"data.vae": str(world / "vae")} if to == "official" else {})
        for own, same in zip(images, other.sample(classes=["3", 4] if other.class_names else [3, 4], n=3, seed=5,
                                                  cfg_scale=2, sampler="heun", steps=2), strict=True):  # fmt: skip
            assert np.abs(np.asarray(own).astype(int) - np.asarray(same)).max() <= 1
    own = fastdit.load(tmp_path / "run", **{"data.vae": str(world / "vae"), "objective.sample_shift": 2.0}).config
    assert own.data.vae == str(world / "vae") and own.objective.options == {"sample_shift": 2.0}
    for path in (tmp_path / "run", tmp_path / "pipe"):  # as Model.sample takes it
        noisy = fastdit.load(path, sampler="ddim", **{"sampler.eta": 0.5})
        assert noisy.config.sampling.sampler == Choice("ddim", {"eta": 0.5})
    with pytest.raises(ValueError, match="data.num_classes=3: only sampling"):
        fastdit.load(tmp_path / "run", **{"data.num_classes": 3})
    with pytest.raises(ValueError, match="'cat' is not a class of this model"):
        model.sample(classes="cat")
    for nothing in ({"n": 0}, {"n": -3}, {"classes": []}):
        with pytest.raises(ValueError, match=r"sample\(classes=.*, n=.*\) makes no image; use n=1 or more"):
            model.sample(**nothing)
    with pytest.raises(ValueError, match="sampling.cfgscale=3 is not a known key; did you mean 'sampling.cfg_scale'"):
        model.sample(cfgscale=3)


def test_importing_fastdit_imports_no_torch():
    code = "import sys, fastdit; fastdit.__version__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        fastdit.lode  # noqa: B018


def test_all_processes_together_give_one_message(world, tmp_path):
    with pytest.raises(AssertionError) as error:
        run("train.py", "sit_s_2", f"data.shards={world}/nowhere", f"run_dir={tmp_path}/run", processes=3)
    assert str(error.value).count("error: ") == 1 and "Traceback" not in str(error.value).partition("Process Fork")[0]


def test_a_command_of_one_process_is_refused_under_a_launcher(monkeypatch, capsys):
    """Two processes of `fastdit ema` removed each other's folders, and one ended well without a width."""

    def stub(parser):
        """Takes no arguments."""
        return pytest.fail

    monkeypatch.setenv("WORLD_SIZE", "2")
    for command in ("ema", "convert", "likelihood", "import", "shards", "report", "grid", "quickstart"):
        monkeypatch.setitem(COMMANDS, command, stub)
        says = f"fastdit {command} runs in one process, but the environment has WORLD_SIZE=2; start it without a"
        assert mistake(capsys, command).startswith(f"error: {says}")
    main(["configs"])  # writes nothing


def test_the_notebook_runs(tmp_path, monkeypatch):
    cells = json.loads((ROOT / "docs" / "tour.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert code[0].count("= 1300, 1000") == 1
    code[0] = code[0].replace("= 1300, 1000", "= 2, 2")
    monkeypatch.chdir(tmp_path)
    scope = {}
    for cell in code:
        exec(cell, scope)
    assert [image.size for image in scope["samples"]] == [(32, 32)] * 8 and scope["sheet"].size == (512, 64)
    for own, same in zip(scope["samples"], scope["same"], strict=True):
        assert np.abs(np.asarray(own).astype(int) - np.asarray(same)).max() <= 1
