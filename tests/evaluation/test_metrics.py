"""Metrics against scikit-learn, over any batches and ranks; the score that decides; ending early; calibration."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import call, events, part_of, run, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from sklearn.calibration import calibration_curve
from sklearn.metrics import (
    balanced_accuracy_score,
    f1_score,
    log_loss,
    precision_recall_fscore_support,
    top_k_accuracy_score,
)

from fasttrain import train as training
from fasttrain.checkpoints import checkpoint
from fasttrain.config.schema import EvaluationConfig
from fasttrain.evaluation import calibration, metrics
from fasttrain.evaluation.metrics import Scores, Sums
from fasttrain.evaluation.predictions import Predictions, save

CPU = torch.device("cpu")


def sample(seed: int, count: int, classes: int, missing: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random probabilities, and labels that favor likely classes; the last `missing` classes have no images."""
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(np.full(classes, 0.3), count)
    labels = np.array([rng.choice(classes, p=row) for row in probs]) % max(1, classes - missing)
    return probs, labels.astype(np.int64)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 200), st.integers(2, 30), st.integers(0, 2))
def test_scores_equal_scikit_learn(seed, count, classes, missing):
    probs, labels = sample(seed, count, classes, missing)
    ours, answers, names = metrics.scores(probs, labels), probs.argmax(1), np.arange(classes)
    present = np.union1d(labels, answers)
    with np.errstate(invalid="ignore"):
        assert ours.top1 == pytest.approx((answers == labels).mean(), abs=1e-6)
        assert ours.balanced_accuracy == pytest.approx(recall_of_present(labels, answers), abs=1e-6)
    assert ours.macro_f1 == pytest.approx(f1_score(labels, answers, average="macro", labels=present), abs=1e-6)
    assert ours.log_loss == pytest.approx(log_loss(labels, probs, labels=names), abs=1e-6)
    assert ours.calibration_error == pytest.approx(calibration_error(probs, labels), abs=1e-6)
    if classes > metrics.TOP:
        top5 = top_k_accuracy_score(labels, probs, k=5, labels=names)
        assert ours.top5 == pytest.approx(top5, abs=1e-6)
    precision, recall, _, support = precision_recall_fscore_support(labels, answers, labels=names, zero_division=np.nan)
    np.testing.assert_allclose(ours.per_class.precision, precision, atol=1e-6)
    np.testing.assert_allclose(ours.per_class.recall, recall, atol=1e-6)
    assert ours.per_class.count.tolist() == support.tolist()


def recall_of_present(labels: np.ndarray, answers: np.ndarray) -> float:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of answers that are no labels
        return balanced_accuracy_score(labels, answers)


def calibration_error(probs: np.ndarray, labels: np.ndarray) -> float:
    """From scikit-learn's curve, with the number of images in each bin."""
    confidence = probs.max(1)
    right, mean = calibration_curve(probs.argmax(1) == labels, confidence, n_bins=metrics.BINS)
    counts = np.histogram(np.searchsorted(np.linspace(0, 1, metrics.BINS + 1)[1:-1], confidence), range(16))[0]
    return float((counts[counts > 0] / len(labels) * abs(right - mean)).sum())


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 120), st.integers(2, 9), st.integers(1, 7))
def test_scores_do_not_depend_on_batches_or_ranks(seed, count, classes, parts):
    """To the last bit."""
    probs, labels = sample(seed, count, classes)
    whole, sums = metrics.scores(probs, labels), [Sums(classes, CPU) for _ in range(parts)]
    for number, rows in enumerate(np.array_split(np.random.default_rng(seed).permutation(count), 3 * parts)):
        logs = torch.from_numpy(probs[rows]).log()
        sums[number % parts].add(logs, torch.from_numpy(labels[rows]), torch.ones(len(rows), dtype=torch.bool))
    total = Sums(classes, CPU)
    total.values = sum(each.values for each in sums)
    ours = total.scores()
    assert ours[:-1] == whole[:-1] and ours.per_class.to_dict() == whole.per_class.to_dict()


def test_evaluation_ranks_a_tie_by_the_first_class_and_counts_certain_answers():
    scores = metrics.scores(np.array([[0.5, 0.5], [0.5, 0.5], [1, 0], [1, 0]]), np.array([0, 1, 0, 1]))
    assert scores.top1 == 0.5 and scores.per_class.recall.tolist() == [1, 0]
    assert scores.log_loss == pytest.approx(log_loss([0, 1, 0, 1], [[0.5, 0.5], [0.5, 0.5], [1, 0], [1, 0]]))


@pytest.fixture(scope="module")
def index(demo_set):
    return part_of(demo_set, 4)


def scores_of(**values: float) -> Scores:
    return Scores(0.5, 1.0, 40, balanced_accuracy=values.pop("balanced_accuracy", 0.5), **values)


def test_the_chosen_score_decides_and_a_lower_loss_is_better(index, tmp_path, monkeypatch, capsys):
    losses = iter([0.9, 0.5, 0.7, 0.4])
    monkeypatch.setattr(training, "evaluate", lambda *args: scores_of(log_loss=next(losses)))
    recipe = tiny(epochs=4, evaluation=EvaluationConfig(best="log_loss"))
    assert run(recipe, tmp_path / "run", index, index).best == 0.4
    assert checkpoint.find(tmp_path / "run" / "best").name == "step-00000008"
    monkeypatch.undo()
    longer = replace(recipe, epochs=5, evaluation=EvaluationConfig(best="macro_f1"))
    run(replace(longer, resume=replace(longer.resume, allow=("epochs",))), tmp_path / "run", index, index)
    assert "`best` was chosen by log-loss and is chosen again, by macro F1" in capsys.readouterr().err
    assert checkpoint.find(tmp_path / "run" / "best").name == "step-00000010"


