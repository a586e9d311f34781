"""The DALI operators of each decoder, from encoded files to uint8 HWC images, on a GPU or a CPU."""

from typing import Any

from nvidia.dali import fn, types

from fasttrain.pipelines.decoders import Decoder

# No EXIF rotation: boxes are planned from the size in the header, and PIL does not rotate by default either.
_AS_STORED = {"output_type": types.RGB, "adjust_orientation": False, "jpeg_fancy_upsampling": True}
# Pinned threads would compete for their cores with the train loop and with DALI's other threads.
_ON_GPU = {**_AS_STORED, "device": "mixed", "affine": False}


def header_size(encoded: Any) -> Any:
    """Height and width from each file's header, int32 [2], without EXIF rotation.

    The CPU's decoder gets its region from it. When that decoder meets a file without a header that it can parse, its
    other threads may still read the batch, and it crashes now and then (seen with DALI 2.4). This operator fails first,
    and does not crash.
    """
    return fn.cast(fn.peek_image_shape(encoded, adjust_orientation=False)[:2], dtype=types.INT32)


def decode(encoded: Any, size: Any, decoder: Decoder, on_gpu: bool) -> Any:
    """Decode full images. size: their `header_size`. on_gpu: whether the results are on the GPU; if not, the decoder
    must be `cpu`."""
    if decoder.kind == "cpu":
        # Not `fn.decoders.image`: with DALI 2.2 (nvImageCodec 0.8) it reads past the end of a truncated BMP file, and
        # returns arbitrary memory or crashes. `image_slice` gives the same pixels, and an error for a truncated file.
        return _decode_on_cpu(encoded, size * 0, size, on_gpu)
    return fn.decoders.image(encoded, hw_decoder_load=_hardware_load(decoder), **_ON_GPU)


def decode_region(encoded: Any, size: Any, start: Any, shape: Any, decoder: Decoder, on_gpu: bool) -> Any:
    """Decode a region of each image. size: their `header_size`. start (top, left), shape (height, width): CPU nodes
    int32 [2], in pixels."""
    if decoder.kind == "cpu":
        return _decode_on_cpu(encoded, start + size * 0, shape, on_gpu)
    region = {"start": start, "shape": shape, "axis_names": "HW"}
    if decoder.kind == "gpu-region":
        return fn.decoders.image_slice(encoded, hw_decoder_load=0.0, **region, **_ON_GPU)
    return fn.slice(decode(encoded, size, decoder, on_gpu), **region)


def _decode_on_cpu(encoded: Any, start: Any, shape: Any, on_gpu: bool) -> Any:
    images = fn.decoders.image_slice(encoded, device="cpu", start=start, shape=shape, axis_names="HW", **_AS_STORED)
    return images.gpu() if on_gpu else images


def _hardware_load(decoder: Decoder) -> float:
    return decoder.hardware_load if decoder.kind == "gpu-hardware" else 0.0
