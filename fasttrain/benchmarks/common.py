"""What the benchmarks share. Contenders take turns, round after round, in one run; results are medians with their
spread, in a table, as JSON and as a picture."""

import datetime
import fnmatch
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fasttrain.utils import versions
from fasttrain.utils.errors import UserError
from fasttrain.utils.files import read_json, replacing
from fasttrain.utils.text import printable

OWN = "fasttrain"  # the contender that the others are compared with


@dataclass(frozen=True)
class Row:
    """One contender in one case. seconds: the median over n rounds of what one call takes, with least and most.
    images: that one call handles (0: it is not about images). details: what else is known, plain values by name."""

    work: str
    case: str
    contender: str
    seconds: float
    least: float
    most: float
    n: int
    images: int = 0
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def images_per_s(self) -> float:
        return self.images / self.seconds

    def plain(self) -> dict[str, Any]:
        """All of it in one level, as JSON has it."""
        told = {key: value for key, value in vars(self).items() if key != "details"}
        return told | ({"images_per_s": self.images_per_s} if self.images else {}) | dict(self.details)


def chosen(names: Iterable[str], only: Sequence[str], known: Iterable[str] = ()) -> list[str]:
    """The names that a pattern of `only` matches, in their order; all where there is no pattern. UserError where a
    pattern matches none of them, nor any other name that is `known`."""
    names = list(names)
    every = list(dict.fromkeys([*names, *known]))
    for pattern in only:
        if not fnmatch.filter(every, pattern):
            raise UserError(f"--only {printable(pattern)}: no contender; there are {', '.join(map(repr, every))}")
    return [name for name in names if not only or any(fnmatch.fnmatchcase(name, pattern) for pattern in only)]


def compared_with_best(rows: list[Row], peers: str, left_out: Mapping[str, str] | None = None) -> list[Row]:
    """The rows of a case, the project's own with the fastest peer's name (`best_peer`, one of those that match the
    pattern `peers`), how many times as fast as that it is (`x_best_peer`), and the peers that failed (`left_out`)."""
    failed = "; ".join(f"{name}: {why}" for name, why in (left_out or {}).items())
    more = {"left_out": failed} if failed else {}
    found = [row for row in rows if fnmatch.fnmatchcase(row.contender, peers)]
    best = min(found, key=lambda row: row.seconds) if found else None

    def compared(row: Row) -> Row:
        ratio = {"best_peer": best.contender, "x_best_peer": best.seconds / row.seconds} if best else {}
        return replace(row, details={**row.details, **ratio, **more})

    return [compared(row) if row.contender == OWN else row for row in rows]


