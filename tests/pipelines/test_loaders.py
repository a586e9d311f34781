"""The training and evaluation pipelines: against PIL, for any ranks, threads and first step, and with broken files."""

import os
import re
import shutil
import threading
from collections import Counter
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from helpers import broken_files, reference_view
from PIL import Image

from fasttrain import recipes
from fasttrain.config.schema import AugmentConfig, MixConfig
from fasttrain.data.scan import scan
from fasttrain.pipelines import decode_errors, decode_graph, train_loader
from fasttrain.pipelines.decoders import Decoder
from fasttrain.pipelines.eval_loader import EvalLoader
from fasttrain.pipelines.eval_loader import graph as eval_graph
from fasttrain.pipelines.plan import Plan
from fasttrain.pipelines.views import views_by_name
from fasttrain.show_batch import draw_batch
from fasttrain.utils.errors import RunError

CPU = torch.device("cpu")
HOST = Decoder("cpu")


def make_plan(index, world=1, rank=0, **changes) -> Plan:
    settings = {"image_size": 64, "batch_size": 6, "epochs": 3} | changes
    return Plan.of(replace(recipes.for_arch("resnet18"), **settings), index, world, rank)


@pytest.fixture(scope="module")
def index(photos):
    return scan(photos)


def collect(plan, index, threads=2, **span) -> dict[int, list[tuple[int, bytes]]]:
    """(image, bytes of its pixels) for every step, in order."""
    start = span.get("start_step", 0)
    seen: dict[int, list[tuple[int, bytes]]] = {}
    for count, batch in enumerate(train_loader.batches(plan, index, CPU, threads, **span)):
        step = start + count // plan.micro_batches
        pairs = zip(batch.indices.tolist(), batch.pixels.numpy(), strict=True)
        seen.setdefault(step, []).extend((number, pixels.tobytes()) for number, pixels in pairs)
    return seen


def test_batches_are_uint8_nhwc_without_a_copy_and_channels_last(index, monkeypatch):
    plan = make_plan(index)
    pointers = []
    from_dlpack = torch.from_dlpack
    monkeypatch.setattr(torch, "from_dlpack", lambda tensor: pointers.append(tensor.data_ptr()) or from_dlpack(tensor))
    batch = next(train_loader.batches(plan, index, CPU, 2))
    assert batch.pixels.dtype == torch.uint8 and batch.pixels.shape == (6, 64, 64, 3)
    assert batch.pixels.data_ptr() == pointers[0]
    assert batch.pixels.permute(0, 3, 1, 2).is_contiguous(memory_format=torch.channels_last)
    assert batch.indices.tolist() == plan.images(0, 0).tolist()


@pytest.mark.parametrize("take", [1, 9])
def test_a_stream_ends_its_feeding_thread(index, take):
    """Whether it is closed early or reaches its end."""
    stream = train_loader.batches(make_plan(index), index, CPU, 2)
    for _, _ in zip(range(take), stream, strict=False):
        pass
    stream.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "fasttrain-ahead"]


def test_an_earlier_batch_stays_valid(index):
    stream = train_loader.batches(make_plan(index), index, CPU, 2)
    kept = [next(stream) for _ in range(6)]
    again = train_loader.batches(make_plan(index), index, CPU, 2)
    for batch in kept:
        assert torch.equal(batch.pixels, next(again).pixels)


def test_steps_do_not_depend_on_ranks_threads_micro_batches_or_first_step(index):
    alone = collect(make_plan(index), index, threads=1)
    assert len(alone) == make_plan(index).steps
    for world, micro, threads in ((2, 0, 3), (3, 1, 2), (1, 2, 2)):
        ranks = [collect(make_plan(index, world, r, micro_batch=micro), index, threads) for r in range(world)]
        for step, expected in alone.items():
            assert [pair for rank in ranks for pair in rank[step]] == expected
    late = collect(make_plan(index), index, start_step=4)
    assert late == {step: pairs for step, pairs in alone.items() if step >= 4}


def test_batches_do_not_depend_on_the_prefetch_depth(index, monkeypatch):
    expected = collect(make_plan(index), index)
    depths = []
    graph = train_loader.graph
    monkeypatch.setattr(
        train_loader, "graph", lambda *args, **kw: depths.append(kw["prefetch_queue_depth"]) or graph(*args, **kw)
    )
    monkeypatch.setattr(train_loader, "PREFETCH", 5)
    assert collect(make_plan(index), index) == expected
    assert depths == [5]


