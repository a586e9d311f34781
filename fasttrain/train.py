"""Training: `train`, and the loop."""

import gc
import sys
import time
from contextlib import closing
from datetime import datetime
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from torch import nn

from fasttrain.checkpoints.async_save import Saver
from fasttrain.checkpoints.resume import rewind
from fasttrain.config.schema import Recipe
from fasttrain.data.index import Index
from fasttrain.data.message_names import MessageNames
from fasttrain.distributed.ranks import Ranks
from fasttrain.distributed.stop_signals import StopSignals
from fasttrain.distributed.watchdog import EVALUATING, SAVING, Watch
from fasttrain.evaluation.evaluate import EvaluationFailed, evaluate
from fasttrain.evaluation.metrics import NAMES, Scores
from fasttrain.pipelines.eval_loader import EvalLoader
from fasttrain.pipelines.plan import UNBOUNDED, Plan
from fasttrain.pipelines.train_loader import PREFETCH, batches
from fasttrain.prepare import Run, build_val_loader, decoder_of, open_log, prepare
from fasttrain.training.budget import FIRST_POINTS, Budget
from fasttrain.training.feed import Feed
from fasttrain.training.guard import REPORT, Diverged
from fasttrain.training.log import Log
from fasttrain.training.memory import explain_out_of_memory, gc_paused
from fasttrain.training.usage import Usage
from fasttrain.utils.decoder_messages import Messages
from fasttrain.utils.errors import RunError, Stopped
from fasttrain.utils.text import printable

NO_MESSAGES = Messages()


class Result(NamedTuple):
    """steps: steps done in total. scores: of the last evaluation, or None without validation images. best: the best
    score by `evaluation.best`. Both are the averaged weights' where the run averages them."""

    steps: int
    scores: Scores | None
    best: float | None


def train(
    recipe: Recipe,
    out: Path,
    train_index: Index,
    val_index: Index | None,
    ranks: Ranks,
    resume_from: Path | None = None,
    messages: Messages = NO_MESSAGES,
    started: float | None = None,
) -> Result:
    """Train a resolved recipe into the run's folder `out`.

    resume_from: the checkpoint to resume from; None: start. messages: of image decoders, for which the log names a
    file. started: from when the time of a budget counts, by `time.monotonic`; by default now. Every rank calls this
    with the same arguments, except for `ranks`. Raises UserError where the settings, the data and the checkpoint do not
    fit together; RunError where an image cannot be decoded, memory runs out or losses stay not finite; and Stopped
    after SIGTERM, SIGUSR1 or SIGHUP, once the step is done and saved.
    """
    started = time.monotonic() if started is None else started
    budget, usage = None, Usage.start(ranks)
    with StopSignals() as signals:
        while True:
            run = prepare(recipe, out, train_index, val_index, ranks, resume_from)
            if run.finished:
                if run.ended_early and ranks.first:
                    print(
                        f"this run ended early, after step {run.progress.steps_done} of {run.plan.steps}: "
                        f"{run.progress.stale} evaluations without a better {NAMES[run.progress.criterion]}; "
                        "--set evaluation.patience=0 goes on",
                        file=sys.stderr,
                    )
                elif ranks.first:
                    print(f"this run is complete, with {run.plan.steps} of {run.plan.steps} steps", file=sys.stderr)
                return Result(run.progress.steps_done, None, run.progress.best)
            budget = budget or budget_of(run, started)
            try:
                return train_loop(run, signals, messages, usage, budget)
            except Diverged as diverged:
                del run  # the next one needs its memory
                resume_from = ranks.from_first(partial(rewind, out, diverged, train_index, recipe.guard.rewinds))
                if resume_from is None:
                    raise RunError(f"{diverged}; {printable(out / REPORT)} has the steps and their images") from None


def budget_of(run: Run, started: float) -> Budget | None:
    """The budget of a run that ends by time."""
    settings = run.recipe.budget
    if settings.until:
        left = (datetime.fromisoformat(settings.until) - datetime.now().astimezone()).total_seconds()
        return Budget(left + time.monotonic() - started, started=started)
    return Budget(settings.seconds, used=run.seconds, started=started) if settings.seconds else None


