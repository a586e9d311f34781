"""Code that the benchmarks share. All contenders run in one process and take turns, round after round. Results are
medians with their spread, as a table, as JSON and as a plot."""

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
from fasttrain.utils.environment import cpu_name, cpuinfo
from fasttrain.utils.errors import UserError
from fasttrain.utils.files import read_json, replacing
from fasttrain.utils.text import printable

FASTTRAIN = "fasttrain"  # the contender that the others are compared with


@dataclass(frozen=True)
class Row:
    """One contender in one case. seconds: time per call, the median over n rounds; least and most: its range. images:
    number of images per call, or 0 if calls do not process images. details: further plain values by name."""

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

    def to_dict(self) -> dict[str, Any]:
        """The row as a flat dictionary, as it is written to JSON."""
        values = {key: value for key, value in vars(self).items() if key != "details"}
        return values | ({"images_per_s": self.images_per_s} if self.images else {}) | dict(self.details)


def select(names: Iterable[str], only: Sequence[str], known: Iterable[str] = ()) -> list[str]:
    """The names that a pattern in `only` matches, in their order; all names if there are no patterns. Raises UserError
    where a pattern matches neither a name nor one of the other names in `known`."""
    names = list(names)
    all_names = list(dict.fromkeys([*names, *known]))
    for pattern in only:
        if not fnmatch.filter(all_names, pattern):
            choices = ", ".join(map(repr, all_names))
            raise UserError(f"--only {printable(pattern)} matches no contender; choose from {choices}")
    return [name for name in names if not only or any(fnmatch.fnmatchcase(name, pattern) for pattern in only)]


def compared_with_best(rows: list[Row], peers: str, left_out: Mapping[str, str] | None = None) -> list[Row]:
    """The rows of a case, with more details in fasttrain's row: `best_peer`, the name of the fastest contender that
    matches the pattern `peers`; `x_best_peer`, the speedup over it; and `left_out`, the peers that failed and why."""
    failed = "; ".join(f"{name}: {reason}" for name, reason in (left_out or {}).items())
    failures = {"left_out": failed} if failed else {}
    peer_rows = [row for row in rows if fnmatch.fnmatchcase(row.contender, peers)]
    best = min(peer_rows, key=lambda row: row.seconds) if peer_rows else None

    def compared(row: Row) -> Row:
        speedup = {"best_peer": best.contender, "x_best_peer": best.seconds / row.seconds} if best else {}
        return replace(row, details={**row.details, **speedup, **failures})

    return [compared(row) if row.contender == FASTTRAIN else row for row in rows]


