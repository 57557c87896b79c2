"""What a resume does with each key of TrainingConfig that was changed: it applies the new value, or refuses it.

A key that no table names fails `test_every_key_is_in_one_table`: a new key needs a row here.
"""

import dataclasses
import itertools
import re
import shutil
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fastdit.config import load_config
from fastdit.diffusion.timesteps import LossAwareTimes
from fastdit.evaluation.features import FEATURES
from fastdit.models.dit import DiT
from fastdit.schema import TrainingConfig
from fastdit.training import boards, checkpoint, monitor
from fastdit.training.log import read_metrics, read_records
from fastdit.training.loop import train
from fastdit.training.state import read_weights
from fastdit.training.watchdog import Watchdog
from helpers.evaluation import tiny
from helpers.runs import run

pytestmark = pytest.mark.usefixtures("one_thread")
LR = 1e-3
BEGUN = ["training.steps=2", "training.global_batch=4", "training.precision=fp32", f"training.lr={LR}",
         "training.checkpoint_every=1", "training.keep_checkpoints=0", "data.val_fraction=0.02",
         "training.validate_every=0", "training.validate_images=20", "training.evaluate_images=10"]  # fmt: skip
GO_ON = ["training.steps=3"]


@dataclass
class Run:
    """A run that was resumed at step 2; `plain` was resumed in the same way, but without the change."""

    folder: Path
    said: str = ""
    error: str = ""
    calls: Counter = field(default_factory=Counter)
    plain: "Run | None" = None
    timeout_s: float = 0

    def weights(self, step: int, name: str = "model") -> Tensor:
        """Trained weights, or their average, in one vector: the final layer, which has a large gradient from step 1."""
        state = read_weights(self.folder / "checkpoints" / f"step-{step:07d}" / f"{name}.safetensors")
        return torch.cat([tensor.flatten() for key, tensor in state.items() if key.startswith("final_layer.linear.")])

    @property
    def fp8_history(self) -> Tensor:
        return read_weights(self.folder / "checkpoints" / "step-0000003" / "progress.safetensors")["fp8.history"]

    @property
    def change(self) -> Tensor:
        """By step 3, the first after the resume."""
        return self.weights(3) - self.weights(2)

    @property
    def checkpoints(self) -> list[int]:
        return [int(path.name.removeprefix("step-")) for path in checkpoint.checkpoints(self.folder)]

    def logged(self, key: str) -> dict[int, float]:
        return {record["step"]: record[key] for record in read_metrics(self.folder)}

    @property
    def measured(self) -> dict:
        """The values of the validation, the samples and the evaluation of step 3."""
        return next((r for r in read_records(self.folder / "metrics.jsonl") if "monitor_s" in r and r["step"] == 3), {})

    @property
    def loss_of_validation(self) -> float:
        return self.measured["val_loss"]

    @property
    def protocol(self) -> dict:
        [result] = read_records(self.folder / "evaluations.jsonl")
        return result["protocol"]

    @property
    def loss(self) -> float:
        return self.logged("loss")[3]

    @property
    def lr(self) -> float:
        return self.logged("lr")[3]


def moved_by(change: Tensor, lr: float) -> float:
    """The part of the weights that moved by lr, as all do in AdamW with betas (0, 0)."""
    return torch.isclose(change.abs(), torch.tensor(lr), rtol=1e-3, atol=0).float().mean().item()


def same(a: Tensor, b: Tensor, **tolerance) -> bool:
    return torch.allclose(a, b, **({"rtol": 0, "atol": 0} | tolerance))


def decayed(r: Run, lr: float, weight_decay: float) -> Tensor:
    """The change without that by the weight decay, which AdamW adds to any other."""
    return r.change + lr * weight_decay * r.weights(2)


