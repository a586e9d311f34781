"""P x K batches: what holds for every batch, for classes of any sizes."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from helpers import index_of
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fasttrain import recipes
from fasttrain.pipelines.groups import Groups
from fasttrain.pipelines.plan import Plan
from fasttrain.utils.errors import UserError


def batches_of(groups: Groups, seed=0, epoch=0) -> np.ndarray:
    """[batches, p, k]"""
    return groups.order(seed, epoch).reshape(-1, groups.p, groups.k)


@given(st.data(), st.integers(1, 5), st.integers(1, 6), st.integers(0, 99))
@settings(max_examples=150, deadline=None)
def test_batches_of_any_classes(data, k, p, seed):
    sizes = data.draw(st.lists(st.integers(k, 40), min_size=p, max_size=12))
    index = index_of(*sizes)
    groups = Groups.of(index, k, p * k)
    batches = batches_of(groups, seed, data.draw(st.integers(0, 300)))
    assert batches.shape == (groups.batches, p, k) and groups.batches >= 1
    assert len(set(batches.ravel().tolist())) == batches.size, "an image twice in an epoch"
    labels = index.labels[batches]
    assert (labels == labels[:, :, :1]).all(), "a group of two classes"
    assert all(len(set(row)) == p for row in labels[:, :, 0].tolist()), "a class twice in a batch"
    # More batches are impossible: a class of n images has at most min(n // k, B) groups in B batches.
    more = groups.batches + 1
    assert sum(min(size // k, more) for size in sizes) < p * more


def test_equal_classes_leave_out_only_their_remainder():
    """The challenge's classes have 50 images; groups of 4 use 48 of them, different ones in each epoch."""
    groups = Groups.of(index_of(*[50] * 96), 4, 128)
    assert groups.batches == 96 * 12 // 32
    seen: Counter[int] = Counter()
    for epoch in range(100):
        images = batches_of(groups, 0, epoch).ravel()
        assert len(images) == 96 * 48
        seen.update(images.tolist())
    assert len(seen) == 96 * 50 and min(seen.values()) > 80


def test_orders_are_pure_and_differ_by_epoch_and_seed():
    groups, again = (Groups.of(index_of(*[20] * 10), 4, 20) for _ in range(2))
    np.testing.assert_array_equal(groups.order(3, 7), again.order(3, 7))
    assert not np.array_equal(groups.order(3, 7), groups.order(3, 8))
    assert not np.array_equal(groups.order(3, 7), groups.order(4, 7))


def test_large_classes_last_to_the_end_of_the_epoch():
    """With classes of 60 and of 12 images, both halves of an epoch have similar shares of the large ones."""
    groups = Groups.of(index_of(*[60] * 8, *[12] * 40), 4, 32)
    first = second = 0
    for epoch in range(30):
        large = groups.labels[batches_of(groups, 0, epoch)[:, :, 0]] < 8
        half = len(large) // 2
        first, second = first + int(large[:half].sum()), second + int(large[-half:].sum())
    assert 0.75 < first / second < 1.33


def test_classes_share_batches_at_random():
    """How often two of 40 equal classes share a batch, over several epochs, compared with a fair draw."""
    groups = Groups.of(index_of(*[20] * 40), 4, 32)
    together = np.zeros((40, 40))
    for epoch in range(60):
        for row in groups.labels[batches_of(groups, 0, epoch)[:, :, 0]]:
            together[np.ix_(row, row)] += 1
    counts = together[np.triu_indices(40, 1)]
    expected = 60 * groups.batches * (8 * 7) / (40 * 39)
    assert counts.mean() == pytest.approx(expected)
    assert stats.chisquare(counts).pvalue > 1e-4


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("micro", [0, 4])
def test_no_group_is_split_among_ranks(world, micro):
    recipe = replace(
        recipes.for_arch("resnet18", "ce+triplet"), image_size=32, batch_size=16, micro_batch=micro, epochs=2
    )
    index = index_of(*[9] * 7)
    alone = Plan.of(replace(recipe, micro_batch=0), index)
    for step in range(alone.steps):
        parts = []
        for rank in range(world):
            plan = Plan.of(recipe, index, world, rank)
            parts += [plan.images(step, micro_batch) for micro_batch in range(plan.micro_batches)]
        assert np.concatenate(parts).tolist() == alone.images(step, 0).tolist()
        for part in parts:
            assert set(Counter(index.labels[part].tolist()).values()) == {4}


@pytest.mark.parametrize(
    ("sizes", "changes", "message"),
    [
        ((9, 9, 3, 9, 2), {"batch_size": 16}, r"images_per_class is 4, but class '2' has 3 \(and 1 more classes\)"),
        ((9, 9, 9), {"batch_size": 16}, r"takes 4 classes, but there are 3; set --batch-size 12 or less"),
        ((9, 9, 9), {"batch_size": 10}, "batch_size 10 is not a multiple of images_per_class 4"),
        ((9, 9, 9, 9), {"batch_size": 16, "micro_batch": 2}, "2 images at once are not a multiple of images_per_c"),
    ],
)
def test_impossible_batches_raise_with_the_numbers(sizes, changes, message):
    recipe = replace(recipes.for_arch("resnet18", "ce+triplet"), **changes)
    with pytest.raises(UserError, match=message):
        Plan.of(recipe, index_of(*sizes))
