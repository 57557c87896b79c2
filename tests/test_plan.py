"""The plan: parameters, FLOPs and saved bytes are counted; what fits on which GPU; the printed report."""

import json
import re
import sys
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastdit import cli
from fastdit.build import check_device
from fastdit.cards import GIB, GPUS, card_name, card_of
from fastdit.config import load_config
from fastdit.data.latents import LatentCodec
from fastdit.distributed import Ranks
from fastdit.memory import POLICIES, activation_bytes, choose, memory_by_kind, memory_bytes, moved_bytes
from fastdit.models.dit import DiT
from fastdit.plan import plan, report
from helpers import ROOT
from helpers.runs import train_here

XL_PATH = ROOT / "configs" / "dit_xl_2.yaml"
XL = load_config(XL_PATH)


class Products(TorchDispatchMode):
    """Collects the outputs of matrix products and attention: what selective checkpointing keeps."""

    def __init__(self, storages):
        super().__init__()
        self.storages = storages

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        name = op.name().split("::")[1].split(".")[0]
        if name in ("mm", "addmm", "bmm") or "scaled_dot_product" in name:
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, torch.Tensor):
                    self.storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return out


OPTIONS = [{"mlp": "swiglu"}, {"mlp": "gelu"}, {"qk_norm": "rms"}, {"position": "rope"}, {"dropout": 0.1},
           {"block": "cross_attention"}, {"block": "in_context"}, {"class_token": 768}]  # fmt: skip


@pytest.mark.parametrize(
    "policy, options",
    [(policy, {}) for policy in POLICIES] + [("none", options) for options in OPTIONS]
    + [(policy, {"decoder_blocks": 1}) for policy in POLICIES],
)
def test_predicted_activations_are_those_that_autograd_keeps(policy, options, monkeypatch):
    """Counted on fake tensors, which have sizes but no values. The fused kernels save the same tensors as on a GPU."""
    monkeypatch.setenv("FASTDIT_KERNELS", "triton")

    def kept(images: int) -> int:
        storages = {}

        def pack(tensor):
            storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
            return tensor

        products, hooks = Products(storages if policy == "selective" else {}), torch.autograd.graph.saved_tensors_hooks
        with hooks(pack, lambda t: t), torch.autocast("cpu", torch.bfloat16), products:
            model(torch.randn(images, *model.state_shape), torch.rand(images), torch.zeros(images, dtype=torch.long))
        return sum(storage.nbytes() for storage in storages.values())

    with FakeTensorMode():
        model = DiT(**{"input_size": 16, "hidden_size": 192, "depth": 2, "num_heads": 3, "num_classes": 10} | options)
        model.set_activation_checkpointing(policy)
        per_image = kept(2) - kept(1)  # weights and their copies cancel
    assert per_image == pytest.approx(activation_bytes(model, policy), rel=0.08)


def test_memory_by_kind_is_counted_per_process():
    with torch.device("meta"):
        model = DiT()
    count = sum(p.numel() for p in model.parameters())
    alone = memory_bytes(model, 1, "none")
    assert alone["weights"] == alone["gradients"] == alone["EMA"] == 4 * count and alone["optimizer"] == 8 * count
    sharded = memory_bytes(model, 1, "none", world=8, zero_stage=2)
    assert sharded["optimizer"] == count and sharded["gradients"] == count / 2 and sharded["weights"] == 4 * count
    # DeepSpeed's own fp32 copy of the weights that the process updates, and its buckets of 5e8 gradients
    assert sharded["ZeRO's copy and buckets"] == count / 2 + 2 * 4 * 5e8 and len(alone) == len(sharded) - 1
    third = memory_bytes(model, 1, "none", world=8, zero_stage=3), memory_bytes(model, 1, "none", world=8, zero_stage=3,
                                                                                precision="fp32")  # fmt: skip
    assert [m["ZeRO's copy and buckets"] - count / 2 for m in third] == [6 * 5e8, 4 * 5e8]
    assert memory_bytes(model, 2, "none")["activations"] == 2 * alone["activations"]
    assert activation_bytes(model, "none") - activation_bytes(model, "activation") == 28 * 256 * 1152 * 8
    # 28 layers, bf16 residual: the 297 MB an image of the analytic account, and the ends
    assert activation_bytes(model, "none", residual=2) == pytest.approx(297e6, rel=0.01)


