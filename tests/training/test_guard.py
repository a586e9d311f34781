"""Losses and gradients that are not finite: such a step changes nothing, runs go back, and a report is written."""

import gc
import json
import math
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import CPU, events, logged, part_of, run, same, tiny, weights
from torch import nn

from fasttrain import prepare
from fasttrain import train as training
from fasttrain.checkpoints import checkpoint
from fasttrain.config.schema import (
    CheckpointConfig,
    EmaConfig,
    GuardConfig,
    InitConfig,
    MachineConfig,
    MixConfig,
    OptimConfig,
)
from fasttrain.losses.cross_entropy import CrossEntropy
from fasttrain.losses.triplet import Triplet
from fasttrain.pipelines.plan import Plan
from fasttrain.training import inputs, optim
from fasttrain.training.guard import Guard
from fasttrain.training.step import Step, update
from fasttrain.utils.errors import RunError


@pytest.fixture(scope="module")
def index(demo_set):
    """100 images: five steps of 20 per epoch."""
    return part_of(demo_set, 10)


def poison(monkeypatch, calls, value=math.nan):
    """Set one pixel of the network's input to `value` in the given calls of `inputs.mix`, counted from 0."""
    original, count = inputs.mix, [0]

    def mix(*args):
        mixed = original(*args)
        if count[0] in calls:
            mixed.images[0, 0, 0, 0] = value
        count[0] += 1
        return mixed

    monkeypatch.setattr(inputs, "mix", mix)


def explode(monkeypatch, steps):
    """Make one gradient infinite in the given steps, while the loss is finite."""
    original, count = Guard.check, [0]

    def check(guard):
        if count[0] in steps:
            next(iter(guard.parameters.values())).grad[0] = math.inf
        count[0] += 1
        return original(guard)

    monkeypatch.setattr(Guard, "check", check)


def tensors_at(out: Path, step: int | str):
    """All tensors of a run's checkpoint, by step or by name."""
    saved = checkpoint.load(out / "checkpoints" / (f"step-{step:08}" if isinstance(step, int) else step))
    return saved.model | saved.train


def failed_steps(log: list[dict]) -> list[int]:
    """The steps, counted from 1, that a run's log reports as not finite."""
    return [step["step"] for event in log if event["event"] == "not_finite" for step in event["steps"]]


EVERY_STEP = CheckpointConfig(every_steps=1, keep=99)


@pytest.mark.parametrize("kind", ["nan", "inf", "gradient"])
@pytest.mark.parametrize("step", [0, 3])
@pytest.mark.parametrize("micro_batch", [0, 10])
def test_a_step_that_is_not_finite_changes_nothing(index, tmp_path, monkeypatch, kind, step, micro_batch):
    """Weights, momentum, BatchNorm's statistics and their count stay. This includes the first step, where torch's fused
    SGD would leave the momentum uninitialized. Of two micro-batches the second one is bad."""
    recipe = tiny(epochs=1, checkpoint=EVERY_STEP, micro_batch=micro_batch, optim=OptimConfig(warmup_epochs=0))
    run(recipe, tmp_path / "good", index)
    with monkeypatch.context() as patch:
        if kind == "gradient":
            explode(patch, {step})
        else:
            poison(patch, {2 * step + 1 if micro_batch else step}, float(kind))
        run(recipe, tmp_path / "bad", index)
    if step:
        before = tensors_at(tmp_path / "good", step)
    else:
        torch.manual_seed(recipe.seed)
        before = dict(prepare.Classifier.of(recipe, 10).state_dict())
    after = tensors_at(tmp_path / "bad", step + 1)
    momenta = {name for name in after if name.startswith("momentum.")}
    assert (
        momenta and after.keys() - momenta == before.keys() - momenta and any("running_var" in name for name in after)
    )
    for name, tensor in after.items():
        expected = before[name] if name in before else torch.zeros_like(tensor)
        assert torch.equal(tensor, expected), name
    failures = [event for event in events(tmp_path / "bad") if event["event"] == "not_finite"]
    assert failed_steps(failures) == [step + 1]
    assert failures[0]["steps"][0]["grad_norm"] in ("nan", "inf")
    # The logged means leave out the failed step, and training continues.
    losses = [event["loss"] for event in events(tmp_path / "bad") if event["event"] == "train"]
    assert all(math.isfinite(loss) for loss in losses)
    assert not torch.equal(tensors_at(tmp_path / "bad", 5)["backbone.fc.weight"], after["backbone.fc.weight"])


