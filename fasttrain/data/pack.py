"""Makes packs (see `stores/pack.py`) and unpacks them."""

import io
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fasttrain.data.decode import BATCH_FILES, decode_batch
from fasttrain.data.decode_check import KINDS, sniff
from fasttrain.data.headers import EXTENSIONS
from fasttrain.data.index import Index, merge_weights
from fasttrain.data.process_pool import map_in_processes, split_by_cost
from fasttrain.data.stores.pack import DTYPES, FORMAT, TENSORS, WEIGHTS, Images, is_pack, open_pack
from fasttrain.utils.errors import RunError, UserError
from fasttrain.utils.files import atomic_folder, fsync
from fasttrain.utils.text import printable

_CHUNK_PIXELS = 2**24  # at most, per task of a worker
_SAMPLE = 16  # images that are encoded for the estimate
_JOURNAL = "fasttrain-pack-journal-2"


@dataclass(frozen=True)
class Encoding:
    """How images are packed. kind: `same` keeps the files, `raw` their pixels, `jpeg` encodes them again.
    shorter_side: larger images are reduced to it, in pixels; 0: none are. quality: of `jpeg`."""

    kind: str = "same"
    shorter_side: int = 0
    quality: int = 90

    def size(self, height: int, width: int) -> tuple[int, int]:
        """The size of an image in the pack. Images are never enlarged."""
        shorter = min(height, width)
        if not 0 < self.shorter_side < shorter:
            return height, width
        scale = self.shorter_side / shorter
        return max(1, round(height * scale)), max(1, round(width * scale))

    def raw_bytes(self, index: Index, number: int) -> int:
        """The bytes of an image's pixels in the pack."""
        height, width = self.size(*index.sizes[number].tolist())
        return height * width * 3


class Packed(NamedTuple):
    """images, bytes: in the pack. left_out: (id, reason) of the images that cannot be decoded."""

    images: int
    bytes: int
    left_out: list[tuple[str, str]]


class _Image(NamedTuple):
    """An image to pack. content: of an image in a container; else it is read from `path`."""

    path: str
    content: bytes | None
    height: int
    width: int


def encode(images: Sequence[_Image], encoding: Encoding) -> list[tuple[bytes, str]]:
    """Each image's bytes in the pack, or why it has none. At most BATCH_FILES images."""
    contents: list[bytes] = []
    problems: list[str] = []
    for image in images:
        try:
            contents.append(image.content if image.content is not None else Path(image.path).read_bytes())
            problems.append("" if contents[-1] else "the file is empty")
        except OSError as error:
            contents.append(b"")
            problems.append(f"it cannot be read ({error.strerror})")
    sound = [number for number, problem in enumerate(problems) if not problem]
    arrays = [np.frombuffer(contents[number], np.uint8) for number in sound]
    decoded: list[NDArray[np.uint8] | None] = [*decode_batch(arrays)] if arrays else []
    if not decoded:  # one by one; a copy, since DALI's memory is used again
        decoded = [next((found.copy() for found in decode_batch([array])), None) for array in arrays]
    pixels = dict(zip(sound, decoded, strict=True))
    results = []
    for number, image in enumerate(images):
        problem, found = problems[number], pixels.get(number)
        if not problem and found is None:
            problem = "it is damaged, or not an image that DALI can read"
        if not problem and found is not None and found.shape[:2] != (image.height, image.width):
            problem = f"it has {found.shape[1]} x {found.shape[0]} pixels, unlike its header"
        if problem or found is None:
            results.append((b"", problem))
        else:
            results.append((contents[number] if encoding.kind == "same" else _encode(found, encoding), ""))
    return results


def _encode(pixels: NDArray[np.uint8], encoding: Encoding) -> bytes:
    """Reduced pixels, as they are or as a JPEG."""
    from PIL import Image

    height, width = encoding.size(*pixels.shape[:2])
    if encoding.kind == "raw" and (height, width) == pixels.shape[:2]:
        return pixels.tobytes()
    image = Image.fromarray(pixels)
    if (height, width) != pixels.shape[:2]:
        image = image.resize((width, height), Image.Resampling.BICUBIC)  # antialiased
    if encoding.kind == "raw":
        return image.tobytes()
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=encoding.quality)
    return buffer.getvalue()


