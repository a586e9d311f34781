"""Two stages: what --init takes and refuses, distillation and averaged weights in the loop, collapse in the log."""

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
from fasttrain.losses.arcface import ArcFace
from fasttrain.losses.contrastive import Contrastive
from fasttrain.losses.cross_entropy import CrossEntropy
from fasttrain.losses.distillation import Distillation
from fasttrain.losses.symmetric import SymmetricCrossEntropy
from fasttrain.losses.triplet import Triplet
from fasttrain.models import Classifier
from fasttrain.prepare import resolve_auto
from fasttrain.training.ema import Ema as Average
from fasttrain.utils.errors import UserError

ARCFACE = (CrossEntropy(0.1), ArcFace())
TRIPLET = (CrossEntropy(0.1), Triplet())


@pytest.fixture(scope="module")
def first(index, tmp_path_factory):
    """A run of stage 1."""
    out = tmp_path_factory.mktemp("stage1") / "run"
    run(tiny(epochs=1), out, index)
    return out


def stage2(first, losses=ARCFACE, **changes):
    settings = {"losses": losses, "epochs": 1, "init": InitConfig(str(first)), "images_per_class": 2}
    return tiny(**(settings | changes))


@pytest.mark.parametrize("losses", [ARCFACE, TRIPLET])
def test_stage_two_does_not_start_from_scratch_unless_forced(index, tmp_path, losses):
    scratch = stage2("", losses, init=InitConfig())
    with pytest.raises(UserError, match=rf"{losses[1].name} does not converge from random .* --init RUN"):
        run(scratch, tmp_path / "run", index)
    assert not (tmp_path / "run" / "last").exists()
    run(replace(scratch, init=InitConfig(force_scratch=True)), tmp_path / "run", index)
    # What was forced goes on without being forced again.
    run(scratch, tmp_path / "run", index)


def test_all_but_the_new_head_is_taken_and_named(first, index):
    torch.manual_seed(5)
    model = Classifier.of(stage2(first), 10)
    head = model.cosine.weight.detach().clone()  # type: ignore[union-attr]
    said = initialize(model, InitConfig(str(first)), "test_resnet", index.classes)
    stored = weights(first)
    for name, each in model.state_dict().items():
        assert torch.equal(each, head if name == "cosine.weight" else stored[name]), name
    total = len(model.state_dict())
    assert f"{total - 1} of {total} tensors" in said and said.endswith("starting random: cosine.weight")


def test_other_classes_start_with_another_classifier(first, index):
    for classes in (["a", "b", "c"], [*index.classes[:-1], "zebra"]):
        model = Classifier("test_resnet", len(classes))
        fresh = {name: each.clone() for name, each in model.state_dict().items()}
        said = initialize(model, InitConfig(str(first)), "test_resnet", classes)
        assert said.endswith("starting random: backbone.fc.bias, backbone.fc.weight")
        for name, each in model.state_dict().items():
            assert torch.equal(each, fresh[name] if "fc" in name else weights(first)[name]), name


# ---- a projection head

CONTRASTIVE = (SymmetricCrossEntropy(), Contrastive())


@pytest.fixture(scope="module")
def projected(index, tmp_path_factory):
    """A run of a network with a projection head, with averaged weights. All steps mix, so nothing reads the head."""
    out = tmp_path_factory.mktemp("projected") / "run"
    run(
        tiny(losses=CONTRASTIVE, epochs=1, mix=MixConfig(cutmix=0.999), ema=EmaConfig(0.8), optim=OptimConfig(lr=0.5)),
        out,
        index,
    )
    return out


def test_a_projection_head_is_saved_averaged_and_loaded(projected):
    stored = weights(projected)
    for averaged, prefix in ((None, "ema."), (True, "ema."), (False, "")):
        model, recipe, _ = checkpoint.network(projected / "last", averaged)
        assert recipe.losses == CONTRASTIVE
        heads = {name: each for name, each in model.named_parameters() if name.startswith("projection.")}
        assert len(heads) == 4 and all(torch.equal(each, stored[prefix + name]) for name, each in heads.items())
        assert model(torch.zeros(1, 3, 32, 32)).embedding is None
    # Decay and momentum go on in steps whose loss does not read it.
    assert stored["momentum.projection.out.weight"].any()


