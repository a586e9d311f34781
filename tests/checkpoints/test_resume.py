"""A run that stops after any step and resumes equals one that never stopped. Damage, kills, locks and signals."""

import json
import os
import signal
import subprocess
import sys
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
    """60 images, six of each class: three steps of 20 per epoch."""
    return part_of(demo_set, 6)


def stop_at(monkeypatch, step: int) -> None:
    """Send SIGTERM to this process during the given step, counted from 0."""
    original = training.batches

    def signaling(plan, *args, **settings):
        start = args[3]
        for count, batch in enumerate(original(plan, *args, **settings)):
            if start + count // plan.micro_batches == step:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    monkeypatch.setattr(training, "batches", signaling)


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


# The first recipe has all kinds of state that a checkpoint holds; the others differ in what a step computes.
@pytest.mark.parametrize(
    ("name", "stops"),
    [
        # The run's first step, an epoch's last and first step, and the last step that can be interrupted.
        ("triplet, EMA, accumulation", (0, 2, 3, 7)),
        *(pytest.param(name, range(8), marks=pytest.mark.slow) for name in RECIPES),
    ],
)
def test_a_run_stopped_after_any_step_resumes_bit_for_bit(index, tmp_path, monkeypatch, name, stops):
    recipe = RECIPES[name]
    run(recipe, tmp_path / "expected", index, index)
    for step in stops:
        out = tmp_path / f"stopped{step}"
        with monkeypatch.context() as patch:
            stop_at(patch, step)
            with pytest.raises(Stopped, match=rf"stopped by SIGTERM after step {step + 1} of 9") as caught:
                run(recipe, out, index, index)
        assert caught.value.exit_status == 75
        run(recipe, out, index, index)
        same(out, tmp_path / "expected")


@pytest.mark.slow
def test_a_run_stopped_many_times_resumes_bit_for_bit(index, tmp_path, monkeypatch):
    """It stops three times in the first epoch and twice in the second."""
    recipe = replace(RECIPES["triplet, EMA, accumulation"], epochs=2)
    run(recipe, tmp_path / "expected", index, index)
    for step in (0, 1, 2, 3, 4):
        with monkeypatch.context() as patch:
            stop_at(patch, step)
            with pytest.raises(Stopped):
                run(recipe, tmp_path / "out", index, index)
    run(recipe, tmp_path / "out", index, index)
    same(tmp_path / "out", tmp_path / "expected")


def test_checkpoints_every_few_steps_do_not_change_the_results(index, tmp_path):
    recipe = tiny(epochs=2)
    run(recipe, tmp_path / "plain", index, index)
    often = replace(recipe, checkpoint=CheckpointConfig(every_steps=2, keep=20, archive_epochs=1))
    run(often, tmp_path / "often", index, index)
    same(tmp_path / "often", tmp_path / "plain")
    names = sorted(path.name for path in (tmp_path / "often" / "checkpoints").iterdir())
    assert names == [f"step-{step:08}" for step in (2, 3, 4, 6)]


def evaluated_epochs(out: Path) -> list[int]:
    """The epochs after which a run was evaluated."""
    return [event["epoch"] for event in events(out) if event["event"] == "eval"]


@pytest.mark.slow
def test_rare_evaluation_does_not_change_the_results(index, tmp_path, monkeypatch):
    """Also where a stopped run resumes with another interval."""
    recipe = tiny(epochs=5)
    rare = replace(recipe, evaluation=EvaluationConfig(every_epochs=3))
    run(recipe, tmp_path / "often", index, index)
    run(rare, tmp_path / "rare", index, index)
    assert evaluated_epochs(tmp_path / "often") == [0, 1, 2, 3, 4] and evaluated_epochs(tmp_path / "rare") == [2, 4]
    often_log, rare_log = logged(tmp_path / "often"), logged(tmp_path / "rare")
    assert rare_log == {key: often_log[key] for key in often_log if key[0] != "eval" or key in rare_log}
    for first, then, epochs in ((rare, rare, [2, 4]), (recipe, rare, [0, 1, 2, 4]), (rare, recipe, [2, 3, 4])):
        out = tmp_path / f"{epochs}"
        with monkeypatch.context() as patch:
            stop_at(patch, 9)
            with pytest.raises(Stopped):
                run(first, out, index, index)
        run(then, out, index, index)
        assert evaluated_epochs(out) == epochs
        ours, theirs = weights(out), weights(tmp_path / "often")
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_checkpoints_have_the_scores_of_their_weights(index, tmp_path, monkeypatch):
    """A checkpoint that was not evaluated has no scores and is never the best."""
    top1s = iter([0.5, 0.7, 0.6])
    monkeypatch.setattr(training, "evaluate", lambda *args: training.Scores(next(top1s), 1.0, 60))
    settings = CheckpointConfig(every_steps=2, keep=20)
    recipe = tiny(epochs=5, checkpoint=settings, evaluation=EvaluationConfig(every_epochs=2))
    result = run(recipe, tmp_path / "run", index, index)
    metas = [checkpoint.load(path).meta for path in sorted((tmp_path / "run" / "checkpoints").iterdir())]
    saved_top1s = {meta["step"]: meta["scores"] and meta["scores"]["top1"] for meta in metas}
    assert saved_top1s == {2: None, 3: None, 4: None, 6: 0.5, 8: None, 9: None, 10: None, 12: 0.7, 14: None, 15: 0.6}
    assert [meta["best"] for meta in metas] == [None] * 3 + [0.5] * 4 + [0.7] * 3
    assert checkpoint.load(tmp_path / "run" / "best").meta["step"] == 12
    assert result.best == 0.7 and result.scores == training.Scores(0.6, 1.0, 60)


