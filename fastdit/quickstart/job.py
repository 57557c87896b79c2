"""The full pipeline on real images in minutes: scikit-learn's digits, with the same code that trains on ImageNet.

digits -> image folder -> small autoencoder -> extract_features -> train -> sample -> judge -> report.
"""

import json
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

import fastdit
from fastdit.autoencoder.config import AutoencoderConfig
from fastdit.autoencoder.loop import train_autoencoder
from fastdit.autoencoder.monitor import ABOUT
from fastdit.config import load_config, shipped_config, to_tree
from fastdit.data.extract import extract_features
from fastdit.distributed import init
from fastdit.environment import hardware
from fastdit.errors import make_folder
from fastdit.evaluation.evaluate import load_reference, measure
from fastdit.evaluation.features import load_features
from fastdit.evaluation.images import open_set
from fastdit.evaluation.memorization import neighbors
from fastdit.evaluation.metrics import frechet_distance
from fastdit.files import append_json, read_json
from fastdit.quickstart.digits import read_folder, write_digits
from fastdit.quickstart.judge import Judge
from fastdit.report import write_report
from fastdit.report.facts import QUALITY
from fastdit.sampling import load_pipeline, sample
from fastdit.schema import Config
from fastdit.sheets import save
from fastdit.sweep import plot, points, samples_of, sweep, table
from fastdit.training.log import read_metrics
from fastdit.training.loop import train

SAMPLES, SWEPT = 500, 100
SWEEP, METRICS = "cfg_scale=1,1.4,2,4", ["frechet", "precision_recall"]
STAGES = 7
MEASURED = ["training.validate_every=200", "training.sample_every=500", "training.evaluate_every=500",
            "training.evaluate_images=100", "training.loss_reference=quickstart"]  # fmt: skip
JUDGE = "judge.npz"
THREADS = 2  # at most: an operator of these networks takes microseconds, and waking more threads takes longer
ON_GPU = ["training.cuda_graph=true", "sampling.compile=false"]  # compiling takes longer than it would save here


@contextmanager
def few_threads(most: int = THREADS) -> Iterator[None]:
    """Uses at most `most` threads in PyTorch and one in NumPy's matrix products."""
    from threadpoolctl import threadpool_limits  # scikit-learn needs it

    before = torch.get_num_threads()
    torch.set_num_threads(min(before, most))
    try:
        with threadpool_limits(1, "blas"):
            yield
    finally:
        torch.set_num_threads(before)


