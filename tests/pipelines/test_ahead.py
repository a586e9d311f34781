"""The thread that works ahead of a pipeline."""

import threading
import time

import pytest

from fasttrain.pipelines.ahead import Ahead


def alive() -> int:
    return sum(thread.name == "fasttrain-ahead" for thread in threading.enumerate())


def counting(most: int, made: list[int]):
    def source(info):
        if info.iteration == most:
            raise StopIteration
        made.append(info.iteration)
        return info.iteration * 10

    return source


def wait_for(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_batches_come_in_order_and_then_it_ends():
    with Ahead(counting(7, []), depth=2) as feed:
        assert [feed(None) for _ in range(7)] == [0, 10, 20, 30, 40, 50, 60]
        for _ in range(3):  # as often as DALI asks
            with pytest.raises(StopIteration):
                feed(None)
    assert not alive()


def test_it_is_ahead_by_its_depth_and_no_further():
    made: list[int] = []
    with Ahead(counting(100, made), depth=3) as feed:
        wait_for(lambda: len(made) == 4)  # three wait, and one is in hand
        time.sleep(0.05)
        assert len(made) == 4 and feed(None) == 0
        wait_for(lambda: len(made) == 5)
    assert not alive() and len(made) <= 6


def test_an_error_comes_with_the_batch_that_has_it():
    def source(info):
        return 1 // (2 - info.iteration)

    with Ahead(source, depth=4) as feed:
        assert [feed(None), feed(None)] == [0, 1]
        with pytest.raises(ZeroDivisionError):
            feed(None)
