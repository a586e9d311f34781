"""Images a second of the training pipeline beside timm's PIL loader, in one run, in turns.

usage: python scripts/bench_pipeline.py --data DIR [--json FILE]

The project's pipeline takes images at random, and in batches of P classes x K images. All loaders decode, random-
resize-crop, flip and (in the second set) AutoAugment the same files, and give normalised float32 batches on the CPU.
timm has as many worker processes as DALI has threads. Every round makes each loader in turn, warms it up and times it;
the table gives medians over the rounds, with the range, and the ratio of medians.
"""

import argparse
import datetime
import gc
import itertools
import json
import platform
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from nvidia import dali
from timm.data import ImageDataset, create_loader

from fasttrain import dataset, recipes
from fasttrain.config import IMAGENET_MEAN, IMAGENET_STD, Augment
from fasttrain.evaluate import normalised
from fasttrain.pipelines.plan import Plan
from fasttrain.pipelines.train import batches

WARM_UP = 6  # batches
AUTOAUGMENT = {"none": None, "imagenet": "original"}  # ours: timm's name of the same policy


def ours(index: dataset.Index, policy: str, args: argparse.Namespace, images_per_class: int = 0) -> Iterator[Any]:
    recipe = replace(
        recipes.for_arch("resnet18"),
        batch_size=args.batch,
        images_per_class=images_per_class,
        image_size=args.size,
        epochs=10**6,
        augment=Augment(autoaugment=policy),
    )
    plan = Plan.of(recipe, index)
    for batch in batches(plan, index, torch.device("cpu"), args.workers):
        yield normalised(batch.pixels, torch.float32)


def grouped(index: dataset.Index, policy: str, args: argparse.Namespace) -> Iterator[Any]:
    """Batches of 4 images a class over the same files, which for this are taken to be of classes of 8."""
    labels = np.arange(len(index)) // 8
    relabelled = replace(index, labels=labels, classes=tuple(map(str, range(labels[-1] + 1))))
    return ours(relabelled, policy, args, images_per_class=4)


def timms(index: dataset.Index, policy: str, args: argparse.Namespace) -> Iterator[Any]:
    files = ImageDataset(args.data)
    files.reader.samples = files.reader.samples * (args.batch * 400 // len(files) + 1)  # no epoch's end on the way
    loader = create_loader(
        files,
        input_size=(3, args.size, args.size),
        batch_size=args.batch,
        is_training=True,
        auto_augment=AUTOAUGMENT[policy],
        color_jitter=None,
        interpolation="bilinear",
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        num_workers=args.workers,
        device=torch.device("cpu"),
    )
    for images, _ in loader:
        yield images


def rate(stream: Iterator[Any], args: argparse.Namespace) -> float:
    """Images a second over `args.batches` batches, after a few that fill the loader's queues."""
    for _ in itertools.islice(stream, WARM_UP):
        pass
    start = time.perf_counter()
    for _ in itertools.islice(stream, args.batches):
        pass
    return args.batches * args.batch / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of class folders")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=20, help="batches a loader and round")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    index = dataset.scan(args.data)
    results = []
    for policy in AUTOAUGMENT:
        loaders = {"fasttrain": ours, "fasttrain, P x K batches": grouped, "timm": timms}
        rates: dict[str, list[float]] = {name: [] for name in loaders}
        for _ in range(args.rounds):
            for name, loader in loaders.items():
                # Each is made anew and gone before the next begins: a loader that waits still works ahead.
                rates[name].append(rate(loader(index, policy, args), args))
                gc.collect()
        medians = {name: statistics.median(each) for name, each in rates.items()}
        ratio = medians["fasttrain"] / medians["timm"]
        print(f"AutoAugment {policy}:")
        for name, each in rates.items():
            print(f"  {name:24} {medians[name]:7.0f} img/s  ({min(each):.0f} … {max(each):.0f})")
        print(f"  fasttrain to timm {ratio:14.2f}", flush=True)
        results.append({"autoaugment": policy, "images_per_s": rates, "ratio": ratio})
    if args.json:
        about = {
            "date": datetime.date.today().isoformat(),
            "device": f"{platform.processor() or platform.machine()}, {args.workers} workers",
            "versions": {each.__name__: each.__version__ for each in (torch, timm, dali, np)},
            "batch": args.batch,
            "size": args.size,
            "images": len(index),
            "results": results,
        }
        args.json.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
