"""The training loop and what it stands on: engines, EMA, checkpoints, logs."""
