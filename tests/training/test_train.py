"""Training end to end: the same losses on any number of processes and with either engine; mistakes name the remedy."""

import math
import sys
from functools import partial

import pytest
import torch
import yaml
from safetensors.torch import load_file

from fastdit.config import load_config
from fastdit.memory import micro_batches
from fastdit.training import checkpoint
from fastdit.training.engine import TorchEngine
from fastdit.training.log import read_metrics
from fastdit.training.loop import train
from fastdit.training.zero import merge_deepspeed
from helpers import ROOT
from helpers.data import small_vae
from helpers.runs import losses, rendezvous, run, run_command, train_here

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_run_logs_learns_and_leaves_checkpoints(world, whole):
    records = read_metrics(world / "whole")
    assert [r["step"] for r in records] == list(range(1, 21))
    for key in ("loss", "grad_norm", "lr", "images_per_s", "steps_per_s", "mfu", "peak_gib"):
        assert all(math.isfinite(r[key]) and r[key] > 0 for r in records), key
    assert sum(whole[-5:]) < sum(whole[:5])
    assert [c.name for c in checkpoint.checkpoints(world / "whole")] == ["step-0000010", "step-0000015", "step-0000020"]
    assert list((world / "whole" / "tensorboard").iterdir())
    saved = yaml.safe_load((world / "whole" / "config.yaml").read_text())
    assert saved["training"]["lr"] == 1e-3 and saved["model"]["variant"] == "DiT-Ti/4"


@pytest.mark.parametrize("change", ["training.micro_batch=4", "training.activation_checkpointing=selective"])
def test_micro_batches_and_checkpointing_change_no_loss(world, whole, tmp_path, change):
    train_here(world, tmp_path / "run", change, "training.steps=6", "training.precision=fp32")
    train_here(world, tmp_path / "plain", "training.steps=6", "training.precision=fp32")
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)


def test_optimal_transport_pairs_the_whole_batch_however_it_is_split(world, tmp_path):
    common = ["objective=flow", "objective.coupling=ot", "training.steps=3", "training.precision=fp32"]
    train_here(world, tmp_path / "whole", *common)
    train_here(world, tmp_path / "parts", *common, "training.micro_batch=1")
    train_here(world, tmp_path / "independent", *common[:1], *common[2:])
    launcher = [sys.executable, "-m", "fastdit.cli", "launch", "--gpus", "2"]
    done = run_command(*launcher, "train", world / "config.yaml", *common, f"run_dir={tmp_path}/two")
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    assert losses(tmp_path / "independent") != pytest.approx(losses(tmp_path / "whole"), rel=1e-3)


def test_compiled_blocks_and_a_compiled_model_give_the_same_losses(world, tmp_path, monkeypatch):
    """The blocks without Inductor; test_dit.py compiles blocks with it."""
    few = ["model.variant=DiT-2x64x4/4", "training.steps=4", "training.precision=fp32"]
    for name in ("false", "whole", "true"):
        if name == "true":
            monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
        train_here(world, tmp_path / name, f"training.compile={name}", *few)
    for name in ("true", "whole"):
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "false"), rel=1e-5)


def test_fused_kernels_give_the_eager_definitions_losses(world, tmp_path, monkeypatch):
    """Forward and backward in three training steps; in Triton's interpreter if there is no GPU."""
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for mode in ("triton", "eager"):
        monkeypatch.setenv("FASTDIT_KERNELS", mode)
        few = ["training.steps=3", "training.precision=fp32", "training.global_batch=3", "model.variant=DiT-2x64x4/4"]
        train(load_config(world / "config.yaml", [f"run_dir={tmp_path}/{mode}", *few]), device=device)
    assert losses(tmp_path / "triton") == pytest.approx(losses(tmp_path / "eager"), rel=1e-6)
    states = (load_file(tmp_path / mode / "checkpoints/step-0000003/model.safetensors") for mode in ("triton", "eager"))
    assert any(not torch.equal(ours, theirs) for ours, theirs in zip(*(s.values() for s in states), strict=True))


def test_a_bf16_residual_stream_stays_within_bf16_noise(world, whole, tmp_path):
    train_here(world, tmp_path / "run", "training.residual=bf16")
    assert losses(tmp_path / "run") != whole
    assert losses(tmp_path / "run") == pytest.approx(whole, abs=5e-3)


