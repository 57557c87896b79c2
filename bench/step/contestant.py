"""One contestant in its own process: `python -m bench.step.contestant` reads a job from stdin and writes one file.

The job, in JSON: case (the fields of Case), gate (whether to run the gate's steps), warmup and steps (0: no timing),
turn_s (seconds: fewer steps are timed to hold them, at least 3), profile (steps to profile), trace (a file for the
timeline, or ""), file (where the result goes).

The result, in JSON: losses, moved, drawn, precision, first_step_s of the gate; seconds of each timed step, peak_gib of
the tensors, reserved_gib (with a CUDA graph's own memory), product_tflops; profile_ms by kind of kernel, kernels of the
largest by name (milliseconds and calls of a step); turn_s, what all took; or else {failed: traceback, out_of_memory:
bool}.
"""

import json
import sys
import time
import traceback
from pathlib import Path

import torch

from bench.record import product_tflops, synchronize
from bench.step.cases import Case
from bench.step.profiles import breakdown, largest
from bench.step.stacks import Fastdit, Reference, build_case
from fastdit.errors import is_out_of_memory
from fastdit.training.log import peak_gib


def perform(job: dict) -> dict:
    """Build the case and do the job; the result as above."""
    case = Case(**{**job["case"], "overrides": tuple(job["case"]["overrides"])})
    device = torch.device(case.device)
    # a batch that was halved in an earlier process must not make the compiler expect dynamic shapes
    torch._dynamo.config.automatic_dynamic_shapes = False
    result, begin = {}, time.perf_counter()
    try:
        contestant = build_case(case)
        if job["gate"]:
            verdict = contestant.gate()
            result = {"losses": verdict.losses.tolist(), "moved": verdict.moved.tolist(),
                      "drawn": verdict.drawn.tolist(), "precision": verdict.precision,
                      "first_step_s": verdict.first_done - begin}  # fmt: skip
        if job["steps"]:
            result["seconds"] = time_steps(contestant, device, job["warmup"], job["steps"], begin + job["turn_s"])
            result["peak_gib"] = result["reserved_gib"] = peak_gib(device)
            if device.type == "cuda":
                result["reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
    except Exception as error:
        return {"failed": traceback.format_exc(), "out_of_memory": is_out_of_memory(error)}
    try:
        if job["steps"]:
            result["product_tflops"] = product_tflops(device)  # while the device is as warm as it gets
        if job["profile"]:
            result |= profile(contestant, device, job["profile"], job["trace"])
    except Exception as error:  # the times are valid nevertheless
        print(f"{case.name}: not measured: {error}", file=sys.stderr)
    return result | {"turn_s": time.perf_counter() - begin}


def time_steps(
    contestant: Reference | Fastdit, device: torch.device, warmup: int, steps: int, until: float
) -> list[float]:
    """Seconds of each step, without waiting for the device in between; fewer, but 3, to end at time.perf_counter()."""

    def mark():
        if device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    for i in range(warmup):
        if i == warmup - 1:
            synchronize(device)
            start = time.perf_counter()
        contestant.step(i)
    synchronize(device)
    if warmup:
        now = time.perf_counter()
        steps = min(steps, max(3, int((until - now) / (now - start))))
    marks, losses = [mark()], []
    for i in range(steps):
        losses.append(contestant.step(i))
        marks.append(mark())
    synchronize(device)
    if not torch.isfinite(torch.stack([loss.detach().float() for loss in losses])).all():
        raise ValueError(f"a loss is not finite: {losses}")
    pairs = zip(marks, marks[1:], strict=False)
    return [a.elapsed_time(b) / 1000 if device.type == "cuda" else b - a for a, b in pairs]


def profile(contestant: Reference | Fastdit, device: torch.device, steps: int, trace: str) -> dict[str, dict]:
    """Milliseconds of a step by kind of kernel, and the largest kernels; `trace` gets the timeline for a viewer."""
    activity = torch.profiler.ProfilerActivity
    activities = [activity.CUDA if device.type == "cuda" else activity.CPU]  # reading the host's too takes seconds
    contestant.step(0)
    synchronize(device)
    with torch.profiler.profile(activities=activities) as profiler:
        start = time.perf_counter()
        for i in range(steps):
            contestant.step(i)
        synchronize(device)
        seconds = time.perf_counter() - start
    if trace:
        profiler.export_chrome_trace(trace)
    events = profiler.events()
    kinds = breakdown(events, seconds, device.type)
    return {"profile_ms": {kind: 1000 * s / steps for kind, s in kinds.items()},
            "kernels": largest(events, steps, device.type)}  # fmt: skip


if __name__ == "__main__":
    if text := sys.stdin.read():  # empty when a process that was started ahead is not needed
        job = json.loads(text)
        partial = Path(job["file"]).with_suffix(".partial")
        partial.write_text(json.dumps(perform(job)))
        partial.rename(job["file"])
