"""Folds: equal parts with each class's share, the same for any order of the images; what their runs give together."""

import json
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
from helpers import call, index_of, part_of
from hypothesis import given, settings
from hypothesis import strategies as st

from fasttrain import train as training
from fasttrain.config.schema import DataConfig
from fasttrain.data.folds import fold_numbers, without_fold
from fasttrain.data.open_data import open_data
from fasttrain.evaluation import cross_validation, predictions
from fasttrain.utils.errors import UserError


@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.integers(2, 12), st.randoms())
@settings(max_examples=150, deadline=None)
def test_folds_are_equal_parts_of_every_class(sizes, folds, random):
    index = index_of(*sizes)
    numbers = fold_numbers(index, folds)
    for chosen in [slice(None), *(index.labels == label for label in range(len(sizes)))]:
        counts = np.bincount(numbers[chosen], minlength=folds)
        assert counts.max() - counts.min() <= 1
    order = list(range(len(index)))
    random.shuffle(order)
    assert fold_numbers(index.take(np.array(order)), folds).tolist() == numbers[order].tolist()


def test_training_and_held_out_images_are_a_partition():
    index = replace(index_of(9, 5, 2), weights=np.arange(16.0), problems={3: "damaged", 15: "empty"})
    for fold in range(3):
        train, held_out = without_fold(index, 3, fold)
        assert not set(train.ids) & set(held_out.ids) and {*train.ids, *held_out.ids} == set(index.ids)
        assert train.classes == held_out.classes == index.classes
        for part in (train, held_out):
            position = {image_id: number for number, image_id in enumerate(index.ids)}
            assert part.weights.tolist() == [position[image_id] for image_id in part.ids]
            assert all(index.problems[position[part.ids[number]]] == text for number, text in part.problems.items())
        assert len(train.problems) + len(held_out.problems) == 2


def test_images_that_cannot_be_read_are_not_validated_on():
    index = index_of(6, 6)
    index.sizes[[2, 9]] = 0
    parts = [without_fold(index, 3, fold) for fold in range(3)]
    assert all((held_out.sizes > 0).all() for _, held_out in parts)
    assert sum(len(held_out) for _, held_out in parts) == 10 and all(len(train) == 8 for train, _ in parts)


def test_folds_that_cannot_be_made_are_refused():
    with pytest.raises(UserError, match="class '1' has one image"):
        without_fold(index_of(9, 1), 2, 0)
    with pytest.raises(UserError, match="4 images do not make 5 folds; set --folds to a smaller number"):
        without_fold(index_of(2, 2), 5, 0)
    twice = index_of(3, 3)
    twice = replace(twice, ids=("a.jpg", *twice.ids[1:-1], "a.jpg"))
    with pytest.raises(UserError, match=r"two images are called a\.jpg, in different --data"):
        without_fold(twice, 2, 0)
    with pytest.raises(UserError, match="--val with --folds"):
        open_data(DataConfig(train=("x",), val="y", folds=2))


def test_folds_of_a_pack_hold_its_images(demo_set, tmp_path):
    call("data", "pack", demo_set / "val", "--out", tmp_path / "val.safetensors", "--pixels", "raw")
    files, packed = (open_data(DataConfig(train=(str(path),), folds=4, fold=1))
                     for path in (demo_set / "val", tmp_path / "val.safetensors"))  # fmt: skip
    for index, other in zip(files, packed, strict=True):
        assert index.ids == other.ids and index.fingerprint() == other.fingerprint()
        whole, _ = open_data(DataConfig(train=(str(tmp_path / "val.safetensors"),)))
        for number in (0, len(index) - 1):
            own = other.store.content(number)
            assert np.array_equal(own, whole.store.content(whole.ids.index(index.ids[number])))
            assert other.store.length(number) == own.size


@pytest.fixture(scope="module")
def small(demo_set, tmp_path_factory):
    """Ten images of each class of the demo set, as a folder."""
    folder = tmp_path_factory.mktemp("small") / "images"
    index = part_of(demo_set, 10)
    for path, image_id in zip(index.paths, index.ids, strict=True):
        target = folder / image_id
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(path)
    return folder


