"""Finds the image that caused a pipeline's error: DALI does not know from which file a decoder's input comes."""

import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def, types

from fasttrain.data.index import Index
from fasttrain.pipelines.decoders import Decoder
from fasttrain.pipelines.image_input import read_images
from fasttrain.pipelines.plan import Plan
from fasttrain.utils.environment import exhausted
from fasttrain.utils.errors import RunError
from fasttrain.utils.text import printable

_CPU = torch.device("cpu")
_CPU_DECODER = Decoder("cpu")


@pipeline_def(batch_size=1, num_threads=1, prefetch_queue_depth=1, exec_dynamic=True)
def _decode_one(region: bool, decoder: Decoder, on_gpu: bool) -> tuple[Any, Any]:
    """One image or a region of it, decoded as in the loaders' graphs, and the size in its header."""
    nodes = {"encoded": fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)}
    if not region:
        return read_images(nodes, decoder, on_gpu)
    start, shape = (fn.external_source(name=name, dtype=types.INT32, ndim=1) for name in ("start", "shape"))
    return read_images(nodes, decoder, on_gpu, (start, shape))


def image_problem(
    index: Index,
    number: int,
    region: tuple[NDArray[np.int32], NDArray[np.int32]] | None = None,
    decoder: Decoder = _CPU_DECODER,
    device: torch.device = _CPU,
) -> str:
    """Why an image of the index cannot be decoded; empty if it can, or if its pixels are stored.

    Raises RunError if it is there but cannot be read: that says nothing about the image. The arguments are those of
    `content_problem`.
    """
    path = index.paths[number]
    if index.store is not None:
        if index.store.decoded:
            return ""
        content = index.store.content(number)
    else:
        try:
            content = np.fromfile(path, np.uint8)
        except FileNotFoundError:
            require_folder(path)
            return "the file no longer exists"
        except OSError as error:
            raise RunError(
                f"cannot read {printable(path)}: {error.strerror}; check the disk, or move the file away"
            ) from None
    return content_problem(content, index.sizes[number], region, decoder, device)


def content_problem(
    content: NDArray[np.uint8],
    size: Sequence[int] | None = None,
    region: tuple[NDArray[np.int32], NDArray[np.int32]] | None = None,
    decoder: Decoder = _CPU_DECODER,
    device: torch.device = _CPU,
) -> str:
    """Why the content of an image file, uint8 [n], cannot be decoded; empty if it can.

    size: (height, width) in the index; an image of another size is refused, since its crops were planned for this one.
    region: (top, left) and (height, width) of the region to decode, int32 [2] each, in pixels; None: the whole image.
    decoder, device: those of the loader.
    """
    if not len(content):
        return "the file is empty"
    on_gpu = device.type == "cuda"
    try:
        # A new pipeline each time: after some errors a pipeline always fails.
        pipe = _decode_one(region is not None, decoder, on_gpu, device_id=device.index or 0 if on_gpu else None)
        pipe.build()
        pipe.feed_input("encoded", [content])
        if region is not None:
            for name, value in zip(("start", "shape"), region, strict=True):
                pipe.feed_input(name, [value])
        _, header = pipe.run()
        height, width = np.array(header.as_array())[0].tolist()
    except RuntimeError as error:
        if line := exhausted(error):
            raise RunError(line) from None
        # Else DALI's message holds an error code at most.
        damaged = "it is damaged, or not an image that DALI can read"
        return damaged if region is None else content_problem(content, size) or damaged
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
    """An image that cannot be trained on, the reason, and the image that replaces it at this step. Both are paths."""

    path: str
    reason: str
    substitute: str


