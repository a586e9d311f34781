"""What a machine lacks is one line on stderr, not a traceback."""

import os
import pwd
import re
import subprocess
import sys
import types

import pytest
from helpers import CPU, call, events

from fasttrain.data.scan import scan
from fasttrain.training.log import Log
from fasttrain.utils.environment import explain


def fasttrain(*args: object, **variables: str):
    """Run the command line in its own process, with these environment variables."""
    command = [sys.executable, "-m", "fasttrain", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | variables, timeout=200)


@pytest.fixture
def run_args(demo_set, tmp_path) -> list[object]:
    small = ["--image-size", 32, "--batch-size", 50, "--epochs", 1, "--device", "cpu"]
    return ["run", "--arch", "test_resnet", *small, "--data", demo_set / "val", "--out", tmp_path / "run"]


def last_line(result: subprocess.CompletedProcess) -> str:
    assert "Traceback" not in result.stderr, result.stderr
    return result.stderr.splitlines()[-1]


def test_a_user_without_a_home_folder_scans_but_has_no_demo_set(demo_set, monkeypatch):
    """As in a container with a user that is in no list: images are read without a cache."""

    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert len(scan(demo_set / "val")) == 250
    assert "no home folder; set XDG_CACHE_HOME" in call("run", "--arch", "test_resnet", status=2).stderr


@pytest.mark.slow
def test_a_missing_compiler_is_named(run_args, tmp_path):
    result = fasttrain(*run_args, "--compile", PATH="/nowhere", CC="", CXX="", TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    assert result.returncode == 1 and "there is no C or C++ compiler" in last_line(result)


def test_errors_of_compilers_are_explained():
    compiler = subprocess.CalledProcessError(1, ["gcc"], stderr=b"main.c:2:10: fatal error: Python.h: No such file\n")
    wrapped = RuntimeError("many\nlines")
    wrapped.__cause__ = compiler
    line = explain(wrapped)
    assert "Python.h: No such file" in line and "python3-dev" in line and "\n" not in line
    triton = RuntimeError("Failed to find C compiler. Please specify via CC environment variable")
    assert "there is no C or C++ compiler" in explain(triton)
    assert explain(RuntimeError("something else")) == ""
    assert explain(subprocess.CalledProcessError(1, ["nvidia-smi", "-L"], stderr=b"error: no devices")) == ""
    assert "a compiler failed" in explain(subprocess.CalledProcessError(1, "/usr/bin/x86_64-linux-gnu-g++-12 a.cpp"))


@pytest.mark.parametrize(("name", "value"), [("RANK", "x"), ("WORLD_SIZE", "two")])
def test_wrong_variables_of_torchrun_are_named(run_args, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert f"the variable {name} is {value!r}, not a number" in call(*run_args, status=2).stderr


@pytest.mark.slow
def test_missing_variables_of_torchrun_are_named(run_args):
    result = fasttrain(*run_args, WORLD_SIZE="2")
    message = "cannot join the other 1 ranks: .*RANK expected, but not set; start all of them with"
    assert result.returncode == 1 and re.search(message, last_line(result))


def test_a_current_folder_that_was_deleted_is_named(tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    command = f"cd {gone} && rmdir {gone} && {sys.executable} -m fasttrain data check {tmp_path}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=100)
    assert result.returncode == 2 and "the current folder no longer exists" in last_line(result)


def test_an_encoding_without_some_characters_prints_the_help():
    result = fasttrain("run", "--help", PYTHONIOENCODING="latin1")
    assert result.returncode == 0 and "\\u2026" in result.stdout


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "memory is full"),
        (RuntimeError("Error when executing: std::bad_alloc"), "memory is full"),
        (MemoryError(), "memory is full"),
        (RuntimeError("can't start new thread"), "no more threads"),
    ],
)
def test_full_memory_and_too_few_threads_are_explained(error, message):
    assert message in explain(error)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [("TQDM_MININTERVAL", "often", "TQDM_MININTERVAL"), ("PYTHONOPTIMIZE", "2", "docstrings")],
)
def test_a_variable_that_python_cannot_run_with_is_named(name, value, message):
    result = fasttrain("recipes", **{name: value})
    assert result.returncode == 2 and message in last_line(result)


def test_a_backend_of_matplotlib_that_does_not_exist_is_named():
    code = "from fasttrain.evaluation import confusion; confusion.require_matplotlib()"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"MPLBACKEND": "x"}, timeout=60)
    assert "UserError: matplotlib is not set up: Key backend: 'x'" in result.stderr.splitlines()[-1]


def test_a_broken_tensorboard_is_said_and_left_out(tmp_path, monkeypatch, capsys):
    broken = types.ModuleType("torch.utils.tensorboard")

    def writer(path):
        raise AttributeError("module 'numpy' has no attribute 'bool8'")

    broken.SummaryWriter = writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", broken)
    log = Log(tmp_path, CPU, start_step=0, steps=1, batch_size=1)
    log.train(0, 1, 0.1, {"loss": 1.0})
    log.close()
    assert "no TensorBoard files: AttributeError" in capsys.readouterr().err and len(events(tmp_path)) == 1
