"""Alignment losses and token routing in a run: formulas, gradients, resume, engines, what is stored and exported."""

import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fastdit.api import load
from fastdit.convert import convert, read_initial
from fastdit.models.dit import DiT
from fastdit.models.routing import Routing
from fastdit.models.taps import Tapped
from fastdit.registry import Choice
from fastdit.training.alignment import (
    ALIGNMENTS,
    REPA,
    SRA2,
    GridConv,
    LayerSync,
    alignment_losses,
    at_depth,
    attach,
    patches_of,
    spatially_normalized,
)
from fastdit.training.log import read_metrics, training_flops
from helpers.data import edit_manifest
from helpers.networks import small
from helpers.runs import losses, run, train_here

pytestmark = pytest.mark.usefixtures("one_thread")
SHORT = ["training.steps=6", "training.checkpoint_every=3", "training.precision=fp32"]
ALIGNED = ["training.align=[{name: layersync, weight: 5}, {name: sra2, weight: 3}]"]
FEATURES = ["training.align=[{name: repa, weight: 5, width: 32}]"]
ROUTED = ["training.route=0.5", "training.route_ends=[1,1]"]


def model_of() -> DiT:
    return small(input_size=8, in_channels=3, depth=4, num_classes=4, learn_sigma=False, attention="eager")


def test_layersync_is_the_negative_cosine_to_a_deeper_block_without_its_gradient():
    a = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[1.0, 1.0], [3.0, 0.0]]], requires_grad=True)  # (2, 2, 2)
    b = torch.tensor([[[2.0, 0.0], [0.0, -1.0]], [[1.0, 0.0], [0.0, 1.0]]], requires_grad=True)
    tapped = {"student": Tapped(a, None), "target": Tapped(b, None)}
    loss = LayerSync().loss(tapped, torch.zeros(2, 3, 4, 4), 2)
    torch.testing.assert_close(loss, torch.tensor([0.0, -(math.sqrt(0.5) + 0) / 2]))
    loss.sum().backward()
    assert b.grad is None and a.grad.abs().sum() > 0


def test_sra2_is_the_smooth_l1_to_the_patches_of_the_clean_latent():
    x_0 = torch.arange(2 * 3 * 4 * 4.0).reshape(2, 3, 4, 4)
    patches = patches_of(x_0, 2)
    assert patches.shape == (2, 4, 12)
    assert sorted(patches[0, 1].tolist()) == sorted(x_0[0, :, :2, 2:].flatten().tolist())  # the token to the right
    off = torch.full_like(patches, 0.02)
    off[1] = 1.0
    loss = SRA2().loss({"student": Tapped(patches + off, None)}, x_0, 2)
    torch.testing.assert_close(loss, torch.tensor([0.5 * 0.02**2 / 0.05, 1.0 - 0.5 * 0.05]), rtol=1e-4, atol=1e-6)
    kept = torch.tensor([[3, 0], [1, 2]])
    some = patches.gather(1, kept[..., None].expand(-1, -1, 12))
    assert SRA2().loss({"student": Tapped(some, kept)}, x_0, 2).abs().max() == 0


def test_layersync_compares_the_same_tokens_where_one_block_is_on_a_route():
    whole, kept = torch.randn(2, 6, 5), torch.tensor([[4, 0, 2], [5, 1, 3]])
    some = whole.gather(1, kept[..., None].expand(-1, -1, 5))
    for student, target in ((Tapped(whole, None), Tapped(some, kept)), (Tapped(some, kept), Tapped(whole, None))):
        loss = LayerSync().loss({"student": student, "target": target}, torch.zeros(2, 3, 4, 4), 2)
        torch.testing.assert_close(loss, torch.full((2,), -1.0))


def test_repa_is_the_negative_cosine_to_the_features_of_each_patch():
    tokens = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [3.0, 4.0], [1.0, 1.0]]], requires_grad=True)  # (1, 4, 2)
    features = torch.tensor([[[[5.0, 0.0], [1.0, 0.0]], [[4.0, 3.0], [-2.0, -2.0]]]])  # (1, 2, 2, 2)
    x_0 = torch.zeros(1, 3, 4, 4)
    loss = REPA().loss({"student": Tapped(tokens, None)}, x_0, 2, features.half())
    torch.testing.assert_close(loss, torch.tensor([-(1 + 0 + 24 / 25 - 1) / 4]))
    kept = torch.tensor([[2, 0]])  # on a route, only these are compared
    loss = REPA().loss({"student": Tapped(tokens[:, kept[0]], kept)}, x_0, 2, features)
    torch.testing.assert_close(loss, torch.tensor([-(24 / 25 + 1) / 2]))
    loss.sum().backward()
    assert tokens.grad[0, [0, 2]].abs().sum() > 0 and tokens.grad[0, [1, 3]].abs().sum() == 0


