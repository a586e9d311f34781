"""What two decoders, PIL's and the training pipelines' own, say of an image file."""

import faulthandler
import functools
import hashlib
import io
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import IO, Any

from fasttrain.data.process_pool import groups
from fasttrain.utils.text import printable

_MOST_SIDE, _LEAST_SIDE = 16384, 4  # pixels; PIL itself refuses areas beyond 179 million
_MOST_BYTES = 2**30
_MOST_SCANS = 500  # each scan of a progressive JPEG costs as much as a whole picture
CHUNK, CHUNK_BYTES, _BATCH_PIXELS = 32, 2**26, 2**25  # what a worker takes, and DALI decodes, at once
SECONDS = 120.0  # a file, or a batch of DALI's, gets no more

KINDS = {
    "JPEG": (rb"\xff\xd8", ("JPEG", "MPO"), (".jpg", ".jpeg", ".jpe", ".jfif")),
    "PNG": (rb"\x89PNG\r\n\x1a\n", ("PNG",), (".png",)),
    "WebP": (rb"RIFF....WEBP", ("WEBP",), (".webp",)),
    "BMP": (rb"BM", ("BMP",), (".bmp",)),
    "TIFF": (rb"II[*+]\0|MM\0[*+]", ("TIFF",), (".tif", ".tiff")),
}
_OTHERS = {
    "GIF": rb"GIF8",
    "AVIF": rb"....ftypavi[fs]",
    "HEIF": rb"....ftyp(hei|hev|mif1|msf1)",
    "JPEG 2000": rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51",
    "JPEG XL": rb"\0\0\0\x0cJXL |\xff\x0a",
    "Photoshop": rb"8BPS",
    "icon": rb"\0\0[\1\2]\0",
    "PNM": rb"P[1-7]\s",
    "PDF": rb"%PDF",
    "SVG": rb"\s*(<\?xml[^>]*>\s*)?<svg",
}
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # neither a stuffed byte, nor fill, nor a restart
_LIBJPEG = re.compile(r"Corrupt JPEG data.*|Premature end of JPEG.*|Inconsistent progression.*")
_ANSI_AND_ADDRESS = re.compile(r"\x1b\[[0-9;]*m| ?<\S+ object at 0x[0-9a-f]+>")

Task = tuple[str, bool]  # a file's path, and whether a digest of its content is wanted
Verdict = tuple[list[tuple[str, str]], bytes | None]  # (kind, reason) pairs, and that digest


@dataclass
class _Look:
    """What PIL makes of a file. data: its content where DALI is to be asked too; size: (width, height) as stored;
    problem: (kind, reason) of damage."""

    data: bytes = b""
    kind: str = ""
    size: tuple[int, int] = (0, 0)
    problem: tuple[str, str] | None = None
    notes: list[tuple[str, str]] = field(default_factory=list)
    digest: bytes | None = None


def read(tasks: Sequence[Task]) -> list[Verdict]:
    """A worker's part: each file is read once and decoded twice, by PIL and by DALI."""
    _decoder()  # DALI's import counts as the start of the process, not as a file's time
    with _stderr_aside() as aside:

        def in_time() -> None:
            # A thread of C ends the process, whatever its decoder is doing.
            faulthandler.dump_traceback_later(SECONDS, exit=True, file=aside)

        try:
            looks = []
            for task in tasks:
                in_time()
                looks.append(_look(task))
            asked = [look for look in looks if look.data]
            singly, sound = ([look for look in asked if bool(look.problem) == bad] for bad in (True, False))
            for batch in groups(sound, CHUNK, lambda look: look.size[0] * look.size[1], _BATCH_PIXELS):
                in_time()
                shapes, said = _decode([look.data for look in batch], aside)
                if shapes and not _LIBJPEG.search(said):
                    for look, shape in zip(batch, shapes, strict=True):
                        _compare(look, shape, "")
                else:
                    singly += batch
            for look in singly:
                in_time()
                shapes, said = _decode([look.data], aside)
                _compare(look, shapes[0] if shapes else None, said)
        finally:
            faulthandler.cancel_dump_traceback_later()
    return [(look.notes + ([look.problem] if look.problem else []), look.digest) for look in looks]


