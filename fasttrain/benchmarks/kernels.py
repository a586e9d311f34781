"""Fasttrain's kernels and weight averaging, compared with eager, compiled and library implementations."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fasttrain.benchmarks.common import FASTTRAIN, Row, race, row, select
from fasttrain.config.schema import IMAGENET_MEAN, IMAGENET_STD
from fasttrain.kernels import mix, triplet
from fasttrain.training.ema import Ema

BATCHES_CPU, BATCHES_GPU = (64, 128, 256), (64, 128, 256, 512, 1024)
TRIPLET_CPU, TRIPLET_GPU = (
    ((128, 2048), (256, 2656), (1024, 2048)),
    ((128, 2048), (256, 2656), (512, 2048), (1024, 2048)),
)
AVERAGED_CPU, AVERAGED_GPU = ("resnest101e",), ("tresnet_xl", "resnest101e", "seresnext101_32x4d")
SIZE = 224


def kernels(device: torch.device, rounds: int = 15, only: Sequence[str] = ()) -> Iterator[list[Row]]:
    """Measure on one device: mix (forward), triplet (forward and backward) and the averaging of a network's weights.
    Yields the rows of each case as soon as it is measured. only: patterns of cases, such as `mix 256*`."""
    on_gpu = device.type == "cuda"
    cases: dict[str, Callable[[], list[Row]]] = {}
    for batch in BATCHES_GPU if on_gpu else BATCHES_CPU:
        cases[f"mix {batch} x {SIZE}²"] = partial(_mix, batch, device, rounds)
    for batch, width in TRIPLET_GPU if on_gpu else TRIPLET_CPU:
        for dtype in (torch.float32, torch.bfloat16) if on_gpu else (torch.float32,):
            name = str(dtype).removeprefix("torch.")
            cases[f"triplet {batch} x {width} {name}"] = partial(_triplet, batch, width, dtype, device, rounds)
    for arch in AVERAGED_GPU if on_gpu else AVERAGED_CPU:
        cases[f"averaging {arch}"] = partial(_averaging, arch, device, rounds)
    for name in select(cases, only):
        yield cases[name]()


def _mix(batch: int, device: torch.device, rounds: int) -> list[Row]:
    """Rows with `of_copy_bandwidth`: the time of a plain copy of the bytes that mix must read and write, as a share of
    the contender's time."""
    contenders, needed = _mix_contenders(batch, device)
    rows = _race("mix", f"{batch} x {SIZE}²", contenders, device, rounds)
    # One pass reads and writes each image once, plus a few bytes of parameters, partners and shares per image.
    moved = rows[0].details["bytes"]
    if not needed <= moved <= needed + 64 * batch:
        raise RuntimeError(f"mix moves {moved} bytes; it should move {needed}, plus up to 64 per image")
    copy_seconds = rows[-1].seconds
    return [replace(row, details={**row.details, "of_copy_bandwidth": copy_seconds / row.seconds}) for row in rows]


def _triplet(batch: int, width: int, dtype: torch.dtype, device: torch.device, rounds: int) -> list[Row]:
    case = f"{batch} x {width} {str(dtype).removeprefix('torch.')}"
    return _race("triplet", case, _triplet_contenders(batch, width, dtype, device), device, rounds)


def _averaging(arch: str, device: torch.device, rounds: int) -> list[Row]:
    return _race("averaging", arch, _averaging_contenders(arch, device), device, rounds)