# key: overrides beside GO_ON, and what shows that the new value is in force
APPLIED = {
    "steps": (["steps=4"], lambda r: r.checkpoints[-1] == 4),
    "epochs": (["epochs=0.013"], lambda r: r.checkpoints[-1] == 4),  # of 1,198 images, 4 per step
    "micro_batch": (["micro_batch=2"], lambda r: "batch 1 x 2 x 2" in r.said),
    "lr": (["lr=3e-3"], lambda r: r.lr == 3e-3 and same(r.change, 3 * r.plain.change, rtol=1e-4, atol=1e-7)),
    "betas": (["betas=[0,0]"], lambda r: moved_by(r.change, LR) > 0.99 and moved_by(r.plain.change, LR) < 0.1),
    "weight_decay": (["weight_decay=5"], lambda r: same(decayed(r, LR, 5), r.plain.change, rtol=1e-4, atol=1e-7)),
    "warmup_steps": (["warmup_steps=30"], lambda r: r.lr == LR * 3 / 30),
    "lr_schedule": (["lr_schedule={name: wsd, decay: 1, shape: linear}"], lambda r: r.lr == pytest.approx(LR / 3)),
    # a gradient of norm 1e-20 is far below AdamW's eps: nothing moves
    "grad_clip": (["grad_clip=1e-20", "betas=[0,0]"], lambda r: r.change.abs().max() < 1e-8),
    "ema_decay": (["ema_decay=0"], lambda r: same(r.weights(3, "ema"), r.weights(3))),
    "ema_warmup": (
        ["ema_warmup=true"],  # decay (1 + 3) / (10 + 3)
        lambda r: same(r.weights(3, "ema"), r.weights(2, "ema").lerp(r.weights(3), 9 / 13), rtol=1e-5, atol=1e-7),
    ),
    "precision": (["precision=bf16"], lambda r: r.loss != r.plain.loss == pytest.approx(r.loss, rel=1e-2)),
    "residual": (
        ["precision=bf16", "residual=bf16"],
        lambda r: r.loss != r.plain.loss == pytest.approx(r.loss, rel=1e-2),
    ),
    "fp8": (["precision=bf16", "fp8=true"], lambda r: r.loss != r.plain.loss == pytest.approx(r.loss, rel=0.1)),
    "fp8_history": (
        ["precision=bf16", "fp8=true", "fp8_history=5"],
        lambda r: [len(run.fp8_history) for run in (r, r.plain)] == [5, 16],
    ),
    "fp8_margin": (  # small values are then rounded more coarsely
        ["precision=bf16", "fp8=true", "steps=5", "fp8_margin=64"],
        lambda r: r.logged("loss")[5] != r.plain.logged("loss")[5] == pytest.approx(r.logged("loss")[5], rel=0.1),
    ),
    "activation_checkpointing": (
        ["activation_checkpointing=full"],
        lambda r: "checkpointing full" in r.said and r.loss == pytest.approx(r.plain.loss, rel=1e-5),
    ),
    "compile": (["compile=true"], lambda r: r.calls["compile_blocks"] > r.plain.calls["compile_blocks"]),
    "joint_adaln": (
        ["joint_adaln=true"],
        lambda r: r.calls["join_modulations"] > r.plain.calls["join_modulations"]
        and r.loss == pytest.approx(r.plain.loss, rel=1e-5),
    ),
    "loss_aware_times": (["loss_aware_times=true"], lambda r: r.calls["update"] > r.plain.calls["update"]),
    "route": (
        ["route=0.5", "route_ends=[1,1]", "steps=6"],
        lambda r: r.logged("loss")[6] != r.plain.logged("loss")[6] == pytest.approx(r.logged("loss")[6], rel=1e-2),
    ),
    "route_ends": (["route=0.5", "route_ends=[1,1]"], lambda r: "leave none of 4 blocks to skip" in r.plain.error),
    "route_full_steps": (
        ["route=0.5", "route_ends=[1,1]", "steps=6", "route_full_steps=6"],
        lambda r: r.logged("loss")[6] != r.plain.logged("loss")[6],
    ),
    "log_every": (["log_every=2", "steps=5"], lambda r: list(r.logged("loss")) == [1, 2, 4, 5]),
    "checkpoint_every": (["checkpoint_every=2", "steps=5"], lambda r: r.checkpoints == [1, 2, 4, 5]),
    "checkpoint_minutes": (
        ["checkpoint_every=100", "steps=5", "checkpoint_minutes=1e-9"],
        lambda r: r.checkpoints == [1, 2, 3, 4, 5] and r.plain.checkpoints == [1, 2, 5],
    ),
    "keep_checkpoints": (["keep_checkpoints=1"], lambda r: r.checkpoints == [3]),
    "keep_every": (
        ["keep_every=2", "keep_checkpoints=1", "steps=5"],
        lambda r: r.checkpoints == [2, 4, 5] and r.plain.checkpoints == [5],
    ),
    "max_skipped": (
        ["max_skipped=2", "lr=1e30", "steps=9"],
        lambda r: "in 2 steps in a row (training.max_skipped), up to step 5" in r.error,
    ),
    "validate_every": (["validate_every=3"], lambda r: "val_loss" in r.measured and not r.plain.measured),
    "validate_images": (
        ["validate_every=3", "validate_images=40"],
        lambda r: r.loss_of_validation != r.plain.loss_of_validation == pytest.approx(r.loss_of_validation, rel=0.2),
    ),
    "loss_reference": (
        ["validate_every=3", "loss_reference=quickstart"],
        lambda r: "loss_reference=quickstart was measured with other settings: model.variant=DiT-Ti/2" in r.said,
    ),
    "sample_every": (["sample_every=3"], lambda r: "sample_s" in r.measured and not r.plain.measured),
    "sample_images": (["sample_every=3", "sample_images=3"], lambda r: "step 3  3 samples of the EMA" in r.said),
    "evaluate_every": (
        ["evaluate_every=3", "reference=WORLD/held_out"],
        lambda r: "eval_frechet" in r.measured and not r.plain.measured,
    ),
    "reference": (
        ["evaluate_every=3", "reference=WORLD/held_out/3"],
        lambda r: r.protocol["reference"]["images"] < 100 and "needs training.reference" in r.plain.error,
    ),
    "evaluate_images": (
        ["evaluate_every=3", "reference=WORLD/held_out/3", "evaluate_images=8"],
        lambda r: r.protocol["num_images"] == 8 and r.plain.protocol["num_images"] == 10,
    ),
    "evaluate_features": (
        ["evaluate_every=3", "reference=WORLD/held_out/3", "evaluate_features=other"],
        lambda r: r.protocol["features"] == "other" and r.plain.protocol["features"] == "efficientnet-lite0",
    ),
    "wandb": (["wandb=mine"], lambda r: r.calls["start_wandb"] == 1 and not r.plain.calls["start_wandb"]),
    "report": (["report=true"], lambda r: r.calls["report"] == 1 and not r.plain.calls["report"]),
    "timeout_s": (["timeout_s=5"], lambda r: r.timeout_s == 5),
    "time_limit": (["time_limit=00:30", "steps=99"], lambda r: r.error == "75" and "by training.time_limit" in r.said),
}
# key: an override, and the message
REFUSED = {
    "init_from": ("init_from=elsewhere", "has training.init_from='', this run 'elsewhere'; make them equal to resume"),
    "global_batch": ("global_batch=8", "has global_batch=4, this run 8; make them equal to resume"),
    "ema_stds": ("ema_stds=[0.05,0.1]", "has training.ema_stds=[], this run [0.05, 0.1]; make them equal"),
    "optimizer": ("optimizer=muon", "has training.optimizer='adamw', this run 'muon'; make them equal to resume"),
    "align": ("align=[sra2]", "has training.align=[], this run [{'name': 'sra2'}]; make them equal to resume"),
    "fp8_attention": ("fp8_attention=true", "training.fp8_attention=true needs training.fp8=true"),  # and test_fp8.py
    "cuda_graph": ("cuda_graph=true", "training.cuda_graph=true needs a GPU"),  # on one, test_train.py
}
BY_ENGINE = {"engine", "zero_stage", "deepspeed"}  # test_under_zero