def check_against_pil(pixels, draws, indices, index) -> None:
    """Check that uint8 [n, 96, 96, 3] are the drawn boxes, resized by PIL's bilinear filter and flipped where drawn."""
    for ours, box, flipped, number in zip(pixels.numpy(), draws.crop.tolist(), draws.flip, indices, strict=True):
        top, left, height, width = box
        image = Image.open(index.paths[number]).convert("RGB").crop((left, top, left + width, top + height))
        image = image.resize((96, 96), Image.Resampling.BILINEAR)
        if flipped:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        difference = abs(ours.astype(int) - np.asarray(image).astype(int))
        assert difference.mean() <= 0.6 and difference.max() <= 24, index.ids[number]


def test_crop_resize_and_flip_equal_pils(index):
    """Without AutoAugment."""
    plan = make_plan(index, batch_size=16, augment=AugmentConfig(autoaugment="none"), image_size=96)
    flips = 0
    for step in range(3):
        batch = next(train_loader.batches(plan, index, CPU, 2, start_step=step, stop_step=step + 1))
        indices = batch.indices.numpy()
        draws = plan.draws(step, indices, index.sizes[indices])
        check_against_pil(batch.pixels, draws, indices, index)
        flips += int(draws.flip.sum())
    assert 0 < flips < 48


def plan_of_three_views(index, **changes) -> Plan:
    """A plan with two views of each image and a third one that is never mixed."""
    return replace(make_plan(index, **changes), views=2, ema_views=1)


def test_each_view_equals_pils_with_its_own_draws(index):
    """As above. Each file is decoded once for all views, and only the region that they need."""
    plan = plan_of_three_views(index, batch_size=16, augment=AugmentConfig(autoaugment="none"), image_size=96)
    batch = next(train_loader.batches(plan, index, CPU, 2))
    indices = batch.indices.numpy()
    assert batch.pixels.shape == (48, 96, 96, 3) and len(indices) == 16
    assert batch.pixels.permute(0, 3, 1, 2).is_contiguous(memory_format=torch.channels_last)
    for view in range(3):
        draws = plan.draws(0, indices, index.sizes[indices], view)
        check_against_pil(batch.pixels[16 * view : 16 * view + 16], draws, indices, index)
    graph = train_loader.graph(
        train_loader.Source(plan, index, 0, 1), HOST, False, batch_size=16, num_threads=1, device_id=None
    )
    kinds = [name for name, _ in operators(graph)]
    assert kinds.count("ImageSlice") == 1 and kinds.count("Slice") == kinds.count("Resize") == 3


def test_views_do_not_depend_on_ranks_and_micro_batches(index):
    augment = AugmentConfig(autoaugment="none", randaugment=2, erase=0.5)
    (alone,) = train_loader.batches(plan_of_three_views(index, epochs=1, augment=augment), index, CPU, 2, stop_step=1)
    expected = alone.pixels.unflatten(0, (3, 6))
    assert not torch.equal(expected[0], expected[1]) and not torch.equal(expected[0], expected[2])
    parts = [
        batch.pixels.unflatten(0, (3, -1))
        for rank in range(2)
        for batch in train_loader.batches(
            replace(plan_of_three_views(index, epochs=1, augment=augment, micro_batch=1), world=2, rank=rank),
            index,
            CPU,
            1,
            stop_step=1,
        )
    ]
    assert torch.equal(torch.cat(parts, 1), expected)


