"""Latents in the layouts of other programs, made on the spot: their values, their labels, and what is refused."""

import json
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fastdit.cli import main
from fastdit.data.import_latents import import_latents
from fastdit.data.latents import LatentCodec, sample_latents
from fastdit.data.loader import latent_batches, read_moments
from fastdit.data.manifest import Manifest
from fastdit.data.others import LAYOUTS
from fastdit.verify import verify
from helpers.data import tiny_vae, write_cerebras
from helpers.runs import losses
from helpers.shards import take

pytestmark = pytest.mark.usefixtures("one_thread")
COUNT, SHAPE = 13, (4, 16, 16)  # more than ten: 10.npy sorts before 2.npy
LABELS = [i % 3 for i in range(COUNT)]
RNG = np.random.default_rng(0)
MEAN = RNG.normal(1, 4, (2, COUNT, *SHAPE)).astype(np.float32)  # of the images and of their mirror images
STD = RNG.uniform(0.01, 0.5, (2, COUNT, *SHAPE)).astype(np.float32)
CHANNEL_MEAN, CHANNEL_STD = np.array([0.5, -1, 2, 0], np.float32), np.array([2, 3, 4, 5], np.float32)


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("autoencoder") / "vae"
    tiny_vae().save_pretrained(folder)
    return folder


def fast_dit(root: Path) -> Path:
    for part in ("imagenet256_features", "imagenet256_labels"):
        (root / part).mkdir(parents=True)
    for i in range(COUNT):
        np.save(root / f"imagenet256_features/{i}.npy", (MEAN[0, i : i + 1] * np.float32(0.18215)))
        np.save(root / f"imagenet256_labels/{i}.npy", np.array([LABELS[i]]))
    return root


def repa_files() -> dict[str, np.ndarray]:
    both = np.concatenate([MEAN[0], STD[0]], axis=1)
    return {f"{f'{i:08d}'[:5]}/img-mean-std-{i:08d}.npy": both[i] for i in range(COUNT)}


