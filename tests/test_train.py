"""The training loop: learning, accumulation, resuming, its files, and that no step waits for the device."""

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
from fasttrain.data.open_data import Parts
from fasttrain.losses.arcface import ArcFace
from fasttrain.losses.contrastive import Contrastive
from fasttrain.losses.cross_entropy import CrossEntropy
from fasttrain.losses.mean_teacher import MeanTeacher
from fasttrain.losses.symmetric import SymmetricCrossEntropy
from fasttrain.losses.triplet import Triplet
from fasttrain.models import Classifier
from fasttrain.pipelines.plan import Plan
from fasttrain.training import inputs, trackers
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
    losses = [event["loss"] for event in events(tmp_path / "run") if event["event"] == "train"]
    assert losses[0] > 2.0 and losses[-1] < 1.6


def test_files_and_log_of_a_run(index, tmp_path):
    out = tmp_path / "run"
    result = run(tiny(), out, index, index)
    assert result.steps == 10 and result.scores is not None and result.scores.images == 100
    assert recipes.by_name(str(out / "recipe.toml")) == tiny()
    log = events(out)
    kinds = [event["event"] for event in log]
    assert kinds[0] == "start" and kinds[-1] == "end"
    points = [event for event in log if event["event"] == "train"]
    assert [point["step"] for point in points] == [2, 4, 5, 6, 8, 10]
    assert {"epoch", "step", "lr", "loss", "terms", "images_per_s"} <= points[0].keys()
    assert points[0]["terms"].keys() == {"cross_entropy"} and points[0]["loss"] == points[0]["terms"]["cross_entropy"]
    evals = [event for event in log if event["event"] == "eval"]
    assert [event["step"] for event in evals] == [5, 10] and evals[0]["images"] == 100
    assert [event["path"] for event in log if event["event"] == "checkpoint"] == [
        "checkpoints/step-00000005",
        "checkpoints/step-00000010",
    ]
    assert (out / "last").resolve().name == "step-00000010"
    best = max(evals, key=lambda event: (event["top1"], -event["step"]))
    assert (out / "best").resolve().name == f"step-{best['step']:08}"
    assert result.best == best["top1"]
    meta = json.loads((out / "last" / "meta.json").read_text())
    assert meta["classes"] == list(index.classes) and meta["step"] == 10


@pytest.mark.parametrize("tensorboard", [True, False])
def test_tensorboard_files_can_be_switched_off(index, tmp_path, monkeypatch, tensorboard):
    """With a fake writer, since TensorBoard may not be installed."""
    folders: list[Path] = []
    monkeypatch.setattr(trackers, "_tensorboard", lambda out, say: folders.append(out))
    recipe = tiny(epochs=1)
    run(replace(recipe, machine=replace(recipe.machine, tensorboard=tensorboard)), tmp_path / "run", index)
    assert folders == [tmp_path / "run"] * tensorboard


def test_learning_rates_follow_the_schedule(index, tmp_path):
    run(tiny(), tmp_path / "run", index)
    points = [event for event in events(tmp_path / "run") if event["event"] == "train"]
    peak = 0.1 * 20 / 256
    assert points[0]["lr"] == pytest.approx(peak * 1 / 5)  # the second of five warm-up steps
    assert points[3]["lr"] == pytest.approx(peak)


def test_evaluation_scores_equal_a_plain_loop(index, tmp_path):
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
    # Pixels differ from PIL's by up to 2 of 255, so close predictions may change.
    assert abs(result.scores.top1 * 100 - int(hits[:, 0].sum())) <= 2
    assert abs(result.scores.top5 * 100 - int(hits.sum())) <= 2


