"""Checkpoints: a killed run resumes exactly, a partial checkpoint does not count, and the EMA follows its formula."""

import errno
import json
import random
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from fastdit.training import checkpoint
from fastdit.training.ema import EMA
from fastdit.training.state import keep_autoencoder, write_weights
from helpers.runs import file_size_limit, losses, run, train_here

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("seed", range(5))
def test_killed_at_a_random_step_and_resumed_gives_the_same_losses(world, whole, tmp_path, seed):
    arguments = ["--config", str(world / "config.yaml"), f"run_dir={tmp_path}/run", "--resume"]
    random_number = random.Random(seed)
    run("train.py", *arguments, kill=(random_number.randint(1, 19), 0.05 * random_number.random()))
    run("train.py", *arguments)
    assert losses(tmp_path / "run") == whole
    for name in ("model", "ema", "exp_avg", "exp_avg_sq", "progress"):
        ours = load_file(tmp_path / "run" / "checkpoints" / "step-0000020" / f"{name}.safetensors")
        theirs = load_file(world / "whole" / "checkpoints" / "step-0000020" / f"{name}.safetensors")
        assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


@pytest.mark.parametrize(
    "override, word",
    [
        ("model.variant=DiT-Ti/2", "model='DiT-Ti/4'"),
        ("seed=3", "seed=0"),
        ("training.global_batch=24", "global_batch=12"),
    ],
)
def test_resuming_another_run_is_refused(world, whole, override, word):
    with pytest.raises(ValueError, match=word):
        train_here(world, world / "whole", override, resume=True)


def test_a_checkpoint_counts_only_when_complete(world, whole, tmp_path):
    shutil.copytree(world / "whole", tmp_path / "run")
    newest = checkpoint.checkpoints(tmp_path / "run")[-1]
    newest.rename(newest.with_suffix(".partial"))  # as a kill between writing and renaming leaves it
    assert checkpoint.find(tmp_path / "run").name == "step-0000015"
    with open(checkpoint.find(tmp_path / "run") / "ema.safetensors", "r+b") as file:
        file.truncate(100)
    with pytest.raises(ValueError, match="ema.safetensors has 100 bytes"):
        checkpoint.read_meta(checkpoint.find(tmp_path / "run"))
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        checkpoint.find(world / "latents")
    meta = json.loads((checkpoint.find(tmp_path / "run") / checkpoint.META).read_text())
    assert meta["step"] == 15


def test_a_full_disk_leaves_the_last_checkpoint_and_no_partial_one(world, whole, tmp_path):
    shutil.copytree(world / "whole", tmp_path / "run")

    def full(folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        checkpoint.save(tmp_path / "run", 25, full, {}, keep=3)
    assert checkpoint.find(tmp_path / "run").name == "step-0000020"
    assert not list((tmp_path / "run" / "checkpoints").glob("*.partial"))


def test_a_write_that_fails_in_a_library_keeps_its_reason_and_names_the_file(tmp_path):
    for size, name in [(40_000, "model.safetensors"), (100, "step-0000005")]:  # the second: in checkpoint.json

        def write(folder, size=size):
            write_weights({"x": torch.zeros(size // 4)}, folder / "model.safetensors")

        with file_size_limit(20_000 if size > 20_000 else 300), pytest.raises(OSError) as raised:
            checkpoint.save(tmp_path, 5, write, {"note": "x" * 300}, keep=3)
        assert raised.value.errno == errno.EFBIG and raised.value.filename.endswith(name)
        assert not list((tmp_path / "checkpoints").iterdir())


def test_all_of_a_checkpoint_is_flushed_to_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    flushed, final = [], checkpoint.path_of(tmp_path, 5)
    monkeypatch.setattr(checkpoint, "sync", lambda path: flushed.append((path.name, final.exists())))
    checkpoint.save(tmp_path, 5, lambda folder: (folder / "weights").touch(), {}, keep=3)
    assert flushed == [("weights", False), ("checkpoint.json", False), ("step-0000005.partial", False),
                       ("checkpoints", True)]  # fmt: skip


def test_an_autoencoder_that_does_not_fit_into_the_run_leaves_no_half_copy(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "weights").write_bytes(bytes(1000))
    with file_size_limit(100), pytest.raises(OSError) as raised:
        keep_autoencoder(str(tmp_path / "source"), tmp_path / "run")
    assert raised.value.errno == errno.EFBIG and not list((tmp_path / "run").iterdir())
    (tmp_path / "run" / "vae.x1.partial" / "vae").mkdir(parents=True)  # as a kill leaves it
    keep_autoencoder(str(tmp_path / "source"), tmp_path / "run")
    assert (tmp_path / "run" / "vae" / "weights").stat().st_size == 1000
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["vae"]


def test_a_full_disk_is_reported_whatever_the_writer_raises(tmp_path, monkeypatch):
    def full(folder):
        raise SafetensorError("Error while serializing: I/O error")

    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    with pytest.raises(OSError, match="No space left on device.*step-0000005"):
        checkpoint.save(tmp_path, 5, full, {}, keep=3)
    assert checkpoint.checkpoints(tmp_path) == [] and not list((tmp_path / "checkpoints").iterdir())


def test_the_newest_and_every_nth_checkpoint_are_kept(tmp_path):
    for step in range(1, 9):
        checkpoint.save(tmp_path, step, lambda folder: (folder / "file").write_text("x"), {}, keep=2, keep_every=3)
    assert [checkpoint.step_of(path) for path in checkpoint.checkpoints(tmp_path)] == [3, 6, 7, 8]


def test_a_failed_write_ends_the_run_at_the_next_step(world, tmp_path, monkeypatch):
    original = checkpoint.save

    def save(run_dir, step, *rest):
        if step == 4:
            raise OSError(28, "No space left on device")
        original(run_dir, step, *rest)

    monkeypatch.setattr(checkpoint, "save", save)
    with pytest.raises(OSError, match="No space left"):
        train_here(world, tmp_path / "run", "training.checkpoint_every=2")
    assert len(losses(tmp_path / "run")) in (4, 5) and checkpoint.find(tmp_path / "run").name == "step-0000002"


def test_ema_follows_its_closed_form():
    weights = [torch.full((3,), 1.0)]
    ema = EMA(weights, decay=0.9)
    weights[0].fill_(2.0)
    for step in range(1, 11):
        ema.update(weights, step, torch.tensor(False))
    torch.testing.assert_close(ema.average[0], torch.full((3,), 2 - 0.9**10))
    warm = EMA([torch.zeros(1)], decay=0.9999, warmup=True)
    warm.update([torch.ones(1)], 1, torch.tensor(False))  # decay 2 / 11
    torch.testing.assert_close(warm.average[0], torch.tensor([9 / 11]))


def test_ema_is_kept_in_fp32_where_bf16_would_not_change():
    ema = EMA([torch.ones(1, dtype=torch.bfloat16)], decay=0.9999)
    ema.update([torch.full((1,), 2.0, dtype=torch.bfloat16)], 1, torch.tensor(False))
    assert ema.average[0].dtype == torch.float32 and 1 < ema.average[0].item() < 1.001
