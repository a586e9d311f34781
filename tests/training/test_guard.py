"""Losses and gradients that are not finite: they change nothing, runs go back and past them, and say what it was."""

import json
import math
import subprocess
import sys
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
from fasttrain.training.step import update
from fasttrain.utils.errors import RunError


@pytest.fixture(scope="module")
def index(demo_set):
    """100 images: five steps an epoch of 20."""
    return part_of(demo_set, 10)


def poison(monkeypatch, calls, value=math.nan):
    """Put `value` into one pixel of the images that the network gets in the given calls of the mix, from 0."""
    honest, count = inputs.mix, [0]

    def mix(*args):
        mixed = honest(*args)
        if count[0] in calls:
            mixed.images[0, 0, 0, 0] = value
        count[0] += 1
        return mixed

    monkeypatch.setattr(inputs, "mix", mix)


def explode(monkeypatch, steps):
    """Make one gradient infinite in the given steps, with a loss that is finite."""
    honest, count = Guard.check, [0]

    def check(guard):
        if count[0] in steps:
            next(iter(guard.parameters.values())).grad[0] = math.inf
        count[0] += 1
        return honest(guard)

    monkeypatch.setattr(Guard, "check", check)


def at(out: Path, step: int | str):
    saved = checkpoint.load(out / "checkpoints" / (f"step-{step:08}" if isinstance(step, int) else step))
    return saved.model | saved.train


EVERY = CheckpointConfig(every_steps=1, keep=99)


@pytest.mark.parametrize("how", ["nan", "inf", "gradient"])
@pytest.mark.parametrize("step", [0, 3])
@pytest.mark.parametrize("micro_batch", [0, 10])
def test_a_step_that_is_not_finite_changes_nothing(index, tmp_path, monkeypatch, how, step, micro_batch):
    """Weights, momentum, BatchNorm's statistics and their count; in the first step too, where torch's own fused SGD
    would leave the momentum to whatever is in memory. Of two micro-batches the second is bad."""
    recipe = tiny(epochs=1, checkpoint=EVERY, micro_batch=micro_batch, optim=OptimConfig(warmup_epochs=0))
    run(recipe, tmp_path / "good", index)
    with monkeypatch.context() as patch:
        if how == "gradient":
            explode(patch, {step})
        else:
            poison(patch, {2 * step + 1 if micro_batch else step}, float(how))
        run(recipe, tmp_path / "bad", index)
    if step:
        before = at(tmp_path / "good", step)
    else:
        torch.manual_seed(recipe.seed)
        before = dict(prepare.Classifier.of(recipe, 10).state_dict())
    after = at(tmp_path / "bad", step + 1)
    momenta = {name for name in after if name.startswith("momentum.")}
    assert (
        momenta and after.keys() - momenta == before.keys() - momenta and any("running_var" in name for name in after)
    )
    for name, each in after.items():
        expected = before[name] if name in before else torch.zeros_like(each)
        assert torch.equal(each, expected), name
    told = [each for each in events(tmp_path / "bad") if each["event"] == "not_finite"]
    assert [each["step"] for event in told for each in event["steps"]] == [step + 1]
    assert told[0]["steps"][0]["grad_norm"] in ("nan", "inf")
    # The log's means are of the good steps alone, and the run goes on to learn from them.
    losses = [each["loss"] for each in events(tmp_path / "bad") if each["event"] == "train"]
    assert all(math.isfinite(each) for each in losses)
    assert not torch.equal(at(tmp_path / "bad", 5)["backbone.fc.weight"], after["backbone.fc.weight"])


def test_averaged_weights_and_metrics_of_bad_steps(index, tmp_path, monkeypatch):
    """A window without a good step has no loss; the average takes in weights, never what is not finite."""
    recipe = tiny(epochs=1, checkpoint=EVERY, ema=EmaConfig(0.9))
    poison(monkeypatch, {0, 1})
    run(recipe, tmp_path / "run", index)
    trained = [each for each in events(tmp_path / "run") if each["event"] == "train"]
    assert trained[0]["loss"] is None and trained[0]["grad_norm"] is None and trained[0]["terms"] == {}
    assert all(each.isfinite().all() for each in weights(tmp_path / "run").values())
    assert "NaN" not in (tmp_path / "run" / "log.jsonl").read_text()