def test_a_run_ends_early_and_stays_ended(index, tmp_path, monkeypatch, capsys):
    accuracies = iter([0.2, 0.6, 0.5, 0.6, 0.9])
    monkeypatch.setattr(training, "evaluate", lambda *args: scores_of(balanced_accuracy=next(accuracies)))
    recipe = tiny(epochs=9, evaluation=EvaluationConfig(best="balanced_accuracy", patience=2))
    result = run(recipe, tmp_path / "run", index, index)
    assert result.steps == 8 and result.best == 0.6
    assert checkpoint.find(tmp_path / "run" / "best").name == "step-00000004"
    assert checkpoint.find(tmp_path / "run" / "last").name == "step-00000008"
    assert "ended after epoch 3: 2 evaluations without a better balanced accuracy" in capsys.readouterr().err
    end = events(tmp_path / "run")[-1]
    assert end == end | {"event": "end", "step": 8, "best": 0.6}
    assert run(recipe, tmp_path / "run", index, index).steps == 8
    patient = replace(recipe, epochs=9, evaluation=EvaluationConfig(best="balanced_accuracy", patience=3))
    monkeypatch.setattr(training, "evaluate", lambda *args: scores_of(balanced_accuracy=0.1))
    assert run(patient, tmp_path / "run", index, index).steps == 10


def test_a_run_logs_every_score(index, tmp_path):
    run(tiny(epochs=1), tmp_path / "run", index, index)
    (logged,) = [event for event in events(tmp_path / "run") if event["event"] == "eval"]
    assert set(metrics.NAMES) <= set(logged) and len(logged["per_class"]["recall"]) == 10
    assert logged["per_class"]["count"] == [4] * 10
    assert "per_class" not in checkpoint.load(tmp_path / "run" / "last").meta["scores"]


def test_eval_and_ensemble_write_metrics(tmp_path):
    probs, labels = sample(1, 50, 4)
    names = np.array(list("abcd"))
    ids = np.array([f"{n}.jpg" for n in range(50)])
    save(Predictions(ids, names, probs.astype(np.float32), labels), tmp_path / "a.npz")
    out = call("ensemble", tmp_path / "a.npz", "--metrics", tmp_path / "m.json").stdout
    written = json.loads((tmp_path / "m.json").read_text())
    expected = metrics.scores(probs.astype(np.float32), labels)
    assert written["classes"] == list("abcd") and written["recall"] == expected.per_class.to_dict()["recall"]
    assert written["balanced_accuracy"] == expected.balanced_accuracy
    assert f"balanced accuracy {expected.balanced_accuracy:.2%}, macro F1 {expected.macro_f1:.2%}" in out
    (tmp_path / "thesis.json").write_text("{}")
    line = call("ensemble", tmp_path / "a.npz", "--metrics", tmp_path / "thesis.json", status=2).output
    assert "exists and holds no metrics" in line


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.2, 5))
def test_the_temperature_has_the_least_log_loss(seed, sharpness):
    probs, labels = sample(seed, 150, 6)
    probs = calibration.scaled(probs.astype(np.float32), 1 / sharpness)
    ours = calibration.temperature(probs, labels)

    def loss(log_temperature: float) -> float:
        logits = np.log(np.maximum(probs.astype(np.float64), np.finfo(np.float64).eps)) / np.exp(log_temperature)
        return float((torch.logsumexp(torch.from_numpy(logits), 1).numpy() - logits[range(150), labels]).mean())

    best = minimize_scalar(loss, bounds=(np.log(1e-3), np.log(1e3)), method="bounded", options={"xatol": 1e-10})
    assert loss(np.log(ours)) <= best.fun + 1e-9
    scaled = calibration.scaled(probs, ours)
    assert (scaled.argmax(1) == probs.argmax(1)).mean() > 0.99 and np.allclose(scaled.sum(1), 1, atol=1e-5)


def test_one_certain_mistake_does_not_flatten_the_others():
    """Its log probability counts as in the log-loss that is reported."""
    probs, labels = sample(3, 300, 7)
    probs = probs.astype(np.float32)
    probs[0], labels[0] = np.eye(7, dtype=np.float32)[1], 2
    after = calibration.scaled(probs, calibration.temperature(probs, labels))
    assert metrics.scores(after, labels).log_loss <= metrics.scores(probs, labels).log_loss


def test_ensemble_calibrates(tmp_path):
    for name, seed in (("val", 1), ("test", 2)):
        probs, labels = sample(seed, 400, 5)
        sharp = calibration.scaled(probs.astype(np.float32), 0.3)
        ids = np.array([f"{name}{n}.jpg" for n in range(400)])
        save(Predictions(ids, np.array(list("abcde")), sharp, labels), tmp_path / f"{name}.npz")
    before = metrics.scores(*loaded(tmp_path / "test.npz"))
    call("ensemble", tmp_path / "test.npz", "--calibrate", tmp_path / "val.npz", "--out", tmp_path / "out.npz")
    after = metrics.scores(*loaded(tmp_path / "out.npz"))
    assert after.top1 == before.top1 and after.calibration_error < before.calibration_error / 2
    line = call("ensemble", tmp_path / "test.npz", *["--calibrate", tmp_path / "val.npz"] * 2, status=2).output
    assert "--calibrate is given 2 times for 1 files" in line


def loaded(path) -> tuple[np.ndarray, np.ndarray]:
    with np.load(path) as arrays:
        return arrays["probs"], arrays["labels"]
