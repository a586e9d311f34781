"""Training: one function, read from top to bottom."""

import gc
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fasttrain import __version__
from fasttrain.checkpoints import checkpoint, resume
from fasttrain.checkpoints.async_save import Saver
from fasttrain.checkpoints.init_weights import initialise
from fasttrain.checkpoints.run_dir import abandon_later, check_overwritable, newest_before_failures, write_recipe
from fasttrain.config import toml
from fasttrain.config.schema import CheckpointConfig, Recipe
from fasttrain.data.index import Index, require_classes
from fasttrain.distributed.ranks import Ranks, StopSignals
from fasttrain.distributed.watchdog import EVALUATING, SAVING, TRAINING, WAITING, Watch
from fasttrain.evaluation.evaluate import evaluate
from fasttrain.evaluation.predictions import Scores
from fasttrain.losses.distillation import Distillation
from fasttrain.models import Classifier, build_on_meta, check_input_shape
from fasttrain.pipelines.eval_loader import EvalLoader
from fasttrain.pipelines.images import Images
from fasttrain.pipelines.plan import Plan
from fasttrain.pipelines.train_loader import batches
from fasttrain.pipelines.views import views_by_name
from fasttrain.prepare import decoder_of
from fasttrain.training.guard import REPORT, Diverged
from fasttrain.training.log import Log
from fasttrain.training.step import Step
from fasttrain.utils.errors import RunError, Stopped, UserError
from fasttrain.utils.text import printable


class Result(NamedTuple):
    """steps: done in all. scores: of the last evaluation, or None without validation images. best: best top-1. Both
    are those of the averaged weights where the run averages them."""

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
) -> Result:
    """Train a resolved recipe into the run's folder `out`: on from its checkpoint, or from other weights, or scratch.

    Every rank calls this with the same arguments but its own `ranks`. Raises UserError where the settings, the data
    or the checkpoint do not fit together, RunError where a file cannot be decoded, the memory does not suffice or
    losses stay not finite, and Stopped where a SIGTERM or SIGUSR1 came: after the step, and saved.
    """
    with StopSignals() as signals:
        while True:
            try:
                return train_loop(recipe, out, train_index, val_index, ranks, signals, resume_from)
            except Diverged as fault:
                resume_from = ranks.from_first(partial(rewind, out, fault, train_index, recipe.guard.rewinds))
                if resume_from is None:
                    raise RunError(f"{fault}; {printable(out / REPORT)} has the steps and their images") from None


