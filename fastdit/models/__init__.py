"""Networks: DiT and its layers, the VAE, conversion between checkpoint formats."""