@few_threads()
def quickstart(
    out: str | Path = "quickstart", *, seed: int = 0, overrides=(), vae_overrides=(), say: Callable = print
) -> dict:
    """Run the full pipeline, write to `out` (new or empty), and return the contents of report.json.

    `overrides`: of configs/quickstart.yaml; `vae_overrides`: of configs/vae_digits.yaml.

    All networks run on a GPU if there is one.
    """
    out, ranks = Path(out), init()
    on_gpu = ranks.device.type == "cuda"
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"--out {out} is not empty; choose another --out or remove it")
    places = [f"run_dir={out / 'run'}", f"data.shards={out / 'latents'}", f"data.vae={out / 'vae'}",
              f"data.val_shards={out / 'held_out_latents'}", f"training.reference={out / 'held_out'}",
              f"training.evaluate_features=classifier={out / JUDGE}", *MEASURED]  # fmt: skip
    config = load_config(shipped_config("quickstart"), [f"seed={seed}", *places, *ON_GPU * on_gpu, *overrides])
    make_folder(out, "--out")
    seconds: dict[str, float] = {}

    @contextmanager
    def stage(name: str, what: str):
        say(f"[{len(seconds) + 1}/{STAGES}] {what}")
        start = time.perf_counter()
        yield
        seconds[name] = round(time.perf_counter() - start, 2)

    with stage("images", f"writing scikit-learn's digits as PNG folders to {out}"):
        counts = write_digits(out, config.data.image_size)
        train_images, train_labels = read_folder(out / "images", config.data.image_size)
        held_images, held_labels = read_folder(out / "held_out", config.data.image_size)
        judge = Judge(held_images, held_labels)
        judge.save(out / JUDGE)

    with stage("autoencoder", f"training a small autoencoder on {len(train_images)} images"):
        autoencoder, about = small_autoencoder(out, [f"seed={seed}", *vae_overrides])

    with stage("extract", "encoding the images as shards of latents"):
        settings = {"vae": str(out / "vae"), "image_size": config.data.image_size, "ranks": ranks}
        manifest = extract_features(images=out / "images", out=out / "latents", **settings)
        extract_features(images=out / "held_out", out=out / "held_out_latents", **settings)  # of the validation loss

    with stage("train", f"training {config.model.variant} for {config.training.steps} steps"):
        checkpoint = train(config)

    with stage("sample", f"sampling {SAMPLES} images"):
        sample(checkpoint, out / "samples", SAMPLES, seed=seed)
        shutil.copy(out / "samples" / "grid.png", out / "grid.png")

    with stage("judge", "scoring the samples with a judge fitted on held-out real images"):
        samples = open_set(out / "samples", "SAMPLES")
        images = np.load(out / "samples" / "samples.npz")["arr_0"]
        labels = np.arange(SAMPLES) % config.data.num_classes
        extractor = load_features(f"classifier={out / JUDGE}", ranks.device)
        held_out = load_reference(out / "held_out", samples.size, extractor, ranks)
        result = measure(samples, held_out, ranks, extractor=extractor, seed=seed)
        append_json(out / "results.jsonl", result)
        real = np.random.default_rng(seed).permutation(len(train_images))[:SAMPLES]  # as many as samples
        scores = {
            "class_accuracy": judge.accuracy(images, labels),
            "judge_accuracy_on_real": judge.accuracy(train_images, train_labels),
            "frechet_distance": result["values"]["frechet"],
            "frechet_distance_real": frechet_distance(extractor(train_images[real]), held_out.features.moments),
        }
        near, sheet = neighbors(out / "samples", out / "latents", ranks, held_out=out / "held_out_latents", seed=seed)
        scores["memorized"] = near["values"]["memorized"]
        save([sheet], out / "neighbors.png")

    with stage("sweep", f"sweeping over the guidance scale with {SWEPT} images each"):
        chosen, file = points([SWEEP]), out / "sweep.jsonl"
        images = samples_of(str(checkpoint), ranks.device, chosen, num_samples=SWEPT, seed=seed)
        features = f"classifier={out / JUDGE}"
        results = sweep(chosen, images, out / "held_out", ranks, features=features, metrics=METRICS, out=str(file))
        plot(chosen, results, out / "sweep.png")
        say(table(chosen, results))

    metrics = read_metrics(config.run_dir)
    report = {
        **{key: round(value, 4) for key, value in scores.items()},
        "reconstruction_psnr_db": round(about["psnr"], 2),
        "images": counts,
        "parameters": {
            "dit": load_pipeline(checkpoint).model.parameter_count(),
            "autoencoder": about["parameters"],
        },
        "seconds": {**seconds, "total": round(sum(seconds.values()), 2)},
        "train_images_per_s": metrics[-1]["images_per_s"],
        "final_loss": metrics[-1]["loss"],
        "seed": seed,
        "config": to_tree(config),
        "autoencoder": {"latent_shape": list(manifest.latents.shape), "scale": manifest.latents.scale,
                        "config": to_tree(autoencoder)},  # fmt: skip
        "samples": SAMPLES,
        "versions": {"fastdit": fastdit.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "machine": {"hardware": hardware(ranks.device), "threads": torch.get_num_threads()},
        "date": time.strftime("%Y-%m-%d"),
    }
    (out / "report.json").write_text(json.dumps(report, indent=1))
    (Path(config.run_dir) / QUALITY).write_text(json.dumps(quality(report), indent=1))
    write_report([config.run_dir], out / "report.html", title="fastdit quickstart", device=ranks.device)
    say(closing_words(report, out, config))
    return report


def small_autoencoder(out: Path, overrides: Sequence[str] = ()) -> tuple[AutoencoderConfig, dict]:
    """Train the autoencoder of configs/vae_digits.yaml on out/images, measure it on out/held_out, and copy it to
    out/vae. Returns its config and what was measured."""
    places = [f"run_dir={out / 'autoencoder'}", f"data.images={out / 'images'}", f"data.val_images={out / 'held_out'}"]
    config = load_config(shipped_config("vae_digits"), [*places, *overrides], AutoencoderConfig)
    with few_threads(1):  # two are no faster at a batch of 4, and wait for each other where cores are busy
        trained = train_autoencoder(config)
    shutil.copytree(trained, out / "vae")
    return config, read_json(out / "vae" / ABOUT)


def quality(report: dict) -> list[dict]:
    """The figures of the report's page."""
    judge = f"a perceptron fitted on {report['images']['held_out']} real images that were not trained on"
    return [
        {"name": name, "value": value, "protocol": protocol}
        for name, value, protocol in (
            ("samples recognized", f"{report['class_accuracy']:.1%}", f"{report['samples']} samples, by {judge}"),
            ("real images recognized", f"{report['judge_accuracy_on_real']:.1%}", f"training images, by {judge}"),
            ("Frechet distance", report["frechet_distance"], "samples to held-out images, in the judge's features"),
            ("Frechet distance of real images", report["frechet_distance_real"], "as many training images instead"),
            ("memorized", f"{report['memorized']:.1%}", "samples nearer to a training image than 99% of the held-out "
             "images, by the distance of latents"),
            ("PSNR of the autoencoder", f"{report['reconstruction_psnr_db']:.1f} dB", "on held-out images"),
        )
    ]


def closing_words(report: dict, out: Path, config: Config) -> str:
    """The results, and the next commands for your own images."""
    return f"""
samples recognized   {report["class_accuracy"]:.1%}   (the judge on real images: {report["judge_accuracy_on_real"]:.1%})
Frechet distance     {report["frechet_distance"]:.2f}   (real vs. real: {report["frechet_distance_real"]:.2f})
time                 {report["seconds"]["total"]:.0f} s
report               {out / "report.html"}   (also there: neighbors.png, sweep.png)

Next, with your own images in my_images/<class>/*.jpg:
  fastdit extract --images my_images --out latents --vae stabilityai/sd-vae-ft-ema --image-size 256
  fastdit train sit_s_2 data.shards=latents run_dir=runs/mine training.epochs=100 training.ema_warmup=true
  fastdit sample runs/mine --num-samples 64 sampling.cfg_scale=4"""
