"""Autoencoders of latent-diffusion become folders of diffusers that compute the same."""

import os
import pickle
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from fastdit.cli import main
from fastdit.convert import convert
from fastdit.convert.ldm import find_autoencoder, renamed
from fastdit.data.autoencoders import load_autoencoder
from fastdit.data.extract import extract_features
from fastdit.data.latents import LatentCodec
from fastdit.training import checkpoint
from helpers.ldm import LDM

pytestmark = pytest.mark.usefixtures("one_thread")


def saved(state, path):
    torch.save(state, path)
    return path


def weights(**options) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return LDM(**options).state_dict()


@pytest.mark.parametrize("attended", [(), (1,), (0, 1), (0,)])
def test_the_converted_network_computes_the_same(tmp_path, attended):
    torch.manual_seed(0)
    network = LDM(attended=attended).double().eval()
    said = []
    path = saved({key: t.float() for key, t in network.state_dict().items()}, tmp_path / "vae.ckpt")
    out = convert(path, "diffusers", tmp_path / "vae", scale=0.5, shift=0.25, say=said.append)
    vae = load_autoencoder(out).double().eval()
    network.load_state_dict({key: t.double() for key, t in torch.load(path).items()})
    x = torch.rand(2, 3, 12, 20, dtype=torch.float64) * 2 - 1
    with torch.no_grad():
        moments, output = network.encode(x), network.decode(network.encode(x)[:, :5])
        theirs = vae.encode(x).latent_dist
        torch.testing.assert_close(theirs.parameters, moments, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(vae.decode(theirs.mean).sample, output, rtol=1e-9, atol=1e-9)
    codec = LatentCodec.load(out)
    mean = codec.encode(x.float())[:, :5]  # x_0 = (mean - shift) scale
    torch.testing.assert_close(codec.decode((mean - 0.25) * 0.5).double(), output, rtol=1e-4, atol=1e-4)
    assert (vae.config.scaling_factor, vae.config.shift_factor) == (0.5, 0.25)
    assert vae.config.latent_channels == 5 and moments.shape == (2, 10, 6, 10)
    assert ("attention at 1/" in " ".join(said)) == bool(attended) and "scaling_factor=1" not in " ".join(said)


def test_the_names_are_those_of_diffusers_own_converter():
    """It leaves out the attention of the levels, which is why it is not used."""
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    state = weights(channels=(32, 32, 64), layers=2, attended=())
    config = {"down_block_types": [""] * 3, "up_block_types": [""] * 3}
    theirs = convert_ldm_vae_checkpoint(dict(state), config)
    ours = {renamed(name, 3): tensor for name, tensor in state.items()}
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor.flatten(), theirs[name].flatten()) for name, tensor in ours.items())


@pytest.mark.parametrize("form", ["lightning", "first stage", "mar", "safetensors", "half", "no quant conv"])
def test_files_of_each_form_are_read(tmp_path, form):
    state, path = weights(), tmp_path / "vae.ckpt"
    if form == "lightning":  # as VA-VAE's: with the discriminator and the foundation model that trained it
        others = {"loss.discriminator.main.0.weight": torch.ones(2), "foundation_model.model.cls_token": torch.ones(3),
                  "linear_proj.weight": torch.ones(4), "loss.logvar": torch.tensor(0.0)}  # fmt: skip
        saved({"state_dict": state | others, "global_step": 7, "optimizer_states": [{"state": {}}]}, path)
    elif form == "first stage":
        inside = {f"first_stage_model.{name}": tensor for name, tensor in state.items()}
        saved({"state_dict": inside | {"model.diffusion_model.x": torch.ones(1)}}, path)
    elif form == "mar":
        saved({"model": state}, path)
    elif form == "safetensors":
        path = tmp_path / "vae.safetensors"
        save_file(state, path)
    elif form == "half":
        state = {name: tensor.half() for name, tensor in state.items()}
        saved(state, path)
    else:
        state = {name: tensor for name, tensor in state.items() if "quant" not in name}
        saved(state, path)
    said = []
    vae = load_autoencoder(convert(path, "diffusers", tmp_path / "vae", say=said.append))
    name = "encoder.down_blocks.0.resnets.0.conv1.weight"
    assert torch.equal(vae.state_dict()[name], state["encoder.down.0.block.0.conv1.weight"].float())
    told = " ".join(said)
    assert "scaling_factor=1, because the file does not state it" in told and vae.config.scaling_factor == 1
    if form == "lightning":
        assert "left out: loss (2), foundation_model (1), linear_proj (1)" in told
    assert (vae.quant_conv is None) == (form == "no quant conv")