def test_the_logged_gradient_norm_is_that_of_the_step(index, tmp_path, monkeypatch):
    """Beside autograd's own gradients, in float64."""
    norms = []
    honest = Guard.check

    def check(guard):
        norms.append(math.sqrt(sum(p.grad.double().square().sum().item() for p in guard.parameters.values())))
        return honest(guard)

    monkeypatch.setattr(Guard, "check", check)
    run(
        tiny(epochs=1, machine=MachineConfig(device="cpu", compile="off", log_steps=1, workers=2)),
        tmp_path / "run",
        index,
    )
    found = [each["grad_norm"] for each in events(tmp_path / "run") if each["event"] == "train"]
    assert found == pytest.approx(norms, rel=1e-5) and len(found) == 5


# ---- going back


def watch_images(monkeypatch):
    """The numbers of the images of every batch that comes from the pipeline."""
    honest, seen = training.batches, []

    def watched(*args, **settings):
        for batch in honest(*args, **settings):
            seen.append(batch.numbers.tolist())
            yield batch

    monkeypatch.setattr(training, "batches", watched)
    return seen


RECIPE = tiny(epochs=3, guard=GuardConfig(patience=2, rewinds=2), checkpoint=CheckpointConfig(every_steps=1, keep=3))


def test_a_run_goes_back_and_on_with_other_images(index, tmp_path, monkeypatch):
    """Steps 7 and 8 (from 1) fail; the run goes on from the checkpoint of step 6 with the images of steps 9, 10, …"""
    with monkeypatch.context() as patch:
        seen = watch_images(patch)
        poison(patch, {6, 7})
        result = run(RECIPE, tmp_path / "run", index, index)
    assert result.steps == 15
    plan = Plan.of(RECIPE, index)
    order = [plan.images(step, 0).tolist() for step in range(17)]
    assert seen == order[:8] + order[8:17]
    log = events(tmp_path / "run")
    assert [each["step"] for each in log if each["event"] == "resume"] == [6]
    meta = checkpoint.load(tmp_path / "run" / "last").meta
    assert (meta["step"], meta["shift"], meta["rewinds"], meta["streak"]) == (15, 2, 1, 0)
    assert all(each.isfinite().all() for each in weights(tmp_path / "run").values())
    # What was written while steps failed is no place to come back to.
    assert not (tmp_path / "run" / "checkpoints" / "step-00000008").exists()


