"""The page of a run: complete, in one file, and honest about what is not there."""

import base64
import io
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

import fastdit.report
from fastdit.cli import main
from fastdit.data.extract import extract_features
from fastdit.data.shards import merge, split
from fastdit.report import report_at_end, write_report
from fastdit.report.facts import read_run, reproduce, warnings
from fastdit.training import checkpoint
from fastdit.training.log import read_metrics
from helpers.data import write_digits
from helpers.pages import PICTURE, checked
from helpers.runs import losses, train_here

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def runs(world, tmp_path_factory):
    place = tmp_path_factory.mktemp("runs")
    train_here(world, place / "a", "training.ema_warmup=true")
    train_here(world, place / "b", "training.lr=2e-3", "training.ema_warmup=true", "training.steps=10")
    return place


@pytest.fixture
def copied(runs, tmp_path):
    """A copy of run a to spoil, and what changes its config everywhere."""
    shutil.copytree(runs / "a", tmp_path / "a")

    def change(old, new):
        for path in (tmp_path / "a").rglob("config.yaml"):
            path.write_text(path.read_text().replace(str(old), str(new)))
        for path in (tmp_path / "a").rglob("checkpoint.json"):  # a config that differs from what it was is refused
            checkpoint.write_meta(path.parent, json.loads(path.read_text()))

    return tmp_path / "a", change


def test_the_page_holds_every_figure_in_one_file(runs, capsys):
    main(["report", str(runs / "a"), "--device", "cpu", "sampling.steps=3"])
    assert capsys.readouterr().out.strip() == str(runs / "a" / "report.html")
    page = (runs / "a" / "report.html").read_text()
    assert checked(page).headings == ["Samples", "Samples over training", "Nearest training images", "Training",
                                      "What was trained on what", "Where it ran", "To reproduce it"]  # fmt: skip
    for words in ("DiT-Ti/4 with", "on 1,198 images of 10 classes at 32 px for 20 steps", "dpmpp_2m, 3 steps",
                  "guidance 1.5", "the run&#x27;s own setting is heun, 4 steps", "Generated", "Real", "noise to data",
                  "step 10", "step 15", "step 20", "distances 0.", "training.checkpoint_every = 5"):  # fmt: skip
        assert words in page
    for title in ("Loss", "Loss, logarithmic", "Loss per timestep", "Gradient norm", "Learning rate",
                  "Images per second", "Peak memory in GiB"):  # fmt: skip
        assert f'aria-label="{title}"' in page
    [warning] = re.findall("<li>(.*?)</li>", page)  # the autoencoder is not trained
    assert warning.startswith("The scaled latents have a standard deviation of 0.2, not about 1: the autoencoder")
    assert len(page) < 1_500_000
    kinds = [kind for kind, _ in PICTURE.findall(page)]
    assert kinds.count("gif") == 1 and kinds.count("webp") == 2 + 3 + 2 * 6  # sheets, checkpoints, neighbors


def test_its_pictures_can_be_opened_and_show_something(runs):
    page = write_report([runs / "a"], runs / "again.html", overrides=["sampling.steps=3"]).read_text()
    for _, data in PICTURE.findall(page):
        picture = Image.open(io.BytesIO(base64.b64decode(data)))
        assert np.asarray(picture.convert("L")).std() > 3
        if picture.format == "GIF":
            assert picture.n_frames == 4 and picture.size == (4 * 34 - 2, 4 * 34 - 2)


