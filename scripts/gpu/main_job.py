"""The main job: `fasttrain run --arch tresnet_xl` on photographs, with default settings, for a few steps.

    python3 scripts/gpu/main_job.py --data DIR --out OUT --json FILE [--pack]

The photographs are repeated (as hard links) until there are enough for the steps. The figures come from the run's log.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout need not be installed
from checkout import environment

from fasttrain.benchmarks.common import write_figures
from fasttrain.config.schema import DataConfig
from fasttrain.data.open_data import open_data
from fasttrain.distributed.ranks import ranks

BATCH = 256  # the recipe's batch size


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--json", required=True, type=Path)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--arch", default="tresnet_xl")
    parser.add_argument("--pack", action="store_true", help="train on a pack of raw pixels at 288")
    parser.add_argument("--toy", action="store_true", help="a tiny network, on a CPU")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the run")
    args = parser.parse_args()
    steps, batch = (4, 8) if args.toy else (args.steps, BATCH)
    arch = "test_resnet" if args.toy else args.arch
    shutil.rmtree(args.out, ignore_errors=True)
    images = args.out / "images"
    index, _ = open_data(DataConfig(train=(args.data,)))
    for copy in range(-(-steps * batch // len(index))):
        for path, name in zip(index.paths, index.ids, strict=True):
            target = images / f"{Path(name).parent}" / f"{copy:03}-{Path(name).name}"
            target.parent.mkdir(parents=True, exist_ok=True)
            link(path, target)
    data = images
    if args.pack:
        data = args.out / "raw288.safetensors"
        words = ["data", "pack", str(images), "--out", str(data), "--pixels", "raw", "--shorter-side", "288"]
        subprocess.run([sys.executable, "-m", "fasttrain", *words], env=environment(), check=True)
    command = [sys.executable, "-m", "fasttrain", "run", "--arch", arch, "--data", str(data), "--epochs", "1"]
    command += ["--out", str(args.out / "run"), "--set", "machine.log_steps=5"]
    command += [word for setting in args.set for word in ("--set", setting)]
    command += ["--image-size", "32", "--batch-size", "8", "--device", "cpu"] if args.toy else []
    start = time.perf_counter()
    status = subprocess.run(command, env=environment()).returncode
    seconds = time.perf_counter() - start
    log = args.out / "run" / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    keys = ("step", "images_per_s", "memory_gib", "loss")
    rows = [{key: line.get(key) for key in keys} for line in lines if line["event"] == "train"]
    with ranks("auto") as this_rank:
        run_command = ["fasttrain", "run", "--arch", arch, "--epochs", "1", "--set", "machine.log_steps=5", *args.set]
        settings = {
            "command": run_command,
            "pack": args.pack,
            "exit_status": status,
            "seconds": seconds,
            "batch_size": batch,
        }
        write_figures(args.json, this_rank.device, rows, settings)
    for row in rows:
        print(row)
    return status


def link(path: str, target: Path) -> None:
    try:
        os.link(path, target)
    except OSError:  # another disk
        shutil.copyfile(path, target)


if __name__ == "__main__":
    sys.exit(main())
