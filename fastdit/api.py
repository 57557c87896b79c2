"""What `import fastdit` offers, on the same code paths as the commands.

    model = fastdit.load("runs/mine")
    images = model.sample(classes=["cat", "dog"], n=16, cfg_scale=4, seed=0)
    fastdit.grid(images, columns=4)
    fastdit.extract("images", "latents", vae="vae", image_size=256)
    fastdit.train("sit_s_2", shards="latents", run_dir="runs/mine", training={"steps": 1000})
    fastdit.train_vae("vae_kl_f4", images="images", run_dir="runs/vae")
"""

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fastdit import distributed
from fastdit.autoencoder.config import AutoencoderConfig
from fastdit.autoencoder.loop import train_autoencoder
from fastdit.config import config_from, load_config, take_steps, to_tree
from fastdit.convert import convert, read_initial
from fastdit.data.add_features import check_listed
from fastdit.data.archives import open_images
from fastdit.data.extract import extract_features
from fastdit.data.images import size_text
from fastdit.data.latents import LatentCodec
from fastdit.data.manifest import Manifest
from fastdit.data.opening import is_local
from fastdit.errors import counted
from fastdit.evaluation.encoders import load_encoder
from fastdit.files import yaml_line
from fastdit.report import report_at_end
from fastdit.sampling import ImagePipeline, load_pipeline
from fastdit.schema import SD_VAE, Config, shards_text
from fastdit.sheets import in_rows, labelled, tiled
from fastdit.training.loop import train as run_training

SECTIONS = ("data", "model", "objective", "sampling", "training")


@dataclass(frozen=True)
class Model:
    """A trained network with its sampler and autoencoder; made by `load`."""

    path: Path
    weights: str
    pipeline: ImagePipeline = field(repr=False)
    device: torch.device

    @property
    def config(self) -> Config:
        return self.pipeline.config

    @property
    def class_names(self) -> tuple[str, ...]:
        """() where they are not known."""
        return self.pipeline.classes.names

    def sample(
        self, classes: int | str | Iterable[int | str] | None = None, n: int = 16, *, seed: int = 0, **settings: Any
    ) -> list[Image.Image]:
        """`n` images, the same as files 0 to n - 1 of `fastdit sample` with these settings.

        `classes`: a class by number or name, several to take in turn, or None for all trained classes in turn.
        `settings`: keys of the config section `sampling`, such as cfg_scale=4, steps=50, sampler="heun". ValueError for
        an unknown class or setting.
        """
        pipeline = self.pipeline
        if settings:
            fixed = [key for key in ("precision", "compile", "weak_checkpoint") if key in settings]
            if fixed:
                raise ValueError(f"sample({fixed[0]}=...) must be known when the model is loaded; pass it to load()")
            overrides = [f"sampling.{key}={yaml_line(value)}" for key, value in settings.items()]
            pipeline = pipeline.changed(overrides, "sample()")
        chosen = list(classes) if isinstance(classes, Iterable) else [classes]
        chosen = classes if isinstance(classes, str | None) else chosen
        if n < 1 or chosen is not None and not chosen:
            raise ValueError(f"sample(classes={classes!r}, n={n}) makes no image; use n=1 or more, and None for all "
                             "classes")  # fmt: skip
        labels = pipeline.classes.labels(chosen, n, seed)
        batches = (pipeline.batch(b, labels, seed) for b in range(pipeline.batches(n)))
        return [Image.fromarray(image) for images in batches for image in images]


def load(path: str | Path, *, weights: str = "ema", device: str | None = None, **settings: Any) -> Model:
    """The model at `path`: a run, a checkpoint, an official DiT or SiT .pt file, or a diffusers folder.

    `weights`: "ema" or "model". `device`: by default the GPU if there is one. `settings`: as in `Model.sample`, and
    keys of other sections as {"data.vae": "vae"}; for a source that fastdit did not write also {"objective": "flow"}
    and others.
    """
    path, chosen = Path(path), distributed.named_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    distributed.make_fast(chosen)
    dotted = {key: settings.pop(key) for key in list(settings) if key.partition(".")[0] in SECTIONS}
    overrides = [f"sampling.{key}={yaml_line(value)}" for key, value in settings.items()]
    foreign = path.is_file() or any((path / name).exists() for name in ("model_index.json", "transformer"))
    stated = [f"{key}={yaml_line(value)}" for key, value in dotted.items()]
    if not foreign:
        return Model(path, weights, load_pipeline(path, stated + overrides, weights=weights, device=chosen), chosen)
    with tempfile.TemporaryDirectory() as folder:
        converted = convert(path, "fastdit", Path(folder) / "model", overrides=stated, say=lambda line: None)
        pipeline = load_pipeline(converted, overrides, weights=weights, device=chosen)
        pipeline.model.load_state_dict({k: v.clone() for k, v in pipeline.model.state_dict().items()}, assign=True)
    return Model(path, weights, pipeline, chosen)


