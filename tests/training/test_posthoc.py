"""Post-hoc EMA: the recorded numbers, averages that follow their profiles, and widths rebuilt from stored averages."""

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fastdit.cli import main
from fastdit.config import load_config
from fastdit.convert import convert, read_initial
from fastdit.memory import memory_bytes
from fastdit.sampling import load_pipeline
from fastdit.training import checkpoint
from fastdit.training.ema import AVERAGES, EMA, PowerAverage, exponent, power_decay, width_name
from fastdit.training.posthoc import coefficients, rebuild
from fastdit.training.state import load_network
from fastdit.verify import verify
from helpers import GOLDEN
from helpers.networks import small
from helpers.runs import run, train_here

pytestmark = pytest.mark.usefixtures("one_thread")
STDS = (0.05, 0.1)
NEVER = torch.tensor(False)


@pytest.fixture(scope="module")
def recorded():
    with np.load(GOLDEN / "posthoc_ema.npz", allow_pickle=False) as file:
        return dict(file)


def test_exponents_and_decays_are_the_recorded_ones(recorded):
    assert [exponent(std) for std in recorded["std"]] == pytest.approx(recorded["exponent"], rel=1e-12)
    for std in STDS:
        gamma = exponent(std)
        decays = [power_decay(gamma, t, float(recorded["beta/t_delta"])) for t in recorded["beta/t_next"].astype(float)]
        assert decays == pytest.approx(recorded[f"beta/std{std}"], rel=1e-12, abs=0)


def test_coefficients_are_the_recorded_ones(recorded):
    snapshots = list(zip(recorded["snapshot_step"].tolist(), recorded["snapshot_std"].tolist(), strict=True))
    for i, (step, std) in enumerate(zip(recorded["target_step"], recorded["target_std"], strict=True)):
        weights, _ = coefficients(snapshots, float(step), float(std))
        np.testing.assert_allclose(weights, recorded["coefficients"][:, i], rtol=1e-10, atol=1e-12)
        assert weights.sum() == pytest.approx(1, rel=1e-14)


@pytest.mark.parametrize("std", [0.01, 0.05, 0.1, 0.25, 12**-0.5])
def test_an_exponent_gives_its_width_by_quadrature(std):
    s, gamma = (np.arange(200_000) + 0.5) / 200_000, exponent(std)
    p = (gamma + 1) * s**gamma / len(s)
    assert p.sum() == pytest.approx(1, rel=1e-5)
    assert np.sqrt((p * s**2).sum() - (p * s).sum() ** 2) == pytest.approx(std, rel=1e-4)


def test_the_error_of_a_profile_is_that_of_quadrature():
    s, snapshots = (np.arange(400_000) + 0.5) / 100, [(step, std) for step in (1000, 2000, 3000, 4000) for std in STDS]

    def profile(step, std):
        return np.where(s <= step, (exponent(std) + 1) * (s / step) ** exponent(std) / step, 0)

    for std in (0.03, 0.075, 0.2):
        weights, error = coefficients(snapshots, 4000, std)
        target = profile(4000, std)
        rest = target - sum(w * profile(*snapshot) for w, snapshot in zip(weights, snapshots, strict=True))
        assert error == pytest.approx(np.sqrt((rest**2).sum() / (target**2).sum()), rel=1e-3)


@pytest.mark.parametrize("std", [0, -0.1, 0.3, float("nan")])
def test_a_width_that_no_average_has_is_refused(std):
    with pytest.raises(ValueError, match=f"std={std} is out of range; use a width between 0 and 0.2887"):
        exponent(std)


