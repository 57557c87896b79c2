"""Training steps per second: fastdit beside the public recipes, on the same work, in one run, by turns.

A step is everything from a batch of moments in pinned host memory to moved weights and EMA: transfer, posterior sample,
noise, label dropout, DDPM's learned-range loss, backward, optimiser, EMA. Every contestant lives in a process of its
own and must first pass a gate: from the same weights and inputs the same losses, step after step, within the noise of
its dtype, as the plain network in fp32. Only then are they timed, taking turns, and ratios are formed within a turn.

    python bench/step.py                     # the small model on a CPU, DiT-XL/2 at batch 256 on a GPU
    python bench/step.py --size small --contestants strong fastdit --rounds 5 --out bench/results/here
"""

import argparse
import statistics
import sys
import time
import traceback
from dataclasses import replace
from multiprocessing import get_context

import torch
from contestants import CONTESTANTS, SIZES, Case, Verdict, build_case, config_of, latent_shape
from record import record

from fastdit.diffusion.objectives import OBJECTIVES
from fastdit.training.log import peak_gib
from fastdit.training.loop import network

# against fp32: losses of single images and ways of the weights, root mean square of the relative differences (Adam
# moves a weight whose gradient is all rounding as far as any other, hence the second number)
TOLERANCE = {"fp32": (1e-4, 1e-2), "tf32": (5e-3, 0.1), "fp16": (5e-3, 0.1), "bf16": (1e-2, 0.15)}
START_S = 600  # longest wait for a contestant to build, compile and pass the gate


def serve(connection, case: Case) -> None:
    """The process of one contestant: answers (method, arguments) until told nothing more."""
    try:
        bench = None
        while (order := connection.recv()) is not None:
            method, arguments = order
            if method == "build":
                bench = Served(case)
            else:
                connection.send(getattr(bench, method)(*arguments))
                continue
            connection.send(None)
    except torch.OutOfMemoryError as error:
        connection.send(MemoryError(str(error).partition("\n")[0]))
    except Exception:
        connection.send(RuntimeError(traceback.format_exc()))


class Served:
    """A contestant inside its process."""

    def __init__(self, case: Case):
        self.device = torch.device(case.device)
        self.begin = time.perf_counter()
        self.contestant = build_case(case)
        self.done = 0

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def gate(self, inputs) -> tuple[Verdict, float]:
        """The verdict, and the seconds from nothing to the end of the first steps."""
        verdict = self.contestant.gate(inputs)
        self.wait()
        return verdict, time.perf_counter() - self.begin

    def round(self, warmup: int, steps: int) -> float:
        """Seconds per step."""
        for i in range(warmup):
            self.contestant.step(i)
        self.wait()
        start = time.perf_counter()
        for i in range(steps):
            loss = self.contestant.step(i)
        self.wait()
        seconds = (time.perf_counter() - start) / steps
        if not torch.isfinite(loss):
            raise ValueError(f"the loss became {loss.item()}")
        return seconds

    def peak_gib(self) -> float:
        return peak_gib(self.device)


class Worker:
    """The other end: starts the process and passes on what it answers."""

    def __init__(self, case: Case):
        self.case = case
        context = get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, case), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, method: str, *arguments, timeout: float = START_S):
        self.connection.send((method, arguments))
        if not self.connection.poll(timeout):
            self.process.kill()
            raise TimeoutError(f"{self.case.name}: no answer to {method} within {timeout:.0f} s")
        try:
            answer = self.connection.recv()
        except EOFError:
            self.process.join(10)
            raise RuntimeError(f"{self.case.name}: the process ended with {self.process.exitcode}") from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        if self.process.is_alive():
            self.connection.send(None)
            self.process.join(30)


def gate_errors(verdict: Verdict, truth: Verdict) -> tuple[float, float]:
    """(of the losses, of the ways that weights and EMA went): root mean square of the relative differences."""
    losses = torch.stack(verdict.losses) / torch.stack(truth.losses) - 1
    ways = verdict.moved / truth.moved - 1
    return tuple(float(error.square().mean().sqrt()) for error in (losses, ways))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--size", choices=SIZES, default="XL/2" if on_gpu else "small")
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="timed in one turn")
    arguments = parser.parse_args()
    size = SIZES[arguments.size]
    cases = [Case(name, name, arguments.size, size.batch, arguments.device) for name in arguments.contestants]

    oracle = None
    workers, facts = {}, {}
    for case in sorted(cases, key=lambda case: case.stack != "fastdit"):  # first: it draws the gate's inputs
        worker = Worker(case)
        worker.ask("build")
        verdict, seconds = worker.ask("gate", oracle.inputs if oracle else None)
        if oracle is None:
            truth = Worker(replace(case, name="oracle", stack="oracle"))
            truth.ask("build")
            oracle, _ = truth.ask("gate", verdict.inputs)
            truth.close()
        errors = gate_errors(verdict, oracle)
        good = all(error <= most for error, most in zip(errors, TOLERANCE[verdict.precision], strict=True))
        print(f"{case.name}: {verdict.precision}, losses {errors[0]:.1e}, ways {errors[1]:.1e}"
              f" -> {'equal' if good else 'DIFFERENT'}; ready after {seconds:.1f} s", file=sys.stderr)  # fmt: skip
        if not good:
            sys.exit(f"{case.name} computes something else than the reference; nothing was timed")
        workers[case.name], facts[case.name] = worker, seconds
    seconds: dict[str, list[float]] = {case.name: [] for case in cases}
    for _ in range(arguments.rounds):
        for case in cases:
            seconds[case.name].append(workers[case.name].ask("round", 1, arguments.steps))
    with torch.device("meta"):
        config = config_of(cases[0])
        flops = 3 * network(config, latent_shape(size), OBJECTIVES["ddpm"]()).flops_per_image()
    for case in cases:
        each = seconds[case.name]
        median = statistics.median(each)
        ratio = {
            other: round(statistics.median(b / a for a, b in zip(each, seconds[other], strict=True)), 2)
            for other in seconds
            if other != case.name
        }
        record(
            "step", contestant=case.name, size=arguments.size, batch=case.batch, steps_per_s=round(1 / median, 3),
            images_per_s=round(case.batch / median, 2),
            spread=[round(case.batch / worst, 2) for worst in (max(each), min(each))],
            tflops=round(flops * case.batch / median / 1e12, 4), speed_over=ratio,
            peak_gib=round(workers[case.name].ask("peak_gib"), 2), first_step_s=round(facts[case.name], 1),
        )  # fmt: skip
    for worker in workers.values():
        worker.close()


if __name__ == "__main__":
    main()
