"""The recipe for little data: its rule, and where a run recommends it."""

import json
from dataclasses import replace

import numpy as np
import pytest
from helpers import call, index_of
from hypothesis import given
from hypothesis import strategies as st

from fasttrain import recipes
from fasttrain.config import toml
from fasttrain.pipelines.plan import Plan
from fasttrain.prepare import schedule_line
from fasttrain.recipes.small_data import AUTOAUGMENT_FROM, CUTMIX_FROM, small_data
from fasttrain.utils.errors import UserError


@given(st.integers(2, 10**6), st.integers(1, 600), st.sampled_from(["resnet18", "tresnet_xl"]))
def test_the_rule_is_what_it_says(images, epochs, arch):
    base = recipes.for_arch(arch)
    recipe = small_data(base, images, epochs)
    batch = recipe.batch_size
    assert batch in (16, 32, 64, 128) and recipe.epochs == epochs
    assert batch == 16 or images // batch >= 32, "fewer than 32 steps per epoch"
    assert batch == 128 or images // (2 * batch) < 32, "a larger batch would do"
    assert recipe.peak_lr == pytest.approx({16: 0.02, 32: 0.0283, 64: 0.04, 128: 0.0566}[batch])
    assert recipe.optim.weight_decay == pytest.approx(np.clip(4e-5 * epochs, 2e-4, 2e-3))
    assert recipe.optim.warmup_epochs <= min(5, epochs / 20) + 1e-3
    assert (recipe.mix.cutmix > 0) == (epochs >= CUTMIX_FROM)
    strong = epochs >= AUTOAUGMENT_FROM
    assert recipe.augment.autoaugment == (base.augment.autoaugment if strong else "none")
    assert (recipe.arch, recipe.image_size) == (base.arch, base.image_size)
    assert toml.from_toml(toml.to_toml(recipe)) == recipe


def test_run_takes_it_and_options_override_it(demo_set, tmp_path):
    words = ["run", "--recipe", "small_data/test_resnet", "--data", demo_set, "--image-size", "32", "--device", "cpu"]
    words += ["--epochs", "1", "--set", "optim.momentum=0.8", "--out", tmp_path / "run"]
    call(*words)
    recipe = recipes.by_name(str(tmp_path / "run" / "recipe.toml"))
    expected = small_data(recipes.for_arch("test_resnet"), 500, 1)
    assert recipe.optim == replace(expected.optim, momentum=0.8) and recipe.augment == expected.augment
    assert recipe.batch_size == expected.batch_size and recipe.name == "small_data/test_resnet"
    assert "complete, with 31 of 31 steps" in call(*words).output  # the same command resumes
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert not any("small_data" in line.get("text", "") for line in lines if line["event"] == "note")
    output = call(*words[:-2], "--batch-size", "50", "--folds", "5", "--fold", "0", "--dry-run").output
    expected = small_data(recipes.for_arch("test_resnet"), 400, 1, 50)
    assert f"weight_decay = {expected.optim.weight_decay}" in output and "batch      50 = " in output


def test_set_counts_and_a_file_in_a_folder_of_that_name_is_a_file(demo_set, tmp_path):
    words = ["run", "--recipe", "small_data/test_resnet", "--data", demo_set, "--device", "cpu", "--dry-run"]
    output = call(*words, "--set", "epochs=200", "--set", "batch_size=20").output
    expected = small_data(recipes.for_arch("test_resnet"), 500, 200, 20)
    assert f"warmup_epochs = {expected.optim.warmup_epochs}" in output and 'autoaugment = "imagenet"' in output
    assert "batch      20 = " in output and expected.augment.autoaugment == "imagenet"
    file = tmp_path / "small_data" / "test_resnet" / "recipe.toml"
    file.parent.mkdir(parents=True)
    file.write_text(toml.to_toml(replace(expected, epochs=7)))
    output = call("run", "--recipe", file, "--data", demo_set, "--device", "cpu", "--dry-run").output
    assert "= 7 epochs x 25" in output


def test_where_it_cannot_be_used_says_why(demo_set):
    message = (
        "follows from the training images and the epochs, so only `run` takes it; `fasttrain run --recipe small_data"
    )
    with pytest.raises(UserError, match=message):
        recipes.by_name("small_data/resnet18")
    words = ["run", "--recipe", "small_data/resnet18", "--data", demo_set]
    assert "leave --budget and --until out" in call(*words, "--budget", "1h", status=2).output
    assert (
        "no network"
        in call("run", "--recipe", "small_data/resnet1888", "--data", demo_set, "--dry-run", status=2).output
    )


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        (["epochs=30"], "CutMix and AutoAugment"),
        (["epochs=30", "mix.cutmix=0"], "AutoAugment"),
        ([f"epochs={CUTMIX_FROM}"], ""),
        (["epochs=30", "mix.cutmix=0", "augment.autoaugment=none"], ""),
        (["epochs=30", "init.weights=run"], ""),
        (["budget.seconds=60"], ""),
    ],
)
def test_a_run_recommends_it_where_its_schedule_is_short(settings, names):
    recipe = toml.override(replace(recipes.for_arch("resnet18"), batch_size=10), *settings)
    line = schedule_line(Plan.of(recipe, index_of(50, 50)), recipe)
    assert (f"too rarely for {names} to help: --recipe small_data/resnet18" in line) if names else line == ""
