"""Positions, query and key norms, dropout and the smaller options of DiT, each against its definition."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from fastdit.kernels import rope_2d
from fastdit.models.dit import DiT
from fastdit.models.dropout import dropout, dropout_keys
from fastdit.models.layers import NORMS, Attention, Mlp, rotated
from fastdit.schema import NetworkOptions
from helpers.networks import batch, gradients, small

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


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


def test_rope_rotates_patches_only_and_adds_no_table():
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
    attention = Attention(24, 3, NetworkOptions(qk_norm=norm), "eager")
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
    attention = Attention(24, 3, NetworkOptions(qk_norm=norm or "none", qkv_bias=False), "eager")
    x = torch.randn(3, 9, 24, generator=torch.Generator().manual_seed(0))
    before = attention(x)[0]
    with torch.no_grad():
        attention.qkv.weight[:48] *= 1000  # queries and keys
    after = attention(x)[0]
    # normalized, |q| = |k| = sqrt(head_dim), so logits stay within sqrt(head_dim) and the scale is forgotten
    assert ((after - before).abs().max() < 1e-3) == (norm is not None)


@pytest.mark.parametrize("options", [{}, {"block": "adaln"}, {"decoder_blocks": 1}], ids=str)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_joint_modulations_change_neither_values_nor_names(options, compiled, monkeypatch):
    """Compiled without Inductor; test_dit.py compiles joint modulations with it."""
    model = small(**options)
    names, (out, wanted) = list(model.state_dict()), gradients(model)
    model.join_modulations()
    if compiled:
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
        model.compile_blocks()
    joint, found = gradients(model)
    torch.testing.assert_close(joint, out, **CLOSE)
    for name in wanted:
        assert (found[name] - wanted[name]).norm() <= 2e-6 * wanted[name].norm(), name
    assert list(model.state_dict()) == names


def test_joint_modulations_are_refused_without_modulations():
    with pytest.raises(ValueError, match="training.joint_adaln=true needs modulations.* use false"):
        small(block="in_context").join_modulations()


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


def test_the_transposed_convolution_equals_pytorchs():
    model = small(unpatchify="transposed_conv")
    final, x = model.final_layer, torch.randn(3, 9, 24)
    out = model.unpatchify(final(x, (torch.zeros_like(x), None, None), torch.zeros(3, 24)))
    shift, scale = final.adaLN_modulation(torch.zeros(3, 24)).chunk(2, -1)
    h = F.layer_norm(x, (24,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
    image = h.transpose(1, 2).unflatten(2, (3, 3))  # (N, D, h, w)
    expected = F.conv_transpose2d(image, final.conv.weight, final.conv.bias, stride=2)
    torch.testing.assert_close(out, expected, **CLOSE)


# ---- the MLP


def test_activations_equal_their_definitions():
    x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0))
    wanted = {
        "gelu": lambda u: u * 0.5 * (1 + torch.erf(u / math.sqrt(2))),
        "gelu_tanh": lambda u: u * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3))),
        "swiglu": lambda u: u[..., :64] * torch.sigmoid(u[..., :64]) * u[..., 64:],
    }
    for kind, definition in wanted.items():
        torch.manual_seed(0)
        mlp = Mlp(24, NetworkOptions(mlp=kind))
        out, bias = mlp(x)
        torch.testing.assert_close(out + bias, mlp.fc2(definition(mlp.fc1(x))), **CLOSE)

    def swiglu_width(hidden_size: int) -> int:
        with torch.device("meta"):
            return Mlp(hidden_size, NetworkOptions(mlp="swiglu")).fc2.weight.shape[1]

    assert [swiglu_width(d) for d in (24, 384, 768, 1024, 1152, 2048)] == [64, 1024, 2048, 2736, 3072, 5464]


def test_bias_switches_remove_their_biases():
    for switch, names in {
        "qkv_bias": {"attn.qkv.bias", "cross.q.bias", "cross.kv.bias"},
        "proj_bias": {"attn.proj.bias", "cross.proj.bias"},
        "mlp_bias": {"mlp.fc1.bias", "mlp.fc2.bias"},
    }.items():
        have, full = (set(small(block="cross_attention", **o).blocks[0].state_dict()) for o in ({switch: False}, {}))
        assert full - have == names and have < full


# ---- dropout


def test_dropout_drops_its_share_and_keeps_the_mean():
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
        ({"decoder_blocks": -1}, "model.decoder_blocks=-1 is out of range; use 0 for none"),
        ({"decoder_blocks": 1}, "model.decoder_blocks=1 leaves none of 1 blocks for the encoder; use fewer"),
        ({"decoder_blocks": 1, "block": "in_context"}, "'in_context' has no modulations; use adaln_zero or adaln"),
        ({"input_size": (4, 7)}, "latent size 7 is not divisible by patch_size=2; use a latent of 6"),
    ],
)
def test_impossible_options_are_refused_with_the_remedy(options, words):
    with pytest.raises(ValueError) as error:
        DiT(**{"hidden_size": 24, "depth": 1, "num_heads": 3} | options)
    assert words in str(error.value)
