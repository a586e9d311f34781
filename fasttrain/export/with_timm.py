"""Runs an exported file as its users do, with timm and without fasttrain: python with_timm.py FILE IMAGES.json OUT.npy

FILE: weights, with config.json next to them. IMAGES.json: a list of image files. OUT.npy: the probabilities, float32
[N, K].
"""

import json
import sys
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config

BATCH = 32


def main() -> None:
    file, listing, out = map(Path, sys.argv[1:])
    config = json.loads((file.parent / "config.json").read_text(encoding="utf-8"))
    network = timm.create_model(config["architecture"], num_classes=config["num_classes"], checkpoint_path=str(file))
    network.eval()
    transform = create_transform(**resolve_data_config(config["pretrained_cfg"]))
    paths = json.loads(listing.read_text(encoding="utf-8"))
    rows = []
    for start in range(0, len(paths), BATCH):
        images = torch.stack([transform(Image.open(path).convert("RGB")) for path in paths[start : start + BATCH]])
        with torch.no_grad():
            rows.append(network(images).softmax(1).numpy())
    np.save(out, np.concatenate(rows))


if __name__ == "__main__":
    main()