def train_loop(
    recipe: Recipe,
    out: Path,
    train_index: Index,
    val_index: Index | None,
    ranks: Ranks,
    signals: StopSignals,
    resume_from: Path | None,
) -> Result:
    """The loop: what `train` does, up to the end or to where a guard has to go back, which it raises as Diverged."""
    device = ranks.device
    plan = Plan.of(recipe, train_index, ranks.world, ranks.rank)
    check_input_shape(
        build_on_meta(recipe, len(train_index.classes)), recipe.arch, plan.micro_batch * plan.views, recipe.image_size
    )
    teacher = load_teacher(recipe, train_index.classes, device)
    torch.manual_seed(recipe.seed)
    model = Classifier.of(recipe, len(train_index.classes))
    run_fingerprint = resume.run_fingerprint(recipe, train_index)
    start, best, scores, rewinds, changed, notes = 0, None, None, 0, [], []
    saved = checkpoint.load(resume_from) if resume_from is not None else None
    if saved is not None:
        changed = resume.check_compatible(saved, run_fingerprint, recipe.resume.allow)
        if saved.meta["world"] != ranks.world:
            changed.append(f"ranks were {saved.meta['world']} and are {ranks.world}")
        decoder = saved.meta["recipe"]["machine"].get("decoder", recipe.machine.decoder)
        if decoder != recipe.machine.decoder:
            changed.append(
                f"the decoder was {printable(decoder)} and is {recipe.machine.decoder}: pixels differ slightly"
            )
        notes += [f"going on with changes: {'; '.join(changed)}"] if changed else []
        start, best = resume.step_of(saved.meta, plan.steps_per_epoch), saved.meta["best"]
        shift = saved.meta["shift"] * plan.steps_per_epoch // saved.meta["epoch_steps"]
        plan, rewinds = replace(plan, shift=shift), saved.meta["rewinds"]
    else:
        require_init(recipe)
        if recipe.init.weights:
            notes.append(initialise(model, recipe.init, recipe.arch, train_index.classes))
        elif recipe.aside:
            notes.append("the mean teacher starts from random weights; --init RUN starts it from trained ones")

    torch.backends.cudnn.benchmark = True  # of the algorithms for a shape the fastest; shapes stay the same
    train_step = Step(recipe, plan, model, torch.from_numpy(train_index.labels), ranks, teacher)
    meter, guard, ema = train_step.meter, train_step.guard, train_step.ema
    logged: dict[str, list[float]] = {loss.name: [] for loss in recipe.losses}  # in this epoch
    if saved is not None:
        checkpoint.restore(saved, train_step.state)
        guard.reset()
        meter.restore(saved.meta["meters"], saved.meta["streak"], ranks)
        logged |= saved.meta["logged"]
        if start >= plan.steps:
            return Result(start, None, best)
        if ranks.first:
            write_recipe(out, toml.to_toml(recipe))
        saved = None  # its tensors take as much memory as the network's

    threads = ranks.threads(recipe.machine.workers)
    evaluation = None
    if val_index is not None:
        views = views_by_name("center", recipe.image_size)
        evaluation = EvalLoader(
            val_index,
            views,
            plan.micro_batch,
            device,
            threads,
            ranks.world,
            ranks.rank,
            decoder=decoder_of(recipe, device),
        )
    tolerant = recipe.checkpoint.on_error == "go_on"
    log = Log(
        out,
        ranks,
        start_step=start,
        steps=plan.steps,
        batch_size=plan.batch_size,
        tolerant=tolerant,
        tensorboard=recipe.machine.tensorboard,
    )
    log.event(
        "resume" if start else "start",
        step=start,
        steps=plan.steps,
        images=plan.count,
        world=ranks.world,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        versions={"fasttrain": __version__, "torch": torch.__version__},
        **({"changed": changed} if changed else {}),
        **({"rewinds": rewinds, "shift": plan.shift} if rewinds else {}),
    )
    log.say(about_device(recipe, ranks))
    for line in filter(None, (*notes, about_groups(plan), about_views(plan, recipe))):
        log.event("note", text=line)
        log.say(line)
    skip = log.skip if recipe.data.on_bad == "skip" else None
    stream = batches(plan, train_index, device, threads, start, on_skip=skip, decoder=decoder_of(recipe, device))
    step = start
    watch = Watch(ranks, recipe.machine.hang_timeout)
    saver = Saver(out, recipe.checkpoint, log, alive=lambda: watch.at(step, SAVING))
    best_before = best
    seen: list[str] = []  # hashes of this step's images, where the recipe asks for them

    def watched() -> Iterator[Images]:
        watch.at(step, WAITING)
        for pixels, numbers in stream:
            watch.at(step, TRAINING)
            if recipe.machine.hash_batches:
                ids = [train_index.ids[number] for number in numbers.tolist()]
                rows = hashes(pixels, ids * plan.views_total)
                seen.extend(each for image in range(len(ids)) for each in rows[image :: len(ids)])
            yield Images(pixels, numbers)
            watch.at(step, WAITING)

    feed = watched()
    with closing(log), saver, watch, gc_paused(), explain_out_of_memory(plan):
        while step < plan.steps:
            epoch = step // plan.steps_per_epoch
            train_step(step, feed)

            done = step + 1
            log.advance()
            if recipe.machine.hash_batches:
                everywhere = [each for share in ranks.gather(seen) for each in share]
                log.event("batch", step=done, sha256=sha256("".join(everywhere).encode()).hexdigest())
                seen.clear()
            epoch_ends = done % plan.steps_per_epoch == 0
            if done % recipe.machine.log_steps == 0 or epoch_ends:
                means, failed, streak, unbroken = meter.read(ranks)
                log.train(epoch, done, train_step.lr_at(step), means)
                for name in logged.keys() & means:
                    logged[name].append(means[name])
                saver.poll()
                if failed:
                    log.failed(done, failed)
                if streak >= recipe.guard.patience:
                    raise Diverged(done, plan, rewinds, best, unbroken, guard.worst())
            scores = None  # of the weights after this step
            if epoch_ends:
                for each in recipe.losses:
                    if each.collapsed(logged[each.name]):
                        log.event("collapsed", epoch=epoch, step=done, loss=each.name, values=logged[each.name])
                        log.say(f"epoch {epoch}: {each.name} has collapsed: {COLLAPSED}")
                    logged[each.name].clear()
                if evaluation is not None and evaluates_after(recipe, epoch):
                    assert val_index is not None
                    crops = partial(watch.each, step, EVALUATING, evaluation)
                    ranks.share_buffers(model)
                    raw = evaluate(model, crops(), val_index, ranks, train_step.dtype)
                    averaged = None
                    if ema:
                        ranks.share_buffers(ema.model)
                        averaged = evaluate(ema.model, crops(), val_index, ranks, train_step.dtype)
                    log.evaluation(epoch, done, raw, averaged)
                    scores = averaged or raw
            stopping = signals.agreed(ranks)
            if stopping or done == plan.steps or saves_at(recipe.checkpoint, done, plan.steps_per_epoch):
                watch.at(step, SAVING)
                saver.finish()
                if saver.lost:  # if it was the best, that is on no disk
                    best, saver.lost = best_before, False
                improved = val_index is None or bool(scores and (best is None or scores.top1 > best))
                best_before = best
                if scores and improved:
                    best = scores.top1
                meters = ranks.gather(meter.state())
                if ranks.first:
                    meta = {
                        **run_fingerprint,
                        "epoch_steps": plan.steps_per_epoch,
                        "world": ranks.world,
                        "shift": plan.shift,
                        "rewinds": rewinds,
                        "streak": meter.streak,
                        "best": best,
                        "scores": scores.told() if scores else None,
                        "meters": meters,
                        "logged": {name: list(each) for name, each in logged.items()},  # a thread writes it later
                    }
                    archived = epoch_ends and is_multiple(epoch + 1, recipe.checkpoint.archive_epochs)
                    saver.save(done, train_step.state, epoch, improved=improved, archived=archived, meta=meta)
            if stopping and done < plan.steps:
                saver.finish(last=True)
                log.event("stopped", step=done, signal=signals.name)
                ranks.any(False)  # until rank 0 has saved: a launcher ends all ranks once one has ended
                raise Stopped(
                    f"stopped by {signals.name or 'a signal to another rank'} after step {done} of {plan.steps}, and "
                    "saved; the same command goes on from there"
                )
            if epoch_ends:
                gc.collect()
            if epoch_ends or stopping:
                log.resume_clock()
            step = done
        saver.finish(last=True)
        log.event("end", step=plan.steps, best=best)
    return Result(plan.steps, scores, best)


