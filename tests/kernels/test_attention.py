"""Both forms of attention's backward pass: two kernels, and one that holds a whole head (Hopper, up to 256 tokens)."""

import importlib
import json
import os
import subprocess
import sys

import pytest
import torch

from fastdit.kernels import OPS, runtime
from helpers import ROOT
from helpers.kernels import DEVICE, cast, compare, run

MODULE = importlib.import_module("fastdit.kernels.attention")
OP = OPS["attention_packed"]
KERNELS = {False: ["_attention_backward_q", "_attention_backward_kv"], True: ["_attention_backward_whole"]}
HOPPER = DEVICE == "cpu" or torch.cuda.get_device_capability()[0] == 9  # the shared memory that one kernel needs
FORMS = pytest.mark.parametrize("whole", [False, True] if HOPPER else [False])


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels that were launched."""
    names, launch = [], runtime.wrap_triton._launch

    def keep(self, *args, **kwargs):
        names.append(self.kernel.__name__)
        launch(self, *args, **kwargs)

    monkeypatch.setattr(runtime.wrap_triton, "_launch", keep)
    return names


@FORMS
@pytest.mark.parametrize("head_dim", [64, 72])
@pytest.mark.parametrize("tokens", [41, 96, 250, 256])
def test_both_forms_are_as_exact_as_eager_and_repeat_their_bits(monkeypatch, launched, whole, tokens, head_dim):
    monkeypatch.setattr(MODULE, "_whole", lambda gpu, q: whole)
    kwargs = OP.inputs((2, 2, tokens, head_dim), torch.float16, DEVICE, seed=tokens)
    assert not compare(OP, kwargs)
    launched.clear()
    first, second = (run(OP.triton, cast(kwargs)) for _ in range(2))
    assert launched == 2 * ["_attention_forward", *KERNELS[whole]]
    assert all(torch.equal(second[key], value) for key, value in first.items())


@FORMS
def test_padding_cannot_outweigh_very_negative_scores(monkeypatch, whole):
    """A key past the end has score 0; relative to scores of -300 (base 2) its probability would be infinite."""
    monkeypatch.setattr(MODULE, "_whole", lambda gpu, q: whole)
    qkv = OP.inputs((1, 2, 41, 72), torch.float16, DEVICE)["qkv"].detach()
    qkv[:, :, 0] += 5
    qkv[:, :, 1] -= 5
    assert not compare(OP, {"qkv": qkv.requires_grad_()})


def test_the_form_follows_from_gpu_dtype_and_shape(monkeypatch):
    monkeypatch.setattr(MODULE, "WHOLE_FITS", True)

    def whole(gpu=(9, 0), dtype=torch.bfloat16, tokens=256, head_dim=72):
        return MODULE._whole(gpu, torch.empty(2, 2, tokens, head_dim, dtype=dtype, device="meta"))

    assert whole() and whole(dtype=torch.float16) and whole(head_dim=64) and whole(tokens=192) and whole(tokens=96)
    assert not any([whole(gpu=(8, 0)), whole(gpu=(10, 0)), whole(dtype=torch.float32), whole(tokens=257),
                    whole(tokens=250), whole(head_dim=96), whole(head_dim=32)])  # fmt: skip
    monkeypatch.setattr(MODULE, "WHOLE_FITS", False)  # a compiler that would spill
    assert not whole()


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU is what it is")
@pytest.mark.parametrize("gpu", [(8, 0), (9, 0), (10, 0)])
def test_the_op_launches_that_form(monkeypatch, launched, gpu):
    monkeypatch.setattr(runtime, "ABSENT_GPU", gpu)
    run(OP.triton, cast(OP.inputs((1, 2, 41, 72), torch.float16)))
    assert launched == ["_attention_forward", *KERNELS[gpu[0] == 9]]


STATIC = """
import importlib, json, triton
module = importlib.import_module("fastdit.kernels.attention")
fits, module.WHOLE_FITS = module.WHOLE_FITS, True
from bench.static.kernels import OPS, rows_of
rows = [row for row in rows_of({"attention_packed": OPS["attention_packed"]}) if row["pass"] == "backward"]
print(json.dumps({"fits": fits, "rows": rows}))
"""


def test_one_kernel_is_built_for_hopper_alone_and_fits():
    """In shared memory with any version of Triton, in registers with those that use it; tensor cores as on Hopper."""
    env = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", STATIC], env=env, cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    kernels = {sm: [row["kernel"] for row in found["rows"] if row["sm"] == sm] for sm in (80, 90, 100)}
    two, one = ([name.lstrip("_") for name in KERNELS[whole]] for whole in (False, True))
    assert kernels == {80: two, 90: one, 100: two}
    (row,) = (row for row in found["rows"] if row["sm"] == 90)
    assert row["hgmma"] > 0 and row["shared"] <= 227 * 1024 and row["ratio"] <= OP.most_bytes
    assert row["spills"] == 0 or not found["fits"]
