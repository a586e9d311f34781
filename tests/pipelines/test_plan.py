"""The plan's draws: the generator's known answers, torchvision's distributions, and independence of the ranks."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import RECIPE, index_of, plan_of
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torchvision.transforms import RandomResizedCrop

from fasttrain.config.schema import AugmentConfig, MixConfig
from fasttrain.kernels import mix as mix_kernel
from fasttrain.losses.contrastive import Contrastive
from fasttrain.losses.symmetric import SymmetricCrossEntropy
from fasttrain.pipelines import plan as planning
from fasttrain.pipelines.philox import STEP, generator, philox4x32, reused_generator, uniforms
from fasttrain.pipelines.plan import Box, Plan, epoch_order, image_draws, random_resized_crop, step_mix
from fasttrain.utils.errors import UserError

ks_2samp: Any = stats.ks_2samp  # its stubs lack the result's fields


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # the known answers that Philox's authors publish for philox4x32-10
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers(counter, key, words):
    found = philox4x32(np.array(counter, np.uint64)[:, None], key[0] | key[1] << 32)
    assert tuple(int(word) for word in found[:, 0]) == words


@given(st.integers(0, 2**63 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.integers(1, 9))
def test_the_reused_generator_draws_like_a_new_one(seed, epoch, step, draws):
    """Whatever was drawn from it before, and however many words it has buffered."""
    expected, found = generator(seed, STEP, epoch, step, 2), reused_generator(seed, STEP, epoch, step, 2)
    for rng in (expected, found):
        rng.integers(5, size=draws)
    assert expected.random() == found.random() and expected.beta(0.2, 0.2) == found.beta(0.2, 0.2)
    assert expected.permutation(9).tolist() == found.permutation(9).tolist()
    assert expected.integers(9, size=2).tolist() == found.integers(9, size=2).tolist()


def test_uniforms_are_uniform_and_uncorrelated():
    draws = uniforms(7, 1, 3, np.arange(20_000), 6)
    for row in draws:
        assert stats.kstest(row, "uniform").pvalue > 1e-4
    correlation = np.corrcoef(draws) - np.eye(6)
    assert abs(correlation).max() < 0.03
    other_epoch = uniforms(7, 1, 4, np.arange(20_000), 6)
    assert abs(np.corrcoef(draws[0], other_epoch[0])[0, 1]) < 0.03


@given(st.lists(st.integers(0, 10_000), min_size=1, max_size=20, unique=True), st.integers(0, 2**63 - 1), st.data())
@settings(max_examples=30, deadline=None)
def test_a_draw_does_not_depend_on_its_batch(images, seed, data):
    """An image has the same draws alone and in any batch."""
    numbers = np.array(images)
    sizes = np.array([[50 + n % 400, 40 + n % 300] for n in images], np.int32)
    epoch, view = data.draw(st.integers(0, 300)), data.draw(st.integers(0, 2))
    other = AugmentConfig(autoaugment="none", randaugment=3, erase=0.5)
    augment = data.draw(st.sampled_from([AugmentConfig(), other]))
    together = image_draws(seed, epoch, numbers, sizes, augment, 64, view)
    for row in range(len(images)):
        alone = image_draws(seed, epoch, numbers[row : row + 1], sizes[row : row + 1], augment, 64, view)
        for batch_values, single in zip(together, alone, strict=True):
            np.testing.assert_array_equal(batch_values[row], single[0])


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(0, 1000))
@settings(max_examples=200, deadline=None)
def test_crops_are_inside_the_image(height, width, seed):
    u = uniforms(seed, 1, 0, np.arange(50), 22)
    boxes = random_resized_crop(u, np.tile(np.array([height, width], np.int32), (50, 1)), (0.08, 1.0), (3 / 4, 4 / 3))
    top, left, h, w = boxes.T
    assert (h >= 1).all() and (w >= 1).all() and (top >= 0).all() and (left >= 0).all()
    assert (top + h <= height).all() and (left + w <= width).all()


@pytest.mark.parametrize("shape", [(375, 500), (500, 375), (224, 224), (100, 800), (900, 90), (40, 41)])
def test_crops_have_torchvisions_distribution(shape):
    """Two-sample Kolmogorov-Smirnov on each of the four numbers. Wide and tall images often take the fallback."""
    count = 4000
    u = uniforms(11, 1, 0, np.arange(count), 22)
    ours = random_resized_crop(u, np.tile(np.array(shape, np.int32), (count, 1)), (0.08, 1.0), (3 / 4, 4 / 3))
    torch.manual_seed(0)
    blank = torch.empty(3, *shape)
    theirs = np.array([RandomResizedCrop.get_params(blank, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(count)])
    for column, name in enumerate(("top", "left", "height", "width")):
        assert ks_2samp(ours[:, column], theirs[:, column]).pvalue > 1e-4, name


def test_aspect_ratios_are_log_uniform():
    """Small crops of a large image always fit, so the first try's ratio is the crop's."""
    count, ratio = 4000, (1 / 4, 4.0)
    u = uniforms(3, 1, 0, np.arange(count), 22)
    crops = random_resized_crop(u, np.full((count, 2), 4000, np.int32), (0.01, 0.05), ratio)
    logs = np.log(crops[:, 3] / crops[:, 2])
    assert stats.kstest(logs, stats.uniform(np.log(ratio[0]), np.log(ratio[1] / ratio[0])).cdf).pvalue > 1e-3
    areas = crops[:, 2] * crops[:, 3] / 4000**2
    assert stats.kstest(areas, stats.uniform(0.01, 0.04).cdf).pvalue > 1e-3


def test_crop_falls_back_to_the_center():
    u = np.full((22, 2), 0.999)
    boxes = random_resized_crop(u, np.array([[10, 1000], [1000, 10]], np.int32), (0.9, 1.0), (3 / 4, 4 / 3))
    assert boxes.tolist() == [[0, 493, 10, 13], [493, 0, 13, 10]]


def test_flips_are_fair_and_independent_of_the_crop():
    sizes = np.tile(np.array([300, 300], np.int32), (20_000, 1))
    draws = image_draws(3, 0, np.arange(20_000), sizes, AugmentConfig(), 224)
    assert stats.binomtest(int(draws.flip.sum()), 20_000).pvalue > 1e-4
    assert abs(np.corrcoef(draws.flip, draws.crop[:, 2])[0, 1]) < 0.03
    assert not image_draws(3, 0, np.arange(99), sizes[:99], AugmentConfig(flip=0.0), 224).flip.any()


def test_an_epoch_has_each_image_once_in_a_new_order():
    orders = [epoch_order(5, epoch, 1000) for epoch in range(3)]
    for order in orders:
        assert np.array_equal(np.sort(order), np.arange(1000))
    assert not np.array_equal(orders[0], orders[1])
    assert abs(np.corrcoef(orders[0], orders[1])[0, 1]) < 0.1
    assert np.array_equal(orders[2], epoch_order.__wrapped__(5, 2, 1000))


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("micro", [0, 1, 2])
def test_global_batches_are_the_same_at_any_number_of_ranks(world, micro):
    alone = plan_of()
    for step in range(alone.steps):
        parts = []
        for rank in range(world):
            plan = Plan.of(
                replace(RECIPE, image_size=64, batch_size=8, epochs=3, micro_batch=micro), index_of(50), world, rank
            )
            parts += [plan.images(step, micro_batch) for micro_batch in range(plan.micro_batches)]
        assert np.concatenate(parts).tolist() == alone.images(step, 0).tolist()


def test_an_epoch_drops_only_its_last_partial_batch():
    plan = plan_of()
    assert plan.steps_per_epoch == 6 and plan.steps == 18
    seen = np.concatenate([plan.images(step, 0) for step in range(6)])
    assert len(set(seen.tolist())) == 48


@pytest.mark.parametrize(
    ("changes", "world", "message"),
    [
        ({"batch_size": 64}, 1, "50 images are fewer than one batch of 64"),
        ({"batch_size": 9}, 2, "batch_size 9 does not divide among 2 ranks"),
        ({"micro_batch": 3}, 2, "micro_batch 3 does not divide a rank's 4 images"),
    ],
)
def test_batches_that_do_not_divide_raise(changes, world, message):
    with pytest.raises(UserError, match=message):
        Plan.of(replace(RECIPE, **({"batch_size": 8} | changes)), index_of(50), world)


def test_cutmix_boxes_have_the_papers_distribution():
    """Against the paper's own code with numpy: box areas by KS, and the mean share E[λ] ≈ 0.68."""
    size, count = 224, 4000
    boxes = [step_mix(1, 0, step, size, MixConfig(cutmix=1.0)) for step in range(count)]
    assert all(isinstance(box, Box) for box in boxes)
    ours = np.array([(b.bottom - b.top) * (b.right - b.left) for b in boxes if isinstance(b, Box)]) / size**2
    rng = np.random.default_rng(0)
    theirs = np.empty(count)
    for row in range(count):
        cut = int(size * np.sqrt(1 - rng.beta(1, 1)))
        cx, cy = rng.integers(size), rng.integers(size)
        x1, y1 = np.clip(cx - cut // 2, 0, size), np.clip(cy - cut // 2, 0, size)
        x2, y2 = np.clip(cx + cut // 2, 0, size), np.clip(cy + cut // 2, 0, size)
        theirs[row] = (x2 - x1) * (y2 - y1) / size**2
    assert ks_2samp(ours, theirs).pvalue > 1e-4
    assert 1 - ours.mean() == pytest.approx(0.68, abs=0.02)


def test_mixup_has_its_share_of_the_steps_and_the_papers_distribution():
    mixes = [step_mix(3, 0, step, 64, MixConfig(cutmix=0.3, mixup=0.5, mixup_alpha=0.2)) for step in range(4000)]
    lams = [mixing for mixing in mixes if isinstance(mixing, float)]
    assert stats.binomtest(len(lams), 4000, 0.5).pvalue > 1e-4
    assert stats.binomtest(sum(isinstance(mixing, Box) for mixing in mixes), 4000, 0.3).pvalue > 1e-4
    assert stats.kstest(lams, stats.beta(0.2, 0.2).cdf).pvalue > 1e-4


def test_mixup_reaches_the_kernels_table():
    plan = plan_of(mix=MixConfig(cutmix=0, mixup=1))
    for step in range(6):
        table, mixed = plan.mix_params(step, 0)
        assert mixed and set(table[:, mix_kernel.MODE]) == {mix_kernel.MIXUP}
        assert len(set(table[:, mix_kernel.LAM])) == 1 and 0 <= table[0, mix_kernel.LAM] <= 1
        assert sorted(table[:, mix_kernel.PARTNER]) == list(range(8))


def test_half_of_the_steps_mix_and_a_step_has_one_box():
    mixing = [step_mix(2, 0, step, 64, MixConfig()) is not None for step in range(2000)]
    assert stats.binomtest(sum(mixing), 2000).pvalue > 1e-4
    plans = [
        Plan.of(replace(RECIPE, image_size=64, batch_size=8, epochs=3, micro_batch=2), index_of(50), 2, r)
        for r in (0, 1)
    ]
    partners = set()
    for step in range(18):
        tables = [plan.mix_params(step, micro) for plan in plans for micro in range(2)]
        assert len({mixed for _, mixed in tables}) == 1
        assert len({table[:, mix_kernel.BOX].tobytes() for table, _ in tables}) == 1
        for table, mixed in tables:
            assert sorted(table[:, mix_kernel.PARTNER]) == [0, 1]
            assert set(table[:, mix_kernel.MODE]) == {mix_kernel.CUTMIX if mixed else mix_kernel.PLAIN}
            if mixed:
                partners.add(table[:, mix_kernel.PARTNER].tobytes())
    assert len(partners) == 2  # both permutations of two occur


def test_cached_orders_are_read_only():
    order = planning.epoch_order(0, 0, 10)
    with pytest.raises(ValueError, match="read-only"):
        order[0] = 1


def test_views_are_independent_and_the_first_equals_a_plans_only_view():
    sizes = np.tile(np.array([300, 400], np.int32), (5000, 1))
    augment = AugmentConfig(autoaugment="none", randaugment=2, erase=0.5)
    views = [image_draws(4, 1, np.arange(5000), sizes, augment, 224, view) for view in range(3)]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        for name in ("crop", "flip", "op", "erased"):
            one, other = (getattr(views[view], name).reshape(5000, -1)[:, 0] for view in (first, second))
            assert abs(np.corrcoef(one, other)[0, 1]) < 0.06, name
    both, one = (replace(plan_of(), views=count).draws(0, np.arange(8), sizes[:8]) for count in (2, 1))
    for ours, alone in zip(both, one, strict=True):
        np.testing.assert_array_equal(ours, alone)


def test_ema_views_are_never_mixed_and_all_others_are():
    plan = replace(plan_of(mix=MixConfig(cutmix=1.0)), views=2, ema_views=1)
    for step in range(5):
        table, mixed = plan.mix_params(step, 0)
        assert mixed and len(table) == 3 * 8
        assert sorted(table[:16, mix_kernel.PARTNER]) == list(range(16))
        assert set(table[:16, mix_kernel.MODE]) == {mix_kernel.CUTMIX}
        np.testing.assert_array_equal(table[16:], mix_kernel.plain_params(24)[16:])


def test_a_contrastive_loss_needs_two_images():
    losses = (SymmetricCrossEntropy(), Contrastive())
    recipe = replace(RECIPE, image_size=64, batch_size=8, micro_batch=1, losses=losses)
    with pytest.raises(UserError, match="a contrastive loss needs two or more images at once"):
        Plan.of(recipe, index_of(50))
    assert Plan.of(recipe, index_of(50), world=2).views == 2
