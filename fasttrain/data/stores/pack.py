"""A pack: a data set in one safetensors file, which is read through a memory map.

Its tensors, for N images of all splits:

    images   uint8 [bytes]  the images end to end: files, or pixels of uint8 [H, W, 3]
    offsets  int64 [N + 1]  where each image starts in `images`
    sizes    int32 [N, 2]   heights and widths
    labels   int64 [N]      positions in `classes`
    splits   uint8 [N]      positions in `splits` of the metadata
    ids      uint8 [bytes]  the ids in UTF-8, with a 0 between two of them
    sha256   uint8 [N, 32]  a hash of each image's bytes
    weights  float64 [N]    how often each is drawn, see `Index`; only where a table of images gives weights

Its metadata: `format`, `kind` (same, jpeg or raw), `classes` and `splits` as JSON lists, `source` (the fingerprint of
what was packed), `shorter_side`, `quality`, and `command`.
"""

import json
import os
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fasttrain.data.index import MAX_WEIGHT, Index
from fasttrain.utils.errors import UserError
from fasttrain.utils.files import opened
from fasttrain.utils.text import printable

FORMAT = "fasttrain-pack-1"
KINDS = ("same", "jpeg", "raw")
DTYPES: dict[str, np.dtype[Any]] = {
    "U8": np.dtype("u1"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
    "F64": np.dtype("<f8"),
}
TENSORS = {
    "images": "U8",
    "offsets": "I64",
    "sizes": "I32",
    "labels": "I64",
    "splits": "U8",
    "ids": "U8",
    "sha256": "U8",
}
WEIGHTS = {"weights": "F64"}
HEADER_BYTES = 100 << 20  # at most, as safetensors itself reads it


@dataclass(frozen=True, eq=False)
class Images:
    """The store of a pack's images `rows`, int64 [N]: positions among all images of the pack. files: the pack."""

    files: tuple[str]
    tensors: dict[str, NDArray[Any]]
    rows: NDArray[np.int64]
    decoded: bool

    def length(self, number: int) -> int:
        """See `Store`."""
        row = int(self.rows[number])
        return int(self.tensors["offsets"][row + 1] - self.tensors["offsets"][row])

    def content(self, number: int) -> NDArray[np.uint8]:
        """A view of the memory map; see `Store`."""
        row = int(self.rows[number])
        offsets = self.tensors["offsets"]
        data = self.tensors["images"][offsets[row] : offsets[row + 1]]
        return data.reshape(*self.tensors["sizes"][row].tolist(), 3) if self.decoded else data

    def intact(self, number: int) -> bool:
        """Whether an image has its hash; reads it."""
        expected = self.tensors["sha256"][self.rows[number]].tobytes()
        return sha256(self.content(number).tobytes()).digest() == expected


def is_pack(path: str | Path) -> bool:
    return os.path.isfile(path) and str(path).endswith(".safetensors")


def open_pack(path: str | Path) -> dict[str, Index]:
    """The indices of a pack's splits, by name. Raises UserError, which says what is wrong, for any other file.

    The file is untrusted: every size and offset is checked before it is used. The images' hashes are not: see `intact`.
    """
    try:
        metadata, tensors = _read(Path(path))
        return _indices(os.path.realpath(path), metadata, tensors)
    except OSError as error:
        raise UserError(f"cannot read {printable(path)}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{printable(path)} is not a pack, or it is damaged: {printable(str(error))}") from None


def source_of(path: str | Path) -> str:
    """The fingerprint of what was packed; empty for a file that is not a pack."""
    try:
        metadata, _ = _read(Path(path))
    except (OSError, ValueError, RecursionError):
        return ""
    return str(metadata.get("source", ""))


def _read(path: Path) -> tuple[dict[str, str], dict[str, NDArray[Any]]]:
    """A safetensors file's metadata and tensors. The tensors are views of a memory map."""
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(HEADER_BYTES, size - 8):
            raise ValueError("it has no header of safetensors, or is cut off")
        header = json.loads(file.read(length))
        data = np.memmap(file, np.uint8, "r") if size > 8 else np.zeros(0, np.uint8)
    if not isinstance(header, dict):
        raise ValueError("its header is not a table")
    metadata = header.get("__metadata__")
    if not (isinstance(metadata, dict) and metadata.get("format") == FORMAT):
        raise ValueError(f"its metadata does not name the format {FORMAT}")
    names = TENSORS | (WEIGHTS if "weights" in header else {})
    tensors = {name: _tensor(header.get(name), name, dtype, data[8 + length :]) for name, dtype in names.items()}
    return metadata, tensors


def _tensor(entry: Any, name: str, dtype: str, data: NDArray[np.uint8]) -> NDArray[Any]:
    """A tensor by its entry in the header. Raises ValueError where it does not fit the file."""
    if not (isinstance(entry, dict) and entry.get("dtype") == dtype):
        raise ValueError(f"it has no tensor {name} of type {dtype}")
    shape, offsets = (_natural_numbers(entry.get(key)) for key in ("shape", "data_offsets"))
    if len(shape) > 2 or len(offsets) != 2 or offsets[1] > len(data):
        raise ValueError(f"{name} ends after the file, which is cut off")
    count = 1
    for side in shape:
        count *= side
    if offsets[1] - offsets[0] != count * DTYPES[dtype].itemsize:
        raise ValueError(f"{name} does not have the size of its shape")
    return data[offsets[0] : offsets[1]].view(DTYPES[dtype]).reshape(shape)


def _natural_numbers(value: Any) -> list[int]:
    if not (isinstance(value, list) and all(type(number) is int and 0 <= number < 2**62 for number in value)):
        raise ValueError("the place of a tensor is not given")
    return value


def _indices(path: str, metadata: dict[str, str], tensors: dict[str, NDArray[Any]]) -> dict[str, Index]:
    classes, split_names = (_names(metadata, key) for key in ("classes", "splits"))
    kind = metadata.get("kind")
    if kind not in KINDS:
        raise ValueError(f"its kind is {kind!r}, not one of {', '.join(KINDS)}")
    count = len(tensors["labels"])
    shapes = {"offsets": (count + 1,), "sizes": (count, 2), "labels": (count,), "splits": (count,)}
    shapes |= {"sha256": (count, 32)} | ({"weights": (count,)} if "weights" in tensors else {})
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise ValueError(f"{name} has the shape {list(tensors[name].shape)}, not {list(shape)}")
    # Copies: checks of a memory map would not hold if the file changed afterwards.
    tensors = {name: each if name == "images" else np.array(each) for name, each in tensors.items()}
    offsets, sizes, labels, splits = (tensors[name] for name in ("offsets", "sizes", "labels", "splits"))
    lengths = np.diff(offsets)
    if count == 0 or offsets[0] != 0 or (lengths < 0).any() or offsets[-1] != len(tensors["images"]):
        raise ValueError("its offsets do not lead through its images")
    if (sizes <= 0).any():
        raise ValueError("it has images without a size")
    if kind == "raw" and (lengths != sizes.prod(1, dtype=np.int64) * 3).any():
        raise ValueError("it has images that do not have the size of their pixels")
    if (labels < 0).any() or (labels >= len(classes)).any() or (splits >= len(split_names)).any():
        raise ValueError("it has labels or splits without a name")
    weights = tensors.get("weights")
    if weights is not None and not ((weights >= 0) & (weights <= MAX_WEIGHT)).all():
        raise ValueError("it has weights that are no numbers of 0 or more")
    ids = tensors["ids"].tobytes().decode(errors="surrogateescape").split("\0")
    if len(ids) != count:
        raise ValueError(f"it has {count} images and {len(ids)} ids")
    indices = {}
    for number, split in enumerate(split_names):
        rows = np.flatnonzero(splits == number)
        names = tuple(ids[row] for row in rows.tolist())
        if len(set(names)) < len(names):
            raise ValueError("it has two images of the same id")
        store = Images((path,), tensors, rows, decoded=kind == "raw")
        paths = tuple(f"{path}:{name}" for name in names)
        own_weights = None if weights is None else weights[rows]
        indices[split] = Index(paths, names, labels[rows], sizes[rows], classes, store=store, weights=own_weights)
    return indices


def _names(metadata: dict[str, str], key: str) -> tuple[str, ...]:
    names = json.loads(metadata.get(key) or "null")
    if not (isinstance(names, list) and names and all(isinstance(name, str) and name for name in names)):
        raise ValueError(f"its {key} are not a list of names")
    if len(set(names)) < len(names) or (key == "classes" and names != sorted(names)):
        raise ValueError(f"its {key} are not sorted, or one is there twice")
    return tuple(names)
