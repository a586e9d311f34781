"""Finds the file that caused a pipeline's error: DALI does not know from which file a decoder's input comes."""

import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def, types

from fasttrain.data.index import Index
from fasttrain.pipelines.decode_graph import decode, header_size
from fasttrain.pipelines.decoders import Decoder
from fasttrain.utils.errors import RunError
from fasttrain.utils.text import printable


@pipeline_def(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1, exec_dynamic=True)
def _decode_one() -> Any:
    path = fn.external_source(name="path", dtype=types.UINT8, ndim=1)
    encoded = fn.io.file.read(path)
    return decode(encoded, header_size(encoded), Decoder("cpu"), on_gpu=False)


def decode_problem(path: str, size: Sequence[int] | None = None) -> str:
    """Why an image cannot be read and decoded; empty if it can.

    size: (height, width) in the index. If the image has another size, the planned crops may lie outside it.
    """
    try:
        if os.path.getsize(path) == 0:
            return "the file is empty"
        pipe = _decode_one()  # a new one each time: after some errors a pipeline always fails
        pipe.build()
        pipe.feed_input("path", [np.frombuffer(os.fsencode(path), np.uint8)])
        height, width, _ = pipe.run()[0].shape()[0]
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    except RuntimeError:  # DALI's message holds an error code at most
        return "it is damaged, or not an image that DALI can read"
    if size is not None and (height, width) != tuple(size):
        return f"it has {width} x {height} pixels, but had {size[1]} x {size[0]} when the folder was scanned"
    return ""


def check_sizes(headers: NDArray[np.int32], sizes: NDArray[np.int32]) -> None:
    """Raises RuntimeError, as the pipeline does, where headers have other sizes than the index, int32 [n, 2] each: the
    files were replaced after the scan, and crops were planned for the old ones."""
    if (headers != sizes).any():
        raise RuntimeError("images have other sizes than when the folder was scanned")


def require_folder(path: str) -> None:
    """Raises RunError where the folder of an image no longer exists; its other images cannot be read either."""
    folder = os.path.dirname(path)
    if not os.path.isdir(folder):
        raise RunError(
            f"{printable(folder)} no longer exists or cannot be read; its disk may be disconnected. Once it is back, "
            "the same command resumes from the last checkpoint"
        )


class Skip(NamedTuple):
    """An image that cannot be trained on, the reason, and the image that replaces it everywhere. Both are paths."""

    path: str
    reason: str
    substitute: str


def substitutes(
    index: Index, indices: NDArray[np.int64], replacement: NDArray[np.int64]
) -> Iterator[tuple[int, int, Skip]]:
    """(number, substitute's number, Skip) for each of the images that cannot be decoded.

    The substitute is the class's next image in the index that can be decoded; after the last image the search starts
    again at the first. It depends only on the files. replacement: int64 [N], the substitutes found so far; the other
    images replace themselves. Raises RunError where a class has no image that can be decoded, or a folder no longer
    exists.
    """
    for number in indices.tolist():
        size = index.sizes[number]
        reason = "its header cannot be read" if size[0] == 0 else decode_problem(index.paths[number], size)
        if not reason:
            continue
        require_folder(index.paths[number])
        of_class = np.flatnonzero(index.labels == index.labels[number])
        start = int(np.searchsorted(of_class, number)) + 1
        for other in np.roll(of_class, -start)[:-1].tolist():
            size = index.sizes[other]
            if size[0] and replacement[other] == other and not decode_problem(index.paths[other], size):
                yield number, other, Skip(index.paths[number], reason, index.paths[other])
                break
        else:
            name = printable(index.classes[index.labels[number]])
            raise RunError(f"no image of class {name!r} can be decoded, for example {printable(index.paths[number])}")


def decode_error(error: Exception, paths: Sequence[str], sizes: NDArray[np.int32]) -> RunError:
    """A RunError that names the first of `paths` that cannot be read and decoded; if all can, it names the batch.

    sizes: int32 [N, 2], from the index. Raises RunError itself where a folder no longer exists.
    """
    for path, size in zip(paths, sizes, strict=True):
        reason = decode_problem(path, size)
        if reason:
            require_folder(path)
            return RunError(f"cannot decode {printable(path)}: {reason}; fix or remove it")
    first_paths = ", ".join(printable(path) for path in paths[:3])
    reason = _error_line(error)
    return RunError(f"the data pipeline failed on a batch of {len(paths)} files ({first_paths}, …): {reason}")


def _error_line(error: Exception) -> str:
    """The line of DALI's message that says what happened: the one after `encountered:`, or else the first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    row = lines.index("encountered:") + 1 if "encountered:" in lines[:-1] else 0
    return lines[row] if lines else "unknown error"
