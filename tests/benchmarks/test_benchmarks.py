"""The benchmarks run, every contender does the same work, and the results are written. Their values are not checked."""

import importlib.util
import json
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers import ROOT
from PIL import Image

from fasttrain import recipes
from fasttrain.benchmarks import common, kernels, pipeline, step, train
from fasttrain.cli.main import main
from fasttrain.config.schema import IMAGENET_MEAN, IMAGENET_STD, AugmentConfig
from fasttrain.data import pack
from fasttrain.data.index import Index
from fasttrain.data.open_data import open_splits
from fasttrain.data.scan import scan
from fasttrain.data.stores.pack import open_pack
from fasttrain.distributed.ranks import Ranks
from fasttrain.evaluation.evaluate import normalize
from fasttrain.utils.errors import UserError

CPU = torch.device("cpu")
ONE_RANK = Ranks(0, 1, 0, 1, CPU)
LOADERS: dict[str, pipeline.Loader] = {
    common.FASTTRAIN: pipeline.fasttrain_batches,
    pipeline.GROUPED: partial(pipeline.grouped_batches, images_per_class=2),
    pipeline.LINEAR: partial(pipeline.fasttrain_batches, augment=AugmentConfig(autoaugment="none", warps="linear")),
    pipeline.TIMM: pipeline.timm_batches,
    pipeline.TORCHVISION: pipeline.torchvision_batches,
    pipeline.STOCK: pipeline.stock_dali_batches,
}
README_TABLES = ROOT / "scripts" / "readme_tables.py"


@pytest.fixture(scope="module")
def colors(tmp_path_factory) -> Index:
    """Sixteen images, one per class. Each has a single color, which identifies it."""
    folder = tmp_path_factory.mktemp("colors")
    for number in range(16):
        (folder / f"{number:02}").mkdir()
        pixels = np.full((40, 48, 3), (16 * number, 255 - 16 * number, 80), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02}" / "image.png")
    return scan(folder, progress=False)


def work_of(index, *, cutmix: bool = False, dtype: torch.dtype = torch.float32) -> pipeline.Workload:
    return pipeline.Workload(
        index, batch=4, size=24, policy="none", cutmix=cutmix, device=CPU, dtype=dtype, workers=1, processes=1
    )


def tiny(loss: str = "ce", **changes):
    settings: dict[str, Any] = {"batch_size": 8, "image_size": 32}
    return step.recipe_of(recipes.for_arch("test_resnet", loss), CPU, **(settings | changes))


def read(path: Path, rows: list[common.Row], tmp_path: Path) -> list[dict]:
    """Write the rows as JSON, as a table and as a plot, check the format, and return the rows of the JSON file."""
    common.write_json(path, CPU, rows, {"rounds": 2})
    result = json.loads(path.read_text())
    assert {
        "date",
        "commit",
        "device",
        "clocks_mhz",
        "processor",
        "cores",
        "threads",
        "versions",
        "settings",
        "rows",
    } == result.keys()
    assert torch.__version__.startswith(result["versions"]["torch"]) and result["settings"] == {"rounds": 2}
    table = common.table(rows)
    for row in result["rows"]:
        assert {"work", "case", "contender", "seconds", "least", "most", "n"} <= row.keys()
        assert 0 < row["least"] <= row["seconds"] <= row["most"] and row["n"] == 2
        assert row["contender"] in table
        if row["images"]:
            assert row["images_per_s"] == pytest.approx(row["images"] / row["seconds"])
    plot = tmp_path / "plot.png"
    common.write_plot(plot, rows, "fasttrain")
    assert plot.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    return result["rows"]


