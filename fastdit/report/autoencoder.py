"""The HTML page of runs of `fastdit train-vae`, from what their monitor measured and wrote while they trained."""

import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fastdit.autoencoder.monitor import ABOUT
from fastdit.data.images import size_text
from fastdit.data.latents import in_words
from fastdit.errors import counted
from fastdit.files import read_json
from fastdit.pipeline import spread
from fastdit.report.facts import Run, latents_of
from fastdit.report.page import (
    SMOOTHED,
    both,
    differences,
    document,
    notes,
    opening,
    optimization,
    places,
    rates,
    recipe,
    section,
    side_by_side,
    table,
    text,
    unique_names,
)
from fastdit.report.pictures import Series, picture, plot, short
from fastdit.training.monitor import FOLDER
from fastdit.training.sheets import GAP, read_png, sheets, step_of
from fastdit.training.state import VAE

SHOWN, STEPS, SIDE = 8, 6, 256  # images; steps of the reconstructions over training; pixels of an image, at most
LISTED, CONTRAST = 16, 4  # channels in a table, at most; factor of the difference from the images
QUALITY = {
    "psnr": ("PSNR", "of 8-bit reconstructions, from the mean squared error of all of them"),
    "ssim": ("SSIM", "mean over images; 1 is exact"),
    "lpips": ("LPIPS", "mean over images; 0 is exact"),
    "frechet": ("Frechet distance", "of reconstructions to images, in the features of {}"),
}
LOSSES = {
    "loss": "Loss",
    "reconstruction": "Reconstruction loss",
    "perceptual": "Perceptual loss",
    "kl": "KL per pixel value",
    "adversarial": "Adversarial loss",
    "discriminator": "Discriminator's loss",
    "adversarial_weight": "Weight of the adversarial loss",
}


def render(runs: Sequence[Run], title: str = "") -> str:
    """The page of one run, or of several side by side."""
    names = unique_names(runs)
    title = title or " and ".join(names)
    body = [
        f"<header><h1>{text(title)}</h1>{side_by_side(names, [head(run) for run in runs])}</header>",
        section("Quality", table(names, [quality(run) for run in runs]) + quality_curves(runs)),
        section("Images and reconstructions", side_by_side(names, [reconstructions(run) for run in runs])),
        section("Reconstructions over training", side_by_side(names, [over_training(run) for run in runs])),
        section("Latents", latents(names, runs)),
        section("Training", curves(runs)),
        section("What was trained on what", table(names, [about(run) for run in runs])),
        section("What differs", table(names, differences(runs))) if len(runs) > 1 else "",
        section("Where it ran", table(names, [places(run) for run in runs])),
        section("To use it", side_by_side(names, [to_use(run) for run in runs])),
        section("To reproduce it", side_by_side(names, [recipe(run, len(runs) == 1) for run in runs])),
        section("Not on this page", side_by_side(names, [notes(run, *missing(run)) for run in runs])),
    ]
    return document(title, body)


def measures(run: Run) -> dict:
    """The last record of the monitor; {} without one."""
    return next((record for record in reversed(run.measured) if isinstance(record.get("psnr"), float)), {})


def about_vae(run: Run) -> dict:
    """What run_dir/vae says about itself; {} without it."""
    try:
        return read_json(run.folder / VAE / ABOUT, dict)
    except (ValueError, OSError):
        return {}


def head(run: Run) -> str:
    """What it is in a sentence, the main figures, and the warnings."""
    data, parameters = run.config.data, about_vae(run).get("parameters")
    size = f" with {short(parameters)} parameters" if isinstance(parameters, int) else ""
    images = counted(run.images, "image") if run.images else "images"
    epochs = f" ({counted(run.epochs, 'epoch', spec='.3g')})" if run.epochs else ""
    lead = (
        f"{run.config.model.variant}{size}, trained on {images} at {size_text(data.image_size)} px for "
        f"{counted(run.steps, 'step')}{epochs}. Latents of {shape_of(run)}."
    )
    last = measures(run)
    found = {QUALITY[key][0]: last[key] for key in QUALITY if isinstance(last.get(key), float)}
    return opening(run, lead, {name: shown(name, value) for name, value in found.items()})


