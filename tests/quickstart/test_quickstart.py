"""The quickstart, shortened: every stage runs, every picture and number is there, and the digits are real."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from threadpoolctl import threadpool_info

import fastdit.quickstart.job as main_job
from fastdit.cli import main
from fastdit.environment import hardware
from fastdit.evaluation.features import load_features
from fastdit.evaluation.metrics import frechet_distance
from fastdit.evaluation.protocol import read_result
from fastdit.quickstart.judge import Judge, thumbnails


@pytest.fixture(scope="module")
def shortened(tmp_path_factory):
    out = tmp_path_factory.mktemp("quickstart") / "out"
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main_job, "SAMPLES", 40)
        changes = ["training.steps=30", "training.log_every=10", "sampling.steps=4"]
        torch.set_num_threads(16)
        short = ["training.steps=120"]
        report = main_job.quickstart(out, seed=1, overrides=changes, vae_overrides=short, say=lambda _: None)
        assert torch.get_num_threads() == 16
    torch.set_num_threads(threads)
    return out, report


def test_the_report_holds_every_figure(shortened):
    out, report = shortened
    assert json.loads((out / "report.json").read_text()) == report
    assert report["images"] == {"images": 1198, "held_out": 599}
    assert report["judge_accuracy_on_real"] > 0.9 and report["reconstruction_psnr_db"] > 15
    assert 0 < report["frechet_distance_real"] < report["frechet_distance"]
    assert set(report["seconds"]) == {"images", "autoencoder", "extract", "train", "sample", "judge", "sweep", "total"}
    assert report["config"]["training"]["steps"] == 30 and report["config"]["seed"] == 1
    page = (out / "report.html").read_text()
    assert f"<td>{report['class_accuracy']:.1%}</td>" in page and "599 real images that were not trained on" in page
    assert "training.steps = 30" in page and "image/gif" in page and "Not on this page" not in page
    assert Image.open(out / "grid.png").size == (4 * 34 - 2, 10 * 34 - 2)  # four samples of each of ten classes


def test_it_measures_during_training_sweeps_the_guidance_and_looks_for_copies(shortened):
    out, report = shortened
    [evaluation] = [json.loads(line) for line in (out / "run" / "evaluations.jsonl").read_text().splitlines()]
    assert evaluation["step"] == 30 and evaluation["protocol"]["features"] == "classifier"
    [validation] = [r for r in map(json.loads, (out / "run" / "metrics.jsonl").read_text().splitlines())
                    if "val_loss" in r]  # fmt: skip
    assert validation["step"] == 30 and len(validation["val_bins"]) == 20 and validation["eval_frechet"] > 0
    swept = [json.loads(line) for line in (out / "sweep.jsonl").read_text().splitlines()]
    assert [line["protocol"]["samples"]["sampling"]["cfg_scale"] for line in swept] == [1, 1.4, 2, 4]
    assert 0 <= report["memorized"] <= 1
    for name in ("sweep.png", "neighbors.png", "run/monitor/strip.png"):
        assert min(Image.open(out / name).size) > 30, name


def test_the_images_are_the_digits_and_the_held_out_ones_are_kept_apart(shortened):
    out, _ = shortened
    digits = load_digits()
    seen = {p.name for p in (out / "images").rglob("*.png")}
    held = {p.name for p in (out / "held_out").rglob("*.png")}
    assert not seen & held and len(seen | held) == 1797
    picture = next((out / "images" / "7").iterdir())
    index = int(picture.stem)
    assert digits.target[index] == 7
    cells = thumbnails(np.asarray(Image.open(picture))[None], 8).reshape(8, 8)
    assert np.corrcoef(cells.ravel(), digits.images[index].ravel())[0, 1] > 0.95


def test_the_judge_tells_right_from_wrong_labels(shortened):
    out, report = shortened
    held = main_job.read_folder(out / "held_out", 32)
    images, labels = main_job.read_folder(out / "images", 32)
    judge = Judge(*held)
    assert judge.accuracy(images, labels) > 0.9 > 0.1 > judge.accuracy(images, (labels + 1) % 10)
    extractor = load_features(f"classifier={out / 'judge.npz'}")
    np.testing.assert_allclose(extractor(images), judge.features(images), rtol=1e-4, atol=1e-5)
    probabilities = judge.classifier.predict_proba(thumbnails(images))
    samples = np.load(out / "samples" / "samples.npz")["arr_0"]
    distance = frechet_distance(judge.features(samples), judge.features(held[0]))
    assert report["frechet_distance"] == pytest.approx(distance, rel=1e-4)
    np.testing.assert_allclose(extractor.probabilities(extractor(images)), probabilities, rtol=1e-3, atol=1e-6)


def test_the_command_repeats_the_measurement(shortened, tmp_path, capsys):
    out, report = shortened
    result = read_result(out / "results.jsonl")
    assert round(result["values"]["frechet"], 4) == report["frechet_distance"]
    assert result["protocol"]["features"] == "classifier" and result["protocol"]["reference"]["images"] == 599
    assert result["protocol"]["samples"]["sampling"]["steps"] == "4"
    command = ["evaluate", str(out / "samples"), "--reference", str(out / "held_out"), "--seed", "1", "--device", "cpu",
               "--features", f"classifier={out / 'judge.npz'}", "--out", str(tmp_path / "again.jsonl")]  # fmt: skip
    main(command)
    again = read_result(tmp_path / "again.jsonl")
    assert [again[key] for key in ("protocol", "values", "real")] == [
        result[key] for key in ("protocol", "values", "real")
    ]
    assert "FD (classifier)" in capsys.readouterr().out


def test_many_cores_get_no_more_threads_than_these_networks_can_use(shortened):
    out, report = shortened
    assert report["machine"]["threads"] == 2
    assert json.loads((out / "run" / "environment.jsonl").read_text())["threads"] == 2
    with main_job.few_threads():
        [*pools] = [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]
        assert pools and set(pools) == {1}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_every_network_runs_there(shortened):
    out, report = shortened
    assert report["config"]["training"]["cuda_graph"] and report["machine"]["hardware"] == hardware()
    environment = json.loads((out / "run" / "environment.jsonl").read_text())
    assert environment["device"] == "cuda" and report["seconds"]["autoencoder"] < 10  # 60 steps; on 16 cores minutes


def test_an_existing_folder_is_never_overwritten(shortened):
    out, _ = shortened
    with pytest.raises(ValueError, match="is not empty; choose another --out"):
        main_job.quickstart(out)
