"""The contrastive loss against a naive loop and pytorch-metric-learning; two ranks against one; absence and edges."""

import math
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning import losses
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from fasttrain.losses.base import Batch, Output, Term
from fasttrain.losses.contrastive import Contrastive
from fasttrain.losses.cross_entropy import CrossEntropy
from fasttrain.models import Classifier


def batch_of(labels, mixed=False, progress=0.0) -> Batch:
    """Of the images' labels: rows are each image's view 0, then each image's view 1."""
    rows = torch.cat([labels, labels])
    return Batch(rows, rows, torch.ones(len(rows)), mixed, views=2, progress=progress)


def call(loss: Contrastive, embedding, labels=None, progress=0.0) -> Term:
    if labels is None:
        labels = torch.arange(len(embedding) // 2)
    term = loss(Output(embedding, embedding, None, embedding), batch_of(labels, progress=progress))
    assert term is not None
    return term


def directions(rows: int, width: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, width, generator=generator, dtype=torch.float64))


def naive(embedding, labels: list[int], temperature: float, mask_same_class: bool) -> list[float]:
    """[loss, mean cosine with the positive, accuracy], by loops in float64."""
    rows, images = embedding.tolist(), len(labels)
    told = []
    for anchor in range(2 * images):
        positive, negatives = 0.0, []
        for other in range(2 * images):
            cosine = sum(a * b for a, b in zip(rows[anchor], rows[other], strict=True))
            if other == anchor:
                continue
            if other % images == anchor % images:
                positive = cosine
            elif not (mask_same_class and labels[other % images] == labels[anchor % images]):
                negatives.append(cosine)
        powers = sum(math.exp((each - positive) / temperature) for each in [positive, *negatives])
        told.append((math.log(powers), positive, float(all(each < positive for each in negatives))))
    return [sum(column) / len(told) for column in zip(*told, strict=True)]


@given(
    *(st.integers(1, 7), st.integers(2, 8), st.integers(1, 4), st.floats(0.05, 2), st.booleans()),
    st.integers(0, 2**31 - 1),
)
@settings(max_examples=60, deadline=None)
def test_equals_a_naive_loop(images, width, classes, temperature, mask, seed):
    embedding = directions(2 * images, width, seed)
    labels = torch.randint(classes, (images,), generator=torch.Generator().manual_seed(seed))
    term = call(Contrastive(temperature=temperature, weight=2.0, mask_same_class=mask), embedding, labels)
    loss, *stats = naive(embedding, labels.tolist(), temperature, mask)
    assert term.loss.item() == pytest.approx(2 * loss, rel=1e-9, abs=1e-9)
    assert [term.stats[name].item() for name in Contrastive.stats] == pytest.approx(stats, rel=1e-9, abs=1e-9)
    assert not any(each.requires_grad for each in term.stats.values())


@pytest.mark.parametrize("mask", [False, True])
def test_equals_pytorch_metric_learning(mask):
    ours, theirs = (directions(24, 16).requires_grad_() for _ in range(2))
    labels = torch.arange(12) % 5
    term = call(Contrastive(temperature=0.2, weight=1.0, mask_same_class=mask), ours, labels)
    image = torch.arange(24) % 12
    same_image, same_class = image[:, None] == image, torch.cat([labels, labels])[:, None] == torch.cat([labels] * 2)
    positives = torch.nonzero(same_image & ~torch.eye(24, dtype=torch.bool), as_tuple=True)
    negatives = torch.nonzero(~(same_class if mask else same_image), as_tuple=True)
    value = losses.NTXentLoss(0.2)(theirs, indices_tuple=(*positives, *negatives))
    if not mask:
        assert losses.NTXentLoss(0.2)(theirs, image).item() == pytest.approx(value.item())
    term.loss.backward()
    value.backward()
    assert term.loss.item() == pytest.approx(value.item(), rel=1e-9)
    # Theirs takes lengths into account: of its gradient, what changes the direction is compared.
    across = []
    for each in (ours, theirs):
        assert each.grad is not None
        across.append(each.grad - (each.grad * each).sum(1, keepdim=True) * each)
    torch.testing.assert_close(*across, rtol=1e-7, atol=1e-9)


def test_no_row_is_its_own_candidate():
    """One image: its other view is the only candidate. One point: all 2N − 1 other rows are as near."""
    for embedding in (directions(2, 4), torch.tensor([[1.0, 0.0], [-1.0, 0.0]])):
        term = call(Contrastive(), embedding)
        assert term.loss.item() == 0 and term.stats["accuracy"].item() == 1
    term = call(Contrastive(weight=1.0), torch.tensor([[0.0, 1.0]]).expand(10, 2))
    assert term.loss.item() == pytest.approx(math.log(9)) and term.stats["accuracy"].item() == 0


def test_images_of_one_class_are_left_out_where_asked_for():
    """All of one class: nothing but the positive is left."""
    embedding, labels = directions(8, 4), torch.zeros(4, dtype=torch.int64)
    assert call(Contrastive(mask_same_class=True), embedding, labels).loss.item() == 0
    assert call(Contrastive(), embedding, labels).loss.item() > 0.1


def test_gradient_is_right():
    rows, labels = directions(8, 3).requires_grad_(), torch.tensor([0, 1, 0, 2])
    for mask in (False, True):
        assert torch.autograd.gradcheck(lambda x, m=mask: call(Contrastive(mask_same_class=m), x, labels).loss, rows)