def test_a_drawn_batch_has_an_images_views_side_by_side(index):
    plan = plan_of_three_views(index, image_size=96, mix=MixConfig(cutmix=0))
    (batch,) = train_loader.batches(plan, index, CPU, 2, stop_step=1)
    sheet = np.asarray(draw_batch(plan, index, 0, 8)).astype(int)
    for cell in range(18):
        row = cell % 3 * 6 + cell // 3
        left = cell % 6 * (sheet.shape[1] // 6) + 3  # three views of two images
        top = cell // 6 * (sheet.shape[0] // 3) + 2
        assert abs(sheet[top : top + 96, left : left + 96] - batch.pixels[row].numpy()).max() <= 1


@pytest.mark.parametrize(
    ("size", "interpolation"),
    [(64, "bilinear"), (224, "bilinear"), (320, "bilinear"), (448, "bilinear"), (224, "bicubic"), (448, "bicubic")],
)
def test_evaluation_equals_torchvision_and_pil(index, size, interpolation):
    means, largest, outliers, count = [], 0, 0, 0
    for (images,), indices in EvalLoader(index, views_by_name("center", size), 7, CPU, 2, interpolation=interpolation):
        for pixels, number in zip(images.numpy(), indices.tolist(), strict=True):
            difference = abs(pixels.astype(int) - reference_view(index.paths[number], size, interpolation))
            means.append(difference.mean())
            largest = max(largest, difference.max())
            outliers, count = outliers + (difference > 14).sum(), count + difference.size
    assert len(means) == len(index) and np.mean(means) <= 0.3
    if interpolation == "bilinear":
        assert largest <= 2
    else:  # PIL clips to 0 … 255 between its two passes, which changes the hardest edges of black and white
        assert outliers <= count / 1e6


@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_has_every_image_once_per_pass(index, world):
    ranks = [EvalLoader(index, views_by_name("center", 32), 4, CPU, 1, world, rank) for rank in range(world)]
    for _ in range(3):
        seen = [number for rank in ranks for batch in rank for number in batch.indices.tolist()]
        assert sorted(seen) == list(range(len(index)))


def test_exif_orientation_is_ignored(tmp_path):
    """Like PIL, both pipelines use an EXIF-rotated image as it is stored."""
    picture = np.zeros((40, 80, 3), np.uint8)
    picture[:, :40] = (200, 30, 30)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    for name in "ab":
        (tmp_path / name).mkdir()
        Image.fromarray(picture).save(tmp_path / name / "rotated.jpg", quality=95, exif=exif)
    index = scan(tmp_path)
    assert index.sizes.tolist() == [[40, 80]] * 2
    batch = next(iter(EvalLoader(index, views_by_name("center", 32), 2, CPU, 1)))
    assert abs(batch.pixels[0][0].numpy().astype(int) - reference_view(index.paths[0], 32)).max() <= 2
    full_crop = AugmentConfig(crop_area=(1.0, 1.0), crop_ratio=(2.0, 2.0), flip=0.0, autoaugment="none")
    trained = next(train_loader.batches(make_plan(index, batch_size=2, augment=full_crop), index, CPU, 1))
    left, right = trained.pixels[0, 32, 10].tolist(), trained.pixels[0, 32, 54].tolist()
    assert left[0] > 150 and max(right) < 40


HEADER = ("PeekImageShape", "TensorSubscript", "Cast")
REGION_CHECK = Counter({"ArithmeticGenericOp": 2})  # the `cpu` decoder's region depends on the header's size
_POLICIES = {"none": AugmentConfig(autoaugment="none"), "imagenet": AugmentConfig(),
             "randaugment": AugmentConfig(autoaugment="none", randaugment=2, erase=0.25)}  # fmt: skip


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("policy", _POLICIES)
def test_the_gpu_graph_serializes_and_has_the_cpu_graphs_operators(index, policy, views):
    """Defining and serializing the GPU graph finds wrong arguments, types and devices. Its operators are the CPU
    graph's, except for blends with gray, and those that process pixels are on the GPU."""
    plan = replace(make_plan(index, augment=_POLICIES[policy]), views=views)
    source = train_loader.Source(plan, index, 0, 1)
    options = {"batch_size": 6, "num_threads": 1, "device_id": None}
    cpu = operators(train_loader.graph(source, HOST, False, **options))
    gpu = operators(train_loader.graph(source, Decoder("gpu-region"), True, **options))
    cpu_counts, gpu_counts = (Counter(name for name, _ in pairs) for pairs in (cpu, gpu))
    assert {device for _, device in cpu} == {"cpu"}
    on_gpu = {name for name, device in gpu if device == "gpu"}
    touch_pixels = {"ImageSlice", "Resize"}
    cpu_counts -= REGION_CHECK
    if policy == "none":
        assert cpu_counts == gpu_counts
    else:  # the blends in each slot of each view have another form
        assert set(cpu_counts - gpu_counts) == {
            "BrightnessContrast",
            "ColorSpaceConversion",
            "LookupTable",
            "Reshape",
            "ArithmeticGenericOp",
        }
        assert gpu_counts - cpu_counts == {"ColorTwist": 2 * views}
        touch_pixels |= {"Equalize", "WarpAffine", "ColorTwist", "Filter", "Mean", "Min", "Max", "LookupTable", "Merge"}
    if policy == "randaugment":
        touch_pixels |= {"Erase"}
    if views > 1:
        touch_pixels |= {"Slice"}
    assert touch_pixels <= on_gpu and not touch_pixels & {name for name, device in gpu if device == "cpu"}
    assert sum(gpu_counts.values()) < sum(cpu_counts.values()) or policy == "none"


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("cpu", {"ImageSlice": "cpu"}),
        ("gpu", {"Image": "gpu", "Slice": "gpu"}),
        ("gpu-region", {"ImageSlice": "gpu"}),
        ("gpu-hardware", {"Image": "gpu", "Slice": "gpu"}),
    ],
)
def test_each_decoder_has_its_operators_on_a_gpu(index, monkeypatch, kind, expected, views):
    """Only `gpu-hardware` uses the GPU's JPEG engine, and no decoder pins threads to cores."""
    calls = []
    for name in ("image", "image_slice"):
        operator = getattr(decode_graph.fn.decoders, name)
        monkeypatch.setattr(
            decode_graph.fn.decoders,
            name,
            lambda *args, operator=operator, **kw: calls.append(kw) or operator(*args, **kw),
        )
    source = train_loader.Source(
        replace(make_plan(index, augment=AugmentConfig(autoaugment="none")), views=views), index, 0, 1
    )
    decoder = Decoder(kind, hardware_load=0.25)
    found = operators(train_loader.graph(source, decoder, True, batch_size=6, num_threads=1, device_id=None))
    expected = {**expected, "Resize": "gpu"} | ({"Slice": "gpu"} if views > 1 else {})
    others = {"ExternalSource", "Read", "Copy", *HEADER, *(REGION_CHECK if kind == "cpu" else ())}
    assert {name: device for name, device in found if name not in others} == expected
    (options,) = calls
    assert options.get("hw_decoder_load") == {"gpu": 0.0, "gpu-region": 0.0, "gpu-hardware": 0.25}.get(kind)
    assert kind == "cpu" or options["affine"] is False


