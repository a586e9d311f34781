"""`data check`: read every file of a data set with two decoders, say what is wrong, and move bad files aside.

Bad is what training would fail on or be misled by: `empty`, `truncated`, `corrupt`, `crash` (it kills its decoder, or
keeps it busy for minutes), `dali-refuses` (PIL reads it, DALI does not), `not-an-image`, `unsupported`, `absurd-size`,
`unreadable`, `empty-class`; and `duplicate` where the copies have different labels (all of them are bad) or are in both
train and val (those in train are bad). All else is a remark: `wrong-extension` (DALI goes by content), `exif-rotated`
(training takes the pixels as stored), `cmyk` and `16-bit` (converted to 8-bit RGB), `duplicate` within a class,
`not-utf8`, and what training leaves out: `stray`, `hidden`, `link-loop`, `link-out`, `broken-link`.
"""

import errno
import faulthandler
import filecmp
import functools
import hashlib
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import stat
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

from fasttrain.dataset import EXTENSIONS, _is_split, shown
from fasttrain.errors import UserError

_BAD = {"empty", "truncated", "corrupt", "crash", "dali-refuses", "not-an-image", "unsupported", "absurd-size"}
_BAD |= {"unreadable", "empty-class"}
LIMITS = (
    "Not seen by this check: changed bytes that still decode. Of a JPEG's, libjpeg notices about one single bit in "
    "four and nine in ten blocks of 512 zeroed bytes; in the pixels of a WebP, BMP or TIFF hardly anything is noticed. "
    "Only a manifest of hashes, made while the files were known to be good, finds the rest. Nor does it look for wrong "
    "labels, for copies that are not equal byte for byte, or at the second and later images in a file."
)
_MOST_SIDE, _LEAST_SIDE = 16384, 4  # pixels; PIL itself refuses areas beyond 179 million
_MOST_BYTES = 2**30
_MOST_SCANS = 500  # each scan of a progressive JPEG costs as much as a whole picture
_CHUNK, _CHUNK_BYTES, _BATCH_PIXELS = 32, 2**26, 2**25  # what a worker takes, and DALI decodes, at once
_SECONDS = 120.0  # a file, or a batch of DALI's, gets no more
_MANIFEST = "restore.json"

