"""Every kernel, built for sm_80, sm_90 and sm_100 without a GPU: no spills, wide accesses, near the minimum bytes."""

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
    """The static table, from another process, because kernels are interpreted in this one."""
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
    """16 bytes per thread for most of the bytes (of a row of 1152 = 1024 + 128, a ninth moves in narrower accesses)."""
    limits = {"sum_chunks": 0.75}
    narrow = [r for r in rows if r["wide"] < limits.get(r["kernel"], 0.83)]
    split = [r for r in rows if r["wide_found"] < r["wide_expected"]]  # in the layout, but not in the SASS
    assert (narrow, split) == ([], [])


def test_enough_warps_stay_resident(rows: list[dict]) -> None:
    assert [r for r in rows if r["warps_per_sm"] < 8] == []


def test_bytes_are_near_the_minimum(rows: list[dict]) -> None:
    from fastdit.kernels import OPS

    far = [(r["op"], r["shape"], r["ratio"]) for r in rows if not 1 <= r["ratio"] <= OPS[r["op"]].most_bytes]
    assert far == []


def test_the_compiler_sees_the_kernels_and_what_they_write() -> None:
    """torch.compile sees the launches, in one graph, and takes no input for an output (which it would copy)."""
    from fastdit.kernels import OPS

    script = Path(__file__).with_name("trace.py")
    env = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    expected = {(name, False): list(map(list, op.writes)) for name, op in OPS.items() if any(op.writes)}
    expected |= {(name, True): list(map(list, op.writes_hopper)) for name, op in OPS.items() if op.writes_hopper}
    assert {(line["op"], line["hopper"]): line["written"] for line in lines} == expected
    assert not any(line["opaque"] for line in lines)
