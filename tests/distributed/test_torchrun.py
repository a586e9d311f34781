"""Two ranks on CPUs under torchrun: the images of one process, equal weights, one writer, one message on failure."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import call

PROBE = '''
"""Train through the command line. Each rank writes its image indices, pixel hashes and weights to a JSON file."""
import hashlib, json, os, sys
import torch
from fasttrain import prepare, train
from fasttrain.cli.main import main

rank, folder = os.environ.get("RANK", "0"), sys.argv[1]
batch_images = []
original = train.batches

def recording(*args, **settings):
    for batch in original(*args, **settings):
        pixels = batch.pixels.numpy()
        hashes = [hashlib.sha256(image.tobytes()).hexdigest() for image in pixels]
        batch_images.append([[int(number), digest] for number, digest in zip(batch.indices, hashes)])
        yield batch

train.batches = recording
models = []


class RecordedClassifier(prepare.Classifier):
    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        models.append(self)


prepare.Classifier = RecordedClassifier
try:
    main(sys.argv[2:], standalone_mode=False)
finally:
    digest = hashlib.sha256()
    for name, tensor in models[0].state_dict().items() if models else ():
        if "running" not in name:
            digest.update(tensor.numpy().tobytes())
    json.dump({"images": batch_images, "weights": digest.hexdigest()}, open(f"{folder}/rank{rank}.json", "w"))
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
def two_ranks(demo_set, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    done = launch(folder, 2, *SMALL, "--data", demo_set, "--out", folder / "run")
    return folder, done


def report(folder: Path, rank: int) -> dict:
    return json.loads((folder / f"rank{rank}.json").read_text())


def test_two_ranks_load_the_same_images_and_pixels_as_one(two_ranks, demo_set, tmp_path):
    launch(tmp_path / "one", 1, *SMALL, "--data", demo_set / "train", "--out", tmp_path / "run")
    alone = report(tmp_path / "one", 0)["images"]
    ranks = [report(two_ranks[0], rank)["images"] for rank in (0, 1)]
    assert len(alone) == 10
    assert [first + second for first, second in zip(*ranks, strict=True)] == alone


def test_both_ranks_have_the_same_weights_after_ten_steps(two_ranks):
    digests = {report(two_ranks[0], rank)["weights"] for rank in (0, 1)}
    assert len(digests) == 1


def test_only_rank_0_writes_and_prints(two_ranks):
    folder, done = two_ranks
    log = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    assert [event["event"] for event in log].count("start") == 1 and log[0]["world"] == 2
    assert [event["images"] for event in log if event["event"] == "eval"] == [250]
    assert done.stdout.count("run folder:") == 1 and done.stderr.count("no recipe for") == 1


@pytest.mark.slow
def test_triplet_trains_on_two_ranks_as_on_one(demo_set, tmp_path):
    """Triplets are mined over the gathered batch. The network has no BatchNorm, whose statistics would differ."""
    args = ("--arch", "test_convnext", "--loss", "ce+triplet", "--image-size", 32, "--batch-size", 40, "--epochs", 1)
    settings = ("init.force_scratch=true", "mix.cutmix=0", "machine.log_steps=2", "optim.lr=0.02")
    options = [word for setting in settings for word in ("--set", setting)]
    logs = []
    for world in (1, 2):
        out = tmp_path / f"run{world}"
        command = (*args, *options, "--data", demo_set / "train", "--out", out)
        if world == 1:
            call("run", "--device", "cpu", *command)
        else:
            launch(tmp_path / "probe", world, *command)
        lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
        logs.append([event for event in lines if event["event"] == "train"])
    assert len(logs[0]) == len(logs[1]) == 6
    for alone, both in zip(*logs, strict=True):
        for part in ("terms", "stats"):
            assert both[part] == pytest.approx(alone[part], rel=2e-4)
        assert both["stats"].keys() == {"triplet/active", "triplet/d_ap", "triplet/d_an"}


@pytest.fixture
def one_thread():
    """One thread, as the ranks have: with more threads, sums can round differently."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
def test_prediction_with_two_ranks_gives_the_same_probabilities(two_ranks, demo_set, tmp_path, one_thread):
    """Also where a rank has no images."""
    import numpy as np

    (tmp_path / "few").mkdir()
    (tmp_path / "few" / "one.jpg").write_bytes((demo_set / "val" / "disc-stripes-red" / "050.jpg").read_bytes())
    for images in (demo_set / "val", tmp_path / "few"):
        alone, both = (tmp_path / f"{images.name}{world}.npz" for world in (1, 2))
        options = ["predict", two_ranks[0] / "run", "--images", images, "--device", "cpu", "--out"]
        call(*options, alone)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        command += ["-m", "fasttrain", *map(str, options), str(both)]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
        assert done.returncode == 0, done.stderr
        np.testing.assert_array_equal(np.load(alone)["probs"], np.load(both)["probs"])


@pytest.mark.slow
def test_one_rank_resumes_the_run_of_two(two_ranks, demo_set):
    folder, _ = two_ranks
    done = launch(folder, 1, *SMALL, "--data", demo_set, "--out", folder / "run")
    assert "10 steps" in done.stdout


