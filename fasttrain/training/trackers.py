"""Experiment trackers behind the log: TensorBoard, Weights & Biases, trackio and MLflow.

Each one works on a thread of its own, so that a slow, blocked or broken tracker neither stops nor slows the run.
"""

import importlib
import importlib.util
import json
import logging
import re
import shlex
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple, Protocol

from fasttrain.distributed import signals
from fasttrain.utils.errors import UserError
from fasttrain.utils.files import atomic, read_json
from fasttrain.utils.text import printable

IDS = "trackers.json"  # in a run's folder: the id of the tracked run by tracker, such as {"wandb:PROJECT": "…"}
QUEUE = 1000  # log points that may wait for a tracker; further ones are dropped
CLOSE_SECONDS = 30.0  # how long the end of a run waits for all its trackers together
_START_SECONDS = 60.0  # after which W&B gives up connecting; a process may have to wait for that before it can exit
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_IDS_BYTES = 1 << 16
_PARAMS = 100  # MLflow's most per request
_MODULES = {"tensorboard": "torch.utils.tensorboard"}  # those not called like their trackers

Say = Callable[[str], None]


class Tracker(Protocol):
    """One run in one tracker. Its thread alone makes, calls and closes it. id: the tracked run's; empty if it has
    none. where: a line on where to look at it; empty if there is nothing to say."""

    id: str
    where: str

    def log(self, step: int, values: dict[str, float]) -> None:
        """Scalars by name after `step` steps. Steps may go back: a run that resumes or rewinds repeats some."""

    def close(self, finished: bool) -> None:
        """Write all that is left. finished: whether the run has reached its end."""


class Tracked(NamedTuple):
    """What a tracker gets to know about a run. config: its recipe as plain values. known: the id of the tracked run to
    resume; empty for a new one."""

    out: Path
    project: str
    config: dict[str, Any]
    known: str

    @property
    def name(self) -> str:
        """A readable name: the last two parts of the run's folder."""
        return printable("/".join(self.out.resolve().parts[-2:]))


def require_installed(track: Sequence[str]) -> None:
    """Raises UserError where a tracker's package is not installed. track: see `machine.track`."""
    for tracker in track:
        name = tracker.partition(":")[0]
        found: Any = sys.modules[name] if name in sys.modules else importlib.util.find_spec(name)
        # A folder of this name in the working directory, as W&B makes one, counts as a package without an origin.
        if found is None or (isinstance(found, ModuleSpec) and found.origin is None):
            raise UserError(f"machine.track={printable(tracker)} needs {name}: pip install {name}")


class Trackers:
    """The trackers of a run, whose folder is `out`. track: see `machine.track`. config: the recipe as plain values.
    say: prints a line to stderr."""

    def __init__(self, out: Path, *, tensorboard: bool, track: Sequence[str], config: dict[str, Any], say: Say) -> None:
        self.path, self.say, self.lock = out / IDS, say, threading.Lock()
        self.ids = _read_ids(self.path, say) if track else {}
        starts: dict[str, Callable[[], Tracker | None]] = {}
        if tensorboard:
            _import("tensorboard")
            starts["TensorBoard"] = partial(_tensorboard, out, say)
        for tracker in track:
            name, _, project = tracker.partition(":")
            _import(name)
            starts[tracker] = partial(_open, name, Tracked(out, project, config, self.ids.get(tracker, "")))
        self.sinks = [Sink(name, start, self._remember, say) for name, start in starts.items()]

    def log(self, step: int, values: dict[str, float]) -> None:
        """Scalars by name after `step` steps. Never waits."""
        for sink in self.sinks:
            sink.log(step, values)

    def close(self, finished: bool) -> None:
        """Wait until the trackers have written everything, for CLOSE_SECONDS at most. finished: see `Tracker.close`."""
        deadline = time.monotonic() + CLOSE_SECONDS
        for sink in self.sinks:
            sink.end(finished)
        for sink in self.sinks:
            sink.wait(deadline)

    def _remember(self, name: str, run_id: str) -> None:
        """Keep a tracked run's id for when the run resumes."""
        with self.lock:
            self.ids[name] = run_id
            try:
                with atomic(self.path) as temporary:
                    temporary.write_text(json.dumps(self.ids, indent=1) + "\n", encoding="utf-8")
            except OSError as error:
                reason = error.strerror or error
                self.say(f"cannot write {printable(self.path)}: {reason}; a resumed run starts anew in {name}")


