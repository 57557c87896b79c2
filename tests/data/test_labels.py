"""Which files, columns and labels of a source are read: those of one split, under their usual names."""

import json
import tarfile
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from fastdit.data.archives import open_images
from fastdit.data.images import load_crop
from fastdit.data.sources import remarks
from helpers import sources
from helpers.sources import PIXELS, png


def hub_table(root: Path, **columns: str) -> Path:
    """Three rows with columns of these types of the Hugging Face hub; row i of column c has image 3 c + i."""
    values, features = {}, {}
    for number, (name, kind) in enumerate(columns.items()):
        features[name] = {"_type": kind, **({"names": ["p", "q", name]} if kind == "ClassLabel" else {})}
        values[name] = ([{"bytes": png(3 * number + i), "path": None} for i in range(3)] if kind == "Image"
                        else [(i + number) % 3 for i in range(3)])  # fmt: skip
    stored = {"huggingface": json.dumps({"info": {"features": features}})}
    parquet.write_table(pyarrow.table(values).replace_schema_metadata(stored), root / "train.parquet")
    return root


def test_of_several_columns_the_usual_names_count_whatever_comes_first(tmp_path):
    found = open_images(hub_table(tmp_path, mask="Image", color="ClassLabel", image="Image", label="ClassLabel"))
    assert found.class_names == ("p", "q", "label") and list(found.labels) == [0, 1, 2]
    assert [found.open(i).read() for i in range(3)] == [png(6 + i) for i in range(3)]
    found = open_images(hub_table(tmp_path, photo="Image", kind="ClassLabel"))  # there is only one of each type
    assert found.class_names == ("p", "q", "kind") and found.open(1).read() == png(1)
    found = open_images(hub_table(tmp_path, image="Image", label="Image"))  # a mask
    assert found.class_names == () and found.open(1).read() == png(1)


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        ({"left": "Image", "right": "Image"}, "columns left, right may be the image; rename the one to use to image"),
        ({"image": "Image", "color": "ClassLabel", "writer": "ClassLabel"}, "columns color, writer may be the label"),
        ({"image": "Image", "color": "ClassLabel", "label": "Value"}, "columns color, label may be the label"),
    ],
)
def test_columns_that_are_not_told_apart_are_refused(tmp_path, kinds, message):
    with pytest.raises(ValueError, match=message):
        open_images(hub_table(tmp_path, **kinds))


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["train-00000-of-00002", "train-00001-of-00002", "train_small-00000-of-00001", "test-0"], "train-0000"),
        (["train-00000-of-00001-0a1b2c", "trainval-00000-of-00001"], "train-0"),
        (["cifar10_train", "cifar10_test"], "cifar10_train"),
        (["0000", "0001"], "000"),
        (["validation-00000-of-00002", "validation-00001-of-00002"], "validation"),
        (["night", "day"], ""),  # which are no splits
        (["test-0", "validation-0"], "splits test, validation; give a folder with the files of one, or a single file"),
        (["train_large-0", "train_small-0"], "splits train_large, train_small; give"),
    ],
)
def test_parquet_files_of_one_split_are_read(tmp_path, names, wanted):
    table = parquet.read_table(hub_table(tmp_path, image="Image", label="ClassLabel") / "train.parquet")
    (tmp_path / "data").mkdir()
    for name in names:
        parquet.write_table(table, tmp_path / f"data/{name}.parquet")
    (tmp_path / "train.parquet").unlink()
    if "give" in wanted:
        with pytest.raises(ValueError, match=wanted):
            open_images(tmp_path)
        assert len(open_images(tmp_path / f"data/{names[0]}.parquet")) == 3
    else:
        found = open_images(tmp_path)
        assert {path.split(",")[0].removesuffix(".parquet") for path in found.paths} == {
            name for name in names if name.startswith(wanted)}  # fmt: skip


def test_tar_files_of_one_split_are_read(tmp_path):
    (tmp_path / ".cache").mkdir()  # as `hf download --local-dir` leaves it
    for name in ("train-000", "train-001", "val-000"):
        tar_of(tmp_path / f"{name}.tar", f"{name}.png")
    found = open_images(tmp_path)
    assert found.paths == ["train-000.tar/train-000.png", "train-001.tar/train-001.png"]
    assert found.ignored == ("val-000.tar\tnot of the training split",)
    (tmp_path / "train-000.tar").rename(tmp_path / "test-000.tar")
    (tmp_path / "train-001.tar").unlink()
    with pytest.raises(ValueError, match="has files of the splits test, val; give a folder with the files of one"):
        open_images(tmp_path)


def test_rows_of_one_split_are_read(tmp_path):
    path = tmp_path / "list.csv"
    path.write_text("path,split,label\na.png,train,cat\nb.png,test,yak\nc.png,Train,dog\n")
    found = open_images(path)
    assert (found.paths, list(found.labels), found.class_names) == (["a.png", "c.png"], [0, 1], ("cat", "dog"))
    assert found.ignored == ("b.png\tnot of the training split",)
    path.write_text("path,split,label\na.png,val,cat\nb.png,test,cat\n")
    with pytest.raises(ValueError, match="has rows of the splits test, val; leave those of one"):
        open_images(path)
    for text in ("path,split,label\na.png,left,cat\nb.png,right,cat\n", "path,split\na.png,test\nb.png,test\n"):
        path.write_text(text)
        assert open_images(path).paths == ["a.png", "b.png"]