def test_a_cuda_graph_is_refused_without_a_gpu(world, tmp_path):
    with pytest.raises(ValueError, match="training.cuda_graph=true needs a GPU"):
        train(load_config(world / "config.yaml", [f"run_dir={tmp_path}/run", "training.cuda_graph=true"]), device="cpu")
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_cuda_graph_replays_the_very_same_steps(world, tmp_path):
    for name in ("true", "false"):
        change = [f"training.cuda_graph={name}", "training.warmup_steps=10", "training.steps=12"]
        change += ["training.ema_warmup=true"]  # another decay at each step
        train(load_config(world / "config.yaml", [f"run_dir={tmp_path}/{name}", *change]), device="cuda")
    assert losses(tmp_path / "true") == pytest.approx(losses(tmp_path / "false"), abs=1e-3)
    behind = {}  # how far the EMA is behind the weights: less than half as far at the decay of the captured step
    for name in ("true", "false"):
        model, ema = (load_file(checkpoint.find(tmp_path / name) / f"{kind}.safetensors") for kind in ("model", "ema"))
        behind[name] = sum((model[key] - ema[key]).square().sum() for key in model).sqrt().item()
    assert behind["true"] == pytest.approx(behind["false"], rel=0.1)


def test_zero_3_is_not_compiled(world, tmp_path):
    zero = ["training.engine=deepspeed", "training.zero_stage=3", "training.compile=true"]
    with pytest.raises(ValueError, match="use compile=false, or zero_stage=2"):
        train_here(world, tmp_path / "run", *zero)
    assert not (tmp_path / "run").exists()


def test_zero_runs_under_plain_python(world, whole, tmp_path):
    zero = ["training.engine=deepspeed", "training.steps=4"]
    run("train.py", "--config", str(world / "config.yaml"), f"run_dir={tmp_path}/run", *zero)
    assert losses(tmp_path / "run") == pytest.approx(whole[:4], rel=1e-3)


