"""verify accepts healthy folders and names every fault that is planted."""

import json
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fastdit import cli
from fastdit.data.manifest import Manifest
from fastdit.training import checkpoint
from fastdit.verify import verify
from helpers.checkpoints import moved, quiet
from helpers.data import edit_manifest, make_shards
from helpers.runs import train_here

pytestmark = pytest.mark.usefixtures("one_thread")


def copy(place, tmp_path, name):
    shutil.copytree(place / name, tmp_path / name)
    return tmp_path / name


def test_a_healthy_checkpoint_and_shard_set_pass(place, world, capsys, monkeypatch):
    heard = []
    assert verify(place / "ddpm", heard.append) == [] and verify(place / "latents", heard.append) == []
    text = "\n".join(heard)
    assert "fp32 EMA" in text and "within 0.0e+00 of the recorded output" in text
    assert "40 images of 3 classes in 2 shards" in text
    for name, code in (("ddpm", 0), ("latents", 0)):
        monkeypatch.setattr(sys, "argv", ["fastdit", "verify", str(place / name)])
        assert cli.main() is None or code
        assert "all is well" in capsys.readouterr().out


def test_a_trained_run_and_its_shards_pass(world, tmp_path):
    run = train_here(world, tmp_path / "run", "training.steps=3")
    assert verify(tmp_path / "run", quiet) == [] and verify(run, quiet) == []
    [line] = verify(world / "latents", quiet)  # an untrained autoencoder's, with Stable Diffusion's scale
    assert "far from the 1" in line and "scale=0.18215" in line


def edit(folder, name, change):
    """Change the tensors of a safetensors file, and its entry in checkpoint.json."""
    state = load_file(folder / f"{name}.safetensors")
    save_file(change(dict(state)), folder / f"{name}.safetensors")
    relist(folder)


def relist(folder):
    """List the files in checkpoint.json as they are now."""
    change_meta(folder, lambda meta: None)


def change_meta(folder, change):
    meta = json.loads((folder / checkpoint.META).read_text())
    change(meta)
    checkpoint.write_meta(folder, {key: value for key, value in meta.items() if key != "sha256"})


def poked(state, name, value):
    state[name] = state[name].clone()
    state[name].view(-1)[3:5] = value
    return state


def without(state, name):
    del state[name]
    return state


def written(folder, old, new):
    text = (folder / "config.yaml").read_text()
    assert old in text
    (folder / "config.yaml").write_text(text.replace(old, new))


HEAD = "final_layer.linear.weight"


def as_trained(folder):
    """Make a converted checkpoint look like one of a run."""
    state = load_file(folder / "model.safetensors")
    state.pop("pos_embed")
    for name in ("exp_avg", "exp_avg_sq"):
        save_file(state, folder / f"{name}.safetensors")
    save_file({"updates": torch.tensor(500)}, folder / "progress.safetensors")
    change_meta(folder, lambda m: m.update(step=500))


CHECKPOINT_FAULTS = {
    "a missing tensor": (
        lambda folder: edit(folder, "ema", lambda s: without(s, HEAD)),
        [f"ema.safetensors: {HEAD} is missing"],
    ),
    "a tensor too many": (
        lambda folder: edit(folder, "model", lambda s: s | {"blocks.2.x": torch.ones(2)}),
        ["model.safetensors: blocks.2.x has no place"],
    ),
    "a shape": (
        lambda folder: edit(folder, "ema", lambda s: s | {HEAD: torch.ones(16, 48)}),
        ["shape (16, 48) instead of (32, 48)"],
    ),
    "not finite": (
        lambda folder: edit(folder, "ema", lambda s: poked(s, HEAD, float("nan"))),
        [f"ema.safetensors: {HEAD} has 2 of 1536 values that are not finite", "output on random input is not finite"],
    ),
    "bf16": (
        lambda folder: edit(folder, "ema", lambda s: {k: v.bfloat16() for k, v in s.items()}),
        ["is bfloat16, not float32", "weights and EMA must be fp32", "more: precision"],
    ),
    "no EMA": (lambda folder: (folder / "ema.safetensors").unlink(), ["ema.safetensors is missing"]),
    "cut short": (
        lambda folder: (folder / "ema.safetensors").write_bytes((folder / "ema.safetensors").read_bytes()[:-100]),
        ["bytes instead of", "is damaged"],
    ),
    "no config": (lambda folder: (folder / "config.yaml").unlink(), ["config.yaml does not exist"]),
    "another model": (
        lambda folder: written(folder, "2x48x4", "3x48x4"),
        ["checkpoint.json says model='DiT-2x48x4/2', but config.yaml says 'DiT-3x48x4/2'",
         "blocks.2.attn.qkv.weight is missing", "more: weights"],
    ),
    "a config key": (
        lambda folder: written(folder, "variant:", "varaint:"),
        ["model.varaint", "did you mean 'model.variant'"],
    ),
    "no facts": (lambda folder: change_meta(folder, lambda m: m.pop("latents")), ["has no 'latents'"]),
    "a scale": (
        lambda folder: change_meta(folder, lambda m: m["latents"].update(scale=1.0)),
        ["the latents in the checkpoint have scale 1.0", "0.18215"],
    ),
    "another autoencoder": (
        lambda folder: change_meta(folder, lambda m: m["latents"].update(codec="ab", codec_encoder="cd")),
        ["the latents in the checkpoint have codec ab"],
    ),
    "another network's weights": (
        lambda folder: edit(folder, "ema", lambda s: moved(s, 0.1)),
        ["differs from the recorded output by"],
    ),
    "a run without optimizer": (
        lambda folder: (as_trained(folder), (folder / "exp_avg.safetensors").unlink()),
        ["exp_avg.safetensors is missing"],
    ),
    "an average of nothing": (
        as_trained,
        ["the EMA equals the weights bit for bit"],
    ),
    "an average that stood still": (
        lambda folder: (
            edit(folder, "ema", lambda s: s | {HEAD: torch.zeros(32, 48)}),
            as_trained(folder),
        ),
        [f"the EMA never moved: {HEAD} is all zero"],
    ),
}  # fmt: skip


