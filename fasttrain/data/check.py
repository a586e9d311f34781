"""`data check`: decode every file of a data set with PIL and DALI, and report what is wrong.

A file is bad if training would fail on it or learn wrong things from it: `empty`, `truncated`, `corrupt`, `crash` (it
kills its decoder, or keeps it busy for minutes), `dali-refuses` (PIL decodes it, DALI does not), `differs` (their
pixels differ), `not-an-image`, `unsupported`, `absurd-size`, `unreadable`, `empty-class`; and `duplicate` where the
copies have different labels (all are bad) or are in both train and val (those in train are bad). Other findings are
notes: `wrong-extension` (DALI looks only at the content), `exif-rotated` (training uses the pixels as stored), `cmyk`
and `16-bit` (converted to 8-bit RGB), `decoder-warning` (from DALI's decoder, which decodes the file), `duplicate`
within a class, `not-utf8`, and what training ignores: `stray`, `hidden`, `link-loop`, `link-out`, `broken-link`.
"""

import errno
import json
import os
import re
import stat
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from fasttrain.data.decode_check import CHUNK_BYTES, CHUNK_FILES, KINDS, TIMEOUT_S, Task, check_files, sniff
from fasttrain.data.headers import EXTENSIONS
from fasttrain.data.layout import find_splits
from fasttrain.data.open_data import open_container
from fasttrain.data.process_pool import map_in_processes, split_by_cost
from fasttrain.data.scan import DEFAULT_LIMITS, Limits
from fasttrain.data.stores import Store
from fasttrain.data.stores.pack import Images, open_pack
from fasttrain.utils.errors import UserError
from fasttrain.utils.files import atomic, read_json_object
from fasttrain.utils.text import printable

BAD = {"empty", "truncated", "corrupt", "crash", "dali-refuses", "not-an-image", "unsupported", "absurd-size"}
BAD |= {"differs", "unreadable", "empty-class"}
LIMITS = (
    "This check misses changed bytes that still decode. In a JPEG, libjpeg notices about one in four flipped bits and "
    "nine in ten blocks of 512 zeroed bytes; in the pixels of a WebP, BMP or TIFF, hardly any change is noticed. Only "
    "a manifest of hashes, made while the files were known to be good, finds the rest. The check does not look for "
    "wrong labels, for copies that are not equal byte for byte, or at the second and later images in a file."
)

PACK_LIMITS = "This check compares the images with the hashes from when the pack was made; it does not decode them."


@dataclass(frozen=True, order=True)
class Finding:
    """A finding about a file or class folder. path: relative to the report's folder, with `/` and with undecodable
    bytes as surrogates. kind: see the list at the top of this module. reason: one printable line."""

    path: str
    kind: str
    reason: str
    bad: bool


@dataclass(frozen=True)
class Report:
    """What `examine` or `examine_pack` found. files: number of images read. seconds: the time it took. findings: sorted
    by path. limits: what the check does not find."""

    folder: Path
    files: int
    seconds: float
    findings: tuple[Finding, ...]
    limits: str = LIMITS

    @property
    def rate(self) -> float:
        """Files per second."""
        return self.files / max(self.seconds, 1e-9)

    @property
    def bad(self) -> tuple[Finding, ...]:
        """The findings that make a file or class folder bad for training."""
        return tuple(finding for finding in self.findings if finding.bad)

    def to_json(self) -> str:
        """The report as JSON in ASCII, with paths made printable."""
        rows = [vars(finding) | {"path": printable(finding.path)} for finding in self.findings]
        head = {"fasttrain_check": 1, "folder": printable(self.folder), "files": self.files}
        head |= {"seconds": round(self.seconds, 3), "files_per_second": round(self.rate, 1), "limits": self.limits}
        return json.dumps(head | {"findings": rows}, indent=1) + "\n"

    def text(self) -> str:
        """The report for a terminal: a line per finding, counts, the rate, and the check's limits."""
        lines = [f"{'BAD ' if f.bad else 'note'}  {printable(f.path)}: {f.kind}: {f.reason}" for f in self.findings]
        for bad, title in ((True, "bad"), (False, "notes")):
            counts = Counter(finding.kind for finding in self.findings if finding.bad == bad)
            by_kind = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
            lines.append(f"{title}: {by_kind or 'none'}")
        lines.append(f"{self.files} images read in {self.seconds:.1f} s, {self.rate:.0f} per second")
        return "\n".join([*lines, self.limits])


class _File(NamedTuple):
    """An image file to read. relative: its path in the report's folder. split: the folder of the split with `/`, or an
    empty string. label: its class. size: in bytes."""

    path: str
    relative: str
    split: str
    label: str
    size: int


