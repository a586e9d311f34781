"""Cross entropy against torch's, a naive loop in float64, and gradcheck."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fasttrain.losses.base import Batch, Output
from fasttrain.losses.cross_entropy import CrossEntropy


def batch_of(labels, other=None, lam=None) -> Batch:
    mixed = other is not None
    ones = torch.ones(len(labels))
    return Batch(labels, other if mixed else labels, lam if lam is not None else ones, mixed)


def output_of(logits) -> Output:
    return Output(logits, logits)


@given(st.integers(1, 9), st.integers(2, 40), st.floats(0, 0.9), st.integers(0, 2**31 - 1), st.floats(0.01, 30))
@settings(max_examples=60, deadline=None)
def test_equals_torch_with_its_definition_of_smoothing(batch, classes, smoothing, seed, scale):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, classes, generator=generator, dtype=torch.float64) * scale
    labels = torch.randint(classes, (batch,), generator=generator)
    torch_smoothing = smoothing * classes / (classes - 1)
    if torch_smoothing > 1:
        return
    ours = CrossEntropy(smoothing)(output_of(logits), batch_of(labels)).loss
    theirs = F.cross_entropy(logits, labels, label_smoothing=torch_smoothing)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-9, abs=1e-9)


@given(st.integers(1, 6), st.integers(2, 12), st.floats(0, 0.5), st.integers(0, 2**31 - 1))
@settings(max_examples=40, deadline=None)
def test_equals_a_naive_loop_for_mixed_labels(batch, classes, smoothing, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, classes, generator=generator, dtype=torch.float64) * 4
    labels, other = (torch.randint(classes, (batch,), generator=generator) for _ in range(2))
    lam = torch.rand(batch, generator=generator, dtype=torch.float64)
    expected = 0.0
    for row in range(batch):
        total = math.log(sum(math.exp(v) for v in logits[row].tolist()))
        for label, share in ((int(labels[row]), float(lam[row])), (int(other[row]), 1 - float(lam[row]))):
            for k in range(classes):
                q = 1 - smoothing if k == label else smoothing / (classes - 1)
                expected -= share * q * (float(logits[row, k]) - total) / batch
    ours = CrossEntropy(smoothing)(output_of(logits), batch_of(labels, other, lam)).loss
    assert ours.item() == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_gradcheck():
    logits = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    labels, other = torch.tensor([0, 3, 6, 2]), torch.tensor([1, 3, 0, 5])
    lam = torch.tensor([0.25, 1.0, 0.5, 0.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: CrossEntropy(0.1)(output_of(x), batch_of(labels, other, lam)).loss, logits
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_computes_in_float32_and_is_finite_at_large_logits(dtype):
    logits = torch.tensor([[6e4, -6e4, 0.0], [-6e4, 6e4, 6e4]], dtype=dtype, requires_grad=True)
    loss = CrossEntropy(0.1)(output_of(logits), batch_of(torch.tensor([1, 0]))).loss
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite() and logits.grad is not None and logits.grad.isfinite().all()


def test_weight_and_smoothing():
    logits, labels = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 0])
    plain = CrossEntropy(0.1)(output_of(logits), batch_of(labels)).loss
    assert torch.equal(CrossEntropy(0.1, weight=2.0)(output_of(logits), batch_of(labels)).loss, 2 * plain)
    with pytest.raises(ValueError, match="smoothing"):
        CrossEntropy(1.0)
