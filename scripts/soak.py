"""Train a small network for many steps while injecting faults, and report which faults it survived and any leaks.

usage: python scripts/soak.py --out DIR [--steps N | --minutes M] [--data DIR] [--compare] [--json FILE] [--plot FILE]

The run is `fasttrain run` on a copy of the images under --out (hard links where possible; without --data, the demo
set), so that nothing outside --out changes. Faults come in a random order that depends on --seed; every kind is equally
frequent: signals, kills, Ctrl-C, damaged checkpoints, images that cannot be decoded, missing data, a second run into
the same folder. After each fault every promise is checked (see `Soak.check_exit`), and the same command starts the run
again. Memory, file handles, threads and processes are sampled about once per second (OUT/samples.jsonl). The last part
of the run (--calm) has no faults.

Exit status: 0, or 1 if a promise was broken; each broken promise is printed. Ctrl-C ends the run and writes the results
so far; the same command resumes. --plot needs `pip install ".[plot]"`.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout need not be installed
from fasttrain.utils.versions import all_installed

STOPS = {"SIGTERM": signal.SIGTERM, "SIGUSR1": signal.SIGUSR1}
COLORS = {
    **dict(zip(STOPS, ("tab:blue", "tab:cyan"), strict=True)),
    "SIGKILL": "tab:red",
    "SIGINT": "tab:orange",
    "damaged checkpoint": "tab:purple",
    "bad image": "tab:green",
    "data away": "tab:brown",
    "second run": "tab:olive",
}
KINDS = tuple(COLORS)
IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
STRETCHES = 3  # number of stretches that are fitted, the longest ones
# Events that are logged in the order of their steps. Others, like those of checkpoints, may come later.
IN_ORDER = ("start", "resume", "train", "eval", "stopped", "end")
MIN_SAMPLES = 8  # of a stretch
FITTED = {"rss_mib": "resident, MiB", "handles": "file handles", "threads": "threads"}


class CannotStart(Exception):
    """The run does not start any more; the soak ends."""


class FinishedEarly(Exception):
    """The run finished before the fault took effect."""


class Soak:
    """A run, its injected faults and its samples. Every wait uses `wait_for`, which also takes samples."""

    def __init__(self, args: argparse.Namespace, command: list[str], home: Path, data: Path) -> None:
        self.args, self.command, self.home, self.data = args, command, home, data
        self.run = home / "run"
        self.rng = random.Random(f"{args.seed} how")
        self.samples = read_lines(home / "samples.jsonl")
        self.faults = read_lines(home / "faults.jsonl")
        self.broken = [f"{fault['fault']}: {message}" for fault in self.faults for message in fault["broken"]]
        self.starts = max((sample["run"] for sample in self.samples), default=0)
        self.log: list[dict[str, Any]] = []
        self.log_bytes = 0  # of log.jsonl, read so far
        self.next_sample = 0.0
        self.deadline = time.monotonic() + 60 * args.minutes if args.minutes else float("inf")
        self.process: subprocess.Popen[bytes] | None = None
        self.first_event = 0  # index in the log of the process's first event
        self.fault, self.fault_failures = "start", list[str]()  # the current fault, and the promises broken in it

    # ---- the run

    def start(self) -> None:
        self.starts += 1
        self.process = self.spawn(self.stderr)
        self.first_event = len(self.log)

    def spawn(self, stderr: Path) -> "subprocess.Popen[bytes]":
        """Start the run's command in a new session, so that all its processes can be found."""
        stderr.parent.mkdir(exist_ok=True)
        with stderr.open("wb") as file:
            return subprocess.Popen(self.command, stdout=file, stderr=file, start_new_session=True)

    @property
    def stderr(self) -> Path:
        return self.home / "stderr" / f"{self.starts:04}.txt"

    @property
    def step(self) -> int:
        return next((event["step"] for event in reversed(self.log) if event["event"] in IN_ORDER), 0)

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def training(self) -> bool:
        """Whether the process has logged training steps and has not ended."""
        events = [event["event"] for event in self.log[self.first_event :]]
        return "train" in events and events[-1] not in ("stopped", "end")

    def ensure_training(self) -> None:
        """Start the run if it is not running, and wait for its first log point. Raises CannotStart after three
        attempts."""
        for _ in range(3):
            if not self.alive:
                self.start()
            if self.wait_for(self.training) or self.finished():
                return
            self.fail(f"did not start training: {tail(self.stderr)}")
            self.kill()
        raise CannotStart("the run does not start any more")

    def finished(self) -> bool:
        return bool(self.log) and self.log[-1]["event"] == "end"

    def kill(self) -> None:
        """Kill all remaining processes of the run."""
        if self.process:
            for pid in session_processes(self.process.pid):
                try_kill(pid, signal.SIGKILL)
            self.process.wait()
            self.remaining_processes()

    def remaining_processes(self) -> list[int]:
        """The run's processes that are still alive up to two seconds after its end."""
        assert self.process
        for _ in range(20):
            if not session_processes(self.process.pid):
                break
            time.sleep(0.1)
        return session_processes(self.process.pid)

    # ---- waiting and sampling

    def wait_for(self, condition: Callable[[], bool], patience: float | None = None) -> bool:
        """Wait for a condition. Returns False if the time is over or the run has ended before it holds."""
        end = time.monotonic() + (patience or self.args.patience)
        while True:
            alive = self.alive
            self.read_log()
            if condition():
                return True
            if not alive or time.monotonic() > end:
                return False
            self.sample()
            time.sleep(0.05)

    def read_log(self) -> None:
        try:
            with (self.run / "log.jsonl").open("rb") as file:
                file.seek(self.log_bytes)
                text = file.read()
        except FileNotFoundError:
            return
        text = text[: text.rfind(b"\n") + 1]
        self.log_bytes += len(text)
        for line in text.splitlines():
            try:
                self.log.append(json.loads(line))
            except ValueError:  # `log_problems` reports it at the end
                continue

    def sample(self) -> None:
        if time.monotonic() < self.next_sample or not self.process:
            return
        self.next_sample = time.monotonic() + self.args.interval
        usages = [used for pid in session_processes(self.process.pid) if (used := usage(pid))]
        if usages:
            rss, handles, threads = (sum(column) for column in zip(*usages, strict=True))
            row = {
                "time": round(time.time(), 2),
                "run": self.starts,
                "step": self.step,
                "rss_mib": round(rss / 2**20, 2),
                "handles": handles,
                "threads": threads,
                "children": len(usages) - 1,
                "under_way": self.training(),
            }
            self.samples.append(row)
            append(self.home / "samples.jsonl", row)

    # ---- promises

    def fail(self, message: str) -> None:
        self.fault_failures.append(message)
        self.broken.append(f"{self.fault}: {message}")
        print(f"BROKEN  step {self.step}: {self.fault}: {message}", flush=True)

    def check_exit(self, *codes: int) -> None:
        """Wait for the run's end and check the promises about every exit: its status is in `codes` (-9: SIGKILL); no
        process is left; an error is one line without a traceback; no lock is left; no partial checkpoint is left if
        another one has been saved since. Raises FinishedEarly if the run finished instead."""
        assert self.process
        if not self.wait_for(lambda: not self.alive):
            self.fail(f"did not end within {self.args.patience} s")
            self.kill()
            return
        self.read_log()
        code = self.process.returncode
        if code == 0 and 0 not in codes and self.finished():
            raise FinishedEarly
        text = self.stderr.read_text(errors="replace")
        if code not in codes:
            self.fail(f"ended with {code} instead of {' or '.join(map(str, codes))}: {tail(self.stderr)}")
        if processes := self.remaining_processes():
            self.fail(f"left {len(processes)} processes")
            self.kill()
        if "Traceback" in text:
            self.fail(f"printed a traceback to {self.stderr.name}")
        lines = [line for line in text.splitlines() if line.startswith("fasttrain: ")]
        if code > 0 and len(lines) != 1:
            self.fail(f"printed {len(lines)} error lines instead of one: {lines}")
        if code >= 0 and (self.run / ".lock").exists():
            self.fail("left its lock")
        saved = any(event["event"] == "checkpoint" for event in self.log[self.first_event :])
        partial = [path for folder in (self.run, self.run / "checkpoints") for path in folder.glob(".*")]
        if code >= 0 and saved and partial:
            self.fail(f"left {', '.join(path.name for path in partial)}")

    def check_stderr(self, text: str) -> None:
        if text not in self.stderr.read_text(errors="replace"):
            self.fail(f"did not print {text!r} but: {tail(self.stderr)}")

    def check_resume(self, step: int | None = None) -> None:
        """Start the run again with the same command and check that it resumes from `step`. Default: that of the newest
        valid checkpoint."""
        checkpoints = self.valid_checkpoints()
        expected = step if step is not None else step_of(checkpoints[-1]) if checkpoints else 0
        self.ensure_training()
        first = next((event for event in self.log[self.first_event :] if event["event"] in ("start", "resume")), None)
        if first and first["step"] != expected:
            self.fail(f"resumed from step {first['step']} instead of {expected}")

    def valid_checkpoints(self) -> list[Path]:
        """The run's valid checkpoints up to `last`, oldest first. Checkpoints after `last` were abandoned."""
        last = (self.run / "last").resolve()
        paths = sorted((self.run / "checkpoints").glob("step-*"))
        return [path for path in paths if path.name <= last.name and is_valid(path)]

    # ---- faults

    def inject(self, kind: str) -> None:
        """Inject a fault, check the promises about it, and record it."""
        self.fault, self.fault_failures = kind, []
        start, step = time.time(), self.step
        print(f"step {step}: {kind}", flush=True)
        assert self.process
        if kind in STOPS:
            self.stop(STOPS[kind])
            self.check_resume()
        elif kind == "SIGKILL":
            try_kill(self.process.pid, signal.SIGKILL)
            self.check_exit(-9)
            self.check_resume()
        elif kind == "SIGINT":
            os.killpg(self.process.pid, signal.SIGINT)  # like a terminal
            self.check_exit(130)
            self.check_stderr("interrupted")
            self.check_resume()
        elif kind == "damaged checkpoint":
            self.damage_checkpoint()
        elif kind == "bad image":
            self.break_image()
        elif kind == "data away":
            self.take_data_away()
        else:
            self.second_run()
        row = {
            "fault": kind,
            "step": step,
            "time": round(start, 2),
            "until": round(time.time(), 2),
            "broken": self.fault_failures,
        }
        self.faults.append(row)
        append(self.home / "faults.jsonl", row)

    def stop(self, number: signal.Signals) -> None:
        """Send a signal on which the run must save, report it and exit with 75."""
        assert self.process
        try_kill(self.process.pid, number)
        self.check_exit(75)
        self.check_stderr(f"stopped by {number.name}")
        event = self.log[-1] if self.log else {}
        if event.get("event") != "stopped" or event.get("signal") != number.name:
            self.fail(f"its log ends with {event}")
        elif not self.valid_checkpoints() or step_of(self.valid_checkpoints()[-1]) != event["step"]:
            self.fail(f"stopped after step {event['step']}, which was not saved")

    def damage_checkpoint(self) -> None:
        """Truncate the newest checkpoint, or flip one of its bits, while the run is stopped."""
        # The run needs an older checkpoint to resume from.
        self.wait_for(lambda: len({step_of(path) for path in self.valid_checkpoints()}) >= 3)
        self.stop(self.rng.choice(list(STOPS.values())))
        checkpoints = self.valid_checkpoints()
        if len(checkpoints) < 2:
            self.fail(f"has {len(checkpoints)} valid checkpoints")
            return self.ensure_training()
        # A flipped bit in meta.json may change only whitespace, which its checksum does not cover.
        name, how = self.rng.choice(
            [("model.safetensors", "half"), ("model.safetensors", "bit"), ("train.safetensors", "half"),
             ("train.safetensors", "bit"), ("meta.json", "half")]
        )  # fmt: skip
        victim = checkpoints[-1] / name
        content = bytearray(victim.read_bytes())
        if how == "bit":
            content[self.rng.randrange(len(content))] ^= 1 << self.rng.randrange(8)
        else:
            del content[len(content) // 2 :]
        victim.write_bytes(content)
        self.check_resume(step_of(checkpoints[-2]))
        self.check_stderr("trying the one before")
        self.check_stderr(name)

    def break_image(self) -> None:
        """Replace an image with a text file until the run has skipped it."""
        assert self.process
        folder = self.data / "train" if (self.data / "train").is_dir() else self.data
        victim = self.rng.choice(images_of(folder))
        backup, bad_image = self.home / "held", self.home / "other"
        backup.mkdir(exist_ok=True)
        os.link(victim, backup / victim.name)
        (backup / "place").write_text(str(victim))
        bad_image.write_text("no image\n")
        os.replace(bad_image, victim)  # not written in place, because it may be a hard link to the original

        def skipped() -> bool:
            events = self.log[self.first_event :]
            return any(event["event"] == "skip" and event["path"] == str(victim) for event in events)

        try:
            if not self.wait_for(skipped, 10 * self.args.patience):
                self.fail(f"did not skip a bad image: {tail(self.stderr)}")
        finally:
            restore_data(self.home, self.data)
        step = self.step
        if not self.wait_for(lambda: self.step > step) and not self.finished():
            self.fail("did not continue after a bad image")
            self.ensure_training()

    def take_data_away(self) -> None:
        """Move the folder of images away until the run has ended. It must end in time, with one error line."""
        away = self.data.with_name("data.away")
        self.data.rename(away)
        try:
            self.check_exit(1)
        finally:
            away.rename(self.data)
        self.check_resume()

    def second_run(self) -> None:
        """Run the same command while the run is active: it must be refused, and the first run must continue."""
        assert self.process
        stderr = self.home / "stderr" / f"{self.starts:04}-second.txt"
        second = self.spawn(stderr)
        in_time = self.wait_for(lambda: second.poll() is not None)
        if not in_time and not self.finished():
            self.fail("the second run was not refused")
        second.kill()
        second.wait()
        if in_time and second.returncode != 2:
            self.fail(f"the second run ended with {second.returncode} instead of 2: {tail(stderr)}")
        if in_time and "another run is writing to" not in stderr.read_text(errors="replace"):
            self.fail(f"the second run printed: {tail(stderr)}")
        step = self.step
        if not self.wait_for(lambda: self.step > step) and not self.finished():
            self.fail(f"the first run did not continue: {tail(self.stderr)}")
            self.ensure_training()

    # ---- the complete soak

    def soak(self, plan: Iterator[tuple[int, str]]) -> None:
        """Inject the faults of the plan, then let the run continue without faults to its end."""
        self.read_log()
        if not self.finished():
            self.ensure_training()
        for _ in zip(self.faults, plan, strict=False):  # skip the faults of an earlier call
            pass
        for fault_step, kind in plan:
            if time.monotonic() > self.deadline - 60 * self.args.minutes * self.args.calm:
                break
            self.fault, self.fault_failures = "between faults", []
            while not self.wait_for(lambda step=fault_step: self.step >= step or self.finished(), 3600):  # type: ignore[misc]
                self.fail(f"ended by itself: {tail(self.stderr)}")
                self.ensure_training()
            if self.finished():
                break
            try:
                self.inject(kind)
            except FinishedEarly:
                print(f"the run ended before {kind} took effect", flush=True)
                break
        self.fault, self.fault_failures = "the end", []
        if self.args.minutes:
            self.wait_for(lambda: time.monotonic() > self.deadline, 60 * self.args.minutes)
            self.stop(signal.SIGTERM)
            return
        while not self.wait_for(self.finished, 36000):
            self.fail(f"ended by itself: {tail(self.stderr)}")
            self.ensure_training()
        if self.process:
            self.check_exit(0)

    def interrupt(self) -> None:
        """After Ctrl-C: stop the run so that it saves, and kill it if it does not end in time."""
        if self.alive and self.process:
            try_kill(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(self.args.patience)
            except subprocess.TimeoutExpired:
                self.kill()

    def compare(self) -> str:
        """Run the same command without faults. Returns the first difference in weights or losses; empty if none."""
        from safetensors.numpy import load_file

        reference = self.home / "whole"
        print("training again without faults", flush=True)
        command = [str(reference) if word == str(self.run) else word for word in self.command]
        with (self.home / "stderr" / "whole.txt").open("wb") as file:
            if subprocess.run(command, stdout=file, stderr=file).returncode:
                return f"the run without faults failed: {tail(self.home / 'stderr' / 'whole.txt')}"
        for name in ("model.safetensors", "train.safetensors"):
            ours, theirs = (load_file(run / "last" / name) for run in (self.run, reference))
            for key in sorted(ours.keys() | theirs.keys()):
                if key not in ours or key not in theirs or ours[key].tobytes() != theirs[key].tobytes():
                    return f"{key} in {name} differs from the run without faults"
        ours, theirs = (losses(read_lines(run / "log.jsonl")) for run in (self.run, reference))
        different = [step for step in sorted(ours.keys() | theirs.keys()) if ours.get(step) != theirs.get(step)]
        return f"the loss of step {different[0]} differs from the run without faults" if different else ""


def losses(log: list[dict[str, Any]]) -> dict[int, float]:
    """The loss by step. If a step was repeated, that of the last repetition."""
    return {event["step"]: event["loss"] for event in log if event["event"] == "train"}


def schedule(seed: int, kinds: Sequence[str], gap: float) -> Iterator[tuple[int, str]]:
    """Yield (step, fault) without end: every kind once per span of len(kinds) · gap steps, at random steps in random
    order."""
    rng = random.Random(seed)
    start = 0.0
    while True:
        deck = rng.sample(kinds, len(kinds))
        gaps = [rng.uniform(0.5, 1.5) for _ in deck]
        for number, kind in enumerate(deck):
            yield round(start + gap * len(deck) * sum(gaps[: number + 1]) / sum(gaps)), kind
        start += gap * len(deck)


def log_problems(text: str) -> list[str]:
    """Problems of a log.jsonl: lines that are not events, and steps that do not increase where no run starts or
    resumes."""
    problems, step, started = [], 0, False
    if text and not text.endswith("\n"):
        problems.append("the last line is incomplete")
    for number, line in enumerate(text.splitlines(), 1):
        try:
            event = json.loads(line)
            kind = event["event"]
        except (ValueError, KeyError, TypeError):
            problems.append(f"line {number} is not an event: {line[:80]}")
            continue
        if kind not in IN_ORDER:
            continue
        if kind in ("start", "resume"):
            if event["step"] > step or (kind == "start" and event["step"]):
                problems.append(f"line {number}: {kind} at step {event['step']}, after step {step}")
            started = True
        elif not started or event["step"] < step or (kind == "train" and event["step"] == step):
            problems.append(f"line {number}: {kind} of step {event['step']} after step {step}")
        step = event["step"]
    return problems


def stretches(samples: list[dict[str, Any]], faults: list[dict[str, Any]], warm_up: int) -> list[list[dict[str, Any]]]:
    """The longest stretches of samples of one process without a fault. Their first `warm_up` steps are left out, but at
    most a fifth of their steps."""
    parts: list[list[dict[str, Any]]] = []
    key = None
    for row in samples:
        if not row["under_way"]:
            continue
        if during(row, faults):
            key = None
            continue
        faults_before = sum(fault["until"] < row["time"] for fault in faults)
        if key != (row["run"], faults_before):
            key = (row["run"], faults_before)
            parts.append([])
        parts[-1].append(row)
    warm = []
    for part in parts:
        start, end = part[0]["step"], part[-1]["step"]
        first = start + min(warm_up, (end - start) / 5)
        warm.append([row for row in part if row["step"] >= first])
    long = [part for part in warm if len(part) >= MIN_SAMPLES and part[-1]["step"] > part[0]["step"]]
    return sorted(long, key=lambda part: part[0]["step"] - part[-1]["step"])[:STRETCHES]


def during(row: dict[str, Any], faults: list[dict[str, Any]]) -> bool:
    """Whether a sample was taken during a fault."""
    return any(fault["time"] <= row["time"] <= fault["until"] for fault in faults)


def growth(part: list[dict[str, Any]]) -> dict[str, Any]:
    """Linear fits to a stretch's samples: MiB, handles and threads per 1000 steps, with the slopes' standard errors."""
    steps = np.array([row["step"] for row in part]) / 1000
    fits: dict[str, Any] = {"from_step": part[0]["step"], "to_step": part[-1]["step"], "n": len(part)}
    for name in FITTED:
        values = np.array([row[name] for row in part], float)
        (slope, base), spread = np.polyfit(steps, values, 1), np.sum((steps - steps.mean()) ** 2)
        residuals = values - slope * steps - base
        error = float(np.sqrt(np.sum(residuals**2) / max(1, len(part) - 2) / spread))
        fits[name] = {
            "per_1000_steps": round(float(slope), 4),
            "error": round(error, 4),
            "mean": round(float(values.mean()), 2),
        }
    return fits


def session_processes(session: int) -> list[int]:
    """The processes of a session, without zombies."""
    pids = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has ended
                continue
            if int(fields[3]) == session and fields[0] not in "ZX":
                pids.append(int(entry.name))
    return pids


def usage(pid: int) -> tuple[int, int, int] | None:
    """(resident bytes, file handles, threads) of a process, or None if it has ended."""
    try:
        proc = Path("/proc", str(pid))
        pages = int((proc / "statm").read_text().split()[1])
        threads = next(line for line in (proc / "status").read_text().splitlines() if line.startswith("Threads:"))
        return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir(proc / "fd")), int(threads.split()[1])
    except (OSError, StopIteration):
        return None


def try_kill(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:  # it has just ended
        return


def is_valid(checkpoint: Path) -> bool:
    try:
        hashes = json.loads((checkpoint / "meta.json").read_text())["sha256"]
        actual = {name: hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() for name in hashes}
        return actual == hashes
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1].split(".")[0])


