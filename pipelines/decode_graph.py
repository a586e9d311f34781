"""The DALI operators of each decoder: encoded files to uint8 HWC images, on a GPU or a CPU."""

from typing import Any

from nvidia.dali import fn, types

from fasttrain.pipelines.decoders import Decoder

# Boxes are planned from the size in the header, which knows nothing of EXIF; PIL does not rotate either.
_AS_STORED = {"output_type": types.RGB, "adjust_orientation": False, "jpeg_fancy_upsampling": True}
_WHOLE: dict[str, Any] = {"rel_start": [0.0, 0.0], "rel_shape": [1.0, 1.0], "axis_names": "HW"}
# Threads that are tied to cores compete with the loop's and DALI's own for the same ones.
_ON_GPU = {**_AS_STORED, "device": "mixed", "affine": False}


def decode(encoded: Any, decoder: Decoder, on_gpu: bool) -> Any:
    """Whole images. on_gpu: where they come out; only then may the decoder be another than `cpu`."""
    if decoder.kind == "cpu":
        # Not `fn.decoders.image`: with DALI 2.2 (nvImageCodec 0.8) it reads past the end of a truncated BMP, and
        # returns what is in memory there or crashes. A region gives the same pixels, and an error for such a file.
        images = fn.decoders.image_slice(encoded, device="cpu", **_WHOLE, **_AS_STORED)
        return images.gpu() if on_gpu else images
    return fn.decoders.image(encoded, hw_decoder_load=_hardware_load(decoder), **_ON_GPU)


def decode_region(encoded: Any, start: Any, shape: Any, decoder: Decoder, on_gpu: bool) -> Any:
    """A region of each image: start (top, left) and shape (height, width), CPU nodes int32 [2], in pixels."""
    region = {"start": start, "shape": shape, "axis_names": "HW"}
    if decoder.kind == "cpu":
        images = fn.decoders.image_slice(encoded, device="cpu", **region, **_AS_STORED)
        return images.gpu() if on_gpu else images
    if decoder.kind == "gpu-region":
        return fn.decoders.image_slice(encoded, hw_decoder_load=0.0, **region, **_ON_GPU)
    return fn.slice(decode(encoded, decoder, on_gpu), **region)


def _hardware_load(decoder: Decoder) -> float:
    return decoder.hardware_load if decoder.kind == "gpu-hardware" else 0.0
