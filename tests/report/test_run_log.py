"""Reading logs that were cut, abandoned or written by others."""

import json

import pytest

from fasttrain.report import run_log
from fasttrain.report.run_log import curve, number, read_lines, read_log, total
from fasttrain.utils.errors import UserError


def train(step: int, loss: float) -> dict:
    return {"event": "train", "step": step, "loss": loss, "terms": {"ce": loss}}


def write(tmp_path, *rows, tail: str = ""):
    text = "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)
    (tmp_path / "log.jsonl").write_text(text + tail)
    return tmp_path


def test_abandoned_attempts_are_left_out(tmp_path):
    run = write(
        tmp_path,
        {"event": "start", "step": 0},
        train(10, 9.0),
        {"event": "start", "step": 0},  # the first command saved nothing
        train(10, 3.0),
        train(20, 2.0),
        {"event": "eval", "step": 20, "top1": 0.5},
        train(30, 99.0),
        {"event": "eval", "step": 30, "top1": 0.9},
        {"event": "not_finite", "step": 30, "steps": [{"step": 29}]},
        {"event": "resume", "step": 20, "rewinds": 1},
        train(30, 1.5),
        {"event": "stopped", "step": 40, "seconds": 5.5},
        train(50, 77.0),
        {"event": "rewind", "step": 40},  # by a later version
        train(50, 1.0),
        {"event": "end", "step": 50, "seconds": 4.5, "joules": 10},
    )
    rows = read_log(run)
    assert curve(rows, "train", "loss") == [(10, 3.0), (20, 2.0), (30, 1.5), (50, 1.0)]
    assert curve(rows, "train", "terms", "ce") == curve(rows, "train", "loss")
    assert curve(rows, "eval", "top1") == [(20, 0.5)]
    assert [row["event"] for row in rows].count("start") == 1
    every = read_lines(run).rows
    assert [row["event"] for row in every if row["event"] == "not_finite"]  # which the page lists all the same
    assert total(every, "seconds") == 10.0 and total(every, "joules") == 10.0 and total(every, "miles") is None


def test_damaged_lines_and_strange_values_are_left_out(tmp_path):
    run = write(
        tmp_path,
        '{"event": "train", "st\n',
        "[1]\n",
        '{"no event": 1}\n',
        '{"event": 7}\n',
        "[" * 100_000 + "\n",
        "\n",
        train(1, 2.0),
        {"event": "train", "step": "2", "loss": 1.0},
        {"event": "train", "step": -3, "loss": 1.0},
        {"event": "train", "step": 4, "loss": "high"},
        {"event": "train", "step": 5, "loss": None},
        '{"event": "train", "step": 6, "loss": NaN}\n',
        '{"event": "train", "step": 7, "loss": 1e400}\n',
        '{"event": "train", "step": 8, "loss": ' + "9" * 400 + "}\n",
        {"event": "train", "step": 9, "terms": ["ce"]},
        {"event": "resume", "step": "nowhere"},
        {"event": "a later version's", "step": 3},
        tail='{"event": "train", "step": 10, "lo',
    )
    lines = read_lines(run)
    assert lines.damaged == 6
    assert curve(lines.rows, "train", "loss") == [(1, 2.0)]
    assert curve(lines.rows, "train", "terms", "ce") == [(1, 2.0)]
    assert run_log.names(lines.rows, "train", "terms") == ["ce"]
    assert read_log(run) == lines.rows
    assert number(True) is None and number(1e31) is None


def test_a_log_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*log\.jsonl: No such file"):
        read_log(tmp_path)
