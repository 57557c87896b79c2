"""Sampled images per second: fastdit's own path (fastdit.sampling's ImagePipeline) beside plain loops, in rotation.

250-step DDPM, 50-step Heun and 20-step DPM-Solver++, classifier-free guidance 1.5 as one batch of twice the size;
latents, without the autoencoder. First both must produce the same latents in fp32 from the same weights, noise and
labels. fastdit is timed in bf16, the plain loop in fp32 (TF32 on a GPU) as the public code samples, and in bf16
autocast too. Only a share of each sampler's steps is run, as all cost the same: images/s are scaled to the full number.

    python -m bench.sample                       # the small model on a CPU, DiT-XL/2 on a GPU
    python -m bench.sample --size tiny --share 0.1 --out results
"""

import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from bench.record import compared, markdown, parser, record, rotate, synchronize
from bench.sample import reference
from bench.step.cases import SIZES, Case, config_of
from bench.step.stacks import SEED, fill, plain_network
from fastdit.build import build_network, build_objective
from fastdit.diffusion.timesteps import respaced
from fastdit.distributed import ImageRandom, seed_of
from fastdit.pipeline import ImagePipeline, Inference

CFG = 1.5
# name: (overrides, full number of steps, the plain loop as f(network, x_1, y, null, steps, noise))
SAMPLINGS: dict[str, tuple[list[str], int, Callable]] = {
    "DDPM": (
        ["objective=ddpm", "sampling.sampler=ddpm", "sampling.cfg_channels=3"], 250,
        lambda f, x, y, null, steps, noise: reference.ddpm(f, x, y, null, respaced(steps), noise, CFG),
    ),
    "Heun": (
        ["objective=flow", "sampling.sampler=heun", "sampling.cfg_channels=0", "model.learn_sigma=true"], 50,
        lambda f, x, y, null, steps, noise: reference.heun(f, x, y, null, steps, CFG),
    ),
    "DPM-Solver++": (
        ["objective=ddpm", "sampling.sampler=dpmpp_2m", "sampling.cfg_channels=0"], 20,
        lambda f, x, y, null, steps, noise: reference.dpmpp_2m(f, x, y, null, respaced(steps), CFG),
    ),
}  # fmt: skip
GATE_STEPS = 8
TOLERANCE = {"cpu": 1e-4, "cuda": 2e-2}  # relative difference of the latents in fp32; TF32 on a GPU


class Bench:
    """One sampler, through fastdit and through the plain loop, on the same weights."""

    def __init__(
        self, name: str, size: str, batch: int, device: torch.device, overrides: tuple[str, ...],
        like: "Bench | None" = None,
    ):  # fmt: skip
        """`like`: one for another sampler, whose networks, compiled and captured, this one shares."""
        self.options, self.whole, self.loop = SAMPLINGS[name]
        self.case = Case(name, "fastdit", size, batch, device.type, overrides)
        self.spec, self.null, self.device = SIZES[size].latents, SIZES[size].classes, device
        generator = torch.Generator().manual_seed(SEED)
        self.y = torch.randint(0, self.null, (batch,), generator=generator).to(device)
        self.inferences: dict[str, Inference] = like.inferences if like else {}  # by precision
        if like:
            self.plain = like.plain
            return
        with device:
            self.plain = plain_network(SIZES[size])
        self.plain = self.plain.to(device).eval()
        fill(self.plain)

    def fastdit(self, steps: int, precision: str) -> Tensor:
        """x_0 (N, C, h, w) after `steps` steps, as sample_ddp.py samples."""
        wanted = f"sampling.steps={steps}", f"sampling.precision={precision}", f"sampling.cfg_scale={CFG}"
        config = config_of(replace(self.case, overrides=(*self.options, *wanted, *self.case.overrides)))
        objective = build_objective(config)
        if precision not in self.inferences:
            with self.device:
                model = build_network(config, self.spec.shape, objective, self.device)
            model = model.to(self.device).eval()
            fill(model)
            self.inferences[precision] = Inference(model, precision, config.sampling.compile)
        pipeline = ImagePipeline(config, self.inferences[precision], None, objective, None, self.spec)
        return pipeline.latents(list(range(len(self.y))), self.y, SEED)

    def reference(self, steps: int, precision: str) -> Tensor:
        noise = ImageRandom([seed_of(SEED, i) for i in range(len(self.y))])
        x_1 = noise(torch.empty(len(self.y), *self.spec.shape, device=self.device))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16"):
            return self.loop(lambda *a: self.plain(*a).float(), x_1, self.y, self.null, steps, noise)

    def rate(self, run: Callable[[int, str], Tensor], steps: int, precision: str) -> float:
        """Images/s of the full number of steps, from `steps` of them."""
        synchronize(self.device)
        start = time.perf_counter()
        run(steps, precision)
        synchronize(self.device)
        return len(self.y) * steps / self.whole / (time.perf_counter() - start)


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def measure(bench: Bench, steps: int, rounds: int, deadline: float) -> tuple[dict[str, dict], float, float]:
    """The contestants' figures from `steps` steps per round, and fastdit's errors in fp32 and bf16.

    ValueError if the latents are not the plain loop's, TimeoutError if the deadline left no time for a round.
    """
    truth = bench.reference(GATE_STEPS, "fp32")
    error = difference(bench.fastdit(GATE_STEPS, "fp32"), truth)
    if not error <= TOLERANCE[bench.device.type]:
        raise ValueError(f"differs by {error:.1e} from the plain loop and was not timed")
    noise = difference(bench.fastdit(GATE_STEPS, "bf16"), truth)
    ways = {"plain, fp32": (bench.reference, "fp32"), "plain, bf16": (bench.reference, "bf16"),
            "fastdit": (bench.fastdit, "bf16")}  # fmt: skip
    for run, precision in ways.values():
        run(4, precision)  # compiles what gets compiled
    runs = {name: lambda way=way: bench.rate(way[0], steps, way[1]) for name, way in ways.items()}
    rates = rotate(runs, rounds, deadline)
    if not rates["fastdit"]:
        raise TimeoutError("was not timed: the budget was used up")
    return compared(rates), error, noise