@dataclass
class Race:
    """The turns of a case so far. timed: seconds per call of each contender. left_out: why a peer failed, by name."""

    timed: dict[str, list[float]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def race(case: str, makers: Mapping[str, Callable[[], Callable[[], float]]], rounds: int) -> Iterator[Race]:
    """Run the contenders' turns, and yield what is known after each of them: what ends a benchmark early leaves that.

    makers: makes what runs a contender's turn and gives its seconds per call; it is called for the first turn. Each
    contender has one turn in every round, and every other round goes the other way, so that none always follows the
    same one. A peer that fails (out of memory, say) is reported and left out; the project's own failures are raised.
    Progress goes to stderr.
    """
    found = Race()
    turns: dict[str, Callable[[], float]] = {}
    with tqdm(total=rounds * len(makers), desc=case, unit="turn", leave=False, disable=None) as bar:
        for number in range(rounds):
            for name in list(makers)[:: -1 if number % 2 else 1]:
                bar.update()
                if name in found.left_out:
                    continue
                bar.set_postfix_str(name)
                try:
                    if name not in turns:
                        turns[name] = makers[name]()
                    spent = turns[name]()
                except RuntimeError as error:
                    if name.startswith(OWN):
                        raise
                    found.left_out[name] = str(error).partition("\n")[0]
                    tqdm.write(f"{case}: {name} is left out: {found.left_out[name]}", file=sys.stderr)
                    found.timed.pop(name, None)
                    turns.pop(name, None)
                    continue
                found.timed.setdefault(name, []).append(spent)
                yield found


def row(work: str, case: str, contender: str, times: list[float], images: int = 0, **details: Any) -> Row:
    """The Row of a contender's times in seconds a call."""
    return Row(work, case, contender, statistics.median(times), min(times), max(times), len(times), images, details)


def seconds(function: Callable[[], Any], device: torch.device, calls: int) -> float:
    """Seconds a call takes on the device, over so many in a row. On a GPU by events before and after all of them; the
    calls themselves are not waited for."""
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(calls):
            function()
        return (time.perf_counter() - start) / calls
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    before.record()
    for _ in range(calls):
        function()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1000 / calls


def wall(function: Callable[[], Any], device: torch.device) -> float:
    """Seconds from an idle device to an idle device, for work that other threads and streams do as well."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait for all that a GPU has to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def require_even(batch_sizes: Iterable[int]) -> None:
    """UserError where timm's Mixup does not take a batch."""
    for batch in batch_sizes:
        if batch % 2:
            raise UserError(f"timm's Mixup, one of the contenders, takes even batches only, not {batch}")


def table(rows: list[Row]) -> str:
    """Markdown, a line a row, with how many times the project's own time each contender takes."""
    names = list(dict.fromkeys(name for row in rows for name in row.details))
    rates = any(row.images for row in rows)
    head = ["work", "case", "contender", "ms (least … most)", *(["img/s"] if rates else []), f"x {OWN}", *names]
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    own = {(row.work, row.case): row.seconds for row in rows if row.contender == OWN}
    for each in rows:
        spread = f"{each.seconds * 1e3:.3f} ({each.least * 1e3:.3f} … {each.most * 1e3:.3f})"
        rate = [f"{each.images_per_s:.0f}" if each.images else ""] if rates else []
        base = own.get((each.work, each.case))
        ratio = f"{each.seconds / base:.2f}" if base else ""
        told = (_told(each.details.get(name)) for name in names)
        lines.append(f"| {' | '.join([each.work, each.case, each.contender, spread, *rate, ratio, *told])} |")
    return "\n".join(lines)


def _told(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def about(device: torch.device) -> dict[str, Any]:
    """What figures need beside them: date, commit (of a checkout), device, its clocks, threads and versions."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu(),
        "clocks_mhz": clocks(device),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()} | versions.all_installed(),
    }


def _commit() -> str | None:
    """The commit of the checkout that this code lies in, with a + where the code has changed since. None elsewhere."""
    here = Path(__file__).resolve().parents[2]
    code = ["--untracked-files=no", "--", "fasttrain", "pipelines", "kernels"]
    try:
        told, changed = (
            subprocess.run(
                ["git", "-C", str(here), *command], capture_output=True, text=True, timeout=20, check=True
            ).stdout.strip()
            for command in (["rev-parse", "--short", "--show-toplevel", "HEAD"], ["status", "--porcelain", *code])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    top, commit = told.splitlines()
    return commit + "+" * bool(changed) if Path(top) == here else None


def clocks(device: torch.device) -> dict[str, float] | None:
    """Clocks as they are now, in MHz: of a GPU `sm` and `memory`, and at most `sm_max`; of a CPU `cpu`, the fastest
    core's. None where the system does not tell."""
    try:
        if device.type != "cuda":
            found = [float(value) for value in _cpuinfo("cpu MHz")]
            return {"cpu": max(found)} if found else None
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        query = ["nvidia-smi", f"--id=GPU-{uuid}", "--format=csv,noheader,nounits"]
        told = subprocess.run(
            [*query, "--query-gpu=clocks.sm,clocks.mem,clocks.max.sm"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
        values = [float(value) for value in told.stdout.split(",")]
        return dict(zip(("sm", "memory", "sm_max"), values, strict=True))
    except (OSError, subprocess.SubprocessError, ValueError, AttributeError):
        return None


def _cpu() -> str:
    return next(iter(_cpuinfo("model name")), f"{platform.machine()} CPU")


def _cpuinfo(key: str) -> list[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    return [line.partition(":")[2].strip() for line in lines if line.startswith(key)]


def check_overwritable(path: Path) -> None:
    """UserError unless `write_json` can write to `path` without losing what is no benchmark's."""
    if not path.parent.is_dir():
        raise UserError(f"cannot write {printable(path)}: there is no folder {printable(path.parent)}")
    if os.path.lexists(path) and not _is_result(path):
        raise UserError(f"{printable(path)} is there and holds no figures of a benchmark; name another file")


def _is_result(path: Path) -> bool:
    try:
        told = read_json(path)
    except (OSError, ValueError):
        return False
    return isinstance(told, dict) and {"date", "device", "versions", "settings", "rows"} <= told.keys()


def write_json(path: Path, device: torch.device, rows: list[Row], settings: Mapping[str, Any]) -> None:
    """All figures, and `about`. settings: what the benchmark was asked to do, plain values by name. RunError where
    the disk does not take it."""
    write_figures(path, device, [row.plain() for row in rows], settings)


def write_figures(
    path: Path, device: torch.device, rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]
) -> None:
    """As `write_json`, of rows that are plain values."""
    content = {**about(device), "settings": dict(settings), "rows": rows}
    with replacing(path) as aside:
        aside.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def require_matplotlib() -> None:
    """UserError where `write_plot` would miss it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install matplotlib") from None


def write_plot(path: Path, rows: list[Row], software: str) -> None:
    """Bars, a panel a case: images a second, or milliseconds where a row is not about images; software: who made it,
    as the PNG says. RunError where the disk does not take it."""
    from matplotlib.figure import Figure

    cases: dict[tuple[str, str], list[Row]] = {}
    for each in rows:
        cases.setdefault((each.work, each.case), []).insert(0, each)
    bars = max(len(inside) for inside in cases.values())
    figure = Figure(figsize=(8, (0.5 + 0.24 * bars) * len(cases)), layout="constrained")
    for axes, ((work, case), inside) in zip(
        figure.subplots(len(cases), squeeze=False)[:, 0], cases.items(), strict=True
    ):
        by_rate = all(each.images for each in inside)
        values = [each.images_per_s if by_rate else each.seconds * 1e3 for each in inside]
        drawn = axes.barh([each.contender for each in inside], values)
        unit = "img/s" if by_rate else "ms"
        axes.bar_label(
            drawn,
            [f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}" for value in values],
            padding=3,
            fontsize=8,
        )
        axes.margins(x=0.2)
        axes.set_title(f"{work} {case}", loc="left", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.xaxis.set_visible(False)
    with replacing(path) as aside:
        figure.savefig(aside, format="png", metadata={"Software": software})
