"""Network options in a run: exact resuming, names kept in checkpoints, mistakes found before anything is written."""

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

from fastdit.build import prepare_for_training
from fastdit.diffusion.objectives import FlowMatching
from fastdit.models.dit import DiT
from fastdit.sampling import load_pipeline
from fastdit.schema import TrainingConfig
from helpers.runs import losses, train_here

EVERYTHING = [
    "model.norm=rms", "model.qk_norm=layer", "model.mlp=swiglu", "model.position=rope", "model.registers=2",
    "model.qkv_bias=false", "model.dropout=0.1", "model.unpatchify=transposed_conv",
]  # fmt: skip
SHORT = ["training.steps=6", "training.checkpoint_every=3", "training.precision=fp32"]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("block", ["adaln", "in_context", "cross_attention", "adaln_zero model.decoder_blocks=2"])
def test_a_resume_is_exact_and_a_checkpoint_keeps_every_name(world, tmp_path, block):
    options = [*f"model.block={block}".split(), *EVERYTHING, *SHORT]
    whole = train_here(world, tmp_path / "whole", *options)
    train_here(world, tmp_path / "halves", *options, "training.steps=3")
    halves = train_here(world, tmp_path / "halves", *options, resume=True)
    assert losses(tmp_path / "halves") == losses(tmp_path / "whole")
    for name in ("model", "ema"):
        ours, theirs = load_file(whole / f"{name}.safetensors"), load_file(halves / f"{name}.safetensors")
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    generator = load_pipeline(whole)
    ema, loaded = load_file(whole / "ema.safetensors"), generator.model.state_dict()
    assert ema.keys() == loaded.keys() and all(torch.equal(ema[k], loaded[k]) for k in ema)
    assert generator.latents([0, 1], torch.tensor([3, 4]), seed=0).isfinite().all()


def test_a_resume_refuses_another_network_of_the_same_shapes(world, tmp_path):
    train_here(world, tmp_path / "run", *SHORT, "training.steps=1")
    with pytest.raises(ValueError, match="model.norm='layer', this run 'rms'; make them equal to resume"):
        train_here(world, tmp_path / "run", *SHORT, "model.norm=rms", resume=True)
    train_here(world, tmp_path / "run", *SHORT, "training.steps=2", "model.dropout=0.1", resume=True)


def test_micro_batches_and_recomputation_draw_the_same_dropout(world, tmp_path):
    options = ["model.block=adaln", "model.dropout=0.2", *SHORT]  # without gates, that it is felt at once
    train_here(world, tmp_path / "plain", *options)
    changes = ["training.micro_batch=4", "training.activation_checkpointing=full"]
    train_here(world, tmp_path / "changed", *options, *changes)
    assert losses(tmp_path / "changed") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)
    train_here(world, tmp_path / "without", *options, "model.dropout=0")
    assert losses(tmp_path / "plain")[1:] != pytest.approx(losses(tmp_path / "without")[1:], rel=1e-3)


@pytest.mark.parametrize(
    "change, words",
    [
        ("model.dropout=1", "model.dropout=1.0 is out of range; use a probability in [0, 1)"),
        ("model.registers=-1", "model.registers=-1 is out of range; use 0 for none"),
        ("model.mlp_ratio=0", "model.mlp_ratio=0.0 is out of range; use a positive factor"),
        ("model.block=zero",
         "model.block='zero' is unknown; did you mean 'adaln_zero'? Known: adaln_zero, adaln, in_context, cross_att"),
        ("model.variant=DiT-4x64x7/4", "hidden_size=64 must be a multiple of num_heads=7"),
        ("model.variant=DiT-XL/3", "model.variant='DiT-XL/3' is unknown; did you mean 'DiT-XL/"),
        ("objective.variance=learned_range", "objective.variance='learned_range' is an option of ddpm, not of flow"),
        ("objective={name: ddpm, weight: velocity}", "objective.weight='velocity' is an option of flow, not of ddpm"),
        ("sampling.sampler={name: heun, eta: 1}", "sampling.sampler.eta=1 is an option of ddim"),
        ("model.class_dropout=0", "sampling.cfg_scale=1.5 needs a null label; this model has class_dropout=0.0"),
        ("sampling.steps=ddim50", "steps='ddim50' needs a discrete schedule; use a positive count"),
        (["objective=ddpm", "sampling.steps=ddim300"], "ddim300"),
        (["model.position=rope", "model.variant=DiT-2x60x10/4"], "use another num_heads, or position=sincos"),
    ],
)
def test_wrong_combinations_fail_before_a_run_begins(world, tmp_path, change, words):
    with pytest.raises(ValueError) as error:
        train_here(world, tmp_path / "run", *([change] if isinstance(change, str) else change))
    assert words in str(error.value) and not (tmp_path / "run").exists()


def test_the_compiler_leaves_blocks_whole_under_ddp(monkeypatch):
    """It would split a block that is larger than one of DDP's buckets, and fuse nothing across the split."""
    counters, compile_module = torch._dynamo.utils.counters, nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module, **options: compile_module(module, backend="aot_eager"))
    inputs = torch.randn(2, 4, 8, 8), torch.rand(2), torch.zeros(2, dtype=torch.long)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        graphs = []
        for wrap in (lambda model: model, nn.parallel.DistributedDataParallel):
            torch._dynamo.reset()
            counters.clear()
            model = DiT(input_size=8, hidden_size=256, depth=3, num_heads=4, num_classes=10)
            prepare_for_training(model, FlowMatching(), TrainingConfig(precision="fp32"), "none")
            wrap(model)(*inputs).sum().backward()
            graphs.append(counters["aot_autograd"]["total"])
        assert graphs[0] == graphs[1] > 0
    finally:
        dist.destroy_process_group()
        torch._dynamo.reset()