def test_features_of_another_grid_are_resampled_to_the_tokens():
    features = torch.arange(2 * 4 * 6 * 3.0).reshape(2, 4, 6, 3)  # linear in row and column, so its resampling is, too
    x_0 = torch.zeros(2, 3, 8, 12)
    inner = features[:, 1:3, 2:4].mean((1, 2))  # the center of the image, in any grid with an odd number of tokens
    tokens = torch.randn(2, 1, 3)
    loss = REPA().loss({"student": Tapped(tokens, None)}, torch.zeros(2, 3, 2, 2), 2, features)
    torch.testing.assert_close(loss, -torch.cosine_similarity(tokens[:, 0], inner), rtol=1e-4, atol=1e-5)
    assert REPA().loss({"student": Tapped(torch.randn(2, 24, 3), None)}, x_0, 2, features).shape == (2,)


def test_spatial_normalization_is_by_channel_over_the_patches():
    x = torch.tensor([[[1.0, 10.0], [3.0, 10.5], [5.0, 9.5]]])  # means 3, 10; deviations sqrt(8 / 3), sqrt(1 / 6)
    expected = torch.tensor([[[1.0, 10.0], [3.0, 10.5], [5.0, 9.5]]]) - 0.6 * torch.tensor([3.0, 10.0])
    expected = expected / torch.tensor([math.sqrt(8 / 3), math.sqrt(1 / 6)])
    torch.testing.assert_close(spatially_normalized(x, 0.6), expected, rtol=1e-4, atol=1e-5)
    features, tokens = x.reshape(1, 1, 3, 2), torch.randn(1, 3, 2)
    loss = REPA(spatial_norm=True).loss({"student": Tapped(tokens, None)}, torch.zeros(1, 3, 2, 6), 2, features)
    torch.testing.assert_close(loss, -torch.cosine_similarity(tokens, expected, dim=-1).mean(1), rtol=1e-4, atol=1e-5)