@pytest.mark.parametrize("changes", [{}, {"arch": "test_vit", "image_size": 160}])
def test_a_resumed_run_equals_an_uninterrupted_one_bitwise(index, tmp_path, monkeypatch, changes):
    recipe = tiny(epochs=3, **changes)
    if recipe.arch == "test_vit":
        recipe = replace(recipe, epochs=2, batch_size=10)
    run(recipe, tmp_path / "full", index, index)
    for stops in range(1, recipe.epochs):
        out = tmp_path / f"stopped{stops}"
        with monkeypatch.context() as patch:
            fail_at(patch, stops * len(index) // recipe.batch_size)
            with pytest.raises(Stop):
                run(recipe, out, index, index)
        run(recipe, out, index, index)
        actual, expected = weights(out), weights(tmp_path / "full")
        assert actual.keys() == expected.keys()
        for name in actual:
            assert torch.equal(actual[name], expected[name]), name
        assert "resume" in [event["event"] for event in events(out)]

        def without_times(folder):
            dropped = ("images_per_s", "held_s", "write_s")
            lines = [event for event in events(folder) if event["event"] in ("train", "eval", "checkpoint")]
            return [{key: value for key, value in line.items() if key not in dropped} for line in lines]

        assert sorted(map(str, without_times(out))) == sorted(map(str, without_times(tmp_path / "full")))


def test_a_finished_run_is_not_repeated(index, tmp_path):
    run(tiny(epochs=1), tmp_path / "run", index, index)
    before = (tmp_path / "run" / "log.jsonl").read_text()
    result = run(tiny(epochs=1), tmp_path / "run", index, index)
    assert result.steps == 5 and (tmp_path / "run" / "log.jsonl").read_text() == before


def test_resume_refuses_other_settings_and_names_all_differences(index, tmp_path):
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


def test_resume_never_renames_the_old_run(index, tmp_path):
    out = tmp_path / "run"
    run(tiny(epochs=1), out, index)
    first = weights(out)
    run(tiny(epochs=1, seed=1), out, index, resume="never")
    assert all(torch.equal(first[name], tensor) for name, tensor in weights(tmp_path / "run.1").items())
    assert not all(torch.equal(first[name], tensor) for name, tensor in weights(out).items())


def test_a_folder_with_other_files_is_refused(index, tmp_path):
    (tmp_path / "thesis.txt").write_text("x")
    for resume in ("auto", "never"):
        with pytest.raises(UserError, match="is not empty and holds no run"):
            run(tiny(), tmp_path, index, resume=resume)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("micro", [10, 5, 1])
def test_accumulated_gradients_equal_one_big_batch(index, tmp_path, micro):
    """With a network without BatchNorm, and without CutMix, whose partners come from the micro-batch."""
    losses = []
    for name, size in (("big", 0), ("small", micro)):
        recipe = tiny(arch="test_convnext", micro_batch=size, mix=MixConfig(cutmix=0), epochs=1)
        run(recipe, tmp_path / name, index)
        losses.append([event["loss"] for event in events(tmp_path / name) if event["event"] == "train"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    big, small = weights(tmp_path / "big"), weights(tmp_path / "small")
    for name in big:
        torch.testing.assert_close(small[name], big[name], rtol=1e-4, atol=2e-6)


class SyncCounter(TorchDispatchMode):
    """Counts operations that make the host wait for the device."""

    WAITING = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "_to_cpu", "equal")

    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in self.WAITING:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "changes",
    [
        *(pytest.param({"precision": name}, marks=pytest.mark.slow, id=name) for name in ("fp32", "bf16", "fp16")),
        pytest.param(
            {"losses": (CrossEntropy(), Triplet()), "images_per_class": 5, "init": InitConfig(force_scratch=True)},
            marks=pytest.mark.slow,
            id="triplet",
        ),
        pytest.param(
            {
                "losses": (CrossEntropy(), ArcFace()),
                "init": InitConfig(force_scratch=True),
                "ema": EmaConfig(0.9),
                "precision": "bf16",
            },
            id="ArcFace, averages, bf16",
        ),
    ],
)
def test_no_step_waits_for_the_device(index, tmp_path, changes):
    """Two and four times as many steps, with as many log points and checkpoints, have the same number of waits."""
    counts = []
    for batch in (20, 10, 5):
        quiet = MachineConfig(device="cpu", compile="off", log_steps=1000)
        recipe = tiny(epochs=1, batch_size=batch, machine=quiet, **changes)
        with SyncCounter() as syncs:
            run(recipe, tmp_path / f"{batch}", index)
        counts.append(syncs.counts)
    assert counts[0] == counts[1] == counts[2]


def test_sync_counter_counts():
    with SyncCounter() as syncs:
        torch.ones(3).sum().item()
        bool(torch.tensor(1) > 0)
    assert sum(syncs.counts.values()) == 2


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"arch": "vit_tiny_patch16_224"}, "vit_tiny_patch16_224 does not take 20 images of 32 x 32 pixels at once"),
        ({"arch": "tresnet_m", "image_size": 30}, "tresnet_m does not take 20 images of 30 x 30"),
        ({"arch": "resnest14d", "micro_batch": 1}, "resnest14d does not take one image .*micro_batch"),
        ({"losses": (CrossEntropy(), ArcFace())}, "arcface does not converge from random weights"),
        ({"init": InitConfig(weights="nowhere")}, "nowhere is no checkpoint"),
    ],
)
def test_run_and_summary_refuse_what_cannot_be_trained(index, tmp_path, changes, message):
    recipe = tiny(**changes)
    with pytest.raises(UserError, match=message):
        prepare.summary(recipe, index, None, CPU, tmp_path / "run", Parts([], [], []))
    with pytest.raises(UserError, match=message):
        run(recipe, tmp_path / "run", index)