def repa(root: Path, labels=None) -> Path:
    for name, array in repa_files().items():
        (root / "vae-sd" / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(root / "vae-sd" / name, array)
    labels = labels or [[name, label] for name, label in zip(repa_files(), LABELS, strict=True)]
    (root / "vae-sd" / "dataset.json").write_text(json.dumps({"labels": labels}))
    return root


def edm2(root: Path) -> Path:
    source = repa(root) / "vae-sd"
    with zipfile.ZipFile(root / "img-latents.zip", "w") as archive:
        for path in sorted(path for path in source.rglob("*") if path.is_file()):
            archive.write(path, path.relative_to(source))
    return root / "img-latents.zip"


def lightningdit(root: Path, flip: bool = True) -> Path:
    root.mkdir(parents=True)
    for shard, rows in enumerate((slice(0, 8), slice(8, None))):
        tensors = {"latents": torch.tensor(MEAN[0, rows]), "labels": torch.tensor(LABELS[rows])}
        tensors |= {"latents_flip": torch.tensor(MEAN[1, rows])} if flip else {}
        save_file(tensors, root / f"latents_rank00_shard{shard:03d}.safetensors", metadata={"total_size": "8"})
    stats = {"mean": torch.tensor(CHANNEL_MEAN).view(1, 4, 1, 1), "std": torch.tensor(CHANNEL_STD).view(1, 4, 1, 1)}
    torch.save(stats, root / "latents_stats.pt")
    return root


def cerebras(root: Path, orientation: int = 0) -> Path:
    return write_cerebras(root, MEAN[orientation], STD[orientation], LABELS)


MADE = {"fast-dit": fast_dit, "repa": repa, "edm2": edm2, "lightningdit": lightningdit, "cerebras": cerebras}
ORDER = {"cerebras": np.argsort(LABELS, kind="stable")}  # by class; the others keep the order of the numbers


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_its_values_labels_and_scale(layout, tmp_path, vae):
    manifest = import_latents(layout, MADE[layout](tmp_path / "src"), tmp_path / "out", vae=vae, shard_size=5)
    order, index = ORDER.get(layout, np.arange(COUNT)), manifest.index()
    mean, std = read_moments(manifest, index).chunk(2, dim=1)
    sampled = layout in ("fast-dit", "lightningdit")
    np.testing.assert_allclose(mean, MEAN[0, order], rtol=2e-7 if layout == "fast-dit" else 0)
    np.testing.assert_allclose(std, 0 if sampled else STD[0, order], rtol=2e-6 if layout == "cerebras" else 0)
    assert index["label"].tolist() == [LABELS[i] for i in order] and len(manifest.shards) == 3
    assert manifest.class_names == (("n00", "n01", "n02") if layout == "cerebras" else ("0", "1", "2"))
    assert (manifest.latents.shape, manifest.latents.image_size, manifest.dtype) == (SHAPE, 32, "float32")
    assert manifest.orientations == (2 if layout == "lightningdit" else 1)
    assert verify(tmp_path / "out", say=lambda line: None) == []
    assert LatentCodec.load(manifest.latents.vae).fingerprint == manifest.latents.codec
    assert (tmp_path / "out/preview.png").is_file()


def test_a_sampled_latent_trains_as_the_value_that_the_file_holds(tmp_path, vae):
    """x_0 does not depend on the posterior's noise, and is what fast-DiT and LightningDiT train on."""
    batches = {}
    for layout in ("fast-dit", "lightningdit"):
        manifest = import_latents(layout, MADE[layout](tmp_path / layout), tmp_path / f"out-{layout}", vae=vae)
        spec, moments = manifest.latents, read_moments(manifest, manifest.index())
        batches[layout] = sample_latents(moments, torch.randn(COUNT, *SHAPE), spec.scale, spec.shift)
    np.testing.assert_allclose(batches["fast-dit"], MEAN[0] * np.float32(0.18215), rtol=2e-7)
    mean, std = (torch.tensor(values).view(4, 1, 1) for values in (CHANNEL_MEAN, CHANNEL_STD))
    theirs = (torch.tensor(MEAN[0]) - mean) / std
    torch.testing.assert_close(batches["lightningdit"], theirs, rtol=1e-6, atol=1e-6)


def test_mirror_images_come_from_the_source_or_not_at_all(tmp_path, vae):
    one = import_latents("cerebras", cerebras(tmp_path / "a"), tmp_path / "one", vae=vae)
    with pytest.raises(ValueError, match=r"data.hflip=True, but .*one has no latents of mirror.*data.hflip=false"):
        latent_batches(one, global_batch=4, seed=0)
    [batch] = take(one, 1, global_batch=COUNT, seed=0, hflip=False)
    assert {m.tobytes() for m in batch.moments[:, :4].numpy()} == {m.tobytes() for m in MEAN[0]}
    both = import_latents("cerebras", tmp_path / "a/train", tmp_path / "both", vae=vae,
                          mirrored=cerebras(tmp_path / "b", 1))  # fmt: skip
    mirrored = read_moments(both, both.index(), mirrored=True)
    np.testing.assert_array_equal(mirrored[:, :4], MEAN[1, ORDER["cerebras"]])
    assert both.orientations == 2 and verify(tmp_path / "both", say=lambda line: None) == []


def test_edm2s_autoencoder_decodes_to_the_usual_range(tmp_path, vae):
    manifest = import_latents("edm2", edm2(tmp_path / "src"), tmp_path / "out", vae=vae)
    latents = torch.tensor(MEAN[0, :2]) * 0.18215
    before, after = (LatentCodec.load(folder).decode(latents) for folder in (vae, manifest.latents.vae))
    torch.testing.assert_close(after, 2 * before - 1, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="edm2 needs --vae"):
        import_latents("edm2", tmp_path / "src/img-latents.zip", tmp_path / "other")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_trains_from_an_import(layout, tmp_path, vae, capsys):
    command = ["import", layout, str(MADE[layout](tmp_path / "src")), str(tmp_path / "out"), "--vae", str(vae)]
    main([*command, "--image-size", "32"])
    assert ("data.hflip=false" in capsys.readouterr().out) == (layout != "lightningdit")
    settings = ["model.variant=DiT-Ti/4", "training.global_batch=4", "training.steps=2", "training.compile=false",
                "training.report=false", "training.log_every=1", f"data.hflip={layout == 'lightningdit'}",
                "sampling.steps=1", "sampling.cfg_scale=1"]  # fmt: skip
    main(["train", "sit_s_2", f"data.shards={tmp_path / 'out'}", f"run_dir={tmp_path / 'run'}", *settings])
    assert np.isfinite(losses(tmp_path / "run")).all() and len(losses(tmp_path / "run")) == 2
    main(["sample", str(tmp_path / "run"), "--num-samples", "2", *settings[-2:]])
    assert (tmp_path / "run/samples/grid.png").is_file()
    main(["verify", str(tmp_path / "run")])
    assert "all is well" in capsys.readouterr().out


def test_without_an_autoencoder_the_usual_one_is_recorded_by_name(tmp_path):
    manifest = import_latents("repa", repa(tmp_path / "src"), tmp_path / "out")
    spec = manifest.latents
    assert (spec.vae, spec.codec, spec.scale, spec.image_size) == ("stabilityai/sd-vae-ft-mse", "", 0.18215, 128)


def test_an_autoencoder_whose_latents_have_another_shape_is_refused_though_theirs_is_unknown(tmp_path, vae):
    manifest = import_latents("repa", repa(tmp_path / "src"), tmp_path / "out", image_size=32)
    assert manifest.latents.codec == ""
    manifest.check(codec=LatentCodec.load(vae))
    with pytest.raises(ValueError, match=r"vae=none makes latents of shape \(3, .*\) of these images, but those in"):
        manifest.check(codec=LatentCodec.load("none"))


def test_without_its_statistics_lightningdit_takes_the_scale_that_is_given(tmp_path, vae):
    source = lightningdit(tmp_path / "src")
    (source / "latents_stats.pt").unlink()
    with pytest.raises(ValueError, match="has no latents_stats.pt, which says the scale; copy it there, or give"):
        import_latents("lightningdit", source, tmp_path / "out")
    assert import_latents("lightningdit", source, tmp_path / "a", scale=0.5).latents.scale == 0.5
    assert import_latents("lightningdit", source, tmp_path / "b", vae=vae).latents.scale == 0.18215


def test_classes_have_the_names_of_a_file_or_their_numbers(tmp_path, vae):
    source, names = repa(tmp_path / "src"), tmp_path / "names.txt"
    names.write_text("otter\nzebra\nyak\nbear\n")
    assert import_latents("repa", source, tmp_path / "a", vae=vae, classes=names).class_counts == (5, 4, 4, 0)
    names.write_text("otter\nzebra\n")
    with pytest.raises(ValueError, match=r"--classes=.*names.txt names 2 classes, but there is a label 2"):
        import_latents("repa", source, tmp_path / "b", vae=vae, classes=names)
    (source / "vae-sd/dataset.json").unlink()
    assert import_latents("repa", source, tmp_path / "c", vae=vae).class_names == ()
    with pytest.raises(ValueError, match=r"--classes=.* but SRC=.* has no labels"):
        import_latents("repa", source, tmp_path / "d", vae=vae, classes=names)


def test_half_precision_keeps_its_dtype_and_float32_may_become_it(tmp_path, vae):
    source = repa(tmp_path / "src")
    assert import_latents("repa", source, tmp_path / "small", vae=vae, dtype="float16").dtype == "float16"
    for path in (source / "vae-sd").rglob("*.npy"):
        np.save(path, np.load(path).astype(np.float16))
    manifest = import_latents("repa", source, tmp_path / "out", vae=vae)
    mean = read_moments(manifest, manifest.index())[:, :4]
    assert manifest.dtype == "float16" and (mean == torch.tensor(MEAN[0].astype(np.float16)).float()).all()


def test_an_interrupted_import_keeps_the_finished_shards(tmp_path, vae):
    source, out = repa(tmp_path / "src"), tmp_path / "out"
    broken = source / "vae-sd/00000/img-mean-std-00000012.npy"
    kept = broken.read_bytes()
    broken.write_bytes(kept[:100])
    with pytest.raises(ValueError, match=r"img-mean-std-00000012.npy cannot be read.*copy it again"):
        import_latents("repa", source, out, vae=vae, shard_size=5)
    assert not out.exists()
    first = tmp_path / "out.partial/shard-00000.tar"
    assert first.is_file()
    broken.write_bytes(kept)  # another version of the source: it starts again, and gives the same bytes
    import_latents("repa", source, out, vae=vae, shard_size=5)
    import_latents("repa", source, tmp_path / "again", vae=vae, shard_size=5)
    assert {p.name: p.read_bytes() for p in out.glob("*.tar")} == {
        p.name: p.read_bytes() for p in (tmp_path / "again").glob("*.tar")
    }


def damage(path: Path, array: np.ndarray) -> None:
    np.save(path, array, allow_pickle=True)


class Run:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


FEATURE, LABEL = "imagenet256_features/3.npy", "imagenet256_labels/3.npy"
DAMAGES = {  # name: (layout, what happens to the source, what the error says)
    "no label": ("fast-dit", lambda s: (s / LABEL).unlink(), "imagenet256_labels has no 3.npy .1 are missing"),
    "no latent": ("fast-dit", lambda s: (s / FEATURE).unlink(), "imagenet256_features has no 3.npy"),
    "no labels": ("fast-dit", lambda s: shutil.rmtree(s / "imagenet256_labels"), r"has 0 folders \*_labels, not"),
    "nan": ("fast-dit", lambda s: damage(s / FEATURE, np.full((1, *SHAPE), np.nan)), "3.npy has values that are not f"),
    "shape": ("fast-dit", lambda s: damage(s / FEATURE, np.zeros((1, 4, 8, 8))), r"has moments of shape \(1, 8, 8"),
    "integers": ("fast-dit", lambda s: damage(s / FEATURE, np.zeros(SHAPE, int)), "3.npy has int64 of shape"),
    "pickle": ("fast-dit", lambda s: damage(s / FEATURE, np.array([{}])), "3.npy cannot be read: .*allow_pickle=False"),
    "truncated": ("fast-dit", lambda s: (s / FEATURE).write_bytes((s / FEATURE).read_bytes()[:999]), "3.npy cannot be"),
    "float label": ("fast-dit", lambda s: damage(s / LABEL, np.array([1.5])), "3.npy has float64 .* not one label"),
    "negative label": ("fast-dit", lambda s: damage(s / LABEL, np.array([-1])), "3.npy has label -1"),
    "huge label": ("fast-dit", lambda s: damage(s / LABEL, np.array([2**40])), "has label 1099511627776"),
    "empty": ("repa", lambda s: shutil.rmtree(s / "vae-sd/00000"), r"dataset.json names 00000/.*, which is not there"),
    "unlisted": ("repa", lambda s: damage(s / "vae-sd/a.npy", MEAN[0, 0]), "json has no label for a.npy"),
    "json": ("repa", lambda s: (s / "vae-sd/dataset.json").write_text('{"labels": ['), "json is damaged"),
    "odd": ("repa", lambda s: damage(s / "vae-sd/00000/img-mean-std-00000000.npy", np.ones((7, 9, 9), "f4")), "7 chan"),
    "one-hot": ("repa", lambda s: (s / "vae-sd/dataset.json").write_text('{"labels": [["a", [1]]]}'), "not .file, n"),
    "deviation": ("repa", lambda s: damage(s / "vae-sd/00000/img-mean-std-00000002.npy", -np.ones((8, 16, 16), "f4")),
                  "00000002.npy has deviations below 0"),
    "cut zip": ("edm2", lambda s: s.write_bytes(s.read_bytes()[:5000]), "nor a complete zip file"),
    "bytes in zip": ("edm2", lambda s: s.write_bytes(s.read_bytes().replace(MEAN[0, 5].tobytes()[:64], bytes(64))),
                     "00000005.npy cannot be read: Bad CRC"),
    "stats": ("lightningdit", lambda s: (s / "latents_stats.pt").write_bytes(pickle.dumps(Run(s / "was run"))),
              "latents_stats.pt cannot be read as tensors .*nothing in it was run"),
    "stats of zeros": ("lightningdit", lambda s: torch.save({"mean": torch.ones(4), "std": torch.zeros(4)},
                                                            s / "latents_stats.pt"), "not finite and positive"),
    "channels": ("lightningdit", lambda s: torch.save({"mean": torch.ones(3), "std": torch.ones(3)},
                                                      s / "latents_stats.pt"), "has 3 channels, the latents 4"),
    "cut tensors": ("lightningdit", lambda s: (f := s / "latents_rank00_shard001.safetensors").write_bytes(
        f.read_bytes()[:3000]), "shard001.safetensors cannot"),
    "no flip": ("lightningdit", lambda s: save_file({"latents": torch.ones(1, *SHAPE), "labels": torch.ones(1).long()},
                                                    s / "latents_z.safetensors"), "files with latents_flip and files"),
    "wrong folder": ("cerebras", lambda s: (s / "n00/003.npz").rename(s / "n02/003.npz"), "003.npz has label .0"),
    "two classes": ("cerebras", lambda s: shutil.copytree(s / "n01", s / "n07"), "two classes with one label"),
    "object": ("cerebras", lambda s: np.savez(s / "n01/001.npz", vae_output=np.array([Run(s / "was run")]), label=1),
               "001.npz cannot be read: .*allow_pickle=False"),
    "cut npz": ("cerebras", lambda s: (s / "n01/001.npz").write_bytes((s / "n01/001.npz").read_bytes()[:900]),
                "001.npz cannot be read"),
    "other keys": ("cerebras", lambda s: np.savez(s / "n01/001.npz", arr_0=1), "001.npz has arr_0, not vae_output"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_source_is_refused_in_one_line_and_nothing_is_run(name, tmp_path, vae):
    layout, change, message = DAMAGES[name]
    source = MADE[layout](tmp_path / "src")
    change(source)
    with pytest.raises(ValueError, match=message) as caught:
        import_latents(layout, source, tmp_path / "out", vae=vae)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists() and not list(tmp_path.rglob("was run"))


@pytest.mark.parametrize("packed", [False, True])
def test_labels_are_found_in_a_folder_around_which_there_is_another(packed, tmp_path):
    """As `zip -r latents.zip vae-sd` writes it."""
    outer, files = tmp_path / "src" / "outer", sorted(repa(tmp_path / "src/outer/repa").rglob("*.*"))
    if packed:
        outer = tmp_path / "latents.zip"
        with zipfile.ZipFile(outer, "w") as archive:
            for path in files:
                archive.write(path, path.relative_to(tmp_path / "src/outer/repa"))
    manifest = import_latents("repa", outer, tmp_path / "out")
    assert manifest.index()["label"].tolist() == list(LABELS) and manifest.class_names == ("0", "1", "2")
    if not packed:
        np.save(outer / "0.npy", MEAN[0, 0])
        with pytest.raises(ValueError, match="has latents in repa/vae-sd/, with their dataset.json, and elsewhere"):
            import_latents("repa", outer, tmp_path / "again")


def test_two_labels_for_a_file_and_labels_that_cannot_be_are_refused(tmp_path):
    labels = [[name, label] for name, label in zip(repa_files(), LABELS, strict=True)]
    with pytest.raises(ValueError, match=r"two labels for 00000/img-mean-std-00000000.npy, 0 and 2"):
        import_latents("repa", repa(tmp_path / "src", [*labels, [labels[0][0], 2]]), tmp_path / "out")
    with pytest.raises(ValueError, match="dataset.json, other.npy, has label 100000; use labels from 0 to 99999"):
        import_latents("repa", repa(tmp_path / "large", [*labels, ["other.npy", 100_000]]), tmp_path / "out")
    source = cerebras(tmp_path / "cerebras")
    path = min(source.rglob("*.npz"))
    np.savez(path, **{**np.load(path), "label": np.int64(1 << 40)})  # names for all labels below it would not fit
    with pytest.raises(ValueError, match=f"{path} has label {1 << 40}; use labels from 0 to 99999"):
        import_latents("cerebras", source, tmp_path / "out")


def test_wrong_arguments_name_themselves_and_a_remedy(tmp_path, vae):
    source = repa(tmp_path / "src")
    wide = tmp_path / "wide"
    tiny_vae(latent_channels=8).save_pretrained(wide)
    for arguments, options, message in (
        (("repla", source), {}, "FORMAT='repla' is unknown; did you mean 'repa'"),
        (("repa", tmp_path / "none"), {}, "SRC=.*none does not exist"),
        (("fast-dit", source), {}, r"has 0 folders \*_features"),
        (("lightningdit", source), {}, "holds no latents in the layout of lightningdit"),
        (("cerebras", cerebras(tmp_path / "c").parent), {}, "give one of its splits, such as .*/c/train"),
        (("cerebras", cerebras(tmp_path / "c")), {"mirrored": tmp_path / "c/train"}, "c/train is SRC; give the folder"),
        (("repa", source), {"vae": wide}, "has 8 latent channels, but the latents have 4"),
        (("repa", source), {"vae": vae, "image_size": 256}, "makes latents 16 x 16 of 32 x 32 px"),
        (("repa", source), {"vae": vae, "mirrored": source}, "is for cerebras"),
        (("repa", source), {"vae": vae, "dtype": "int8"}, "dtype='int8' is unknown"),
        (("repa", source), {"scale": -1.0}, "must be positive"),
        (("repa", source), {"classes": tmp_path / "none.txt"}, "none.txt cannot be read"),
    ):
        with pytest.raises(ValueError, match=message):
            import_latents(*arguments, tmp_path / "out", **options)
    with pytest.raises(ValueError, match="lies inside SRC"):
        import_latents("repa", source, source / "out")
    Manifest.load(import_latents("repa", source, tmp_path / "out", vae=vae).folder)
    with pytest.raises(ValueError, match="exists"):
        import_latents("repa", source, tmp_path / "out", vae=vae)
