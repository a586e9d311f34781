"""Random erasing: the distribution of boxes against torchvision's, and the DALI graph."""

import numpy as np
import pytest
import torch
from nvidia.dali import fn, pipeline_def, types
from scipy import stats
from torchvision.transforms import RandomErasing

from fasttrain.config.schema import IMAGENET_MEAN, IMAGENET_STD
from fasttrain.pipelines import erasing
from fasttrain.pipelines.philox import uniforms

SIZE = 224
USUAL = ((0.02, 0.33), (0.3, 3.3))
LONG = ((0.05, 0.3), (0.2, 1.0))
HARD = ((0.5, 1.0), (0.2, 3.0))  # all tries fail for some images


def ours(count: int, p: float, area, ratio, size: int = SIZE) -> np.ndarray:
    return erasing.boxes(uniforms(3, 1, 0, np.arange(count), erasing.DRAWS), size, p, area, ratio)


def theirs(count: int, area, ratio, size: int = SIZE) -> np.ndarray:
    """torchvision's boxes; zeros where it erases nothing."""
    torch.manual_seed(0)
    image = torch.empty(1, 1, 1).expand(3, size, size)
    boxes = [RandomErasing.get_params(image, area, ratio, [0.0])[:4] for _ in range(count)]
    return np.array([(0, 0, 0, 0) if box == (0, 0, size, size) else box for box in boxes])


@pytest.mark.parametrize(("area", "ratio"), [USUAL, LONG, HARD])
def test_boxes_have_torchvisions_distribution(area, ratio):
    """Kolmogorov–Smirnov tests on sides, corners, areas and ratios of boxes; Fisher's test on their number."""
    count = 4000
    found, expected = ours(10 * count, 1.0, area, ratio), theirs(count, area, ratio)
    assert found.dtype == np.int32 and found.shape == (10 * count, 4)
    empty, expected_empty = (int((boxes[:, 2] == 0).sum()) for boxes in (found, expected))
    assert stats.fisher_exact([[empty, 10 * count - empty], [expected_empty, count - expected_empty]]).pvalue > 1e-3
    assert (found[found[:, 2] == 0] == 0).all()
    assert (expected_empty > 0) == ((area, ratio) == HARD)
    a, b = (boxes[boxes[:, 2] > 0].astype(float).T for boxes in (found, expected))
    for column in range(4):
        assert stats.ks_2samp(a[column], b[column]).pvalue > 1e-3
    assert stats.ks_2samp(a[2] * a[3], b[2] * b[3]).pvalue > 1e-3
    assert stats.ks_2samp(a[2] / a[3], b[2] / b[3]).pvalue > 1e-3
    for start, side in ((0, 2), (1, 3)):  # a box's start, as a share of its possible starts
        assert stats.ks_2samp(*((boxes[start] + 0.5) / (SIZE - boxes[side] + 1) for boxes in (a, b))).pvalue > 1e-3


def test_boxes_are_inside_and_smaller_than_the_image():
    for size in (1, 2, 3, 8, 17, 224):
        top, left, height, width = ours(20_000, 1.0, *HARD, size=size).T
        assert (top >= 0).all() and (left >= 0).all() and (height < size).all() and (width < size).all()
        assert (top + height <= size).all() and (left + width <= size).all()
        if size == 8:
            touches_end = ((top + height == size) & (height > 0)).any() and ((left + width == size) & (width > 0)).any()
            assert touches_end and ((top == 0) & (height > 0)).any() and ((left == 0) & (width > 0)).any()


def test_p_is_the_share_of_erased_images():
    assert not ours(1000, 0.0, *USUAL).any()
    assert ours(1000, 1.0, *USUAL)[:, 2:].all()
    erased = int((ours(20_000, 0.25, *USUAL)[:, 2] > 0).sum())
    assert stats.binomtest(erased, 20_000, 0.25).pvalue > 1e-3


@pipeline_def(num_threads=2, device_id=None)
def graph(images, boxes, on_gpu):
    pixels = fn.external_source(source=[images], dtype=types.UINT8, ndim=3, layout="HWC")
    anchor = fn.external_source(source=[np.ascontiguousarray(boxes[:, :2])], dtype=types.FLOAT, ndim=1)
    shape = fn.external_source(source=[np.ascontiguousarray(boxes[:, 2:])], dtype=types.FLOAT, ndim=1)
    return erasing.erase(pixels.gpu() if on_gpu else pixels, anchor, shape)


def test_images_are_filled_with_the_mean_color_inside_their_boxes_only():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, 40, 40, 3)).astype(np.uint8)
    boxes = np.array([(0, 0, 0, 0), (3, 5, 10, 20), (39, 39, 1, 1), (0, 0, 40, 40), (0, 7, 0, 9), (30, 0, 10, 40)])
    pipe = graph(images, boxes.astype(np.float32), False, batch_size=6)
    pipe.build()
    results = pipe.run()[0].as_array()
    for image, (top, left, height, width), erased in zip(images, boxes, results, strict=True):
        inside = np.zeros((40, 40), bool)
        inside[top : top + height, left : left + width] = True
        np.testing.assert_array_equal(erased[~inside], image[~inside])
        normalized = (erased[inside] / 255 - IMAGENET_MEAN) / IMAGENET_STD
        assert abs(normalized).max(initial=0) <= 0.5 / 255 / min(IMAGENET_STD)


def test_the_gpu_graph_serializes():
    pipe = graph(np.zeros((1, 8, 8, 3), np.uint8), np.zeros((1, 4), np.float32), True, batch_size=1)
    assert len(pipe.serialize()) > 1000
    (erase,) = [operator for operator in pipe._ops if "rase" in operator.name]
    assert erase.spec.OutputDevice(0) == "gpu"
