"""The same twelve images of three classes in every kind of source that is read."""

import csv
import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), np.uint8)
LABELS = [i % 3 for i in range(12)]
NAMES = ("ant", "bee", "cat")


def png(i: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(PIXELS[i]).save(file, "PNG")
    return file.getvalue()


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def loose(folder: Path) -> list[str]:
    """The images as files; their paths relative to the folder."""
    paths = [f"{LABELS[i]}/Bild {i:02d} ä.PNG" for i in range(12)]
    for i, path in enumerate(paths):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(png(i))
    return paths


def make_flat(root: Path) -> Path:
    for i in range(12):
        (root / f"{i:02d}.png").write_bytes(png(i))
    (root / "readme.txt").write_text("hello")
    return root


def make_csv(root: Path) -> Path:
    with (root / "list.csv").open("w", encoding="utf-8-sig", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["label", "path"])
        rows.writerows([NAMES[LABELS[i]], path] for i, path in enumerate(loose(root)))
    return root / "list.csv"


def make_jsonl(root: Path) -> Path:
    lines = [json.dumps({"file_name": path, "label": LABELS[i]}) for i, path in enumerate(loose(root))]
    (root / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return root / "metadata.jsonl"


def make_webdataset(root: Path, kind: str = "cls") -> Path:
    """As the library writes it, in two tar files; `kind` of the labels: cls, json or none."""
    import webdataset

    for number in range(2):
        with webdataset.TarWriter(str(root / f"{number:03d}.tar")) as tar:
            for i in range(6 * number, 6 * number + 6):
                label = {"cls": {"cls": LABELS[i]}, "json": {"json": {"label": NAMES[LABELS[i]]}}, "none": {}}[kind]
                tar.write({"__key__": f"folder.v2/{i:06d}", "png": png(i), **label, "txt": "a caption"})
    return root


def make_imagenet(root: Path) -> Path:
    """ILSVRC2012_img_train.tar; its classes are in another order than the devkit's numbers."""
    wnids = ["n01440764", "n02012849", "n03126707"]
    with tarfile.open(root / "ILSVRC2012_img_train.tar", "w") as outer:
        for label in (2, 0, 1):
            data = io.BytesIO()
            with tarfile.open(fileobj=data, mode="w", format=tarfile.USTAR_FORMAT) as inner:
                for i in range(12):
                    if LABELS[i] == label:
                        add(inner, f"{wnids[label]}_{i}.JPEG", png(i))
            add(outer, f"{wnids[label]}.tar", data.getvalue())
    return root / "ILSVRC2012_img_train.tar"


def make_devkit(root: Path) -> Path:
    """ILSVRC2012_devkit_t12.tar.gz with MATLAB's struct array, in which numbers are not in the order of the classes."""
    from scipy.io import savemat

    rows = [
        (1, "n03126707", "crane", "lifts", 0),
        (2, "n01440764", "tench, Tinca tinca", "a fish", 0),
        (3, "n02012849", "crane", "a bird", 0),
        (4, "n00001740", "entity", "everything", 3),
    ]
    kind = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")]
    file = io.BytesIO()
    savemat(file, {"synsets": np.array(rows, kind).reshape(-1, 1)})
    truth = "".join(f"{[2, 3, 1][LABELS[i]]}\n" for i in range(12))
    with tarfile.open(root / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as tar:
        add(tar, "ILSVRC2012_devkit_t12/data/meta.mat", file.getvalue())
        add(tar, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", truth.encode())
        add(tar, "ILSVRC2012_devkit_t12/readme.txt", b"hello")
    return root


def make_imagenet_val(root: Path) -> Path:
    make_devkit(root)
    with tarfile.open(root / "ILSVRC2012_img_val.tar", "w") as tar:
        for i in reversed(range(12)):
            add(tar, f"ILSVRC2012_val_{i + 1:08d}.JPEG", png(i))
    return root / "ILSVRC2012_img_val.tar"


def make_cifar10(root: Path) -> Path:
    """cifar-10-python.tar.gz with the keys, types and protocol of the original, which Python 2 wrote."""
    rows = PIXELS.transpose(0, 3, 1, 2).reshape(12, -1)
    with tarfile.open(root / "cifar-10-python.tar.gz", "w:gz") as tar:
        add(tar, "cifar-10-batches-py/batches.meta", pickle.dumps({b"label_names": [n.encode() for n in NAMES]}, 2))
        for number, part in enumerate((slice(0, 5), slice(5, 12)), start=1):
            batch = {b"data": rows[part], b"labels": LABELS[part], b"batch_label": b"training batch"}
            add(tar, f"cifar-10-batches-py/data_batch_{number}", pickle.dumps(batch, 2))
        batch = {b"data": rows[11::-1], b"labels": LABELS[11::-1], b"batch_label": b"testing batch"}
        add(tar, "cifar-10-batches-py/test_batch", pickle.dumps(batch, 2))
        add(tar, "cifar-10-batches-py/readme.html", b"hello")
    return root / "cifar-10-python.tar.gz"


def cifar_of(path: Path, batch: bytes, names: tuple[str, ...] = ("a",)) -> Path:
    """CIFAR-10 of these classes and of one batch, the bytes of its pickle; compressed if the path ends in .gz."""
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        add(tar, "cifar-10-batches-py/batches.meta", pickle.dumps({b"label_names": [n.encode() for n in names]}, 2))
        add(tar, "cifar-10-batches-py/data_batch_1", batch)
    return path


def make_cifar100(root: Path) -> Path:
    batch = {"data": PIXELS.transpose(0, 3, 1, 2).reshape(12, -1), "fine_labels": LABELS, "coarse_labels": [0] * 12}
    with tarfile.open(root / "cifar-100-python.tar", "w") as tar:
        add(tar, "cifar-100-python/meta", pickle.dumps({"fine_label_names": [*NAMES], "coarse_label_names": ["x"]}))
        add(tar, "cifar-100-python/train", pickle.dumps(batch))
        batch = {key: values[11::-1] for key, values in batch.items()}
        add(tar, "cifar-100-python/test", pickle.dumps(batch))
    return root / "cifar-100-python.tar"


def make_parquet(root: Path, hub: bool = True) -> Path:
    """Two files with two groups of rows each, with the hub's schema and folders, or with bytes and names alone."""
    import pyarrow
    from pyarrow import parquet

    (root / "data").mkdir()
    splits = {"train-00000-of-00002": range(7), "train-00001-of-00002": range(7, 12), "test": range(2)}
    for split, numbers in splits.items():
        if hub:
            columns = {
                "image": [{"bytes": png(i), "path": None} for i in numbers],
                "label": [LABELS[i] for i in numbers],
            }
            about = {"image": {"_type": "Image"}, "label": {"names": NAMES, "_type": "ClassLabel"}}
            table = pyarrow.table(columns).replace_schema_metadata(
                {"huggingface": json.dumps({"info": {"features": about}})}
            )
        else:
            table = pyarrow.table({"img": [png(i) for i in numbers], "label": [NAMES[LABELS[i]] for i in numbers]})
        parquet.write_table(table, root / "data" / f"{split}.parquet", row_group_size=4)
    return root
