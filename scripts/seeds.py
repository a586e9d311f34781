"""Train several settings with several seeds, and compare their scores on the validation images.

    python scripts/seeds.py --out OUT --seeds 3 --score balanced_accuracy --json FILE \
        --arm "cross entropy" "" --arm "balance 0.5" "--set data.balance=0.5" -- --arch resnet10t --data DIR --epochs 40

Each arm has a name and further words of `fasttrain run`; the words after `--` belong to all. All arms are compared
with the first, paired by seed. The score is that of the last epoch. Every run is a fasttrain run in OUT/ARM/seedN, so
the same command resumes. Needs scipy, and matplotlib for --plot.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout need not be installed
import paired

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    words = sys.argv[1:]
    common = words[words.index("--") + 1 :] if "--" in words else []
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--arm", nargs=2, action="append", required=True, metavar=("NAME", "WORDS"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--score", default="top1", help="a score of log.jsonl, default: top1")
    parser.add_argument("--title", default="", help="of the table, kept in --json")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args(words[: len(words) - len(common) - ("--" in words)])
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    scores: dict[str, list[float]] = {name: [] for name, _ in args.arm}
    for seed in seeds:
        for name, own in args.arm:
            folder = args.out / re.sub(r"[^\w.+=-]+", "-", name) / f"seed{seed}"
            evaluation = run(folder, [*common, *shlex.split(own), "--seed", str(seed)])
            scores[name].append(evaluation[args.score])
            print(f"seed {seed}: {name}: {args.score} {evaluation[args.score]:.4f}", flush=True)
    (first, _), *_ = args.arm
    rows = [
        paired.entry(name, values, None if name == first else first, scores[first]) for name, values in scores.items()
    ]
    print("\n".join(map(paired.line, rows)))
    if args.json:
        result = {
            "command": shlex.join(["python", "scripts/seeds.py", *sys.argv[1:]]),
            "date": str(date.today()),
            "device": paired.device_name(),
            "torch": torch.__version__,
            "title": args.title,
            "score": args.score,
            "seeds": list(seeds),
            "rows": rows,
        }
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if args.plot:
        paired.draw(args.plot, rows, args.score)
    return 0


def run(folder: Path, words: list[str]) -> dict[str, Any]:
    """The last evaluation of a run, which is first started, or resumed if it is not complete. Averaged weights count
    where the run averages them."""
    done = folder / "done.json"
    known = json.loads(done.read_text(encoding="utf-8")) if done.exists() else {}
    if known and known.get("words") != words:
        raise SystemExit(f"{folder} has a run of other words: {shlex.join(known.get('words', []))}; name another --out")
    if not known:
        env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        folder.parent.mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        with folder.with_suffix(".log").open("ab") as log:
            command = [sys.executable, "-m", "fasttrain", "run", *words, "--out", str(folder)]
            subprocess.run(command, check=True, env=env, stdout=log, stderr=log)
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        evaluation = [line for line in lines if line["event"] == "eval"][-1]
        scores = evaluation | evaluation.get("ema", {})
        known = scores | {"seconds": time.monotonic() - start, "words": words}
        done.write_text(json.dumps(known), encoding="utf-8")
    return known


if __name__ == "__main__":
    sys.exit(main())
