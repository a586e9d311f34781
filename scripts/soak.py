"""Train a small network for many steps while faults are injected, and say what the run survived and what it keeps.

usage: python scripts/soak.py --out DIR [--steps N | --minutes M] [--data DIR] [--compare] [--json FILE] [--plot FILE]

The run is `fasttrain run` on a copy of the images (hard links where possible; without --data, of the demo set), made
under --out, so that nothing outside of it is touched. Faults come in a random order that --seed fixes, each kind as
often as the others: signals, kills, Ctrl-C, damaged checkpoints, images that cannot be decoded, data that goes away, a
second run into the same folder. After each of them every promise is checked (see `Soak.ended`), and the run is started
again with the same command. About once a second memory, file handles, threads and processes are sampled
(OUT/samples.jsonl). The last part of the run (--calm) is left undisturbed.

Exit status: 0, or 1 where a promise was broken, each of which is named. Ctrl-C ends the run and writes what is known;
the same command again goes on. --plot needs `pip install ".[plot]"`.
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
COLOURS = {
    **dict(zip(STOPS, ("tab:blue", "tab:cyan"), strict=True)),
    "SIGKILL": "tab:red",
    "SIGINT": "tab:orange",
    "damaged checkpoint": "tab:purple",
    "bad image": "tab:green",
    "data away": "tab:brown",
    "second run": "tab:olive",
}
KINDS = tuple(COLOURS)
IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
STRETCHES = 3  # the longest ones, which are fitted
IN_ORDER = ("start", "resume", "train", "eval", "stopped", "end")  # events; a checkpoint's comes when it is written
FEWEST = 8  # samples of a stretch
FITTED = {"rss_mib": "resident, MiB", "handles": "file handles", "threads": "threads"}


class Broken(Exception):
    """The run cannot be brought back to life; the soak ends."""


class Late(Exception):
    """The run came to its end before the fault could reach it."""


class Soak:
    """A run, the faults that it is given, and what it did. Every wait goes through `until`, which samples meanwhile."""

    def __init__(self, args: argparse.Namespace, command: list[str], home: Path, data: Path) -> None:
        self.args, self.command, self.home, self.data = args, command, home, data
        self.run = home / "run"
        self.rng = random.Random(f"{args.seed} how")
        self.samples = read_lines(home / "samples.jsonl")
        self.faults = read_lines(home / "faults.jsonl")
        self.broken = [f"{each['fault']}: {what}" for each in self.faults for what in each["broken"]]
        self.starts = max((each["run"] for each in self.samples), default=0)
        self.log: list[dict[str, Any]] = []
        self.read = 0  # bytes of log.jsonl
        self.next_sample = 0.0
        self.deadline = time.monotonic() + 60 * args.minutes if args.minutes else float("inf")
        self.process: subprocess.Popen[bytes] | None = None
        self.begun = 0  # events of the log when it was started
        self.fault, self.now = "start", list[str]()  # under way, and the promises broken in it

    # ---- the run

    def start(self) -> None:
        self.starts += 1
        self.process = self.spawn(self.stderr)
        self.begun = len(self.log)

    def spawn(self, stderr: Path) -> "subprocess.Popen[bytes]":
        """The run's command in a session of its own, so that all its processes can be found."""
        stderr.parent.mkdir(exist_ok=True)
        with stderr.open("wb") as file:
            return subprocess.Popen(self.command, stdout=file, stderr=file, start_new_session=True)

    @property
    def stderr(self) -> Path:
        return self.home / "stderr" / f"{self.starts:04}.txt"

    @property
    def step(self) -> int:
        return next((each["step"] for each in reversed(self.log) if each["event"] in IN_ORDER), 0)

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def under_way(self) -> bool:
        """Whether the run has trained since it was started, and has not come to its end."""
        events = [each["event"] for each in self.log[self.begun :]]
        return "train" in events and events[-1] not in ("stopped", "end")

    def ensure(self) -> None:
        """Bring the run to life where it is not, up to its first log point. Broken where it ends again and again."""
        for _ in range(3):
            if not self.alive:
                self.start()
            if self.until(self.under_way) or self.finished():
                return
            self.fail(f"did not get going: {tail(self.stderr)}")
            self.kill()
        raise Broken("the run does not start any more")

    def finished(self) -> bool:
        return bool(self.log) and self.log[-1]["event"] == "end"

    def kill(self) -> None:
        """End whatever is left of the run."""
        if self.process:
            for pid in members(self.process.pid):
                try_kill(pid, signal.SIGKILL)
            self.process.wait()
            self.left()

    def left(self) -> list[int]:
        """The processes of the run that are there still, a moment after it."""
        assert self.process
        for _ in range(20):
            if not members(self.process.pid):
                break
            time.sleep(0.1)
        return members(self.process.pid)

    # ---- waiting and sampling

    def until(self, condition: Callable[[], bool], patience: float | None = None) -> bool:
        """Wait for a condition; False where the time is over, or the run, without it."""
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
                file.seek(self.read)
                text = file.read()
        except FileNotFoundError:
            return
        text = text[: text.rfind(b"\n") + 1]
        self.read += len(text)
        for line in text.splitlines():
            try:
                self.log.append(json.loads(line))
            except ValueError:  # `flaws` says so in the end
                continue

    def sample(self) -> None:
        if time.monotonic() < self.next_sample or not self.process:
            return
        self.next_sample = time.monotonic() + self.args.interval
        found = [usage(pid) for pid in members(self.process.pid)]
        usages = [each for each in found if each]
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
                "under_way": self.under_way(),
            }
            self.samples.append(row)
            append(self.home / "samples.jsonl", row)

    # ---- promises

    def fail(self, what: str) -> None:
        self.now.append(what)
        self.broken.append(f"{self.fault}: {what}")
        print(f"BROKEN  step {self.step}: {self.fault}: {what}", flush=True)

    def ended(self, *codes: int) -> None:
        """Wait for the run's end and check what every end promises: its status (-9: SIGKILL), no process left, one line
        and no traceback, no lock, no half-written checkpoint once another one has been saved."""
        assert self.process
        if not self.until(lambda: not self.alive):
            self.fail(f"had not ended after {self.args.patience} s")
            self.kill()
            return
        self.read_log()
        code = self.process.returncode
        if code == 0 and 0 not in codes and self.finished():
            raise Late
        said = self.stderr.read_text(errors="replace")
        if code not in codes:
            self.fail(f"ended with {code} in place of {' or '.join(map(str, codes))}: {tail(self.stderr)}")
        if left := self.left():
            self.fail(f"left {len(left)} processes")
            self.kill()
        if "Traceback" in said:
            self.fail(f"a traceback in {self.stderr.name}")
        lines = [line for line in said.splitlines() if line.startswith("fasttrain: ")]
        if code > 0 and len(lines) != 1:
            self.fail(f"said {len(lines)} lines in place of one: {lines}")
        if code >= 0 and list(self.home.glob(".run.lock*")):
            self.fail("left its lock")
        saved = any(each["event"] == "checkpoint" for each in self.log[self.begun :])
        remains = [each for folder in (self.run, self.run / "checkpoints") for each in folder.glob(".*")]
        if code >= 0 and saved and remains:
            self.fail(f"left {', '.join(each.name for each in remains)}")

    def said(self, text: str) -> None:
        if text not in self.stderr.read_text(errors="replace"):
            self.fail(f"did not say {text!r} but: {tail(self.stderr)}")

    def goes_on(self, step: int | None = None) -> None:
        """Start the run again with the same command: it goes on from the newest whole checkpoint, or from `step`."""
        newest = self.whole()
        expected = step if step is not None else step_of(newest[-1]) if newest else 0
        self.ensure()
        first = next((each for each in self.log[self.begun :] if each["event"] in ("start", "resume")), None)
        if first and first["step"] != expected:
            self.fail(f"went on from step {first['step']} in place of {expected}")

    def whole(self) -> list[Path]:
        """The whole checkpoints of the run's course, up to `last`, the oldest first."""
        last = (self.run / "last").resolve()
        found = sorted((self.run / "checkpoints").glob("step-*"))
        return [each for each in found if each.name <= last.name and is_whole(each)]

    # ---- faults

    def inject(self, kind: str) -> None:
        """Bring a fault about, check what is promised for it, and write it down."""
        self.fault, self.now = kind, []
        began, at = time.time(), self.step
        print(f"step {at}: {kind}", flush=True)
        assert self.process
        if kind in STOPS:
            self.stop(STOPS[kind])
            self.goes_on()
        elif kind == "SIGKILL":
            try_kill(self.process.pid, signal.SIGKILL)
            self.ended(-9)
            self.goes_on()
        elif kind == "SIGINT":
            os.killpg(self.process.pid, signal.SIGINT)  # as a terminal does
            self.ended(130)
            self.said("interrupted")
            self.goes_on()
        elif kind == "damaged checkpoint":
            self.damage_checkpoint()
        elif kind == "bad image":
            self.break_image()
        elif kind == "data away":
            self.take_data_away()
        else:
            self.second_run()
        row = {"fault": kind, "step": at, "time": round(began, 2), "until": round(time.time(), 2), "broken": self.now}
        self.faults.append(row)
        append(self.home / "faults.jsonl", row)

    def stop(self, number: signal.Signals) -> None:
        """A signal upon which the run saves, says so and ends with 75."""
        assert self.process
        try_kill(self.process.pid, number)
        self.ended(75)
        self.said(f"stopped by {number.name}")
        told = self.log[-1] if self.log else {}
        if told.get("event") != "stopped" or told.get("signal") != number.name:
            self.fail(f"its log ends with {told}")
        elif not self.whole() or step_of(self.whole()[-1]) != told["step"]:
            self.fail(f"stopped after step {told['step']}, which was not saved")

    def damage_checkpoint(self) -> None:
        """The newest checkpoint is truncated, or has one bit flipped, while the run is down."""
        # Otherwise it is not the run's fault that there is nothing to go on from.
        self.until(lambda: len({step_of(each) for each in self.whole()}) >= 3)
        self.stop(self.rng.choice(list(STOPS.values())))
        whole = self.whole()
        if len(whole) < 2:
            self.fail(f"has {len(whole)} whole checkpoints")
            return self.ensure()
        # A bit of meta.json is in no hash; a half of it is.
        name, how = self.rng.choice(
            [("model.safetensors", "half"), ("model.safetensors", "bit"), ("train.safetensors", "half"),
             ("train.safetensors", "bit"), ("meta.json", "half")]
        )  # fmt: skip
        victim = whole[-1] / name
        content = bytearray(victim.read_bytes())
        if how == "bit":
            content[self.rng.randrange(len(content))] ^= 1 << self.rng.randrange(8)
        else:
            del content[len(content) // 2 :]
        victim.write_bytes(content)
        self.goes_on(step_of(whole[-2]))
        self.said("looking at the one before")
        self.said(name)

    def break_image(self) -> None:
        """An image turns into something else until the run has passed over it."""
        assert self.process
        folder = self.data / "train" if (self.data / "train").is_dir() else self.data
        victim = self.rng.choice(images_of(folder))
        held, other = self.home / "held", self.home / "other"
        held.mkdir(exist_ok=True)
        os.link(victim, held / victim.name)
        (held / "place").write_text(str(victim))
        other.write_text("no image\n")
        os.replace(other, victim)  # never written in place: the original may be a hard link of it

        def skipped() -> bool:
            return any(each["event"] == "skip" and each["path"] == str(victim) for each in self.log[self.begun :])

        try:
            if not self.until(skipped, 10 * self.args.patience):
                self.fail(f"did not pass over a bad image: {tail(self.stderr)}")
        finally:
            mend(self.home, self.data)
        step = self.step
        if not self.until(lambda: self.step > step) and not self.finished():
            self.fail("did not go on")
            self.ensure()

    def take_data_away(self) -> None:
        """The folder of images is renamed until the run has ended, in time and with one line."""
        away = self.data.with_name("data.away")
        self.data.rename(away)
        try:
            self.ended(1)
        finally:
            away.rename(self.data)
        self.goes_on()

    def second_run(self) -> None:
        """The same command while the run goes on: refused, and the first one is not disturbed."""
        assert self.process
        stderr = self.home / "stderr" / f"{self.starts:04}-second.txt"
        other = self.spawn(stderr)
        in_time = self.until(lambda: other.poll() is not None)
        if not in_time and not self.finished():
            self.fail("the second run was not refused")
        other.kill()
        other.wait()
        if in_time and other.returncode != 2:
            self.fail(f"the second run ended with {other.returncode} in place of 2: {tail(stderr)}")
        if in_time and "another run is writing to" not in stderr.read_text(errors="replace"):
            self.fail(f"the second run said: {tail(stderr)}")
        step = self.step
        if not self.until(lambda: self.step > step) and not self.finished():
            self.fail(f"the first run did not go on: {tail(self.stderr)}")
            self.ensure()

    # ---- the whole

    def soak(self, plan: Iterator[tuple[int, str]]) -> None:
        """Fault after fault, then the calm rest of the run up to its end."""
        self.read_log()
        if not self.finished():
            self.ensure()
        for _ in zip(self.faults, plan, strict=False):  # those of an earlier call are done
            pass
        for at, kind in plan:
            if time.monotonic() > self.deadline - 60 * self.args.minutes * self.args.calm:
                break
            self.fault, self.now = "between faults", []
            while not self.until(lambda at=at: self.step >= at or self.finished(), 3600):  # type: ignore[misc]
                self.fail(f"ended by itself: {tail(self.stderr)}")
                self.ensure()
            if self.finished():
                break
            try:
                self.inject(kind)
            except Late:
                print(f"the run ended before {kind} reached it", flush=True)
                break
        self.fault, self.now = "the end", []
        if self.args.minutes:
            self.until(lambda: time.monotonic() > self.deadline, 60 * self.args.minutes)
            self.stop(signal.SIGTERM)
            return
        while not self.until(self.finished, 36000):
            self.fail(f"ended by itself: {tail(self.stderr)}")
            self.ensure()
        if self.process:
            self.ended(0)

    def interrupt(self) -> None:
        """End the run, with its state saved, for Ctrl-C."""
        if self.alive and self.process:
            try_kill(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(self.args.patience)
            except subprocess.TimeoutExpired:
                self.kill()

    def compare(self) -> str:
        """What differs between the run's weights and losses and those of the same command, undisturbed; or nothing."""
        from safetensors.numpy import load_file

        whole = self.home / "whole"
        print("training once more, undisturbed", flush=True)
        command = [str(whole) if each == str(self.run) else each for each in self.command]
        with (self.home / "stderr" / "whole.txt").open("wb") as file:
            if subprocess.run(command, stdout=file, stderr=file).returncode:
                return f"the undisturbed run failed: {tail(self.home / 'stderr' / 'whole.txt')}"
        for name in ("model.safetensors", "train.safetensors"):
            ours, theirs = (load_file(each / "last" / name) for each in (self.run, whole))
            for key in sorted(ours.keys() | theirs.keys()):
                if key not in ours or key not in theirs or ours[key].tobytes() != theirs[key].tobytes():
                    return f"{key} of {name} is not that of an undisturbed run"
        ours, theirs = (losses(read_lines(each / "log.jsonl")) for each in (self.run, whole))
        different = [step for step in sorted(ours.keys() | theirs.keys()) if ours.get(step) != theirs.get(step)]
        return f"the loss of step {different[0]} is not that of an undisturbed run" if different else ""


def losses(log: list[dict[str, Any]]) -> dict[int, float]:
    """By step; of a step that was done twice, the last one."""
    return {each["step"]: each["loss"] for each in log if each["event"] == "train"}


def schedule(seed: int, kinds: Sequence[str], gap: float) -> Iterator[tuple[int, str]]:
    """(step, fault) without end: every kind once in each span of len(kinds) · gap steps, in random order and places."""
    rng = random.Random(seed)
    start = 0.0
    while True:
        deck = rng.sample(kinds, len(kinds))
        gaps = [rng.uniform(0.5, 1.5) for _ in deck]
        for number, kind in enumerate(deck):
            yield round(start + gap * len(deck) * sum(gaps[: number + 1]) / sum(gaps)), kind
        start += gap * len(deck)


def flaws(text: str) -> list[str]:
    """What is wrong with a log.jsonl: lines that are no events, steps that do not rise though no run goes on there."""
    found, step, begun = [], 0, False
    if text and not text.endswith("\n"):
        found.append("the last line has no end")
    for number, line in enumerate(text.splitlines(), 1):
        try:
            event = json.loads(line)
            kind = event["event"]
        except (ValueError, KeyError, TypeError):
            found.append(f"line {number} is no event: {line[:80]}")
            continue
        if kind not in IN_ORDER:
            continue
        if kind in ("start", "resume"):
            if event["step"] > step or (kind == "start" and event["step"]):
                found.append(f"line {number}: {kind} at step {event['step']}, after step {step}")
            begun = True
        elif not begun or event["step"] < step or (kind == "train" and event["step"] == step):
            found.append(f"line {number}: {kind} of step {event['step']} after step {step}")
        step = event["step"]
    return found


def stretches(samples: list[dict[str, Any]], faults: list[dict[str, Any]], warm_up: int) -> list[list[dict[str, Any]]]:
    """The longest stretches of samples of one process without a fault, less their first `warm_up` steps, or a fifth of
    them where that is less."""
    parts: list[list[dict[str, Any]]] = []
    key = None
    for row in samples:
        if not row["under_way"]:
            continue
        if during(row, faults):
            key = None
            continue
        after = sum(fault["until"] < row["time"] for fault in faults)
        if key != (row["run"], after):
            key = (row["run"], after)
            parts.append([])
        parts[-1].append(row)
    warm = []
    for part in parts:
        begins, ends = part[0]["step"], part[-1]["step"]
        first = begins + min(warm_up, (ends - begins) / 5)
        warm.append([row for row in part if row["step"] >= first])
    long = [part for part in warm if len(part) >= FEWEST and part[-1]["step"] > part[0]["step"]]
    return sorted(long, key=lambda part: part[0]["step"] - part[-1]["step"])[:STRETCHES]


def during(row: dict[str, Any], faults: list[dict[str, Any]]) -> bool:
    """Whether a sample was taken while a fault was under way."""
    return any(fault["time"] <= row["time"] <= fault["until"] for fault in faults)


def growth(part: list[dict[str, Any]]) -> dict[str, Any]:
    """A line through a stretch's samples: MiB, handles and threads per 1000 steps, with the slope's standard error."""
    steps = np.array([row["step"] for row in part]) / 1000
    told: dict[str, Any] = {"from_step": part[0]["step"], "to_step": part[-1]["step"], "n": len(part)}
    for name in FITTED:
        values = np.array([row[name] for row in part], float)
        (slope, base), spread = np.polyfit(steps, values, 1), np.sum((steps - steps.mean()) ** 2)
        rest = values - slope * steps - base
        error = float(np.sqrt(np.sum(rest**2) / max(1, len(part) - 2) / spread))
        told[name] = {
            "per_1000_steps": round(float(slope), 4),
            "error": round(error, 4),
            "mean": round(float(values.mean()), 2),
        }
    return told


def members(session: int) -> list[int]:
    """The processes of a session, but those that are dead and only wait to be asked for their status."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has ended
                continue
            if int(fields[3]) == session and fields[0] not in "ZX":
                found.append(int(entry.name))
    return found


def usage(pid: int) -> tuple[int, int, int] | None:
    """(bytes resident, file handles, threads) of a process, or None where it has ended."""
    try:
        place = Path("/proc", str(pid))
        pages = int((place / "statm").read_text().split()[1])
        threads = next(line for line in (place / "status").read_text().splitlines() if line.startswith("Threads:"))
        return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir(place / "fd")), int(threads.split()[1])
    except (OSError, StopIteration):
        return None


def try_kill(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:  # it has just ended
        return


def is_whole(checkpoint: Path) -> bool:
    try:
        hashes = json.loads((checkpoint / "meta.json").read_text())["sha256"]
        found = {name: hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() for name in hashes}
        return found == hashes
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1].split(".")[0])


def images_of(folder: Path) -> list[Path]:
    return sorted(each for each in folder.rglob("*") if each.suffix.lower() in IMAGES)


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: Path, row: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def tail(path: Path) -> str:
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    return " | ".join(lines[-2:]) or "(nothing said)"


def mend(home: Path, data: Path) -> None:
    """Put back what a fault, perhaps of an earlier call, has taken from the data."""
    away = data.with_name("data.away")
    if away.exists() and not data.exists():
        away.rename(data)
    held = home / "held"
    if (held / "place").exists():
        place = Path((held / "place").read_text())
        if (held / place.name).exists():
            os.replace(held / place.name, place)
    shutil.rmtree(held, ignore_errors=True)


def copy_data(source: Path | None, data: Path) -> None:
    """The images as the soak's own copy, whole or not at all."""
    if data.exists():
        return
    if source is None:
        subprocess.run([sys.executable, "-m", "fasttrain", "data", "demo", str(data)], check=True, stdout=sys.stderr)
        return
    aside = data.with_name("data.partial")
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(source, aside, copy_function=link)
    aside.rename(data)


def link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def run_command(args: argparse.Namespace, data: Path, run: Path, gap: float, skipping: bool) -> list[str]:
    """What is started, again and again."""
    train = data / "train" if (data / "train").is_dir() else data
    per_epoch = len(images_of(train)) // args.batch_size
    if per_epoch == 0:
        sys.exit(f"soak.py: {train} has fewer images than a batch of {args.batch_size}")
    epochs = 10**6 if args.minutes else -(-args.steps // per_epoch)
    log_steps = max(1, min(10, round(gap / 4)))
    save_steps = log_steps * max(1, min(200, round(gap / 3)) // log_steps)  # so that what is saved has been logged
    command = [sys.executable, "-m", "fasttrain", "run", "--arch", args.arch, "--image-size", str(args.image_size)]
    command += ["--batch-size", str(args.batch_size), "--epochs", str(epochs), "--seed", str(args.seed)]
    command += ["--workers", str(args.workers), "--device", args.device, "--data", str(data), "--out", str(run)]
    command += ["--on-bad", "skip"] if skipping else []
    command += ["--set", f"machine.log_steps={log_steps}", "--set", f"checkpoint.every_steps={save_steps}"]
    return [*command, "--set", "checkpoint.keep=4", *(part for each in args.set for part in ("--set", each))]


def report(soak: Soak, kinds: Sequence[str], compared: str | None, ended: str) -> dict[str, Any]:
    """The result, which is also printed as tables."""
    print(f"\n{'fault':<20}{'injected':>9}{'survived':>9}")
    counts = {}
    for kind in kinds:
        rows = [each for each in soak.faults if each["fault"] == kind]
        counts[kind] = {"injected": len(rows), "survived": sum(not each["broken"] for each in rows)}
        print(f"{kind:<20}{counts[kind]['injected']:>9}{counts[kind]['survived']:>9}")
    fits = [growth(part) for part in stretches(soak.samples, soak.faults, soak.args.warm_up)]
    print(f"\n{'undisturbed steps':<20}{'n':>6}{'MiB':>9}   MiB, handles, threads per 1000 steps (standard error)")
    for fit in fits:
        lines = [fit[name] for name in FITTED]
        slopes = ", ".join(f"{each['per_1000_steps']:+.3f} ({each['error']:.3f})" for each in lines)
        print(f"{fit['from_step']} to {fit['to_step']}".ljust(20) + f"{fit['n']:>6}{lines[0]['mean']:>9.1f}   {slopes}")
    if not fits:
        print(f"none with {FEWEST} samples")
    print(f"\nbroken promises: {len(soak.broken)}" + "".join(f"\n  {each}" for each in soak.broken))
    first = next((each for each in soak.log if each["event"] == "start"), {})
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
        "bit_equal": None if compared is None else not compared,
        "broken": soak.broken,
    }


def versions(known: dict[str, str]) -> dict[str, str]:
    return {"python": sys.version.split()[0], "numpy": np.__version__, **all_installed(), **known}


def draw(path: Path, samples: list[dict[str, Any]], faults: list[dict[str, Any]]) -> None:
    """Memory, handles and threads over the steps, a line for each process, and a mark for each fault."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    plots = figure.subplots(len(FITTED), sharex=True)
    rows = [row for row in samples if row["under_way"] and not during(row, faults)]
    cuts = [0, *(at for at, (one, other) in enumerate(pairwise(rows), 1) if one["run"] != other["run"]), len(rows)]
    for axes, (name, title) in zip(plots, FITTED.items(), strict=True):
        for start, stop in pairwise(cuts):
            part = rows[start:stop]
            axes.plot([row["step"] for row in part], [row[name] for row in part], color="black", linewidth=1)
        for kind, colour in COLOURS.items():
            for number, fault in enumerate(each for each in faults if each["fault"] == kind):
                axes.axvline(fault["step"], color=colour, linewidth=1, alpha=0.6, label=None if number else kind)
        axes.set_ylabel(title)
        axes.grid(axis="y", alpha=0.3)
    plots[-1].set_xlabel("step")
    if faults:
        figure.legend(*plots[-1].get_legend_handles_labels(), loc="outside upper center", ncols=len(KINDS) // 2)
    figure.savefig(path, dpi=100)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="images to copy; none: the demo set")
    parser.add_argument("--steps", type=int, default=20000, help="of the run, rounded up to an epoch's end")
    parser.add_argument("--minutes", type=float, default=0, help="end after so long, in place of --steps")
    parser.add_argument("--gap", type=float, default=500, help="steps between two faults, at most and on average")
    parser.add_argument("--calm", type=float, default=0.25, help="share of the run, at its end, without faults")
    parser.add_argument("--only", action="append", choices=KINDS, help="this fault (repeatable) and no others")
    parser.add_argument("--compare", action="store_true", help="with an undisturbed run; leaves out bad images")
    parser.add_argument("--arch", default="test_resnet")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=20)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the run")
    parser.add_argument("--seed", type=int, default=0, help="of the run and of the faults")
    parser.add_argument("--interval", type=float, default=1, help="seconds between two samples")
    parser.add_argument("--warm-up", type=int, default=300, help="steps at the start of a stretch that are not fitted")
    parser.add_argument("--patience", type=float, default=120, help="seconds that a start, a save or an end may take")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    if args.minutes and args.compare:
        parser.error("--compare needs --steps: the end of a run by --minutes is no step that another run has")
    if args.steps < 1 or args.minutes < 0 or not 0 <= args.calm < 1 or args.gap <= 0:
        parser.error("--steps and --gap are above 0, --minutes 0 or more, --calm in [0, 1)")
    return args


def main() -> None:
    args = arguments()
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell's background job ignores the first
        signal.signal(number, signal.default_int_handler)
    kinds = [each for each in args.only or KINDS if not (args.compare and each == "bad image")]
    home = args.out.resolve()
    home.mkdir(parents=True, exist_ok=True)
    data = home / "data"
    mend(home, data)
    copy_data(args.data, data)
    disturbed = args.steps * (1 - args.calm)
    gap = args.gap if args.minutes else min(args.gap, disturbed / len(kinds))
    plan = schedule(args.seed, kinds, gap)
    if not args.minutes:
        plan = takewhile(lambda each: each[0] <= disturbed, plan)
    soak = Soak(args, run_command(args, data, home / "run", gap, "bad image" in kinds), home, data)
    compared, ended = None, "whole"
    try:
        soak.soak(plan)
        if args.compare:
            compared = soak.compare()
    except KeyboardInterrupt:
        ended = "interrupted"
        soak.interrupt()
    except Broken as error:
        ended = f"given up: {error}"
    finally:
        soak.kill()
        mend(home, data)
    soak.read_log()
    log = home / "run" / "log.jsonl"
    soak.broken += [f"log.jsonl: {each}" for each in flaws(log.read_text(errors="replace") if log.exists() else "")]
    soak.broken += [f"--compare: {compared}"] if compared else []
    result = report(soak, kinds, compared, ended)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if args.plot:
        draw(args.plot, soak.samples, soak.faults)
    sys.exit(130 if ended == "interrupted" else 1 if soak.broken or ended != "whole" else 0)


if __name__ == "__main__":
    main()