def make(
    indices: Mapping[str, Index],
    out: Path,
    encoding: Encoding,
    *,
    workers: int = 0,
    skip_bad: bool = False,
    command: str = "",
    progress: bool = True,
    say: Callable[[str], object] = print,
) -> Packed:
    """Pack indices by split, such as {"train": …, "val": …}, into the file `out`. An interrupted call goes on where it
    was. All images are decoded, also with `same`.

    workers: processes; 0: one per core. skip_bad: leave out images that cannot be decoded; else the first one is an
    error. command: kept in the metadata. say: gets the estimate. Raises UserError where the images, `out` or the space
    on the disk do not allow it, RunError where an image or the disk fails.
    """
    _check(indices, out, encoding)
    workers = workers or len(os.sched_getaffinity(0))
    index_of = list(indices.values())
    order = [(split, number) for split, index in enumerate(index_of) for number in range(len(index))]
    partial_path, journal_path = (out.with_name(f".{out.name}.{suffix}") for suffix in ("partial", "journal"))
    header_bytes = _header_bytes(indices, encoding, command)
    stamp = _stamp(indices, encoding, header_bytes)
    done = _resume(partial_path, journal_path, stamp, header_bytes)
    left = range(len(done), len(order))

    def task(position: int) -> _Image:
        split, number = order[position]
        return _task(index_of[split], number)

    written = sum(entry.length for entry in done)
    if left:
        sample = [task(left[row]) for row in _spread(len(left))]
        raw = encoding.kind == "raw"
        needed = (
            sum(encoding.raw_bytes(index_of[split], number) for split, number in order[len(done) :]) if raw else None
        )
        say(_estimate(sample, len(left), needed, encoding, workers, out, written))
    try:
        with partial_path.open("r+b" if done else "wb") as data, journal_path.open("ab" if done else "wb") as journal:
            if not done:
                journal.write((json.dumps(stamp) + "\n").encode())
            data.seek(header_bytes + written)
            data.truncate()
            tasks = ((position, task(position)) for position in left)
            for entry in _append(tasks, encoding, workers, data, journal, len(done), len(order), progress):
                if entry.problem and not skip_bad:
                    path = printable(task(len(done)).path)
                    raise RunError(
                        f"cannot pack {path}: {entry.problem}; fix or remove it, or leave it out with --on-bad skip"
                    )
                done.append(entry)
            kept = [position for position, entry in enumerate(done) if not entry.problem]
            if not kept:
                raise RunError("no image can be decoded")
            size = _finish(data, header_bytes, indices, order, done, kept, _metadata(indices, encoding, command))
        fsync(partial_path)
        os.replace(partial_path, out)
        journal_path.unlink(missing_ok=True)
    except OSError as error:
        raise RunError(f"cannot write {printable(partial_path)}: {error.strerror}; the same command resumes") from None
    left_out = [
        (index_of[split].ids[number], entry.problem)
        for (split, number), entry in zip(order, done, strict=True)
        if entry.problem
    ]
    return Packed(len(kept), size, left_out)


class _Entry(NamedTuple):
    """What is known about an image that is in the file already, or is left out because of `problem`."""

    length: int
    sha256: str
    problem: str


def _check(indices: Mapping[str, Index], out: Path, encoding: Encoding) -> None:
    if out.suffix != ".safetensors":
        raise UserError(f"{printable(out)}: a pack is a safetensors file; end the name in .safetensors")
    if not out.parent.is_dir():
        raise UserError(f"cannot write {printable(out)}: there is no folder {printable(out.parent)}")
    if out.exists() and not (is_pack(out) and _is_ours(out)):
        raise UserError(f"{printable(out)} exists and is not a pack; name another file")
    if encoding.kind == "same" and encoding.shorter_side:
        raise UserError("--pixels same keeps the files as they are; with --shorter-side take raw or jpeg")
    for index in indices.values():
        if index.store is not None and index.store.decoded:
            raise UserError("this is a pack of pixels already; name the folder that it was made from")
        for name in index.classes:
            if not name.isprintable() or any(0xD800 <= ord(character) < 0xE000 for character in name):
                raise UserError(f"class {printable(name)!r} has a name that a pack cannot hold; rename its folder")


def _is_ours(path: Path) -> bool:
    try:
        open_pack(path)
    except UserError:
        return False
    return True


def _stamp(indices: Mapping[str, Index], encoding: Encoding, header_bytes: int) -> dict[str, Any]:
    """What must be equal for an interrupted call to go on. header_bytes: where the images start, by the metadata."""
    prints = {split: [index.fingerprint(), index.fingerprint_of_sizes()] for split, index in indices.items()}
    return {"format": _JOURNAL, "encoding": vars(encoding), "source": prints, "start": header_bytes}


def _resume(data: Path, journal: Path, stamp: dict[str, Any], header_bytes: int) -> list[_Entry]:
    """The images that an interrupted call has written."""
    try:
        first, *lines = journal.read_text(encoding="utf-8").split("\n")
        if json.loads(first) != stamp:
            return []
        entries, left = [], data.stat().st_size - header_bytes
        for line in lines[:-1]:
            entry = _Entry(*json.loads(line))
            left -= entry.length
            if left < 0:
                break
            entries.append(entry)
        return entries
    except (OSError, ValueError, TypeError):
        return []


