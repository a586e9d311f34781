"""The trials of a search: ordinary runs in ordinary folders, chosen by Optuna and stopped early by successive halving.

OUT/study.log has the trials (Optuna's journal), OUT/trials/0000 and so on are their runs, with their recipes and what
they printed next to them. A search that was stopped goes on with the same command, also inside a trial.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fasttrain.checkpoints.run_dir import lock
from fasttrain.config import toml
from fasttrain.config.schema import Recipe
from fasttrain.distributed import signals
from fasttrain.evaluation.metrics import LOWER_IS_BETTER, described
from fasttrain.tune.search import Range, values_of
from fasttrain.utils.errors import RunError, Stopped, UserError
from fasttrain.utils.files import read_text
from fasttrain.utils.text import printable

if TYPE_CHECKING:
    import optuna

REDUCTION, RUNGS = 3, 2  # a third of the trials go on after 1/9 of the epochs, and a third of those after 1/3
STARTUP_TRIALS = 8  # drawn at random before the sampler models the score
_POLL = 0.2  # seconds
_KILL_AFTER = 120  # seconds that a trial gets to save and end


def require_optuna() -> None:
    """Raises UserError where Optuna is not installed."""
    try:
        import optuna  # noqa: F401
    except ImportError:
        raise UserError("`fasttrain tune` needs Optuna: pip install optuna") from None


def first_rung(epochs: int) -> int:
    """The epochs after which a trial can be stopped first; also the epochs between its evaluations. Rounded up, so that
    no trial is stopped shortly before its end."""
    return -(-epochs // REDUCTION**RUNGS)


@dataclass
class Search:
    """A search in the folder `out`.

    recipe: what the trials train, with the data, folds and device that they use; the ranges change it. jobs: trials at
    a time, each on one of the GPUs where there are some. trials: how many there shall be in all, with those of earlier
    calls; 0: any number. deadline: when this call ends, by `time.monotonic`; None: when there are enough trials.
    """

    out: Path
    recipe: Recipe
    ranges: Sequence[Range]
    jobs: int
    trials: int
    deadline: float | None
    say: Any = print
    study: "optuna.Study" = field(init=False)
    lock: threading.Lock = field(default_factory=threading.Lock)
    stopping: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.study = open_study(self.out, self.recipe, self.ranges)
        self.unfinished = [trial for trial in self.study.trials if trial.state.name == "RUNNING"]

    def run(self) -> None:
        """Run trials until there are enough, or the time is over. Raises Stopped after a signal, RunError where no
        trial can be trained."""
        with ThreadPoolExecutor(self.jobs) as pool:
            workers = [pool.submit(self._work, number) for number in range(self.jobs)]
            try:
                while not all(worker.done() for worker in workers):
                    time.sleep(_POLL)
                    if signals.received():
                        self.stopping.set()
            except KeyboardInterrupt:
                self.stopping.set()
                raise
        for worker in workers:
            worker.result()
        if signals.received():
            raise Stopped(f"stopped by {signals.received()}; the same command goes on")

    def _work(self, job: int) -> None:
        try:
            while (trial := self._next()) is not None:
                self._train(trial, job)
        except BaseException:
            self.stopping.set()  # the other jobs end too
            raise

    def _next(self) -> "optuna.Trial | None":
        """The next trial: one that an earlier call left, or a new one; None when there are enough."""
        import optuna

        with self.lock:
            if self._over():
                return None
            if self.unfinished:
                return optuna.trial.Trial(self.study, self.unfinished.pop(0)._trial_id)
            if self.trials and sum(trial.state.name != "WAITING" for trial in self.study.trials) >= self.trials:
                return None
            trial = self.study.ask()
            for each in self.ranges:
                each.suggest(trial)
            return trial

    def _over(self) -> bool:
        return self.stopping.is_set() or (self.deadline is not None and time.monotonic() >= self.deadline)

    def _train(self, trial: "optuna.Trial", job: int) -> None:
        """Train a trial to its end, unless it is stopped early, and tell the study its score."""
        import optuna

        folder = self.out / "trials" / f"{trial.number:04}"
        try:
            recipe = self.trial_recipe(trial)
        except UserError as error:  # two settings that do not fit together
            with self.lock:
                self._failed(trial, str(error))
            return
        folder.parent.mkdir(exist_ok=True)
        if not self._wait_for(folder):
            return
        folder.with_suffix(".toml").write_text(toml.to_toml(recipe), encoding="utf-8")
        command = [sys.executable, "-m", "fasttrain", "run", "--recipe", str(folder.with_suffix(".toml"))]
        environment = dict(os.environ)
        if self.jobs > 1 and torch.cuda.is_available():
            environment["CUDA_VISIBLE_DEVICES"] = visible_device(job)
        before = self.study.trials[trial.number]
        reported = set(before.intermediate_values)
        start, pruned = time.monotonic(), False
        with folder.with_suffix(".log").open("ab") as log:
            process = subprocess.Popen(
                [*command, "--out", str(folder)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C reaches this process, which lets the trial save
            )
            try:
                while process.poll() is None and not self._over() and not pruned:
                    time.sleep(_POLL)
                    pruned = self._report(trial, folder, recipe, reported) and process.poll() is None
            finally:
                status = stop(process)
        seconds = time.monotonic() - start + before.user_attrs.get("seconds", 0.0)
        trial.set_user_attr("seconds", round(seconds, 1))
        self._report(trial, folder, recipe, reported)
        score = evaluations(folder, recipe)
        with self.lock:
            if pruned:
                self.study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                self.say(f"trial {trial.number}: stopped early after epoch {max(score)}, {self._text(trial, score)}")
            elif status == 0 and score:
                self.study.tell(trial, score[max(score)])
                self.say(f"trial {trial.number}: {self._text(trial, score)}, {seconds:.0f} s")
            elif status != Stopped.exit_status and not self._over():
                self._failed(trial, last_line(folder.with_suffix(".log")))

    def _failed(self, trial: "optuna.Trial", reason: str) -> None:
        """Tell the study that a trial failed. Raises RunError where it is the only one that was tried."""
        import optuna

        self.study.tell(trial, state=optuna.trial.TrialState.FAIL)
        self.say(f"trial {trial.number} failed: {reason}; {settings_text(trial)}")
        if all(each.state.name in ("FAIL", "WAITING") for each in self.study.trials):
            raise RunError(f"the first trial failed: {reason}")

    def _wait_for(self, folder: Path) -> bool:
        """Wait while another process trains in a trial's folder, as one does whose `tune` was killed. Whether none does
        any more."""
        said = False
        while not self._over():
            try:
                with lock(folder):
                    return True
            except UserError as error:
                if not said:
                    self.say(f"waiting: {error}")
                said = True
                time.sleep(1)
        return False

    def trial_recipe(self, trial: "optuna.Trial | optuna.trial.FrozenTrial") -> Recipe:
        """The recipe of a trial's run."""
        return replace(with_settings(self.recipe, self.ranges, trial.params), name=f"trial-{trial.number:04}")

    def _report(self, trial: "optuna.Trial", folder: Path, recipe: Recipe, reported: set[int]) -> bool:
        """Report a trial's new evaluations, and add their epochs to `reported`. Whether it should be stopped."""
        for epoch, score in evaluations(folder, recipe).items():
            if epoch not in reported:
                reported.add(epoch)
                trial.report(score, epoch)
                if epoch < recipe.epochs and trial.should_prune():
                    return True
        return False

    def _text(self, trial: "optuna.Trial", score: dict[int, float]) -> str:
        return f"{described(self.recipe.evaluation.best, score[max(score)])}; {settings_text(trial)}"


