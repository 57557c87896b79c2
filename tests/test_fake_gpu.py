"""The code that only a GPU runs, on a fake one (helpers/fake_gpu.py)."""

import json
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch

from helpers import fake_gpu
from helpers.runs import FORKS, Forks, losses

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")

REFUSED = [
    "ones + torch.ones(2)",
    "torch.ones(2)[torch.tensor([0], device='cuda')]",
    "ones.numpy()",
    "np.asarray(ones)",
    "ones.pin_memory()",
    "torch.randn(2, device='cuda', generator=torch.Generator())",
    "torch.randn(2, generator=torch.Generator('cuda'))",
    "torch.nn.Linear(2, 2).to('cuda')(torch.ones(2))",
    "captured(lambda: ones.sum().item())",
    "captured(lambda: ones[ones > 0])",
    "captured(lambda: ones.cpu())",
    "captured(lambda: ones + torch.tensor(1.0, device='cuda'))",
    "captured(lambda: ones.copy_(torch.ones(2)))",
    "captured(lambda: torch.randn(2, device='cuda', generator=torch.Generator('cuda')))",
]
RIGHT = {
    "ones.device": "cuda:0",
    "(ones + torch.tensor(1.0)).cpu()": "tensor([2., 2.])",
    "torch.ones(2).to(ones).is_cuda": "True",
    "torch.nn.Linear(2, 2).to('cuda')(ones).is_cuda": "True",
    "replayed(lambda x: x * 2, torch.tensor([3.0, 4.0], device='cuda')).cpu()": "tensor([6., 8.])",
    "replayed(lambda x: x.add_(1), torch.tensor([3.0, 4.0], device='cuda')).cpu()": "tensor([4., 5.])",
}


def evaluated(expression: str) -> str:
    """What the expression gives on the GPU, or the error that it raises."""
    ones = torch.ones(2, device="cuda")
    try:
        return str(eval(expression, globals() | {"ones": ones}))
    except (RuntimeError, TypeError) as error:
        return f"refused: {error}"


def captured(function) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph


def replayed(function, given: torch.Tensor) -> torch.Tensor:
    """What a graph gives that was captured with zeros and is replayed with `given`."""
    place, outs = torch.zeros_like(given), []
    graph = captured(lambda: outs.append(function(place)))
    place.copy_(given)
    graph.replay()
    return outs[0]


def test_the_fake_gpu_refuses_what_a_gpu_refuses():
    with ProcessPoolExecutor(1, FORKS, initializer=fake_gpu.install) as pool:
        got = dict(zip([*REFUSED, *RIGHT], pool.map(evaluated, [*REFUSED, *RIGHT]), strict=True))
    assert [expression for expression in REFUSED if not got[expression].startswith("refused: ")] == []
    assert {expression: got[expression] for expression in RIGHT} == RIGHT


def run_on(place: str, script: str, *arguments: object, processes: int = 1) -> None:
    device, before = ("cuda", fake_gpu.install) if place == "gpu" else ("cpu", None)
    given = (*map(str, arguments), "--device", device)  # an error if there is no GPU
    with Forks(script, *given, processes=processes, before=before) as forks:
        codes, said = forks.wait(), forks.said()
    assert set(codes) == {0}, said


def train_on(place: str, world, run_dir, *overrides: str, processes: int = 1) -> list[float]:
    """The losses."""
    config = ("--config", world / "config.yaml", f"run_dir={run_dir}", "training.precision=fp32")
    run_on(place, "train.py", *config, *overrides, processes=processes)
    return losses(run_dir)


@pytest.fixture(scope="module")
def runs(world, tmp_path_factory):
    """A run on the CPU, and on the GPU one with CUDA graphs that was resumed; their losses."""
    root = tmp_path_factory.mktemp("runs")
    more = ("training.steps=10", "data.val_fraction=0.3", "training.ema_stds=[0.05,0.1]", "training.grad_clip=1.0",
            "training.ema_decay=0.5", "training.sample_every=5")  # fmt: skip
    graph = ("training.cuda_graph=true", "training.compile=true")
    on_cpu = train_on("cpu", world, root / "cpu", *more)
    train_on("gpu", world, root / "gpu", *more, *graph, "training.steps=5")
    on_gpu = train_on("gpu", world, root / "gpu", *more, *graph, "--resume")
    return root, on_cpu, on_gpu


def test_training_in_a_cuda_graph_and_its_resume_have_the_losses_of_the_cpu(runs):
    _, on_cpu, on_gpu = runs
    assert on_gpu == pytest.approx(on_cpu, rel=1e-5)


def test_two_gpus_have_the_losses_of_one(world, runs, tmp_path):
    _, on_cpu, _ = runs
    both = train_on("gpu", world, tmp_path / "run", "training.steps=6", "data.val_fraction=0.3",
                    "training.grad_clip=1.0", processes=2)  # fmt: skip
    assert both == pytest.approx(on_cpu[:6], rel=1e-4)


