"""Training with images that cannot be decoded: another image of the class replaces each, and each skip is reported."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import broken_files, events, run, tiny
from PIL import Image

from fasttrain.config.schema import AugmentConfig, DataConfig
from fasttrain.data.check import BAD
from fasttrain.data.decode_check import Task, check_files
from fasttrain.data.index import Index
from fasttrain.data.open_data import open_data
from fasttrain.data.scan import scan as strict_scan
from fasttrain.pipelines.decode_errors import Skip, content_problem
from fasttrain.pipelines.eval_loader import EvalLoader
from fasttrain.pipelines.plan import Plan
from fasttrain.pipelines.train_loader import batches
from fasttrain.pipelines.views import views_by_name
from fasttrain.utils.errors import RunError, UserError


@pytest.fixture
def folder(demo_set, tmp_path) -> Path:
    """60 images, six per class."""
    for cls in sorted((demo_set / "train").iterdir()):
        (tmp_path / "set" / cls.name).mkdir(parents=True)
        for path in sorted(cls.iterdir())[:6]:
            shutil.copy(path, tmp_path / "set" / cls.name)
    return tmp_path / "set"


def scan(folder: Path) -> Index:
    return open_data(DataConfig(train=(str(folder),), on_bad="skip"))[0]


def plan_of(index, **changes) -> Plan:
    return Plan.of(tiny(batch_size=6, epochs=2, augment=AugmentConfig(autoaugment="none"), **changes), index)


@pytest.mark.parametrize(
    ("when", "kind"),
    [("before the scan", kind) for kind in broken_files()]
    + [("after the scan", kind) for kind in (*broken_files(), "missing", "smaller")],
)
def test_another_image_of_the_class_replaces_a_bad_one(folder, kind, when):
    """Images 7 and 8 are neighbors in a class; image 9 replaces both everywhere."""
    index = scan(folder)
    plan = plan_of(index)
    good = [
        (batch.indices.numpy().copy(), batch.pixels.numpy().copy())
        for batch in batches(plan, index, torch.device("cpu"), 1)
    ]
    for number in (7, 8):
        if kind == "missing":
            Path(index.paths[number]).unlink()
        elif kind == "smaller":  # a valid image, but the planned crops are outside it
            Image.new("RGB", (8, 8)).save(index.paths[number])
        else:
            Path(index.paths[number]).write_bytes(broken_files()[kind])
    if when == "before the scan":
        index = scan(folder)
    skips: list[Skip] = []
    replaced = list(batches(plan, index, torch.device("cpu"), 1, on_skip=skips.append))
    assert sorted(skip.path for skip in skips) == [index.paths[7], index.paths[8]]
    assert {skip.substitute for skip in skips} == {index.paths[9]} and all(skip.reason for skip in skips)
    assert kind != "smaller" or "it has 8 x 8 pixels, but had" in skips[0].reason
    assert index.labels[7] == index.labels[8] == index.labels[9]
    assert len(replaced) == len(good) == 20
    pixels_of_9: dict[int, np.ndarray] = {}
    for step, (indices, pixels) in enumerate(good):
        for row in np.flatnonzero(indices == 9):
            pixels_of_9[step // 10] = pixels[row]
    for step, (batch, (planned, pixels)) in enumerate(zip(replaced, good, strict=True)):
        expected = np.where((planned == 7) | (planned == 8), 9, planned)
        np.testing.assert_array_equal(batch.indices.numpy(), expected)
        for row, number in enumerate(planned.tolist()):
            expected_pixels = pixels_of_9[step // 10] if number in (7, 8) else pixels[row]
            np.testing.assert_array_equal(batch.pixels[row].numpy(), expected_pixels)


@pytest.mark.parametrize("kind", broken_files())
def test_the_data_check_agrees(tmp_path, kind):
    (tmp_path / kind).write_bytes(broken_files()[kind])
    assert content_problem(np.fromfile(tmp_path / kind, np.uint8))
    ((notes, _),) = check_files([Task(str(tmp_path / kind))])
    assert notes[-1][0] in BAD and "DALI decodes it" not in notes[-1][1]


def test_a_large_truncated_bmp_does_not_crash(tmp_path):
    """A decoder that reads past the end of the file would read outside the process's memory here."""
    victim = tmp_path / "large.bmp"
    Image.new("RGB", (4000, 4000)).save(victim)
    os.truncate(victim, 1000)
    code = "import sys, numpy; from fasttrain.pipelines.decode_errors import content_problem as problem; "
    code += "print(problem(numpy.fromfile(sys.argv[1], numpy.uint8)))"
    result = subprocess.run([sys.executable, "-c", code, victim], capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout == "it is damaged, or not an image that DALI can read\n"


def test_the_first_image_of_a_class_replaces_the_last(folder):
    index = scan(folder)
    Path(index.paths[11]).write_bytes(b"")
    skips: list[Skip] = []
    list(batches(plan_of(index), index, torch.device("cpu"), 1, on_skip=skips.append))
    assert skips == [Skip(index.paths[11], "the file is empty", index.paths[6])]


def truncate(path: str, share: float) -> None:
    """Keep the first part of a file; some crops of a JPEG can still be decoded."""
    os.truncate(path, int(os.path.getsize(path) * share))


def test_a_truncated_image_is_used_or_replaced_by_its_crop_at_each_step(folder):
    """Whether it can be decoded depends on the crop, so what a step uses must not depend on the steps before it, on
    the rank or on the micro-batch."""
    index = scan(folder)
    for number in (2, 7, 8, 21, 40):
        truncate(index.paths[number], 0.7)
    cpu, steps = torch.device("cpu"), range(20)
    plan = plan_of(index)

    def images_of(plan: Plan, **settings) -> list[tuple[list[int], bytes]]:
        stream = batches(plan, index, cpu, 1, on_skip=lambda skip: None, **settings)
        return [(batch.indices.tolist(), batch.pixels.numpy().tobytes()) for batch in stream]

    whole = images_of(plan)
    planned = np.array([plan.images(step, 0) for step in steps])
    used = np.array([indices for indices, _ in whole])
    outcomes = [set((used == planned)[planned == number].tolist()) for number in (2, 7, 8, 21, 40)]
    assert {True, False} in outcomes, "one image should be used at one step and replaced at another"
    for start in (3, 7, 10, 11, 15, 19):
        assert images_of(plan, start_step=start) == whole[start:], start
    shares = [images_of(replace(plan, world=2, micro_batch=3, rank=rank)) for rank in (0, 1)]
    assert [(a[0] + b[0], a[1] + b[1]) for a, b in zip(*shares, strict=True)] == whole


def test_a_file_that_cannot_be_read_ends_the_run_with_its_cause(folder):
    """The system's error says nothing about the image, so no other image replaces it."""
    index = scan(folder)
    Path(index.paths[8]).unlink()
    Path(index.paths[8]).mkdir()
    with pytest.raises(RunError, match=f"cannot read {index.paths[8]}: Is a directory"):
        list(batches(plan_of(index), index, torch.device("cpu"), 1, on_skip=lambda skip: None))


def test_a_class_without_a_good_image_is_an_error(folder):
    index = scan(folder)
    for number in range(6, 12):
        Path(index.paths[number]).write_bytes(b"")
    with pytest.raises(RunError, match=rf"no image of class '{index.classes[1]}' can be decoded"):
        list(batches(plan_of(index), index, torch.device("cpu"), 1, on_skip=lambda skip: None))


def test_a_run_logs_each_bad_file_once_and_resumes_exactly(folder, tmp_path, monkeypatch):
    for number in (3, 20, 41):
        victim = Path(scan(folder).paths[number])
        victim.write_bytes(victim.read_bytes()[:600] if number != 20 else b"this is not a picture")
    recipe = tiny(epochs=2, data=DataConfig(train=(str(folder),), on_bad="skip"))
    index = scan(folder)
    run(recipe, tmp_path / "uninterrupted", index)
    skips = [event for event in events(tmp_path / "uninterrupted") if event["event"] == "skip"]
    assert sorted(skip["path"] for skip in skips) == [index.paths[number] for number in (3, 20, 41)]
    assert all(
        skip["instead"].rsplit("/", 2)[1] == skip["path"].rsplit("/", 2)[1] and skip["rank"] == 0 for skip in skips
    )

    from helpers import Stop, fail_at, weights

    with monkeypatch.context() as patch:
        fail_at(patch, 3)
        with pytest.raises(Stop):
            run(recipe, tmp_path / "stopped", index)
    run(recipe, tmp_path / "stopped", index)
    ours, theirs = weights(tmp_path / "stopped"), weights(tmp_path / "uninterrupted")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_bad_file_ends_the_run_unless_on_bad_is_skip(folder, tmp_path):
    index = scan(folder)
    recipe = tiny(epochs=2, data=DataConfig(train=(str(folder),)))
    victim = Path(index.paths[5])
    victim.write_bytes(victim.read_bytes()[:600])
    with pytest.raises(RunError, match=str(victim)):
        run(recipe, tmp_path / "run", index)
    result = run(replace(recipe, data=replace(recipe.data, on_bad="skip")), tmp_path / "run", index)
    assert result.steps == 6


def test_validation_never_skips(folder):
    index = scan(folder)
    Path(index.paths[0]).write_bytes(b"this is not a picture")
    shutil.copytree(folder, folder.parent / "val")
    with pytest.raises(UserError, match="cannot use the image"):
        open_data(DataConfig(train=(str(folder),), val=str(folder.parent / "val"), on_bad="skip"))
    with pytest.raises(UserError, match="cannot use the image"):
        strict_scan(folder)


def test_run_has_the_option(folder, tmp_path):
    from helpers import TINY, call

    victim = sorted(folder.rglob("*.jpg"))[13]
    victim.write_bytes(b"this is not a picture")
    args = [
        "run",
        *TINY[:4],
        "--batch-size",
        20,
        "--device",
        "cpu",
        "--data",
        folder,
        "--epochs",
        1,
        "--out",
        tmp_path / "o",
    ]
    assert "cannot use the image" in call(*args, status=2).stderr
    result = call(*args, "--on-bad", "skip")
    assert f"skipping {victim}: it has no header of an image; instead: " in result.stderr
    log = [json.loads(line) for line in (tmp_path / "o" / "log.jsonl").read_text().splitlines()]
    assert [event["path"] for event in log if event["event"] == "skip"] == [str(victim)]


@pytest.mark.parametrize("on_bad", ["stop", "skip"])
def test_a_valid_image_of_another_size_is_not_used(demo_set, tmp_path, on_bad):
    """A larger image replaces one after the scan: the planned crop fits, but it was planned for another image."""
    shutil.copytree(demo_set / "train", tmp_path / "images")
    index = scan(tmp_path / "images")
    plan = plan_of(index)
    victim = index.paths[plan.images(1, 0)[3]]
    with Image.open(victim) as image:
        larger = image.resize((image.width + 100, image.height + 100))
    larger.save(victim)
    skips: list[Skip] = []
    on_skip = skips.append if on_bad == "skip" else None
    stream = batches(plan, index, torch.device("cpu"), 1, stop_step=3, on_skip=on_skip)
    if on_bad == "skip":
        assert len(list(stream)) == 3 and [skip.path for skip in skips] == [victim]
        return
    with pytest.raises(RunError, match=f"cannot decode {victim}: it has .* pixels, but had"):
        list(stream)
    views = views_by_name("center", 32)
    with pytest.raises(RunError, match=f"cannot decode {victim}: it has .* pixels, but had"):
        list(EvalLoader(index, views, 50, torch.device("cpu"), 1))


MANY_FAILURES = """
import sys
from dataclasses import replace
from pathlib import Path
import torch
from fasttrain import recipes
from fasttrain.data.scan import scan
from fasttrain.pipelines.eval_loader import EvalLoader
from fasttrain.pipelines.plan import Plan
from fasttrain.pipelines.train_loader import batches
from fasttrain.pipelines.views import views_by_name
from fasttrain.utils.errors import RunError

index = scan(sys.argv[1], progress=False)
recipe = replace(recipes.for_arch("resnet18"), image_size=32, batch_size=50, epochs=1)
plan, cpu = Plan.of(recipe, index), torch.device("cpu")
Path(index.paths[plan.images(2, 0)[25]]).write_text("not an image")
for _ in range(4):
    skips = []
    assert sum(len(each.indices) for each in batches(plan, index, cpu, 2, 0, 5, on_skip=skips.append)) == 250
    assert len(skips) == 1
    try:
        list(EvalLoader(index, views_by_name("center", 32), 50, cpu, 2))
    except RunError:
        continue
    raise AssertionError("evaluation used a file that is not an image")
"""


def test_a_file_that_is_not_an_image_does_not_crash_the_decoder(demo_set, tmp_path):
    """In a process of its own, several times: DALI's decoder alone crashes in one of two such batches."""
    shutil.copytree(demo_set / "train", tmp_path / "images")
    command = [sys.executable, "-c", MANY_FAILURES, str(tmp_path / "images")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
