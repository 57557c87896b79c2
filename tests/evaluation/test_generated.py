"""Samples of a run, made on the fly: the digits and the protocol of their folder, on any number of processes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from fastdit.data.images import to_uint8
from fastdit.data.latents import LatentCodec, sample_latents
from fastdit.data.loader import read_moments
from fastdit.data.manifest import Manifest
from fastdit.distributed import Ranks
from fastdit.evaluation.evaluate import extract, load_reference, measure
from fastdit.evaluation.features import FEATURES, load_features
from fastdit.evaluation.generated import generated
from fastdit.evaluation.images import ImageSet, open_set
from fastdit.files import append_json
from fastdit.sampling import load_pipeline, sample
from helpers.commands import mistake
from helpers.data import edit_manifest
from helpers.evaluation import evaluate, pictures, tiny, use_tiny
from helpers.runs import Forks

pytestmark = pytest.mark.usefixtures("one_thread")
ALONE = Ranks(0, 0, 1, torch.device("cpu"))
COUNT = 43  # eleven batches of 4: the last one is short, as is the second block of 32
SETTINGS = ("--labels", "random", "--seed", "2", "--weights", "model", "sampling.cfg_scale=2")


@pytest.fixture(scope="module")
def folder(trained, tmp_path_factory):
    """Samples of a run, and a reference of the same size."""
    root = tmp_path_factory.mktemp("generated")
    sample(trained, root / "samples", COUNT, labels="random", seed=2, weights="model",
           overrides=["sampling.cfg_scale=2"], device="cpu")  # fmt: skip
    np.savez(root / "reference.npz", pictures(50, size=32))
    return root


@pytest.fixture(scope="module")
def expected(folder):
    """What `fastdit evaluate` finds in the folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FEATURES, "efficientnet-lite0", tiny)
        return evaluate(folder / "samples", "--reference", folder / "reference.npz", "--seed", "2")


def same(result, expected):
    """All but the names of files and the time."""
    assert result["subject"].pop("samples") != expected["subject"]["samples"]
    ignored = {"environment": 0, "subject": {key: expected["subject"][key] for key in result["subject"]}}
    assert result["subject"] == ignored["subject"]
    return {**result, **ignored} == {**expected, **ignored}


def test_a_run_gives_the_digits_of_its_folder_of_samples(trained, folder, expected, small):
    result = evaluate(trained, "--reference", folder / "reference.npz", "--num-samples", COUNT, *SETTINGS)
    assert same(result, expected)
    made = result["protocol"]["samples"]
    assert made["sampling"]["cfg_scale"] == 2 and made["labels"] == "random" and made["weights"] == "model"
    assert made["seed"] == 2 and len(made["vae_fingerprint"]) >= 8 and made["sampling"]["precision"] == "fp32"
    assert len(result["subject"]["sha256"]) == 64 and "step-0000020" in result["subject"]["checkpoint"]


def test_so_do_two_processes(trained, folder, expected, tmp_path):
    options = ["evaluate", trained, "--reference", folder / "reference.npz", "--num-samples", COUNT, *SETTINGS,
               "--device", "cpu", "--out", tmp_path / "out.jsonl"]  # fmt: skip
    with Forks("fastdit/cli.py", *map(str, options), processes=2, before=use_tiny) as forks:
        assert set(forks.wait()) == {0}, forks.said()
    (line,) = (tmp_path / "out.jsonl").read_text().splitlines()
    assert same(json.loads(line), expected)
    assert not list(trained.glob("samples"))  # nothing is written


@pytest.mark.parametrize("block", [1, 7, 64])
def test_blocks_of_any_size_have_the_same_features_and_hash(block):
    images = pictures(70)
    blocks = {size: lambda numbers, size=size: (images[b * size : (b + 1) * size] for b in numbers)
              for size in (block, 32)}  # fmt: skip
    (values, digest), (expected, wanted) = (
        extract(ImageSet(Path(), 70, (48, 48), read, block=size), tiny(None, ALONE.device), ALONE)
        for size, read in blocks.items()
    )
    assert (values == expected).all() and digest == wanted and values.shape == (70, 48)


