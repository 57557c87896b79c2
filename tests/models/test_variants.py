"""Each option of DiT against a plain definition, published counts and known invariances."""

import dataclasses
import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastdit.kernels.runtime import INTERPRET
from fastdit.models.blocks import BLOCKS, RECOMPUTE
from fastdit.models.dit import DIT_VARIANTS, DiT, create_dit
from fastdit.models.layers import NORMS
from fastdit.schema import ModelConfig
from helpers.networks import COMBINED, EVERYTHING, OPTIONS, batch, each_option, gradients, small

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


# ---- published facts


# Peebles & Xie 2023, table 4: Gflops (multiply-adds, and LayerNorm's own 0.02) and millions of parameters of XL/2
@pytest.mark.parametrize(
    "block, gflops, millions",
    [
        ("in_context", 119.37, 449),
        ("cross_attention", 137.62, 598),
        ("adaln", 118.56, 600),
        ("adaln_zero", 118.64, 675),
    ],
)
def test_block_designs_have_the_papers_gflops_and_parameters(block, gflops, millions):
    with torch.device("meta"):
        model = create_dit("DiT-XL/2", block=block)
    assert model.flops_per_image() / 2e9 == pytest.approx(gflops, abs=0.025)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions


def test_presets_beyond_the_paper_have_their_published_sizes():
    with torch.device("meta"):
        two_b = create_dit("DiT-2B/2")  # Cerebras model zoo: 30 layers, hidden 2048, 16 heads, filter 8192
        lightning = create_dit(
            "DiT-XL/1", input_size=16, in_channels=32, norm="rms", mlp="swiglu", position="sincos_rope"
        )
    assert two_b.parameter_count() == 2_281_635_872
    assert lightning.blocks[0].mlp.fc2.weight.shape == (1152, 3072)
    assert round(lightning.parameter_count() / 1e6) == 675  # Yao et al. 2025, table 3
    assert all(f"DiT-{size}/{patch}" in DIT_VARIANTS for size in ("S", "B", "L", "XL", "2B") for patch in (1, 2, 4, 8))


@each_option
def test_counted_flops_equal_the_analytic_ones(options):
    with torch.device("meta"):
        model = DiT(**{"input_size": 6, "hidden_size": 24, "depth": 2, "num_heads": 3, "attention": "eager"} | options)
        height, width = (side * model.patch_size for side in model.grid)
        with FlopCounterMode(display=False) as counter:
            model.eval()(torch.empty(1, 4, height, width), torch.empty(1), torch.empty(1, dtype=torch.long))
    assert counter.get_total_flops() == model.flops_per_image()


# ---- every option


@each_option
def test_gradients_reach_every_parameter(options):
    for name, gradient in gradients(small(**options))[1].items():
        assert gradient.isfinite().all() and gradient.abs().max() > 1e-6, name


@each_option
def test_it_starts_at_zero_and_has_the_latents_shape(options):
    torch.manual_seed(0)
    model = DiT(**{"input_size": 6, "hidden_size": 24, "depth": 2, "num_heads": 3, "num_classes": 5} | options)
    x, t, y = batch(model)
    assert torch.equal(model(x, t, y), torch.zeros(3, 8, *x.shape[2:]))


@each_option
def test_recomputing_activations_changes_nothing(options):
    model = small(**options)
    expected, expected_gradients = gradients(model)
    for policy in RECOMPUTE:
        if policy == "activation" and options.get("mlp") == "gelu":
            continue  # refused: nothing would be saved (tests/test_plan.py)
        model.set_activation_checkpointing(policy)
        out, found = gradients(model)
        torch.testing.assert_close(out, expected, **CLOSE)
        torch.testing.assert_close(found, expected_gradients, **CLOSE)


@pytest.mark.parametrize("name", ["official", "gelu", "qk_layer", *sorted(OPTIONS.keys() & BLOCKS.keys()), *COMBINED])
def test_blocks_compile_to_one_graph_with_the_same_values(name):
    torch.compiler.reset()  # it gives up on a function that was compiled for too many others
    model = small(**OPTIONS[name])
    expected, expected_gradients = gradients(model)
    model.set_activation_checkpointing("full")  # which then happens inside the graph
    for block in model.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    out, found = gradients(model)
    torch.testing.assert_close(out, expected, **CLOSE)
    torch.testing.assert_close(found, expected_gradients, **CLOSE)


@pytest.mark.skipif(not INTERPRET, reason="Triton's interpreter stands in for a GPU")
@pytest.mark.parametrize("policy, options", [("none", {"mlp_bias": False}), ("activation", EVERYTHING)])
def test_fused_kernels_give_the_same_values(monkeypatch, policy, options):
    model = small(block="cross_attention", depth=1, **options)
    expected, expected_gradients = gradients(model)
    monkeypatch.setenv("FASTDIT_KERNELS", "triton")
    model.set_activation_checkpointing(policy)
    out, found = gradients(model)
    torch.testing.assert_close(out, expected, **CLOSE)
    for key, gradient in found.items():
        worst = (gradient - expected_gradients[key]).abs().max() / expected_gradients[key].abs().max()
        assert worst < 1e-5, key