def examine_pack(path: str | Path, progress: bool = True) -> Report:
    """Read all images of a pack and compare them with their hashes. Raises UserError where it is not a pack, or its
    tensors do not fit together."""
    from tqdm import tqdm

    start, findings, count = time.perf_counter(), [], 0
    indices = open_pack(path)
    total = sum(map(len, indices.values()))
    with tqdm(total=total, desc="checking", unit="img", disable=None if progress else True) as bar:
        for split, index in indices.items():
            store = index.store
            assert isinstance(store, Images)
            for number, image_id in enumerate(index.ids):
                if not store.intact(number):
                    findings.append(Finding(f"{split}/{image_id}", "corrupt", "it does not have its hash", True))
                count += 1
                bar.update()
    return Report(Path(path), count, time.perf_counter() - start, tuple(sorted(findings)), PACK_LIMITS)


def examine(folder: str | Path, workers: int = 0, follow_links: bool = False, progress: bool = True) -> Report:
    """Read all files of DIR/<class>/, or of DIR/train/<class>/ and DIR/val/<class>/ where DIR has those.

    workers: number of decoder processes; 0: one per core. follow_links: check what links out of the folder lead to.
    Raises UserError where the folder cannot be listed, has no class folders or can be read in two ways, or the
    processes do not start. No file's content makes it raise.
    """
    start, root = time.perf_counter(), Path(folder)
    if not root.is_dir():
        raise UserError(f"no such folder: {printable(root)}")
    findings: list[Finding] = []
    files: list[_File] = []
    try:
        splits = find_splits(root)
        for path in filter(None, (splits.train, splits.val)):
            files += _walk(root, f"{path.name}/" if path != root else "", findings, follow_links)
    except OSError as error:
        raise UserError(f"cannot read the folder {printable(error.filename or root)}: {error.strerror}") from None
    return _examine(root, files, findings, start, workers, progress)


def examine_container(
    path: str | Path, workers: int = 0, limits: Limits = DEFAULT_LIMITS, progress: bool = True
) -> Report:
    """Read all images of a table, of tar shards or of another container that is not a pack. Raises UserError where it
    is malformed, or the processes do not start."""
    start, files = time.perf_counter(), []
    stores: list[tuple[Store | None, int]] = []
    for split, index in open_container(path, limits).items():
        for number, (name, image_id, label) in enumerate(
            zip(index.paths, index.ids, index.labels.tolist(), strict=True)
        ):
            size = os.path.getsize(name) if index.store is None else index.store.length(number)
            files.append(_File(name, image_id, f"{split}/", index.classes[label] if label >= 0 else "", size))
            stores.append((index.store, number))

    def content(number: int) -> bytes | None:
        store, own = stores[number]
        return None if store is None else store.content(own).tobytes()

    return _examine(Path(path).parent, files, [], start, workers, progress, content)