def train_loop(
    run: Run, signals: StopSignals, messages: Messages, usage: Usage, budget: Budget | None = None
) -> Result:
    """Train from the run's next step to its end. usage: of this command. Raises Diverged where too many steps in a row
    were not finite."""
    recipe, plan, ranks, progress, train_step = run.recipe, run.plan, run.ranks, run.progress, run.train_step
    first_step = progress.steps_done
    val_loader, log = build_val_loader(run), open_log(run)
    end = UNBOUNDED if budget else plan.steps  # a run that ends by time may become longer
    stream = batches(
        plan,
        run.train_index,
        ranks.device,
        ranks.threads(recipe.machine.workers),
        progress.steps_done,
        stop_step=end,
        on_skip=log.skip if recipe.data.on_bad == "skip" else None,
        decoder=decoder_of(recipe, ranks.device),
    )
    watch = Watch(ranks, recipe.machine.hang_timeout)
    saver = Saver(run.out, recipe.checkpoint, log, alive=lambda: watch.at(progress.steps_done - 1, SAVING))
    feed = Feed(stream, plan, run.train_index, watch, range(progress.steps_done, end), recipe.machine.hash_batches)
    names = MessageNames(messages, log.say)
    if budget:
        budget.start(first_step)
    with closing(log), saver, watch, gc_paused(), explain_out_of_memory(plan), names:
        for step, micro_batches in feed:
            train_step(step, micro_batches)

            progress.steps_done, progress.scores = step + 1, None
            epoch, epoch_ends = step // plan.steps_per_epoch, (step + 1) % plan.steps_per_epoch == 0
            log.advance()
            if recipe.machine.hash_batches:
                log_hash(feed, log, progress.steps_done, ranks)
            measures = budget is not None and step + 1 - first_step in FIRST_POINTS
            last = step + 1 == run.plan.steps
            if epoch_ends or last or measures or is_multiple(step + 1, recipe.machine.log_steps):
                log_point(run, log, saver, epoch)
                names.look(lambda: recent_paths(run))
                if budget and not last:
                    fit_length(run, log, budget)
            epoch_ends |= run.plan.steps <= step + 1  # a run that ends by time may end inside an epoch
            if epoch_ends:
                log_collapsed(run, log, epoch)
                if val_loader is not None and evaluates_after(recipe, run.plan, step + 1):
                    try:
                        progress.evaluated(evaluate_epoch(run, log, watch, val_loader, epoch))
                    except EvaluationFailed as failure:
                        save(run, saver, epoch, epoch_ends, budget)
                        saver.finish(last=True)
                        raise failure.__cause__ or failure from None
                    if budget:
                        budget.paused(step + 1)
                    if budget and not run.finished:
                        fit_length(run, log, budget)

            stopping = signals.agreed(ranks)
            if stopping or run.ended_early or saves_after(recipe, run.plan, step + 1):
                watch.at(step, SAVING)
                save(run, saver, epoch, epoch_ends, budget)
            if stopping and not run.finished:
                used = usage.so_far()
                saver.finish(last=True)
                log.event("stopped", step=step + 1, signal=signals.name, **used)
                ranks.any(False)  # wait until rank 0 has saved: a launcher ends all ranks once one has ended
                by = signals.name or "a signal to another rank"
                raise Stopped(
                    f"stopped by {by} after step {step + 1}{log.of_steps}, and saved; the same command resumes"
                )
            if epoch_ends:
                gc.collect()
            if epoch_ends or stopping:
                log.resume_clock()
            if run.ended_early:
                log.say(
                    f"ended after epoch {epoch}: {progress.stale} evaluations without a better "
                    f"{NAMES[progress.criterion]}"
                )
            if run.finished:
                break
        used = usage.so_far()
        saver.finish(last=True)
        log.end(progress.steps_done, progress.best, **used)
    return Result(progress.steps_done, progress.scores, progress.best)


def log_hash(feed: Feed, log: Log, steps_done: int, ranks: Ranks) -> None:
    """Log one hash over all images of the step, of all ranks in their order."""
    of_all_ranks = [image_hash for hashes in ranks.gather(feed.hashes) for image_hash in hashes]
    log.event("batch", step=steps_done, sha256=sha256("".join(of_all_ranks).encode()).hexdigest())


def log_point(run: Run, log: Log, saver: Saver, epoch: int) -> None:
    """Read the meter and log the means since the last point. Waits for the device. Raises Diverged."""
    progress, train_step = run.progress, run.train_step
    done = progress.steps_done
    reading = train_step.meter.read(run.ranks)
    log.train(epoch, done, train_step.lr_at(done - 1), reading.means)
    for name in progress.logged.keys() & reading.means:
        progress.logged[name].append(reading.means[name])
    saver.poll()
    if reading.failures:
        log.failed(done, reading.failures)
    if reading.streak >= run.recipe.guard.patience:
        norms = train_step.guard.worst()
        raise Diverged(done, run.plan, progress.rewinds, progress.best, reading.streak_values, norms)


