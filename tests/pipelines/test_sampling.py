"""Sampling by class and by weight: how often images are drawn, and that nothing depends on ranks or earlier steps."""

from collections import Counter
from dataclasses import replace
from fractions import Fraction
from math import ceil, floor

import numpy as np
import pytest
import torch
from helpers import Stop, fail_at, index_of, run, tiny, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fasttrain import recipes
from fasttrain.config.schema import CheckpointConfig, DataConfig
from fasttrain.data.scan import scan
from fasttrain.pipelines.groups import Groups
from fasttrain.pipelines.plan import Plan
from fasttrain.pipelines.sampling import Sampling
from fasttrain.pipelines.train_loader import batches
from fasttrain.utils.errors import UserError

CPU = torch.device("cpu")


def expected_times(sizes, weights, balance):
    """How often each image is drawn on average, from the definition."""
    labels = [label for label, size in enumerate(sizes) for _ in range(size)]
    totals = Counter()
    for label, weight in zip(labels, weights, strict=True):
        totals[label] += weight
    powers = {label: total ** (1 - balance) for label, total in totals.items()}
    return [
        len(labels) * powers[label] / sum(powers.values()) * weight / totals[label]
        for label, weight in zip(labels, weights, strict=True)
    ]


@given(st.data(), st.lists(st.integers(1, 30), min_size=1, max_size=8), st.floats(0, 1), st.integers(0, 99))
@settings(max_examples=150, deadline=None)
def test_an_epoch_draws_each_image_as_often_as_its_share_says(data, sizes, balance, seed):
    weight = st.sampled_from([0.0, 0.5, 1.0, 2.0, 7.0])
    weights = data.draw(st.lists(weight, min_size=sum(sizes), max_size=sum(sizes)))
    index = replace(index_of(*sizes), weights=np.array(weights))
    totals = np.bincount(index.labels, weights)
    if not totals.all():
        with pytest.raises(UserError, match="have the weight 0"):
            Sampling.of(index, balance)
        return
    sampling = Sampling.of(index, balance)
    times = expected_times(sizes, weights, balance)
    np.testing.assert_allclose(sampling.times, times, rtol=1e-9)
    samples = sampling.order(seed, data.draw(st.integers(0, 300)))
    assert len(samples) == len(index) and len(set(samples.tolist())) == len(samples), "a sample twice"
    drawn = np.bincount(samples % len(index), minlength=len(index))
    for count, time in zip(drawn.tolist(), times, strict=True):
        assert floor(time - 1e-6) <= count <= ceil(time + 1e-6)
    # A sample's number says how often the image was drawn before.
    for image, count in enumerate(drawn.tolist()):
        assert sorted(sample // len(index) for sample in samples.tolist() if sample % len(index) == image) == list(
            range(count)
        )
    of_class = np.bincount(index.labels[samples % len(index)], minlength=len(sizes))
    share = np.bincount(index.labels, times, len(sizes))
    assert (np.abs(of_class - share) < 1 + 1e-6).all()


def test_over_epochs_images_of_a_class_are_drawn_alike():
    sampling = Sampling.of(index_of(40, 7), 1.0)
    counts = sum(np.bincount(sampling.order(3, epoch) % 47, minlength=47) for epoch in range(600))
    assert counts[40:].sum() / counts.sum() == pytest.approx(0.5, abs=0.01)
    assert stats.chisquare(counts[:40]).pvalue > 1e-4 and stats.chisquare(counts[40:]).pvalue > 1e-4
    first = [sampling.order(3, epoch)[0] % 47 >= 40 for epoch in range(600)]
    assert stats.binomtest(sum(first), 600, 0.5).pvalue > 1e-4, "the order within an epoch is not random"


def test_without_balance_and_weights_nothing_changes():
    assert Sampling.of(index_of(9, 2), 0.0) is None
    recipe = replace(recipes.for_arch("resnet18"), batch_size=4)
    plan, again = (Plan.of(replace(recipe, data=DataConfig(balance=value)), index_of(9, 2)) for value in (0.0, 1.0))
    assert plan.sampling is None and again.sampling is not None
    assert sorted(np.concatenate([plan.samples(step, 0) for step in range(2)]).tolist())[-1] < 11


@pytest.mark.parametrize("k", [0, 2])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_share_the_samples_of_one(world, k):
    data = DataConfig(balance=0.7)
    recipe = replace(recipes.for_arch("resnet18"), image_size=32, batch_size=8, epochs=3, data=data, images_per_class=k)
    index = index_of(30, 9, 4, 2)
    alone = Plan.of(recipe, index)
    for step in range(alone.steps):
        parts = [Plan.of(recipe, index, world, rank).samples(step, 0) for rank in range(world)]
        assert np.concatenate(parts).tolist() == alone.samples(step, 0).tolist()


