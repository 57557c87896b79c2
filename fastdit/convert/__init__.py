"""`fastdit convert`: convert between fastdit checkpoints, official DiT and SiT files, and diffusers pipelines."""

from fastdit.convert.command import convert

__all__ = ["convert"]
