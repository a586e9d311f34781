"""`fasttrain tune`: what is searched, trials that stop early and go on after a kill, what is written at the end."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from helpers import call, part_of
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fasttrain import recipes
from fasttrain.config import toml
from fasttrain.tune.search import Range, ranges_of, usual, values_of
from fasttrain.tune.study import evaluations, first_rung, visible_device, with_settings
from fasttrain.utils.errors import UserError

optuna = pytest.importorskip("optuna")
optuna.logging.set_verbosity(optuna.logging.ERROR)
RECIPE = recipes.for_arch("resnet18")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("optim.lr=log(1e-3,1)", Range("optim.lr", "log", (1e-3, 1))),
        (" mix.cutmix = uniform( 0 , 0.5 ) ", Range("mix.cutmix", "uniform", (0, 0.5))),
        ("epochs=int(2,9)", Range("epochs", "int", (2, 9))),
        ("augment.autoaugment=choice(none, imagenet)", Range("augment.autoaugment", "choice", ("none", "imagenet"))),
        ('augment.autoaugment=choice("none")', "give 2 to 100 choices"),
        ("augment.crop_area=choice([0.1,1],[0.5,1])", Range("augment.crop_area", "choice", ([0.1, 1], [0.5, 1]))),
        ("optim.lr", "expected a setting and its range, as in optim.lr=log"),
        ("optim.lr=normal(0,1)", "expected a setting and its range"),
        ("optim.lr=log(1,0.1)", "log takes two increasing numbers"),
        ("optim.lr=log(0,1)", "log takes numbers above 0"),
        ("optim.lr=uniform(a,b)", "uniform takes two increasing numbers"),
        ("epochs=int(2.5,9)", "int takes whole numbers"),
    ],
)
def test_ranges(text, expected):
    if isinstance(expected, Range):
        assert Range.parse(text) == expected and Range.parse(str(expected)) == expected
        return
    with pytest.raises(UserError, match=expected) as error:
        Range.parse(text)
    assert str(error.value).startswith(f"--search {text}: ")


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["optim.lrr=log(0.1,1)"], "no key 'optim.lrr'; did you mean 'optim.lr'"),
        (["optim.lr=log(0.1,1)", "optim.lr=uniform(0.1,1)"], "names optim.lr twice"),
        (["optim.momentum=uniform(0.5,1)"], r"momentum must be in \[0, 1\), not 1"),
        (["augment.autoaugment=choice(none,strong)"], "autoaugment must be one of"),
        (["batch_size=uniform(16,64)"], "--search batch_size: batch_size must be an integer, not 33.76"),
        (["data.folds=int(2,5)"], "this says where or how to run, not how to train"),
    ],
)
def test_ranges_that_do_not_fit_the_recipe_are_refused_before_anything_runs(texts, message):
    with pytest.raises(UserError, match=message):
        ranges_of(texts, RECIPE, 1000)


@settings(deadline=None, max_examples=30)
@given(st.integers(8, 100_000), st.sampled_from(["resnet18", "tresnet_xl"]), st.sampled_from(["ce", "ce+triplet"]))
def test_the_usual_search_suits_any_recipe_and_holds_its_own_values(images, arch, loss):
    recipe = replace(recipes.for_arch(arch, loss), data=replace(RECIPE.data))
    ranges = usual(recipe, images)
    for each in ranges:
        for value in each.values:
            toml.override(recipe, (each.key, value))
    study = optuna.create_study()
    study.enqueue_trial(values_of(recipe, ranges))
    trial = study.ask()
    for each in ranges:
        each.suggest(trial)
    found = with_settings(recipe, ranges, trial.params)
    assert found == recipe or recipe.batch_size > images
    assert all(size <= images for each in ranges if each.key == "batch_size" for size in each.values)


def test_the_recipes_own_values_are_found_in_a_range_or_not():
    ranges = [Range("mix.cutmix", "choice", (0, 0.5)), Range("optim.lr", "log", (1e-3, 1e-2))]
    assert values_of(RECIPE, ranges) == {"mix.cutmix": "0.5"}
    recipe = toml.override(RECIPE, "mix.cutmix=0", "optim.lr=0.005")
    assert values_of(recipe, ranges) == {"mix.cutmix": "0", "optim.lr": 0.005}


def test_jobs_share_the_gpus(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert [visible_device(job) for job in range(3)] == ["2", "5", "2"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [visible_device(job) for job in range(3)] == ["0", "1", "0"]


@given(st.integers(1, 600))
def test_a_trial_is_stopped_in_its_first_third_or_never(epochs):
    rungs = [first_rung(epochs) * 3**number for number in range(7)]
    stops = [rung for rung in rungs if rung < epochs]
    assert rungs[0] >= 1 and len(stops) <= 2
    assert all(stop <= epochs / 3 + 3 for stop in stops)


def test_a_log_that_is_being_written_is_read_as_far_as_it_goes(tmp_path):
    lines = [{"event": "start"}, {"event": "eval", "epoch": 0, "top1": 0.25}]
    lines += [{"event": "eval", "epoch": 2, "top1": 0.5, "ema": {"top1": 0.75}}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    assert evaluations(tmp_path, RECIPE) == {}
    (tmp_path / "log.jsonl").write_text(text + '{"event": "eval", "epo')
    assert evaluations(tmp_path, RECIPE) == {1: 0.25, 3: 0.75}


@pytest.fixture(scope="module")
def small(demo_set, tmp_path_factory):
    """Ten images of each class of the demo set, as a folder."""
    folder = tmp_path_factory.mktemp("small") / "images"
    index = part_of(demo_set, 10)
    for path, image_id in zip(index.paths, index.ids, strict=True):
        (folder / image_id).parent.mkdir(parents=True, exist_ok=True)
        os.link(path, folder / image_id)
    return folder


def words_of(small, out, *more):
    words = ["tune", "--arch", "test_resnet", "--data", small, "--image-size", 32, "--device", "cpu", "--out", out]
    return [str(word) for word in (*words, "--set", "batch_size=20", *more)]


def start(words, log):
    """Start a search, and wait until the trial of this log trains."""
    process = subprocess.Popen([sys.executable, "-m", "fasttrain", *words], stderr=subprocess.PIPE, text=True)
    while not (log.exists() and '"event": "train"' in log.read_text()):
        assert process.poll() is None
        time.sleep(0.1)
    return process


@pytest.mark.slow
def test_a_search_goes_on_and_its_best_recipe_trains(small, tmp_path):
    out = tmp_path / "search"
    words = words_of(small, out, "--epochs", 3, "--search", "optim.lr=log(1e-6,2)")
    words += ["--search", "augment.autoaugment=choice(none,imagenet)"]
    call(*words, "--trials", 2)
    output = call(*words, "--trials", 5).output
    rows = list(csv.DictReader((out / "trials.csv").open()))
    assert [row["trial"] for row in rows] == ["0", "1", "2", "3", "4"]
    own = {key: row for key, row in rows[0].items()}
    assert float(own["optim.lr"]) == RECIPE.optim.lr and own["augment.autoaugment"] == '"imagenet"'
    complete = [row for row in rows if row["state"] == "complete"]
    assert all(row["epochs"] == "3" for row in complete) and {row["state"] for row in rows} <= {"complete", "pruned"}
    best = max(complete, key=lambda row: float(row["score"]))
    tuned = recipes.by_name(str(out / "best.toml"))
    assert f"best: trial {best['trial']}, top-1 {float(best['score']):.2%} on fold 0 of 5" in output
    assert tuned.optim.lr == pytest.approx(float(best["optim.lr"])) and tuned.data.folds == 0
    assert tuned.data.train == (str(small),) and tuned.epochs == 3
    assert Image.open(out / "trials.png").size[0] > 400
    # Each trial is an ordinary run, whose score is the last of its log.
    for row in rows:
        scores = evaluations(out / "trials" / f"{int(row['trial']):04}", RECIPE)
        assert float(row["score"]) == scores[int(row["epochs"])]
    run = ["run", "--recipe", out / "best.toml", "--out", tmp_path / "run", "--epochs", "1", "--device", "cpu"]
    assert "run folder" in call(*run).output
    message = "is for another recipe or other data; name another --out"
    assert message in call(*words_of(small, out, "--epochs", 4, "--search", "optim.lr=log(1e-6,2)"), status=2).output
    next((small / "cross-checks-blue").iterdir()).rename(tmp_path / "aside.jpg")
    assert "was made from other images than" in call(*words, status=2).output
    (tmp_path / "aside.jpg").rename(small / "cross-checks-blue" / "000.jpg")


@pytest.mark.slow
def test_a_search_that_is_stopped_goes_on_inside_its_trial(small, tmp_path):
    out = tmp_path / "search"
    words = words_of(small, out, "--epochs", 60, "--search", "optim.lr=log(0.01,2)", "--trials", 1)
    log = out / "trials" / "0000" / "log.jsonl"
    process = start(words, log)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75 and "stopped by SIGTERM; the same command goes on" in errors
    assert '"event": "stopped"' in log.read_text()
    call(*words)
    events = [json.loads(line) for line in log.read_text().splitlines()]
    assert sum(event["event"] == "resume" for event in events) == 1
    (row,) = csv.DictReader((out / "trials.csv").open())
    assert row["state"] == "complete" and row["epochs"] == "60"


@pytest.mark.slow
def test_settings_that_do_not_fit_together_fail_their_trial_only(small, tmp_path):
    words = words_of(small, tmp_path / "search", "--epochs", 1, "--trials", 6, "--set", "mix.cutmix=0")
    call(*words, "--search", "mix.cutmix=choice(0,0.6)", "--search", "mix.mixup=choice(0,0.6)")
    rows = list(csv.DictReader((tmp_path / "search" / "trials.csv").open()))
    assert {row["state"] for row in rows} >= {"complete"} and len(rows) == 6
    for row in rows:
        both = row["mix.cutmix"] == row["mix.mixup"] == "0.6"
        assert (row["state"] == "fail") == both


@pytest.mark.slow
def test_a_search_that_was_killed_waits_for_its_trial(small, tmp_path):
    out = tmp_path / "search"
    words = words_of(small, out, "--epochs", 40, "--search", "optim.lr=log(0.01,2)", "--trials", 1)
    log = out / "trials" / "0000" / "log.jsonl"
    process = start(words, log)
    process.kill()
    process.communicate()
    output = call(*words).output
    (row,) = csv.DictReader((out / "trials.csv").open())
    assert row["state"] == "complete" and row["epochs"] == "40" and "waiting: another run is writing to" in output


@pytest.mark.slow
def test_a_first_trial_that_fails_ends_the_search_with_its_reason(small, tmp_path):
    words = words_of(small, tmp_path / "search", "--epochs", 1, "--set", "micro_batch=7", "--trials", 3)
    output = call(*words, status=1).output
    assert "the first trial failed" in output and "micro_batch 7 does not divide" in output
