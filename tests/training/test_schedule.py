import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fasttrain.training.optim import lr_at


def test_equals_torch_schedulers_chained():
    """torch's own warm-up and cosine, stepped one after the other, give the same learning rates."""
    steps, warmup, peak = 200, 20, 0.4
    parameter = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([parameter], lr=peak)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps - warmup)
    for step in range(steps):
        if step < warmup:
            expected = peak * step / warmup
        else:
            expected = optimizer.param_groups[0]["lr"]
            optimizer.step()
            cosine.step()
        assert lr_at(step, steps=steps, warmup_steps=warmup, peak=peak) == pytest.approx(expected, abs=1e-12)


@given(st.integers(1, 500), st.integers(0, 600), st.floats(1e-4, 10))
def test_stays_within_zero_and_peak(steps, warmup, peak):
    rates = [lr_at(step, steps=steps, warmup_steps=warmup, peak=peak) for step in range(steps)]
    assert all(0 <= rate <= peak and math.isfinite(rate) for rate in rates)
    rising, falling = rates[:warmup], rates[warmup:]
    assert rising == sorted(rising) and falling == sorted(falling, reverse=True)
    if warmup:
        assert rates[0] == 0
    if warmup < steps:
        assert rates[warmup] == peak
