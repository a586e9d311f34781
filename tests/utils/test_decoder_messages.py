"""Messages that decoders repeat are shown once; everything else reaches stderr, even from a process that aborts."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import LONG
from PIL import Image

PROGRAM = """
import os, sys
from fasttrain.utils.decoder_messages import shown_once

with shown_once():
    for number in range(500):
        os.write(2, b"\\x1b[31m[ERROR] \\x1b[0m[libtiff_decoder] Unsupported photometric kind: %d\\n" % number)
        os.write(2, b"libpng warning: iCCP: too short" * (1 + number % 3) + b"\\n" * (number % 3))
        os.write(2, b"[ERROR:0@0.%d] global loadsave.cpp:1374 imdecode_: can't read header\\n> where\\n\\n" % number)
    os.write(2, b"NCCL WARN something\\n\\n> kept\\n")
    print("progress", end="\\r", file=sys.stderr, flush=True)
    print("from Python", file=sys.stderr)
    if sys.argv[1] == "abort":
        os.write(2, b"terminate called\\n")
        os.abort()
    if sys.argv[1] == "raise":
        raise SystemExit("an error")
print("after", file=sys.stderr)
"""


@pytest.mark.parametrize(("how", "status"), [("return", 0), ("raise", 1), ("abort", -6)])
def test_repeated_messages_are_shown_once_and_others_always(how, status):
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, timeout=60)
    assert done.returncode == status
    for kind in ("libtiff_decoder", "libpng warning", "loadsave.cpp"):
        lines = [line for line in done.stderr.split("\n") if kind in line]
        assert len(lines) == 1 and lines[0].endswith("(shown once; `fasttrain data check` names such files)")
    assert "NCCL WARN something\n\n> kept\n" in done.stderr
    assert "progress" in done.stderr and "from Python\n" in done.stderr and "> where" not in done.stderr
    expected = {"return": "after\n", "raise": "an error\n", "abort": "terminate called\n"}[how]
    assert expected in done.stderr


def test_a_closed_stdout_does_not_take_stderr_away(tmp_path):
    command = f"{sys.executable} -m fasttrain run --arch test_resnet --data {tmp_path}/nothing >&-"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and "no such folder" in done.stderr


@pytest.mark.slow
def test_a_run_shows_what_decoders_say_once(demo_set, tmp_path):
    """PNGs with a color profile that libpng complains about at each decode."""
    for name in ("ape", "yak"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for number in range(10):
            Image.new("RGB", (40, 40), (number, 99, 9)).save(
                tmp_path / "set" / name / f"{number}.png", icc_profile=b"abc"
            )
    command = [sys.executable, "-m", "fasttrain", "run", *LONG[:4], "--batch-size", "10", "--epochs", "5"]
    options = ["--device", "cpu", "--data", str(tmp_path / "set"), "--out", str(tmp_path / "run")]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("libpng warning") == 2 and "step 10 of 10" in done.stderr
    named = [line for line in done.stderr.splitlines() if re.match(r".*\.png: libpng warning: iCCP", line)]
    assert len(named) == 1 and Path(named[0].split(": ")[0]).parent.parent == tmp_path / "set"
    evaluated = subprocess.run(
        [*command[:3], "eval", str(tmp_path / "run"), "--data", str(tmp_path / "set"), "--device", "cpu"],
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert f"{tmp_path}/set/ape/0.png: libpng warning: iCCP" in evaluated.stderr
