"""Temperature scaling (Guo et al. 2017): one number, fitted on labeled images, that makes probabilities honest."""

import numpy as np
from numpy.typing import NDArray

_LARGEST = 1e3  # temperature, and its smallest inverse


def temperature(probs: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """The temperature with the least log-loss for these probabilities [N, K] and labels, int64 [N].

    The log-loss is convex in the temperature's inverse, so its derivative is bisected. Between 1e-3 and 1e3, which it
    reaches where all answers are right, or where probabilities say nothing.
    """
    logs = _logs(probs)
    own = logs[np.arange(len(labels)), labels].mean()
    low, high = np.log(1 / _LARGEST), np.log(_LARGEST)
    for _ in range(60):
        middle = (low + high) / 2
        weights = _softmax(np.exp(middle) * logs)
        expected = (weights * logs).sum(1).mean()
        low, high = (middle, high) if expected < own else (low, middle)
    return float(np.exp(-(low + high) / 2))


def scaled(probs: NDArray[np.float32], temperature: float) -> NDArray[np.float32]:
    """Probabilities [N, K] at another temperature; each image's classes keep their order."""
    return _softmax(_logs(probs) / temperature).astype(np.float32)


def _logs(probs: NDArray[np.float32]) -> NDArray[np.float64]:
    return np.log(np.maximum(probs.astype(np.float64), np.finfo(np.float64).eps))


def _softmax(logs: NDArray[np.float64]) -> NDArray[np.float64]:
    weights = np.exp(logs - logs.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True)
