"""What there is to choose from: the included configs, and every config key with its type, default and meaning."""

import dataclasses
import inspect
import re

from fastdit.autoencoder.config import AutoencoderConfig
from fastdit.config import load_config, shipped_config, shipped_names
from fastdit.registry import Choice
from fastdit.schema import Config

COMMAND = re.compile(r"# (fastdit|deepspeed) ")  # a command at the top of a config
FIELD = re.compile(r"    (\w+): ([^=]+?) = (.+?)(?:  # (.*))?$")


def configs() -> str:
    """One paragraph per included config: its name and the comments at its top; and commands for images of one's own."""
    parts = []
    for schema in (Config, AutoencoderConfig):
        for name in shipped_names(schema):
            lines = shipped_config(name).read_text().splitlines()
            about = [line.removeprefix("# ") for line in lines if line.startswith("#") and not COMMAND.match(line)]
            what = load_config(name, schema=schema).model.variant
            parts.append("\n".join([f"{name:<19} {what}", *(f"    {line}" for line in about)]))
    where = shipped_config("NAME")
    return "\n".join([*parts, "", f"The commands of each are at the top of {where}. For your own images:",
                      "fastdit extract --images images --out latents --vae stabilityai/sd-vae-ft-ema --image-size 256",
                      "fastdit train sit_s_2 data.shards=latents run_dir=runs/mine training.epochs=100 "
                      "training.ema_warmup=true",
                      "fastdit train-vae vae_kl_f8 data.images=images run_dir=runs/vae"])  # fmt: skip


def keys(schema: type = Config) -> str:
    """One line per key: dotted name, type, default and comment, as they stand in the source."""
    lines = []
    for section in dataclasses.fields(schema):
        dotted = dataclasses.is_dataclass(section.type) and section.type is not Choice
        own = section.type if dotted else None
        if own is None:
            lines.append(_line(section.name, *_source(schema)[section.name]))
            continue
        for field in dataclasses.fields(own):
            owner = next(c for c in own.__mro__ if field.name in vars(c).get("__annotations__", {}))
            lines.append(_line(f"{section.name}.{field.name}", *_source(owner)[field.name]))
    return "\n".join(lines)


def _line(key: str, kind: str, default: str, comment: str) -> str:
    text = f"{key} = {default}"
    return f"{text:44} {kind}" + (f"\n        {comment}" if comment else "")


def _source(owner: type) -> dict[str, tuple[str, str, str]]:
    """Type, default and comment of each field, from the source; a comment may also stand in the lines above."""
    found, above = {}, []
    for line in inspect.getsource(owner).splitlines():
        if match := FIELD.match(line):
            name, kind, default, comment = match.groups()
            found[name] = kind, default, " ".join([*above, *filter(None, [comment])])
        above = [*above, line.strip("# ")] if line.startswith("    # ") else []
    return found