def test_averaged_weights_and_metrics_leave_out_bad_steps(index, tmp_path, monkeypatch):
    """A log interval without a good step has no loss. The averaged weights stay finite."""
    recipe = tiny(epochs=1, checkpoint=EVERY_STEP, ema=EmaConfig(0.9))
    poison(monkeypatch, {0, 1})
    run(recipe, tmp_path / "run", index)
    first = next(event for event in events(tmp_path / "run") if event["event"] == "train")
    assert first["loss"] is None and first["grad_norm"] is None and first["terms"] == {}
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "run").values())
    assert "NaN" not in (tmp_path / "run" / "log.jsonl").read_text()


def test_the_logged_gradient_norm_equals_autograds_in_float64(index, tmp_path, monkeypatch):
    norms = []
    original = Guard.check

    def check(guard):
        norms.append(math.sqrt(sum(p.grad.double().square().sum().item() for p in guard.parameters.values())))
        return original(guard)

    monkeypatch.setattr(Guard, "check", check)
    run(
        tiny(epochs=1, machine=MachineConfig(device="cpu", compile="off", log_steps=1, workers=2)),
        tmp_path / "run",
        index,
    )
    logged_norms = [event["grad_norm"] for event in events(tmp_path / "run") if event["event"] == "train"]
    assert logged_norms == pytest.approx(norms, rel=1e-5) and len(logged_norms) == 5


# ---- going back


def watch_images(monkeypatch):
    """Returns a list that gets the image indices of each batch from the pipeline."""
    original, indices = training.batches, []

    def recording(*args, **settings):
        for batch in original(*args, **settings):
            indices.append(batch.indices.tolist())
            yield batch

    monkeypatch.setattr(training, "batches", recording)
    return indices


RECIPE = tiny(epochs=3, guard=GuardConfig(patience=2, rewinds=2), checkpoint=CheckpointConfig(every_steps=1, keep=3))


def test_a_run_goes_back_and_resumes_with_other_images(index, tmp_path, monkeypatch):
    """Steps 7 and 8 (from 1) fail. The run resumes from the checkpoint of step 6 with the images of steps 9, 10, …"""
    with monkeypatch.context() as patch:
        indices = watch_images(patch)
        poison(patch, {6, 7})
        result = run(RECIPE, tmp_path / "run", index, index)
    assert result.steps == 15
    plan = Plan.of(RECIPE, index)
    order = [plan.images(step, 0).tolist() for step in range(17)]
    assert indices == order[:8] + order[8:17]
    log = events(tmp_path / "run")
    assert [event["step"] for event in log if event["event"] == "resume"] == [6]
    meta = checkpoint.load(tmp_path / "run" / "last").meta
    assert (meta["step"], meta["shift"], meta["rewinds"], meta["streak"]) == (15, 2, 1, 0)
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "run").values())
    # The checkpoint that was written during the failed steps is gone.
    assert not (tmp_path / "run" / "checkpoints" / "step-00000008").exists()


def test_the_network_before_going_back_is_freed(index, tmp_path, monkeypatch):
    """The next run's network would not fit next to it."""
    alive: list[int] = []
    steps: list[weakref.ref] = []
    original = Step.__init__

    def init(step, *args):
        gc.collect()
        alive.append(sum(reference() is not None for reference in steps))
        steps.append(weakref.ref(step))
        original(step, *args)

    monkeypatch.setattr(Step, "__init__", init)
    poison(monkeypatch, {3, 4})
    run(RECIPE, tmp_path / "run", index)
    assert alive == [0, 0]


