"""Validation, samples and metrics during training: they change no bit of it, and mistakes are found at the start."""

import filecmp
import json
import os
import re
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastdit.classes import Classes
from fastdit.config import load_config
from fastdit.data.manifest import Manifest
from fastdit.distributed import Ranks
from fastdit.evaluation.features import FEATURES
from fastdit.pipeline import ImagePipeline
from fastdit.training import checkpoint
from fastdit.training.log import Log, peak_gib, read_metrics, read_records
from fastdit.training.loop import train
from fastdit.training.monitor import Monitor, spread_labels
from fastdit.training.sheets import GAP, GRAY, read_png, sheet, strip, write_png
from fastdit.training.validation import loss_of_run
from fastdit.training.watchdog import MONITORS, Watchdog
from helpers.data import make_shards
from helpers.evaluation import evaluate, pictures, tiny, use_tiny
from helpers.runs import Forks, losses, train_here
from helpers.shards import write_shards

pytestmark = pytest.mark.usefixtures("one_thread")
SHORT = ["training.steps=10", "training.checkpoint_every=4", "training.ema_decay=0.9", "training.keep_checkpoints=0",
         "model.variant=DiT-2x64x4/4", "model.dropout=0.1", "data.val_fraction=0.1"]  # fmt: skip
TIMES = re.compile(r"_s$|^time$|^mfu$|^peak_gib$")


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    path = tmp_path_factory.mktemp("reference") / "real.npz"
    np.savez(path, pictures(30, size=32))
    return path


@pytest.fixture(scope="module")
def monitored(reference):
    return [*SHORT, "training.validate_images=40", "training.sample_every=4", "training.sample_images=6",
            "training.evaluate_every=8", f"training.reference={reference}", "training.evaluate_images=10"]  # fmt: skip


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(FEATURES, "efficientnet-lite0", tiny)


@pytest.fixture(scope="module")
def watched(world, monitored, tmp_path_factory):
    """A run with everything on."""
    folder = tmp_path_factory.mktemp("watched") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FEATURES, "efficientnet-lite0", tiny)
        train_here(world, folder, *monitored)
    return folder


def events(run_dir: Path) -> list[dict]:
    return [record for record in read_records(run_dir / "metrics.jsonl") if "monitor_s" in record]


def without_times(run_dir: Path) -> list[dict]:
    records = read_records(run_dir / "metrics.jsonl")
    return [{key: value for key, value in record.items() if not TIMES.search(key)} for record in records]


def same_checkpoints(a: Path, b: Path) -> None:
    for one, other in zip(checkpoint.checkpoints(a), checkpoint.checkpoints(b), strict=True):
        names = sorted(path.name for path in one.glob("*.safetensors"))
        assert len(names) == 5 and filecmp.cmpfiles(one, other, names, shallow=False) == (names, [], [])


def test_losses_weights_and_checkpoints_are_the_same_bits_without_it(world, watched, tmp_path):
    train_here(world, tmp_path / "plain", *SHORT, "training.validate_every=0")
    state = torch.random.get_rng_state()
    assert losses(tmp_path / "plain") == losses(watched) and len(losses(watched)) == 10
    same_checkpoints(tmp_path / "plain", watched)
    train_here(world, tmp_path / "again", *SHORT, "training.validate_images=20")
    assert torch.equal(torch.random.get_rng_state(), state) and not events(tmp_path / "plain")
    assert [e["step"] for e in events(tmp_path / "again")] == [4, 8, 10]


@pytest.mark.parametrize("engine", ["torch", "deepspeed"])
def test_nor_on_two_processes_whose_figures_are_those_of_the_commands_on_one(
    world, monitored, reference, tmp_path, engine
):
    common = ["--config", str(world / "config.yaml"), f"training.engine={engine}", *monitored]
    for name, change in {"on": [], "off": ["validate_every=0", "sample_every=0", "evaluate_every=0"]}.items():
        overrides = [f"run_dir={tmp_path / name}", *(f"training.{key}" for key in change)]
        with Forks("train.py", *common, *overrides, processes=2, before=use_tiny) as forks:
            assert forks.wait() == [0, 0], forks.said()
    on, off = tmp_path / "on", tmp_path / "off"
    assert losses(on) == losses(off) and len(losses(on)) == 10
    same_checkpoints(on, off)
    last = events(on)[-1]
    for weights, key in (("ema", "val_loss"), ("model", "val_loss_model")):
        found = loss_of_run(on, Ranks(0, 0, 1, torch.device("cpu")), num_samples=40, weights=weights)
        assert found["values"]["loss"] == last[key]
    stamped = read_records(on / "evaluations.jsonl")[-1]
    few = "--num-samples", 10, "sampling.compile=false"
    alone = evaluate(on, "--reference", reference, *few, out=tmp_path / "out.jsonl")
    assert alone["protocol"] == stamped["protocol"] and alone["values"] == stamped["values"]
    assert alone["subject"]["samples_sha256"] == stamped["subject"]["samples_sha256"]
    assert alone["subject"]["checkpoint"] == stamped["subject"]["checkpoint"] and stamped["step"] == 10


