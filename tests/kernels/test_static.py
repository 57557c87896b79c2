"""Every kernel, built for sm_80, sm_90 and sm_100 without a GPU: no spills, wide accesses, few bytes too many."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import ROOT

pytest.importorskip("triton")
BENCH = [sys.executable, "-m", "bench.static.kernels", "--out"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """The static table; in its own process, since this one's kernels are interpreted."""
    out = tmp_path_factory.mktemp("static")
    env = os.environ | {"TRITON_INTERPRET": "0"}
    subprocess.run([*BENCH, out], env=env, cwd=ROOT, check=True, capture_output=True)
    return [json.loads(line) for line in (out / "kernels_static.jsonl").read_text().splitlines()]


def test_every_op_is_built_for_every_target(rows: list[dict]) -> None:
    from fastdit.kernels import OPS

    expected = {(name, shape, sm) for name, op in OPS.items() for shape in op.real for sm in (80, 90, 100)}
    assert {(r["op"], tuple(r["shape"]), r["sm"]) for r in rows} == expected


def test_nothing_spills(rows: list[dict]) -> None:
    assert [r for r in rows if r["spills"]] == []


def test_accesses_are_wide(rows: list[dict]) -> None:
    """16 bytes a thread for the bulk of the bytes (a width like 1152 = 1024 + 128 leaves a ninth to narrower ones)."""
    limits = {"sum_chunks": 0.75}
    narrow = [r for r in rows if r["wide"] < limits.get(r["kernel"], 0.83)]
    split = [r for r in rows if r["wide_found"] < r["wide_expected"]]  # the layout promised, the SASS did not keep
    assert (narrow, split) == ([], [])


def test_enough_warps_stay_resident(rows: list[dict]) -> None:
    assert [r for r in rows if r["warps_per_sm"] < 8] == []


def test_bytes_are_near_the_minimum(rows: list[dict]) -> None:
    """Attention reads keys and values once a block of queries, from the L2 cache; the rotary tables are fp32."""
    limits = {"attention": 4, "attention_packed": 4, "qk_norm_rope": 1.1}
    assert [(r["op"], r["shape"], r["ratio"]) for r in rows if not 1 <= r["ratio"] <= limits.get(r["op"], 1.05)] == []


WRITES = {  # per launch, forward then backward
    "adaln": [["h", "stats"], ["d_x", "partial"], ["out"]],
    "gate_residual_adaln": [["x_out", "h", "stats"], ["d_x", "d_branch", "partial"], ["out"]],
    "gate_residual": [["x_out"], ["d_branch", "partial"], ["out"]],
    "gelu": [["y"], ["d_x", "partial"], ["out"]],
    "swiglu": [["y"], ["d_x", "partial"], ["out"]],
    "gelu_linear": [["y"], ["d_x", "y", "partial"], ["out"]],
    "swiglu_linear": [["y"], ["d_x", "y", "partial"], ["out"]],
    "adamw_ema": [["param", "exp_avg", "exp_avg_sq", "ema", "copy"]],
    "qk_norm_rope": [["q", "k"], ["d_qkv", "partial"], ["out"]],
    "attention": [["out", "lse"], ["delta", "d_qkv"], ["d_qkv"]],
    "attention_packed": [["out", "lse"], ["delta", "d_qkv"], ["d_qkv"]],
}


def test_the_compiler_sees_the_kernels_and_what_they_write() -> None:
    """Inside torch.compile the launches lie open, in one graph, and no input is taken for written (and copied)."""
    script = Path(__file__).with_name("trace.py")
    env = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert {line["op"]: line["written"] for line in lines} == WRITES
    assert not any(line["opaque"] for line in lines)