def test_summary_refuses_a_folder_with_other_files(index, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="holds no run"):
        prepare.summary(tiny(), index, None, CPU, tmp_path, Parts([], [], []))


def test_out_of_memory_names_the_micro_batch_to_try(index, tmp_path, monkeypatch):
    def out_of_gpu_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(inputs, "mix", out_of_gpu_memory)
    with pytest.raises(RunError, match=r"micro_batch=20 at 32 pixels; try --set micro_batch=10"):
        run(tiny(), tmp_path / "run", index)
    plan = Plan.of(tiny(micro_batch=1), index)
    assert "smaller --image-size" in str(out_of_memory(plan))
    assert "micro_batch=3" in str(out_of_memory(replace(plan, micro_batch=9)))


@pytest.mark.slow
def test_the_compiled_network_has_the_same_losses(index, tmp_path):
    plain, compiled = (
        tiny(epochs=1, machine=MachineConfig(device="cpu", compile=mode, log_steps=1)) for mode in ("off", "on")
    )
    run(plain, tmp_path / "plain", index)
    run(compiled, tmp_path / "compiled", index)
    actual, expected = (
        [event["loss"] for event in events(tmp_path / name) if event["event"] == "train"]
        for name in ("compiled", "plain")
    )
    assert actual == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("compile_mode", ["on", "graphs"])
def test_compiled_losses_equal_uncompiled_ones(index, tmp_path, compile_mode):
    """With two views and an averaged network as a teacher. A CPU runs the code of `graphs` without CUDA graphs."""
    losses = (SymmetricCrossEntropy(), Contrastive(), MeanTeacher())
    terms = []
    for mode in ("off", compile_mode):
        machine = MachineConfig(device="cpu", compile=mode, log_steps=1, workers=2)
        recipe = tiny(epochs=1, losses=losses, ema=EmaConfig(0.9), machine=machine)
        run(recipe, tmp_path / mode, index)
        terms.append([event["terms"] for event in events(tmp_path / mode) if event["event"] == "train"])
    assert len(terms[0]) == 5
    for plain, compiled in zip(*terms, strict=True):
        assert compiled == pytest.approx(plain, rel=2e-3)
