"""Train the steps of a method, one added to another, over several seeds, and say what each of them brings.

usage: python scripts/ablation.py --data DIR --out DIR [--method report|attract_repulse --label-noise P --seeds N …]

The method is the DeepBlueAI report's, or Attract-and-Repulse with our constants. --label-noise gives that share of the
training images, drawn anew for each seed, the label of another class, all others equally likely. DIR holds train/ and
val/. Needs `pip install ".[test,plot]"` (scipy, matplotlib). Every run is a fasttrain run under --out; the same command
again goes on where it was stopped, and with all runs there it only writes the table. Accuracy is top-1 over val/ after
the last epoch (never of the best one). Intervals are Student's at 95 % over the seeds; the difference is to the row
that a step is compared with, paired by seed.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from datetime import date
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout need not be installed
from fasttrain import recipes
from fasttrain.checkpoints import checkpoint
from fasttrain.checkpoints.run_dir import open_run
from fasttrain.config import toml
from fasttrain.config.schema import AugmentConfig, EmaConfig, InitConfig, MixConfig, OptimConfig, Recipe
from fasttrain.data.index import scan
from fasttrain.distributed.ranks import ranks
from fasttrain.evaluation.evaluate import evaluate
from fasttrain.losses.contrastive import Contrastive
from fasttrain.losses.cross_entropy import CrossEntropy
from fasttrain.losses.mean_teacher import MeanTeacher
from fasttrain.losses.symmetric import SymmetricCrossEntropy
from fasttrain.losses.triplet import Triplet
from fasttrain.pipelines.eval_loader import EvalLoader
from fasttrain.pipelines.views import views_by_name
from fasttrain.prepare import resolve_auto
from fasttrain.train import train
from fasttrain.training.step import DTYPES


class Row(NamedTuple):
    """A line of the table: the run that it reads, and the row that it is compared with."""

    title: str
    run: str
    beside: str | None = None
    averaged: bool = False


REPORT = (
    Row("timm's loader and loop: CE", "timm"),
    Row("CE", "ce", beside="timm's loader and loop: CE"),
    Row("+ AutoAugment", "autoaugment", beside="CE"),
    Row("+ CutMix", "cutmix", beside="+ AutoAugment"),
    Row("+ EMA of the weights", "cutmix", beside="+ CutMix", averaged=True),
    Row("stage 2: CE again", "stage2-ce", beside="+ CutMix"),
    Row("stage 2: CE + triplet", "stage2-triplet", beside="stage 2: CE again"),
    Row("stage 2: CE + 0.1 triplet", "stage2-light-triplet", beside="stage 2: CE again"),
    Row("stage 2: CE + ArcFace", "stage2-arcface", beside="stage 2: CE again"),
)
# The losses of Attract-and-Repulse's rows; stage 2 goes on from SCE + CR, its control with the same losses.
_SCE, _CR = SymmetricCrossEntropy(), Contrastive(decay="cosine")
ATTRACT_REPULSE = (
    Row("CE", "ce"),
    Row("SCE", "sce", beside="CE"),
    Row("SCE on two views", "sce-views", beside="SCE"),
    Row("SCE + CR", "sce-cr", beside="SCE on two views"),
    Row("+ RandAugment, erasing", "randaugment", beside="SCE + CR"),
    Row("stage 2: SCE + CR again", "stage2-sce-cr", beside="SCE + CR"),
    Row("the same, averaged weights", "stage2-sce-cr", beside="stage 2: SCE + CR again", averaged=True),
    Row("stage 2: + mean teacher", "stage2-teacher", beside="the same, averaged weights", averaged=True),
)
LOSSES: dict[str, tuple[Any, ...]] = {
    "ce": (CrossEntropy(smoothing=0.0),),
    "sce": (_SCE,),
    "sce-views": (_SCE, Contrastive(weight=0.0)),
    "sce-cr": (_SCE, _CR),
    "randaugment": (_SCE, _CR),
    "stage2-sce-cr": (_SCE, _CR),
    "stage2-teacher": (_SCE, _CR, MeanTeacher()),
}
METHODS = {"report": REPORT, "attract_repulse": ATTRACT_REPULSE}
COMBINATION = {
    "stage2-ce": "ce",
    "stage2-triplet": "ce+triplet",
    "stage2-light-triplet": "ce+triplet",
    "stage2-arcface": "ce+arcface",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--method", choices=METHODS, default="report")
    parser.add_argument("--label-noise", type=share, default=0.0, metavar="P", help="in [0, 1)")
    parser.add_argument("--arch", default="resnet10t")
    parser.add_argument("--classes", type=int, default=50, help="the first N classes of DIR")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=48)
    parser.add_argument("--epochs", type=int, default=20, help="of stage 1; stage 2 has four fifths of them")
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--crop-area", type=float, default=0.25, help="smallest share of the image that a crop has")
    parser.add_argument("--ema", type=float, default=0.99, help="decay a step")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()

    rows = METHODS[args.method]
    top1: dict[str, dict[str, float]] = {}
    for seed in range(args.seeds):
        into = args.out / (f"seed{seed}/data-{args.label_noise:g}" if args.label_noise else "data")
        data = subset(args.data, into, args.classes, args.label_noise, seed)
        for row in rows:
            folder = args.out / f"seed{seed}" / row.run
            score = with_timm(args, data, folder, seed) if row.run == "timm" else trained(args, data, folder, seed, row)
            top1.setdefault(row.title, {})[str(seed)] = score
            print(f"seed {seed}: {row.title}: {score:.2%}", flush=True)
    table = [line(row, top1) for row in rows]
    for each in table:
        print(f"{each['title']:<28} {each['mean']:6.2%} ± {each['interval']:.2%}   {difference(each)}")
    result = {
        "command": "python scripts/ablation.py " + " ".join(sys.argv[1:]),
        "date": str(date.today()),
        "device": f"CPU, cores used: {len(os.sched_getaffinity(0))}" if not torch.cuda.is_available() else gpu(),
        "torch": torch.__version__,
        "label_noise": args.label_noise,
        "images": {split: len(scan(data / split)) for split in ("train", "val")},
        "rows": table,
    }
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if args.plot:
        draw(args.plot, table)


def gpu() -> str:
    return torch.cuda.get_device_name()


def share(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"a share in [0, 1), not {text}")
    return value


def subset(data: Path, into: Path, classes: int, noise: float, seed: int) -> Path:
    """DIR's first classes, as hard links (copies on another disk), so that timm's loader sees the same files; with a
    share `noise` of the training images in the folder of another class."""
    for split in ("train", "val"):
        folders = sorted(each for each in (data / split).iterdir() if each.is_dir())[:classes]
        files = [[path for path in sorted(folder.rglob("*")) if path.is_file()] for folder in folders]
        labels = np.repeat(np.arange(len(folders)), [len(each) for each in files])
        if split == "train":
            labels = noisy(labels, len(folders), noise, seed)
        for path, label in zip(chain.from_iterable(files), labels, strict=True):
            target = into / split / folders[label].name / "-".join(path.relative_to(data / split).parts)
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                link(str(path), str(target))
    return into


def noisy(labels: np.ndarray, classes: int, noise: float, seed: int) -> np.ndarray:
    """Labels of which round(noise · n), drawn by the seed, are another class, each of the others equally likely."""
    rng = np.random.default_rng(seed)
    wrong = rng.permutation(len(labels))[: round(noise * len(labels))]
    labels = labels.copy()
    labels[wrong] = (labels[wrong] + rng.integers(1, classes, len(wrong))) % classes
    return labels


def link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def recipe_of(args: argparse.Namespace, run: str, seed: int, stage1: Path) -> Recipe:
    """The recipe of a run: the report's method, less what its row has not yet, at the command line's size."""
    whole = replace(
        recipes.for_arch(args.arch),
        image_size=args.image_size,
        batch_size=args.batch_size,
        epochs=args.epochs,
        seed=seed,
        optim=OptimConfig(lr=args.lr, lr_batch=0),
        augment=AugmentConfig(crop_area=(args.crop_area, 1.0)),
        mix=MixConfig(cutmix=0.5),
        ema=EmaConfig(decay=args.ema),
    )
    if run == "ce":
        whole = replace(whole, augment=replace(whole.augment, autoaugment="none"))
    if run in ("ce", "autoaugment"):
        whole = replace(whole, mix=MixConfig(cutmix=0))
    if args.method == "attract_repulse":
        # Small images and few epochs: RandAugment and erasing have a row of their own.
        strong = recipes.stage1(whole).augment if run == "randaugment" else AugmentConfig(autoaugment="none")
        augment = replace(strong, crop_area=whole.augment.crop_area)
        epochs = args.epochs * 4 // 5 if run.startswith("stage2") else args.epochs
        whole = replace(whole, losses=LOSSES[run], augment=augment, mix=MixConfig(cutmix=0.5), epochs=epochs)
    elif run in COMBINATION:
        whole = recipes.second_stage(whole, COMBINATION[run])
    if run.startswith("stage2"):
        # Another seed, so that the control does not see stage 1's batches again.
        whole = replace(whole, seed=1000 + seed, init=InitConfig(weights=str(stage1), averaged=False))
    if run == "stage2-light-triplet":
        whole = replace(whole, losses=(whole.losses[0], Triplet(weight=0.1)))
    return replace(whole, machine=replace(whole.machine, workers=args.workers, log_steps=100))


def trained(args: argparse.Namespace, data: Path, out: Path, seed: int, row: Row) -> float:
    """Top-1 of a run, which is made, or gone on with, where it is not there whole."""
    stage1 = "cutmix" if args.method == "report" else "sce-cr"
    recipe = recipe_of(args, row.run, seed, out.parent / stage1 / "last")
    with ranks("auto") as here:
        recipe = resolve_auto(recipe, here.device)
        start = open_run(out, "auto", toml.to_toml(recipe))
        train(recipe, out, scan(data / "train"), None, here, start)
        val = scan(data / "val")
        model, _, _ = checkpoint.network(out / "last", averaged=row.averaged)
        centre = views_by_name("center", args.image_size)
        crops = EvalLoader(val, centre, args.batch_size, here.device, here.threads(args.workers))
        return evaluate(model.to(here.device), crops, val, here, DTYPES[recipe.precision]).top1


def with_timm(args: argparse.Namespace, data: Path, out: Path, seed: int) -> float:
    """Top-1 of the first row's recipe in timm's loader and a plain loop, trained afresh unless its result is there."""
    done = out / "result.json"
    if not done.exists():
        out.mkdir(parents=True, exist_ok=True)
        names = ("arch", "image_size", "batch_size", "epochs", "lr", "crop_area")
        options = [str(each) for name in names for each in ("--" + name.replace("_", "-"), getattr(args, name))]
        options += ["--no-autoaugment", "--cutmix", "0", "--seed", str(seed), "--data", str(data)]
        script = Path(__file__).with_name("train_with_timm.py")
        started = time.monotonic()
        said = subprocess.run([sys.executable, script, *options], check=True, capture_output=True, text=True).stdout
        top1 = float(re.findall(r"top-1 ([\d.]+)%", said)[-1]) / 100
        done.write_text(json.dumps({"top1": top1, "seconds": time.monotonic() - started}), encoding="utf-8")
    return json.loads(done.read_text())["top1"]


def interval(values: np.ndarray) -> float:
    """Half the width of Student's 95 % interval of the mean."""
    if len(values) < 2:
        return float("nan")
    return float(stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))


def line(row: Row, top1: dict[str, dict[str, float]]) -> dict:
    values = np.array(list(top1[row.title].values()))
    told = {"title": row.title, "top1": values.tolist(), "mean": values.mean(), "interval": interval(values)}
    if row.beside:
        gain = values - np.array(list(top1[row.beside].values()))
        told |= {"beside": row.beside, "gain": gain.mean(), "gain_interval": interval(gain)}
    return told


def difference(row: dict) -> str:
    return f"{row['gain']:+.2%} ± {row['gain_interval']:.2%} to {row['beside']}" if "gain" in row else ""


def draw(path: Path, table: list[dict]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.5 * len(table) + 1), layout="constrained")
    axes = figure.subplots()
    for at, row in enumerate(reversed(table)):
        axes.errorbar(100 * row["mean"], at, xerr=100 * row["interval"], fmt="o", color="tab:blue", capsize=4)
        axes.plot([100 * each for each in row["top1"]], [at] * len(row["top1"]), ".", color="black", alpha=0.5)
    axes.set_yticks(range(len(table)), [row["title"] for row in reversed(table)])
    axes.set_xlabel("top-1, % (dots: seeds; bars: 95 % interval of the mean)")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