def test_a_run_that_went_back_is_resumed_exactly(index, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        poison(patch, {6, 7})
        run(RECIPE, tmp_path / "whole", index, index)
    honest = training.batches

    def failing(plan, train_index, device, threads, start=0, **settings):
        for count, batch in enumerate(honest(plan, train_index, device, threads, start, **settings)):
            if start + count == 11:
                raise KeyboardInterrupt
            yield batch

    with monkeypatch.context() as patch:
        poison(patch, {6, 7})
        patch.setattr(training, "batches", failing)
        with pytest.raises(KeyboardInterrupt):
            run(RECIPE, tmp_path / "stopped", index, index)
    run(RECIPE, tmp_path / "stopped", index, index)
    same(tmp_path / "stopped", tmp_path / "whole")


def test_a_run_that_does_not_get_past_it_ends_with_a_report(index, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        seen = watch_images(patch)
        poison(patch, set(range(6, 99)))
        with pytest.raises(RunError, match=r"not finite in step 8 .* \S*not_finite.json has the steps") as caught:
            run(RECIPE, tmp_path / "run", index, index)
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().err.count("going back to") == 2
    report = json.loads((tmp_path / "run" / "not_finite.json").read_text())
    assert report["step"] == 8 and report["rewinds"] == 2
    assert [each["step"] for each in report["steps"]] == [7, 8]
    assert [each["images"] for each in report["steps"]] == [[index.paths[n] for n in batch] for batch in seen[-2:]]
    assert all(each["loss"] == each["cross_entropy"] == each["grad_norm"] == "nan" for each in report["steps"])
    assert set(report["gradient_norms"].values()) == {"nan"} and "backbone.fc.weight" in report["gradient_norms"]
    # The same command, with the cause gone, goes on.
    assert run(RECIPE, tmp_path / "run", index, index).steps == 15


def test_without_a_checkpoint_there_is_nothing_to_go_back_to(index, tmp_path, monkeypatch):
    poison(monkeypatch, {0, 1})
    with pytest.raises(RunError, match="not finite in step 2"):
        run(RECIPE, tmp_path / "run", index)
    assert json.loads((tmp_path / "run" / "not_finite.json").read_text())["rewinds"] == 0


def test_a_learning_rate_without_bounds_is_caught_by_itself(index, tmp_path):
    """Nothing injected: weights that grow beyond float32 make the next losses infinite."""
    recipe = replace(RECIPE, optim=OptimConfig(lr=1e30, lr_batch=0), guard=GuardConfig(patience=2, rewinds=0), epochs=1)
    with pytest.raises(RunError, match="not finite"):
        run(recipe, tmp_path / "run", index)


def test_triplet_with_accumulation_is_guarded_too(index, tmp_path, monkeypatch):
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
    assert all(math.isfinite(each["loss"] or 0) for each in logged(tmp_path / "run").values() if "loss" in each)


DEFAULTS = tiny(
    epochs=6, checkpoint=CheckpointConfig(every_steps=4), machine=MachineConfig(device="cpu", compile="off", workers=2)
)


def test_with_the_default_settings_a_run_goes_back_too(index, tmp_path, monkeypatch):
    """Ten steps in a row, a log point only each 20 steps and at epochs' ends, and saves in between, of which two are
    kept: the one from before them has to be among those."""
    with monkeypatch.context() as patch:
        poison(patch, set(range(12, 25)))
        assert run(DEFAULTS, tmp_path / "run", index, index).steps == 30
    log = events(tmp_path / "run")
    went = [each for each in log if each["event"] == "resume"]
    assert [(each["step"], each["rewinds"]) for each in went] == [(12, 1)]
    assert [e["step"] for each in log if each["event"] == "not_finite" for e in each["steps"]] == list(range(13, 26))


def test_every_failed_step_is_told_where_log_points_are_rare(index, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, {0, 3})
    run(replace(DEFAULTS, epochs=1, guard=GuardConfig(patience=1, rewinds=0)), tmp_path / "run", index)
    told = [each for each in events(tmp_path / "run") if each["event"] == "not_finite"]
    assert [each["step"] for each in told[0]["steps"]] == [1, 4]
    # The last step was good, so there is nothing to go back from.
    assert "not finite in step 1, 4, which changed nothing" in capsys.readouterr().err


def test_a_parameter_that_nothing_uses(index, tmp_path, monkeypatch):
    """It has no gradient and no norm, and does not hide the others' in the report."""
    made = prepare.Classifier.of

    def of(recipe, classes):
        model = made(recipe, classes)
        model.unused = nn.Parameter(torch.zeros(3))
        return model

    monkeypatch.setattr(prepare.Classifier, "of", of)
    poison(monkeypatch, {0, 1})
    with pytest.raises(RunError, match="not finite in step 2"):
        run(RECIPE, tmp_path / "run", index)
    norms = json.loads((tmp_path / "run" / "not_finite.json").read_text())["gradient_norms"]
    assert "backbone.fc.weight" in norms and "unused" not in norms


def test_the_best_before_going_back_stays_the_best(index, tmp_path, monkeypatch):
    """An evaluation in the middle of failing steps is of weights that are whole."""
    tops = iter([0.1, 0.9, 0.3, 0.5, 0.4])  # step 10 comes twice
    monkeypatch.setattr(training, "evaluate", lambda *args: training.Scores(next(tops), 1.0, 100))
    poison(monkeypatch, {9, 10})
    machine = MachineConfig(device="cpu", compile="off", log_steps=1, workers=2)
    result = run(replace(RECIPE, epochs=4, machine=machine), tmp_path / "run", index, index)
    assert result.best == 0.9
    best = checkpoint.load(tmp_path / "run" / "best").meta
    assert best["scores"]["top1"] == 0.9 and best["step"] == 10


def test_buffers_of_every_layout_and_dtype_are_kept_whole():
    """Also those that lie in memory in another order, as channels_last makes them."""
    model = nn.Linear(3, 2)
    made = {
        "four": torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "turned": torch.rand(3, 4).T,
        "plain": torch.rand(2, 3),
        "count": torch.tensor(3),
        "none": torch.rand(0, 2),
        "flag": torch.tensor([True, False]),
    }
    for name, each in made.items():
        model.register_buffer(name, each)
    optimizer, scaler = optim.sgd(model, OptimConfig()), torch.amp.GradScaler("cpu", enabled=False)
    guard = Guard(model, scaler, CPU.device)
    for bad in (False, True, False):
        before = {name: each.clone() for name, each in model.named_buffers()}
        for each in model.parameters():
            each.grad = torch.full_like(each, math.nan if bad else 1.0)
        for each in model.buffers():
            each.logical_not_() if each.dtype == torch.bool else each.add_(1)
        after = {name: each.clone() for name, each in model.named_buffers()}
        update(optimizer, scaler, guard)
        for name, each in model.named_buffers():
            assert torch.equal(each, (before if bad else after)[name]), name


# ---- float16's scaler


def test_a_scaler_looking_for_its_scale_is_no_failure():
    """Float16 gradients of 3 · 2^16 and 3 · 2^15 overflow, those of 3 · 2^14 do not: two steps are skipped, none has
    failed."""
    model = nn.Linear(2, 1, bias=False)
    optimizer = optim.sgd(model, OptimConfig())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    guard = Guard(model, scaler, CPU.device)
    start = model.weight.detach().clone()
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    moved = []
    for _ in range(4):
        loss = 3 * nn.functional.linear(torch.tensor([[1.0, 0.5]]).half(), model.weight.half()).float().sum()
        scaler.scale(loss).backward(guard.seed(loss))
        norm, _, failed = update(optimizer, scaler, guard)
        moved.append(math.isfinite(norm))
        assert not failed
    assert moved == [False, False, True, True]
    assert norm.item() == pytest.approx(3 * math.sqrt(1.25), rel=1e-5)
    assert model.weight.isfinite().all() and not torch.equal(model.weight, start)


def test_a_loss_that_is_nan_has_failed_once_the_scale_is_down():
    model = nn.Linear(2, 1)
    optimizer, scaler = optim.sgd(model, OptimConfig()), torch.amp.GradScaler("cpu", init_scale=4.0)
    guard = Guard(model, scaler, CPU.device)
    failed = []
    for _ in range(5):
        loss = model(torch.tensor([[1.0, math.nan]])).sum()
        scaler.scale(loss).backward(guard.seed(loss))
        failed.append(update(optimizer, scaler, guard).failed.item())
    assert failed == [0, 0, 1, 1, 1] and all(each.isfinite().all() for each in model.parameters())  # at 1, ½ and ¼


# ---- two ranks

RANKED = """
import os, sys
from fasttrain.cli.main import main
from fasttrain.training import inputs
honest, count = inputs.mix, [0]


def mix(*args):
    mixed = honest(*args)
    if os.environ["RANK"] == "1" and count[0] in (2, 3):
        mixed.images[0, 0, 0, 0] = float("nan")
    count[0] += 1
    return mixed


inputs.mix = mix
main(sys.argv[1:])
"""


def test_what_one_rank_computes_changes_neither(demo_set, tmp_path):
    """Steps 3 and 4 are bad on rank 1 alone; both ranks leave them out, go back together and end alike."""
    (tmp_path / "ranked.py").write_text(RANKED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(tmp_path / "ranked.py"), "run", "--arch", "test_resnet", "--image-size", "32", "--epochs", "1"]
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
    assert [each["step"] for each in log if each["event"] == "resume"] == [2]
    assert [e["step"] for each in log if each["event"] == "not_finite" for e in each["steps"]] == [3, 4]
    meta = checkpoint.load(tmp_path / "out" / "last").meta
    assert (meta["step"], meta["shift"], meta["rewinds"]) == (10, 2, 1)
    before, after = at(tmp_path / "out", "step-00000002"), at(tmp_path / "out", "left0-step-00000003")
    assert not [name for name, each in after.items() if not torch.equal(each, before[name])]