def _task(index: Index, number: int) -> _Image:
    height, width = index.sizes[number].tolist()
    content = None if index.store is None else index.store.content(number).tobytes()
    return _Image(index.paths[number], content, height, width)


def _spread(count: int) -> list[int]:
    """Some of the positions 0 … count−1, evenly spread."""
    return np.linspace(0, count - 1, min(_SAMPLE, count)).astype(int).tolist()


def _estimate(
    sample: Sequence[_Image], count: int, needed: int | None, encoding: Encoding, workers: int, out: Path, written: int
) -> str:
    """What `count` more images will need, by encoding a few of them. needed: in bytes, if it is known. Raises UserError
    where the disk has too little space."""
    encode(sample[:1], encoding)  # builds the decoder
    start = time.perf_counter()
    lengths = [len(content) for content, _ in encode(sample, encoding)]
    minutes = (time.perf_counter() - start) / len(sample) * count / workers / 60
    needed = int(np.mean(lengths) * count) if needed is None else needed
    free = shutil.disk_usage(out.parent).free
    if needed > free:
        raise UserError(
            f"the pack needs about {needed / 1e9:.1f} GB more and {printable(out.parent)} has {free / 1e9:.1f} GB free"
        )
    size = f"{(needed + written) / 1e6:,.0f} MB"
    return f"packing {count} images: about {size}, and {max(minutes, 0.1):.1f} minutes with {workers} processes"


def _append(
    tasks: Iterable[tuple[int, _Image]],
    encoding: Encoding,
    workers: int,
    data: BinaryIO,
    journal: BinaryIO,
    done: int,
    total: int,
    progress: bool,
) -> Iterator[_Entry]:
    """Encode the images, write them in their order, and give an entry for each; the journal has it afterwards."""
    from tqdm import tqdm

    chunks = split_by_cost(tasks, BATCH_FILES, lambda task: task[1].height * task[1].width, _CHUNK_PIXELS)
    waiting: dict[int, tuple[bytes, str]] = {}
    following = done
    work = partial(_encode_numbered, encoding=encoding)
    # `disable=None` hides the bar where stderr is not a terminal.
    with tqdm(total=total, initial=done, desc="packing", unit="img", disable=None if progress else True) as bar:
        for (number, _), result in map_in_processes(work, chunks, workers):
            waiting[number] = result or (b"", "its decoder crashed, or ran out of memory")
            while following in waiting:
                content, problem = waiting.pop(following)
                entry = _Entry(len(content), sha256(content).hexdigest(), problem)
                yield entry
                data.write(content)
                data.flush()
                journal.write((json.dumps(entry) + "\n").encode())
                following += 1
                bar.update()
            journal.flush()


def _encode_numbered(tasks: Sequence[tuple[int, _Image]], encoding: Encoding) -> list[tuple[bytes, str]]:
    return encode([image for _, image in tasks], encoding)


def source(indices: Mapping[str, Index]) -> str:
    """The fingerprint of what is packed, as `stores.pack.source_of` reads it from the pack."""
    return sha256("".join(index.fingerprint() for index in indices.values()).encode()).hexdigest()


def _metadata(indices: Mapping[str, Index], encoding: Encoding, command: str) -> dict[str, str]:
    return {
        "format": FORMAT,
        "kind": encoding.kind,
        "classes": json.dumps(next(iter(indices.values())).classes),
        "splits": json.dumps(list(indices)),
        "source": source(indices),
        "shorter_side": str(encoding.shorter_side),
        "quality": str(encoding.quality) if encoding.kind == "jpeg" else "",
        "command": printable(command),
    }


def _header(metadata: Mapping[str, str], shapes: Mapping[str, Sequence[int]]) -> bytes:
    """The header of a safetensors file, without its length."""
    entries: dict[str, Any] = {"__metadata__": metadata}
    start = 0
    for name, dtype in (TENSORS | WEIGHTS).items():
        if name not in shapes:
            continue
        end = start + int(np.prod(shapes[name], dtype=np.int64)) * DTYPES[dtype].itemsize
        entries[name] = {"dtype": dtype, "shape": list(shapes[name]), "data_offsets": [start, end]}
        start = end
    return json.dumps(entries).encode()


def _header_bytes(indices: Mapping[str, Index], encoding: Encoding, command: str) -> int:
    """The bytes that are kept free for the header, which is written last: enough for any size of the images."""
    most = {name: (2**60, 2) for name in TENSORS | WEIGHTS}
    return (8 + len(_header(_metadata(indices, encoding, command), most)) + 63) // 64 * 64


