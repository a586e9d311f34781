"""Packages, the entry point and the extras; everything else about the build is in pyproject.toml."""

from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent

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
        "fasttrain.models",
        "fasttrain.losses",
        "fasttrain.pipelines",
        "fasttrain.kernels",
    ],
    package_data={"fasttrain": ["data/vipriors/*.txt.gz", "data/vipriors/CREDITS.txt"]},
    install_requires=[
        "torch>=2.10",
        "torchvision",
        "timm>=1.0.20",
        "triton>=3.6",
        "nvidia-dali-cuda130>=2.4",
        "numpy>=2.0",
        "pillow>=10.0",
        "click>=8.1",
        "safetensors>=0.5",
        "tomli-w>=1.0",
        "tqdm>=4.66",
    ],
    extras_require={
        "tensorboard": ["tensorboard"],
        "plot": ["matplotlib"],
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
        ],
    },
    entry_points={"console_scripts": ["fasttrain = fasttrain.cli:main"]},
)
