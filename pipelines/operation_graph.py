"""The DALI graph of `operations`, and of random erasing: one operation per image, on a GPU or a CPU.

This runs while DALI builds a graph: `images` and the arguments are nodes, and `if` splits the batch. DALI's AutoGraph
follows plain functions only.
"""

from typing import Any

from nvidia.dali import fn, math, types

from fasttrain.pipelines import erasing
from fasttrain.pipelines.operations import FILL, Arguments, Kind

# DALI's type and number of dimensions, per image, of each field of Arguments.
INPUTS: dict[str, tuple[Any, int]] = {
    "kind": (types.INT32, 0),
    "keep": (types.UINT8, 0),
    "flip": (types.UINT8, 0),
    "threshold": (types.UINT8, 0),
    "brightness": (types.FLOAT, 0),
    "saturation": (types.FLOAT, 0),
    "contrast": (types.FLOAT, 0),
    "matrix": (types.FLOAT, 2),
    "kernel": (types.FLOAT, 2),
}


def apply(images: Any, a: Arguments, size: int, interp: types.DALIInterpType = types.INTERP_NN) -> Any:
    """Apply to each image (uint8 HWC, size x size) its own operation. All arguments are CPU nodes, except for the
    kernel, which is where the images are. interp: DALI's interpolation of warps."""
    if a.kind == Kind.NONE.value:
        result = images
    elif a.kind == Kind.BITS.value:
        result = (images & a.keep) ^ a.flip
    elif a.kind == Kind.EQUALIZE.value:
        result = fn.equalize(images)
    elif a.kind == Kind.WARP.value:
        result = fn.warp_affine(images, matrix=a.matrix, size=[size, size], fill_value=FILL, interp_type=interp)
    elif a.kind == Kind.COLOR.value:
        result = color(images, a.saturation)
    elif a.kind == Kind.CONTRAST.value:
        result = contrast(images, a.contrast, a.brightness)
    elif a.kind == Kind.SHARPNESS.value:
        result = fn.filter(images, a.kernel)
    elif a.kind == Kind.AUTO_CONTRAST.value:
        result = auto_contrast(images)
    else:  # Kind.SOLARIZE
        result = images ^ (a.flip * (images >= a.threshold))
    return result


# On a CPU what turns numbers with a fraction into bytes is most of an operation's time, so the forms for a CPU have
# none; each was timed beside the other. On a GPU the fewest launches count.

_INT16_MAX = 32767
_LIFT = 255  # keeps sums that are not clipped yet from being negative


def color(images: Any, factor: Any) -> Any:
    """Blend with the grey image, as PIL's ImageEnhance.Color does; factor 0 … 2."""
    if images.device == "gpu":
        return fn.color_twist(images, saturation=factor)
    beyond = fn.cast(factor > 1, dtype=types.FLOAT)
    # Both terms are bytes long: the grey one, negative where the factor is above 1, is then lifted.
    grey = fn.brightness_contrast(_grey(images), brightness=1 - factor, brightness_shift=beyond)
    grey = fn.color_space_conversion(grey, image_type=types.GRAY, output_type=types.RGB)
    own = fn.brightness_contrast(
        images,
        dtype=types.INT16,
        brightness=factor,
        brightness_shift=((1 - beyond) * _LIFT - 0.5) / _INT16_MAX,  # PIL cuts fractions off
    )
    return fn.lookup_table(own + grey, keys=_SUMS, values=_CLIPPED, default_value=255, dtype=types.UINT8)


_SUMS = list(range(_LIFT + 255))
_CLIPPED = [max(0, each - _LIFT) for each in _SUMS]


def contrast(images: Any, factor: Any, brightness: Any) -> Any:
    """Blend with the mean of the grey image and with black, as PIL's ImageEnhance.Contrast and Brightness do."""
    mean = math.floor(fn.reductions.mean(_grey(images), keep_dims=True) + 0.5)
    if images.device == "gpu":
        return fn.cast((mean + (images - mean) * factor) * brightness, dtype=types.UINT8)
    center = fn.reshape(mean, shape=[])
    return fn.brightness_contrast(images, brightness=brightness, contrast=factor, contrast_center=center)


def _grey(images: Any) -> Any:
    return fn.color_space_conversion(images, image_type=types.RGB, output_type=types.GRAY)


def auto_contrast(images: Any) -> Any:
    """Stretch each channel to 0 … 255; a channel of one value stays as it is."""
    low = fn.reductions.min(images, axis_names="HW", keep_dims=True)
    high = fn.reductions.max(images, axis_names="HW", keep_dims=True)
    flat = low == high
    # In 256ths, which fit 16 bits. The casts keep what there is once a channel from being worked out for each pixel.
    scale = fn.cast(255.0 * 256 / (high - low + flat * 255), dtype=types.UINT16)
    stretched = (images - fn.cast(low * (low != high), dtype=types.UINT8)) * scale
    return fn.lookup_table(stretched, keys=_IN_256THS, values=_ROUNDED, dtype=types.UINT8)


_IN_256THS = list(range(1 << 16))
_ROUNDED = [min(255, (each + 128) // 256) for each in _IN_256THS]


def erase(images: Any, anchor: Any, shape: Any) -> Any:
    """Images (uint8 HWC), each with its box (top, left) + (height, width), CPU nodes float32 [2], filled."""
    return fn.erase(images, anchor=anchor, shape=shape, axis_names="HW", fill_value=erasing.FILL)
