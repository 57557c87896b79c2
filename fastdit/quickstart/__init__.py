"""`fastdit quickstart`: the whole job on digits (job.py), and the small parts that only it needs."""

from fastdit.quickstart.job import quickstart

__all__ = ["quickstart"]
