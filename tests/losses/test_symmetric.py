"""Symmetric cross entropy against a naive loop in float64, its closed form, and gradcheck; edge cases."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fasttrain.losses.base import Batch, Output
from fasttrain.losses.cross_entropy import CrossEntropy
from fasttrain.losses.symmetric import SymmetricCrossEntropy


def batch_of(labels, other=None, lam=None) -> Batch:
    ones = torch.ones(len(labels))
    return Batch(labels, labels if other is None else other, ones if lam is None else lam, other is not None)


def output_of(logits) -> Output:
    return Output(logits, logits)


def loss_of(settings: SymmetricCrossEntropy | CrossEntropy, logits, *batch) -> torch.Tensor:
    return settings(output_of(logits), batch_of(*batch)).loss


def softmax(row: list[float]) -> list[float]:
    powers = [math.exp(value - max(row)) for value in row]
    return [power / sum(powers) for power in powers]


@given(
    *(st.integers(1, 6), st.integers(2, 12), st.floats(0, 0.5), st.booleans(), st.integers(0, 2**31 - 1)),
    *(st.floats(0.1, 3), st.floats(0, 3), st.floats(-9, -0.1)),
)
@settings(max_examples=60, deadline=None)
def test_equals_a_naive_loop(batch, classes, smoothing, mixed, seed, alpha, beta, floor):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, classes, generator=generator, dtype=torch.float64) * 4
    labels, other = (torch.randint(classes, (batch,), generator=generator) for _ in range(2))
    lam = torch.rand(batch, generator=generator, dtype=torch.float64) if mixed else torch.ones(batch).double()

    def row_loss(probs: list[float], label: int) -> float:
        forward = reverse = 0.0
        for k, p in enumerate(probs):
            forward -= (1 - smoothing if k == label else smoothing / (classes - 1)) * math.log(p)
            reverse -= p * max(math.log(1.0) if k == label else -math.inf, floor)  # of the label before smoothing
        return alpha * forward + beta * reverse

    expected = 0.0
    for row in range(batch):
        probs, share = softmax(logits[row].tolist()), float(lam[row])
        expected += (share * row_loss(probs, int(labels[row])) + (1 - share) * row_loss(probs, int(other[row]))) / batch
    loss = SymmetricCrossEntropy(alpha, beta, floor, smoothing, weight=0.5)
    value = loss_of(loss, logits, labels, other if mixed else None, lam)
    assert value.item() == pytest.approx(0.5 * expected, rel=1e-9, abs=1e-9)


def test_the_reverse_term_is_proportional_to_the_other_classes_probabilities():
    logits, labels = torch.randn(9, 5, dtype=torch.float64), torch.arange(9) % 5
    reverse = loss_of(SymmetricCrossEntropy(alpha=0, beta=1, floor=-4), logits, labels)
    others = 1 - logits.softmax(1)[torch.arange(9), labels]
    torch.testing.assert_close(reverse, 4 * others.mean())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_without_the_reverse_term_it_is_cross_entropy(smoothing):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(8, 6, generator=generator) * 3
    labels, other = (torch.randint(6, (8,), generator=generator) for _ in range(2))
    batch = (labels, other, torch.rand(8, generator=generator))
    plain = loss_of(CrossEntropy(smoothing), logits, *batch)
    torch.testing.assert_close(
        loss_of(SymmetricCrossEntropy(2.5, 0, smoothing=smoothing), logits, *batch), 2.5 * plain, rtol=1e-6, atol=0
    )
    assert torch.equal(loss_of(SymmetricCrossEntropy(1, 0, smoothing=smoothing), logits, *batch), plain)


def test_gradcheck():
    logits = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    batch = (torch.tensor([0, 3, 6, 2]), torch.tensor([1, 3, 0, 5]), torch.tensor([0.25, 1.0, 0.5, 0.0]).double())
    loss = SymmetricCrossEntropy(alpha=0.7, beta=1.3, smoothing=0.1)
    assert torch.autograd.gradcheck(lambda x: loss_of(loss, x, *batch), logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", [1e4, 6e4])
def test_computes_in_float32_and_is_finite_at_large_logits(dtype, size):
    logits = torch.tensor([[size, -size, 0.0], [-size, size, size]], dtype=dtype, requires_grad=True)
    loss = loss_of(SymmetricCrossEntropy(beta=1, smoothing=0.1), logits, torch.tensor([1, 0]))
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite() and logits.grad is not None and logits.grad.isfinite().all()
    reverse = loss_of(SymmetricCrossEntropy(alpha=0, beta=1), logits, torch.tensor([1, 0]))
    assert reverse.item() == 4  # its maximum: both rows are certain and wrong


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": -1.0}, "alpha must be 0 or more, not -1"),
        ({"beta": math.nan}, "beta must be 0 or more, not nan"),
        ({"alpha": 0.0, "beta": 0.0}, "alpha must be above 0"),
        ({"floor": 0.0}, "floor must be below 0, not 0"),
        ({"smoothing": 1.0}, r"smoothing must be in \[0, 1\), not 1"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SymmetricCrossEntropy(**settings)
