"""The bench measures what it says: wrong contestants are caught, failures end alone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers import ROOT

sys.path.append(str(ROOT / "bench"))

import contestants  # noqa: E402
import gate  # noqa: E402
import profiles  # noqa: E402
import report  # noqa: E402
import sample  # noqa: E402
import step  # noqa: E402
from contestants import Case, build_case, fill  # noqa: E402
from gate import Gated, gate_errors  # noqa: E402

from helpers.runs import ENVIRONMENT  # noqa: E402

EAGER = ("training.compile=false",)
CHECKOUT = """
import sys
from torch import nn
sys.path.append({bench!r})
from reference import PlainDiT, torch

class DiT(PlainDiT):  # the constructor and the label dropout of the released models.py
    def __init__(self, input_size, patch_size, in_channels, hidden_size, depth, num_heads, num_classes,
                 class_dropout_prob=0.1, mlp_ratio=4.0, learn_sigma=True):
        super().__init__(input_size, patch_size, in_channels, hidden_size, depth, num_heads, num_classes)
        self.y_embedder.dropout_prob = class_dropout_prob
        self.null = num_classes

    def forward(self, x, t, y):
        if self.training and self.y_embedder.dropout_prob > 0:
            y = torch.where(torch.rand(len(y)) < self.y_embedder.dropout_prob, self.null, y)
        {change}
        return super().forward(x, t, y)