def test_a_run_that_validates_needs_a_second_network_and_more_hours():
    overrides = ["data.val_fraction=0.01", "training.sample_every=500"]
    (_, (alone, *_)), (model, (monitored, *_)) = (plan(load_config(XL_PATH, more), "H200") for more in ([], overrides))
    assert monitored.memory == alone.memory | {"monitor": 4 * sum(p.numel() for p in model.parameters())}
    every = load_config(XL_PATH).training.checkpoint_every
    text = report(load_config(XL_PATH, overrides), "H200")
    assert f"Not in the hours: training.validate_every={every}; training.sample_every=500." in text
    never = load_config(XL_PATH, ["data.val_fraction=0.01", "training.validate_every=0"])
    assert "Not in the hours" not in report(never, "H200")


WHOLE = ["training.micro_batch=256"]


@pytest.mark.parametrize(
    ("gpu", "overrides", "policy", "micro"),
    [
        ("H200", [], "none", 256),
        ("A100-80G", [], "none", 128),  # two passes cost less than making anything again
        ("A100-80G", WHOLE, "selective", 256),
        ("A100-80G", [*WHOLE, "training.residual=bf16"], "activation", 256),
    ],
)
def test_the_fastest_policy_that_fits_comes_first(gpu, overrides, policy, micro):
    model, plans = plan(load_config(XL_PATH, overrides), gpu)
    assert model.parameter_count() == 675_129_632
    assert plans[0].policy == policy and plans[0].fits and plans[0].micro_batch == micro
    for p in plans:
        assert p.fits == (sum(p.memory.values()) < GPUS[gpu].gib * GIB * 0.94)
    fitting = [p.step_s for p in plans if p.fits]
    assert fitting == sorted(fitting)


@pytest.mark.parametrize("overrides", [[], ["data.image_size=512"], ["data.image_size=512", "training.precision=fp32"]])
def test_a_run_takes_what_the_plan_ranks_first(monkeypatch, overrides):
    open_ = ["training.micro_batch=-1", "training.activation_checkpointing=auto"]
    config = load_config(XL_PATH, [*overrides, *open_])
    for gpu, gib in (("H200", 141), ("H100", 80), ("A100-80G", 80), ("H100", 40), ("RTX 4090", 24)):
        card = replace(GPUS[gpu], gib=gib)
        monkeypatch.setitem(GPUS, gpu, card)
        monkeypatch.setattr("fastdit.memory.card_of", lambda device, card=card: card)
        model, (best, *_) = plan(config, gpu)
        assert best.fits
        one = Ranks(0, 0, 1, torch.device("cpu"))
        assert choose(config, model, one) == (best.policy, best.micro_batch, 256 // best.micro_batch, best.step_s)
        # what the config states is taken, and only the rest chosen
        stated = load_config(XL_PATH, [*overrides, "training.micro_batch=-1", "training.activation_checkpointing=full"])
        policy, micro, accumulation, _ = choose(stated, model, one)
        assert policy == "full" and micro * accumulation == 256
        smaller = memory_by_kind(model, stated.training, "full", micro, 1)
        assert sum(smaller.values()) <= gib * GIB * 0.94


@pytest.mark.parametrize("card, said", [(GPUS["H200"], ", predicted to take 0:00:0"), (None, "")])
def test_a_run_says_how_long_it_is_predicted_to_take(world, tmp_path, monkeypatch, capsys, card, said):
    monkeypatch.setattr("fastdit.memory.card_of", lambda device: card)
    train_here(world, tmp_path / "run", "training.steps=3", "training.compile=false")
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "3 steps = " in line)
    assert line.partition("from random weights")[2].startswith(said) and ("predicted" in line) == bool(said)


def test_what_fits_nowhere_says_what_would_help(monkeypatch):
    monkeypatch.setattr("fastdit.distributed.memory_of", lambda device: 8 * GIB)
    config = load_config(XL_PATH, ["training.micro_batch=-1", "training.activation_checkpointing=auto"])
    with torch.device("meta"):
        model = DiT()
    with pytest.raises(ValueError, match="micro_batch=1 with activation_checkpointing=full needs .* use more GPUs"):
        choose(config, model, Ranks(0, 0, 1, torch.device("cpu")))


