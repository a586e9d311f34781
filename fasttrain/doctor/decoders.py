"""Tries every decoder on a GPU: `fasttrain doctor --gpu`. A decoder may crash the process, so each has one of its own:
`python -m fasttrain.doctor.machine.decoders SETTINGS.json RESULT.json`.

Each decodes the same crops of the same files through the training pipeline, without AutoAugment. What is measured: how
many images per second; how far its pixels are from those of the host's decoder, on the same GPU; and whether 20
batches have the same pixels three times, twice while matrix products keep the GPU busy.
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
from fasttrain.data.index import Index, open_data, scan_unlabelled
from fasttrain.pipelines import decoders
from fasttrain.pipelines.decoders import Decoder
from fasttrain.pipelines.plan import Plan
from fasttrain.utils import versions
from fasttrain.utils.text import printable

BATCH, SIZE = 64, 224
HASHED_BATCHES, WARM_UP, TIMED_BATCHES = 20, 6, 60
LIMIT_S = 90  # a decoder's process is ended after so many seconds
# Of 255: mean differences to the host's decoder up to which pixels count as the same picture, over all files and for
# each of them. On an H200 they were 0.02 and 0.04.
CLOSE, CLOSE_FILE = 1.0, 3.0
_SET = "--set machine.decoder="


@dataclass(frozen=True)
class Trial:
    """What became of one decoder. status: its process's exit status; negative: the signal that ended it. same: whether
    all passes had the same pixels. mean, most: the difference of its pixels to the host's decoder's, of 255; worst:
    the file with the largest mean. reason: why there is no more, or nothing."""

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
    """Try the decoders one after another, over the class folders in `data`, or drawn files, and a few drawn ones of
    rare kinds."""
    with tempfile.TemporaryDirectory() as folder:
        draw(Path(folder, "drawn"), photos=0 if data else 160)
        for kind in ("cpu", "gpu", "gpu-hardware", "gpu-region"):
            settings = {"kind": kind, "data": data, "drawn": f"{folder}/drawn", "device": "cuda"}
            yield _apart(settings, Path(folder), limit_s)


def _apart(settings: dict[str, Any], folder: Path, limit_s: float) -> Trial:
    """A trial in a process of its own."""
    kind = settings["kind"]
    asked, told = folder / "settings.json", folder / f"{kind}.json"
    asked.write_text(json.dumps(settings), encoding="utf-8")
    command = [sys.executable, "-m", "fasttrain.doctor.decoders", str(asked), str(told)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=limit_s)
    except subprocess.TimeoutExpired:
        return Trial(kind, 124, reason=f"not done after {limit_s:.0f} s")
    if done.returncode == 0 and told.exists():
        return Trial(kind, 0, **json.loads(told.read_text(encoding="utf-8")))
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return Trial(kind, done.returncode, reason=lines[-1][:200] if lines else "it says nothing")


def draw(folder: Path, photos: int, seed: int = 0) -> None:
    """Write class folders: `photos` JPEGs like photographs (500 x 375), and in the class `rare` one file each that is
    grey, CMYK, progressive, not subsampled, rotated by EXIF, a PNG of 16 bits and a WebP."""
    rng = np.random.default_rng(seed)
    for number in range(photos):
        inside = folder / f"photos{number % 2}"
        inside.mkdir(parents=True, exist_ok=True)
        _picture(rng).save(inside / f"{number:03}.jpg", quality=90)
    rare = folder / "rare"
    rare.mkdir(parents=True)
    picture = _picture(rng)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    picture.convert("L").save(rare / "grey.jpg", quality=90)
    picture.convert("CMYK").save(rare / "cmyk.jpg", quality=90)
    picture.save(rare / "progressive.jpg", quality=90, progressive=True)
    picture.save(rare / "not-subsampled.jpg", quality=90, subsampling=0)
    picture.save(rare / "exif-rotated.jpg", quality=90, exif=exif)
    picture.save(rare / "picture.webp", quality=90)
    deep = np.asarray(picture.convert("L")).astype(np.uint16) * 257
    Image.fromarray(deep).save(rare / "16-bit.png")


def _picture(rng: np.random.Generator) -> Image.Image:
    """Shapes of all sizes in many colours: random pixels at several scales, enlarged smoothly and added."""
    total = np.zeros((375, 500, 3))
    for cells, weight in ((4, 1.0), (16, 0.5), (64, 0.25), (250, 0.12)):
        coarse = Image.fromarray(rng.integers(0, 256, (cells * 3 // 4, cells, 3)).astype(np.uint8))
        total += weight * np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC), np.float64)
    return Image.fromarray(np.clip(total / 1.87, 0, 255).astype(np.uint8))


# ------------------------------------------------------------------------------- in a process for each decoder


def files(data: str | None, drawn: str) -> tuple[Index, Index]:
    """The images to time, and the rare kinds, of one index each."""
    drawn_index = scan_unlabelled(drawn, progress=False)
    is_rare = np.array([each.startswith("rare/") for each in drawn_index.ids])
    photos = open_data(DataConfig(train=(data,)))[0] if data else _some(drawn_index, np.flatnonzero(~is_rare))
    return photos, _some(drawn_index, np.flatnonzero(is_rare))


def _some(index: Index, numbers: np.ndarray[Any, Any]) -> Index:
    return replace(
        index,
        paths=tuple(index.paths[each] for each in numbers),
        ids=tuple(index.ids[each] for each in numbers),
        labels=np.zeros(len(numbers), np.int64),
        sizes=index.sizes[numbers],
        classes=("all",),
    )


def stream(index: Index, decoder: Decoder, device: torch.device, batch: int, threads: int) -> Iterator[Any]:
    """Batches of the training pipeline without AutoAugment, epoch after epoch."""
    from fasttrain.pipelines.train_loader import batches

    recipe = recipes.for_arch("resnet18")
    recipe = replace(recipe, batch_size=batch, image_size=SIZE, epochs=10**6, augment=AugmentConfig(autoaugment="none"))
    return batches(Plan.of(recipe, index), index, device, threads, decoder=decoder)


def trial(kind: str, photos: Index, rare: Index, device: torch.device, threads: int) -> dict[str, Any]:
    """What `Trial` has of a decoder that works."""
    decoder = Decoder(kind, hardware_load=0.65)
    batch = min(BATCH, len(photos))
    hashes = []
    for busy in (False, True, True):
        seen = stream(photos, decoder, device, batch, threads)
        few = next(stream(rare, decoder, device, len(rare), threads))
        hashes.append([_hash(few.pixels, busy), *(_hash(next(seen).pixels, busy) for _ in range(HASHED_BATCHES))])
    for _ in range(WARM_UP):  # so that none of the timed ones was ready before
        next(seen)
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(TIMED_BATCHES):
        next(seen)
    _synchronize(device)
    rate = TIMED_BATCHES * batch / (time.perf_counter() - start)
    del seen
    means, most = {}, 0
    for index in (photos, rare):
        count = min(batch, len(index))
        ours, hosts = (stream(index, each, device, count, threads) for each in (decoder, Decoder("cpu")))
        for _ in range(max(1, min(4, len(index) // count))):
            one, other = next(ours), next(hosts)
            difference = (one.pixels.cpu().int() - other.pixels.cpu().int()).abs()
            most = max(most, int(difference.max()))
            for number, each in zip(one.numbers.tolist(), difference.float().mean((1, 2, 3)).tolist(), strict=True):
                means[index.ids[number]] = each
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
        for _ in range(20):  # some milliseconds, in which the pipeline works on the batches after this one
            matrix = matrix @ matrix * 1e-3
    return sha256(pixels.cpu().numpy().tobytes()).hexdigest()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(settings_path: str, result_path: str) -> None:
    from fasttrain.distributed.ranks import ranks

    settings = json.loads(Path(settings_path).read_text(encoding="utf-8"))
    photos, rare = files(settings["data"], settings["drawn"])
    with ranks(settings["device"]) as here:
        result = trial(settings["kind"], photos, rare, here.device, here.threads(0))
    Path(result_path).write_text(json.dumps(result), encoding="utf-8")


# ------------------------------------------------------------------------------------------------ the report


def line(trial: Trial) -> str:
    """A line of the report."""
    name = f"{trial.kind:13}"
    if trial.status:
        ended = f"ended by signal {-trial.status}" if trial.status < 0 else f"exit status {trial.status}"
        return f"{name}{ended}: {printable(trial.reason)}"
    same = "the same pixels each time" if trial.same else "PIXELS THAT DIFFER FROM PASS TO PASS"
    worst = f"worst {printable(trial.worst)} {trial.worst_mean:.2f}"
    return (
        f"{name}{trial.images_per_s:6.0f} img/s, {same}, differs from the host's decoder by {trial.mean:.2f} of 255 on "
        f"average, {trial.most} at most; {worst}"
    )


def advice(trials: list[Trial]) -> str:
    """The line to set: the fastest decoder that is good and not known to be unsafe; where that is what `auto` takes
    here anyway, that nothing has to be set."""
    rule = decoders.rule()
    unsafe = {*rule.refused, "gpu-hardware"}
    good = [each for each in trials if each.good and each.kind not in unsafe]
    if not good:
        return "no safe decoder works here; the lines above say what each of them reported"
    best = max(good, key=lambda each: each.images_per_s)
    if best.kind == rule.auto:
        return f"machine.decoder=auto is {best.kind} here, the fastest that is safe: nothing has to be set"
    if rule.auto not in [each.kind for each in good]:
        return f"machine.decoder=auto is {rule.auto}, which does not work here: {_SET}{best.kind}"
    return f"machine.decoder=auto is {rule.auto} here; faster and safe: {_SET}{best.kind}"


def report(data: str | None) -> Iterator[tuple[str, list[Trial]]]:
    """Lines for the user, each with the trials up to it; the last is `advice`. Raises UserError where there are no
    images in `data`."""
    if data:
        open_data(DataConfig(train=(data,)))  # before a decoder can be blamed for it
    known = versions.all_installed()
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    if not name:
        yield "no GPU that torch can use: the host decodes, and there is nothing to try", []
        return
    yield f"{name}, DALI {known.get('nvidia-dali')}, nvImageCodec {known.get('nvidia-nvimgcodec')}", []
    trials: list[Trial] = []
    for each in run(data):
        trials.append(each)
        yield line(each), trials
    yield advice(trials), trials


if __name__ == "__main__":
    main(*sys.argv[1:])