def _mix_contenders(batch: int, device: torch.device) -> tuple[dict[str, Callable[[], Any]], int]:
    """CutMix of a batch from uint8 NHWC to bf16 channels_last, and the number of bytes that it must read and write."""
    from timm.data import Mixup
    from torchvision.transforms import v2

    images = torch.randint(0, 256, (batch, SIZE, SIZE, 3), dtype=torch.uint8, device=device)
    labels = torch.randint(0, 1000, (batch,), device=device)
    table = torch.from_numpy(mix.plain_params(batch))
    table[:, mix.PARTNER] = torch.randperm(batch).float()
    table[:, mix.MODE] = mix.CUTMIX
    table[:, mix.BOX] = torch.tensor([30.0, 170.0, 40.0, 190.0])
    table = table.to(device)
    mean, std = (torch.tensor(value, device=device)[:, None, None] * 255 for value in (IMAGENET_MEAN, IMAGENET_STD))
    timm_mixup = Mixup(mixup_alpha=0, cutmix_alpha=1.0, prob=1.0, label_smoothing=0.1, num_classes=1000)
    torchvision_cutmix = v2.CutMix(num_classes=1000)

    def normalized() -> Tensor:
        return images.permute(0, 3, 1, 2).float().sub_(mean).div_(std)

    def with_timm() -> Tensor:
        mixed, _ = timm_mixup(normalized(), labels)
        return mixed.to(torch.bfloat16, memory_format=torch.channels_last)

    def with_torchvision() -> Tensor:
        mixed, _ = torchvision_cutmix(normalized(), labels)
        return mixed.to(torch.bfloat16, memory_format=torch.channels_last)

    arguments = (images, table, IMAGENET_MEAN, IMAGENET_STD, torch.bfloat16)
    compiled = torch.compile(mix.reference, dynamic=False)
    expected = mix.reference(*arguments).images
    if not torch.equal(mix.mix(*arguments).images, expected):
        raise RuntimeError("mix differs from its reference, so its time means nothing")
    contenders = {
        FASTTRAIN: lambda: mix.mix(*arguments),
        "reference, compiled": lambda: compiled(*arguments),
        "reference": lambda: mix.reference(*arguments),
        "timm: normalise + Mixup": with_timm,
        "torchvision v2: normalise + CutMix": with_torchvision,
    }
    needed = images.nbytes + expected.nbytes
    halves = torch.empty(2, needed // 2, dtype=torch.uint8, device=device)
    return contenders | {"floor: a copy of as many bytes": lambda: halves[0].copy_(halves[1])}, needed


def _triplet_contenders(
    batch: int, width: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Callable[[], Any]]:
    """Loss and gradient of batch-hard triplet mining, with four images per class."""
    torch.compiler.reset()  # or dynamo would count the shapes of earlier cases
    features = torch.randn(batch, width, device=device).to(dtype).requires_grad_()
    labels = torch.arange(batch, device=device) // 4

    def gradient(loss: Callable[[], Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(loss(), features)

    def eager() -> Tensor:
        """The usual few lines, with a matrix of all distances."""
        square = features.float().square().sum(1)
        distance = (square[:, None] + square[None] - 2 * features.float() @ features.float().T).clamp(min=1e-12).sqrt()
        same = labels[:, None] == labels[None]
        positive = distance.masked_fill(~same, 0).amax(1)
        negative = distance.masked_fill(same, torch.inf).amin(1)
        return (positive - negative + 0.3).relu().mean()

    def ours() -> Tensor:
        return triplet.batch_hard_triplet(features, labels).loss

    # The eager form rounds its distances; the losses still agree to a few digits.
    if abs(ours().item() - eager().item()) > 0.02 * abs(eager().item()) + 0.02:
        raise RuntimeError("triplet differs from the eager form, so its time means nothing")
    contenders = {
        FASTTRAIN: gradient(ours),
        "eager": gradient(eager),
        "eager, compiled": gradient(torch.compile(eager, dynamic=False)),
    }
    detached = features.detach()
    contenders["floor: the matrix product alone"] = lambda: detached @ detached.T
    try:
        from pytorch_metric_learning import distances, losses, miners, reducers
    except ImportError:
        return contenders
    distance = distances.LpDistance(normalize_embeddings=False)
    loss_function = losses.TripletMarginLoss(0.3, distance=distance, reducer=reducers.MeanReducer())
    miner = miners.BatchHardMiner(distance=distance)
    contenders["pytorch-metric-learning"] = gradient(lambda: loss_function(features, labels, miner(features, labels)))
    return contenders


def _averaging_contenders(arch: str, device: torch.device) -> dict[str, Callable[[], Any]]:
    """The moving average of all weights of a network and the copies of its buffers, as after a training step."""
    import timm
    from timm.utils import ModelEmaV3

    network = timm.create_model(arch, num_classes=1000).to(device)
    ours, step = Ema(network, decay=0.999), 10_000
    timm_ema = ModelEmaV3(network, decay=0.999)
    average = timm.create_model(arch, num_classes=1000).to(device).requires_grad_(False)

    def one_by_one() -> None:
        """The usual loop over tensors."""
        with torch.no_grad():
            for mean, current in zip(average.parameters(), network.parameters(), strict=True):
                mean.lerp_(current, 1e-3)
            for mean, current in zip(average.buffers(), network.buffers(), strict=True):
                mean.copy_(current)

    return {
        FASTTRAIN: lambda: ours.update(step),
        "timm: ModelEmaV3": lambda: timm_ema.update(network, step),
        "one tensor at a time": one_by_one,
    }


def _race(
    work: str, case: str, contenders: dict[str, Callable[[], Any]], device: torch.device, rounds: int
) -> list[Row]:
    """Rows with what `_trace` finds in one call."""
    for function in contenders.values():
        for _ in range(3):
            function()
    makers = {name: partial(partial, _seconds, function, device) for name, function in contenders.items()}
    *_, timings = race(f"{work} {case}", makers, rounds)
    traces = {name: _trace(function, device, compiled="compiled" in name) for name, function in contenders.items()}
    return [row(work, case, name, times, **traces[name]) for name, times in timings.times.items()]


def _seconds(function: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        from triton.testing import do_bench

        return float(do_bench(function, warmup=5, rep=20, return_mode="median")) / 1000
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


class _Operations(TorchDispatchMode):
    """Counts the operations that compute something (views do not) and the bytes that they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and "empty" not in func.name():
            self.count += 1
            read = args[1:] if func is torch.ops.aten.copy_.default else args  # a copy does not read its target
            leaves = tree_leaves((read, kwargs, result))
            self.bytes += sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor))
        return result


def _trace(function: Callable[[], Any], device: torch.device, *, compiled: bool) -> dict[str, Any]:
    """`launches` of one call, of GPU kernels or, on a CPU, operations; `gpu_seconds`, the time of these kernels alone;
    and `bytes` moved by the operations that torch dispatches. Operations of compiled code are not dispatched, so only
    its kernels are counted."""
    values: dict[str, Any] = {}
    if not compiled:
        with _Operations() as operations:
            function()
        values = {"launches": operations.count, "bytes": operations.bytes}
    if device.type == "cpu":
        return values
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    on_gpu = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    microseconds = sum(event.time_range.elapsed_us() for event in on_gpu)
    return values | {"launches": len(on_gpu), "gpu_seconds": microseconds / 1e6}
