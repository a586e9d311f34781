"""Tar shards as WebDataset writes them, read in place: an archive is never unpacked.

The members of a sample follow each other and have the same name up to the first dot: 000017.jpg and 000017.cls. One of
them is an image. The label is a number or a name in a `.cls`, or the `label`, `cls` or `class` of a `.json`. Other
members are not used. An image's id is its member's name, after its shard's where several shards have such a member.
"""

import hashlib
import json
import os
import re
import sys
import tarfile
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Lock
from typing import IO, Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fasttrain.data.headers import EXTENSIONS
from fasttrain.data.index import Index, of_samples
from fasttrain.data.scan import Limits, cached, load_array, sizes_of, stamp, store_array
from fasttrain.data.stores import stored_file
from fasttrain.data.stores.patterns import expand
from fasttrain.utils.errors import RunError, UserError
from fasttrain.utils.files import opened
from fasttrain.utils.text import printable

_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # of gzip, bzip2, xz and zstd
_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)  # the sample, and what the member is
_LABEL_KEYS = ("label", "cls", "class")  # of a .json
_MOST_LABEL_BYTES = {"cls": 1024, "json": 1 << 20}
_OPEN_FILES = 64
_END = 512  # bytes of zeros, at least, after the last member


class _Member(NamedTuple):
    """An image: the shard's number, where its content is in it, its name, and its label ("" without one)."""

    shard: int
    offset: int
    length: int
    name: str
    label: str


@dataclass(frozen=True, eq=False)
class Shards:
    """The store of images in tar files. shard: int32 [N], a position in `files`. offsets, lengths: int64 [N], in
    bytes."""

    files: tuple[str, ...]
    shard: NDArray[np.int32]
    offsets: NDArray[np.int64]
    lengths: NDArray[np.int64]
    decoded: bool = False
    _open: OrderedDict[int, BinaryIO] = field(default_factory=OrderedDict)
    _lock: Any = field(default_factory=Lock)

    def length(self, number: int) -> int:
        """See `Store`."""
        return int(self.lengths[number])

    def content(self, number: int) -> NDArray[np.uint8]:
        """The bytes of an image file; see `Store`. Raises RunError where they cannot be read."""
        return np.frombuffer(self.read(number, 0, self.length(number)), np.uint8)

    def read(self, number: int, start: int, length: int) -> bytes:
        """`length` bytes of an image file, from byte `start`."""
        shard = int(self.shard[number])
        try:
            file = self._file(shard)
            content = os.pread(file.fileno(), length, int(self.offsets[number]) + start)
        except OSError as error:
            raise RunError(f"cannot read {printable(self.files[shard])}: {error.strerror}; check the disk") from None
        if len(content) < length:
            raise RunError(f"{printable(self.files[shard])} has been cut off since it was opened")
        return content

    def _file(self, shard: int) -> BinaryIO:
        """An open shard. A file that is closed here stays open while another thread reads it."""
        with self._lock:
            file = self._open.pop(shard, None) or opened(self.files[shard])
            self._open[shard] = file
            if len(self._open) > _OPEN_FILES:
                self._open.popitem(last=False)
            return file


def is_shards(path: str | Path) -> bool:
    return str(path).lower().endswith((".tar", *_COMPRESSED)) and not os.path.isdir(path)


def open_shards(
    pattern: str | Path, limits: Limits, *, labeled: bool = True, progress: bool = True
) -> dict[str, Index]:
    """The index of the images in tar files, as the split `train`. Images that cannot be used have the size 0 and a
    problem.

    labeled: each image needs a label; if not, all labels are −1. Raises UserError, which names the shard and the
    member, where a file is not a tar file, is compressed or cut off, or a label is missing or cannot be read.
    """
    files = tuple(os.path.realpath(name) for name in expand(str(pattern)))
    twice = [name for name, count in Counter(files).items() if count > 1]
    if twice:
        raise UserError(f"{printable(pattern)}: {printable(twice[0])} is there twice")
    digest = hashlib.sha256(b"shards\0")
    for name in files:
        try:
            digest.update(stamp(name, os.stat(name)).encode(errors="surrogateescape"))
        except OSError as error:
            raise UserError(f"cannot read {printable(name)}: {error.strerror}") from None
    members = _members(files, digest.hexdigest(), progress)
    if not members:
        raise UserError(f"{printable(pattern)} holds no images; an image's name ends in {', '.join(EXTENSIONS)}")
    lacking = next((each for each in members if not each.label), None)
    if labeled and lacking:
        raise UserError(
            f"{printable(files[lacking.shard])}: {printable(lacking.name)} has no label; it belongs in a .cls next to "
            f"it, or is the {', '.join(_LABEL_KEYS[:-1])} or {_LABEL_KEYS[-1]} of a .json"
        )
    names = [each.name for each in members]
    for prefixes in ([Path(name).stem for name in files], [f"{number:05}" for number in range(len(files))]):
        if len(set(names)) < len(names):
            names = [f"{prefixes[each.shard]}/{each.name}" for each in members]
    samples = of_samples(names, [each.label for each in members] if labeled else None, pattern)
    some = [members[row] for row in samples.order]
    paths = tuple(f"{files[each.shard]}:{each.name}" for each in some)
    store = Shards(
        files,
        np.array([each.shard for each in some], np.int32),
        np.array([each.offset for each in some], np.int64),
        np.array([each.length for each in some], np.int64),
    )

    def open_image(number: int) -> IO[bytes]:
        return stored_file(store.length(number), partial(store.read, number))

    digest.update(samples.order.tobytes())  # which is another one without labels
    sizes, problems = sizes_of(paths, digest.hexdigest(), progress, limits, open_image)
    return {"train": Index(paths, samples.ids, samples.labels, sizes, samples.classes, problems, store)}