@pytest.mark.slow
def test_an_indivisible_batch_size_is_reported_in_one_line(demo_set, tmp_path):
    args = (*SMALL[:4], "--batch-size", 51, "--data", demo_set, "--out", tmp_path / "run")
    done = launch(tmp_path, 2, *args, check=False)
    lines = [line for line in done.stderr.splitlines() if "fasttrain: " in line]
    assert done.returncode != 0 and len(lines) == 1 and "does not divide among 2 ranks" in lines[0]


def test_a_failure_of_one_rank_ends_all_with_its_message(demo_set, tmp_path):
    """A file is damaged after the scan. Only rank 1 reads it, in the middle of an epoch."""
    import shutil

    from fasttrain import recipes
    from fasttrain.data.scan import scan
    from fasttrain.pipelines.plan import epoch_order

    shutil.copytree(demo_set / "train", tmp_path / "train")
    index = scan(tmp_path / "train")
    assert recipes.for_arch("test_resnet").seed == 0
    damaged = Path(index.paths[epoch_order(0, 0, 500)[4 * 50 + 30]])  # step 4, image 30 of 50: on rank 1
    damaged.write_bytes(damaged.read_bytes()[:700])
    done = launch(tmp_path, 2, *SMALL, "--data", tmp_path / "train", "--out", tmp_path / "run", check=False)
    lines = [line for line in done.stderr.splitlines() if "fasttrain: " in line]
    assert done.returncode != 0
    assert len(lines) == 1 and "rank 1" in lines[0] and str(damaged) in lines[0], done.stderr


OWN_FOLDERS = """
import os, sys
from fasttrain.cli.main import main
main([word.replace("NODE", f"node{os.environ['RANK']}") for word in sys.argv[1:]])
"""


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("train/cross-checks-blue", "rank 1 on .* has another set of classes of the training images than rank 0 on"),
        pytest.param("train/*/001.jpg", "has another set of training images than", marks=pytest.mark.slow),
        pytest.param("val/*/*7.jpg", "has another set of validation images than", marks=pytest.mark.slow),
    ],
)
def test_ranks_that_do_not_see_the_same_images_are_refused(demo_set, tmp_path, change, says):
    """Each rank has folders of its own, as on machines with local copies; in rank 1's, something is renamed."""
    for node in ("node0", "node1"):
        shutil.copytree(demo_set, tmp_path / node)
    victim = sorted((tmp_path / "node1").glob(change))[0]
    victim.rename(victim.with_name(f"other-{victim.name}"))
    if change == "train/cross-checks-blue":
        (tmp_path / "node1/val/cross-checks-blue").rename(tmp_path / "node1/val/other-cross-checks-blue")
    (tmp_path / "folders.py").write_text(OWN_FOLDERS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(tmp_path / "folders.py"), "run", *SMALL, "--device", "cpu", "--data", str(tmp_path / "NODE")]
    command += ["--out", str(tmp_path / "run")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=200)
    lines = [line for line in done.stderr.splitlines() if line.startswith("fasttrain: ")]
    assert done.returncode and len(lines) == 1 and re.search(says, lines[0]), done.stderr


@pytest.mark.slow
def test_balanced_images_are_those_of_one_process(demo_set, tmp_path):
    words = [
        *SMALL,
        "--data",
        demo_set,
        "--set",
        "data.balance=0.7",
        "--set",
        "losses.cross_entropy.logit_adjustment=1",
    ]
    launch(tmp_path / "one", 1, *words, "--out", tmp_path / "one" / "run")
    launch(tmp_path / "two", 2, *words, "--out", tmp_path / "two" / "run")
    alone = [image for batch in report(tmp_path / "one", 0)["images"] for image in batch]
    ranks = [report(tmp_path / "two", rank) for rank in range(2)]
    together = [image for batches in zip(*(rank["images"] for rank in ranks), strict=True) for batch in batches
                for image in batch]  # fmt: skip
    assert together == alone and ranks[0]["weights"] == ranks[1]["weights"]


@pytest.mark.slow
def test_ranks_agree_on_the_length_of_a_run_that_ends_by_time(demo_set, tmp_path):
    words = [word for word in SMALL if word not in ("--epochs", "1")]
    launch(tmp_path / "two", 2, *words, "--data", demo_set, "--budget", "40s", "--out", tmp_path / "two" / "run")
    ranks = [report(tmp_path / "two", rank) for rank in range(2)]
    assert ranks[0]["weights"] == ranks[1]["weights"]
    lines = [json.loads(line) for line in (tmp_path / "two" / "run" / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["event"] == "end" and any(line["event"] == "fitted" for line in lines)
    assert [line["step"] for line in lines if line["event"] == "eval"][-1] == lines[-1]["step"]


@pytest.mark.slow
def test_all_folds_on_two_ranks(demo_set, tmp_path):
    done = launch(tmp_path / "two", 2, *SMALL, "--data", demo_set, "--folds", "2", "--out", tmp_path / "two" / "run")
    assert done.stdout.count("2 folds: top-1") == 1
    assert (tmp_path / "two" / "run" / "out-of-fold.npz").exists()