def test_the_convolution_reads_each_tokens_neighbors_on_an_awkward_grid():
    torch.manual_seed(0)
    projector, tokens, rows, columns = GridConv(4, 5, (3, 5)), torch.randn(2, 15, 4), 3, 5
    expected = torch.zeros(2, 15, 5)
    for row in range(rows):
        for column in range(columns):
            total = projector.conv.bias.expand(2, -1).clone()
            for i in range(max(0, row - 1), min(rows, row + 2)):
                for j in range(max(0, column - 1), min(columns, column + 2)):
                    weight = projector.conv.weight[:, :, i - row + 1, j - column + 1]  # (5, 4)
                    total += tokens[:, i * columns + j] @ weight.T
            expected[:, row * columns + column] = total
    torch.testing.assert_close(projector(tokens), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("depth, block", [(28, 8), (24, 8), (12, 4), (4, 1)])
def test_repa_reads_the_papers_block_through_its_projector(depth, block):
    model = SimpleNamespace(blocks=[None] * depth, hidden_size=8, in_channels=4, patch_size=2, grid=(3, 5))
    tap = REPA().taps(model, 6)["student"]
    shapes = [tuple(m.weight.shape) for m in tap.modules() if isinstance(m, nn.Linear)]
    assert tap.block == block and shapes == [(2048, 8), (2048, 2048), (6, 2048)]
    conv = REPA(projector="conv").taps(model, 6)["student"].projector
    assert conv(torch.randn(1, 15, 8)).shape == (1, 15, 6)


def test_the_flops_of_a_step_know_the_route_and_the_projectors():
    from torch.utils.flop_counter import FlopCounterMode

    model, routing = model_of(), Routing(0.5, (1, 1), full_from=3)
    plain = model.flops_per_image()
    attach([Choice("repa", {"block": 2}), Choice("sra2", {"block": 4})], model, 6, routing)
    x, t, y = torch.randn(1, 3, 8, 8), torch.rand(1), torch.tensor([0])
    counted = {}
    for name, route in (("whole", None), ("routed", routing.draw(lambda n: torch.rand(1, n), model, 0))):
        model.route = route
        with FlopCounterMode(display=False) as counter:
            model(x, t, y)
        counted[name] = counter.get_total_flops()
    assert model.flops_per_image() == counted["whole"] > plain
    assert model.flops_per_image(routing.lengths(model)) == counted["routed"] < counted["whole"]
    of_step = training_flops(model, routing)
    assert [of_step(n) for n in (1, 3, 4)] == [3 * counted[name] for name in ("routed", "routed", "whole")]
    assert training_flops(model, None)(1) == 3 * counted["whole"]
    assert model.parameter_count() == model_of().parameter_count()


def test_the_taps_read_the_right_blocks_and_give_gradients_only_before_them():
    model = model_of()
    alignments = attach([Choice("sra2", {"block": 2})], model)
    x = torch.randn(3, 3, 8, 8)
    model(x, torch.rand(3), torch.tensor([0, 1, 4]))
    alignment_losses(alignments, model, x)["sra2"].sum().backward()
    assert model.tapped == {}
    touched = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert any(name.startswith("blocks.1.mlp") for name in touched)
    assert not any(name.startswith(("blocks.2", "blocks.3", "final_layer")) for name in touched)
    assert {f"taps.sra2:student.projector.{i}.weight" for i in (0, 2, 4, 6, 8)} <= touched


@pytest.mark.parametrize("depth, expected", [(28, (8, 16, 8)), (24, (7, 14, 7)), (12, (3, 7, 2)), (4, (1, 2, 1))])
def test_depths_scale_with_the_network(depth, expected):
    model = SimpleNamespace(blocks=[None] * depth, hidden_size=8, in_channels=4, patch_size=2)
    layersync, sra2 = LayerSync().taps(model), SRA2().taps(model)
    assert (layersync["student"].block, layersync["target"].block, sra2["student"].block) == expected
    linears = [m for m in sra2["student"].modules() if isinstance(m, nn.Linear)]
    assert len(linears) == 5 and linears[-1].out_features == 16
    with pytest.raises(ValueError, match=f"block {depth + 1} is not one of the network's 1 to {depth}"):
        at_depth(depth + 1, model, 8)


@pytest.mark.parametrize("options", [
    ALIGNED, ROUTED, [*ALIGNED, *ROUTED, "model.position=rope", "model.qk_norm=rms"], [*FEATURES, *ROUTED],
    ["training.align={name: repa, projector: conv, spatial_norm: true, weight: 5, until: 4}"],
], ids=["aligned", "routed", "both", "features", "irepa"])  # fmt: skip
def test_a_resume_is_exact(world, featured, tmp_path, options):
    options = [*options, featured] if "repa" in str(options) else options
    whole = train_here(world, tmp_path / "whole", *SHORT, *options)
    train_here(world, tmp_path / "halves", *SHORT, *options, "training.steps=3")
    halves = train_here(world, tmp_path / "halves", *SHORT, *options, resume=True)
    assert losses(tmp_path / "halves") == losses(tmp_path / "whole")
    files = {path.name for path in whole.glob("*.safetensors")}
    assert ("alignment.safetensors" in files) == ("align" in str(options))
    for name in files:
        ours, theirs = load_file(whole / name), load_file(halves / name)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours), name


def test_official_files_hold_nothing_of_the_alignment_and_can_be_sampled_and_exported(world, tmp_path):
    aligned = train_here(world, tmp_path / "aligned", *SHORT, *ALIGNED)
    plain = train_here(world, tmp_path / "plain", *SHORT)
    for name in ("model", "ema", "exp_avg", "exp_avg_sq"):
        assert load_file(aligned / f"{name}.safetensors").keys() == load_file(plain / f"{name}.safetensors").keys()
    stored = load_file(aligned / "alignment.safetensors")
    assert {key.partition(".")[0] for key in stored} == {"model", "ema", "exp_avg", "exp_avg_sq"}
    assert len(load(tmp_path / "aligned", device="cpu").sample(n=2, steps=2)) == 2
    official = torch.load(convert(tmp_path / "aligned", "official", tmp_path / "out.pt"), weights_only=True)
    assert official["ema"].keys() == torch.load(
        convert(tmp_path / "plain", "official", tmp_path / "plain.pt"), weights_only=True
    )["ema"].keys()
    train_here(world, tmp_path / "tuned", *SHORT, *ALIGNED, "training.steps=1", f"training.init_from={tmp_path}/plain",
               read_initial=read_initial)


