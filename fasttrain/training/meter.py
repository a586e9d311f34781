"""A run's values, which wait on the device until a log point reads them."""

import math
from collections import deque
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fasttrain.distributed.ranks import Ranks


class Reading(NamedTuple):
    """What a meter says at a log point. means: by name, over all ranks and over the good steps since the last reading
    that had it. failed: values by name of the steps since then that failed, by their number from 0. streak: how many
    steps in a row have failed up to now; unbroken: values of those of them that this process has taken."""

    means: dict[str, float]
    failed: dict[int, dict[str, Any]]
    streak: int
    unbroken: dict[int, dict[str, Any]]


class Row(NamedTuple):
    """What a step tells, before it is in the table: float32 scalars on the device, one a column, and how much of the
    step each value is of."""

    values: list[Tensor]
    shares: list[float]


class Meter:
    """What steps tell: their loss, its terms and what those tell, and the gradient's norm. A step writes a row of a
    table on the device and waits for nothing; reading brings the rows over. kept: how many rows there are, at least as
    many as steps between two readings."""

    def __init__(self, names: list[str], device: torch.device, kept: int) -> None:
        self.names = [*names, "grad_norm"]
        self.device = device
        self._zero = torch.zeros((), device=device)
        self._table = torch.zeros(kept, len(self.names) + 1, device=device)  # the last column: whether the step failed
        self._rows = self._table.unbind()
        self._written = 0
        self._unread: deque[tuple[int, list[float]]] = deque(maxlen=kept)  # a step of each row, and the values' shares
        self._begin()
        self.streak = 0  # as of the last row that was brought over
        self._new_failures: dict[int, dict[str, Any]] = {}
        self._failure_streak: dict[int, dict[str, Any]] = {}
        self._clear()

    def _begin(self) -> None:
        self.values: list[Tensor] = []  # of the step under way
        self._shares = [0.0] * (len(self.names) - 1)  # how much of that step each value is of

    def _clear(self) -> None:
        self.sums, self.shares = [0.0] * len(self.names), [0.0] * len(self.names)

    def add(self, terms: dict[str, Tensor], share: float) -> None:
        """Add one micro-batch's terms (float32 scalars on the device), the micro-batch being `share` of its step."""
        names = self.names[:-1]
        values = [terms[name].detach() if name in terms else self._zero for name in names]
        if share != 1:
            values = list(torch._foreach_mul(values, share))
        self.values = list(torch._foreach_add(self.values, values)) if self.values else values
        self._shares = [had + share * (name in terms) for had, name in zip(self._shares, names, strict=True)]

    def row(self, norm: Tensor, failed: Tensor) -> Row:
        """What was added since the last one, and what the guard gave. Its values do not count in any mean unless the
        norm is finite."""
        made = Row([*self.values, norm, failed], [*self._shares, 1.0])
        self._begin()
        return made

    def commit(self, step: int, row: Row) -> None:
        """The step (from 0) is done: one launch."""
        torch.stack(row.values, out=self._rows[self._written % len(self._rows)])
        self._unread.append((step, row.shares))
        self._written += 1

    def _bring(self) -> None:
        """Take up all rows that were not brought over yet; waits for the device."""
        table = self._table.tolist()
        first = self._written - len(self._unread)
        for row, (step, shares) in enumerate(self._unread, first):
            *values, failed = table[row % len(table)]
            if math.isfinite(values[-1]):
                self.sums = [total + value for total, value in zip(self.sums, values, strict=True)]
                self.shares = [total + share for total, share in zip(self.shares, shares, strict=True)]
            if failed:
                self.streak += 1
                told = dict(zip(self.names, map(plain, values), strict=True))
                self._new_failures[step] = self._failure_streak[step] = told
            else:
                self.streak, self._failure_streak = 0, {}
        self._unread.clear()

    def state(self) -> dict[str, list[float]]:
        """{name: [sum, share]} since the last reading, as plain numbers; waits for the device."""
        self._bring()
        return {name: list(each) for name, *each in zip(self.names, self.sums, self.shares, strict=True)}

    def restore(self, states: list[dict[str, list[float]]], streak: int, ranks: Ranks) -> None:
        """Go on from the states of a run's ranks: its own, or their mean where there were more or fewer of them."""
        self.streak = streak
        own = [states[ranks.rank]] if len(states) == ranks.world else states
        if own:
            sums = [[state.get(name, [0.0, 0.0]) for name in self.names] for state in own]
            self.sums, self.shares = np.array(sums).mean(0).T.tolist()

    def read(self, ranks: Ranks) -> Reading:
        """What there is to say since the last reading; starts afresh. Waits for the device and the other ranks."""
        self._bring()
        own = torch.tensor([self.sums, self.shares], dtype=torch.float64, device=self.device)
        means = {
            n: total / share for n, total, share in zip(self.names, *ranks.sum(own).tolist(), strict=True) if share
        }
        fresh, self._new_failures = self._new_failures, {}
        self._clear()
        finite = {name: each for name, each in means.items() if math.isfinite(each)}
        return Reading(finite, fresh, self.streak, dict(self._failure_streak))


def plain(value: float) -> float | str:
    """A number as JSON has it, which knows neither nan nor infinities: those as text."""
    return value if math.isfinite(value) else str(value)
