"""The loop: learning, accumulation, resuming, what it writes, and that it never waits for the device in a step."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import CPU, Stop, events, fail_at, run, tiny, weights
from torch.utils._python_dispatch import TorchDispatchMode

from fasttrain import prepare, recipes
from fasttrain.checkpoints import checkpoint
from fasttrain.config.schema import (
    AugmentConfig,
    CheckpointConfig,
    EmaConfig,
    InitConfig,
    MachineConfig,
    MixConfig,
    OptimConfig,
)
from fasttrain.losses.arcface import ArcFace
from fasttrain.losses.contrastive import Contrastive
from fasttrain.losses.cross_entropy import CrossEntropy
from fasttrain.losses.mean_teacher import MeanTeacher
from fasttrain.losses.symmetric import SymmetricCrossEntropy
from fasttrain.losses.triplet import Triplet
from fasttrain.models import Classifier
from fasttrain.pipelines.plan import Plan
from fasttrain.training import inputs
from fasttrain.training import log as logging
from fasttrain.training.memory import out_of_memory
from fasttrain.utils.errors import RunError, UserError


def test_a_run_learns(index, tmp_path):
    recipe = tiny(
        epochs=12,
        augment=AugmentConfig(crop_area=(0.6, 1.0), autoaugment="none"),
        mix=MixConfig(cutmix=0),
        optim=OptimConfig(lr=0.05, lr_batch=0),
        losses=(CrossEntropy(0.0),),
    )
    run(recipe, tmp_path / "run", index)
    losses = [each["loss"] for each in events(tmp_path / "run") if each["event"] == "train"]
    assert losses[0] > 2.0 and losses[-1] < 1.6


def test_the_runs_folder_holds_what_is_promised(index, tmp_path):
    out = tmp_path / "run"
    result = run(tiny(), out, index, index)
    assert result.steps == 10 and result.scores is not None and result.scores.images == 100
    assert recipes.by_name(str(out / "recipe.toml")) == tiny()
    log = events(out)
    kinds = [each["event"] for each in log]
    assert kinds[0] == "start" and kinds[-1] == "end"
    points = [each for each in log if each["event"] == "train"]
    assert [each["step"] for each in points] == [2, 4, 5, 6, 8, 10]
    assert {"epoch", "step", "lr", "loss", "terms", "images_per_s"} <= points[0].keys()
    assert points[0]["terms"].keys() == {"cross_entropy"} and points[0]["loss"] == points[0]["terms"]["cross_entropy"]
    tests = [each for each in log if each["event"] == "eval"]
    assert [each["step"] for each in tests] == [5, 10] and tests[0]["images"] == 100
    assert [each["path"] for each in log if each["event"] == "checkpoint"] == [
        "checkpoints/step-00000005",
        "checkpoints/step-00000010",
    ]
    assert (out / "last").resolve().name == "step-00000010"
    best = max(tests, key=lambda each: (each["top1"], -each["step"]))
    assert (out / "best").resolve().name == f"step-{best['step']:08}"
    assert result.best == best["top1"]
    meta = json.loads((out / "last" / "meta.json").read_text())
    assert meta["classes"] == list(index.classes) and meta["step"] == 10


@pytest.mark.parametrize("wanted", [True, False])
def test_tensorboards_files_are_written_where_they_are_wanted(index, tmp_path, monkeypatch, wanted):
    """Its writer is a stand-in, since it need not be installed."""
    folders: list[Path] = []
    monkeypatch.setattr(logging, "_tensorboard", folders.append)
    recipe = tiny(epochs=1)
    run(replace(recipe, machine=replace(recipe.machine, tensorboard=wanted)), tmp_path / "run", index)
    assert folders == [tmp_path / "run"] * wanted


def test_learning_rates_are_the_schedules(index, tmp_path):
    run(tiny(), tmp_path / "run", index)
    points = [each for each in events(tmp_path / "run") if each["event"] == "train"]
    peak = 0.1 * 20 / 256
    assert points[0]["lr"] == pytest.approx(peak * 1 / 5)  # the second of five warm-up steps
    assert points[3]["lr"] == pytest.approx(peak)


def test_evaluation_scores_are_those_of_a_plain_loop(index, tmp_path):
    out = tmp_path / "run"
    result = run(tiny(), out, index, index)
    from PIL import Image
    from torchvision import transforms as T

    view = T.Compose(
        [T.Resize(37), T.CenterCrop(32), T.ToTensor(), T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    )
    model = Classifier("test_resnet", 10).eval()
    checkpoint.restore_model(checkpoint.load(out / "last"), model)
    images = torch.stack([view(Image.open(path).convert("RGB")) for path in index.paths])
    with torch.no_grad():
        ranked = model(images).logits.topk(5).indices
    hits = ranked == torch.from_numpy(index.labels)[:, None]
    assert result.scores is not None
    # Pixels differ by up to 2 of 255 from PIL's, so a tie or two may fall to the other side.
    assert abs(result.scores.top1 * 100 - int(hits[:, 0].sum())) <= 2
    assert abs(result.scores.top5 * 100 - int(hits.sum())) <= 2


@pytest.mark.parametrize("changes", [{}, {"arch": "test_vit", "image_size": 160}])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(index, tmp_path, monkeypatch, changes):
    recipe = tiny(epochs=3, **changes)
    if recipe.arch == "test_vit":
        recipe = replace(recipe, epochs=2, batch_size=10)
    run(recipe, tmp_path / "whole", index, index)
    for stops in range(1, recipe.epochs):
        out = tmp_path / f"stopped{stops}"
        with monkeypatch.context() as patch:
            fail_at(patch, stops * len(index) // recipe.batch_size)
            with pytest.raises(Stop):
                run(recipe, out, index, index)
        run(recipe, out, index, index)
        ours, theirs = weights(out), weights(tmp_path / "whole")
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert torch.equal(ours[name], theirs[name]), name
        assert "resume" in [each["event"] for each in events(out)]

        def timeless(folder):
            drop = ("images_per_s", "held_s", "write_s")
            kept = [each for each in events(folder) if each["event"] in ("train", "eval", "checkpoint")]
            return [{key: value for key, value in each.items() if key not in drop} for each in kept]

        assert sorted(map(str, timeless(out))) == sorted(map(str, timeless(tmp_path / "whole")))


def test_a_finished_run_is_not_run_again(index, tmp_path):
    run(tiny(epochs=1), tmp_path / "run", index, index)
    before = (tmp_path / "run" / "log.jsonl").read_text()
    result = run(tiny(epochs=1), tmp_path / "run", index, index)
    assert result.steps == 5 and (tmp_path / "run" / "log.jsonl").read_text() == before


def test_resuming_refuses_another_run_and_names_every_difference(index, tmp_path):
    run(tiny(epochs=1), tmp_path / "run", index)
    with pytest.raises(UserError) as caught:
        run(tiny(epochs=1, seed=3, optim=OptimConfig(momentum=0.8)), tmp_path / "run", index)
    assert "seed was 0 and is 3" in str(caught.value) and "optim.momentum was 0.9 and is 0.8" in str(caught.value)
    other = replace(index, labels=index.labels[::-1].copy())
    with pytest.raises(UserError, match="the training images differ"):
        run(tiny(epochs=1), tmp_path / "run", other)
    renamed = replace(index, classes=("yak", *index.classes[1:]))
    with pytest.raises(UserError, match=r"the classes differ .*yak"):
        run(tiny(epochs=1), tmp_path / "run", renamed)
    run(tiny(epochs=1, micro_batch=10, checkpoint=CheckpointConfig(keep=1)), tmp_path / "run", index)


def test_starting_over_moves_the_old_run_aside(index, tmp_path):
    out = tmp_path / "run"
    run(tiny(epochs=1), out, index)
    first = weights(out)
    run(tiny(epochs=1, seed=1), out, index, resume="never")
    assert all(torch.equal(first[name], each) for name, each in weights(tmp_path / "run.1").items())
    assert not all(torch.equal(first[name], each) for name, each in weights(out).items())


def test_a_folder_of_something_else_is_not_touched(index, tmp_path):
    (tmp_path / "thesis.txt").write_text("x")
    for resume in ("auto", "never"):
        with pytest.raises(UserError, match="is not empty and holds no run"):
            run(tiny(), tmp_path, index, resume=resume)
    assert [each.name for each in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("micro", [10, 5, 1])
def test_accumulated_gradients_equal_one_big_batch(index, tmp_path, micro):
    """For a network without BatchNorm; without CutMix, whose partners come from the micro-batch."""
    logs = []
    for name, size in (("big", 0), ("small", micro)):
        recipe = tiny(arch="test_convnext", micro_batch=size, mix=MixConfig(cutmix=0), epochs=1)
        run(recipe, tmp_path / name, index)
        logs.append([each["loss"] for each in events(tmp_path / name) if each["event"] == "train"])
    assert logs[0] == pytest.approx(logs[1], rel=1e-5)
    big, small = weights(tmp_path / "big"), weights(tmp_path / "small")
    for name in big:
        torch.testing.assert_close(small[name], big[name], rtol=1e-4, atol=2e-6)


class Syncs(TorchDispatchMode):
    """Counts operations that make the host wait for a device's result."""

    WAITING = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "_to_cpu", "equal")

    def __init__(self):
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in self.WAITING:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "changes",
    [
        *({"precision": precision} for precision in ("fp32", "bf16", "fp16")),
        {"losses": (CrossEntropy(), Triplet()), "images_per_class": 5, "init": InitConfig(force_scratch=True)},
        {"losses": (CrossEntropy(), ArcFace()), "init": InitConfig(force_scratch=True), "ema": EmaConfig(0.9)},
    ],
)
def test_no_step_waits_for_the_device(index, tmp_path, changes):
    """Twice and four times the steps, the same number of log points and checkpoints: the same number of waits."""
    counts = []
    for batch in (20, 10, 5):
        quiet = MachineConfig(device="cpu", compile="off", log_steps=1000)
        recipe = tiny(epochs=1, batch_size=batch, machine=quiet, **changes)
        with Syncs() as syncs:
            run(recipe, tmp_path / f"{batch}", index)
        counts.append(syncs.seen)
    assert counts[0] == counts[1] == counts[2]


