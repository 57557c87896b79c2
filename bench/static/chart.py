"""The bar chart at the top of the README, drawn from the README's own table of GPU figures.

    python -m bench.static.chart        # writes docs/h200.svg
"""

import re
from pathlib import Path

from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[2]
BARS = {  # start of a row in the table -> label
    "fastdit, `training.residual=bf16 training.cuda_graph=true training.fp8=true`": "fastdit, FP8",
    "fastdit, `training.residual=bf16 training.cuda_graph=true` |": "fastdit, bf16",
    "strong baseline": "strong baseline (bf16, torch.compile, SDPA)",
    "fast-DiT's recipe": "fast-DiT",
    "official recipe": "official DiT (TF32)",
}


def figures() -> dict[str, float]:
    """Images/s of each bar, from the README."""
    text = (ROOT / "README.md").read_text()
    found = {}
    for start, label in BARS.items():
        [row] = re.findall(rf"^\| {re.escape(start)}.*$", text, re.M)
        found[label] = float(row.split("|")[4])
    return found


def draw(path: Path) -> None:
    values = figures()
    figure = Figure(figsize=(8, 2.3), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    colors = ["#2a78b5" if label.startswith("fastdit") else "#9a9a9a" for label in values]
    bars = axes.barh(list(values), list(values.values()), color=colors)
    axes.bar_label(bars, fmt="%.0f", padding=4, color="#808080")
    axes.invert_yaxis()
    axes.spines[:].set_visible(False)
    axes.set_xticks([])
    axes.tick_params(length=0, labelcolor="#808080")  # readable on light and on dark pages
    axes.set_title("DiT-XL/2 at 256 px on one H200: training, images/s", loc="left", color="#808080", fontsize=10)
    figure.savefig(path, transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    draw(ROOT / "docs" / "h200.svg")
