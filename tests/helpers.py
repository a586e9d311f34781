"""Shared by several tests: small runs and their results, plans, the command line, files that do not decode.

Every test imports this module, those of the kernels too. They also run where DALI is not installed, so functions that
train import it themselves.
"""

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from click.testing import CliRunner
from PIL import Image

from fasttrain import recipes
from fasttrain.checkpoints import checkpoint
from fasttrain.checkpoints.run_dir import open_run
from fasttrain.cli.main import main
from fasttrain.config import toml
from fasttrain.config.schema import MachineConfig
from fasttrain.data.index import Index
from fasttrain.data.scan import scan
from fasttrain.distributed.ranks import Ranks
from fasttrain.pipelines.plan import Plan
from fasttrain.pipelines.views import shorter_edge
from fasttrain.prepare import resolve_auto

ROOT = Path(__file__).parents[1]  # the project's root
CPU = Ranks(0, 1, 0, 1, torch.device("cpu"))
TINY = ["--arch", "test_resnet", "--image-size", "32", "--batch-size", "50", "--device", "cpu"]
LONG = ("--arch", "test_resnet", "--image-size", "32", "--batch-size", "50", "--epochs", "400")
RECIPE = recipes.for_arch("resnet18")


def part_of(demo_set: Path, per_class: int) -> Index:
    """The first `per_class` training images of each class of the demo set."""
    full = scan(demo_set / "train")
    numbers = [number for number in range(500) if number % 50 < per_class]
    return Index(
        tuple(full.paths[n] for n in numbers),
        tuple(full.ids[n] for n in numbers),
        full.labels[numbers],
        full.sizes[numbers],
        full.classes,
    )


def tiny(**changes):
    """A recipe that trains in one second."""
    recipe = replace(
        recipes.for_arch("test_resnet"),
        image_size=32,
        batch_size=20,
        epochs=2,
        precision="fp32",
        machine=MachineConfig(device="cpu", compile="off", log_steps=2, workers=2),
    )
    return replace(recipe, **changes)


def run(recipe, out, index, val=None, resume="auto"):
    """Train a recipe in this process, like `fasttrain run`."""
    from fasttrain.train import train

    start = open_run(out, resume, toml.to_toml(recipe))
    return train(resolve_auto(recipe, CPU.device), out, index, val, CPU, start)


def events(out: Path) -> list[dict]:
    """The lines of a run's log."""
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def weights(out: Path):
    """All tensors of a run's last checkpoint."""
    saved = checkpoint.load(out / "last")
    return saved.model | saved.train


class Stop(Exception):
    """Raised by `fail_at`."""


def fail_at(monkeypatch, step: int):
    """Make a run fail in step `step`, counted from 0."""
    from fasttrain import train as training

    original = training.batches

    def failing(plan, *args, **settings):
        for count, batch in enumerate(original(plan, *args, **settings)):
            if count == step * plan.micro_batches:
                raise Stop
            yield batch

    monkeypatch.setattr(training, "batches", failing)


def call(*args, status=0):
    """Run the command line in this process, and check its exit status."""
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    assert result.exit_code == status, (result.output, result.exception)
    return result


def logged(out: Path) -> dict[tuple, dict]:
    """What was logged for each step; for a step that was done twice, the second time."""
    lines = [event for event in events(out) if event["event"] in ("train", "eval", "collapsed")]
    return {(e["event"], e["step"]): {key: e[key] for key in e if key != "images_per_s"} for e in lines}


def same(out: Path, reference: Path) -> None:
    """Check that two runs have bitwise the same tensors, and the same log."""
    actual, expected = weights(out), weights(reference)
    assert actual.keys() == expected.keys()
    different = [name for name in actual if not torch.equal(actual[name], expected[name])]
    assert not different, different
    assert logged(out) == logged(reference)


def start_run(*args: object) -> subprocess.Popen:
    """Start `fasttrain run` in its own process."""
    command = [sys.executable, "-m", "fasttrain", "run", "--device", "cpu", *map(str, args)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def await_line(process: subprocess.Popen, part: str) -> None:
    """Wait until a process prints a line that contains `part` to stderr."""
    assert process.stderr is not None
    for line in process.stderr:
        if part in line:
            return
    raise AssertionError(f"ended without {part!r}")


def index_of(*sizes: int) -> Index:
    """An index of classes with these numbers of images; the files do not exist."""
    labels = np.repeat(np.arange(len(sizes)), sizes)
    names = tuple(f"{label}/{number}.jpg" for number, label in enumerate(labels))
    shapes = np.tile(np.array([64, 64], np.int32), (len(labels), 1))
    return Index(names, names, labels, shapes, tuple(map(str, range(len(sizes)))))


def plan_of(**changes) -> Plan:
    """A plan over 50 images of one class; the files do not exist."""
    settings = {"image_size": 64, "batch_size": 8, "epochs": 3}
    return Plan.of(replace(RECIPE, **(settings | changes)), index_of(50))


def reference_view(path: str, size: int, interpolation: str = "bilinear") -> np.ndarray:
    """A view by torchvision's Resize and CenterCrop."""
    from torchvision.transforms import CenterCrop, InterpolationMode, Resize

    image = Image.open(path).convert("RGB")
    image = Resize(shorter_edge(size), InterpolationMode(interpolation))(image)
    return np.asarray(CenterCrop(size)(image)).astype(int)


def broken_files() -> dict[str, bytes]:
    """Files that do not decode, by name."""
    rng = np.random.default_rng(0)
    files = {}
    for suffix, kind in ((".jpg", "JPEG"), (".png", "PNG"), (".webp", "WEBP"), (".bmp", "BMP")):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (60, 60, 3)).astype(np.uint8)).save(buffer, kind)
        files[f"truncated{suffix}"] = buffer.getvalue()[: len(buffer.getvalue()) // 2]
    buffer = io.BytesIO()
    Image.new("RGB", (61, 60)).save(buffer, "BMP")
    files["padding.bmp"] = buffer.getvalue()[:-1]  # one byte of the last row's padding is missing, but no pixel
    return files | {"empty.jpg": b"", "text.jpg": b"this is not a picture\n" * 40}


def write_shards(folder: Path, out: Path, *, label: str = "cls", per_shard: int = 150) -> str:
    """The images of a folder of class folders as WebDataset's own writer writes them, and their pattern."""
    import webdataset

    out.mkdir(parents=True, exist_ok=True)
    files = sorted(folder.rglob("*.jpg"), key=lambda path: path.name[::-1])  # in an order of its own
    with webdataset.ShardWriter(str(out / "shard-%06d.tar"), maxcount=per_shard, verbose=0) as writer:
        for path in files:
            name = path.relative_to(folder).with_suffix("")
            value = {"label": path.parent.name, "width": 3} if label == "json" else path.parent.name.encode()
            writer.write({"__key__": str(name), "jpg": path.read_bytes(), label: value})
    return str(out / f"shard-{{000000..{(len(files) - 1) // per_shard:06}}}.tar")
