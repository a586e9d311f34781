"""Stopping after any step and going on: bit for bit the run that was never stopped. Signals, damage, kills, locks."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import LONG, await_line, call, events, logged, part_of, run, same, start_run, tiny, weights

from fasttrain import train as training
from fasttrain.checkpoints import checkpoint
from fasttrain.checkpoints.run_dir import lock, newest, open_run
from fasttrain.config.schema import (
    AugmentConfig,
    CheckpointConfig,
    EmaConfig,
    EvaluationConfig,
    InitConfig,
    MachineConfig,
    MixConfig,
)
from fasttrain.losses.arcface import ArcFace
from fasttrain.losses.contrastive import Contrastive
from fasttrain.losses.cross_entropy import CrossEntropy
from fasttrain.losses.mean_teacher import MeanTeacher
from fasttrain.losses.symmetric import SymmetricCrossEntropy
from fasttrain.losses.triplet import Triplet
from fasttrain.utils.errors import Stopped, UserError


@pytest.fixture(scope="module")
def index(demo_set):
    """60 images, six of each class: three steps an epoch of 20."""
    return part_of(demo_set, 6)


def stop_at(monkeypatch, step: int) -> None:
    """Send SIGTERM to this process while the given step (0-based) is under way."""
    honest = training.batches

    def watched(plan, *args, **settings):
        start = args[3]
        for count, batch in enumerate(honest(plan, *args, **settings)):
            if start + count // plan.micro_batches == step:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    monkeypatch.setattr(training, "batches", watched)


RECIPES = {
    "CutMix": tiny(epochs=3, mix=MixConfig(cutmix=0.5)),
    "triplet, EMA, accumulation": tiny(
        epochs=3,
        losses=(CrossEntropy(0.1), Triplet()),
        images_per_class=2,
        micro_batch=10,
        ema=EmaConfig(0.9),
        init=InitConfig(force_scratch=True),
        machine=MachineConfig(device="cpu", compile="off", log_steps=5, workers=2),
    ),
    "ArcFace, mixup": tiny(
        epochs=3,
        losses=(CrossEntropy(0.1), ArcFace()),
        mix=MixConfig(cutmix=0.3, mixup=0.4),
        init=InitConfig(force_scratch=True),
    ),
    "two views, mean teacher": tiny(
        epochs=3,
        losses=(SymmetricCrossEntropy(), Contrastive(decay="cosine"), MeanTeacher(ramp_epochs=2.0)),
        ema=EmaConfig(0.9),
        augment=AugmentConfig(autoaugment="none", randaugment=2, erase=0.25),
    ),
}


# What a run keeps besides weights and momentum is in the first; the rest differ in what a step computes.
@pytest.mark.parametrize(
    ("name", "stops"),
    [
        ("triplet, EMA, accumulation", (0, 2, 3, 7)),  # at the run's first step, an epoch's last and first, the last
        *(pytest.param(name, range(8), marks=pytest.mark.slow) for name in RECIPES),
    ],
)
def test_a_run_stopped_after_any_step_goes_on_bit_for_bit(index, tmp_path, monkeypatch, name, stops):
    recipe = RECIPES[name]
    run(recipe, tmp_path / "whole", index, index)
    for step in stops:
        out = tmp_path / f"stopped{step}"
        with monkeypatch.context() as patch:
            stop_at(patch, step)
            with pytest.raises(Stopped, match=rf"stopped by SIGTERM after step {step + 1} of 9") as caught:
                run(recipe, out, index, index)
        assert caught.value.exit_status == 75
        run(recipe, out, index, index)
        same(out, tmp_path / "whole")


def test_a_run_stopped_many_times_goes_on_bit_for_bit(index, tmp_path, monkeypatch):
    """Twice and three times in one epoch."""
    recipe = replace(RECIPES["triplet, EMA, accumulation"], epochs=2)
    run(recipe, tmp_path / "whole", index, index)
    for step in (0, 1, 2, 3, 4):
        with monkeypatch.context() as patch:
            stop_at(patch, step)
            with pytest.raises(Stopped):
                run(recipe, tmp_path / "out", index, index)
    run(recipe, tmp_path / "out", index, index)
    same(tmp_path / "out", tmp_path / "whole")


def test_checkpoints_every_so_many_steps_change_nothing_else(index, tmp_path):
    recipe = tiny(epochs=2)
    run(recipe, tmp_path / "plain", index, index)
    often = replace(recipe, checkpoint=CheckpointConfig(every_steps=2, keep=20, archive_epochs=1))
    run(often, tmp_path / "often", index, index)
    same(tmp_path / "often", tmp_path / "plain")
    names = sorted(each.name for each in (tmp_path / "often" / "checkpoints").iterdir())
    assert names == [f"step-{step:08}" for step in (2, 3, 4, 6)]


def evaluated(out: Path) -> list[int]:
    """Epochs, each time that one was evaluated."""
    return [each["epoch"] for each in events(out) if each["event"] == "eval"]


def test_evaluating_seldom_changes_nothing_else(index, tmp_path, monkeypatch):
    """Also where a stopped run goes on with another interval."""
    recipe = tiny(epochs=5)
    seldom = replace(recipe, evaluation=EvaluationConfig(every_epochs=3))
    run(recipe, tmp_path / "often", index, index)
    run(seldom, tmp_path / "seldom", index, index)
    assert evaluated(tmp_path / "often") == [0, 1, 2, 3, 4] and evaluated(tmp_path / "seldom") == [2, 4]
    often, few = logged(tmp_path / "often"), logged(tmp_path / "seldom")
    assert few == {key: often[key] for key in often if key[0] != "eval" or key in few}
    for first, then, epochs in ((seldom, seldom, [2, 4]), (recipe, seldom, [0, 1, 2, 4]), (seldom, recipe, [2, 3, 4])):
        out = tmp_path / f"{epochs}"
        with monkeypatch.context() as patch:
            stop_at(patch, 9)
            with pytest.raises(Stopped):
                run(first, out, index, index)
        run(then, out, index, index)
        assert evaluated(out) == epochs
        ours, theirs = weights(out), weights(tmp_path / "often")
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_checkpoints_have_the_scores_of_their_own_weights(index, tmp_path, monkeypatch):
    """Those that were not evaluated have none, and are never the best."""
    tops = iter([0.5, 0.7, 0.6])
    monkeypatch.setattr(training, "evaluate", lambda *args: training.Scores(next(tops), 1.0, 60))
    settings = CheckpointConfig(every_steps=2, keep=20)
    recipe = tiny(epochs=5, checkpoint=settings, evaluation=EvaluationConfig(every_epochs=2))
    result = run(recipe, tmp_path / "run", index, index)
    metas = [checkpoint.load(each).meta for each in sorted((tmp_path / "run" / "checkpoints").iterdir())]
    told = {meta["step"]: meta["scores"] and meta["scores"]["top1"] for meta in metas}
    assert told == {2: None, 3: None, 4: None, 6: 0.5, 8: None, 9: None, 10: None, 12: 0.7, 14: None, 15: 0.6}
    assert [meta["best"] for meta in metas] == [None] * 3 + [0.5] * 4 + [0.7] * 3
    assert checkpoint.load(tmp_path / "run" / "best").meta["step"] == 12
    assert result.best == 0.7 and result.scores == training.Scores(0.6, 1.0, 60)


def test_what_is_kept(index, tmp_path):
    """The newest, the best and each second epoch's."""
    recipe = tiny(epochs=5, checkpoint=CheckpointConfig(every_steps=1, keep=2, archive_epochs=2))
    run(recipe, tmp_path / "run", index, index)
    tests = [each for each in events(tmp_path / "run") if each["event"] == "eval"]
    best = max(tests, key=lambda each: (each["top1"], -each["step"]))["step"]
    kept = {int(each.name.removeprefix("step-")) for each in (tmp_path / "run" / "checkpoints").iterdir()}
    assert kept == {14, 15, 6, 12, best}


