"""The benchmarks run, do the same work in every contender and write what they found; what that is is not asserted."""

import importlib.util
import json
import subprocess
import sys
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
from fasttrain.data.index import Index, scan
from fasttrain.distributed.ranks import Ranks
from fasttrain.evaluation.evaluate import normalised
from fasttrain.utils.errors import UserError

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, 0, 1, CPU)
LOADERS: dict[str, pipeline.Loader] = {
    common.OWN: pipeline.ours,
    pipeline.GROUPED: partial(pipeline.grouped, images_per_class=2),
    pipeline.LINEAR: partial(pipeline.ours, augment=AugmentConfig(autoaugment="none", warps="linear")),
    pipeline.TIMM: pipeline.timms,
    pipeline.TORCHVISION: pipeline.torchvisions,
    pipeline.STOCK: pipeline.stock,
}
README_TABLES = ROOT / "scripts" / "readme_tables.py"


@pytest.fixture(scope="module")
def colours(tmp_path_factory) -> Index:
    """Sixteen images of one colour each, one a class, the colour telling which."""
    folder = tmp_path_factory.mktemp("colours")
    for number in range(16):
        (folder / f"{number:02}").mkdir()
        picture = np.full((40, 48, 3), (16 * number, 255 - 16 * number, 80), np.uint8)
        Image.fromarray(picture).save(folder / f"{number:02}" / "image.png")
    return scan(folder, progress=False)


def work_of(index, *, cutmix: bool = False, dtype: torch.dtype = torch.float32) -> pipeline.Work:
    return pipeline.Work(
        index, batch=4, size=24, policy="none", cutmix=cutmix, device=CPU, dtype=dtype, workers=1, processes=1
    )


def tiny(loss: str = "ce", **changes):
    settings: dict[str, Any] = {"batch_size": 8, "image_size": 32}
    return step.recipe_of(recipes.for_arch("test_resnet", loss), CPU, **(settings | changes))


def read(path: Path, rows: list[common.Row], tmp_path: Path) -> list[dict]:
    """The rows as written, once everything else that belongs to them is seen to be there."""
    common.write_json(path, CPU, rows, {"rounds": 2})
    told = json.loads(path.read_text())
    assert {"date", "commit", "device", "clocks_mhz", "cores", "threads", "versions", "settings", "rows"} == told.keys()
    assert torch.__version__.startswith(told["versions"]["torch"]) and told["settings"] == {"rounds": 2}
    table = common.table(rows)
    for each in told["rows"]:
        assert {"work", "case", "contender", "seconds", "least", "most", "n"} <= each.keys()
        assert 0 < each["least"] <= each["seconds"] <= each["most"] and each["n"] == 2
        assert each["contender"] in table
        if each["images"]:
            assert each["images_per_s"] == pytest.approx(each["images"] / each["seconds"])
    plot = tmp_path / "plot.png"
    common.write_plot(plot, rows, "fasttrain")
    assert plot.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    return told["rows"]


def test_kernels(monkeypatch, tmp_path):
    monkeypatch.setattr(kernels, "BATCHES_CPU", (2,))
    monkeypatch.setattr(kernels, "TRIPLET_CPU", ((8, 16),))
    monkeypatch.setattr(kernels, "AVERAGED_CPU", ("test_resnet",))
    monkeypatch.setattr(kernels, "SIZE", 16)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    rows = read(tmp_path / "kernels.json", flat(kernels.kernels(CPU, rounds=2)), tmp_path)
    own = [each for each in rows if each["contender"] == common.OWN]
    assert [each["work"] for each in own] == ["mix", "triplet", "averaging"] and own[0]["launches"] == 1
    copy = [each for each in rows if each["contender"].startswith("floor: a copy")]
    assert copy[0]["of_copy_bandwidth"] == 1 and own[0]["of_copy_bandwidth"] == copy[0]["seconds"] / own[0]["seconds"]
    assert own[2]["launches"] == 3  # all weights, all floating-point buffers, all counters


