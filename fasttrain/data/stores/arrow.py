"""Parquet and Arrow files as Hugging Face datasets writes them, with images in a column.

An image is a struct of its `bytes` and its `path`, or binary. A label is a class of the `ClassLabel` that the schema
names, or a number or a name in the column `label`, `labels`, `cls` or `class`. A folder may hold several splits: one
that `save_to_disk` has written, or files such as data/train-00000-of-00002.parquet.

Arrow files are read through a memory map. A parquet file has no random access, so its images are copied once into an
Arrow file in the cache. An image's id is its path in the struct, or its row where paths are missing or not unique.
"""

import glob
import hashlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fasttrain.data.index import Index, of_samples
from fasttrain.data.layout import VAL_NAMES, has_folders
from fasttrain.data.scan import Limits, cache_dir, sizes_of, stamp
from fasttrain.data.stores import stored_file
from fasttrain.data.stores.patterns import expand
from fasttrain.utils.errors import UserError
from fasttrain.utils.files import atomic, read_json_object
from fasttrain.utils.text import printable

if TYPE_CHECKING:
    import pyarrow

_SPLIT = re.compile(r"(train|test|val|valid|validation)(?![a-z])")
_MARKERS = ("dataset_dict.json", "dataset_info.json", "state.json")  # of save_to_disk
_LABELS = ("label", "labels", "cls", "class")
_IMAGES = ("image", "img", "jpg", "png")
_ROWS = 16  # of a parquet file, in memory at once


@dataclass(frozen=True, eq=False)
class ArrowImages:
    """The store of images in Arrow tables. files: those that are read. data: the content of each chunk, uint8. chunk:
    int32 [N]. starts, ends: int64 [N], in bytes."""

    files: tuple[str, ...]
    data: list[NDArray[np.uint8]]
    chunk: NDArray[np.int32]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    decoded: bool = False

    def length(self, number: int) -> int:
        """See `Store`."""
        return int(self.ends[number] - self.starts[number])

    def content(self, number: int) -> NDArray[np.uint8]:
        """A view of the memory map; see `Store`."""
        return self.data[self.chunk[number]][self.starts[number] : self.ends[number]]


class _Columns(NamedTuple):
    """The names of the columns of images and labels, and those of the classes where the labels are their positions."""

    image: str
    label: str | None
    classes: tuple[str, ...] | None

    @classmethod
    def of(cls, schema: "pyarrow.Schema", file: Path) -> "_Columns":
        """Raises UserError where it is not clear which column holds the images or the labels."""
        features = _features(schema)
        images = [name for name in schema.names if _holds_images(name, schema.field(name).type)]
        if len(images) > 1:
            images = [name for name in images if name in _IMAGES][:1] or images
        if len(images) != 1:
            found = ", ".join(map(printable, images)) or "none"
            raise UserError(f"{printable(file)}: one column must hold the bytes of images; found {found}")
        named = [name for name, each in features.items() if each.get("_type") == "ClassLabel" and name in schema.names]
        labels = named or [name for name in _LABELS if name in schema.names]
        if len(labels) > 1:
            labels = [name for name in labels if name in _LABELS][:1] or labels
        if len(labels) > 1:
            raise UserError(f"{printable(file)} has several columns of labels: {', '.join(map(printable, labels))}")
        if not labels:
            return cls(images[0], None, None)
        classes = features.get(labels[0], {}).get("names") if named else None
        if classes is not None and not _are_names(classes):
            raise UserError(f"{printable(file)}: the names of its classes are not a list of different texts")
        return cls(images[0], labels[0], None if classes is None else tuple(classes))


