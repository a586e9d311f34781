"""Everything before the first step: resolve `auto`, check all that can be checked, build the run, print the banner.

`fasttrain run --dry-run` makes the same checks and prints a summary.
"""

import os
import platform
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from fasttrain import __version__
from fasttrain.checkpoints import checkpoint, resume
from fasttrain.checkpoints.init_weights import initialize
from fasttrain.checkpoints.run_dir import check_overwritable, write_recipe
from fasttrain.config import toml
from fasttrain.config.schema import Recipe
from fasttrain.data.index import Index, facts, require_classes
from fasttrain.data.open_data import Parts, data_line
from fasttrain.distributed.ranks import Ranks
from fasttrain.losses.base import Output
from fasttrain.models import Classifier, build_on_meta, check_input_shape
from fasttrain.pipelines import decoders
from fasttrain.pipelines.decoders import Decoder
from fasttrain.pipelines.plan import UNBOUNDED, Plan
from fasttrain.pipelines.views import views_by_name
from fasttrain.recipes.small_data import CUTMIX_FROM, PREFIX
from fasttrain.training.log import Log, describe
from fasttrain.training.progress import Progress
from fasttrain.training.step import Step
from fasttrain.utils.environment import cpu_name
from fasttrain.utils.errors import UserError
from fasttrain.utils.text import printable
from fasttrain.utils.versions import DALI, installed

if TYPE_CHECKING:  # steps can be benchmarked where DALI is not installed
    from fasttrain.pipelines.eval_loader import EvalLoader


def resolve_auto(recipe: Recipe, device: torch.device) -> Recipe:
    """`recipe` with each `auto` replaced by its choice for this device. Raises UserError for a decoder that is known to
    crash."""
    on_gpu = device.type == "cuda"
    half = "bf16" if not on_gpu or torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    precision = (half if on_gpu else "fp32") if recipe.precision == "auto" else recipe.precision
    machine = recipe.machine
    compiled = ("on" if on_gpu else "off") if machine.compile == "auto" else machine.compile
    decoder = decoders.resolve(machine.decoder, device)
    align = machine.align
    if align == "auto":
        align = "on" if on_gpu and precision != "fp32" and recipe.arch.startswith("tresnet") else "off"
    machine = replace(machine, compile=compiled, decoder=decoder, align=align)
    return replace(recipe, precision=precision, machine=machine)


def decoder_of(recipe: Recipe, device: torch.device) -> Decoder:
    """The decoder of a recipe, resolved or not, on this device."""
    return Decoder(decoders.resolve(recipe.machine.decoder, device), recipe.machine.hardware_load)


class Checked(NamedTuple):
    """A run's plan; its network on the meta device, without values; and the network's output for one micro-batch."""

    plan: Plan
    model: Classifier
    output: Output


def check(recipe: Recipe, index: Index, ranks: Ranks) -> Checked:
    """Check that batches can be made and that the network takes them. Raises UserError if not."""
    plan = Plan.of(recipe, index, ranks.world, ranks.rank)
    model = build_on_meta(recipe, len(index.classes))
    output = check_input_shape(model, recipe.arch, plan.micro_batch * plan.views, recipe.image_size)
    return Checked(plan, model, output)


def start_weights(recipe: Recipe, model: Classifier, classes: Sequence[str]) -> list[str]:
    """Load the weights that a recipe starts from into a network, which has random ones; a network on the meta device is
    only checked. Returns lines to log. Raises UserError where they do not fit, or a loss needs some and has none."""
    fine_tuning = [loss.name for loss in recipe.losses if loss.fine_tunes]
    if fine_tuning and not recipe.init.weights and not recipe.init.force_scratch:
        raise UserError(
            f"{' and '.join(fine_tuning)} does not converge from random weights: train the network with cross entropy "
            "first and name that run with --init RUN, or insist with --set init.force_scratch=true"
        )
    if recipe.init.weights:
        return [initialize(model, recipe.init, recipe.arch, classes)]
    if recipe.ema_views:
        return ["the mean teacher starts from random weights; --init RUN starts it from trained ones"]
    return []


def load_teacher(recipe: Recipe, classes: Sequence[str], device: torch.device) -> Classifier | None:
    """The frozen network that a loss names as its teacher, or None. Raises UserError where it has other classes."""
    runs = {run for loss in recipe.losses if (run := loss.teacher_run()) is not None}
    if not runs:
        return None
    if len(runs) > 1:
        raise UserError(f"there can be one teacher, not {len(runs)}: {', '.join(map(printable, sorted(runs)))}")
    (run,) = runs
    model, _, teacher_classes = checkpoint.network(Path(run))
    require_classes(teacher_classes, run, classes, "the training images")
    return model.requires_grad_(False).to(device).to(memory_format=torch.channels_last)


