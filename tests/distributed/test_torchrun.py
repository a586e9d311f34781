"""Two ranks on CPUs under torchrun: the same data and weights as one process, one writer, one message on failure."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import call

PROBE = '''
"""Train through the command line and write down, on each rank, what came in and what came out."""
import hashlib, json, os, sys
import torch
from fasttrain import prepare, train
from fasttrain.cli.main import main

rank, folder = os.environ.get("RANK", "0"), sys.argv[1]
seen = []
honest = train.batches

def watched(*args, **settings):
    for batch in honest(*args, **settings):
        pixels = batch.pixels.numpy()
        seen.append([[int(n), hashlib.sha256(p.tobytes()).hexdigest()] for n, p in zip(batch.numbers, pixels)])
        yield batch

train.batches = watched
models = []


class Kept(prepare.Classifier):
    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        models.append(self)


prepare.Classifier = Kept
try:
    main(sys.argv[2:], standalone_mode=False)
finally:
    digest = hashlib.sha256()
    for name, each in models[0].state_dict().items() if models else ():
        if "running" not in name:
            digest.update(each.numpy().tobytes())
    json.dump({"seen": seen, "weights": digest.hexdigest()}, open(f"{folder}/rank{rank}.json", "w"))
'''


def launch(folder: Path, world: int, *args: object, check=True) -> subprocess.CompletedProcess:
    folder.mkdir(exist_ok=True)
    (folder / "probe.py").write_text(PROBE)
    start = [sys.executable]
    if world > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    command = [*start, str(folder / "probe.py"), str(folder), "run", "--device", "cpu", *map(str, args)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert not check or done.returncode == 0, done.stderr
    return done


SMALL = ("--arch", "test_resnet", "--image-size", "32", "--batch-size", "50", "--epochs", "1")


@pytest.fixture(scope="module")
def two(demo_set, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    done = launch(folder, 2, *SMALL, "--data", demo_set, "--out", folder / "run")
    return folder, done


def report(folder: Path, rank: int) -> dict:
    return json.loads((folder / f"rank{rank}.json").read_text())


def test_two_ranks_take_the_same_images_and_pixels_as_one(two, demo_set, tmp_path):
    launch(tmp_path / "one", 1, *SMALL, "--data", demo_set / "train", "--out", tmp_path / "run")
    alone = report(tmp_path / "one", 0)["seen"]
    ranks = [report(two[0], rank)["seen"] for rank in (0, 1)]
    assert len(alone) == 10
    assert [first + second for first, second in zip(*ranks, strict=True)] == alone


def test_both_ranks_have_the_same_weights_after_ten_steps(two):
    digests = {report(two[0], rank)["weights"] for rank in (0, 1)}
    assert len(digests) == 1


def test_one_rank_writes_and_speaks(two):
    folder, done = two
    log = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    assert [each["event"] for each in log].count("start") == 1 and log[0]["world"] == 2
    assert [each["images"] for each in log if each["event"] == "eval"] == [250]
    assert done.stdout.count("run folder:") == 1 and done.stderr.count("has no report recipe") == 1


def test_triplet_trains_at_two_ranks_as_at_one(demo_set, tmp_path):
    """Mined over the gathered batch, in the whole loop; a network without BatchNorm, whose batches would differ."""
    args = ("--arch", "test_convnext", "--loss", "ce+triplet", "--image-size", 32, "--batch-size", 40, "--epochs", 1)
    settings = ("init.force_scratch=true", "mix.cutmix=0", "machine.log_steps=2", "optim.lr=0.02")
    options = [each for setting in settings for each in ("--set", setting)]
    logs = []
    for world in (1, 2):
        out = tmp_path / f"run{world}"
        command = (*args, *options, "--data", demo_set / "train", "--out", out)
        if world == 1:
            call("run", "--device", "cpu", *command)
        else:
            launch(tmp_path / "probe", world, *command)
        lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
        logs.append([each for each in lines if each["event"] == "train"])
    assert len(logs[0]) == len(logs[1]) == 6
    for alone, both in zip(*logs, strict=True):
        for part in ("terms", "stats"):
            assert both[part] == pytest.approx(alone[part], rel=2e-4)
        assert both["stats"].keys() == {"triplet/active", "triplet/d_ap", "triplet/d_an"}


@pytest.fixture
def one_thread():
    """As ranks in processes of their own have; more may round otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_evaluation_at_any_number_of_ranks_gives_the_same_probabilities(two, demo_set, tmp_path, one_thread):
    """Also where a rank has no image at all."""
    import numpy as np

    (tmp_path / "few").mkdir()
    (tmp_path / "few" / "one.jpg").write_bytes((demo_set / "val" / "disc-stripes-red" / "050.jpg").read_bytes())
    for images in (demo_set / "val", tmp_path / "few"):
        alone, both = (tmp_path / f"{images.name}{world}.npz" for world in (1, 2))
        options = ["predict", two[0] / "run", "--images", images, "--device", "cpu", "--out"]
        call(*options, alone)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        command += ["-m", "fasttrain", *map(str, options), str(both)]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
        assert done.returncode == 0, done.stderr
        np.testing.assert_array_equal(np.load(alone)["probs"], np.load(both)["probs"])


def test_the_run_goes_on_with_one_rank(two, demo_set):
    """The checkpoint of two ranks is that of any number."""
    folder, _ = two
    done = launch(folder, 1, *SMALL, "--data", demo_set, "--out", folder / "run")
    assert "10 steps" in done.stdout


def test_a_batch_that_does_not_divide_is_one_line(demo_set, tmp_path):
    args = (*SMALL[:4], "--batch-size", 51, "--data", demo_set, "--out", tmp_path / "run")
    done = launch(tmp_path, 2, *args, check=False)
    said = [line for line in done.stderr.splitlines() if "fasttrain: " in line]
    assert done.returncode != 0 and len(said) == 1 and "does not divide among 2 ranks" in said[0]


def test_one_ranks_failure_ends_all_with_its_message(demo_set, tmp_path):
    """A file that only rank 1 meets, in the middle of an epoch, breaks after the scan."""
    import shutil

    from fasttrain import recipes
    from fasttrain.data.index import scan
    from fasttrain.pipelines.plan import epoch_order

    shutil.copytree(demo_set / "train", tmp_path / "train")
    index = scan(tmp_path / "train")
    assert recipes.for_arch("test_resnet").seed == 0
    victim = Path(index.paths[epoch_order(0, 0, 500)[4 * 50 + 30]])  # step 4, image 30 of 50: rank 1's
    victim.write_bytes(victim.read_bytes()[:700])
    done = launch(tmp_path, 2, *SMALL, "--data", tmp_path / "train", "--out", tmp_path / "run", check=False)
    said = [line for line in done.stderr.splitlines() if "fasttrain: " in line]
    assert done.returncode != 0
    assert len(said) == 1 and "rank 1" in said[0] and str(victim) in said[0], done.stderr