def test_a_run_that_went_back_is_resumed_exactly(index, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        poison(patch, {6, 7})
        run(RECIPE, tmp_path / "expected", index, index)
    original = training.batches

    def failing(plan, train_index, device, threads, start=0, **settings):
        for count, batch in enumerate(original(plan, train_index, device, threads, start, **settings)):
            if start + count == 11:
                raise KeyboardInterrupt
            yield batch

    with monkeypatch.context() as patch:
        poison(patch, {6, 7})
        patch.setattr(training, "batches", failing)
        with pytest.raises(KeyboardInterrupt):
            run(RECIPE, tmp_path / "stopped", index, index)
    run(RECIPE, tmp_path / "stopped", index, index)
    same(tmp_path / "stopped", tmp_path / "expected")


def test_a_run_that_keeps_failing_ends_with_a_report(index, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        indices = watch_images(patch)
        poison(patch, set(range(6, 99)))
        with pytest.raises(RunError, match=r"not finite in step 8 .* \S*not_finite.json has the steps") as caught:
            run(RECIPE, tmp_path / "run", index, index)
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().err.count("going back to") == 2
    report = json.loads((tmp_path / "run" / "not_finite.json").read_text())
    assert report["step"] == 8 and report["rewinds"] == 2
    assert [step["step"] for step in report["steps"]] == [7, 8]
    assert [step["images"] for step in report["steps"]] == [[index.paths[n] for n in batch] for batch in indices[-2:]]
    assert all(step["loss"] == step["cross_entropy"] == step["grad_norm"] == "nan" for step in report["steps"])
    assert set(report["gradient_norms"].values()) == {"nan"} and "backbone.fc.weight" in report["gradient_norms"]
    # Without the cause, the same command resumes.
    assert run(RECIPE, tmp_path / "run", index, index).steps == 15


def test_without_a_checkpoint_the_run_ends(index, tmp_path, monkeypatch):
    poison(monkeypatch, {0, 1})
    with pytest.raises(RunError, match="not finite in step 2"):
        run(RECIPE, tmp_path / "run", index)
    assert json.loads((tmp_path / "run" / "not_finite.json").read_text())["rewinds"] == 0


def test_a_huge_learning_rate_is_caught(index, tmp_path):
    """Without injected values: the weights overflow float32, and the next losses are not finite."""
    recipe = replace(RECIPE, optim=OptimConfig(lr=1e30, lr_batch=0), guard=GuardConfig(patience=2, rewinds=0), epochs=1)
    with pytest.raises(RunError, match="not finite"):
        run(recipe, tmp_path / "run", index)


def test_triplet_with_accumulation_is_guarded(index, tmp_path, monkeypatch):
    recipe = replace(
        RECIPE,
        losses=(CrossEntropy(0.1), Triplet()),
        images_per_class=2,
        micro_batch=10,
        mix=MixConfig(cutmix=0),
        init=InitConfig(force_scratch=True),
    )
    with monkeypatch.context() as patch:
        poison(patch, {13, 14})  # the second micro-batch of step 7 and the first of step 8
        assert (
            run(recipe, tmp_path / "run", index, index).steps == recipe.epochs * Plan.of(recipe, index).steps_per_epoch
        )
    assert all(math.isfinite(event["loss"] or 0) for event in logged(tmp_path / "run").values() if "loss" in event)


DEFAULTS = tiny(
    epochs=6, checkpoint=CheckpointConfig(every_steps=4), machine=MachineConfig(device="cpu", compile="off", workers=2)
)


def test_a_run_with_default_settings_goes_back(index, tmp_path, monkeypatch):
    """Ten failed steps in a row, log points every 20 steps and after each epoch, and saves in between. Two checkpoints
    are kept, and one of them must be older than the failed steps."""
    with monkeypatch.context() as patch:
        poison(patch, set(range(12, 25)))
        assert run(DEFAULTS, tmp_path / "run", index, index).steps == 30
    log = events(tmp_path / "run")
    resumes = [event for event in log if event["event"] == "resume"]
    assert [(event["step"], event["rewinds"]) for event in resumes] == [(12, 1)]
    assert failed_steps(log) == list(range(13, 26))


def test_every_failed_step_is_reported_where_log_points_are_rare(index, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, {0, 3})
    run(replace(DEFAULTS, epochs=1, guard=GuardConfig(patience=1, rewinds=0)), tmp_path / "run", index)
    first = next(event for event in events(tmp_path / "run") if event["event"] == "not_finite")
    assert [step["step"] for step in first["steps"]] == [1, 4]
    # The last step was good, so the run does not go back.
    assert "not finite in step 1, 4, which changed nothing" in capsys.readouterr().err


def test_an_unused_parameter_is_not_reported(index, tmp_path, monkeypatch):
    """It has no gradient and no norm. The report still has the norms of the others."""
    original = prepare.Classifier.of

    def of(recipe, classes):
        model = original(recipe, classes)
        model.unused = nn.Parameter(torch.zeros(3))
        return model

    monkeypatch.setattr(prepare.Classifier, "of", of)
    poison(monkeypatch, {0, 1})
    with pytest.raises(RunError, match="not finite in step 2"):
        run(RECIPE, tmp_path / "run", index)
    norms = json.loads((tmp_path / "run" / "not_finite.json").read_text())["gradient_norms"]
    assert "backbone.fc.weight" in norms and "unused" not in norms


def test_the_best_before_going_back_stays_the_best(index, tmp_path, monkeypatch):
    """Evaluating between failed steps scores the last good weights."""
    top1s = iter([0.1, 0.9, 0.3, 0.5, 0.4])  # step 10 is evaluated twice
    monkeypatch.setattr(training, "evaluate", lambda *args: training.Scores(next(top1s), 1.0, 100))
    poison(monkeypatch, {9, 10})
    machine = MachineConfig(device="cpu", compile="off", log_steps=1, workers=2)
    result = run(replace(RECIPE, epochs=4, machine=machine), tmp_path / "run", index, index)
    assert result.best == 0.9
    best = checkpoint.load(tmp_path / "run" / "best").meta
    assert best["scores"]["top1"] == 0.9 and best["step"] == 10


def test_buffers_of_every_layout_and_dtype_are_restored():
    """Also buffers with another memory order, such as channels_last."""
    model = nn.Linear(3, 2)
    buffers = {
        "channels_last": torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "transposed": torch.rand(3, 4).T,
        "plain": torch.rand(2, 3),
        "count": torch.tensor(3),
        "empty": torch.rand(0, 2),
        "flag": torch.tensor([True, False]),
    }
    for name, buffer in buffers.items():
        model.register_buffer(name, buffer)
    optimizer, scaler = optim.sgd(model, OptimConfig()), torch.amp.GradScaler("cpu", enabled=False)
    guard = Guard(model, scaler, CPU.device)
    for bad in (False, True, False):
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, math.nan if bad else 1.0)
        for buffer in model.buffers():
            buffer.logical_not_() if buffer.dtype == torch.bool else buffer.add_(1)
        after = {name: buffer.clone() for name, buffer in model.named_buffers()}
        update(optimizer, scaler, guard)
        for name, buffer in model.named_buffers():
            assert torch.equal(buffer, (before if bad else after)[name]), name


# ---- float16's scaler


def test_steps_skipped_while_the_scaler_looks_for_a_scale_have_not_failed():
    """Float16 gradients of 3 · 2^16 and 3 · 2^15 overflow, those of 3 · 2^14 do not: two steps are skipped, and none
    has failed."""
    model = nn.Linear(2, 1, bias=False)
    optimizer = optim.sgd(model, OptimConfig())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    guard = Guard(model, scaler, CPU.device)
    start = model.weight.detach().clone()
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    finite = []
    for _ in range(4):
        loss = 3 * nn.functional.linear(torch.tensor([[1.0, 0.5]]).half(), model.weight.half()).float().sum()
        scaler.scale(loss).backward(guard.first_gradient(loss))
        norm, _, failed = update(optimizer, scaler, guard)
        finite.append(math.isfinite(norm))
        assert not failed
    assert finite == [False, False, True, True]
    assert norm.item() == pytest.approx(3 * math.sqrt(1.25), rel=1e-5)
    assert model.weight.isfinite().all() and not torch.equal(model.weight, start)


def test_a_nan_loss_fails_the_step_once_the_scale_is_1():
    model = nn.Linear(2, 1)
    optimizer, scaler = optim.sgd(model, OptimConfig()), torch.amp.GradScaler("cpu", init_scale=4.0)
    guard = Guard(model, scaler, CPU.device)
    failed = []
    for _ in range(5):
        loss = model(torch.tensor([[1.0, math.nan]])).sum()
        scaler.scale(loss).backward(guard.first_gradient(loss))
        failed.append(update(optimizer, scaler, guard).failed.item())
    assert failed == [0, 0, 1, 1, 1] and all(p.isfinite().all() for p in model.parameters())  # at scales 1, ½ and ¼


# ---- two ranks

RANK_PROGRAM = """
import os, sys
from fasttrain.cli.main import main
from fasttrain.training import inputs
original, count = inputs.mix, [0]


def mix(*args):
    mixed = original(*args)
    if os.environ["RANK"] == "1" and count[0] in (2, 3):
        mixed.images[0, 0, 0, 0] = float("nan")
    count[0] += 1
    return mixed


inputs.mix = mix
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_bad_step_of_one_rank_changes_nothing_on_either_rank(demo_set, tmp_path):
    """Steps 3 and 4 are bad on rank 1 alone. Both ranks skip them and go back together."""
    (tmp_path / "rank.py").write_text(RANK_PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(tmp_path / "rank.py"), "run", "--arch", "test_resnet", "--image-size", "32", "--epochs", "1"]
    command += [
        "--device",
        "cpu",
        "--batch-size",
        "50",
        "--data",
        str(demo_set / "train"),
        "--out",
        str(tmp_path / "out"),
    ]
    for setting in ("guard.patience=2", "checkpoint.every_steps=1", "machine.log_steps=1", "checkpoint.keep=20"):
        command += ["--set", setting]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("going back to") == 1
    log = events(tmp_path / "out")
    assert [event["step"] for event in log if event["event"] == "resume"] == [2]
    assert failed_steps(log) == [3, 4]
    meta = checkpoint.load(tmp_path / "out" / "last").meta
    assert (meta["step"], meta["shift"], meta["rewinds"]) == (10, 2, 1)
    before, after = tensors_at(tmp_path / "out", "step-00000002"), tensors_at(tmp_path / "out", "left0-step-00000003")
    assert not [name for name, tensor in after.items() if not torch.equal(tensor, before[name])]
