"""Benchmarks. Everything is measured beside its peers in one run, in turns, and told as medians with their spread."""

import datetime
import importlib.metadata
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fasttrain.config import IMAGENET_MEAN, IMAGENET_STD
from fasttrain.errors import UserError
from fasttrain.kernels import mix, triplet

BATCHES_CPU, BATCHES_GPU = (64, 128), (64, 128, 256, 512, 1024)
TRIPLET_CPU, TRIPLET_GPU = (
    ((128, 2048), (256, 2656), (1024, 2048)),
    ((128, 2048), (256, 2656), (512, 2048), (1024, 2048)),
)
_SIZE = 224


@dataclass(frozen=True)
class Row:
    """One contender in one case. seconds: the median, with least and most. launches: GPU kernels, or operations on a
    CPU. bytes: read and written by them. Both are counted by a trace; compiled code does not show in it (0)."""

    work: str
    case: str
    contender: str
    seconds: float
    least: float
    most: float
    launches: int
    bytes: int


def kernels(device: torch.device, rounds: int = 15) -> list[Row]:
    """The project's kernels, forward (mix) and forward with backward (triplet), beside eager, compiled and library
    versions of the same work, on one device."""
    on_gpu = device.type == "cuda"
    rows: list[Row] = []
    for batch in BATCHES_GPU if on_gpu else BATCHES_CPU:
        contenders, least = _mix_contenders(batch, device)
        found = _race("mix", f"{batch} x {_SIZE}²", contenders, device, rounds)
        # One pass: images in, images out, and a few bytes of parameters, partners and shares an image.
        if not least <= found[0].bytes <= least + 64 * batch:
            raise RuntimeError(f"mix moves {found[0].bytes} bytes, of which {least} are needed")
        rows += found
    for batch, width in TRIPLET_GPU if on_gpu else TRIPLET_CPU:
        for dtype in (torch.float32, torch.bfloat16) if on_gpu else (torch.float32,):
            name = str(dtype).removeprefix("torch.")
            contenders = _triplet_contenders(batch, width, dtype, device)
            rows += _race("triplet", f"{batch} x {width} {name}", contenders, device, rounds)
    return rows


