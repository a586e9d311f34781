"""The command line. torch, timm and DALI are imported inside the commands, so that help comes at once."""

import math
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fasttrain import __version__
from fasttrain.cli.bench import bench
from fasttrain.cli.options import COMBINATIONS, DECODERS, FILE, FOLDER, PNG_SOFTWARE, SET_HELP, require_png, writes
from fasttrain.distributed import signals
from fasttrain.utils.errors import CommandError, Stopped, UserError

if TYPE_CHECKING:
    from fasttrain.config.schema import Recipe
    from fasttrain.data.index import Index
    from fasttrain.data.place_files import Placed
    from fasttrain.evaluation.predictions import Predictions


class _Group(click.Group):
    """Ends every command that fails for a known reason with one line and the status that belongs to it."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except CommandError as error:
            if str(error):
                _complain(str(error))
            sys.exit(error.exit_status)
        except ImportError as error:
            _complain(f"{error} (Python {sys.executable}); `fasttrain doctor` says what is missing")
            sys.exit(1)
        except RuntimeError as error:
            # Not imported here: whoever raised torch's error has done so.
            if not isinstance(error, getattr(sys.modules.get("torch"), "OutOfMemoryError", ())):
                raise
            training = ctx.invoked_subcommand == "run"
            smaller = "--set micro_batch=N or --image-size" if training else "--batch-size"
            _complain(f"CUDA is out of memory; end what else uses the GPU, or try a smaller {smaller}")
            sys.exit(1)
        except KeyboardInterrupt:
            goes_on = "; the same command goes on from the last checkpoint" if ctx.invoked_subcommand == "run" else ""
            _complain(f"interrupted{goes_on}")
            sys.exit(130)


def _complain(line: str) -> None:
    click.echo(f"fasttrain: {line}", err=True)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
def main() -> None:
    """Train image classifiers from scratch, with NVIDIA DALI pipelines and a channels-last mixed-precision loop."""


@main.command()
@click.option("--arch", metavar="A", help="Network: tresnet_xl, resnest101e, seresnext101_32x4d or any other of timm.")
@click.option("--recipe", "recipe_name", metavar="NAME|FILE.toml", help="Recipe instead of a network's own.")
@click.option("--loss", type=click.Choice(COMBINATIONS), default=None,
              help="With --arch: which of the report's losses. Default: ce; the others go on from --init.")  # fmt: skip
@click.option("--init", metavar="CKPT|FILE", help="Start from these weights: a run's (its best) or timm's in a .pth.")
@click.option("--data", multiple=True, type=FOLDER, metavar="DIR", help="Training images; repeatable. None: demo set.")
@click.option("--val", type=FOLDER, metavar="DIR", help="Validation images. Default: DIR/val beside DIR/train.")
@click.option("--out", type=FOLDER, metavar="DIR", help="The run's folder. Default: runs/<recipe>.")
@click.option("--epochs", type=click.IntRange(1), help="Passes over the images. Default: the recipe's.")
@click.option("--batch-size", type=click.IntRange(1), help="Images a step, over all ranks. Default: the recipe's.")
@click.option("--image-size", type=click.IntRange(8),
              help="Side of the square training images, in pixels. Default: the recipe's.")  # fmt: skip
@click.option("--lr", type=float, help="Peak learning rate. Default: by the recipe's rule.")
@click.option("--seed", type=click.IntRange(0), help="Seed of weights and of every random draw. Default: the recipe's.")
@click.option("--workers", type=click.IntRange(0), help="DALI threads a rank. 0: this rank's share of the cores.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), help="Default: auto, a GPU where there is one.")
@click.option(
    "--resume",
    default="auto",
    metavar="auto|never|PATH",
    show_default=True,
    help="Go on from the run's last checkpoint, start over (the old run is moved aside), or from PATH.",
)
@click.option("--on-bad", type=click.Choice(["stop", "skip"]), default=None,
              help="A training image that cannot be decoded ends the run (stop, default) or is replaced.")  # fmt: skip
@click.option("--compile/--no-compile", "compiled", default=None, help="torch.compile. Default: on for CUDA.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help=SET_HELP)
@click.option("--dry-run", is_flag=True, help="Print what would be done and stop.")  # fmt: skip
def run(
    arch: str | None,
    recipe_name: str | None,
    loss: str | None,
    init: str | None,
    data: tuple[str, ...],
    val: str | None,
    out: str | None,
    epochs: int | None,
    batch_size: int | None,
    image_size: int | None,
    lr: float | None,
    seed: int | None,
    workers: int | None,
    device: str | None,
    resume: str,
    on_bad: str | None,
    compiled: bool | None,
    settings: tuple[str, ...],
    dry_run: bool,
) -> None:
    """Train a network.

    Without --data it trains on a drawn demo set, on small images for a few epochs. The same command again goes on
    where a run was stopped. Several GPUs: torchrun --nproc-per-node N -m fasttrain run …
    """
    if not dry_run:
        signals.install()
    from fasttrain import recipes
    from fasttrain.checkpoints.run_dir import lock, open_run
    from fasttrain.data import index as dataset
    from fasttrain.distributed.ranks import ranks
    from fasttrain.prepare import resolve_auto
    from fasttrain.train import summary, train
    from fasttrain.utils.text import printable

    if signals.received():
        again = "before a step was done; the same command starts again"
        raise Stopped(f"stopped by {signals.received()} {again}" if writes() else "")
    recipe = _chosen(arch, recipe_name, loss)
    on_demo = not data and not recipe.data.train
    if on_demo:
        if val:
            raise UserError("--val without --data: name the training images too")
        recipe = _demo(recipe)
    elif data:
        folders = tuple(os.path.abspath(each) for each in data)
        recipe = replace(recipe, data=replace(recipe.data, train=folders, val=""))
    if val:
        recipe = replace(recipe, data=replace(recipe.data, val=os.path.abspath(val)))
    changes: list[tuple[str, object]] = [
        ("epochs", epochs),
        ("batch_size", batch_size),
        ("image_size", image_size),
        ("seed", seed),
        ("machine.workers", workers),
        ("machine.device", device),
        ("data.on_bad", on_bad),
        ("init.weights", init and os.path.abspath(init)),
    ]
    if compiled is not None:
        changes.append(("machine.compile", "on" if compiled else "off"))
    if lr is not None:
        changes += [("optim.lr", lr), ("optim.lr_batch", 0)]
    for key, value in changes:
        if value is not None:
            by = "--init" if init and key == "init.weights" else "--" + key.split(".")[-1].replace("_", "-")
            recipe = recipes.override(recipe, (key, value), by=by)
    recipe = recipes.override(recipe, *settings)
    recipes.to_toml(recipe)  # refuses what the run's folder could not keep, before anything is read
    folder = Path(out or Path("runs", recipe.name))

    with ranks(recipe.machine.device, recipe.machine.hang_timeout) as here:
        if on_demo and here.first:
            click.echo(
                f"no --data: training on the demo set, {recipe.image_size} px, {recipe.epochs} epochs. "
                f"Your own images: {_program()} run --arch {recipe.arch} --data DIR  (DIR/<class>/<image>)",
                err=True,
            )
        recipe = resolve_auto(recipe, here.device)
        train_index, val_index = here.in_turn(lambda: dataset.open_data(recipe.data))
        if dry_run:
            if here.first:
                click.echo(f"{recipes.to_toml(recipe)}\n{summary(recipe, train_index, val_index, here, folder)}")
            return
        with lock(folder) if here.first else nullcontext():
            start = here.from_first(lambda: open_run(folder, resume, recipes.to_toml(recipe)))
            result = train(recipe, folder, train_index, val_index, here, start)
        if here.first:
            place = printable(folder)
            if result.best is not None:
                last = f"top-1 {result.scores.top1:.2%}, top-5 {result.scores.top5:.2%}, " if result.scores else ""
                click.echo(f"{last}best top-1 {result.best:.2%}")
            whole = f"best checkpoint: {place}/best, last: {place}/last"
            click.echo(f"run folder: {place}  ({result.steps} steps; {whole})")
            held_out = recipe.data.val or (os.path.commonpath(val_index.paths) if val_index else "DIR")
            click.echo(f"next: {_program()} eval {_word(folder)} --data {_word(held_out)}")


def _word(path: str | Path) -> str:
    """A path as a word of a line that the user can repeat in a shell."""
    from fasttrain.utils.text import printable

    return shlex.quote(printable(path))


def _program() -> str:
    """How this command was called, for lines that the user can repeat."""
    called = sys.argv[0]
    if called.endswith("__main__.py"):
        return "python -m fasttrain"
    on_path = shutil.which("fasttrain")
    elsewhere = not on_path or os.path.abspath(called) != os.path.abspath(on_path)
    return _word(called) if elsewhere and Path(called).name == "fasttrain" else "fasttrain"


def _chosen(arch: str | None, recipe_name: str | None, loss: str | None = None) -> "Recipe":
    from fasttrain import recipes

    if recipe_name and (arch or loss):
        raise UserError("--recipe excludes --arch and --loss: a recipe names its network and its losses")
    if recipe_name:
        return recipes.by_name(recipe_name)
    if not arch:
        raise UserError("name a network with --arch (such as tresnet_xl) or a recipe with --recipe")
    from fasttrain.models import ARCHS

    recipe = recipes.for_arch(arch, loss or "ce")
    if arch not in ARCHS and int(os.environ.get("RANK", 0)) == 0:
        rule = f"batch {recipe.batch_size}, {recipe.epochs} epochs by default"
        click.echo(f"{arch} has no report recipe: {rule}", err=True)
    return recipe


def _demo(recipe: "Recipe") -> "Recipe":
    """`recipe` on the demo set, which is made in the user's cache on first use."""
    import torch

    from fasttrain import recipes
    from fasttrain.data import demo_set
    from fasttrain.data import index as dataset
    from fasttrain.models import Classifier

    with torch.device("meta"):
        parameters = sum(each.numel() for each in Classifier(recipe.arch, len(demo_set.CLASSES)).parameters())
    folder = dataset.cache_dir() / "demo-1"
    demo_set.make(folder)
    return recipes.demo(recipe, folder, parameters, int(os.environ.get("WORLD_SIZE", 1)))