@pytest.mark.parametrize("options", [
    ("training.optimizer=muon", "training.align=[layersync]", "training.route=0.5", "training.route_ends=[1,1]",
     "model.variant=DiT-4x32x2/4"),
    ("training.fp8=true", "training.cuda_graph=true", "model.variant=DiT-2x64x4/4", "training.joint_adaln=true",
     "training.precision=bf16"),
    ("objective.name=ddpm", "objective.loss_type=kl", "training.loss_aware_times=true", "training.micro_batch=4"),
    ("model.block=cross_attention", "model.mlp=swiglu", "model.position=rope", "model.qk_norm=rms", "model.dropout=0.1",
     "training.activation_checkpointing=full", "training.residual=bf16", "training.precision=bf16"),
])  # fmt: skip
def test_every_kind_of_step_runs_on_a_gpu_as_on_the_cpu(world, tmp_path, options):
    on_cpu = train_on("cpu", world, tmp_path / "cpu", "training.steps=5", "model.attention=sdpa",
                      *(each for each in options if "cuda_graph" not in each))  # fmt: skip
    on_gpu = train_on("gpu", world, tmp_path / "gpu", "training.steps=5", "model.attention=sdpa", *options)
    assert on_gpu == pytest.approx(on_cpu, rel=1e-4)


@pytest.mark.parametrize("options", [
    ("sampling.sampler=heun", "sampling.cfg_interval=[0.1,0.9]", "sampling.cfg_rescale=0.5", "sampling.clip=dynamic"),
    ("sampling.sampler=sde_euler", "sampling.weak_checkpoint={run}/checkpoints/step-0000005"),
])  # fmt: skip
def test_sampling_in_a_cuda_graph_makes_the_images_of_the_cpu(runs, tmp_path, options):
    run, images = runs[0] / "gpu", {}
    options = [each.format(run=run) for each in options]
    for place in ("cpu", "gpu"):
        out = tmp_path / place
        run_on(place, "sample_ddp.py", "--checkpoint", run, "--out", out, "--num-samples", 6, *options)
        with np.load(out / "samples.npz") as file:
            images[place] = file["arr_0"]
        compiled = json.loads((out / "sampling.json").read_text())["sampling"]["compile"]
        assert compiled == (place == "gpu")
    assert np.array_equal(images["gpu"], images["cpu"])


def test_extraction_on_a_gpu_gives_the_latents_of_the_cpu(world, tmp_path):
    settings = ("--images", world / "held_out", "--vae", world / "vae", "--image-size", 32, "--precision", "float32")
    stored = []
    for place in ("cpu", "gpu"):
        run_on(place, "extract_features.py", *settings, "--out", tmp_path / place)
        stored.append([path.read_bytes() for path in sorted((tmp_path / place).glob("*.tar"))])
    assert stored[0] == stored[1] != []


def test_an_autoencoder_trains_and_resumes_on_a_gpu_as_on_the_cpu(world, tmp_path):
    data = (f"data.images={world / 'images'}", f"data.val_images={world / 'held_out'}")
    rest = ("training.checkpoint_every=3", "training.log_every=1", "training.evaluate_every=3",
            "training.evaluate_images=8", "discriminator.weight=0.5", "discriminator.start=2", "discriminator.layers=1",
            "discriminator.channels=8")  # fmt: skip
    for place in ("cpu", "gpu"):
        for steps, resume in ((3, ()), (6, ("--resume",))):
            run_on(place, "fastdit/cli.py", "train-vae", "vae_digits", *data, *rest, f"run_dir={tmp_path / place}",
                   f"training.steps={steps}", *resume)  # fmt: skip
    assert losses(tmp_path / "gpu") == pytest.approx(losses(tmp_path / "cpu"), rel=1e-4)


def test_a_run_is_measured_on_a_gpu_as_on_the_cpu(world, runs, tmp_path):
    run, shards = runs[0] / "gpu", world / "latents"
    measured = {"cpu": [], "gpu": []}
    for place, results in measured.items():
        run_on(place, "fastdit/cli.py", "evaluate", run, "--loss", "--out", tmp_path / f"{place}.jsonl")
        results.append(json.loads((tmp_path / f"{place}.jsonl").read_text())["values"]["loss"])
        run_on(place, "fastdit/cli.py", "likelihood", "--checkpoint", run, "--shards", shards, "--num-images", 4,
               "--steps", 2, "--probes", 1, "--out", tmp_path / f"{place}.json")  # fmt: skip
        results.append(json.loads((tmp_path / f"{place}.json").read_text())["bits_per_dim"])
    assert measured["gpu"] == pytest.approx(measured["cpu"], rel=1e-4)
