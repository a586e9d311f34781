"""Tries every decoder on a GPU: `fasttrain doctor --gpu`. A decoder may crash its process, so each one has its own:
`python -m fasttrain.doctor.decoders SETTINGS.json RESULT.json`.

All decoders decode the same crops of the same files in the training pipeline, without AutoAugment. Each trial measures
the images per second, how much the pixels differ from those of the `cpu` decoder on the same GPU, and whether three
passes over 20 batches give the same pixels; in two of the passes, matrix products keep the GPU busy.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fasttrain import recipes
from fasttrain.config.schema import AugmentConfig, DataConfig
from fasttrain.data.index import Index
from fasttrain.data.open_data import open_data
from fasttrain.data.scan import scan_unlabeled
from fasttrain.pipelines import decoders
from fasttrain.pipelines.decoders import Decoder
from fasttrain.pipelines.plan import Plan
from fasttrain.utils import versions
from fasttrain.utils.text import printable

BATCH, SIZE = 64, 224
HASHED_BATCHES, WARM_UP, TIMED_BATCHES = 20, 6, 60
LIMIT_S = 90  # after which a decoder's process is killed
# The largest mean differences from the `cpu` decoder, of 255, with which a decoder is good: over all files, and of any
# single file. On an H200 they were 0.02 and 0.04.
CLOSE, CLOSE_FILE = 1.0, 3.0
_SET = "--set machine.decoder="


@dataclass(frozen=True)
class Trial:
    """The result for one decoder. status: the exit status of its process; negative: the signal that ended it. same:
    whether all passes gave the same pixels. mean, most: the mean and the largest difference of its pixels from those of
    the `cpu` decoder, of 255. worst: the file with the largest mean. reason: why the trial failed, or empty."""

    kind: str
    status: int
    images_per_s: float = 0.0
    same: bool = False
    mean: float = 0.0
    most: int = 0
    worst: str = ""
    worst_mean: float = 0.0
    reason: str = ""

    @property
    def good(self) -> bool:
        return self.status == 0 and self.same and self.mean <= CLOSE and self.worst_mean <= CLOSE_FILE


def run(data: str | None, limit_s: float = LIMIT_S) -> Iterator[Trial]:
    """Try the decoders one after another, on the class folders in `data` or else on synthetic images, and on synthetic
    files of rare kinds."""
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder, "drawn"), photos=0 if data else 160)
        for kind in ("cpu", "gpu", "gpu-hardware", "gpu-region"):
            settings = {"kind": kind, "data": data, "drawn": f"{folder}/drawn", "device": "cuda"}
            yield _run_process(settings, Path(folder), limit_s)


def _run_process(settings: dict[str, Any], folder: Path, limit_s: float) -> Trial:
    """Run `main` in its own process."""
    kind = settings["kind"]
    settings_path, result_path = folder / "settings.json", folder / f"{kind}.json"
    settings_path.write_text(json.dumps(settings), encoding="utf-8")
    command = [sys.executable, "-m", "fasttrain.doctor.decoders", str(settings_path), str(result_path)]
    try:
        process = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=limit_s)
    except subprocess.TimeoutExpired:
        return Trial(kind, 124, reason=f"not finished after {limit_s:.0f} s")
    if process.returncode == 0 and result_path.exists():
        return Trial(kind, 0, **json.loads(result_path.read_text(encoding="utf-8")))
    lines = [line.strip() for line in process.stderr.splitlines() if line.strip()]
    return Trial(kind, process.returncode, reason=lines[-1][:200] if lines else "no error message")


def write_images(folder: Path, photos: int, seed: int = 0) -> None:
    """Write class folders of synthetic images: `photos` photo-like JPEGs (500 x 375), and in the class `rare` one file
    of each rare kind: gray, CMYK, progressive, not subsampled and EXIF-rotated JPEGs, a 16-bit PNG and a WebP."""
    rng = np.random.default_rng(seed)
    for number in range(photos):
        class_folder = folder / f"photos{number % 2}"
        class_folder.mkdir(parents=True, exist_ok=True)
        _picture(rng).save(class_folder / f"{number:03}.jpg", quality=90)
    rare = folder / "rare"
    rare.mkdir(parents=True)
    picture = _picture(rng)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    picture.convert("L").save(rare / "grey.jpg", quality=90)
    picture.convert("CMYK").save(rare / "cmyk.jpg", quality=90)
    picture.save(rare / "progressive.jpg", quality=90, progressive=True)
    picture.save(rare / "not-subsampled.jpg", quality=90, subsampling=0)
    picture.save(rare / "exif-rotated.jpg", quality=90, exif=exif)
    picture.save(rare / "picture.webp", quality=90)
    deep = np.asarray(picture.convert("L")).astype(np.uint16) * 257
    Image.fromarray(deep).save(rare / "16-bit.png")


def _picture(rng: np.random.Generator) -> Image.Image:
    """Shapes of all sizes in many colors: random pixels at several scales, upsampled smoothly and added."""
    total = np.zeros((375, 500, 3))
    for cells, weight in ((4, 1.0), (16, 0.5), (64, 0.25), (250, 0.12)):
        coarse = Image.fromarray(rng.integers(0, 256, (cells * 3 // 4, cells, 3)).astype(np.uint8))
        total += weight * np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC), np.float64)
    return Image.fromarray(np.clip(total / 1.87, 0, 255).astype(np.uint8))


# ------------------------------------------------------------------------------- in each decoder's process


def load_images(data: str | None, drawn: str) -> tuple[Index, Index]:
    """Two indices: the images to time, and the files of rare kinds. drawn: the folder of `write_images`."""
    drawn_index = scan_unlabeled(drawn, progress=False)
    is_rare = np.array([id_.startswith("rare/") for id_ in drawn_index.ids])
    photos = open_data(DataConfig(train=(data,)))[0] if data else _subset(drawn_index, np.flatnonzero(~is_rare))
    return photos, _subset(drawn_index, np.flatnonzero(is_rare))


def _subset(index: Index, numbers: np.ndarray[Any, Any]) -> Index:
    """Some images, all of one class."""
    return replace(index.take(numbers), labels=np.zeros(len(numbers), np.int64), classes=("all",))


def stream(index: Index, decoder: Decoder, device: torch.device, batch: int, threads: int) -> Iterator[Any]:
    """Batches of the training pipeline without AutoAugment, epoch after epoch."""
    from fasttrain.pipelines.train_loader import batches

    recipe = recipes.for_arch("resnet18")
    recipe = replace(recipe, batch_size=batch, image_size=SIZE, epochs=10**6, augment=AugmentConfig(autoaugment="none"))
    return batches(Plan.of(recipe, index), index, device, threads, decoder=decoder)


def measure(kind: str, photos: Index, rare: Index, device: torch.device, threads: int) -> dict[str, Any]:
    """The fields of `Trial` for a decoder that works."""
    decoder = Decoder(kind, hardware_load=0.65)
    batch = min(BATCH, len(photos))
    hashes = []
    for busy in (False, True, True):
        photo_batches = stream(photos, decoder, device, batch, threads)
        rare_batch = next(stream(rare, decoder, device, len(rare), threads))
        hashes.append([_hash(rare_batch.pixels, busy)])
        hashes[-1] += [_hash(next(photo_batches).pixels, busy) for _ in range(HASHED_BATCHES)]
    for _ in range(WARM_UP):  # uses up the batches that were prefetched
        next(photo_batches)
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(TIMED_BATCHES):
        next(photo_batches)
    _synchronize(device)
    rate = TIMED_BATCHES * batch / (time.perf_counter() - start)
    del photo_batches
    means, most = {}, 0
    for index in (photos, rare):
        count = min(batch, len(index))
        ours, reference = (stream(index, d, device, count, threads) for d in (decoder, Decoder("cpu")))
        for _ in range(max(1, min(4, len(index) // count))):
            actual, expected = next(ours), next(reference)
            difference = (actual.pixels.cpu().int() - expected.pixels.cpu().int()).abs()
            most = max(most, int(difference.max()))
            per_image = difference.float().mean((1, 2, 3)).tolist()
            for number, mean in zip(actual.indices.tolist(), per_image, strict=True):
                means[index.ids[number]] = mean
    worst = max(means, key=lambda name: means[name])
    return {
        "images_per_s": rate,
        "same": hashes[0] == hashes[1] == hashes[2],
        "mean": float(np.mean(list(means.values()))),
        "most": most,
        "worst": worst,
        "worst_mean": means[worst],
    }


def _hash(pixels: torch.Tensor, busy: bool) -> str:
    if busy and pixels.is_cuda:
        matrix = torch.randn(4096, 4096, device=pixels.device, dtype=torch.bfloat16)
        for _ in range(20):  # takes some milliseconds, in which the pipeline prepares the next batches
            matrix = matrix @ matrix * 1e-3
    return sha256(pixels.cpu().numpy().tobytes()).hexdigest()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(settings_path: str, result_path: str) -> None:
    """Measure the decoder that a JSON file of settings names, and write the result to a JSON file."""
    from fasttrain.distributed.ranks import ranks

    settings = json.loads(Path(settings_path).read_text(encoding="utf-8"))
    photos, rare = load_images(settings["data"], settings["drawn"])
    with ranks(settings["device"]) as rank:
        result = measure(settings["kind"], photos, rare, rank.device, rank.threads(0))
    Path(result_path).write_text(json.dumps(result), encoding="utf-8")


# ------------------------------------------------------------------------------------------------ the report


def line(trial: Trial) -> str:
    """The line of the report on one decoder."""
    name = f"{trial.kind:13}"
    if trial.status:
        outcome = f"ended by signal {-trial.status}" if trial.status < 0 else f"exit status {trial.status}"
        return f"{name}{outcome}: {printable(trial.reason)}"
    same = "the same pixels each time" if trial.same else "PIXELS DIFFER BETWEEN PASSES"
    worst = f"worst {printable(trial.worst)} {trial.worst_mean:.2f}"
    return (
        f"{name}{trial.images_per_s:6.0f} img/s, {same}, differs from the cpu decoder by {trial.mean:.2f} of 255 on "
        f"average, {trial.most} at most; {worst}"
    )


def advice(trials: list[Trial]) -> str:
    """The setting for the fastest decoder that is good and not known to be unsafe. Where `auto` stands for it, the line
    says that no setting is needed."""
    rule = decoders.rule()
    unsafe = {*rule.refused, "gpu-hardware"}
    good = [trial for trial in trials if trial.good and trial.kind not in unsafe]
    if not good:
        return "no safe decoder works here; see the reasons above"
    best = max(good, key=lambda trial: trial.images_per_s)
    if best.kind == rule.auto:
        return f"machine.decoder=auto is {best.kind} here, the fastest safe decoder: nothing to set"
    if rule.auto not in [trial.kind for trial in good]:
        return f"machine.decoder=auto is {rule.auto}, which does not work here: {_SET}{best.kind}"
    return f"machine.decoder=auto is {rule.auto} here; faster and safe: {_SET}{best.kind}"


def report(data: str | None) -> Iterator[tuple[str, list[Trial]]]:
    """Lines for the user, each with the trials so far; the last line is `advice`. Raises UserError where `data` has no
    images."""
    if data:
        open_data(DataConfig(train=(data,)))  # an error in the data must not look like an error of a decoder
    installed = versions.all_installed()
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    if not name:
        yield "no GPU that torch can use: images are decoded on the CPU, and there is no other decoder to try", []
        return
    yield f"{name}, DALI {installed.get('nvidia-dali')}, nvImageCodec {installed.get('nvidia-nvimgcodec')}", []
    trials: list[Trial] = []
    for trial in run(data):
        trials.append(trial)
        yield line(trial), trials
    yield advice(trials), trials


if __name__ == "__main__":
    main(*sys.argv[1:])