def _features(schema: "pyarrow.Schema") -> dict[str, dict[str, Any]]:
    """The features that datasets has written into a schema, by name."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        return {name: each for name, each in features.items() if isinstance(each, dict)}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _are_names(value: Any) -> bool:
    return (
        isinstance(value, list)
        and all(isinstance(name, str) and name for name in value)
        and len(set(value)) == len(value)
    )


def _holds_images(name: str, kind: "pyarrow.DataType") -> bool:
    import pyarrow.types as types

    if types.is_struct(kind):
        position = kind.get_field_index("bytes")
        kind = kind.field(position).type if position >= 0 else None
        return kind is not None and (types.is_binary(kind) or types.is_large_binary(kind))
    return name in _IMAGES and (types.is_binary(kind) or types.is_large_binary(kind))


def is_arrow(path: str | Path) -> bool:
    if not os.path.isdir(path):
        return str(path).lower().endswith((".parquet", ".arrow"))
    return any(os.path.isfile(os.path.join(path, name)) for name in _MARKERS) or bool(_files_by_split(Path(path)))


def open_arrow(path: str | Path, limits: Limits, *, labeled: bool = True, progress: bool = True) -> dict[str, Index]:
    """The indices of the splits, by name; `train` where the files do not name one. Images that cannot be used have the
    size 0 and a problem.

    labeled: each image of `train` and `val` needs a label; if not, all labels are −1. Raises UserError, which names the
    file and the row, where pyarrow is missing, a file is damaged or has no column of images, or a label is missing.
    """
    try:
        import pyarrow
    except ImportError:
        raise UserError(f"{printable(path)} needs pyarrow: pip install pyarrow") from None
    files = _files_by_split(Path(path)) if os.path.isdir(path) else {"train": expand(str(path))}
    splits = sorted({_split_name(os.path.basename(name)) for name in files.get("train", ())} - {""})
    if len(splits) > 1:
        raise UserError(f"{printable(path)} has files of the splits {' and '.join(splits)}; name those of one")
    if not files:
        raise UserError(f"{printable(path)} holds no data files; those of save_to_disk are called data-….arrow")
    try:
        parts = {split: [_Part.open(name, progress) for name in names] for split, names in files.items()}
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise UserError(f"cannot read {printable(path)}: {printable(str(error)).splitlines()[0][:300]}") from None
    everything = [part for some in parts.values() for part in some]
    classes = sorted({name for part in everything for name in (*part.classes, *part.labels) if name}) if labeled else []
    return {split: _index(split, some, classes, path, limits, labeled, progress) for split, some in parts.items()}


def _index(
    split: str,
    parts: "Sequence[_Part]",
    classes: Sequence[str],
    path: str | Path,
    limits: Limits,
    labeled: bool,
    progress: bool,
) -> Index:
    """The index of a split's files."""
    names = [name for part in parts for name in part.names]
    if not names:
        raise UserError(f"{printable(path)} holds no images ({split})")
    for prefixes in ([part.file.stem for part in parts], [f"{number:05}" for number in range(len(parts))]):
        if not all(names) or len(set(names)) < len(names):
            numbered = zip(parts, prefixes, strict=True)
            names = [f"{prefix}-{row:07}" for part, prefix in numbered for row in range(len(part.names))]
    labels = [label for part in parts for label in part.labels]
    has_labels = labeled and all(labels)
    if labeled and not has_labels and split in ("train", "val"):
        part = next(part for part in parts if not all(part.labels))
        raise UserError(f"{printable(part.file)}: row {part.labels.index('')} has no label")
    samples = of_samples(names, labels if has_labels else None, path, classes)
    places = [(part, row) for part in parts for row in range(len(part.names))]
    order = samples.order.tolist()
    paths = tuple(f"{part.file}:{row}" for part, row in (places[number] for number in order))
    chunks = [chunk for part in parts for chunk in part.chunks]
    store = ArrowImages(
        tuple(str(part.source) for part in parts),
        [content for content, _ in chunks],
        np.repeat(np.arange(len(chunks), dtype=np.int32), [len(offsets) - 1 for _, offsets in chunks])[order],
        np.concatenate([offsets[:-1] for _, offsets in chunks])[order],
        np.concatenate([offsets[1:] for _, offsets in chunks])[order],
    )
    digest = hashlib.sha256(b"arrow\0" + "".join(part.stamp for part in parts).encode(errors="surrogateescape"))
    digest.update(samples.order.tobytes())  # which is another one without labels

    def open_image(number: int) -> IO[bytes]:
        content = store.content(number)
        return stored_file(len(content), lambda start, length: content[start : start + length].tobytes())

    sizes, problems = sizes_of(paths, digest.hexdigest(), progress, limits, open_image)
    return Index(paths, samples.ids, samples.labels, sizes, samples.classes, problems, store)