def test_the_runs_of_all_folds_give_scores_of_all_images(small, demo_set, tmp_path):
    words = ["run", "--arch", "test_resnet", "--image-size", "32", "--batch-size", "20", "--epochs", "1", "--device"]
    words += ["cpu", "--links", "follow", "--data", small, "--out", tmp_path / "cv", "--folds", "2"]
    first = call(*words, "--fold", "1")
    assert "1 of 2 folds are done" in first.output and not (tmp_path / "cv" / "out-of-fold.npz").exists()
    message = "has 1 of 2 folds; train the others with `run --folds 2`, or name one of its runs"
    assert message in call("eval", tmp_path / "cv", "--data", demo_set, status=2).output
    output = call(*words).output
    whole = predictions.load(tmp_path / "cv" / "out-of-fold.npz")
    index, _ = open_data(DataConfig(train=(str(small),), links="follow"))
    assert sorted(whole.ids.tolist()) == sorted(index.ids) and len(whole) == 100
    top1 = []
    for fold, run in enumerate(cross_validation.fold_runs(tmp_path / "cv")):
        _, held_out = without_fold(index, 2, fold)
        lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        top1 += [line["top1"] for line in lines if line["event"] == "eval"]
        rows = [whole.ids.tolist().index(image_id) for image_id in held_out.ids]
        assert np.array_equal(whole.labels[rows], held_out.labels)
        right = (whole.probs[rows].argmax(1) == held_out.labels).mean()
        assert right == pytest.approx(top1[-1])
    assert f"2 folds: top-1 {np.mean(top1):.2%} ± " in output
    # eval takes the folder for the mean of its runs.
    files = [tmp_path / f"{name}.npz" for name in ("both", "0", "1")]
    for path, run in zip(files, (tmp_path / "cv", *cross_validation.fold_runs(tmp_path / "cv")), strict=True):
        call("eval", run, "--data", demo_set / "val", "--device", "cpu", "--out", path)
    both, *alone = (predictions.load(path).probs for path in files)
    np.testing.assert_allclose(both, np.mean(alone, axis=0), atol=1e-6)


def test_the_interval_is_students():
    from scipy import stats

    values = [0.61, 0.58, 0.66, 0.6, 0.57]
    low, high = stats.t.interval(0.95, 4, np.mean(values), stats.sem(values))
    assert cross_validation.spread("top-1", values) == f"top-1 {np.mean(values):.2%} ± {(high - low) / 2:.2%}"
    for degrees, t in enumerate(cross_validation._T95, 1):
        assert t == pytest.approx(stats.t.ppf(0.975, degrees), abs=6e-4)


def test_fold_options_that_contradict_are_refused(small, tmp_path):
    words = ["run", "--arch", "test_resnet", "--data", small, "--links", "follow", "--out", tmp_path / "x"]
    assert "name --folds N too" in call(*words, "--fold", "1", status=2).output
    message = "--folds 2 and --set data.folds=3 disagree"
    assert message in call(*words, "--folds", "2", "--set", "data.folds=3", "--device", "cpu", status=2).output
    # What is wrong with the last fold is said before the first one is trained.
    output = call(*words, "--folds", "2", "--batch-size", "51", "--device", "cpu", status=2).output
    assert "50 images are fewer than one batch of 51" in output and not (tmp_path / "x").exists()
    assert "--resume PATH is for one run" in call(*words, "--folds", "2", "--resume", "runs/y", status=2).output


@pytest.mark.slow
def test_a_signal_in_the_last_step_of_a_fold_stops_before_the_next(small, tmp_path, monkeypatch):
    words = ["run", "--arch", "test_resnet", "--image-size", "32", "--batch-size", "20", "--epochs", "1", "--device"]
    words += ["cpu", "--links", "follow", "--data", small, "--out", tmp_path / "cv", "--folds", "2"]
    original = training.save

    def save_and_signal(*args):
        original(*args)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(training, "save", save_and_signal)
        assert "stopped by SIGTERM; the same command resumes" in call(*words, status=75).output
    assert (tmp_path / "cv" / "fold-0" / "held-out.npz").exists() and not (tmp_path / "cv" / "fold-1").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert "2 folds: top-1" in call(*words).output