def test_kernels(monkeypatch, tmp_path):
    monkeypatch.setattr(kernels, "BATCHES_CPU", (2,))
    monkeypatch.setattr(kernels, "TRIPLET_CPU", ((8, 16),))
    monkeypatch.setattr(kernels, "AVERAGED_CPU", ("test_resnet",))
    monkeypatch.setattr(kernels, "SIZE", 16)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    rows = read(tmp_path / "kernels.json", flat(kernels.kernels(CPU, rounds=2)), tmp_path)
    own = [row for row in rows if row["contender"] == common.FASTTRAIN]
    assert [row["work"] for row in own] == ["mix", "triplet", "averaging"] and own[0]["launches"] == 1
    copy = [row for row in rows if row["contender"].startswith("floor: a copy")]
    assert copy[0]["of_copy_bandwidth"] == 1 and own[0]["of_copy_bandwidth"] == copy[0]["seconds"] / own[0]["seconds"]
    assert own[2]["launches"] == 3  # all weights, all floating-point buffers, all counters


def flat(cases) -> list[common.Row]:
    """All rows of a benchmark; for each case, the rows after its last turn."""
    last = {(case[0].work, case[0].case): case for case in cases}
    return [row for case in last.values() for row in case]


def test_only_the_requested_cases_are_measured(monkeypatch):
    monkeypatch.setattr(kernels, "_mix", lambda batch, *_: [common.row("mix", str(batch), common.FASTTRAIN, [1.0])])
    rows = flat(kernels.kernels(CPU, only=["mix 64*"]))
    assert [row.case for row in rows] == ["64"]
    with pytest.raises(UserError, match=r"--only mixup\* matches no contender; choose from 'mix 64 x 224²'"):
        flat(kernels.kernels(CPU, only=["mixup*"]))


def test_fasttrain_is_compared_with_the_fastest_peer():
    times = {common.FASTTRAIN: 2.0, "fasttrain, eager": 1.0, "timm, a": 4.0, "timm, b": 3.0}
    rows = [common.row("step", "case", name, [seconds]) for name, seconds in times.items()]
    own, *others = common.compared_with_best(rows, "timm*")
    assert own.details == {"best_peer": "timm, b", "x_best_peer": 1.5} and others == rows[1:]
    assert common.compared_with_best(rows[:2], "timm*") == rows[:2]


def test_bytes_match_the_shapes():
    images = torch.zeros(3, 8, 10, 3, dtype=torch.uint8)
    counted = kernels._trace(lambda: images.float().add_(1), CPU, compiled=False)
    # uint8 in, float32 out; then float32 in and out
    assert counted == {"launches": 2, "bytes": 720 + 3 * 2880}


def test_every_other_round_is_in_reverse_order():
    order = []
    contenders = {name: lambda name=name: lambda: order.append(name) or float(len(order)) for name in "abc"}
    states = [
        {name: [*times] for name, times in timings.times.items()} for timings in common.race("case", contenders, 3)
    ]
    assert "".join(order) == "abccbaabc" and states[-1]["a"] == [1.0, 6.0, 7.0]
    assert states[0] == {"a": [1.0]} and len(states) == 9  # after every turn
    row = common.row("work", "case", "a", states[-1]["a"], images=12, note="x")
    assert (row.seconds, row.least, row.most, row.n, row.images_per_s) == (6.0, 1.0, 7.0, 3, 2.0)
    assert row.to_dict()["note"] == "x" and "details" not in row.to_dict()


def test_a_peer_that_fails_in_a_later_round_is_left_out_with_its_times(capsys):
    turns = iter([1.0])

    def peer() -> float:
        return next(turns, None) or fail("out of memory\nmore")

    *_, timings = common.race("case", {common.FASTTRAIN: lambda: lambda: 2.0, "timm, a": lambda: peer}, 3)
    assert timings.times == {common.FASTTRAIN: [2.0] * 3} and timings.left_out == {"timm, a": "out of memory"}
    assert "case: timm, a is left out: out of memory" in capsys.readouterr().err
    (own,) = common.compared_with_best([common.row("step", "case", common.FASTTRAIN, [2.0])], "timm*", timings.left_out)
    assert own.details == {"left_out": "timm, a: out of memory"}
    with pytest.raises(RuntimeError, match="ours"):
        list(common.race("case", {"fasttrain, eager": lambda: fail("ours")}, 1))