def _files_by_split(folder: Path) -> dict[str, list[str]]:
    """The data files of a folder, by split; an empty table where it holds none."""
    if (folder / "state.json").is_file():
        return {"train": _saved_files(folder)}
    found: dict[str, list[str]] = {}
    if (folder / "dataset_dict.json").is_file():
        for part in sorted(folder.iterdir()):
            if (part / "state.json").is_file():
                found.setdefault(_split_name(part.name), []).extend(_saved_files(part))
        return found
    if has_folders(folder / "train") or not folder.is_dir():
        return {}
    pattern = glob.escape(str(folder))
    for name in sorted(path for part in ("", "/data", "/*") for path in glob.glob(f"{pattern}{part}/*.parquet")):
        split = _split_name(os.path.basename(name)) or _split_name(os.path.basename(os.path.dirname(name)))
        if split:
            found.setdefault(split, []).append(name)
    for split, names in found.items():
        folders = sorted({os.path.dirname(name) for name in names})
        if len(folders) > 1:
            listed = " and ".join(map(printable, folders[:2]))
            raise UserError(f"{printable(folder)} has files of {split} in {listed}; name the folder to use")
    return {split: sorted(set(names)) for split, names in found.items()}


def _saved_files(folder: Path) -> list[str]:
    """The files that a folder's state.json names."""
    entries = read_json_object(folder / "state.json").get("_data_files")
    names = [each.get("filename") for each in entries if isinstance(each, dict)] if isinstance(entries, list) else []
    if not names or not all(isinstance(name, str) and name == os.path.basename(name) for name in names):
        raise UserError(f"{printable(folder / 'state.json')} does not name the data files next to it")
    return [str(folder / str(name)) for name in names]


def _split_name(name: str) -> str:
    """The split that a file or a folder belongs to by its name, or an empty string."""
    match = _SPLIT.match(name)
    return "" if match is None else "val" if match[1] in VAL_NAMES else match[1]


@dataclass(frozen=True, eq=False)
class _Part:
    """A file. source: the Arrow file that is read. chunks: the content of the images, uint8, and where each starts and
    ends in it, int64 [n + 1]. names: the images' paths; "" where one has none. labels: "" where there is none. classes:
    those that the schema names."""

    file: Path
    source: Path
    stamp: str
    chunks: list[tuple[NDArray[np.uint8], NDArray[np.int64]]]
    names: list[str]
    labels: list[str]
    classes: tuple[str, ...]

    @classmethod
    def open(cls, name: str, progress: bool) -> "_Part":
        """Raises UserError where the file has no column of images; OSError, ValueError or ArrowException where it is
        damaged."""
        import pyarrow.compute

        file = Path(os.path.realpath(name))
        mark = stamp(str(file), file.stat())
        source = _in_arrow(file, mark, progress) if file.suffix.lower() == ".parquet" else file
        table = _mapped(source)
        columns = _Columns.of(table.schema, file)
        images, paths = table[columns.image], None
        if pyarrow.types.is_struct(images.type):
            paths = pyarrow.compute.struct_field(images, "path") if images.type.get_field_index("path") >= 0 else None
            images = pyarrow.compute.struct_field(images, "bytes")
        if images.null_count:
            row = images.is_null().to_pylist().index(True)
            raise UserError(f"{printable(file)}: row {row} has no bytes of an image; store the images in the file")
        names = [""] * len(images) if paths is None else [_image_name(path) for path in paths.to_pylist()]
        labels = [""] * len(images)
        if columns.label is not None:
            kind = table.schema.field(columns.label).type
            if pyarrow.types.is_floating(kind) or pyarrow.types.is_boolean(kind):
                raise UserError(
                    f"{printable(file)}: the labels in {printable(columns.label)} are {kind}; store integers or text"
                )
            labels = [_label_text(value, columns.classes) for value in table[columns.label].to_pylist()]
        chunks = [_content(chunk) for chunk in images.chunks if len(chunk)]
        return cls(file, source, mark, chunks, names, labels, columns.classes or ())