def fit_length(run: Run, log: Log, budget: Budget) -> None:
    """Fit the number of steps of a run that ends by time, as rank 0 measures it."""
    plan, done = run.plan, run.progress.steps_done
    budget.measure(done)
    per_pause = plan.steps_per_epoch * run.recipe.evaluation.every_epochs
    pause_steps = len(run.val_index or ()) / plan.batch_size
    steps = run.ranks.from_first(lambda: budget.fit(done, plan.steps, per_pause, pause_steps))
    if steps != plan.steps:
        run.fit(steps)
        log.fitted(done, steps, budget.left)


def recent_paths(run: Run) -> list[str]:
    """The files that this rank has decoded up to now in the epoch, the last ones first, and those of the validation
    images. None of images in containers."""
    plan, done = run.plan, run.progress.steps_done
    first = (done - 1) // plan.steps_per_epoch * plan.steps_per_epoch
    steps = range(min(done + PREFETCH, plan.steps) - 1, first - 1, -1)
    paths = []
    if run.train_index.store is None:
        numbers = (plan.images(step, micro).tolist() for step in steps for micro in range(plan.micro_batches))
        paths += [run.train_index.paths[number] for some in numbers for number in some]
    if run.val_index is not None and run.val_index.store is None:
        paths += run.val_index.paths
    return paths


def log_collapsed(run: Run, log: Log, epoch: int) -> None:
    """Log each loss that has collapsed in an epoch, and forget the epoch's means."""
    for loss in run.recipe.losses:
        means = run.progress.logged[loss.name]
        if loss.collapsed(means):
            log.event("collapsed", epoch=epoch, step=run.progress.steps_done, loss=loss.name, values=list(means))
            log.say(
                f"epoch {epoch}: {loss.name} has collapsed: its mean stayed at the margin, so all images look alike to "
                "the network; lower lr_scale or the loss's weight"
            )
        means.clear()


def evaluate_epoch(run: Run, log: Log, watch: Watch, val_loader: EvalLoader, epoch: int) -> Scores:
    """Evaluate the weights, and the averaged ones where there are any. Returns the scores that count."""
    ranks, train_step, index = run.ranks, run.train_step, val_loader.source.index

    def scores_of(model: nn.Module) -> Scores:
        crops = watch.each(run.progress.steps_done - 1, EVALUATING, val_loader)
        ranks.share_buffers(model)
        return evaluate(model, crops, index, ranks, train_step.dtype)

    raw = scores_of(train_step.model)
    averaged = scores_of(train_step.ema.model) if train_step.ema else None
    log.evaluation(epoch, run.progress.steps_done, raw, averaged)
    return averaged or raw


def save(run: Run, saver: Saver, epoch: int, epoch_ends: bool, budget: Budget | None) -> None:
    """Save a checkpoint of the steps done so far; a thread writes it."""
    recipe, plan, ranks, progress, train_step = run.recipe, run.plan, run.ranks, run.progress, run.train_step
    saver.finish()
    if saver.lost:  # the last save failed, so the best that it held is on no disk
        progress.best, saver.lost = progress.best_on_disk, False
    improved = progress.update_best(validates=run.val_index is not None)
    meters = ranks.gather(train_step.meter.state())
    if ranks.first:
        meta = {
            **run.fingerprint,
            **progress.to_meta(),
            "epoch_steps": plan.steps_per_epoch,
            "world": ranks.world,
            "shift": plan.shift,
            "length": plan.length if plan.bounded else 0,
            "seconds": round(budget.spent, 1) if budget else 0.0,
            "streak": train_step.meter.streak,
            "meters": meters,
        }
        archived = epoch_ends and is_multiple(epoch + 1, recipe.checkpoint.archive_epochs)
        saver.save(progress.steps_done, train_step.state, epoch, improved=improved, archived=archived, meta=meta)


def saves_after(recipe: Recipe, plan: Plan, steps_done: int) -> bool:
    """Whether a run saves after so many steps."""
    every_epochs = recipe.checkpoint.every_epochs * plan.steps_per_epoch
    return (
        steps_done == plan.steps
        or is_multiple(steps_done, every_epochs)
        or is_multiple(steps_done, recipe.checkpoint.every_steps)
    )


def evaluates_after(recipe: Recipe, plan: Plan, steps_done: int) -> bool:
    """Whether a run with validation images evaluates after so many steps, at the end of an epoch or of the run."""
    every = recipe.evaluation.every_epochs * plan.steps_per_epoch
    return steps_done == plan.steps or is_multiple(steps_done, every)


def is_multiple(number: int, of: int) -> bool:
    """Whether a number is a multiple of `of`; False where `of` is 0, which switches a setting off."""
    return of > 0 and number % of == 0
