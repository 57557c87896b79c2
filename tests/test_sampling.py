"""Sampling: image i depends on seed i alone, whatever the number of processes, the batch, or what was killed."""

import json
import shutil
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fastdit
from fastdit.commands.look import default_out
from fastdit.config import load_config
from fastdit.data.latents import LatentCodec
from fastdit.evaluation.images import open_set
from fastdit.lock import FolderLock
from fastdit.sampling import grid, load_pipeline, sample
from fastdit.sweep import samples_of
from fastdit.training import checkpoint
from fastdit.training.loop import train
from fastdit.training.state import load_network
from fastdit.verify import verify
from helpers import ROOT
from helpers.data import small_vae
from helpers.runs import run, run_command

COUNT = 10  # three batches of 4, the last one padded


@pytest.fixture(scope="session")
def reference(trained, tmp_path_factory):
    """The samples of one process."""
    out = tmp_path_factory.mktemp("samples") / "one"
    command = [ROOT / "sample_ddp.py", "--checkpoint", trained, "--out", out, "--num-samples", str(COUNT)]
    done = run_command(sys.executable, *command)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def pictures(out):
    return {p.name: p.read_bytes() for p in sorted((out / "images").iterdir())}


def array(out):
    with np.load(out / "samples.npz", allow_pickle=False) as file:
        return file["arr_0"]


def test_the_folder_holds_png_files_an_npz_and_a_grid(reference):
    images = array(reference)
    assert images.shape == (COUNT, 32, 32, 3) and images.dtype == np.uint8
    for i, image in enumerate(images):
        assert np.array_equal(np.asarray(Image.open(reference / "images" / f"{i:06d}.png")), image)
    assert len({image.tobytes() for image in images}) == COUNT
    assert Image.open(reference / "grid.png").size == (32, 34 * 10 - 2)  # ten classes, one image each


@pytest.mark.parametrize("processes", [2, 3])
def test_any_number_of_processes_makes_the_same_files(trained, reference, tmp_path, processes):
    arguments = ["--checkpoint", str(trained), "--out", str(tmp_path / "out"), "--num-samples", str(COUNT)]
    run("sample_ddp.py", *arguments, processes=processes)
    assert pictures(tmp_path / "out") == pictures(reference)
    assert (tmp_path / "out" / "samples.npz").read_bytes() == (reference / "samples.npz").read_bytes()
    assert (tmp_path / "out" / "grid.png").read_bytes() == (reference / "grid.png").read_bytes()


def test_the_number_of_threads_that_a_user_sets_changes_no_file(trained, reference, tmp_path, one_thread):
    torch.set_num_threads(2)
    sample(trained, tmp_path / "out", COUNT, device="cpu")
    assert torch.get_num_threads() == 2
    assert pictures(tmp_path / "out") == pictures(reference)


def test_batches_of_7_and_of_50_agree_to_one_gray_level(trained, tmp_path):
    for batch in (7, 50):
        sample(trained, tmp_path / str(batch), 60, overrides=[f"sampling.batch_size={batch}"], device="cpu")
    difference = np.abs(array(tmp_path / "7").astype(int) - array(tmp_path / "50"))
    assert difference.max() <= 1 and (difference > 0).mean() < 1e-3


def test_a_killed_run_goes_on_and_ends_the_same(trained, reference, tmp_path):
    out = tmp_path / "out"
    sample(trained, out, COUNT, device="cpu")
    for i in (1, 5, 6):  # as if killed: images missing, one half-written under its temporary name
        (out / "images" / f"{i:06d}.png").rename(out / "images" / f"{i:06d}.png.partial")
    (out / "samples.npz").unlink()
    kept = (out / "images" / "000009.png").stat().st_mtime_ns
    sample(trained, out, COUNT, device="cpu")
    assert (out / "images" / "000009.png").stat().st_mtime_ns == kept  # not made again
    assert pictures(out) == pictures(reference)
    assert np.array_equal(array(out), array(reference))


def test_a_folder_that_another_command_writes_to_is_refused(trained, reference, tmp_path):
    """Both would pass the check of the settings before one of them has written its own."""
    out = tmp_path / "out"
    with FolderLock(out, "--out"):
        with pytest.raises(ValueError, match=r"--out=.*out is in use by process \d+ on "):
            sample(trained, out, COUNT, seed=1, device="cpu")
        assert [path.name for path in out.iterdir()] == ["lock"]
    sample(trained, out, COUNT, device="cpu")
    assert {path.name for path in out.iterdir()} == {path.name for path in reference.iterdir()}  # no lock


