"""The thread that prepares a pipeline's inputs ahead."""

import threading
import time

import pytest

from fasttrain.pipelines.ahead import PrefetchedSource


def threads_alive() -> int:
    return sum(thread.name == "fasttrain-ahead" for thread in threading.enumerate())


def counting(count: int, produced: list[int]):
    def source(info):
        if info.iteration == count:
            raise StopIteration
        produced.append(info.iteration)
        return info.iteration * 10

    return source


def wait_for(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_batches_come_in_order_until_the_end():
    with PrefetchedSource(counting(7, []), depth=2) as feed:
        assert [feed(None) for _ in range(7)] == [0, 10, 20, 30, 40, 50, 60]
        for _ in range(3):  # as often as DALI asks
            with pytest.raises(StopIteration):
                feed(None)
    assert not threads_alive()


def test_it_works_ahead_by_its_depth_only():
    produced: list[int] = []
    with PrefetchedSource(counting(100, produced), depth=3) as feed:
        wait_for(lambda: len(produced) == 4)  # three in the queue and one waiting for room
        time.sleep(0.05)
        assert len(produced) == 4 and feed(None) == 0
        wait_for(lambda: len(produced) == 5)
    assert not threads_alive() and len(produced) <= 6


def test_an_error_is_raised_for_its_batch():
    def source(info):
        return 1 // (2 - info.iteration)

    with PrefetchedSource(source, depth=4) as feed:
        assert [feed(None), feed(None)] == [0, 1]
        with pytest.raises(ZeroDivisionError):
            feed(None)