@pytest.mark.parametrize("form", ["lightning", "first stage", "beside"])
def test_the_ema_is_left_out_or_taken_and_either_is_said(tmp_path, form):
    """latent-diffusion stores an EMA under names without dots; other programs store a second set."""
    state, prefix = weights(), "first_stage_model." if form == "first stage" else ""
    average = {name: tensor + 0.25 for name, tensor in state.items()}
    dotless = {f"{prefix}model_ema.{name.replace('.', '')}": tensor for name, tensor in average.items()}
    counters = {f"{prefix}model_ema.decay": torch.tensor(0.999), "model_ema.diffusion_modelx": torch.ones(1)}
    inside = {f"{prefix}{name}": tensor for name, tensor in state.items()}
    content = {"model": state, "ema": average} if form == "beside" else {"state_dict": inside | dotless | counters}
    path, name = saved(content, tmp_path / "vae.ckpt"), "encoder.mid.attn_1.q.bias"
    for chosen, wanted in ((None, state), ("model", state), ("ema", average)):
        said = []
        vae = load_autoencoder(convert(path, "diffusers", tmp_path / str(chosen), weights=chosen, say=said.append))
        assert torch.equal(vae.state_dict()[renamed(name, 2)], wanted[name])
        assert any("its EMA is left out" in line for line in said) == (chosen is None)
    with pytest.raises(ValueError, match="--weights=ema, but .*plain.ckpt has no EMA; leave it out"):
        convert(saved(state, tmp_path / "plain.ckpt"), "diffusers", tmp_path / "out", weights="ema")


@pytest.mark.parametrize(("stored", "given", "scale"), [(0.2, None, 0.2), (0.2, 0.5, 0.5), (0.0, None, None)])
def test_the_scale_factor_of_a_latent_diffusion_model_is_read(tmp_path, stored, given, scale):
    state = {f"first_stage_model.{name}": tensor for name, tensor in weights().items()}
    path, said = saved({"state_dict": state | {"scale_factor": torch.tensor(stored)}}, tmp_path / "ldm.ckpt"), []
    if scale is None:
        with pytest.raises(ValueError, match="has scale_factor=0.0, not a positive number; give --scale"):
            convert(path, "diffusers", tmp_path / "vae", say=said.append)
        return
    vae = load_autoencoder(convert(path, "diffusers", tmp_path / "vae", scale=given, say=said.append))
    assert vae.config.scaling_factor == pytest.approx(scale) and "does not state it" not in " ".join(said)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_half_precision_is_read_value_for_value(tmp_path, dtype, suffix):
    state, path = {name: tensor.to(dtype) for name, tensor in weights().items()}, tmp_path / f"vae.{suffix}"
    save_file(state, path) if suffix == "safetensors" else saved(state, path)
    vae = load_autoencoder(convert(path, "diffusers", tmp_path / "vae", say=lambda line: None)).state_dict()
    assert all(torch.equal(vae[renamed(name, 2)].flatten(), tensor.float().flatten()) for name, tensor in state.items())


def test_the_command_makes_a_folder_for_extract(tmp_path, capsys):
    path = saved({"state_dict": weights()}, tmp_path / "vavae.pt")
    (tmp_path / "images").mkdir()
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"images/{i}.png")
    with pytest.raises(ValueError, match=r"vavae.pt is a file; .* fastdit convert .*vavae.pt --to diffusers --out"):
        LatentCodec.load(path)
    main(["convert", str(path), "--to", "diffusers", "--out", str(tmp_path / "vavae"), "--scale", "0.3"])
    assert capsys.readouterr().out.splitlines()[-1].endswith(f"use it with fastdit extract --vae {tmp_path}/vavae")
    images = tmp_path / "images"
    manifest = extract_features(images=images, out=tmp_path / "latents", vae=tmp_path / "vavae", image_size=16)
    assert manifest.latents.shape == (5, 8, 8) and manifest.latents.scale == 0.3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images", "latents", "vavae", "vavae.pt"]


class Callback:
    """What Lightning puts into a checkpoint; loading it would call `os.system`."""

    def __reduce__(self):
        return os.system, ("touch executed",)


class Harmless:
    def __init__(self):
        self.state = {"best": 1}


def test_objects_in_a_file_are_not_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = saved({"state_dict": weights(), "callbacks": {Harmless: 1, "x": Harmless()}}, tmp_path / "a.ckpt")
    monkeypatch.delattr(sys.modules[__name__], "Harmless")  # the class is not needed to read the file
    assert len(find_autoencoder(path).state) == len(weights())
    path = saved({"state_dict": weights(), "callbacks": Callback()}, tmp_path / "b.ckpt")
    with pytest.raises(ValueError, match="b.ckpt"):
        convert(path, "diffusers", tmp_path / "out", say=lambda line: None)
    assert not (tmp_path / "executed").exists() and not (tmp_path / "out").exists()


def spoiled(change) -> dict:
    state = weights()
    change(state)
    return state


