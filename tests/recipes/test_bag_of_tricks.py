"""Bag of Tricks: each recipe differs from its base in one trick, and each setting does what it should."""

from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from helpers import events, run, tiny

from fasttrain import prepare, recipes
from fasttrain.config import toml
from fasttrain.config.schema import MixConfig, OptimConfig
from fasttrain.losses.cross_entropy import CrossEntropy
from fasttrain.losses.distillation import Distillation
from fasttrain.models import Classifier
from fasttrain.training import optim


def flat_settings(recipe) -> dict:
    flat: dict = {}
    for key, value in toml.to_dict(recipe).items():
        flat |= (
            {f"{key}.{inner}": inner_value for inner, inner_value in value.items()}
            if isinstance(value, dict)
            else {key: value}
        )
    return flat


# A recipe, the recipe that it builds on, and the settings in which they differ.
TRICKS = [
    (
        "efficient",
        "baseline",
        {"batch_size", "precision", "zero_gamma", "optim.decay_norm_bias", "optim.warmup_epochs"},
    ),
    ("resnet-d", "efficient", {"arch"}),
    ("cosine", "resnet-d", {"optim.schedule"}),
    ("smoothing", "cosine", {"losses.cross_entropy"}),
    ("distillation", "smoothing", {"losses.distillation"}),
    ("mixup", "smoothing", {"epochs", "mix.mixup"}),
    ("mixup-distillation", "mixup", {"losses.distillation"}),
]


@pytest.mark.parametrize(("name", "base", "changed"), TRICKS)
def test_a_recipe_adds_only_its_trick(name, base, changed):
    ours, theirs = (flat_settings(recipes.by_name(f"bag_of_tricks/{recipe}")) for recipe in (name, base))
    different = {key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key)}
    assert different == changed | {"name"}


def test_the_recipes_have_the_papers_numbers():
    baseline, efficient, mixup, both = (
        recipes.by_name(f"bag_of_tricks/{name}") for name in ("baseline", "efficient", "mixup", "mixup-distillation")
    )
    assert (baseline.batch_size, baseline.peak_lr, baseline.epochs) == (256, 0.1, 120)
    assert (efficient.batch_size, efficient.peak_lr, efficient.optim.warmup_epochs) == (1024, 0.4, 5.0)
    assert efficient.optim.step_epochs == (30, 60, 90) and efficient.optim.step_factor == 0.1
    assert mixup.mix == MixConfig(cutmix=0, mixup=1.0, mixup_alpha=0.2)
    assert both.losses == (CrossEntropy(0.1), Distillation(temperature=20.0))


# ---- single settings


def test_linear_scaling_is_a_setting():
    recipe = recipes.for_arch("resnet50")
    assert [replace(recipe, batch_size=size).peak_lr for size in (128, 256, 1024)] == pytest.approx([0.05, 0.1, 0.4])
    fixed = replace(recipe, optim=replace(recipe.optim, lr_batch=0))
    assert [replace(fixed, batch_size=size).peak_lr for size in (128, 1024)] == [0.1, 0.1]


def rates(**settings) -> np.ndarray:
    recipe = tiny(epochs=120, batch_size=256, optim=OptimConfig(**settings))
    return np.array([optim.lr_schedule(recipe, 10)(step) for step in range(1200)])


def test_warm_up_is_linear_and_ends_at_the_peak():
    for epochs in (0, 1, 5):
        values = rates(warmup_epochs=epochs, schedule="step")
        start = epochs * 10
        np.testing.assert_allclose(values[:start], 0.1 * np.arange(start) / max(1, start))
        assert values[start] == pytest.approx(0.1) and values.max() == values[start]