"""


pytestmark = pytest.mark.usefixtures("one_thread")


def checkout(folder: Path, change: str = "pass") -> Path:
    folder.mkdir()
    (folder / "models.py").write_text(CHECKOUT.format(bench=str(ROOT / "bench"), change=change))
    return folder


def tiny(name: str, stack: str, *overrides: str, repo: str = "") -> Case:
    return Case(name, stack, "tiny", 4, "cpu", overrides, repo)


@pytest.fixture(scope="module")
def first():
    """fastdit's gate in fp32, and the oracle's."""
    verdict = build_case(tiny("fastdit", "fastdit", *EAGER, "training.precision=fp32")).gate()
    return verdict, build_case(tiny("oracle", "oracle")).gate()


def objection(verdict, truth) -> str:
    return gate.objection(Gated(verdict, 4, 0.0), gate_errors(verdict, truth))


@pytest.mark.parametrize("stack", ["official", "fast-dit"])
def test_stacks_compute_the_same(first, stack):
    verdict, truth = first
    assert gate_errors(verdict, truth)[0] < 1e-5
    assert not objection(build_case(tiny(stack, stack)).gate(), truth)


@pytest.mark.parametrize("overrides", [(), ("training.residual=bf16",)])
def test_fastdit_in_bf16_passes_within_its_noise(first, overrides):
    verdict = build_case(tiny("fastdit", "fastdit", *EAGER, *overrides)).gate()
    assert verdict.precision == "bf16" and not objection(verdict, first[1])
    assert gate_errors(verdict, first[1])[0] > 1e-5  # it is not fp32 in disguise


def test_the_plain_loss_is_the_recorded_one():
    """golden/ddpm.npz, case learned_range_mse: the referee itself is held to the published numbers."""
    import numpy as np
    from reference import Inputs, PlainDDPM

    golden = np.load(ROOT / "tests/golden/ddpm.npz", allow_pickle=False)
    x_0, noise, output = (torch.from_numpy(golden[key]) for key in ("x_start", "noise", "model_output"))
    inputs = Inputs(x_0, None, torch.from_numpy(golden["t"]), noise)
    losses = PlainDDPM(tables=None).losses(lambda x, t, y: output, inputs)
    torch.testing.assert_close(losses, torch.from_numpy(golden["loss/learned_range_mse/loss"]), atol=1e-5, rtol=1e-5)


def test_the_plain_network_is_the_recorded_one():
    import numpy as np

    golden = np.load(ROOT / "tests/golden/dit.npz", allow_pickle=False)
    config = json.loads(str(golden["config"]))
    keys = ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads", "num_classes")
    model = contestants.PlainDiT(**{key: config[key] for key in keys})
    state = {k.removeprefix("weights/"): torch.from_numpy(golden[k]) for k in golden if k.startswith("weights/")}
    model.load_state_dict(state)
    out = model(*(torch.from_numpy(golden[key]) for key in ("x", "t", "y")))
    torch.testing.assert_close(out, torch.from_numpy(golden["out"]), atol=1e-5, rtol=1e-5)


WRONG = {  # what a stack might get wrong without any error
    "time": "t = t - 1",
    "labels": "y = y.roll(1)",
    "noise": "x = x + 0.02 * torch.randn_like(x)",
    "a bias": "self.blocks[1].mlp.fc2.bias.data.zero_()",
    "a gate": "x = x * 0.99",
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_a_wrong_network_is_caught(first, tmp_path, change):
    repo = str(checkout(tmp_path / "repo", change))
    verdict = build_case(tiny("official", "official", repo=repo)).gate()
    assert "computes something else" in objection(verdict, first[1])


@pytest.mark.parametrize("what", ["no optimiser", "half the rate", "no average"])
def test_a_wrong_step_is_caught(first, what):
    bench = build_case(tiny("official", "official"))
    if what == "no optimiser":
        bench.work.optimizer.step = lambda: None
    elif what == "half the rate":
        right = bench.work.set_lr
        bench.work.set_lr = lambda lr: right(lr / 2)
    else:
        bench.work.average = lambda: None
    assert objection(bench.gate(), first[1])


@pytest.mark.parametrize("what", ["moments", "y", "step", "lr"])
def test_a_graph_that_replays_what_it_was_captured_with_is_caught(first, what):
    bench = build_case(tiny("fastdit", "fastdit", *EAGER))
    right, names, calls = bench.work, ("moments", "y", "step", "lr"), []

    def stale(*given):
        calls.append(dict(zip(names, given, strict=True)))
        if len(calls) > 4:  # three as they are, one captured, then replays
            given = ({**calls[-1], what: calls[3][what]}[name] for name in names)
        return right(*given)

    bench.work = stale
    if what == "lr":  # in bf16, whose own noise is 0.04
        assert gate_errors(bench.gate(), first[1])[1] > 1.5 * gate.TOLERANCE["bf16"][1]
    else:
        with pytest.raises(ValueError, match="step 4 computed on another (x_0|y) than its seed, number and batch say"):
            bench.gate()


def test_half_a_batch_is_the_first_half_of_the_images():
    whole, half = (contestants.host_batches(contestants.SIZES["tiny"], batch, False) for batch in (4, 2))
    for ours, theirs in zip(half, whole, strict=True):
        assert torch.equal(ours[0], theirs[0][:2]) and torch.equal(ours[1], theirs[1][:2])
    assert not torch.equal(whole[0][0], whole[1][0])


def test_weights_are_equal_by_name_and_leave_nothing_silent():
    cases = tiny("fastdit", "fastdit", *EAGER), tiny("official", "official")
    models = [build_case(case).model for case in cases]
    for model in models:
        fill(model)
    (ours, theirs) = (dict(contestants.trained(model)) for model in models)
    assert list(ours) == list(theirs)
    for name, weight in ours.items():
        assert torch.equal(weight, theirs[name]) and weight.abs().max() > 0


def run_step(*arguments: str, code: int = 0) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "bench/step.py"), "--size", "tiny", "--device", "cpu", *arguments, *EAGER]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def test_a_run_writes_table_chart_and_lines(tmp_path):
    out = tmp_path / "out"
    memory = "if len(y) > 2: raise torch.OutOfMemoryError('CUDA out of memory. Tried')"
    repo = checkout(tmp_path / "DiT", memory)  # the released network instead of the plain one, in too little memory
    done = run_step("--contestants", "official", "fastdit", "--turns", "1", "--steps", "2", "--profile",
                    "--reference-repo", str(repo), "--out", str(out), "--")  # fmt: skip
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert lines == [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    official, fastdit = sorted(lines, key=lambda line: line["contestant"] == "fastdit")
    assert (official["contestant"], official["batch"], fastdit["batch"]) == ("official", 2, 4)
    for line in lines:
        for key in "images_per_s steps_per_s tflops of_product product_tflops peak_gib first_step_s".split():
            assert line[key] > 0, key
        assert line["spread"][0] <= line["images_per_s"] <= line["spread"][1] and line["steps"] == 2
        assert line["loss_error"] < 1e-2 and line["hardware"] and line["commit"] and line["date"] and line["torch"]
        assert line["profile_ms"]["GEMM"] > 0 and line["profile_ms"]["gap"] >= 0
    assert fastdit["over"]["official"] == pytest.approx(1 / official["over"]["fastdit"], rel=0.02)
    assert "predicted_gib" not in fastdit  # the peak beside it is the whole process's on a CPU
    table = (out / "step.md").read_text()
    assert table in done.stdout and all(f"**{line['images_per_s']}**" in table for line in lines)
    assert (out / "step.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "trace-fastdit.json.gz").stat().st_size > 1000


def test_a_wrong_or_dying_contestant_is_not_timed_and_the_others_are(tmp_path):
    wrong = checkout(tmp_path / "DiT", WRONG["labels"])
    dying = checkout(tmp_path / "fast-DiT", "import os; os._exit(9)  # checkpoint")
    done = run_step("--turns", "1", "--steps", "1", "--fresh", "--contestants", "official", "fast-dit", "fastdit",
                    "--reference-repo", str(wrong), str(dying), "--", code=1)  # fmt: skip
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    lines = {line["contestant"]: line for line in lines}
    assert "computes something else" in lines["official"]["failed"] and "images_per_s" not in lines["official"]
    assert "ended with 9" in lines["fast-dit"]["failed"]
    assert lines["fastdit"]["images_per_s"] > 0
    assert "computes something else" in done.stdout.split("| contestant")[1]


@pytest.mark.parametrize(
    "arguments, words",
    [(["--reference-repo", "no/such"], "holds no models.py"), (["model.attenton=eager"], "did you mean 'attention'")],
)
def test_mistakes_are_said_in_one_line_before_any_work(monkeypatch, arguments, words):
    monkeypatch.setattr(sys, "argv", ["step.py", "--size", "tiny", *arguments])
    with pytest.raises(SystemExit) as error:
        step.main()
    assert str(error.value).startswith("error: ") and words in str(error.value) and "\n" not in str(error.value)


KERNELS = {
    "attention": [
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4, false, false, bf16>>(Params)",
        "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>", "fmha_cutlassF_bf16_aligned_sm80",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x1x1_kernel0_0",
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_31_64x64x128_1x4x1_kernel0_0",
        "_attention_forward", "_attention_backward_q", "_attention_backward_kv_0",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
    ],
    "GEMM": [
        "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT", "nvjet_hsh_256x128_64x4_1x2_h_bz_coopB_NNT",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_segment_k_off_kernel",
        "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16_128x2_tn_align8>(Params)",
        "void cutlass::device_kernel<at::cuda::detail::enable_3x_kernel_for_sm9x<cutlass::gemm::kernel::GemmUniversal>",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>(Params)", "aten::addmm", "aten::mm",
        "triton_tem_fused_addmm_3", "ampere_sgemm_128x64_tn",
    ],
    "norm": [
        "_adaln_forward", "_adaln_backward", "_gate_residual_adaln_forward_1", "_gate_residual_adaln_backward",
        "_gate_residual_forward", "_gate_residual_backward", "_sum_chunks", "_qk_norm_rope_forward",
        "_qk_norm_rope_backward", "triton_red_fused_native_layer_norm_0", "triton_per_fused_add_native_layer_norm_2",
        "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float, float>(...)",
        "aten::native_layer_norm",
    ],
    "activation": [
        "_gelu_forward", "_gelu_backward_1", "_swiglu_forward", "_swiglu_backward", "triton_poi_fused_gelu_3",
        "triton_poi_fused_addmm_gelu_backward_7", "void at::native::vectorized_elementwise_kernel<4, GeluCUDAKernel>",
    ],
    "optimiser": [
        "_adamw_ema", "aten::_foreach_lerp_",
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<TensorListMetadata<4>, "
        "FusedAdamMathFunctor<float, 4, ADAM_MODE::ADAMW, false>, float const*>",
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<TensorListMetadata<2>, "
        "TernaryOpScalarFunctor<float>, LerpFunctor<float>, float>", "triton_for_fused_lerp_0",
    ],
    "copy": [
        "Memcpy HtoD (Pinned -> Device)", "Memcpy DtoD (Device -> Device)", "Memset (Device)", "aten::copy_",
        "void at::native::elementwise_kernel<128, 4, gpu_kernel_impl_nocast<direct_copy_kernel_cuda(TensorIterator&)>>",
    ],
    "random": [
        "void at::native::(anonymous namespace)::distribution_elementwise_grid_stride_kernel<float, 4, normal>",
        "aten::normal_", "aten::uniform_",
    ],
    "elementwise": [
        "triton_poi_fused_add_addmm_mul_5", "triton_poi_fused__scaled_dot_product_flash_attention_clone_2",
        "triton_red_fused__to_copy_sum_4", "triton_poi_fused__to_copy_1", "triton_red_fused_mm_sum_9",
        "void at::native::vectorized_elementwise_kernel<4, CUDAFunctor_add<float>>", "aten::mul", "_forward", "_update",
        "void at::native::reduce_kernel<512, 1, ReduceOp<float, MeanOps<float, float>>>",
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind", KERNELS)
def test_kinds_of_kernels(kind):
    assert {name: profiles.kind_of(name) for name in KERNELS[kind]} == dict.fromkeys(KERNELS[kind], kind)


def test_kernels_that_overlap_count_once():
    assert profiles.covered([(0, 4), (1, 2), (3, 6), (8, 9)]) == 7


def test_a_table_without_figures_says_why():
    line = {"contestant": "strong", "size": "tiny", "failed": "out of memory: 1 GiB", "hardware": "x", "torch": "2",
            "commit": "c", "date": "d"}  # fmt: skip
    assert "**out of memory: 1 GiB**" in report.table([line])


@pytest.mark.parametrize("name", sample.SAMPLINGS)
def test_both_samplings_make_the_same_latents(name):
    bench = sample.Bench(name, "tiny", 2, torch.device("cpu"), ())
    truth = bench.reference(sample.GATE_STEPS, "fp32")
    assert sample.difference(bench.fastdit(sample.GATE_STEPS, "fp32"), truth) < 1e-5
    assert 1e-5 < sample.difference(bench.fastdit(sample.GATE_STEPS, "bf16"), truth) < 0.05
    assert sample.difference(bench.fastdit(sample.GATE_STEPS + 1, "fp32"), truth) > sample.TOLERANCE["cpu"]


def test_sampling_that_differs_is_not_timed(monkeypatch, tmp_path, capsys):
    right = sample.Bench.fastdit
    monkeypatch.setattr(sample.Bench, "fastdit", lambda self, *a: right(self, *a) * (1.01 if self.whole == 50 else 1))
    arguments = f"sample.py --device cpu --size tiny --batch 2 --turns 1 --samplings Heun DPM-Solver++ --out {tmp_path}"
    monkeypatch.setattr(sys, "argv", arguments.split())
    with pytest.raises(SystemExit, match="Heun differs"):
        sample.main()
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {line["sampler"] for line in lines} == {"DPM-Solver++"} and {line["contestant"] for line in lines} == {
        "plain, fp32", "plain, bf16", "fastdit"
    }  # fmt: skip
    for line in lines:
        assert line["images_per_s"] > 0 and (line["steps"], line["steps_timed"]) == (20, 4)
        assert f"**{line['images_per_s']}**" in (tmp_path / "sample.md").read_text()


def test_the_gpu_run_hangs_and_fails_part_by_part(tmp_path):
    """bench/gpu.sh with a python that hangs on one part and fails on another: the others run, all ends up in OUT."""
    python = tmp_path / "python"
    python.write_text(f"""#!/bin/sh
case "$*" in
    *sample.py*) sleep 1000 ;;
    *kernels.py*) exit 3 ;;
    *import*) exec {sys.executable} "$@" ;;
    *) echo "ran $*"; echo '{{"bench": 1}}' >> {tmp_path}/out/results.jsonl; echo table > {tmp_path}/out/step.md ;;
esac
""")
    python.chmod(0o755)
    done = subprocess.run(
        ["bash", str(ROOT / "bench/gpu.sh"), str(tmp_path / "out"), "--rehearse", "sample", "kernels", "step"],
        env={**ENVIRONMENT, "PYTHON": str(python), "LIMITS": "sample 1"}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2 and "failed: sample(124) kernels(3)" in done.stdout
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"log.txt", "results.jsonl", "report.md"}
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "=== step took" in log and "ran bench/step.py" in log
    assert (tmp_path / "out" / "report.md").read_text() == "table\n"