def test_the_average_is_its_profile_over_the_weights():
    """At step t: sum over s of w_s (s^(gamma+1) - (s-1)^(gamma+1)) / t^(gamma+1)."""
    history = torch.randn(60, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    average = PowerAverage([torch.full((5,), 1e6)], std=0.1)  # the initial weights do not count
    for step, weights in enumerate(history, 1):
        average.update([weights.float()], step, NEVER)
    edges = (torch.arange(61, dtype=torch.float64) / 60) ** (exponent(0.1) + 1)
    torch.testing.assert_close(average.average[0], (edges.diff() @ history).float(), rtol=1e-5, atol=1e-6)
    before = average.average[0].clone()
    average.update([torch.ones(5)], 61, torch.tensor(True))
    assert torch.equal(average.average[0], before) and average.name == "power-0.100"


def test_a_replayed_graph_reads_the_decay_that_was_set_before(monkeypatch):
    ordinary, graphed = (EMA([torch.zeros(1)], decay=0.9999, warmup=True) for _ in range(2))
    capturing = SimpleNamespace(is_available=lambda: True, is_current_stream_capturing=lambda: True)
    for step in range(1, 6):
        ordinary.update([torch.ones(1)], step, NEVER)
        graphed.set_step(step)
        with monkeypatch.context() as patch:
            patch.setattr("fastdit.training.ema.torch.cuda", capturing)
            graphed.update([torch.ones(1)], 1, NEVER)  # the step of the capture
    assert torch.equal(ordinary.average[0], graphed.average[0]) and 0 < ordinary.average[0] < 1


def walk(state, steps, every, folder, targets=()):
    """A random walk of the weights with snapshots in `folder`; returns the averages of `targets`, and the weights."""
    names = [name for name in state if name != "pos_embed"]
    weights = [state[name].clone() for name in names]
    averages = {std: PowerAverage(weights, std) for std in (*STDS, *targets)}
    generator = torch.Generator().manual_seed(3)
    for step in range(1, steps + 1):
        for tensor in weights:
            tensor += 0.01 * torch.randn(tensor.shape, generator=generator)
        for average in averages.values():
            average.update(weights, step, NEVER)
        if step % every == 0:
            place = folder / f"step-{step:07d}"
            place.mkdir(parents=True)
            for std in STDS:
                own = dict(zip(names, averages[std].average, strict=True))
                save_file({**state, **own}, place / f"{averages[std].name}.safetensors")
            checkpoint.write_meta(place, {"step": step})
    followed = {std: dict(zip(names, averages[std].average, strict=True)) for std in targets}
    return followed, dict(zip(names, weights, strict=True))


def distance(ours, theirs):
    return sum((ours[name] - tensor).square().sum() for name, tensor in theirs.items()).sqrt().item()


TARGETS = (0.03, 0.0625, 0.15)


@pytest.fixture(scope="module")
def walked(world, tmp_path_factory):
    """A run of 200 steps as `fastdit ema` sees it, the averages of TARGETS that were followed directly, the weights."""
    place = tmp_path_factory.mktemp("walked") / "run"
    newest = train_here(world, place, "training.steps=2", f"training.ema_stds={list(STDS)}")
    shutil.rmtree(place / AVERAGES)
    final = newest.with_name("step-0000200")
    newest.rename(final)
    meta = {**checkpoint.read_meta(final), "step": 200}
    checkpoint.write_meta(final, {key: value for key, value in meta.items() if key != "files"})
    return place, *walk(load_file(final / "model.safetensors"), 200, 5, place / AVERAGES, TARGETS)


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["fastdit", "ema", *map(str, arguments)])
    main()


def test_the_command_rebuilds_the_averages_that_were_followed_directly(walked, tmp_path, monkeypatch, capsys):
    place, direct, last = walked
    command(monkeypatch, place, "--std", "0.05,0.03,0.0625,0.15", "--out", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "std-0.030", "std-0.050", "std-0.0625", "std-0.150"
    ]  # fmt: skip
    model = (place / "checkpoints/step-0000200/model.safetensors").read_bytes()
    for std in TARGETS:
        folder = tmp_path / "out" / f"std-{width_name(std)}"
        ema = load_file(folder / "ema.safetensors")
        assert distance(ema, direct[std]) < 0.02 * distance(last, direct[std])
        assert {tensor.dtype for tensor in ema.values()} == {torch.float32}
        assert torch.equal(ema["pos_embed"], load_file(folder / "model.safetensors")["pos_embed"])
        assert (folder / "model.safetensors").read_bytes() == model
        assert load_config(folder / "config.yaml").run_dir == str(folder)
        meta = checkpoint.read_meta(folder, contents=None)
        assert (meta["step"], meta["ema_std"]) == (200, std)
        assert verify(folder, lambda line: None) == []
    stored = load_file(place / AVERAGES / "step-0000200" / "power-0.050.safetensors")
    rebuilt = load_file(tmp_path / "out" / "std-0.050" / "ema.safetensors")
    assert all(torch.equal(rebuilt[name], tensor) for name, tensor in stored.items())
    assert "warning" not in capsys.readouterr().out


