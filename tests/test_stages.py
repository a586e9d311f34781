"""Training in two stages: --init, distillation and averaged weights in the loop, collapsed losses in the log."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import CPU, events, run, tiny, weights

from fasttrain import prepare
from fasttrain.checkpoints import checkpoint
from fasttrain.checkpoints.init_weights import initialize
from fasttrain.config import toml
from fasttrain.config.schema import EmaConfig, InitConfig, MixConfig, OptimConfig
from fasttrain.evaluation.metrics import NAMES
from fasttrain.losses.arcface import ArcFace
from fasttrain.losses.contrastive import Contrastive
from fasttrain.losses.cross_entropy import CrossEntropy
from fasttrain.losses.distillation import Distillation
from fasttrain.losses.symmetric import SymmetricCrossEntropy
from fasttrain.losses.triplet import Triplet
from fasttrain.models import Classifier
from fasttrain.prepare import resolve_auto
from fasttrain.training.ema import Ema
from fasttrain.utils.errors import UserError

ARCFACE = (CrossEntropy(0.1), ArcFace())
TRIPLET = (CrossEntropy(0.1), Triplet())


@pytest.fixture(scope="module")
def stage1_run(index, tmp_path_factory):
    """A finished run of stage 1."""
    out = tmp_path_factory.mktemp("stage1") / "run"
    run(tiny(epochs=1), out, index)
    return out


def stage2_recipe(stage1_run, losses=ARCFACE, **changes):
    settings = {"losses": losses, "epochs": 1, "init": InitConfig(str(stage1_run)), "images_per_class": 2}
    return tiny(**(settings | changes))


@pytest.mark.parametrize("losses", [ARCFACE, TRIPLET])
def test_stage_two_needs_trained_weights_unless_forced(index, tmp_path, losses):
    scratch = stage2_recipe("", losses, init=InitConfig())
    with pytest.raises(UserError, match=rf"{losses[1].name} does not converge from random .* --init RUN"):
        run(scratch, tmp_path / "run", index)
    assert not (tmp_path / "run" / "last").exists()
    run(replace(scratch, init=InitConfig(force_scratch=True)), tmp_path / "run", index)
    # A resumed run need not be forced again.
    run(scratch, tmp_path / "run", index)


def test_init_loads_all_but_the_new_head(stage1_run, index):
    torch.manual_seed(5)
    model = Classifier.of(stage2_recipe(stage1_run), 10)
    head = model.cosine.weight.detach().clone()  # type: ignore[union-attr]
    message = initialize(model, InitConfig(str(stage1_run)), "test_resnet", index.classes)
    stored = weights(stage1_run)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, head if name == "cosine.weight" else stored[name]), name
    total = len(model.state_dict())
    assert f"{total - 1} of {total} tensors" in message and message.endswith("starting random: cosine.weight")


def test_init_with_other_classes_skips_the_classifier(stage1_run, index):
    for classes in (["a", "b", "c"], [*index.classes[:-1], "zebra"]):
        model = Classifier("test_resnet", len(classes))
        fresh = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        message = initialize(model, InitConfig(str(stage1_run)), "test_resnet", classes)
        assert message.endswith("starting random: backbone.fc.bias, backbone.fc.weight")
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, fresh[name] if "fc" in name else weights(stage1_run)[name]), name


# ---- the projection head

CONTRASTIVE = (SymmetricCrossEntropy(), Contrastive())


@pytest.fixture(scope="module")
def projected_run(index, tmp_path_factory):
    """A run with a projection head and averaged weights. All steps mix images, so no loss uses the head."""
    out = tmp_path_factory.mktemp("projected") / "run"
    run(
        tiny(losses=CONTRASTIVE, epochs=1, mix=MixConfig(cutmix=0.999), ema=EmaConfig(0.8), optim=OptimConfig(lr=0.5)),
        out,
        index,
    )
    return out


def test_the_projection_head_is_saved_averaged_and_loaded(projected_run):
    stored = weights(projected_run)
    for averaged, prefix in ((None, "ema."), (True, "ema."), (False, "")):
        model, recipe, _ = checkpoint.network(projected_run / "last", averaged)
        assert recipe.losses == CONTRASTIVE
        head = {name: p for name, p in model.named_parameters() if name.startswith("projection.")}
        assert len(head) == 4 and all(torch.equal(p, stored[prefix + name]) for name, p in head.items())
        assert model(torch.zeros(1, 3, 32, 32)).embedding is None
    # Weight decay and momentum also apply in steps whose losses do not use it.
    assert stored["momentum.projection.out.weight"].any()


def test_init_with_and_without_a_projection_head(stage1_run, projected_run, index):
    def start(recipe, init, classes=index.classes):
        torch.manual_seed(5)
        model = Classifier.of(recipe, len(classes))
        fresh = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        return (
            model.state_dict(),
            fresh,
            initialize(model, InitConfig(str(init), averaged=False), "test_resnet", classes),
        )

    names = ["projection.hidden.bias", "projection.hidden.weight", "projection.out.bias", "projection.out.weight"]
    with_head, without = tiny(losses=CONTRASTIVE), tiny()
    state, fresh, message = start(with_head, stage1_run)
    assert message.endswith(f"starting random: {', '.join(names)}")
    assert all(torch.equal(state[name], fresh[name]) for name in names)
    state, _, message = start(with_head, projected_run)
    assert message.endswith("starting random: none")
    assert all(torch.equal(tensor, weights(projected_run)[name]) for name, tensor in state.items())
    state, _, message = start(without, projected_run)
    assert message.endswith("starting random: none") and not state.keys() & set(names)
    assert all(torch.equal(tensor, weights(projected_run)[name]) for name, tensor in state.items())
    # The head does not depend on the classes, so it is loaded even if they differ.
    state, fresh, message = start(with_head, projected_run, ["a", "b", "c"])
    assert message.endswith("starting random: backbone.fc.bias, backbone.fc.weight")
    assert all(torch.equal(state[name], weights(projected_run)[name]) for name in names)


def test_init_refuses_weights_that_do_not_fit(stage1_run, index, tmp_path):
    with pytest.raises(UserError, match=r"holds a test_resnet, and this run trains a resnet18"):
        initialize(Classifier("resnet18", 10), InitConfig(str(stage1_run)), "resnet18", index.classes)
    other = Classifier("resnet18", 10)
    with pytest.raises(UserError, match=r"backbone\.\S+ is .* in it and .* in this network"):
        initialize(other, InitConfig(str(stage1_run)), "test_resnet", index.classes)
    with pytest.raises(UserError, match="is no checkpoint"):
        run(stage2_recipe(tmp_path / "none"), tmp_path / "run", index)


def test_stage_two_starts_with_the_weights_of_stage_one(stage1_run, index, tmp_path):
    """One step at a learning rate of 0 (warm-up) does not change the loaded weights."""
    recipe = stage2_recipe(stage1_run, batch_size=100, images_per_class=10)
    run(recipe, tmp_path / "run", index)
    before, after = weights(stage1_run), weights(tmp_path / "run")
    loaded = [name for name in after if name in before and "running" not in name and name.startswith("backbone.")]
    assert loaded and all(torch.equal(before[name], after[name]) for name in loaded if "num_batches" not in name)
    notes = [event["text"] for event in events(tmp_path / "run") if event["event"] == "note"]
    assert (
        notes[0].startswith("init: ") and notes[1] == "batches of 10 classes x 10 images; 100 of 100 images per epoch"
    )


def test_triplet_logs_its_stats_and_skips_mixed_steps(stage1_run, index, tmp_path):
    run(stage2_recipe(stage1_run, TRIPLET, mix=MixConfig(cutmix=0)), tmp_path / "plain", index)
    points = [event for event in events(tmp_path / "plain") if event["event"] == "train"]
    assert all(point["stats"].keys() == {"triplet/active", "triplet/d_ap", "triplet/d_an"} for point in points)
    assert all(point["loss"] == pytest.approx(sum(point["terms"].values()), rel=1e-5) for point in points)
    run(stage2_recipe(stage1_run, TRIPLET, mix=MixConfig(cutmix=0.999)), tmp_path / "mixed", index)
    points = [event for event in events(tmp_path / "mixed") if event["event"] == "train"]
    assert all(point["terms"].keys() == {"cross_entropy"} and "stats" not in point for point in points)


def test_mining_within_micro_batches_is_noted(stage1_run, index, tmp_path):
    run(stage2_recipe(stage1_run, TRIPLET, micro_batch=10), tmp_path / "run", index)
    notes = [event["text"] for event in events(tmp_path / "run") if event["event"] == "note"]
    assert "mined within each micro-batch of 10" in notes[1]


def test_a_collapsed_loss_is_logged_and_printed(stage1_run, index, tmp_path, monkeypatch, capsys):
    class ZeroFeatures(Classifier):
        def forward(self, images):
            output = super().forward(images)
            return output._replace(features=output.features * 0)

    monkeypatch.setattr(prepare, "Classifier", ZeroFeatures)
    run(stage2_recipe(stage1_run, TRIPLET, mix=MixConfig(cutmix=0)), tmp_path / "dead", index)
    collapsed = [event for event in events(tmp_path / "dead") if event["event"] == "collapsed"]
    assert [event["loss"] for event in collapsed] == ["triplet"] and "triplet has collapsed" in capsys.readouterr().err
    monkeypatch.undo()
    run(stage2_recipe(stage1_run, TRIPLET, mix=MixConfig(cutmix=0)), tmp_path / "alive", index)
    assert not [event for event in events(tmp_path / "alive") if event["event"] == "collapsed"]


# ---- the teacher


def test_a_student_with_the_weights_of_its_teacher_has_no_loss(index, tmp_path):
    """In the first step, with a network without BatchNorm, whose training mode would differ."""
    tiny_net = tiny(arch="test_convnext", epochs=1, machine=replace(tiny().machine, log_steps=1))
    run(tiny_net, tmp_path / "teacher", index)
    losses = (Distillation(teacher=str(tmp_path / "teacher"), temperature=1.0),)
    run(replace(tiny_net, losses=losses, init=InitConfig(str(tmp_path / "teacher"))), tmp_path / "same", index)
    run(replace(tiny_net, losses=losses, seed=7), tmp_path / "other", index)
    same, other = (
        next(event["terms"]["distillation"] for event in events(tmp_path / name) if event["event"] == "train")
        for name in ("same", "other")
    )
    assert abs(same) < 1e-6 and other > 1e-3


def test_the_teacher_is_frozen_and_its_classes_are_checked(stage1_run, index, tmp_path):
    recipe = tiny(losses=(Distillation(teacher=str(stage1_run)),))
    teacher = prepare.load_teacher(recipe, index.classes, CPU.device)
    assert teacher is not None and not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
    assert prepare.load_teacher(tiny(), index.classes, CPU.device) is None
    with pytest.raises(UserError, match="class 'zebra' is in the training images but not in"):
        prepare.load_teacher(recipe, [*index.classes, "zebra"], CPU.device)
    with pytest.raises(UserError, match="needs a teacher"):
        prepare.load_teacher(tiny(losses=(Distillation(),)), index.classes, CPU.device)


# ---- averaged weights


def test_the_average_follows_its_formula():
    torch.manual_seed(0)
    linear, norm = torch.nn.Linear(3, 2).double(), torch.nn.BatchNorm1d(2).double()
    model = torch.nn.Sequential(linear, norm)
    average = Ema(model, 0.9)
    ema_linear: Any = average.model.get_submodule("0")
    ema_norm: Any = average.model.get_submodule("1")
    expected = linear.weight.detach().clone()
    history = []
    for step in range(1, 30):
        with torch.no_grad():
            linear.weight += torch.randn(2, 3).double()
            norm.get_buffer("running_mean").add_(1)
        average.update(step)
        history.append(linear.weight.detach().clone())
        share = min(1 - 1 / step, 0.9)
        expected = share * expected + (1 - share) * history[-1]
        torch.testing.assert_close(ema_linear.weight, expected)
        if step <= 10:
            torch.testing.assert_close(ema_linear.weight, torch.stack(history).mean(0))
    assert torch.equal(ema_norm.running_mean, norm.running_mean)  # type: ignore[arg-type]
    assert not any(p.requires_grad for p in average.model.parameters())


def test_averaged_weights_are_evaluated_saved_and_resumed(index, tmp_path, monkeypatch):
    recipe = tiny(epochs=2, ema=EmaConfig(0.8), optim=OptimConfig(lr=0.5))
    result = run(recipe, tmp_path / "full", index, index)
    evals = [event for event in events(tmp_path / "full") if event["event"] == "eval"]
    assert all(event["ema"].keys() == {*NAMES, "images"} for event in evals)
    assert result.scores is not None and result.scores.top1 == evals[-1]["ema"]["top1"]
    assert result.best == max(event["ema"]["top1"] for event in evals)

    plain = tiny(epochs=2, optim=OptimConfig(lr=0.5))
    run(plain, tmp_path / "plain", index, index)
    raw, averaged = weights(tmp_path / "plain"), weights(tmp_path / "full")
    assert all(torch.equal(raw[name], averaged[name]) for name in raw), "averaging changed the training"
    moved = [name for name in raw if f"ema.{name}" in averaged]
    assert moved and any(not torch.equal(averaged[f"ema.{name}"], averaged[name]) for name in moved)

    from helpers import Stop, fail_at

    with monkeypatch.context() as patch:
        fail_at(patch, 5)
        with pytest.raises(Stop):
            run(recipe, tmp_path / "stopped", index, index)
    run(recipe, tmp_path / "stopped", index, index)
    resumed = weights(tmp_path / "stopped")
    assert all(torch.equal(resumed[name], averaged[name]) for name in averaged)

    ema_model, _, _ = checkpoint.network(tmp_path / "full" / "last")
    assert all(torch.equal(p, averaged[f"ema.{name}"]) for name, p in ema_model.named_parameters())
    raw_model, _, _ = checkpoint.network(tmp_path / "full" / "last", averaged=False)
    assert all(torch.equal(p, averaged[name]) for name, p in raw_model.named_parameters())
    with pytest.raises(UserError, match="has no averaged weights"):
        checkpoint.network(tmp_path / "plain", averaged=True)


def test_init_takes_averaged_weights_by_default(index, tmp_path):
    run(tiny(epochs=1, ema=EmaConfig(0.8), optim=OptimConfig(lr=0.5)), tmp_path / "run", index)
    stored = weights(tmp_path / "run")
    for averaged, prefix in ((True, "ema."), (False, "")):
        model = Classifier("test_resnet", 10)
        init = InitConfig(str(tmp_path / "run"), averaged=averaged)
        message = initialize(model, init, "test_resnet", index.classes)
        assert ("averaged weights" in message) == averaged
        assert all(torch.equal(p, stored[prefix + name]) for name, p in model.named_parameters())


def test_a_checkpoint_has_the_full_recipe(stage1_run):
    meta = json.loads((stage1_run / "last" / "meta.json").read_text())
    assert toml.from_dict(meta["recipe"], "meta") == resolve_auto(tiny(epochs=1), torch.device("cpu"))