COLLAPSED = "its mean stayed at the margin, as if all images were one; lower lr_scale or the loss's weight"


def rewind(out: Path, fault: Diverged, index: Index, rewinds: int) -> Path | None:
    """The checkpoint from which a run that has diverged goes on, past the images at which it did; or None, and a
    report in the run's folder, where it has gone back `rewinds` times or has none."""
    found = newest_before_failures(out) if fault.rewinds < rewinds else None
    if found is None:
        fault.report(out, index)
        return None
    abandon_later(out, found)

    def changes(meta: dict[str, Any]) -> dict[str, Any]:
        step = resume.step_of(meta, fault.plan.steps_per_epoch)
        return {"shift": fault.shift(step), "rewinds": fault.rewinds + 1, "best": fault.best}

    made = checkpoint.branch(out, found, changes)
    print(f"{fault}; going back to {printable(found)}, on with the images after these", file=sys.stderr)
    return made


def hashes(pixels: Tensor, ids: Sequence[str]) -> list[str]:
    """SHA-256 of each image's id and pixels, uint8 [B, H, W, 3]; waits for the device."""
    rows = pixels.cpu().numpy()
    return [sha256(os.fsencode(name) + b"\0" + row.tobytes()).hexdigest() for name, row in zip(ids, rows, strict=True)]


def saves_at(settings: CheckpointConfig, step: int, steps_per_epoch: int) -> bool:
    """Whether a run saves after so many steps."""
    return is_multiple(step, settings.every_steps) or is_multiple(step, settings.every_epochs * steps_per_epoch)


def evaluates_after(recipe: Recipe, epoch: int) -> bool:
    """Whether a run with validation images evaluates at the end of an epoch, from 0."""
    return epoch + 1 == recipe.epochs or is_multiple(epoch + 1, recipe.evaluation.every_epochs)


def is_multiple(number: int, of: int) -> bool:
    """Of 0 nothing is."""
    return of > 0 and number % of == 0


def require_init(recipe: Recipe) -> None:
    """UserError where a recipe's losses do not converge from random weights and it names no others to start from."""
    needy = [loss.name for loss in recipe.losses if loss.fine_tunes]
    if needy and not recipe.init.weights and not recipe.init.force_scratch:
        raise UserError(
            f"{' and '.join(needy)} does not converge from random weights: train the network with cross entropy first "
            "and name that run with --init RUN, or insist with --set init.force_scratch=true"
        )


def load_teacher(recipe: Recipe, classes: Sequence[str], device: torch.device) -> Classifier | None:
    """The frozen network that a recipe distils from, or None. UserError where it does not know just these classes."""
    for loss in recipe.losses:
        if isinstance(loss, Distillation):
            if not loss.teacher:
                raise UserError("distillation needs a teacher: --set losses.distillation.teacher=CKPT")
            model, _, knows = checkpoint.network(Path(loss.teacher))
            require_classes(knows, loss.teacher, classes, "the training images")
            return model.requires_grad_(False).to(device).to(memory_format=torch.channels_last)
    return None