@dataclass
class Timings:
    """The measurements of a case so far. times: seconds per call in each round, by contender. left_out: why a peer
    failed, by name."""

    times: dict[str, list[float]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def race(case: str, makers: Mapping[str, Callable[[], Callable[[], float]]], rounds: int) -> Iterator[Timings]:
    """Run the contenders in turn and yield the measurements after each turn, so that an interrupted benchmark keeps
    them.

    makers: called before a contender's first turn; the function that it returns runs one turn and returns its seconds
    per call. Each contender has one turn per round. Every other round is in reverse order, so that no contender always
    follows the same one. A peer that fails (for example out of memory) is reported and left out; fasttrain's own
    failures are raised. Progress is printed to stderr.
    """
    timings = Timings()
    turns: dict[str, Callable[[], float]] = {}
    with tqdm(total=rounds * len(makers), desc=case, unit="turn", leave=False, disable=None) as bar:
        for number in range(rounds):
            for name in list(makers)[:: -1 if number % 2 else 1]:
                bar.update()
                if name in timings.left_out:
                    continue
                bar.set_postfix_str(name)
                try:
                    if name not in turns:
                        turns[name] = makers[name]()
                    elapsed = turns[name]()
                except RuntimeError as error:
                    if name.startswith(FASTTRAIN):
                        raise
                    timings.left_out[name] = str(error).partition("\n")[0]
                    tqdm.write(f"{case}: {name} is left out: {timings.left_out[name]}", file=sys.stderr)
                    timings.times.pop(name, None)
                    turns.pop(name, None)
                    continue
                timings.times.setdefault(name, []).append(elapsed)
                yield timings


def row(work: str, case: str, contender: str, times: list[float], images: int = 0, **details: Any) -> Row:
    """The Row of a contender. times: seconds per call in each round."""
    return Row(work, case, contender, statistics.median(times), min(times), max(times), len(times), images, details)


def seconds(function: Callable[[], Any], device: torch.device, calls: int) -> float:
    """Seconds per call on the device, the mean over `calls` calls in a row. On a GPU, events before and after all calls
    measure the time; nothing waits between calls."""
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


def wall_seconds(function: Callable[[], Any], device: torch.device) -> float:
    """Seconds of wall time from an idle device to an idle device. Includes the work of other threads and streams."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished all its work; no-op on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def require_even(batch_sizes: Iterable[int]) -> None:
    """Raises UserError where a batch size is odd, which timm's Mixup does not accept."""
    for batch in batch_sizes:
        if batch % 2:
            raise UserError(f"timm's Mixup, one of the contenders, needs an even batch size, not {batch}")


def table(rows: list[Row]) -> str:
    """A Markdown table with one line per row, and each contender's time as a multiple of fasttrain's."""
    names = list(dict.fromkeys(name for row in rows for name in row.details))
    rates = any(row.images for row in rows)
    head = ["work", "case", "contender", "ms (least … most)", *(["img/s"] if rates else []), f"x {FASTTRAIN}", *names]
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    baselines = {(row.work, row.case): row.seconds for row in rows if row.contender == FASTTRAIN}
    for row in rows:
        spread = f"{row.seconds * 1e3:.3f} ({row.least * 1e3:.3f} … {row.most * 1e3:.3f})"
        rate = [f"{row.images_per_s:.0f}" if row.images else ""] if rates else []
        baseline = baselines.get((row.work, row.case))
        ratio = f"{row.seconds / baseline:.2f}" if baseline else ""
        details = (_cell(row.details.get(name)) for name in names)
        lines.append(f"| {' | '.join([row.work, row.case, row.contender, spread, *rate, ratio, *details])} |")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def environment_info(device: torch.device) -> dict[str, Any]:
    """What a reader of the figures must know: date, commit (of a checkout), device, its clocks, the host's processor,
    threads, versions."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "clocks_mhz": clocks(device),
        "processor": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()} | versions.all_installed(),
    }


def _commit() -> str | None:
    """The commit of the checkout that contains this code, with a + if the code has changed since. None without a
    checkout."""
    root = Path(__file__).resolve().parents[2]
    code = ["--untracked-files=no", "--", "fasttrain", "pipelines", "kernels"]
    try:
        head, changes = (
            subprocess.run(
                ["git", "-C", str(root), *command], capture_output=True, text=True, timeout=20, check=True
            ).stdout.strip()
            for command in (["rev-parse", "--short", "--show-toplevel", "HEAD"], ["status", "--porcelain", *code])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    top, commit = head.splitlines()
    return commit + "+" * bool(changes) if Path(top) == root else None


def clocks(device: torch.device) -> dict[str, float] | None:
    """Current clocks in MHz. GPU: `sm`, `memory`, and `sm_max`, the highest possible `sm`. CPU: `cpu`, of the fastest
    core. None where the system does not report them."""
    try:
        if device.type != "cuda":
            core_clocks = [float(value) for value in cpuinfo("cpu MHz")]
            return {"cpu": max(core_clocks)} if core_clocks else None
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        query = ["nvidia-smi", f"--id=GPU-{uuid}", "--format=csv,noheader,nounits"]
        done = subprocess.run(
            [*query, "--query-gpu=clocks.sm,clocks.mem,clocks.max.sm"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
        values = [float(value) for value in done.stdout.split(",")]
        return dict(zip(("sm", "memory", "sm_max"), values, strict=True))
    except (OSError, subprocess.SubprocessError, ValueError, AttributeError):
        return None


def check_overwritable(path: Path) -> None:
    """Raises UserError where `write_json` cannot write to `path`, or would overwrite another kind of file."""
    if not path.parent.is_dir():
        raise UserError(f"cannot write {printable(path)}: folder {printable(path.parent)} does not exist")
    if os.path.lexists(path) and not _is_result(path):
        raise UserError(f"{printable(path)} exists and holds no benchmark results; name another file")


def _is_result(path: Path) -> bool:
    try:
        content = read_json(path)
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and {"date", "device", "versions", "settings", "rows"} <= content.keys()


def write_json(path: Path, device: torch.device, rows: list[Row], settings: Mapping[str, Any]) -> None:
    """Write all figures and `environment_info`. settings: the benchmark's settings, plain values by name. Raises
    RunError where the file cannot be written."""
    write_figures(path, device, [row.to_dict() for row in rows], settings)


def write_figures(
    path: Path, device: torch.device, rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]
) -> None:
    """Like `write_json`, for rows that are dictionaries of plain values."""
    content = {**environment_info(device), "settings": dict(settings), "rows": rows}
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def require_matplotlib() -> None:
    """Raises UserError where matplotlib, which `write_plot` needs, is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install matplotlib") from None


COLORS = {FASTTRAIN: "tab:blue", "floor": "0.85"}  # by what a contender's name begins with; others are gray


def write_plot(path: Path, rows: list[Row], software: str) -> None:
    """Draw bars with the range of the rounds, one panel per case: images per second, or milliseconds if calls do not
    process images. Stages are left out. software: the PNG's `Software` entry. Raises RunError where the file cannot be
    written."""
    from matplotlib.figure import Figure

    cases: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.work != "stages":
            cases.setdefault((row.work, row.case), []).insert(0, row)
    heights = [0.5 + 0.24 * len(case_rows) for case_rows in cases.values()]
    figure = Figure(figsize=(8, sum(heights)), layout="constrained")
    panels = figure.subplots(len(cases), squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for axes, ((work, case), case_rows) in zip(panels, cases.items(), strict=True):
        by_rate = all(row.images for row in case_rows)
        values = [row.images_per_s if by_rate else row.seconds * 1e3 for row in case_rows]
        rounds = [(row.images / row.most, row.images / row.least) if by_rate else (row.least * 1e3, row.most * 1e3)
                  for row in case_rows]  # fmt: skip
        below, above = zip(*((value - low, high - value) for value, (low, high) in zip(values, rounds, strict=True)),
                           strict=True)  # fmt: skip
        axes.barh(
            [row.contender for row in case_rows],
            values,
            xerr=(below, above),
            color=[
                next((c for name, c in COLORS.items() if row.contender.startswith(name)), "0.65") for row in case_rows
            ],
            error_kw={"elinewidth": 1, "ecolor": "0.3"},
        )
        for line, (value, (_, high)) in enumerate(zip(values, rounds, strict=True)):
            text = f"{value:.0f}" if value >= 100 else f"{value:.3g}"
            axes.annotate(text, (high, line), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
        unit = "images per second, more is better" if by_rate else "milliseconds, less is better"
        axes.set_title(f"{work} {case} ({unit})", loc="left", fontsize=9)
        axes.margins(x=0.12)
        axes.tick_params(labelsize=8, left=False)
        axes.xaxis.set_visible(False)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": software})
