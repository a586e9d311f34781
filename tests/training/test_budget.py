"""Runs that end by time: the number of steps is fitted to a machine's speed, and a stopped run keeps its time."""

import itertools
import json
import math
import random
import time
from dataclasses import replace
from datetime import datetime, timedelta, timezone

import pytest
from helpers import CPU, Stop, call, events, fail_at, part_of, run, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from fasttrain import train as training
from fasttrain.checkpoints import meta
from fasttrain.config import toml
from fasttrain.config.schema import BudgetConfig, CheckpointConfig, ResumeConfig
from fasttrain.pipelines.plan import UNBOUNDED
from fasttrain.training.budget import FIRST_POINTS, Budget
from fasttrain.utils.durations import seconds_of, seconds_until
from fasttrain.utils.errors import UserError


def simulate(seconds, step_time, pause_time, *, steps_per_pause, compile_time=0.0, log_steps=20, used=0.0):
    """A run by a clock of its own. step_time: from the step to its seconds. Returns its seconds, its steps, and the
    lengths that were fitted."""
    now = 0.0
    budget = Budget(seconds, used=used, started=0.0, clock=lambda: now)
    budget.start(0)
    steps, lengths = UNBOUNDED, []
    for done in itertools.count(1):
        now += step_time(done) + (compile_time if done == 1 else 0)
        ends = done % steps_per_pause == 0
        if ends or done in FIRST_POINTS or done % log_steps == 0:
            budget.measure(done)
            steps = budget.fit(done, steps, steps_per_pause, pause_time / step_time(1) * 0.4)
        if ends or done >= steps:
            now += pause_time
            budget.paused(done)
            if done < steps:  # as in the loop, which ends here
                steps = budget.fit(done, steps, steps_per_pause)
        lengths.append(steps)
        if done >= steps:
            return now, done, lengths


@given(
    seconds=st.floats(60, 10_000),
    step=st.floats(0.02, 0.5),
    pause=st.floats(0, 5),
    steps_per_pause=st.integers(30, 1000),
    noise=st.floats(0, 0.3),
    compile_time=st.floats(0, 20),
)
@settings(max_examples=60, deadline=None)
def test_a_run_ends_on_time_whatever_the_machine_does(seconds, step, pause, steps_per_pause, noise, compile_time):
    rng = random.Random(1)
    took, steps, lengths = simulate(
        seconds,
        lambda _: step * (1 + noise * rng.uniform(-1, 1)),
        pause,
        steps_per_pause=steps_per_pause,
        compile_time=min(compile_time, 0.15 * seconds),
    )
    assert took <= seconds + 0.02 * seconds + 25 * step + pause
    assert took >= 0.95 * seconds - 25 * step - 2 * pause
    # From the first fit on, the length that the schedule follows stays near the one that it ends with.
    fitted = [length for length in lengths if length < UNBOUNDED]
    half = fitted[len(fitted) // 4]
    assert math.isclose(half, steps, rel_tol=0.35 + noise, abs_tol=30)


def test_a_machine_that_becomes_slower_still_ends_on_time():
    took, _, _ = simulate(1000, lambda done: 0.1 if done < 4000 else 0.25, 2.0, steps_per_pause=500)
    assert 970 <= took <= 1010


def test_time_that_was_used_before_counts():
    took, steps, _ = simulate(100, lambda _: 0.1, 0.0, steps_per_pause=100, used=60)
    assert 38 <= took <= 41 and 370 <= steps <= 410


@pytest.fixture(scope="module")
def index(demo_set):
    return part_of(demo_set, 10)


def test_a_run_with_a_budget_anneals_and_keeps_its_time_when_it_resumes(index, tmp_path, monkeypatch):
    recipe = tiny(budget=BudgetConfig(seconds=9.0), checkpoint=CheckpointConfig(every_steps=1))
    with monkeypatch.context() as patch, pytest.raises(Stop):
        fail_at(patch, 12)
        run(recipe, tmp_path / "run", index)
    meta = json.loads((tmp_path / "run" / "last" / "meta.json").read_text())
    assert 12 < meta["length"] < UNBOUNDED and 0 < meta["seconds"] < 9
    start = time.monotonic()
    result = run(recipe, tmp_path / "run", index, val=index)
    took = time.monotonic() - start
    assert took < 9 - meta["seconds"] + 4
    lines = events(tmp_path / "run")
    rates = [line["lr"] for line in lines if line["event"] == "train"]
    assert max(rates) > 0.5 * recipe.peak_lr and rates[-1] < 0.05 * recipe.peak_lr
    assert lines[-1]["event"] == "end" and lines[-1]["step"] == result.steps
    assert [line["step"] for line in lines if line["event"] == "eval"][-1] == result.steps
    # A finished run stays finished, and another budget is another run.
    assert run(recipe, tmp_path / "run", index, val=index).steps == result.steps
    more = tiny(budget=BudgetConfig(seconds=40.0))
    with pytest.raises(UserError, match=r"budget\.seconds was 9\.0 and is 40\.0"):
        run(more, tmp_path / "run", index)
    allowed = replace(more, resume=ResumeConfig(allow=("budget",)))
    assert not training.prepare(allowed, tmp_path, index, index, CPU, tmp_path / "run" / "last").plan.bounded


@pytest.mark.slow
@pytest.mark.parametrize("longer", [True, False])
def test_a_run_that_resumes_may_become_longer_or_shorter_and_ends_whole(index, tmp_path, monkeypatch, longer):
    """Another machine may be faster. The saved length is changed to one that does not fit the time that is left."""
    recipe = tiny(budget=BudgetConfig(seconds=15.0), checkpoint=CheckpointConfig(every_epochs=100))
    with monkeypatch.context() as patch, pytest.raises(Stop):
        fail_at(patch, 12)
        run(replace(recipe, checkpoint=CheckpointConfig(every_steps=1)), tmp_path / "run", index, val=index)
    last = tmp_path / "run" / "last"
    saved = meta.read(last)
    meta.write(last.resolve(), saved | {"length": saved["step"] + 8 if longer else 10**6, "seconds": 11.0})
    result = run(recipe, tmp_path / "run", index, val=index)
    lines = events(tmp_path / "run")
    assert result.scores is not None and lines[-1] == lines[-1] | {"event": "end", "step": result.steps}
    assert [line["step"] for line in lines if line["event"] == "eval"][-1] == result.steps
    assert meta.read(last)["step"] == result.steps and result.steps < 10**6
    if longer:
        assert result.steps > saved["step"] + 8


def test_an_annealed_run_is_over(monkeypatch):
    """The last evaluation may leave time, but the learning rate does not rise again."""
    took, _, _ = simulate(60, lambda _: 0.1, 12.0, steps_per_pause=100)
    assert took <= 61


def test_until_counts_from_now(index, tmp_path):
    until = (datetime.now().astimezone() + timedelta(seconds=8)).isoformat(timespec="seconds")
    recipe = tiny(budget=BudgetConfig(until=until))
    budget = training.budget_of(training.prepare(recipe, tmp_path, index, None, CPU, None), time.monotonic() - 5)
    assert 5 < budget.left <= 8.1


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("2h", 7200), ("90m", 5400), ("90min", 5400), ("1h30m", 5400), ("45s", 45), ("1.5h", 5400), ("1d 2h", 93600)],
)
def test_durations(text, seconds):
    assert seconds_of(text, "--budget") == seconds