def flat(cases) -> list[common.Row]:
    """All rows of a benchmark, each case's as they were last."""
    found = {(case[0].work, case[0].case): case for case in cases}
    return [row for case in found.values() for row in case]


def test_only_the_cases_asked_for_are_measured(monkeypatch):
    monkeypatch.setattr(kernels, "_mix", lambda batch, *_: [common.row("mix", str(batch), common.OWN, [1.0])])
    rows = flat(kernels.kernels(CPU, only=["mix 64*"]))
    assert [each.case for each in rows] == ["64"]
    with pytest.raises(UserError, match=r"--only mixup\*: no contender; there are 'mix 64 x 224²'"):
        flat(kernels.kernels(CPU, only=["mixup*"]))


def test_the_project_is_compared_with_the_fastest_peer():
    times = {common.OWN: 2.0, "fasttrain, eager": 1.0, "timm, a": 4.0, "timm, b": 3.0}
    rows = [common.row("step", "case", name, [each]) for name, each in times.items()]
    own, *others = common.compared_with_best(rows, "timm*")
    assert own.details == {"best_peer": "timm, b", "x_best_peer": 1.5} and others == rows[1:]
    assert common.compared_with_best(rows[:2], "timm*") == rows[:2]


def test_bytes_are_those_of_the_shapes():
    images = torch.zeros(3, 8, 10, 3, dtype=torch.uint8)
    counted = kernels._trace(lambda: images.float().add_(1), CPU)
    # bytes in, floats out, floats in and out again
    assert counted == {"launches": 2, "bytes": 720 + 3 * 2880}


def test_contenders_have_turns_in_both_directions():
    order = []
    contenders = {name: lambda name=name: lambda: order.append(name) or float(len(order)) for name in "abc"}
    known = [{name: [*times] for name, times in each.timed.items()} for each in common.race("case", contenders, 3)]
    assert "".join(order) == "abccbaabc" and known[-1]["a"] == [1.0, 6.0, 7.0]
    assert known[0] == {"a": [1.0]} and len(known) == 9  # after every turn
    row = common.row("work", "case", "a", known[-1]["a"], images=12, note="x")
    assert (row.seconds, row.least, row.most, row.n, row.images_per_s) == (6.0, 1.0, 7.0, 3, 2.0)
    assert row.plain()["note"] == "x" and "details" not in row.plain()


def test_a_peer_that_fails_later_is_left_out_with_its_times(capsys):
    turns = iter([1.0])

    def peer() -> float:
        return next(turns, None) or fail("out of memory\nmore")

    *_, found = common.race("case", {common.OWN: lambda: lambda: 2.0, "timm, a": lambda: peer}, 3)
    assert found.timed == {common.OWN: [2.0] * 3} and found.left_out == {"timm, a": "out of memory"}
    assert "case: timm, a is left out: out of memory" in capsys.readouterr().err
    (own,) = common.compared_with_best([common.row("step", "case", common.OWN, [2.0])], "timm*", found.left_out)
    assert own.details == {"left_out": "timm, a: out of memory"}
    with pytest.raises(RuntimeError, match="ours"):
        list(common.race("case", {"fasttrain, eager": lambda: fail("ours")}, 1))


def fail(reason: str):
    raise RuntimeError(reason)


