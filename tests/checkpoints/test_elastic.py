"""Resuming with two ranks, bit for bit; with another number of ranks; and with allowed changes."""

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
original, stop = train.batches, int(os.environ.get("STOP", -1))


def signaling(plan, index, device, threads, start=0, **settings):
    for count, batch in enumerate(original(plan, index, device, threads, start, **settings)):
        if start + count // plan.micro_batches == stop and os.environ.get("RANK", "1") == "1":
            os.kill(os.getpid(), signal.SIGUSR1)
        yield batch


train.batches = signaling
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
    """A folder of 60 images: three steps of 20 per epoch."""
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
from fasttrain.config.schema import DataConfig, EmaConfig, InitConfig, MachineConfig
from fasttrain.data.scan import scan
from fasttrain.distributed.ranks import ranks
from fasttrain.utils.errors import Stopped
from fasttrain.losses.contrastive import Contrastive
from fasttrain.losses.cross_entropy import CrossEntropy
from fasttrain.losses.mean_teacher import MeanTeacher
from fasttrain.losses.triplet import Triplet
original, stop = train.batches, -1


def signaling(plan, index, device, threads, start=0, **settings):
    for count, batch in enumerate(original(plan, index, device, threads, start, **settings)):
        if start + count // plan.micro_batches == stop and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGUSR1)
        yield batch


train.batches = signaling
recipe = tiny(ema=EmaConfig(0.9), machine=MachineConfig(device="cpu", compile="off", log_steps=2, workers=1))
if sys.argv[3] == "triplet":
    recipe = replace(recipe, losses=(CrossEntropy(0.1), Triplet()), images_per_class=2, micro_batch=2,
                     init=InitConfig(force_scratch=True))
if sys.argv[3] == "truncated files":
    recipe = replace(recipe, data=DataConfig(on_bad="skip"))
if sys.argv[3] == "mean teacher":
    recipe = replace(recipe, losses=(CrossEntropy(0.1), Contrastive(), MeanTeacher()))
index = scan(sys.argv[2], progress=False)


def run(name, this_rank):
    out = Path(sys.argv[4], name)
    start = this_rank.from_first(lambda: run_dir.open_run(out, "auto", toml.to_toml(recipe)))
    return train.train(recipe, out, index, None, this_rank, start).steps


with ranks("cpu") as this_rank:
    steps = run("expected", this_rank)
    for step in range(steps - 1):
        stop = step
        try:
            run(f"stopped{step}", this_rank)
        except Stopped as stopped:
            assert f"after step {step + 1} of {steps}" in str(stopped), stopped
        else:
            raise AssertionError("the run did not stop")
        stop = -1
        assert run(f"stopped{step}", this_rank) == steps