_KINDS = {
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
T = TypeVar("T")


@dataclass(frozen=True, order=True)
class Finding:
    """Something about a file or class folder. path: relative to the report's folder, with `/`, as the file system has
    it (undecodable bytes as surrogates); kind: one of this module's list; reason: one printable line."""

    path: str
    kind: str
    reason: str
    bad: bool


@dataclass(frozen=True)
class Report:
    """What `examine` found. files: image files that were read; seconds: how long all took; findings: sorted."""

    folder: Path
    files: int
    seconds: float
    findings: tuple[Finding, ...]

    @property
    def rate(self) -> float:
        """Files a second."""
        return self.files / max(self.seconds, 1e-9)

    @property
    def bad(self) -> tuple[Finding, ...]:
        """Those of the findings that training would fail on or be misled by."""
        return tuple(each for each in self.findings if each.bad)

    def to_json(self) -> str:
        """The report as JSON in ASCII. Paths are escaped as everywhere on screen."""
        rows = [vars(each) | {"path": shown(each.path)} for each in self.findings]
        head = {"fasttrain_check": 1, "folder": shown(self.folder), "files": self.files}
        head |= {"seconds": round(self.seconds, 3), "files_per_second": round(self.rate, 1), "limits": LIMITS}
        return json.dumps(head | {"findings": rows}, indent=1) + "\n"

    def text(self) -> str:
        """The report for a terminal: a line for each finding, counts, the rate, and what the check cannot see."""
        lines = [f"{'BAD ' if f.bad else 'note'}  {shown(f.path)}: {f.kind}: {f.reason}" for f in self.findings]
        for bad, what in ((True, "bad"), (False, "remarks")):
            counts = Counter(each.kind for each in self.findings if each.bad == bad)
            listed = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
            lines.append(f"{what}: {listed or 'none'}")
        lines.append(f"{self.files} image files read in {self.seconds:.1f} s, {self.rate:.0f} a second")
        return "\n".join([*lines, LIMITS])


class _File(NamedTuple):
    """An image file to read. label: its class; split: `train/`, `val/` or nothing; size: in bytes."""

    path: str
    relative: str
    split: str
    label: str
    size: int


_Task = tuple[str, bool]  # a file's path, and whether a digest of its content is wanted
_Verdict = tuple[list[tuple[str, str]], bytes | None]  # (kind, reason) pairs, and that digest


def examine(folder: str | Path, workers: int = 0, progress: bool = True) -> Report:
    """Read all files of DIR/<class>/, or of DIR/train/<class>/ and DIR/val/<class>/ where DIR holds those.

    workers: processes that decode; 0 stands for one a core. Raises UserError where the folder cannot be listed, has no
    class folders, or the processes do not start; nothing that a file holds makes it raise.
    """
    from tqdm import tqdm

    start, root = time.perf_counter(), Path(folder)
    if not root.is_dir():
        raise UserError(f"no such folder: {shown(root)}")
    findings: list[Finding] = []
    files: list[_File] = []
    try:
        inside = [split for split in ("train", "val") if _is_split(root / split)]
        for split in [f"{each}/" for each in inside] if "train" in inside else [""]:
            files += _walk(root, split, findings)
    except OSError as error:
        raise UserError(f"cannot read the folder {shown(error.filename or root)}: {error.strerror}") from None
    bytes_of = Counter(file.size for file in files)
    tasks: dict[_Task, _File] = {(file.path, bytes_of[file.size] > 1): file for file in files}
    workers = workers or len(os.sched_getaffinity(0))
    # Several chunks a worker, so that all finish at about the same time.
    most = max(1, min(_CHUNK, len(tasks) // (4 * workers)))
    chunks = _groups(list(tasks), most, lambda task: tasks[task].size, _CHUNK_BYTES)
    copies: defaultdict[bytes, list[_File]] = defaultdict(list)
    # `disable=None` hides the bar where stderr is not a terminal.
    with tqdm(total=len(files), desc="checking", unit="file", disable=None if progress else True) as bar:
        for task, verdict in _in_processes(_read, chunks, workers):
            file = tasks[task]
            lost = [("crash", f"its decoder died, ran out of memory, or was not done within {_SECONDS:.0f} s")]
            notes, digest = verdict or (lost, None)
            findings += [Finding(file.relative, kind, reason, kind in _BAD) for kind, reason in notes]
            if digest:
                copies[digest].append(file)
            bar.update()
    for group in copies.values():
        findings += _duplicates(sorted(group, key=lambda file: file.relative))
    return Report(root, len(files), time.perf_counter() - start, tuple(sorted(findings)))


def _walk(root: Path, split: str, findings: list[Finding]) -> list[_File]:
    """The image files that training would take from root/split, and findings on everything else there."""
    real_root = os.path.realpath(root / split)
    files: list[_File] = []

    def note(path: str, kind: str, reason: str) -> None:
        findings.append(Finding(path, kind, reason, kind in _BAD))

    def visible(folder: str) -> Iterator[tuple[os.DirEntry[str], os.stat_result, str]]:
        with os.scandir(root / folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
        for entry in entries:
            path = folder + entry.name
            if re.search("[\udc80-\udcff]", entry.name):
                note(path, "not-utf8", "the name is not UTF-8; other programs may not find the file")
            if entry.name.startswith("."):
                note(path, "hidden", "training leaves it out")
                continue
            try:
                info = entry.stat()
            except OSError as error:
                kind = {errno.ELOOP: "link-loop", errno.ENOENT: "broken-link"}.get(error.errno or 0, "unreadable")
                note(path, kind, error.strerror or "cannot be looked at")
                continue
            real = os.path.realpath(entry.path)
            if entry.is_symlink() and f"{os.path.realpath(root / folder)}/".startswith(f"{real}/"):
                note(path, "link-loop", "a link to a folder that it is in; training leaves it out")
            elif entry.is_symlink() and not real.startswith(real_root + os.sep):
                note(path, "link-out", f"leads to {shown(real)}; training leaves it out")
            else:
                yield entry, info, path

    classes = 0
    for entry, info, path in visible(split):
        if not stat.S_ISDIR(info.st_mode):
            note(path, "stray", "a file beside the class folders; training leaves it out")
            continue
        classes += 1
        before = len(files)
        try:
            for file, about, below in visible(f"{path}/"):
                if stat.S_ISDIR(about.st_mode):
                    note(below, "stray", "a folder in a class folder; training leaves it and its files out")
                elif not file.name.lower().endswith(EXTENSIONS):
                    note(below, *_left_out(file.path, about))
                elif not stat.S_ISREG(about.st_mode):
                    note(below, "not-an-image", "a pipe, socket or device, not a file")
                else:
                    files.append(_File(file.path, below, split, entry.name, about.st_size))
        except OSError as error:
            note(path, "unreadable", error.strerror or "cannot be listed")
        else:
            if len(files) == before:
                note(path, "empty-class", "no image files directly in it; training refuses to start")
    if not classes:
        place = shown(root / split)
        raise UserError(f"{place} has no class folders; images belong in {place}/<class>/<image>")
    return files


def _left_out(path: str, info: os.stat_result) -> tuple[str, str]:
    """Kind and reason for a file whose extension is not an image's."""
    head = b""
    if stat.S_ISREG(info.st_mode):
        with suppress(OSError), open(path, "rb") as file:
            head = file.read(256)
    known, name = _sniff(head)
    if known:
        return "wrong-extension", f"holds a {name}, but training leaves files of this extension out"
    if name:
        return "unsupported", f"{name}; training takes {', '.join(_KINDS)}"
    return "stray", "not an image by its extension; training leaves it out"


def _duplicates(group: Sequence[_File]) -> Iterator[Finding]:
    """Findings on files of equal content, sorted by path."""
    for file in group:
        others = [each for each in group if each.label != file.label]
        if others:
            many = f" and {len(others) - 1} more" if len(others) > 1 else ""
            reason = f"same content as {shown(others[0].relative)}{many}, which has another label"
            yield Finding(file.relative, "duplicate", reason, True)
            continue
        held_out = [each for each in group if each.split == "val/" != file.split]
        first = next(each for each in group if each.split == file.split)
        if held_out:
            reason = f"same content as {shown(held_out[0].relative)}: in train and in val"
            yield Finding(file.relative, "duplicate", reason, True)
        elif file is not first:
            yield Finding(file.relative, "duplicate", f"same content as {shown(first.relative)}", False)


def _groups(items: Sequence[T], most: int, cost: Callable[[T], int], most_cost: int) -> Iterator[list[T]]:
    """The items in order, in groups of at most `most`, which cost at most so much unless one item alone does."""
    group: list[T] = []
    spent = 0
    for item in items:
        if group and (len(group) == most or spent + cost(item) > most_cost):
            yield group
            group, spent = [], 0
        group.append(item)
        spent += cost(item)
    if group:
        yield group


Work = Callable[[Sequence[Any]], Sequence[T]]


def _in_processes(work: Work[T], chunks: Iterator[list[Any]], workers: int) -> Iterator[tuple[Any, T | None]]:
    """Each item of the chunks with what `work` says of it, in the order in which processes finish their chunks.

    When a process dies, its pool is lost. The chunks that were under way are then done again one item at a time, and
    an item whose process dies again has None. UserError where a process dies with nothing to do.
    """
    waiting, pool = chunks, None
    running: dict[Future[Sequence[T]], list[Any]] = {}
    try:
        while True:
            for chunk in islice(waiting, 2 * workers - len(running)):
                pool = pool or _pool(work, workers)
                try:
                    running[pool.submit(work, chunk)] = chunk
                except BrokenProcessPool as error:
                    future: Future[Sequence[T]] = Future()
                    future.set_exception(error)
                    running[future] = chunk
            if not running or not pool:
                return
            broken = []
            for future in wait(running, return_when="FIRST_COMPLETED").done:
                chunk = running.pop(future)
                if isinstance(future.exception(), BrokenProcessPool):
                    broken.append(chunk)
                else:
                    yield from zip(chunk, future.result(), strict=True)
            if broken:
                # The rest of `running` fails too; what is done already is only done again.
                items = [item for chunk in [*broken, *running.values()] for item in chunk]
                running.clear()
                pool.shutdown(cancel_futures=True)
                pool = None
                for item in items:
                    pool = pool or _pool(work, 1)
                    try:
                        yield item, pool.submit(work, [item]).result()[0]
                    except BrokenProcessPool:
                        pool.shutdown()
                        pool = None
                        yield item, None
                if pool:
                    pool.shutdown()
                    pool = None
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)


def _pool(work: Work[T], workers: int) -> ProcessPoolExecutor:
    # An interrupt of the terminal goes to all processes, and the first one ends the others.
    ignore = (signal.SIGINT, signal.SIG_IGN)
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), signal.signal, ignore)
    try:
        pool.submit(work, []).result()
    except BrokenProcessPool:
        raise UserError("the processes that decode do not start; is there too little memory?") from None
    return pool


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


def _read(tasks: Sequence[_Task]) -> list[_Verdict]:
    """A worker's part: each file is read once and decoded twice, by PIL and by DALI."""
    _decoder()  # DALI's import counts as the start of the process, not as a file's time
    with _stderr_aside() as aside:

        def in_time() -> None:
            # A thread of C ends the process, whatever its decoder is doing.
            faulthandler.dump_traceback_later(_SECONDS, exit=True, file=aside)

        try:
            looks = []
            for task in tasks:
                in_time()
                looks.append(_look(task))
            asked = [look for look in looks if look.data]
            singly, sound = ([look for look in asked if bool(look.problem) == bad] for bad in (True, False))
            for batch in _groups(sound, _CHUNK, lambda look: look.size[0] * look.size[1], _BATCH_PIXELS):
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


def _look(task: _Task) -> _Look:
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
    known, look.kind = _sniff(data[:256])
    if not known:
        look.problem = ("not-an-image", f"no kind of image starts with {data[:8].hex(' ')}")
        if look.kind:
            look.problem = ("unsupported", f"{look.kind}; training takes {', '.join(_KINDS)}")
        return look
    if not path.lower().endswith(_KINDS[look.kind][2]):
        look.notes.append(("wrong-extension", f"holds a {look.kind}"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _decode_with_pil(look, data)
    return look


def _sniff(head: bytes) -> tuple[bool, str]:
    """Whether training takes this kind of image, and the kind's name by its first bytes, or nothing."""
    for name, (pattern, _, _) in _KINDS.items():
        if re.match(pattern, head, re.DOTALL):
            return True, name
    return False, next((name for name, pattern in _OTHERS.items() if re.match(pattern, head, re.DOTALL)), "")


def _decode_with_pil(look: _Look, data: bytes) -> None:
    from PIL import Image

    formats = _KINDS[look.kind][1]
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
    return shown(line.encode(errors="replace").decode())[:200]


@functools.cache
def _decoder() -> Any:
    """DALI's decoder as the training pipelines use it, for the contents of up to _CHUNK files."""
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=_CHUNK, num_threads=1, device_id=None, prefetch_queue_depth=1, exec_dynamic=True)
    def decode() -> Any:
        content = fn.external_source(name="content", dtype=types.UINT8, ndim=1)
        return fn.decoders.image(content, output_type=types.RGB, adjust_orientation=False)

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


def write_report(report: Report, path: str | Path) -> None:
    """Write the report as JSON, aside first. UserError where `path` holds anything but such a report, or on failure."""
    path = Path(path)
    if os.path.lexists(path) and "fasttrain_check" not in _read_json(path):
        raise UserError(f"{shown(path)} is there and is no report of a check; name another file")
    try:
        _write_aside(path, report.to_json())
    except OSError as error:
        raise UserError(f"cannot write {shown(path)}: {error.strerror}") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _write_aside(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with aside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def quarantine(report: Report, aside: str | Path) -> int:
    """Move the bad files of a report to `aside`/<path in the report>; `restore` moves them back. Returns how many.

    `aside`/restore.json lists all moves before the first is made: a file is at `to` where that exists, otherwise it is
    still at `from`. Class folders stay. UserError where `aside` lies in the folder itself or holds other things, or
    where a file cannot be moved (it is then where it was).
    """
    root, place = os.path.realpath(report.folder), Path(os.path.realpath(aside))
    if f"{place}/".startswith(f"{root}/"):
        raise UserError(f"{shown(aside)} is inside {shown(root)}; name a folder elsewhere")
    if os.path.lexists(place) and not (place.is_dir() and (_moves(place) is not None or not any(place.iterdir()))):
        raise UserError(f"{shown(aside)} is neither empty nor a quarantine; name another folder")
    moves = {to: source for to, source in (_moves(place) or {}).items() if os.path.lexists(place / to)}
    planned: dict[str, str] = {}
    for path in sorted({each.path for each in report.bad}):
        source, to = os.path.join(root, path), path
        while to in moves:  # a file of the same name was moved before
            to += ".again"
        if os.path.lexists(source) and (os.path.islink(source) or not os.path.isdir(source)):
            planned[to] = source
    if not planned:
        return 0
    try:
        place.mkdir(parents=True, exist_ok=True)
        _write_moves(place, moves | planned)
        for to, source in planned.items():
            if os.path.lexists(source):  # else it was reached twice, through a link
                _move(source, str(place / to))
    except OSError as error:
        why = f"{shown(error.filename or '')} {error.strerror or error}".strip()
        raise UserError(f"cannot move bad files to {shown(aside)}: {why}") from None
    return sum(os.path.lexists(place / to) for to in planned)


def restore(aside: str | Path) -> int:
    """Move the files of a quarantine back and remove what is then empty. Returns how many went back.

    UserError where there is no quarantine, or where files could not go back: nothing is overwritten, they stay.
    """
    place = Path(os.path.realpath(aside))
    moves = _moves(place)
    if moves is None:
        raise UserError(f"{shown(aside)} is no quarantine: {_MANIFEST} is missing or damaged")
    count, stay = 0, {}
    for to, source in moves.items():
        held = str(place / to)
        try:
            _remove(_partial(held))  # of a move that was killed
            if not os.path.lexists(held):
                continue  # it never left, or is back already
            if not os.path.lexists(source):
                _move(held, source)
            elif not os.path.islink(held) and os.path.isfile(source) and filecmp.cmp(held, source, shallow=False):
                os.unlink(held)  # the move was cut short between the copy and the removal
            else:
                raise FileExistsError(errno.EEXIST, "the place is taken", source)
            count += 1
        except OSError as error:
            stay[to] = (source, error.strerror or str(error))
    try:
        if stay:
            _write_moves(place, {to: source for to, (source, _) in stay.items()})
        else:
            (place / _MANIFEST).unlink()
    except OSError as error:
        raise UserError(f"cannot write {shown(place / _MANIFEST)}: {error.strerror}") from None
    for folder, _, _ in os.walk(place, topdown=False):
        with suppress(OSError):  # not empty
            os.rmdir(folder)
    if stay:
        source, why = next(iter(stay.values()))
        raise UserError(f"{len(stay)} files stay in {shown(aside)}; the first belongs at {shown(source)}: {why}")
    return count


def _moves(place: Path) -> dict[str, str] | None:
    """The moves of a quarantine: {path relative to it: absolute path before}, or None where there are none to read."""
    try:
        rows = [(os.fsdecode(bytes.fromhex(row["to_bytes"])), row["from_bytes"])
                for row in _read_json(place / _MANIFEST)["moves"]]  # fmt: skip
        moves = {to: os.fsdecode(bytes.fromhex(source)) for to, source in rows}
    except (KeyError, TypeError, ValueError):
        return None
    inside = all(os.path.isabs(source) and ".." not in Path(to).parts and not os.path.isabs(to)
                 for to, source in moves.items())  # fmt: skip
    return moves if inside else None


def _write_moves(place: Path, moves: dict[str, str]) -> None:
    """Paths are there twice: escaped, to be read by people, and as their bytes in hexadecimal."""
    rows = [
        {"from": shown(source), "to": shown(to), "from_bytes": os.fsencode(source).hex(),
         "to_bytes": os.fsencode(to).hex()}
        for to, source in moves.items()
    ]  # fmt: skip
    _write_aside(place / _MANIFEST, json.dumps({"moves": rows}, indent=1) + "\n")


def _move(source: str, to: str) -> None:
    """Move one file, link or pipe: it is whole in one of both places at any time, and nothing is overwritten."""
    os.makedirs(os.path.dirname(to), exist_ok=True)
    if os.path.lexists(to):
        raise FileExistsError(errno.EEXIST, "the place is taken", to)
    try:
        os.rename(source, to)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        partial = _partial(to)
        try:
            shutil.copy2(source, partial, follow_symlinks=False)
            os.rename(partial, to)
        finally:
            _remove(partial)
        os.unlink(source)


def _partial(to: str) -> str:
    """Where a copy grows. No file of that name is ever quarantined: it is hidden."""
    return os.path.join(os.path.dirname(to), f".{os.path.basename(to)}.partial")


def _remove(path: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)
