"""Comparing runs and files of probabilities."""

import json

import numpy as np
import pytest
from helpers import TINY, call
from scipy.stats import binomtest
from sklearn.metrics import accuracy_score, log_loss

from fasttrain.evaluation import predictions
from fasttrain.evaluation.predictions import Predictions


def example(seed: int, order: np.ndarray | None = None) -> Predictions:
    """Answers to the same 300 images; in another order where one is given."""
    labels = np.random.default_rng(0).integers(0, 4, 300)
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(300, 4))
    logits[np.arange(300), labels] += seed
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    rows = np.arange(300) if order is None else order
    ids = np.array([f"{number}.jpg" for number in range(300)])
    return Predictions(ids[rows], np.array(list("abcd")), probs[rows].astype(np.float32), labels[rows])


@pytest.fixture
def files(tmp_path):
    first, second = tmp_path / "a.npz", tmp_path / "b.npz"
    predictions.save(example(1), first)
    predictions.save(example(2, np.random.default_rng(5).permutation(300)), second)
    return first, second


def test_files_are_compared_image_by_image(files, tmp_path):
    call("compare", *files, "--json", tmp_path / "c.json")
    found = json.loads((tmp_path / "c.json").read_text())
    a, b = example(1), example(2)
    right = [each.probs.argmax(1) == each.labels for each in (a, b)]
    for scores, each in zip(found["scores"], (a, b), strict=True):
        assert scores["top1"] == pytest.approx(accuracy_score(each.labels, each.probs.argmax(1)))
        probs = each.probs.astype(float)
        expected = log_loss(each.labels, probs / probs.sum(1, keepdims=True))
        assert scores["log_loss"] == pytest.approx(expected, abs=1e-6)
    only = int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())
    assert (found["only_first_right"], found["only_second_right"]) == only
    assert found["mcnemar_p"] == pytest.approx(binomtest(only[0], sum(only)).pvalue, rel=1e-9)
    for key in ("top1", "log_loss"):
        each = found["differences"][key]
        assert each["value"] == pytest.approx(found["scores"][1][key] - found["scores"][0][key], abs=1e-6)
        assert each["low"] < each["value"] < each["high"]
    assert found["settings"] is None
    (tmp_path / "other.json").write_text("{}")
    assert "holds no comparison" in call("compare", *files, "--json", tmp_path / "other.json", status=2).stderr


def test_two_orders_of_the_same_answers_do_not_differ(files, tmp_path):
    predictions.save(example(1, np.arange(300)[::-1]), tmp_path / "c.npz")
    output = call("compare", files[0], tmp_path / "c.npz").stdout
    assert "only A is right on 0 images, only B on 0: McNemar's exact test gives p = 1" in output
    assert "[+0.00, +0.00]" in output


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"classes": np.array(list("abcx"))}, "class 'd' is in"),
        (
            {"ids": np.array([f"{number}.png" for number in range(300)])},
            "have different validation images (300 and 300",
        ),
        ({"labels": np.zeros(300, np.int64)}, "have different labels for"),
        ({"labels": None}, "has no labels; `eval --out` writes"),
    ],
)
def test_other_classes_images_and_labels_are_refused_in_a_line(files, tmp_path, changes, line):
    predictions.save(Predictions(**(vars(example(1)) | changes)), tmp_path / "c.npz")
    result = call("compare", files[0], tmp_path / "c.npz", status=2)
    assert line in result.stderr and len(result.stderr.splitlines()) == 1


def test_runs_are_compared_with_their_settings(demo_set, tmp_path):
    for out, seed in (("one", 0), ("two", 1)):
        call("run", *TINY, "--data", demo_set, "--epochs", 1, "--seed", seed, "--out", tmp_path / out)
    output = call("compare", tmp_path / "one", tmp_path / "two", "--device", "cpu").stdout.splitlines()
    rows = [line.split() for line in output]
    assert ["seed", "0", "1"] in rows and not any(row[:1] == ["optim.lr"] for row in rows)
    assert "scores on the same 250 images of 10 classes:" in output
    evaluated = call(
        "eval", tmp_path / "two", "--data", demo_set, "--device", "cpu", "--out", tmp_path / "two.npz"
    ).stdout
    top1 = evaluated.split()[1].rstrip(",")
    assert next(row for row in rows if row[0] == "top-1")[2] == top1
    mixed = call("compare", tmp_path / "one", tmp_path / "two.npz", "--device", "cpu").stdout
    assert f"{top1}" in mixed and "settings" not in mixed
    other = call(
        "compare", tmp_path / "one", tmp_path / "two", "--data", tmp_path / "nowhere", "--device", "cpu", status=2
    )
    assert "nowhere" in other.stderr
