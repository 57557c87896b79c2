"""From a network to a pipeline that makes images, with the autoencoder and the weak network of its config."""

from pathlib import Path

from fastdit.classes import Classes
from fastdit.config import to_tree
from fastdit.data.latents import LatentCodec, LatentSpec
from fastdit.diffusion.objectives import Objective
from fastdit.models.dit import DiT
from fastdit.pipeline import ImagePipeline, Inference
from fastdit.schema import Config
from fastdit.training.state import VAE, load_network


def image_pipeline(
    config: Config,
    model: DiT,
    objective: Objective,
    latents: LatentSpec,
    where: str | Path,
    *,
    run_dir: Path | None,
    weights: str = "ema",
    classes: Classes,
    **about: str,
) -> ImagePipeline:
    """The pipeline of a network in `where`. `run_dir`: has a copy of the autoencoder, used if the original is gone.

    `about`: further fields of ImagePipeline. ValueError where the autoencoder, or the weak checkpoint, is not for the
    same latents.
    """
    settings, device = config.sampling, next(model.parameters()).device
    kept = run_dir is not None and not Path(config.data.vae).is_dir() and (run_dir / VAE).is_dir()
    codec = LatentCodec.load(str(run_dir / VAE) if kept else config.data.vae, device=device)
    codec.take_scale_of(latents)
    latents.check(codec.spec(latents.image_size, latents.shape), str(where), f"data.vae={config.data.vae}")
    weak, weak_identity = None, ""
    if settings.weak_checkpoint:
        weaker = load_network(settings.weak_checkpoint, weights, device=device)
        latents.check(weaker.latents, str(where), f"sampling.weak_checkpoint={weaker.folder}")
        for key, own, other in (
            ("objective", config.objective, weaker.config.objective),
            ("data.num_classes", config.data.num_classes, weaker.config.data.num_classes),
            ("model.class_token", config.model.class_token, weaker.config.model.class_token),
            ("class_names", classes.names, weaker.classes.names),
        ):
            if own != other and not (key == "class_names" and () in (own, other)):  # unknown
                raise ValueError(
                    f"sampling.weak_checkpoint={weaker.folder} has {key}={to_tree(other)}, {where} "
                    f"{to_tree(own)}; a weak model must be trained on the same task"
                )
        weaker.warn(f"sampling.weak_checkpoint={weaker.folder}")
        weak, weak_identity = Inference(weaker.model, settings.precision, settings.compile), weaker.identity
    inference = Inference(model, settings.precision, settings.compile)
    return ImagePipeline(
        config, inference, weak, objective, codec, latents, classes=classes, weights=weights,
        weak_identity=weak_identity, **about,
    )