@contextmanager
def _stderr_aside() -> Iterator[IO[bytes]]:
    """libjpeg and others write their warnings to file descriptor 2, and only there: a file takes its place."""
    with tempfile.TemporaryFile() as file:
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield file
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def _look(task: Task) -> _Look:
    """PIL's verdict. `data` stays empty where DALI is not to be asked: there is no picture, or one far too large."""
    look, (path, hashed) = _Look(), task
    try:
        with open(path, "rb") as file:
            data = file.read(_MOST_BYTES + 1)
    except OSError as error:
        look.problem = ("unreadable", error.strerror or "cannot be read")
        return look
    if not data:
        look.problem = ("empty", "0 bytes")
        return look
    if len(data) > _MOST_BYTES:
        look.problem = ("absurd-size", f"a file of more than {_MOST_BYTES >> 20} MiB; it was not decoded")
        return look
    if hashed:
        look.digest = hashlib.blake2b(data, digest_size=16).digest()
    known, look.kind = sniff(data[:256])
    if not known:
        look.problem = ("not-an-image", f"no kind of image starts with {data[:8].hex(' ')}")
        if look.kind:
            look.problem = ("unsupported", f"{look.kind}; training takes {', '.join(KINDS)}")
        return look
    if not path.lower().endswith(KINDS[look.kind][2]):
        look.notes.append(("wrong-extension", f"holds a {look.kind}"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _decode_with_pil(look, data)
    return look


def sniff(head: bytes) -> tuple[bool, str]:
    """Whether training takes this kind of image, and the kind's name by its first bytes, or nothing."""
    for name, (pattern, _, _) in KINDS.items():
        if re.match(pattern, head, re.DOTALL):
            return True, name
    return False, next((name for name, pattern in _OTHERS.items() if re.match(pattern, head, re.DOTALL)), "")


def _decode_with_pil(look: _Look, data: bytes) -> None:
    from PIL import Image

    formats = KINDS[look.kind][1]
    cut, scans = _cut_short(look.kind, data)
    try:
        with Image.open(io.BytesIO(data), formats=formats) as image:
            look.size = image.size
            if max(look.size) > _MOST_SIDE or min(look.size) < _LEAST_SIDE or scans > _MOST_SCANS:
                scanned = f" in {scans} scans" if scans > _MOST_SCANS else ""
                look.problem = ("absurd-size", f"{look.size[0]} x {look.size[1]} pixels{scanned}; it was not decoded")
                return
            look.data = data
            tags: Any = getattr(image, "tag_v2", {})  # of a TIFF; PIL turns its pixels in load()
            turned, bits = tags.get(274, 1), tags.get(258, 8)
            if tags and turned in range(5, 9):
                look.size = look.size[::-1]  # PIL tells the size after the turn
            deep = max(bits if isinstance(bits, tuple) else (bits,)) > 8 or (look.kind == "PNG" and data[24] == 16)
            if look.kind == "PNG":
                with Image.open(io.BytesIO(data), formats=formats) as header:
                    header.verify()  # the checksums, which load() does not look at
            image.load()
            if image.mode == "CMYK":
                look.notes.append(("cmyk", "converted to RGB without a colour profile"))
            if deep:
                look.notes.append(("16-bit", "more than 8 bits a channel; training takes 8"))
            with suppress(Exception):  # of broken metadata, which training does not look at
                turned = turned if tags else image.getexif().get(274, 1)
            if turned in range(2, 9):
                look.notes.append(("exif-rotated", f"orientation {turned}; training takes the pixels as stored"))
    except Image.DecompressionBombError:
        look.problem = ("absurd-size", f"more than {2 * (Image.MAX_IMAGE_PIXELS or 0)} pixels; it was not decoded")
        return
    except Exception as error:  # PIL raises whatever broken content leads its parsers to
        reason = _plain(str(error) or type(error).__name__)
        damage = "truncated" if cut or re.search("truncated|incomplete", reason, re.IGNORECASE) else "corrupt"
        look.problem = (damage, f"{cut}; PIL: {reason}" if cut else f"PIL: {reason}")
        return
    if cut:
        look.problem = ("truncated", f"{cut}; PIL decodes it")


def _cut_short(kind: str, data: bytes) -> tuple[str, int]:
    """What shows that the end of a file is missing, or nothing; and the number of scans of a JPEG."""
    if kind == "JPEG":
        at, scans = 2, 0
        while found := _MARKER.search(data, at):
            at, marker = found.end(), found[0][1]
            if marker == 0xD9:
                return "", scans
            scans += marker == 0xDA
            if marker not in (0x01, 0xD8):  # these two have no length
                at += int.from_bytes(data[at : at + 2])
        # With one at the very end, it is a stray marker in the middle that hides the rest.
        return "" if data.endswith(b"\xff\xd9") else "no end-of-image marker", scans
    if kind == "PNG" and b"\0\0\0\0IEND\xaeB`\x82" not in data:
        return "no end chunk", 0
    # Both formats tell the file's size.
    size = int.from_bytes(data[2:6] if kind == "BMP" else data[4:8], "little") + (8 if kind == "WebP" else 0)
    if kind in ("BMP", "WebP") and size > len(data):
        return f"{len(data)} of {size} bytes", 0
    return "", 0


def _compare(look: _Look, shape: Sequence[int] | None, said: str) -> None:
    """Add DALI's verdict to PIL's: the decoded shape (height, width, 3) or None, and what was written meanwhile."""
    warned = _LIBJPEG.search(said) if look.kind == "JPEG" else None
    if look.problem:
        verdict = "DALI decodes it, so that training would take what there is" if shape else "DALI: cannot decode it"
        look.problem = (look.problem[0], f"{look.problem[1]}; {verdict}")
    elif shape is None:
        # OpenCV's lines, which DALI turns to last, have times in them.
        lines = [line for line in _ANSI_AND_ADDRESS.sub("", said).splitlines() if line and "0@" not in line]
        gist = f" ({_plain(lines[0])})" if lines else ""
        look.problem = ("dali-refuses", f"DALI: cannot decode it{gist}; PIL decodes it")
    elif warned:
        look.problem = ("corrupt", f"libjpeg: {_plain(warned[0])}; PIL and DALI decode it in silence")
    elif tuple(shape[1::-1]) != look.size:
        sizes = f"{look.size[0]} x {look.size[1]} pixels for PIL, {shape[1]} x {shape[0]} for DALI"
        look.problem = ("corrupt", f"the decoders disagree: {sizes}")


def _plain(text: str) -> str:
    """One printable line without what differs from run to run."""
    line = " ".join(_ANSI_AND_ADDRESS.sub("", text).split())
    return printable(line.encode(errors="replace").decode())[:200]


@functools.cache
def _decoder() -> Any:
    """DALI's decoder as the pipelines use it on the host (pipelines/decode_graph.py, which is above this room), for the
    contents of up to CHUNK files."""
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=CHUNK, num_threads=1, device_id=None, prefetch_queue_depth=1, exec_dynamic=True)
    def decode() -> Any:
        content = fn.external_source(name="content", dtype=types.UINT8, ndim=1)
        whole: dict[str, Any] = {"rel_start": [0.0, 0.0], "rel_shape": [1.0, 1.0], "axis_names": "HW"}
        return fn.decoders.image_slice(content, **whole, output_type=types.RGB, adjust_orientation=False)

    pipe = decode()
    pipe.build()
    return pipe


def _decode(contents: Sequence[bytes], aside: IO[bytes]) -> tuple[list[Sequence[int]], str]:
    """Shapes (height, width, 3) of what DALI decodes, none where it cannot decode all; and what was written to fd 2."""
    import numpy as np

    os.ftruncate(aside.fileno(), 0)
    os.lseek(aside.fileno(), 0, os.SEEK_SET)
    try:
        pipe = _decoder()
        pipe.feed_input("content", [np.frombuffer(content, np.uint8) for content in contents])
        shapes = list(pipe.run()[0].shape())
    except Exception:  # DALI's reason is a number, or nothing
        _decoder.cache_clear()  # after some errors a pipeline fails for ever
        shapes = []
    return shapes, os.pread(aside.fileno(), 2**16, 0).decode(errors="replace")
