"""bench/gpu.sh, and on a GPU what only runs there."""

import re
import subprocess

import pytest
import torch

from bench.sample import __main__ as sample
from bench.step.cases import Case
from bench.step.gate import gate_errors
from bench.step.report import predicted_gib
from bench.step.stacks import build_case
from helpers import ROOT
from helpers.runs import ENVIRONMENT


@pytest.fixture
def gpu_run(tmp_path):
    """bench/gpu.sh with a python of one's own: f(body of its case statement, *arguments, **environment) -> process."""

    def run(cases: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        python = tmp_path / "python"
        python.write_text(f'#!/bin/sh\ncase "$*" in\n{cases}\nesac\n')
        python.chmod(0o755)
        return subprocess.run(
            ["bash", str(ROOT / "bench/gpu.sh"), str(tmp_path / "out"), *arguments],
            env={**ENVIRONMENT, "PYTHON": str(python), **environment}, capture_output=True, text=True,
        )  # fmt: skip

    return run


def test_the_gpu_run_hangs_and_fails_part_by_part(gpu_run, tmp_path):
    """A python that hangs on one part and fails on another: the others run, all ends up in OUT."""
    cases = f"""
    *find_spec*) ;;
    *bench.sample*) sleep 1000 ;;
    *bench.static.kernels*) exit 3 ;;
    *cuda*) exit 1 ;;
    *fill-caches*) echo "strong: compiled beside other work" ;;
    *"-m pytest"*) echo "3 passed in 1 s" ;;
    *) echo "ran $*"; echo '{{"bench": 1}}' >> {tmp_path}/out/results.jsonl; echo table > {tmp_path}/out/step.md
       touch {tmp_path}/out/raw.json ;;"""
    done = gpu_run(cases, "--rehearse", "sample", "kernels", "tests", "step", LIMITS="sample 1")
    assert done.returncode == 2 and "failed: sample(124) kernels(3)" in done.stdout
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"log.txt", "results.jsonl", "report.md", "files.tgz"}  # others are in files.tgz
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "=== step took" in log and "ran -m bench.step" in log
    assert log.index("3 passed") < log.index("compiled beside other work") < log.index("ran -m bench.step")
    assert (tmp_path / "out" / "report.md").read_text() == "table\n"


def test_the_gpu_run_says_what_it_will_do_when_and_what_is_missing(gpu_run):
    cases = "*find_spec*) echo liger_kernel deepspeed ;;\n*) echo ran $* ;;"
    done = gpu_run(cases, "--budget-s", "300", "tests", "smoke", "step", "kernels", "engines")
    plan = done.stdout[done.stdout.index("plan for 300 s") :]
    lines = [re.sub(r" +", " ", line) for line in plan.splitlines()]
    begin = int(re.search(r"tests from second (\d+)", lines[1])[1])  # what came before
    assert lines[1:10] == [
        f" tests from second {begin} to {begin + 90}",
        " WARNING: smoke lacks deepspeed; carry them with --wheels (bench/README.md)",
        " smoke: left out",
        f" step from second {begin + 90} to {begin + 260}",
        " WARNING: kernels lacks liger_kernel; carry them with --wheels (bench/README.md)",
        f" kernels from second {begin + 260} to 300",
        " WARNING: engines lacks deepspeed; carry them with --wheels (bench/README.md)",
        " engines if 60 s are left",
        lines[9],
    ]
    assert "ran -m bench.step --engines" in done.stdout and "bench.smoke" not in done.stdout  # nothing took its time
    assert gpu_run(cases, "speed").returncode == 2


def test_the_gpu_run_ends_within_its_budget(gpu_run):
    done = gpu_run("*find_spec*) ;;\n*) sleep 100 ;;", "--budget-s", "6", "kernels", "attention", LIMITS="kernels 3")
    assert re.search(r"=== kernels took [34] s\n=== attention: left out, [23] s are left", done.stdout), done.stdout


def test_the_parts_that_run_by_default_are_the_ones_it_knows():
    script = (ROOT / "bench/gpu.sh").read_text()
    parts = re.search(r"PARTS=\((tests [^)]*)\)", script)[1].split()
    for name in ("LIMIT", "LEAST"):
        for pairs in re.findall(rf"\b{name}=\((tests [^)]*)\)", script):
            assert pairs.split()[::2] == parts
    limits = dict(zip(*[iter(re.findall(r"LIMIT=\((tests 90 [^)]*)\)", script)[0].split())] * 2, strict=True))
    assert sum(int(limits[part]) for part in parts[:5]) <= 480 - 60  # and the smoke test, if they take all their time
    for file, name in re.findall(r"(tests/[\w/]*test_\w+\.py)(?:::(\w+))?", script):
        assert f"def {name}" in (ROOT / file).read_text(), (file, name)


on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@on_a_gpu
def test_a_network_built_on_the_gpu_has_the_same_tables():
    for overrides in ((), ("model.position=rope",)):
        ours, wanted = (
            dict(build_case(Case("fastdit", "fastdit", "tiny", 4, device, overrides)).model.named_buffers())
            for device in ("cuda", "cpu")
        )
        assert ours.keys() == wanted.keys() and len(ours)
        for name, buffer in ours.items():
            assert buffer.is_cuda
            torch.testing.assert_close(buffer.cpu(), wanted[name], atol=1e-6, rtol=1e-6)


@on_a_gpu
@pytest.mark.parametrize("compiled", ["true", "false"])
@pytest.mark.parametrize("residual", ["fp32", "bf16"])
def test_a_graphed_step_is_the_step_that_it_captured(compiled, residual):
    """Images, labels, seed and learning rate are other ones at every step (bench/step/gate.py)."""
    common = (f"training.compile={compiled}", f"training.residual={residual}")
    graphed, plain = (
        build_case(Case("fastdit", "fastdit", "tiny", 4, "cuda", (*common, f"training.cuda_graph={graph}"))).gate()
        for graph in ("true", "false")
    )
    losses, ways = gate_errors(graphed, plain)
    assert losses < 1e-3 and ways < 0.05


@on_a_gpu
@pytest.mark.parametrize("precision, most", [("fp32", sample.TOLERANCE["cuda"]), ("bf16", 0.05)])
def test_a_graphed_evaluation_is_the_networks(precision, most):
    bench = sample.Bench("DDPM", "tiny", 2, torch.device("cuda"), ())
    truth = bench.reference(sample.GATE_STEPS, "fp32")
    assert sample.difference(bench.fastdit(sample.GATE_STEPS, precision), truth) < most
    assert bench.inferences[precision].graphs


@on_a_gpu
@pytest.mark.parametrize("policy", ["none", "activation", "selective"])
def test_predicted_memory_is_within_a_tenth_of_the_peak(policy):
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    case = Case("peak", "fastdit", "B/2", 64, "cuda", (f"training.activation_checkpointing={policy}",))
    bench = build_case(case)
    for i in range(3):
        torch.cuda.reset_peak_memory_stats()  # of a step when all has been compiled
        bench.step(i)
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30
    assert peak == pytest.approx(predicted_gib(case), rel=0.1)