def fail(reason: str):
    raise RuntimeError(reason)


@pytest.mark.parametrize("name", LOADERS)
def test_every_loader_yields_each_image_once_per_epoch_normalized(colors, name):
    """Every crop of an image with a single color is the same, so the pixels are known and identify the image."""
    stream = LOADERS[name](work_of(colors))
    seen: Counter[int] = Counter()
    mean, std = (torch.tensor(value)[:, None, None] for value in (IMAGENET_MEAN, IMAGENET_STD))
    for _ in range(4):
        images, labels, targets = next(stream)
        assert images.shape == (4, 3, 24, 24) and images.dtype == torch.float32
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert labels.dtype == torch.int64 and labels.shape == (4,) and torch.equal(labels, targets)
        pixels = (images * std + mean) * 255
        which = (pixels[:, 0].mean((1, 2)) / 16).round().long()
        expected = torch.stack([16 * which, 255 - 16 * which, torch.full_like(which, 80)], 1)[:, :, None, None]
        assert (pixels - expected).abs().max() < 1.01
        if name != pipeline.GROUPED:
            assert torch.equal(which, labels)
        else:
            assert torch.equal(which // 4, labels) and torch.equal(
                labels.unique(return_counts=True)[1], torch.full((2,), 2)
            )
        seen.update(which.tolist())
    stream.close()
    assert seen == Counter(range(16))


@pytest.mark.parametrize("name", LOADERS)
def test_every_loader_mixes_each_batch_with_cutmix(colors, name):
    """An image with a single color keeps a single color unless it is mixed; CutMix must cut some images per batch."""
    stream = LOADERS[name](work_of(colors, cutmix=True, dtype=torch.bfloat16))
    cut = 0
    for _ in range(4):
        images, _, targets = next(stream)
        assert images.dtype == torch.bfloat16 and images.is_contiguous(memory_format=torch.channels_last)
        cut += int((images.float().flatten(2).std(2).amax(1) > 0.05).sum())
        assert isinstance(targets, tuple) or targets.shape == (4, 16)
    stream.close()
    assert cut >= 4


@pytest.mark.parametrize("name", LOADERS)
def test_a_turn_takes_the_documented_number_of_batches(colors, name):
    taken = []

    def counted(work):
        for batch in LOADERS[name](work):
            taken.append(len(batch.images))
            yield batch

    assert pipeline.seconds_per_batch(counted, work_of(colors), 3) > 0
    assert taken == [4] * (pipeline.WARM_UP + 2 + 3)  # two for the loader's process


def test_a_loader_that_ends_early_is_an_error():
    with pytest.raises(RuntimeError, match="after 2 of 3"):
        pipeline.take(iter([1, 2]), 3)


@pytest.mark.slow
def test_pipeline_and_its_stages(photos, tmp_path):
    index = scan(photos, progress=False)
    cases = pipeline.pipeline(
        index,
        CPU,
        torch.float32,
        batch_sizes=(4,),
        image_size=32,
        policies=("imagenet",),
        images_per_class=2,
        workers=1,
        processes=1,
        rounds=2,
        steps=2,
        profile=True,
    )
    rows = read(tmp_path / "pipeline.json", flat(cases), tmp_path)
    assert [row["contender"] for row in rows if row["work"] == "pipeline"] == list(LOADERS)
    stages = [row for row in rows if row["work"] == "stages"]
    expected = ["read", "+ decode the crop", "+ resize, flip", "+ AutoAugment", "+ normalise, mix"]
    assert [row["contender"] for row in stages] == expected
    full = next(row for row in rows if row["contender"] == common.FASTTRAIN)
    assert sum(row["us_per_image"] for row in stages) == pytest.approx(full["least"] / 4 * 1e6)
    assert stages[-1]["seconds"] == full["seconds"]