# ---- damage


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "one bit":
        content[len(content) // 3] ^= 4
        path.write_bytes(content)
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["truncated", "one bit", "gone"])
@pytest.mark.parametrize("file", ["model.safetensors", "train.safetensors", "meta.json"])
def test_a_damaged_checkpoint_is_passed_over(index, tmp_path, capsys, file, how):
    recipe = tiny(epochs=2, checkpoint=CheckpointConfig(every_steps=1, keep=9))
    run(recipe, tmp_path / "run", index)
    # Copies: what safetensors reads is a view of the very file that is damaged next.
    whole = {name: each.clone() for name, each in weights(tmp_path / "run").items()}
    victim = (tmp_path / "run" / "last").resolve()
    if file == "meta.json" and how == "one bit":
        content = (victim / file).read_text()
        (victim / file).write_text(content.replace('"sha256"', '"sha265"'))
    else:
        damage(victim / file, how)
    result = run(recipe, tmp_path / "run", index)
    said = capsys.readouterr().err
    assert file in said and "trying the one before" in said and result.steps == 6
    assert [each["step"] for each in events(tmp_path / "run") if each["event"] == "resume"] == [5]
    assert all(torch.equal(each, whole[name]) for name, each in weights(tmp_path / "run").items())


def test_nothing_but_damage_is_said_so(index, tmp_path):
    run(tiny(epochs=1), tmp_path / "run", index)
    for path in (tmp_path / "run" / "checkpoints").glob("step-*"):
        damage(path / "model.safetensors", "one bit")
    with pytest.raises(UserError, match=r"no checkpoint in \S+ is intact; start over with --resume never"):
        run(tiny(epochs=1), tmp_path / "run", index)


