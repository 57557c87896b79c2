"""fastdit: diffusion transformers (DiT, SiT), trained fast, exactly and resumably."""

__version__ = "0.1.0"
