"""The whole training step as one CUDA graph: loss, backward, optimiser and EMA replayed, no launch from Python."""

import torch
from torch import Tensor

from fastdit.distributed import seed_of
from fastdit.training.step import TrainStep

WARMUP = 3  # real steps before the capture: they compile the blocks and create the optimiser's state


class GraphedStep:
    """Call it as the TrainStep that it wraps: the first steps run as they are, later ones are replays.

    Every step draws from a generator reseeded from (seed, step) before the replay, as without a graph: the numbers
    are the same. One process, the torch engine, an EMA with a fixed decay; ValueError otherwise.
    """

    def __init__(self, step: TrainStep):
        wrong = {
            "a GPU": step.ranks.device.type == "cuda",
            "one process": step.ranks.world == 1,
            "training.engine=torch": step.engine.name == "torch",
            "training.ema_warmup=false": not step.ema.warmup,
            "training.loss_aware_times=false": step.times is None,
        }
        for need, met in wrong.items():
            if not met:
                raise ValueError(f"training.cuda_graph=true needs {need}; set training.cuda_graph=false")
        for group in step.engine.optimizer.param_groups:
            group["capturable"] = True  # as fused AdamW is: PyTorch refuses to capture its step without the flag
        self.step, self.calls = step, 0
        self.stream = torch.cuda.Stream(step.ranks.device)
        self.generator = torch.Generator(step.ranks.device)
        self.graph = torch.cuda.CUDAGraph()
        self.graph.register_generator_state(self.generator)

    def __call__(self, moments: Tensor, y: Tensor, step: int, lr: float) -> tuple[dict[str, Tensor], Tensor]:
        """As TrainStep; the returned tensors are overwritten by the next call."""
        self.calls += 1
        self.generator.manual_seed(seed_of(self.step.seed, step))
        if self.calls <= WARMUP:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                out = self.step.run(moments, y, self.generator, step, lr)
            torch.cuda.current_stream().wait_stream(self.stream)
            return out
        if self.calls == WARMUP + 1:
            self.moments, self.y = moments.clone(), y.clone()
            # thread_local: the loader's thread pins memory meanwhile, which would end a global capture
            with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
                self.out = self.step.run(self.moments, self.y, self.generator, step, lr)
            self.generator.manual_seed(seed_of(self.step.seed, step))
        self.moments.copy_(moments)
        self.y.copy_(y)
        self.step.engine.set_lr(lr)
        self.graph.replay()
        return self.out
