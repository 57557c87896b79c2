"""Every fused op against its definition: on a GPU if there is one, else in Triton's interpreter on the CPU."""

import dataclasses
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from fastdit import kernels
from fastdit.kernels import OPS, rope_2d, runtime
from fastdit.kernels.tiles import sum_chunks
from helpers.kernels import DEVICE, DTYPES, cast, compare, run, strided

# the interpreter is slow: there, all shapes but the first run in fp32 only
CASES = [
    (name, shape, dtype)
    for name, op in OPS.items()
    for index, shape in enumerate(op.shapes)
    for dtype in (DTYPES if index == 0 or DEVICE == "cuda" else DTYPES[:1])
]


@pytest.mark.parametrize("name, shape, dtype", CASES, ids=[f"{n}-{'x'.join(map(str, s))}-{d}" for n, s, d in CASES])
def test_as_exact_as_eager(name: str, shape: tuple, dtype: torch.dtype) -> None:
    assert not compare(OPS[name], OPS[name].inputs(shape, dtype, DEVICE, seed=len(shape)))


@pytest.mark.parametrize("how", ["offset", "transposed"])
@pytest.mark.parametrize("name", OPS)
def test_reads_views(name: str, how: str) -> None:
    op = OPS[name]
    assert not compare(op, strided(op.inputs(op.shapes[0], torch.float32, DEVICE), how))


VARIANTS = [(name, changes) for name, op in OPS.items() for changes in op.variants]


@pytest.mark.parametrize("name, changes", VARIANTS, ids=[f"{n}-{'-'.join(c)}" for n, c in VARIANTS])
def test_options(name: str, changes: dict) -> None:
    op = OPS[name]
    assert not compare(op, op.inputs(op.shapes[0], torch.float32, DEVICE) | changes)


