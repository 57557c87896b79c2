"""The protocol names every setting that determines a number, so that unlike numbers are not compared or mixed."""

import json
import math
import re
import shutil

import numpy as np
import pytest

from fastdit.cli import main
from fastdit.data.manifest import Manifest
from fastdit.files import append_json
from fastdit.likelihood import likelihood
from fastdit.sampling import sample
from helpers.commands import mistake
from helpers.data import edit_manifest
from helpers.evaluation import evaluate, pictures
from helpers.runs import train_here

pytestmark = pytest.mark.usefixtures("one_thread", "small")
FEW = ("--num-samples", "8", "--metrics", "frechet", "sampling.cfg_scale=2")
SHIFTED = "objective.sample_shift=4"  # moves the sampler's times


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    path = tmp_path_factory.mktemp("reference") / "reference.npz"
    np.savez(path, pictures(50, size=32))
    return path


def test_another_objective_makes_another_protocol(trained, reference, tmp_path, capsys):
    plain = evaluate(trained, "--reference", reference, *FEW, out=tmp_path / "a.jsonl")
    shifted = evaluate(trained, "--reference", reference, *FEW, SHIFTED, out=tmp_path / "b.jsonl")
    assert plain["values"] != shifted["values"]
    said = mistake(capsys, "evaluate", "--compare", tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    assert "samples.objective.sample_shift=None and 4" in said
    evaluate(trained, "--reference", reference, *FEW, "--sweep", "steps=4", out=tmp_path / "s.jsonl")
    evaluate(trained, "--reference", reference, *FEW, SHIFTED, "--sweep", "steps=4", out=tmp_path / "s.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert [line["values"] for line in lines] == [plain["values"], shifted["values"]]


def test_a_value_that_is_not_finite_is_compared_as_nan(trained, reference, tmp_path, capsys):
    result = evaluate(trained, "--reference", reference, *FEW, out=tmp_path / "a.jsonl")
    result["values"]["frechet"] = math.nan
    append_json(tmp_path / "b.jsonl", result)
    main(["evaluate", "--compare", str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")])
    assert re.search(r"^FD .*\d \+- .* nan \+- ", capsys.readouterr().out, re.M)
    sweep = (trained, "--reference", reference, *FEW, "--sweep", "steps=4,5")
    evaluate(*sweep, out=tmp_path / "s.jsonl")
    first, second = map(json.loads, (tmp_path / "s.jsonl").read_text().splitlines())
    first["values"]["frechet"] = None
    (tmp_path / "s.jsonl").write_text(f"{json.dumps(first)}\n{json.dumps(second)}\n")
    evaluate(*sweep, out=tmp_path / "s.jsonl")  # it reads both
    assert len((tmp_path / "s.jsonl").read_text().splitlines()) == 2 and " nan" in capsys.readouterr().out


def test_a_folder_of_samples_does_not_mix_two_objectives(trained, tmp_path):
    sample(trained, tmp_path / "out", 4, device="cpu")
    with pytest.raises(ValueError, match="holds samples with objective.sample_shift=None, not 4; choose another --out"):
        sample(trained, tmp_path / "out", 4, overrides=[SHIFTED], device="cpu")


def test_losses_of_latents_on_another_scale_are_not_compared(world, trained, tmp_path, capsys):
    train_here(world, tmp_path / "run", "training.steps=2", "training.precision=fp32", "data.normalize=channel")
    for run, name in ((trained, "a"), (tmp_path / "run", "b")):
        evaluate(run, "--loss", "--shards", world / "latents", "--num-samples", "20", out=tmp_path / f"{name}.jsonl")
    assert "latents.scale=" in mistake(capsys, "evaluate", "--compare", tmp_path / "a.jsonl", tmp_path / "b.jsonl")


def test_labels_that_mean_other_classes_are_refused(world, trained, tmp_path, capsys):
    shutil.copytree(world / "latents", tmp_path / "latents")
    edit_manifest(tmp_path / "latents", class_names=Manifest.load(world / "latents").class_names[::-1])
    assert Manifest.load(tmp_path / "latents").class_names[0] == "9"
    said = mistake(capsys, "evaluate", trained, "--loss", "--shards", tmp_path / "latents")
    assert "has other classes than the run (9, not 0); extract both with the same classes" in said
    with pytest.raises(ValueError, match="has other classes than the run"):
        likelihood(trained, tmp_path / "latents", num_images=2, steps=2, device="cpu")


def test_the_path_of_weak_weights_may_differ(trained, reference, tmp_path, capsys):
    out = []
    for name in "ab":
        shutil.copytree(trained, tmp_path / name)
        out.append(tmp_path / f"{name}.jsonl")
        weak = f"sampling.weak_checkpoint={tmp_path / name}"
        result = evaluate(trained, "--reference", reference, *FEW, weak, "--sweep", "steps=2", out=out[-1])
        evaluate(trained, "--reference", reference, *FEW, weak, "--sweep", "steps=2", out=tmp_path / "both.jsonl")
    assert result["protocol"]["samples"]["weak_sha256"]
    main(["evaluate", "--compare", *map(str, out)])
    assert "FD (tiny)" in capsys.readouterr().out
    assert len((tmp_path / "both.jsonl").read_text().splitlines()) == 1  # not measured again
    evaluate(trained, "--reference", reference, *FEW, "--sweep", "steps=2", out=out[1])
    assert "weak_sha256=" in mistake(capsys, "evaluate", "--compare", *out)


def test_what_means_nothing_is_refused(world, trained, reference, tmp_path, capsys):
    loss = (trained, "--loss", "--shards", world / "latents")
    for option in (["--sweep", "steps=4"], ["--features", "x"], ["--seed", "3"], ["--metrics", "kid"]):
        assert f"{option[0]} means nothing with --loss" in mistake(capsys, "evaluate", *loss, *option)
    evaluate(trained, "--reference", reference, "--num-samples", "8", "--metrics", "frechet", out=tmp_path / "a.jsonl")
    evaluate(trained, "--reference", reference, "--num-samples", "8", "--metrics", "kid", out=tmp_path / "b.jsonl")
    said = mistake(capsys, "evaluate", "--compare", tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    assert "has frechet" in said and "has kid; measure both with the same --metrics" in said


def test_a_sweep_shows_what_all_its_results_have(trained, reference, tmp_path, capsys):
    out = tmp_path / "m.jsonl"
    few = ("--reference", reference, "--num-samples", "8")
    evaluate(trained, *few, "--metrics", "frechet,kid", "--sweep", "cfg_scale=1", out=out)
    assert "KID" in capsys.readouterr().out
    evaluate(trained, *few, "--metrics", "frechet", "--sweep", "cfg_scale=1,1.4", out=out)
    assert len(out.read_text().splitlines()) == 2  # the first is not measured again
    said = capsys.readouterr().out
    assert "FD (tiny)" in said and "KID" not in said