def test_two_processes_under_torchrun_give_the_single_process_losses(world, whole, tmp_path):
    launcher = [sys.executable, "-m", "fastdit.cli", "launch", "--gpus", "2"]
    done = run_command(*launcher, "train", world / "config.yaml", f"run_dir={tmp_path}/run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(tmp_path / "run") == pytest.approx(whole, abs=1e-3)
    assert len(read_metrics(tmp_path / "run")) == 20


@pytest.mark.parametrize("stage, micro_batch", [(1, 3), (2, 3), (3, 6)])  # of 6 images a process
def test_zero_on_two_processes_gives_the_single_process_losses_and_resumes_exactly(
    world, whole, tmp_path, stage, micro_batch
):
    common = ["--config", str(world / "config.yaml"), "training.engine=deepspeed", f"training.zero_stage={stage}"]
    common += [f"training.micro_batch={micro_batch}", "--resume"]
    run("train.py", *common, f"run_dir={tmp_path}/run", "training.steps=10", processes=2)
    run("train.py", *common, f"run_dir={tmp_path}/run", processes=2)
    assert losses(tmp_path / "run") == pytest.approx(whole, abs=1e-3)
    run("train.py", *common, f"run_dir={tmp_path}/through", processes=2)
    assert losses(tmp_path / "run") == losses(tmp_path / "through")
    ours = load_file(checkpoint.find(tmp_path / "run") / "ema.safetensors")
    theirs = load_file(checkpoint.find(world / "whole") / "ema.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, atol=2e-3, rtol=0, msg=name)


@pytest.mark.parametrize("engine", ["torch", "deepspeed"])
def test_fp8_on_two_processes_gives_the_single_process_losses_and_history(world, tmp_path, engine):
    common = ["--config", str(world / "config.yaml"), "training.fp8=true", "training.steps=6", "training.compile=false"]
    run("train.py", *common, f"run_dir={tmp_path}/one")
    run("train.py", *common, f"training.engine={engine}", f"run_dir={tmp_path}/two", processes=2)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-3)
    one, two = (load_file(checkpoint.find(tmp_path / name) / "progress.safetensors") for name in ("one", "two"))
    # a process averages its gradient over half of the images: it is twice as large
    halves = one["fp8.history"] * torch.tensor([1.0, 1.0, 2.0])
    torch.testing.assert_close(two["fp8.history"][:6], halves[:6], rtol=0.2, atol=0)  # single values, with bf16's noise


def test_the_deepspeed_launcher_trains_on_two_processes(world, whole, tmp_path):
    store, environment = rendezvous()
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2"]
    command = ["--master_port", environment["MASTER_PORT"], ROOT / "train.py", "--config", world / "config.yaml"]
    done = run_command(*launcher, *command, f"run_dir={tmp_path}/run", "training.engine=auto", **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(tmp_path / "run") == pytest.approx(whole, abs=1e-3)
    meta = checkpoint.read_meta(checkpoint.find(tmp_path / "run"))
    assert meta["step"] == 20


def test_micro_batches_divide_the_global_batch():
    assert micro_batches(256, 0, 8) == (32, 1)
    assert micro_batches(256, 8, 8) == (8, 4)
    with pytest.raises(ValueError, match="global_batch=10 is not divisible by 4 processes; use 8"):
        micro_batches(10, 0, 4)
    with pytest.raises(ValueError, match="micro_batch=5 does not divide 12 images per process; use 4"):
        micro_batches(24, 5, 2)


@pytest.mark.parametrize(
    "override, words",
    [
        ("data.shards={world}/nowhere", ["nowhere has no manifest.json", "fastdit extract"]),
        ("data.image_size=64", ["image_size=64", "32"]),
        ("data.vae={world}/other_vae", ["vae (fingerprint", "extract again"]),
        ("data.num_classes=7", ["num_classes=7", "set 10"]),
        ("training.global_batch=5000", ["global_batch=5000", "at most 1198"]),
        ("model.variant=DiT-XXL/2", ["model.variant='DiT-XXL/2'", "did you mean"]),
        ("model.variant=DiT-Ti/8", None),
        ("objective.name=flwo", ["objective.name='flwo'", "did you mean 'flow'"]),
        ("objective.time=uniform", ["objective.time='uniform'", "did you mean"]),
        ("sampling.sampler=hein", ["sampling.sampler.name='hein'", "did you mean 'heun'"]),
        ("model.attention=flash", ["model.attention='flash'"]),
    ],
)
def test_mistakes_end_in_one_line_before_anything_is_written(world, tmp_path, override, words, capsys):
    if "other_vae" in override:
        small_vae(32, seed=9).save_pretrained(world / "other_vae")
    overrides = [override.format(world=world), "training.steps=1"]
    if words is None:  # the largest patch that fits, the border of what is allowed
        train_here(world, tmp_path / "run", *overrides)
        return
    with pytest.raises(ValueError) as error:
        train_here(world, tmp_path / "run", *overrides)
    assert all(word in str(error.value) for word in words), error.value
    assert not (tmp_path / "run").exists()


def test_out_of_memory_names_the_keys_that_help_and_loses_no_checkpoint(world, tmp_path, monkeypatch):
    """The GPU's own error, at the third step; the run resumes from the checkpoint of the second."""
    step, calls = TorchEngine.step, []

    def full(self, lr, *rest):
        calls.append(lr)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has ...")
        return step(self, lr, *rest)

    monkeypatch.setattr(TorchEngine, "step", full)
    options = ["training.steps=3", "training.checkpoint_every=2", "training.micro_batch=6"]
    remedy = "cpu has too little memory for micro_batch=6 with .*=none: use training.micro_batch=3, or"
    with pytest.raises(ValueError, match=f"CUDA out of memory; {remedy}"):
        train_here(world, tmp_path / "run", *options)
    assert [c.name for c in checkpoint.checkpoints(tmp_path / "run")] == ["step-0000002"]
    train_here(world, tmp_path / "run", *options, resume=True)


def test_the_command_says_it_in_one_line_with_exit_code_2(world, whole, tmp_path):
    for argument, words in [
        ("training.lrr=1", ["config.yaml", "training.lrr=1", "did you mean 'training.lr'"]),
        (f"run_dir={world}/whole", ["is not empty", "--resume"]),
    ]:
        done = run_command(sys.executable, ROOT / "train.py", "--config", world / "config.yaml", argument)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert all(word in done.stderr for word in ["error: ", *words]), done.stderr


def test_a_diverged_run_stops_and_names_the_remedy(world, tmp_path):
    with pytest.raises(ValueError, match=r"not finite in 3 steps in a row .* lower training.lr"):
        train_here(world, tmp_path / "run", "training.lr=1e30", "training.precision=fp32")
    for folder in checkpoint.checkpoints(tmp_path / "run"):
        assert all(t.isfinite().all() for t in load_file(folder / "ema.safetensors").values())


def test_a_run_folder_that_cannot_be_made_is_named(world, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match="run_dir=.*file/run cannot be created"):
        train_here(world, tmp_path / "file" / "run", "training.steps=1")


def test_deepspeed_keys_that_it_would_ignore_or_that_we_own_are_refused():
    own = {"zero_optimization": {"stage": 1}, "gradient_clipping": 0.0}
    merged = merge_deepspeed(own, {"zero_optimization": {"overlap_comm": True}, "wall_clock_breakdown": True})
    assert merged["zero_optimization"] == {"stage": 1, "overlap_comm": True} and merged["wall_clock_breakdown"]
    with pytest.raises(ValueError, match="gradient_clipping.*is set by fastdit"):
        merge_deepspeed(own, {"gradient_clipping": 1.0})
    with pytest.raises(ValueError, match="wall_clock_brakdown.*is not a key"):
        merge_deepspeed(own, {"wall_clock_brakdown": True})
    for value in (True, 2, {"stage": 2}):
        with pytest.raises(ValueError, match="zero_optimization=.*is set by fastdit"):
            merge_deepspeed(own, {"zero_optimization": value})


def test_a_scale_that_does_not_fit_is_said_at_the_start(world, tmp_path, capsys):
    train_here(world, tmp_path / "run", "training.steps=1")  # an untrained autoencoder's latents, with SD's scale
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith("DiT-Ti/4") and second.startswith("warning: ") and "far from the 1" in second