# ---- courses


def test_what_comes_after_is_left_when_a_run_goes_on_from_before(index, tmp_path):
    """A run of 9 steps goes on from its third: what came after is kept under other names, and never gone on from."""
    recipe = tiny(epochs=3, checkpoint=CheckpointConfig(every_steps=1, keep=9))
    run(recipe, tmp_path / "run", index, index)
    home = tmp_path / "run" / "checkpoints"
    best = checkpoint.find(tmp_path / "run").name
    run(replace(recipe, epochs=3), tmp_path / "run", index, index, resume=str(home / "step-00000003"))
    names = sorted(each.name for each in home.iterdir())
    assert names == sorted([f"step-{step:08}" for step in range(1, 10)] + [f"left0-step-{s:08}" for s in range(4, 10)])
    assert best and checkpoint.find(tmp_path / "run").parent == home
    # Another run's checkpoint to start from: none of those that are there are of that course.
    run(recipe, tmp_path / "other", index, index)
    run(recipe, tmp_path / "run", index, index, resume=str(tmp_path / "other" / "checkpoints" / "step-00000008"))
    assert sorted(each.name for each in home.glob("step-*")) == ["step-00000009"]


def test_damage_does_not_bring_back_what_was_left(index, tmp_path):
    """`last` is damaged and passed over; should the run then be killed before it saves again, that still holds."""
    recipe = tiny(epochs=3, checkpoint=CheckpointConfig(every_steps=1, keep=9))
    run(recipe, tmp_path / "run", index)
    home = tmp_path / "run" / "checkpoints"
    (tmp_path / "run" / "last").unlink()
    (tmp_path / "run" / "last").symlink_to("checkpoints/step-00000006")
    damage(home / "step-00000006" / "model.safetensors", "truncated")
    for _ in range(2):
        start = open_run(tmp_path / "run", "auto", "")
        assert start is not None and start.name == "step-00000005"
        assert checkpoint.find(tmp_path / "run" / "last").name == "step-00000005"


# ---- kills

KILLED = '''
"""Checkpoints twice and once more; a child for each n dies by SIGKILL at the n-th write of the later saves."""
import os, signal, sys
from pathlib import Path
import torch
from fasttrain.checkpoints import checkpoint
from fasttrain.config.schema import OptimConfig
from fasttrain.training import optim
from fasttrain.training.state import State

torch.set_num_threads(1)
META = {"recipe": {}, "classes": ["a"], "data": "", "sizes": "", "best": None, "epoch_steps": 1, "world": 1}
META |= {"shift": 0, "rewinds": 0, "streak": 0, "meters": [], "logged": {}}
count, fatal, armed = 0, 0, False


def write_comes():
    global count
    if armed:
        count += 1
        if count == fatal:
            os.kill(os.getpid(), signal.SIGKILL)


def deadly(function):
    def wrapped(*args, **kwargs):
        write_comes()
        result = function(*args, **kwargs)
        write_comes()
        return result
    return wrapped


def half(function):
    def wrapped(tensors, path):
        if armed and count + 1 == fatal:
            Path(path).write_bytes(b"half a file")
        write_comes()
        return function(tensors, path)
    return wrapped


def saves(out):
    global armed
    model = torch.nn.Linear(3, 2)
    optimizer, scaler = optim.sgd(model, OptimConfig()), torch.amp.GradScaler("cpu", enabled=False)
    for step in (1, 2, 2):
        with torch.no_grad():
            model.weight.fill_(step)
        armed = step == 2
        snapshot = checkpoint.Snapshot().take(State(model, optimizer, scaler))
        checkpoint.save(out, step, snapshot, improved=True, keep=2, meta=META)


for name in ("rename", "replace", "symlink", "fsync", "mkdir", "unlink", "rmdir"):
    setattr(os, name, deadly(getattr(os, name)))
checkpoint.save_file = half(checkpoint.save_file)
Path.write_text = deadly(Path.write_text)
ended = 0
while not ended:
    fatal += 1
    out = Path(sys.argv[1]) / f"run{fatal}"
    out.mkdir()
    child = os.fork()
    if not child:
        saves(out)
        os._exit(7)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL or os.WEXITSTATUS(status) == 7, status
    ended = not os.WIFSIGNALED(status)
print(fatal - 1)
'''


