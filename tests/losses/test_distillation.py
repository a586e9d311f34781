"""Distillation against a naive loop in float64; edge cases."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fasttrain.losses.base import Batch, Output
from fasttrain.losses.distillation import Distillation


def batch_of(teacher) -> Batch:
    labels = torch.zeros(len(teacher), dtype=torch.int64)
    return Batch(labels, labels, torch.ones(len(teacher)), False, teacher_logits=teacher)


@given(st.integers(1, 6), st.integers(2, 9), st.floats(0.5, 40), st.integers(0, 2**31 - 1))
@settings(max_examples=60, deadline=None)
def test_equals_a_naive_loop(batch, classes, temperature, seed):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(2, batch, classes, generator=generator, dtype=torch.float64) * 5).unbind()

    def softmax(row: list[float]) -> list[float]:
        powers = [math.exp(value / temperature) for value in row]
        return [power / sum(powers) for power in powers]

    expected = 0.0
    for ours, theirs in zip(student.tolist(), teacher.tolist(), strict=True):
        expected += sum(t * math.log(t / s) for s, t in zip(softmax(ours), softmax(theirs), strict=True)) / batch
    loss = Distillation(temperature=temperature, weight=0.5)(Output(student, student), batch_of(teacher)).loss
    assert loss.item() == pytest.approx(0.5 * temperature**2 * expected, rel=1e-8, abs=1e-9)


def test_a_student_equal_to_its_teacher_has_no_gradient():
    logits = torch.randn(5, 7, requires_grad=True)
    loss = Distillation()(Output(logits, logits), batch_of(logits.detach())).loss
    loss.backward()
    assert abs(loss.item()) < 1e-4 and logits.grad is not None and logits.grad.abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_computes_in_float32_and_is_finite_at_large_logits(dtype):
    student = torch.tensor([[6e4, -6e4, 0.0]], dtype=dtype, requires_grad=True)
    loss = Distillation()(Output(student, student), batch_of(-student.detach())).loss
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite()
    assert student.grad is not None and student.grad.isfinite().all()


def test_needs_a_teacher_and_a_temperature():
    logits = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="teacher"):
        Distillation()(Output(logits, logits), batch_of(logits)._replace(teacher_logits=None))
    with pytest.raises(ValueError, match="temperature"):
        Distillation(temperature=0)
