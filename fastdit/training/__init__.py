"""The training loop and its parts: step, engines, EMA, checkpoints, logs."""