def _sizes(text: str) -> tuple[int, ...]:
    parts = [each.strip() for each in text.split(",")]
    if not all(each.isascii() and each.isdigit() for each in parts):
        raise UserError(f"--sizes {text}: numbers of pixels with commas, as in 224,320")
    return tuple(map(int, parts))


_network_options = (
    click.option("--views", type=click.Choice(["center", "report", "tencrop"]), default="center", show_default=True,
                 help="Of each image: a central crop; the report's 16 (4 sizes, 2 crops, mirrored or not); ten crops."),
    click.option("--sizes", metavar="N,N,…", help="Sides of the crops in pixels, instead of the views' own."),
    click.option("--interpolation", type=click.Choice(["bilinear", "bicubic"]), default="bilinear", show_default=True),
    click.option("--raw", is_flag=True, help="The raw weights, where the checkpoint has averaged ones as well."),
    click.option("--batch-size", type=click.IntRange(1), default=64, show_default=True, help="Images at once."),
    click.option("--workers", type=click.IntRange(0), default=0,
                 help="DALI threads. 0: this rank's share of the cores."),
    click.option("--decoder", type=click.Choice(DECODERS), default="auto", show_default=True,
                 help="On a GPU: what decodes the images (machine.decoder of `fasttrain recipes NAME`)."),
    click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True),
)  # fmt: skip