def _members(files: Sequence[str], cache_key: str, progress: bool) -> list[_Member]:
    """The images of all shards, from the cache or else from the archives' headers."""
    from tqdm import tqdm

    caches = [cached(f"fasttrain-shards-1-{cache_key}-{part}.npy") for part in ("places", "names", "labels")]
    arrays = [array for path in caches if (array := load_array(path)) is not None]
    if len(arrays) == len(caches):
        with suppress(ValueError, TypeError):  # the cache is broken
            rows = zip(arrays[0].tolist(), _split(arrays[1]), _split(arrays[2]), strict=True)
            return [_Member(shard, offset, length, name, label) for (shard, offset, length), name, label in rows]
    members: list[_Member] = []
    # `disable=None` hides the bar where stderr is not a terminal.
    for shard, file in enumerate(tqdm(files, desc="reading shards", unit="file", disable=None if progress else True)):
        members += _read(file, shard)
    if members:
        places = np.array([(each.shard, each.offset, each.length) for each in members], np.int64)
        names, labels = _joined([each.name for each in members]), _joined([each.label for each in members])
        parts: list[NDArray[Any]] = [places, names, labels]
        for cache, part in zip(caches, parts, strict=True):
            store_array(cache, part)
    return members


def _joined(texts: Sequence[str]) -> NDArray[np.uint8]:
    return np.frombuffer("\0".join(texts).encode(errors="surrogateescape"), np.uint8)


def _split(joined: NDArray[np.uint8]) -> list[str]:
    return joined.tobytes().decode(errors="surrogateescape").split("\0")


def _read(path: str, shard: int) -> Iterator[_Member]:
    """The images of a shard. Raises UserError, which says where the file is wrong."""
    where, ignored = printable(path), 0
    try:
        with opened(path) as file:
            size = os.fstat(file.fileno()).st_size
            if file.read(6).startswith(_MAGIC):
                raise UserError(f"{where} is compressed, so that no image can be read alone; decompress it")
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:") as archive:
                sample, image = "", None
                labels: dict[str, bytes] = {}
                while True:
                    member = archive.next()
                    archive.members = []  # type: ignore[attr-defined]  # else it keeps all of them
                    found = _NAME.fullmatch(os.path.normpath(member.name)) if member and member.isreg() else None
                    if image and (member is None or not found or found[1] != sample):
                        yield image._replace(label=_label(labels, f"{where}: {printable(image.name)}"))
                    if member is None:
                        break
                    if found is None or found[1] != sample:
                        sample, image, labels = found[1] if found else "", None, {}
                    if member.isreg() and member.offset_data + member.size > size:
                        raise UserError(f"{where} is cut off in {printable(member.name)}; copy it again")
                    kind = found[2].lower() if found else ""
                    if f".{kind}" in EXTENSIONS and member.sparse is None:
                        if image:
                            raise UserError(f"{where}: sample {printable(sample)} has two images; only one can be used")
                        name = os.path.normpath(member.name)
                        if name.startswith("/") or ".." in name.split("/"):
                            raise UserError(f"{where}: the name {printable(name)!r} leads out of the archive")
                        image = _Member(shard, member.offset_data, member.size, name, "")
                    elif kind in _MOST_LABEL_BYTES:
                        if member.size > _MOST_LABEL_BYTES[kind]:
                            raise UserError(f"{where}: {printable(member.name)} is too long for a label")
                        labels[kind] = os.pread(file.fileno(), member.size, member.offset_data)
                    else:
                        ignored += not member.isdir()
                _check_end(file, archive.offset, size, where)
    except tarfile.TarError as error:
        raise UserError(f"{where} is not a tar file, or is cut off: {printable(str(error))}") from None
    except (OSError, ValueError, OverflowError) as error:
        raise UserError(f"cannot read {where}: {printable(getattr(error, 'strerror', None) or str(error))}") from None
    if ignored:
        print(f"{where}: ignored {ignored} members that are neither images nor labels", file=sys.stderr)


def _check_end(file: BinaryIO, end: int, size: int, where: str) -> None:
    """Raises UserError where no zeros, or something else, follows the last member: tarfile would not notice."""
    file.seek(end)
    rest = size - end
    while block := file.read(1 << 20):
        if any(block):
            raise UserError(f"{where} is damaged at byte {end}, or another archive follows there; write it again")
    if rest < _END:
        raise UserError(f"{where} is cut off at byte {size}: the end of the archive is missing; copy it again")


def _label(labels: dict[str, bytes], where: str) -> str:
    """The label in a sample's .cls and .json; "" without one. Raises UserError where it cannot be read, or the two
    differ."""
    found = {}
    if "cls" in labels:
        found["cls"] = _text(labels["cls"])
        if not found["cls"]:
            raise UserError(f"{where}: its .cls is not a number or a name")
    if "json" in labels:
        try:
            table = json.loads(labels["json"])
        except (ValueError, RecursionError):
            raise UserError(f"{where}: its .json cannot be read as JSON") from None
        value = next((table[key] for key in _LABEL_KEYS if key in table), None) if isinstance(table, dict) else None
        if value is not None:
            found["json"] = _text(str(value).encode()) if type(value) in (int, str) else ""
            if not found["json"]:
                raise UserError(f"{where}: the label in its .json is not a number or a name")
    texts = set(found.values())
    if len(texts) > 1:
        raise UserError(f"{where}: its .cls says {printable(found['cls'])} and its .json {printable(found['json'])}")
    return texts.pop() if texts else ""


def _text(content: bytes) -> str:
    """A label as text; "" where it is empty, has several lines or is not text."""
    try:
        text = content.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        return ""
    return "" if "\0" in text or "\n" in text else text