def test_there_is_no_term_on_a_mixed_step():
    embedding = directions(8, 4)
    assert Contrastive()(Output(embedding, embedding), batch_of(torch.arange(4), mixed=True)) is None


def test_the_weight_falls_along_half_a_cosine_where_asked_for():
    embedding = directions(8, 4)
    whole = call(Contrastive(weight=1.0), embedding).loss.item()
    for progress, share in ((0.0, 1.0), (0.25, (2 + math.sqrt(2)) / 4), (0.5, 0.5), (0.75, (2 - math.sqrt(2)) / 4)):
        falls, stays = (Contrastive(decay=decay, weight=2.0) for decay in ("cosine", "none"))
        assert call(falls, embedding, progress=progress).loss.item() == pytest.approx(2 * share * whole)
        assert call(stays, embedding, progress=progress).loss.item() == pytest.approx(2 * whole)
    assert call(falls, embedding, progress=1 - 1e-6).loss.item() < 1e-9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_computes_in_float32_whatever_autocast_says(dtype):
    embedding = directions(12, 6).to(dtype)
    plain = call(Contrastive(), embedding).loss
    with torch.autocast("cpu", torch.bfloat16):
        cast = call(Contrastive(), embedding).loss
    assert cast.dtype == torch.float32 and torch.equal(plain, cast)
    assert plain.item() == pytest.approx(call(Contrastive(), embedding.double()).loss.item(), rel=1e-5)


def test_is_finite_at_the_edges():
    """A small temperature with the positive on the other side, and embeddings of 0."""
    for rows in (torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]]), torch.zeros(4, 2)):
        embedding = rows.requires_grad_()
        loss = call(Contrastive(temperature=1e-3), embedding).loss
        loss.backward()
        assert loss.isfinite() and embedding.grad is not None and embedding.grad.isfinite().all()


def test_what_is_missing_or_bad_is_told():
    embedding, batch = directions(4, 2), batch_of(torch.arange(2))
    with pytest.raises(ValueError, match="projection head"):
        Contrastive()(Output(embedding, embedding), batch)
    with pytest.raises(ValueError, match="2 views of each image, not 1"):
        Contrastive()(Output(embedding, embedding, None, embedding), batch._replace(views=1))
    with pytest.raises(ValueError, match="temperature must be above 0, not 0"):
        Contrastive(temperature=0)
    with pytest.raises(ValueError, match="decay must be none or cosine, not 'linear'"):
        Contrastive(decay="linear")


# ---- two ranks

IMAGES = 6
PIXELS = torch.randn(2, IMAGES, 3, 32, 32, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1, 0, 1, 2, 0])  # classes are spread over both ranks
MIXED = [False, True, True, False]


def steps(network: nn.Module, images: slice) -> list[dict[str, torch.Tensor]]:
    """What each of the steps of MIXED tells, and the network's gradients in it, by name."""
    told = []
    for mixed in MIXED:
        network.zero_grad()
        output = network(PIXELS[:, images].flatten(0, 1))
        batch = batch_of(LABELS[images], mixed)
        terms = {each.name: each(output, batch) for each in (CrossEntropy(), Contrastive(mask_same_class=True))}
        values = {name: term.loss for name, term in terms.items() if term is not None}
        torch.stack(list(values.values())).sum().backward()
        stats = {name: each for term in terms.values() if term is not None for name, each in term.stats.items()}
        gradients = {f"grad {name}": each.grad.clone() for name, each in network.named_parameters()}  # type: ignore[union-attr]
        told.append({name: each.detach() for name, each in (values | stats).items()} | gradients)
    return told


def without_batch_norm() -> Classifier:
    """Whose statistics would differ between one process and two."""
    torch.manual_seed(0)
    return Classifier("test_convnext", 3, projection_head=True)


def rank(number: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=number, world_size=2, timeout=timedelta(seconds=60)
    )
    half = slice(number * IMAGES // 2, (number + 1) * IMAGES // 2)
    for static in (True, False):
        network = DistributedDataParallel(without_batch_norm(), static_graph=static)
        torch.save(steps(network, half), f"{folder}/rank{number}-{static}.pt")
    dist.destroy_process_group()


def test_two_ranks_have_the_loss_and_gradients_of_one(tmp_path):
    """With steps without the term in between, in which the projection head's gradients are zeros."""
    mp.spawn(rank, args=(str(tmp_path),), nprocs=2)
    alone = steps(without_batch_norm(), slice(0, IMAGES))
    for static in (True, False):
        both = [torch.load(tmp_path / f"rank{number}-{static}.pt") for number in (0, 1)]
        for mixed, expected, *found in zip(MIXED, alone, *both, strict=True):
            assert ("contrastive" in expected) is not mixed
            for name, each in expected.items():
                if name.startswith("grad "):  # DDP's mean, on either rank
                    name_there = name.replace("grad ", "grad module.")
                    for there in found:
                        torch.testing.assert_close(there[name_there], each, rtol=1e-5, atol=1e-6)
                    assert not (mixed and "projection" in name and each.any())
                else:
                    mean = torch.stack([there[name] for there in found]).mean(0)
                    torch.testing.assert_close(mean, each, rtol=1e-6, atol=1e-6)
        assert any(each.any() for name, each in alone[0].items() if "projection" in name)
