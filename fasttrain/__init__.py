"""fasttrain: a high-throughput trainer for image classifiers."""

__version__ = "0.1.0"