def test_a_rebuilt_checkpoint_is_sampled_without_a_word_about_its_age(walked, tmp_path):
    place = rebuild(walked[0], [0.1], tmp_path / "out", say=lambda line: None)[0]
    said = run("sample_ddp.py", "--checkpoint", str(place), "--out", str(tmp_path / "images"), "--num-samples", "2")
    assert len(list((tmp_path / "images").rglob("*.png"))) >= 2 and "random weights" not in said


def test_a_rebuilt_checkpoint_keeps_the_autoencoder_of_its_run(walked, tmp_path):
    """And does not take one that lies beside it, as runs/vae does beside runs/mine_ema."""
    run = shutil.copytree(walked[0], tmp_path / "runs" / "mine")
    vae = load_config(checkpoint.find(run) / "config.yaml").data.vae
    other = shutil.copytree(vae, tmp_path / "runs" / "vae")
    (other / "config.json").write_text((other / "config.json").read_text().replace("scaling_factor", "other"))
    [made] = rebuild(run, [0.05], tmp_path / "runs" / "mine_ema", say=lambda line: None)
    assert (made / "vae" / "config.json").read_bytes() == (Path(vae) / "config.json").read_bytes()
    meta = {key: value for key, value in checkpoint.read_meta(made).items() if key not in ("sha256", "files")}
    text = (made / "config.yaml").read_text()
    (made / "config.yaml").write_text(text.replace(vae, str(tmp_path / "gone")))
    checkpoint.write_meta(made, meta)
    assert load_pipeline(made).codec.scale == load_pipeline(run).codec.scale


