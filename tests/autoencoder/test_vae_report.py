"""The page of a run of fastdit train-vae."""

import base64
import io
import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import fastdit
from fastdit.autoencoder.loop import train_autoencoder
from fastdit.cli import main
from fastdit.config import load_config, save_config
from fastdit.report import autoencoder, write_report
from fastdit.report.facts import read_run, reproduce, warnings
from fastdit.training.log import read_metrics
from helpers.pages import PICTURE, checked

from .conftest import SMALL, small

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def copied(whole, tmp_path):
    """A copy of the run, and what changes the records of its metrics.jsonl."""
    shutil.copytree(whole, tmp_path / "run")

    def change(do):
        path = tmp_path / "run" / "metrics.jsonl"
        records = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(record | do(record)) + "\n" for record in records))

    return tmp_path / "run", change


def test_training_from_python_writes_it_too(images, tmp_path):
    few = {"steps": 1, "evaluate_every": 0}
    sections = {"training": few, "discriminator": {"weight": 0}}
    vae = fastdit.train_vae(SMALL, images=images, run_dir=tmp_path / "run", device="cpu", **sections)
    assert vae == tmp_path / "run/vae" and "To reproduce it" in (tmp_path / "run/report.html").read_text()


def test_the_page_holds_every_figure_in_one_file(whole, tmp_path, capsys):
    main(["report", str(whole), "--out", str(tmp_path / "page.html"), "--device", "cpu"])
    assert capsys.readouterr().out.strip() == str(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert checked(page).headings == [
        "Quality", "Images and reconstructions", "Reconstructions over training", "Latents", "Training",
        "What was trained on what", "Where it ran", "To use it", "To reproduce it"]  # fmt: skip
    last = autoencoder.measures(read_run(whole))
    for words in ("AutoencoderKL-4x8/2 with 10.96k parameters, trained on 72 images at 16 px for 8 steps (0.889 ",
                  "Latents of 8 x 8 x 3", f"{last['psnr']:.2f} dB", f"{last['ssim']:.4f}", "18 images that were not",
                  "L1 + 0.0001 KL", "PatchGAN, layers 1, channels 4, weight 0.5, from step 3 on", "channel 2",
                  f"{last['scaling_factor']:g}", "training.sheet_images = 4", "fastdit train-vae"):  # fmt: skip
        assert words in page, words
    for title in ("PSNR in dB", "SSIM", "Loss", "Reconstruction loss", "KL per pixel value", "Adversarial loss",
                  "Discriminator&#x27;s loss", "Weight of the adversarial loss", "Mean logits", "Gradient norm",
                  "Deviation of latents, not scaled"):  # fmt: skip
        assert f'aria-label="{title}"' in page, title
    assert "Perceptual loss" not in page and "LPIPS" not in page and "Frechet" not in page
    assert page.partition('aria-label="Mean logits"')[2].partition("</svg>")[0].count("dashed") == 1
    assert f"--vae {whole}/vae --image-size 16" in page


def test_its_pictures_are_those_of_the_run(whole, tmp_path):
    page = write_report([whole], tmp_path / "page.html").read_text()
    files = [io.BytesIO(base64.b64decode(data)) for _, data in PICTURE.findall(page)]
    shown = [np.asarray(Image.open(file).convert("RGB")) for file in files]
    sheet = np.asarray(Image.open(whole / "monitor/step-0000008.png"))
    images, latents, outputs, difference = shown[:4]
    for row, picture in enumerate((images, latents, outputs)):
        cells = [[whole[:16, c : c + 16] for c in (0, step, 2 * step, 3 * step)]
                 for whole, step in ((sheet[18 * row :], 18), (picture, 17))]  # fmt: skip
        assert np.array_equal(*cells)
    wanted = (4 * np.abs(images.astype(int) - outputs)).clip(max=255)
    assert np.array_equal(difference[:, :16], wanted[:, :16]) and len(shown) == 4 + 3


def test_a_page_without_measures_and_pictures_says_so(copied):
    run, _ = copied
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(line for line in lines if "psnr" not in line))
    for folder in ("monitor", "checkpoints", "vae"):
        shutil.rmtree(run / folder)
    page = write_report([run]).read_text()
    headings = checked(page).headings
    assert "Quality" not in headings and "To use it" not in headings and headings[-1] == "Not on this page"
    assert "nothing has been measured yet; the run does so every 4 steps and at the end" in page


