"""Run the tests that need a GPU, each file in separate processes, so that a crash does not affect other files.

    python3 scripts/gpu/run_tests.py --json FILE test_gpu.py kernels/test_triton.py

FILE has a row per test file: how many tests passed, and the names of those that failed. It is written again and again
while tests run, so it also tells what was done before a time limit. The output has the reasons. The exit status is 0
even if tests fail, and 1 if pytest itself fails or finds no tests.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout need not be installed
from checkout import ROOT

from fasttrain.benchmarks.common import write_figures
from fasttrain.distributed.ranks import ranks

WORKERS = 6  # processes that share the GPU
OUTCOMES = {"PASSED": "passed", "FAILED": "failed", "ERROR": "failed", "SKIPPED": "skipped"}
OUTCOME = re.compile(r"\[gw\d+\] \[ *\d+%\] (\w+) \S+::(.+)")  # a line of pytest -v with xdist
SECONDS_BETWEEN_WRITES = 2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--json", required=True, type=Path)
    parser.add_argument("--toy", action="store_true", help="on a CPU, where all these tests are skipped")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    broken = False

    def write() -> None:
        with ranks("auto") as this_rank:
            write_figures(args.json, this_rank.device, rows, {"files": args.files})

    for name in args.files:
        row: dict[str, Any] = {
            "file": name,
            "passed": 0,
            "failed": 0,
            "skipped": 0,
            "seconds": 0.0,
            "exit_status": None,
        }
        rows.append(row | {"failures": []})
        run(rows[-1], write)
        write()
        print(rows[-1], flush=True)
        count = rows[-1]["passed"] + rows[-1]["failed"] + (rows[-1]["skipped"] if args.toy else 0)
        broken |= rows[-1]["exit_status"] not in (0, 1) or not count
    return int(broken)


def run(row: dict[str, Any], write: Any) -> None:
    """Run a test file, pass its output on, and count in its row. A worker that crashes is replaced, and its test counts
    as failed."""
    command = [sys.executable, "-m", "pytest", "-v", "-m", "gpu", "--timeout=120", "--durations=8"]
    command += [
        "-n",
        str(min(WORKERS, os.cpu_count() or 1)),
        "-p",
        "no:cacheprovider",
        str(ROOT / "tests" / row["file"]),
    ]
    start = written = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        outcome = OUTCOME.match(line)
        if outcome and outcome[1] in OUTCOMES:
            row[OUTCOMES[outcome[1]]] += 1
            row["failures"] += [outcome[2].strip()] if OUTCOMES[outcome[1]] == "failed" else []
            row["seconds"] = round(time.perf_counter() - start, 1)
            if time.perf_counter() - written > SECONDS_BETWEEN_WRITES:
                write()
                written = time.perf_counter()
    row |= {"exit_status": process.wait(), "seconds": round(time.perf_counter() - start, 1)}


if __name__ == "__main__":
    sys.exit(main())