def test_an_earlier_step_uses_nothing_later(walked, tmp_path, capsys):
    place, _, _ = walked
    run_dir = tmp_path / "run"
    shutil.copytree(place, run_dir)
    for later in range(105, 201, 5):
        shutil.rmtree(run_dir / AVERAGES / f"step-{later:07d}")
    rebuild(run_dir, [0.07], tmp_path / "short")
    rebuild(place, [0.07], tmp_path / "long", step=100)
    ours, theirs = (load_file(tmp_path / name / "std-0.070/ema.safetensors") for name in ("long", "short"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert checkpoint.read_meta(tmp_path / "long" / "std-0.070")["step"] == 100
    said = capsys.readouterr().out
    assert said.count("the checkpoint of step 100 is gone: model.safetensors is from step-0000200") == 2
    made = tmp_path / "long" / "std-0.070"
    assert load_network(made, "ema").step == 100
    with pytest.raises(ValueError, match="has the EMA of step 100, but the weights of step 200: .*; use --weights ema"):
        load_network(made, "model")
    # where both are taken over, the weights of another step are not
    initial = read_initial(str(made), load_config(made / "config.yaml"))
    converted = convert(made, "fastdit", tmp_path / "converted")
    assert capsys.readouterr().out.count("the weights of step 200; the EMA is used as both") == 2
    for state in (initial.model, initial.ema, load_file(converted / "model.safetensors")):
        assert all(torch.equal(state[name], ours[name]) for name in ours)


def test_a_width_far_from_the_stored_ones_is_warned_of(walked, tmp_path):
    lines = []
    rebuild(walked[0], [0.005, 0.06], tmp_path / "out", say=lines.append)
    warnings = [line for line in lines if line.startswith("warning")]
    assert len(warnings) == 1 and "std=0.005 is not well represented" in warnings[0] and "nearer to 0.05" in warnings[0]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--std", "0.4"], "std=0.4 is out of range; use a width between 0 and 0.2887"),
        (["--std", "a"], "--std=a is not a list of numbers; use for example --std 0.05,0.1"),
        (["--std", "0.1", "--step", "101"], "--step=101 has no averages; the nearest is 100, of 40 from 5 on"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(walked, tmp_path, monkeypatch, capsys, arguments, words):
    with pytest.raises(SystemExit, match="2"):
        command(monkeypatch, walked[0], *arguments, "--out", tmp_path / "out")
    assert capsys.readouterr().err.startswith(f"error: {words}")
    assert not list(tmp_path.iterdir())


def test_a_run_without_averages_and_an_existing_folder_are_refused(world, whole, walked, tmp_path):
    with pytest.raises(ValueError, match="whole holds no averages; name the folder of a run with training.ema_stds="):
        rebuild(world / "whole", [0.1], tmp_path / "out")
    (tmp_path / "here").mkdir()
    with pytest.raises(ValueError, match="--out .*/here exists; choose another name"):
        rebuild(walked[0], [0.1], tmp_path / "here")
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_damaged_and_foreign_averages_are_named(walked, tmp_path, capsys):
    run_dir = tmp_path / "run"
    shutil.copytree(walked[0], run_dir)
    shutil.copytree(run_dir / AVERAGES / "step-0000100", run_dir / AVERAGES / "step-0000100.best")  # the user's own
    bad = run_dir / AVERAGES / "step-0000100" / "power-0.050.safetensors"
    content = bytearray(bad.read_bytes())
    content[-5] ^= 4
    bad.write_bytes(content)
    _, direct, last = walked
    [rebuilt] = rebuild(run_dir, [0.0625], tmp_path / "out")
    said = capsys.readouterr().out
    assert said.startswith(f"file {bad} is damaged: its SHA-256 is not the recorded one; its step is left out\n")
    assert distance(load_file(rebuilt / "ema.safetensors"), direct[0.0625]) < 0.02 * distance(last, direct[0.0625])

    place = run_dir / AVERAGES / "step-0000200"
    save_file(small().state_dict(), place / "power-0.050.safetensors")
    checkpoint.write_meta(place, {"step": 200})
    with pytest.raises(ValueError, match="step-0000200/power-0.050.safetensors holds the average of another network"):
        rebuild(run_dir, [0.07], tmp_path / "other")
    assert not list(tmp_path.glob("other*"))


@pytest.mark.parametrize(
    "stds, words",
    [
        ("[0.1]", "training.ema_stds=[0.1] is out of range; use two or more different widths"),
        ("[0.1,0.1]", "training.ema_stds=[0.1, 0.1] is out of range; use two or more different widths"),
        ("[0.1,0.3]", "training.ema_stds=[0.1, 0.3] is out of range; use widths between 0 and 0.2887"),
        ("[0,0.1]", "training.ema_stds=[0.0, 0.1] is out of range; use widths between 0 and 0.2887"),
        ("0.1", "training.ema_stds=0.1 must be a list of numbers"),
        ("[a,b]", "training.ema_stds='a' must be a number"),
    ],
)
def test_widths_to_store_are_checked_by_the_config(world, stds, words):
    with pytest.raises(ValueError) as error:
        load_config(world / "config.yaml", [f"training.ema_stds={stds}"])
    assert words in str(error.value)


def test_the_predicted_memory_counts_every_average():
    alone, three = (memory_bytes(small(), 1, "none", averages=n)["EMA"] for n in (1, 3))
    assert three == 3 * alone > 0


@pytest.mark.parametrize("engine", ["torch", "deepspeed"])
def test_a_run_keeps_its_averages_and_fastdit_ema_rebuilds_a_width_from_them(world, tmp_path, engine):
    """Interrupted or not, on one process or two: the same averages, and a width that was tracked all along."""
    common = ["--config", str(world / "config.yaml"), "training.precision=fp32", "training.checkpoint_every=2"]
    common += [f"training.engine={engine}", "--resume", "training.keep_checkpoints=1"]
    for name, stds in (("run", [0.05, 0.1]), ("through", [0.05, 0.1, 0.07])):
        arguments = [*common, f"run_dir={tmp_path / name}", f"training.ema_stds={stds}"]
        for steps in (11, 20) if name == "run" else (20,):
            run("train.py", *arguments, f"training.steps={steps}", processes=2 if engine == "deepspeed" else 1)
    for step in range(2, 21, 2):  # of all checkpoints, though only the last one is kept
        for std in ("0.050", "0.100"):
            ours, theirs = (
                load_file(tmp_path / name / "averages" / f"step-{step:07d}" / f"power-{std}.safetensors")
                for name in ("run", "through")
            )
            assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)
    [folder] = rebuild(tmp_path / "run", [0.07], tmp_path / "rebuilt", say=lambda line: None)
    ours = load_file(folder / "ema.safetensors")
    theirs = load_file(tmp_path / "through" / "checkpoints" / "step-0000020" / "power-0.070.safetensors")
    moved = load_file(tmp_path / "through" / "averages" / "step-0000002" / "power-0.070.safetensors")
    error = sum(float((ours[k] - theirs[k]).square().sum()) for k in ours)
    assert error < 0.05**2 * sum(float((moved[k] - theirs[k]).square().sum()) for k in ours)