def _examine(
    root: Path,
    files: Sequence[_File],
    findings: list[Finding],
    start: float,
    workers: int,
    progress: bool,
    content: Callable[[int], bytes | None] = lambda number: None,
) -> Report:
    """Decode the files, and look for copies among them. content: that of an image in a container, by its number."""
    from tqdm import tqdm

    size_counts = Counter(file.size for file in files)  # only files of equal size can be copies, so others need no hash
    tasks = (Task(file.path, size_counts[file.size] > 1, n, content(n)) for n, file in enumerate(files))
    workers = workers or len(os.sched_getaffinity(0))
    # Several chunks per worker, so that all workers finish at about the same time.
    chunk_files = max(1, min(CHUNK_FILES, len(files) // (4 * workers)))
    chunks = split_by_cost(tasks, chunk_files, lambda task: files[task.number].size, CHUNK_BYTES)
    copies: defaultdict[bytes, list[_File]] = defaultdict(list)
    # `disable=None` hides the bar where stderr is not a terminal.
    with tqdm(total=len(files), desc="checking", unit="file", disable=None if progress else True) as bar:
        for task, result in map_in_processes(check_files, chunks, workers):
            file = files[task.number]
            crash = [("crash", f"its decoder crashed, ran out of memory, or took more than {TIMEOUT_S:.0f} s")]
            problems, digest = result or (crash, None)
            findings += [Finding(file.relative, kind, reason, kind in BAD) for kind, reason in problems]
            if digest:
                copies[digest].append(file)
            bar.update()
    for group in copies.values():
        findings += _duplicates(sorted(group, key=lambda file: file.relative))
    return Report(root, len(files), time.perf_counter() - start, tuple(sorted(findings)))


def _walk(root: Path, split: str, findings: list[Finding], follow_links: bool) -> list[_File]:
    """The image files that training would use from root/split; adds a finding for everything else there."""
    real_root = os.path.realpath(root / split)
    files: list[_File] = []

    def add(path: str, kind: str, reason: str) -> None:
        findings.append(Finding(path, kind, reason, kind in BAD))

    def visible(folder: str) -> Iterator[tuple[os.DirEntry[str], os.stat_result, str]]:
        with os.scandir(root / folder) as scanned:
            entries = sorted(scanned, key=lambda entry: entry.name)
        for entry in entries:
            path = folder + entry.name
            if re.search("[\udc80-\udcff]", entry.name):
                add(path, "not-utf8", "the name is not UTF-8; other programs may not find the file")
            if entry.name.startswith("."):
                add(path, "hidden", "training ignores it")
                continue
            try:
                info = entry.stat()
            except OSError as error:
                kind = {errno.ELOOP: "link-loop", errno.ENOENT: "broken-link"}.get(error.errno or 0, "unreadable")
                add(path, kind, error.strerror or "cannot be read")
                continue
            real = os.path.realpath(entry.path)
            if entry.is_symlink() and f"{os.path.realpath(root / folder)}/".startswith(f"{real}/"):
                add(path, "link-loop", "a link to a folder that contains it; training ignores it")
            elif entry.is_symlink() and not follow_links and not real.startswith(real_root + os.sep):
                add(path, "link-out", f"a link out of the folder, to {printable(real)}; training ignores it")
            else:
                yield entry, info, path

    classes = 0
    for entry, info, path in visible(split):
        if not stat.S_ISDIR(info.st_mode):
            add(path, "stray", "a file next to the class folders; training ignores it")
            continue
        classes += 1
        count_before = len(files)
        try:
            for file, file_info, file_path in visible(f"{path}/"):
                if stat.S_ISDIR(file_info.st_mode):
                    add(file_path, "stray", "a folder in a class folder; training ignores it and its files")
                elif not file.name.lower().endswith(EXTENSIONS):
                    add(file_path, *_check_ignored(file.path, file_info))
                elif not stat.S_ISREG(file_info.st_mode):
                    add(file_path, "not-an-image", "a pipe, socket or device, not a file")
                else:
                    files.append(_File(file.path, file_path, split, entry.name, file_info.st_size))
        except OSError as error:
            add(path, "unreadable", error.strerror or "cannot be listed")
        else:
            if len(files) == count_before:
                add(path, "empty-class", "has no image files directly in it; training does not start")
    if not classes:
        name = printable(root / split)
        raise UserError(f"{name} has no class folders; images belong in {name}/<class>/<image>")
    return files


def _check_ignored(path: str, info: os.stat_result) -> tuple[str, str]:
    """Kind and reason of the finding for a file whose extension is not an image's."""
    head = b""
    if stat.S_ISREG(info.st_mode):
        with suppress(OSError), open(path, "rb") as file:
            head = file.read(256)
    supported, name = sniff(head)
    if supported:
        return "wrong-extension", f"holds a {name}, but training ignores files with this extension"
    if name:
        return "unsupported", f"{name}; training supports {', '.join(KINDS)}"
    return "stray", "does not have an image's extension; training ignores it"


def _duplicates(group: Sequence[_File]) -> Iterator[Finding]:
    """Findings about files of equal content, which are sorted by path."""
    for file in group:
        others = [other for other in group if other.label != file.label and other.label and file.label]
        if others:
            more = f" and {len(others) - 1} more" if len(others) > 1 else ""
            reason = f"same content as {printable(others[0].relative)}{more}, with another label"
            yield Finding(file.relative, "duplicate", reason, True)
            continue
        in_val = [other for other in group if "train/" == file.split != other.split]
        first = next(other for other in group if other.split == file.split)
        if in_val:
            reason = f"same content as {printable(in_val[0].relative)}: in train and in val"
            yield Finding(file.relative, "duplicate", reason, True)
        elif file is not first:
            yield Finding(file.relative, "duplicate", f"same content as {printable(first.relative)}", False)


def require_writable(path: str | Path) -> None:
    """Raises UserError where `path` exists and is not a report, or has no folder to be written to."""
    path = Path(path)
    if os.path.lexists(path) and "fasttrain_check" not in read_json_object(path):
        raise UserError(f"{printable(path)} exists and is not a report of a check; name another file")
    if not path.parent.is_dir():
        raise UserError(f"cannot write {printable(path)}: No such file or directory")


def write_report(report: Report, path: str | Path) -> None:
    """Write the report as JSON. Raises UserError where `path` exists and is not a report, or cannot be written."""
    path = Path(path)
    require_writable(path)
    try:
        with atomic(path, sync=True) as temporary:
            temporary.write_text(report.to_json(), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {printable(path)}: {error.strerror}") from None
