"""`fastdit evaluate RUN --sweep`: every combination once, a table, a plot, and mistakes before anything is sampled."""

import json

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from fastdit.cli import main
from fastdit.pipeline import ImagePipeline
from fastdit.sweep import plot, points
from helpers.commands import mistake
from helpers.evaluation import evaluate, pictures, use_tiny
from helpers.runs import Forks

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    path = tmp_path_factory.mktemp("sweep") / "reference.npz"
    np.savez(path, pictures(20, size=32))
    return path


def command(trained, reference, out, *sweep):
    return ["evaluate", *map(str, [trained, "--reference", reference, "--num-samples", 8, "--out", out]),
            "--metrics", "frechet,kid", "--device", "cpu", "--sweep", *sweep]  # fmt: skip


def test_a_sweep_measures_each_combination_once(trained, reference, tmp_path, small, capsys, monkeypatch):
    out = tmp_path / "sweep.jsonl"
    axes = "cfg_scale=1,3", "sampling.steps=2,4", "weights=model,ema"
    main(command(trained, reference, out, *axes))
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    protocols = [line["protocol"]["samples"] for line in lines]
    seen = [(p["sampling"]["cfg_scale"], p["sampling"]["steps"], p["weights"]) for p in protocols]
    assert seen == [(c, s, w) for c in (1, 3) for s in ("2", "4") for w in ("model", "ema")]
    said = capsys.readouterr().out.splitlines()
    assert said[0].split() == ["cfg_scale", "steps", "weights", "FD", "(tiny)", "KID"]
    values = [line["values"] for line in lines]
    first = [f"{values[0]['frechet']:.4f}", "+-", f"{values[0]['frechet_error']:.4f}"]
    assert said[1].split()[:6] == ["1", "2", "model", *first]
    best = min(values, key=lambda value: value["frechet"])
    smallest = f"smallest FD (tiny): {best['frechet']:.4f} +- {best['frechet_error']:.4f} at cfg_scale="
    assert said[9].startswith(smallest) and len(set(said[1:9])) == 8
    assert said[10] == f"real against real: {lines[0]['real']['frechet']:.4f} (8 against 10 images)"
    plot = Image.open(out.with_suffix(".png"))
    assert plot.size == (900, 600) and len(plot.convert("RGB").getcolors(1 << 24)) > 100
    alone = evaluate(trained, "--reference", reference, "--num-samples", 8, "--metrics", "frechet,kid", "--weights",
                     "model", "sampling.cfg_scale=3", "sampling.steps=4", out=tmp_path / "alone.jsonl")  # fmt: skip
    assert alone["values"] == lines[6]["values"] and alone["protocol"] == lines[6]["protocol"]
    capsys.readouterr()
    monkeypatch.setattr(ImagePipeline, "images", None)  # nothing is sampled again
    main(command(trained, reference, out, *axes))
    assert capsys.readouterr().out.splitlines()[:10] == said[:10] and len(out.read_text().splitlines()) == 8


def test_the_plot_has_the_errors_of_the_table(tmp_path, monkeypatch):
    """Bars from value - error to value + error; none where a line of an earlier version has no error."""
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *given, **kw: [figures.append(self), save(self, *given, **kw)])
    chosen, errors = points(["cfg_scale=2,1,3"]), ({"frechet_error": 2}, {"frechet_error": 3}, {})
    results = [{"values": {"frechet": distance} | error, "real": None, "distance": "FD", "protocol": {"num_images": 8}}
               for distance, error in zip((10, 20, 15), errors, strict=True)]  # fmt: skip
    plot(chosen, results, tmp_path / "sweep.png")
    [axes] = figures[0].axes
    line, _, [bars] = axes.containers[0]
    assert line.get_xydata().tolist() == [[1, 20], [2, 10], [3, 15]]
    assert [segment.tolist() for segment in bars.get_segments()][:2] == [[[1, 17], [1, 23]], [[2, 8], [2, 12]]]
    assert len(bars.get_segments()[2]) == 0