def test_packs_have_contenders_of_their_own(colors, tmp_path):
    """With the images of the pack, which is repeated like the folder."""
    folder = str(Path(colors.paths[0]).parent.parent)
    path = tmp_path / "small.safetensors"
    pack.make(open_splits(folder), path, pack.Encoding("raw"), workers=1, progress=False, say=lambda line: None)
    options = {"batch_sizes": (4,), "image_size": 32, "policies": ("none",), "rounds": 1, "steps": 2}
    only = ("fasttrain", "fasttrain, small")
    packs = {"small": open_pack(path)["train"]}
    *_, rows = pipeline.pipeline(colors, CPU, torch.float32, only=only, packs=packs, **options)
    assert [row.contender for row in rows] == list(only)


def test_a_truncated_pipeline_outputs_its_last_stage(colors):
    work = work_of(colors)
    shapes = {}
    for name, loader in pipeline.stages(work).items():
        stream = loader(work)
        shapes[name] = next(stream)[0].at(0).shape
        stream.close()
    assert list(shapes) == ["read", "decode the crop", "resize, flip"]
    assert len(shapes["read"]) == 1 and len(shapes["decode the crop"]) == 3 and shapes["resize, flip"] == (24, 24, 3)


def test_repeating_and_relabeling_keep_the_images(colors):
    twice = pipeline.repeated(colors, 17)
    assert len(twice) == 32 and Counter(twice.paths) == Counter(dict.fromkeys(colors.paths, 2))
    assert twice.labels.tolist() == colors.labels.tolist() * 2 and twice.sizes.shape == (32, 2)
    grouped = pipeline.relabeled(twice, 6)
    assert grouped.labels.tolist() == [label for label in range(5) for _ in range(6)] and len(grouped.classes) == 5


def test_step(tmp_path):
    also = ["optim.nesterov=true"]
    rows = flat(step.step([tiny()], CPU, classes=10, rounds=2, steps=2, warm_up=1, also=also))
    written = read(tmp_path / "step.json", rows, tmp_path)
    names = ["fasttrain, optim.nesterov=true", "timm, NCHW, eager", "timm, channels_last, eager"]
    assert [row["contender"] for row in written] == [common.FASTTRAIN, *names]
    assert written[0]["best_peer"] in names[1:]


def test_fasttrains_step_without_peers():
    rows = flat(step.step([tiny()], CPU, rounds=1, steps=1, warm_up=1, only=[common.FASTTRAIN]))
    assert [row.contender for row in rows] == [common.FASTTRAIN]


def test_a_peer_that_fails_is_reported_and_left_out(monkeypatch, capsys):
    class Failing(step.TimmStep):
        def __call__(self):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")

    monkeypatch.setattr(step, "TimmStep", Failing)
    rows = flat(step.step([tiny()], CPU, rounds=2, steps=1, warm_up=1))
    reason = "CUDA out of memory. Tried to allocate 2 GiB."
    assert [row.contender for row in rows] == [common.FASTTRAIN]
    assert f"timm, NCHW, eager: {reason}" in rows[0].details["left_out"]
    lines = capsys.readouterr().err.splitlines()
    assert sum(f"timm, NCHW, eager is left out: {reason}" in line for line in lines) == 1


def test_the_step_can_be_measured_without_dali():
    """Nor without tomli_w."""
    code = (
        "import sys; sys.modules['nvidia.dali'] = sys.modules['tomli_w'] = None\nfrom fasttrain.cli.main import main\n"
    )
    code += "main('bench step --arch test_resnet --image-size 32 --batch-size 8 --rounds 1 --steps 1'.split())"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_each_memory_format_is_compiled_with_static_strides():
    """Both share a code object, so dynamo would treat the second memory format's strides as dynamic by default."""
    seen = []

    def backend(module, inputs):
        for node in module.graph.nodes:
            value = node.meta.get("example_value")
            if node.op == "placeholder" and isinstance(value, torch.Tensor) and [*value.shape[1:]] == [3, 32, 32]:
                seen.append([isinstance(stride, int) for stride in value.stride()])
        return module

    torch_compile = torch.compile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda network, **options: torch_compile(network, backend=backend, **options))
        torch.compiler.reset()
        makers = step.contenders(tiny(compiled="on"), CPU, 10)
        for layout in step.LAYOUTS:
            makers[f"timm, {layout}, compiled"]()()
    assert len(seen) == 2 and all(all(strides) for strides in seen)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--no-peers", "--only", "timm*"], "--only and --no-peers exclude each other"),
        (["--only", "tim"], "--only tim matches no contender; choose from 'fasttrain', 'timm, NCHW, eager'"),
        (["--also", "optim.lrr=1"], "--set: no key 'optim.lrr'"),
    ],
)
def test_wrong_options_are_refused(words, says):
    result = CliRunner().invoke(main, ["bench", "step", "--arch", "test_resnet", "--device", "cpu", *words])
    assert result.exit_code == 2 and says in result.stderr


