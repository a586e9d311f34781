"""Headers: which kinds of images are taken is decided by comparing DALI's pixels with PIL's."""

import io
import struct
import sys
import warnings
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from nvidia.dali import fn, pipeline_def, types
from PIL import Image

from fasttrain.data.headers import read_header, read_headers
from fasttrain.data.scan import Limits, scan
from fasttrain.utils.errors import UserError

MINISWHITE, MINISBLACK, RGB, PALETTE, SEPARATED, YCBCR, CIELAB = 0, 1, 2, 3, 5, 6, 8  # photometric kinds of TIFF
UINT, INT, FLOAT = 1, 2, 3


def photo(height=40, width=56, channels=6) -> np.ndarray:
    """Smooth uint8 pixels [H, W, C]."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 7 * channels)).astype(np.uint8))
    return np.asarray(coarse.resize((width * channels, height), Image.Resampling.BICUBIC)).reshape(height, width, -1)


def tiff(photometric: int, channels: int, bits: int, planar: bool, sample_format: int, extra: int | None) -> bytes:
    """An uncompressed TIFF of one strip per plane. extra: the kind of the first extra channel; None: no such tag."""
    pixels = photo()[..., :channels]
    if sample_format == FLOAT:
        data = (pixels / 255).astype({16: "<f2", 32: "<f4", 64: "<f8"}[bits])
    else:
        data = (pixels.astype(np.uint64) * ((2**bits - 1) // 255)).astype(f"<u{bits // 8}")
    planes = [data[..., channel].tobytes() for channel in range(channels)] if planar else [data.tobytes()]
    tags: list[tuple[int, int, tuple[int, ...]]] = [
        (256, 4, (pixels.shape[1],)),
        (257, 4, (pixels.shape[0],)),
        (258, 3, (bits,) * channels),
        (259, 3, (1,)),
        (262, 3, (photometric,)),
        (273, 4, (0,) * len(planes)),
        (277, 3, (channels,)),
        (278, 4, (pixels.shape[0],)),
        (279, 4, tuple(map(len, planes))),
        (284, 3, (2 if planar else 1,)),
    ]
    if photometric == PALETTE:
        ramp = np.arange(256) * 257
        tags.append((320, 3, (*ramp.tolist(), *ramp[::-1].tolist(), *np.roll(ramp, 99).tolist())))
    natural = {RGB: 3, SEPARATED: 4, YCBCR: 3, CIELAB: 3}.get(photometric, 1)
    if extra is not None and channels > natural:
        tags.append((338, 3, (extra,) + (0,) * (channels - natural - 1)))
    tags.append((339, 3, (sample_format,) * channels))
    start = 8 + 2 + 12 * len(tags) + 4
    overflow = b""
    entries = b""
    data_start = start + sum(len(values) * (2 if kind == 3 else 4) for _, kind, values in tags)
    for tag, kind, values in tags:
        if tag == 273:
            values = tuple(data_start + sum(map(len, planes[:number])) for number in range(len(planes)))
        packed = struct.pack(f"<{len(values)}{'H' if kind == 3 else 'I'}", *values)
        entries += struct.pack("<HHI", tag, kind, len(values))
        if len(packed) <= 4:
            entries += packed.ljust(4, b"\0")
        else:
            entries += struct.pack("<I", start + len(overflow))
            overflow += packed
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + b"\0" * 4 + overflow
    return head.ljust(data_start, b"\0") + b"".join(planes)


@pipeline_def(batch_size=1, num_threads=1, device_id=None)
def decode_one():
    content = fn.external_source(name="content", dtype=types.UINT8, ndim=1)
    return fn.decoders.image_slice(
        content, rel_start=[0.0, 0.0], rel_shape=[1.0, 1.0], output_type=types.RGB, adjust_orientation=False
    )


def with_dali(content: bytes) -> np.ndarray | None:
    try:
        pipe = decode_one()
        pipe.build()
        pipe.feed_input("content", [np.frombuffer(content, np.uint8)])
        return pipe.run()[0].at(0).astype(int)
    except RuntimeError:
        return None


def with_pil(content: bytes) -> np.ndarray | None:
    """PIL's RGB pixels; the high bytes of 16-bit gray, which PIL would clip. None where PIL cannot decode them."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            if image.mode.startswith("I;16"):
                return np.repeat(np.asarray(image)[..., None] >> 8, 3, 2).astype(int)
            return np.asarray(image.convert("RGB")).astype(int)
    except Exception:
        return None