@pytest.mark.parametrize("text", ["", "2", "h", "-1h", "0s", "1h2h", "two hours", "1e9h"])
def test_what_is_no_duration_is_refused(text):
    with pytest.raises(UserError, match="give a duration such as 2h, 90m, 1h30m or 45s"):
        seconds_of(text, "--budget")


def test_times():
    now = datetime(2027, 1, 31, 18, 0, tzinfo=timezone(timedelta(hours=1)))
    assert seconds_until("18:30", "--until", now) == 1800
    assert seconds_until("17:00", "--until", now) == 23 * 3600
    assert seconds_until("2027-02-01T18:00+01:00", "--until", now) == 86400
    assert seconds_until("2027-01-31T18:00+00:00", "--until", now) == 3600
    for text, message in (
        ("2027-01-31T17:00+01:00", "has passed"),
        ("9999-12-31T23:59:59-14:00", "give a time such as"),
        ("25:00", "give a time such as"),
        ("x", "give a time"),
    ):
        with pytest.raises(UserError, match=message):
            seconds_until(text, "--until", now)


def test_options_that_contradict_are_refused(demo_set, tmp_path):
    words = ["run", "--arch", "test_resnet", "--data", demo_set, "--out", tmp_path / "x", "--dry-run"]
    assert "exclude each other" in call(*words, "--epochs", "3", "--budget", "1h", status=2).output
    assert "name one --fold" in call(*words, "--until", "2040-01-01", "--folds", "3", status=2).output
    output = call(*words, "--budget", "1h", "--set", "batch_size=50", "--device", "cpu").output
    assert "as many as fit into 1 h 0 min; 10 per epoch" in output
    (tmp_path / "b.toml").write_text(toml.to_toml(tiny(budget=BudgetConfig(seconds=3600))))
    by_file = ["run", "--recipe", tmp_path / "b.toml", "--data", demo_set, "--out", tmp_path / "x", "--dry-run"]
    assert "75 = 3 epochs x 25" in call(*by_file, "--epochs", "3").output
    assert "as many as fit until 2040-01-01T00:00" in call(*by_file, "--until", "2040-01-01").output
    with pytest.raises(UserError, match="schedule must be cosine with a budget of time"):
        toml.override(tiny(), "budget.seconds=5", "optim.schedule=step")
    with pytest.raises(UserError, match="until must be a time with its zone"):
        toml.override(tiny(), "budget.until=2027-01-31T18:30")
