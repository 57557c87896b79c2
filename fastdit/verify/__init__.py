"""`fastdit verify`: check a checkpoint or a folder of latent shards."""

from collections.abc import Callable
from pathlib import Path

from fastdit.data.features import holds_features
from fastdit.data.remote import check_local
from fastdit.training import checkpoint
from fastdit.training.state import AUTOENCODER
from fastdit.verify.autoencoders import verify_autoencoder
from fastdit.verify.checkpoints import verify_averages, verify_checkpoint
from fastdit.verify.features import verify_features
from fastdit.verify.findings import Findings
from fastdit.verify.shards import verify_shards


def verify(path: str | Path, say: Callable[[str], None] = print) -> list[str]:
    """Check the newest checkpoint and the stored averages of a run, one checkpoint, or a folder of latents or features.

    Returns the problems found.

    `say` receives a summary of what was checked. Raises ValueError if `path` is none of these.
    """
    check_local(path, "fastdit verify")
    path, found = Path(path), Findings()
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder; use a run, one of its checkpoints/step-*, or a folder of latents")
    if (path / "manifest.json").exists():
        (verify_features if holds_features(path) else verify_shards)(path, found, say)
    else:
        folder = checkpoint.find(path)
        meta, faults = checkpoint.inspect(folder)
        for fault in faults:
            found.add("files", fault)
        if meta.get("kind") == AUTOENCODER:
            verify_autoencoder(folder, meta, found, say)
        elif meta:
            verify_checkpoint(folder, meta, found, say)
        verify_averages(path, found, say)
    return found.all()
