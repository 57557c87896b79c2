"""Contestants in processes of their own: one that runs out of memory ends alone, and peak memory is its own."""

import gc
import time
import traceback
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from contestants import Case, build_case
from gate import Gated
from record import product_tflops

from fastdit.errors import is_out_of_memory
from fastdit.training.log import peak_gib


class Served:
    """A contestant inside its process."""

    def __init__(self):
        self.contestant: Any = None
        self.device = torch.device("cpu")

    def build(self, case: Case) -> None:
        self.device = torch.device(case.device)
        # a batch that was halved, here or in an earlier process, must not make the compiler expect any batch
        torch._dynamo.config.automatic_dynamic_shapes = False
        self.contestant = build_case(case)

    def gate(self, case: Case) -> Gated:
        """Build, and run the first steps; with half the batch, and half again, where the memory does not suffice."""
        while True:
            try:
                begin = time.perf_counter()
                self.build(case)
                verdict = self.contestant.gate()
                return Gated(verdict, case.batch, verdict.first_done - begin)
            except Exception as error:
                if case.batch == 1 or case.stack == "oracle" or not is_out_of_memory(error):
                    raise
                case = replace(case, batch=case.batch // 2)
            self.contestant = None
            torch._dynamo.reset()
            self.release()

    def release(self) -> None:
        """Give the device back what nothing is kept in."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def turn(self, warmup: int, steps: int) -> list[float]:
        """Seconds of each step, one after the other without waiting in between."""
        for i in range(warmup):
            self.contestant.step(i)
        self.wait()
        marks, losses = [self.mark()], []
        for i in range(steps):
            losses.append(self.contestant.step(i))
            marks.append(self.mark())
        self.wait()
        if not torch.isfinite(torch.stack([loss.detach().float() for loss in losses])).all():
            raise ValueError(f"a loss is not finite: {losses}")
        if self.device.type == "cuda":
            return [a.elapsed_time(b) / 1000 for a, b in zip(marks, marks[1:], strict=False)]
        return [b - a for a, b in zip(marks, marks[1:], strict=False)]

    def mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def peak_gib(self) -> tuple[float, float]:
        """Of the tensors, and of what was taken from the device for them (a CUDA graph keeps its own)."""
        on_gpu = self.device.type == "cuda"
        return peak_gib(self.device), torch.cuda.max_memory_reserved() / 2**30 if on_gpu else peak_gib(self.device)

    def product_tflops(self) -> float:
        return product_tflops(self.device)

    def profile(self, steps: int, trace: Path | None) -> dict[str, float]:
        """Milliseconds of a step by kind of kernel; `trace` gets the whole timeline for a trace viewer."""
        from profiles import breakdown

        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self.contestant.step(0)
        self.wait()
        with torch.profiler.profile(activities=activities) as profiler:
            start = time.perf_counter()
            for i in range(steps):
                self.contestant.step(i)
            self.wait()
            seconds = time.perf_counter() - start
        if trace is not None:
            profiler.export_chrome_trace(str(trace))
        return {kind: 1000 * s / steps for kind, s in breakdown(profiler.events(), seconds, self.device.type).items()}


def serve(connection) -> None:
    """The body of a contestant's process: does what it is asked until it is ended."""
    bench = Served()
    try:
        while True:
            method, arguments = connection.recv()
            connection.send(getattr(bench, method)(*arguments))
    except (EOFError, KeyboardInterrupt):
        pass
    except Exception as error:
        if is_out_of_memory(error):
            connection.send(MemoryError(str(error).partition("\n")[0].partition(" GPU ")[0]))
        else:
            connection.send(RuntimeError(traceback.format_exc()))


class Worker:
    """This end of it: starts the process and passes on what it answers, or raises what it died of."""

    def __init__(self):
        context = get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, method: str, *arguments: Any, timeout_s: float) -> Any:
        try:
            self.connection.send((method, arguments))
            if not self.connection.poll(timeout_s):
                self.process.kill()
                raise TimeoutError(f"no answer to {method} within {timeout_s:.0f} s")
            answer = self.connection.recv()
        except (EOFError, BrokenPipeError):
            self.process.join(10)
            raise RuntimeError(f"its process ended with {self.process.exitcode} in {method}") from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        """At once: nothing that the process still holds is wanted, and the next one waits for its memory."""
        self.process.kill()
        self.process.join()
