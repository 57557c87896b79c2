"""Every option of the network and every objective, trained on scikit-learn's digits: the tables of docs/variants.md.

    python -m bench.quality.variants                     every row; about a minute each on one idle core
    python -m bench.quality.variants --only rope ot      some rows; the table keeps the newest line of every other row
    python -m bench.quality.variants --missing           rows that have no line yet
    python -m bench.quality.variants --table             write the tables again without training

One autoencoder and one judge, made as `fastdit quickstart` makes them, serve all rows. A row is the quickstart's config
with a few overrides and three quarters of its steps; twice as many without guidance, or when the loss is of eps and
gives little weight to the noisy times that decide the class. Its line in bench/results/variants.jsonl lists them.
"""

import argparse
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from bench.record import ROOT, markdown, record
from fastdit.build import build_network, build_objective
from fastdit.config import load_config, shipped_config
from fastdit.data.extract import extract_features
from fastdit.diffusion.paths import INTERPOLANTS, SCHEDULES
from fastdit.diffusion.timesteps import TIME_DISTRIBUTIONS
from fastdit.evaluation.metrics import frechet_distance
from fastdit.models.blocks import BLOCKS
from fastdit.models.layers import ACTIVATIONS, NORMS
from fastdit.quickstart.digits import read_folder, write_digits
from fastdit.quickstart.job import SAMPLES, small_autoencoder
from fastdit.quickstart.judge import Judge
from fastdit.sampling import load_pipeline, sample
from fastdit.schema import Config
from fastdit.training.log import read_metrics
from fastdit.training.loop import train

RESULTS, DOCS = ROOT / "bench" / "results" / "variants.jsonl", ROOT / "docs" / "variants.md"
COMMON = ["training.steps=1500", "training.checkpoint_every=100000", "training.log_every=100"]
DDIM = ["sampling.sampler=ddim", "sampling.steps=ddim50"]
ANCESTRAL = ["sampling.sampler=ddpm", "sampling.steps=100"]
LONGER = ["training.steps=4000"]
NOISIER = "time_distribution: logit_normal, time_mean: 1"
REAL = "real images"

LIGHTNING = ["model.norm=rms", "model.mlp=swiglu", "model.position=sincos_rope"]
NETWORKS: dict[str, list[str]] = {
    "official design": [],
    **{f"block={name}": [f"model.block={name}"] for name in BLOCKS if name != "adaln_zero"},
    **{f"norm={name}": [f"model.norm={name}"] for name in NORMS if name != "layer"},
    **{f"qk_norm={name}": [f"model.qk_norm={name}"] for name in NORMS},
    **{f"mlp={name}": [f"model.mlp={name}"] for name in ACTIVATIONS if name != "gelu_tanh"},
    "mlp_ratio=2": ["model.mlp_ratio=2"],
    **{f"position={name}": [f"model.position={name}"] for name in ("rope", "sincos_rope")},
    "registers=4": ["model.registers=4"],
    "decoder_blocks=1": ["model.decoder_blocks=1"],
    **{f"{name}=false": [f"model.{name}=false"] for name in ("qkv_bias", "proj_bias", "mlp_bias")},
    "dropout=0.1": ["model.dropout=0.1"],
    "unpatchify=transposed_conv": ["model.unpatchify=transposed_conv"],
    "class_dropout=0, no guidance": ["model.class_dropout=0", "sampling.cfg_scale=1", *LONGER],
    "patch 4": ["model.variant=DiT-Ti/4"],
    "patch 1": ["model.variant=DiT-Ti/1"],
    "LightningDiT's: rms, swiglu, sincos_rope": LIGHTNING,
    "the same, qk_norm=rms, registers=4": [*LIGHTNING, "model.qk_norm=rms", "model.registers=4"],
}

