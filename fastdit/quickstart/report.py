"""Pictures and the HTML report of the quickstart."""

import html
from pathlib import Path

import numpy as np
from PIL import Image


def loss_curve(metrics: list[dict], path: Path) -> None:
    """Plot loss and gradient norm over steps, from the records of metrics.jsonl."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left = figure.add_subplot()
    steps = [m["step"] for m in metrics]
    left.plot(steps, [m["loss"] for m in metrics], color="tab:blue")
    left.set_xlabel("step")
    left.set_ylabel("loss", color="tab:blue")
    right = left.twinx()
    right.plot(steps, [m["grad_norm"] for m in metrics], color="tab:orange", linewidth=0.8)
    right.set_ylabel("gradient norm", color="tab:orange")
    figure.savefig(path, dpi=120)


def denoising_gif(frames: np.ndarray, path: Path, columns: int = 10, scale: int = 2, frame_ms: int = 80) -> None:
    """Animate frames uint8 (steps, N, H, W, 3), noise first, as a grid with `columns` columns; hold the last frame."""
    sheets = []
    for images in frames:
        rows = [np.concatenate(list(images[i : i + columns]), axis=1) for i in range(0, len(images), columns)]
        sheet = Image.fromarray(np.concatenate(rows))
        sheets.append(sheet.resize((sheet.width * scale, sheet.height * scale), Image.Resampling.NEAREST))
    durations = [frame_ms] * (len(sheets) - 1) + [1500]
    sheets[0].save(path, save_all=True, append_images=sheets[1:], duration=durations, loop=0)


def write_html(report: dict, path: Path) -> None:
    """Write a page that shows the scores, grid.png, denoising.gif, loss.png and all settings."""
    rows = [
        ("Samples classified correctly by the judge", f"{report['class_accuracy']:.1%}"),
        ("Unseen real images classified correctly by the judge", f"{report['judge_accuracy_on_real']:.1%}"),
        ("Frechet distance, samples to held-out real images", f"{report['frechet_distance']:.3f}"),
        ("Frechet distance, real to held-out real images", f"{report['frechet_distance_real']:.3f}"),
        ("PSNR of the autoencoder", f"{report['reconstruction_psnr_db']:.1f} dB"),
        ("Parameters", ", ".join(f"{k} {v:,}" for k, v in report["parameters"].items())),
        ("Training speed", f"{report['train_images_per_s']:.0f} images/s"),
        ("Seconds", ", ".join(f"{k} {v:.0f}" for k, v in report["seconds"].items())),
    ]
    table = "\n".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in rows)
    settings = html.escape("\n".join(_lines(report)))
    path.write_text(f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>fastdit quickstart</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
img {{ max-width: 100%; image-rendering: pixelated }} figure {{ margin: 1.5rem 0 }} figcaption {{ color: #666 }}
th {{ text-align: left; font-weight: normal; padding-right: 2rem }} td {{ font-variant-numeric: tabular-nums }}
pre {{ background: #f6f6f6; padding: 1rem; overflow-x: auto; font-size: 13px }}
</style>
<h1>fastdit quickstart</h1>
<table>
{table}
</table>
<figure><img src="grid.png" width="640" alt="samples"><figcaption>Samples, one class per row.</figcaption></figure>
<figure><img src="denoising.gif" alt="denoising"><figcaption>From noise to images.</figcaption></figure>
<figure><img src="loss.png" alt="loss"><figcaption>The loss during training.</figcaption></figure>
<details><summary>All settings</summary><pre>{settings}</pre></details>
</html>
""")


def _lines(value, prefix: str = "") -> list[str]:
    if isinstance(value, dict):
        return [line for key, item in value.items() for line in _lines(item, f"{prefix}.{key}" if prefix else str(key))]
    return [f"{prefix} = {value}"]