@pytest.mark.parametrize("name", LOADERS)
def test_every_loader_delivers_each_image_once_an_epoch_normalised(colours, name):
    """Of images of one colour every crop is the same, so pixels are known; and they tell which image it was."""
    stream = LOADERS[name](work_of(colours))
    seen: Counter[int] = Counter()
    mean, std = (torch.tensor(each)[:, None, None] for each in (IMAGENET_MEAN, IMAGENET_STD))
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
def test_every_loader_mixes_each_batch_where_asked(colours, name):
    """Flat images that stay flat were not mixed; with CutMix some of a batch have to be cut."""
    stream = LOADERS[name](work_of(colours, cutmix=True, dtype=torch.bfloat16))
    cut = 0
    for _ in range(4):
        images, _, targets = next(stream)
        assert images.dtype == torch.bfloat16 and images.is_contiguous(memory_format=torch.channels_last)
        cut += int((images.float().flatten(2).std(2).amax(1) > 0.05).sum())
        assert isinstance(targets, tuple) or targets.shape == (4, 16)
    stream.close()
    assert cut >= 4


@pytest.mark.parametrize("name", LOADERS)
def test_a_turn_takes_as_many_batches_as_it_claims(colours, name):
    taken = []

    def counted(work):
        for batch in LOADERS[name](work):
            taken.append(len(batch.images))
            yield batch

    assert pipeline.turn(counted, work_of(colours), 3) > 0
    assert taken == [4] * (pipeline.WARM_UP + 2 + 3)  # two for the process


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
    told = read(tmp_path / "pipeline.json", flat(cases), tmp_path)
    assert [each["contender"] for each in told if each["work"] == "pipeline"] == list(LOADERS)
    stages = [each for each in told if each["work"] == "stages"]
    named = ["read", "+ decode the crop", "+ resize, flip", "+ AutoAugment", "+ normalise, mix"]
    assert [each["contender"] for each in stages] == named
    whole = next(each for each in told if each["contender"] == common.OWN)
    assert sum(each["us_per_image"] for each in stages) == pytest.approx(whole["least"] / 4 * 1e6)
    assert stages[-1]["seconds"] == whole["seconds"]


def test_a_cut_pipeline_gives_what_its_last_stage_makes(colours):
    work = work_of(colours)
    shapes = {}
    for name, loader in pipeline.stages(work).items():
        stream = loader(work)
        shapes[name] = next(stream)[0].at(0).shape
        stream.close()
    assert list(shapes) == ["read", "decode the crop", "resize, flip"]
    assert len(shapes["read"]) == 1 and len(shapes["decode the crop"]) == 3 and shapes["resize, flip"] == (24, 24, 3)


def test_repeating_and_relabelling_keep_the_images(colours):
    twice = pipeline.repeated(colours, 17)
    assert len(twice) == 32 and Counter(twice.paths) == Counter(dict.fromkeys(colours.paths, 2))
    assert twice.labels.tolist() == colours.labels.tolist() * 2 and twice.sizes.shape == (32, 2)
    grouped = pipeline.relabelled(twice, 6)
    assert grouped.labels.tolist() == [label for label in range(5) for _ in range(6)] and len(grouped.classes) == 5


def test_step(tmp_path):
    also = ["optim.nesterov=true"]
    rows = flat(step.step([tiny()], CPU, classes=10, rounds=2, steps=2, warm_up=1, also=also))
    told = read(tmp_path / "step.json", rows, tmp_path)
    names = ["fasttrain, optim.nesterov=true", "timm, NCHW, eager", "timm, channels_last, eager"]
    assert [each["contender"] for each in told] == [common.OWN, *names] and told[0]["best_peer"] in names[1:]


def test_a_step_alone():
    rows = flat(step.step([tiny()], CPU, rounds=1, steps=1, warm_up=1, only=[common.OWN]))
    assert [each.contender for each in rows] == [common.OWN]


def test_a_peer_that_fails_is_reported_and_left_out(monkeypatch, capsys):
    class Failing(step.Timm):
        def __call__(self):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")

    monkeypatch.setattr(step, "Timm", Failing)
    rows = flat(step.step([tiny()], CPU, rounds=2, steps=1, warm_up=1))
    reason = "CUDA out of memory. Tried to allocate 2 GiB."
    assert [each.contender for each in rows] == [common.OWN] and f"timm, NCHW, eager: {reason}" in rows[0].details[
        "left_out"
    ]
    lines = capsys.readouterr().err.splitlines()
    assert sum(f"timm, NCHW, eager is left out: {reason}" in line for line in lines) == 1


