"""Random erasing: boxes distributed as torchvision's are, and their graph."""

import numpy as np
import pytest
import torch
from nvidia.dali import fn, pipeline_def, types
from scipy import stats
from torchvision.transforms import RandomErasing

from fasttrain.config.schema import IMAGENET_MEAN, IMAGENET_STD
from fasttrain.pipelines import erasing, operation_graph
from fasttrain.pipelines.philox import uniforms

SIZE = 224
USUAL = ((0.02, 0.33), (0.3, 3.3))
LONG = ((0.05, 0.3), (0.2, 1.0))
HARD = ((0.5, 1.0), (0.2, 3.0))  # of which some images' tries all fail


def ours(count: int, p: float, area, ratio, size: int = SIZE) -> np.ndarray:
    return erasing.boxes(uniforms(3, 1, 0, np.arange(count), erasing.DRAWS), size, p, area, ratio)


def theirs(count: int, area, ratio, size: int = SIZE) -> np.ndarray:
    """torchvision's boxes, zeros where it leaves an image as it is."""
    torch.manual_seed(0)
    image = torch.empty(1, 1, 1).expand(3, size, size)
    found = [RandomErasing.get_params(image, area, ratio, [0.0])[:4] for _ in range(count)]
    return np.array([(0, 0, 0, 0) if each == (0, 0, size, size) else each for each in found])


@pytest.mark.parametrize(("area", "ratio"), [USUAL, LONG, HARD])
def test_boxes_are_distributed_as_torchvisions(area, ratio):
    """Kolmogorov–Smirnov on sides, corners, areas and ratios of boxes; Fisher's test on how many there are."""
    count = 4000
    mine, expected = ours(10 * count, 1.0, area, ratio), theirs(count, area, ratio)
    assert mine.dtype == np.int32 and mine.shape == (10 * count, 4)
    lost, lost_there = (int((boxes[:, 2] == 0).sum()) for boxes in (mine, expected))
    assert stats.fisher_exact([[lost, 10 * count - lost], [lost_there, count - lost_there]]).pvalue > 1e-3
    assert (mine[mine[:, 2] == 0] == 0).all()
    assert (lost_there > 0) == ((area, ratio) == HARD)
    a, b = (boxes[boxes[:, 2] > 0].astype(float).T for boxes in (mine, expected))
    for each in range(4):
        assert stats.ks_2samp(a[each], b[each]).pvalue > 1e-3
    assert stats.ks_2samp(a[2] * a[3], b[2] * b[3]).pvalue > 1e-3
    assert stats.ks_2samp(a[2] / a[3], b[2] / b[3]).pvalue > 1e-3
    for start, side in ((0, 2), (1, 3)):  # where a box begins, of the places that its size leaves it
        assert stats.ks_2samp(*((each[start] + 0.5) / (SIZE - each[side] + 1) for each in (a, b))).pvalue > 1e-3


def test_boxes_are_inside_and_smaller_than_the_image():
    for size in (1, 2, 3, 8, 17, 224):
        top, left, height, width = ours(20_000, 1.0, *HARD, size=size).T
        assert (top >= 0).all() and (left >= 0).all() and (height < size).all() and (width < size).all()
        assert (top + height <= size).all() and (left + width <= size).all()
        if size == 8:
            touching = ((top + height == size) & (height > 0)).any() and ((left + width == size) & (width > 0)).any()
            assert touching and ((top == 0) & (height > 0)).any() and ((left == 0) & (width > 0)).any()


def test_as_many_are_erased_as_asked_for():
    assert not ours(1000, 0.0, *USUAL).any()
    assert ours(1000, 1.0, *USUAL)[:, 2:].all()
    erased = int((ours(20_000, 0.25, *USUAL)[:, 2] > 0).sum())
    assert stats.binomtest(erased, 20_000, 0.25).pvalue > 1e-3


@pipeline_def(num_threads=2, device_id=None)
def graph(images, boxes, on_gpu):
    pixels = fn.external_source(source=[images], dtype=types.UINT8, ndim=3, layout="HWC")
    anchor = fn.external_source(source=[np.ascontiguousarray(boxes[:, :2])], dtype=types.FLOAT, ndim=1)
    shape = fn.external_source(source=[np.ascontiguousarray(boxes[:, 2:])], dtype=types.FLOAT, ndim=1)
    return operation_graph.erase(pixels.gpu() if on_gpu else pixels, anchor, shape)


def test_images_are_filled_with_the_mean_colour_inside_their_boxes_only():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, 40, 40, 3)).astype(np.uint8)
    boxes = np.array([(0, 0, 0, 0), (3, 5, 10, 20), (39, 39, 1, 1), (0, 0, 40, 40), (0, 7, 0, 9), (30, 0, 10, 40)])
    pipe = graph(images, boxes.astype(np.float32), False, batch_size=6)
    pipe.build()
    found = pipe.run()[0].as_array()
    for image, (top, left, height, width), seen in zip(images, boxes, found, strict=True):
        inside = np.zeros((40, 40), bool)
        inside[top : top + height, left : left + width] = True
        np.testing.assert_array_equal(seen[~inside], image[~inside])
        normalised = (seen[inside] / 255 - IMAGENET_MEAN) / IMAGENET_STD
        assert abs(normalised).max(initial=0) <= 0.5 / 255 / min(IMAGENET_STD)


def test_the_gpu_graph_serialises():
    pipe = graph(np.zeros((1, 8, 8, 3), np.uint8), np.zeros((1, 4), np.float32), True, batch_size=1)
    assert len(pipe.serialize()) > 1000
    (erase,) = [each for each in pipe._ops if "rase" in each.name]
    assert erase.spec.OutputDevice(0) == "gpu"
