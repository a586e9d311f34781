"""How long a checkpoint blocks training: python scripts/bench_save.py [--out DIR] [--json FILE]

Saves the weights, buffers and momentum of each of the report's networks. A run waits only for a copy in memory; a
thread then writes, hashes, syncs and renames the files. The same work without the thread and torch.save of the same
tensors are measured in turn.
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


def training_state(arch: str, device: torch.device) -> checkpoint.State:
    """A network and its optimizer."""
    model = Classifier(arch, 1000).to(device).to(memory_format=torch.channels_last)
    return checkpoint.State(model, optim.sgd(model, OptimConfig()), torch.amp.GradScaler(device.type, enabled=False))


def seconds(arch: str, device: torch.device, home: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds per round of each contender. The first round, which allocates memory, is not counted."""
    state, snapshot = training_state(arch, device), checkpoint.Snapshot()
    times: dict[str, list[float]] = {}

    def record(name: str, start: float) -> None:
        times.setdefault(name, []).append(time.perf_counter() - start)

    for step in range(rounds + 1):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        snapshot.take(state)
        if device.type == "cuda":  # measures how long the device is blocked; the host continues at once
            torch.cuda.synchronize()
        record("held", start)
        write_start = time.perf_counter()
        checkpoint.save(home / "run", step, snapshot, improved=False, keep=1, meta=META)
        record("written by the thread", write_start)
        record("without a thread", start)
        start = time.perf_counter()
        momenta = {name: state.optimizer.state[parameter] for name, parameter in state.model.named_parameters()}
        torch.save({"model": state.model.state_dict(), "optimizer": momenta}, home / "torch.pth")
        record("torch.save", start)
    return {name: values[1:] for name, values in times.items()}


@click.command()
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=7, show_default=True)
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder to write to. Default: the system's temporary folder."
)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the figures.")
def main(device: str, rounds: int, out: Path | None, json_path: Path | None) -> None:
    """Measure, and print one line per network."""
    torch_device = torch.device(device)
    rows = []
    for arch in ARCHS:
        home = Path(tempfile.mkdtemp(dir=out))
        try:
            times = seconds(arch, torch_device, home, rounds)
            size = sum(path.stat().st_size for path in (home / "run" / "last").iterdir())
        finally:
            shutil.rmtree(home)
        rows.append({"arch": arch, "bytes": size, "seconds": times})
        medians = ", ".join(f"{name} {statistics.median(values):.3f} s" for name, values in times.items())
        click.echo(f"{arch}, {size / 1e6:.0f} MB: {medians}")
    if json_path:
        content = common.environment_info(torch_device) | {"rows": rows}
        json_path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