def test_also_accepts_auto_and_works_without_peers(monkeypatch, tmp_path):
    path = tmp_path / "a.json"
    words = ["--no-peers", "--also", "precision=auto", "--rounds", "1", "--steps", "1", "--json", str(path)]
    small = ["--arch", "test_resnet", "--image-size", "32", "--batch-size", "8", "--device", "cpu"]
    result = CliRunner().invoke(main, ["bench", "step", *small, *words])
    assert result.exit_code == 0, (result.output, result.exception)
    assert [row["contender"] for row in json.loads(path.read_text())["rows"]] == [
        "fasttrain",
        "fasttrain, precision=auto",
    ]


def test_a_loader_that_some_cases_lack_can_be_selected(colors):
    with pytest.raises(UserError, match="--only nothing matches no contender"):
        flat(pipeline.pipeline(colors, CPU, torch.float32, batch_sizes=(4,), only=["nothing"]))
    assert common.select(["fasttrain"], [pipeline.LINEAR], pipeline.LOADERS) == []


@pytest.mark.parametrize("layout", step.LAYOUTS)
def test_timms_weights_and_images_have_the_named_memory_format(layout):
    timm_step = step.contenders(tiny(), CPU, 10)[f"timm, {layout}, eager"]()
    assert isinstance(timm_step, step.TimmStep) and isinstance(timm_step.network, torch.nn.Module)
    network, inputs = timm_step.network, []
    network.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    timm_step()
    memory_format = step.LAYOUTS[layout]
    assert inputs[0].is_contiguous(memory_format=memory_format)
    weights = [weight for weight in network.parameters() if weight.ndim == 4]
    assert all(weight.is_contiguous(memory_format=memory_format) for weight in weights)


def test_a_step_with_several_views_is_compared_with_one_view():
    stage2 = recipes.stage2(recipes.stage1(tiny()))
    recipe = replace(tiny(), losses=stage2.losses, ema=stage2.ema)
    rows = flat(step.step([recipe], CPU, classes=10, rounds=1, steps=1, warm_up=1))
    assert [row.contender for row in rows][:2] == [common.FASTTRAIN, "fasttrain, CE on one view"]
    assert rows[0].images_per_s == pytest.approx(8 / rows[0].seconds)  # images, not views


def test_a_recipe_keeps_its_precision_and_losses_and_distillation_is_refused():
    recipe = step.recipe_of(recipes.RECIPES["bag_of_tricks/baseline"], CPU)
    assert recipe.precision == "fp32" and recipe.losses == recipes.RECIPES["bag_of_tricks/baseline"].losses
    with pytest.raises(UserError, match="needs a teacher, which benchmarks do not have"):
        step.recipe_of(recipes.RECIPES["bag_of_tricks/distillation"], CPU)


def test_only_compiled_contenders_are_compiled(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model, **_: compiled.append(model) or model)
    makers = step.contenders(tiny(compiled="on"), CPU, 10)
    for name, make in makers.items():
        compiled.clear()
        make()
        assert len(compiled) == ("compiled" in name or name == common.FASTTRAIN), name
    assert sum("compiled" in name for name in makers) == 2