class Sink:
    """Passes scalars on to a tracker, in order, on a daemon thread. An error ends the tracker and is reported once.

    start: makes the tracker, on that thread; None where there is nothing to do. remember: takes the tracked run's id.
    """

    def __init__(
        self, name: str, start: Callable[[], Tracker | None], remember: Callable[[str, str], None], say: Say
    ) -> None:
        self.name, self.start, self.remember, self.say = name, start, remember, say
        self.points: SimpleQueue[tuple[int, dict[str, float]] | None] = SimpleQueue()
        self.done = threading.Event()
        self.dropping = self.finished = self.abandoned = False
        threading.Thread(target=self._work, name=f"tracker {name}", daemon=True).start()

    def log(self, step: int, values: dict[str, float]) -> None:
        """Queue scalars; where QUEUE points wait already, drop them, which is reported once."""
        if self.done.is_set():
            return
        if self.points.qsize() < QUEUE:
            self.points.put((step, values))
        elif not self.dropping:
            self.dropping = True
            self.say(f"{self.name} is too slow and loses points from step {step} on; log.jsonl has everything")

    def end(self, finished: bool) -> None:
        """Let the thread close the tracker after what is queued. Does not wait."""
        self.finished = finished
        self.points.put(None)

    def wait(self, deadline: float) -> None:
        """Wait for the thread until `deadline`, by `time.monotonic`."""
        if not self.done.wait(max(0.0, deadline - time.monotonic())):
            self.abandoned = True  # from now on it says nothing: Python may be exiting
            self.say(
                f"{self.name} is still busy after {CLOSE_SECONDS:g} s and may lose points; log.jsonl has everything"
            )

    def _work(self) -> None:
        try:
            tracker = self.start()
            if tracker is None:
                return
            if tracker.id:
                self.remember(self.name, tracker.id)
            if tracker.where:
                self.say(f"{self.name}: {printable(tracker.where)}")
            while (point := self.points.get()) is not None:
                tracker.log(*point)
            tracker.close(self.finished)
        except (Exception, SystemExit) as error:
            if not self.abandoned:
                self.say(f"{self.name}: {_reason(error)}; it gets no more points, and log.jsonl has everything")
        finally:
            self.done.set()


def _open(name: str, run: Tracked) -> Tracker:
    match name:
        case "wandb":
            return _WandB(run)
        case "trackio":
            return _Trackio(run)
        case _:
            return _MLflow(run)


class _TensorBoard:
    id = where = ""

    def __init__(self, writer: Any) -> None:
        self.writer = writer

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self, finished: bool) -> None:
        self.writer.close()


def _tensorboard(out: Path, say: Say) -> Tracker | None:
    """TensorBoard; None where it is not installed, or does not work, which is reported."""
    try:
        from torch.utils.tensorboard import SummaryWriter

        return _TensorBoard(SummaryWriter(str(out / "tensorboard")))
    except ModuleNotFoundError:
        return None
    except OSError:
        return None  # if the disk is full, log.jsonl reports it
    except Exception as error:  # versions of TensorBoard, protobuf and numpy that do not fit raise anything
        say(f"no TensorBoard files: {_reason(error)}; machine.tensorboard=false leaves it out")
        return None


class _WandB:
    def __init__(self, run: Tracked) -> None:
        import wandb

        self.id = run.known or uuid.uuid4().hex
        wanted = {
            "silent": True,  # without a login it also raises instead of asking for one
            "console": "off",  # stdout and stderr are not captured
            "x_disable_meta": True,  # which holds the command line; the recipe is in the configuration
            "disable_git": True,
            "save_code": False,
            "init_timeout": _START_SECONDS,
            "finish_timeout": CLOSE_SECONDS - 5,
            "reinit": "create_new",
            "allow_val_change": True,
            # The stop button of its page: the run saves and ends, instead of a KeyboardInterrupt.
            "stop_fn": partial(signals.request, "W&B's stop button"),
        }
        known = wandb.Settings.model_fields  # other versions may lack some
        settings = wandb.Settings(**{key: value for key, value in wanted.items() if key in known})
        # The login does not have the settings of the run. Other runs of this process keep theirs.
        wandb.setup(wandb.Settings(silent=True))
        self.run = wandb.init(
            project=run.project,
            id=self.id,
            name=run.name,
            dir=str(run.out),
            config=run.config,
            resume="allow",
            settings=settings,
        )
        self.where = self.run.url or "offline; `wandb sync` uploads the folders in the run's wandb/"
        # Its own steps cannot go back; as an axis, ours can.
        self.run.define_metric("step", hidden=True)
        self.run.define_metric("*", step_metric="step")

    def log(self, step: int, values: dict[str, float]) -> None:
        self.run.log({"step": step, **values})

    def close(self, finished: bool) -> None:
        self.run.finish(exit_code=0 if finished else 1)


