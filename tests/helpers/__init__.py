"""What tests share: recorded arrays, small networks, images, runs and checkpoints."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