def test_a_policy_without_a_kernel_is_refused_and_never_planned():
    with pytest.raises(ValueError, match="has no kernel for model.mlp=gelu; use selective"):
        DiT(depth=1, mlp="gelu").set_activation_checkpointing("activation")
    assert "activation" not in [p.policy for p in plan(load_config(XL_PATH, ["model.mlp=gelu"]), "H100")[1]]


def test_a_bf16_residual_stream_and_zero_count_in_the_plan(monkeypatch):
    (fp32, *_), (bf16, *_), (zero, *_) = (
        plan(load_config(XL_PATH, overrides), "H200", world=8)[1]
        for overrides in ([], ["training.residual=bf16"], ["training.engine=deepspeed"])
    )
    assert bf16.memory["activations"] < 0.9 * fp32.memory["activations"] and bf16.step_s < fp32.step_s
    assert zero.memory["optimizer"] == fp32.memory["optimizer"] / 8 and zero.step_s < fp32.step_s
    # under the deepspeed launcher engine=auto shards, and so does what the loop predicts
    monkeypatch.setattr("fastdit.build.under_deepspeed", lambda: True)
    with torch.device("meta"):
        model = DiT()
    assert memory_by_kind(model, XL.training, "none", 32, 8) == zero.memory


def test_tf32_is_half_as_fast_as_bf16():
    fp32, bf16 = (plan(load_config(XL_PATH, [f"training.precision={p}"]), "H200")[1][0] for p in ("fp32", "bf16"))
    assert 0.45 < bf16.step_s / fp32.step_s < 0.55


def test_bytes_follow_the_width_of_the_mlp():
    with torch.device("meta"):
        wide, narrow = DiT(depth=1), DiT(depth=1, mlp_ratio=2.0)
    tokens = 256 * 1152
    assert activation_bytes(wide, "none") - activation_bytes(narrow, "none") == tokens * 2 * (2 + 2)
    assert moved_bytes(wide, "none") - moved_bytes(narrow, "none") == tokens * 2 * (2 * (2 + 2) + 2)


COUNTED = [json.loads(line) for line in (ROOT / "bench/results/count.jsonl").read_text().splitlines()]
COUNTED = [line for line in COUNTED if "attention=" not in str(line["overrides"]) and "KERNELS" not in
           str(line["overrides"])]  # fmt: skip


@pytest.mark.parametrize("line", COUNTED, ids=lambda line: " ".join(line["overrides"]) or "defaults")
def test_bytes_of_the_plan_are_those_counted_on_the_gpus_code(line):
    config = load_config(XL_PATH, line["overrides"])
    settings = config.training
    with torch.device("meta"):
        model = DiT(**vars(config.model.options))
    by_kind = line["mb_per_image_by"]
    counted = sum(by_kind.values()) - by_kind["products"]
    policy = settings.activation_checkpointing
    planned = moved_bytes(model, policy, residual=settings.residual_bytes, fp8=settings.fp8) / 1e6
    assert planned == pytest.approx(counted, rel=0.04)


def test_options_of_the_network_take_time_and_what_is_not_timed_is_said():
    """The bytes are those of count.jsonl, at the share of the bandwidth that one H200 reached."""
    counted = {tuple(line["overrides"]): sum(line["mb_per_image_by"].values()) for line in COUNTED}
    (plain, *_), card = plan(XL, "H200")[1], GPUS["H200"]
    for override in ("model.qk_norm=rms", "model.position=rope", "model.mlp=gelu", "model.dropout=0.1"):
        best = next(p for p in plan(load_config(XL_PATH, [override]), "H200")[1] if p.policy == "none")
        more = 256 * (counted[(override,)] - counted[()]) * 1e6 / (card.bandwidth * 1e12 * card.efficiency.memory)
        assert best.step_s - plain.step_s == pytest.approx(more, rel=0.05), override
    assert "Not in the hours" not in report(XL, "H200")
    settings = ["model.dropout=0.1", "training.sample_every=100", "training.compile=false"]
    assert ("Not in the hours: the integer operations of model.dropout's masks; a step with training.compile=false; "
            "training.sample_every=100.") in report(load_config(XL_PATH, settings), "H200")  # fmt: skip