def test_damaged_records_and_sheets_do_no_harm(copied):
    run, change = copied
    change(lambda record: {"latent_mean": [1.0], "scaling_factor": "x", "ssim": None} if "psnr" in record else {})
    (run / "monitor/step-0000004.png").write_bytes(b"no picture")
    Image.new("RGB", (20, 30)).save(run / "monitor/step-0000008.png")
    (run / "vae/about.json").write_text("[]")
    page = write_report([run]).read_text()
    assert "Images and reconstructions" not in checked(page).headings and "PSNR" in page


def test_the_loss_of_a_decoder_alone_has_no_kl(whole):
    run = read_run(whole)
    assert autoencoder.about(run)["loss"] == "L1 + 0.0001 KL"
    run.config = replace(run.config, training=replace(run.config.training, init_from="vae", decoder_only=True))
    assert autoencoder.about(run)["loss"] == "L1" and autoencoder.about(run)["trained"] == "the decoder alone"


def test_faults_are_warned_of(copied):
    run, change = copied
    assert warnings(read_run(run)) == []
    change(lambda record: {"latent_std": [3.0] * 3, "psnr": 20.0 - record["step"]} if "psnr" in record else {})
    (run / "skipped.jsonl").write_text(json.dumps({"step": 3, "keys": [], "times": []}) + "\n")
    config = load_config(run / "config.yaml", ["training.steps=9", "training.ema_warmup=false"], type(small("", run)))
    save_config(config, run / "config.yaml")
    found = " ".join(warnings(read_run(run)))
    for words in ("not complete: step 8 of 9", "1 step was skipped", "names their samples.", "99% random weights",
                  "The PSNR fell to 12.00 dB, from 16.00 dB at step 4", "The standard deviations of the"):
        assert words in found, words


def test_two_runs_side_by_side_and_mixtures_that_are_refused(whole, copied, world, tmp_path):
    run, change = copied
    change(lambda record: {"latent_mean": [0.0] * 17, "latent_std": [1.0] * 17} if "psnr" in record else {})
    page = write_report([whole, run], tmp_path / "two.html").read_text()
    assert page.count("difference x 4</span>") == 2 and "<title>whole and run</title>" in page
    assert 'aria-label="Mean and deviation of scaled latents"' in page and "channel 16" not in page
    checked(page)
    (tmp_path / "dit").mkdir()
    shutil.copy(world / "config.yaml", tmp_path / "dit")
    with pytest.raises(ValueError, match="whole is a run of fastdit train-vae, others are of fastdit train"):
        write_report([whole, tmp_path / "dit"])
    with pytest.raises(ValueError, match="sampling.steps=3 is a setting of samples, and .* of train-vae; leave it out"):
        write_report([whole], overrides=["sampling.steps=3"])


def test_training_writes_the_page_and_its_command_runs_the_same_again(whole, images, tmp_path, capsys):
    config = small(images, tmp_path / "run", "training.steps=4", "discriminator.weight=0")
    save_config(config, tmp_path / "run.yaml")
    main(["train-vae", str(tmp_path / "run.yaml"), "--device", "cpu"])
    assert capsys.readouterr().out.splitlines()[-1] == f"report {tmp_path}/run/report.html"
    page = (tmp_path / "run/report.html").read_text()
    assert "Mean logits" not in page and "PatchGAN" not in page
    assert re.search(r"<figcaption>PSNR", page) is None  # one point is no curve
    command = reproduce(read_run(tmp_path / "run")).splitlines()[-1].split()
    assert command.pop(0) == "fastdit"
    main([*(w for w in command if not w.startswith("run_dir=")), f"run_dir={tmp_path}/again", "training.report=false"])
    one, two = ([m["loss"] for m in read_metrics(tmp_path / name)] for name in ("run", "again"))
    assert one == two and not (tmp_path / "again/report.html").exists()
    train_autoencoder(small(images, tmp_path / "quiet", "training.steps=4", "discriminator.weight=0"), device="cpu")
    assert not (tmp_path / "quiet/report.html").exists()