def test_pruning_keeps_the_newest_the_best_and_archived_epochs(index, tmp_path):
    """keep=2 and archive_epochs=2."""
    recipe = tiny(epochs=5, checkpoint=CheckpointConfig(every_steps=1, keep=2, archive_epochs=2))
    run(recipe, tmp_path / "run", index, index)
    evals = [event for event in events(tmp_path / "run") if event["event"] == "eval"]
    best = max(evals, key=lambda event: (event["top1"], -event["step"]))["step"]
    kept = {int(path.name.removeprefix("step-")) for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert kept == {14, 15, 6, 12, best}


# ---- damage


def damage(path: Path, kind: str) -> None:
    content = bytearray(path.read_bytes())
    if kind == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "one bit":
        content[len(content) // 3] ^= 4
        path.write_bytes(content)
    else:
        path.unlink()


@pytest.mark.parametrize("kind", ["truncated", "one bit", "gone"])
@pytest.mark.parametrize("file", ["model.safetensors", "train.safetensors", "meta.json"])
def test_a_damaged_checkpoint_is_skipped(index, tmp_path, capsys, file, kind):
    recipe = tiny(epochs=2, checkpoint=CheckpointConfig(every_steps=1, keep=9))
    run(recipe, tmp_path / "run", index)
    # Copies, because the tensors that safetensors loads are views of the file that is damaged next.
    expected = {name: tensor.clone() for name, tensor in weights(tmp_path / "run").items()}
    damaged = (tmp_path / "run" / "last").resolve()
    if file == "meta.json" and kind == "one bit":
        content = (damaged / file).read_text()
        (damaged / file).write_text(content.replace('"sha256"', '"sha265"'))
    else:
        damage(damaged / file, kind)
    result = run(recipe, tmp_path / "run", index)
    stderr = capsys.readouterr().err
    assert file in stderr and "trying the one before" in stderr and result.steps == 6
    assert [event["step"] for event in events(tmp_path / "run") if event["event"] == "resume"] == [5]
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(tmp_path / "run").items())


def test_a_run_without_an_intact_checkpoint_is_an_error(index, tmp_path):
    run(tiny(epochs=1), tmp_path / "run", index)
    for path in (tmp_path / "run" / "checkpoints").glob("step-*"):
        damage(path / "model.safetensors", "one bit")
    with pytest.raises(UserError, match=r"no checkpoint in \S+ is intact; start over with --resume never"):
        run(tiny(epochs=1), tmp_path / "run", index)


# ---- abandoned checkpoints


def test_later_checkpoints_are_renamed_when_a_run_resumes_from_an_earlier_one(index, tmp_path):
    """A run of 9 steps resumes from step 3. Its later checkpoints are renamed, and no run resumes from them."""
    recipe = tiny(epochs=3, checkpoint=CheckpointConfig(every_steps=1, keep=9))
    run(recipe, tmp_path / "run", index, index)
    folder = tmp_path / "run" / "checkpoints"
    best = checkpoint.find(tmp_path / "run").name
    run(replace(recipe, epochs=3), tmp_path / "run", index, index, resume=str(folder / "step-00000003"))
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(
        [f"step-{step:08}" for step in range(1, 10)] + [f"left0-step-{step:08}" for step in range(4, 10)]
    )
    assert best and checkpoint.find(tmp_path / "run").parent == folder
    # Resuming from another run's checkpoint abandons all of this run's.
    run(recipe, tmp_path / "other", index, index)
    run(recipe, tmp_path / "run", index, index, resume=str(tmp_path / "other" / "checkpoints" / "step-00000008"))
    assert sorted(path.name for path in folder.glob("step-*")) == ["step-00000009"]


def test_damage_does_not_bring_back_abandoned_checkpoints(index, tmp_path):
    """`last` is damaged and skipped, also a second time if the run is killed before it saves again."""
    recipe = tiny(epochs=3, checkpoint=CheckpointConfig(every_steps=1, keep=9))
    run(recipe, tmp_path / "run", index)
    folder = tmp_path / "run" / "checkpoints"
    (tmp_path / "run" / "last").unlink()
    (tmp_path / "run" / "last").symlink_to("checkpoints/step-00000006")
    damage(folder / "step-00000006" / "model.safetensors", "truncated")
    for _ in range(2):
        start = open_run(tmp_path / "run", "auto", "")
        assert start is not None and start.name == "step-00000005"
        assert checkpoint.find(tmp_path / "run" / "last").name == "step-00000005"


# ---- kills

KILLED = '''
"""Save step 1, then step 2 twice. For each n, a child process dies by SIGKILL at the n-th write of step 2's saves."""
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


def kill_point():
    global count
    if armed:
        count += 1
        if count == fatal:
            os.kill(os.getpid(), signal.SIGKILL)


def with_kill_points(function):
    def wrapped(*args, **kwargs):
        kill_point()
        result = function(*args, **kwargs)
        kill_point()
        return result
    return wrapped


def with_kill_inside_file(function):
    def wrapped(tensors, path):
        if armed and count + 1 == fatal:
            Path(path).write_bytes(b"half a file")
        kill_point()
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
    setattr(os, name, with_kill_points(getattr(os, name)))
checkpoint.save_file = with_kill_inside_file(checkpoint.save_file)
Path.write_text = with_kill_points(Path.write_text)
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


def test_a_kill_at_any_write_of_a_save_leaves_an_intact_checkpoint(tmp_path):
    """SIGKILL before and after each call that changes the disk, and in the middle of a file, also while a checkpoint of
    the same step is being replaced."""
    (tmp_path / "killed.py").write_text(KILLED)
    (tmp_path / "runs").mkdir()
    args = [sys.executable, str(tmp_path / "killed.py"), str(tmp_path / "runs")]
    done = subprocess.run(args, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    kills = int(done.stdout)
    for fatal in range(1, kills + 2):
        out = tmp_path / "runs" / f"run{fatal}"
        for path in (newest(out), checkpoint.find(out)):
            assert path is not None
            saved = checkpoint.load(path)
            assert saved.meta["step"] in (1, 2) and (saved.model["weight"] == saved.meta["step"]).all()
    print(f"survived {kills} of {kills} kills")
    assert kills > 30


# ---- locks and signals


def test_two_runs_into_one_folder_and_a_signal(demo_set, tmp_path):
    """The second run is refused while the first one lives. SIGUSR1 makes the first save and exit with 75. The lock of
    a dead process does not count."""
    args = (*LONG, "--data", demo_set / "train", "--out", tmp_path / "run")
    first = start_run(*args)
    await_line(first, "epoch 0")
    stderr = call("run", "--device", "cpu", *args, status=2).stderr
    assert f"another run is writing to {tmp_path / 'run'} (process {first.pid} on " in stderr
    first.send_signal(signal.SIGUSR1)
    _, stderr = first.communicate(timeout=60)
    assert first.returncode == 75 and "stopped by SIGUSR1 after step" in stderr and "Traceback" not in stderr
    second = start_run(*args)
    await_line(second, " of 4000")
    second.kill()
    second.communicate()
    log = events(tmp_path / "run")
    stopped = next(event for event in log if event["event"] == "stopped")
    assert next(event for event in log if event["event"] == "resume")["step"] == stopped["step"]
    (tmp_path / "alias").symlink_to("run")
    with lock(tmp_path / "run"), pytest.raises(UserError, match="another run"), lock(tmp_path / "alias"):
        pass
    (tmp_path / "alias").unlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


SIGNALED = """
import os, signal, sys
from fasttrain.cli.main import main


class SignalOnTorchImport:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGTERM)


if sys.argv.pop(1) == "importing":
    sys.meta_path.insert(0, SignalOnTorchImport())
else:
    from fasttrain import train
    original = train.prepare

    def prepare(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    train.prepare = prepare
main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("moment", "message"),
    [("importing", "stopped by SIGTERM before a step was done"), ("preparing", "stopped by SIGTERM after step 1 of")],
)
def test_a_signal_before_the_first_step(demo_set, tmp_path, moment, message):
    """A signal while torch is imported ends the run at once. While the run is prepared, it does one step and saves."""
    (tmp_path / "signaled.py").write_text(SIGNALED)
    args = [moment, "run", "--device", "cpu", *LONG, "--data", demo_set / "train", "--out", tmp_path / "run"]
    command = [sys.executable, str(tmp_path / "signaled.py"), *map(str, args)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=100, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 75 and message in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_a_signal_to_one_of_two_ranks_stops_both(demo_set, tmp_path):
    """torchrun forwards SIGTERM to all of its ranks. Here only rank 1 gets it, and both stop at the same step."""
    program = tmp_path / "rank.py"
    program.write_text(
        "import os, signal, sys\nfrom fasttrain import train\nfrom fasttrain.cli.main import main\n"
        "original = train.batches\n\n\ndef signaling(*args, **settings):\n"
        "    for count, batch in enumerate(original(*args, **settings)):\n"
        "        if count == 3 and os.environ['RANK'] == '1':\n            os.kill(os.getpid(), signal.SIGTERM)\n"
        "        yield batch\n\n\ntrain.batches = signaling\nmain(sys.argv[1:])\n"
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
    lines = [line for line in done.stderr.splitlines() if "fasttrain: " in line]
    assert done.returncode != 0 and len(lines) == 1 and "after step 4 of 4000, and saved" in lines[0]
    assert "exitcode  : 75" in done.stderr
    meta = json.loads((tmp_path / "run" / "last" / "meta.json").read_text())
    assert meta["step"] == 4 and len(meta["meters"]) == 2