def _of_a_network(command: Callable[..., None]) -> Callable[..., None]:
    """The options of a command that puts images through a checkpoint's network."""
    for option in reversed(_network_options):
        command = option(command)
    return click.argument("checkpoint_path", metavar="CKPT", type=click.Path(path_type=Path))(command)


def _predict(
    checkpoint_path: Path, open_index: "Callable[[Recipe, list[str]], Index]", **options: Any
) -> "Predictions | None":
    """What a checkpoint's network says of an index's images, on rank 0; None on the others."""
    import numpy as np
    import torch
    from tqdm import tqdm

    from fasttrain.checkpoints import checkpoint
    from fasttrain.distributed.ranks import ranks
    from fasttrain.evaluation.evaluate import probabilities
    from fasttrain.evaluation.predictions import Predictions
    from fasttrain.models import build_on_meta, check_input_shape
    from fasttrain.pipelines.eval_loader import EvalLoader
    from fasttrain.pipelines.views import views_by_name
    from fasttrain.prepare import decoder_of, resolve_auto
    from fasttrain.training.step import DTYPES

    sizes = () if options["sizes"] is None else _sizes(options["sizes"])
    with ranks(options["device"]) as here:
        model, recipe, classes = checkpoint.network(checkpoint_path, averaged=False if options["raw"] else None)
        views = views_by_name(options["views"], recipe.image_size, sizes)
        outline = build_on_meta(recipe, len(classes))
        for size in views.sizes:
            check_input_shape(outline, recipe.arch, 2, size, "name other --sizes or --views")
        index = here.in_turn(lambda: open_index(recipe, classes))
        model.to(here.device).to(memory_format=torch.channels_last)
        machine = replace(recipe.machine, decoder=options["decoder"])
        recipe = resolve_auto(replace(recipe, precision="auto", machine=machine), here.device)
        precision, threads = DTYPES[recipe.precision], here.threads(options["workers"])
        share = options["batch_size"], here.device, threads, here.world, here.rank
        batches = EvalLoader(index, views, *share, options["interpolation"], decoder_of(recipe, here.device))
        total = len(batches.source.numbers)
        with tqdm(total=total, unit="img", desc="images", disable=None if here.first else True) as bar:
            per_size = probabilities(model, len(classes), batches, here, precision, bar.update)
        if not here.first:
            return None
    probs = np.mean(np.stack(list(per_size.values())), axis=0) if len(per_size) > 1 else next(iter(per_size.values()))
    labels = index.labels if index.classes else None
    return Predictions(np.array(index.ids), np.array(classes), probs, labels, per_size if len(per_size) > 1 else {})