def test_a_seed_and_the_raw_weights_change_the_images(trained, reference, tmp_path):
    sample(trained, tmp_path / "seed", COUNT, seed=1, device="cpu")
    sample(trained, tmp_path / "raw", COUNT, weights="model", device="cpu")
    for other in ("seed", "raw"):
        assert not np.array_equal(array(tmp_path / other), array(reference))


@pytest.mark.parametrize(
    "objective, sampler", [("ddpm", "ddpm"), ("ddpm", "ddim"), ("flow", "euler"), ("flow", "heun")]
)
def test_every_sampler_runs_from_a_checkpoint_of_its_objective(world, trained, tmp_path, objective, sampler):
    run_dir = trained
    if objective == "ddpm":
        run_dir = world / "trained_ddpm"
        if not run_dir.exists():
            train(load_config(world / "config.yaml", [f"run_dir={run_dir}", "objective=ddpm", "training.steps=5"]))
    sample(run_dir, tmp_path / "out", 3, overrides=[f"sampling.sampler={sampler}", "sampling.steps=5"], device="cpu")
    assert array(tmp_path / "out").std() > 0


@pytest.mark.parametrize("name", ["", "samples.npz"])
def test_an_evaluation_reads_the_folder_and_how_it_was_sampled(reference, name):
    images = open_set(reference / name, "SAMPLES")
    assert images.sampling == json.loads((reference / "sampling.json").read_text())
    assert (np.concatenate([*images.blocks(range(-(-images.count // 32)))]) == array(reference)).all()


def test_a_grid_has_one_class_per_row(tmp_path):
    (tmp_path / "images").mkdir()
    labels = [i % 3 for i in range(9)]
    for i, label in enumerate(labels):
        Image.new("RGB", (4, 4), (100 * label, 0, 0)).save(tmp_path / "images" / f"{i:06d}.png")
    sheet = np.asarray(grid(tmp_path, labels))
    assert sheet.shape == (16, 16, 3)
    for r in range(3):
        for c in range(3):
            assert (sheet[6 * r : 6 * r + 4, 6 * c : 6 * c + 4, 0] == 100 * r).all()


@pytest.mark.parametrize(
    "labels, rows",
    [
        ([i % 3 for i in range(64)], [(0, 10), (0, 10), (0, 2), (1, 10), (1, 10), (1, 1), (2, 10), (2, 10), (2, 1)]),
        ([i % 3 for i in range(330)], [(0, 10)] * 4 + [(1, 10)] * 3 + [(2, 10)] * 3),
        ([0] * 25, [(0, 10), (0, 10), (0, 5)]),
        ([0] * 9 + [1] * 90, [(0, 9)] + [(1, 10)] * 9),
        ([i % 11 for i in range(220)], [(c, 10) for c in range(10)]),
        ([*range(64)], [(None, 10)] * 6 + [(None, 4)]),
        ([i % 40 for i in range(160)], [(None, 8)] * 10),
    ],
)
def test_a_grid_fills_its_places_in_order_of_class(tmp_path, labels, rows):
    (tmp_path / "images").mkdir()
    for i, label in enumerate(labels):
        Image.new("RGB", (1, 1), (label + 1, 0, 0)).save(tmp_path / "images" / f"{i:06d}.png")
    sheet = np.asarray(grid(tmp_path, labels, gap=0))[..., 0].astype(int)
    counts = [(row != 128).sum() for row in sheet]
    assert sheet.shape[1] == max(count for _, count in rows) and [*counts] == [count for _, count in rows]
    shown = [row[:count] - 1 for row, count in zip(sheet, counts, strict=True)]
    assert (np.diff(np.concatenate(shown)) >= 0).all()
    assert all(label is None or (row == label).all() for row, (label, _) in zip(shown, rows, strict=True))


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"path": "nowhere"}, ["nowhere", "does not exist"]),
        ({"num_samples": 0}, ["--num-samples=0"]),
        ({"labels": "3,12"}, ["--labels='3,12'", "0..9"]),
        ({"labels": "cats"}, ["--labels='cats'"]),
        ({"overrides": ["sampling.steps=ddim50"]}, ["steps='ddim50'"]),
        ({"overrides": ["sampling.sampler=hein"]}, ["did you mean 'heun'"]),
        ({"overrides": ["model.variant=DiT-Ti/2"]}, ["model.variant=DiT-Ti/2: only sampling.*, objective, data.vae,"]),
        ({"overrides": ["seed=3"]}, ["seed=3 changes nothing when sampling; use --seed 3"]),
        ({"overrides": ["run_dir=x"]}, ["run_dir=x: only sampling.*", "can be changed when sampling; leave it out"]),
        ({"overrides": ["data.image_size=16"]}, ["data.image_size=16: only sampling.*"]),
        ({"overrides": ["training={lr: 1}"]}, ["training={lr: 1}: only sampling.*"]),
        ({"overrides": ["training.lr_schedule.final=1"]}, ["training.lr_schedule.final=1: only sampling.*"]),
        ({"overrides": ["training.route_ends=[1,1]"]}, ["training.route_ends=[1,1]: only sampling.*"]),
        ({"overrides": ["objective.time_scale=2"]}, ["objective.time_scale=2 changes nothing when sampling; leave it"]),
        ({"overrides": ["cfg_scale=3"]}, ["cfg_scale=3 is not a known key; did you mean 'sampling.cfg_scale'"]),
        ({"overrides": ["data.vae=nowhere/at/all"]}, ["nowhere/at/all"]),
        ({"overrides": ["sampling.cfg_channels=-1"]}, ["sampling.cfg_channels=-1"]),
    ],
)
def test_mistakes_name_key_value_and_remedy_and_write_nothing(trained, tmp_path, arguments, words):
    arguments = {"path": trained, "num_samples": 2, **arguments}
    with pytest.raises(ValueError) as error:
        sample(arguments.pop("path"), tmp_path / "out", device="cpu", **arguments)
    assert all(word in str(error.value) for word in words), error.value
    assert not (tmp_path / "out").exists()


def test_a_config_of_another_network_is_refused(trained):
    for override in ("model.variant=DiT-Ti/2", "data.num_classes=2"):
        with pytest.raises(ValueError, match="another network"):
            load_network(trained, overrides=[override])


def test_another_autoencoder_is_refused(trained, tmp_path):
    small_vae(32, seed=9).save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match="have codec .* use the same autoencoder"):
        load_pipeline(trained, [f"data.vae={tmp_path}/vae"])


def latents_with(trained, *overrides, **options):
    labels = torch.tensor([0, 1])
    return load_pipeline(trained, overrides).latents([0, 1], labels, 0, **options)


def test_guidance_outside_its_interval_is_no_guidance(trained):
    scaled = ["sampling.sampler=euler", "sampling.cfg_scale=3"]  # no evaluation at t = 0
    plain, guided = latents_with(trained, *scaled, "sampling.cfg_scale=1"), latents_with(trained, *scaled)
    assert torch.equal(latents_with(trained, *scaled, "sampling.cfg_interval=[0, 0]"), plain)
    late = latents_with(trained, *scaled, "sampling.cfg_interval=[0, 0.6]")
    assert not torch.equal(late, plain) and not torch.equal(late, guided)


def test_rescaled_guidance_has_the_contrast_of_the_unguided_prediction(trained):
    shown = []
    options = {"on_step": lambda t, x_t, prediction: shown.append(prediction.x_0.std(dim=(1, 2, 3)))}
    latents_with(trained, "sampling.sampler=euler", "sampling.cfg_scale=1", **options)
    latents_with(trained, "sampling.sampler=euler", "sampling.cfg_scale=9", "sampling.cfg_rescale=1", **options)
    torch.testing.assert_close(shown[4], shown[0])  # the first evaluation, of the same noise


def test_guidance_by_the_model_itself_has_no_effect_and_another_network_is_refused(trained, tmp_path):
    plain = latents_with(trained, "sampling.cfg_scale=1")
    own = latents_with(trained, "sampling.cfg_scale=3", f"sampling.weak_checkpoint={trained}")
    torch.testing.assert_close(own, plain, rtol=1e-4, atol=1e-4)
    [newest] = (trained / "checkpoints").glob("step-0000020")
    shutil.copytree(newest, tmp_path / "weak")
    text = (newest / "config.yaml").read_text().replace("name: flow", "name: flow\n  interpolant: gvp")
    (tmp_path / "weak" / "config.yaml").write_text(text)
    meta = json.loads((newest / "checkpoint.json").read_text())
    checkpoint.write_meta(tmp_path / "weak", {key: value for key, value in meta.items() if key != "sha256"})
    with pytest.raises(ValueError, match="weak_checkpoint=.* has objective={'name': 'flow', 'interpolant': 'gvp'}"):
        load_pipeline(trained, [f"sampling.weak_checkpoint={tmp_path}/weak"])
    (tmp_path / "weak" / "config.yaml").write_text((newest / "config.yaml").read_text())
    others = [f"other {name}" for name in meta["class_names"]]
    facts = {key: value for key, value in meta.items() if key != "sha256"}
    checkpoint.write_meta(tmp_path / "weak", facts | {"class_names": others})
    with pytest.raises(ValueError, match=r"has class_names=\['other 0', .* must be trained on the same task"):
        load_pipeline(trained, [f"sampling.weak_checkpoint={tmp_path}/weak"])


def test_samples_of_a_checkpoint_are_not_written_into_its_folder():
    """Which a resumed run deletes after training.keep_checkpoints further ones."""
    assert default_out("runs/a", "samples") == Path("runs/a/samples")
    assert default_out("runs/a/checkpoints/step-0000020", "samples") == Path("runs/a/step-0000020-samples")


def test_guidance_that_is_not_what_it_seems_is_pointed_out(trained, tmp_path, capsys):
    own = [f"sampling.weak_checkpoint={trained}", "sampling.cfg_scale=1"]
    sample(trained, tmp_path / "out", 1, overrides=own, device="cpu")
    assert f"weak_checkpoint={trained} changes nothing at sampling.cfg_scale=1" in capsys.readouterr().err
    weak = [{"cfg_scale": value} for value in (1, 2)]
    samples_of(trained, torch.device("cpu"), weak, num_samples=1, overrides=[f"sampling.weak_checkpoint={trained}"])
    assert capsys.readouterr().err.count("changes nothing at sampling.cfg_scale=1") == 1
    pipeline = load_pipeline(trained, ["sampling.cfg_scale=2", "sampling.cfg_channels=3"])
    assert pipeline.remarks() == []  # as DiT was released, for 4 channels
    wide = replace(pipeline, spec=replace(pipeline.spec, shape=(16, 4, 4)))
    assert wide.remarks() == ["sampling.cfg_channels=3 guides only the first of 16 channels; use 0 for all"]


@pytest.mark.parametrize(("override", "words"), [
    ("objective.prediction=eps", "objective.prediction=eps, but .* was trained with velocity; leave it out"),
    ("objective.interpolant=gvp", "objective.interpolant=gvp, but .* was trained with linear"),
    ("objective={name: ddpm, variance: fixed_small, loss_type: mse}", "objective.name=ddpm, but .* trained with flow"),
])  # fmt: skip
def test_the_networks_output_is_not_taken_for_something_else(trained, override, words):
    with pytest.raises(ValueError, match=words):
        load_pipeline(trained, [override])
    load_pipeline(trained, ["objective.prediction=velocity", "objective.sample_shift=3"])


@pytest.mark.parametrize(("weight", "fits"), [
    ("decoder.conv_out.bias", True), ("post_quant_conv.bias", True), ("encoder.conv_in.bias", False),
    ("quant_conv.bias", False),
])  # fmt: skip
def test_an_autoencoder_with_the_same_encoder_and_another_decoder_is_for_the_same_latents(
    trained, world, tmp_path, weight, fits
):
    vae = LatentCodec.load(world / "vae").vae
    with torch.no_grad():
        vae.get_parameter(weight).add_(0.5)
    vae.save_pretrained(tmp_path / "vae")
    other, again = f"data.vae={tmp_path}/vae", ["training.steps=1", f"run_dir={tmp_path}/run"]
    if not fits:
        with pytest.raises(ValueError, match="the latents of data.vae=.* have codec .*; use the same autoencoder"):
            load_pipeline(trained, [other])
        with pytest.raises(ValueError, match="is not the one that encoded the latents"):
            train(load_config(world / "config.yaml", [other, *again]), device="cpu")
        return
    pipeline, before = load_pipeline(trained, [other]), load_pipeline(trained)
    x_0, (line,) = torch.randn(2, *pipeline.spec.shape), pipeline.remarks()
    assert f"the decoder of {tmp_path}/vae is not that of" in line and before.remarks() == []
    assert torch.equal(pipeline.codec.decode(x_0), LatentCodec.load(tmp_path / "vae").decode(x_0))
    assert not torch.allclose(pipeline.codec.decode(x_0), before.codec.decode(x_0))
    run_dir = train(load_config(world / "config.yaml", [other, *again]), device="cpu")
    assert load_pipeline(run_dir).codec.fingerprint == pipeline.codec.fingerprint
    assert verify(run_dir, lambda line: None) == []


def test_x_0_is_clipped_or_replaced_as_asked(trained):
    wild = ["sampling.sampler=ddim", "sampling.cfg_scale=30"]  # whose last step ends at the predicted x_0
    assert latents_with(trained, *wild).abs().max() > 1.5
    assert latents_with(trained, *wild, "sampling.clip=static").abs().max() == 1
    dynamic = latents_with(trained, *wild, "sampling.clip=dynamic")
    assert dynamic.abs().max() == 1 and not torch.equal(dynamic, latents_with(trained, *wild, "sampling.clip=static"))
    assert not latents_with(trained, *wild, denoised_fn=torch.zeros_like).any()


def test_a_folder_of_other_samples_is_never_overwritten(trained, reference, tmp_path):
    with pytest.raises(ValueError, match="seed=0, not 5; choose another --out"):
        sample(trained, reference, COUNT, seed=5, device="cpu")
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(ValueError, match="is not empty"):
        sample(trained, tmp_path, COUNT, device="cpu")
    assert (tmp_path / "mine.txt").read_text() == "precious"
    assert json.loads((reference / "sampling.json").read_text())["seed"] == 0


def test_the_record_names_all_that_determines_the_images(trained, tmp_path):
    own = [f"sampling.weak_checkpoint={trained}"]
    sample(trained, tmp_path / "out", 2, overrides=own, device="cpu")
    record, pipeline = json.loads((tmp_path / "out" / "sampling.json").read_text()), load_pipeline(trained, own)
    assert record["weak_sha256"] == record["sha256"] == pipeline.identity and len(pipeline.identity) == 64
    assert record["vae_fingerprint"] == pipeline.codec.fingerprint and record["fastdit"] == fastdit.__version__


def test_samples_are_continued_if_all_that_is_recorded_agrees(trained, reference, tmp_path):
    out = shutil.copytree(reference, tmp_path / "out")
    record = json.loads((out / "sampling.json").read_text()) | {"vae": "the same in another folder"}
    (out / "sampling.json").write_text(json.dumps(record))
    (out / "images" / "000003.png").unlink()
    sample(trained, out, COUNT, device="cpu")
    assert pictures(out) == pictures(reference) and json.loads((out / "sampling.json").read_text()) == record
    other = ["sampling.steps=3"]
    with pytest.raises(ValueError, match=r"holds samples with sampling.steps='\d+', not '3'; choose another --out"):
        sample(trained, out, COUNT, device="cpu", overrides=other)
    (out / "sampling.json").write_text(json.dumps(record | {"vae_fingerprint": "0"}))
    with pytest.raises(ValueError, match="holds samples with vae_fingerprint='0', not .*; choose another --out"):
        sample(trained, out, COUNT, device="cpu")
    for lost in record:
        (out / "sampling.json").write_text(json.dumps({key: record[key] for key in record if key != lost}))
        with pytest.raises(ValueError, match=f"{out}/sampling.json is damaged: it has no '{lost}'; choose another -"):
            sample(trained, out, COUNT, device="cpu")


def test_the_npz_is_streamed_and_complete(reference):
    with zipfile.ZipFile(reference / "samples.npz") as archive:
        assert archive.namelist() == ["arr_0.npy"] and archive.testzip() is None


def test_bf16_sampling_stays_near_fp32(trained):
    wanted = load_pipeline(trained).latents([0, 1], torch.tensor([0, 1]), 0)
    half = load_pipeline(trained, ["sampling.precision=bf16"]).latents([0, 1], torch.tensor([0, 1]), 0)
    assert 0 < (half - wanted).abs().max() < 0.1


def test_weights_cast_once_give_the_bits_of_autocast(trained):
    generator = load_pipeline(trained, ["sampling.precision=bf16"])
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([0.2, 0.9]), torch.tensor([1, 2])
    model = load_pipeline(trained).model
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        wanted = model(x, t, y).float()
    assert torch.equal(generator.inference(x, t, y), wanted)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_graph_replays_what_the_compiled_network_computes(trained, precision):
    overrides = [f"sampling.precision={precision}"]
    graphed = load_pipeline(trained, overrides, device="cuda").inference
    plain = load_pipeline(trained, [*overrides, "sampling.compile=false"], device="cuda").inference
    y = torch.tensor([1, 2], device="cuda")
    for seed in range(3):
        x = torch.randn(2, 4, 8, 8, device="cuda", generator=torch.Generator("cuda").manual_seed(seed))
        t = torch.full((2,), 0.3 * seed, device="cuda")
        torch.testing.assert_close(graphed(x, t, y), plain(x, t, y), atol=2e-2, rtol=2e-2)
    assert len(graphed.graphs) == 1
