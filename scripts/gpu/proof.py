"""The proof on small data: stage 1 and the three losses of stage 2, compared with timm.

    python3 scripts/gpu/proof.py --data DIR --out OUT --json FILE

DIR contains train/ and val/. Stage 1 trains with cross entropy. Stage 2 continues from it three times: with cross
entropy, with triplet loss and with ArcFace. timm's loader and a plain loop train the same network for as many epochs as
both stages have together. FILE has, for each model, the best top-1 on val, the seconds until it was reached (including
startup and compilation and, for stage 2, all of stage 1), and the top-1 with the report's 16 views; also the top-1 of
the stage-2 models' ensemble. Results of an earlier run in OUT are removed, because their times are unknown.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout need not be installed
from checkout import ROOT, environment

from fasttrain.benchmarks.common import write_figures
from fasttrain.distributed.ranks import ranks
from fasttrain.evaluation import metrics
from fasttrain.evaluation.ensemble import fuse, load_members
from fasttrain.evaluation.predictions import Predictions

BATCH, SIZE = 128, 64
STAGE1, STAGE2 = 40, 20  # epochs
LOSSES = ("ce", "ce+triplet", "ce+arcface")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--json", required=True, type=Path)
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--toy", action="store_true", help="a tiny network, one epoch per stage, on a CPU")
    args = parser.parse_args()
    proof = Proof(args)
    try:
        proof.stages()
        proof.ensemble()
        proof.timm()
    except subprocess.CalledProcessError as error:
        return error.returncode
    return 0


class Proof:
    def __init__(self, args: argparse.Namespace) -> None:
        self.data, self.out, self.json = args.data, args.out, args.json
        self.arch, self.epochs = args.arch, (STAGE1, STAGE2)
        self.run_options = ["--batch-size", str(BATCH), "--image-size", str(SIZE)]
        self.device: list[str] = []
        if args.toy:
            self.arch, self.epochs = "test_resnet", (1, 1)
            self.run_options = ["--batch-size", "16", "--image-size", "32"]
            self.device = ["--device", "cpu"]
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir(parents=True)
        self.rows: list[dict[str, Any]] = []

    def stages(self) -> None:
        stage1 = self.out / "stage1"
        stage1_seconds = self._train("stage 1, ce", stage1, self.epochs[0], ["--loss", "ce"])
        for loss in LOSSES:
            options = ["--loss", loss, "--init", str(stage1)]
            self._train(f"stage 2, {loss}", self.out / f"stage2-{loss}", self.epochs[1], options, stage1_seconds)

    def _train(self, name: str, folder: Path, epochs: int, options: list[str], stage1_seconds: float = 0) -> float:
        """Run fasttrain, record the time at which each evaluation appears in the log, then evaluate with 16 views.
        stage1_seconds: the time of the stage that the run continues from. Returns the seconds of both stages."""
        command = ["run", "--arch", self.arch, "--data", str(self.data), "--epochs", str(epochs), "--out", str(folder)]
        start = time.perf_counter() - stage1_seconds
        process = subprocess.Popen(
            self._fasttrain(*command, *self.run_options, *self.device, *options), env=environment()
        )
        curve: list[tuple[float, float]] = []
        while process.poll() is None:
            time.sleep(0.1)
            curve = add_evaluations(folder / "log.jsonl", curve, time.perf_counter() - start)
        curve = add_evaluations(folder / "log.jsonl", curve, time.perf_counter() - start)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, name)
        words = ["eval", str(folder), "--data", str(self.data / "val"), "--views", "report"]
        evaluate = self._fasttrain(*words, "--out", str(predictions_file(folder)), *self.device)
        subprocess.run(evaluate, env=environment(), check=True)
        (predicted,) = load_members([predictions_file(folder)])
        all_epochs = epochs + (self.epochs[0] if stage1_seconds else 0)
        self._row(name, all_epochs, curve, top1_16_views=top1_of(predicted.probs, predicted))
        return curve[-1][0]

    def ensemble(self) -> None:
        members = load_members([predictions_file(self.out / f"stage2-{loss}") for loss in LOSSES])
        fused = fuse([member.probs for member in members], None)
        self._row("the three of stage 2 together", 0, [], top1_16_views=top1_of(fused, members[0]))

    def timm(self) -> None:
        """Train with timm's loader and a plain loop, at the same peak learning rate."""
        epochs, size = sum(self.epochs), self.run_options[3]
        batch = int(self.run_options[1])
        script = ROOT / "scripts" / "train_with_timm.py"
        command = [sys.executable, str(script), "--data", str(self.data), "--arch", self.arch]
        command += ["--image-size", size, "--batch-size", str(batch), "--epochs", str(epochs)]
        command += ["--lr", str(0.1 * batch / 256), "--workers", str(len(os.sched_getaffinity(0)))]
        start, curve = time.perf_counter(), []
        process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            if match := re.search(r"top-1 ([\d.]+)%", line):
                curve.append((time.perf_counter() - start, float(match[1]) / 100))
        if process.wait():
            raise subprocess.CalledProcessError(process.returncode, "train_with_timm.py")
        self._row("timm", epochs, curve)

    def _row(self, name: str, epochs: int, curve: list[tuple[float, float]], **values: float) -> None:
        row: dict[str, Any] = {"model": name, "epochs": epochs, "curve": curve, **values}
        if curve:
            best = max(top1 for _, top1 in curve)
            row |= {"top1": best, "seconds": next(seconds for seconds, top1 in curve if top1 == best)}
            row |= {"all_seconds": curve[-1][0]}
        self.rows.append(row)
        print({key: value for key, value in row.items() if key != "curve"}, flush=True)
        with ranks("auto") as this_rank:
            write_figures(self.json, this_rank.device, self.rows, {"arch": self.arch, "options": self.run_options})

    def _fasttrain(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "fasttrain", *words]


def top1_of(probs: NDArray[Any], labeled: Predictions) -> float:
    assert labeled.labels is not None
    return metrics.scores(probs, labeled.labels).top1


def predictions_file(folder: Path) -> Path:
    """The file with a run's probabilities for the report's views."""
    return folder / "views.npz"


def add_evaluations(log: Path, curve: list[tuple[float, float]], seconds: float) -> list[tuple[float, float]]:
    """The (seconds, top-1) of all evaluations in a log. New ones, which `curve` does not have yet, get the current time
    `seconds`."""
    if not log.exists():
        return curve
    lines = [line for line in log.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    evaluations = [event for event in map(json.loads, lines) if event["event"] == "eval"]
    return curve + [(seconds, event["top1"]) for event in evaluations[len(curve) :]]


if __name__ == "__main__":
    sys.exit(main())