@given(st.data(), st.integers(1, 4), st.integers(1, 5), st.floats(0, 1), st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_balanced_groups(data, k, p, balance, seed):
    sizes = data.draw(st.lists(st.integers(k, 60), min_size=p, max_size=9))
    index = index_of(*sizes)
    groups = Groups.of(index, k, p * k, balance)
    samples = groups.order(seed, data.draw(st.integers(0, 50))).reshape(-1, p, k)
    assert len(set(samples.ravel().tolist())) == samples.size, "a sample twice in an epoch"
    images = samples % len(index)
    for batch in images:
        assert len(set(batch.ravel().tolist())) == p * k, "an image twice in a batch"
        labels = index.labels[batch]
        assert (labels == labels[:, :1]).all() and len(set(labels[:, 0].tolist())) == p
    drawn = np.bincount(index.labels[images].ravel(), minlength=len(sizes)) / k
    total = sum(size // k for size in sizes)
    powers = [size ** (1 - balance) for size in sizes]
    wanted = [max(1, total * power / sum(powers)) for power in powers] if balance else [size // k for size in sizes]
    # Each class has its share, unless there are fewer batches than it needs groups, or too many groups in all.
    assert (drawn <= np.minimum(np.ceil(wanted), len(images)) + 1e-9).all()
    if p == 1:
        assert (drawn >= np.floor(wanted)).all()


def test_images_with_weights_and_groups_are_refused():
    index = replace(index_of(8, 8), weights=np.ones(16))
    recipe = replace(recipes.for_arch("resnet18"), batch_size=4, images_per_class=2)
    with pytest.raises(UserError, match="leave out the table's column weight, or images_per_class"):
        Plan.of(recipe, index)


@pytest.fixture(scope="module")
def unequal(demo_set):
    """Some images of the demo set: 20 of one class and 4 of another."""
    full = scan(demo_set / "train")
    numbers = [*range(20), *range(50, 54)]
    chosen = [getattr(full, name) for name in ("paths", "ids")]
    paths, ids = (tuple(values[number] for number in numbers) for values in chosen)
    return replace(full, paths=paths, ids=ids, labels=full.labels[numbers], sizes=full.sizes[numbers],
                   classes=full.classes[:2])  # fmt: skip


def test_an_image_is_augmented_anew_each_time_an_epoch_draws_it(unequal):
    recipe = replace(recipes.for_arch("resnet18"), image_size=32, batch_size=24, epochs=1, data=DataConfig(balance=1.0))
    plan = Plan.of(recipe, unequal)
    (batch,) = list(batches(plan, unequal, CPU, 1))
    assert batch.indices.tolist() == plan.images(0, 0).tolist()
    rows = {}
    for row, number in enumerate(batch.indices.tolist()):
        rows.setdefault(number, []).append(batch.pixels[row])
    repeated = [pixels for number, pixels in rows.items() if number >= 20]
    assert all(len(pixels) == 3 for pixels in repeated)
    for first, *others in repeated:
        assert not any(torch.equal(first, other) for other in others)


def test_shares_of_the_plan_are_those_that_it_draws():
    recipe = replace(recipes.for_arch("resnet18"), image_size=32, batch_size=4)
    index = index_of(64, 16, 4)
    for balance, powers in ((0.0, (64, 16, 4)), (0.5, (8, 4, 2)), (1.0, (1, 1, 1))):
        plan = Plan.of(replace(recipe, data=DataConfig(balance=balance)), index)
        shares = [float(Fraction(power, sum(powers))) for power in powers]
        np.testing.assert_allclose(plan.class_shares(index), shares)
        groups = Plan.of(replace(recipe, data=DataConfig(balance=balance), images_per_class=4), index)
        np.testing.assert_allclose(groups.class_shares(index), shares, atol=0.04)


def test_a_run_that_was_interrupted_ends_with_the_same_weights(unequal, tmp_path, monkeypatch):
    settings = {"batch_size": 6, "epochs": 2, "data": DataConfig(balance=0.8)}
    recipe = tiny(checkpoint=CheckpointConfig(every_steps=1), **settings)
    run(recipe, tmp_path / "whole", unequal)
    with monkeypatch.context() as patch, pytest.raises(Stop):
        fail_at(patch, 3)
        run(recipe, tmp_path / "parts", unequal)
    with pytest.raises(UserError, match=r"data\.balance was 0\.8 and is 0\.1"):
        run(replace(recipe, data=DataConfig(balance=0.1)), tmp_path / "parts", unequal)
    run(recipe, tmp_path / "parts", unequal)
    expected, found = (weights(tmp_path / name) for name in ("whole", "parts"))
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)
