"""Fine-tuning: a run starts from another one's weights and EMA, in every format, and says what it did not take over."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from fastdit.config import load_config
from fastdit.convert import convert, read_initial
from fastdit.models.dit import DiT
from fastdit.training import checkpoint
from fastdit.training.loop import train
from fastdit.training.state import LABELS, take_over
from helpers.runs import run

pytestmark = pytest.mark.usefixtures("one_thread")
STILL = ["training.steps=1", "training.lr=1e-30", "training.warmup_steps=0", "training.precision=fp32"]


@pytest.fixture(scope="module")
def source(world, tmp_path_factory):
    """A short run whose weights and EMA differ, and its newest checkpoint in every format."""
    place = tmp_path_factory.mktemp("source")
    overrides = [f"run_dir={place}/run", "training.steps=6", "training.ema_decay=0.5", "training.precision=fp32"]
    train(load_config(world / "config.yaml", overrides), device="cpu")
    for to, name in (("official", "run.pt"), ("diffusers", "pipe")):
        convert(place / "run", to, place / name, say=lambda line: None)
    return place


def weights(run_dir, name):
    return load_file(checkpoint.find(run_dir) / f"{name}.safetensors")


def start(world, run_dir, origin, *overrides):
    changes = [f"run_dir={run_dir}", f"training.init_from={origin}", *STILL, *overrides]
    train(load_config(world / "config.yaml", changes), device="cpu", read_initial=read_initial)


@pytest.mark.parametrize("name", ["run", "run/checkpoints/step-0000006", "run.pt", "pipe"])
def test_weights_and_ema_come_from_there(world, source, tmp_path, name):
    start(world, tmp_path / "fine", source / name)
    close = {"rtol": 0, "atol": 0} if name != "pipe" else {"rtol": 1e-4, "atol": 1e-5}
    for kind in ("model", "ema"):
        ours, theirs = weights(tmp_path / "fine", kind), weights(source / "run", "ema" if name == "pipe" else kind)
        blend = torch.lerp if kind == "ema" else lambda a, b, w: a  # one step of the average, at decay 0.9999
        raw = weights(tmp_path / "fine", "model")
        for key in ours.keys() - ({"t_embedder.mlp.0.weight"} if name == "pipe" else set()):  # equal as a function only
            torch.testing.assert_close(ours[key], blend(theirs[key], raw[key], 1 - 0.9999), **close)
    meta = checkpoint.read_meta(checkpoint.find(tmp_path / "fine"))
    assert meta["step"] == 1
    assert int(weights(tmp_path / "fine", "progress")["updates"]) == 1  # the optimizer is fresh


def test_under_zero_the_ema_comes_from_there_too(world, source, tmp_path):
    for stage in (1, 3):
        out = tmp_path / f"zero{stage}"
        places = [f"run_dir={out}", f"training.init_from={source}/run"]
        zero = ["training.engine=deepspeed", f"training.zero_stage={stage}"]
        run("train.py", "--config", str(world / "config.yaml"), *places, *STILL, *zero, processes=2)
        raw, theirs = weights(out, "model"), weights(source / "run", "ema")
        for key, value in weights(source / "run", "model").items():
            torch.testing.assert_close(raw[key], value, rtol=0, atol=0)
        for key, value in weights(out, "ema").items():
            torch.testing.assert_close(value, torch.lerp(theirs[key], raw[key], 1 - 0.9999), rtol=1e-6, atol=1e-7)


def test_another_number_of_classes_keeps_the_null_label_alone(world, source, tmp_path, capsys):
    start(world, tmp_path / "fine", source / "run", "data.num_classes=17")
    ours, theirs = weights(tmp_path / "fine", "model"), weights(source / "run", "model")
    assert ours[LABELS].shape == (18, 64) and torch.equal(ours[LABELS][-1], theirs[LABELS][-1])
    assert not torch.equal(ours[LABELS][:10], theirs[LABELS][:10])
    assert all(torch.equal(ours[key], theirs[key]) for key in ours if key != LABELS)
    assert f"from {source}/run, except for {LABELS} (but for the null label)" in capsys.readouterr().out


def test_positions_are_computed_anew_and_other_networks_are_refused():
    torch.manual_seed(0)
    small = {"hidden_size": 24, "depth": 1, "num_heads": 3, "num_classes": 5}
    old, new = DiT(4, **small), DiT(8, learn_sigma=False, position="sincos_rope", **small)
    [state], kept = take_over(new.state_dict(), [old.state_dict()], "x.pt", new.null_label)
    assert kept == ["pos_embed", "rope", "final_layer.linear.weight", "final_layer.linear.bias"]
    assert torch.equal(state["pos_embed"], new.pos_embed) and torch.equal(state["rope"], new.rope)
    assert torch.equal(state["blocks.0.mlp.fc1.weight"], old.blocks[0].mlp.fc1.weight)
    for other in (DiT(8, **small | {"depth": 2}), DiT(8, mlp="swiglu", **small), DiT(8, **small | {"hidden_size": 36})):
        with pytest.raises(ValueError, match="training.init_from=x.pt is another network: .*; set model.variant and"):
            take_over(other.state_dict(), [old.state_dict()], "x.pt", other.null_label)


def test_a_resume_continues_the_fine_tuning_and_reads_its_source_no_more(world, source, tmp_path):
    shutil.copytree(source / "run", tmp_path / "gone")
    start(world, tmp_path / "fine", tmp_path / "gone")
    shutil.rmtree(tmp_path / "gone")
    overrides = [f"run_dir={tmp_path}/fine", f"training.init_from={tmp_path}/gone", *STILL, "training.steps=2"]
    train(load_config(world / "config.yaml", overrides), resume=True, device="cpu", read_initial=read_initial)
    assert checkpoint.find(tmp_path / "fine").name == "step-0000002"


@pytest.mark.parametrize("name", ["converted", "run/checkpoints/step-0000006"])
def test_a_run_dir_that_is_a_checkpoint_is_refused_untouched(world, source, tmp_path, name):
    convert(source / "run", "fastdit", source / "converted", say=lambda line: None) if name == "converted" else None
    shutil.copytree(source / name, tmp_path / "it")
    before = {path.name: path.read_bytes() for path in (tmp_path / "it").iterdir()}
    for resume in (False, True):
        config = load_config(world / "config.yaml", [f"run_dir={tmp_path}/it", *STILL])
        with pytest.raises(ValueError, match="is a checkpoint, not a run, .* training.init_from="):
            train(config, resume=resume, device="cpu")
    assert {path.name: path.read_bytes() for path in (tmp_path / "it").iterdir()} == before


def test_a_folder_without_a_run_is_not_resumed(world, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"x")
    config = load_config(world / "config.yaml", [f"run_dir={tmp_path}/photos", *STILL])
    with pytest.raises(ValueError, match="holds files, but no run that could be resumed"):
        train(config, resume=True, device="cpu")


def test_a_missing_source_and_a_missing_reader_are_named(world, tmp_path):
    with pytest.raises(ValueError, match="training.init_from=nowhere.pt does not exist"):
        start(world, tmp_path / "run", "nowhere.pt")
    config = load_config(world / "config.yaml", [f"run_dir={tmp_path}/run", "training.init_from=x.pt", *STILL])
    with pytest.raises(ValueError, match="read_initial=fastdit.convert.read_initial"):
        train(config, device="cpu")
    assert not (tmp_path / "run").exists()
