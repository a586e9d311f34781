"""`data check`: read every file of a data set with two decoders, say what is wrong, and move bad files aside.

Bad is what training would fail on or be misled by: `empty`, `truncated`, `corrupt`, `crash` (it kills its decoder, or
keeps it busy for minutes), `dali-refuses` (PIL reads it, DALI does not), `not-an-image`, `unsupported`, `absurd-size`,
`unreadable`, `empty-class`; and `duplicate` where the copies have different labels (all of them are bad) or are in both
train and val (those in train are bad). All else is a remark: `wrong-extension` (DALI goes by content), `exif-rotated`
(training takes the pixels as stored), `cmyk` and `16-bit` (converted to 8-bit RGB), `duplicate` within a class,
`not-utf8`, and what training leaves out: `stray`, `hidden`, `link-loop`, `link-out`, `broken-link`.
"""

import errno
import json
import os
import re
import stat
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from fasttrain.data.decode_check import CHUNK, CHUNK_BYTES, KINDS, SECONDS, Task, read, sniff
from fasttrain.data.index import EXTENSIONS, is_split
from fasttrain.data.process_pool import groups, in_processes
from fasttrain.utils.errors import UserError
from fasttrain.utils.files import atomic, read_json_object
from fasttrain.utils.text import printable

BAD = {"empty", "truncated", "corrupt", "crash", "dali-refuses", "not-an-image", "unsupported", "absurd-size"}
BAD |= {"unreadable", "empty-class"}
LIMITS = (
    "Not seen by this check: changed bytes that still decode. Of a JPEG's, libjpeg notices about one single bit in "
    "four and nine in ten blocks of 512 zeroed bytes; in the pixels of a WebP, BMP or TIFF hardly anything is noticed. "
    "Only a manifest of hashes, made while the files were known to be good, finds the rest. Nor does it look for wrong "
    "labels, for copies that are not equal byte for byte, or at the second and later images in a file."
)


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
        rows = [vars(each) | {"path": printable(each.path)} for each in self.findings]
        head = {"fasttrain_check": 1, "folder": printable(self.folder), "files": self.files}
        head |= {"seconds": round(self.seconds, 3), "files_per_second": round(self.rate, 1), "limits": LIMITS}
        return json.dumps(head | {"findings": rows}, indent=1) + "\n"

    def text(self) -> str:
        """The report for a terminal: a line for each finding, counts, the rate, and what the check cannot see."""
        lines = [f"{'BAD ' if f.bad else 'note'}  {printable(f.path)}: {f.kind}: {f.reason}" for f in self.findings]
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


def examine(folder: str | Path, workers: int = 0, progress: bool = True) -> Report:
    """Read all files of DIR/<class>/, or of DIR/train/<class>/ and DIR/val/<class>/ where DIR holds those.

    workers: processes that decode; 0 stands for one a core. Raises UserError where the folder cannot be listed, has no
    class folders, or the processes do not start; nothing that a file holds makes it raise.
    """
    from tqdm import tqdm

    start, root = time.perf_counter(), Path(folder)
    if not root.is_dir():
        raise UserError(f"no such folder: {printable(root)}")
    findings: list[Finding] = []
    files: list[_File] = []
    try:
        inside = [split for split in ("train", "val") if is_split(root / split)]
        for split in [f"{each}/" for each in inside] if "train" in inside else [""]:
            files += _walk(root, split, findings)
    except OSError as error:
        raise UserError(f"cannot read the folder {printable(error.filename or root)}: {error.strerror}") from None
    bytes_of = Counter(file.size for file in files)
    tasks: dict[Task, _File] = {(file.path, bytes_of[file.size] > 1): file for file in files}
    workers = workers or len(os.sched_getaffinity(0))
    # Several chunks a worker, so that all finish at about the same time.
    most = max(1, min(CHUNK, len(tasks) // (4 * workers)))
    chunks = groups(list(tasks), most, lambda task: tasks[task].size, CHUNK_BYTES)
    copies: defaultdict[bytes, list[_File]] = defaultdict(list)
    # `disable=None` hides the bar where stderr is not a terminal.
    with tqdm(total=len(files), desc="checking", unit="file", disable=None if progress else True) as bar:
        for task, verdict in in_processes(read, chunks, workers):
            file = tasks[task]
            lost = [("crash", f"its decoder died, ran out of memory, or was not done within {SECONDS:.0f} s")]
            notes, digest = verdict or (lost, None)
            findings += [Finding(file.relative, kind, reason, kind in BAD) for kind, reason in notes]
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
        findings.append(Finding(path, kind, reason, kind in BAD))

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
                note(path, "link-out", f"leads to {printable(real)}; training leaves it out")
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
        place = printable(root / split)
        raise UserError(f"{place} has no class folders; images belong in {place}/<class>/<image>")
    return files


def _left_out(path: str, info: os.stat_result) -> tuple[str, str]:
    """Kind and reason for a file whose extension is not an image's."""
    head = b""
    if stat.S_ISREG(info.st_mode):
        with suppress(OSError), open(path, "rb") as file:
            head = file.read(256)
    known, name = sniff(head)
    if known:
        return "wrong-extension", f"holds a {name}, but training leaves files of this extension out"
    if name:
        return "unsupported", f"{name}; training takes {', '.join(KINDS)}"
    return "stray", "not an image by its extension; training leaves it out"


def _duplicates(group: Sequence[_File]) -> Iterator[Finding]:
    """Findings on files of equal content, sorted by path."""
    for file in group:
        others = [each for each in group if each.label != file.label]
        if others:
            many = f" and {len(others) - 1} more" if len(others) > 1 else ""
            reason = f"same content as {printable(others[0].relative)}{many}, which has another label"
            yield Finding(file.relative, "duplicate", reason, True)
            continue
        held_out = [each for each in group if each.split == "val/" != file.split]
        first = next(each for each in group if each.split == file.split)
        if held_out:
            reason = f"same content as {printable(held_out[0].relative)}: in train and in val"
            yield Finding(file.relative, "duplicate", reason, True)
        elif file is not first:
            yield Finding(file.relative, "duplicate", f"same content as {printable(first.relative)}", False)


def require_writable(path: str | Path) -> None:
    """UserError unless a report can be written to `path` without losing anything but another report."""
    path = Path(path)
    if os.path.lexists(path) and "fasttrain_check" not in read_json_object(path):
        raise UserError(f"{printable(path)} is there and is no report of a check; name another file")
    if not path.parent.is_dir():
        raise UserError(f"cannot write {printable(path)}: No such file or directory")


def write_report(report: Report, path: str | Path) -> None:
    """Write the report as JSON. UserError where `path` holds anything but such a report, or cannot be written."""
    path = Path(path)
    require_writable(path)
    try:
        with atomic(path) as temporary:
            temporary.write_text(report.to_json(), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {printable(path)}: {error.strerror}") from None