class _Trackio:
    def __init__(self, run: Tracked) -> None:
        import trackio

        self.restore = _silence("trackio")
        self.run = trackio.init(
            run.project, name=run.name, config=run.config, embed=False, auto_log_cpu=False, auto_log_gpu=False
        )
        # It finds a run to resume by its name alone, which runs in other folders may have too.
        self.run.id = run.known or self.run.id
        self.id = self.run.id
        self.where = f"`trackio show --project {shlex.quote(run.project)}` shows it"

    def log(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def close(self, finished: bool) -> None:
        self.run.finish()
        self.restore()


class _MLflow:
    def __init__(self, run: Tracked) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self.level = logging.getLogger("mlflow").level
        logging.getLogger("mlflow").setLevel(logging.ERROR)
        self.client = MlflowClient()
        self.where = f"in {self.client.tracking_uri}"
        self.id, params = self._open(run)
        new = [Param(key, value) for key, value in _flat(run.config).items() if key not in params]
        for first in range(0, len(new), _PARAMS):
            self.client.log_batch(self.id, params=new[first : first + _PARAMS], synchronous=True)

    def _open(self, run: Tracked) -> tuple[str, dict[str, str]]:
        """The id of the tracked run, and its parameters, which MLflow does not let change. It is a new one where the
        known one does not exist in this store, or was deleted."""
        from mlflow.exceptions import MlflowException

        if run.known:
            with suppress(MlflowException):  # without a connection the next request fails too
                found = self.client.get_run(run.known)
                if found.info.lifecycle_stage == "active":
                    self.client.update_run(run.known, status="RUNNING")
                    return run.known, found.data.params
        experiment = self.client.get_experiment_by_name(run.project)
        experiment_id = experiment.experiment_id if experiment else self.client.create_experiment(run.project)
        return self.client.create_run(experiment_id, run_name=run.name).info.run_id, {}

    def log(self, step: int, values: dict[str, float]) -> None:
        from mlflow.entities import Metric

        now = round(time.time() * 1000)
        metrics = [Metric(name, value, now, step) for name, value in values.items()]
        self.client.log_batch(self.id, metrics=metrics, synchronous=True)

    def close(self, finished: bool) -> None:
        self.client.set_terminated(self.id, status="FINISHED" if finished else "KILLED")
        logging.getLogger("mlflow").setLevel(self.level)


def _read_ids(path: Path, say: Say) -> dict[str, str]:
    """The ids of tracked runs. An untrusted file: where it is damaged, this is reported and there are none."""
    try:
        ids = read_json(path, _IDS_BYTES)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        ids = None
    if isinstance(ids, dict) and all(isinstance(each, str) and _ID.fullmatch(each) for each in ids.values()):
        return ids
    say(f"{printable(path)} is damaged and ignored: trackers start new runs")
    return {}


def _import(name: str) -> None:
    """Import a tracker's package: here and not on its thread, since threads that import at once can get half a module.
    An error is not lost: the tracker's thread meets it again."""
    with suppress(Exception):
        importlib.import_module(_MODULES.get(name, name))


def _silence(package: str) -> Callable[[], None]:
    """Let a package's modules print nothing, until the function that is returned is called. Only stdout as a whole
    could be redirected, and other threads use it."""
    modules = [module for name, module in list(sys.modules.items()) if f"{name}.".startswith(f"{package}.")]
    for module in modules:
        vars(module)["print"] = lambda *args, **options: None

    def restore() -> None:
        for module in modules:
            vars(module).pop("print", None)

    return restore


def _reason(error: BaseException) -> str:
    """An error as one short line."""
    text = (isinstance(error, OSError) and error.strerror) or str(error).strip()
    first = text.splitlines()[0].rstrip(". ") if text else ""
    line = f"{type(error).__name__}: {first}" if first else type(error).__name__
    return printable(line if len(line) <= 300 else f"{line[:299]}…")


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """A recipe's values as text, by dotted key. A table that is the value of a loss's setting, whose keys can be any
    text, stays whole."""
    flat: dict[str, str] = {}
    for key, value in table.items():
        if isinstance(value, dict) and prefix.count(".") < 2:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return flat
