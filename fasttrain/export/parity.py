"""Compares an exported file with its checkpoint, on images, before it is put in place."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from PIL import Image

from fasttrain.data.index import Index
from fasttrain.distributed.ranks import Ranks
from fasttrain.evaluation import metrics
from fasttrain.exported import GRAPHS
from fasttrain.predict import predict
from fasttrain.utils.errors import RunError
from fasttrain.utils.files import is_inside, read_json_object
from fasttrain.utils.text import printable

LEAST_AGREEMENT = 0.995  # share of images whose most likely class must be the same
# A near tie: the checkpoint gives the file's class nearly the probability of its own, and the file's probabilities are
# all as near to the checkpoint's. One unit of 255 in the pixels, which is what image decoders and resizes differ by,
# decides such a tie one way or the other.
NEAR = 0.02
MOST_NEAR_TIES = 0.02  # share of images; a network whose answers are all near ties cannot be compared
SUFFIX = ".parity.json"
_CPU = Ranks(0, 1, 0, 1, torch.device("cpu"))
_SCRIPT = Path(__file__).with_name("with_timm.py")


@dataclass(frozen=True)
class Parity:
    """How an exported file compares with its checkpoint on `images` images.

    agreement: the share of images with the same most likely class. near_ties: the share of images with another one,
    which is as likely within 2 %; see NEAR. max_difference: the largest absolute difference of two probabilities.
    top1_checkpoint, top1_file: top-1 of both, where the images have labels. run_by: what computed the file's
    probabilities. images_from: where the images are from.
    """

    images: int
    agreement: float
    near_ties: float
    max_difference: float
    top1_checkpoint: float | None
    top1_file: float | None
    run_by: str
    images_from: str

    @property
    def passed(self) -> bool:
        return self.agreement + min(self.near_ties, MOST_NEAR_TIES) >= LEAST_AGREEMENT

    def to_json(self, **facts: object) -> str:
        """The content of the file next to the exported one. facts: more of it."""
        return json.dumps({"fasttrain_parity": 1, **facts, **asdict(self)}, indent=1, allow_nan=False) + "\n"

    def __str__(self) -> str:
        line = (
            f"{self.agreement:.2%} of {self.images} images have the same top-1 class (at least {LEAST_AGREEMENT:.1%} "
            f"are required), probabilities differ by at most {self.max_difference:.2g}"
        )
        if self.near_ties:
            line += f", {self.near_ties:.2%} are near ties (two classes within 2 %)"
        if self.top1_file is not None:
            line += f", top-1 {self.top1_checkpoint:.2%} before and {self.top1_file:.2%} after"
        return f"{line}; run by {self.run_by} on {self.images_from}"


def compare(file: Path, run: Path, index: Index, *, raw: bool, labeled: bool, images_from: str) -> Parity:
    """Compare an exported file, with config.json next to it, with the checkpoint of `run`.

    Graphs run as `fasttrain eval` runs them. Weights are loaded by timm in a process of its own, which decodes the
    images with PIL and preprocesses them by config.json. raw: the file has the raw weights, not the averaged ones.
    labeled: the index's labels are those of the network's classes. Raises RunError where one of the two fails.
    """
    expected = predict(run, lambda *_: index, _CPU, raw=raw, precision="fp32")
    assert expected is not None
    if file.suffix in GRAPHS:
        found = predict(file, lambda *_: index, _CPU)
        assert found is not None
        probs = found.probs
        run_by = f"onnxruntime {version('onnxruntime')}" if file.suffix == ".onnx" else f"torch {torch.__version__}"
    else:
        probs, run_by = _with_timm(file, index), f"timm {timm.__version__} with PIL"
    return of_probabilities(
        expected.probs, probs, index.labels if labeled else None, run_by=run_by, images_from=images_from
    )


def of_probabilities(
    expected: NDArray[np.float32],
    found: NDArray[np.float32],
    labels: NDArray[np.int64] | None,
    run_by: str,
    images_from: str,
) -> Parity:
    """The comparison of two networks' probabilities [N, K]. labels: int64 [N]."""
    if found.shape != expected.shape or not np.isfinite(found).all():
        raise RunError(f"the exported network returns {list(found.shape)} values, or some that are not finite")
    own, other = expected.argmax(1), found.argmax(1)
    rows = np.arange(len(expected))
    gap = np.maximum(expected[rows, own] - expected[rows, other], np.abs(expected - found).max(1))
    near = gap <= NEAR * expected[rows, own]
    return Parity(
        images=len(expected),
        agreement=float((own == other).mean()),
        near_ties=float((near & (own != other)).mean()),
        max_difference=float(np.abs(expected - found).max()),
        top1_checkpoint=None if labels is None else metrics.scores(expected, labels).top1,
        top1_file=None if labels is None else metrics.scores(found, labels).top1,
        run_by=run_by,
        images_from=images_from,
    )


def is_parity(path: Path) -> bool:
    """Whether a file is one that an export wrote about its file."""
    return "fasttrain_parity" in read_json_object(path)


def spread(index: Index, most: int) -> Index:
    """At most `most` images of an index, evenly spread over it, and so over its classes. 0: all."""
    if not most or len(index) <= most:
        return index
    return index.take(np.linspace(0, len(index) - 1, most).round().astype(np.int64))


def _with_timm(file: Path, index: Index) -> NDArray[np.float32]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        listing, out = folder / "images.json", folder / "probabilities.npy"
        listing.write_text(json.dumps([_image_file(index, number, folder) for number in range(len(index))]))
        # Without the script's folder (-P) and ours on the path, the script finds what others have installed.
        folders = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        others = [each for each in folders if each and not is_inside(_SCRIPT, each)]
        env = os.environ | {"PYTHONPATH": os.pathsep.join(others)}
        command = [sys.executable, "-P", str(_SCRIPT), str(file), str(listing), str(out)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, errors="replace")
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise RunError(f"timm cannot run the exported file: {printable(reason)[:300]}")
        return np.load(out, allow_pickle=False)


def _image_file(index: Index, number: int, folder: Path) -> str:
    """The path of an image's file, which is written to `folder` where the image is in a container."""
    if index.store is None:
        return index.paths[number]
    content = index.store.content(number)
    path = folder / f"{number}.png"
    if index.store.decoded:
        Image.fromarray(content).save(path, compress_level=1)
    else:
        path.write_bytes(content.tobytes())
    return str(path)
