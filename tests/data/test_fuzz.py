"""A short version of `make fuzz`, and by name the faults that it found."""

import io
import json
import random
import struct
import zipfile
import zlib

import numpy as np
import pyarrow
import pytest
import yaml
from pyarrow import parquet
from scipy.io import loadmat, savemat

from chaos import fuzz, mutate, subjects
from chaos.pictures import member
from fastdit.config import load_config
from fastdit.data.archives import members, open_images
from fastdit.data.features import FeatureManifest
from fastdit.data.images import read_image
from fastdit.data.import_latents import import_latents
from fastdit.data.matlab import structures
from fastdit.evaluation.images import open_set, read_statistics
from fastdit.verify import verify
from helpers.checkpoints import quiet
from helpers.data import edit_manifest

pytestmark = pytest.mark.usefixtures("one_thread")


def test_mutated_files_are_read_or_refused_by_name(tmp_path):
    ends = list(fuzz.fuzzed(tmp_path, seed=0, numbers=range(300)))
    assert [end.number for end in ends] == list(range(300))
    assert not [end for end in ends if end.how not in (fuzz.READ, fuzz.REFUSED)]
    assert all(sum(end.how == how for end in ends) > 50 for how in (fuzz.READ, fuzz.REFUSED))


def hang(*_):
    while True:
        pass


def crash(*_):
    import ctypes

    ctypes.string_at(0)


def silent(path, *_):
    raise subjects.Silent("a batch has other values")


def escape(path, out, _):
    (out.parent / "cwd" / "x").write_text("")


def execute(*_):
    (subjects.Path.cwd() / "canary").touch()


def grow(*_):
    np.empty(1 << 40)


def fail(*_):
    raise KeyError("x")


@pytest.mark.parametrize(
    "read, how",
    [(hang, fuzz.HANGS), (crash, fuzz.CRASHES), (silent, fuzz.SILENT), (escape, fuzz.OUTSIDE), (execute, fuzz.EXECUTED),
     (grow, fuzz.BLOW_UPS), (fail, fuzz.OTHERS), (lambda *_: int("x"), fuzz.UNNAMED), (lambda *_: None, fuzz.READ)],
)  # fmt: skip
def test_the_watch_sees_every_kind_of_fault(tmp_path, monkeypatch, read, how):
    monkeypatch.setattr(fuzz, "LIMIT_S", 0.2)
    monkeypatch.setitem(subjects.SUBJECTS, "weights", subjects.Subject(subjects.weights, read))
    ends = list(fuzz.fuzzed(tmp_path, 0, [0, 1], ["weights"]))
    assert [end.how for end in ends] == [how, how]


@pytest.mark.parametrize("size", [-512, -1024])
def test_a_member_of_a_tar_that_leads_back_ends_the_reading(tmp_path, size):
    """tarfile of Python up to 3.11.13 reads it again and again."""
    path = subjects.plain_tar(tmp_path)
    data = bytearray(path.read_bytes())
    data[124:136] = size.to_bytes(12, "big", signed=True)
    data[148:156] = b"        "
    data[148:156] = b"%06o\0 " % sum(data[:512])
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"a.tar is .*000000.png says {size} bytes"):
        list(members(path))
    with pytest.raises(ValueError, match="a.tar is of no known kind"):
        open_images(path)


def test_records_before_a_member_are_read_up_to_a_limit(tmp_path):
    """tarfile would ask for all of their memory at once."""
    path = subjects.plain_tar(tmp_path)
    path.write_bytes(member("000000.png") + member("x", b"", b"x", size=8 << 30) + path.read_bytes())
    with pytest.raises(ValueError, match="a.tar is .* says 8589934592 bytes"):
        open_images(path)


@pytest.mark.parametrize("compressed", [False, True])
def test_structures_of_matlab_are_read_as_scipy_reads_them(compressed):
    rows = [(i, f"n{i:08d}", f"word {i}, ä", np.arange(i), 0.5 * i) for i in range(300)]
    kind = [(name, "O") for name in ("ID", "WNID", "words", "children", "height")]
    file = io.BytesIO()
    savemat(file, {"other": np.eye(3), "synsets": np.array(rows, kind).reshape(-1, 1)}, do_compression=compressed)
    expected = loadmat(io.BytesIO(file.getvalue()), squeeze_me=True)["synsets"]
    found = structures(file.getvalue(), "synsets", 1 << 20)
    assert len(found) == len(expected) == 300
    for own, other in zip(found, expected, strict=True):
        for key in ("ID", "WNID", "words", "height"):
            assert own[key] == other[key]
    with pytest.raises(ValueError, match="no structure x"):
        structures(file.getvalue(), "x", 1 << 20)


def test_damaged_structures_of_matlab_are_errors():
    """SciPy's reader can be crashed by them."""
    file, draw, refused = io.BytesIO(), random.Random(0), 0
    savemat(file, {"synsets": np.array([(1, "n1", "a"), (2, "n2", "b")], [(n, "O") for n in "abc"])})
    for _ in range(500):
        try:
            structures(mutate.mutate("meta.mat", file.getvalue(), draw), "synsets", 1 << 20)
        except (ValueError, struct.error, zlib.error):
            refused += 1
    assert refused > 100


def test_a_shard_of_nothing_is_a_finding(tmp_path):
    folder = subjects.latents(tmp_path)
    (folder / "shard-00001.tar").write_bytes(b"")
    subjects.seal(folder)
    assert any("index.npy has samples outside the shards" in line for line in verify(folder, quiet))