@dataclass
class Run:
    """A run that is ready for its next step. resumed_from: the checkpoint it goes on from, or None. changed: what
    differs from that checkpoint's run. seconds: what it has used of its time before. notes: lines to log at the
    start."""

    recipe: Recipe
    out: Path
    train_index: Index
    val_index: Index | None
    ranks: Ranks
    plan: Plan
    train_step: Step
    progress: Progress
    fingerprint: dict[str, Any]
    resumed_from: Path | None
    seconds: float = 0.0
    changed: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ended_early(self) -> bool:
        """Whether too many evaluations have brought no better score."""
        patience = self.recipe.evaluation.patience
        return 0 < patience <= self.progress.stale

    @property
    def finished(self) -> bool:
        return self.progress.steps_done >= self.plan.steps or self.ended_early

    def fit(self, steps: int) -> None:
        """Change the number of steps of a run that ends by time."""
        self.plan = replace(self.plan, length=steps)
        self.train_step.follow(self.plan)


def prepare(
    recipe: Recipe, out: Path, train_index: Index, val_index: Index | None, ranks: Ranks, resume_from: Path | None
) -> Run:
    """Build a run of a resolved recipe, from a checkpoint, from other weights or from scratch. Raises UserError where
    the settings, the data and the checkpoint do not fit together."""
    require_same_run(recipe, train_index, val_index, ranks)
    plan = check(recipe, train_index, ranks).plan
    teacher = load_teacher(recipe, train_index.classes, ranks.device)
    torch.manual_seed(recipe.seed)
    model = Classifier.of(recipe, len(train_index.classes))
    fingerprint = resume.run_fingerprint(recipe, train_index) | {"val": resume.val_fingerprint(val_index)}
    saved, changed, notes = None, [], []
    if resume_from is None:
        progress = Progress.start(recipe.losses, recipe.evaluation.best)
        notes = start_weights(recipe, model, train_index.classes)
    else:
        saved = checkpoint.load(resume_from)
        changed = resume.check_compatible(saved, fingerprint, recipe.resume.allow)
        changed += resume.machine_changes(saved.meta, recipe, ranks)
        if changed:
            notes.append(f"resuming with changes: {'; '.join(changed)}")
        progress = Progress.from_meta(saved.meta, recipe.losses, plan.steps_per_epoch, recipe.evaluation.best)
        notes += resume.check_validation(saved.meta, progress, fingerprint["val"])
        notes += resume.check_criterion(saved.meta, progress)
        plan = replace(plan, shift=saved.meta["shift"] * plan.steps_per_epoch // saved.meta["epoch_steps"])
        if recipe.budget and saved.meta["recipe"].get("budget") == toml.to_dict(recipe)["budget"]:
            plan = replace(plan, length=saved.meta.get("length") or UNBOUNDED)

    if val_index is None and (recipe.evaluation.patience or recipe.evaluation.best != "top1"):
        notes.append("there are no validation images, so evaluation.best and evaluation.patience have no effect")

    torch.backends.cudnn.benchmark = True  # tries all algorithms once per shape; the shapes do not change
    train_step = Step(recipe, plan, model, train_index, ranks, teacher)
    if saved is not None:
        checkpoint.restore(saved, train_step.state)
        train_step.guard.reset()
        train_step.meter.restore(saved.meta["meters"], saved.meta["streak"], ranks)
    return Run(
        recipe=recipe,
        out=out,
        train_index=train_index,
        val_index=val_index,
        ranks=ranks,
        plan=plan,
        train_step=train_step,
        progress=progress,
        fingerprint=fingerprint,
        resumed_from=saved.path if saved else None,
        seconds=saved.meta.get("seconds", 0.0) if saved else 0.0,
        changed=changed,
        notes=notes,
    )


def require_same_run(recipe: Recipe, train_index: Index, val_index: Index | None, ranks: Ranks) -> None:
    """Raises UserError on all ranks where they do not have the same recipe, classes, images and sizes. Folders, the
    number of threads and trackers, which only rank 0 has, may differ."""
    comparable = replace(
        recipe,
        data=replace(recipe.data, train=(), val=""),
        init=replace(recipe.init, weights=""),
        machine=replace(recipe.machine, workers=0, stage="", track=()),
    )
    recipe_text = repr(toml.to_dict(comparable))
    ranks.require_same({"recipe": recipe_text} | facts(train_index, "training") | facts(val_index, "validation"))


def build_val_loader(run: Run) -> "EvalLoader | None":
    """The loader of a run's validation images, one central crop each; None without such images."""
    from fasttrain.pipelines.eval_loader import EvalLoader

    if run.val_index is None:
        return None
    recipe, ranks = run.recipe, run.ranks
    return EvalLoader(
        run.val_index,
        views_by_name("center", recipe.image_size),
        run.plan.micro_batch,
        ranks.device,
        ranks.threads(recipe.machine.workers),
        ranks.world,
        ranks.rank,
        decoder=decoder_of(recipe, ranks.device),
    )


def open_log(run: Run) -> Log:
    """Open a run's log, and write and print how it starts. A run that resumes also gets its recipe.toml anew."""
    recipe, plan, progress, device = run.recipe, run.plan, run.progress, run.ranks.device
    start = progress.steps_done
    if run.resumed_from and run.ranks.first:
        write_recipe(run.out, toml.to_toml(recipe))
    log = Log(
        run.out,
        run.ranks,
        start_step=start,
        steps=plan.steps if plan.bounded else None,
        batch_size=plan.batch_size,
        tolerant=recipe.checkpoint.on_error == "go_on",
        tensorboard=recipe.machine.tensorboard,
        track=recipe.machine.track,
        config=toml.to_dict(recipe),
    )
    gpus = run.ranks.gather(torch.cuda.get_device_name(device) if device.type == "cuda" else "")
    log.event(
        "resume" if start else "start",
        step=start,
        steps=plan.steps if plan.bounded else None,
        images=plan.count,
        world=run.ranks.world,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        **({"gpus": gpus} if all(gpus) else {}),
        cpu={"model": cpu_name(), "cores": len(os.sched_getaffinity(0))},
        versions=logged_versions(),
        **({"changed": run.changed} if run.changed else {}),
        **({"rewinds": progress.rewinds, "shift": plan.shift} if progress.rewinds else {}),
    )
    log.say(device_line(recipe, run.ranks))
    if run.resumed_from:
        log.say(f"resuming after step {start}{log.of_steps}, from {printable(run.resumed_from)}")
    about_data = (schedule_line(plan, recipe), classes_line(plan, recipe, run.train_index))
    lines = (*run.notes, *about_data, groups_line(plan), views_line(plan, recipe))
    for line in filter(None, lines):
        log.event("note", text=line)
        log.say(line)
    return log


def logged_versions() -> dict[str, str | None]:
    """The versions of Python and of the libraries that decide what a run computes."""
    libraries = {"timm": installed("timm"), "nvidia-dali": installed(*DALI), "python": platform.python_version()}
    return {"fasttrain": __version__, "torch": torch.__version__} | libraries


def device_line(recipe: Recipe, ranks: Ranks) -> str:
    """The line that says what a run trains, and where."""
    where = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "the CPU"
    losses = " + ".join(loss.name for loss in recipe.losses)
    line = f"{recipe.arch} on {where}, {recipe.precision}, compile {recipe.machine.compile}, {losses}"
    line += f", {ranks.world} ranks" if ranks.world > 1 else ""
    if ranks.device.type == "cpu" and recipe.machine.device == "auto" and shutil.which("nvidia-smi"):
        line += "; this machine may have a GPU that torch cannot use: see `fasttrain doctor`"
    return line


def schedule_line(plan: Plan, recipe: Recipe) -> str:
    """The line that recommends the recipe for little data; empty where the schedule is long enough for the recipe's
    augmentation, where a network is fine-tuned, or without such augmentation."""
    seen = plan.steps * plan.batch_size / plan.count
    fine_tunes = bool(recipe.init.weights) or any(loss.fine_tunes for loss in recipe.losses)
    used = {"CutMix": recipe.mix.cutmix > 0, "AutoAugment": recipe.augment.autoaugment != "none"}
    names = " and ".join(name for name, is_used in used.items() if is_used)
    if not names or fine_tunes or recipe.budget or seen >= CUTMIX_FROM:
        return ""
    return (
        f"each image is seen about {seen:.0f} times, too rarely for {names} to help: "
        f"--recipe {PREFIX}{recipe.arch} suits short schedules"
    )


UNEQUAL = 3  # how many times as many images the largest class must have for the run to say so


def classes_line(plan: Plan, recipe: Recipe, index: Index) -> str:
    """The line that says how unequal the classes are, and what to set or what is set; empty for classes alike."""
    sizes = np.bincount(index.labels, minlength=len(index.classes))
    least, most = int(sizes.min()), int(sizes.max())
    ways = []
    if recipe.data.balance:
        shares = plan.class_shares(index)
        ways.append(f"drawn with data.balance={recipe.data.balance:g}, {shares.max() / shares.min():.3g} to 1")
    if index.weights is not None:
        ways.append("images are drawn by their weights")
    ways += [way for loss in recipe.losses for way in loss.against_imbalance()]
    if not ways and most < UNEQUAL * least:
        return ""
    line = f"the classes have {least} to {most} images" if most > least else ""
    line += f", {most / least:.3g} to 1" if most > least > 0 else ""
    if ways:
        return "; ".join(filter(None, (line, ", ".join(ways))))
    adjusts = any(loss.name == "cross_entropy" for loss in recipe.losses)
    settings = "losses.cross_entropy.logit_adjustment=1 or data.balance=0.5" if adjusts else "data.balance=0.5"
    return f"{line}; for equal accuracy on all classes set {settings}, and evaluation.best=balanced_accuracy"


def steps_text(recipe: Recipe, plan: Plan) -> str:
    """How long a run is, for the summary."""
    if recipe.budget.until:
        return f"as many as fit until {recipe.budget.until}; {plan.steps_per_epoch} per epoch"
    if recipe.budget.seconds:
        return f"as many as fit into {describe(recipe.budget.seconds)}; {plan.steps_per_epoch} per epoch"
    return f"{plan.steps} = {plan.epochs} epochs x {plan.steps_per_epoch}"


def groups_line(plan: Plan) -> str:
    """The line that describes P x K batches; empty where images are drawn at random."""
    if not plan.groups:
        return ""
    used = plan.steps_per_epoch * plan.batch_size
    line = f"batches of {plan.groups.p} classes x {plan.groups.k} images; {used} of {plan.count} images per epoch"
    if plan.micro_batches > 1:
        line += f"; mined within each micro-batch of {plan.micro_batch * plan.world}, not within the batch"
    return line


def views_line(plan: Plan, recipe: Recipe) -> str:
    """The line that describes several views per image; empty for one view."""
    views = plan.views_total
    if views == 1:
        return ""
    line = f"{views} views of each image, {views * plan.batch_size} per step"
    line += "; one of them is the averaged network's" if plan.ema_views else ""
    if plan.micro_batches > 1 and any(loss.projection_head for loss in recipe.losses):
        line += f"; contrasted within each micro-batch of {plan.micro_batch * plan.world}, not within the batch"
    return line


def summary(recipe: Recipe, train_index: Index, val_index: Index | None, ranks: Ranks, out: Path, parts: Parts) -> str:
    """What a run would do from its start, as text. Nothing is trained or written. Raises UserError like `prepare`."""
    plan, model, output = check(recipe, train_index, ranks)
    start_weights(recipe, model, train_index.classes)
    load_teacher(recipe, train_index.classes, torch.device("cpu"))
    check_overwritable(out)
    parameters = sum(p.numel() for p in model.parameters())
    weight_bytes = sum(tensor.nbytes for tensor in model.state_dict().values())
    saved_bytes = weight_bytes * (2 if recipe.ema.decay else 1) + sum(p.nbytes for p in model.parameters())
    kept = min(recipe.checkpoint.keep + 1, -(-recipe.epochs // recipe.checkpoint.every_epochs))
    rows = plan.micro_batch * plan.views
    lines = {
        "data": data_line(parts, train_index, val_index, recipe.data),
        "network": f"{recipe.arch}, {parameters / 1e6:.2f} M parameters, {recipe.precision}",
        "losses": " + ".join(loss.name for loss in recipe.losses),
        "input": f"{[rows, 3, recipe.image_size, recipe.image_size]} per rank and micro-batch",
        "output": f"logits {list(output.logits.shape)}, features {list(output.features.shape)}",
        "batch": f"{plan.batch_size} = {ranks.world} ranks x {plan.micro_batches} micro-batches x {plan.micro_batch}",
        "steps": steps_text(recipe, plan),
        "peak lr": f"{recipe.peak_lr:g}",
        "device": f"{ranks.device}, compile {recipe.machine.compile}, {ranks.threads(recipe.machine.workers)} threads",
        "checkpoint": f"{saved_bytes / 2**20:.0f} MiB each, up to {kept} kept",
        "writes": f"{printable(out)}/: recipe.toml, log.jsonl, checkpoints/, last, best",
    }
    if advice := schedule_line(plan, recipe):
        lines["advice"] = advice
    if classes := classes_line(plan, recipe, train_index):
        lines["classes"] = classes
    if views := views_line(plan, recipe):
        lines["views"] = views
    return "\n".join(f"{name:<11}{line}" for name, line in lines.items())
