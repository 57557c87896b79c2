"""What all tests share.

Without a GPU, Triton's kernels run under its interpreter, which must be chosen before triton is first imported.
"""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with images, an autoencoder, latents and config.yaml to train in (helpers/runs.py)."""
    from helpers.runs import make_world

    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def one_thread():
    """As the commands run in these tests: the number of threads changes a sum's last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