@pytest.mark.parametrize("value", [[], [1.0]])
def test_statistics_of_other_channels_are_a_finding(tmp_path, value):
    folder = subjects.latents(tmp_path)
    edit_manifest(folder, channel_mean=value)
    assert any("the channel means are" in line for line in verify(folder, quiet))


def test_features_of_records_that_numpy_does_not_have_are_named(tmp_path):
    folder = subjects.with_features(tmp_path) / "features"
    edit_manifest(folder, grid=[1024, 1024], dim=65536)
    with pytest.raises(ValueError, match="features/manifest.json is damaged"):
        FeatureManifest.load(folder)


@pytest.mark.parametrize("label, words", [("9" * 5000, "a.csv has label of 5000 digits"), ("123456", "label 123456")])
def test_a_label_of_many_digits_names_the_list(tmp_path, label, words):
    (tmp_path / "a.csv").write_text(f"path,label\nx.png,{label}\n")
    with pytest.raises(ValueError, match=words):
        open_images(tmp_path / "a.csv")


@pytest.mark.parametrize("name", ["a\\u0000b.png", "\\ud800.png"])
def test_a_path_that_no_file_can_have_is_skipped_by_name(tmp_path, name):
    (tmp_path / "a.jsonl").write_text(f'{{"path": "{name}"}}\n')
    with pytest.raises(ValueError, match="is not a file"):
        open_images(tmp_path / "a.jsonl").open(0)


@pytest.mark.parametrize("cell", [["x"], "text", 5])
def test_parquet_whose_images_are_no_bytes_is_an_error(tmp_path, cell):
    parquet.write_table(pyarrow.table({"image": [cell, cell]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="no bytes in this row"):
        read_image(open_images(tmp_path / "a.parquet").open(0), 32)


@pytest.mark.parametrize("header", [b"(" * 100, b"{'a\0", b"{'descr': '|u1', 'fortran_order': False, 'shape': (9, "])
def test_the_header_of_an_array_of_samples_is_one_line(tmp_path, header):
    with open(tmp_path / "a.npy", "wb") as file:
        file.write(b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.write(tmp_path / "a.npy", "arr_0.npy")
    with pytest.raises(ValueError, match="SAMPLES=.*a.npz cannot be read"):
        open_set(tmp_path / "a.npz", "SAMPLES")


def test_foreign_latents_that_overflow_are_named(tmp_path):
    source = subjects.fast_dit(tmp_path)
    np.save(source / "imagenet256_features/2.npy", np.full((1, 4, 8, 8), 3e38, np.float32))
    with pytest.raises(ValueError, match="imagenet256_features/2.npy has values too large"):
        import_latents("fast-dit", source, tmp_path.with_name("out"), say=quiet)


@pytest.mark.parametrize("change", [
    {"features": None}, {"features": np.full((9, 5), np.nan, np.float32)}, {"features": np.zeros((9, 5), np.int64)},
    {"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, {"sigma": np.diag([3e38] * 5)}, {"sigma": np.triu(np.ones((5, 5)))},
    {"about": {"size": 8}}, {"about": {"images": "many"}},
])  # fmt: skip
def test_statistics_of_a_reference_that_are_damaged_are_named(tmp_path, change):
    path = subjects.statistics(tmp_path)
    with np.load(path) as stored:
        arrays = dict(stored)
    about = json.loads(str(arrays["about"])) | change.pop("about", {})
    np.savez(path, **{**arrays, "about": np.array(json.dumps(about)), **change})
    if "features" in change and change["features"] is None:
        with zipfile.ZipFile(path, "w") as archive:  # NumPy returns what is not a .npy file as bytes
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w") as file:
                    file.write(b"x") if name == "features" else np.lib.format.write_array(file, array)
    with pytest.raises(ValueError, match="--reference=.*reference.npz"):
        read_statistics(path, "--reference")


def test_a_foreign_latent_in_a_zip_names_the_zip(tmp_path):
    source = subjects.repa(tmp_path)
    path = source / "vae-sd/00000/img-mean-std-00000002.npy"
    np.save(path, -np.load(path))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for file in (source / "vae-sd").rglob("*.*"):
            archive.write(file, file.relative_to(source / "vae-sd"))
    with pytest.raises(ValueError, match="a.zip: 00000/img-mean-std-00000002.npy has deviations below 0"):
        import_latents("repa", tmp_path / "a.zip", tmp_path.with_name("out"), say=quiet)


def test_foreign_latents_without_a_side_are_named(tmp_path):
    source = subjects.fast_dit(tmp_path)
    np.save(source / "imagenet256_features/0.npy", np.zeros((1, 4, 0, 8), np.float32))
    with pytest.raises(ValueError, match="imagenet256_features/0.npy has float32 of shape"):
        import_latents("fast-dit", source, tmp_path.with_name("out"), say=quiet)


@pytest.mark.parametrize("text", ["!!int ''", "!!bool x", "!!timestamp x", "{[1]: 2}", "!!python/name:os.system x"])
def test_yaml_whose_value_does_not_fit_its_tag_is_one_line(tmp_path, text):
    (tmp_path / "a.yaml").write_text(f"training: {text}\n")
    with pytest.raises(ValueError, match="a.yaml") as error:
        load_config(tmp_path / "a.yaml")
    assert not isinstance(error.value, yaml.YAMLError)
