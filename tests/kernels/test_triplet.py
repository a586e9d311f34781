"""Batch-hard triplet on the CPU, against naive loops in float64, gradcheck, pytorch-metric-learning and torch.compile.
The tests of the Triton path are in test_triton.py."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning import distances, losses, miners, reducers

from fasttrain.kernels import triplet
from fasttrain.kernels.triplet import batch_hard_triplet


def naive(embeddings, labels, candidates=None, candidate_labels=None, self_offset=0, margin=0.3, squared=False):
    """Loss, distances and indices, pair by pair, in Python floats."""
    rows = embeddings.double().tolist()
    pool = rows if candidates is None else candidates.double().tolist()
    own = labels.tolist()
    theirs = own if candidate_labels is None else candidate_labels.tolist()
    found = []
    for i, row in enumerate(rows):
        far, near = (-1.0, -1), (math.inf, -1)
        for j, other in enumerate(pool):
            square = sum((x - y) ** 2 for x, y in zip(row, other, strict=True))
            distance = square if squared else math.sqrt(square)
            if own[i] == theirs[j] and j != i + self_offset and distance > far[0]:
                far = (distance, j)
            if own[i] != theirs[j] and distance < near[0]:
                near = (distance, j)
        found.append((far, near))
    terms = []
    for far, near in found:
        if far[1] >= 0 and near[1] >= 0:
            gap = far[0] - near[0]
            soft = max(gap, 0.0) + math.log1p(math.exp(-abs(gap)))
            terms.append(soft if margin is None else max(0.0, margin + gap))
    return sum(terms) / len(terms) if terms else 0.0, found, terms


@st.composite
def batches(draw):
    """Integer embeddings (so that float32 is exact and ties are common), labels, and options."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    batch, width = draw(st.integers(1, 14)), draw(st.integers(1, 9))
    classes = draw(st.integers(1, 6))
    spread = draw(st.sampled_from([1, 2, 5, 30]))
    embeddings = torch.from_numpy(rng.integers(-spread, spread + 1, (batch, width))).float()
    labels = torch.from_numpy(rng.integers(0, classes, batch))
    return embeddings, labels, draw(st.sampled_from([0.0, 0.3, 2.0, None])), draw(st.booleans())


def check_against_naive(output, expected, batch, margin: float | None = 0.3):
    loss, found, terms = expected
    assert output.loss.item() == pytest.approx(loss, rel=1e-5, abs=1e-6)
    for i in range(batch):
        (far, j_far), (near, j_near) = found[i]
        assert (int(output.i_pos[i]), int(output.i_neg[i])) == (j_far, j_near)
        assert output.d_pos[i].item() == pytest.approx(far if j_far >= 0 else 0, rel=1e-6)
        assert output.d_neg[i].item() == pytest.approx(near if j_near >= 0 else 0, rel=1e-6)
    assert output.valid.item() == len(terms)
    if margin is not None:  # a soft margin's loss is 0 only by rounding
        share = sum(term > 1e-6 for term in terms) / len(terms) if terms else 0
        assert output.active.item() == pytest.approx(share, abs=1e-6)


def is_borderline(expected, margin: float | None) -> bool:
    """Whether a hinge is so close to 0 that rounding decides whether its anchor is active."""
    pairs = [(far, near) for (far, j_far), (near, j_near) in expected[1] if j_far >= 0 and j_near >= 0]
    return margin is not None and any(abs(far - near + margin) < 1e-4 for far, near in pairs)


@given(batches())
@settings(max_examples=150, deadline=None)
def test_equals_a_naive_loop_with_ties_and_duplicates(case):
    embeddings, labels, margin, squared = case
    expected = naive(embeddings, labels, margin=margin, squared=squared)
    while is_borderline(expected, margin):
        margin += 0.125
        expected = naive(embeddings, labels, margin=margin, squared=squared)
    for function in (batch_hard_triplet, triplet.reference):
        check_against_naive(function(embeddings, labels, margin=margin, squared=squared), expected, len(labels), margin)


@given(st.integers(0, 2**31 - 1), st.integers(1, 8), st.integers(0, 8), st.integers(0, 8), st.booleans())
@settings(max_examples=60, deadline=None)
def test_equals_a_naive_loop_over_a_gathered_set(seed, batch, before, after, squared):
    generator = torch.Generator().manual_seed(seed)
    pool = torch.randint(-4, 5, (before + batch + after, 5), generator=generator).float()
    labels = torch.randint(0, 3, (len(pool),), generator=generator)
    embeddings, own = pool[before : before + batch].clone(), labels[before : before + batch].clone()
    expected = naive(embeddings, own, pool, labels, before, 0.3, squared)
    output = batch_hard_triplet(
        embeddings, own, candidates=pool, candidate_labels=labels, self_offset=before, squared=squared
    )
    check_against_naive(output, expected, batch)


