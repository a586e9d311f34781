"""Each operation against PIL's and torchvision's."""

import io

import numpy as np
import pytest
from nvidia.dali import fn, pipeline_def, types
from PIL import Image, ImageEnhance, ImageOps
from torchvision.transforms import InterpolationMode
from torchvision.transforms.autoaugment import _apply_op

from fasttrain.pipelines import operations, randaugment
from fasttrain.pipelines.autoaugment import strength
from fasttrain.pipelines.operations import Op

SIZE = 224


@pytest.fixture(scope="module")
def pictures(photos) -> list[np.ndarray]:
    files = sorted(photos.rglob("*.*"))[:16]
    images = [Image.open(path).convert("RGB") for path in files]
    return [np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BILINEAR)) for image in images]


@pipeline_def(enable_conditionals=True, num_threads=2, device_id=None)
def one_operation(images, arguments, interp):
    decoded = fn.external_source(source=[images], dtype=types.UINT8, ndim=3, layout="HWC")
    nodes = []
    for values, (dtype, ndim) in zip(arguments, operations.INPUTS.values()):  # noqa: B905 (DALI's AutoGraph does not support strict)
        nodes.append(fn.external_source(source=[values], dtype=getattr(types, dtype), ndim=ndim))
    return operations.apply(decoded, operations.Arguments(*nodes), SIZE, interp)


def with_dali(pictures, op: Op, value: float, interp=types.INTERP_NN) -> list[np.ndarray]:
    count = len(pictures)
    arguments = operations.arguments(np.full(count, op, np.int32), np.full(count, value, np.float32), SIZE)
    pipe = one_operation(pictures, [np.ascontiguousarray(values) for values in arguments], interp, batch_size=count)
    pipe.build()
    (result,) = pipe.run()
    return [np.asarray(result.at(row)) for row in range(count)]


def with_pil(picture: np.ndarray, op: Op, value: float) -> np.ndarray:
    image = Image.fromarray(picture)
    match op:
        case Op.IDENTITY:
            result = image
        case Op.POSTERIZE:
            result = ImageOps.posterize(image, int(value))
        case Op.SOLARIZE:
            result = ImageOps.solarize(image, value)  # type: ignore[arg-type]
        case Op.INVERT:
            result = ImageOps.invert(image)
        case Op.EQUALIZE:
            result = ImageOps.equalize(image)
        case Op.AUTO_CONTRAST:
            result = ImageOps.autocontrast(image)
        case Op.ROTATE:
            result = image.rotate(value, Image.Resampling.NEAREST, fillcolor=(128, 128, 128))
        case Op.SHEAR_X:
            affine = (1, value, 0, 0, 1, 0)
            result = image.transform(
                image.size, Image.Transform.AFFINE, affine, Image.Resampling.NEAREST, fillcolor=(128, 128, 128)
            )
        case Op.COLOR:
            result = ImageEnhance.Color(image).enhance(value)
        case Op.CONTRAST:
            result = ImageEnhance.Contrast(image).enhance(value)
        case Op.SHARPNESS:
            result = ImageEnhance.Sharpness(image).enhance(value)
        case Op.BRIGHTNESS:
            result = ImageEnhance.Brightness(image).enhance(value)
        case Op.SHEAR_Y:
            result = with_torchvision(image, "ShearY", value)
        case Op.TRANSLATE_X | Op.TRANSLATE_Y:
            result = with_torchvision(image, f"Translate{op.name[-1]}", value * SIZE)
    return np.asarray(result)


def with_torchvision(image: Image.Image, name: str, magnitude: float) -> Image.Image:
    return _apply_op(image, name, magnitude, InterpolationMode.NEAREST, [128.0] * 3)


LARGEST_SHIFT = 150 / 331  # RandAugment's largest translation, as a share of the side
EXACT = [
    (Op.IDENTITY, 0),
    (Op.INVERT, 0),
    *((Op.POSTERIZE, bits) for bits in (8, 6, 5, 4)),
    *((Op.SOLARIZE, strength(Op.SOLARIZE, bin_, 1)) for bin_ in range(10)),
    (Op.SOLARIZE, 178.5),
    *(
        (op, share)
        for op in (Op.TRANSLATE_X, Op.TRANSLATE_Y)
        for share in (0.0, 0.03, -0.03, LARGEST_SHIFT, -LARGEST_SHIFT, 1.0)
    ),
]


@pytest.mark.parametrize(("op", "value"), EXACT)
def test_exact_operations_equal_pils(pictures, op, value):
    for ours, picture in zip(with_dali(pictures, op, value), pictures, strict=True):
        np.testing.assert_array_equal(ours, with_pil(picture, op, value))