def test_a_region_sliced_from_the_full_image_equals_the_decoded_region(index, monkeypatch):
    """The `gpu` decoder's graph, run on a CPU, must have the geometry of `cpu`. Pixels at a region's edges may differ,
    because libjpeg-turbo's upsampling sees the region's neighbors only in a full image."""
    plan = make_plan(index, augment=AugmentConfig(autoaugment="none", crop_area=(0.3, 0.6)))
    regions = [batch.pixels.numpy().astype(int) for batch in train_loader.batches(plan, index, CPU, 2, stop_step=2)]
    decode = decode_graph.decode
    monkeypatch.setattr(
        decode_graph, "decode", lambda encoded, size, decoder, on_gpu: decode(encoded, size, HOST, on_gpu)
    )
    sliced = train_loader.batches(plan, index, CPU, 2, stop_step=2, decoder=Decoder("gpu"))
    for ours, batch in zip(regions, sliced, strict=True):
        difference = abs(ours - batch.pixels.numpy())
        assert difference.mean() < 0.05 and difference.max() < 20


def operators(pipe) -> list[tuple[str, str]]:
    """The name of each operator of a graph and the device of its output, in the graph's order."""
    assert len(pipe.serialize()) > 1000
    return [(re.sub(r"^_+|_\d+$", "", op.name), op.spec.OutputDevice(0)) for op in pipe._ops]


def test_the_gpu_evaluation_graph_serializes(index):
    source = EvalLoader(index, views_by_name("report", 64), 4, CPU, 1).source
    for kind in ("cpu", "gpu", "gpu-region", "gpu-hardware"):
        pipe = eval_graph(source, Decoder(kind), True, "bilinear", batch_size=4, num_threads=1, device_id=None)
        devices = dict(operators(pipe))
        assert devices["ImageSlice" if kind == "cpu" else "Image"] == ("cpu" if kind == "cpu" else "gpu")
        assert devices["Resize"] == "gpu" and devices["Read"] == "cpu"


@pytest.mark.parametrize(
    ("part", "name"),
    [*product(("training", "evaluation"), [*broken_files(), "missing.jpg"]), ("training", "smaller.jpg")],
)
def test_a_file_that_does_not_decode_is_named(demo_set, tmp_path, name, part):
    """The file is damaged after the scan."""
    shutil.copytree(demo_set / "val", tmp_path / "set")
    victim = sorted((tmp_path / "set").rglob("*.jpg"))[3]
    bad = victim.with_name(name)
    os.rename(victim, bad)
    index = scan(tmp_path / "set")
    if name == "missing.jpg":
        bad.unlink()
    elif name == "smaller.jpg":  # a valid image, but the planned crops are outside it
        Image.new("RGB", (8, 8)).save(bad)
    else:
        bad.write_bytes(broken_files()[name])
    plan = make_plan(index, augment=AugmentConfig(autoaugment="none"))
    stream = (
        train_loader.batches(plan, index, CPU, 2)
        if part == "training"
        else EvalLoader(index, views_by_name("center", 64), 4, CPU, 2)
    )
    with pytest.raises(RunError, match=re.escape(name)) as caught:
        for _ in stream:
            pass
    assert "\n" not in str(caught.value)


def test_the_gpu_graph_of_one_image_serializes():
    """The graph that finds an image which cannot be decoded has the loader's decoder."""
    for region, kind in product((False, True), ("cpu", "gpu", "gpu-region", "gpu-hardware")):
        pipe = decode_errors._decode_one(region, Decoder(kind), True, device_id=None)
        slicing = kind == "cpu" or (region and kind == "gpu-region")
        names = {name for name, _ in operators(pipe)}
        assert names & {"ImageSlice", "Image"} == {"ImageSlice" if slicing else "Image"}