def test_fp8_counts_in_the_plan_and_is_refused_where_there_is_none():
    config = load_config(XL_PATH, ["training.fp8=true", "training.residual=bf16"])
    best, bf16 = plan(config, "H200")[1][0], plan(load_config(XL_PATH, ["training.residual=bf16"]), "H200")[1][0]
    assert 1.3 < bf16.step_s / best.step_s < 1.45  # 1.39 measured
    assert "FP8 linears" in report(config, "H200") and "activation" not in [p.policy for p in plan(config, "H200")[1]]
    with pytest.raises(ValueError, match="training.fp8=true is impossible on --gpu A100-80G; use training.fp8=false"):
        plan(config, "A100-80G")


def test_a_route_and_alignments_count_in_the_plan():
    plain, routed, aligned = (
        load_config(XL_PATH, overrides)
        for overrides in ([], ["training.route=0.5"], ["training.align=[repa]", "training.route=0.5"])
    )
    model, (before, *_) = plan(plain, "H200")
    _, (best, *_) = plan(routed, "H200")
    assert (22 * 0.5 + 6) / 28 < best.step_s / before.step_s < 0.7  # 22 of 28 blocks with half of the tokens
    kept = (22 * 0.5 + 6) / 28
    assert best.memory["activations"] == pytest.approx(kept * before.memory["activations"], rel=0.03)
    text = report(routed, "H200")
    assert "training.route: 128 of 256 tokens in blocks 3 to 24." in text
    forward, training = map(float, re.search(r"; ([\d.]+) GFLOP per image forward, ([\d.]+) in", text).groups())
    attention = 4 * 22 * (256**2 - 128**2) * 1152  # products of queries, keys and values that are left out
    linears = 2 * 22 * 128 * 12 * 1152**2
    assert forward == 237.2 and training == pytest.approx(3 * (237.2 - (attention + linears) / 1e9), abs=0.3)
    full = load_config(XL_PATH, ["training.route=0.5", "training.route_full_steps=1000"])
    assert plan(full, "H200")[1][0].memory == before.memory
    assert "the last 1,000 steps, with all tokens, take longer than predicted" in report(full, "H200")
    text = report(aligned, "H200")
    assert f"{model.parameter_count():,} parameters" in text  # without the projector, which counts in the memory:
    projector = 1152 * 2048 + 2048 * 2048 + 2048 * 768 + 2 * 2048 + 768
    weights = plan(aligned, "H200")[1][0].memory["weights"] - before.memory["weights"]
    assert weights == 4 * projector
    terabytes = 1_281_167 * 2 * 257 * 768 / 1e12
    assert f"DINOv2-B (768) {2 * terabytes:.2f} TB as float16 or {terabytes * (1 + 4 / 768):.2f} TB as int8" in text
    assert "Features" not in report(routed, "H200") and "route" not in report(plain, "H200")


def measured_rows() -> list[tuple[list[str], int, float]]:
    """(overrides, batch, ms a step) of fastdit in the README's table of one H200; the references are not predicted."""
    text = (ROOT / "README.md").read_text()
    rows = re.findall(r"^\| fastdit, (.*?) \| (\d+) \| ([\d.]+) \|", text, flags=re.MULTILINE)
    return [(re.findall(r"training\.\w+=\w+", what), int(batch), float(ms)) for what, batch, ms in rows]


@pytest.mark.parametrize("overrides, batch, ms", measured_rows(), ids=str)
def test_a_measured_step_is_predicted_within_a_twentieth(overrides, batch, ms):
    config = load_config(XL_PATH, [*overrides, f"training.global_batch={batch}", f"training.micro_batch={batch}"])
    predicted = next(p for p in plan(config, "H200")[1] if p.policy == "none")
    assert 1000 * predicted.step_s == pytest.approx(ms, rel=0.05)


def test_the_page_of_plans_is_what_the_command_prints():
    page = (ROOT / "docs/plan.md").read_text()
    commands = re.findall(r"^    fastdit plan --config (\S+) (.*)$", page, flags=re.MULTILINE)
    assert len(commands) >= 12
    for path, rest in commands:
        gpu, gpus = re.search(r"--gpu (\S+)", rest)[1], re.search(r"--gpus (\d+)", rest)
        overrides = [word for word in rest.split() if "=" in word]
        assert report(load_config(ROOT / path, overrides), gpu, int(gpus[1]) if gpus else 1) in page, (path, rest)