@main.command("eval")
@_of_a_network
@click.option("--data", required=True, type=FOLDER, metavar="DIR",
              help="Labelled images: DIR, or DIR/val where DIR holds train/ and val/.")  # fmt: skip
@click.option("--out", type=FILE, metavar="FILE.npz", help="Write the probabilities.")
@click.option("--confusion", "confusion_path", type=FILE, metavar="FILE.png", help="Draw the confusion matrix.")
def evaluate_(checkpoint_path: Path, data: str, out: Path | None, confusion_path: Path | None, **options: Any) -> None:
    """Top-1 and top-5 of a checkpoint over a folder of class folders; worst classes, most confused pairs.

    CKPT is a checkpoint's folder, `last` or `best`, or a run's folder (its best).
    """
    from fasttrain.data import index as dataset
    from fasttrain.evaluation import confusion, predictions
    from fasttrain.utils.text import printable

    def labelled(recipe: "Recipe", classes: list[str]) -> "Index":
        index = dataset.open_labelled(data)
        dataset.require_classes(classes, checkpoint_path, index.classes, data)
        return index

    if out and writes():
        predictions.check_overwritable(out)
    if confusion_path and writes():
        require_png(confusion_path, "--confusion")
        confusion.require_matplotlib()
    found = _predict(checkpoint_path, labelled, **options)
    if found is None or found.labels is None:
        return
    counts = confusion.matrix(found.labels, found.probs.argmax(1), len(found.classes))
    names = [str(each) for each in found.classes]
    if out:
        predictions.save(found, out)
    if confusion_path:
        confusion.draw(counts, names, confusion_path, PNG_SOFTWARE)
    for size, probs in found.per_size.items():
        of_size = predictions.scores(probs, found.labels)
        click.echo(f"{size:>5} px: top-1 {of_size.top1:.2%}, top-5 {of_size.top5:.2%}")
    scores = predictions.scores(found.probs, found.labels)
    fused = "   fused: " if found.per_size else ""
    click.echo(f"{fused}top-1 {scores.top1:.2%}, top-5 {scores.top5:.2%} of {scores.images} images")
    click.echo(confusion.told(counts, names))
    for path in filter(None, (out, confusion_path)):
        click.echo(f"wrote {printable(path)}")


@main.command()
@_of_a_network
@click.option("--images", required=True, type=FOLDER, metavar="DIR", help="Images, in DIR and folders inside it.")
@click.option("--out", required=True, type=FILE, metavar="FILE.npz", help="Where to write the probabilities.")
def predict(checkpoint_path: Path, images: str, out: Path, **options: Any) -> None:
    """Probabilities of images without labels.

    CKPT is a checkpoint's folder, `last` or `best`, or a run's folder (its best).
    """
    from fasttrain.data import index as dataset
    from fasttrain.evaluation import predictions
    from fasttrain.utils.text import printable

    if writes():
        predictions.check_overwritable(out)
    found = _predict(checkpoint_path, lambda recipe, classes: dataset.scan_unlabelled(images), **options)
    if found is not None:
        predictions.save(found, out)
        click.echo(f"wrote {printable(out)}: {len(found)} images, {len(found.classes)} classes")


