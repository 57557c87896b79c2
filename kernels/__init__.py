"""Fused Triton kernels, imported as `fastdit.kernels` (setup.py maps this folder)."""
