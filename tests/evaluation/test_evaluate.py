"""Evaluation during training: its counts, and its copies to the device."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import CPU
from torch import nn

from fasttrain.data.index import Index
from fasttrain.evaluation import evaluate as evaluation
from fasttrain.evaluation.evaluate import evaluate, normalize
from fasttrain.evaluation.metrics import Scores
from fasttrain.losses.base import Output
from fasttrain.pipelines.eval_loader import Crops
from fasttrain.training.log import Log

LABELS = np.arange(20) % 10
INDEX = Index(
    tuple(f"{number}.png" for number in range(20)),
    tuple(f"{number}.png" for number in range(20)),
    LABELS,
    np.full((20, 2), 4, np.int32),
    tuple("abcdefghij"),
)


class FixedLogits(nn.Module):
    """Returns the rows of logits [20, 10] in order."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits, self.position = logits, 0

    def forward(self, images):
        self.position += len(images)
        return Output(self.logits[self.position - len(images) : self.position], torch.zeros(len(images), 1))


def crops(size: int) -> list[Crops]:
    """20 images in batches of `size`; the last one may be smaller."""
    return [Crops((torch.zeros(len(n), 4, 4, 3, dtype=torch.uint8),), n) for n in torch.arange(20).split(size)]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_outputs_that_are_not_finite_are_wrong_and_counted(bad):
    scores = evaluate(FixedLogits(torch.full((20, 10), bad)), crops(8), INDEX, CPU, torch.float32)
    assert scores[:4] == (0, 0, 20, 20) and scores.log_loss is None and scores.balanced_accuracy == 0
    logits = nn.functional.one_hot(torch.from_numpy(LABELS), 10).float()
    logits[3, 7] = bad
    assert evaluate(FixedLogits(logits), crops(8), INDEX, CPU, torch.float32)[:4] == (0.95, 0.95, 20, 1)
    logits[3, 7] = 0
    assert evaluate(FixedLogits(logits), crops(8), INDEX, CPU, torch.float32)[:4] == (1, 1, 20, 0)


def test_log_reports_outputs_that_are_not_finite(tmp_path, capsys):
    log = Log(tmp_path, CPU, start_step=0, steps=9, batch_size=1)
    log.evaluation(0, 1, Scores(0.5, 1.0, 20), Scores(0.5, 1.0, 20))
    assert "not finite" not in capsys.readouterr().err
    log.evaluation(1, 2, Scores(0.5, 1.0, 20, 3), Scores(0.0, 0.0, 20, 20))
    log.close()
    messages = [line for line in capsys.readouterr().err.splitlines() if "not finite" in line]
    assert len(messages) == 1 and "3 of 20" in messages[0] and "averaged weights: 20" in messages[0]
    first, second = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    assert "not_finite" not in first and "not_finite" not in first["ema"]
    assert second["not_finite"] == 3 and second["ema"]["not_finite"] == 20


def test_only_labels_are_copied_to_the_device(monkeypatch):
    """By `to_device`, which does not wait. The mixing parameters are copied once per batch size."""
    copied = []

    def to_device(values, device):
        copied.append(list(values.shape))
        return values.to(device)

    monkeypatch.setattr(evaluation, "to_device", to_device)
    evaluation._plain.cache_clear()
    for _ in range(2):
        evaluate(FixedLogits(torch.zeros(20, 10)), crops(6), INDEX, CPU, torch.float32)
    tables = [shape for shape in copied if len(shape) == 2]
    assert copied.count([6]) == 6 and copied.count([2]) == 2 and [shape[0] for shape in tables] == [6, 2]


def test_normalize_does_not_depend_on_the_batch_size():
    pixels = torch.randint(0, 256, (5, 4, 4, 3), dtype=torch.uint8)
    expected = normalize(pixels, torch.float32)
    assert torch.equal(torch.cat([normalize(part, torch.float32) for part in pixels.split(2)]), expected)


def test_the_shares_of_all_ranks_are_joined(monkeypatch):
    ranks = replace(CPU, world=2)
    other = {32: np.ones((1, 2), np.float32), 64: np.zeros((1, 2), np.float32)}
    monkeypatch.setattr(type(ranks), "gather", lambda self, own: [own, other])
    joined = evaluation._of_all_ranks({32: np.zeros((2, 2), np.float32), 64: np.ones((2, 2), np.float32)}, ranks)
    assert joined[32].tolist() == [[0, 0], [0, 0], [1, 1]] and joined[64].tolist() == [[1, 1], [1, 1], [0, 0]]
