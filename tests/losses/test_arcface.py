"""ArcFace against a naive loop in float64 and pytorch-metric-learning; its head in the network; edge cases."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning import losses
from torch.nn import functional as F

from fasttrain.config.schema import OptimConfig
from fasttrain.losses.arcface import ArcFace
from fasttrain.losses.base import Batch, Output
from fasttrain.models import Classifier
from fasttrain.models.heads import CosineHead
from fasttrain.training import optim


def batch_of(labels, other=None, lam=None) -> Batch:
    ones = torch.ones(len(labels))
    return Batch(labels, labels if other is None else other, ones if lam is None else lam, other is not None)


def output_of(cosine) -> Output:
    return Output(cosine, cosine, cosine)


@given(st.integers(1, 6), st.integers(2, 12), st.floats(0, 1.5), st.booleans(), st.integers(0, 2**31 - 1))
@settings(max_examples=60, deadline=None)
def test_equals_a_naive_loop(batch, classes, margin, mixed, seed):
    generator = torch.Generator().manual_seed(seed)
    cosine = torch.rand(batch, classes, generator=generator, dtype=torch.float64) * 2 - 1
    labels, other = (torch.randint(classes, (batch,), generator=generator) for _ in range(2))
    lam = torch.rand(batch, generator=generator, dtype=torch.float64) if mixed else torch.ones(batch).double()

    def row_loss(row: list[float], label: int) -> float:
        angle = math.acos(row[label])
        moved = math.cos(angle + margin) if angle + margin <= math.pi else row[label] - margin * math.sin(margin)
        scaled = [30 * (moved if k == label else row[k]) for k in range(classes)]
        top = max(scaled)
        return top + math.log(sum(math.exp(v - top) for v in scaled)) - scaled[label]

    expected = 0.0
    for i in range(batch):
        row, share = cosine[i].tolist(), float(lam[i])
        expected += (share * row_loss(row, int(labels[i])) + (1 - share) * row_loss(row, int(other[i]))) / batch
    term = ArcFace(scale=30, margin_rad=margin)(output_of(cosine), batch_of(labels, other if mixed else None, lam))
    assert term.loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_equals_pytorch_metric_learning():
    """Where θ + margin stays below π. Above it, the two have different fallbacks."""
    torch.manual_seed(0)
    features, labels = torch.randn(40, 12).double(), torch.randint(7, (40,))
    head = CosineHead(12, 7).double()
    theirs = losses.ArcFaceLoss(7, 12, margin=math.degrees(0.5), scale=30).double()
    with torch.no_grad():
        theirs.W.copy_(head.weight.T)
        assert (head(features).acos() + 0.5 < math.pi).all()
    ours = ArcFace()(Output(features, features, head(features)), batch_of(labels)).loss
    assert ours.item() == pytest.approx(theirs(features, labels).item(), rel=1e-6)


def test_gradcheck():
    torch.manual_seed(0)
    cosine = (torch.rand(5, 6, dtype=torch.float64) * 1.8 - 0.9).requires_grad_()
    labels, other = torch.tensor([0, 1, 2, 3, 4]), torch.tensor([1, 1, 5, 0, 2])
    lam = torch.tensor([0.2, 1.0, 0.0, 0.5, 0.7], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: ArcFace()(output_of(x), batch_of(labels, other, lam)).loss, cosine)


@pytest.mark.parametrize("edge", [-1.0, 1.0, -math.cos(0.5), 0.0])
def test_is_finite_at_the_edges(edge):
    cosine = torch.full((2, 3), edge, requires_grad=True)
    loss = ArcFace()(output_of(cosine), batch_of(torch.tensor([0, 2]))).loss
    loss.backward()
    assert loss.isfinite() and cosine.grad is not None and cosine.grad.isfinite().all()


def test_the_loss_never_falls_with_the_angle():
    """The cosine with the margin falls with the angle from 0 to π, also across the step at π − margin."""
    angles = torch.linspace(0, math.pi, 2001, dtype=torch.float64)
    cosine = torch.stack([angles.cos(), torch.zeros_like(angles)], 1)
    row_losses = torch.stack([ArcFace()(output_of(row[None]), batch_of(torch.tensor([0]))).loss for row in cosine])
    assert (row_losses.diff() > -1e-9).all()


def test_the_head_is_part_of_the_network():
    network = Classifier("test_resnet", 4, cosine_head=True)
    assert "cosine.weight" in network.state_dict()
    groups = optim.sgd(network, OptimConfig()).param_groups
    assert network.cosine and any(p is network.cosine.weight for group in groups for p in group["params"])
    images = torch.randn(2, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        output = network.train()(images)
    assert output.cosine is not None and output.cosine.dtype == torch.float32
    expected = F.cosine_similarity(output.features.float()[:, None], network.cosine.weight[None], dim=2)
    torch.testing.assert_close(output.cosine, expected, atol=1e-6, rtol=0)
    ArcFace()(output, batch_of(torch.tensor([0, 1]))).loss.backward()
    assert network.cosine.weight.grad.any()  # type: ignore[union-attr]
    assert network.eval()(images).cosine is None
    with pytest.raises(ValueError, match="cosine head"):
        ArcFace()(network(images), batch_of(torch.tensor([0, 1])))


def test_zero_features_have_a_finite_gradient():
    features = torch.zeros(2, 3, requires_grad=True)
    CosineHead(3, 4)(features).sum().backward()
    assert features.grad is not None and features.grad.isfinite().all()