def open_study(out: Path, recipe: Recipe, ranges: Sequence[Range]) -> "optuna.Study":
    """The study in a folder, which is made where it does not exist; its first trial has the recipe's own values. Raises
    UserError where the folder holds a study of another recipe."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna calls some of its options experimental
        sampler = optuna.samplers.TPESampler(
            seed=recipe.seed, n_startup_trials=STARTUP_TRIALS, multivariate=True, constant_liar=True
        )
    study = optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(out / "study.log"))),
        study_name="fasttrain",
        load_if_exists=True,
        direction="minimize" if recipe.evaluation.best in LOWER_IS_BETTER else "maximize",
        sampler=sampler,
        pruner=optuna.pruners.SuccessiveHalvingPruner(first_rung(recipe.epochs), REDUCTION),
    )
    trained = {key: value for key, value in toml.to_dict(recipe).items() if key not in ("machine", "checkpoint")}
    base = {"recipe": trained, "search": [str(each) for each in ranges]}
    before = study.user_attrs.get("base")
    if before is None:
        study.set_user_attr("base", base)
        study.enqueue_trial(values_of(recipe, ranges))
    elif before != base:
        what = (
            "searches other settings" if before["recipe"] == base["recipe"] else "is for another recipe or other data"
        )
        raise UserError(f"the search in {printable(out)} {what}; name another --out, or call it with the same options")
    return study


def with_settings(recipe: Recipe, ranges: Sequence[Range], params: dict[str, Any]) -> Recipe:
    """`recipe` with the values of a trial, as Optuna stores them."""
    changes = [
        (each.key, json.loads(params[each.key]) if each.kind == "choice" else params[each.key])
        for each in ranges
        if each.key in params
    ]
    return toml.override(recipe, *changes, option="--search")


def settings_text(trial: "optuna.Trial | optuna.trial.FrozenTrial") -> str:
    """A trial's values, for people."""
    return ", ".join(
        f"{key}={value:.3g}" if isinstance(value, float) else f"{key}={value}" for key, value in trial.params.items()
    )


def evaluations(folder: Path, recipe: Recipe) -> dict[int, float]:
    """A run's scores by the number of epochs after which they were measured; of the averaged weights where the run
    averages them."""
    try:
        lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    found = {}
    for line in lines:
        if '"event": "eval"' in line:
            try:
                event = json.loads(line)
            except ValueError:  # it is being written
                continue
            score = (event.get("ema") or event).get(recipe.evaluation.best)
            if score is not None:
                found[int(event["epoch"]) + 1] = float(score)
    return found


def stop(process: "subprocess.Popen[bytes]") -> int:
    """Let a run save and end, where it has not ended. Returns its exit status."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_KILL_AFTER)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def last_line(log: Path) -> str:
    """The last line that a run has printed, safe to print."""
    try:
        lines = [line for line in read_text(log, 1 << 30).splitlines() if line.strip()]
    except (OSError, ValueError):
        lines = []
    return printable(lines[-1][:500]) if lines else "it printed nothing"


def visible_device(job: int) -> str:
    """The GPU of a job, as CUDA_VISIBLE_DEVICES names it. With more jobs than GPUs some share one."""
    names = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    names = names or [str(number) for number in range(torch.cuda.device_count())]
    return names[job % len(names)]
