"""Checks image files with two decoders: PIL, and DALI as the training pipelines use it."""

import faulthandler
import hashlib
import io
import os
import re
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import IO, Any, NamedTuple

from fasttrain.data import headers
from fasttrain.data.decode import BATCH_FILES, decode_batch, decoder
from fasttrain.data.process_pool import split_by_cost
from fasttrain.utils.decoder_messages import kinds
from fasttrain.utils.text import printable

_MAX_SIDE, _MIN_SIDE = 16384, 4  # pixels; PIL itself refuses images of more than 179 million pixels
_MAX_BYTES = 2**30
_MAX_SCANS = 500  # each scan of a progressive JPEG takes as long as a full image
CHUNK_FILES, CHUNK_BYTES = BATCH_FILES, 2**26  # at most, per task of a worker
_BATCH_PIXELS = 2**25  # at most, per batch that DALI decodes
_SAMPLE = 256  # rows and columns, at most, on which the decoders' pixels are compared
_CLOSE = 8  # the largest difference, of 255, between decoders that agree; they differ by 2, or 6 for 16-bit BMPs
TIMEOUT_S = 120.0  # per file for PIL, per batch for DALI

KINDS = {
    "JPEG": (rb"\xff\xd8", ("JPEG",), (".jpg", ".jpeg", ".jpe", ".jfif")),
    "PNG": (rb"\x89PNG\r\n\x1a\n", ("PNG",), (".png",)),
    "WebP": (rb"RIFF....WEBP", ("WEBP",), (".webp",)),
    "BMP": (rb"BM", ("BMP",), (".bmp",)),
    "TIFF": (rb"II[*+]\0|MM\0[*+]", ("TIFF",), (".tif", ".tiff")),
    "PNM": (rb"P[56]\s", ("PPM",), (".ppm", ".pgm")),
}
_OTHERS = {
    "GIF": rb"GIF8",
    "AVIF": rb"....ftypavi[fs]",
    "HEIF": rb"....ftyp(hei|hev|mif1|msf1)",
    "JPEG 2000": rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51",
    "JPEG XL": rb"\0\0\0\x0cJXL |\xff\x0a",
    "Photoshop": rb"8BPS",
    "icon": rb"\0\0[\1\2]\0",
    "PNM in text or black and white": rb"P[1-47]\s",
    "PDF": rb"%PDF",
    "SVG": rb"\s*(<\?xml[^>]*>\s*)?<svg",
}
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # not a stuffed byte, a fill byte or a restart marker
_LIBJPEG = re.compile(r"Corrupt JPEG data.*|Premature end of JPEG.*|Inconsistent progression.*")
_ANSI_AND_ADDRESS = re.compile(r"\x1b\[[0-9;]*m| ?<\S+ object at 0x[0-9a-f]+>")


class Task(NamedTuple):
    """A file to check. hashed: whether to hash its content. number: its position among all files. content: of an image
    in a container; else it is read from `path`."""

    path: str
    hashed: bool = False
    number: int = 0
    content: bytes | None = None


Result = tuple[list[tuple[str, str]], bytes | None]  # (kind, reason) pairs, and the hash


class _Decoded(NamedTuple):
    """size: (width, height). sample: some of the pixels, uint8 [rows, columns, 3], evenly spaced."""

    size: tuple[int, int]
    sample: Any


@dataclass
class _File:
    """What is known about a file. data: its content, if DALI should decode it too. kind: a key of KINDS or _OTHERS.
    size: (width, height) as stored. decoded: what PIL decodes. problem: (kind, reason) of damage. notes: (kind, reason)
    of other findings."""

    data: bytes = b""
    kind: str = ""
    size: tuple[int, int] = (0, 0)
    decoded: "_Decoded | None" = None
    problem: tuple[str, str] | None = None
    notes: list[tuple[str, str]] = field(default_factory=list)
    digest: bytes | None = None


def check_files(tasks: Sequence[Task]) -> list[Result]:
    """Read each file once and decode it twice, with PIL and with DALI. Ends the process where a decoder exceeds
    TIMEOUT_S."""
    decoder()  # so that the import of DALI does not count against the timeout
    with _captured_stderr() as captured:

        def restart_timeout() -> None:
            # A C thread ends the process, whatever the decoder is doing.
            faulthandler.dump_traceback_later(TIMEOUT_S, exit=True, file=captured)

        try:
            files = []
            for task in tasks:
                restart_timeout()
                files.append(_check_with_pil(task))
            to_decode = [file for file in files if file.data]
            one_by_one, sound = ([file for file in to_decode if bool(file.problem) == bad] for bad in (True, False))
            for batch in split_by_cost(sound, CHUNK_FILES, lambda file: file.size[0] * file.size[1], _BATCH_PIXELS):
                restart_timeout()
                images, stderr = _decode_with_dali([file.data for file in batch], captured)
                if images and not stderr:
                    for file, image in zip(batch, images, strict=True):
                        _compare(file, image, "")
                else:
                    one_by_one += batch
            for file in one_by_one:
                restart_timeout()
                images, stderr = _decode_with_dali([file.data], captured)
                _compare(file, images[0] if images else None, stderr)
        finally:
            faulthandler.cancel_dump_traceback_later()
    return [(file.notes + ([file.problem] if file.problem else []), file.digest) for file in files]


