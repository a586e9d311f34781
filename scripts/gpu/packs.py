"""The input pipeline with packs: photographs, raw pixels and JPEGs at 288 pixels, in one benchmark.

python3 scripts/gpu/packs.py --data DIR --out OUT --json FILE [ARGUMENT of `fasttrain bench pipeline`...]
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout need not be installed
from checkout import environment


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--json", required=True, type=Path)
    args, benchmark = parser.parse_known_args()
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)
    fasttrain = [sys.executable, "-m", "fasttrain"]
    packs = {kind: args.out / f"{kind}288.safetensors" for kind in ("raw", "jpeg")}
    for kind, path in packs.items():
        options = ["--pixels", kind, "--shorter-side", "288", "--split", "train"]
        subprocess.run(
            [*fasttrain, "data", "pack", args.data, "--out", str(path), *options], env=environment(), check=True
        )
    words = [word for path in packs.values() for word in ("--pack", str(path))]
    command = [*fasttrain, "bench", "pipeline", "--data", args.data, *words, "--json", str(args.json), *benchmark]
    return subprocess.run(command, env=environment()).returncode


if __name__ == "__main__":
    sys.exit(main())