def test_without_an_average_the_weights_in_its_place_are_no_fault(place, tmp_path):
    folder = copy(place, tmp_path, "ddpm")
    as_trained(folder)
    written(folder, "ema_decay: 0.9999", "ema_decay: 0.0")
    assert not any("EMA" in line for line in verify(folder, quiet))


@pytest.mark.parametrize("name", CHECKPOINT_FAULTS)
def test_every_fault_of_a_checkpoint_is_named(place, tmp_path, name):
    folder = copy(place, tmp_path, "ddpm")
    break_it, words = CHECKPOINT_FAULTS[name]
    break_it(folder)
    lines = verify(folder, quiet)
    assert lines and all(any(word in line for line in lines) for word in words), lines
    assert all("\n" not in line for line in lines)


def write_index(folder, change):
    """Change index.npy, and its hash in the manifest."""
    import hashlib

    index = np.load(folder / "index.npy")
    change(index)
    np.save(folder / "index.npy", index)
    digest = hashlib.sha256((folder / "index.npy").read_bytes()).hexdigest()
    edit_manifest(folder, index_sha256=digest)


def flip(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def put(index, field, value):
    index[field][7] = value


SHARD = "shard-00000.tar"  # 4,096 bytes a sample: 512 + 128 + 2 x 1,024 + padding, 512 + label + padding
SHARD_FAULTS = {
    "one bit of a latent": (
        lambda folder: flip(folder / SHARD, 1000),
        ["SHA-256 is not the one in the manifest", "sample 000000000 is damaged"],
    ),
    "one bit of a label": (
        lambda folder: flip(folder / SHARD, 3584),
        ["SHA-256 is not", "sample 000000000 has label 1 in the tar, 0 in the index"],
    ),
    "one bit of a header": (
        lambda folder: flip(folder / SHARD, 4096),
        ["SHA-256 is not", "a tar reader finds 1 sample and 1 label"],
    ),
    "one bit of the padding": (lambda folder: flip(folder / SHARD, 3000), ["SHA-256 is not"]),
    "cut short": (
        lambda folder: (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:9000]),
        [f"{SHARD} has 9000 bytes instead of"],
    ),
    "a missing shard": (lambda folder: (folder / SHARD).unlink(), [f"{SHARD} is missing"]),
    "a stray shard": (
        lambda folder: shutil.copy(folder / SHARD, folder / "shard-00009.tar"),
        ["shard-00009.tar is not in the manifest"],
    ),
    "the index": (lambda folder: flip(folder / "index.npy", 500), ["index.npy is damaged"]),
    "a label out of range": (
        lambda folder: write_index(folder, lambda index: put(index, "label", 3)),
        ["has label 3, not one of 0..2", "in the tar, 3 in the index"],
    ),
    "another label": (
        lambda folder: write_index(folder, lambda index: put(index, "label", 0)),
        ["sample 000000007 has label 1 in the tar, 0 in the index", "class counts in the manifest differ"],
    ),
    "an offset": (
        lambda folder: write_index(folder, lambda index: put(index, "offset", 1000)),
        ["sample 000000007 is damaged"],
    ),
    "a key twice": (
        lambda folder: write_index(folder, lambda index: put(index, "key", 3)),
        ["has a duplicate key"],
    ),
    "a shard's number": (
        lambda folder: write_index(folder, lambda index: put(index, "shard", 1)),
        ["different numbers of samples per shard"],
    ),
    "a statistic": (
        lambda folder: edit_manifest(folder, channel_std=[1.0] * 4),
        ["the channel standard deviations are 0.9", "but the manifest says 1.00"],
    ),
    "a shape of as many values": (
        lambda folder: edit_manifest(folder, latent_shape=[4, 4, 16]),
        ["sample 000000000 has float16 of shape (2, 8, 8, 8), but the manifest says float16 of (2, 8, 4, 16)"],
    ),
    "no manifest to read": (
        lambda folder: (folder / "manifest.json").write_text("{"),
        ["manifest.json is damaged"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SHARD_FAULTS)
def test_every_fault_of_a_shard_set_is_named(place, tmp_path, name):
    folder = copy(place, tmp_path, "latents")
    break_it, words = SHARD_FAULTS[name]
    break_it(folder)
    lines = verify(folder, quiet)
    assert lines and all(any(word in line for line in lines) for word in words), lines


def raw_edit(folder, **values):
    """Set entries of manifest.json by hand, without its digest."""
    stored = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(stored | values))


@pytest.mark.parametrize(
    "entry", [{"image_size": 32}, {"vae": "other"}, {"codec": "1" * 64}, {"class_names": ["b", "a", "c"]}]
)
def test_an_edited_manifest_is_refused(place, tmp_path, entry):
    """No other file of the folder shows these."""
    folder = copy(place, tmp_path, "latents")
    raw_edit(folder, **entry)
    [line] = verify(folder, quiet)
    assert "manifest.json was changed: its contents do not match its entry sha256; copy it again, or remove" in line
    with pytest.raises(ValueError, match="manifest.json was changed"):
        Manifest.load(folder)


@pytest.mark.parametrize(("entry", "words"), [
    ({"image_size": 64}, "have shape (4, 8, 8) (autoencoder {world}/vae), but {world}/vae has (4, 16, 16) of 64 px"),
    ({"codec": "1" * 64, "codec_encoder": "2" * 64}, "have codec 1111"),
])  # fmt: skip
def test_an_edited_manifest_without_its_digest_is_held_against_its_autoencoder(world, tmp_path, entry, words):
    """How docs/images.md edits one. Of 32 px images, the autoencoder of the world makes 8 x 8 x 4 latents."""
    folder = copy(world, tmp_path, "latents")
    raw_edit(folder, **entry, sha256=None)
    lines = [line for line in verify(folder, quiet) if "far from the 1" not in line]
    assert len(lines) == 1 and words.format(world=world) in lines[0], lines


def test_latents_far_from_unit_variance_name_the_scale_that_suits(tmp_path):
    make_shards(tmp_path / "latents", scale=1.0)
    [line] = verify(tmp_path / "latents", quiet)
    assert "standard deviations of the scaled latents are 5." in line and "scale=1 is wrong; " in line
    assert "write scaling_factor=0.18" in line


def test_a_checkpoint_is_held_against_the_shards_it_names(place, tmp_path):
    folder = copy(place, tmp_path, "ddpm")
    text = (folder / "config.yaml").read_text().replace("shards: ''", f"shards: {place}/latents")
    (folder / "config.yaml").write_text(text)
    relist(folder)
    [line] = verify(folder, quiet)
    assert f"the latents in {place}/latents have codec 000" in line


def test_a_checkpoint_is_held_against_the_generated_latents_it_names(world, tmp_path):
    shards = "synthetic:40/4x8x8/10"
    own = [f"data.shards={shards}", 'data.vae=""', "data.image_size=64", "training.steps=3", "training.report=false"]
    run = train_here(world, tmp_path / "run", *own)
    assert verify(run, quiet) == []
    change_meta(run, lambda meta: meta["latents"].update(scale=0.5))
    assert verify(run, quiet) == [f"the latents in {shards} have scale 0.18215, but the checkpoint says 0.5"]


def test_stored_averages_are_checked_too(world, tmp_path):
    """A flipped bit, and a value that is not finite in a file that is otherwise as recorded."""
    settings = ["steps=2", "checkpoint_every=1", "ema_stds=[0.05,0.1]"]
    train_here(world, tmp_path / "run", *(f"training.{setting}" for setting in settings))
    averages = tmp_path / "run" / "averages"
    heard = []
    assert verify(tmp_path / "run", heard.append) == [] and f"{averages}: averages of 2 steps" in heard
    flip(averages / "step-0000001" / "power-0.050.safetensors", -5)
    edit(averages / "step-0000002", "power-0.100", lambda state: poked(state, "final_layer.linear.bias", float("nan")))
    flipped, poisoned = verify(tmp_path / "run", quiet)
    assert "step-0000001/power-0.050.safetensors is damaged: its SHA-256 is not the recorded one" in flipped
    assert "power-0.100.safetensors: final_layer.linear.bias has 2 of" in poisoned and "not finite" in poisoned


def test_the_command_ends_with_exit_code_2(place, tmp_path, capsys, monkeypatch):
    folder = copy(place, tmp_path, "latents")
    flip(folder / SHARD, 3000)
    gone = tmp_path / "gone"
    for path, words in [(folder, "wrong: "), (gone, "error: "), (tmp_path, "holds no complete checkpoint")]:
        monkeypatch.setattr(sys, "argv", ["fastdit", "verify", str(path)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        output = capsys.readouterr()
        assert stop.value.code == 2 and words in output.out + output.err
    assert replace(Manifest.load(folder), folder=None) == replace(Manifest.load(place / "latents"), folder=None)