def test_hours_follow_from_speed_and_steps():
    _, plans = plan(XL, "H100", world=8)
    speed, hours = re.search(r"\| yes \| (\d+) \| (\d+) \|", report(XL, "H100", world=8)).groups()
    assert float(hours) == pytest.approx(400_000 * 256 / float(speed) / 3600, abs=0.51)  # printed as whole hours
    limit = GPUS["H100"].tflops * 1e12 * 8 / (3 * 237.2e9)
    assert 0.25 * limit < 256 / plans[0].step_s < limit
    assert float(speed) == pytest.approx(256 / plans[0].step_s, rel=0.01)


def test_without_shards_epochs_count_imagenet_and_latents_are_those_of_a_local_autoencoder(world):
    config = load_config(XL_PATH, ["training.epochs=1400"])
    last = report(config, "H100").splitlines()[-1]
    assert last.endswith(f"; {-(-1400 * 1_281_167 // 256):,} steps = 1400 epochs.")
    assert "; 400,000 steps." in report(XL, "H100") and "Latents are taken" not in report(XL, "H100")
    other = report(load_config(XL_PATH, ["data.vae=someone/dc-ae-f32c32"]), "H100")
    assert "Latents are taken to be 4 x 32 x 32, as data.vae=someone/dc-ae-f32c32 is not read; give others" in other
    codec = LatentCodec.load(world / "vae")
    model, _ = plan(load_config(XL_PATH, [f"data.vae={world}/vae", "data.image_size=64"]), "H100")
    assert codec.downsample != 8 and model.in_channels == codec.channels
    assert model.patches == (64 // codec.downsample // model.patch_size) ** 2


def test_the_command_prints_the_report_and_names_mistakes(capsys, monkeypatch):
    command = ["fastdit", "plan", "--config", str(XL_PATH), "--gpu"]
    monkeypatch.setattr(sys, "argv", [*command, "H200"])
    cli.main()
    assert capsys.readouterr().out.strip() == report(XL, "H200").strip()
    monkeypatch.setattr(sys, "argv", [*command, "H20"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "did you mean 'H200'" in error and error.count("\n") == 1
    with pytest.raises(ValueError, match="global_batch=256 is not divisible by 7 processes"):
        plan(XL, "H100", world=7)
    for world, *excluded, error in (
        (1, "training.optimizer=muon", "training.engine=deepspeed", "optimizer=muon needs whole matrices"),
        (8, "training.cuda_graph=true", "training.cuda_graph=true needs one process"),
    ):
        with pytest.raises(ValueError, match=error):
            plan(load_config(XL_PATH, excluded), "H100", world)
    with pytest.raises(ValueError, match="--gpus=0 is not a number of GPUs; use 1 or more"):
        plan(XL, "H100", world=0)


def test_gpus_have_any_spelling_and_those_without_bf16_are_refused(monkeypatch):
    spellings = {"h200": "H200", "4090": "RTX 4090", "rtx-5090": "RTX 5090", "a100": "A100-80G", "l40s": "L40S"}
    assert {name: card_name(name) for name in spellings} == spellings
    with pytest.raises(ValueError, match="--gpu='t4' has no bf16, which fastdit trains in; use a GPU from Ampere on"):
        plan(XL, "t4")
    gpu = torch.device("cuda")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "Tesla T4")
    with pytest.raises(ValueError, match="training.precision=bf16 needs a GPU from Ampere on, but this is a Tesla T4"):
        check_device(XL.training, gpu)
    check_device(replace(XL.training, precision="fp32"), gpu)
    monkeypatch.setattr("fastdit.distributed.memory_of", lambda device: 24 * GIB)
    for name, card in (("NVIDIA A10", "A10"), ("NVIDIA A100-SXM4-80GB", "A100-80G"), ("NVIDIA L4", "L4")):
        monkeypatch.setattr("torch.cuda.get_device_name", lambda device, name=name: name)
        assert replace(card_of(gpu), gib=GPUS[card].gib) == GPUS[card]
