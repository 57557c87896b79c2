"""Token routing: every token returns to its place, the others are computed as in a network of fewer tokens."""

import pytest
import torch

from fastdit.build import build_routing
from fastdit.kernels import qk_norm_rope, rope_2d
from fastdit.kernels.qk_norm_rope import qk_norm_rope_eager, qk_norm_rope_triton
from fastdit.models.dit import DiT
from fastdit.models.routing import Route, random_tokens
from fastdit.models.taps import Tap, settled
from fastdit.schema import TrainingConfig
from helpers.networks import small

OPTIONS = [
    {},
    {"position": "rope", "qk_norm": "rms", "registers": 3, "norm": "rms", "mlp": "swiglu"},
    {"position": "rope"},
    {"block": "in_context"},
    {"block": "cross_attention"},
    {"block": "adaln"},
]


def network(depth: int = 5, **options) -> DiT:
    """In fp64, with no weight zero; 6 x 4 patches."""
    sizes = {"input_size": (12, 8), "in_channels": 3, "depth": depth, "num_classes": 4, "learn_sigma": False}
    model = small(**sizes, attention="eager", **options).double()
    model.t_embedder.float()  # its sines and cosines are always fp32
    return model


def batch(n: int = 3):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 3, 12, 8, generator=generator, dtype=torch.float64)
    return x, torch.rand(n, generator=generator, dtype=torch.float64), torch.tensor([0, 3, 4])[:n]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_route_of_all_tokens_changes_nothing(options):
    model, (x, t, y) = network(**options), batch()
    whole = model(x, t, y)
    model.route = Route(1, 4, torch.arange(model.tokens).expand(3, -1))
    torch.testing.assert_close(model(x, t, y), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_skipping_tokens_return_unchanged_to_their_places(options):
    model, (x, t, y) = network(**options), batch()
    for block in (1, 3, 4):
        model.taps[f"{block}:"] = Tap(block)
    kept = random_tokens(torch.rand(3, model.patches), 0.4, model.patches, model.tokens)
    assert kept.shape == (3, model.tokens - 10)
    model.route = Route(1, 4, kept)
    model(x, t, y)
    (before, none), (inside, among), (after, again) = (model.tapped[f"{block}:"] for block in (1, 3, 4))
    patches = kept[:, : among.shape[1]]
    assert none is None and again is None and torch.equal(among, patches)
    skipped = torch.ones(3, model.patches, dtype=torch.bool).scatter(1, patches, False)
    assert torch.equal(after[skipped], before[skipped])
    assert not torch.isclose(after[~skipped], before[~skipped]).any(1).all()
    assert inside.shape == (3, model.patches - 10, 24)


def test_the_kept_tokens_see_only_each_other():
    """Where tokens skip every block but the last, they cannot have changed the others' tokens before it."""
    model, (x, t, y) = network(depth=4), batch(1)
    model.taps["3:"] = Tap(3)
    model.route = Route(0, 3, torch.tensor([[1, 5, 6, 20]]))
    model(x, t, y)
    tokens = model.tapped["3:"].tokens
    changed = x.clone()
    changed[:, :, 10:, 6:] += 1  # patch 23, which skips
    model(changed, t, y)
    other = model.tapped["3:"].tokens
    same = torch.isclose(tokens, other, rtol=0, atol=0).all(-1)[0]
    assert same[:23].all() and not same[23]


def test_output_and_gradients_equal_a_forward_pass_written_by_hand():
    model, (x, t, y) = network(depth=3), batch(2)
    kept = torch.tensor([[0, 3, 17], [4, 9, 23]])
    inputs = [x.requires_grad_(), *model.parameters()]

    def by_hand() -> torch.Tensor:
        c = model.condition(model.t_embedder(t), y)
        whole = settled(*model.blocks[0](model.x_embedder(x) + model.pos_embed, None, c))
        short = settled(*model.blocks[1](torch.stack([whole[0, kept[0]], whole[1, kept[1]]]), None, c))
        back = []
        for tokens, own, row in zip(whole, short, kept, strict=True):
            places = {token: i for i, token in enumerate(row.tolist())}
            back.append(torch.stack([own[places[i]] if i in places else tokens[i] for i in range(24)]))
        return model.unpatchify(model.final_layer(*model.blocks[2](torch.stack(back), None, c), c))

    expected = by_hand()
    gradients = torch.autograd.grad(expected.square().mean(), inputs, allow_unused=True)
    model.route = Route(1, 2, kept)
    out = model(x, t, y)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    own = torch.autograd.grad(out.square().mean(), inputs, allow_unused=True)
    for ours, theirs in zip(own, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "blocks"])
