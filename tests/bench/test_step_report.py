"""The step benchmark's contestants by name, the kinds of kernels in a profile, and the table."""

from argparse import Namespace
from dataclasses import replace

import pytest

from bench.step import cases, profiles, report
from bench.step.cases import cases_of, config_of
from fastdit.cards import GPUS

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
        "_sum_chunks", "_qk_norm_rope_forward", "_qk_norm_rope_backward", "triton_red_fused_native_layer_norm_0",
        "triton_per_fused_add_native_layer_norm_2",
        "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float, float>(...)",
        "aten::native_layer_norm",
    ],
    "activation": [
        "_gelu_forward", "_gelu_backward_1", "_swiglu_forward", "_swiglu_backward", "triton_poi_fused_gelu_3",
        "triton_poi_fused_addmm_gelu_backward_7", "void at::native::vectorized_elementwise_kernel<4, GeluCUDAKernel>",
    ],
    "optimizer": [
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
    line = {"contestant": "strong", "size": "tiny", "failed": "out of memory: 1 GiB"}
    environment = dict.fromkeys(("hardware", "torch", "commit", "date"), "x")
    assert "**out of memory: 1 GiB**" in report.table([line], environment)


def test_all_on_is_a_contestant_of_its_own_and_has_no_graph_on_a_cpu():
    common = dict(size="XL/2", batch=None, override=["model.attention=sdpa"], reference_repo=[], ablation=False,
                  engines=False, contestants=["fastdit", "fastdit-all-on", "strong"])  # fmt: skip
    plain, on, strong = cases_of(Namespace(device="cuda", **common))
    assert plain.overrides == ("model.attention=sdpa",) and not strong.overrides
    settings = config_of(on).training
    assert settings.cuda_graph and settings.residual == "bf16" and on.stack == "fastdit"
    assert config_of(on).model.attention == "sdpa" and config_of(replace(on, overrides=())).model.attention == "auto"
    on_cpu = config_of(cases_of(Namespace(device="cpu", **common))[1]).training
    assert on_cpu.residual == "bf16" and not on_cpu.cuda_graph
    # a bf16 stream keeps 4 bytes a value less in each of 28 blocks, 256 images of 256 tokens, and 2 at the end
    saved = report.predicted_gib(plain) - report.predicted_gib(on)
    assert saved == pytest.approx(256 * 256 * 1152 * (28 * 4 + 2) / 2**30)


def test_the_largest_kernels_by_name():
    class Event:
        is_user_annotation = False

        def __init__(self, name, start, end, device="DeviceType.CUDA"):
            self.name, self.device_type = name, device
            self.time_range = Namespace(start=start, end=end, elapsed_us=lambda: end - start)

    two_steps = [Event("gemm", 0, 3000), Event("norm", 3000, 3500), Event("gemm", 3500, 6500),
                 Event("small", 6500, 6501),
                 Event("aten::mm", 0, 9e9, "DeviceType.CPU"), Event("## Call CompiledFxGraph", 0, 9e9)]  # fmt: skip
    assert profiles.largest(two_steps, 2, "cuda", count=2) == {"gemm": (3.0, 1.0), "norm": (0.25, 0.5)}
    line = {"contestant": "fastdit", "size": "tiny", "profile_ms": {"GEMM": 3.0}, "kernels": {"gemm": [3.0, 1.0]}}
    environment = dict.fromkeys(("hardware", "torch", "commit", "date"), "x") | {"caches": "warm"}
    text = report.table([line], environment)
    assert "| `gemm` | 1 | 3.00 |" in text and "with warm compiler caches" in text


@pytest.mark.parametrize("gib, batch", [(140.0, 256), (79.6, 128), (22.0, 16)])
def test_the_batch_is_one_that_fits(monkeypatch, gib, batch):
    """DiT-XL/2 in the memory of an H200, an H100 and a small card; eager fp32 starts at half."""
    monkeypatch.setattr(report, "card_of", lambda device: replace(GPUS["H100"], gib=gib))
    asked = Namespace(device="cuda", size="XL/2", batch=None, override=[], reference_repo=[], ablation=False,
                      engines=False, contestants=["fastdit-fp8", "strong", "official"])  # fmt: skip
    assert [case.batch for case in report.fitting(cases_of(asked))] == [batch, batch, batch // 2]


@pytest.mark.parametrize("installed", [True, False])
def test_engines_whose_package_is_missing_are_left_out_in_one_line(installed, monkeypatch, capsys):
    monkeypatch.setattr(cases.importlib.util, "find_spec", lambda name: object() if installed else None)
    asked = Namespace(device="cpu", size="tiny", batch=None, override=[], reference_repo=[], ablation=False,
                      engines=True, contestants=None)  # fmt: skip
    names = [case.name for case in cases_of(asked)]
    zero = ["ZeRO-1", "ZeRO-2", "ZeRO-3, no compile"]
    assert names == ["fastdit", "DDP", *zero * installed, "no compile"]
    said = capsys.readouterr().err
    assert said == ("" if installed else f"{', '.join(zero)}: left out, deepspeed is not installed\n")
