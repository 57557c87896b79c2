"""A picture of an autoencoder's training: its losses, those of the discriminator, and the measured quality."""

from pathlib import Path

from fastdit.files import replacing
from fastdit.training.log import read_records

CURVES = "curves.png"
PANELS = {
    "reconstruction and perceptual loss": ("reconstruction", "perceptual"),
    "hinge losses": ("discriminator", "adversarial"),
    "mean logits": ("logits_real", "logits_fake"),
    "adversarial weight": ("adversarial_weight",),
    "PSNR in dB": ("psnr",),
    "distance to the images": ("frechet", "lpips"),
}  # title -> keys of metrics.jsonl


def write_curves(run_dir: Path) -> None:
    """Write run_dir/curves.png from metrics.jsonl, with a panel for each of PANELS that has values."""
    from matplotlib.figure import Figure

    records = read_records(run_dir / "metrics.jsonl")
    points = {key: [(r["step"], r[key]) for r in records if isinstance(r.get(key), int | float)]
              for keys in PANELS.values() for key in keys}  # fmt: skip
    shown = {title: drawn for title, keys in PANELS.items() if (drawn := [key for key in keys if points[key]])}
    if not shown:
        return
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(4 * columns, 3 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for one, (title, keys) in zip(axes, shown.items(), strict=False):
        for key in keys:
            one.plot(*zip(*points[key], strict=True), ".-" if len(points[key]) < 30 else "-", label=key, lw=1)
        one.set(title=title, xlabel="step")
        if len(PANELS[title]) > 1:
            one.legend(fontsize="small")
    for one in axes[len(shown) :]:
        one.remove()
    with replacing(run_dir / CURVES) as file:
        figure.savefig(file, format="png", dpi=100)
