"""DiT against recorded outputs of the official network, published sizes, and counted FLOPs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastdit.models.attention import ATTENTION
from fastdit.models.blocks import RECOMPUTE
from fastdit.models.dit import DIT_VARIANTS, DiT, create_dit, drop_labels
from helpers.checkpoints import golden, golden_dit

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
GOLDEN = golden("dit")


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_forward_equals_the_official_network(backend):
    model = golden_dit(attention=backend)
    with torch.no_grad():
        torch.testing.assert_close(model(GOLDEN["x"], GOLDEN["t"], GOLDEN["y"]), GOLDEN["out"], **CLOSE)
        fractional = model(GOLDEN["x"], GOLDEN["t_fractional"], GOLDEN["y"])
    torch.testing.assert_close(fractional, GOLDEN["out_t_fractional"], **CLOSE)


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_gradients_equal_the_official_network(recompute):
    model = golden_dit()
    model.set_activation_checkpointing(recompute)
    x = GOLDEN["x"].clone().requires_grad_()
    out = model(x, GOLDEN["t"], GOLDEN["y"])
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    gradients = {k.removeprefix("grad_"): v for k, v in GOLDEN.items() if k.startswith("grad_")}
    parameters = dict(model.named_parameters(), x=x)
    assert len(gradients) == 4
    for name, expected in gradients.items():
        torch.testing.assert_close(parameters[name].grad, expected, **CLOSE, msg=lambda m, n=name: f"{n}: {m}")


def test_compiled_blocks_give_the_same_output_and_gradients_and_keep_the_official_names():
    model = golden_dit()
    names = list(model.state_dict())

    def gradients() -> tuple[torch.Tensor, list[torch.Tensor]]:
        out = model(GOLDEN["x"], GOLDEN["t"], GOLDEN["y"])
        return out, torch.autograd.grad(out.square().sum(), [p for p in model.parameters() if p.requires_grad])

    _, wanted = gradients()
    model.join_modulations()
    model.compile_blocks()
    out, found = gradients()
    torch.testing.assert_close(out, GOLDEN["out"], **CLOSE)
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours - theirs).norm() <= 2e-6 * theirs.norm()
    assert list(model.state_dict()) == names


@pytest.mark.parametrize(
    "variant, count", [("S", 32_963_360), ("B", 130_512_416), ("L", 458_102_816), ("XL", 675_129_632)]
)
def test_parameter_counts_and_key_count_are_the_published_ones(variant, count):
    with torch.device("meta"):
        model = create_dit(f"DiT-{variant}/2")
    assert model.parameter_count() == count
    if variant == "XL":
        assert len(model.state_dict()) == 292


def test_counted_flops_equal_the_analytic_ones_and_the_paper():
    with torch.device("meta"):
        for variant in ("DiT-S/2", "DiT-B/8"):
            model = create_dit(variant, attention="eager")
            with FlopCounterMode(display=False) as counter:
                model(torch.empty(1, 4, 32, 32), torch.empty(1), torch.empty(1, dtype=torch.long))
            assert counter.get_total_flops() == model.flops_per_image()
        # paper's table: 118.64 "Gflops" (multiply-adds) for XL/2
        assert create_dit("DiT-XL/2").flops_per_image() / 2e9 == pytest.approx(118.64, abs=0.05)


def test_every_variant_has_integral_heads_and_starts_at_zero():
    for name, shape in DIT_VARIANTS.items():
        assert shape["hidden_size"] % shape["num_heads"] == 0, name
    model = create_dit("DiT-Ti/2", input_size=8, num_classes=10)
    assert model(torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([0, 10])).abs().max() == 0


def test_label_dropout_has_its_rate_and_needs_a_null_label():
    u = torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    dropped = drop_labels(torch.zeros(100_000, dtype=torch.long), u, 0.1, 1000) == 1000
    assert dropped.float().mean().item() == pytest.approx(0.1, abs=0.004)
    with torch.device("meta"):
        assert create_dit("DiT-S/8", class_dropout=0.0).y_embedder.embedding_table.weight.shape[0] == 1000
        assert create_dit("DiT-S/8", class_dropout=0.0).null_label is None
        assert create_dit("DiT-S/8").null_label == 1000


def test_unconditional_network_has_no_label_table_and_ignores_labels():
    model = create_dit("DiT-Ti/2", input_size=8, num_classes=0)
    assert not any(name.startswith("y_embedder") for name in model.state_dict())
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x, t = torch.randn(2, 4, 8, 8), torch.rand(2)
    assert torch.equal(model(x, t), model(x, t, torch.tensor([1, 2])))


@pytest.mark.parametrize(
    "arguments, word",
    [
        ({"input_size": 31}, "patch_size=2"),
        ({"hidden_size": 100, "num_heads": 3}, "num_heads=3"),
        ({"attention": "sdqa"}, "sdpa"),
    ],
)
def test_impossible_networks_are_refused_with_the_remedy(arguments, word):
    with pytest.raises(ValueError, match=word):
        DiT(**arguments)


def test_unknown_variant_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'DiT-XL/2'"):
        create_dit("DIT-XL/2")


def test_attention_backends_agree_on_awkward_shapes():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 2, 41, 72, generator=generator) for _ in range(3))
    torch.testing.assert_close(ATTENTION["eager"](q, k, v), ATTENTION["sdpa"](q, k, v), **CLOSE)