def test_the_compilers_own_code_agrees_with_everything_on():
    torch.compiler.reset()
    model = small(block="cross_attention", depth=1, **EVERYTHING)
    expected, expected_gradients = gradients(model)
    model.compile_blocks()
    out, found = gradients(model)
    torch.testing.assert_close(out, expected, **CLOSE)
    torch.testing.assert_close(found, expected_gradients, atol=1e-4, rtol=1e-4)


def test_the_configs_defaults_are_the_networks():
    arguments = inspect.signature(DiT).parameters
    fields = {f.name: f.default for f in dataclasses.fields(ModelConfig)}
    options = {name for name, p in arguments.items() if p.kind is p.KEYWORD_ONLY}
    assert options <= set(fields)
    for name in options:
        assert arguments[name].default == fields[name], name


# ---- block designs, against their definition in plain PyTorch


def plain_block(block, x: Tensor, c: Tensor | None) -> Tensor:
    """x (N, T, D) through a block as the paper defines it, without fusion."""
    n, _, d = x.shape

    def heads(z):
        return z.view(n, -1, 3, d // 3).transpose(1, 2)

    def attend(q, k, v, proj):
        weights = (heads(q) @ heads(k).transpose(2, 3) / math.sqrt(d // 3)).softmax(-1)
        return proj((weights @ heads(v)).transpose(1, 2).flatten(2))

    branches = [lambda h: attend(*block.attn.qkv(h).chunk(3, -1), block.attn.proj)]
    if block.cross is not None:
        cross = block.cross
        branches.append(lambda h: attend(cross.q(h), *cross.kv(c).chunk(2, -1), cross.proj))
    branches.append(lambda h: block.mlp.fc2(F.gelu(block.mlp.fc1(h), approximate="tanh")))
    if block.modulations:
        rows = block.adaLN_modulation(c).view(n, 2, block.modulations, 1, d)
    for i, branch in enumerate(branches):
        h = F.layer_norm(x, (d,), eps=1e-6) if block.norm == "layer" else F.rms_norm(x, (d,), eps=1e-6)
        if block.modulations:
            h = h * (1 + rows[:, i, 1]) + rows[:, i, 0]
        else:
            norm = block.norms[i]
            h = h * norm.weight + getattr(norm, "bias", 0)
        x = x + (rows[:, i, 2] if block.modulations == 3 else 1) * branch(h)
    return x


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("design", BLOCKS)
def test_block_designs_equal_their_definitions(design, norm):
    block = small(block=design, norm=norm).blocks[1]
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(3, 9, 24, generator=generator)
    c = {"in_context": None, "cross_attention": torch.randn(3, 2, 24, generator=generator)}.get(
        design, torch.randn(3, 24, generator=generator)
    )
    residual, (branch, gate, bias) = block(x, None, c)
    out = residual + (1 if gate is None else gate[:, None]) * (branch + bias)
    torch.testing.assert_close(out, plain_block(block, x, c), **CLOSE)


def test_adaln_zero_starts_as_the_identity_and_the_others_do_not():
    x = torch.randn(3, 9, 24)
    for design in BLOCKS:
        torch.manual_seed(0)
        block = DiT(6, hidden_size=24, depth=1, num_heads=3, num_classes=5, block=design).blocks[0]
        c = {"in_context": None, "cross_attention": torch.randn(3, 2, 24)}.get(design, torch.randn(3, 24))
        assert torch.equal(plain_block(block, x, c), x) == (design == "adaln_zero")
        residual, (_, gate, _) = block(x, None, c)
        if design == "adaln_zero":
            assert torch.equal(residual, x) and not gate.any()


@pytest.mark.parametrize("block", BLOCKS)
def test_time_and_label_reach_the_output(block):
    model = small(block=block)
    x, t, y = batch(model)
    out = model(x, t, y)
    assert (model(x, t + 0.3, y) - out).flatten(1).abs().amax(1).min() > 1e-4
    assert (model(x, t, (y + 1) % 5) - out).flatten(1).abs().amax(1).min() > 1e-4


# ---- tokens and positions


def test_registers_are_tokens_inside_the_blocks_alone():
    model = small(registers=3)
    seen = []
    model.blocks[0].register_forward_hook(lambda module, args, out: seen.append(args[0]))
    x, t, y = batch(model)
    assert model(x, t, y).shape == (3, 8, 6, 6)
    assert seen[0].shape == (3, 9 + 3, 24) and model.tokens == 12
    assert torch.equal(seen[0][:, 9:], model.registers.expand(3, -1, -1))
    plain = small()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if k != "registers"})
    assert (plain(x, t, y) - model(x, t, y)).abs().max() > 1e-3


def test_condition_tokens_of_the_in_context_design_stand_behind_the_patches():
    model = small(block="in_context", registers=1)
    seen = []
    model.blocks[0].register_forward_hook(lambda module, args, out: seen.append(args[0]))
    x, t, y = batch(model)
    model(x, t, y)
    expected = torch.stack([model.t_embedder(t), model.y_embedder(y)], 1)
    torch.testing.assert_close(seen[0][:, 9:11], expected, **CLOSE)