def test_repa_pulls_tokens_toward_the_features_and_exports_hold_nothing_of_it(world, featured, tmp_path):
    train_here(world, tmp_path / "plain", *SHORT, featured)
    longer = ["training.steps=20", "training.lr=1e-2"]
    aligned = train_here(world, tmp_path / "aligned", *SHORT, featured, *FEATURES, *longer)
    cosines = [record["repa"] for record in read_metrics(tmp_path / "aligned")]
    assert cosines[-1] < cosines[0] - 0.2
    plain = load_file(tmp_path / "plain" / "checkpoints/step-0000006/model.safetensors")
    assert load_file(aligned / "model.safetensors").keys() == plain.keys()
    assert len(load(tmp_path / "aligned", device="cpu").sample(n=2, steps=2)) == 2
    official = torch.load(convert(tmp_path / "aligned", "official", tmp_path / "out.pt"), weights_only=True)
    assert not any("taps" in name for name in official["ema"])
    train_here(world, tmp_path / "ungraced", *SHORT)
    assert losses(tmp_path / "plain") == losses(tmp_path / "ungraced")  # the folder of features changes nothing


def test_a_resume_with_other_features_is_refused(world, featured, tmp_path):
    train_here(world, tmp_path / "run", *SHORT, featured, *FEATURES)
    other = tmp_path / "other"
    shutil.copytree(Path(featured.partition("=")[2]) / "features", other)
    edit_manifest(other, weights="6" * 64)
    with pytest.raises(ValueError, match=r"has features=\{'encoder': 'tiny'.*make them equal to resume"):
        train_here(world, tmp_path / "run", *SHORT, featured, *FEATURES, f"data.features={other}", resume=True)


def test_alignment_and_routing_change_the_run_and_leave_its_random_numbers(world, tmp_path):
    for name, options in (("plain", []), ("aligned", ALIGNED), ("routed", ROUTED)):
        train_here(world, tmp_path / name, *SHORT, *options)
    plain, aligned, routed = (losses(tmp_path / name) for name in ("plain", "aligned", "routed"))
    assert plain[0] == aligned[0] == routed[0]  # gates start at zero, and noise and times are the same
    assert plain[-1] != aligned[-1] and plain[-1] != routed[-1]
    assert aligned == pytest.approx(plain, rel=0.05) and routed == pytest.approx(plain, rel=0.05)


@pytest.mark.parametrize("options, processes", [
    ([], 2), (["training.engine=deepspeed"], 2), (["training.engine=deepspeed", "training.zero_stage=2"], 1),
    (["training.engine=deepspeed", "training.zero_stage=3"], 2),
], ids=["ddp", "zero1", "zero2", "zero3"])  # fmt: skip
def test_engines_and_processes_give_the_same_run(world, featured, tmp_path, options, processes):
    aligned = [*ALIGNED[0][:-1], ", {name: repa, weight: 5, width: 32}]"]
    common = ["--config", str(world / "config.yaml"), *SHORT, "".join(aligned), featured, *ROUTED,
              "training.checkpoint_every=6", "model.decoder_blocks=1"]  # fmt: skip
    run("train.py", *common, f"run_dir={tmp_path}/one")
    run("train.py", *common, *options, f"run_dir={tmp_path}/other", processes=processes)
    assert losses(tmp_path / "other") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    one, other = (tmp_path / name / "checkpoints/step-0000006" for name in ("one", "other"))
    ours, theirs = load_file(one / "alignment.safetensors"), load_file(other / "alignment.safetensors")
    assert ours.keys() == theirs.keys()
    for key in ours:
        if "exp_avg" not in key:
            torch.testing.assert_close(theirs[key], ours[key], rtol=1e-3, atol=2e-3, msg=key)