@main.command()
@click.argument("files", metavar="FILE.npz…", nargs=-1, required=True, type=FILE)
@click.option("--weights", metavar="W,W,…", help="A weight for each file. Default: all the same.")
@click.option(
    "--fit",
    "fit_files",
    multiple=True,
    type=FILE,
    metavar="VAL.npz",
    help="Fit the weights greedily: the same models on labelled images, once for each file, in their order.",
)
@click.option("--out", type=FILE, metavar="FILE.npz", help="Write the fused probabilities.")
@click.option("--submission", "submission_path", type=FILE, metavar="FILE.csv", help="Write the challenge's CSV.")
def ensemble(
    files: tuple[Path, ...],
    weights: str | None,
    fit_files: tuple[Path, ...],
    out: Path | None,
    submission_path: Path | None,
) -> None:
    """Mean of the probabilities that `eval` or `predict` wrote for several models.

    Prints each file's own accuracy and the fused one, where labels are known, and how often the files agree.
    """
    from fasttrain.evaluation import predictions, submission
    from fasttrain.evaluation.ensemble import agreement, fuse, greedy_weights, load_alike
    from fasttrain.utils.text import printable

    if weights and fit_files:
        raise UserError("--weights and --fit exclude each other: fitting finds the weights")
    if out:
        predictions.check_overwritable(out)
    if submission_path:
        submission.check_overwritable(submission_path)
    shares: list[float] | None = None
    if weights:
        shares = _weights(weights, len(files))
    if fit_files:
        if len(fit_files) != len(files):
            raise UserError(f"--fit is given {len(fit_files)} times for {len(files)} files; name one for each of them")
        val = load_alike(fit_files)
        if val[0].labels is None:
            raise UserError(f"--fit {printable(fit_files[0])} has no labels; use files that `eval` wrote")
        shares = greedy_weights([each.probs for each in val], val[0].labels)
        fitted_classes = val[0].classes.tolist()
        del val
    members = load_alike(files)
    if fit_files and fitted_classes != members[0].classes.tolist():
        raise UserError("--fit: its files are of other classes than the files to be fused")
    fused = fuse([each.probs for each in members], shares)
    first = members[0]
    if out:
        predictions.save(replace(first, probs=fused, per_size={}), out)
    if submission_path:
        submission.write(submission_path, [str(each) for each in first.ids], fused.argmax(1).tolist())
    for at, (path, member) in enumerate(zip(files, members, strict=True)):
        share = f"weight {shares[at]:.3f}  " if shares else ""
        own = f"top-1 {predictions.scores(member.probs, first.labels).top1:.2%}  " if first.labels is not None else ""
        click.echo(f"{at:>3}  {own}{share}{printable(path)}")
    if len(members) > 1:
        click.echo("agreement of pairs (share of images given the same class):")
        for at, row in enumerate(agreement([each.probs for each in members])):
            click.echo(f"{at:>3}  " + " ".join(f"{each:6.1%}" for each in row))
    if first.labels is not None:
        scores = predictions.scores(fused, first.labels)
        click.echo(f"fused: top-1 {scores.top1:.2%}, top-5 {scores.top5:.2%} of {scores.images} images")
    for path in filter(None, (out, submission_path)):
        click.echo(f"wrote {printable(path)}: {len(fused)} predictions")


def _weights(text: str, count: int) -> list[float]:
    try:
        found = [float(each) for each in text.split(",")]
    except ValueError:
        found = []
    if len(found) != count or not all(0 <= each < float("inf") for each in found) or not sum(found):
        raise UserError(f"--weights {text}: {count} numbers with commas, 0 or more and not all 0")
    whole = math.fsum(found)
    return [each / whole for each in found]


@main.command()
@click.argument("submission_path", metavar="SUBMISSION.csv", type=FILE)
@click.option("--labels", required=True, type=FILE, metavar="FILE.csv",
              help="Right classes: the line Image IDs,Labels, then id,class.")  # fmt: skip
def score(submission_path: Path, labels: Path) -> None:
    """Top-1 of a submission, which must name each image of the labels once, and no other."""
    from fasttrain.evaluation import submission

    top1, images = submission.score(submission_path, labels)
    click.echo(f"top-1 {top1:.4f} of {images} images")


@main.group("data")
def data_() -> None:
    """Make and inspect folders of images."""


