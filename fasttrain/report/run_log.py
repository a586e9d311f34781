"""Reads a run's log.jsonl, which is untrusted: lines may be cut, and steps may have been done twice."""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fasttrain.utils.errors import UserError
from fasttrain.utils.files import opened
from fasttrain.utils.text import printable

LOG = "log.jsonl"
Row = dict[str, Any]
_LINE_BYTES = 16 << 20  # longer lines are no events
_LARGEST = 1e30  # of numbers that are drawn


class Lines(NamedTuple):
    """rows: all events, in their order. damaged: the number of lines that are not events."""

    rows: list[Row]
    damaged: int


def read_log(run: Path) -> list[Row]:
    """The events of a run's log, without those of abandoned attempts; see `current`. Raises UserError where the log
    cannot be read. Lines that are no events are left out."""
    return current(read_lines(run).rows)


def read_lines(run: Path) -> Lines:
    """All events of a run's log. Raises UserError like `read_log`."""
    path, rows, damaged = run / LOG, [], 0
    try:
        with opened(path) as file:
            for line in file:
                row = _event(line)
                damaged += row is None and not line.isspace()
                rows += [row] if row is not None else []
    except OSError as error:
        raise UserError(f"cannot read {printable(path)}: {error.strerror}") from None
    return Lines(rows, damaged)


def _event(line: bytes) -> Row | None:
    """The event in a line, or None."""
    try:
        row = json.loads(line) if len(line) <= _LINE_BYTES else None
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and isinstance(row.get("event"), str) else None


def starts_attempt(row: Row) -> bool:
    """Whether an event is the start of a command, or a return to an earlier checkpoint."""
    return row["event"] in ("start", "resume", "rewind") and step_of(row) is not None


def current(rows: Iterable[Row]) -> list[Row]:
    """The events that belong to the run as it is: where it went back to an earlier step, by a resume or a rewind, what
    was logged after that step before is left out."""
    kept: list[Row] = []
    for row in rows:
        if starts_attempt(row):
            first = step_of(row) or 0
            kept = [each for each in kept if (step_of(each) or 0) <= first] if first else []
        kept.append(row)
    return kept


def step_of(row: Row) -> int | None:
    """The number of steps that were done at an event, or None."""
    step = row.get("step")
    return step if type(step) is int and 0 <= step < 2**53 else None


def number(value: Any) -> float | None:
    """A value of a log as a number that can be drawn; None where it is none."""
    if type(value) not in (int, float) or not -_LARGEST < value < _LARGEST:  # false for NaN, too
        return None
    return float(value)


def curve(rows: Sequence[Row], event: str, *keys: str) -> list[tuple[int, float]]:
    """(step, value) of a key in a kind of event, in the order of the steps; the last value of a step counts. keys: the
    value's, and before it those of the tables that hold it."""
    points: dict[int, float] = {}
    for row in rows:
        value: Any = row if row["event"] == event else None
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        step, found = step_of(row), number(value)
        if step is not None and found is not None:
            points[step] = found
    return sorted(points.items())


def names(rows: Sequence[Row], event: str, table: str) -> list[str]:
    """The keys of a table in a kind of event, in the order in which they first appear."""
    found: dict[str, None] = {}
    for row in rows:
        values = row.get(table) if row["event"] == event else None
        found |= dict.fromkeys(values if isinstance(values, dict) else ())
    return list(found)


def total(rows: Sequence[Row], key: str) -> float | None:
    """The sum of what a run's commands have used; None where none has logged it. A command that was killed has not."""
    values = [number(row.get(key)) for row in rows if row["event"] in ("end", "stopped")]
    known = [value for value in values if value is not None and value >= 0]
    return math.fsum(known) if known else None
