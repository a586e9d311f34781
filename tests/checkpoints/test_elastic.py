"""Two ranks: stopped and going on bit for bit; going on at another number of ranks; and what may differ knowingly."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import ROOT, call, events, part_of, run, same, tiny

from fasttrain.checkpoints import checkpoint
from fasttrain.checkpoints.resume import check_compatible, run_fingerprint
from fasttrain.config.schema import CheckpointConfig, EmaConfig, MachineConfig, MixConfig, OptimConfig, ResumeConfig
from fasttrain.losses.contrastive import Contrastive
from fasttrain.losses.cross_entropy import CrossEntropy
from fasttrain.losses.triplet import Triplet
from fasttrain.pipelines.plan import Plan
from fasttrain.pipelines.train_loader import batches
from fasttrain.utils.errors import UserError

PROGRAM = """
import os, signal, sys
from fasttrain import train
from fasttrain.cli.main import main
honest, stop = train.batches, int(os.environ.get("STOP", -1))


def watched(plan, index, device, threads, start=0, **settings):
    for count, batch in enumerate(honest(plan, index, device, threads, start, **settings)):
        if start + count // plan.micro_batches == stop and os.environ.get("RANK", "1") == "1":
            os.kill(os.getpid(), signal.SIGUSR1)
        yield batch


train.batches = watched
main(sys.argv[1:])
"""


SMALL = ["--device", "cpu", "--arch", "test_resnet", "--image-size", "32", "--batch-size", "20", "--epochs", "2"]
SMALL += ["--workers", "1"]


def launch(folder: Path, world: int, out: str, *args: object, stop: int = -1) -> subprocess.CompletedProcess:
    (folder / "program.py").write_text(PROGRAM)
    start = [sys.executable]
    if world > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    command = [*start, str(folder / "program.py"), "run", *SMALL, "--out", str(folder / out)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "STOP": str(stop)}
    return subprocess.run([*command, *map(str, args)], capture_output=True, text=True, env=env, timeout=300)


@pytest.fixture(scope="module")
def small(demo_set, tmp_path_factory):
    """60 images in folders: three steps an epoch of 20."""
    folder = tmp_path_factory.mktemp("small")
    for path in part_of(demo_set, 6).paths:
        copy = folder / "data" / Path(path).parent.name / Path(path).name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    return folder / "data"


EVERY_STOP = """
import os, signal, sys
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from helpers import tiny
from fasttrain import train
from fasttrain.checkpoints import run_dir
from fasttrain.config import toml
from fasttrain.config.schema import EmaConfig, InitConfig, MachineConfig
from fasttrain.data.index import scan
from fasttrain.distributed.ranks import ranks
from fasttrain.utils.errors import Stopped
from fasttrain.losses.contrastive import Contrastive
from fasttrain.losses.cross_entropy import CrossEntropy
from fasttrain.losses.mean_teacher import MeanTeacher
from fasttrain.losses.triplet import Triplet
honest, stop = train.batches, -1


def watched(plan, index, device, threads, start=0, **settings):
    for count, batch in enumerate(honest(plan, index, device, threads, start, **settings)):
        if start + count // plan.micro_batches == stop and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGUSR1)
        yield batch


train.batches = watched
recipe = tiny(ema=EmaConfig(0.9), machine=MachineConfig(device="cpu", compile="off", log_steps=2, workers=1))
if sys.argv[3] == "triplet":
    recipe = replace(recipe, losses=(CrossEntropy(0.1), Triplet()), images_per_class=2, micro_batch=2,
                     init=InitConfig(force_scratch=True))
if sys.argv[3] == "mean teacher":
    recipe = replace(recipe, losses=(CrossEntropy(0.1), Contrastive(), MeanTeacher()))
index = scan(sys.argv[2], progress=False)


def run(name, here):
    out = Path(sys.argv[4], name)
    start = here.from_first(lambda: run_dir.open_run(out, "auto", toml.to_toml(recipe)))
    return train.train(recipe, out, index, None, here, start).steps


with ranks("cpu") as here:
    steps = run("whole", here)
    for each in range(steps - 1):
        stop = each
        try:
            run(f"stopped{each}", here)
        except Stopped as stopped:
            assert f"after step {each + 1} of {steps}" in str(stopped), stopped
        else:
            raise AssertionError("it did not stop")
        stop = -1
        assert run(f"stopped{each}", here) == steps