def test_timms_variants_have_the_same_losses():
    """The memory format changes only the time."""
    recipe = tiny()
    losses = {}
    for name, make in step.contenders(recipe, CPU, 10).items():
        contender = make()
        np.random.seed(0)
        losses[name] = [contender().item() for _ in range(3)]
    own, nchw, *others = losses.values()
    assert len(others) == 1 and all(values == pytest.approx(nchw, rel=1e-4) for values in others)
    assert all(0 < loss < 10 for loss in own + nchw)


def test_timms_fixed_batch_is_normalized_like_ours():
    pixels = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    images, _ = next(step.prefetched(pixels, torch.zeros(2)))
    ours = normalize(pixels.permute(0, 2, 3, 1).contiguous(), torch.float32)
    assert torch.allclose(images, ours, atol=1e-5)


def test_a_turn_takes_the_documented_number_of_steps():
    count = 0

    class Counted:
        cudnn_benchmark = True

        @property
        def warm(self):
            return count >= 4

        def __call__(self):
            nonlocal count
            count += 1
            time.sleep(0.002)

    timer = step.StepTimer(Counted, CPU, steps=3, warm_up=2)  # type: ignore[arg-type]
    before = torch.backends.cudnn.benchmark
    assert count == 4
    assert 0.002 <= timer() and count == 7 and timer.details() == {}
    assert torch.backends.cudnn.benchmark == before


def test_host_time_uses_a_network_with_one_parameter(tmp_path):
    assert sum(parameter.numel() for parameter in step.OneParameter().parameters()) == 1
    rows = read(tmp_path / "host.json", flat(step.host(CPU, rounds=2, steps=2, warm_up=1)), tmp_path)
    assert len(rows) == 5
    assert [row["contender"] for row in rows[:2]] == [common.FASTTRAIN, f"{step.REPLAYED}, without its work"]