def test_folders_of_splits_are_no_classes(tmp_path):
    paths = [f"{split}/{label}/0.png" for split in ("train", "val") for label in "ab"]
    for path in paths:
        (tmp_path / "set" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / path).write_bytes(png(0))
    message = "has the splits train, val, not classes; give one of them, such as .*set/train"
    with pytest.raises(ValueError, match=message):
        open_images(tmp_path / "set")
    assert open_images(tmp_path / "set/train").class_names == ("a", "b")
    (tmp_path / "set/boat").mkdir()
    (tmp_path / "set/boat/0.png").write_bytes(png(0))
    assert open_images(tmp_path / "set").class_names == ("boat", "train", "val")


def tar_of(path: Path, *names: str) -> Path:
    with tarfile.open(path, "w") as tar:
        for i, name in enumerate(names):
            sources.add(tar, name, b"7" if name.endswith(".cls") else png(i))
    return path


def test_of_several_images_with_a_key_the_plain_one_counts(tmp_path):
    """The field of a WebDataset's file is all after the first dot: key.seg.png is not the image key.png."""
    names = ("a/0.seg.png", "a/0.png", "a/0.cls", "a/1.JPG", "a/1.depth.PNG", "a/1.cls", "b/0.x.png", "b/0.cls")
    source = open_images(tar_of(tmp_path / "x.tar", *names))
    assert [*source.paths] == ["x.tar/a/0.png", "x.tar/a/1.JPG", "x.tar/b/0.x.png"] and [*source.labels] == [7] * 3
    assert [load_crop(source.open(i), 32).tolist() for i in range(3)] == PIXELS[[1, 3, 6]].tolist()
    assert source.ignored == ("x.tar/a/0.seg.png\tnot the image of its key: .seg.png",
                              "x.tar/a/1.depth.PNG\tnot the image of its key: .depth.PNG")  # fmt: skip
    for others in (("a/0.x.png", "a/0.y.png"), ("a/0.png", "a/0.jpg", "a/0.x.png")):
        kinds = ", ".join(name.removeprefix("a/0") for name in others)
        with pytest.raises(ValueError, match=f"{len(others)} images with the key 'a/0' in y.tar: {kinds}; name the"):
            open_images(tar_of(tmp_path / "y.tar", *others))


@pytest.mark.parametrize(
    ("text", "labels", "names"),
    [
        ("Path, Label\na.png, cat\nb.png, ant\n", [1, 0], ("ant", "cat")),
        ("path,class\na.png,2\nb.png,0\n", [2, 0], ("0", "1", "2")),
        ("file_name,caption,class_id\na.png,a cat,1.0\nb.png,an ant,0.0\n", [1, 0], ("0", "1")),
        ('{"path": "a.png"}\n{"path": "b.png", "label": null}\n', [0, 0], ()),
        ('{"path": "a.png", "labels": 1.0}\n{"path": "b.png", "labels": 3}\n', [1, 3], ("0", "1", "2", "3")),
    ],
)
def test_labels_are_found_under_their_usual_names(tmp_path, text, labels, names):
    path = tmp_path / ("list.jsonl" if text.startswith("{") else "list.csv")
    path.write_text(text)
    source = open_images(path)
    assert (source.labels, source.class_names, source.paths) == (labels, names, ["a.png", "b.png"])


def test_a_list_beside_a_flat_folder_of_images_is_pointed_at(tmp_path):
    (tmp_path / "a.png").write_bytes(png(0))
    (tmp_path / "metadata.csv").write_text("file_name,label\na.png,cat\n")
    assert f"for labels in it, use --images {tmp_path}/metadata.csv" in remarks(open_images(tmp_path))
    assert open_images(tmp_path / "metadata.csv").class_names == ("cat",)
    assert len(remarks(open_images(tmp_path / "metadata.csv"))) == 1


def test_images_beside_tar_files_are_not_left_out_silently(tmp_path):
    sources.make_webdataset(tmp_path)
    (tmp_path / "b.png").write_bytes(png(0))
    with pytest.raises(ValueError, match="holds 1 image, such as b.png, beside 2 tar files"):
        open_images(tmp_path)


@pytest.mark.parametrize("label", ["true", "[1]", "1.5", "NaN", '{"a": 1}', "-1", '"-1"'])
def test_a_label_that_is_neither_a_name_nor_a_number_is_an_error(tmp_path, label):
    """It was taken for a missing one, and the network trained without classes."""
    lines = [f'{{"path": "{name}.png", "label": {label}}}\n' for name in "ab"]
    (tmp_path / "list.jsonl").write_text("".join(lines))
    with pytest.raises(ValueError, match=r"list.jsonl has label .*(a whole number|must be 0 or more)"):
        open_images(tmp_path / "list.jsonl")