"""


@pytest.mark.parametrize(
    "recipe", ["CutMix", *(pytest.param(name, marks=pytest.mark.slow) for name in ("triplet", "mean teacher"))]
)
def test_two_ranks_stopped_after_any_step_go_on_bit_for_bit(small, tmp_path, recipe):
    """A signal to rank 1 alone makes both finish the step; also with triplet's batches and accumulation."""
    (tmp_path / "every_stop.py").write_text(EVERY_STOP)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    args = [tmp_path / "every_stop.py", ROOT / "tests", small, recipe, tmp_path / "runs"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *map(str, args)], capture_output=True, text=True, env=env, timeout=500)
    assert done.returncode == 0, done.stderr
    stopped = sorted((tmp_path / "runs").glob("stopped*"))
    assert len(stopped) == checkpoint.load(tmp_path / "runs" / "whole" / "last").meta["step"] - 1 >= 5
    for out in stopped:
        same(out, tmp_path / "runs" / "whole")


def batch_hashes(out: Path) -> dict[int, str]:
    return {each["step"]: each["sha256"] for each in events(out) if each["event"] == "batch"}


@pytest.mark.slow  # two cases of the usual suite: two ranks see what one sees, and one goes on where two stopped
def test_another_number_of_ranks_sees_the_same_images(small, tmp_path):
    """2 ranks, then 1, then 2 in micro-batches: the same order and pixels at each step as in one process; the log
    says what has changed."""
    args = ("--data", small, "--set", "machine.hash_batches=true")
    assert launch(tmp_path, 1, "one", *args).returncode == 0
    launch(tmp_path, 2, "many", *args, stop=1)
    launch(tmp_path, 1, "many", *args, stop=3)
    done = launch(tmp_path, 2, "many", *args, "--set", "micro_batch=5")
    assert done.returncode == 0 and "resuming with changes: ranks were 1 and are 2" in done.stderr, done.stderr
    assert (
        batch_hashes(tmp_path / "many") == batch_hashes(tmp_path / "one") and len(batch_hashes(tmp_path / "one")) == 6
    )
    changes = [each["changed"] for each in events(tmp_path / "many") if each["event"] == "resume"]
    assert changes == [["ranks were 2 and are 1"], ["ranks were 1 and are 2"]]


def test_the_hash_of_several_views_does_not_depend_on_micro_batches(demo_set, tmp_path):
    index = part_of(demo_set, 2)
    machine = MachineConfig(device="cpu", compile="off", workers=2, hash_batches=True)
    told = []
    for micro in (0, 5):
        losses = (CrossEntropy(0.1), Contrastive())
        run(tiny(epochs=1, micro_batch=micro, losses=losses, machine=machine), tmp_path / str(micro), index)
        told.append(batch_hashes(tmp_path / str(micro)))
    assert told[0] == told[1] and len(told[0]) == 1


def test_the_hash_is_that_of_the_images_in_their_order(demo_set, tmp_path):
    index = part_of(demo_set, 6)
    recipe = tiny(epochs=1, machine=MachineConfig(device="cpu", compile="off", workers=2, hash_batches=True))
    run(recipe, tmp_path / "run", index)
    images = batches(Plan.of(recipe, index), index, torch.device("cpu"), 1)
    for step, (pixels, numbers) in enumerate(images, 1):
        each = [
            hashlib.sha256(index.ids[n].encode() + b"\0" + p.tobytes()).hexdigest()
            for n, p in zip(numbers.tolist(), pixels.numpy(), strict=True)
        ]
        assert batch_hashes(tmp_path / "run")[step] == hashlib.sha256("".join(each).encode()).hexdigest()


# ---- what may differ


@pytest.fixture(scope="module")
def index(demo_set):
    return part_of(demo_set, 6)


@pytest.fixture
def begun(index, tmp_path):
    """A run of 6 steps, of which the checkpoint of step 3 is the last."""
    run(tiny(checkpoint=CheckpointConfig(keep=9)), tmp_path / "run", index)
    (tmp_path / "run" / "last").unlink()
    (tmp_path / "run" / "last").symlink_to("checkpoints/step-00000003")
    return tmp_path / "run"


CHANGED = tiny(seed=3, optim=OptimConfig(momentum=0.8), mix=MixConfig(cutmix=0.1))


