"""Checkpoints are checked before they are believed: damage is named, a resume falls back, nothing in them runs."""

import json
import os
import random
import shutil
import stat

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastdit.config import load_config
from fastdit.data.manifest import Manifest
from fastdit.distributed import Ranks
from fastdit.files import sealed
from fastdit.likelihood import likelihood
from fastdit.sampling import load_pipeline, sample
from fastdit.training import checkpoint
from fastdit.training.engine import TorchEngine
from fastdit.training.loop import train
from fastdit.training.state import TrainingState
from fastdit.training.validation import loss_of_run
from fastdit.verify import verify
from helpers.data import edit_manifest

pytestmark = pytest.mark.usefixtures("one_thread")
ONE = Ranks(0, 0, 1, torch.device("cpu"))
SHORT = ["training.steps=4", "training.checkpoint_every=2", "training.precision=fp32", "training.loss_aware_times=true",
         "objective={name: ddpm}", "sampling.sampler=ddpm"]  # fmt: skip
FILES = [
    "checkpoint.json",
    "config.yaml",
    "model.safetensors",
    "ema.safetensors",
    "exp_avg.safetensors",
    "exp_avg_sq.safetensors",
    "progress.safetensors",
]


def run_in(world, run_dir, *overrides, resume=False):
    return train(
        load_config(world / "config.yaml", [f"run_dir={run_dir}", *SHORT, *overrides]), resume=resume, device="cpu"
    )


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("integrity") / "run"
    run_in(world, run_dir)
    return run_dir


