"""`fastdit convert`: convert between fastdit checkpoints, official DiT and SiT files, and diffusers pipelines."""

from fastdit.convert.command import convert, read_initial

__all__ = ["convert", "read_initial"]