# The largest mean difference, of 255, for any image. PIL truncates where DALI rounds (0.5), and blends with a gray
# image. A warp with the nearest neighbor differs in single pixels at edges.
CLOSE = [
    (Op.AUTO_CONTRAST, 0, 0.6),
    *((op, strength(op, bin_, sign), 0.6) for op in (Op.COLOR, Op.CONTRAST) for bin_ in (2, 8) for sign in (-1, 1)),
    *((Op.BRIGHTNESS, factor, 0.6) for factor in (0.1, 0.73, 1.27, 1.9)),
    *((Op.SHARPNESS, strength(Op.SHARPNESS, 7, sign), 0.6) for sign in (-1, 1)),
    *((Op.ROTATE, strength(Op.ROTATE, bin_, sign), 0.1) for bin_ in (3, 9) for sign in (-1, 1)),
    *((op, value, 0.1) for op in (Op.SHEAR_X, Op.SHEAR_Y) for value in (-0.3, -0.05, strength(Op.SHEAR_X, 5, 1))),
]


@pytest.mark.parametrize(("op", "value", "bound"), CLOSE)
def test_close_operations_differ_little_from_pils(pictures, op, value, bound):
    for ours, picture in zip(with_dali(pictures, op, value), pictures, strict=True):
        difference = abs(ours.astype(int) - with_pil(picture, op, value))
        if op == Op.SHARPNESS:  # PIL does not change the outermost pixels
            difference = difference[1:-1, 1:-1]
        assert difference.mean() <= bound


def test_warps_can_be_linear(pictures):
    for ours, picture in zip(with_dali(pictures, Op.ROTATE, 20, types.INTERP_LINEAR), pictures, strict=True):
        expected = Image.fromarray(picture).rotate(20, Image.Resampling.BILINEAR, fillcolor=(128, 128, 128))
        inside = np.asarray(Image.new("L", (SIZE, SIZE), 1).rotate(20)) == 1
        inside[[0, -1]] = inside[:, [0, -1]] = False
        difference = abs(ours.astype(int) - np.asarray(expected))[inside]
        assert difference.mean() <= 0.6 and (difference > 2).mean() < 0.01


def test_equalize_equals_opencvs(pictures):
    """DALI uses OpenCV's formula. It must equal that formula, computed here from the histogram, and be near PIL's."""
    for ours, picture in zip(with_dali(pictures, Op.EQUALIZE, 0), pictures, strict=True):
        expected = np.empty_like(picture)
        for channel in range(3):
            plane = picture[..., channel]
            cumulative = np.bincount(plane.ravel(), minlength=256).cumsum()
            first = cumulative[plane.min()]
            table = (cumulative - first) * (255 / max(1, plane.size - first))
            expected[..., channel] = np.rint(np.clip(table, 0, 255)).astype(np.uint8)[plane]
        assert abs(ours.astype(int) - expected).max() <= 1
        assert abs(ours.astype(int) - with_pil(picture, Op.EQUALIZE, 0)).mean() < 12


def test_flat_images_do_not_change():
    flat = [np.full((SIZE, SIZE, 3), level, np.uint8) for level in (0, 77, 255)]
    for op in (Op.AUTO_CONTRAST, Op.CONTRAST, Op.SHARPNESS, Op.COLOR):
        for ours, picture in zip(with_dali(flat, op, 1.8), flat, strict=True):
            assert abs(ours.astype(int) - picture).max() <= 1


def test_each_image_gets_its_own_operation():
    """A batch with a different operation for every image equals the images processed one by one."""
    rng = np.random.default_rng(0)
    batch = [rng.integers(0, 256, (SIZE, SIZE, 3)).astype(np.uint8) for _ in Op]
    ops = np.array(list(Op), np.int32)
    of_autoaugment = [op for op in Op if op not in randaugment.OPERATIONS]
    values = np.array(
        [strength(op, 6, -1) if op in of_autoaugment else randaugment.strength(op, 18, -1) for op in Op], np.float32
    )
    arguments = [np.ascontiguousarray(argument) for argument in operations.arguments(ops, values, SIZE)]
    pipe = one_operation(batch, arguments, types.INTERP_NN, batch_size=len(batch))
    pipe.build()
    (together,) = pipe.run()
    for row, op in enumerate(Op):
        (alone,) = with_dali(batch[row : row + 1], op, float(values[row]))
        np.testing.assert_array_equal(np.asarray(together.at(row)), alone)


def test_the_bounds_would_catch_a_jpeg_round_trip(pictures):
    """The comparisons above would fail for a change as small as a JPEG round trip."""
    stored = io.BytesIO()
    Image.fromarray(pictures[0]).save(stored, "JPEG", quality=90)
    assert abs(np.asarray(Image.open(stored)).astype(int) - pictures[0]).mean() > 0.8
