"""Trackers: none stops, slows or changes a run; a resumed run goes on in the same tracked run.

Most tests use a fake trackio. The last ones use the real packages, without a network.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CPU, Stop, await_line, call, events, fail_at, run, start_run, tiny, weights

from fasttrain import prepare
from fasttrain.training import trackers
from fasttrain.training.trackers import IDS, Sink, Tracked, Trackers, require_installed
from fasttrain.utils.errors import UserError

DEMO = "trackio:demo"


def tracked(*names: str, **changes):
    recipe = tiny(**changes)
    return replace(recipe, machine=replace(recipe.machine, tensorboard=False, track=names))


class FakeRun:
    """A run of a fake trackio, which does `act` when it is asked to do `at`: init, log or finish."""

    def __init__(self, number: int, act, at: str, config: dict[str, Any]) -> None:
        self.id, self.act, self.at, self.config = f"made-{number}", act, at, config
        self.points: list[tuple[int, dict[str, float]]] = []
        self.finished = False

    def do(self, what: str) -> None:
        if what == self.at:
            self.act()

    def log(self, values: dict[str, float], step: int) -> None:
        self.do("log")
        self.points.append((step, values))

    def finish(self) -> None:
        self.do("finish")
        self.finished = True


def fake_trackio(monkeypatch, act=lambda: None, at: str = "") -> list[FakeRun]:
    """Install a fake trackio; the runs it makes."""
    runs: list[FakeRun] = []

    def make(config: dict[str, Any]) -> FakeRun:
        made = FakeRun(len(runs), act, at, config)
        runs.append(made)
        made.do("init")
        return made

    module: Any = types.ModuleType("trackio")
    module.make = make
    code = "def init(project, **options):\n    print('a line')\n    return make(options['config'])"
    exec(code, vars(module))  # so that it prints with the module's own `print`
    monkeypatch.setitem(sys.modules, "trackio", module)
    return runs


def points_of(out: Path) -> list[tuple[int, dict[str, float]]]:
    """What trackers should get, as log.jsonl has it."""
    points = []
    for event in events(out):
        if event["event"] == "train":
            values = {name: event[name] for name in ("lr", "loss", "grad_norm")}
            points.append((event["step"], values | {f"loss/{name}": mean for name, mean in event["terms"].items()}))
        elif event["event"] == "eval":
            points.append((event["step"], {name: event[name] for name in ("top1", "top5", "log_loss")}))
    return points


def check_points(actual: list[tuple[int, dict[str, float]]], out: Path) -> None:
    """Check that a tracker has the points of the log, in its order."""
    expected = points_of(out)
    assert [step for step, _ in actual] == [step for step, _ in expected]
    for (step, values), (_, wanted) in zip(actual, expected, strict=True):
        assert {name: values.get(name) for name in wanted} == pytest.approx(wanted, rel=1e-6), step


def test_a_tracker_gets_the_recipe_and_the_points_and_says_where_to_look(index, tmp_path, monkeypatch, capsys):
    made = fake_trackio(monkeypatch)
    run(tracked(DEMO), tmp_path / "run", index, index)
    (only,) = made
    assert only.finished and only.config["optim"]["lr"] == 0.1 and only.config["machine"]["track"] == [DEMO]
    check_points(only.points, tmp_path / "run")
    assert {"images_per_s", "lr"} <= only.points[0][1].keys()
    output = capsys.readouterr()
    assert "print" not in vars(sys.modules["trackio"]), "its own output is restored"
    said = [line for line in output.err.splitlines() if DEMO in line]
    assert output.out == "" and said == [f"{DEMO}: `trackio show --project demo` shows it"]


@pytest.fixture(scope="module")
def untracked(index, tmp_path_factory):
    """The tensors of a run without trackers."""
    out = tmp_path_factory.mktemp("untracked") / "run"
    run(tracked(epochs=1), out, index)
    return weights(out)


def forever() -> None:
    threading.Event().wait()


def failing() -> None:
    raise ConnectionError("no route\nto the host")


@pytest.mark.parametrize(
    ("act", "at", "line"),
    [
        (failing, "init", "ConnectionError: no route;"),
        (failing, "log", "ConnectionError: no route;"),
        (failing, "finish", "ConnectionError: no route;"),
        (forever, "init", "still busy"),
        (forever, "log", "still busy"),
        (sys.exit, "log", "SystemExit;"),
    ],
)
def test_a_broken_tracker_changes_nothing_and_is_said_once(
    index, untracked, tmp_path, monkeypatch, capsys, act, line, at
):
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 0.3)
    fake_trackio(monkeypatch, act, at)
    run(tracked(DEMO, epochs=1), tmp_path / "run", index)
    said = [line for line in capsys.readouterr().err.splitlines() if DEMO in line and "shows it" not in line]
    assert len(said) == 1 and line in said[0], said
    actual, expected = weights(tmp_path / "run"), untracked
    assert actual.keys() == expected.keys() and all(torch.equal(actual[name], expected[name]) for name in actual)
    assert events(tmp_path / "run")[-1]["event"] == "end"


def test_points_stay_in_order_and_few_wait(monkeypatch):
    monkeypatch.setattr(trackers, "QUEUE", 5)
    taken: list[int] = []
    said: list[Any] = []
    go = threading.Event()

    class Slow:
        id, where = "one", ""

        def log(self, step, values):
            taken.append(step)

        def close(self, finished):
            taken.append(finished)

    def start():
        go.wait()
        return Slow()

    sink = Sink("slow", start, lambda *known: said.append(known), said.append)
    for step in range(8):
        sink.log(step, {})
    assert len(said) == 1 and "loses points from step 5" in said[0]
    go.set()
    sink.end(True)
    sink.wait(time.monotonic() + 60)
    assert taken == [0, 1, 2, 3, 4, True] and said[1:] == [("slow", "one")]


def test_a_resumed_run_goes_on_in_its_tracked_run(index, tmp_path, monkeypatch):
    out, recipe = tmp_path / "run", tracked(DEMO)
    made = fake_trackio(monkeypatch)
    with monkeypatch.context() as patch, pytest.raises(Stop):
        fail_at(patch, 8)
        run(recipe, out, index)
    assert made[0].finished and json.loads((out / IDS).read_text()) == {DEMO: "made-0"}
    run(tracked(DEMO, "trackio:other"), out, index)
    by_id = {each.id: each for each in made[1:]}
    assert len(by_id) == 2
    check_points([*made[0].points, *by_id["made-0"].points], out)
    assert [step for step, _ in by_id["made-0"].points] == [6, 8, 10]  # 6 again, after the checkpoint of step 5
    assert json.loads((out / IDS).read_text()).keys() == {DEMO, "trackio:other"}
    run(tiny(epochs=2), out, index)  # and without trackers
    run(recipe, out, index, resume="never")
    assert made[-1].id == f"made-{len(made) - 1}"


@pytest.mark.parametrize(
    "content",
    ["[]", "{", '{"trackio:demo": 3}', '{"trackio:demo": "../../x"}', "\udcff", '{"a": "' + "b" * 70000 + '"}'],
)
def test_a_damaged_file_of_ids_is_ignored(tmp_path, monkeypatch, content):
    made = fake_trackio(monkeypatch)
    said: list[str] = []
    (tmp_path / IDS).write_bytes(content.encode(errors="surrogateescape"))
    for _ in range(2):  # the second finds what the first wrote
        opened = Trackers(tmp_path, tensorboard=False, track=[DEMO], config={}, say=said.append)
        opened.close(True)
    said = [line for line in said if "shows it" not in line]
    assert said == [f"{tmp_path / IDS} is damaged and ignored: trackers start new runs"]
    assert [each.id for each in made] == ["made-0", "made-0"]
    assert json.loads((tmp_path / IDS).read_text()) == {DEMO: "made-0"}


@pytest.mark.parametrize(
    ("tracker", "message"),
    [
        (
            "tensorbord:x",
            "--track: machine.track must be wandb:PROJECT, trackio:PROJECT or mlflow:EXPERIMENT, not 'tens",
        ),
        ("wandb", "not 'wandb'"),
        ("wandb: ", "not 'wandb: '"),
        ("mlflow:a\nb", "not 'mlflow:a\\nb'"),
    ],
)
def test_an_unknown_tracker_is_refused(tmp_path, demo_set, tracker, message):
    options = ("--data", demo_set, "--track", tracker, "--out", tmp_path / "o", "--dry-run")
    result = call("run", "--arch", "test_resnet", *options, status=2)
    assert message in result.stderr.splitlines()[-1] and not (tmp_path / "o").exists()


@pytest.mark.parametrize("dry_run", [("--dry-run",), ()])
def test_a_missing_package_is_said_before_anything_is_done(tmp_path, demo_set, monkeypatch, dry_run):
    monkeypatch.setitem(sys.modules, "wandb", None)
    options = ("--data", demo_set, "--track", "wandb:demo", "--out", tmp_path / "o", *dry_run)
    result = call("run", "--arch", "test_resnet", *options, status=2)
    assert "machine.track=wandb:demo needs wandb: pip install wandb" in result.stderr.splitlines()[-1]
    assert not (tmp_path / "o").exists() and "demo set" not in result.stderr


def test_a_folder_of_the_name_of_a_package_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "wandb" / "offline-run-1").mkdir(parents=True)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(UserError, match="needs wandb: pip install wandb"):
        require_installed(["wandb:demo"])


def test_only_rank_0_needs_to_be_told_of_trackers(index, monkeypatch):
    told = []
    ranks = replace(CPU, world=2)
    monkeypatch.setattr(type(ranks), "require_same", lambda self, facts: told.append(facts))
    for recipe in (tracked(), tracked(DEMO)):
        prepare.require_same_run(recipe, index, None, ranks)
    assert told[0] == told[1]


def test_names_of_tracked_runs_are_readable(tmp_path):
    assert Tracked(tmp_path / "runs" / "small" / "fold-0", "p", {}, "").name == "small/fold-0"


def wandb_points(out: Path) -> tuple[list, list[dict]]:
    """The points and configurations in W&B's files, by its own reader."""
    points, configs, ids, axes = [], [], set(), []
    for folder in sorted((out / "wandb").glob("offline-run-*")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
        for line in subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines():
            record = json.loads(line)
            if record["type"] == "history":
                item = record["history"]["item"]
                points.append((item["step"], item))
            elif record["type"] == "run":
                configs.append(record["run"]["config"]["update"])
                ids.add(record["run"]["run_id"])
            elif record["type"] == "metric" and record["metric"].get("glob_name") == "*":
                axes.append(record["metric"]["step_metric"])
            assert "--image-size" not in line  # the command line
    assert ids == {json.loads((out / IDS).read_text())["wandb:demo"]}
    assert axes == ["step"] * len(configs)
    return points, configs


@pytest.mark.slow
def test_the_real_trackers_have_one_run_with_all_points(demo_set, tmp_path, monkeypatch):
    """A run that SIGTERM stops inside an epoch and that resumes from an earlier step, without a network."""
    for package in ("tensorboard", "wandb", "trackio", "mlflow"):
        pytest.importorskip(package)
    out, store = tmp_path / "run", f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.chdir(tmp_path)
    options = ["--arch", "test_resnet", "--image-size", 32, "--batch-size", 50, "--epochs", 40, "--data", demo_set]
    options += ["--out", out, "--set", "machine.log_steps=3", "--set", "checkpoint.keep=50"]
    options += [word for name in ("wandb", "trackio", "mlflow") for word in ("--track", f"{name}:demo")]
    first = start_run(*options)
    await_line(first, "step 33 ")
    first.send_signal(signal.SIGTERM)
    output, errors = first.communicate(timeout=120)
    assert first.returncode == 75 and "the same command resumes" in errors.splitlines()[-1], errors
    assert output == "" and ":demo" not in errors
    earlier = out / "checkpoints" / "step-00000020"
    second = start_run(*options, "--resume", earlier, "--set", "epochs=5", "--set", "resume.allow=['epochs']")
    output, errors = second.communicate(timeout=300)
    assert second.returncode == 0 and errors.count(":demo: ") == 3, errors  # where to look
    assert "step 33 " in errors and len(output.splitlines()) == 3
    expected = points_of(out)
    steps = [step for step, _ in expected]
    assert steps != sorted(steps)

    points, configs = wandb_points(out)
    check_points(points, out)
    assert [config["epochs"] for config in configs] == [40, 5] and configs[0]["optim"]["lr"] == 0.1

    code = "import json, sys; from trackio.sqlite_storage import SQLiteStorage as S; "
    code += "runs, name = S.get_run_records('demo'), sys.argv[1]; "
    code += "print(json.dumps([runs, S.get_logs('demo', name), S.get_run_config('demo', name)], default=str))"
    name = f"{tmp_path.name}/run"
    found = subprocess.run([sys.executable, "-c", code, name], capture_output=True, text=True, check=True)
    records, logs, config = json.loads(found.stdout)
    assert [record["name"] for record in records] == [name]
    check_points([(each["step"], each) for each in logs], out)
    assert config["epochs"] == 5 and config["optim"]["lr"] == 0.1

    from mlflow import MlflowClient

    client = MlflowClient(store)
    (kept,) = client.search_runs([client.get_experiment_by_name("demo").experiment_id])
    assert kept.info.run_name == name and kept.info.status == "FINISHED"
    assert kept.data.params["optim.lr"] == "0.1" and kept.data.params["arch"] == "test_resnet"
    for metric in ("lr", "loss/cross_entropy", "top1"):
        history = [(each.step, each.value) for each in client.get_metric_history(kept.info.run_id, metric)]
        assert sorted(history) == sorted((step, values[metric]) for step, values in expected if metric in values)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0}, purge_orphaned_data=False)
    reader.Reload()
    scalars = [(each.step, each.value) for each in reader.Scalars("loss/cross_entropy")]
    losses = [(step, values["loss/cross_entropy"]) for step, values in expected if "loss/cross_entropy" in values]
    assert [step for step, _ in sorted(scalars)] == [step for step, _ in sorted(losses)]
    assert sorted(value for _, value in scalars) == pytest.approx(sorted(value for _, value in losses), rel=1e-6)


@pytest.mark.slow
def test_wandb_without_a_login_and_mlflow_without_its_run(index, tmp_path, monkeypatch, capsys):
    """W&B does not ask for a key, and MLflow starts a new run where another store is used."""
    for package in ("wandb", "mlflow"):
        pytest.importorskip(package)
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    out, handlers = tmp_path / "run", [signal.getsignal(number) for number in (*range(1, 32),)]
    out.mkdir()
    (out / IDS).write_text('{"mlflow:demo": "0123456789abcdef0123456789abcdef"}')
    (out / "recipe.toml").touch()
    run(tracked("wandb:demo", "mlflow:demo", epochs=1), out, index)
    said = [line for line in capsys.readouterr().err.splitlines() if "wandb:demo" in line]
    assert len(said) == 1 and "wandb:demo: UsageError: No API key configured" in said[0], said
    assert handlers == [signal.getsignal(number) for number in (*range(1, 32),)]

    from mlflow import MlflowClient

    ids = json.loads((out / IDS).read_text())
    assert ids["mlflow:demo"] != "0123456789abcdef0123456789abcdef" and "wandb:demo" not in ids
    assert MlflowClient().get_run(ids["mlflow:demo"]).info.status == "FINISHED"