def test_two_processes_write_the_same_lines(trained, reference, tmp_path, small):
    """The first combination is there already, which the main process alone knows."""
    axes = "cfg_scale=1,3", "sampler=euler"
    for name, sweep in (("one", axes), ("two", ("cfg_scale=1", "sampler=euler"))):
        main(command(trained, reference, tmp_path / f"{name}.jsonl", *sweep))
    options = command(trained, reference, tmp_path / "two.jsonl", *axes)
    with Forks("fastdit/cli.py", *options, processes=2, before=use_tiny) as forks:
        assert set(forks.wait()) == {0}, forks.said()
    one, two = (
        [json.loads(line) | {"environment": 0} for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert one == two and len(two) == 2


def test_options_of_a_sampler_that_is_swept_or_chosen_are_in_force(trained, reference, tmp_path, small):
    chosen, noisy, found = "sampling.sampler=ddim", "sampling.sampler.eta=1", {}
    for name, given, axes in (
        ("both", [], ["sampler.eta=0,1", "sampler=ddim"]),
        ("option", [chosen], ["sampler.eta=0,1"]),
        ("sampler", [noisy], ["sampler=ddim"]),
        ("neither", [noisy, chosen], ["cfg_scale=1.5"]),
    ):
        argv = command(trained, reference, tmp_path / f"{name}.jsonl", *axes)
        main([*argv[:-len(axes) - 1], *given, "sampling.steps=2", *argv[-len(axes) - 1 :]])
        lines = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        found[name] = {line["protocol"]["samples"]["sampling"]["sampler"]["eta"]: line["values"] for line in lines}
    assert found["both"] == found["option"] and found["both"].keys() == {0, 1}
    assert found["both"][0] != found["both"][1]
    assert found["sampler"] == {1: found["both"][1]} and found["neither"].keys() == {1}


def test_points_are_all_combinations():
    assert points([]) == [{}]
    assert points(["cfg_interval=[0,0.6],[0,1]", "steps=5"]) == [
        {"cfg_interval": "[0,0.6]", "steps": "5"},
        {"cfg_interval": "[0,1]", "steps": "5"},
    ]
    assert points(["sampler.eta=0,1"])[1] == {"sampler.eta": "1"}


def test_mistakes_are_answered_before_anything_is_sampled(trained, reference, tmp_path, small, capsys, monkeypatch):
    monkeypatch.setattr(ImagePipeline, "images", None)
    np.savez(tmp_path / "samples.npz", pictures(4, size=32))
    for sweep, words in (
        (["cfg_scal=1,2"], "--sweep='cfg_scal' is unknown; did you mean 'cfg_scale'"),
        (["cfg_scale"], "--sweep cfg_scale is not of the form key=value,value"),
        (["cfg_scale=1", "sampling.cfg_scale=2"], "--sweep sampling.cfg_scale=2 repeats a key"),
        (["cfg_scale=1,high"], "error: --sweep: sampling.cfg_scale='high' must be a number"),
        (["steps=4,ddim50"], "steps='ddim50' needs a discrete schedule"),
        (["sampler=heun,hein"], "did you mean 'heun'"),
        (["weights=ema,raw"], "--sweep weights='raw' is unknown; did you mean"),
        (["cfg_rescale=0,2"], "sampling.cfg_rescale=2"),
        (["weak_checkpoint=nowhere"], "nowhere"),
    ):
        assert words in mistake(capsys, *command(trained, reference, tmp_path / "out.jsonl", *sweep)), words
    for given, sweep, words in (
        ("sampling.cfg_scale=3", "cfg_scale=1,2", "--sweep cfg_scale=... and sampling.cfg_scale=3 are the same; give"),
        ("sampling.sampler=heun", "sampler=ddim", "--sweep sampler=... and sampling.sampler=heun are the same; give"),
        ("sampling={steps: 2}", "steps=3", "--sweep steps=... and sampling={steps: 2} are the same; give one"),
        ("sampling.sampler.eta=1", "sampler=ddim,heun", "sampling.sampler.eta=1 is an option of ddim, not of heun"),
        ("--weights=model", "weights=ema", "--weights=model and --sweep weights=... are the same; give one"),
        ("seed=3", "steps=3", "seed=3 changes nothing when sampling; use --seed 3"),
    ):
        argv = command(trained, reference, tmp_path / "out.jsonl")[:-1]
        assert words in mistake(capsys, *argv, given, "--sweep", sweep), words
    assert not (tmp_path / "out.jsonl").exists()
    argv = command(tmp_path / "samples.npz", reference, tmp_path / "out.jsonl", "cfg_scale=1,2")
    assert "--num-samples, --sweep: SAMPLES=" in mistake(capsys, *argv)