def _finish(
    data: BinaryIO,
    header_bytes: int,
    indices: Mapping[str, Index],
    order: Sequence[tuple[int, int]],
    done: Sequence[_Entry],
    kept: Sequence[int],
    metadata: Mapping[str, str],
) -> int:
    """Write the other tensors after the images, and the header. Returns the file's size in bytes."""
    index_of = list(indices.values())
    encoding = Encoding(metadata["kind"], int(metadata["shorter_side"]))
    images = [(split, index_of[split], number) for split, number in (order[position] for position in kept)]
    lengths = [done[position].length for position in kept]
    ids = "\0".join(index.ids[number] for _, index, number in images).encode(errors="surrogateescape")
    tensors: dict[str, NDArray[Any]] = {
        "offsets": np.cumsum([0, *lengths], dtype="<i8"),
        "sizes": np.array([encoding.size(*index.sizes[number].tolist()) for _, index, number in images], "<i4"),
        "labels": np.array([index.labels[number] for _, index, number in images], "<i8"),
        "splits": np.array([split for split, _, _ in images], "u1"),
        "ids": np.frombuffer(ids, np.uint8),
        "sha256": np.frombuffer(bytes.fromhex("".join(done[position].sha256 for position in kept)), np.uint8),
    }
    tensors["sha256"] = tensors["sha256"].reshape(-1, 32)
    if (weights := merge_weights(index_of)) is not None:
        first = np.cumsum([0, *map(len, index_of)])
        tensors["weights"] = weights[[first[split] + number for split, _, number in images]].astype("<f8")
    for tensor in tensors.values():  # `data` is at the end of the images
        data.write(tensor.tobytes())
    header = _header(metadata, {"images": (sum(lengths),)} | {name: each.shape for name, each in tensors.items()})
    size = data.tell()
    data.seek(0)
    data.write((header_bytes - 8).to_bytes(8, "little") + header.ljust(header_bytes - 8))
    data.flush()
    return size


def _file_names(index: Index, store: Images, path: Path) -> list[tuple[str, str]]:
    """The class folder and the name of each image's file. Raises RunError where a class or an id cannot be a name."""
    folders = [index.classes[label] for label in index.labels.tolist()]
    for folder, image_id in zip(folders, index.ids, strict=True):
        if {"", ".", ".."} & {folder, *image_id.split("/")} or "/" in folder:
            raise RunError(f"{printable(path)}: {printable(image_id)!r} is not the name of an image in a class")
    stems, endings = [], []
    for number, image_id in enumerate(index.ids):
        stem, ending = os.path.splitext(image_id)
        if ending.lower() not in EXTENSIONS:  # an image that had no name
            _, kind = sniff(store.content(number).tobytes()[:256]) if not store.decoded else (True, "")
            stem, ending = image_id, KINDS[kind][2][0] if kind in KINDS else ""
        stems.append(stem)
        endings.append(".png" if store.decoded else ending)
    short = [f"{stem.rsplit('/', 1)[-1]}{ending}" for stem, ending in zip(stems, endings, strict=True)]
    count = Counter(zip(folders, short, strict=True))
    names: list[tuple[str, str]] = []
    taken: set[tuple[str, str]] = set()
    for number, (folder, name) in enumerate(zip(folders, short, strict=True)):
        if count[folder, name] > 1:
            name = f"{stems[number].replace('/', '-')}{endings[number]}"
        while (folder, name) in taken:
            name = f"{number}-{name}"
        taken.add((folder, name))
        names.append((folder, name))
    return names


def unpack(path: Path, out: Path, progress: bool = True) -> int:
    """Write a pack's images as files: class folders in `out`, or in OUT/train and OUT/val where it has both. Pixels
    become PNGs. Returns the number of images. Raises UserError where `out` is not empty or `path` is no pack, RunError
    where an image does not have its hash or the disk fails."""
    from PIL import Image
    from tqdm import tqdm

    indices = open_pack(path)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{printable(out)} exists and is not an empty folder; name another one")
    total = sum(map(len, indices.values()))
    try:
        bar = tqdm(total=total, desc="unpacking", unit="img", disable=None if progress else True)
        with atomic_folder(out) as temporary, bar:
            for split, index in indices.items():
                root = temporary / split if len(indices) > 1 else temporary
                store = index.store
                assert isinstance(store, Images)
                for number, (folder, name) in enumerate(_file_names(index, store, path)):
                    if not store.intact(number):
                        raise RunError(f"{printable(index.paths[number])} is damaged: it does not have its hash")
                    target = root / folder / name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    content = store.content(number)
                    if store.decoded:
                        Image.fromarray(content).save(target)
                    else:
                        target.write_bytes(content.tobytes())
                    bar.update()
    except OSError as error:
        raise RunError(f"cannot write {printable(out)}: {error.strerror}") from None
    return total