def random_case(batch, width, classes, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(batch, width, generator=generator, dtype=torch.float64).to(dtype)
    return embeddings, torch.randint(0, classes, (batch,), generator=generator)


@pytest.mark.parametrize("margin", [0.3, 5.0, None])
@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("gathered", [False, True])
def test_gradients_equal_autograd_of_the_float64_reference(margin, squared, gathered):
    embeddings, labels = random_case(24, 17, 5)
    pool, pool_labels = random_case(40, 17, 5, seed=1)
    pool[8:32], pool_labels[8:32] = embeddings, labels
    grads = []
    for function, dtype in ((batch_hard_triplet, torch.float32), (triplet.reference, torch.float64)):
        ours = embeddings.to(dtype).requires_grad_()
        extra = {}
        if gathered:
            candidates = pool.to(dtype).requires_grad_()
            extra = {"candidates": candidates, "candidate_labels": pool_labels, "self_offset": 8}
        loss = function(ours, labels, margin=margin, squared=squared, **extra).loss
        (2.5 * loss).backward()
        grads.append([loss.detach(), ours.grad] + ([candidates.grad] if gathered else []))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-6)


def test_reference_passes_gradcheck():
    """Checks the reference for the gradients above by finite differences, away from ties."""
    embeddings, labels = random_case(8, 4, 3)
    for margin, squared in ((5.0, False), (None, True)):
        assert torch.autograd.gradcheck(
            lambda x, m=margin, s=squared: triplet.reference(x, labels, margin=m, squared=s).loss,
            embeddings.clone().requires_grad_(),
        )


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("shape", [(32, 16), (128, 64), (97, 33)])
def test_agrees_with_pytorch_metric_learning(squared, shape):
    """With its batch-hard miner, Euclidean distance, hinge, and mean over all valid anchors."""
    embeddings, labels = random_case(shape[0], shape[1], 9, dtype=torch.float32)
    space = distances.LpDistance(normalize_embeddings=False, p=2, power=2 if squared else 1)
    theirs = losses.TripletMarginLoss(0.3, distance=space, reducer=reducers.MeanReducer())
    ours_in, theirs_in = (embeddings.clone().requires_grad_() for _ in range(2))
    expected = theirs(theirs_in, labels, miners.BatchHardMiner(distance=space)(theirs_in, labels))
    output = batch_hard_triplet(ours_in, labels, squared=squared)
    torch.testing.assert_close(output.loss, expected, rtol=1e-4, atol=1e-5)
    output.loss.backward()
    expected.backward()
    torch.testing.assert_close(ours_in.grad, theirs_in.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("labels", [[3, 3, 3, 3], [0, 1, 2, 3], [7]])
def test_loss_is_zero_and_has_a_graph_without_valid_anchors(labels):
    embeddings = torch.randn(len(labels), 5, requires_grad=True)
    output = batch_hard_triplet(embeddings, torch.tensor(labels))
    output.loss.backward()
    assert output.loss.item() == 0 and output.valid.item() == 0 and output.active.item() == 0
    assert embeddings.grad is not None and not embeddings.grad.any()


def test_duplicates_have_zero_gradient():
    embeddings = torch.ones(6, 8, requires_grad=True)
    output = batch_hard_triplet(embeddings, torch.tensor([0, 0, 1, 1, 2, 2]))
    output.loss.backward()
    assert output.loss.item() == pytest.approx(0.3) and output.active.item() == 1.0
    assert embeddings.grad is not None and not embeddings.grad.any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("row", [0, 3, 7])
def test_nonfinite_embeddings_make_loss_and_gradient_nonfinite(bad, row):
    embeddings, labels = random_case(8, 5, 2, dtype=torch.float32)
    labels = torch.arange(8) % 2
    embeddings[row, 2] = bad
    embeddings.requires_grad_()
    output = batch_hard_triplet(embeddings, labels)
    output.loss.backward()
    assert not output.loss.isfinite() and not embeddings.grad.isfinite().all()
    for index in (output.i_pos, output.i_neg):
        assert ((index >= -1) & (index < 8)).all()


def test_mining_survives_a_common_offset():
    """Embeddings that are close together and far from the origin: the subtraction must not cancel."""
    embeddings, labels = random_case(64, 32, 8)
    far = (embeddings * 0.01 + 30).float()
    output, exact = batch_hard_triplet(far, labels), triplet.reference(far.double(), labels)
    assert torch.equal(output.i_pos, exact.i_pos) and torch.equal(output.i_neg, exact.i_neg)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_embeddings_are_mined_exactly(dtype):
    embeddings, labels = random_case(48, 40, 6)
    half = embeddings.to(dtype).requires_grad_()
    output, exact = batch_hard_triplet(half, labels), triplet.reference(half.detach().double(), labels)
    assert torch.equal(output.i_pos, exact.i_pos) and torch.equal(output.i_neg, exact.i_neg)
    assert output.loss.item() == pytest.approx(exact.loss.item(), rel=1e-5)
    output.loss.backward()
    assert half.grad is not None and half.grad.dtype == dtype


def test_double_backward_raises():
    embeddings, labels = random_case(8, 4, 2, dtype=torch.float32)
    embeddings.requires_grad_()
    (gradient,) = torch.autograd.grad(
        batch_hard_triplet(embeddings, labels, margin=9.0).loss, embeddings, create_graph=True
    )
    with pytest.raises(RuntimeError, match=r"does not require grad|no autograd formula"):
        gradient.sum().backward()


def test_only_the_loss_is_differentiable():
    embeddings, labels = random_case(8, 4, 2, dtype=torch.float32)
    output = batch_hard_triplet(embeddings.requires_grad_(), labels)
    assert [name for name, value in output._asdict().items() if value.requires_grad] == ["loss"]


@pytest.mark.parametrize("gathered", [False, True])
def test_opcheck(gathered):
    embeddings, labels = random_case(12, 6, 3, dtype=torch.float32)
    pool, pool_labels = (embeddings.clone().requires_grad_(), labels.clone()) if gathered else (None, None)
    args = (embeddings.requires_grad_(), labels, pool, pool_labels, 0, 0.3, False)
    torch.library.opcheck(torch.ops.fasttrain.triplet.default, args)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph_with_the_same_results(dynamic):
    embeddings, labels = random_case(16, 8, 3, dtype=torch.float32)

    def step(x):
        return batch_hard_triplet(x * 2, labels, margin=2.0).loss

    results = []
    for function in (step, torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")):
        x = embeddings.clone().requires_grad_()
        loss = function(x)
        loss.backward()
        results.append((loss.detach(), x.grad))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_autocast_has_no_effect():
    embeddings, labels = random_case(16, 8, 3, dtype=torch.float32)
    plain = batch_hard_triplet(embeddings, labels)
    with torch.autocast("cpu", torch.bfloat16):
        inside = batch_hard_triplet(embeddings, labels)
    assert all(torch.equal(one, other) for one, other in zip(plain, inside, strict=True))


def test_cpu_tensors_take_the_cpu_path(monkeypatch):
    paths = []
    on_cpu = triplet.on_cpu
    monkeypatch.setattr(triplet, "on_cpu", lambda *args: paths.append("cpu") or on_cpu(*args))
    monkeypatch.setattr(triplet, "launch", lambda *args: paths.append("triton"))
    embeddings, labels = random_case(4, 3, 2, dtype=torch.float32)
    batch_hard_triplet(embeddings, labels)
    assert paths == ["cpu"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embeddings": torch.zeros(4, 3, dtype=torch.float64)}, "float32, float16 or bfloat16"),
        ({"embeddings": torch.zeros(4)}, r"rows, D"),
        ({"embeddings": torch.zeros(0, 3), "labels": torch.zeros(0, dtype=torch.int64)}, "not empty"),
        ({"labels": torch.zeros(5, dtype=torch.int64)}, r"int64 \[4\]"),
        ({"labels": torch.zeros(4)}, "int64"),
        ({"candidates": torch.zeros(6, 3)}, "must be given together"),
        (
            {"candidates": torch.zeros(6, 2), "candidate_labels": torch.zeros(6, dtype=torch.int64)},
            "like the embeddings",
        ),
    ],
)
def test_other_shapes_and_dtypes_raise(change, message):
    arguments = {"embeddings": torch.zeros(4, 3), "labels": torch.zeros(4, dtype=torch.int64)} | change
    with pytest.raises(ValueError, match=message):
        batch_hard_triplet(arguments.pop("embeddings"), arguments.pop("labels"), **arguments)
