"""The inputs of networks and losses against loops over rows: views, mixing, teachers, labels."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import index_of, plan_of

from fasttrain.config.schema import IMAGENET_MEAN, IMAGENET_STD, MixConfig
from fasttrain.kernels import mix as mix_kernel
from fasttrain.losses.base import Output
from fasttrain.pipelines.images import Images
from fasttrain.training.inputs import InputBuilder

B, SIZE, CLASSES = 8, 16, 3
CPU = torch.device("cpu")


class MeanColors:
    """A network whose logits are the mean colors times 4. It keeps its last input."""

    def __call__(self, images):
        self.images = images
        assert not torch.is_grad_enabled()
        return Output(4 * images.mean((2, 3)), images.mean((2, 3)))


def normalized(pixels):
    return (pixels / 255 - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)


@pytest.fixture
def pixels():
    return torch.randint(0, 256, (3 * B, SIZE, SIZE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("mix", [MixConfig(cutmix=0), MixConfig(cutmix=1), MixConfig(cutmix=0, mixup=1)])
def test_rows_labels_and_targets(pixels, mix):
    plan = replace(plan_of(mix=mix, image_size=SIZE), views=2, ema_views=1)
    index = replace(index_of(50), labels=np.arange(50) % CLASSES, classes=("a", "b", "c"))
    labels = torch.from_numpy(index.labels)
    indices = torch.from_numpy(plan.images(3, 0).copy())
    teacher, ema_model = MeanColors(), MeanColors()
    inputs = InputBuilder(plan, index, CPU, torch.float32, teacher, ema_model)
    images, batch = inputs(inputs.on_host(3, 0, Images(pixels, indices)), inputs.scalars(3))

    table, mixed = plan.mix_params(3, 0)
    assert batch.mixed == mixed == bool(mix.cutmix or mix.mixup)
    assert images.shape == (2 * B, 3, SIZE, SIZE) and images.is_contiguous(memory_format=torch.channels_last)
    assert batch.teacher_logits is not None and batch.ema_logits is not None
    assert teacher.images is images and torch.equal(batch.teacher_logits, 4 * images.mean((2, 3)))
    unmixed = normalized(pixels.numpy())
    ema_view = ema_model.images.permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(ema_view, unmixed[2 * B :], atol=1e-5)  # never mixed
    np.testing.assert_allclose(batch.ema_logits, 4 * ema_view.mean((1, 2)), atol=1e-5)
    assert batch.views == 2
    for row in range(2 * B):
        other = int(table[row, mix_kernel.PARTNER])
        assert batch.labels[row] == labels[indices[row % B]]
        assert batch.labels_mixed[row] == labels[indices[other % B]]
        lam = float(batch.lam[row])
        assert batch.partner[row] == other
        expected = lam * unmixed[row] + (1 - lam) * unmixed[other]
        if mix.cutmix:
            top, bottom, left, right = table[row, mix_kernel.BOX].astype(int)
            expected = unmixed[row].copy()
            expected[top:bottom, left:right] = unmixed[other][top:bottom, left:right]
            assert lam == pytest.approx(1 - (bottom - top) * (right - left) / SIZE**2)
        np.testing.assert_allclose(images[row].permute(1, 2, 0), expected, atol=1e-5)
    assert (batch.epoch, batch.progress) == (3 / 6, 3 / 18)
    assert not batch.ema_logits.requires_grad


def test_one_view_without_teachers(pixels):
    plan = plan_of(mix=MixConfig(cutmix=0), image_size=SIZE)
    index = replace(index_of(50), labels=np.arange(50), classes=tuple(f"{n:02}" for n in range(50)))
    indices = torch.from_numpy(plan.images(0, 0).copy())
    inputs = InputBuilder(plan, index, CPU, torch.float32)
    images, batch = inputs(inputs.on_host(0, 0, Images(pixels[:B], indices)), inputs.scalars(0))
    np.testing.assert_allclose(images.permute(0, 2, 3, 1), normalized(pixels[:B].numpy()), atol=1e-5)
    assert torch.equal(batch.labels, indices) and torch.equal(batch.labels_mixed, indices)
    assert (batch.lam == 1).all() and not batch.mixed and batch.views == 1
    assert batch.teacher_logits is None and batch.ema_logits is None