def test_the_step_schedule_equals_torchs_after_warm_up():
    values = rates(warmup_epochs=5, schedule="step")
    parameter = torch.nn.Parameter(torch.zeros(1))
    sgd = torch.optim.SGD([parameter], lr=0.1)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(sgd, milestones=[300, 600, 900], gamma=0.1)
    expected: list[float] = []
    for _ in range(1200):
        expected.append(float(scheduler.get_last_lr()[0]))
        sgd.step()
        scheduler.step()
    np.testing.assert_allclose(values[50:], expected[50:])


def test_the_cosine_schedule_equals_torchs_after_warm_up():
    values = rates(warmup_epochs=5, schedule="cosine")
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, T_max=1150)
    for step in range(50, 1200):
        assert values[step] == pytest.approx(scheduler.get_last_lr()[0], abs=1e-9)
        sgd.step()
        scheduler.step()


@pytest.mark.parametrize("arch", ["resnet18", "test_resnet", "tresnet_m", "seresnext50_32x4d", "resnest14d"])
def test_zero_gamma_changes_only_the_last_norm_of_each_block(arch):
    torch.manual_seed(0)
    with_zero = Classifier(arch, 5).state_dict()
    torch.manual_seed(0)
    without = Classifier(arch, 5, zero_gamma=False).state_dict()
    changed = {name for name in with_zero if not torch.equal(with_zero[name], without[name])}
    assert changed == {name for name, tensor in with_zero.items() if name.endswith("weight") and not tensor.any()}
    assert changed and all((without[name] == 1).all() and without[name].ndim == 1 for name in changed)
    blocks = [name for name, module in timm.create_model(arch).named_modules() if hasattr(module, "zero_init_last")]
    assert not blocks or {name.split(".bn")[0].removeprefix("backbone.") for name in changed} == set(blocks)


@pytest.mark.parametrize(
    ("precision", "dtype"), [pytest.param("bf16", torch.bfloat16, marks=pytest.mark.slow), ("fp16", torch.float16)]
)
def test_half_precision_keeps_master_weights_in_float32(index, tmp_path, precision, dtype, monkeypatch):

    dtypes = set()

    class RecordingClassifier(Classifier):
        def forward(self, images):
            output = super().forward(images)
            dtypes.add((images.dtype, output.logits.dtype))
            return output

    monkeypatch.setattr(prepare, "Classifier", RecordingClassifier)
    run(tiny(epochs=1, precision=precision), tmp_path / "run", index)
    assert dtypes == {(dtype, dtype)}
    from fasttrain.checkpoints import checkpoint

    saved = checkpoint.load(tmp_path / "run" / "last")
    assert {tensor.dtype for tensor in (saved.model | saved.train).values()} == {torch.float32, torch.int64}


@pytest.mark.parametrize("arch", ["resnet50", "resnet50c", "resnet50d"])
def test_resnet_variants_have_the_papers_tweaks(arch):
    """ResNet-B is torch's ResNet-50, with the stride in the 3x3; C has a stem of three 3x3; D pools in the shortcut."""
    network = Classifier(arch, 10).backbone
    stem, shortcut = network.conv1, network.layer2[0].downsample
    strides = [network.layer2[0].conv1.stride[0], network.layer2[0].conv2.stride[0]]
    assert strides == [1, 2]
    assert isinstance(stem, torch.nn.Sequential) == (arch != "resnet50")
    assert isinstance(shortcut[0], torch.nn.AvgPool2d) == (arch == "resnet50d")


def test_smoothing_and_mixup_change_the_first_loss(index, tmp_path):
    base = tiny(epochs=1, mix=MixConfig(cutmix=0), losses=(CrossEntropy(0.0),))
    losses: dict[str, float] = {}
    variants: dict[str, dict] = {
        "base": {},
        "smoothing": {"losses": (CrossEntropy(0.1),)},
        "mixup": {"mix": MixConfig(cutmix=0, mixup=1)},
    }
    for name, changes in variants.items():
        run(replace(base, **changes), tmp_path / name, index)
        losses[name] = next(event["loss"] for event in events(tmp_path / name) if event["event"] == "train")
    assert len(set(losses.values())) == 3
