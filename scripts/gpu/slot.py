"""All measurements that need a GPU, in slots of at most eight minutes, the most important first.

    python3 scripts/gpu/slot.py A --data DIR --out OUT       (a checkout need not be installed)
    python3 scripts/gpu/slot.py B G --data DIR --out OUT --parts main-job-pack kernels

DIR contains photographs in class folders; for slot C it contains train/ and val/. Each part runs in a separate process
with a time limit and writes OUT/parts/NAME.json; its expected time is printed before it starts. A part whose file
exists is not run again. Parts that need DALI are left out if DALI is not installed. After each part, OUT/gpu.json has
all figures, OUT/gpu.md their tables, and OUT/logs.tar.gz the output of the parts.

Inductor's cache is in OUT/parts and, at the end, also in OUT/inductor.tar.xz. Pass that file to --cache to start with
it on another machine.
"""

import argparse
import contextlib
import importlib.util
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import report
from checkout import ROOT, environment

MAX_CACHE_BYTES = 16 << 20  # of the packed cache; a larger one is not kept


@dataclass(frozen=True)
class Part:
    """A measurement. expected: its seconds on one H100 or H200. limit: seconds after which it is stopped. command: the
    shell words after `python3`; {data}, {classes}, {out}, {json} and {arch} are replaced by the images, their number of
    classes, a folder for the part, the file to write and the network. toy: words to append on a CPU, where {arch} is a
    tiny network."""

    name: str
    expected: int
    limit: int
    command: str
    toy: str = ""
    arch: str = "tresnet_xl"
    needs_dali: bool = True


_TOY_STEP = "--device cpu --image-size 32 --batch-size 8 --rounds 1 --steps 2"
_TOY_RUN = f"{_TOY_STEP} --warm-up 1"
_TOY_LOADERS = "--device cpu --batch-size 8 --image-size 32 --rounds 1 --steps 2"
_STEP = "-m fasttrain bench step --json {json} --arch {arch} --classes {classes} --rounds 3 --steps 10"
_RUN = "-m fasttrain bench train --data {data} --json {json} --arch {arch} --rounds 2 --steps 60 --warm-up 20"
_LOADERS = (
    "-m fasttrain bench pipeline --data {data} --json {json} --autoaugment imagenet --batch-size 256"
    " --images-per-class 0 --rounds 3 --steps 20"
)
_TESTS = "scripts/gpu/run_tests.py --json {json}"
_KERNELS = (
    "-m fasttrain bench kernels --json {json} --rounds 9"
    " --only 'mix 256*' --only 'triplet 256 x 2656*' --only 'triplet 1024*'"
)
_PACKS = (
    "scripts/gpu/packs.py --data {data} --out {out} --json {json} --batch-size 256 --images-per-class 0 --rounds 3"
    " --steps 20 --only 'fasttrain*'"
)
_MAIN_JOB = "scripts/gpu/main_job.py --data {data} --out {out} --json {json}"
_PROOF = "scripts/gpu/proof.py --data {data} --out {out} --json {json}"


def _step(name: str, expected: int, limit: int, words: str, **fields: str) -> Part:
    toy = " ".join(filter(None, [_TOY_STEP, fields.pop("toy", "")]))
    return Part(f"step-{name}", expected, limit, f"{_STEP} {words}", toy, needs_dali=False, **fields)