class Substitutes:
    """With `--on-bad skip`: the images that replace those which cannot be decoded.

    Whether an image can be decoded at a step is decided for the region that the step needs: a truncated file may have
    it or not. The substitute is the class's next image in the index whose own region can be decoded; after the last
    image the search goes on with the first. Both depend only on the files and (seed, epoch, step), not on what this
    process met before.
    """

    def __init__(self, plan: Plan, index: Index, decoder: Decoder, device: torch.device) -> None:
        self.plan, self.index, self.decoder, self.device = plan, index, decoder, device
        # Images that failed once. Only they are tested at each step; any other one makes its batch fail first.
        self.suspects = set(np.flatnonzero(index.sizes[:, 0] == 0).tolist())
        self.reasons: dict[int, str] = {}
        self.reported: set[int] = set()

    def apply(self, step: int, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """The samples to use at a step instead of these, int64 [n]. Raises RunError where a class has no image that can
        be decoded, or a folder no longer exists."""
        if self.suspects.isdisjoint(self.plan.image_of(samples).tolist()):
            return samples
        return np.array([self._substitute(step, sample) for sample in samples.tolist()], np.int64)

    def _substitute(self, step: int, sample: int) -> int:
        number = sample % self.plan.count
        reason = self._known_problem(step, sample)
        if not reason:
            return sample
        self.reasons[number] = reason
        drawn = True if self.index.weights is None else self.index.weights > 0
        of_class = np.flatnonzero((self.index.labels == self.index.labels[number]) & drawn)
        following = int(np.searchsorted(of_class, number)) + 1
        for other in (np.roll(of_class, -following)[:-1] + (sample - number)).tolist():
            if not self._known_problem(step, other):
                return other
        name = printable(self.index.classes[self.index.labels[number]])
        raise RunError(f"no image of class {name!r} can be decoded, for example {printable(self.index.paths[number])}")

    def new_skips(self, indices: NDArray[np.int64], used: NDArray[np.int64]) -> Iterator[Skip]:
        """A Skip for each image that was replaced for the first time. indices, used: what `apply` took and returned."""
        for number, other in zip(indices.tolist(), used.tolist(), strict=True):
            if number != other and number not in self.reported:
                self.reported.add(number)
                yield Skip(self.index.paths[number], self.reasons[number], self.index.paths[other])

    def add_suspects(self, step: int, samples: NDArray[np.int64]) -> bool:
        """Test the samples of a batch that failed; whether the image of one of them had not been a suspect."""
        found = {
            number
            for sample, number in zip(samples.tolist(), self.plan.image_of(samples).tolist(), strict=True)
            if number not in self.suspects and self._problem(step, sample)
        }
        self.suspects |= found
        return bool(found)

    def _known_problem(self, step: int, sample: int) -> str:
        return self._problem(step, sample) if sample % self.plan.count in self.suspects else ""

    def _problem(self, step: int, sample: int) -> str:
        number = sample % self.plan.count
        size = self.index.sizes[number]
        if not size[0]:
            return self.index.problems.get(number, "its header cannot be read")
        start, shape = self.plan.region(self.plan.all_draws(step, np.array([sample]), size[None]))
        return image_problem(self.index, number, (start[0], shape[0]), self.decoder, self.device)


def decode_error(error: Exception, index: Index, numbers: NDArray[np.int64]) -> RunError:
    """A RunError that names the first of these images that cannot be read and decoded; if all can, it names the batch.
    Raises RunError itself where a folder no longer exists."""
    if line := exhausted(error):
        return RunError(line)
    for number in numbers.tolist():
        if reason := image_problem(index, number):
            path = index.paths[number]
            advice = "fix or remove it" if index.store is not None or os.path.exists(path) else "put it back"
            return RunError(f"cannot decode {printable(path)}: {reason}; {advice}")
    first_paths = ", ".join(printable(index.paths[number]) for number in numbers[:3])
    reason = _error_line(error)
    return RunError(f"the data pipeline failed on a batch of {len(numbers)} images ({first_paths}, …): {reason}")


def _error_line(error: Exception) -> str:
    """The line of DALI's message that says what happened: the one after `encountered:`, or else the first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    row = lines.index("encountered:") + 1 if "encountered:" in lines[:-1] else 0
    return lines[row] if lines else "unknown error"