@pytest.mark.parametrize("options", [
    ["training.micro_batch=4"], ["training.activation_checkpointing=full"],
    ["training.activation_checkpointing=selective"], ["training.joint_adaln=true"],
], ids=str)  # fmt: skip
def test_options_of_the_step_change_only_rounding(world, tmp_path, options):
    train_here(world, tmp_path / "plain", *SHORT, *ALIGNED, *ROUTED)
    train_here(world, tmp_path / "other", *SHORT, *ALIGNED, *ROUTED, *options)
    assert losses(tmp_path / "other") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)


def test_an_alignment_ends_and_tokens_stop_skipping_at_their_steps(world, tmp_path):
    ending = ["training.align={name: sra2, weight: 3, until: 2}"]
    train_here(world, tmp_path / "ending", *SHORT, *ending)
    train_here(world, tmp_path / "first", *SHORT, "training.align={name: sra2, weight: 3}")
    first, ended = losses(tmp_path / "first"), losses(tmp_path / "ending")
    assert ended[:3] == first[:3] and ended[3:] != first[3:]
    train_here(world, tmp_path / "full", *SHORT, *ROUTED, "training.route_full_steps=6")
    train_here(world, tmp_path / "plain", *SHORT)
    assert losses(tmp_path / "full") == losses(tmp_path / "plain")


@pytest.mark.parametrize("options, words", [
    (["training.align=[layersnc]"], "training.align.name='layersnc' is unknown; did you mean 'layersync'"),
    (["training.align={name: layersync, block: 9}"], "block 9 is not one of the network's 1 to 4"),
    (["training.align={name: layersync, block: 3, target: 2}"], "target=2 must be deeper than training.align.block=3"),
    (["training.align={name: sra2, weight: -1}"], "training.align.weight=-1.0"),
    (["training.align={name: sra2, wieght: 1}"], "training.align.wieght=1 is not a known key; did you mean 'weight'"),
    (["training.align=7"], "training.align=7 must be a list"),
    (["training.route=0.5"], "training.route_ends=[2, 4] leave none of 4 blocks to skip"),
    (["training.align={name: repa, projector: cnv}"], "training.align.projector='cnv' is unknown; did you mean 'conv'"),
    (["training.align={name: repa, width: 0}"], "training.align.width=0 must be positive"),
    (["training.align={name: repa, gamma: x}"], "training.align.gamma='x' must be a number"),
    (["training.align={name: repa, projector: conv, block: 2}", *ROUTED], "training.align.projector=conv reads all "
     "tokens after block 2, but training.route=0.5 lets some skip blocks 2 to 3; use projector=mlp, or another block"),
    (["training.align=[repa]", "data.features=nowhere"], "nowhere has no manifest.json; write features there with"),
    (["training.route=1.5"], "training.route=1.5 is out of range"),
    ([*ROUTED, "model.decoder_blocks=2"], "training.route_ends=[1, 1] let tokens skip blocks of the decoder, which "
     "needs every token's condition; use [1, 2], or model.decoder_blocks=0"),
    (["training.route=0.5", "training.route_ends=[1]"], "training.route_ends=[1] must be a list of 2 numbers"),
], ids=str)  # fmt: skip
def test_mistakes_are_found_before_a_run_begins(world, featured, tmp_path, options, words):
    with pytest.raises(ValueError) as error:
        train_here(world, tmp_path / "run", featured, *options)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_features_that_are_missing_or_damaged_are_named(world, featured, tmp_path):
    with pytest.raises(ValueError, match="needs features, but .*latents has none; add them with fastdit extract"):
        train_here(world, tmp_path / "run", *FEATURES)
    other = tmp_path / "features"
    shutil.copytree(Path(featured.partition("=")[2]) / "features", other)
    for path in other.glob("*.tar"):
        data = bytearray(path.read_bytes())
        data[2000::4096] = bytes(255 - b for b in data[2000::4096])
        path.write_bytes(data)
    with pytest.raises(ValueError, match=f"of {other}/shard.*tar is damaged: its bytes do not match its crc32"):
        train_here(world, tmp_path / "run", *SHORT, featured, *FEATURES, f"data.features={other}")


def test_every_alignment_has_the_options_of_all():
    for name, entry in ALIGNMENTS.items():
        alignment = entry(weight=0.7, until=5)
        assert (alignment.weight_at(4), alignment.weight_at(5)) == (0.7, 0.0), name
        assert entry().weight_at(10**9) == entry().weight > 0
        assert "arXiv" in entry.__doc__
