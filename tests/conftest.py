"""What all tests share.

A test must not depend on the machine: by default everything computes on one CPU thread (the number of threads changes
the last bits of a sum), nothing asks the Hugging Face hub, and a GPU is used only where a test names it. Without a GPU,
Triton's kernels run under its interpreter. All of this must be set before the libraries are first imported.
"""

import os
import tempfile

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["DS_ACCELERATOR"] = "cpu"

import fastdit  # noqa: F401, I001  before torch: it sets how OpenMP's threads wait

import pytest
import torch

# Inductor's cache does not tell instruction sets apart: code made under another ATEN_CPU_CAPABILITY crashes
cache = f"{tempfile.gettempdir()}/fastdit_tests_{os.getuid()}_{torch.backends.cpu.get_cpu_capability()}"
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", cache)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with images, an autoencoder, latents and config.yaml to train in (helpers/runs.py)."""
    from helpers.runs import make_world

    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def trained(world):
    """A run long enough for an output that is not zero, as it is at initialization."""
    from helpers.runs import train_here

    train_here(world, world / "trained", "training.ema_decay=0.5")
    return world / "trained"


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder with converted checkpoints, their autoencoder and latents (helpers/checkpoints.py)."""
    from helpers.checkpoints import make_place

    return make_place(tmp_path_factory.mktemp("place"))


@pytest.fixture
def one_thread():
    """One CPU thread, for comparisons with files that another process wrote with one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def any_cpu(monkeypatch):
    """bf16 also where extraction refuses it: without the processor's instructions it is slow, with the same results."""
    monkeypatch.setattr("fastdit.data.extract.check_precision", lambda precision, device: None)
