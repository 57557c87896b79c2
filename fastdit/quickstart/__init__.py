"""`fastdit quickstart`: the full pipeline on digits (job.py), and the parts used only there."""

from fastdit.quickstart.job import quickstart

__all__ = ["quickstart"]
