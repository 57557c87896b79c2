"""Each option of DiT does what it says and nothing else: plain definitions, published counts, known invariances."""

import dataclasses
import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from fastdit.kernels import rope_2d
from fastdit.kernels.runtime import INTERPRET
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastdit.config import ModelConfig
from fastdit.models.blocks import BLOCKS, RECOMPUTE
from fastdit.models.dit import DIT_VARIANTS, DiT, create_dit
from fastdit.models.dropout import dropout, dropout_keys
from fastdit.models.layers import ACTIVATIONS, NORMS, Attention, Mlp, mlp_width, rotated

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
OPTIONS = {
    "official": {},
    **{block: {"block": block} for block in BLOCKS if block != "adaln_zero"},
    **{mlp: {"mlp": mlp} for mlp in ACTIVATIONS if mlp != "gelu_tanh"},
    "narrow": {"mlp_ratio": 1.5},
    "rms": {"norm": "rms"},
    "qk_rms": {"qk_norm": "rms"},
    "qk_layer": {"qk_norm": "layer"},
    "rope": {"position": "rope"},
    "sincos_rope": {"position": "sincos_rope"},
    "registers": {"registers": 3},
    "no_bias": {"qkv_bias": False, "proj_bias": False, "mlp_bias": False},
    "dropout": {"dropout": 0.2},
    "transposed_conv": {"unpatchify": "transposed_conv"},
    "wide": {"input_size": (4, 10)},
    "unconditional": {"num_classes": 0, "block": "in_context"},
}
EVERYTHING = {
    "norm": "rms", "qk_norm": "rms", "mlp": "swiglu", "position": "sincos_rope", "registers": 3, "qkv_bias": False,
    "mlp_bias": False, "dropout": 0.2, "unpatchify": "transposed_conv", "input_size": (4, 10),
}  # fmt: skip
COMBINED = {f"{block}_with_all": {"block": block, **EVERYTHING} for block in BLOCKS}
OPTIONS |= COMBINED
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def small(**options) -> DiT:
    """Two blocks, three heads of 8, every weight moved away from its start."""
    torch.manual_seed(0)
    arguments = {"input_size": 6, "hidden_size": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
    model = DiT(**arguments | options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def batch(model: DiT, n: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    height, width = (side * model.patch_size for side in model.grid)
    y = torch.randint(0, 6, (n,), generator=generator) if model.num_classes else None
    return torch.randn(n, 4, height, width, generator=generator), torch.rand(n, generator=generator), y


def gradients(model: DiT) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    out = model(*batch(model))
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    return out.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


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
    """x (N, T, D) through a block as the paper draws it: nothing fused, nothing handed on."""
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
    if block.rows_of_c:
        rows = block.adaLN_modulation(c).view(n, 2, block.rows_of_c, 1, d)
    for i, branch in enumerate(branches):
        h = F.layer_norm(x, (d,), eps=1e-6) if block.norm == "layer" else F.rms_norm(x, (d,), eps=1e-6)
        if block.rows_of_c:
            h = h * (1 + rows[:, i, 1]) + rows[:, i, 0]
        else:
            norm = block.norms[i]
            h = h * norm.weight + getattr(norm, "bias", 0)
        x = x + (rows[:, i, 2] if block.rows_of_c == 3 else 1) * branch(h)
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


def test_rotated_logits_depend_on_relative_positions_alone():
    height, width = 3, 5
    cos, sin = rope_2d(height, width, 8)
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(8, generator=generator).expand(1, 1, height * width, 8) for _ in range(2))
    logits = (rotated(q, cos, sin) @ rotated(k, cos, sin).transpose(2, 3))[0, 0]
    place = [(i // width, i % width) for i in range(height * width)]
    by_offset: dict[tuple[int, int], list[float]] = {}
    for i, (a, b) in enumerate(place):
        for j, (c, d) in enumerate(place):
            by_offset.setdefault((a - c, b - d), []).append(logits[i, j].item())
    for values in by_offset.values():
        assert max(values) - min(values) < 1e-5
    means = sorted(values[0] for values in by_offset.values())
    assert min(b - a for a, b in zip(means, means[1:], strict=False)) > 1e-6  # and no two offsets look alike


def test_rope_leaves_tokens_beside_the_patches_unturned_and_adds_no_table():
    model = small(position="rope", registers=2, block="in_context")
    assert "pos_embed" not in model.state_dict() and model.rope.shape == (2, 9 + 2 + 2, 4)
    assert torch.equal(model.rope[:, 9:], torch.tensor([1.0, 0.0])[:, None, None].expand(2, 4, 4))
    torch.testing.assert_close(model.rope[:, :9], torch.stack(rope_2d(3, 3, 8)))


@pytest.mark.parametrize("position", ["sincos", "rope"])
def test_the_residual_stays_fp32_under_autocast(position):
    model = small(position=position, block="in_context", registers=1)
    seen = []
    model.blocks[1].register_forward_hook(lambda module, args, out: seen.append(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(*batch(model))
    assert seen == [torch.float32]


@pytest.mark.parametrize("norm", NORMS)
def test_query_key_norm_then_rotation_equals_its_definition(norm):
    torch.manual_seed(0)
    attention = Attention(24, 3, "eager", qk_norm=norm)
    torch.nn.init.normal_(attention.q_norm.weight)
    torch.nn.init.normal_(attention.k_norm.weight)
    x, rope = torch.randn(3, 6, 24), rope_2d(2, 3, 8)
    out, bias = attention(x, rope)
    q, k, v = attention.qkv(x).view(3, 6, 3, 3, 8).permute(2, 0, 3, 1, 4)
    normed = F.layer_norm if norm == "layer" else F.rms_norm
    q, k = (
        rotated(normed(z, (8,), weight=own.weight, eps=1e-6), *rope)
        for z, own in ((q, attention.q_norm), (k, attention.k_norm))
    )
    expected = attention.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(out + bias, expected, **CLOSE)


@pytest.mark.parametrize("norm", [None, *NORMS])
def test_query_key_norm_bounds_the_logits_whatever_the_weights(norm):
    attention = Attention(24, 3, "eager", qk_norm=norm or "none", qkv_bias=False)
    x = torch.randn(3, 9, 24, generator=torch.Generator().manual_seed(0))
    before = attention(x)[0]
    with torch.no_grad():
        attention.qkv.weight[:48] *= 1000  # queries and keys
    after = attention(x)[0]
    # normalised, |q| = |k| = sqrt(head_dim), so logits stay within sqrt(head_dim) and the scale is forgotten
    assert ((after - before).abs().max() < 1e-3) == (norm is not None)


def test_latents_may_be_rectangular():
    model = DiT((4, 10), hidden_size=16, depth=1, num_heads=2, learn_sigma=False)
    assert model.pos_embed.shape == (1, 10, 16)
    with torch.no_grad():
        model.x_embedder.proj.weight.copy_(torch.eye(16).view(16, 4, 2, 2))  # a token holds its patch, (C, p, p)
    x = torch.randn(2, 4, 4, 10)
    tokens = model.x_embedder(x).view(2, 10, 4, 2, 2).permute(0, 1, 3, 4, 2).flatten(2)  # (p, p, C)
    assert torch.equal(model.unpatchify(tokens), x)
    # token 7 of 2 x 5 is row 1, column 2: the second half of its encoding is its row's
    square = DiT(20, hidden_size=16, depth=1, num_heads=2).pos_embed[0].view(10, 10, 16)
    assert torch.equal(model.pos_embed[0, 7], square[1, 2])


def test_transposed_convolution_is_one():
    model = small(unpatchify="transposed_conv")
    final, x = model.final_layer, torch.randn(3, 9, 24)
    out = model.unpatchify(final(x, (torch.zeros_like(x), None, None), torch.zeros(3, 24)))
    shift, scale = final.adaLN_modulation(torch.zeros(3, 24)).chunk(2, -1)
    h = F.layer_norm(x, (24,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
    image = h.transpose(1, 2).unflatten(2, (3, 3))  # (N, D, h, w)
    expected = F.conv_transpose2d(image, final.conv.weight, final.conv.bias, stride=2)
    torch.testing.assert_close(out, expected, **CLOSE)


# ---- the MLP


def test_activations_are_what_they_are_called():
    x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0))
    wanted = {
        "gelu": lambda u: u * 0.5 * (1 + torch.erf(u / math.sqrt(2))),
        "gelu_tanh": lambda u: u * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3))),
        "swiglu": lambda u: u[..., :64] * torch.sigmoid(u[..., :64]) * u[..., 64:],
    }
    for kind, definition in wanted.items():
        torch.manual_seed(0)
        mlp = Mlp(24, kind)
        out, bias = mlp(x)
        torch.testing.assert_close(out + bias, mlp.fc2(definition(mlp.fc1(x))), **CLOSE)
    assert [mlp_width(d, 4.0, "swiglu") for d in (24, 384, 768, 1024, 1152, 2048)] == [64, 1024, 2048, 2736, 3072, 5464]


def test_bias_switches_remove_their_biases():
    for switch, names in {
        "qkv_bias": {"attn.qkv.bias", "cross.q.bias", "cross.kv.bias"},
        "proj_bias": {"attn.proj.bias", "cross.proj.bias"},
        "mlp_bias": {"mlp.fc1.bias", "mlp.fc2.bias"},
    }.items():
        have, full = (set(small(block="cross_attention", **o).blocks[0].state_dict()) for o in ({switch: False}, {}))
        assert full - have == names and have < full


# ---- dropout


def test_dropout_keeps_its_share_and_the_mean():
    x = torch.ones(16, 64, 96)
    keys = dropout_keys(torch.randn(16, 4, 8, 8, generator=torch.Generator().manual_seed(0)), 2, 3)
    assert keys.shape == (2, 3, 16) and len(keys.unique()) == keys.numel()
    a, b = dropout(x, keys[0, 0], 0.3), dropout(x, keys[0, 1], 0.3)
    deviation = math.sqrt(0.3 * 0.7 / x.numel())  # of a share of independent draws
    assert (a == 0).float().mean().item() == pytest.approx(0.3, abs=5 * deviation)
    assert a.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    # places, images, tokens and channels are independent: both dropped in 0.3^2 of the cases
    for other in (b, a.roll(1, 0), a.roll(1, 1), a.roll(1, 2), a.roll(7, 2)):
        assert ((a == 0) & (other == 0)).float().mean().item() == pytest.approx(0.09, abs=5 * deviation)


def test_dropout_is_a_function_of_the_latents_alone():
    model = small(dropout=0.3)
    x, t, y = batch(model)
    state = torch.get_rng_state()
    out = model(x, t, y)
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(model(x, t, y), out)
    torch.testing.assert_close(model(x[1:2], t[1:2], y[1:2]), out[1:2], **CLOSE)  # in any batch
    assert (model(x + 1e-6, t, y) - out).abs().max() > 1e-2  # a new draw for the least change
    model.eval()
    plain = small().eval()
    assert torch.equal(model(x, t, y), plain(x, t, y))  # off when not training


# ---- mistakes


@pytest.mark.parametrize(
    "options, words",
    [
        ({"block": "adaln0"}, "model.block='adaln0' is unknown; did you mean 'adaln'"),
        ({"norm": "batch"}, "model.norm='batch'"),
        ({"qk_norm": "l2"}, "model.qk_norm='l2'"),
        ({"mlp": "geglu"}, "model.mlp='geglu' is unknown; did you mean 'gelu'"),
        ({"unpatchify": "conv"}, "model.unpatchify='conv'"),
        ({"position": "learned"}, "model.position='learned'"),
        ({"position": "rope", "hidden_size": 36, "num_heads": 6}, "36 / 6 = 6; use another num_heads"),
        ({"registers": -1}, "registers=-1"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"input_size": (4, 7)}, "latent size 7 is not divisible by patch_size=2; use a latent of 6"),
    ],
)
def test_impossible_options_are_refused_with_the_remedy(options, words):
    with pytest.raises(ValueError) as error:
        DiT(**{"hidden_size": 24, "depth": 1, "num_heads": 3} | options)
    assert words in str(error.value)