@data_.command("demo")
@click.argument("folder", metavar="DIR", type=click.Path(file_okay=False, path_type=Path))
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Other seed, other pictures.")
def data_demo(folder: Path, seed: int) -> None:
    """Draw the demo set: DIR/train and DIR/val with ten classes of 50 and 25 JPEGs each."""
    from fasttrain.data import demo_set
    from fasttrain.utils.text import printable

    made = demo_set.make(folder, seed)
    what = "made" if made else "already there:"
    click.echo(f"{what} {printable(folder)}: {len(demo_set.CLASSES)} classes, 500 train and 250 val images")


@data_.command("check")
@click.argument("folder", metavar="DIR", type=FOLDER)
@click.option("--quarantine", "aside", type=FOLDER, metavar="DIR", help="Move bad files here, to be moved back later.")
@click.option("--out", type=FILE, metavar="FILE.json", help="Write the report.")
@click.option("--workers", type=click.IntRange(0), default=0, help="Processes that decode. 0: one a core.")
def data_check(folder: str, aside: str | None, out: Path | None, workers: int) -> None:
    """Read every file of DIR with two decoders and name the bad ones, and what is odd about others.

    DIR holds class folders, or train/ and val/ with such. Exit status 1 where a file is bad.
    """
    from fasttrain.data import check, quarantine
    from fasttrain.utils.text import printable

    if out:
        check.require_writable(out)
    if aside:
        quarantine.require_place(folder, aside)
    report = check.examine(folder, workers)
    if out:
        check.write_report(report, out)
    click.echo(report.text())
    if out:
        click.echo(f"wrote {printable(out)}")
    if aside:
        moved = quarantine.quarantine(folder, [each.path for each in report.bad], aside)
        back = f"{_program()} data restore {_word(aside)} {_word(folder)}"
        click.echo(f"moved {moved} files to {printable(aside)}; back: {back}")
    if report.bad:
        sys.exit(1)


@data_.command("restore")
@click.argument("aside", metavar="ASIDE", type=FOLDER)
@click.argument("folder", metavar="DIR", type=FOLDER)
def data_restore(aside: str, folder: str) -> None:
    """Move the files of a quarantine, ASIDE, back to where they were in DIR."""
    from fasttrain.data import quarantine
    from fasttrain.utils.text import printable

    click.echo(f"moved {quarantine.restore(aside, folder)} files back from {printable(aside)}")


_link_option = click.option("--link/--copy", default=False, help="Hard links instead of copies. Default: copies.")


@data_.command("vipriors")
@click.option("--imagenet", required=True, type=FOLDER, metavar="DIR", help="Holds train/<wnid>/ and val/.")
@click.option("--out", required=True, type=FOLDER, metavar="DIR", help="The set to make.")
@_link_option
def data_vipriors(imagenet: str, out: str, link: bool) -> None:
    """Build the VIPriors challenge's ImageNet-50 from a local ImageNet: OUT/train, OUT/val (50 images a class each)
    and OUT/test/imgs, with labels.csv for offline scoring.

    The same command again goes on where it was stopped.
    """
    from fasttrain.data import vipriors

    _say_placed(out, vipriors.prepare(Path(imagenet), Path(out), link))


@data_.command("cut")
@click.argument("folder", metavar="DIR", type=FOLDER)
@click.option("--per-class", required=True, type=click.IntRange(1), help="Training images a class.")
@click.option("--val-per-class", type=click.IntRange(0), help="Validation images a class. Default: as many.")
@click.option("--out", required=True, type=FOLDER, metavar="DIR", help="The set to make.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Other seed, other images.")
@_link_option
def data_cut(folder: str, per_class: int, val_per_class: int | None, out: str, seed: int, link: bool) -> None:
    """Draw OUT/train and OUT/val, a few images a class each, from a folder of class folders."""
    from fasttrain.data.subset import make

    val = per_class if val_per_class is None else val_per_class
    _say_placed(out, make(Path(folder), per_class, val, Path(out), seed, link))


def _say_placed(out: str, placed: "Placed") -> None:
    from fasttrain.utils.text import printable

    counts = ", ".join(f"{count} {split}" for split, count in placed.counts.items())
    before = sum(placed.counts.values()) - placed.new
    was = f" ({before} were there from before)" if placed.made and before else ""
    click.echo(f"{'made' if placed.made else 'already there:'} {printable(out)}: {counts} images{was}")


