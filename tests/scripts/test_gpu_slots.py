"""The slots of GPU measurements, tested without a GPU: their runner, and every part at toy size."""

import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from helpers import ROOT

pytestmark = pytest.mark.slow

SCRIPT = ROOT / "scripts" / "gpu" / "slot.py"
SUCCEEDS = """-c "open('{json}', 'w').write('{{\\"rows\\": [{{\\"value\\": 1}}]}}')" """
HANGS = (
    """-c "import subprocess, time; open('{json}', 'w').write('{{\\"rows\\": [{{\\"value\\": 2}}]}}');"""
    """ child = subprocess.Popen(['sleep', '60']); open('{out}.pid', 'w').write(str(child.pid)); time.sleep(60)" """
)


@pytest.fixture
def slot(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("slot_under_test", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "slot_under_test", module)  # dataclasses look there
    spec.loader.exec_module(module)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    return module


@pytest.fixture
def run(slot, monkeypatch, tmp_path):
    """Run slot A with parts (name, command, fields of Part). Returns its exit status."""
    (tmp_path / "data" / "a").mkdir(parents=True)

    def run(*parts, words=()):
        slot_parts = [slot.Part(name, 1, fields.pop("limit", 30), command, **fields) for name, command, fields in parts]
        monkeypatch.setattr(slot, "SLOTS", {"A": slot_parts})
        arguments = ["A", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out"), *words]
        monkeypatch.setattr(sys, "argv", ["slot.py", *arguments])
        return slot.main()

    return run


def results(tmp_path):
    return json.loads((tmp_path / "out" / "gpu.json").read_text())


def test_a_part_runs_once_and_its_figures_are_in_one_file_and_a_table(run, tmp_path, capfd):
    assert run(("one", SUCCEEDS, {})) == 0
    assert results(tmp_path) == {"one": {"rows": [{"value": 1}]}}
    assert (
        "**one**" in (tmp_path / "out" / "gpu.md").read_text() and "about 1 s, at most 30 s" in capfd.readouterr().out
    )
    assert run(("one", "-c 1/0", {})) == 0 and "one: already done" in capfd.readouterr().out
    with tarfile.open(tmp_path / "out" / "logs.tar.gz") as logs:
        assert logs.getnames() == ["one.log"]


def test_a_part_that_fails_is_reported_and_run_again(run, tmp_path, capfd):
    assert run(("bad", "-c 1/0", {}), ("good", SUCCEEDS, {})) == 1
    output = capfd.readouterr().out
    assert "ZeroDivisionError" in output and "not done: bad;" in output and results(tmp_path).keys() == {"good"}
    assert run(("bad", SUCCEEDS, {}), ("good", "-c 1/0", {})) == 0
    assert results(tmp_path).keys() == {"bad", "good"}


def test_a_part_over_its_limit_is_killed_with_its_children_and_its_results_are_kept(run, tmp_path, capfd):
    assert run(("slow", HANGS, {"limit": 2}), ("good", SUCCEEDS, {})) == 1
    assert "slow: 2 s, its time was over" in capfd.readouterr().out
    assert results(tmp_path)["slow"] == {"rows": [{"value": 2}], "unfinished": True}
    assert results(tmp_path)["good"] == {"rows": [{"value": 1}]}
    child = int((tmp_path / "out" / "parts" / "slow.pid").read_text())
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and "Z" not in Path(f"/proc/{child}/stat").read_text().split(")")[1][:3]:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_no_part_runs_after_the_total_time(run, tmp_path, capfd):
    assert run(("slow", HANGS, {}), ("good", SUCCEEDS, {}), words=["--total", "6"]) == 1
    output = capfd.readouterr().out
    assert "slow: about 1 s, at most 6 s" in output and "good: not started, because the 6 s are over" in output


def test_parts_that_need_dali_are_left_out_without_dali(run, slot, monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(slot, "has_dali", lambda: False)
    assert run(("with", SUCCEEDS, {}), ("without", SUCCEEDS, {"needs_dali": False})) == 1
    assert "with: left out because it needs DALI" in capfd.readouterr().out and results(tmp_path).keys() == {"without"}


def test_parts_are_chosen_by_name_and_inductors_cache_is_reused(run, slot, tmp_path, capfd):
    """A part writes to the cache; a later call in another folder reads it."""
    writes = """-c "import os; d = os.environ['TORCHINDUCTOR_CACHE_DIR']; os.makedirs(d); open(d + '/kernel', 'w')" """
    assert run(("one", writes, {}), ("two", "-c 1/0", {}), words=["--parts", "one"]) == 1
    packed = tmp_path / "earlier.tar.xz"
    (tmp_path / "out" / "inductor.tar.xz").rename(packed)
    (tmp_path / "out").rename(tmp_path / "old")
    reads = """-c "import os; os.stat(os.environ['TORCHINDUCTOR_CACHE_DIR'] + '/kernel'); open('{json}', 'w').write("""
    reads += """'{{\\"rows\\": []}}')" """
    assert run(("one", reads, {}), words=["--cache", str(packed)]) == 0
    with pytest.raises(SystemExit):
        run(("one", reads, {}), words=["--parts", "three"])
    assert "slot A has no part three; its parts are one" in capfd.readouterr().err


def test_a_signal_stops_the_part_and_keeps_its_results(tmp_path):
    """Like the SIGTERM of a host's time limit."""
    (tmp_path / "data" / "a").mkdir(parents=True)
    code = f"import sys; sys.argv[0] = {str(SCRIPT)!r}; sys.path.insert(0, {str(SCRIPT.parent)!r}); import slot\n"
    code += f"slot.SLOTS = {{'A': [slot.Part('slow', 1, 60, {HANGS!r})]}}; sys.exit(slot.main())"
    command = [sys.executable, "-c", code, "A", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    running = subprocess.Popen(command)
    pid = tmp_path / "out" / "parts" / "slow.pid"
    deadline = time.monotonic() + 30
    while not pid.exists() or not pid.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    running.terminate()
    assert running.wait(30) == 143 and results(tmp_path)["slow"]["unfinished"]
    child = Path(f"/proc/{pid.read_text()}/stat")
    assert not child.exists() or child.read_text().split(")")[1].split()[0] == "Z"


def test_part_names_are_unique_and_slots_fit_their_time(slot):
    names = [part.name for parts in slot.SLOTS.values() for part in parts]
    assert len(names) == len({*names})
    for parts in slot.SLOTS.values():
        assert sum(part.expected for part in parts) <= 480
        assert all(part.expected < part.limit <= 560 for part in parts)


def test_the_slots_have_all_tests_that_need_a_gpu(slot):
    tests = ROOT / "tests"
    marked = {
        str(path.relative_to(tests)) for path in tests.rglob("test_*.py") if "pytest.mark.gpu" in path.read_text()
    }
    words = [shlex.split(part.command) for parts in slot.SLOTS.values() for part in parts if "tests-" in part.name]
    in_slots = {word for command in words for word in command if re.fullmatch(r"[\w/]*test_\w+\.py", word)}
    assert in_slots == marked - {"scripts/test_gpu_slots.py"}


@pytest.mark.slow
@pytest.mark.parametrize("name", "ABCDEFGH")
def test_every_part_works_at_toy_size(slot, demo_set, tmp_path, name):
    data = demo_set if name == "C" else demo_set / "val"
    command = [sys.executable, str(SCRIPT), name, "--data", str(data), "--out", str(tmp_path / "out"), "--toy"]
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([*command, "--total", "2000"], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    by_part = results(tmp_path)
    assert by_part.keys() == {part.name for part in slot.SLOTS[name]}
    assert all(result["rows"] for part, result in by_part.items() if part != "decoders")


def test_parts_that_need_no_dali_run_without_it(slot, demo_set, tmp_path):
    parts = [part.name for slot_parts in slot.SLOTS.values() for part in slot_parts if not part.needs_dali]
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text("import sys\nsys.modules['nvidia.dali'] = None\n")
    command = [sys.executable, str(SCRIPT), *slot.SLOTS, "--data", str(demo_set / "val"), "--out", str(tmp_path)]
    env = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    words = ["--toy", "--total", "2000", "--parts", *parts]
    done = subprocess.run([*command, *words], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
