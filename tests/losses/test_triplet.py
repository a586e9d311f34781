"""Triplet against a naive loop and pytorch-metric-learning; two ranks against one; collapse, edge cases."""

import math
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning import distances, losses, miners, reducers
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fasttrain.losses.base import Batch, Output, Term
from fasttrain.losses.triplet import Triplet


def batch_of(labels, mixed=False) -> Batch:
    return Batch(labels, labels, torch.ones(len(labels)), mixed)


def call(loss: Triplet, features, labels) -> Term:
    term = loss(Output(features, features), batch_of(labels))
    assert term is not None
    return term


def naive(features, labels, margin: float | None) -> tuple[float, list[float]]:
    """Loss and [active, mean d(ap), mean d(an)], in float64 loops."""
    rows = [[float(v) for v in row] for row in features]
    hardest = []
    for a, anchor in enumerate(rows):
        distances_to = [math.dist(anchor, other) for other in rows]
        positive = [distances_to[i] for i in range(len(rows)) if labels[i] == labels[a] and i != a]
        negative = [distances_to[i] for i in range(len(rows)) if labels[i] != labels[a]]
        if positive and negative:
            hardest.append((max(positive), min(negative)))
    if not hardest:
        return 0.0, [0.0, 0.0, 0.0]
    values = [math.log1p(math.exp(p - n)) if margin is None else max(0.0, margin + p - n) for p, n in hardest]
    count = len(hardest)
    return sum(values) / count, [
        sum(value > 0 for value in values) / count,
        sum(p for p, _ in hardest) / count,
        sum(n for _, n in hardest) / count,
    ]


@given(st.integers(2, 24), st.integers(1, 6), st.integers(1, 9), st.booleans(), st.integers(0, 2**31 - 1))
@settings(max_examples=60, deadline=None)
def test_equals_a_naive_loop(batch, classes, width, soft, seed):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(batch, width, generator=generator)
    labels = torch.randint(classes, (batch,), generator=generator)
    term = call(Triplet(margin=0.3, soft_margin=soft, weight=2.0), features, labels)
    loss, stats = naive(features, labels.tolist(), None if soft else 0.3)
    assert term.loss.item() == pytest.approx(2 * loss, rel=1e-5, abs=1e-6)
    assert [term.stats[name].item() for name in Triplet.stats] == pytest.approx(stats, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("width", [16, 256])
def test_equals_pytorch_metric_learning(width):
    generator = torch.Generator().manual_seed(width)
    labels = torch.arange(8).repeat_interleave(4)
    features = torch.randn(32, width, generator=generator)
    ours, theirs = (features.clone().requires_grad_() for _ in range(2))
    call(Triplet(margin=0.3), ours, labels).loss.backward()
    euclidean = distances.LpDistance(normalize_embeddings=False)
    miner = miners.BatchHardMiner(distance=euclidean)
    loss_fn = losses.TripletMarginLoss(margin=0.3, distance=euclidean, reducer=reducers.MeanReducer())
    value = loss_fn(theirs, labels, miner(theirs, labels))
    value.backward()
    assert call(Triplet(margin=0.3), features, labels).loss.item() == pytest.approx(value.item(), rel=1e-5)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_there_is_no_term_on_a_mixed_step():
    features, labels = torch.randn(8, 4), torch.arange(4).repeat(2)
    assert Triplet()(Output(features, features), batch_of(labels, mixed=True)) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equal_features_have_a_finite_loss_and_gradient(dtype):
    features = torch.ones(8, 16, dtype=dtype, requires_grad=True)
    term = call(Triplet(margin=0.3), features, torch.arange(4).repeat(2))
    term.loss.backward()
    assert term.loss.dtype == torch.float32 and term.loss.item() == pytest.approx(0.3)
    assert features.grad is not None and not features.grad.any()


def test_without_pairs_loss_and_gradient_are_zero():
    features = torch.randn(4, 3, requires_grad=True)
    term = call(Triplet(), features, torch.arange(4))
    term.loss.backward()
    assert term.loss.item() == 0 and features.grad is not None and not features.grad.any()


def test_collapsed_detects_the_loss_of_equal_features():
    hinge, soft = Triplet(margin=0.3, weight=2.0), Triplet(soft_margin=True)
    assert hinge.collapsed([0.6, 0.601, 0.599]) and soft.collapsed([math.log(2)])
    assert not hinge.collapsed([0.6, 0.7]) and not hinge.collapsed([0.3]) and not hinge.collapsed([])


# ---- two ranks


class NoBatchNorm(nn.Module):
    """A network without BatchNorm, whose statistics would differ between one process and two."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 8))
        self.head = nn.Linear(8, 5)

    def forward(self, rows):
        features = self.body(rows)
        return self.head(features), features


ROWS = torch.randn(24, 6, generator=torch.Generator().manual_seed(1))
# Classes 6 to 9 have one image each, all on the first rank, so the ranks differ in their number of valid anchors.
LABELS = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3, 9, 8, 7, 6, 0, 0, 1, 1, 4, 4, 4, 4, 5, 5, 5, 5])


def step(network: nn.Module, rows, labels) -> Term:
    logits, features = network(rows)
    term = Triplet(margin=2.0)(Output(logits, features), batch_of(labels))
    assert term is not None
    (term.loss + 0.1 * logits.square().mean()).backward()
    return term


def rank(number: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=number, world_size=2, timeout=timedelta(seconds=60)
    )
    network = NoBatchNorm()
    half = slice(number * 12, number * 12 + 12)
    term = step(DistributedDataParallel(network), ROWS[half], LABELS[half])
    means = torch.stack([term.loss.detach(), *term.stats.values()])
    dist.all_reduce(means)
    gradients = {name: p.grad for name, p in network.named_parameters()}
    torch.save({"means": means / 2, "gradients": gradients}, f"{folder}/rank{number}.pt")
    dist.destroy_process_group()


def test_two_ranks_have_the_loss_and_gradients_of_one(tmp_path):
    mp.spawn(rank, args=(str(tmp_path),), nprocs=2)
    alone = NoBatchNorm()
    term = step(alone, ROWS, LABELS)
    for number in (0, 1):
        saved = torch.load(tmp_path / f"rank{number}.pt")
        expected = torch.stack([term.loss.detach(), *term.stats.values()])
        torch.testing.assert_close(saved["means"], expected, rtol=1e-6, atol=1e-6)
        for name, parameter in alone.named_parameters():
            torch.testing.assert_close(saved["gradients"][name], parameter.grad, rtol=1e-5, atol=1e-7)
