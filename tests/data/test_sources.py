"""Every kind of source gives the same pixels, labels and class names; nothing is unpacked; no pickle is run."""

import gzip
import io
import os
import pickle
import re
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from pyarrow import parquet

from fastdit.data import columns
from fastdit.data.archives import open_images
from fastdit.data.images import load_crop
from fastdit.data.manifest import Manifest
from fastdit.data.sources import MAX_CLASSES, remarks
from fastdit.evaluation.images import open_set
from fastdit.gallery.folders import folder_grid
from fastdit.verify import verify
from helpers import sources
from helpers.data import make_shards, tiny_vae
from helpers.extraction import files_of, run
from helpers.shards import take
from helpers.sources import LABELS, NAMES, PIXELS, add, cifar_of, png

NUMBERS, ALL = ("0", "1", "2"), range(12)
CRANES = ("tench", "crane (n02012849)", "crane (n03126707)")
WNIDS = ("n01440764", "n02012849", "n03126707")
BY_CLASS = sorted(ALL, key=lambda i: (LABELS[i], i))


def with_devkit(root: Path) -> Path:
    sources.make_devkit(root)
    return sources.make_imagenet(root)


def class_folders(root: Path) -> Path:
    sources.loose(root)
    return root


MADE = {
    "class folders": (class_folders, BY_CLASS, NUMBERS, "class folders"),
    "flat": (sources.make_flat, ALL, (), "a folder of images"),
    "csv": (sources.make_csv, ALL, NAMES, "a CSV list"),
    "jsonl": (sources.make_jsonl, ALL, NUMBERS, "a JSONL list"),
    "webdataset": (sources.make_webdataset, ALL, NUMBERS, "a WebDataset"),
    "webdataset with json": (lambda root: sources.make_webdataset(root, "json"), ALL, NAMES, "a WebDataset"),
    "webdataset without labels": (lambda root: sources.make_webdataset(root, "none"), ALL, (), "a WebDataset"),
    "one tar": (lambda root: sources.make_webdataset(root) / "000.tar", range(6), NUMBERS, "a WebDataset"),
    "imagenet": (sources.make_imagenet, BY_CLASS, WNIDS, "ImageNet's training archive"),
    "imagenet in words": (with_devkit, BY_CLASS, CRANES, "ImageNet's training archive"),
    "imagenet val": (sources.make_imagenet_val, ALL, CRANES, "ImageNet's validation archive"),
    "cifar 10": (sources.make_cifar10, ALL, NAMES, "CIFAR-3's training images"),
    "cifar 100": (sources.make_cifar100, ALL, NAMES, "CIFAR-3's training images"),
    "cifar 10, test": (lambda root: sources.make_cifar10(root) / "test", ALL[::-1], NAMES, "CIFAR-3's test images"),
    "cifar 100, test": (lambda root: sources.make_cifar100(root) / "test", ALL[::-1], NAMES, "CIFAR-3's test images"),
    "cifar 10, train": (lambda root: sources.make_cifar10(root) / "train", ALL, NAMES, "CIFAR-3's training images"),
    "parquet": (sources.make_parquet, ALL, NAMES, "Parquet files"),
    "other parquet": (lambda root: sources.make_parquet(root, hub=False), ALL, NAMES, "Parquet files"),
}


def make(kind: str, root: Path) -> tuple[Path, list[int], tuple[str, ...], str]:
    build, images, names, said = MADE[kind]
    return build(root), list(images), names, said