def grid(images: Sequence[Image.Image | np.ndarray], columns: int = 8, captions: Sequence[str] = ()) -> Image.Image:
    """Images in rows of `columns`, with a caption below each if there are any; smaller ones are centered."""
    if not len(images) or columns < 1 or len(captions) not in (0, len(images)):
        raise ValueError(f"grid() got {counted(len(images), 'image')}, {counted(len(captions), 'caption')} and "
                         f"columns={columns}; give one or more images, and a caption for each or none")  # fmt: skip
    rows, sizes = in_rows(images, columns), {np.shape(image)[:2] for image in images}
    return labelled(rows, captions=in_rows(captions, columns)) if captions or len(sizes) > 1 else tiled(rows)


def extract(
    images: str | Path, out: str | Path, *, vae: str = SD_VAE, encoder: str = "", device: str | None = None,
    **options: Any,
) -> Path:  # fmt: skip
    """Encode images to latent shards in `out`; `encoder` and `options`: as for `fastdit extract`."""
    ranks = distributed.init(device)
    chosen = load_encoder(encoder, ranks.device) if encoder else None
    extract_features(images=images, out=out, vae=vae, encoder=chosen, ranks=ranks, **options)
    return Path(out)


def train(
    config: str | Path | Mapping[str, Any],
    *,
    shards: str | Path = "",
    run_dir: str | Path = "",
    resume: bool = False,
    device: str | None = None,
    **sections: Mapping[str, Any],
) -> Path:
    """Train and return the last checkpoint.

    `config`: the name of an included config, a YAML file, or a mapping with its sections; `sections` are merged into
    it, e.g. training={"steps": 1000}.
    """
    settings = _settings(config, sections, {"data.shards": shards, "run_dir": run_dir}, "train()", Config)
    return run_training(settings, resume=resume, device=device, read_initial=read_initial, report=report_at_end)


def train_vae(
    config: str | Path | Mapping[str, Any],
    *,
    images: str | Path = "",
    run_dir: str | Path = "",
    resume: bool = False,
    device: str | None = None,
    **sections: Mapping[str, Any],
) -> Path:
    """Train an autoencoder and return run_dir/vae. `config` and `sections`: as for `train`, of `fastdit train-vae`."""
    places = {"data.images": images, "run_dir": run_dir}
    settings = _settings(config, sections, places, "train_vae()", AutoencoderConfig)
    return train_autoencoder(settings, resume=resume, device=device, report=report_at_end)


def _settings(config, sections: Mapping[str, Any], places: Mapping[str, str | Path], where: str, schema: type) -> Any:
    """The config with the sections merged into it, and the places that are given."""
    tree = dict(config) if isinstance(config, Mapping) else to_tree(load_config(config, schema=schema))
    for name, section in sections.items():
        if section is None:
            raise ValueError(f"{where} got {name}=None; leave it out, or give its keys")
        tree[name] = {**tree.get(name, {}), **section} if isinstance(section, Mapping) else section
    own = sections.get("training")
    take_steps(tree.get("training"), [f"training.{key}" for key in own] if isinstance(own, Mapping) else [])
    given = {key: value if isinstance(value, list | tuple) else str(value) for key, value in places.items() if value}
    return config_from(tree, where, [f"{key}={yaml_line(value)}" for key, value in given.items()], schema)


def with_latents(
    config: Config, images: str | Path, place: str | tuple = "", device: str | None = None, say=print
) -> Config:
    """The config with the latents of `images` as its shards, which are extracted to `place` unless they are there.

    `place`: by default a folder beside the images. ValueError if what is there is not of these images, or of another
    image size or autoencoder than the config names.
    """
    data, size = config.data, config.data.image_size or 256
    if not is_local(place):
        mixed = shards_text(place)
        raise ValueError(f"--images={images} is for one folder of latents, not data.shards={mixed}; omit it")
    shards = place or f"{str(images).rstrip('/')}_latents_{size_text(size)}"
    if (Path(shards) / "manifest.json").is_file():
        latents = Manifest.load(shards)
        again = f"remove {shards} to extract again"
        others = f"name another folder in data.shards for those of {images}" if place else again
        remedy = f"omit --images to train on them, or {others}"
        check_listed(source := open_images(images), latents, remedy)
        if later := source.changed_after(Path(shards) / "manifest.json"):
            say(f"warning: {counted(later, 'file')} of {images} changed after their latents in {shards} were written; "
                f"remove {shards} to extract again")  # fmt: skip
        known = latents.latents.vae
        if not (place or data.vae) and known != SD_VAE:  # of an earlier command with another data.vae
            raise ValueError(f"the latents in {shards} are of vae={known}, and the default is {SD_VAE}; set data.vae="
                             f"{known}, or {again}")  # fmt: skip
        check = data.vae and (data.vae != known or Path(data.vae).is_dir())  # a folder may hold another one by now
        codec = LatentCodec.load(data.vae) if check else None
        latents.check(image_size=data.image_size, codec=codec)
    else:
        say(f"extracting the latents of {images} to {shards}")
        extract(images, shards, vae=data.vae or SD_VAE, image_size=size, device=device)
    return replace(config, data=replace(data, shards=shards))
