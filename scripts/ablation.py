"""Train the steps of the report's method, one added to another, over several seeds, and say what each of them brings.

usage: python scripts/ablation.py --data DIR --out DIR [--arch A --classes N --image-size S --epochs E --seeds N …]

DIR holds train/ and val/. Needs `pip install ".[test,plot]"` (scipy, matplotlib). Every run is a fasttrain run under
--out; the same command again goes on where it was stopped, and with all runs there it only writes the table. Accuracy
is top-1 over val/ after the last epoch (never of the best one). Intervals are Student's at 95 % over the seeds; the
difference is to the row that a step is compared with, paired by seed.
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
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats

from fasttrain import dataset, recipes, rundir
from fasttrain.config import Augment, Ema, Init, Mix, Optim, Recipe
from fasttrain.distributed import ranks
from fasttrain.losses.triplet import Triplet
from fasttrain.train import settle, train


class Row(NamedTuple):
    """A line of the table: the run that it reads, and the row that it is compared with."""

    title: str
    run: str
    beside: str | None = None
    averaged: bool = False


ROWS = (
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

    data = subset(args.data, args.out / "data", args.classes)
    top1: dict[str, dict[str, float]] = {}
    for seed in range(args.seeds):
        for row in ROWS:
            folder = args.out / f"seed{seed}" / row.run
            score = with_timm(args, data, folder, seed) if row.run == "timm" else trained(args, data, folder, seed, row)
            top1.setdefault(row.title, {})[str(seed)] = score
            print(f"seed {seed}: {row.title}: {score:.2%}", flush=True)
    table = [line(row, top1) for row in ROWS]
    for each in table:
        print(f"{each['title']:<28} {each['mean']:6.2%} ± {each['interval']:.2%}   {difference(each)}")
    result = {
        "command": "python scripts/ablation.py " + " ".join(sys.argv[1:]),
        "date": str(date.today()),
        "device": f"CPU, cores used: {len(os.sched_getaffinity(0))}" if not torch.cuda.is_available() else gpu(),
        "torch": torch.__version__,
        "images": {split: len(dataset.scan(data / split)) for split in ("train", "val")},
        "rows": table,
    }
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if args.plot:
        draw(args.plot, table)


def gpu() -> str:
    return torch.cuda.get_device_name()


def subset(data: Path, into: Path, classes: int) -> Path:
    """DIR's first classes, as hard links (copies on another disk), so that timm's loader sees the same files."""
    for split in ("train", "val"):
        for folder in sorted(each for each in (data / split).iterdir() if each.is_dir())[:classes]:
            if not (into / split / folder.name).exists():
                shutil.copytree(folder, into / split / folder.name, copy_function=link)
    return into


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
        optim=Optim(lr=args.lr, lr_batch=0),
        augment=Augment(crop_area=(args.crop_area, 1.0)),
        mix=Mix(cutmix=0.5),
        ema=Ema(decay=args.ema),
    )
    if run == "ce":
        whole = replace(whole, augment=replace(whole.augment, autoaugment="none"))
    if run in ("ce", "autoaugment"):
        whole = replace(whole, mix=Mix(cutmix=0))
    if run in COMBINATION:
        whole = recipes.second_stage(whole, COMBINATION[run])
        # Another seed, so that the control does not see stage 1's batches again.
        whole = replace(whole, seed=1000 + seed, init=Init(weights=str(stage1), averaged=False))
    if run == "stage2-light-triplet":
        whole = replace(whole, losses=(whole.losses[0], Triplet(weight=0.1)))
    return replace(whole, machine=replace(whole.machine, workers=args.workers, log_steps=100))


def trained(args: argparse.Namespace, data: Path, out: Path, seed: int, row: Row) -> float:
    """Top-1 of a run, which is made, or gone on with, where it is not there whole."""
    recipe = recipe_of(args, row.run, seed, out.parent / "cutmix" / "last")
    with ranks("auto") as here:
        recipe = settle(recipe, here.device)
        start = rundir.open_run(out, "auto", recipes.to_toml(recipe))
        train(recipe, out, dataset.scan(data / "train"), dataset.scan(data / "val"), here, start)
    events = [json.loads(text) for text in (out / "log.jsonl").read_text().splitlines()]
    last = [event for event in events if event["event"] == "eval"][-1]
    return last["ema"]["top1"] if row.averaged else last["top1"]


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