@pytest.mark.parametrize("kind", MADE)
def test_every_source_gives_the_same_images_and_labels(tmp_path, kind):
    path, images, names, said = make(kind, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    source = open_images(path)
    assert source.class_names == names and len(source) == len(images)
    assert list(source.labels) == [LABELS[i] if names else 0 for i in images]
    with ThreadPoolExecutor(4) as pool:
        crops = list(pool.map(lambda i: load_crop(source.open(i), 32), range(len(source))))
    np.testing.assert_array_equal(np.stack(crops), PIXELS[images])
    assert remarks(source)[0] == f"images={source.root}: {said}, {len(images)} images, " + (
        "3 classes" if names else "no classes"
    )
    assert sorted(source.order) == list(range(len(images))) != source.order
    assert sorted(tmp_path.rglob("*")) == before
    assert open_images(path).identity == source.identity


@pytest.mark.parametrize("kind", MADE)
def test_every_source_is_extracted(tmp_path, kind):
    (tmp_path / "source").mkdir()
    path, images, names, said = make(kind, tmp_path / "source")
    tiny_vae().save_pretrained(tmp_path / "vae")
    run(tmp_path, tmp_path / "out", images=path, shard_size=5)
    manifest = Manifest.load(tmp_path / "out")
    assert (manifest.source, manifest.class_names, len(manifest)) == (said, names, len(images))
    assert manifest.num_classes == len(names) and sum(manifest.class_counts) == (len(images) if names else 0)
    labels = dict(zip(manifest.index()["key"].tolist(), manifest.index()["label"].tolist(), strict=True))
    assert [labels[key] for key in range(len(images))] == [LABELS[i] if names else 0 for i in images]
    [batch] = take(manifest, 1, global_batch=4, seed=0)
    assert batch.moments.shape == (4, 8, 16, 16)
    assert [line for line in verify(tmp_path / "out", lambda line: None) if "scaled latents" not in line] == []
    if not names:
        manifest.check(num_classes=0)
        with pytest.raises(ValueError, match="num_classes=3, but the latents .* are of images without classes; set 0"):
            manifest.check(num_classes=3)


def test_groups_of_rows_are_decoded_once_and_by_any_number_of_processes_alike(tmp_path, monkeypatch):
    sources.make_parquet(tmp_path)
    tiny_vae().save_pretrained(tmp_path / "vae")
    run(tmp_path, tmp_path / "out", images=tmp_path / "data", shard_size=5)
    read, groups = parquet.ParquetFile.read_row_group, []
    monkeypatch.setattr(parquet.ParquetFile, "read_row_group",
                        lambda self, i, columns: groups.append((i, *columns)) or read(self, i, columns))  # fmt: skip
    monkeypatch.setattr(columns, "CACHED_GROUPS", 1)
    # one thread: several may be in different groups at once
    run(tmp_path, tmp_path / "again", images=tmp_path / "data", shard_size=5, workers=1)
    assert sum("image" in group for group in groups) == 4 + 3  # the preview reads eight images before
    assert files_of(tmp_path / "again") == files_of(tmp_path / "out")


class Attack:
    def __init__(self, how, *arguments):
        self.how, self.arguments = how, arguments

    def __reduce__(self):
        return self.how, self.arguments


@pytest.mark.parametrize(
    "attack",
    [
        Attack(os.system, "touch MARK"),
        Attack(eval, "open('MARK', 'w')"),
        Attack(getattr, np.ndarray, "tofile"),
        Attack(np.fromfile, "MARK"),
        Attack(np.array, [[1]]),
    ],
)
def test_no_pickle_is_run(tmp_path, monkeypatch, attack):
    monkeypatch.chdir(tmp_path)
    for data in (attack, {"data": attack, "labels": [0]}, {"data": PIXELS[:1].reshape(1, -1), "labels": [attack]}):
        with pytest.raises(ValueError, match="which no CIFAR archive needs; it was not run"):
            open_images(cifar_of(tmp_path / "cifar-10-python.tar.gz", pickle.dumps(data)))
    assert not (tmp_path / "MARK").exists()


def test_a_pickle_of_stand_ins_gone_wrong_is_an_error(tmp_path):
    array = PIXELS[:2].reshape(2, -1)
    for data in (
        {"data": array.astype(np.float32), "labels": [0, 0]},
        {"data": np.array([None, "x"]), "labels": [0, 0]},
        {"data": array, "labels": [0]},
        {"data": array, "labels": [0, 1]},
        {"data": array, "labels": [0, -1]},
        {"data": array[:, :5], "labels": [0, 0]},
        {"data": b"abc", "labels": [0]},
        {"labels": [0]},
        [1, 2],
    ):
        with pytest.raises(ValueError, match="cannot be read as CIFAR .*; copy it again") as error:
            open_images(cifar_of(tmp_path / "cifar-10-python.tar.gz", pickle.dumps(data)))
        assert "\n" not in str(error.value)
    data = pickle.dumps({"data": array, "labels": [0, 0]})
    for cut in range(0, len(data) - 1, 97):
        with pytest.raises(ValueError, match="cannot be read as CIFAR"):
            open_images(cifar_of(tmp_path / "cifar-10-python.tar.gz", data[:cut]))


def mistaken(root: Path, how: str) -> Path:
    path = root / "list.csv"
    if how == "latents":
        make_shards(root / "latents")
        return root / "latents"
    if how == "packed tar":
        with tarfile.open(root / "x.tar.gz", "w:gz") as tar:
            add(tar, "0.png", png(0))
        return root / "x.tar.gz"
    if how == "cut tar":
        sources.make_webdataset(root)
        os.truncate(root / "001.tar", 3000)
        return root
    if how == "some labels":
        with tarfile.open(root / "x.tar", "w") as tar:
            for i in range(3):
                add(tar, f"{i}.png", png(i))
            add(tar, "0.cls", b"1")
        return root / "x.tar"
    if how == "no images":
        with tarfile.open(root / "x.tar", "w") as tar:
            add(tar, "0.txt", b"hello")
        return root / "x.tar"
    if how == "val alone":
        sources.make_imagenet_val(root)
        (root / "ILSVRC2012_devkit_t12.tar.gz").unlink()
        return root / "ILSVRC2012_img_val.tar"
    if how == "cut devkit":
        sources.make_imagenet_val(root)
        data = gzip.decompress((root / "ILSVRC2012_devkit_t12.tar.gz").read_bytes())
        (root / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(gzip.compress(data[:700]))
        return root / "ILSVRC2012_img_val.tar"
    if how == "text":
        path = root / "images.txt"
    text = {
        "no header": "a.png,cat\nb.png,dog\n",
        "empty": "",
        "no path": "path,label\na.png,cat\n,dog\n",
        "some": "path,label\na.png,cat\nb.png,\n",
        "large": f"path,label\na.png,{MAX_CLASSES}\n",
        "json": '{"path": "a.png"}\n{"path": \n',
        "json list": '["a.png"]\n',
        "text": "hello",
    }[how]
    if how.startswith("json"):
        path = root / "list.jsonl"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("latents", "holds latents, not images; train on them with data.shards=.*latents"),
        ("packed tar", "holds 0.png; of the compressed tar files only CIFAR's are read.*decompress it"),
        ("cut tar", "001.tar is not an uncompressed tar file .*; copy it again"),
        ("some labels", "has no label for 2 of 3 images .the first is 'x.tar/1.png'.*; give all or none"),
        ("no images", "x.tar has no images in it"),
        ("val alone", "has no labels in it; put ILSVRC2012_devkit_t12.tar.gz, which has, beside it"),
        ("cut devkit", "ILSVRC2012_devkit_t12.tar.gz is damaged"),
        ("no header", "has no rows with a path; it needs the first line `path,label`"),
        ("empty", "has no rows with a path"),
        ("no path", "has no path in row 2; complete it, or remove the row"),
        ("some", "has no label for 1 of 2 images .the first is 'b.png'"),
        ("large", "has label 100000; numbers must be below 100000"),
        ("json", "cannot be read .Expecting value"),
        ("json list", "has no rows with a path; it needs .* lines"),
        ("text", "images.txt is of no known kind; give a folder of class folders, .*, or Parquet files"),
    ],
)
def test_what_is_wrong_with_a_source_is_one_line(tmp_path, how, message):
    path = mistaken(tmp_path, how)
    with pytest.raises(ValueError, match=message) as error:
        open_images(path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("what", "files"),
    [
        ("latents", ["manifest.json", "index.npy", "preview.png"]),
        ("a run", ["config.yaml", "checkpoints", "report.html"]),
        ("samples with their grid", ["sampling.json", "grid.png"]),
    ],
)
def test_what_a_command_wrote_is_no_class(tmp_path, what, files):
    """Its pictures, such as preview.png, would be the images of one more class."""
    for folder in ("cat", "out"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.png").write_bytes(png(0))
    assert open_images(tmp_path).class_names == ("cat", "out")
    for name in files:
        (tmp_path / "out" / name).write_bytes(png(1))
    with pytest.raises(ValueError, match=f"has a subfolder 'out' that holds {what}, not the images of a class"):
        open_images(tmp_path)


def test_without_pyarrow_parquet_says_what_it_needs(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "train.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="is Parquet, which needs pyarrow; run pip install pyarrow"):
        open_images(tmp_path)


def test_damaged_parquet_is_an_error(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"PAR1 hello")
    with pytest.raises(ValueError, match="cannot be read as Parquet"):
        open_images(tmp_path)


def test_files_of_a_list_that_are_missing_are_skipped_by_name(tmp_path):
    path = sources.make_csv(tmp_path)
    path.write_text(path.read_text() + "ant,gone.png\n")
    os.mkfifo(tmp_path / "pipe.png")
    source = open_images(path)
    with pytest.raises(ValueError, match="gone.png is not a file"):
        source.open(12)
    tiny_vae().save_pretrained(tmp_path / "vae")
    run(tmp_path, tmp_path / "out", images=path)
    assert re.match(r"gone.png\t.*gone.png is not a file", (tmp_path / "out" / "skipped.txt").read_text())
    path.write_text("path,label\npipe.png,ant\n0/Bild 00 ä.PNG,ant\n")
    with pytest.raises(ValueError, match="pipe.png is not a file"):
        open_images(path).open(0)


def test_numbers_without_images_are_remarked_upon(tmp_path):
    sources.loose(tmp_path)
    (tmp_path / "list.csv").write_text("path,label\n0/Bild 00 ä.PNG,1\n1/Bild 01 ä.PNG,3\n")
    source = open_images(tmp_path / "list.csv")
    assert source.class_names == ("0", "1", "2", "3") and source.labels == [1, 3]
    assert "2 of 4 classes have no images (the first is '0')" in remarks(source)


def test_a_split_is_of_a_known_archive_and_another_source_than_the_rest(tmp_path):
    archive = sources.make_cifar10(tmp_path)
    one, two = open_images(archive), open_images(archive / "test")
    assert one.identity != two.identity and one.identity == open_images(archive / "train").identity
    assert remarks(two)[0].startswith(f"images={archive}/test: CIFAR-3's test images, 12 images")
    (tmp_path / "file.csv").write_text("path\n")
    with pytest.raises(ValueError, match="test/0.png does not exist"):
        open_images(archive / "test" / "0.png")
    tar = sources.make_webdataset(tmp_path) / "000.tar"
    for path in (archive / "tests", tmp_path / "file.csv" / "test", tar / "test"):
        with pytest.raises(ValueError, match="is a file, and only CIFAR.s archives have splits, ARCHIVE/train and"):
            open_images(path)


def test_a_split_is_a_reference_and_a_grid(tmp_path):
    archive = sources.make_cifar10(tmp_path)
    images = open_set(archive / "test", "--reference")
    assert images.count == 12 and np.array_equal(next(images.blocks([0])), PIXELS[::-1])
    assert folder_grid(archive / "test", 2, 2, labels=False).size == folder_grid(archive, 2, 2, labels=False).size
    for path in (archive / "dev", tmp_path / "gone" / "test"):
        with pytest.raises(ValueError, match="^--reference="):
            open_set(path, "--reference")


def test_files_that_are_not_of_the_training_images_are_named(tmp_path):
    ignored = dict(line.split("\t") for line in open_images(sources.make_cifar10(tmp_path)).ignored)
    assert ignored == {
        "cifar-10-batches-py/readme.html": "not of the training images",
        "cifar-10-batches-py/test_batch": "not of the training images",
    }
    ignored = open_images(tmp_path / "cifar-10-python.tar.gz" / "test").ignored
    assert [line.split("\t")[1] for line in ignored] == ["not of the test images"] * 3
    ignored = open_images(sources.make_webdataset(tmp_path)).ignored
    assert len(ignored) == 12 and ignored[0] == "000.tar/folder.v2/000000.txt\tname ends in .txt"


def test_identity_sees_labels_and_contents(tmp_path):
    path = sources.make_csv(tmp_path)
    found = {open_images(path).identity}
    path.write_text(path.read_text().replace("bee", "bug"))
    found.add(open_images(path).identity)
    (tmp_path / "0" / "Bild 00 ä.PNG").write_bytes(png(1))
    found.add(open_images(path).identity)
    assert len(found) == 3


def test_an_image_object_in_memory_is_read_like_its_file():
    np.testing.assert_array_equal(load_crop(io.BytesIO(png(3)), 32), PIXELS[3])
