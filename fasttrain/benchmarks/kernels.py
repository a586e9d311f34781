"""The project's kernels, and its averaging of weights, compared with eager, compiled and library versions of the same
work."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fasttrain.benchmarks.common import OWN, Row, chosen, race, row
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
    """The project's kernels, forward (mix) and forward with backward (triplet), and the averaging of a network's
    weights, compared with eager, compiled and library versions of the same work, on one device: a list of rows per
    case, as soon as it is measured. only: patterns of cases, such as `mix 256*`."""
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
    for name in chosen(cases, only):
        yield cases[name]()


def _mix(batch: int, device: torch.device, rounds: int) -> list[Row]:
    """With the share of a plain copy's bandwidth that the bytes of each contender's work, in and out, come to."""
    contenders, least = _mix_contenders(batch, device)
    rows = _race("mix", f"{batch} x {SIZE}²", contenders, device, rounds)
    # One pass: images in, images out, and a few bytes of parameters, partners and shares per image.
    moved = rows[0].details["bytes"]
    if not least <= moved <= least + 64 * batch:
        raise RuntimeError(f"mix moves {moved} bytes, of which {least} are needed")
    copy = rows[-1].seconds
    return [replace(each, details={**each.details, "of_copy_bandwidth": copy / each.seconds}) for each in rows]


def _triplet(batch: int, width: int, dtype: torch.dtype, device: torch.device, rounds: int) -> list[Row]:
    case = f"{batch} x {width} {str(dtype).removeprefix('torch.')}"
    return _race("triplet", case, _triplet_contenders(batch, width, dtype, device), device, rounds)


def _averaging(arch: str, device: torch.device, rounds: int) -> list[Row]:
    return _race("averaging", arch, _averaging_contenders(arch, device), device, rounds)


def _mix_contenders(batch: int, device: torch.device) -> tuple[dict[str, Callable[[], Any]], int]:
    """CutMix of a whole batch to bf16 channels_last from uint8 NHWC, and the bytes that it must read and write."""
    from timm.data import Mixup
    from torchvision.transforms import v2

    images = torch.randint(0, 256, (batch, SIZE, SIZE, 3), dtype=torch.uint8, device=device)
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
        OWN: lambda: mix.mix(*arguments),
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
    torch.compiler.reset()  # or the shapes of cases before would count
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
        OWN: gradient(ours),
        "eager": gradient(eager),
        "eager, compiled": gradient(torch.compile(eager, dynamic=False)),
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


def _averaging_contenders(arch: str, device: torch.device) -> dict[str, Callable[[], Any]]:
    """The moving average of all weights of a network, and the copies of its buffers, after a step."""
    import timm
    from timm.utils import ModelEmaV3

    network = timm.create_model(arch, num_classes=1000).to(device)
    ours, step = Ema(network, decay=0.999), 10_000
    timms = ModelEmaV3(network, decay=0.999)
    loops = timm.create_model(arch, num_classes=1000).to(device).requires_grad_(False)

    def one_by_one() -> None:
        """The usual loop over tensors."""
        with torch.no_grad():
            for mean, now in zip(loops.parameters(), network.parameters(), strict=True):
                mean.lerp_(now, 1e-3)
            for mean, now in zip(loops.buffers(), network.buffers(), strict=True):
                mean.copy_(now)

    return {
        OWN: lambda: ours.update(step),
        "timm: ModelEmaV3": lambda: timms.update(network, step),
        "one tensor at a time": one_by_one,
    }


def _race(
    work: str, case: str, contenders: dict[str, Callable[[], Any]], device: torch.device, rounds: int
) -> list[Row]:
    """Launches are those of GPU kernels, on a CPU operations; bytes are read and written by them. Both are counted by
    a trace; compiled code does not show in it, and has neither."""
    for function in contenders.values():
        for _ in range(3):
            function()
    turns = {name: partial(partial, _seconds, each, device) for name, each in contenders.items()}
    *_, whole = race(f"{work} {case}", turns, rounds)
    traces = {name: {} if "compiled" in name else _trace(each, device) for name, each in contenders.items()}
    return [row(work, case, name, times, **traces[name]) for name, times in whole.timed.items()]


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


def _trace(function: Callable[[], Any], device: torch.device) -> dict[str, int]:
    """`launches` (on a CPU: operations) and `bytes` moved by the operations that torch dispatches, of one call."""
    with _Operations() as operations:
        function()
    if device.type == "cpu":
        return {"launches": operations.count, "bytes": operations.bytes}
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    launches = sum(each.device_type == torch.autograd.DeviceType.CUDA for each in profile.events())
    return {"launches": launches, "bytes": operations.bytes}