def shown(name: str, value: float) -> str:
    return f"{value:.2f} dB" if name == "PSNR" else f"{value:.4f}" if name in ("SSIM", "LPIPS") else short(value)


def shape_of(run: Run) -> str:
    (width, height), factor = run.config.data.sides, run.config.model.downsample
    return f"{height // factor} x {width // factor} x {run.config.model.latent_channels}"


def quality(run: Run) -> dict[tuple[str, str], str]:
    """The last measures with their meaning."""
    last, vae = measures(run), about_vae(run)
    features = run.config.training.evaluate_features.partition("=")[0]
    rows = {(name, remark.format(features)): shown(name, last[key]) for key, (name, remark) in QUALITY.items()
            if isinstance(last.get(key), float)}  # fmt: skip
    if rows:
        count = vae.get("images")
        where = "that were not trained on" if vae.get("held_out") else "of the training set"
        kind = f"{counted(count, 'image')} {where}" if isinstance(count, int) else "images"
        rows["measured on", ""] = f"the EMA at step {last['step']:,}, {kind}"
    return rows


def quality_curves(runs: Sequence[Run]) -> str:
    names = {key: QUALITY[key][0] for key in QUALITY}
    plots = [plot(name + " in dB" * (key == "psnr"), [Series(*run.curve(key), i) for i, run in enumerate(runs)])
             for key, name in names.items()]  # fmt: skip
    several = any(len(run.curve("psnr")[0]) > 1 for run in runs)
    return f'<div class="plots">{"".join(plots)}</div>' if several else ""