KINDS = {
    f"{name}, {channels} x {bits}, {layout}": (photometric, channels, bits, layout == "planar", UINT, None)
    for (name, photometric), channels, bits, layout in product(
        {"white is 0": 0, "black is 0": 1, "RGB": 2, "CMYK": 5, "YCbCr": 6, "CIELAB": 8}.items(),
        range(1, 7),
        (8, 16),
        ("contiguous", "planar"),
    )
} | {
    "palette": (PALETTE, 1, 8, False, UINT, None),
    "32 bits": (MINISBLACK, 1, 32, False, UINT, None),
    "signed": (MINISBLACK, 1, 8, False, INT, None),
    "signed, 16": (MINISBLACK, 1, 16, False, INT, None),
    "float": (MINISBLACK, 1, 32, False, FLOAT, None),
    "RGB of floats": (RGB, 3, 32, False, FLOAT, None),
    "gray with alpha": (MINISBLACK, 2, 8, False, UINT, 2),
    "RGBA": (RGB, 4, 8, False, UINT, 2),
    "RGBA, planar": (RGB, 4, 8, True, UINT, 2),
    "RGBA of 16 bits": (RGB, 4, 16, False, UINT, 2),
    "RGB and another": (RGB, 4, 8, False, UINT, 0),
}


def test_every_kind_of_tiff_that_is_taken_has_pils_pixels(tmp_path):
    """And those that are refused are decoded otherwise, or not at all, by one of the two."""
    outcomes = {}
    for name, kind in KINDS.items():
        path = tmp_path / "image.tif"
        path.write_bytes(tiff(*kind))
        header, pil, dali = read_header(str(path)), with_pil(path.read_bytes()), with_dali(path.read_bytes())
        same = pil is not None and dali is not None and pil.shape == dali.shape and abs(pil - dali).max() <= 2
        outcomes[name] = (not header.problem, same)
        assert header[:2] == ((0, 0) if header.problem else (40, 56)), name
    del outcomes["RGB, 4 x 8, planar"]  # refused like one with alpha, whose pixels differ
    wrong = {name: outcome for name, outcome in outcomes.items() if outcome[0] != outcome[1]}
    assert not wrong, "\n".join(map(str, wrong.items()))
    assert sum(taken for taken, _ in outcomes.values()) >= 10


@pytest.mark.parametrize("extension", ["ppm", "pgm"])
def test_binary_pnm_files_have_pils_pixels(tmp_path, extension):
    path = tmp_path / f"image.{extension}"
    pixels = photo()[..., : 3 if extension == "ppm" else 1].squeeze()
    Image.fromarray(pixels).save(path)
    assert read_header(str(path)) == (40, 56, "")
    assert np.array_equal(with_dali(path.read_bytes()), with_pil(path.read_bytes()))
    path.write_bytes(b"P2\n2 1\n255\n7 8\n" if extension == "pgm" else b"P5\n2 1\n100\n\7\10")
    assert "PNM" in read_header(str(path)).problem


def test_images_with_too_many_pixels_are_refused_by_the_setting(tmp_path):
    """A valid JPEG of 182 million pixels, of which PIL alone would say nothing but that it may be an attack."""
    for name in ("ape", "yak"):
        (tmp_path / "set" / name).mkdir(parents=True)
        Image.new("RGB", (8, 6)).save(tmp_path / "set" / name / "small.jpg")
    large = tmp_path / "set" / "ape" / "large.jpg"
    Image.new("L", (14000, 13000)).save(large)
    with pytest.raises(UserError) as error:
        scan(tmp_path / "set")
    message = f"cannot use the image {large}: it has 14000 x 13000 pixels, 182.0 million, more than data.max_megapixels"
    assert str(error.value).startswith(message)
    assert scan(tmp_path / "set", limits=Limits(max_megapixels=200)).sizes.tolist()[0] == [13000, 14000]
    index = scan(tmp_path / "set", keep_unreadable=True)
    assert index.sizes.tolist()[0] == [0, 0] and "182.0 million" in index.problems[0]


def test_pils_warnings_are_one_line_per_kind_with_a_file(tmp_path, capsys):
    paths = []
    for number in range(4):
        Image.new("RGB", (8, 6)).save(tmp_path / f"{number}.tif")
        paths.append(str(tmp_path / f"{number}.tif"))

    def warn(*_: object, **__: object) -> object:
        warnings.warn("Truncated File Read", stacklevel=1)
        return original(*_, **__)

    original = Image.open
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image, "open", warn)
        sizes, problems = read_headers(paths, progress=False)
    assert sizes.tolist() == [[6, 8]] * 4 and not problems
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].endswith(": Truncated File Read (PIL; shown once)")
    assert Path(lines[0].split(":")[0]).parent == tmp_path and "site-packages" not in lines[0]
    assert sys.modules["PIL.Image"].MAX_IMAGE_PIXELS
