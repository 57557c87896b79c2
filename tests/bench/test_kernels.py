"""`python -m bench.kernels` and its attention table: what they write when time ends early or a backend fails."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench.kernels import __main__ as kernels
from bench.kernels import attention
from bench.step.cases import FP8
from fastdit.kernels import OPS


def lines_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """attention.py as on a GPU whose backends take the milliseconds of the returned dict; each costs one second."""
    backends, now = {"sdpa": 3.0, "sdpa-flash": 2.0, "triton": 4.0}, [0.0]

    def ms(name, shape, deadline, out):
        if now[0] > deadline:
            raise TimeoutError
        now[0] += 1
        return backends.get(name)

    monkeypatch.setattr(attention, "milliseconds", ms)
    monkeypatch.setattr(attention, "MEASURED", tmp_path / "attention.json")
    monkeypatch.setattr(attention.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *device: "GPU")
    monkeypatch.setattr(sys, "argv", ["attention"])
    return backends


def test_attentions_table_holds_every_shape_that_was_done_when_time_ended(gpu, monkeypatch, tmp_path):
    (tmp_path / "attention.json").write_text('{"GPU d64 t256": "sdpa", "another": "eager"}')
    each = len(attention.ATTENTION) - 1  # seconds a shape: all backends but the CPU's
    monkeypatch.setattr(sys, "argv", ["attention", "--budget-s", str(each + 2)])
    with pytest.raises(SystemExit, match="was used up"):
        attention.main()
    table = json.loads((tmp_path / "attention.json").read_text())
    assert table == {"GPU d72 t256": "sdpa-flash", "GPU d64 t256": "sdpa", "another": "eager"}


def test_the_cpus_attention_is_never_a_gpus(gpu, tmp_path):
    gpu["cpu"] = 0.1
    attention.main()
    table = json.loads((tmp_path / "attention.json").read_text())
    assert len(table) == len(attention.SHAPES) and set(table.values()) == {"sdpa-flash"}


def test_a_backend_that_breaks_is_left_out(monkeypatch, tmp_path):
    pytest.importorskip("triton")
    monkeypatch.setattr(attention, "obstacle", lambda *args, **kwargs: None)
    shape = attention.SHAPES[0]
    for wrong in (float("nan"), ImportError("undefined symbol\nand more")):

        def error(*args, wrong=wrong):
            if isinstance(wrong, Exception):
                raise wrong
            return wrong

        monkeypatch.setattr(attention, "error", error)
        assert attention.milliseconds("triton", shape, float("inf"), tmp_path) is None
    with pytest.raises(TimeoutError):
        attention.milliseconds("triton", shape, 0.0, tmp_path)
    assert [line["skipped"] for line in lines_of(tmp_path)] == ["error nan", "ImportError: undefined symbol"]


def test_an_op_that_fails_and_a_peer_that_is_missing_leave_the_others_their_times(monkeypatch, tmp_path):
    def peer():
        raise ImportError("No module named 'liger_kernel'")

    def correct(op, shape):
        if op.name == "swiglu":
            raise RuntimeError("out of resource: shared memory")
        return []

    ops = {name: SimpleNamespace(name=name, real=[(1,)], inputs=lambda *a: {}, minimum_bytes=lambda *a: (1e6, 1e6),
                                 triton=None, eager=lambda: None) for name in ("swiglu", "adaln")}  # fmt: skip
    monkeypatch.setattr(kernels, "correct", correct)
    monkeypatch.setattr(kernels, "copy_gbps", lambda ms: 1000.0)
    monkeypatch.setattr(kernels, "timed", lambda fn, kwargs, ms: {"forward": (1.0, 1.0, 1.0)})
    monkeypatch.setitem(kernels.PEERS, "adaln", {"liger": peer, "apex": lambda: None})
    monkeypatch.setattr(kernels, "calls_of_step", lambda overrides, device: {"adaln": 2 + (FP8[0] in overrides)})
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    with torch._functorch.config.patch(donated_buffer=True):  # the bench sets it
        kernels.run_all(list(ops.values()), 100.0, 1.0, tmp_path)
    lines = lines_of(tmp_path)
    assert lines[0]["op"] == "swiglu" and "shared memory" in lines[0]["failed"][0]
    assert [line["contestant"] for line in lines[1:]] == ["fastdit", "eager", "compiled", "liger", "apex"]
    assert "liger_kernel" in lines[4]["failed"][0] and lines[5]["ms"] == 1.0
    assert lines[1]["calls"] == {"bf16": 2, "fp8": 3} == lines[1]["step_ms"] and len(lines) == 6
    table = (tmp_path / "kernels.md").read_text()
    assert "| adaln | 1 | forward | 1.0 | 1.0 | 1.0 | 1.0 | 0.1 % | 2.0, 3.0 |" in table


def test_both_ways_are_timed_on_several_sets_of_inputs_in_turn(monkeypatch):
    op, seen = OPS["gelu"], []

    def measure(calls, ms):
        seen.append([call() for call in calls])
        return 1.0, 1.0, 1.0

    monkeypatch.setattr(kernels, "measure", measure)
    kwargs = op.inputs(op.shapes[0], torch.float32, "cpu")
    monkeypatch.setattr(kernels, "INPUTS", 3 * sum(value.nbytes for value in kwargs.values()))
    assert list(kernels.timed(op.eager, kwargs, 1.0)) == ["forward", "backward"]
    forward, backward = seen
    assert len({out.data_ptr() for out in forward}) == 3 == len(backward)
    assert all(torch.equal(out, forward[0]) for out in forward) and len(backward[0]) == len(kwargs)


def test_the_calls_of_a_step_are_counted_on_the_network():
    """DiT-XL/2 has 28 blocks of two branches; a branch joins the stream in the next addition and norm."""
    found = kernels.calls_of_step(["training.residual=bf16"], "cpu")
    assert {name: found[name] for name in ("adaln", "gate_residual_adaln", "gelu")} == {
        "adaln": 1, "gate_residual_adaln": 56, "gelu": 28
    }  # fmt: skip