def test_a_route_and_taps_compile_without_graph_breaks(whole):
    torch._dynamo.reset()  # other tests compile blocks, too, and there is a limit for each function
    (x, t, y), kept = batch(2), torch.tensor([[0, 3, 17], [4, 9, 23]])
    found = []
    for compiled in (False, True):
        model = network(depth=3, position="rope", qk_norm="rms")
        model.taps["2:"] = Tap(2, torch.nn.Linear(24, 7).double().requires_grad_(False))
        torch.nn.init.ones_(model.taps["2:"].projector.weight)
        model.route = Route(1, 3, kept)
        for module in ([model] if whole else model.blocks) if compiled else ():
            module.compile(fullgraph=True, backend="aot_eager", dynamic=None if whole else False)
        loss = model(x, t, y).square().mean() + model.tapped["2:"].tokens.sum()
        found.append([loss, *torch.autograd.grad(loss, [p for p in model.blocks.parameters()])])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


def test_settled_equals_what_the_next_block_adds():
    x, branch = torch.randn(2, 5, 8, dtype=torch.float64), torch.randn(2, 5, 8, dtype=torch.float64)
    gate, bias = torch.randn(2, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    assert torch.equal(settled(x, None), x)
    assert torch.equal(settled(x, (branch, None, None)), x + branch)
    assert torch.equal(settled(x, (branch, gate, bias)), x + gate[:, None] * (branch + bias))
    half = settled(x.bfloat16(), (branch.bfloat16(), gate.bfloat16(), None))
    exact = x.bfloat16().double() + gate.bfloat16().double()[:, None] * branch.bfloat16().double()
    assert torch.equal(half, exact.float().bfloat16())


@pytest.mark.parametrize("share, patches", [(0.5, 16), (0.25, 9), (0.9, 24), (0.01, 200)])
def test_tokens_are_drawn_without_repetition_and_at_the_share(share, patches):
    u = torch.rand(400, patches, generator=torch.Generator().manual_seed(0))
    kept = random_tokens(u, share, patches, patches + 2)
    stay = patches - round(share * patches)
    assert kept.shape == (400, stay + 2) and (kept[:, -2:] == torch.tensor([patches, patches + 1])).all()
    assert all(len(set(row)) == stay + 2 and row == sorted(row) for row in kept.tolist())
    often = kept[:, :-2].flatten().bincount(minlength=patches) / 400
    assert (often - stay / patches).abs().max() < 0.13  # 5 standard deviations


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_rotations_of_each_sample_are_its_own(norm):
    torch.manual_seed(0)
    qkv = torch.randn(3, 7, 3, 2, 24, requires_grad=True)
    weights = torch.randn(24), torch.randn(24)
    cos, sin = (table[torch.stack([torch.randperm(20)[:7] for _ in range(3)])] for table in rope_2d(4, 5, 24))
    eager = qk_norm_rope_eager(qkv, *weights, cos, sin, norm=norm)
    fused = qk_norm_rope_triton(qkv, *weights, cos, sin, norm=norm)
    one_by_one = [qk_norm_rope(qkv[i : i + 1], *weights, cos[i], sin[i], norm=norm) for i in range(3)]
    for part, (a, b) in enumerate(zip(eager, fused, strict=True)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(a, torch.cat([sample[part] for sample in one_by_one]), rtol=1e-6, atol=1e-6)
    gradients = [torch.autograd.grad(sum((x * (i + 1)).square().sum() for i, x in enumerate(out)), qkv)[0]
                 for out in (eager, fused)]  # fmt: skip
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"cos has shape \(2, 7, 12\); give it \(3, 7, 12\)"):
        qk_norm_rope(qkv, *weights, cos[:2], sin[:2])


def test_a_route_without_a_middle_is_refused():
    model = network(depth=4)
    assert build_routing(TrainingConfig(), model) is None
    with pytest.raises(ValueError, match=r"training.route_ends=\[2, 4\] leave none of 4 blocks to skip"):
        build_routing(TrainingConfig(route=0.5), model)
    with pytest.raises(ValueError, match="training.route=0.01 of 24 tokens is all or none"):
        build_routing(TrainingConfig(route=0.01, route_ends=(1, 1)), model)
    with pytest.raises(ValueError, match="training.route=1.0 is out of range"):
        TrainingConfig(route=1.0)
    with pytest.raises(ValueError, match="training.route_full_steps=9 is out of range"):
        TrainingConfig(steps=8, route_full_steps=9)


def test_sparse_guidance_extrapolates_from_the_routed_prediction(trained):
    from fastdit.sampling import load_pipeline

    sparse = ["sampling.route=0.5", "sampling.cfg_scale=2", "training.route=0.5", "training.route_ends=[1,1]",
              "sampling.sampler=euler", "sampling.steps=1"]  # fmt: skip
    pipeline = load_pipeline(trained, sparse)
    labels = torch.tensor([1, 2, 3])
    seen = []
    x_0 = pipeline.latents([4, 5, 6], labels, 0, on_step=lambda t, x_t, p: seen.append((x_t, p.velocity)))
    assert pipeline.model.route is None
    [(x_1, velocity)] = seen
    strong = pipeline.inference(x_1, torch.zeros(3), labels)  # SiT's clock: 0 is noise
    routes = [velocity_of(pipeline, x_1, labels, [4, 5, 6])]
    expected = routes[0] + 2 * (-strong[:, :4] - routes[0])
    torch.testing.assert_close(velocity, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(x_0, x_1 - velocity, rtol=1e-4, atol=1e-5)
    one = pipeline.latents([5], labels[1:2], 0)  # an image does not depend on its batch
    torch.testing.assert_close(one[0], x_0[1], rtol=1e-4, atol=1e-5)
    for wrong, words in ((["sampling.route=1"], "sampling.route=1.0 is out of range"),
                         (["sampling.route=0.5"], "needs a run that was trained with training.route"),
                         ([*sparse, "sampling.cfg_scale=1"], "sampling.route=0.5 changes nothing at cfg_scale=1"),
                         ([*sparse, "training.route_ends=[2,4]"], r"route_ends=\[2, 4\] leave none of 4 blocks"),
                         ([*sparse, "sampling.weak_checkpoint=x"], "both give the prediction")):
        with pytest.raises(ValueError, match=words):
            load_pipeline(trained, wrong).latents([0], labels[:1], 0)


def velocity_of(pipeline, x_1, labels, indices) -> torch.Tensor:
    """The velocity with the tokens that Sparse Guidance draws first for these images."""
    from fastdit.distributed import ImageRandom, seed_of

    model = pipeline.model
    order = ImageRandom([seed_of(seed_of(0, i), 2) for i in indices])(torch.empty(len(indices), model.patches))
    model.route = Route(1, 3, random_tokens(order, 0.5, model.patches, model.tokens))
    try:
        return -pipeline.inference(x_1, torch.zeros(len(indices)), labels)[:, :4]
    finally:
        model.route = None
