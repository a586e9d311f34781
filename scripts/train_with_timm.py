"""A baseline for fasttrain: the same training in plain torch with timm's PIL loader. Network, schedule, crops, flips,
label smoothing and number of epochs are the same; AutoAugment and CutMix can be turned off.

usage: python scripts/train_with_timm.py --data DIR --arch resnet18 --image-size 64 --epochs 10 --lr 0.05

DIR contains train/ and val/. Prints top-1 and the elapsed time after each epoch.
"""

import argparse
import sys
import time
from pathlib import Path

import timm
import torch
from timm.data import ImageDataset, Mixup, create_loader
from timm.loss import SoftTargetCrossEntropy

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout need not be installed
from fasttrain.config.schema import IMAGENET_MEAN, IMAGENET_STD
from fasttrain.pipelines.views import shorter_edge
from fasttrain.training.optim import lr_at


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--crop-area", type=float, default=0.08, help="minimum share of the image in a crop")
    parser.add_argument("--no-autoaugment", action="store_true")
    parser.add_argument("--cutmix", type=float, default=0.5, help="probability per batch")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    common = {
        "input_size": (3, args.image_size, args.image_size),
        "batch_size": args.batch_size,
        "interpolation": "bilinear",
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "num_workers": args.workers,
        "device": device,
    }
    files = ImageDataset(f"{args.data}/train")
    classes = len(files.reader.class_to_idx)
    policy = None if args.no_autoaugment else "original"
    train = create_loader(
        files, is_training=True, scale=(args.crop_area, 1.0), auto_augment=policy, color_jitter=None, **common
    )
    crop = args.image_size / shorter_edge(args.image_size)
    val = create_loader(ImageDataset(f"{args.data}/val"), is_training=False, crop_pct=crop, **common)
    mixup = Mixup(mixup_alpha=0, cutmix_alpha=1.0, prob=args.cutmix, label_smoothing=0.1, num_classes=classes)

    model = timm.create_model(args.arch, num_classes=classes).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, weight_decay=1e-4, fused=True)
    criterion = SoftTargetCrossEntropy()
    steps = args.epochs * len(train)
    start, step = time.perf_counter(), 0
    for epoch in range(args.epochs):
        model.train()
        for images, labels in train:
            if len(images) % 2:  # timm's Mixup needs even batches
                images, labels = images[:-1], labels[:-1]
            images, targets = mixup(images, labels)
            optimizer.param_groups[0]["lr"] = lr_at(step, steps=steps, warmup_steps=len(train), peak=args.lr)
            images = images.contiguous(memory_format=torch.channels_last)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logits = model(images)
            criterion(logits.float(), targets).backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
        model.eval()
        hits = total = 0
        with torch.no_grad():
            for images, labels in val:
                hits += int((model(images).argmax(1) == labels).sum())
                total += len(labels)
        print(f"epoch {epoch}: top-1 {hits / total:.2%} after {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