@pytest.mark.parametrize("override, words", [
    ("seed=3", "seed=3: only sampling"),
    ("training.lr=1", "training.lr=1: only sampling"),
    ("sampling.batch_size=3", "sampling.batch_size=3 changes nothing when sampling"),
    ("sampling.steps=few", "steps='few' needs a discrete schedule"),
    ("sampling.sampler=hein", "did you mean 'heun'"),
    ("sampling.cfg_scale=high", "sampling.cfg_scale='high' must be a number"),
])  # fmt: skip
def test_a_mistake_in_a_setting_of_the_samples_writes_no_page(runs, tmp_path, override, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        write_report([runs / "a"], tmp_path / "page.html", overrides=[override])
    assert not any(tmp_path.iterdir())


def test_the_same_page_twice(runs):
    outs = runs / "x.html", runs / "y.html"
    pages = [write_report([runs / "a"], out, overrides=["sampling.steps=2"]).read_bytes() for out in outs]
    assert pages[0] == pages[1]


def test_two_runs_side_by_side(runs):
    page = write_report([runs / "a", runs / "b"], runs / "two.html", overrides=["sampling.steps=2"]).read_text()
    headings = checked(page).headings
    assert "What differs" in headings and "Not on this page" not in headings
    differing = page.partition("What differs</h2>")[2].partition("</section>")[0]
    assert re.findall(r"<tr><th>([\w.]+)</th><td>(.*?)</td><td>(.*?)</td>", differing) == [
        ("training.steps", "20", "10"), ("training.lr", "0.001", "0.002")]  # fmt: skip
    loss = page.partition('aria-label="Loss"')[2].partition("</svg>")[0]
    assert 'class="s0"' in loss and 'class="s1"' in loss
    assert page.count("From noise to data") == 2 and "<title>a and b</title>" in page


@pytest.mark.parametrize("gone", ["latents", "vae"])
def test_a_page_without_what_is_gone_says_so(world, copied, gone):
    run, change = copied
    change(world / gone, f"/gone/{gone}")
    shutil.rmtree(run / "vae")  # the copy of the autoencoder in the run
    page = write_report([run], overrides=["sampling.steps=2"]).read_text()
    headings = checked(page).headings
    assert headings[-1] == "Not on this page" and f"/gone/{gone}" in page.partition("Not on this page")[2]
    assert "Nearest training images" not in headings and "<figcaption>Real" not in page
    assert ("Samples" in headings) == (gone == "latents") and ('"Loss per timestep"' in page) == (gone == "vae")


@pytest.mark.parametrize("action", ["split", "merge", "extract"])
def test_images_that_the_run_was_not_trained_on_are_not_shown_as_training_images(world, copied, tmp_path, action):
    """Where data.shards has some of the images by now, further ones, or others."""
    run, change = copied
    shards, more = tmp_path / "shards", tmp_path / "more"
    if action == "split":
        split(world / "latents", shards, more, count=100)
    else:
        write_digits(tmp_path / "images", 60)
        for path in (tmp_path / "images").rglob("*.png"):
            Image.open(path).transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(path)
        out = shards if action == "extract" else more
        extract_features(images=tmp_path / "images", out=out, vae=world / "vae", image_size=32)
        if action == "merge":
            merge([world / "latents", more], shards)
    change(world / "latents", shards)
    page = write_report([run], overrides=["sampling.steps=2"]).read_text()
    headings = checked(page).headings
    assert "Samples" in headings and "Nearest training images" not in headings and "<figcaption>Real" not in page
    assert f"trained on other images than data.shards={shards} has now" in page.partition("Not on this page")[2]
    assert '"Loss per timestep"' not in page and "1,198 images" not in page


def test_a_run_without_labels_and_one_with_a_learned_variance(world, tmp_path):
    changes = ["objective=ddpm", "data.num_classes=0", "sampling.cfg_scale=1", "training.steps=5"]
    train_here(world, tmp_path / "run", *changes)
    page = write_report([tmp_path / "run"], overrides=["sampling.steps=2"]).read_text()
    assert "trained with DDPM on 1,198 images, without labels, at 32 px" in page and "of its class" not in page
    assert "the EMA is still 100% random weights" in page and "weights without EMA" in page
    assert 'aria-label="Loss: mse"' in page and 'aria-label="Loss: vlb"' in page
    headings = checked(page).headings
    assert "Nearest training images" in headings and "Samples over training" not in headings  # of one checkpoint
    assert "Not on this page" not in headings


def test_a_run_without_checkpoints_or_records_has_a_page(copied):
    run, _ = copied
    shutil.rmtree(run / "checkpoints")
    for name in ("metrics.jsonl", "environment.jsonl"):
        (run / name).unlink()
    page = write_report([run]).read_text()
    assert checked(page).headings == ["What was trained on what", "To reproduce it", "Not on this page"]
    assert "no complete checkpoint" in page and "no environment.jsonl" in page


def test_settings_that_a_resume_changed_are_said_but_for_those_of_steps_that_were_repeated(world, tmp_path):
    run, short = tmp_path / "run", ["training.steps=4", "training.checkpoint_every=2", "training.ema_warmup=true"]
    train_here(world, run, *short, "training.keep_checkpoints=0")
    said = []
    for lr in (5e-4, 2e-4):  # twice from step 2: the second time in place of the first
        shutil.rmtree(run / "checkpoints/step-0000004")
        train_here(world, run, *short, "training.keep_checkpoints=0", f"training.lr={lr}", resume=True)
        said.append([line for line in warnings(read_run(run)) if "A resume" in line])
    assert said == [[f"A resume changed settings: at step 2 training.lr=0.001 -> {lr}. Elsewhere, this page names the "
                     "last ones alone."] for lr in ("0.0005", "0.0002")]  # fmt: skip


def test_skipped_steps_and_weights_that_are_useless_are_said(world, tmp_path):
    train_here(world, tmp_path / "run", "training.lr=1e30", "training.max_skipped=99", "training.ema_warmup=true")
    page = write_report([tmp_path / "run"], overrides=["sampling.steps=2"]).read_text()
    skipped = len((tmp_path / "run" / "skipped.jsonl").read_text().splitlines())
    assert skipped > 10 and f"{skipped} steps were skipped" in page and "The loss is not finite in" in page
    assert "<h2>Samples" not in page and "No loss per timestep: it is not finite" in page
    checked(page)


def test_figures_of_quality_stand_with_their_protocol(copied):
    run, _ = copied
    figures = [{"name": "FID", "value": 2.2701, "protocol": "50,000 samples <of> heun"}, {"name": "IS", "value": "278"}]
    (run / "quality.json").write_text(json.dumps(figures))
    page = write_report([run], budget_s=0).read_text()
    assert checked(page).headings[0] == "Quality"
    assert "<tr><th>FID<small>50,000 samples &lt;of&gt; heun</small></th><td>2.27</td></tr>" in page
    assert "<tr><th>IS</th><td>278</td></tr>" in page


def test_what_would_take_too_long_is_left_out_and_said(runs):
    page = write_report([runs / "a"], runs / "new" / "cheap.html", budget_s=0).read_text()
    headings = checked(page).headings
    assert "Samples" not in headings and "Training" in headings and 'aria-label="Loss"' in page
    assert f"Make them with fastdit report {runs / 'a'}" in page


def test_training_writes_the_page_and_its_losses_are_the_same_without(world, runs, tmp_path, capsys):
    command = ["train", str(world / "config.yaml"), f"run_dir={tmp_path}/run", "training.ema_warmup=true", "--device"]
    main([*command, "cpu", "training.report=true"])
    assert losses(tmp_path / "run") == losses(runs / "a")
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == f"report {tmp_path}/run/report.html" == (tmp_path / "run/train.log").read_text().splitlines()[-1]
    assert "Samples over training" in checked((tmp_path / "run/report.html").read_text()).headings
    [start] = read_run(tmp_path / "run").starts
    assert start["step"] == 0 and start["device"] == "cpu" and start["processes"] == 1 and start["versions"]["torch"]


def test_a_report_that_fails_does_not_fail_the_training(runs, monkeypatch):
    def fail(*_, **__):
        raise KeyError("a fault\nof ours")

    monkeypatch.setattr(fastdit.report, "measure_run", fail)
    line = report_at_end(runs / "a", "cpu")
    assert line.startswith("warning: no report (KeyError: ") and "\n" not in line and f"fastdit report {runs}/a" in line


def test_its_command_runs_the_same_again(runs, tmp_path):
    command = reproduce(read_run(runs / "b")).splitlines()[-1].split()
    assert command.pop(0) == "fastdit"
    again = [word for word in command if not word.startswith("run_dir=")]
    main([*again, f"run_dir={tmp_path}/again"])
    assert [m["loss"] for m in read_metrics(tmp_path / "again")] == [m["loss"] for m in read_metrics(runs / "b")]


def test_a_folder_that_is_no_run_is_refused(runs, tmp_path):
    for folder in (tmp_path, runs / "a" / "checkpoints" / "step-0000020"):
        with pytest.raises(ValueError, match="is not the folder of a run"):
            write_report([folder])
    with pytest.raises(ValueError, match="--out=page.txt must be a file that ends in .html"):
        write_report([runs / "a"], "page.txt")
    with pytest.raises(ValueError, match="shows one to four runs, not 5"):
        write_report([runs / "a"] * 5)


@pytest.mark.parametrize("content", ["", "null"])
def test_an_empty_config_is_answered_in_one_line(tmp_path, content):
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(ValueError, match="config.yaml is not that of a run, which has data.image_size"):
        read_run(tmp_path)