def test_each_difference_is_named_and_what_is_not_allowed_is_refused(index, begun):
    with pytest.raises(UserError, match=r"momentum was 0.9 and is 0.8; mix.cutmix was 0.5 and is 0.1\. Name.*allow="):
        run(replace(CHANGED, resume=ResumeConfig(("seed",))), begun, index)
    with pytest.raises(UserError) as caught:
        run(CHANGED, begun, index)
    assert "seed was 0 and is 3" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("allow", [("seed", "optim.momentum", "mix.cutmix"), ("mix", "optim", "seed")])
def test_what_is_allowed_is_said_and_logged(index, begun, capsys, allow):
    assert run(replace(CHANGED, resume=ResumeConfig(allow)), begun, index).steps == 6
    told = ["seed was 0 and is 3", "optim.momentum was 0.9 and is 0.8", "mix.cutmix was 0.5 and is 0.1"]
    changed = [each["changed"] for each in events(begun) if each["event"] == "resume"]
    assert [sorted(each) for each in changed] == [sorted(told)]
    assert all(line in capsys.readouterr().err for line in told[:1])
    assert "momentum = 0.8" in (begun / "recipe.toml").read_text()


def test_other_images_and_classes(index, begun):
    fewer = replace(index, paths=index.paths[:50], ids=index.ids[:50], labels=index.labels[:50], sizes=index.sizes[:50])
    renamed = replace(index, classes=tuple(f"{each}!" for each in index.classes))
    for other, message in ((fewer, "images differ"), (renamed, "classes differ")):
        with pytest.raises(UserError, match=message):
            run(tiny(), begun, other)
        with pytest.raises(UserError, match=message):
            run(tiny(resume=ResumeConfig(("seed",))), begun, other)
    # 50 images make two steps an epoch: the epoch that is done counts as done, not the number of its steps.
    assert run(tiny(resume=ResumeConfig(("data",))), begun, fewer).steps == 4
    assert [each["step"] for each in events(begun) if each["event"] == "resume"] == [2]


def test_another_batch_size_goes_on_at_the_same_share_of_the_epoch(index, begun):
    result = run(tiny(batch_size=10, resume=ResumeConfig(("batch_size",))), begun, index)
    assert result.steps == 12
    assert [each["step"] for each in events(begun) if each["event"] == "resume"] == [6]


def test_what_is_advised_is_accepted(index, begun):
    """Also for what only one of the two has, such as a loss that came or went."""
    more = tiny(losses=(CrossEntropy(0.1), Triplet()), images_per_class=2, seed=3)
    saved = checkpoint.load(begun / "last")
    theirs = replace(saved, meta=saved.meta | run_fingerprint(more, index))
    for one, ours in ((saved, more), (theirs, tiny())):
        with pytest.raises(UserError) as caught:
            check_compatible(one, run_fingerprint(ours, index), ())
        asked = tuple(json.loads(str(caught.value).split("resume.allow=")[1].rstrip("'")))
        assert {"seed", "losses.triplet.margin"} <= set(asked)
        for allow in (asked, ("losses", "seed", "images_per_class"), ("losses.triplet", "seed", "images_per_class")):
            assert len(check_compatible(one, run_fingerprint(ours, index), allow)) == len(asked)


def test_an_average_may_begin_on_the_way(index, begun):
    assert run(tiny(ema=EmaConfig(0.5), resume=ResumeConfig(("ema",))), begun, index).steps == 6
    assert checkpoint.has_average(checkpoint.load(begun / "last"))


@pytest.mark.parametrize("name", ["sed", "optim.momentun", "machine", "../x", ""])
def test_what_cannot_differ_cannot_be_allowed(index, begun, name):
    with pytest.raises(UserError, match=r"resume.allow: nothing called .* can differ"):
        run(tiny(resume=ResumeConfig((name,))), begun, index)


def test_allowing_is_a_setting(small, tmp_path):
    args = ("--data", small)
    launch(tmp_path, 1, "run", *args, stop=1)
    command = ("run", *SMALL, "--out", tmp_path / "run", *args, "--lr", 0.3)
    assert """--set 'resume.allow=["optim.lr", "optim.lr_batch"]'""" in call(*command, status=2).stderr
    assert "optim.lr was 0.1 and is 0.3" in call(*command, "--set", 'resume.allow=["optim"]').stderr
    assert json.loads((tmp_path / "run" / "last" / "meta.json").read_text())["recipe"]["optim"]["lr"] == 0.3
