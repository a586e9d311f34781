"""How long a checkpoint holds the training up: python scripts/bench_save.py [--out DIR] [--json FILE]

Weights, buffers and momentum of each of the report's networks, saved as a run does it (a copy in memory that the loop
waits for, then hashes, fsync and renaming in a thread), beside the same without the thread and beside torch.save of
the same tensors, in turns.
"""

import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout need not be installed
from fasttrain.benchmarks import common
from fasttrain.checkpoints import checkpoint
from fasttrain.config.schema import OptimConfig
from fasttrain.models import ARCHS, Classifier
from fasttrain.training import optim

META: dict[str, Any] = {
    "recipe": {},
    "classes": [],
    "data": "",
    "sizes": "",
    "best": None,
    "epoch_steps": 1,
    "world": 1,
    "shift": 0,
}
META |= {"rewinds": 0, "streak": 0, "meters": [], "logged": {}}


def made(arch: str, device: torch.device) -> checkpoint.State:
    """A network with the momentum of its optimizer."""
    model = Classifier(arch, 1000).to(device).to(memory_format=torch.channels_last)
    return checkpoint.State(model, optim.sgd(model, OptimConfig()), torch.amp.GradScaler(device.type, enabled=False))


def seconds(arch: str, device: torch.device, home: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds of each contender, a value a round; the first round, which finds the memory, is not counted."""
    state, snapshot = made(arch, device), checkpoint.Snapshot()
    found: dict[str, list[float]] = {}

    def timed(name: str, began: float) -> None:
        found.setdefault(name, []).append(time.perf_counter() - began)

    for step in range(rounds + 1):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        snapshot.take(state)
        if device.type == "cuda":  # what the device is held up; the host goes on at once
            torch.cuda.synchronize()
        timed("held", began)
        writing = time.perf_counter()
        checkpoint.save(home / "run", step, snapshot, improved=False, keep=1, meta=META)
        timed("written by the thread", writing)
        timed("without a thread", began)
        began = time.perf_counter()
        momenta = {name: state.optimizer.state[each] for name, each in state.model.named_parameters()}
        torch.save({"model": state.model.state_dict(), "optimizer": momenta}, home / "torch.pth")
        timed("torch.save", began)
    return {name: each[1:] for name, each in found.items()}


@click.command()
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=7, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Disk to write to. Default: the temporary folder's.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the figures.")
def main(device: str, rounds: int, out: Path | None, json_path: Path | None) -> None:
    """Measure, and print a line a network."""
    place = torch.device(device)
    rows = []
    for arch in ARCHS:
        home = Path(tempfile.mkdtemp(dir=out))
        try:
            found = seconds(arch, place, home, rounds)
            size = sum(each.stat().st_size for each in (home / "run" / "last").iterdir())
        finally:
            shutil.rmtree(home)
        rows.append({"arch": arch, "bytes": size, "seconds": found})
        told = ", ".join(f"{name} {statistics.median(each):.3f} s" for name, each in found.items())
        click.echo(f"{arch}, {size / 1e6:.0f} MB: {told}")
    if json_path:
        json_path.write_text(json.dumps(common.about(place) | {"rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