# Compiling TResNet-XL takes 100 to 110 s on 16 cores (measured), and each compiled peer takes as long. That is why the
# peers of the networks have separate slots.
SLOTS = {
    "A": [
        Part("decoders", 85, 200, "-m fasttrain doctor --gpu --data {data} --json {json}"),
        Part("main-job", 155, 240, _MAIN_JOB, "--toy"),
        _step(
            "tresnet_xl",
            240,
            300,
            "--also machine.align=off --only fasttrain --only '*align*' --only 'timm*eager'",
        ),
    ],
    "B": [
        Part("tests-kernels", 60, 120, f"{_TESTS} kernels/test_triton.py", "--toy", needs_dali=False),
        Part("pipeline-256", 40, 90, f"{_LOADERS} --only fasttrain --only timm", _TOY_LOADERS),
        Part("pipeline-256-cpu-decoder", 20, 60, f"{_LOADERS} --only fasttrain --decoder cpu", _TOY_LOADERS),
        Part("train-tresnet_xl", 250, 320, f"{_RUN} --only fasttrain --only '[CD]:*'", _TOY_RUN),
        Part("kernels", 40, 90, _KERNELS, "--device cpu --rounds 1", needs_dali=False),
    ],
    "C": [Part("proof", 460, 560, _PROOF, "--toy")],
    "D": [
        _step("tresnet_xl-compiled", 340, 420, "--only fasttrain --only '*compiled'", toy="--compile"),
        Part("train-tresnet_xl-timm", 80, 150, f"{_RUN} --only 'timm, channels_last'", _TOY_RUN),
    ],
    "E": [
        Part("parity", 20, 60, "scripts/parity.py --data {data} --json {json}", "--device cpu --images 16"),
        _step("seresnext101_32x4d", 340, 420, "--only fasttrain --only 'timm*'", arch="seresnext101_32x4d"),
        _step(
            "graphs-32",
            100,
            200,
            "--batch-size 32 --set machine.compile=graphs --only fasttrain --only 'fasttrain, compiled'",
            arch="seresnext101_32x4d",
        ),
    ],
    "F": [
        _step("resnest101e", 400, 480, "--only fasttrain --only 'timm*'", arch="resnest101e"),
        _step(
            "graphs-128",
            60,
            200,
            "--batch-size 128 --set machine.compile=graphs --only fasttrain --only 'fasttrain, compiled'",
            arch="resnest101e",
        ),
    ],
    "G": [
        Part("pipeline-256-packs", 130, 200, f"{_PACKS} --only timm --autoaugment imagenet", _TOY_LOADERS),
        Part("main-job-pack", 200, 280, f"{_MAIN_JOB} --pack", "--toy"),
    ],
    "H": [
        Part("tests-training", 150, 300, f"{_TESTS} test_gpu.py models/test_aligned.py", "--toy"),
        Part("pipeline-256-stock", 30, 60, f"{_LOADERS} --only 'DALI*'", _TOY_LOADERS),
        Part("pipeline-256-packs-none", 100, 150, f"{_PACKS} --autoaugment none", _TOY_LOADERS),
    ],
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slots", nargs="+", choices=SLOTS)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--parts", nargs="+", metavar="NAME", help="run only these, in this order")
    parser.add_argument("--total", type=int, default=480, help="time limit of all parts, in seconds (default: 480)")
    parser.add_argument("--work", type=Path, help="folder for the files of the parts (default: OUT/parts)")
    parser.add_argument("--cache", type=Path, help="Inductor's cache from an earlier run, a .tar.xz file")
    parser.add_argument("--toy", action="store_true", help="test every part on a CPU; the figures mean nothing")
    args = parser.parse_args()
    parts = {part.name: part for slot in args.slots for part in SLOTS[slot]}
    named = " ".join(args.slots)
    unknown = [name for name in args.parts or () if name not in parts]
    if unknown:
        parser.error(f"slot {named} has no part {unknown[0]}; its parts are {', '.join(parts)}")
    if not args.data.is_dir():
        parser.error(f"--data {args.data}: the folder does not exist")
    work = args.work or args.out / "parts"
    for folder in (args.out, work):
        folder.mkdir(parents=True, exist_ok=True)
    cache = work / "inductor"
    if args.cache and not cache.exists():
        with tarfile.open(args.cache) as packed:
            packed.extractall(work, filter="data")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the part is stopped and the results are gathered
    deadline = time.monotonic() + args.total
    missing = []
    try:
        for part in [parts[name] for name in args.parts or parts]:
            left = deadline - time.monotonic()
            if (work / f"{part.name}.json").exists():
                print(f"== {part.name}: already done", flush=True)
                continue
            if part.needs_dali and not has_dali():
                print(f"== {part.name}: left out because it needs DALI", flush=True)
            elif left < 5:
                print(f"== {part.name}: not started, because the {args.total} s are over", flush=True)
            elif run(part, args.data.resolve(), work.resolve(), min(left, 1000 if args.toy else part.limit), args.toy):
                report.gather(work, args.out)
                continue
            else:
                report.gather(work, args.out)  # its partial results
            missing.append(part.name)
    finally:
        report.gather(work, args.out)
    pack(cache, args.out / "inductor.tar.xz")
    if missing:
        print(f"slot {named}: not done: {' '.join(missing)}; see OUT/logs.tar.gz", flush=True)
    return bool(missing)


def has_dali() -> bool:
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:
        return False


def count_classes(data: Path) -> int:
    """The number of class folders. Steps with this number of classes share compiled code with the main job."""
    train = data / "train"
    return sum(path.is_dir() for path in (train if train.is_dir() else data).iterdir())


def run(part: Part, data: Path, work: Path, limit: float, toy: bool) -> bool:
    """Run a part. Returns whether it succeeded and wrote its file. All its processes are killed at the end."""
    unfinished = work / f"{part.name}.unfinished.json"
    fields = {
        "data": data,
        "out": work / part.name,
        "json": unfinished,
        "arch": "test_resnet" if toy else part.arch,
        "classes": count_classes(data),
    }
    template = f"{part.command} {part.toy}" if toy else part.command
    words = [word.format(**fields) for word in shlex.split(template)]
    expected = "a toy" if toy else f"about {part.expected} s"
    print(f"== {part.name}: {expected}, at most {limit:.0f} s", flush=True)
    variables = environment(PYTHONUNBUFFERED="1", TORCHINDUCTOR_CACHE_DIR=str(work / "inductor"))
    start = time.monotonic()
    with (work / f"{part.name}.log").open("ab") as log:
        print(shlex.join(words), file=sys.stderr, flush=True)
        process = subprocess.Popen(
            [sys.executable, *words], stdout=log, stderr=log, cwd=ROOT, env=variables, start_new_session=True
        )
        try:
            status: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            kill_group(process)
    reason = "its time was over" if status is None else f"exit status {status}"
    print(f"== {part.name}: {time.monotonic() - start:.0f} s, {reason}", flush=True)
    if status == 0 and unfinished.exists():
        unfinished.rename(work / f"{part.name}.json")
        return True
    lines = (work / f"{part.name}.log").read_text(errors="replace").splitlines()
    print("\n".join(f"   {line[:300]}" for line in lines[-12:]), flush=True)
    return False


def kill_group(process: "subprocess.Popen[bytes]") -> None:
    """Kill a process and all processes that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def pack(cache: Path, packed: Path) -> None:
    """Pack Inductor's cache into one file, unless the file is too large."""
    if not cache.is_dir():
        return
    with tarfile.open(packed, "w:xz", preset=6) as archive:
        archive.add(cache, "inductor")
    if packed.stat().st_size > MAX_CACHE_BYTES:
        print(f"Inductor's cache has {packed.stat().st_size >> 20} MiB and is not kept", flush=True)
        packed.unlink()


if __name__ == "__main__":
    sys.exit(main())
