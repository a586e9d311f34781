"""The inputs of a DALI graph by name, so that neither side has to know their order."""

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from nvidia.dali import fn, types


class Input(NamedTuple):
    """The name of DALI's type, the number of dimensions per image, and DALI's layout of an input of the graph."""

    dtype: str
    ndim: int
    layout: str = ""


# Batches whose values DALI may still read: those that it has prefetched, the one it computes, and some to spare.
_KEPT_BATCHES = 8


def read_inputs(
    source: Callable[[types.BatchInfo], Any], inputs: Mapping[str, Input], *, copy: bool = True
) -> dict[str, Any]:
    """The nodes of a graph's inputs, by name.

    source: returns the values of a batch, in the order of `inputs`. copy: let DALI copy the values; if not, it reads
    them in place, on its own threads, and they must not change.
    """
    kept: deque[Any] = deque(maxlen=_KEPT_BATCHES)

    def keep(info: types.BatchInfo) -> Any:
        kept.append(source(info))
        return kept[-1]

    nodes = fn.external_source(
        source=source if copy else keep,
        no_copy=not copy,
        num_outputs=len(inputs),
        batch=True,
        batch_info=True,
        dtype=[getattr(types, value.dtype) for value in inputs.values()],
        ndim=[value.ndim for value in inputs.values()],
        layout=[value.layout for value in inputs.values()],
    )
    return {name: nodes[position] for position, name in enumerate(inputs)}