def first_to_say(message: str, paths: Sequence[str], seconds: float) -> str:
    """The first of these files at whose decoding DALI's decoders say `message`, numbers aside; "" where there is none,
    or none was found in time."""
    import numpy as np

    (wanted,) = kinds(message.encode(errors="replace")) or {b""}
    end = time.monotonic() + seconds
    with _captured_stderr() as captured:
        pending = [list(paths[start : start + BATCH_FILES]) for start in range(0, len(paths), BATCH_FILES)][::-1]
        while pending and time.monotonic() < end:
            some = pending.pop()
            with suppress(OSError):
                _, stderr = _decode_with_dali([np.fromfile(path, np.uint8).tobytes() for path in some], captured)
                if wanted not in kinds(stderr.encode(errors="replace")):
                    continue
                if len(some) == 1:
                    return some[0]
                pending += [[path] for path in reversed(some)]
    return ""


@contextmanager
def _captured_stderr() -> Iterator[IO[bytes]]:
    """Redirect file descriptor 2 to a temporary file: libjpeg and others write their warnings only there."""
    with tempfile.TemporaryFile() as captured:
        stderr = os.dup(2)
        os.dup2(captured.fileno(), 2)
        try:
            yield captured
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def _check_with_pil(task: Task) -> _File:
    """Read and decode a file. `data` stays empty where DALI need not decode it: it is no image, or far too large."""
    file, path, data = _File(), task.path, task.content
    if data is None:
        try:
            with open(path, "rb") as stream:
                data = stream.read(_MAX_BYTES + 1)
        except OSError as error:
            file.problem = ("unreadable", error.strerror or "cannot be read")
            return file
    if not data:
        file.problem = ("empty", "0 bytes")
        return file
    if len(data) > _MAX_BYTES:
        file.problem = ("absurd-size", f"a file of more than {_MAX_BYTES >> 20} MiB; it was not decoded")
        return file
    if task.hashed:
        file.digest = hashlib.blake2b(data, digest_size=16).digest()
    supported, file.kind = sniff(data[:256])
    if not supported:
        file.problem = ("not-an-image", f"no image format starts with {data[:8].hex(' ')}")
        if file.kind:
            file.problem = ("unsupported", f"{file.kind}; training supports {', '.join(KINDS)}")
        return file
    named = path.lower().endswith(headers.EXTENSIONS)  # an image in a container may have no name
    if named and not path.lower().endswith(KINDS[file.kind][2]):
        file.notes.append(("wrong-extension", f"holds a {file.kind}"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _decode_with_pil(file, data)
    return file


def sniff(head: bytes) -> tuple[bool, str]:
    """Whether training supports a file's format, and the format's name, from its first bytes; '' if it is unknown."""
    for name, (pattern, _, _) in KINDS.items():
        if re.match(pattern, head, re.DOTALL):
            return True, name
    return False, next((name for name, pattern in _OTHERS.items() if re.match(pattern, head, re.DOTALL)), "")


def _decode_with_pil(file: _File, data: bytes) -> None:
    from PIL import Image

    formats = KINDS[file.kind][1]
    truncation, scans = _truncation(file.kind, data)
    try:
        with Image.open(io.BytesIO(data), formats=formats) as image:
            file.size = image.size
            if max(file.size) > _MAX_SIDE or min(file.size) < _MIN_SIDE or scans > _MAX_SCANS:
                in_scans = f" in {scans} scans" if scans > _MAX_SCANS else ""
                file.problem = ("absurd-size", f"{file.size[0]} x {file.size[1]} pixels{in_scans}; it was not decoded")
                return
            if problem := headers.unsupported(image):
                file.problem = ("unsupported", problem)
                return
            file.data = data
            tags: Any = getattr(image, "tag_v2", {})  # only TIFFs have it; PIL rotates their pixels in load()
            orientation, tag = tags.get(headers.ORIENTATION, 1), tags.get(headers.BITS, 8)
            bits = max(tag) if isinstance(tag, tuple) else tag
            if file.kind == "PNG":
                bits = data[24]
                with Image.open(io.BytesIO(data), formats=formats) as header:
                    header.verify()  # checks the checksums, which load() does not
            image.load()
            file.decoded = _decoded(_pil_pixels(image, bits, orientation if tags else 1))
            file.size = file.decoded.size
            if image.mode == "CMYK":
                file.notes.append(("cmyk", "converted to RGB without a color profile"))
            if bits > 8:
                file.notes.append(("16-bit", "more than 8 bits per channel; training uses 8"))
            with suppress(Exception):  # broken metadata, which training does not read
                orientation = orientation if tags else image.getexif().get(headers.ORIENTATION, 1)
            if orientation in range(2, 9):
                unlike = ", unlike PIL and torchvision for a TIFF" if tags else ""
                file.notes.append(
                    ("exif-rotated", f"orientation {orientation}; training uses the pixels as stored{unlike}")
                )
    except Image.DecompressionBombError:
        file.problem = ("absurd-size", f"more than {2 * (Image.MAX_IMAGE_PIXELS or 0)} pixels; it was not decoded")
        return
    except Exception as error:  # broken content makes PIL's parsers raise anything
        reason = _one_line(str(error) or type(error).__name__)
        damage = "truncated" if truncation or re.search("truncated|incomplete", reason, re.IGNORECASE) else "corrupt"
        file.problem = (damage, f"{truncation}; PIL: {reason}" if truncation else f"PIL: {reason}")
        return
    if truncation:
        file.problem = ("truncated", f"{truncation}; PIL decodes it")


def _pil_pixels(image: Any, bits: int, orientation: int) -> Any:
    """PIL's pixels as stored, uint8 [H, W, 3]. bits: per channel. orientation: a TIFF's, by which PIL rotated it."""
    import numpy as np
    from PIL.Image import Transpose

    undo = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_90,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_270,
    }
    image = image.transpose(undo[orientation]) if orientation in undo else image
    if image.mode.startswith("I"):  # 16-bit gray, which `convert` would clip
        gray = (np.asarray(image) >> bits - 8).astype(np.uint8)
        return np.repeat(gray[..., None], 3, 2)
    return np.asarray(image.convert("RGB"))


def _decoded(pixels: Any) -> _Decoded:
    """The size and the sample of pixels, uint8 [H, W, 3]."""
    height, width, _ = pixels.shape
    return _Decoded((width, height), pixels[:: -(-height // _SAMPLE), :: -(-width // _SAMPLE)].copy())


def _truncation(kind: str, data: bytes) -> tuple[str, int]:
    """Why a file counts as truncated, or an empty string; and the number of scans of a JPEG."""
    if kind == "JPEG":
        position, scans = 2, 0
        while match := _MARKER.search(data, position):
            position, marker = match.end(), match[0][1]
            if marker == 0xD9:
                return "", scans
            scans += marker == 0xDA
            if marker not in (0x01, 0xD8):  # these two have no length
                position += int.from_bytes(data[position : position + 2])
        # If the file ends with an end-of-image marker, a stray marker before it made the loop miss it.
        return "" if data.endswith(b"\xff\xd9") else "no end-of-image marker", scans
    if kind == "PNG" and b"\0\0\0\0IEND\xaeB`\x82" not in data:
        return "no end chunk", 0
    # Both formats store the file's size.
    size = int.from_bytes(data[2:6] if kind == "BMP" else data[4:8], "little") + (8 if kind == "WebP" else 0)
    if kind in ("BMP", "WebP") and size > len(data):
        return f"{len(data)} of {size} bytes", 0
    return "", 0


def _compare(file: _File, dali: _Decoded | None, stderr: str) -> None:
    """Compare DALI's result, None where it cannot decode the file, with PIL's."""
    warning = _LIBJPEG.search(stderr) if file.kind == "JPEG" else None
    # Lines from OpenCV, DALI's last resort, are dropped: they have times in them.
    lines = [line for line in _ANSI_AND_ADDRESS.sub("", stderr).splitlines() if line and "0@" not in line]
    if file.problem:
        verdict = "DALI decodes it, so training would use the damaged image" if dali else "DALI: cannot decode it"
        file.problem = (file.problem[0], f"{file.problem[1]}; {verdict}")
    elif dali is None:
        gist = f" ({_one_line(lines[0])})" if lines else ""
        file.problem = ("dali-refuses", f"DALI: cannot decode it{gist}; PIL decodes it")
    elif warning:
        file.problem = ("corrupt", f"libjpeg: {_one_line(warning[0])}; PIL and DALI decode it without an error")
    elif dali.size != file.size:
        sizes = f"{file.size[0]} x {file.size[1]} pixels for PIL, {dali.size[0]} x {dali.size[1]} for DALI"
        file.problem = ("corrupt", f"the decoders disagree: {sizes}")
    else:
        if lines:
            file.notes.append(("decoder-warning", _one_line(lines[0])))
        assert file.decoded is not None
        difference = abs(dali.sample.astype(int) - file.decoded.sample)
        if difference.max() > _CLOSE:
            by = f"by up to {difference.max()} of 255, and by {difference.mean():.1f} on average"
            file.problem = ("differs", f"DALI's pixels differ from PIL's {by}; save it as 8-bit RGB")


def _one_line(text: str) -> str:
    """A text as one printable line of at most 200 characters, without addresses, which differ from run to run."""
    line = " ".join(_ANSI_AND_ADDRESS.sub("", text).split())
    return printable(line.encode(errors="replace").decode())[:200]


def _decode_with_dali(contents: Sequence[bytes], captured: IO[bytes]) -> tuple[list[_Decoded], str]:
    """Decode a batch. Returns no images where DALI cannot decode every one; and what was written to stderr."""
    import numpy as np

    os.ftruncate(captured.fileno(), 0)
    os.lseek(captured.fileno(), 0, os.SEEK_SET)
    images = [_decoded(pixels) for pixels in decode_batch([np.frombuffer(content, np.uint8) for content in contents])]
    return images, os.pread(captured.fileno(), 2**16, 0).decode(errors="replace")
