"""Nothing holds the loop up: no garbage collection inside of epochs, and batches that are there before they are due."""

import gc
import itertools
import time
from dataclasses import replace

import pytest
import torch
from helpers import part_of, run, tiny

from fasttrain import train as training
from fasttrain.config.schema import CheckpointConfig, MachineConfig
from fasttrain.pipelines import train_loader as pipeline
from fasttrain.training.guard import Guard


@pytest.fixture(scope="module")
def index(demo_set):
    """60 images: three steps an epoch of 20."""
    return part_of(demo_set, 6)


def test_the_next_epochs_images_are_on_their_way_during_evaluation(index, tmp_path, monkeypatch):
    """When an epoch's evaluation begins, the first batch of the next epoch has been asked for."""
    asked: list[int] = []
    before_evaluation = []
    position = pipeline.Source.position

    def asking(source, batch):
        step, micro = position(source, batch)
        asked.append(step)
        return step, micro

    honest = training.evaluate

    def evaluate(*args):
        time.sleep(0.2)  # DALI asks in a thread of its own
        before_evaluation.append(max(asked))
        return honest(*args)

    monkeypatch.setattr(pipeline.Source, "position", asking)
    monkeypatch.setattr(training, "evaluate", evaluate)
    run(tiny(epochs=3), tmp_path / "run", index, index)
    assert before_evaluation[0] >= 3 and before_evaluation[1] >= 6


def test_one_stream_runs_through_all_epochs(index, tmp_path, monkeypatch):
    """Its end comes with the run's, not with an epoch's: nothing is built anew in between."""
    made = []
    build = pipeline.build
    monkeypatch.setattr(pipeline, "build", lambda *args: made.append(1) or build(*args))
    run(tiny(epochs=4), tmp_path / "run", index, index)
    assert len(made) == 1


def test_garbage_is_collected_between_epochs_only(index, tmp_path, monkeypatch):
    collections = []
    where = ["before"]

    def note(phase, info):
        if phase == "start":
            collections.append((where[0], info["generation"]))

    honest = Guard.check

    numbers = itertools.count()

    def check(guard):
        where[0] = f"step {next(numbers)}"
        assert not gc.isenabled()
        [[] for _ in range(5000)]  # enough to set a collection off, were it on
        return honest(guard)

    monkeypatch.setattr(Guard, "check", check)
    gc.callbacks.append(note)
    try:
        run(tiny(epochs=3), tmp_path / "run", index)
    finally:
        gc.callbacks.remove(note)
    inside = [place for place, _ in collections if place.startswith("step")]
    assert set(inside) == {"step 2", "step 5", "step 8"}
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_the_collector_is_on_again_after_a_failure(index, tmp_path, monkeypatch):
    def fail(*args):
        raise ZeroDivisionError

    monkeypatch.setattr(Guard, "check", fail)
    with pytest.raises(ZeroDivisionError):
        run(tiny(epochs=1), tmp_path / "run", index)
    assert gc.isenabled()


def test_the_loop_asks_the_device_for_nothing_between_log_points(index, tmp_path, monkeypatch):
    """Every way of torch's to read a tensor's value on the host, counted; on a GPU each would be a wait."""
    reads = []
    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "numpy"):
        honest = getattr(torch.Tensor, name)

        def counted(self, *args, honest=honest, name=name, **kwargs):
            if self.is_floating_point():
                reads.append(name)
            return honest(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counted)
    counts = []
    for steps in (1, 3):  # log points an epoch: three, one
        reads.clear()
        machine = MachineConfig(device="cpu", compile="off", log_steps=steps, workers=2)
        run(
            replace(tiny(epochs=2, machine=machine), checkpoint=CheckpointConfig(every_epochs=2)),
            tmp_path / str(steps),
            index,
        )
        counts.append(len(reads))
    # A log point reads the meter's table, and the sums over all ranks; what a save and the end read is in both.
    assert counts[0] - counts[1] == 4 * 2
