"""The values of each step, kept on the device until a log point reads them."""

import math
from collections import deque
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fasttrain.distributed.ranks import Ranks


class Reading(NamedTuple):
    """What a log point reads.

    means: by name, over all ranks and all good steps since the last reading. failures: values by name of the failed
    steps since then, by step from 0. streak: how many steps in a row have failed up to now. streak_values: the values
    of those of them that this process has trained.
    """

    means: dict[str, float]
    failures: dict[int, dict[str, Any]]
    streak: int
    streak_values: dict[int, dict[str, Any]]


class Row(NamedTuple):
    """One step's values. values: float32 scalars on the device, one per column. shares: for each value, the share of
    the step's micro-batches that had it."""

    values: list[Tensor]
    shares: list[float]


class Meter:
    """Collects each step's loss, its terms, their stats and the gradient norm.

    A step writes a row of a table on the device and does not wait; a reading copies the rows to the host. rows: the
    table's size, at least the number of steps between two readings.
    """

    def __init__(self, names: list[str], device: torch.device, rows: int) -> None:
        self.names = [*names, "grad_norm"]
        self.device = device
        self._zero = torch.zeros((), device=device)
        self._table = torch.zeros(rows, len(self.names) + 1, device=device)  # last column: whether the step failed
        self._rows = self._table.unbind()
        self._written = 0
        self._unread: deque[tuple[int, list[float]]] = deque(maxlen=rows)  # (step, shares) of each row
        self._begin_step()
        self.streak = 0  # as of the last row that was copied to the host
        self._new_failures: dict[int, dict[str, Any]] = {}
        self._failure_streak: dict[int, dict[str, Any]] = {}
        self._clear_sums()

    def _begin_step(self) -> None:
        self.values: list[Tensor] = []
        self._shares = [0.0] * (len(self.names) - 1)

    def _clear_sums(self) -> None:
        self.sums, self.shares = [0.0] * len(self.names), [0.0] * len(self.names)

    def add(self, metrics: dict[str, Tensor], share: float) -> None:
        """Add one micro-batch's values (float32 scalars on the device), which is `share` of its step."""
        names = self.names[:-1]
        values = [metrics[name].detach() if name in metrics else self._zero for name in names]
        if share != 1:
            values = list(torch._foreach_mul(values, share))
        self.values = list(torch._foreach_add(self.values, values)) if self.values else values
        self._shares = [total + share * (name in metrics) for total, name in zip(self._shares, names, strict=True)]

    def row(self, norm: Tensor, failed: Tensor) -> Row:
        """The step's row: everything added since the last row, and the guard's verdict. A step whose norm is not finite
        counts in no mean."""
        row = Row([*self.values, norm, failed], [*self._shares, 1.0])
        self._begin_step()
        return row

    def commit(self, step: int, row: Row) -> None:
        """Write the row of step `step`, counted from 0, to the table: one kernel launch."""
        torch.stack(row.values, out=self._rows[self._written % len(self._rows)])
        self._unread.append((step, row.shares))
        self._written += 1

    def _copy_to_host(self) -> None:
        """Add all unread rows to the sums; waits for the device."""
        table = self._table.tolist()
        first = self._written - len(self._unread)
        for row, (step, shares) in enumerate(self._unread, first):
            *values, failed = table[row % len(table)]
            if math.isfinite(values[-1]):
                self.sums = [total + value for total, value in zip(self.sums, values, strict=True)]
                self.shares = [total + share for total, share in zip(self.shares, shares, strict=True)]
            if failed:
                self.streak += 1
                by_name = dict(zip(self.names, map(json_number, values), strict=True))
                self._new_failures[step] = self._failure_streak[step] = by_name
            else:
                self.streak, self._failure_streak = 0, {}
        self._unread.clear()

    def state(self) -> dict[str, list[float]]:
        """{name: [sum, share]} since the last reading, as Python numbers; waits for the device."""
        self._copy_to_host()
        return {name: [total, share] for name, total, share in zip(self.names, self.sums, self.shares, strict=True)}

    def restore(self, states: list[dict[str, list[float]]], streak: int, ranks: Ranks) -> None:
        """Continue from the ranks' saved states. With another number of ranks, each takes the mean of all states."""
        self.streak = streak
        chosen = [states[ranks.rank]] if len(states) == ranks.world else states
        if chosen:
            sums = [[state.get(name, [0.0, 0.0]) for name in self.names] for state in chosen]
            self.sums, self.shares = np.array(sums).mean(0).T.tolist()

    def read(self, ranks: Ranks) -> Reading:
        """Read everything since the last reading, and start again. Waits for the device and the other ranks."""
        self._copy_to_host()
        own = torch.tensor([self.sums, self.shares], dtype=torch.float64, device=self.device)
        means = {
            name: total / share
            for name, total, share in zip(self.names, *ranks.sum(own).tolist(), strict=True)
            if share
        }
        failures, self._new_failures = self._new_failures, {}
        self._clear_sums()
        finite = {name: mean for name, mean in means.items() if math.isfinite(mean)}
        return Reading(finite, failures, self.streak, dict(self._failure_streak))


def json_number(value: float) -> float | str:
    """A number as JSON can hold it: nan and infinities as text."""
    return value if math.isfinite(value) else str(value)