def about_device(recipe: Recipe, ranks: Ranks) -> str:
    """What a run says of where it trains at its start."""
    where = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "the CPU"
    line = f"{recipe.arch} on {where}, {recipe.precision}, compile {recipe.machine.compile}"
    line += f", {ranks.world} ranks" if ranks.world > 1 else ""
    if ranks.device.type == "cpu" and recipe.machine.device == "auto" and shutil.which("nvidia-smi"):
        line += "; there may be a GPU here that torch cannot use: `fasttrain doctor` says more"
    return line


def about_groups(plan: Plan) -> str:
    """What a run with P x K batches says of itself at its start."""
    if not plan.groups:
        return ""
    used = plan.steps_per_epoch * plan.batch_size
    line = f"batches of {plan.groups.p} classes x {plan.groups.k} images; {used} of {plan.count} images an epoch"
    if plan.micro_batches > 1:
        line += f"; mined within each micro-batch of {plan.micro_batch * plan.world}, not within the batch"
    return line


def about_views(plan: Plan, recipe: Recipe) -> str:
    """What a run whose images have several views says of itself at its start."""
    rows = plan.views_total
    if rows == 1:
        return ""
    line = f"{rows} views of each image, {rows * plan.batch_size} a step"
    line += "; one of them is the averaged network's" if plan.aside else ""
    if plan.micro_batches > 1 and any(loss.projection_head for loss in recipe.losses):
        line += f"; contrasted within each micro-batch of {plan.micro_batch * plan.world}, not within the batch"
    return line


@contextmanager
def gc_paused() -> Iterator[None]:
    """Python's garbage collector rests meanwhile, and leaves alone what is there now: its pauses come at any moment,
    and hosts that feed several GPUs wait for the slowest."""
    was_on = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_on:
            gc.enable()


@contextmanager
def explain_out_of_memory(plan: Plan) -> Iterator[None]:
    """Turns the end of the GPU's memory into `out_of_memory`."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise out_of_memory(plan) from None


def out_of_memory(plan: Plan) -> RunError:
    """What to say when the GPU's memory does not suffice: the micro-batch in use, and the next one to try."""
    used = plan.micro_batch
    smaller = next((n for n in range(used // 2, 0, -1) if used % n == 0), None)
    advice = f"try --set micro_batch={smaller}" if smaller else "set a smaller --image-size"
    return RunError(f"CUDA is out of memory with micro_batch={used} at {plan.image_size} pixels; {advice}")


def summary(recipe: Recipe, train_index: Index, val_index: Index | None, ranks: Ranks, out: Path) -> str:
    """What `train` would do from the start, as text, found without running anything. Raises UserError as it does."""
    plan = Plan.of(recipe, train_index, ranks.world, ranks.rank)
    rows = plan.micro_batch * plan.views
    model = build_on_meta(recipe, len(train_index.classes))
    output = check_input_shape(model, recipe.arch, rows, recipe.image_size)
    require_init(recipe)
    if recipe.init.weights:
        initialise(model, recipe.init, recipe.arch, train_index.classes)
    load_teacher(recipe, train_index.classes, torch.device("cpu"))
    check_overwritable(out)
    weights = sum(each.numel() for each in model.parameters())
    weighing = sum(each.nbytes for each in model.state_dict().values())
    state = weighing * (2 if recipe.ema.decay else 1) + sum(each.nbytes for each in model.parameters())
    kept = min(recipe.checkpoint.keep + 1, -(-recipe.epochs // recipe.checkpoint.every_epochs))
    val = f"{len(val_index)} images" if val_index is not None else "none"
    facts = {
        "data": f"{len(train_index)} images of {len(train_index.classes)} classes; validation: {val}",
        "network": f"{recipe.arch}, {weights / 1e6:.2f} M parameters, {recipe.precision}",
        "input": f"{[rows, 3, recipe.image_size, recipe.image_size]} a rank and micro-batch",
        "output": f"logits {list(output.logits.shape)}, features {list(output.features.shape)}",
        "batch": f"{plan.batch_size} = {ranks.world} ranks x {plan.micro_batches} micro-batches x {plan.micro_batch}",
        "steps": f"{plan.steps} = {plan.epochs} epochs x {plan.steps_per_epoch}",
        "peak lr": f"{recipe.peak_lr:g}",
        "device": f"{ranks.device}, compile {recipe.machine.compile}, {ranks.threads(recipe.machine.workers)} threads",
        "checkpoint": f"{state / 2**20:.0f} MiB each, up to {kept} kept",
        "writes": f"{printable(out)}/: recipe.toml, log.jsonl, checkpoints/, last, best",
    }
    if several := about_views(plan, recipe):
        facts["views"] = several
    return "\n".join(f"{name:<11}{fact}" for name, fact in facts.items())
