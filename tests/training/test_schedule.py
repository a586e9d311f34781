"""The learning-rate schedules against timm's and torch's schedulers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.scheduler import CosineLRScheduler

from fasttrain.training.optim import lr_at


def sgd(lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=lr)


@pytest.mark.parametrize(("steps", "warmup"), [(200, 20), (50, 1), (30, 0), (13, 12)])
def test_warm_up_and_cosine_equal_timm(steps, warmup):
    peak, optimizer = 0.4, sgd(0.4)
    scheduler = CosineLRScheduler(
        optimizer, t_initial=steps - warmup, warmup_t=warmup, warmup_lr_init=0.0, warmup_prefix=True, t_in_epochs=False
    )
    for step in range(steps):
        scheduler.step_update(step)
        expected = optimizer.param_groups[0]["lr"]
        assert lr_at(step, steps=steps, warmup_steps=warmup, peak=peak) == pytest.approx(expected, abs=1e-12)


def test_the_cosine_equals_torch():
    optimizer = sgd(0.4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=180)
    for step in range(20, 200):
        expected = optimizer.param_groups[0]["lr"]
        assert lr_at(step, steps=200, warmup_steps=20, peak=0.4) == pytest.approx(expected, abs=1e-12)
        optimizer.step()
        scheduler.step()


@given(st.integers(1, 500), st.integers(0, 600), st.floats(1e-4, 10))
def test_learning_rates_stay_between_zero_and_peak(steps, warmup, peak):
    rates = [lr_at(step, steps=steps, warmup_steps=warmup, peak=peak) for step in range(steps)]
    assert all(0 <= rate <= peak and math.isfinite(rate) for rate in rates)
    rising, falling = rates[:warmup], rates[warmup:]
    assert rising == sorted(rising) and falling == sorted(falling, reverse=True)
    if warmup:
        assert rates[0] == 0
    if warmup < steps:
        assert rates[warmup] == peak


def test_an_unknown_schedule_is_an_error():
    with pytest.raises(ValueError, match="no learning-rate schedule 'no such'"):
        lr_at(5, steps=10, warmup_steps=0, peak=0.1, schedule="no such")