def _image_name(path: str | None) -> str:
    """An image's path as an id; "" where there is none, or it leads out of a folder."""
    name = os.path.normpath(path) if path else ""
    return "" if name.startswith(("/", "..")) or "\0" in name else name


def _label_text(value: Any, classes: tuple[str, ...] | None) -> str:
    """A label as the name of its class; "" where it is missing, which datasets writes as −1."""
    if classes is not None and type(value) is int:
        return classes[value] if 0 <= value < len(classes) else ""
    return str(value).strip() if type(value) in (int, str) and value != -1 else ""


def _content(chunk: "pyarrow.Array") -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The bytes of a chunk of a binary column, and the offsets of its values in them, int64 [n + 1]."""
    import pyarrow

    _, offsets, data = chunk.buffers()
    kind = np.int64 if pyarrow.types.is_large_binary(chunk.type) else np.int32
    bounds = np.frombuffer(offsets, kind)[chunk.offset : chunk.offset + len(chunk) + 1].astype(np.int64)
    return np.frombuffer(data, np.uint8) if data is not None else np.zeros(0, np.uint8), bounds


def _mapped(file: Path) -> "pyarrow.Table":
    """An Arrow file as a table, whose content is checked, in a memory map."""
    import pyarrow

    with pyarrow.memory_map(str(file)) as source:
        try:
            table = pyarrow.ipc.open_stream(source).read_all()
        except pyarrow.ArrowInvalid:
            source.seek(0)
            table = pyarrow.ipc.open_file(source).read_all()
    table.validate(full=True)  # else a damaged file could lead to any address
    return table


def _in_arrow(file: Path, mark: str, progress: bool) -> Path:
    """A copy of a parquet file's images and labels as an Arrow file in the cache. Raises UserError where the disk has
    too little space."""
    import pyarrow.parquet
    from tqdm import tqdm

    key = hashlib.sha256(mark.encode(errors="surrogateescape")).hexdigest()
    copy = cache_dir() / "arrow" / f"{key}.arrow"
    if copy.is_file():
        return copy
    with pyarrow.parquet.ParquetFile(file) as source:
        columns = _Columns.of(source.schema_arrow, file)
        wanted = [name for name in (columns.image, columns.label) if name is not None]
        schema = pyarrow.schema([source.schema_arrow.field(name) for name in wanted], source.schema_arrow.metadata)
        copy.parent.mkdir(parents=True, exist_ok=True)
        # `disable=None` hides the bar where stderr is not a terminal.
        rows, name = source.metadata.num_rows, f"copying {printable(file.name)}"
        bar = tqdm(total=rows, desc=name, unit="img", disable=None if progress else True)
        with bar, atomic(copy) as temporary, pyarrow.ipc.new_stream(str(temporary), schema) as writer:
            for batch in source.iter_batches(_ROWS, columns=wanted):
                if batch.nbytes > shutil.disk_usage(copy.parent).free:
                    raise UserError(
                        f"the images of {printable(file)} do not fit into {printable(copy.parent)}; set "
                        "XDG_CACHE_HOME to a folder on a larger disk"
                    )
                writer.write_batch(batch)
                bar.update(len(batch))
    return copy