def test_the_step_can_be_measured_without_dali():
    """On a machine that does not have it, nor tomli_w."""
    code = (
        "import sys; sys.modules['nvidia.dali'] = sys.modules['tomli_w'] = None\nfrom fasttrain.cli.main import main\n"
    )
    code += "main('bench step --arch test_resnet --image-size 32 --batch-size 8 --rounds 1 --steps 1'.split())"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_compiled_layouts_of_a_network_are_compiled_for_their_own_strides():
    """Both share a code object, so that dynamo would take the second layout's strides for dynamic ones."""
    seen = []

    def look(module, inputs):
        for node in module.graph.nodes:
            value = node.meta.get("example_value")
            if node.op == "placeholder" and isinstance(value, torch.Tensor) and [*value.shape[1:]] == [3, 32, 32]:
                seen.append([isinstance(each, int) for each in value.stride()])
        return module

    honest = torch.compile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda network, **options: honest(network, backend=look, **options))
        torch.compiler.reset()
        made = step.contenders(tiny(compiled="on"), CPU, 10)
        for layout in step.LAYOUTS:
            made[f"timm, {layout}, compiled"]()()
    assert len(seen) == 2 and all(all(each) for each in seen)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--no-peers", "--only", "timm*"], "--only and --no-peers exclude each other"),
        (["--only", "tim"], "--only tim: no contender; there are 'fasttrain', 'timm, NCHW, eager'"),
        (["--also", "optim.lrr=1"], "--set: no key 'optim.lrr'"),
    ],
)
def test_options_that_do_not_fit_are_refused(words, says):
    result = CliRunner().invoke(main, ["bench", "step", "--arch", "test_resnet", "--device", "cpu", *words])
    assert result.exit_code == 2 and says in result.stderr


def test_settings_of_another_step_may_be_auto_and_go_without_peers(monkeypatch, tmp_path):
    path = tmp_path / "a.json"
    words = ["--no-peers", "--also", "precision=auto", "--rounds", "1", "--steps", "1", "--json", str(path)]
    small = ["--arch", "test_resnet", "--image-size", "32", "--batch-size", "8", "--device", "cpu"]
    result = CliRunner().invoke(main, ["bench", "step", *small, *words])
    assert result.exit_code == 0, (result.output, result.exception)
    assert [row["contender"] for row in json.loads(path.read_text())["rows"]] == [
        "fasttrain",
        "fasttrain, precision=auto",
    ]


def test_a_loader_that_not_every_case_has_can_be_chosen(colours):
    with pytest.raises(UserError, match="--only nothing: no contender"):
        flat(pipeline.pipeline(colours, CPU, torch.float32, batch_sizes=(4,), only=["nothing"]))
    assert common.chosen(["fasttrain"], [pipeline.LINEAR], pipeline.LOADERS) == []


@pytest.mark.parametrize("layout", step.LAYOUTS)
def test_timms_weights_and_images_have_the_layout_that_is_named(layout):
    made = step.contenders(tiny(), CPU, 10)[f"timm, {layout}, eager"]()
    assert isinstance(made, step.Timm) and isinstance(made.network, torch.nn.Module)
    network, seen = made.network, []
    network.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    made()
    memory_format = step.LAYOUTS[layout]
    assert seen[0].is_contiguous(memory_format=memory_format)
    weights = [each for each in network.parameters() if each.ndim == 4]
    assert all(each.is_contiguous(memory_format=memory_format) for each in weights)


