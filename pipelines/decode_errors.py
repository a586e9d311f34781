"""Finding the file behind a pipeline's error: DALI does not know the names of files that it did not read itself."""

import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def, types

from fasttrain.data.index import Index
from fasttrain.pipelines.decode_graph import decode
from fasttrain.pipelines.decoders import Decoder
from fasttrain.utils.errors import RunError
from fasttrain.utils.text import printable


@pipeline_def(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1, exec_dynamic=True)
def _decode_one() -> Any:
    path = fn.external_source(name="path", dtype=types.UINT8, ndim=1)
    return decode(fn.io.file.read(path), Decoder("cpu"), on_gpu=False)


def decode_problem(path: str, size: Sequence[int] | None = None) -> str:
    """Why an image cannot be read and decoded, or nothing where it can. size: (height, width) in the index; with
    another size, the crops that were planned may be outside the image."""
    try:
        if os.path.getsize(path) == 0:
            return "the file is empty"
        pipe = _decode_one()  # afresh each time: after some errors a pipeline fails for ever
        pipe.build()
        pipe.feed_input("path", [np.frombuffer(os.fsencode(path), np.uint8)])
        height, width, _ = pipe.run()[0].shape()[0]
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    except RuntimeError:  # DALI's reason is a number, or nothing
        return "it is damaged, or no image that DALI reads"
    if size is not None and (height, width) != tuple(size):
        return f"it has {width} x {height} pixels, but {size[1]} x {size[0]} when the folder was scanned"
    return ""


def require_folder(path: str) -> None:
    """RunError where the folder of an image has gone: then it is no use to look for others."""
    folder = os.path.dirname(path)
    if not os.path.isdir(folder):
        raise RunError(
            f"{printable(folder)} is no longer there or cannot be read, as if its disk had gone; once it is back, the "
            "same command goes on from the last checkpoint"
        )


class Skip(NamedTuple):
    """An image that is not trained on, why not, and the one that takes its place wherever it comes; paths."""

    path: str
    reason: str
    substitute: str


def substitutes(
    index: Index, numbers: NDArray[np.int64], replacement: NDArray[np.int64]
) -> Iterator[tuple[int, int, Skip]]:
    """(number, substitute's number, Skip) for each of the images that cannot be decoded.

    The substitute is the next image of the class in the index, after the last again the first, that can be decoded:
    it depends on the files alone. replacement: int64 [N], the images found so far, others in their own place. Raises
    RunError where a class has no image that can be decoded, or its folder has gone.
    """
    for number in numbers.tolist():
        size = index.sizes[number]
        reason = "its header cannot be read" if size[0] == 0 else decode_problem(index.paths[number], size)
        if not reason:
            continue
        require_folder(index.paths[number])
        same = np.flatnonzero(index.labels == index.labels[number])
        start = int(np.searchsorted(same, number)) + 1
        for other in np.roll(same, -start)[:-1].tolist():
            size = index.sizes[other]
            if size[0] and replacement[other] == other and not decode_problem(index.paths[other], size):
                yield number, other, Skip(index.paths[number], reason, index.paths[other])
                break
        else:
            name = printable(index.classes[index.labels[number]])
            raise RunError(f"no image of class {name!r} can be decoded, such as {printable(index.paths[number])}")


def decode_error(error: Exception, paths: Sequence[str], sizes: NDArray[np.int32]) -> RunError:
    """A RunError that names the first of `paths` that cannot be read and decoded, or all of the batch if each can.
    sizes: int32 [N, 2], those in the index. Raises one itself where a folder has gone."""
    for path, size in zip(paths, sizes, strict=True):
        reason = decode_problem(path, size)
        if reason:
            require_folder(path)
            return RunError(f"cannot decode {printable(path)}: {reason}; mend or remove it")
    few = ", ".join(printable(path) for path in paths[:3])
    return RunError(f"the data pipeline failed on a batch of {len(paths)} files ({few}, …): {_gist(error)}")


def _gist(error: Exception) -> str:
    """The line of DALI's report that says what happened: the first after `encountered:`, where there is one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    at = lines.index("encountered:") + 1 if "encountered:" in lines[:-1] else 0
    return lines[at] if lines else "unknown error"
