"""The contrastive loss against a naive loop and pytorch-metric-learning; two ranks against one; edge cases."""

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
    """A batch of two views. labels: those of the images. Rows are view 0 of each image, then view 1 of each."""
    rows = torch.cat([labels, labels])
    return Batch(rows, rows, torch.ones(len(rows)), mixed, views=2, progress=progress)


def call(loss: Contrastive, embedding, labels=None, progress=0.0) -> Term:
    if labels is None:
        labels = torch.arange(len(embedding) // 2)
    term = loss(Output(embedding, embedding, None, embedding), batch_of(labels, progress=progress))
    assert term is not None
    return term


def unit_vectors(rows: int, width: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, width, generator=generator, dtype=torch.float64))


def naive(embedding, labels: list[int], temperature: float, mask_same_class: bool) -> list[float]:
    """[loss, mean cosine with the positive, accuracy], in float64 loops."""
    rows, images = embedding.tolist(), len(labels)
    values = []
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
        powers = sum(math.exp((cosine - positive) / temperature) for cosine in [positive, *negatives])
        values.append((math.log(powers), positive, float(all(cosine < positive for cosine in negatives))))
    return [sum(column) / len(values) for column in zip(*values, strict=True)]


@given(
    *(st.integers(1, 7), st.integers(2, 8), st.integers(1, 4), st.floats(0.05, 2), st.booleans()),
    st.integers(0, 2**31 - 1),
)
@settings(max_examples=60, deadline=None)
def test_equals_a_naive_loop(images, width, classes, temperature, mask, seed):
    embedding = unit_vectors(2 * images, width, seed)
    labels = torch.randint(classes, (images,), generator=torch.Generator().manual_seed(seed))
    term = call(Contrastive(temperature=temperature, weight=2.0, mask_same_class=mask), embedding, labels)
    loss, *stats = naive(embedding, labels.tolist(), temperature, mask)
    assert term.loss.item() == pytest.approx(2 * loss, rel=1e-9, abs=1e-9)
    assert [term.stats[name].item() for name in Contrastive.stats] == pytest.approx(stats, rel=1e-9, abs=1e-9)
    assert not any(value.requires_grad for value in term.stats.values())


@pytest.mark.parametrize("mask", [False, True])
def test_equals_pytorch_metric_learning(mask):
    ours, theirs = (unit_vectors(24, 16).requires_grad_() for _ in range(2))
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
    # Theirs normalizes the embeddings, so compare only the part of the gradient that changes their direction.
    tangential = []
    for embedding in (ours, theirs):
        assert embedding.grad is not None
        tangential.append(embedding.grad - (embedding.grad * embedding).sum(1, keepdim=True) * embedding)
    torch.testing.assert_close(*tangential, rtol=1e-7, atol=1e-9)


def test_no_row_is_its_own_candidate():
    """With one image, its other view is the only candidate. With equal rows, all 2N − 1 others are equally close."""
    for embedding in (unit_vectors(2, 4), torch.tensor([[1.0, 0.0], [-1.0, 0.0]])):
        term = call(Contrastive(), embedding)
        assert term.loss.item() == 0 and term.stats["accuracy"].item() == 1
    term = call(Contrastive(weight=1.0), torch.tensor([[0.0, 1.0]]).expand(10, 2))
    assert term.loss.item() == pytest.approx(math.log(9)) and term.stats["accuracy"].item() == 0


def test_mask_same_class_leaves_out_images_of_the_same_class():
    """With one class, only the positive is left."""
    embedding, labels = unit_vectors(8, 4), torch.zeros(4, dtype=torch.int64)
    assert call(Contrastive(mask_same_class=True), embedding, labels).loss.item() == 0
    assert call(Contrastive(), embedding, labels).loss.item() > 0.1


def test_gradcheck():
    rows, labels = unit_vectors(8, 3).requires_grad_(), torch.tensor([0, 1, 0, 2])
    for mask in (False, True):
        assert torch.autograd.gradcheck(lambda x, m=mask: call(Contrastive(mask_same_class=m), x, labels).loss, rows)


def test_there_is_no_term_on_a_mixed_step():
    embedding = unit_vectors(8, 4)
    assert Contrastive()(Output(embedding, embedding), batch_of(torch.arange(4), mixed=True)) is None