def table(lines: list[dict]) -> str:
    header = ["sampler", "contestant", "images/s", "min .. max", "x plain, fp32"]
    return "## sample\n\n" + markdown([header] + [
        [f"{line['steps']}-step {line['sampler']}", line["contestant"], f"**{line['images_per_s']}**",
         "{} .. {}".format(*line["spread"]), line["over"].get("plain, fp32", 1)] for line in lines
    ])  # fmt: skip


def main() -> None:
    options, on_gpu = parser(__doc__), torch.cuda.is_available()
    options.add_argument("override", nargs="*", help="of fastdit's configuration, like model.attention=sdpa-flash")
    options.add_argument("--device", default="cuda" if on_gpu else "cpu")
    options.add_argument("--size", choices=SIZES, default="XL/2" if on_gpu else "small")
    options.add_argument("--batch", type=int, default=32 if on_gpu else 4, help="images; twice as many for the network")
    options.add_argument("--samplings", nargs="+", choices=SAMPLINGS, default=list(SAMPLINGS))
    options.add_argument("--share", type=float, default=0.1, help="of each sampler's steps that is run")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--budget-s", type=float, default=3600.0, help="seconds, after which no run begins")
    arguments = options.parse_args()
    deadline = time.monotonic() + arguments.budget_s
    torch.set_float32_matmul_precision("high")
    device, out = torch.device(arguments.device), arguments.out
    lines, wrong, bench = [], [], None
    for name in arguments.samplings:
        try:
            if time.monotonic() > deadline:
                raise TimeoutError("was not started: the budget was used up")
            bench = Bench(name, arguments.size, arguments.batch, device, tuple(arguments.override), bench)
            steps = max(4, round(arguments.share * bench.whole))
            figures, error, noise = measure(bench, steps, arguments.rounds, deadline)
        except (ValueError, RuntimeError, TimeoutError) as failure:  # the other samplers go on
            wrong.append(f"{name} {failure}".splitlines()[0])
            print(wrong[-1], file=sys.stderr)
            continue
        for contestant, figure in figures.items():
            lines.append(record(
                "sample", out, sampler=name, contestant=contestant, size=arguments.size, device=str(device),
                batch=arguments.batch, cfg=CFG, steps=bench.whole, steps_timed=steps, **figure,
                fp32_error=float(f"{error:.2g}"), bf16_error=float(f"{noise:.2g}"), overrides=arguments.override,
            ))  # fmt: skip
        if out:
            (out / "sample.md").write_text(table(lines))
    print(table(lines))
    if wrong:
        sys.exit("; ".join(wrong))


if __name__ == "__main__":
    main()