def test_every_key_is_in_one_table():
    tables = [*APPLIED, *REFUSED, *BY_ENGINE]
    assert sorted(tables) == sorted(field.name for field in dataclasses.fields(TrainingConfig))


@pytest.fixture(scope="module")
def begun(world, tmp_path_factory):
    """Two steps of a run, for each objective that a row needs."""
    place = tmp_path_factory.mktemp("begun")
    for name in ("flow", "ddpm"):
        overrides = [f"run_dir={place}/{name}", f"objective={name}", *BEGUN]
        train(load_config(world / "config.yaml", overrides), device="cpu")
    return place


def resume(world, begun, out, capsys, monkeypatch, objective, changes) -> Run:
    """Continue a copy of the run to step 3 with `changes`."""
    shutil.copytree(begun / objective, out)
    overrides = [*BEGUN, *GO_ON, *(f"training.{change}".replace("WORLD", str(world)) for change in changes)]
    if any(change.startswith("epochs=") for change in changes):  # instead of steps
        overrides = [override for override in overrides if not override.startswith("training.steps=")]
    config = load_config(world / "config.yaml", [f"run_dir={out}", f"objective={objective}", *overrides])
    resumed = Run(out)

    def spy(owner, name, instead=None):
        original = instead or getattr(owner, name)

        def spied(*arguments, **options):
            resumed.calls[name] += 1
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, spied)

    with monkeypatch.context() as monkeypatch:
        spy(DiT, "compile_blocks", lambda model, dynamic: None)
        spy(DiT, "join_modulations")
        spy(LossAwareTimes, "update")
        spy(boards, "start_wandb", lambda *_: None)
        monkeypatch.setattr(monitor, "check_wandb", lambda project: None)
        monkeypatch.setitem(FEATURES, "efficientnet-lite0", tiny)
        monkeypatch.setitem(FEATURES, "other", lambda *place: replace(tiny(*place), name="other"))
        watch = Watchdog.__init__

        def watching(self, run_dir, ranks, timeout_s):
            resumed.timeout_s = timeout_s
            watch(self, run_dir, ranks, timeout_s)

        monkeypatch.setattr(Watchdog, "__init__", watching)
        if config.training.time_limit:  # a clock that is ten minutes later at each look
            clock = SimpleNamespace(monotonic=itertools.count(0, 600).__next__)
            monkeypatch.setattr("fastdit.training.guard.time", clock)
        try:
            train(config, resume=True, device="cpu", read_initial=lambda *_: pytest.fail("read again"),
                  report=lambda *_: f"reported {resumed.calls.update(['report'])}")  # fmt: skip
        except (ValueError, SystemExit) as error:
            resumed.error = str(error)
    resumed.said = capsys.readouterr().out
    return resumed


