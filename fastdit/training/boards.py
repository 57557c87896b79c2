"""Where a run can be watched: TensorBoard and, with training.wandb, Weights & Biases. Both get the same values."""

import netrc
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np

from fastdit.files import read_text, replace_text

WANDB_ID = "wandb_id"  # file in a run: a resumed run continues the same run of W&B


class Boards:
    """Scalars and pictures of a run, by step. `settings`: the run's config, for W&B."""

    def __init__(self, run_dir: Path, start: int, project: str, settings: dict[str, Any], say: Callable[[str], None]):
        from torch.utils.tensorboard import SummaryWriter

        self.tensorboard = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start + 1)  # `start` itself stays
        self.wandb = start_wandb(project, run_dir, settings, say) if project else None

    def write(self, step: int, values: Mapping[str, float | list[float]], pictures: Mapping[str, np.ndarray]) -> None:
        """The elements of a list are written as name/00, name/01, ...; pictures are uint8 (H, W, 3)."""
        scalars = {}
        for name, value in values.items():
            scalars |= {f"{name}/{i:02d}": v for i, v in enumerate(value)} if isinstance(value, list) else {name: value}
        for name, value in scalars.items():
            self.tensorboard.add_scalar(name, value, step)
        for name, picture in pictures.items():
            self.tensorboard.add_image(name, picture, step, dataformats="HWC")
        if self.wandb is not None:
            import wandb

            self.wandb.log({**scalars, **{name: wandb.Image(p) for name, p in pictures.items()}, "step": step})

    def close(self) -> None:
        self.tensorboard.close()
        if self.wandb is not None:
            self.wandb.finish()


def check_wandb(project: str) -> None:
    """ValueError if W&B is asked for and not installed."""
    if project:
        try:
            from wandb import init  # noqa: F401  a folder that W&B made here would also be found as a module
        except ImportError:
            raise ValueError(f"training.wandb={project} needs the W&B package: pip install wandb") from None


def start_wandb(project: str, run_dir: Path, settings: dict[str, Any], say: Callable[[str], None]):
    """The W&B run of this run, the same after a resume. Offline where there is neither an API key nor WANDB_MODE.

    It is never another one of this process, such as that of a training that failed before.
    """
    import wandb

    path = run_dir / WANDB_ID
    before = read_text(path).strip() if path.is_file() else ""
    offline = "WANDB_MODE" not in os.environ and not has_key()
    if offline:
        say(f"W&B: no API key, so the run is logged to {run_dir / 'wandb'}; upload it with wandb sync")
    chosen = {"mode": "offline"} if offline else {}
    try:
        run = wandb.init(project=project, dir=str(run_dir), name=run_dir.name, config=settings, id=before or None,
                         resume="allow" if before else None, reinit="create_new", **chosen)  # fmt: skip
    except Exception as error:  # of many kinds: wandb's own, and those of the network
        reason = " ".join(str(error).split())
        raise ValueError(f"training.wandb={project} cannot be used ({reason}); set WANDB_MODE=offline") from error
    replace_text(path, run.id)
    run.define_metric("*", step_metric="step")  # W&B's own count cannot go back to the checkpoint of a resume
    return run


def has_key() -> bool:
    """Whether W&B will find an API key."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    with suppress(OSError, netrc.NetrcParseError):
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    return False
