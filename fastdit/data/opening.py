"""What data.shards names: a folder of latents or its URL, generated latents, or several folders that are mixed."""

from pathlib import Path

from fastdit.data.features import FOLDER, FeatureManifest, find_features
from fastdit.data.manifest import Manifest
from fastdit.data.mixture import feature_mixture, mixture
from fastdit.data.remote import NO_CACHE, Cache, is_remote
from fastdit.data.synthetic import PREFIX, synthetic
from fastdit.schema import ShardSet


def is_local(shards: str | Path | tuple[ShardSet, ...]) -> bool:
    """Whether they are one folder of this machine, there or not yet: no URL, generated latents or several sets."""
    return not (isinstance(shards, tuple) or is_remote(shards) or str(shards).startswith(PREFIX))


def can_open(shards: str | Path | tuple[ShardSet, ...]) -> bool:
    """Whether there is something to open: a local folder with a manifest, or anything that is not local."""
    return not is_local(shards) or bool(shards) and (Path(shards) / "manifest.json").is_file()


def open_latents(shards: str | Path | tuple[ShardSet, ...], cache: Cache = NO_CACHE) -> Manifest:
    """Their manifest; a one-line ValueError where it cannot be read. `cache` keeps the files of remote folders."""
    if isinstance(shards, tuple):
        return mixture(shards, cache)
    return synthetic(str(shards)) if str(shards).startswith(PREFIX) else Manifest.load(shards, cache)


def open_features(
    shards: str | Path | tuple[ShardSet, ...], features: str | Path = "", cache: Cache = NO_CACHE
) -> FeatureManifest:
    """The features at data.features, or else beside the latents; a one-line ValueError if there are none."""
    if not isinstance(shards, tuple):
        return find_features(shards, features, cache)
    if features:
        raise ValueError(f"data.features={features} is one folder, but data.shards names {len(shards)}; leave it "
                         f"out, with features in each of them, such as {shards[0].path}/{FOLDER}")  # fmt: skip
    return feature_mixture(shards, cache)