def test_a_kill_at_any_write_of_a_save_leaves_a_whole_checkpoint(tmp_path):
    """SIGKILL before and after each call that changes the disk, and in the middle of a file; also while a checkpoint
    of the same step is being replaced."""
    (tmp_path / "killed.py").write_text(KILLED)
    (tmp_path / "runs").mkdir()
    args = [sys.executable, str(tmp_path / "killed.py"), str(tmp_path / "runs")]
    done = subprocess.run(args, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    kills = int(done.stdout)
    for fatal in range(1, kills + 2):
        out = tmp_path / "runs" / f"run{fatal}"
        for found in (newest(out), checkpoint.find(out)):
            assert found is not None
            saved = checkpoint.load(found)
            assert saved.meta["step"] in (1, 2) and (saved.model["weight"] == saved.meta["step"]).all()
    print(f"survived {kills} of {kills} kills")
    assert kills > 30


# ---- locks and signals of the command


def test_two_runs_into_one_folder_and_a_signal(demo_set, tmp_path):
    """The second is refused while the first lives; SIGUSR1 makes the first save and end with 75; a dead process's
    lock does not count."""
    args = (*LONG, "--data", demo_set / "train", "--out", tmp_path / "run")
    first = start_run(*args)
    await_line(first, "epoch 0")
    said = call("run", "--device", "cpu", *args, status=2).stderr
    assert f"another run is writing to {tmp_path / 'run'} (process {first.pid} on " in said
    first.send_signal(signal.SIGUSR1)
    _, said = first.communicate(timeout=60)
    assert first.returncode == 75 and "stopped by SIGUSR1 after step" in said and "Traceback" not in said
    second = start_run(*args)
    await_line(second, " of 4000")
    second.kill()
    second.communicate()
    log = events(tmp_path / "run")
    stopped = next(each for each in log if each["event"] == "stopped")
    assert next(each for each in log if each["event"] == "resume")["step"] == stopped["step"]
    (tmp_path / "alias").symlink_to("run")
    with lock(tmp_path / "run"), pytest.raises(UserError, match="another run"), lock(tmp_path / "alias"):
        pass
    (tmp_path / "alias").unlink()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize("seconds", [0.8, 3])
def test_a_signal_before_the_first_step(demo_set, tmp_path, seconds):
    """While Python still imports, and later: nothing is saved, and it is told apart from a failure."""
    process = start_run(*LONG, "--data", demo_set / "train", "--out", tmp_path / "run")
    time.sleep(seconds)
    process.terminate()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75 and "Traceback" not in said
    assert "stopped by SIGTERM before a step was done" in said or "after step 1 of" in said


def test_a_signal_to_one_of_two_ranks_stops_both(demo_set, tmp_path):
    """torchrun sends its SIGTERM on to all of its ranks; here one rank gets one, and both stop at the same step."""
    program = tmp_path / "rank.py"
    program.write_text(
        "import os, signal, sys\nfrom fasttrain import train\nfrom fasttrain.cli.main import main\n"
        "honest = train.batches\n\n\ndef watched(*args, **settings):\n"
        "    for count, batch in enumerate(honest(*args, **settings)):\n"
        "        if count == 3 and os.environ['RANK'] == '1':\n            os.kill(os.getpid(), signal.SIGTERM)\n"
        "        yield batch\n\n\ntrain.batches = watched\nmain(sys.argv[1:])\n"
    )
    args = [
        *LONG,
        "--device",
        "cpu",
        "--data",
        demo_set / "train",
        "--out",
        tmp_path / "run",
        "--set",
        "machine.log_steps=2",
    ]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(program), "run"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *map(str, args)], capture_output=True, text=True, env=env, timeout=200)
    said = [line for line in done.stderr.splitlines() if "fasttrain: " in line]
    assert done.returncode != 0 and len(said) == 1 and "after step 4 of 4000, and saved" in said[0]
    assert "exitcode  : 75" in done.stderr
    meta = json.loads((tmp_path / "run" / "last" / "meta.json").read_text())
    assert meta["step"] == 4 and len(meta["meters"]) == 2
