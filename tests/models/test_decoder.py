"""DDT: the last blocks as a decoder that is modulated, token by token, by the output of the blocks before it."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdit.kernels.runtime import INTERPRET
from fastdit.models.blocks import add_and_modulate
from fastdit.models.taps import settled
from helpers.networks import batch, gradients, small

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def plain_block(block, x: Tensor, c: Tensor) -> Tensor:
    """x (N, T, D) through an adaLN block whose condition c is (N, T, D), or (N, 1, D) for all tokens."""
    n, _, d = x.shape
    vectors = block.adaLN_modulation(c).chunk(2 * block.modulations, -1)
    for i, branch in enumerate((block.attn, block.mlp)):
        shift, scale, *gate = vectors[i * block.modulations : (i + 1) * block.modulations]
        h = F.layer_norm(x, (d,), eps=1e-6) * (1 + scale) + shift
        if branch is block.attn:
            q, k, v = branch.qkv(h).view(n, -1, 3, 3, d // 3).permute(2, 0, 3, 1, 4)
            weights = (q @ k.transpose(2, 3) / math.sqrt(d // 3)).softmax(-1)
            h = branch.proj((weights @ v).transpose(1, 2).flatten(2))
        else:
            h = branch.fc2(F.gelu(branch.fc1(h), approximate="tanh"))
        x = x + (gate[0] if gate else 1) * h
    return x


@pytest.mark.parametrize("options", [{}, {"block": "adaln", "registers": 2, "input_size": (4, 10)}], ids=str)
def test_it_equals_the_paper_written_out(options):
    model = small(depth=4, decoder_blocks=2, **options).double()
    model.t_embedder.float()  # its sines and cosines are always fp32
    x, t, y = batch(model)
    x = x.double()

    def tokens(embedder):
        patches = embedder(x) + model.pos_embed
        return patches if model.registers is None else torch.cat([patches, model.registers.expand(3, -1, -1)], 1)

    time = model.t_embedder(t)[:, None]
    z = tokens(model.x_embedder)
    for block in model.blocks[:2]:
        z = plain_block(block, z, time + model.y_embedder(y)[:, None])
    out = tokens(model.decoder_embedder)
    for block in model.blocks[2:]:
        out = plain_block(block, out, z + time)
    shift, scale = model.final_layer.adaLN_modulation(z + time).chunk(2, -1)
    out = model.final_layer.linear(F.layer_norm(out, (24,), eps=1e-6) * (1 + scale) + shift)
    torch.testing.assert_close(model(x, t, y), model.unpatchify(out[:, : model.patches]))


def test_the_label_reaches_the_decoder_through_its_condition_alone():
    """Where modulation does not depend on the condition, only x_t is left, and the encoder has no gradient."""
    model = small(depth=3, decoder_blocks=1)
    for layer in (model.blocks[2], model.final_layer):
        nn.init.zeros_(layer.adaLN_modulation[1].weight)
    x, t, y = batch(model)
    out = model(x, t, y)
    assert torch.equal(model(x, 1 - t, (y + 1) % 5), out)
    assert (model(x + 1, t, y) - out).abs().max() > 0.1
    found = gradients(model)[1]
    encoder = ("x_embedder", "t_embedder", "y_embedder", "blocks.0", "blocks.1")
    for name, gradient in found.items():
        assert gradient.any() != name.startswith(encoder), name


def test_the_output_of_the_encoder_has_a_gradient_at_every_token():
    model = small(depth=3, decoder_blocks=1, registers=2)
    read = []
    model.blocks[1].register_forward_hook(lambda module, args, out: read.append((out[0].retain_grad(), out[0])[1]))
    model(*batch(model)).square().sum().backward()
    assert (read[0].grad.abs().amax(-1) > 1e-4).all() and read[0].shape == (3, 11, 24)


def test_off_nothing_is_added_and_on_only_an_embedding_of_patches():
    plain, decoder = small(depth=3), small(depth=3, decoder_blocks=1)
    extra = ["decoder_embedder.proj.weight", "decoder_embedder.proj.bias"]
    assert list(plain.state_dict()) == [name for name in decoder.state_dict() if name not in extra]
    assert decoder.parameter_count() - plain.parameter_count() == 24 * (16 + 1)


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("how", ["eager", pytest.param("triton", marks=pytest.mark.skipif(
    not INTERPRET, reason="Triton's interpreter stands in for a GPU"))])  # fmt: skip
def test_a_vector_for_each_token_equals_the_formula_with_its_gradients(monkeypatch, how, norm):
    monkeypatch.setenv("FASTDIT_KERNELS", how)
    torch.manual_seed(0)
    x, branch, *vectors = (torch.randn(2, 3, 24, requires_grad=True) for _ in range(5))
    bias = torch.randn(24, requires_grad=True)
    gate, shift, scale = vectors
    ours = add_and_modulate(x, (branch, gate, bias), shift, scale, norm)
    r = x + gate * (branch + bias)
    normed = F.layer_norm(r, (24,), eps=1e-6) if norm == "layer" else F.rms_norm(r, (24,), eps=1e-6)
    theirs = r, normed * (1 + scale) + shift
    torch.testing.assert_close(settled(x, (branch, gate, bias)), r, **CLOSE)
    inputs = [x, branch, *vectors, bias]
    for out in (ours, theirs):
        torch.testing.assert_close(out, theirs, **CLOSE)
    found, wanted = (torch.autograd.grad(sum(v.pow(3).sum() for v in out), inputs) for out in (ours, theirs))
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-4)
    first = add_and_modulate(x, None, shift, scale, norm)[1]  # of a decoder's first branch
    normed = F.layer_norm(x, (24,), eps=1e-6) if norm == "layer" else F.rms_norm(x, (24,), eps=1e-6)
    torch.testing.assert_close(first, normed * (1 + scale) + shift, **CLOSE)


def test_compiled_blocks_accept_other_batches_and_see_no_symbolic_sizes(monkeypatch):
    """The kernels could not take symbolic sizes. PyTorch's limit of 8 kinds of inputs would be reached with a route."""
    torch.compiler.reset()
    sizes = []

    def backend(graph, inputs):
        sizes.extend(size for value in inputs if isinstance(value, Tensor) for size in value.shape)
        return graph

    compile_module = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda block, **kinds: compile_module(block, backend=backend, **kinds))
    model = small(decoder_blocks=1)
    inputs = [batch(model, n) for n in (2, 3)]
    expected = [model(*values) for values in inputs]
    model.compile_blocks()
    for values, wanted in zip(inputs, expected, strict=True):
        torch.testing.assert_close(model(*values), wanted, **CLOSE)
    assert sizes and all(type(size) is int for size in sizes) and torch._dynamo.config.recompile_limit >= 64
    torch.compiler.reset()
