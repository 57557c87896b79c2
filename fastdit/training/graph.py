"""The whole training step as one CUDA graph: loss, backward, optimizer and EMA, with no launches from Python."""

import torch
from torch import Tensor

from fastdit.diffusion.coupling import coupling_of
from fastdit.distributed import seed_of
from fastdit.training.step import StepResult, TrainStep

WARMUP = 3  # ordinary steps before the capture: they compile the blocks and create the optimizer's state


class GraphedStep:
    """Called like the TrainStep that it wraps: the first steps run normally, later ones are replays.

    Before each replay the generator is reseeded from (seed, step), so the random numbers are the same as without a
    graph. For one process with the torch engine (`build.check_engine`). ValueError without a GPU, and for settings that
    change from step to step.
    """

    def __init__(self, step: TrainStep):
        wrong = {
            "a GPU": step.ranks.device.type == "cuda",
            "training.loss_aware_times=false": step.times is None,
            "objective.coupling=independent": coupling_of(step.objective) == "independent",
            "until=0 in training.align": not any(alignment.until for alignment in step.alignments.values()),
        }
        for need, met in wrong.items():
            if not met:
                raise ValueError(f"training.cuda_graph=true needs {need}; set training.cuda_graph=false")
        for group in step.engine.adam.param_groups:
            group["capturable"] = True  # fused AdamW is, but PyTorch wants the flag
        self.step, self.calls = step, 0
        self.stream = torch.cuda.Stream(step.ranks.device)
        self.generator = torch.Generator(step.ranks.device)
        self.graph = torch.cuda.CUDAGraph()
        self.graph.register_generator_state(self.generator)

    def __call__(self, step: int, lr: float, *given: Tensor | None) -> StepResult:
        """Like TrainStep; the next call overwrites the returned tensors."""
        self.calls += 1
        self.generator.manual_seed(seed_of(self.step.seed, step))
        if self.calls <= WARMUP:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                out = self.step.run(self.generator, step, lr, *given)
            torch.cuda.current_stream().wait_stream(self.stream)
            return out
        if self.calls == WARMUP + 1:
            self.places = [None if tensor is None else tensor.clone() for tensor in given]
            # thread_local: the loader's thread pins memory meanwhile, which would abort a global capture
            with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
                self.out = self.step.run(self.generator, step, lr, *self.places)
            self.generator.manual_seed(seed_of(self.step.seed, step))
        for place, tensor in zip(self.places, given, strict=True):
            if place is not None:
                place.copy_(tensor)
        self.step.engine.set_lr(lr)
        for average in (self.step.ema, *self.step.averages):
            average.set_step(step + 1)
        self.graph.replay()
        return self.out