def images_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGES)


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: Path, row: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def tail(path: Path) -> str:
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    return " | ".join(lines[-2:]) or "(no output)"


def restore_data(home: Path, data: Path) -> None:
    """Undo a fault's change of the data, perhaps of an earlier call."""
    away = data.with_name("data.away")
    if away.exists() and not data.exists():
        away.rename(data)
    backup = home / "held"
    if (backup / "place").exists():
        original = Path((backup / "place").read_text())
        if (backup / original.name).exists():
            os.replace(backup / original.name, original)
    shutil.rmtree(backup, ignore_errors=True)


def copy_data(source: Path | None, data: Path) -> None:
    """Copy the images for the soak, atomically; without `source`, generate the demo set."""
    if data.exists():
        return
    if source is None:
        subprocess.run([sys.executable, "-m", "fasttrain", "data", "demo", str(data)], check=True, stdout=sys.stderr)
        return
    temporary = data.with_name("data.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary, copy_function=link)
    temporary.rename(data)


def link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def run_command(args: argparse.Namespace, data: Path, run: Path, gap: float, skip_bad: bool) -> list[str]:
    """The command that starts the run."""
    train = data / "train" if (data / "train").is_dir() else data
    per_epoch = len(images_of(train)) // args.batch_size
    if per_epoch == 0:
        sys.exit(f"soak.py: {train} has fewer images than a batch of {args.batch_size}")
    epochs = 10**6 if args.minutes else -(-args.steps // per_epoch)
    log_steps = max(1, min(10, round(gap / 4)))
    save_steps = log_steps * max(
        1, min(200, round(gap / 3)) // log_steps
    )  # a multiple, so that every saved step has been logged
    command = [sys.executable, "-m", "fasttrain", "run", "--arch", args.arch, "--image-size", str(args.image_size)]
    command += ["--batch-size", str(args.batch_size), "--epochs", str(epochs), "--seed", str(args.seed)]
    command += ["--workers", str(args.workers), "--device", args.device, "--data", str(data), "--out", str(run)]
    command += ["--on-bad", "skip"] if skip_bad else []
    command += ["--set", f"machine.log_steps={log_steps}", "--set", f"checkpoint.every_steps={save_steps}"]
    return [*command, "--set", "checkpoint.keep=4", *(word for setting in args.set for word in ("--set", setting))]


def report(soak: Soak, kinds: Sequence[str], difference: str | None, ended: str) -> dict[str, Any]:
    """Print the results as tables and return them. difference: the result of `Soak.compare`."""
    print(f"\n{'fault':<20}{'injected':>9}{'survived':>9}")
    counts = {}
    for kind in kinds:
        faults = [fault for fault in soak.faults if fault["fault"] == kind]
        counts[kind] = {"injected": len(faults), "survived": sum(not fault["broken"] for fault in faults)}
        print(f"{kind:<20}{counts[kind]['injected']:>9}{counts[kind]['survived']:>9}")
    fits = [growth(part) for part in stretches(soak.samples, soak.faults, soak.args.warm_up)]
    print(f"\n{'undisturbed steps':<20}{'n':>6}{'MiB':>9}   MiB, handles, threads per 1000 steps (standard error)")
    for fit in fits:
        columns = [fit[name] for name in FITTED]
        slopes = ", ".join(f"{column['per_1000_steps']:+.3f} ({column['error']:.3f})" for column in columns)
        mean = columns[0]["mean"]
        print(f"{fit['from_step']} to {fit['to_step']}".ljust(20) + f"{fit['n']:>6}{mean:>9.1f}   {slopes}")
    if not fits:
        print(f"none with {MIN_SAMPLES} samples")
    print(f"\nbroken promises: {len(soak.broken)}" + "".join(f"\n  {message}" for message in soak.broken))
    first = next((event for event in soak.log if event["event"] == "start"), {})
    return {
        "command": "python scripts/soak.py " + " ".join(sys.argv[1:]),
        "run": soak.command[1:],
        "date": str(date.today()),
        "device": f"{first.get('device', 'unknown')}, cores used: {len(os.sched_getaffinity(0))}",
        "versions": versions(first.get("versions", {})),
        "ended": ended,
        "steps": soak.step,
        "starts": soak.starts,
        "samples": len(soak.samples),
        "faults": counts,
        "growth": fits,
        "bit_equal": None if difference is None else not difference,
        "broken": soak.broken,
    }


def versions(known: dict[str, str]) -> dict[str, str]:
    return {"python": sys.version.split()[0], "numpy": np.__version__, **all_installed(), **known}


def draw(path: Path, samples: list[dict[str, Any]], faults: list[dict[str, Any]]) -> None:
    """Plot memory, handles and threads over the steps: one line per process, and a mark for each fault."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    plots = figure.subplots(len(FITTED), sharex=True)
    rows = [row for row in samples if row["under_way"] and not during(row, faults)]
    new_runs = (i for i, (row, following) in enumerate(pairwise(rows), 1) if row["run"] != following["run"])
    cuts = [0, *new_runs, len(rows)]
    for axes, (name, title) in zip(plots, FITTED.items(), strict=True):
        for start, stop in pairwise(cuts):
            part = rows[start:stop]
            axes.plot([row["step"] for row in part], [row[name] for row in part], color="black", linewidth=1)
        for kind, color in COLORS.items():
            for number, fault in enumerate(fault for fault in faults if fault["fault"] == kind):
                axes.axvline(fault["step"], color=color, linewidth=1, alpha=0.6, label=None if number else kind)
        axes.set_ylabel(title)
        axes.grid(axis="y", alpha=0.3)
    plots[-1].set_xlabel("step")
    if faults:
        figure.legend(*plots[-1].get_legend_handles_labels(), loc="outside upper center", ncols=len(KINDS) // 2)
    figure.savefig(path, dpi=100)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="images to copy; default: the demo set")
    parser.add_argument("--steps", type=int, default=20000, help="of the run, rounded up to full epochs")
    parser.add_argument("--minutes", type=float, default=0, help="end after this time, instead of --steps")
    parser.add_argument("--gap", type=float, default=500, help="maximum of the average number of steps between faults")
    parser.add_argument("--calm", type=float, default=0.25, help="share at the end of the run without faults")
    parser.add_argument("--only", action="append", choices=KINDS, help="inject only this kind of fault; repeatable")
    parser.add_argument("--compare", action="store_true", help="with a run without faults; no bad images are injected")
    parser.add_argument("--arch", default="test_resnet")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=20)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the run")
    parser.add_argument("--seed", type=int, default=0, help="of the run and of the faults")
    parser.add_argument("--interval", type=float, default=1, help="seconds between two samples")
    parser.add_argument("--warm-up", type=int, default=300, help="steps at the start of a stretch that are not fitted")
    parser.add_argument("--patience", type=float, default=120, help="seconds that a start, a save or an exit may take")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    if args.minutes and args.compare:
        parser.error("--compare needs --steps, because --minutes ends the run at an unpredictable step")
    if args.steps < 1 or args.minutes < 0 or not 0 <= args.calm < 1 or args.gap <= 0:
        parser.error("--steps and --gap must be positive, --minutes 0 or more, --calm in [0, 1)")
    return args


def main() -> None:
    args = arguments()
    for number in (signal.SIGINT, signal.SIGTERM):  # the background jobs of a shell ignore SIGINT
        signal.signal(number, signal.default_int_handler)
    kinds = [kind for kind in args.only or KINDS if not (args.compare and kind == "bad image")]
    home = args.out.resolve()
    home.mkdir(parents=True, exist_ok=True)
    data = home / "data"
    restore_data(home, data)
    copy_data(args.data, data)
    last_fault_step = args.steps * (1 - args.calm)
    gap = args.gap if args.minutes else min(args.gap, last_fault_step / len(kinds))
    plan = schedule(args.seed, kinds, gap)
    if not args.minutes:
        plan = takewhile(lambda fault: fault[0] <= last_fault_step, plan)
    soak = Soak(args, run_command(args, data, home / "run", gap, "bad image" in kinds), home, data)
    difference, ended = None, "whole"
    try:
        soak.soak(plan)
        if args.compare:
            difference = soak.compare()
    except KeyboardInterrupt:
        ended = "interrupted"
        soak.interrupt()
    except CannotStart as error:
        ended = f"given up: {error}"
    finally:
        soak.kill()
        restore_data(home, data)
    soak.read_log()
    log = home / "run" / "log.jsonl"
    log_text = log.read_text(errors="replace") if log.exists() else ""
    soak.broken += [f"log.jsonl: {problem}" for problem in log_problems(log_text)]
    soak.broken += [f"--compare: {difference}"] if difference else []
    result = report(soak, kinds, difference, ended)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if args.plot:
        draw(args.plot, soak.samples, soak.faults)
    sys.exit(130 if ended == "interrupted" else 1 if soak.broken or ended != "whole" else 0)


if __name__ == "__main__":
    main()
