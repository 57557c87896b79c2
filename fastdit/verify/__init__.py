"""`fastdit verify`: what is wrong with a checkpoint, or with a folder of latent shards, in words."""

from collections.abc import Callable
from pathlib import Path

from fastdit.training import checkpoint
from fastdit.verify.checkpoints import verify_checkpoint
from fastdit.verify.findings import Findings
from fastdit.verify.shards import verify_shards


def verify(path: str | Path, say: Callable[[str], None] = print) -> list[str]:
    """Check a run's newest checkpoint, one checkpoint, or a folder of latents; the findings, none if all is well.

    `say` hears what was checked. ValueError where `path` is neither.
    """
    path, found = Path(path), Findings()
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder; give a run, one of its checkpoints/step-*, or a folder of latents")
    if (path / "manifest.json").exists():
        verify_shards(path, found, say)
    else:
        verify_checkpoint(checkpoint.find(path), found, say)
    return found.all()