@pytest.fixture
def copy(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def newest(run_dir):
    return run_dir / "checkpoints" / "step-0000004"


def test_every_file_of_a_checkpoint_is_listed_in_the_docstring_and_here(trained):
    from fastdit.training import state

    assert sorted(path.name for path in newest(trained).iterdir()) == sorted(FILES)
    assert all(name in state.__doc__ for name in [*FILES, "golden.npz"])


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_bit_and_every_cut_is_found_and_named(world, copy, name):
    path, draw = newest(copy) / name, random.Random(name)
    whole = path.read_bytes()
    for _ in range(12):
        data = bytearray(whole)
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
        assert name in checkpoint.inspect(newest(copy))[1][0]
    for size in (0, 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert name in checkpoint.inspect(newest(copy))[1][0]
    heard = []
    assert checkpoint.newest_good(copy, ONE, heard.append).name == "step-0000002"
    assert len(heard) == 1 and name in heard[0] and "trying the checkpoint before it" in heard[0]
    assert any(name in line for line in verify(copy, lambda line: None))
    if name in ("checkpoint.json", "config.yaml", "ema.safetensors"):
        with pytest.raises(ValueError, match=f"checkpoint file .*{name}"):
            load_pipeline(copy)


def test_a_checkpoint_that_has_lost_its_own_digest_is_damaged(copy):
    path = newest(copy) / checkpoint.META
    for old, new in (('"sha256": "', '"sha25v": "'), ('"files"', '"filfs"')):
        text = path.read_text()
        head, found, tail = text.rpartition(old)  # the last entry named so is the file's own
        assert found
        path.write_text(head + new + tail)
        assert "checkpoint.json is damaged" in checkpoint.inspect(newest(copy))[1][0]
        path.write_text(text)


def test_a_resume_falls_back_to_the_checkpoint_before_and_ends_the_same(world, trained, copy, capsys):
    path = newest(copy) / "exp_avg.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    run_in(world, copy, resume=True)
    assert "exp_avg.safetensors is damaged" in capsys.readouterr().out
    ours, theirs = (load_file(newest(run) / "ema.safetensors") for run in (copy, trained))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs) and not checkpoint.inspect(newest(copy))[1]
    for folder in checkpoint.checkpoints(copy):
        (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="holds only damaged checkpoints; see fastdit verify"):
        run_in(world, copy, resume=True)


def test_other_names_in_the_folder_are_left_alone_and_remains_are_cleared(world, copy):
    for name in ("step-0000004.best", "step-4", "step-abc", "notes"):
        shutil.copytree(newest(copy), copy / "checkpoints" / name)
    for name in ("step-0000002.partial", "step-0000009.partial", "step-0000003.replaced.partial"):
        (copy / "checkpoints" / name).mkdir()
    assert [c.name for c in checkpoint.checkpoints(copy)] == ["step-0000002", "step-0000004"]
    run_in(world, copy, "training.steps=6", "training.keep_checkpoints=2", resume=True)
    assert sorted(path.name for path in (copy / "checkpoints").iterdir()) == [
        "notes", "step-0000004", "step-0000004.best", "step-0000006", "step-4", "step-abc",
    ]  # fmt: skip


def sizes_alone(meta):
    meta["files"] = {name: entry["bytes"] for name, entry in meta["files"].items()}


@pytest.mark.parametrize(
    "spoil, words",
    [
        (sizes_alone, "it lists .* without bytes and sha256"),
        (lambda meta: sizes_alone(meta) or meta.pop("sha256"), "it has no sha256"),
        (lambda meta: meta.pop("sha256") and meta.update(files={}), "it has no sha256"),
        (lambda meta: meta["files"].pop("ema.safetensors"), "does not list ema.safetensors"),
        (lambda meta: meta["files"].pop("config.yaml"), "does not list config.yaml"),
    ],
)
def test_nothing_that_has_no_digest_is_read(world, copy, spoil, words):
    """Whether checkpoint.json has a digest that is right, or none."""
    path = newest(copy) / checkpoint.META
    meta = json.loads(path.read_text())
    spoil(meta)
    path.write_text(json.dumps(sealed(meta) if "sha256" in meta else meta))
    with pytest.raises(ValueError, match=f"^checkpoint file {path} .*{words}.*; use another step$"):
        load_pipeline(copy)


def test_a_checkpoint_without_optimizer_state_is_sampled_but_not_resumed(world, copy):
    for folder in checkpoint.checkpoints(copy):
        meta = checkpoint.read_meta(folder)
        for name in ("exp_avg", "exp_avg_sq", "progress"):
            (folder / f"{name}.safetensors").unlink()
        del meta["contents"]  # which converted ones do not have either
        checkpoint.write_meta(folder, meta)
    load_pipeline(copy)
    with pytest.raises(ValueError, match="0004 has no optimizer state .*; start a new run_dir with training.init_f"):
        run_in(world, copy, "training.steps=6", resume=True)


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq", "progress"])
def test_nothing_in_a_checkpoint_is_run_and_nan_in_its_state_is_found(world, copy, tmp_path, name):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    path, meta = newest(copy) / f"{name}.safetensors", checkpoint.read_meta(newest(copy))
    stored = {key: tensor.clone() for key, tensor in load_file(path).items()}  # not mapped: the file is overwritten
    torch.save({**stored, "payload": Payload()}, path)
    checkpoint.write_meta(newest(copy), meta)
    assert any(f"{path} is not a safetensors file, or is damaged" in line for line in verify(copy, lambda line: None))
    with pytest.raises(ValueError, match=f"{path} is not a safetensors file, or is damaged"):
        run_in(world, copy, "training.steps=6", resume=True)
    assert not (tmp_path / "executed").exists()
    key = next(key for key in stored if stored[key].is_floating_point())
    save_file({**stored, key: stored[key].fill_(torch.nan)}, path)
    checkpoint.write_meta(newest(copy), meta)
    assert any(f"{path.name}: {key} has " in line for line in verify(copy, lambda line: None))


def test_values_that_are_not_finite_are_never_committed(world, copy, monkeypatch):
    for part in ("model", "exp_avg_sq"):
        original = TrainingState.snapshot

        def spoil(self, part=part, original=original):
            copies = original(self)
            next(iter(copies[part].values())).view(-1)[0] = torch.inf
            return copies

        with monkeypatch.context() as patch:
            patch.setattr(TrainingState, "snapshot", spoil)
            with pytest.raises(ValueError, match=f"has values that are not finite .* {part}.safetensors is not writt"):
                run_in(world, copy, "training.steps=6", resume=True)
        assert [c.name for c in checkpoint.checkpoints(copy)] == ["step-0000002", "step-0000004"]


def test_a_resume_applies_the_optimizer_settings_of_its_own_config(world, copy):
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        step = TorchEngine.step
        patch.setattr(TorchEngine, "step", lambda self, *rest: seen.append(self.adam.param_groups) or step(self, *rest))
        changes = ["training.betas=[0.8, 0.95]", "training.weight_decay=0.25"]
        run_in(world, copy, "training.steps=6", *changes, resume=True)
    [group] = seen[0]
    assert tuple(group["betas"]) == (0.8, 0.95) and group["weight_decay"] == 0.25


def test_files_have_the_permissions_of_the_umask(world, copy):
    before = os.umask(0o027)
    try:
        run_in(world, copy, "training.steps=6", resume=True)
    finally:
        os.umask(before)
    for path in (copy / "checkpoints" / "step-0000006").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o640, path


def test_classes_in_another_order_are_not_resumed(world, copy, tmp_path):
    shutil.copytree(world / "latents", tmp_path / "latents")
    names = Manifest.load(world / "latents").class_names
    edit_manifest(tmp_path / "latents", class_names=[names[1], names[0], *names[2:]])
    with pytest.raises(ValueError, match="class_names=.* make them equal to resume"):
        run_in(world, copy, "training.steps=6", f"data.shards={tmp_path}/latents", resume=True)


def test_samples_of_other_weights_under_the_same_path_are_not_taken_for_new(world, copy, tmp_path):
    quick = ["sampling.steps=2"]
    sample(copy, tmp_path / "out", 2, overrides=quick, device="cpu")
    shutil.rmtree(copy)
    run_in(world, copy, "training.lr=1e-2")
    with pytest.raises(ValueError, match="holds samples with sha256='.*; choose another --out"):
        sample(copy, tmp_path / "out", 2, overrides=quick, device="cpu")


def test_a_young_average_is_warned_of(world, copy, capsys):
    run_in(world, copy, "training.steps=6", resume=True)
    assert "after 6 steps at training.ema_decay=0.9999 the EMA is still 100% random weights" in capsys.readouterr().out
    load_pipeline(copy)
    assert "sample with --weights model" in capsys.readouterr().err
    load_pipeline(copy, weights="model")
    assert "random weights" not in capsys.readouterr().err
    load_pipeline(copy, [f"sampling.weak_checkpoint={copy}"])
    said = capsys.readouterr().err
    assert said.count("random weights") == 2 and f"warning: sampling.weak_checkpoint={copy}/checkpoints/step-" in said


@pytest.mark.parametrize("weights", ["ema", "model"])
def test_numbers_of_a_young_average_are_warned_of_too(world, copy, weights, capsys):
    run_in(world, copy, "training.steps=6", resume=True)
    loss_of_run(copy, ONE, shards=world / "latents", num_samples=20, weights=weights)
    assert ("still 100% random weights" in capsys.readouterr().err) == (weights == "ema")
    likelihood(copy, world / "latents", num_images=2, steps=2, probes=1, weights=weights, device="cpu")
    assert ("still 100% random weights" in capsys.readouterr().err) == (weights == "ema")


def test_a_run_with_a_relative_autoencoder_is_sampled_from_any_folder(world, tmp_path, monkeypatch):
    monkeypatch.chdir(world)
    run_in(world, tmp_path / "run", "data.vae=vae")
    monkeypatch.chdir(tmp_path)
    assert load_pipeline(tmp_path / "run").config.data.vae == str(world / "vae")
    assert (tmp_path / "run" / "vae" / "config.json").is_file()
    (tmp_path / "run").rename(tmp_path / "moved")
    path = tmp_path / "moved" / "checkpoints" / "step-0000004"
    meta = checkpoint.read_meta(path)
    config = (path / "config.yaml").read_text().replace(str(world / "vae"), "/gone/vae")
    (path / "config.yaml").write_text(config)
    checkpoint.write_meta(path, {k: v for k, v in meta.items() if k != "files"})
    load_pipeline(tmp_path / "moved")  # from the run's own copy



def test_a_network_that_is_not_finite_is_not_sampled(copy, tmp_path, monkeypatch):
    pipeline = load_pipeline(copy)
    next(pipeline.model.parameters()).data.fill_(torch.nan)
    monkeypatch.setattr("fastdit.sampling.load_pipeline", lambda *_, **__: pipeline)
    with pytest.raises(ValueError, match="the sampled images are not finite"):
        sample(copy, tmp_path / "out", 2, device="cpu")
    assert not list((tmp_path / "out" / "images").glob("*.png"))