@pytest.mark.parametrize("chunks", [0, 1, 3, 16, 130])
def test_partial_sums_add_up(chunks: int) -> None:
    """One tile of chunks or several (130 = 64 + 64 + 2), in wide and in narrow blocks of columns."""
    partial = torch.randn(2, chunks, 2, 145, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    for dtype in DTYPES:
        torch.testing.assert_close(sum_chunks(partial, dtype), partial.double().sum(1).to(dtype), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("used", [0, 1])
def test_one_of_two_outputs_unused(used: int) -> None:
    op = OPS["gate_residual_adaln"]
    only = dataclasses.replace(
        op, eager=lambda **kw: op.eager(**kw)[used] * 2, triton=lambda **kw: op.triton(**kw)[used] * 2
    )
    kwargs = op.inputs(op.shapes[0], torch.float32, DEVICE)
    if used == 0:  # shift and scale are not used
        kwargs |= {name: kwargs[name].detach() for name in ("shift", "scale")}
    assert not compare(only, kwargs)


def test_residual_stream_wider_than_the_branch() -> None:
    """As under autocast: x and x' in fp32; the branch, h and their gradients in fp16."""
    op = OPS["gate_residual_adaln"]
    kwargs = op.inputs(op.shapes[0], torch.float16, DEVICE)
    kwargs["x"] = kwargs["x"].detach().float().requires_grad_()
    x, h = op.triton(**kwargs)
    assert (x.dtype, h.dtype) == (torch.float32, torch.float16)
    assert not compare(op, kwargs)


def test_rotated_products_depend_only_on_the_distance() -> None:
    """The rotary table in closed form: a rotated query times a rotated key depends on the difference of positions."""
    cos, sin = rope_2d(5, 7, 16)
    qkv = torch.randn(16, generator=torch.Generator().manual_seed(0)).expand(1, 35, 3, 1, 16)
    q, k, _ = OPS["qk_norm_rope"].eager(qkv, cos=cos, sin=sin)
    scores = (q[0, 0] @ k[0, 0].T).view(5, 7, 5, 7)
    torch.testing.assert_close(scores[0, 0, 2, 3], scores[1, 3, 3, 6])
    torch.testing.assert_close(scores[2, 1, 1, 0], scores[4, 6, 3, 5])
    assert abs(scores[0, 0, 2, 3] - scores[0, 0, 3, 2]) > 1e-3


@pytest.mark.parametrize("name", OPS)
def test_empty_batch(name: str) -> None:
    op = OPS[name]
    kwargs = op.inputs((0, *op.shapes[0][1:]), torch.float32, DEVICE)
    eager, fused = (run(fn, cast(kwargs)) for fn in (op.eager, op.triton))
    for key, value in eager.items():
        assert torch.equal(fused[key], value), key


@pytest.mark.parametrize("name", OPS)
def test_two_runs_give_the_same_bits(name: str) -> None:
    op = OPS[name]
    kwargs = op.inputs(op.shapes[0] if DEVICE == "cuda" else op.tiny, torch.float32, DEVICE)
    first, second = (run(op.triton, cast(kwargs)) for _ in range(2))
    for key, value in first.items():
        assert torch.equal(second[key], value), key


@pytest.mark.parametrize("name", OPS)
def test_gradient_of_the_definition(name: str) -> None:
    op = OPS[name]
    kwargs = cast(op.inputs(op.tiny, torch.float64, "cpu"))
    leaves = [k for k, v in kwargs.items() if isinstance(v, torch.Tensor) and v.requires_grad]

    def call(*values: torch.Tensor) -> object:
        return op.eager(**kwargs | dict(zip(leaves, values, strict=True)))

    if leaves:
        assert torch.autograd.gradcheck(call, [kwargs[k] for k in leaves], fast_mode=True)


class Calls(torch.utils._python_dispatch.TorchDispatchMode):
    """Keeps the arguments of each of our registered ops."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[object, tuple] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastdit":
            self.calls[func] = args
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("name", [name for name, op in OPS.items() if any(op.writes)])
def test_registration(name: str) -> None:
    op = OPS[name]
    with Calls() as seen:
        run(op.triton, cast(op.inputs(op.tiny, torch.float32, DEVICE)))
    assert seen.calls
    for func, args in seen.calls.items():
        grads = torch._library.custom_ops.OPDEFS[func.name()]._backward_fn is not None
        args = [a.detach().requires_grad_(grads and a.is_floating_point()) if torch.is_tensor(a) else a for a in args]
        torch.library.opcheck(func, tuple(args))


# ---- the choice


def test_eager_on_cpu_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not runtime.use_triton("adaln", "cpu", torch.float32)
    monkeypatch.setenv("FASTDIT_KERNELS", "fast")
    with pytest.raises(ValueError, match="FASTDIT_KERNELS='fast' is unknown; use one of auto, triton, eager"):
        runtime.use_triton("adaln", "cpu", torch.float32)
    monkeypatch.setenv("FASTDIT_KERNELS", "triton")
    with pytest.raises(ValueError, match="triton is impossible for adaln: no kernel for torch.float64"):
        runtime.use_triton("adaln", "cpu", torch.float64)


def test_the_choice_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDIT_KERNELS", "eager")
    assert runtime.choice() == "eager (FASTDIT_KERNELS=eager)"
    monkeypatch.setenv("FASTDIT_KERNELS", "triton")
    assert runtime.choice() == "triton"
    monkeypatch.delenv("FASTDIT_KERNELS")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert runtime.choice() == "eager (no GPU)"


def test_triton_on_cpu_raises_without_the_interpreter() -> None:
    code = (
        "import torch\nfrom fastdit.kernels import OPS, adaln\n"
        "kwargs = OPS['adaln'].inputs((1, 2, 8), torch.float32)\n"
        "try:\n    adaln(**kwargs)\nexcept ValueError as error:\n    print(error)"
    )
    env = os.environ | {"FASTDIT_KERNELS": "triton", "TRITON_INTERPRET": "0"}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert out.startswith("FASTDIT_KERNELS=triton is impossible for adaln: no GPU, and TRITON_INTERPRET=1 was not set")


def test_imports_and_computes_without_triton() -> None:
    code = (
        "import sys\nsys.modules['triton'] = None\nimport torch\nfrom fastdit.kernels import OPS\n"
        "for op in OPS.values():\n    op.public(**op.inputs(op.tiny, torch.float32))\nprint('done')"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out == "done\n"


def test_wrong_shapes_are_named() -> None:
    kwargs = OPS["adaln"].inputs((2, 3, 8), torch.float32)
    with pytest.raises(ValueError, match=r"shift has shape \(2, 4\); give it \(2, 8\)"):
        OPS["adaln"].public(**kwargs | {"shift": kwargs["shift"][:, :4]})


@pytest.mark.parametrize("name", ["gelu_linear", "swiglu_linear"])
def test_the_activation_is_not_kept(name: str) -> None:
    op = OPS[name]
    kept = {}
    for which in ("eager", "triton"):
        kwargs = op.inputs((2, 8, 64), torch.float32, DEVICE)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x):
            getattr(op, which)(**kwargs)
        kept[which] = sum(sizes)
    inputs = sum(kwargs[k].numel() for k in ("x", "bias", "weight"))
    assert kept["triton"] == inputs
    assert kept["eager"] >= inputs - kwargs["bias"].numel() + 2 * 8 * 64


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("mode", ["eager", "triton"])
def test_adamw_ema_follows_torch(monkeypatch: pytest.MonkeyPatch, mode: str, aligned: bool) -> None:
    """Over several steps, one of them skipped; tensors of any size, also as views that are not 16-byte aligned."""
    monkeypatch.setenv("FASTDIT_KERNELS", mode)
    rng = torch.Generator().manual_seed(0)
    sizes = ((16, 8), (1024,), (2, 40, 24)) if aligned else ((1,), (1025,), (7, 3), (5000,))

    def draw() -> list[torch.Tensor]:
        flat = torch.randn(sum(map(math.prod, sizes)) + 4, generator=rng).to(DEVICE)[0 if aligned else 3 :]
        parts = flat.split([*map(math.prod, sizes), len(flat) - sum(map(math.prod, sizes))])
        return [part.view(size) for part, size in zip(parts, sizes, strict=False)]

    params, emas, states = draw(), draw(), [[torch.zeros_like(t) for t in draw()] for _ in range(2)]
    theirs = [torch.nn.Parameter(param.clone()) for param in params]
    averages = [ema.clone() for ema in emas]
    optimizer = torch.optim.AdamW(theirs, lr=0.01, betas=(0.8, 0.99), eps=1e-6, weight_decay=0.3)
    copies = [torch.zeros_like(param, dtype=torch.bfloat16) for param in params]
    scalars = {"lr": 0.01, "ema_weight": 0.1, "grad_scale": 0.5}
    scalars = {name: torch.tensor(value, device=DEVICE) for name, value in scalars.items()}
    options = scalars | {"betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.3}
    done = 0
    for step in range(8):
        skip = step == 3
        grads = [2 * grad.view_as(grad) for grad in draw()]
        if skip:
            grads[1].view(-1)[0] = torch.nan
        done += not skip
        before = [tensor.clone() for row in (params, *states, emas, copies) for tensor in row]
        OPS["adamw_ema"].public(
            params, grads, *states, emas, copies, torch.tensor(float(done), device=DEVICE),
            skip=torch.tensor(skip, device=DEVICE), **options,
        )  # fmt: skip
        if skip:
            after = [tensor for row in (params, *states, emas, copies) for tensor in row]
            assert all(map(torch.equal, before, after))
            continue
        for parameter, grad in zip(theirs, grads, strict=True):
            parameter.grad = grad / 2
        optimizer.step()
        for parameter, average in zip(theirs, averages, strict=True):
            average.lerp_(parameter.detach(), 0.1)
        for ours, expected in ((params, theirs), (emas, averages)):
            torch.testing.assert_close(ours, [tensor.detach() for tensor in expected], rtol=1e-5, atol=1e-6)
    if DEVICE == "cuda" or mode == "eager":  # the interpreter truncates when it converts to bf16
        assert all(torch.equal(copy, param.bfloat16()) for copy, param in zip(copies, params, strict=True))


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_adamw_ema_keeps_or_takes_the_weights_exactly(monkeypatch: pytest.MonkeyPatch, weight: float) -> None:
    monkeypatch.setenv("FASTDIT_KERNELS", "triton")
    kwargs = OPS["adamw_ema"].inputs((1000,), torch.float32, DEVICE)
    before = kwargs["emas"][0].clone()
    kernels.adamw_ema(**kwargs | {"ema_weight": torch.tensor(weight, device=DEVICE), "copies": None})
    assert torch.equal(kwargs["emas"][0], kwargs["params"][0] if weight else before)


def test_adamw_ema_names_what_is_wrong() -> None:
    kwargs = OPS["adamw_ema"].inputs((4, 6), torch.float32)
    halves = [ema.half() for ema in kwargs["emas"]]
    wrong = {
        "emas has 1 tensors; give it 2": {"emas": kwargs["emas"][:1]},
        r"grads\[1\] has shape \(2, 3\); give it \(6,\)": {
            "grads": [kwargs["grads"][0], kwargs["grads"][1].view(2, 3)]
        },
        r"emas\[0\] has dtype torch.float16; it must be torch.float32": {"emas": halves},
        r"grads\[1\] has dtype torch.float16; it must be torch.float32": {
            "grads": [kwargs["grads"][0], kwargs["grads"][1].half()]
        },
    }
    for message, change in wrong.items():
        with pytest.raises(ValueError, match=message):
            kernels.adamw_ema(**kwargs | change)


# ---- under torch.compile


def block(x, modulation, qkv, q_weight, k_weight, cos, sin, proj, fc1, fc1_bias, fc2, bias, gates):
    """A block that uses each op where a model would."""
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.chunk(6, dim=1)
    n, t, d = x.shape
    h = kernels.adaln(x, shift_a, scale_a)
    packed = F.linear(h, qkv).view(n, t, 3, 2, d // 2)
    q, k, v = kernels.qk_norm_rope(packed, q_weight, k_weight, cos, sin)
    branch = kernels.attention(q, k, v).transpose(1, 2) + kernels.attention_packed(packed)
    x, h = kernels.gate_residual_adaln(x, F.linear(branch.flatten(2), proj), gate_a, shift_m, scale_m, bias)
    branch = kernels.gelu_linear(F.linear(h, fc1), fc1_bias, fc2) + F.linear(kernels.gelu(F.linear(h, fc1)), fc2)
    branch = branch + F.linear(kernels.swiglu(F.linear(h, gates)), fc2) + kernels.swiglu_linear(
        F.linear(h, gates), None, fc2
    )
    return kernels.gate_residual_adaln(x, branch, gate_m, shift_a, scale_a, bias)[1]


def block_arguments() -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    shapes = [(2, 6, 16), (2, 96), (48, 16), (8,), (8,), (16, 16), (32, 16), (32,), (16, 32), (16,), (64, 16)]
    made = [(torch.randn(s, generator=rng) / (4 if len(s) == 2 else 1)).to(DEVICE).requires_grad_() for s in shapes]
    cos, sin = (table.to(DEVICE) for table in rope_2d(2, 3, 8))
    return [*made[:5], cos, sin, *made[5:]]


BACKEND = "inductor" if DEVICE == "cuda" else "aot_eager"  # Inductor cannot compile interpreted kernels


@pytest.mark.parametrize("mode, backend", [("auto", "inductor"), ("triton", BACKEND)])
def test_a_block_of_all_ops_compiles_whole(monkeypatch: pytest.MonkeyPatch, mode: str, backend: str) -> None:
    arguments = block_arguments()
    leaves = [a for a in arguments if a.requires_grad]

    def run_block(fn) -> list[torch.Tensor]:
        out = fn(*arguments)
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    monkeypatch.setenv("FASTDIT_KERNELS", "eager")
    expected = run_block(block)
    monkeypatch.setenv("FASTDIT_KERNELS", mode)
    torch.compiler.reset()
    for fn in (block, torch.compile(block, fullgraph=True, backend=backend)):
        for ours, theirs in zip(run_block(fn), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)


@pytest.mark.skipif(DEVICE != "cuda", reason="a CUDA graph needs a GPU")
def test_adamw_ema_in_a_cuda_graph() -> None:
    """Captured once and replayed with another step, rate and weight, after gradients that the capture allocated and
    freed, and after other tensors were updated: equal to a new call."""
    ours, theirs = (OPS["adamw_ema"].inputs((1, 5000, 1024), torch.float32, DEVICE) for _ in range(2))
    source, grads = ours["grads"], [grad.clone() for grad in theirs["grads"]]
    for kwargs in (ours, theirs):
        kernels.adamw_ema(**kwargs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernels.adamw_ema(**ours | {"grads": [2 * grad for grad in source]})
    for kwargs in (ours, theirs):
        kwargs["step"].fill_(9)
        kwargs["lr"].fill_(0.01)
        kwargs["ema_weight"].fill_(0.5)
    kernels.adamw_ema(**OPS["adamw_ema"].inputs((1, 5000, 1024), torch.float32, DEVICE))
    for _ in range(2):
        graph.replay()
        kernels.adamw_ema(**theirs | {"grads": [2 * grad for grad in grads]})
    for name in ("params", "exp_avgs", "exp_avg_sqs", "emas", "copies"):
        assert all(map(torch.equal, ours[name], theirs[name])), name


def test_planted_bugs_are_caught() -> None:
    """One of each sort; `python tests/kernels/mutate.py` plants all of them."""
    script = os.path.join(os.path.dirname(__file__), "mutate.py")
    done = subprocess.run([sys.executable, script, "--fast"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 missed" in done.stdout