DIFFUSIONS: dict[str, list[str]] = {
    "ddpm, as released": ["objective=ddpm", *ANCESTRAL, *LONGER],
    "ddpm, loss_type=rescaled_mse": ["objective=ddpm", "objective.loss_type=rescaled_mse", *ANCESTRAL, *LONGER],
    "ddpm, loss_type=kl, loss-aware times": [
        "objective=ddpm", "objective.loss_type=kl", "training.loss_aware_times=true", *ANCESTRAL, *LONGER
    ],
    "ddpm, prediction=v, loss-aware times": [
        "objective=ddpm", "objective.prediction=v", "training.loss_aware_times=true", *ANCESTRAL
    ],
    # learned variances of an x_0 prediction leave [0, 1] near the data, and a respaced chain amplifies that: DDIM
    "ddpm, prediction=x_0": ["objective=ddpm", "objective.prediction=x_0", *DDIM],
    "ddpm, prediction=v": ["objective=ddpm", "objective.prediction=v", *ANCESTRAL],
    **{
        f"ddpm, variance={variance}": [
            f"objective={{name: ddpm, variance: {variance}, loss_type: mse}}", *ANCESTRAL, *LONGER
        ]
        for variance in ("fixed_large", "fixed_small")
    },
    **{
        f"ddpm, schedule={name}, prediction=v": [f"objective={{name: ddpm, schedule: {name}, prediction: v}}", *DDIM]
        for name in SCHEDULES
    },
    "ddpm, min_snr_gamma=5": ["objective=ddpm", "objective.min_snr_gamma=5", *DDIM, *LONGER],
}  # fmt: skip
FLOWS: dict[str, list[str]] = {
    **{
        f"flow, {path}, {prediction}": [f"objective={{name: flow, interpolant: {path}, prediction: {prediction}}}"]
        for path in INTERPOLANTS
        for prediction in ("velocity", "x_0")
        if (path, prediction) != ("vp", "velocity")
    },
    **{
        f"flow, {path}, {prediction}, noisier times": [
            f"objective={{name: flow, interpolant: {path}, prediction: {prediction}, {NOISIER}}}", *LONGER
        ]
        for path in INTERPOLANTS
        for prediction in ("velocity", "eps", "score")
        if prediction != "velocity" or path == "vp"
    },
    # a logit-normal density is small where the weights are singular
    "flow, linear, eps, weight=velocity, times logit_normal": [
        "objective={name: flow, prediction: eps, weight: velocity, time_distribution: logit_normal}", *LONGER
    ],
    "flow, linear, eps, weight=likelihood, noisier times": [
        f"objective={{name: flow, prediction: eps, weight: likelihood, {NOISIER}}}", *LONGER
    ],
    **{
        f"flow, times {name}": [f"objective={{name: flow, time_distribution: {name}}}"]
        for name in TIME_DISTRIBUTIONS
        if name != "uniform"
    },
    "flow, shift=2": ["objective={name: flow, shift: 2}"],
    "flow, cosine_weight=1": ["objective={name: flow, cosine_weight: 1}"],
    # noise is paired with images regardless of class, which weakens the label: guidance compensates
    "flow, coupling=ot, guidance 2": ["objective={name: flow, coupling: ot}", "sampling.cfg_scale=2", *LONGER],
}
ROWS = NETWORKS | DIFFUSIONS | FLOWS


@dataclass(frozen=True)
class World:
    """Latents of digits, their autoencoder, and a judge fitted on images that no generator sees."""

    root: Path
    judge: Judge
    held_features: np.ndarray

    @classmethod
    def make(cls, root: Path, vae_steps: int | None = None) -> "World":
        config = load_config(shipped_config("quickstart"))
        size = config.data.image_size
        write_digits(root, size)
        small_autoencoder(root, [f"training.steps={vae_steps}"] * bool(vae_steps))
        extract_features(images=root / "images", out=root / "latents", vae=str(root / "vae"), image_size=size)
        images, labels = read_folder(root / "held_out", size)
        judge = Judge(images, labels)
        return cls(root, judge, judge.features(images))

    def real(self) -> dict:
        """Accuracy of real images, and the distance of as many as there are samples: the best that a row can do."""
        images, labels = read_folder(self.root / "images", load_config(shipped_config("quickstart")).data.image_size)
        chosen = np.random.default_rng(0).permutation(len(images))[:SAMPLES]
        return {
            "row": REAL,
            "accuracy": round(self.judge.accuracy(images, labels), 4),
            "frechet": round(frechet_distance(self.judge.features(images[chosen]), self.held_features), 3),
        }


    def run(self, overrides: list[str], samples: int = SAMPLES) -> tuple[Config, Path, dict]:
        """Train and sample the quickstart's config with overrides; (config, checkpoint, figures)."""
        folder = Path(tempfile.mkdtemp(dir=self.root))
        places = [f"run_dir={folder}/run", f"data.shards={self.root}/latents", f"data.vae={self.root}/vae"]
        config = load_config(shipped_config("quickstart"), [*places, *overrides])
        start = time.perf_counter()
        checkpoint = train(config)
        trained = time.perf_counter()
        images = np.load(sample(checkpoint, folder / "samples", samples) / "samples.npz")["arr_0"]
        return config, checkpoint, {
            "steps": config.training.steps,
            "accuracy": round(self.judge.accuracy(images, np.arange(samples) % config.data.num_classes), 4),
            "frechet": round(frechet_distance(self.judge.features(images), self.held_features), 3),
            "loss": round(read_metrics(config.run_dir)[-1]["loss"], 4),
            "train_s": round(trained - start, 1),
            "sample_s": round(time.perf_counter() - trained, 1),
        }