def test_a_projection_head_may_be_new_taken_or_left_behind(first, projected, index):
    def start(recipe, init, classes=index.classes):
        torch.manual_seed(5)
        model = Classifier.of(recipe, len(classes))
        fresh = {name: each.clone() for name, each in model.state_dict().items()}
        return (
            model.state_dict(),
            fresh,
            initialize(model, InitConfig(str(init), averaged=False), "test_resnet", classes),
        )

    names = ["projection.hidden.bias", "projection.hidden.weight", "projection.out.bias", "projection.out.weight"]
    with_head, without = tiny(losses=CONTRASTIVE), tiny()
    own, fresh, said = start(with_head, first)
    assert said.endswith(f"starting random: {', '.join(names)}")
    assert all(torch.equal(own[name], fresh[name]) for name in names)
    own, _, said = start(with_head, projected)
    assert said.endswith("starting random: none")
    assert all(torch.equal(each, weights(projected)[name]) for name, each in own.items())
    own, _, said = start(without, projected)
    assert said.endswith("starting random: none") and not own.keys() & set(names)
    assert all(torch.equal(each, weights(projected)[name]) for name, each in own.items())
    # It knows nothing of classes: where they are others, it is taken all the same.
    own, fresh, said = start(with_head, projected, ["a", "b", "c"])
    assert said.endswith("starting random: backbone.fc.bias, backbone.fc.weight")
    assert all(torch.equal(own[name], weights(projected)[name]) for name in names)


def test_what_does_not_fit_is_refused_by_name(first, index, tmp_path):
    with pytest.raises(UserError, match=r"holds a test_resnet, and this run trains a resnet18"):
        initialize(Classifier("resnet18", 10), InitConfig(str(first)), "resnet18", index.classes)
    other = Classifier("resnet18", 10)
    with pytest.raises(UserError, match=r"backbone\.\S+ is .* in it and .* in this network"):
        initialize(other, InitConfig(str(first)), "test_resnet", index.classes)
    with pytest.raises(UserError, match="is no checkpoint"):
        run(stage2(tmp_path / "none"), tmp_path / "run", index)


def test_stage_two_starts_where_stage_one_ended(first, index, tmp_path):
    """One step at a rate of 0 (warm-up) leaves the weights where --init put them; momentum starts afresh."""
    recipe = stage2(first, batch_size=100, images_per_class=10)
    run(recipe, tmp_path / "run", index)
    stored, found = weights(first), weights(tmp_path / "run")
    taken = [name for name in found if name in stored and "running" not in name and name.startswith("backbone.")]
    assert taken and all(torch.equal(stored[name], found[name]) for name in taken if "num_batches" not in name)
    notes = [each["text"] for each in events(tmp_path / "run") if each["event"] == "note"]
    assert (
        notes[0].startswith("init: ") and notes[1] == "batches of 10 classes x 10 images; 100 of 100 images per epoch"
    )


def test_triplet_tells_its_stats_and_leaves_mixed_steps_out(first, index, tmp_path):
    run(stage2(first, TRIPLET, mix=MixConfig(cutmix=0)), tmp_path / "plain", index)
    points = [each for each in events(tmp_path / "plain") if each["event"] == "train"]
    assert all(each["stats"].keys() == {"triplet/active", "triplet/d_ap", "triplet/d_an"} for each in points)
    assert all(each["loss"] == pytest.approx(sum(each["terms"].values()), rel=1e-5) for each in points)
    run(stage2(first, TRIPLET, mix=MixConfig(cutmix=0.999)), tmp_path / "mixed", index)
    points = [each for each in events(tmp_path / "mixed") if each["event"] == "train"]
    assert all(each["terms"].keys() == {"cross_entropy"} and "stats" not in each for each in points)


def test_mining_by_micro_batch_is_said(first, index, tmp_path):
    run(stage2(first, TRIPLET, micro_batch=10), tmp_path / "run", index)
    notes = [each["text"] for each in events(tmp_path / "run") if each["event"] == "note"]
    assert "mined within each micro-batch of 10" in notes[1]


def test_a_collapsed_loss_is_said_in_the_log_and_on_screen(first, index, tmp_path, monkeypatch, capsys):
    class Dead(Classifier):
        def forward(self, images):
            output = super().forward(images)
            return output._replace(features=output.features * 0)

    monkeypatch.setattr(prepare, "Classifier", Dead)
    run(stage2(first, TRIPLET, mix=MixConfig(cutmix=0)), tmp_path / "dead", index)
    said = [each for each in events(tmp_path / "dead") if each["event"] == "collapsed"]
    assert [each["loss"] for each in said] == ["triplet"] and "triplet has collapsed" in capsys.readouterr().err
    monkeypatch.undo()
    run(stage2(first, TRIPLET, mix=MixConfig(cutmix=0)), tmp_path / "alive", index)
    assert not [each for each in events(tmp_path / "alive") if each["event"] == "collapsed"]


# ---- a teacher


def test_a_student_that_is_its_teacher_has_no_loss(index, tmp_path):
    """A network without BatchNorm, whose training mode would differ; the first two steps, at rates 0 and nearly 0."""
    tiny_net = tiny(arch="test_convnext", epochs=1, machine=replace(tiny().machine, log_steps=1))
    run(tiny_net, tmp_path / "teacher", index)
    alone = (Distillation(teacher=str(tmp_path / "teacher"), temperature=1.0),)
    run(replace(tiny_net, losses=alone, init=InitConfig(str(tmp_path / "teacher"))), tmp_path / "same", index)
    run(replace(tiny_net, losses=alone, seed=7), tmp_path / "other", index)
    same, other = (
        next(each["terms"]["distillation"] for each in events(tmp_path / name) if each["event"] == "train")
        for name in ("same", "other")
    )
    assert abs(same) < 1e-6 and other > 1e-3


