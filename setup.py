"""Packages, the entry point and the extras; everything else about the build is in pyproject.toml.

FASTTRAIN_CUDA chooses the CUDA version that torch and DALI are built for: 13 (the default, for NVIDIA drivers from 580
on) or 12 (for drivers from 525 on).
"""

import os
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent

# PyPI has one build of each torch. From 2.11 on, it is built for CUDA 13. 2.10 is built for CUDA 12.8 on x86-64, and
# without CUDA on aarch64, where the CUDA 12 builds come only from PyTorch's own index (the doctor names the command).
# torchvision 0.25 and Triton 3.6 belong to torch 2.10.
TORCH = {
    "12": ["torch>=2.10,<2.11", "torchvision>=0.25,<0.26", "triton>=3.6,<3.7"],
    "13": ["torch>=2.11", "torchvision>=0.26", "triton>=3.6"],
}
CUDA = os.environ.get("FASTTRAIN_CUDA") or "13"
if CUDA not in TORCH:
    sys.exit(f"FASTTRAIN_CUDA must be 12 or 13, not {CUDA!r}")

setup(
    name="fasttrain",
    version="0.1.0",
    description="A high-throughput trainer for image classifiers: DALI pipelines, Triton kernels, channels-last AMP.",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    # `fasttrain/pipelines` and `fasttrain/kernels` are links to the top-level folders of those names, so that there
    # is one import name for each. Listed by hand: a search for packages would find the top-level folders as well.
    packages=[
        "fasttrain",
        "fasttrain.benchmarks",
        "fasttrain.checkpoints",
        "fasttrain.cli",
        "fasttrain.config",
        "fasttrain.data",
        "fasttrain.data.stores",
        "fasttrain.data.vipriors",
        "fasttrain.distributed",
        "fasttrain.doctor",
        "fasttrain.evaluation",
        "fasttrain.export",
        "fasttrain.kernels",
        "fasttrain.losses",
        "fasttrain.models",
        "fasttrain.pipelines",
        "fasttrain.recipes",
        "fasttrain.report",
        "fasttrain.training",
        "fasttrain.tune",
        "fasttrain.utils",
    ],
    package_data={
        "fasttrain.data.vipriors": ["*.txt.gz", "CREDITS.txt"],
        "fasttrain.report": ["page.css", "page.js"],
    },
    install_requires=[
        *TORCH[CUDA],
        "timm>=1.0.20",
        # Left out: DALI before 2.2, whose decoders have no `adjust_orientation`, and 2.5, which is not released yet.
        # 2.3 and 2.4 come with nvImageCodec 0.9, which crashes when it decodes a region on a GPU
        # (NVIDIA/nvImageCodec#55): pipelines/decoders.py does not let it.
        f"nvidia-dali-cuda{CUDA}0>=2.2,<2.5",
        "numpy>=2.0",
        "pillow>=10.0",
        "click>=8.1",
        "safetensors>=0.5",
        "tomli-w>=1.0",
        "tqdm>=4.66",
    ],
    extras_require={
        "tensorboard": ["tensorboard"],
        "wandb": ["wandb"],
        "trackio": ["trackio"],
        "mlflow": ["mlflow"],
        "plot": ["matplotlib"],
        "parquet": ["pyarrow>=15"],
        "energy": ["nvidia-ml-py"],
        "remote": ["fsspec[http]", "s3fs"],
        "export": ["onnx", "onnxscript", "onnxruntime"],
        "tune": ["optuna>=4", "matplotlib"],
        "notebook": ["notebook", "pandas", "matplotlib"],
        "test": [
            "pytest>=8",
            "pytest-timeout",
            "pytest-xdist",
            "hypothesis>=6.100",
            "matplotlib",
            "scipy",
            "scikit-learn",
            "pytorch-metric-learning",
            "mypy",
            "ruff",
            # A notebook, a browser, and what other programs read.
            "pandas",
            "ipykernel",
            "nbclient",
            "selenium",
            "onnx",
            "onnxscript",
            "onnxruntime",
            # What other programs write, for the tests of what is read from them.
            "datasets",
            "optuna>=4",
            "webdataset",
            "s3fs",
            "moto[s3,server]",
        ],
    },
    entry_points={"console_scripts": ["fasttrain = fasttrain.cli.main:main"]},
)
