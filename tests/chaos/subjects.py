"""What is fuzzed: small good files of every kind that is read, and what reads them."""

import hashlib
import json
import pickle
import random
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import yaml
from safetensors.torch import save_file

from fastdit.config import load_config, shipped_config
from fastdit.data.archives import open_images
from fastdit.data.features import FeatureManifest, FeatureWriter, publish_features
from fastdit.data.images import read_image
from fastdit.data.import_latents import import_latents
from fastdit.data.loader import latent_batches, read_moments
from fastdit.data.manifest import Manifest
from fastdit.distributed import Ranks
from fastdit.evaluation.evaluate import load_reference
from fastdit.evaluation.images import open_set
from fastdit.evaluation.metrics import frechet_distance
from fastdit.files import sealed
from fastdit.training.weights import read_weights
from fastdit.verify import verify
from helpers import awkward, sources
from helpers.data import make_shards, write_cerebras

COUNT, SIDE = 6, 32  # images; the side of a crop
SHAPE = (4, 8, 8)  # of foreign latents


class Silent(AssertionError):
    """Bytes that changed were used."""


@dataclass(frozen=True)
class Subject:
    """`make(folder)` writes good files and returns what `read(path, out, good)` reads.

    `good`: the path of the unchanged files where no digest was made right, else None. `digests`: whether there are any.
    """

    make: Callable[[Path], Path]
    read: Callable[[Path, Path, Path | None], None]
    digests: bool = False


# images ---------------------------------------------------------------------------------------------------------------


def use_images(path: Path, out: Path, good: Path | None) -> None:
    """Each image by itself, as an extraction reads them; one that cannot be read is skipped with its reason."""
    source = open_images(path)
    refused = []
    for i in range(min(len(source), 40)):
        try:
            read_image(source.open(i), SIDE)
        except (ValueError, OSError) as error:  # those that data.encode skips
            refused.append(f"{path}: {source.paths[i]}: {error}")
    assert source.identity
    if refused:
        raise ValueError(refused[0])


