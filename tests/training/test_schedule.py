"""Learning-rate schedules: values by hand, continuity, exact resume, and mistakes in the options."""

import math
import re

import pytest

from fastdit.config import load_config
from fastdit.registry import Choice, _options
from fastdit.schema import TrainingConfig
from fastdit.training.log import read_metrics
from fastdit.training.schedule import SCHEDULES, learning_rates
from helpers import ROOT
from helpers.runs import train_here


def rates(name, *, steps=100, warmup=0, lr=1.0, **options):
    """The learning rate of every step."""
    settings = TrainingConfig(steps=steps, warmup_steps=warmup, lr=lr, lr_schedule=Choice(name, options))
    rate = learning_rates(settings)
    return [rate(step) for step in range(steps)]


@pytest.mark.parametrize("warmup", [0, 1, 7, 1000])
def test_the_default_is_bit_for_bit_the_warmup_alone(warmup):
    settings = TrainingConfig(lr=3.3e-4, warmup_steps=warmup, steps=50)
    rate = learning_rates(settings)
    for step in range(50):
        lr = settings.lr * min(1.0, (step + 1) / settings.warmup_steps) if settings.warmup_steps else settings.lr
        assert rate(step) == lr


@pytest.mark.parametrize(
    "name, options, expected",
    [
        ("constant", {}, {0: 1.0, 50: 1.0, 99: 1.0}),
        ("linear", {}, {0: 1.0, 25: 0.75, 50: 0.5, 99: 0.01}),
        ("linear", {"final": 0.2}, {0: 1.0, 50: 0.6, 99: 0.208}),
        ("cosine", {}, {0: 1.0, 25: (1 + math.sqrt(0.5)) / 2, 50: 0.5, 75: (1 - math.sqrt(0.5)) / 2}),
        ("cosine", {"final": 0.1}, {0: 1.0, 50: 0.55}),
        ("inverse_sqrt", {"reference_steps": 25}, {0: 1.0, 24: 1.0, 35: 5 / 6, 99: 0.5}),
        ("wsd", {}, {0: 1.0, 80: 1.0, 81: 1 - math.sqrt(0.05), 85: 0.5, 96: 1 - math.sqrt(0.8)}),
        ("wsd", {"decay": 0.5, "shape": "linear", "final": 0.2}, {50: 1.0, 75: 0.6, 99: 0.216}),
        ("wsd", {"decay": 0.5, "shape": "cosine"}, {50: 1.0, 75: 0.5}),
        ("wsd", {"decay": 1.0, "shape": "linear"}, {0: 1.0, 40: 0.6}),
    ],
)
def test_known_steps_have_their_values(name, options, expected):
    computed = rates(name, **options)
    assert {step: computed[step] for step in expected} == pytest.approx(expected, rel=1e-12)


def test_the_inverse_square_root_after_its_own_warmup_is_that_of_the_transformer():
    """lr = min(t^-0.5, t warmup^-1.5) / warmup^-0.5, t from 1 (Vaswani et al. 2017, eq. 3)."""
    wanted = [min(t**-0.5, t * 20**-1.5) / 20**-0.5 for t in range(1, 101)]
    assert rates("inverse_sqrt", warmup=20) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("warmup", [0, 1000])
@pytest.mark.parametrize("name", SCHEDULES)
def test_no_schedule_jumps_and_each_has_its_peak_after_the_warmup(name, warmup):
    options = {"reference_steps": 2000} if name == "inverse_sqrt" else {"shape": "linear"} if name == "wsd" else {}
    computed = rates(name, steps=10_000, warmup=warmup, **options)
    assert max(abs(a - b) for a, b in zip(computed[:-1], computed[1:], strict=True)) < 1.01e-3
    assert computed[max(warmup - 1, 0)] == computed[warmup] == max(computed) == 1.0
    assert all(0 < rate <= 1 for rate in computed)
    assert name in ("constant", "inverse_sqrt") or computed[-1] < 1e-3


@pytest.mark.parametrize("warmup", [99, 100, 500])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_warmup_that_fills_the_run_is_no_error(name, warmup):
    assert rates(name, warmup=warmup)[:80] == pytest.approx([(step + 1) / warmup for step in range(80)], rel=1e-12)


@pytest.mark.parametrize(
    "override, words",
    [
        ("lr_schedule=cosin", "training.lr_schedule.name='cosin' is unknown; did you mean 'cosine'"),
        ("lr_schedule={name: cosine, finl: 1}", "training.lr_schedule.finl=1 is not a known key; did you mean 'final'"),
        ("lr_schedule={name: linear, final: -1}", "training.lr_schedule.final=-1.0 is out of range; use"),
        ("lr_schedule={name: cosine, final: 1.5}", "training.lr_schedule.final=1.5 is out of range; use"),
        ("lr_schedule={name: cosine, decay: 0.5}", "training.lr_schedule.decay=0.5 is an option of wsd, not of cosine"),
        ("lr_schedule={name: wsd, decay: 0}", "training.lr_schedule.decay=0.0 is out of range; use"),
        ("lr_schedule={name: wsd, shape: round}", "training.lr_schedule.shape='round' is unknown; did you mean"),
        ("lr_schedule=inverse_sqrt", "training.lr_schedule.reference_steps=0 without a warmup; use a positive number"),
        ("lr_schedule={name: inverse_sqrt, reference_steps: -1}", "training.lr_schedule.reference_steps=-1 is out of"),
    ],
)
def test_mistakes_name_key_value_and_remedy_before_the_run_begins(world, tmp_path, override, words):
    with pytest.raises(ValueError, match=f"^{re.escape(words)}"):
        train_here(world, tmp_path / "run", f"training.{override}")
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_resumed_run_has_the_learning_rates_of_an_uninterrupted_one(world, tmp_path):
    overrides = ["training.warmup_steps=2", "training.lr_schedule={name: cosine, final: 0.1}", "training.steps=6"]
    overrides += ["training.precision=fp32", "training.global_batch=4"]
    train_here(world, tmp_path / "whole", *overrides)
    config = load_config(world / "config.yaml", overrides)
    rate = learning_rates(config.training)
    records = read_metrics(tmp_path / "whole")
    assert [record["lr"] for record in records] == [rate(step) for step in range(6)]
    newest = tmp_path / "whole" / "checkpoints" / "step-0000006"
    newest.rename(tmp_path / "whole" / "checkpoints" / "step-0000006.partial")  # so that it resumes at step 5
    train_here(world, tmp_path / "whole", *overrides, resume=True)
    again = read_metrics(tmp_path / "whole")
    assert [(r["lr"], r["loss"]) for r in again] == [(r["lr"], r["loss"]) for r in records]


def test_the_readme_lists_every_schedule_and_option():
    [row] = [line for line in (ROOT / "README.md").read_text().splitlines() if "`training.lr_schedule`" in line]
    for name, schedule in SCHEDULES.items():
        assert f"`{name}`" in row
        assert all(f"`{option}`" in row for option in _options(schedule)), name
