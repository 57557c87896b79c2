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


def test_the_gpu_run_hangs_and_fails_part_by_part(tmp_path):
    """bench/gpu.sh with a python that hangs on one part and fails on another: the others run, all ends up in OUT."""
    python = tmp_path / "python"
    python.write_text(f"""#!/bin/sh
case "$*" in
    *bench.sample*) sleep 1000 ;;
    *bench.static.kernels*) exit 3 ;;
    *cuda*) exit 1 ;;
    *) echo "ran $*"; echo '{{"bench": 1}}' >> {tmp_path}/out/results.jsonl; echo table > {tmp_path}/out/step.md ;;
esac
""")
    python.chmod(0o755)
    done = subprocess.run(
        ["bash", str(ROOT / "bench/gpu.sh"), str(tmp_path / "out"), "--rehearse", "sample", "kernels", "step"],
        env={**ENVIRONMENT, "PYTHON": str(python), "LIMITS": "sample 1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and "failed: sample(124) kernels(3)" in done.stdout
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"log.txt", "results.jsonl", "report.md"}
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "=== step took" in log and "ran -m bench.step" in log
    assert (tmp_path / "out" / "report.md").read_text() == "table\n"


def test_the_time_limits_of_a_call_stay_under_nine_minutes():
    script = (ROOT / "bench/gpu.sh").read_text()
    words = re.findall(r"LIMIT=\((attention 60 [^)]*)\)", script)[0].split()
    limits = dict(zip(words[::2], map(int, words[1::2]), strict=True))
    parts = re.search(r"PARTS=\((attention [^)]*)\)", script)[1].split()
    assert sum(limits[part] for part in parts) == 535 and "at most 535 s" in script
    assert limits["ablation"] < 540 and limits["small-batch"] + limits["engines"] < 540
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