def test_a_step_of_several_views_is_told_beside_one_of_one_view():
    second = recipes.stage2(recipes.stage1(tiny()))
    recipe = replace(tiny(), losses=second.losses, ema=second.ema)
    rows = flat(step.step([recipe], CPU, classes=10, rounds=1, steps=1, warm_up=1))
    assert [each.contender for each in rows][:2] == [common.OWN, "fasttrain, CE on one view"]
    assert rows[0].images_per_s == pytest.approx(8 / rows[0].seconds)  # images, not rows


def test_a_recipe_keeps_its_own_precision_and_losses_and_one_that_distils_is_refused():
    kept = step.recipe_of(recipes.RECIPES["bag_of_tricks/baseline"], CPU)
    assert kept.precision == "fp32" and kept.losses == recipes.RECIPES["bag_of_tricks/baseline"].losses
    with pytest.raises(UserError, match="distils from a teacher, which benchmarks do not have"):
        step.recipe_of(recipes.RECIPES["bag_of_tricks/distillation"], CPU)


def test_compiled_contenders_are_those_of_a_compiled_recipe(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model, **_: compiled.append(model) or model)
    made = step.contenders(tiny(compiled="on"), CPU, 10)
    for name, make in made.items():
        compiled.clear()
        make()
        assert len(compiled) == ("compiled" in name or name == common.OWN), name
    assert sum("compiled" in name for name in made) == 2


def test_timms_variants_take_the_same_steps():
    """The layout changes nothing but the time."""
    recipe = tiny()
    losses = {}
    for name, make in step.contenders(recipe, CPU, 10).items():
        contender = make()
        np.random.seed(0)
        losses[name] = [contender().item() for _ in range(3)]
    own, usual, *others = losses.values()
    assert len(others) == 1 and all(each == pytest.approx(usual, rel=1e-4) for each in others)
    assert all(0 < each < 10 for each in own + usual)


def test_timms_fixed_batch_is_normalised_as_ours():
    pixels = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    images, _ = next(step.prefetched(pixels, torch.zeros(2)))
    ours = normalised(pixels.permute(0, 2, 3, 1).contiguous(), torch.float32)
    assert torch.allclose(images, ours, atol=1e-5)


def test_turns_take_as_many_steps_as_they_claim():
    count = 0

    class Counted:
        cudnn_benchmark = True

        @property
        def warm(self):
            return count >= 4

        def __call__(self):
            nonlocal count
            count += 1

    turns = step.Turns(Counted, CPU, steps=3, warm_up=2)  # type: ignore[arg-type]
    before = torch.backends.cudnn.benchmark
    assert count == 4 and turns() >= 0 and count == 7 and turns.told() == {}
    assert torch.backends.cudnn.benchmark == before


def test_host_time_is_of_a_network_of_one_parameter(tmp_path):
    assert sum(each.numel() for each in step.OneParameter().parameters()) == 1
    rows = read(tmp_path / "host.json", flat(step.host(CPU, rounds=2, steps=2, warm_up=1)), tmp_path)
    assert len(rows) == 5 and [each["contender"] for each in rows[:2]] == [
        common.OWN,
        f"{step.REPLAYED}, without its work",
    ]