def test_every_result_is_in_all_places(watched):
    found = {record["step"]: record for record in events(watched)}
    assert list(found) == [4, 8, 10]
    assert found[4].keys() == {"step", "time", "val_loss", "val_loss_error", "val_loss_model", "val_bins", "validate_s",
                               "sample_s", "monitor_s"}  # fmt: skip
    evaluated = {"eval_frechet", "eval_frechet_error", "eval_kid", "eval_real_frechet", "evaluate_s"}
    assert evaluated < found[8].keys() & found[10].keys()
    assert found[10]["val_loss"] < found[4]["val_loss"] and len(found[4]["val_bins"]) == 20
    parts = sum(found[8][f"{kind}_s"] for kind in ("validate", "sample", "evaluate"))
    assert 0 < parts <= found[8]["monitor_s"] < parts + 1
    board = EventAccumulator(str(watched / "tensorboard"), {"images": 0, "scalars": 0}).Reload()
    for step, record in found.items():
        for key, value in record.items():
            tags = [f"{key}/{i:02d}" for i in range(20)] if key == "val_bins" else [key]
            for tag, wanted in zip(tags, value if key == "val_bins" else [value], strict=True):
                if tag not in ("step", "time"):
                    [scalar] = [s.value for s in board.Scalars(tag) if s.step == step]
                    assert scalar == pytest.approx(wanted, rel=1e-6), tag
    assert [image.step for image in board.Images("samples")] == [4, 8, 10] == [
        image.step for image in board.Images("samples_over_time")
    ]
    grids = sorted(path.name for path in (watched / "monitor").iterdir())
    assert grids == ["step-0000004.png", "step-0000008.png", "step-0000010.png", "strip.png"]
    said = (watched / "train.log").read_text()
    assert "step 8  validated in" in said and "images/s does not include that time" in said
    assert "step 4  validation loss " in said and " (EMA, still 66% random weights), " in said
    lines = read_records(watched / "evaluations.jsonl")
    assert [line["step"] for line in lines] == [8, 10]
    assert lines[0]["protocol"]["samples"]["sampling"]["cfg_scale"] == 1.5 and lines[0]["protocol"]["num_images"] == 10
    assert lines[0]["values"]["frechet"] == found[8]["eval_frechet"]