REFUSED = {
    "a VQ autoencoder": (lambda s: s.update({"quantize.embedding.weight": torch.ones(8, 5)}), "has a codebook"),
    "linear attention": (lambda s: s.update({"encoder.mid.attn_1.to_qkv.weight": torch.ones(3, 2, 1, 1)}),
                         r"does not fit into an AutoencoderKL of diffusers \(1 tensor; the first: "
                         r"encoder.mid.attn_1.to_qkv.weight has no place"),
    "another embed_dim": (lambda s: s.update({"post_quant_conv.weight": torch.ones(5, 3, 1, 1)}),
                          "has embed_dim=3 and z_channels=5"),
    "no decoder": (lambda s: [s.pop(name) for name in list(s) if name[:7] == "decoder"], "no complete autoencoder"),
    "a missing layer": (lambda s: s.pop("decoder.up.1.block.0.conv1.bias"),
                        "up_blocks.0.resnets.0.conv1.bias is missing"),
    "half an attention": (lambda s: s.pop("encoder.down.1.attn.0.q.weight"), "attentions.0.to_q.weight is missing"),
    "a wider decoder": (lambda s: s.update({"decoder.conv_out.weight": torch.ones(3, 64, 3, 3)}),
                        r"decoder.conv_out.weight has shape \(3, 64, 3, 3\) instead of \(3, 32, 3, 3\)"),
    "few channels": (lambda s: s.update({"encoder.down.0.block.0.conv1.weight": torch.ones(24, 32, 3, 3)}),
                     r"has channels \[24, 64\]; the group norms of latent-diffusion need multiples of 32"),
    "nan": (lambda s: s["encoder.conv_in.bias"].fill_(float("nan")), "conv_in.bias has values that are not finite"),
    "no tensor": (lambda s: s.update({"encoder.conv_in.bias": 3}), "conv_in.bias is not a tensor of plain numbers"),
    "diffusers": (lambda s: s.update({"encoder.down_blocks.0.x": torch.ones(1)}), "has the names of diffusers"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_diffusers_cannot_express_is_refused(tmp_path, what):
    change, message = REFUSED[what]
    path = saved(spoiled(change), tmp_path / "vae.ckpt")
    with pytest.raises(ValueError, match=message):
        convert(path, "diffusers", tmp_path / "out", say=lambda line: None)
    assert [p.name for p in tmp_path.iterdir()] == ["vae.ckpt"]


def test_other_options_are_refused(tmp_path, place):
    path = saved(weights(), tmp_path / "vae.ckpt")
    for arguments, message in (
        (dict(to="fastdit"), "is an autoencoder; convert it --to diffusers"),
        (dict(to="diffusers", heads=3), "--heads is for a network"),
        (dict(to="diffusers", overrides=["objective=flow"]), "objective=flow is for a network"),
        (dict(to="diffusers", scale=0.0), "--scale=0.0 must be a positive number"),
        (dict(to="diffusers", shift=float("nan")), "--shift=nan must be a number"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(path, out=tmp_path / "out", say=lambda line: None, **arguments)
    for option in ("scale", "shift"):
        with pytest.raises(ValueError, match=f"--{option}=1.0 is for an autoencoder of latent-diffusion"):
            convert(place / "ddpm", "official", tmp_path / "out.pt", **{option: 1.0}, say=lambda line: None)
    for to, name in (("official", "out.pt"), ("fastdit", "out")):
        with pytest.raises(ValueError, match=f"--weights=model is for --to diffusers; --to {to} keeps both"):
            convert(place / "ddpm", to, tmp_path / name, weights="model", say=lambda line: None)
    meta = {"kind": "autoencoder", "step": 1}
    for name in ("config.yaml", "model.safetensors", "ema.safetensors"):
        (tmp_path / "vae.partial").mkdir(exist_ok=True)
        (tmp_path / "vae.partial" / name).touch()
    checkpoint.commit(tmp_path / "vae.partial", tmp_path / "step-0000001", meta)
    with pytest.raises(ValueError, match="is of an autoencoder: its run's folder vae/ is in the format of diffusers"):
        convert(tmp_path / "step-0000001", "diffusers", tmp_path / "out", say=lambda line: None)
    (tmp_path / "damaged.ckpt").write_bytes(path.read_bytes()[:1000])
    (tmp_path / "pickle.ckpt").write_bytes(pickle.dumps({"a": [1]}))
    for name in ("damaged.ckpt", "pickle.ckpt"):
        with pytest.raises(ValueError, match=name):
            convert(tmp_path / name, "diffusers", tmp_path / "out", say=lambda line: None)


def test_a_file_with_two_autoencoders_or_a_damaged_one_is_refused(tmp_path):
    own = weights()
    two = {f"{prefix}{name}": tensor for prefix in ("ema.", "model.") for name, tensor in own.items()}
    with pytest.raises(ValueError, match=r"two.pt has 2 autoencoders, ema.\* and model.\*; save one of them"):
        convert(saved(two, tmp_path / "two.pt"), "diffusers", tmp_path / "out")
    damaged = own | {"decoder.conv_in.weight": torch.tensor(1.0)}
    with pytest.raises(ValueError, match="damaged.pt is no complete autoencoder of latent-diffusion"):
        convert(saved(damaged, tmp_path / "damaged.pt"), "diffusers", tmp_path / "out")
    assert not (tmp_path / "out").exists()