def test_several_ranks_do_not_measure_one_another(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = CliRunner().invoke(main, ["bench", "step", "--host", "--json", str(tmp_path / "a.json")])
    assert result.exit_code == 2 and "run it without torchrun" in result.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize("loss", ["ce", pytest.param("ce+triplet", marks=pytest.mark.slow)])
def test_end_to_end(colours, tmp_path, monkeypatch, loss):
    monkeypatch.setattr(pipeline, "LEAST_STEPS", 5)
    recipe = tiny(loss, batch_size=8)
    recipe = replace(recipe, machine=replace(recipe.machine, workers=1))
    if recipe.images_per_class:
        recipe = replace(recipe, images_per_class=2)
    rows = flat(train.end_to_end([recipe], colours, ALONE, rounds=2, steps=2, warm_up=2))
    told = {each["contender"]: each for each in read(tmp_path / "train.json", rows, tmp_path)}
    assert list(told) == [common.OWN, train.STEP, train.PIPELINE, "timm, NCHW", "timm, channels_last"]
    rates = [told[name]["images_per_s"] for name in told]
    assert told[common.OWN]["eta"] == pytest.approx(rates[0] / min(rates[1:3]))


def test_seconds_a_step_leave_the_warm_up_out():
    points = [{"step": 2, "images_per_s": 1.0}, {"step": 4, "images_per_s": 8.0}, {"step": 5, "images_per_s": 2.0}]
    assert train.seconds_a_step(points, tiny(), 2) == pytest.approx((2 * 1 + 1 * 4) / 3)


def test_odd_batches_are_refused(colours):
    with pytest.raises(UserError, match="even"):
        tiny(batch_size=7)
    with pytest.raises(UserError, match="even"):
        flat(pipeline.pipeline(colours, CPU, torch.float32, batch_sizes=(4, 7)))


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
        ("--json", "there.json", "{}", "there.json is there and holds no figures of a benchmark"),
        ("--json", "there.json", "[" * 9999, "there.json is there and holds no figures of a benchmark"),
        ("--json", "nowhere/a.json", None, "there is no folder nowhere"),
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
def test_what_bench_cannot_write_is_said_before_it_measures(
    monkeypatch, tmp_path, demo_set, name, option, path, content, says
):
    def measured(*_, **__):
        raise AssertionError("it has measured")

    for module, function in ((kernels, "kernels"), (step, "step"), (pipeline, "pipeline"), (train, "end_to_end")):
        monkeypatch.setattr(module, function, measured)
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(path).write_text(content)
    if "matplotlib" in says:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
    args = [str(demo_set) if each == "DATA" else each for each in BENCHES[name]]
    result = CliRunner().invoke(main, ["bench", name, *args, "--device", "cpu", option, path])
    lines = [line for line in result.stderr.splitlines() if line.startswith("fasttrain: ")]
    assert result.exit_code == 2 and len(lines) == 1 and says in lines[0], (result.output, result.exception)
    assert content is None or Path(path).read_text() == content


def test_bench_writes_over_its_own_results(monkeypatch, tmp_path):
    monkeypatch.setattr(kernels, "kernels", lambda *_: [[common.row("mix", "case", common.OWN, [1.0, 2.0])]])
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        result = CliRunner().invoke(
            main, ["bench", "kernels", "--device", "cpu", "--json", "a.json", "--plot", "a.png"]
        )
        assert result.exit_code == 0, (result.output, result.exception)
    assert json.loads(Path("a.json").read_text())["rows"][0]["seconds"] == 1.5
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.json", "a.png"]


def test_bench_keeps_each_case_that_was_measured(monkeypatch, tmp_path):
    def two_cases(*_):
        yield [common.row("mix", "first", common.OWN, [1.0])]
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
        common.row("step", "net, 8 x 32², bf16", common.OWN, [1.0, 2.0, 4.0], 8, host_ms=3.0),
        common.row("step", "net, 8 x 32², bf16", "other", [4.0, 4.0, 4.0], 8),
    ]
    common.write_json(results / "step-cpu.json", CPU, rows, {"rounds": 3})
    made = script.tables("step", results)
    told = json.loads((results / "step-cpu.json").read_text())
    assert told["device"] in made and told["date"] in made and "| other |" in made and "2.00" in made
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- step -->\nold\n<!-- end -->\nb\n")
    script.write(readme, results)
    assert readme.read_text() == f"a\n<!-- step -->\n{made}\n<!-- end -->\nb\n"
    (results / "step-cpu.json").rename(tmp_path / "step-cpu.json")
    script.write(readme, results)
    assert made in readme.read_text()  # nothing is taken away
    (tmp_path / "step-cpu.json").rename(results / "step-cpu.json")
    readme.write_text("no place\n")
    with pytest.raises(SystemExit, match="step"):
        script.write(readme, results)