def test_the_counter_of_waits_counts():
    with Syncs() as syncs:
        torch.ones(3).sum().item()
        bool(torch.tensor(1) > 0)
    assert sum(syncs.seen.values()) == 2


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"arch": "vit_tiny_patch16_224"}, "vit_tiny_patch16_224 does not take 20 images of 32 x 32 pixels at once"),
        ({"arch": "tresnet_m", "image_size": 30}, "tresnet_m does not take 20 images of 30 x 30"),
        ({"arch": "resnest14d", "micro_batch": 1}, "resnest14d does not take one image .*micro_batch"),
        ({"losses": (CrossEntropy(), ArcFace())}, "arcface does not converge from random weights"),
        ({"init": InitConfig(weights="nowhere")}, "nowhere is no checkpoint"),
    ],
)
def test_what_cannot_be_trained_is_told_by_the_run_and_by_its_summary(index, tmp_path, changes, says):
    recipe = tiny(**changes)
    with pytest.raises(UserError, match=says):
        prepare.summary(recipe, index, None, CPU, tmp_path / "run")
    with pytest.raises(UserError, match=says):
        run(recipe, tmp_path / "run", index)


def test_a_folder_of_somebody_elses_is_refused_by_a_summary(index, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="holds no run"):
        prepare.summary(tiny(), index, None, CPU, tmp_path)