@main.command("recipes")
@click.argument("name", required=False)
def recipes_(name: str | None) -> None:
    """List the recipes, or print one as TOML that `run --recipe FILE.toml` takes."""
    from fasttrain import recipes

    if name:
        click.echo(recipes.to_toml(recipes.by_name(name)), nl=False)
        return
    click.echo(recipes.table())


@main.command()
@click.option("--arch", metavar="A", help="Network whose recipe to show.")
@click.option("--recipe", "recipe_name", metavar="NAME|FILE.toml", help="Recipe to show.")
@click.option("--data", type=FOLDER, metavar="DIR", help="Training images. None: the recipe's, or the demo set.")
@click.option("--epoch", type=click.IntRange(0), default=0, show_default=True, help="Epoch, from 0.")
@click.option("--step", type=click.IntRange(0), default=0, show_default=True, help="Step of the epoch, from 0.")
@click.option("--images", type=click.IntRange(1), default=32, show_default=True, help="At most so many of the batch.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help=SET_HELP)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=Path("batch.png"), show_default=True,
              help="PNG to write.")  # fmt: skip
def show(
    arch: str | None,
    recipe_name: str | None,
    data: str | None,
    epoch: int,
    step: int,
    images: int,
    settings: tuple[str, ...],
    out: Path,
) -> None:
    """Draw the batch that the network sees at a step: cropped, flipped, augmented and mixed, with its labels."""
    from PIL.PngImagePlugin import PngInfo

    from fasttrain import recipes
    from fasttrain.data import index as dataset
    from fasttrain.pipelines.plan import Plan
    from fasttrain.show_batch import draw_batch
    from fasttrain.utils.text import printable

    recipe = _chosen(arch, recipe_name)
    if data:
        recipe = replace(recipe, data=replace(recipe.data, train=(os.path.abspath(data),), val=""))
    elif not recipe.data.train:
        recipe = _demo(recipe)
    recipe = recipes.override(recipe, *settings)
    require_png(out, "--out")
    index, _ = dataset.open_data(replace(recipe.data, val=""))
    plan = Plan.of(recipe, index)
    if epoch >= plan.epochs or step >= plan.steps_per_epoch:
        span = f"{plan.epochs} epochs of {plan.steps_per_epoch} steps"
        raise UserError(f"--epoch {epoch} --step {step}: there are {span}")
    told = PngInfo()
    told.add_text("Software", PNG_SOFTWARE)
    draw_batch(plan, index, epoch * plan.steps_per_epoch + step, images).save(out, pnginfo=told)
    click.echo(f"wrote {printable(out)}")


main.add_command(bench)


@main.command()
@click.option("--gpu", is_flag=True, help="Try every decoder on the GPU instead; takes a minute.")
@click.option("--data", type=FOLDER, metavar="DIR", help="With --gpu: images in class folders. Default: drawn ones.")
@click.option("--json", "json_path", type=FILE, metavar="FILE", help="With --gpu: write the figures.")
def doctor(gpu: bool, data: str | None, json_path: Path | None) -> None:
    """Say what this machine has and lacks, with the command that fixes it.

    Exit status 1 where something that is needed is missing, or, with --gpu, where the decoder that a run takes by
    default does not work.
    """
    if gpu:
        _try_decoders(data, json_path)
        return
    if data or json_path:
        raise UserError("doctor takes --data and --json together with --gpu only")
    from fasttrain.doctor.machine import examine

    findings = examine()
    for finding in findings:
        click.echo(f"{'ok  ' if finding.good else 'LACK'}  {finding.what}: {finding.found}")
        if finding.mend:
            click.echo(f"      {finding.mend}")
    sys.exit(0 if all(each.good or not each.needed for each in findings) else 1)


def _try_decoders(data: str | None, json_path: Path | None) -> None:
    import torch

    from fasttrain.benchmarks import common
    from fasttrain.doctor import decoders as decoder_check
    from fasttrain.pipelines import decoders

    if json_path:
        common.check_overwritable(json_path)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for line, trials in decoder_check.report(data):
        click.echo(line)
        if json_path:
            settings = {"data": "given" if data else "drawn", "advice": line}
            common.write_figures(json_path, device, [vars(each) for each in trials], settings)
    chosen = [each for each in trials if each.kind == decoders.rule().auto]
    if chosen and not chosen[0].good:
        sys.exit(1)
