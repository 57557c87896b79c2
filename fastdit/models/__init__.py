"""Networks: DiT and its layers."""