@pytest.mark.parametrize("when", [3, 4, 7, 8, 10])
def test_a_run_killed_at_any_time_has_the_records_of_one_that_was_not(
    world, monitored, watched, tmp_path, when, monkeypatch
):
    """At 4, 8 and 10 the checkpoint is written, and what is due then is not done yet."""
    call = Monitor.__call__

    def killed(self, step):
        if step == when:
            raise KeyboardInterrupt
        return call(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(Monitor, "__call__", killed)
        with pytest.raises(KeyboardInterrupt):
            train_here(world, tmp_path / "run", *monitored)
    train_here(world, tmp_path / "run", *monitored, resume=True)
    assert without_times(tmp_path / "run") == without_times(watched)
    same_checkpoints(tmp_path / "run", watched)
    names = sorted(path.name for path in (watched / "monitor").iterdir())
    assert filecmp.cmpfiles(tmp_path / "run/monitor", watched / "monitor", names, shallow=False) == (names, [], [])
    assert [line["step"] for line in read_records(tmp_path / "run" / "evaluations.jsonl")] == [8, 10]


def test_a_signal_leaves_the_rest_of_an_evaluation_to_the_resume(
    world, monitored, watched, tmp_path, monkeypatch, capsys
):
    batch, calls = ImagePipeline.batch, []

    def signaled(self, b, classes, seed):
        calls.append(len(classes))
        if calls.count(10) == 2:  # the second batch of the evaluation
            os.kill(os.getpid(), signal.SIGTERM)
        return batch(self, b, classes, seed)

    with monkeypatch.context() as patch:
        patch.setattr(ImagePipeline, "batch", signaled)
        with pytest.raises(SystemExit, match="75"):
            train_here(world, tmp_path / "run", *monitored)
    assert calls.count(10) == 2  # of three
    assert "step 8  not evaluated: SIGTERM" in capsys.readouterr().out
    train_here(world, tmp_path / "run", *monitored, resume=True)
    assert [(e["step"], e["eval_frechet"]) for e in events(tmp_path / "run") if "eval_frechet" in e] == [
        (e["step"], e["eval_frechet"]) for e in events(watched) if "eval_frechet" in e][1:]  # fmt: skip


def test_too_little_memory_for_samples_ends_no_run_and_the_watchdog_hears_of_each_evaluation(
    world, monitored, watched, tmp_path, monkeypatch, capsys
):
    def full(self, indices, labels, seed):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has ...")

    beats, at = [], Watchdog.at
    monkeypatch.setattr(Watchdog, "at", lambda self, step, phase: beats.append((step, phase)) or at(self, step, phase))
    monkeypatch.setattr(ImagePipeline, "images", full)
    train_here(world, tmp_path / "run", *monitored)
    assert losses(tmp_path / "run") == losses(watched)
    said = capsys.readouterr().out
    assert "step 4  not sampled: CUDA out of memory; sampling.batch_size=1 is too much for cpu: use a smaller" in said
    assert [e["val_loss"] for e in events(tmp_path / "run")] == [e["val_loss"] for e in events(watched)]
    assert beats.count((4, MONITORS)) > 2 * 2  # two batches of two kinds of weights


EVALUATED = "training.evaluate_every=5 training.reference={tmp}"
OTHER = "data.shards={tmp}/other data.vae='' data.image_size=null data.num_classes=null"
MISTAKES = {
    "training.validate_every=5": "training.validate_every=5 needs images that are not trained on; set data.val_frac",
    "training.validate_every=-1": "training.validate_every=-1 is out of range; use 0 for never",
    "training.evaluate_every=5": "training.evaluate_every=5 needs training.reference; give real images",
    f"{EVALUATED}/none": "none does not exist; give real images",
    f"{EVALUATED}/large.npz": "data.shards has images of 32x32 pixels, training.reference=.* of 48x48;.*"
    "give a reference of 32x32, or a folder of images$",
    f"{EVALUATED}/empty": "training.reference=.*empty",
    f"{EVALUATED} training.evaluate_features=inception": "training.evaluate_features='.* did you mean 'inception-v3'",
    "training.evaluate_images=1": "training.evaluate_images=1 is out of range; use 2 or more",
    f"training.sample_every=5 {OTHER}": "vae=vae is not a folder",
    "training.sample_every=5 sampling.weak_checkpoint={tmp}/none": "none does not exist; give a run folder",
    "data.val_shards={tmp}/none": "none has no manifest.json",
    "data.val_shards={world}/latents": "data.val_shards=.* holds the images of data.shards; use data.val_fraction",
    "data.val_shards={tmp}/other": "the latents of data.val_shards=.*other have .*; use the same autoencoder",
    "data.val_shards={tmp}/renamed": "data.val_shards=.*renamed has other classes than data.shards",
    "data.val_fraction=1": "data.val_fraction=1.0 is out of range",
    "data.val_fraction=0.1 data.val_shards=x": "use 0 with data.val_shards",
    "data.val_fraction=1e-6": "holds out 0 of the 1198 images in .*; use a larger fraction",
    "training.loss_reference={tmp}/none": "training.loss_reference=.*none does not exist",
    "training.loss_reference={tmp}/empty.json": "training.loss_reference=.*empty.json is not a reference curve",
    "training.wandb=mine": "training.wandb=mine needs the W&B package: pip install wandb",
}


@pytest.fixture(scope="module")
def wrong(world, tmp_path_factory):
    root = tmp_path_factory.mktemp("wrong")
    manifest = Manifest.load(world / "latents")
    about = replace(manifest, class_names=tuple(f"other {name}" for name in manifest.class_names))
    write_shards(((np.zeros((2, 8, *manifest.latents.shape[1:])), 0) for _ in range(2)), root / "renamed", about)
    np.savez(root / "large.npz", pictures(3, size=48))
    (root / "empty").mkdir()
    (root / "empty.json").write_text("{}")
    make_shards(root / "other")
    return root


@pytest.mark.parametrize("overrides", MISTAKES)
def test_a_mistake_is_answered_at_the_start(world, wrong, tmp_path, overrides, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    given = overrides.format(world=world, tmp=wrong).split()
    with pytest.raises(ValueError, match=MISTAKES[overrides]) as error:
        train(load_config(world / "config.yaml", [f"run_dir={tmp_path}/run", *given]), device="cpu")
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_the_time_left_includes_what_the_monitor_will_take(world, tmp_path, monkeypatch):
    write, told = Log.write, {}

    def spy(self, step, *arguments, monitor_s, **options):
        told[step] = monitor_s
        write(self, step, *arguments, monitor_s=7200, **options)

    monkeypatch.setattr(Log, "write", spy)
    train_here(world, tmp_path / "run", *SHORT, "training.validate_images=20", "training.sample_every=5",
               "training.sample_images=2")  # fmt: skip
    found = events(tmp_path / "run")
    validations = {record["step"]: record["validate_s"] for record in found if "validate_s" in record}  # 4, 8, 10
    samples = {record["step"]: record["sample_s"] for record in found if "sample_s" in record}  # 5, 10
    assert [told[step] for step in (1, 4)] == [0, 0] and told[5] == 2 * validations[4]
    assert told[6] == told[8] == 2 * validations[4] + samples[5] and told[10] == validations[8] + samples[5]
    assert (tmp_path / "run" / "train.log").read_text().count("  eta 2:00:0") == 10


def test_peak_memory_is_that_of_the_steps(world, tmp_path, monkeypatch):
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("the system does not reset the peak of a process")
    before, peaks = Monitor._validate, []

    def large(self):
        np.ones(1 << 26)
        peaks.append(peak_gib(self.device))
        return before(self)

    monkeypatch.setattr(Monitor, "_validate", large)
    train_here(world, tmp_path / "run", *SHORT, "training.validate_images=20")
    after = [record["peak_gib"] for record in read_metrics(tmp_path / "run") if record["step"] > 4]
    assert len(peaks) == 3 and max(after) < min(peaks) - 0.25  # of 0.5 GiB


def test_a_changed_share_is_refused_by_a_resume(world, watched):
    with pytest.raises(ValueError, match="has data.val_fraction=0.1, this run 0.2; make them equal to resume"):
        train_here(world, watched, *SHORT, "data.val_fraction=0.2", "training.steps=11", resume=True)


def test_a_sheet_and_a_strip_show_each_image_where_it_belongs(tmp_path):
    images = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 6, 3), np.uint8)
    picture = sheet(images, 3)
    assert picture.shape == (2 * 8 + GAP, 3 * 6 + 2 * GAP, 3)
    assert (picture[:8, 6 + GAP : 12 + GAP] == 1).all() and (picture[8 + GAP :, :6] == 3).all()
    assert (picture[8 : 8 + GAP] == GRAY).all() and (picture[8 + GAP :, 12 + 2 * GAP :] == GRAY).all()
    for step in range(0, 3000, 100):
        write_png(sheet(images + step // 100, 3), tmp_path / f"step-{step:07d}.png")
    (tmp_path / "step-0000001.png").write_text("no picture")
    whole = strip(tmp_path, 8)
    assert whole.shape[0] == 12 * (8 + GAP) - GAP
    assert (whole[:8, -6:] == 2).all() and (whole[-8:, -6:] == 29 + 2).all()  # the first and the last step
    assert read_png(tmp_path / "step-0000100.png").shape == picture.shape and strip(tmp_path / "none", 8) is None


def test_labels_of_a_grid_are_spread_over_the_classes():
    assert spread_labels(6, Classes(1000)) == [0, 166, 333, 500, 666, 833]
    assert spread_labels(16, Classes(1000))[8:] == [0, 125, 250, 375, 500, 625, 750, 875]
    assert spread_labels(5, Classes(3, ("a", "b", "c"))) == [0, 1, 2, 0, 1]
    assert spread_labels(3, Classes(0, tuple("abcdefghij"))) == [0, 0, 0]


def test_a_damaged_image_of_the_validation_is_found_at_the_start(tmp_path):
    shards = make_shards(tmp_path / "latents")
    path = shards.folder / shards.shards[0].name
    data = bytearray(path.read_bytes())
    for offset in shards.index()["offset"][:20].tolist():
        data[offset + 10] ^= 1
    path.write_bytes(data)
    config = load_config("sit_s_2", [f"data.shards={shards.folder}", f"run_dir={tmp_path}/run", "data.val_fraction=0.5",
                                     "model.variant=DiT-2x64x4/4", "training.global_batch=2"])  # fmt: skip
    with pytest.raises(ValueError, match="damaged images of the validation loss: .*; copy it again"):
        train(config, device="cpu")
    assert not (tmp_path / "run").exists()


def test_epochs_count_the_images_that_are_trained_on(world, watched):
    first = (watched / "train.log").read_text().splitlines()[0]
    count = int(re.search(r"([\d,]+) images", first)[1].replace(",", ""))
    assert 1198 * 0.85 < count < 1198 * 0.95 and f"{10 * 12 / count:.1f} epochs" in first
    assert json.loads((watched / "metrics.jsonl").read_text().splitlines()[0])["step"] == 1
    assert len(read_metrics(watched)) == 10