def test_the_weight_decays_along_half_a_cosine():
    embedding = unit_vectors(8, 4)
    full = call(Contrastive(weight=1.0), embedding).loss.item()
    for progress, share in ((0.0, 1.0), (0.25, (2 + math.sqrt(2)) / 4), (0.5, 0.5), (0.75, (2 - math.sqrt(2)) / 4)):
        decaying, constant = (Contrastive(decay=decay, weight=2.0) for decay in ("cosine", "none"))
        assert call(decaying, embedding, progress=progress).loss.item() == pytest.approx(2 * share * full)
        assert call(constant, embedding, progress=progress).loss.item() == pytest.approx(2 * full)
    assert call(decaying, embedding, progress=1 - 1e-6).loss.item() < 1e-9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_computes_in_float32_under_autocast(dtype):
    embedding = unit_vectors(12, 6).to(dtype)
    plain = call(Contrastive(), embedding).loss
    with torch.autocast("cpu", torch.bfloat16):
        cast = call(Contrastive(), embedding).loss
    assert cast.dtype == torch.float32 and torch.equal(plain, cast)
    assert plain.item() == pytest.approx(call(Contrastive(), embedding.double()).loss.item(), rel=1e-5)


def test_is_finite_at_the_edges():
    """A small temperature with opposite positives, and embeddings of 0."""
    for rows in (torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]]), torch.zeros(4, 2)):
        embedding = rows.requires_grad_()
        loss = call(Contrastive(temperature=1e-3), embedding).loss
        loss.backward()
        assert loss.isfinite() and embedding.grad is not None and embedding.grad.isfinite().all()


def test_missing_inputs_and_bad_settings_are_errors():
    embedding, batch = unit_vectors(4, 2), batch_of(torch.arange(2))
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
LABELS = torch.tensor([0, 1, 0, 1, 2, 0])  # some classes are on both ranks
MIXED = [False, True, True, False]


def steps(network: nn.Module, images: slice) -> list[dict[str, torch.Tensor]]:
    """The losses, stats and gradients by name, for each step of MIXED."""
    results = []
    for mixed in MIXED:
        network.zero_grad()
        output = network(PIXELS[:, images].flatten(0, 1))
        batch = batch_of(LABELS[images], mixed)
        terms = {loss.name: loss(output, batch) for loss in (CrossEntropy(), Contrastive(mask_same_class=True))}
        values = {name: term.loss for name, term in terms.items() if term is not None}
        torch.stack(list(values.values())).sum().backward()
        stats = {name: value for term in terms.values() if term is not None for name, value in term.stats.items()}
        gradients = {f"grad {name}": p.grad.clone() for name, p in network.named_parameters()}  # type: ignore[union-attr]
        results.append({name: value.detach() for name, value in (values | stats).items()} | gradients)
    return results


def without_batch_norm() -> Classifier:
    """A network without BatchNorm, whose statistics would differ between one process and two."""
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


@pytest.mark.slow
def test_two_ranks_have_the_loss_and_gradients_of_one(tmp_path):
    """In mixed steps, which have no contrastive term, the gradients of the projection head are zeros."""
    mp.spawn(rank, args=(str(tmp_path),), nprocs=2)
    alone = steps(without_batch_norm(), slice(0, IMAGES))
    for static in (True, False):
        both = [torch.load(tmp_path / f"rank{number}-{static}.pt") for number in (0, 1)]
        for mixed, expected, *by_rank in zip(MIXED, alone, *both, strict=True):
            assert ("contrastive" in expected) is not mixed
            for name, value in expected.items():
                if name.startswith("grad "):  # both ranks have DDP's mean
                    ddp_name = name.replace("grad ", "grad module.")
                    for results in by_rank:
                        torch.testing.assert_close(results[ddp_name], value, rtol=1e-5, atol=1e-6)
                    assert not (mixed and "projection" in name and value.any())
                else:
                    mean = torch.stack([results[name] for results in by_rank]).mean(0)
                    torch.testing.assert_close(mean, value, rtol=1e-6, atol=1e-6)
        assert any(value.any() for name, value in alone[0].items() if "projection" in name)
