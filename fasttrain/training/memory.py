"""Memory while a run trains: Python's garbage collector, and what to say when a GPU's memory is full."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fasttrain.pipelines.plan import Plan
from fasttrain.utils.errors import RunError


@contextmanager
def gc_paused() -> Iterator[None]:
    """Pause Python's garbage collector and exempt what exists now. Its pauses come at any moment, and with several
    GPUs every rank waits for the slowest."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()


@contextmanager
def explain_out_of_memory(plan: Plan) -> Iterator[None]:
    """Turn torch's out-of-memory error into the RunError of `out_of_memory`."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise out_of_memory(plan) from None


def out_of_memory(plan: Plan) -> RunError:
    """An error that names the micro-batch in use and the next one to try."""
    used = plan.micro_batch
    smaller = next((n for n in range(used // 2, 0, -1) if used % n == 0), None)
    advice = f"try --set micro_batch={smaller}" if smaller else "set a smaller --image-size"
    return RunError(f"CUDA is out of memory with micro_batch={used} at {plan.image_size} pixels; {advice}")