def test_a_reference_serves_several_measurements_in_memory(trained, folder, small):
    extractor, pipeline = load_features("efficientnet-lite0"), load_pipeline(trained)
    reference = load_reference(folder / "reference.npz", (32, 32), extractor, ALONE)
    results = [measure(generated(pipeline, 12, seed), reference, ALONE, extractor=extractor, metrics=["kid"], seed=seed)
               for seed in (0, 0, 1)]  # fmt: skip
    assert results[0]["values"] == results[1]["values"] != results[2]["values"]
    assert results[0]["real"] == results[2]["real"] and results[2]["protocol"]["samples"]["seed"] == 1


def test_latents_are_a_reference_as_their_autoencoder_decodes_them(world, folder, tmp_path, small, capsys):
    arguments, saved = [folder / "samples", "--reference"], tmp_path / "saved.npz"
    result = evaluate(*arguments, world / "latents", "--save-reference", saved)
    manifest = Manifest.load(world / "latents")
    codec, spec = LatentCodec.load(world / "vae"), manifest.latents
    moments = read_moments(manifest, manifest.index()[:8])
    z = sample_latents(moments, torch.zeros_like(moments[:, :4]), spec.scale)
    decoded = open_set(world / "latents", "SAMPLES")
    assert decoded.sampling["latents"] == "posterior mean" and decoded.sampling["vae_fingerprint"] == codec.fingerprint
    images = np.concatenate([*decoded.blocks([0, manifest.index().size // 32])])
    assert (images[:8] == to_uint8(codec.decode(z)).numpy()).all() and len(images) == 32 + 1198 % 32
    about = result["protocol"]["reference"]
    assert about["images"] == 1198 and about["decoded_by"] == codec.fingerprint
    assert "was decoded from latents, so the distance leaves out the autoencoder's own error" in capsys.readouterr().err
    assert evaluate(*arguments, saved)["values"] == result["values"]
    files = two(tmp_path, result, evaluate(*arguments, world / "images"))
    assert f"decoded_by={codec.fingerprint} and None" in mistake(capsys, "evaluate", "--compare", *files)
    shutil.copytree(world / "latents", tmp_path / "other")
    edit_manifest(tmp_path / "other", codec="0" * 64, codec_encoder="0" * 64)
    assert "use the same autoencoder" in mistake(capsys, "evaluate", *arguments, tmp_path / "other")


def two(folder, *results):
    """Files with one result each."""
    for i, result in enumerate(results):
        append_json(folder / f"{i}.jsonl", result)
    return [folder / f"{i}.jsonl" for i in range(2)]


def test_mistakes_are_answered_before_anything_is_sampled(trained, folder, small, capsys, monkeypatch):
    monkeypatch.setattr("fastdit.pipeline.ImagePipeline.images", None)
    samples, reference = folder / "samples", ["--reference", folder / "reference.npz"]
    np.savez(folder / "large.npz", pictures(4, size=64))
    for argv, words in (
        ([trained, *reference], "is a run: say how many samples with --num-samples, such as 10000"),
        ([trained, *reference, "--num-samples", 0], "--num-samples=0 must be 1 or more"),
        ([trained, *reference, "--num-samples", 8, "--labels", "cats"], "--labels='cats'"),
        ([trained, *reference, "--num-samples", 8, "sampling.cfg_scal=2"], "did you mean 'sampling.cfg_scale'"),
        ([trained, "--num-samples", 8, "--reference", folder / "large.npz"], "has images of 32x32 pixels, --refer"),
        ([trained, "--num-samples", 8, "--reference", trained], "is a run or a checkpoint; sample it first"),
        ([samples, *reference, "--num-samples", 8], "--num-samples: SAMPLES="),
        ([samples, *reference, "sampling.steps=3"], "sampling.steps=3: SAMPLES="),
    ):
        assert words in mistake(capsys, "evaluate", *argv, "--device", "cpu"), words