"""


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["CutMix", "triplet", "mean teacher", "truncated files"])
def test_two_ranks_stopped_after_any_step_resume_bit_for_bit(small, tmp_path, recipe):
    """A signal to rank 1 alone makes both ranks finish the step, also with P x K batches and accumulation."""
    if recipe == "truncated files":
        small = truncated(small, tmp_path)
    (tmp_path / "every_stop.py").write_text(EVERY_STOP)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    args = [tmp_path / "every_stop.py", ROOT / "tests", small, recipe, tmp_path / "runs"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *map(str, args)], capture_output=True, text=True, env=env, timeout=500)
    assert done.returncode == 0, done.stderr
    stopped = sorted((tmp_path / "runs").glob("stopped*"))
    assert len(stopped) == checkpoint.load(tmp_path / "runs" / "expected" / "last").meta["step"] - 1 >= 5
    for out in stopped:
        same(out, tmp_path / "runs" / "expected")


def truncated(folder: Path, tmp_path: Path) -> Path:
    """A copy of a folder in which every fourth file lacks its last third: some of its crops can be decoded."""
    shutil.copytree(folder, tmp_path / "truncated")
    for path in sorted((tmp_path / "truncated").rglob("*.jpg"))[::4]:
        os.truncate(path, path.stat().st_size * 2 // 3)
    return tmp_path / "truncated"


def batch_hashes(out: Path) -> dict[int, str]:
    return {event["step"]: event["sha256"] for event in events(out) if event["event"] == "batch"}


@pytest.mark.slow  # test_torchrun.py covers both parts: the images of two ranks, and one rank that resumes their run
@pytest.mark.parametrize("files", ["whole", "truncated"])
def test_another_number_of_ranks_sees_the_same_images(small, tmp_path, files):
    """2 ranks, then 1, then 2 with micro-batches: each step has the images and pixels of a run with one rank. The log
    says what changed."""
    args = ("--data", small, "--set", "machine.hash_batches=true")
    if files == "truncated":
        args = ("--data", truncated(small, tmp_path), "--on-bad", "skip", *args[2:])
    assert launch(tmp_path, 1, "one", *args).returncode == 0
    launch(tmp_path, 2, "changing", *args, stop=1)
    launch(tmp_path, 1, "changing", *args, stop=3)
    done = launch(tmp_path, 2, "changing", *args, "--set", "micro_batch=5")
    assert done.returncode == 0 and "resuming with changes: ranks were 1 and are 2" in done.stderr, done.stderr
    hashes = batch_hashes(tmp_path / "one")
    assert batch_hashes(tmp_path / "changing") == hashes and len(hashes) == 6
    changes = [event["changed"] for event in events(tmp_path / "changing") if event["event"] == "resume"]
    micro_batch = "micro_batch was 0 and is 5: other partners are mixed"
    assert changes == [["ranks were 2 and are 1"], ["ranks were 1 and are 2", micro_batch]]


def test_hashes_of_several_views_do_not_depend_on_micro_batches(demo_set, tmp_path):
    index = part_of(demo_set, 2)
    machine = MachineConfig(device="cpu", compile="off", workers=2, hash_batches=True)
    hashes = []
    for micro_batch in (0, 5):
        losses = (CrossEntropy(0.1), Contrastive())
        run(tiny(epochs=1, micro_batch=micro_batch, losses=losses, machine=machine), tmp_path / str(micro_batch), index)
        hashes.append(batch_hashes(tmp_path / str(micro_batch)))
    assert hashes[0] == hashes[1] and len(hashes[0]) == 1


def test_the_hash_covers_the_images_in_their_order(demo_set, tmp_path):
    index = part_of(demo_set, 6)
    recipe = tiny(epochs=1, machine=MachineConfig(device="cpu", compile="off", workers=2, hash_batches=True))
    run(recipe, tmp_path / "run", index)
    loader = batches(Plan.of(recipe, index), index, torch.device("cpu"), 1)
    for step, (pixels, numbers) in enumerate(loader, 1):
        digests = [
            hashlib.sha256(index.ids[number].encode() + b"\0" + image.tobytes()).hexdigest()
            for number, image in zip(numbers.tolist(), pixels.numpy(), strict=True)
        ]
        assert batch_hashes(tmp_path / "run")[step] == hashlib.sha256("".join(digests).encode()).hexdigest()


# ---- allowed changes


@pytest.fixture(scope="module")
def index(demo_set):
    return part_of(demo_set, 6)


@pytest.fixture
def run_at_step_3(index, tmp_path):
    """A run of 6 steps whose `last` is the checkpoint of step 3."""
    run(tiny(checkpoint=CheckpointConfig(keep=9)), tmp_path / "run", index)
    (tmp_path / "run" / "last").unlink()
    (tmp_path / "run" / "last").symlink_to("checkpoints/step-00000003")
    return tmp_path / "run"


CHANGED = tiny(seed=3, optim=OptimConfig(momentum=0.8), mix=MixConfig(cutmix=0.1))


def test_changes_that_are_not_allowed_are_named_and_refused(index, run_at_step_3):
    with pytest.raises(UserError, match=r"momentum was 0.9 and is 0.8; mix.cutmix was 0.5 and is 0.1\. Name.*allow="):
        run(replace(CHANGED, resume=ResumeConfig(("seed",))), run_at_step_3, index)
    with pytest.raises(UserError) as caught:
        run(CHANGED, run_at_step_3, index)
    assert "seed was 0 and is 3" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("allow", [("seed", "optim.momentum", "mix.cutmix"), ("mix", "optim", "seed")])
def test_allowed_changes_are_printed_and_logged(index, run_at_step_3, capsys, allow):
    assert run(replace(CHANGED, resume=ResumeConfig(allow)), run_at_step_3, index).steps == 6
    expected = ["seed was 0 and is 3", "optim.momentum was 0.9 and is 0.8", "mix.cutmix was 0.5 and is 0.1"]
    logged = [event["changed"] for event in events(run_at_step_3) if event["event"] == "resume"]
    assert [sorted(changes) for changes in logged] == [sorted(expected)]
    printed = capsys.readouterr().err
    assert all(line in printed for line in expected)
    assert "momentum = 0.8" in (run_at_step_3 / "recipe.toml").read_text()


def test_changed_images_and_classes(index, run_at_step_3):
    fewer = replace(index, paths=index.paths[:50], ids=index.ids[:50], labels=index.labels[:50], sizes=index.sizes[:50])
    renamed = replace(index, classes=tuple(f"{name}!" for name in index.classes))
    for other, message in ((fewer, "images differ"), (renamed, "classes differ")):
        with pytest.raises(UserError, match=message):
            run(tiny(), run_at_step_3, other)
        with pytest.raises(UserError, match=message):
            run(tiny(resume=ResumeConfig(("seed",))), run_at_step_3, other)
    # 50 images make two steps per epoch. The run resumes after its first epoch, which is now step 2 instead of 3.
    assert run(tiny(resume=ResumeConfig(("data",))), run_at_step_3, fewer).steps == 4
    assert [event["step"] for event in events(run_at_step_3) if event["event"] == "resume"] == [2]


def test_changed_sizes_are_refused_unless_bad_images_are_skipped(index, run_at_step_3):
    """Crops are planned from sizes. With on_bad=skip, an image that became unreadable has the size 0."""
    sizes = index.sizes.copy()
    sizes[5] = 0
    changed = replace(index, sizes=sizes)
    with pytest.raises(UserError, match="training images have other sizes"):
        run(tiny(), run_at_step_3, changed)
    skip = tiny()
    skip = replace(skip, data=replace(skip.data, on_bad="skip"))
    assert run(skip, run_at_step_3, changed).steps == 6


def test_the_recipe_is_written_again_even_if_a_run_resumes_at_its_start(index, tmp_path):
    """The first of three steps per epoch is the start of an epoch of one step."""
    out = tmp_path / "run"
    short = tiny(checkpoint=CheckpointConfig(every_steps=1, keep=9))
    run(short, out, index)
    start = out / "checkpoints" / "step-00000001"
    run(tiny(batch_size=60, resume=ResumeConfig(("batch_size",))), out, index, resume=str(start))
    assert "batch_size = 60\n" in (out / "recipe.toml").read_text()


def test_another_micro_batch_is_reported(index, run_at_step_3):
    """It changes which images are mixed with each other."""
    assert run(tiny(micro_batch=10), run_at_step_3, index).steps == 6
    (changes,) = [event["changed"] for event in events(run_at_step_3) if event["event"] == "resume"]
    assert changes == ["micro_batch was 0 and is 10: other partners are mixed"]


def test_another_batch_size_resumes_at_the_same_fraction_of_the_epoch(index, run_at_step_3):
    result = run(tiny(batch_size=10, resume=ResumeConfig(("batch_size",))), run_at_step_3, index)
    assert result.steps == 12
    assert [event["step"] for event in events(run_at_step_3) if event["event"] == "resume"] == [6]


def test_the_suggested_setting_allows_all_changes(index, run_at_step_3):
    """Also for settings that only one of the two recipes has, such as those of an added or removed loss."""
    with_triplet = tiny(losses=(CrossEntropy(0.1), Triplet()), images_per_class=2, seed=3)
    saved = checkpoint.load(run_at_step_3 / "last")
    saved_with_triplet = replace(saved, meta=saved.meta | run_fingerprint(with_triplet, index))
    for start, recipe in ((saved, with_triplet), (saved_with_triplet, tiny())):
        fingerprint = run_fingerprint(recipe, index)
        with pytest.raises(UserError) as caught:
            check_compatible(start, fingerprint, ())
        suggested = tuple(json.loads(str(caught.value).split("resume.allow=")[1].rstrip("'")))
        assert {"seed", "losses.triplet.margin"} <= set(suggested)
        for allow in (
            suggested,
            ("losses", "seed", "images_per_class"),
            ("losses.triplet", "seed", "images_per_class"),
        ):
            assert len(check_compatible(start, fingerprint, allow)) == len(suggested)


def test_weight_averaging_can_start_in_a_resumed_run(index, run_at_step_3):
    assert run(tiny(ema=EmaConfig(0.5), resume=ResumeConfig(("ema",))), run_at_step_3, index).steps == 6
    assert checkpoint.has_average(checkpoint.load(run_at_step_3 / "last"))


@pytest.mark.parametrize("name", ["sed", "optim.momentun", "machine", "../x", ""])
def test_unknown_names_in_allow_are_refused(index, run_at_step_3, name):
    with pytest.raises(UserError, match=r"resume.allow: nothing called .* can differ"):
        run(tiny(resume=ResumeConfig((name,))), run_at_step_3, index)


@pytest.mark.slow
def test_the_command_suggests_and_accepts_resume_allow(small, tmp_path):
    args = ("--data", small)
    launch(tmp_path, 1, "run", *args, stop=1)
    command = ("run", *SMALL, "--out", tmp_path / "run", *args, "--lr", 0.3)
    assert """--set 'resume.allow=["optim.lr", "optim.lr_batch"]'""" in call(*command, status=2).stderr
    assert "optim.lr was 0.1 and is 0.3" in call(*command, "--set", 'resume.allow=["optim"]').stderr
    assert json.loads((tmp_path / "run" / "last" / "meta.json").read_text())["recipe"]["optim"]["lr"] == 0.3
