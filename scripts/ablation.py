"""Train a method in cumulative steps over several seeds, and report the gain of each step.

usage: python scripts/ablation.py --data DIR --out DIR [--method report|attract_repulse --label-noise P --seeds N …]

The method is the DeepBlueAI report's, or Attract-and-Repulse with our constants. --label-noise relabels that share of
the training images, chosen separately for each seed, with a uniformly random other class. DIR contains train/ and val/.
Requires `pip install ".[test,plot]"` (scipy, matplotlib). Every run is a fasttrain run under --out. The same command
resumes an interrupted ablation; if all runs are complete, it only writes the table. Accuracy is top-1 on val/ after the
last epoch, not the best one. Intervals are Student's t at 95 % over the seeds. A gain is the difference from the step's
baseline row, paired by seed.
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

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout need not be installed
import paired

from fasttrain import recipes
from fasttrain.checkpoints import checkpoint
from fasttrain.checkpoints.run_dir import open_run
from fasttrain.config import toml
from fasttrain.config.schema import AugmentConfig, EmaConfig, InitConfig, MixConfig, OptimConfig, Recipe
from fasttrain.data.scan import scan
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
    """A row of the table. run: the run that it evaluates. baseline: the title of the row that it is compared with."""

    title: str
    run: str
    baseline: str | None = None
    averaged: bool = False


REPORT = (
    Row("timm's loader and loop: CE", "timm"),
    Row("CE", "ce", baseline="timm's loader and loop: CE"),
    Row("+ AutoAugment", "autoaugment", baseline="CE"),
    Row("+ CutMix", "cutmix", baseline="+ AutoAugment"),
    Row("+ EMA of the weights", "cutmix", baseline="+ CutMix", averaged=True),
    Row("stage 2: CE again", "stage2-ce", baseline="+ CutMix"),
    Row("stage 2: CE + triplet", "stage2-triplet", baseline="stage 2: CE again"),
    Row("stage 2: CE + 0.1 triplet", "stage2-light-triplet", baseline="stage 2: CE again"),
    Row("stage 2: CE + ArcFace", "stage2-arcface", baseline="stage 2: CE again"),
)
# The losses of Attract-and-Repulse's rows. Stage 2 continues from SCE + CR; its control has the same losses.
_SCE, _CR = SymmetricCrossEntropy(), Contrastive(decay="cosine")
ATTRACT_REPULSE = (
    Row("CE", "ce"),
    Row("SCE", "sce", baseline="CE"),
    Row("SCE on two views", "sce-views", baseline="SCE"),
    Row("SCE + CR", "sce-cr", baseline="SCE on two views"),
    Row("+ RandAugment, erasing", "randaugment", baseline="SCE + CR"),
    Row("stage 2: SCE + CR again", "stage2-sce-cr", baseline="SCE + CR"),
    Row("the same, averaged weights", "stage2-sce-cr", baseline="stage 2: SCE + CR again", averaged=True),
    Row("stage 2: + mean teacher", "stage2-teacher", baseline="the same, averaged weights", averaged=True),
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
    parser.add_argument("--label-noise", type=noise_share, default=0.0, metavar="P", help="in [0, 1)")
    parser.add_argument("--arch", default="resnet10t")
    parser.add_argument("--classes", type=int, default=50, help="the first N classes of DIR")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=48)
    parser.add_argument("--epochs", type=int, default=20, help="of stage 1; stage 2 has four fifths as many")
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--crop-area", type=float, default=0.25, help="minimum share of the image in a crop")
    parser.add_argument("--ema", type=float, default=0.99, help="decay per step")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()

    rows = METHODS[args.method]
    top1: dict[str, dict[str, float]] = {}
    for seed in range(args.seeds):
        target = args.out / (f"seed{seed}/data-{args.label_noise:g}" if args.label_noise else "data")
        data = subset(args.data, target, args.classes, args.label_noise, seed)
        for row in rows:
            folder = args.out / f"seed{seed}" / row.run
            if row.run == "timm":
                score = timm_top1(args, data, folder, seed)
            else:
                score = fasttrain_top1(args, data, folder, seed, row)
            top1.setdefault(row.title, {})[str(seed)] = score
            print(f"seed {seed}: {row.title}: {score:.2%}", flush=True)
    by_title = {title: list(of_seeds.values()) for title, of_seeds in top1.items()}
    table = [
        paired.entry(row.title, by_title[row.title], row.baseline, by_title[row.baseline] if row.baseline else ())
        for row in rows
    ]
    print("\n".join(map(paired.line, table)))
    result = {
        "command": "python scripts/ablation.py " + " ".join(sys.argv[1:]),
        "date": str(date.today()),
        "device": paired.device_name(),
        "torch": torch.__version__,
        "label_noise": args.label_noise,
        "images": {split: len(scan(data / split)) for split in ("train", "val")},
        "rows": table,
    }
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if args.plot:
        paired.draw(args.plot, table, "top-1")


def noise_share(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be a share in [0, 1), not {text}")
    return value


def subset(data: Path, target: Path, classes: int, noise: float, seed: int) -> Path:
    """Create `target` with the first classes of `data`, as hard links (or copies, on another disk), so that timm's
    loader sees the same files. A share `noise` of the training images goes to the folder of another class."""
    for split in ("train", "val"):
        folders = sorted(folder for folder in (data / split).iterdir() if folder.is_dir())[:classes]
        files = [[path for path in sorted(folder.rglob("*")) if path.is_file()] for folder in folders]
        labels = np.repeat(np.arange(len(folders)), [len(paths) for paths in files])
        if split == "train":
            labels = add_label_noise(labels, len(folders), noise, seed)
        for path, label in zip(chain.from_iterable(files), labels, strict=True):
            copy = target / split / folders[label].name / "-".join(path.relative_to(data / split).parts)
            if not copy.exists():
                copy.parent.mkdir(parents=True, exist_ok=True)
                link(str(path), str(copy))
    return target


def add_label_noise(labels: np.ndarray, classes: int, noise: float, seed: int) -> np.ndarray:
    """The labels, of which round(noise · n) random ones are replaced by a uniformly random other class."""
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
    """The recipe of a run: the method without the steps that come after its row, with the command line's sizes."""
    recipe = replace(
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
        recipe = replace(recipe, augment=replace(recipe.augment, autoaugment="none"))
    if run in ("ce", "autoaugment"):
        recipe = replace(recipe, mix=MixConfig(cutmix=0))
    if args.method == "attract_repulse":
        # Images are small and epochs are few, so RandAugment and erasing have a separate row.
        augment = recipes.stage1(recipe).augment if run == "randaugment" else AugmentConfig(autoaugment="none")
        augment = replace(augment, crop_area=recipe.augment.crop_area)
        epochs = args.epochs * 4 // 5 if run.startswith("stage2") else args.epochs
        recipe = replace(recipe, losses=LOSSES[run], augment=augment, mix=MixConfig(cutmix=0.5), epochs=epochs)
    elif run in COMBINATION:
        recipe = recipes.second_stage(recipe, COMBINATION[run])
    if run.startswith("stage2"):
        # A different seed, so that the control does not repeat stage 1's batches.
        recipe = replace(recipe, seed=1000 + seed, init=InitConfig(weights=str(stage1), averaged=False))
    if run == "stage2-light-triplet":
        recipe = replace(recipe, losses=(recipe.losses[0], Triplet(weight=0.1)))
    return replace(recipe, machine=replace(recipe.machine, workers=args.workers, log_steps=100))


def fasttrain_top1(args: argparse.Namespace, data: Path, out: Path, seed: int, row: Row) -> float:
    """Top-1 of a run, which is first started or resumed if it is not complete."""
    stage1 = "cutmix" if args.method == "report" else "sce-cr"
    recipe = recipe_of(args, row.run, seed, out.parent / stage1 / "last")
    with ranks("auto") as this_rank:
        device = this_rank.device
        recipe = resolve_auto(recipe, device)
        resume_from = open_run(out, "auto", toml.to_toml(recipe))
        train(recipe, out, scan(data / "train"), None, this_rank, resume_from)
        val = scan(data / "val")
        model, _, _ = checkpoint.network(out / "last", averaged=row.averaged)
        center = views_by_name("center", args.image_size)
        crops = EvalLoader(val, center, args.batch_size, device, this_rank.threads(args.workers))
        return evaluate(model.to(device), crops, val, this_rank, DTYPES[recipe.precision]).top1


def timm_top1(args: argparse.Namespace, data: Path, out: Path, seed: int) -> float:
    """Top-1 of the first row: its recipe with timm's loader and a plain loop. Reuses the result of an earlier call."""
    result = out / "result.json"
    if not result.exists():
        out.mkdir(parents=True, exist_ok=True)
        names = ("arch", "image_size", "batch_size", "epochs", "lr", "crop_area")
        options = [str(word) for name in names for word in ("--" + name.replace("_", "-"), getattr(args, name))]
        options += ["--no-autoaugment", "--cutmix", "0", "--seed", str(seed), "--data", str(data)]
        script = Path(__file__).with_name("train_with_timm.py")
        started = time.monotonic()
        done = subprocess.run([sys.executable, script, *options], check=True, capture_output=True, text=True)
        top1 = float(re.findall(r"top-1 ([\d.]+)%", done.stdout)[-1]) / 100
        result.write_text(json.dumps({"top1": top1, "seconds": time.monotonic() - started}), encoding="utf-8")
    return json.loads(result.read_text())["top1"]


if __name__ == "__main__":
    main()
