"""Run the tests that need a GPU, each file in separate processes, so that a crash does not affect other files.

    python3 scripts/gpu/run_tests.py --json FILE test_gpu.py kernels/test_triton.py

FILE gets a row per test file as soon as it is done: the number of tests that passed, and each failure with its reason.
The exit status is 0 even if tests fail, and 1 if pytest itself fails or finds no tests.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout need not be installed
from checkout import ROOT

from fasttrain.benchmarks.common import write_figures
from fasttrain.distributed.ranks import ranks

WORKERS = 6  # processes that share the GPU


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--json", required=True, type=Path)
    parser.add_argument("--toy", action="store_true", help="on a CPU, where all these tests are skipped")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    broken = False
    for name in args.files:
        row = run(name)
        rows.append(row)
        print(row, flush=True)
        with ranks("auto") as this_rank:
            write_figures(args.json, this_rank.device, rows, {"files": args.files})
        count = row["passed"] + row["failed"] + (row["skipped"] if args.toy else 0)
        broken |= row["exit_status"] not in (0, 1) or not count
    return int(broken)


def run(name: str) -> dict[str, Any]:
    """Run a test file and return its row. If a worker crashes, it is replaced and its test counts as failed."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder, "results.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--timeout=120", f"--junitxml={results}"]
        command += ["-n", str(min(WORKERS, os.cpu_count() or 1)), "-p", "no:cacheprovider", str(ROOT / "tests" / name)]
        start = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace")
        seconds = time.perf_counter() - start
        print(done.stdout[-20000:], done.stderr[-4000:], flush=True)
        cases = list(ElementTree.parse(results).iter("testcase")) if results.exists() else []
    failures = {}
    for case in cases:
        for problem in (*case.findall("failure"), *case.findall("error")):
            failures[case.get("name", "")] = (problem.get("message") or "")[:400]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {
        "file": name,
        "passed": len(cases) - skipped - len(failures),
        "failed": len(failures),
        "skipped": skipped,
        "seconds": round(seconds, 1),
        "exit_status": done.returncode,
        "failures": failures,
    }


if __name__ == "__main__":
    sys.exit(main())