def _mix_contenders(batch: int, device: torch.device) -> tuple[dict[str, Callable[[], Any]], int]:
    """CutMix of a whole batch to bf16 channels_last from uint8 NHWC, and the bytes that it must read and write."""
    from timm.data import Mixup
    from torchvision.transforms import v2

    images = torch.randint(0, 256, (batch, _SIZE, _SIZE, 3), dtype=torch.uint8, device=device)
    labels = torch.randint(0, 1000, (batch,), device=device)
    table = torch.from_numpy(mix.plain_params(batch))
    table[:, mix.PARTNER] = torch.randperm(batch).float()
    table[:, mix.MODE] = mix.CUTMIX
    table[:, mix.BOX] = torch.tensor([30.0, 170.0, 40.0, 190.0])
    table = table.to(device)
    mean, std = (torch.tensor(each, device=device)[:, None, None] * 255 for each in (IMAGENET_MEAN, IMAGENET_STD))
    timms = Mixup(mixup_alpha=0, cutmix_alpha=1.0, prob=1.0, label_smoothing=0.1, num_classes=1000)
    torchvisions = v2.CutMix(num_classes=1000)

    def normalised() -> Tensor:
        return images.permute(0, 3, 1, 2).float().sub_(mean).div_(std)

    def with_timm() -> Tensor:
        mixed, _ = timms(normalised(), labels)
        return mixed.to(torch.bfloat16, memory_format=torch.channels_last)

    def with_torchvision() -> Tensor:
        mixed, _ = torchvisions(normalised(), labels)
        return mixed.to(torch.bfloat16, memory_format=torch.channels_last)

    arguments = (images, table, IMAGENET_MEAN, IMAGENET_STD, torch.bfloat16)
    compiled = torch.compile(mix.reference, dynamic=False)
    expected = mix.reference(*arguments).images
    if not torch.equal(mix.mix(*arguments).images, expected):
        raise RuntimeError("mix differs from its reference; its time means nothing")
    contenders = {
        "fasttrain": lambda: mix.mix(*arguments),
        "reference, compiled": lambda: compiled(*arguments),
        "reference": lambda: mix.reference(*arguments),
        "timm: normalise + Mixup": with_timm,
        "torchvision v2: normalise + CutMix": with_torchvision,
    }
    least = images.nbytes + expected.nbytes
    half = torch.empty(2, least // 2, dtype=torch.uint8, device=device)
    return contenders | {"floor: a copy of as many bytes": lambda: half[0].copy_(half[1])}, least


def _triplet_contenders(
    batch: int, width: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Callable[[], Any]]:
    """Loss and gradient of batch-hard triplet mining, four images of each class."""
    rows = torch.randn(batch, width, device=device).to(dtype).requires_grad_()
    labels = torch.arange(batch, device=device) // 4

    def gradient(loss: Callable[[], Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(loss(), rows)

    def eager() -> Tensor:
        """The usual few lines, through a matrix of all distances."""
        square = rows.float().square().sum(1)
        distance = (square[:, None] + square[None] - 2 * rows.float() @ rows.float().T).clamp(min=1e-12).sqrt()
        same = labels[:, None] == labels[None]
        far = distance.masked_fill(~same, 0).amax(1)
        near = distance.masked_fill(same, torch.inf).amin(1)
        return (far - near + 0.3).relu().mean()

    def ours() -> Tensor:
        return triplet.batch_hard_triplet(rows, labels).loss

    # Distances of this eager form are rounded; the losses still agree to a few digits.
    if abs(ours().item() - eager().item()) > 0.02 * abs(eager().item()) + 0.02:
        raise RuntimeError("triplet differs from the eager form; its time means nothing")
    contenders = {
        "fasttrain": gradient(ours),
        "eager": gradient(eager),
        "eager, compiled": gradient(torch.compile(eager)),
    }
    still = rows.detach()
    contenders["floor: the matrix product alone"] = lambda: still @ still.T
    try:
        from pytorch_metric_learning import distances, losses, miners, reducers
    except ImportError:
        return contenders
    space = distances.LpDistance(normalize_embeddings=False)
    function = losses.TripletMarginLoss(0.3, distance=space, reducer=reducers.MeanReducer())
    miner = miners.BatchHardMiner(distance=space)
    return contenders | {"pytorch-metric-learning": gradient(lambda: function(rows, labels, miner(rows, labels)))}


def _race(
    work: str,
    case: str,
    contenders: dict[str, Callable[[], Any]],
    device: torch.device,
    rounds: int,
) -> list[Row]:
    """Each contender in turn, round after round. The first is the project's own."""
    timed: dict[str, list[float]] = {name: [] for name in contenders}
    for function in contenders.values():
        for _ in range(3):
            function()
    for _, (name, function) in itertools.product(range(rounds), contenders.items()):
        timed[name].append(_seconds(function, device))
    traces = {name: (0, 0) if "compiled" in name else _trace(each, device) for name, each in contenders.items()}
    return [
        Row(work, case, name, statistics.median(each), min(each), max(each), *traces[name])
        for name, each in timed.items()
    ]


def _seconds(function: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        from triton.testing import do_bench

        return float(do_bench(function, warmup=5, rep=20, return_mode="median")) / 1000
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


class _Operations(TorchDispatchMode):
    """Counts operations that compute something (views launch nothing) and the bytes that they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and "empty" not in func.name():
            self.count += 1
            read = args[1:] if func is torch.ops.aten.copy_.default else args  # a copy does not read its target
            touched = tree_leaves((read, kwargs, result))
            self.bytes += sum(each.nbytes for each in touched if isinstance(each, Tensor))
        return result


def _trace(function: Callable[[], Any], device: torch.device) -> tuple[int, int]:
    """Launches (on a CPU: operations) and bytes moved by one call; bytes of the operations that torch dispatches."""
    with _Operations() as operations:
        function()
    if device.type == "cpu":
        return operations.count, operations.bytes
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    return sum(each.device_type == torch.autograd.DeviceType.CUDA for each in profile.events()), operations.bytes


def table(rows: list[Row]) -> str:
    """Markdown, a line a row, with how much slower than the project's own each contender is."""
    lines = ["| work | case | contender | ms (least … most) | x fasttrain | launches | MB moved |", "| --- " * 7 + "|"]
    own = {(row.work, row.case): row.seconds for row in rows if row.contender == "fasttrain"}
    for row in rows:
        ratio = row.seconds / own[row.work, row.case]
        spread = f"{row.seconds * 1e3:.3f} ({row.least * 1e3:.3f} … {row.most * 1e3:.3f})"
        traced = f"{row.launches or ''} | {row.bytes / 1e6:.1f}" if row.bytes else " | "
        lines.append(f"| {row.work} | {row.case} | {row.contender} | {spread} | {ratio:.2f} | {traced} |")
    return "\n".join(lines)


def about(device: torch.device) -> dict[str, Any]:
    """What a figure needs beside it: device, versions and date."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    packages = ("torch", "triton", "timm", "torchvision", "pytorch-metric-learning")
    versions = {}
    for each in packages:
        try:
            versions[each] = importlib.metadata.version(each)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.date.today().isoformat(),
        "device": name,
        "threads": torch.get_num_threads(),
        "versions": versions,
    }


def write_json(path: Path, device: torch.device, rows: list[Row]) -> None:
    content = {**about(device), "rows": [vars(row) for row in rows]}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def write_plot(path: Path, rows: list[Row]) -> None:
    """Bars of milliseconds, a panel a case. Raises UserError where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install matplotlib") from None
    cases = list(dict.fromkeys((row.work, row.case) for row in rows))
    figure = Figure(figsize=(8, 1.7 * len(cases)), layout="constrained")
    for axes, case in zip(figure.subplots(len(cases), squeeze=False)[:, 0], cases, strict=True):
        inside = [row for row in rows if (row.work, row.case) == case][::-1]
        bars = axes.barh([row.contender for row in inside], [row.seconds * 1e3 for row in inside])
        axes.bar_label(bars, [f"{row.seconds * 1e3:.3g} ms" for row in inside], padding=3, fontsize=8)
        axes.margins(x=0.15)
        axes.set_title(" ".join(case), loc="left", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.xaxis.set_visible(False)
    figure.savefig(path)