def measure(name: str, world: World, overrides: list[str], samples: int = SAMPLES) -> dict:
    """Train and sample one row; the contents of its line."""
    _, checkpoint, figures = world.run([*COMMON, *ROWS[name], *overrides], samples)
    model = load_pipeline(checkpoint).model
    return {
        "row": name,
        "overrides": ROWS[name],
        "parameters": model.parameter_count(),
        "gflops": round(model.flops_per_image() / 1e9, 5),
        **figures,
    }


def of_xl(overrides: list[str]) -> tuple[float, float]:
    """Millions of parameters and GFLOPs per image of DiT-XL with these options on 32 x 32 x 4 latents."""
    patch = load_config(shipped_config("quickstart"), overrides).model.variant.partition("/")[2]
    large = ["data.num_classes=1000", f"model.variant=DiT-XL/{patch}"]
    config = load_config(shipped_config("quickstart"), [*overrides, *large])
    with torch.device("meta"):
        model = build_network(config, (4, 32, 32), build_objective(config))
    return model.parameter_count() / 1e6, model.flops_per_image() / 1e9


def table(names: list[str], lines: dict[str, dict], networks: bool) -> str:
    """Markdown of each row's newest line; for networks with the cost of the option at XL's size."""
    header = ["option" if networks else "objective", "steps", "class accuracy", "Frechet distance"]
    header += ["parameters", "MFLOP per image", "XL: M parameters", "XL: GFLOP per image"] if networks else ["loss"]
    rows = [header]
    for name in (name for name in [REAL, *names] if name in lines):
        line = lines[name]
        if name == REAL:
            cells = [""] * (len(header) - 4)
        elif networks:
            millions, gflops = of_xl(line["overrides"])
            cells = [f"{line['parameters']:,}", f"{1000 * line['gflops']:.2f}", f"{millions:.1f}", f"{gflops:.1f}"]
        else:
            cells = [f"{line['loss']:.3f}"]
        rows.append([name, line.get("steps", ""), f"{line['accuracy']:.3f}", f"{line['frechet']:.2f}", *cells])
    return markdown(rows, "---:")


def newest_lines() -> dict[str, dict]:
    """The last line of each row."""
    text = RESULTS.read_text() if RESULTS.is_file() else ""
    return {line["row"]: line for line in map(json.loads, text.splitlines())}


def write_tables() -> None:
    """Write the tables between their marks in docs/variants.md."""
    lines = newest_lines()
    text = DOCS.read_text()
    for mark, names in (("networks", NETWORKS), ("diffusions", DIFFUSIONS), ("flows", FLOWS)):
        head, _, rest = text.partition(f"<!-- {mark} -->\n")
        tail = rest.partition("<!-- end -->")[2]
        text = f"{head}<!-- {mark} -->\n{table(list(names), lines, mark == 'networks')}<!-- end -->{tail}"
    DOCS.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="rows whose name contains one of these words")
    parser.add_argument("--missing", action="store_true", help="only rows without a line")
    parser.add_argument("--set", nargs="+", default=[], help="overrides of every row, as training.steps=500")
    parser.add_argument("--table", action="store_true", help="train nothing")
    arguments = parser.parse_args()
    if not arguments.table:
        torch.set_num_threads(1)
        names = [name for name in ROWS if not arguments.only or any(word in name for word in arguments.only)]
        if not names:
            parser.error(f"--only {' '.join(arguments.only)} names no row; the rows are {', '.join(ROWS)}")
        names = [name for name in names if not arguments.missing or name not in newest_lines()]
        with tempfile.TemporaryDirectory() as root:
            world = World.make(Path(root))
            if REAL not in newest_lines():
                record("variants", RESULTS.parent, name=RESULTS.name, **world.real())
            for name in names:
                record("variants", RESULTS.parent, name=RESULTS.name, **measure(name, world, arguments.set))
                write_tables()
    write_tables()


if __name__ == "__main__":
    main()