def test_bench_refuses_to_run_under_torchrun(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = CliRunner().invoke(main, ["bench", "step", "--host", "--json", str(tmp_path / "a.json")])
    assert result.exit_code == 2 and "run it without torchrun" in result.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize("loss", ["ce", pytest.param("ce+triplet", marks=pytest.mark.slow)])
def test_end_to_end(colors, tmp_path, monkeypatch, loss):
    monkeypatch.setattr(pipeline, "MIN_STEPS", 5)
    recipe = tiny(loss, batch_size=8)
    recipe = replace(recipe, machine=replace(recipe.machine, workers=1))
    if recipe.images_per_class:
        recipe = replace(recipe, images_per_class=2)
    rows = flat(train.end_to_end([recipe], colors, ONE_RANK, rounds=2, steps=2, warm_up=2))
    by_name = {row["contender"]: row for row in read(tmp_path / "train.json", rows, tmp_path)}
    assert list(by_name) == [common.FASTTRAIN, train.STEP, train.PIPELINE, "timm, NCHW", "timm, channels_last"]
    rates = [row["images_per_s"] for row in by_name.values()]
    assert by_name[common.FASTTRAIN]["eta"] == pytest.approx(rates[0] / min(rates[1:3]))


def test_seconds_per_step_exclude_the_warm_up():
    points = [{"step": 2, "images_per_s": 1.0}, {"step": 4, "images_per_s": 8.0}, {"step": 5, "images_per_s": 2.0}]
    assert train.seconds_per_step(points, tiny(), 2) == pytest.approx((2 * 1 + 1 * 4) / 3)


def test_odd_batches_are_refused(colors):
    with pytest.raises(UserError, match="even"):
        tiny(batch_size=7)
    with pytest.raises(UserError, match="even"):
        flat(pipeline.pipeline(colors, CPU, torch.float32, batch_sizes=(4, 7)))


BENCHES = {
    "kernels": (),
    "step": ("--arch", "test_resnet"),
    "pipeline": ("--data", "DATA"),
    "train": ("--data", "DATA", "--arch", "test_resnet"),
}


@pytest.mark.parametrize("name", BENCHES)
@pytest.mark.parametrize(
    ("option", "path", "content", "says"),
    [
        ("--json", "there.json", "{}", "there.json exists and holds no benchmark results"),
        ("--json", "there.json", "[" * 9999, "there.json exists and holds no benchmark results"),
        ("--json", "nowhere/a.json", None, "folder nowhere does not exist"),
        (
            "--plot",
            "nowhere/a.png",
            None,
            "--plot nowhere/a.png: name a file that ends in .png, in a folder",
        ),
        ("--plot", "a.jpg", None, "name a file that ends in .png"),
        ("--plot", "a.png", "mine", "--plot a.png exists and is not a picture made by fasttrain"),
        ("--plot", "b.png", None, "--plot needs matplotlib: pip install matplotlib"),
    ],
)
def test_bench_checks_its_output_files_before_it_measures(
    monkeypatch, tmp_path, demo_set, name, option, path, content, says
):
    def measure(*_, **__):
        raise AssertionError("it measures")

    for module, function in ((kernels, "kernels"), (step, "step"), (pipeline, "pipeline"), (train, "end_to_end")):
        monkeypatch.setattr(module, function, measure)
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(path).write_text(content)
    if "matplotlib" in says:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
    args = [str(demo_set) if word == "DATA" else word for word in BENCHES[name]]
    result = CliRunner().invoke(main, ["bench", name, *args, "--device", "cpu", option, path])
    lines = [line for line in result.stderr.splitlines() if line.startswith("fasttrain: ")]
    assert result.exit_code == 2 and len(lines) == 1 and says in lines[0], (result.output, result.exception)
    assert content is None or Path(path).read_text() == content


def test_bench_overwrites_its_own_results(monkeypatch, tmp_path):
    monkeypatch.setattr(kernels, "kernels", lambda *_: [[common.row("mix", "case", common.FASTTRAIN, [1.0, 2.0])]])
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        result = CliRunner().invoke(
            main, ["bench", "kernels", "--device", "cpu", "--json", "a.json", "--plot", "a.png"]
        )
        assert result.exit_code == 0, (result.output, result.exception)
    assert json.loads(Path("a.json").read_text())["rows"][0]["seconds"] == 1.5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.png"]


def test_bench_keeps_the_measured_cases_when_it_fails(monkeypatch, tmp_path):
    def two_cases(*_):
        yield [common.row("mix", "first", common.FASTTRAIN, [1.0])]
        raise RuntimeError("the second case fails")

    monkeypatch.setattr(kernels, "kernels", two_cases)
    path = tmp_path / "a.json"
    result = CliRunner().invoke(main, ["bench", "kernels", "--device", "cpu", "--json", str(path)])
    assert result.exit_code == 1
    assert [row["case"] for row in json.loads(path.read_text())["rows"]] == ["first"]


def test_readme_tables_name_device_and_date(tmp_path):
    spec = importlib.util.spec_from_file_location("readme_tables", README_TABLES)
    assert spec and spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    results = tmp_path / "results"
    results.mkdir()
    rows = [
        common.row("step", "net, 8 x 32², bf16", common.FASTTRAIN, [1.0, 2.0, 4.0], 8, host_ms=3.0),
        common.row("step", "net, 8 x 32², bf16", "other", [4.0, 4.0, 4.0], 8),
    ]
    common.write_json(results / "step-cpu.json", CPU, rows, {"rounds": 3})
    tables = script.tables("step", results)
    result = json.loads((results / "step-cpu.json").read_text())
    assert result["device"] in tables and result["date"] in tables and "| other |" in tables and "2.00" in tables
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- step -->\nold\n<!-- end -->\nb\n")
    script.write(readme, results)
    assert readme.read_text() == f"a\n<!-- step -->\n{tables}\n<!-- end -->\nb\n"
    (results / "step-cpu.json").rename(tmp_path / "step-cpu.json")
    script.write(readme, results)
    assert tables in readme.read_text()  # it stays without the results
    (tmp_path / "step-cpu.json").rename(results / "step-cpu.json")
    readme.write_text("no place\n")
    with pytest.raises(SystemExit, match="step"):
        script.write(readme, results)