def test_out_of_memory_names_the_micro_batch_to_try(index, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(inputs, "mix", full)
    with pytest.raises(RunError, match=r"micro_batch=20 at 32 pixels; try --set micro_batch=10"):
        run(tiny(), tmp_path / "run", index)
    plan = Plan.of(tiny(micro_batch=1), index)
    assert "smaller --image-size" in str(out_of_memory(plan))
    assert "micro_batch=3" in str(out_of_memory(replace(plan, micro_batch=9)))


@pytest.mark.slow
def test_the_compiled_network_trains_alike(index, tmp_path):
    plain, compiled = (
        tiny(epochs=1, machine=MachineConfig(device="cpu", compile=each, log_steps=1)) for each in ("off", "on")
    )
    run(plain, tmp_path / "plain", index)
    run(compiled, tmp_path / "compiled", index)
    ours, theirs = (
        [each["loss"] for each in events(tmp_path / name) if each["event"] == "train"] for name in ("compiled", "plain")
    )
    assert ours == pytest.approx(theirs, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["on", "graphs"])
def test_a_compiled_run_computes_what_an_uncompiled_one_does(index, tmp_path, how):
    """Also with two views and an averaged network that answers; a CPU has no graphs, and takes the same way to them."""
    losses = (SymmetricCrossEntropy(), Contrastive(), MeanTeacher())
    told = []
    for compiled in ("off", how):
        machine = MachineConfig(device="cpu", compile=compiled, log_steps=1, workers=2)
        recipe = tiny(epochs=1, losses=losses, ema=EmaConfig(0.9), machine=machine)
        run(recipe, tmp_path / compiled, index)
        told.append([each["terms"] for each in events(tmp_path / compiled) if each["event"] == "train"])
    assert len(told[0]) == 5
    for plain, compiled in zip(*told, strict=True):
        assert compiled == pytest.approx(plain, rel=2e-3)