def use_set(path: Path, out: Path, good: Path | None) -> None:
    """As the samples of an evaluation."""
    images = open_set(path, "SAMPLES", str(SIDE))
    for block in images.blocks(range(min(-(-images.count // images.block), 4))):
        assert block.dtype == np.uint8


TINY = SimpleNamespace(name="tiny", hash="0" * 64, dim=5, spatial=0)
ONE = Ranks(0, 0, 1, torch.device("cpu"))


def use_statistics(path: Path, out: Path, good: Path | None) -> None:
    """As the reference of an evaluation."""
    features = load_reference(path, (8, 8), TINY, ONE, save_to=str(out / "again.npz")).features
    moments = features.moments
    frechet_distance(moments, moments)


def one_image(folder: Path) -> Path:
    draw, rng = random.Random(folder.name), np.random.default_rng(0)
    kinds = [
        c
        for kind in (awkward.plain, awkward.turned, awkward.deep, awkward.transparent, awkward.moving)
        for c in kind(rng, (40, 36))
    ]
    case = draw.choice(kinds)
    (folder / f"0.{case.suffix}").write_bytes(case.data)
    return folder


def csv_list(folder: Path) -> Path:
    return sources.make_csv(folder)


def jsonl_list(folder: Path) -> Path:
    return sources.make_jsonl(folder)


# latents --------------------------------------------------------------------------------------------------------------


def latents(folder: Path) -> Path:
    make_shards(folder / "latents")
    return folder / "latents"


def with_features(folder: Path) -> Path:
    """Latents, and beside them features as int8."""
    path = latents(folder)
    index, rng, parts = Manifest.load(path).index(), np.random.default_rng(1), []
    partial = folder / "partial"
    partial.mkdir()
    for shard in (0, 1):
        writer = FeatureWriter(partial, shard, "int8")
        for row in index[index["shard"] == shard]:
            writer.add(int(row["key"]), rng.normal(size=(2, 4, 6)).astype(np.float32), int(row["label"]))
        parts.append(writer.close())
    about = FeatureManifest("tiny", "5" * 64, (2, 2), 6, False, "int8", "float32")
    publish_features(partial, path / "features", about, parts)
    return path


def use_latents(path: Path, out: Path, good: Path | None) -> None:
    found = verify(path, lambda line: None)
    if good and damaged(path, good) and not found:
        raise Silent(f"fastdit verify finds nothing in {path}")
    manifest = Manifest.load(path)
    manifest.check()
    features = FeatureManifest.load(path / "features") if (path / "features").is_dir() else None
    batch = min(8, max(1, len(manifest)))
    batches = latent_batches(manifest, global_batch=batch, seed=0, features=features, prefetch=0)
    expected = None
    if good:
        stored = FeatureManifest.load(good / "features") if features else None
        expected = latent_batches(Manifest.load(good), global_batch=batch, seed=0, features=stored, prefetch=0)
    for one in islice(batches, 5):
        if expected and damaged(path, good):
            other = next(expected)
            same = [a is None or torch.equal(a, b) for a, b in zip(one[1:], other[1:], strict=True)]
            if not all(same):
                raise Silent(f"a batch of {path} has other values than that of the good files")
    read_moments(manifest, manifest.index()[:4])
    if found:
        raise ValueError(f"{path}: {found[0]}")


def damaged(path: Path, good: Path) -> bool:
    """Whether a file was changed whose digest the manifest has; see `seal`."""
    return all(  # an edited manifest may well describe other values
        (path / name).read_bytes() == (good / name).read_bytes()
        for name in ("manifest.json", "features/manifest.json")
        if (good / name).is_file()
    ) and any(
        (path / file.relative_to(good)).read_bytes() != file.read_bytes()
        for file in good.rglob("*")
        if file.suffix in (".tar", ".npy")
    )


def seal(path: Path) -> None:
    """Make the digests in the manifests right, as whoever writes hostile files would."""
    for folder in (path, path / "features"):
        try:
            stored = json.loads((folder / "manifest.json").read_text())
            stored["index_sha256"] = hashlib.sha256((folder / "index.npy").read_bytes()).hexdigest()
            for shard in stored["shards"]:
                data = (folder / shard["name"]).read_bytes()
                shard |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            (folder / "manifest.json").write_text(json.dumps(sealed(stored)))
        except (ValueError, LookupError, TypeError, OSError, RecursionError, MemoryError):
            continue  # the manifest itself was changed; a shard named /dev/zero has no end


# latents of other programs --------------------------------------------------------------------------------------------

RNG = np.random.default_rng(0)
MEAN = RNG.normal(1, 4, (COUNT, *SHAPE)).astype(np.float32)
STD = RNG.uniform(0.01, 0.5, (COUNT, *SHAPE)).astype(np.float32)


def fast_dit(folder: Path) -> Path:
    for part, arrays in (("features", MEAN[:, None]), ("labels", np.arange(COUNT)[:, None] % 3)):
        (folder / f"imagenet256_{part}").mkdir()
        for i in range(COUNT):
            np.save(folder / f"imagenet256_{part}/{i}.npy", arrays[i])
    return folder


def repa(folder: Path) -> Path:
    names = [f"00000/img-mean-std-{i:08d}.npy" for i in range(COUNT)]
    (folder / "vae-sd/00000").mkdir(parents=True)
    for i, name in enumerate(names):
        np.save(folder / "vae-sd" / name, np.concatenate([MEAN[i], STD[i]]))
    labels = [[name, i % 3] for i, name in enumerate(names)]
    (folder / "vae-sd/dataset.json").write_text(json.dumps({"labels": labels}))
    return folder


def repa_zip(folder: Path) -> Path:
    repa(folder)
    with zipfile.ZipFile(folder / "latents.zip", "w") as archive:
        for path in sorted((folder / "vae-sd").rglob("*.*")):
            archive.write(path, path.relative_to(folder / "vae-sd"))
    shutil.rmtree(folder / "vae-sd")
    return folder / "latents.zip"


def lightningdit(folder: Path) -> Path:
    labels = torch.arange(COUNT) % 3
    tensors = {"latents": torch.tensor(MEAN), "latents_flip": torch.tensor(MEAN[..., ::-1].copy()), "labels": labels}
    save_file(tensors, folder / "latents_rank00_shard000.safetensors", metadata={"total_size": "8"})
    torch.save({"mean": torch.zeros(1, 4, 1, 1), "std": torch.ones(1, 4, 1, 1)}, folder / "latents_stats.pt")
    return folder


def cerebras(folder: Path) -> Path:
    return write_cerebras(folder, MEAN, STD, [i % 3 for i in range(COUNT)])


def importing(layout: str) -> Callable[[Path, Path, Path | None], None]:
    def use(path: Path, out: Path, good: Path | None) -> None:
        manifest = import_latents(layout, path, out / "latents", say=lambda line: None)
        if found := verify(out / "latents", lambda line: None):
            assert all("scale" in line or "deviation" in line for line in found), found
        assert len(manifest)

    return use


# evaluation, weights, configs -----------------------------------------------------------------------------------------


def statistics(folder: Path) -> Path:
    about = {"extractor": "tiny", "extractor_sha256": "0" * 64, "sha256": "1" * 64, "images": 9, "size": [8, 8]}
    values = RNG.normal(size=(9, 5))
    np.savez(
        folder / "reference.npz",
        mu=values.mean(0),
        sigma=np.cov(values.T),
        features=values.astype(np.float32),
        about=np.array(json.dumps(about)),
    )
    return folder / "reference.npz"


def samples(folder: Path) -> Path:
    np.savez(folder / "images.npz", arr_0=sources.PIXELS)
    return folder / "images.npz"


def weights(folder: Path) -> Path:
    save_file(
        {"a.weight": torch.randn(64, 9), "a.bias": torch.zeros(64), "b": torch.ones(2, 2, dtype=torch.bfloat16)},
        folder / "model.safetensors",
    )
    return folder / "model.safetensors"


def config(folder: Path) -> Path:
    name = random.Random(folder.name).choice(("sit_s_2", "dit_2b_2"))
    tree = yaml.safe_load(shipped_config(name).read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    return folder / "config.yaml"


def use_config(path: Path, out: Path, good: Path | None) -> None:
    load_config(path)


def tensors_of(path: Path, out: Path, good: Path | None) -> None:
    read_weights(path)


def plain_tar(folder: Path) -> Path:
    """A WebDataset in the older format of tar files, with labels as JSON."""
    with tarfile.open(folder / "a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for i in range(COUNT):
            sources.add(tar, f"{i:06d}.png", sources.png(i))
            sources.add(tar, f"{i:06d}.json", json.dumps({"label": sources.NAMES[i % 3], "n": [i]}).encode())
    return folder / "a.tar"


def cifar_parts(folder: Path) -> Path:
    """CIFAR-10 as a plain tar file, whose pickles are changed in place."""
    rows = sources.PIXELS.transpose(0, 3, 1, 2).reshape(12, -1)
    batch = pickle.dumps({b"data": rows, b"labels": sources.LABELS}, 2)
    return sources.cifar_of(folder / "cifar-10-python.tar", batch, sources.NAMES)


def hub(folder: Path) -> Path:
    return sources.make_parquet(folder)


def metadata(folder: Path) -> Path:
    """Parquet whose Hugging Face metadata is changed, and the file is whole."""
    import pyarrow
    from pyarrow import parquet

    from chaos.mutations import grown

    draw = random.Random(folder.name)
    about = {
        "info": {"features": {"image": {"_type": "Image"}, "label": {"names": [*sources.NAMES], "_type": "ClassLabel"}}}
    }
    cells = draw.choice(
        (
            [sources.png(i) for i in range(4)],
            [{"bytes": sources.png(i)} for i in range(4)],
            ["x"] * 4,
            [1, 2, 3, 4],
            [None, b"", b"x", b"y"],
            [{"path": "/etc/passwd"}] * 4,
            [[b"x"]] * 4,
        )
    )
    labels = draw.choice(([0, 1, 2, 0], ["a", "b", "", None], [1.5] * 4, [[1]] * 4, [-1, 2**40, 0, 1], [True] * 4))
    table = pyarrow.table(
        {draw.choice(("image", "img", "x", "")): cells, draw.choice(("label", "cls", "image")): labels}
    )
    table = table.replace_schema_metadata({"huggingface": json.dumps(grown(about, draw), ensure_ascii=True)})
    parquet.write_table(table, folder / "train.parquet")
    return folder / "train.parquet"


SUBJECTS: dict[str, Subject] = {
    "images": Subject(one_image, use_images),
    "images of an evaluation": Subject(one_image, use_set),
    "class folders": Subject(lambda folder: (sources.loose(folder), folder)[1], use_images),
    "CSV list": Subject(csv_list, use_images),
    "JSONL list": Subject(jsonl_list, use_images),
    "WebDataset": Subject(sources.make_webdataset, use_images),
    "WebDataset with JSON": Subject(plain_tar, use_images),
    "ImageNet, training": Subject(
        lambda folder: (sources.make_devkit(folder), sources.make_imagenet(folder))[1], use_images
    ),
    "ImageNet, validation": Subject(sources.make_imagenet_val, use_images),
    "CIFAR-10, packed": Subject(sources.make_cifar10, use_images),
    "CIFAR-10": Subject(cifar_parts, use_images),
    "CIFAR-100": Subject(sources.make_cifar100, use_images),
    "Parquet": Subject(hub, use_images),
    "Parquet of other types": Subject(metadata, use_images),
    "latents": Subject(latents, use_latents, digests=True),
    "latents with features": Subject(with_features, use_latents, digests=True),
    "latents of fast-DiT": Subject(fast_dit, importing("fast-dit")),
    "latents of REPA": Subject(repa, importing("repa")),
    "latents of REPA, zip": Subject(repa_zip, importing("repa")),
    "latents of LightningDiT": Subject(lightningdit, importing("lightningdit")),
    "latents of Cerebras": Subject(cerebras, importing("cerebras")),
    "reference statistics": Subject(statistics, use_statistics),
    "samples (npz)": Subject(samples, use_set),
    "weights": Subject(weights, tensors_of),
    "config": Subject(config, use_config),
}