def test_the_teacher_is_frozen_and_checked(first, index, tmp_path):
    recipe = tiny(losses=(Distillation(teacher=str(first)),))
    teacher = prepare.load_teacher(recipe, index.classes, CPU.device)
    assert teacher is not None and not teacher.training
    assert not any(each.requires_grad for each in teacher.parameters())
    assert prepare.load_teacher(tiny(), index.classes, CPU.device) is None
    with pytest.raises(UserError, match="class 'zebra' is in the training images but not in"):
        prepare.load_teacher(recipe, [*index.classes, "zebra"], CPU.device)
    with pytest.raises(UserError, match="needs a teacher"):
        prepare.load_teacher(tiny(losses=(Distillation(),)), index.classes, CPU.device)


# ---- averaged weights


def test_the_average_follows_its_rule():
    torch.manual_seed(0)
    linear, norm = torch.nn.Linear(3, 2).double(), torch.nn.BatchNorm1d(2).double()
    model = torch.nn.Sequential(linear, norm)
    average = Average(model, 0.9)
    its_linear: Any = average.model.get_submodule("0")
    its_norm: Any = average.model.get_submodule("1")
    expected = linear.weight.detach().clone()
    seen = []
    for step in range(1, 30):
        with torch.no_grad():
            linear.weight += torch.randn(2, 3).double()
            norm.get_buffer("running_mean").add_(1)
        average.update(step)
        seen.append(linear.weight.detach().clone())
        share = min(1 - 1 / step, 0.9)
        expected = share * expected + (1 - share) * seen[-1]
        torch.testing.assert_close(its_linear.weight, expected)
        if step <= 10:
            torch.testing.assert_close(its_linear.weight, torch.stack(seen).mean(0))
    assert torch.equal(its_norm.running_mean, norm.running_mean)  # type: ignore[arg-type]
    assert not any(each.requires_grad for each in average.model.parameters())


def test_averaged_weights_are_evaluated_saved_and_resumed(index, tmp_path, monkeypatch):
    recipe = tiny(epochs=2, ema=EmaConfig(0.8), optim=OptimConfig(lr=0.5))
    result = run(recipe, tmp_path / "whole", index, index)
    tests = [each for each in events(tmp_path / "whole") if each["event"] == "eval"]
    assert all(each["ema"].keys() == {"top1", "top5", "images"} for each in tests)
    assert result.scores is not None and result.scores.top1 == tests[-1]["ema"]["top1"]
    assert result.best == max(each["ema"]["top1"] for each in tests)

    plain = tiny(epochs=2, optim=OptimConfig(lr=0.5))
    run(plain, tmp_path / "plain", index, index)
    raw, averaged = weights(tmp_path / "plain"), weights(tmp_path / "whole")
    assert all(torch.equal(raw[name], averaged[name]) for name in raw), "averaging changed the training"
    moved = [name for name in raw if f"ema.{name}" in averaged]
    assert moved and any(not torch.equal(averaged[f"ema.{name}"], averaged[name]) for name in moved)

    from helpers import Stop, fail_at

    with monkeypatch.context() as patch:
        fail_at(patch, 5)
        with pytest.raises(Stop):
            run(recipe, tmp_path / "stopped", index, index)
    run(recipe, tmp_path / "stopped", index, index)
    again = weights(tmp_path / "stopped")
    assert all(torch.equal(again[name], averaged[name]) for name in averaged)

    chosen, _, _ = checkpoint.network(tmp_path / "whole" / "last")
    assert all(torch.equal(each, averaged[f"ema.{name}"]) for name, each in chosen.named_parameters())
    plainly, _, _ = checkpoint.network(tmp_path / "whole" / "last", averaged=False)
    assert all(torch.equal(each, averaged[name]) for name, each in plainly.named_parameters())
    with pytest.raises(UserError, match="has no averaged weights"):
        checkpoint.network(tmp_path / "plain", averaged=True)


def test_init_takes_averaged_weights_unless_told_otherwise(index, tmp_path):
    run(tiny(epochs=1, ema=EmaConfig(0.8), optim=OptimConfig(lr=0.5)), tmp_path / "run", index)
    stored = weights(tmp_path / "run")
    for averaged, prefix in ((True, "ema."), (False, "")):
        model = Classifier("test_resnet", 10)
        init = InitConfig(str(tmp_path / "run"), averaged=averaged)
        said = initialize(model, init, "test_resnet", index.classes)
        assert ("averaged weights" in said) == averaged
        assert all(torch.equal(each, stored[prefix + name]) for name, each in model.named_parameters())


def test_the_recipe_in_a_checkpoint_is_whole(first):
    meta = json.loads((first / "last" / "meta.json").read_text())
    assert toml.from_dict(meta["recipe"], "meta") == resolve_auto(tiny(epochs=1), torch.device("cpu"))
