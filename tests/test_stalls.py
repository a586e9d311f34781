"""Nothing blocks the loop: garbage collection, prefetched batches. test_train.py counts waits for the device."""

import gc
import itertools
import time

import pytest
from helpers import part_of, run, tiny

from fasttrain import train as training
from fasttrain.pipelines import train_loader as pipeline
from fasttrain.training.guard import Guard


@pytest.fixture(scope="module")
def index(demo_set):
    """60 images: three steps of 20 per epoch."""
    return part_of(demo_set, 6)


def test_the_next_epoch_is_prefetched_during_evaluation(index, tmp_path, monkeypatch):
    """When the evaluation after an epoch begins, the first batch of the next epoch has been requested."""
    requested: list[int] = []
    before_evaluation = []
    position = pipeline.Source.position

    def recorded_position(source, batch):
        step, micro = position(source, batch)
        requested.append(step)
        return step, micro

    original = training.evaluate

    def evaluate(*args):
        time.sleep(0.2)  # DALI requests batches in its own thread
        before_evaluation.append(max(requested))
        return original(*args)

    monkeypatch.setattr(pipeline.Source, "position", recorded_position)
    monkeypatch.setattr(training, "evaluate", evaluate)
    run(tiny(epochs=3), tmp_path / "run", index, index)
    assert before_evaluation[0] >= 3 and before_evaluation[1] >= 6


def test_one_pipeline_serves_all_epochs(index, tmp_path, monkeypatch):
    """It ends with the run, so no pipeline is built between epochs."""
    calls = []
    build = pipeline.build
    monkeypatch.setattr(pipeline, "build", lambda *args: calls.append(1) or build(*args))
    run(tiny(epochs=4), tmp_path / "run", index, index)
    assert len(calls) == 1


def test_garbage_is_collected_only_between_epochs(index, tmp_path, monkeypatch):
    collections = []
    place = ["before"]

    def record(phase, info):
        if phase == "start":
            collections.append((place[0], info["generation"]))

    original = Guard.check
    steps = itertools.count()

    def check(guard):
        place[0] = f"step {next(steps)}"
        assert not gc.isenabled()
        [[] for _ in range(5000)]  # would start a collection if the collector were on
        return original(guard)

    monkeypatch.setattr(Guard, "check", check)
    gc.callbacks.append(record)
    try:
        run(tiny(epochs=3), tmp_path / "run", index)
    finally:
        gc.callbacks.remove(record)
    in_steps = {name for name, _ in collections if name.startswith("step")}
    assert in_steps == {"step 2", "step 5", "step 8"}
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_the_collector_is_back_on_after_a_failure(index, tmp_path, monkeypatch):
    def fail(*args):
        raise ZeroDivisionError

    monkeypatch.setattr(Guard, "check", fail)
    with pytest.raises(ZeroDivisionError):
        run(tiny(epochs=1), tmp_path / "run", index)
    assert gc.isenabled()
