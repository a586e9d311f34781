"""Mean teacher against a naive loop and torch's kl_divergence; its ramp, mixed targets, edge cases."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Categorical, kl_divergence

from fasttrain.losses.base import Batch, Output
from fasttrain.losses.mean_teacher import MeanTeacher, mixed_targets

NO_RAMP = MeanTeacher(ramp_epochs=0)


def loss_of(settings: MeanTeacher, logits, probs, epoch: float = 0.0) -> torch.Tensor:
    """The loss of unmixed rows. probs: the probabilities of the averaged network."""
    labels, rows = torch.zeros(len(logits), dtype=torch.int64), torch.arange(len(logits))
    ema_logits = None if probs is None else probs.log()
    batch = Batch(labels, labels, torch.ones(len(logits)), False, partner=rows, ema_logits=ema_logits, epoch=epoch)
    return settings(Output(logits, logits), batch).loss


def random_batch(batch: int, classes: int, seed: int = 0):
    """Logits and probabilities, float64 [batch, classes]."""
    generator = torch.Generator().manual_seed(seed)
    logits, other = (torch.randn(2, batch, classes, generator=generator, dtype=torch.float64) * 3).unbind()
    return logits, other.softmax(1)


@given(st.integers(1, 6), st.integers(2, 9), st.integers(0, 8), st.integers(0, 2**31 - 1))
@settings(max_examples=60, deadline=None)
def test_equals_a_naive_loop(batch, classes, zeros, seed):
    logits, target = random_batch(batch, classes, seed)
    target[:, 1 : 1 + zeros] = 0
    target /= target.sum(1, keepdim=True)
    expected = 0.0
    for row, target_row in zip(logits.tolist(), target.tolist(), strict=True):
        total = math.log(sum(math.exp(value) for value in row))
        expected += sum(t * (math.log(t) - (v - total)) for v, t in zip(row, target_row, strict=True) if t) / batch
    loss = loss_of(MeanTeacher(weight=0.5, ramp_epochs=0), logits, target)
    assert loss.item() == pytest.approx(0.5 * expected, rel=1e-8, abs=1e-9)


def test_equals_torch_kl_divergence():
    logits, target = random_batch(32, 10)
    theirs = kl_divergence(Categorical(probs=target), Categorical(logits=logits)).mean()
    torch.testing.assert_close(loss_of(NO_RAMP, logits, target), theirs)


def test_gradcheck_and_no_gradient_for_the_target():
    logits, target = random_batch(4, 5)
    target[0] = torch.tensor([0, 0, 1, 0, 0])
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss_of(NO_RAMP, x, target), logits)
    target.requires_grad_()
    loss_of(NO_RAMP, logits, target).backward()
    assert target.grad is None and logits.grad is not None
    torch.testing.assert_close(logits.grad, ((logits.softmax(1) - target) / 4).detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_computes_in_float32_and_is_finite_at_large_logits(dtype):
    logits = torch.tensor([[6e4, -6e4, 0.0], [1e4, -1e4, 1e4]], dtype=dtype, requires_grad=True)
    loss = loss_of(NO_RAMP, logits, torch.tensor([[0.0, 1.0, 0.0], [0.5, 0.5, 0.0]]))
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite() and logits.grad is not None and logits.grad.isfinite().all()


def test_the_weight_is_ramped_up():
    logits, target = random_batch(3, 4)
    full = loss_of(NO_RAMP, logits, target).item()

    def share(epoch: float, ramp_epochs: float = 5.0) -> float:
        return loss_of(MeanTeacher(weight=2.0, ramp_epochs=ramp_epochs), logits, target, epoch).item() / (2 * full)

    assert share(0) == pytest.approx(math.exp(-5)) and share(2.5) == pytest.approx(math.exp(-1.25))
    assert share(5) == share(7.5) == share(0, ramp_epochs=0) == pytest.approx(1)
    shares = [share(epoch / 10) for epoch in range(51)]
    assert all(one < other for one, other in pairwise(shares))


@given(st.integers(1, 5), st.integers(1, 3), st.integers(1, 4), st.booleans(), st.integers(0, 2**31 - 1))
@settings(max_examples=40, deadline=None)
def test_mixed_targets_equal_a_naive_loop(images, views, classes, int32, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = images * views
    probs = torch.rand(images, classes, generator=generator).softmax(1)
    partner = torch.randperm(rows, generator=generator).to(torch.int32 if int32 else torch.int64)
    lam = torch.rand(rows, generator=generator)
    targets = mixed_targets(probs, partner, lam, views)
    assert targets.shape == (rows, classes) and targets.dtype == torch.float32
    for view in range(views):
        for image in range(images):
            row = view * images + image
            other = int(partner[row]) % images
            expected = lam[row] * probs[image] + (1 - lam[row]) * probs[other]
            torch.testing.assert_close(targets[row], expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(mixed_targets(probs, partner, torch.ones(rows), views), torch.cat([probs] * views))


def test_needs_targets_and_a_ramp():
    with pytest.raises(ValueError, match="averaged network's logits"):
        loss_of(MeanTeacher(), torch.zeros(1, 2), None)
    with pytest.raises(ValueError, match="ramp_epochs must be 0 or more, not -1"):
        MeanTeacher(ramp_epochs=-1)
