"""The inputs of a DALI graph by name, so that neither side has to know their order."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from nvidia.dali import fn, types


class Input(NamedTuple):
    """The name of DALI's type, the number of dimensions per image, and DALI's layout of an input of the graph."""

    dtype: str
    ndim: int
    layout: str = ""


def read_inputs(source: Callable[[types.BatchInfo], Any], inputs: Mapping[str, Input]) -> dict[str, Any]:
    """The nodes of a graph's inputs, by name. source: returns the values of a batch, in the order of `inputs`."""
    nodes = fn.external_source(
        source=source,
        num_outputs=len(inputs),
        batch=True,
        batch_info=True,
        dtype=[getattr(types, value.dtype) for value in inputs.values()],
        ndim=[value.ndim for value in inputs.values()],
        layout=[value.layout for value in inputs.values()],
    )
    return {name: nodes[position] for position, name in enumerate(inputs)}