@pytest.mark.parametrize("key", APPLIED)
def test_a_changed_key_is_applied(world, begun, tmp_path, capsys, monkeypatch, key):
    changes, applied = APPLIED[key]
    objective = "ddpm" if key == "loss_aware_times" else "flow"
    others = [change for change in changes if not change.startswith(f"{key}=")]
    resumed = resume(world, begun, tmp_path / "changed", capsys, monkeypatch, objective, changes)
    assert re.search(rf"changed since step 2: .*training\.{key}[.=]", resumed.said)  # in one line
    if key not in ("max_skipped", "time_limit"):  # those end the run
        assert not resumed.error
        resumed.plain = resume(world, begun, tmp_path / "plain", capsys, monkeypatch, objective, others)
    assert applied(resumed), (resumed, resumed.plain)


@pytest.mark.parametrize("key", REFUSED)
def test_a_key_that_cannot_change_is_refused_and_leaves_the_run_as_it_was(
    world, begun, tmp_path, capsys, monkeypatch, key
):
    change, message = REFUSED[key]
    before = (begun / "flow" / "config.yaml").read_bytes()
    resumed = resume(world, begun, tmp_path / "run", capsys, monkeypatch, "flow", [change])
    assert message in resumed.error
    assert resumed.checkpoints == [1, 2] and (resumed.folder / "config.yaml").read_bytes() == before


def test_under_zero(world, tmp_path):
    """The same for the keys of the engine, and for the optimizer's keys under ZeRO."""

    def zero(name, *changes):
        if name != "begun":
            shutil.copytree(tmp_path / "begun", tmp_path / name)
        overrides = [*BEGUN, "training.engine=deepspeed", f"run_dir={tmp_path}/{name}"]
        changes = [f"training.{change}" for change in changes]
        run("train.py", "--config", str(world / "config.yaml"), *overrides, *changes, "--resume")
        return Run(tmp_path / name)

    zero("begun")
    r = zero("changed", "steps=3", "betas=[0,0]", "weight_decay=5", "lr=3e-3", "ema_decay=0")
    assert r.lr == 3e-3 and moved_by(decayed(r, 3e-3, 5), 3e-3) > 0.99 and same(r.weights(3, "ema"), r.weights(3))
    r = zero("clipped", "steps=3", "betas=[0,0]", "grad_clip=1e-20")
    assert r.change.abs().max() < 1e-8
    for name, change in (("engine", "engine=torch"), ("zero_stage", "zero_stage=3")):  # values: test_elastic.py
        assert zero(name, "steps=3", change).checkpoints == [1, 2, 3]
    with pytest.raises(AssertionError, match="training.deepspeed.clip=1 is not a key that DeepSpeed knows"):
        zero("deepspeed", "steps=3", "deepspeed={clip: 1}")


@pytest.mark.parametrize("change, words", [("steps=1", ""), ("epochs=0.003", " (training.epochs=0.003)")])
def test_a_run_does_not_end_before_its_checkpoint(world, begun, tmp_path, capsys, monkeypatch, change, words):
    before = (begun / "flow" / "config.yaml").read_bytes()
    resumed = resume(world, begun, tmp_path / "run", capsys, monkeypatch, "flow", [change])
    assert f"training.steps=1{words} is less than the 2 steps of {resumed.folder}" in resumed.error
    assert (resumed.folder / "config.yaml").read_bytes() == before