def cells(run: Run, path: Path) -> np.ndarray | None:
    """The rows of a sheet, images, latents and reconstructions: uint8 (3, n, H, W, 3); None where it is damaged."""
    width, height = run.config.data.sides
    found = read_png(path)
    if found is None or found.shape[0] != 3 * (height + GAP) - GAP or (found.shape[1] + GAP) % (width + GAP):
        return None
    columns = min((found.shape[1] + GAP) // (width + GAP), SHOWN)
    grid = np.pad(found, ((0, GAP), (0, GAP), (0, 0))).reshape(3, height + GAP, -1, width + GAP, 3)
    return grid[:, :height, :columns, :width].swapaxes(1, 2)


def strip(label: str, images: np.ndarray) -> str:
    """A row of images uint8 (n, H, W, 3) beside its label."""
    return f'<div class="strip wide"><span>{text(label)}</span>{picture(images, len(images), label, SIDE)}</div>'


def reconstructions(run: Run) -> str:
    paths = sheets(run.folder / FOLDER)
    if not paths or (found := cells(run, paths[-1])) is None:
        return ""
    images, z, outputs = found
    difference = (CONTRAST * np.abs(outputs.astype(np.int16) - images)).clip(max=255).astype(np.uint8)
    rows = {"images": images, "latents": z, "reconstructions": outputs, f"difference x {CONTRAST}": difference}
    return "".join(strip(label, row) for label, row in rows.items()) + (
        f'<p class="muted">The EMA at step {step_of(paths[-1]):,}, on images not chosen by hand. Latents: the means of '
        "the first three channels as red, green and blue. Difference: absolute; black is exact.</p>"
    )


def over_training(run: Run) -> str:
    found = [(path, rows) for path in sheets(run.folder / FOLDER) if (rows := cells(run, path)) is not None]
    if len(found) < 2:
        return ""
    kept = [found[i] for i in spread(len(found), STEPS)]
    rows = [strip(f"step {step_of(path):,}", three[2]) for path, three in kept]
    return "".join([*rows, strip("images", kept[-1][1][0])])


def latents(names: list[str], runs: Sequence[Run]) -> str:
    """Mean and deviation of each channel, in a table or, for many channels, as a plot."""
    found = [latents_of(run) for run in runs]
    columns, series = [], []
    for i, each in enumerate(found):
        rows = {}
        if each:
            mean, std, shift, scale = each
            rows["scaling_factor", "what training multiplies latents by"] = in_words(scale)
            if shift:
                rows["shift_factor", "what it subtracts before"] = in_words(shift)
            mean, std = (mean - np.array(shift)) * np.array(scale), std * np.array(scale)
            if len(mean) <= LISTED:
                told = (f"mean {m:.2f}, deviation {s:.2f}" for m, s in zip(mean, std, strict=True))
                rows |= {(f"channel {c}", ""): line for c, line in enumerate(told)}
            else:
                series.append(Series(np.arange(len(mean), dtype=float), mean, i, error=std))
        columns.append(rows)
    if not any(found):
        return ""
    over_time = [Series(*run.curve("latent_std_all"), i) for i, run in enumerate(runs) if len(run.measured) > 1]
    plots = [
        plot("Mean and deviation of scaled latents", series, x_label="channel"),
        plot("Deviation of latents, not scaled", over_time, zero=True),
    ]
    drawn = f'<div class="plots">{"".join(plots)}</div>' if any(plots) else ""
    about = "Channels are scaled. Diffusion assumes mean 0 and deviation 1."
    return f'{table(names, columns)}{drawn}<p class="muted">{about}</p>'


def curves(runs: Sequence[Run]) -> str:
    def of(key: str, dashed: bool = False) -> list[Series]:
        return [Series(x, y, i, dashed=dashed) for i, run in enumerate(runs) for x, y in [run.curve(key)] if len(x)]

    plots = [plot(name, [s for i, run in enumerate(runs) for s in both(i, *run.curve(key))], log=key in ("loss", "kl"))
             for key, name in LOSSES.items()]  # fmt: skip
    plots.append(plot("Mean logits", of("logits_real") + of("logits_fake", True)))
    drawn = "".join([*plots, *rates(runs)])
    judged = any(len(run.curve("logits_real")[0]) for run in runs)
    about = SMOOTHED + " Mean logits: of images, and dashed of reconstructions." * judged
    return f'<div class="plots">{drawn}</div><p class="muted">{about}</p>' if drawn else ""


def about(run: Run) -> dict[str, str]:
    config, model, loss, critic = run.config, run.config.model, run.config.loss, run.config.discriminator
    attention = ", attention" * model.attention
    rows = {
        "network": f"channels {', '.join(map(str, model.channels))}; layers per level: {model.layers}{attention}",
        "data": f"{counted(run.images, 'image') if run.images else 'images'} of {config.data.images}",
        "loss": loss.reconstruction.upper()
        + (f" + {loss.kl_weight:g} KL" if loss.kl_weight and not config.training.decoder_only else "")
        + (f" + {loss.perceptual_weight:g} {loss.perceptual}" if loss.perceptual != "none" else ""),
    }
    if critic.weight:
        rows["discriminator"] = (f"PatchGAN, layers {critic.layers}, channels {critic.channels}, weight "
                                 f"{critic.weight:g}, from step {critic.start:,} on")  # fmt: skip
    rows["trained"] = "the decoder alone" if config.training.decoder_only else "encoder and decoder"
    rows |= optimization(run)
    crops = "random crops" + f" of {config.data.crop_fraction:g} to 1 of the image" * (config.data.crop_fraction < 1)
    rows["batch"] += f", {crops if config.data.crop == 'random' else 'center crops'}"
    return rows


def to_use(run: Run) -> str:
    if not (run.folder / VAE).is_dir():
        return ""
    size = size_text(run.config.data.image_size)
    words = ["fastdit", "extract", "--images", run.config.data.images, "--vae", str(run.folder / VAE)]
    return f"<pre>{text(shlex.join([*words, '--image-size', size, '--out', 'latents']))}</pre>"


def missing(run: Run) -> list[str]:
    found = []
    if not measures(run):
        settings = run.config.training
        every = settings.checkpoint_every if settings.evaluate_every is None else settings.evaluate_every
        when = f"every {counted(every, 'step')} and at the end" if every else "at the end"
        found.append(f"No quality and latents: nothing has been measured yet; the run does so {when}.")
    elif not sheets(run.folder / FOLDER):
        found.append(f"No reconstructions: {run.folder / FOLDER} has no sheets of them.")
    return found
