"""Training over images that cannot be decoded: another of the class takes the place, every skip is told."""

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
from fasttrain.data import index as dataset
from fasttrain.data.check import BAD
from fasttrain.data.decode_check import read
from fasttrain.pipelines.decode_errors import Skip, decode_problem
from fasttrain.pipelines.plan import Plan
from fasttrain.pipelines.train_loader import batches
from fasttrain.utils.errors import RunError, UserError


@pytest.fixture
def folder(demo_set, tmp_path) -> Path:
    """60 images, six of each class."""
    for cls in sorted((demo_set / "train").iterdir()):
        (tmp_path / "set" / cls.name).mkdir(parents=True)
        for path in sorted(cls.iterdir())[:6]:
            shutil.copy(path, tmp_path / "set" / cls.name)
    return tmp_path / "set"


def scan(folder: Path) -> dataset.Index:
    return dataset.open_data(DataConfig(train=(str(folder),), on_bad="skip"))[0]


def plan_of(index, **changes) -> Plan:
    return Plan.of(tiny(batch_size=6, epochs=2, augment=AugmentConfig(autoaugment="none"), **changes), index)


@pytest.mark.parametrize("kind", [*broken_files(), "missing", "smaller"])
@pytest.mark.parametrize("when", ["before the scan", "after the scan"])
def test_another_image_of_the_class_takes_the_place(folder, kind, when):
    """Images 7 and 8, next to each other in a class: the ninth stands in for both, wherever they come."""
    if kind in ("missing", "smaller") and when == "before the scan":
        return
    index = scan(folder)
    whole = plan_of(index)
    good = [
        (each.numbers.numpy().copy(), each.pixels.numpy().copy())
        for each in batches(whole, index, torch.device("cpu"), 1)
    ]
    for number in (7, 8):
        if kind == "missing":
            Path(index.paths[number]).unlink()
        elif kind == "smaller":  # a sound image, but the crops that were planned are outside it
            Image.new("RGB", (8, 8)).save(index.paths[number])
        else:
            Path(index.paths[number]).write_bytes(broken_files()[kind])
    if when == "before the scan":
        index = scan(folder)
    told: list[Skip] = []
    found = list(batches(whole, index, torch.device("cpu"), 1, on_skip=told.append))
    assert sorted(each.path for each in told) == [index.paths[7], index.paths[8]]
    assert {each.substitute for each in told} == {index.paths[9]} and all(each.reason for each in told)
    assert index.labels[7] == index.labels[8] == index.labels[9]
    assert len(found) == len(good) == 20
    pixels_of_9: dict[int, np.ndarray] = {}
    for step, (numbers, pixels) in enumerate(good):
        for place in np.flatnonzero(numbers == 9):
            pixels_of_9[step // 10] = pixels[place]
    for step, (batch, (planned, pixels)) in enumerate(zip(found, good, strict=True)):
        expected = np.where((planned == 7) | (planned == 8), 9, planned)
        np.testing.assert_array_equal(batch.numbers.numpy(), expected)
        for at, number in enumerate(planned.tolist()):
            same = pixels_of_9[step // 10] if number in (7, 8) else pixels[at]
            np.testing.assert_array_equal(batch.pixels[at].numpy(), same)


@pytest.mark.parametrize("kind", broken_files())
def test_the_data_check_agrees(tmp_path, kind):
    (tmp_path / kind).write_bytes(broken_files()[kind])
    assert decode_problem(str(tmp_path / kind))
    ((notes, _),) = read([(str(tmp_path / kind), False)])
    assert notes[-1][0] in BAD and "DALI decodes it" not in notes[-1][1]


def test_a_large_truncated_bmp_does_not_crash(tmp_path):
    """A decoder that reads past the end of the file reads outside the process's memory here."""
    victim = tmp_path / "large.bmp"
    Image.new("RGB", (4000, 4000)).save(victim)
    os.truncate(victim, 1000)
    code = "import sys; from fasttrain.pipelines import decode_errors; print(decode_errors.decode_problem(sys.argv[1]))"
    ran = subprocess.run([sys.executable, "-c", code, victim], capture_output=True, text=True)
    assert ran.returncode == 0 and ran.stdout == "it is damaged, or no image that DALI reads\n"


def test_the_last_image_of_a_class_is_followed_by_its_first(folder):
    index = scan(folder)
    Path(index.paths[11]).write_bytes(b"")
    told: list[Skip] = []
    list(batches(plan_of(index), index, torch.device("cpu"), 1, on_skip=told.append))
    assert told == [Skip(index.paths[11], "the file is empty", index.paths[6])]


def test_a_class_without_a_good_image_ends_the_run(folder):
    index = scan(folder)
    for number in range(6, 12):
        Path(index.paths[number]).write_bytes(b"")
    with pytest.raises(RunError, match=rf"no image of class '{index.classes[1]}' can be decoded"):
        list(batches(plan_of(index), index, torch.device("cpu"), 1, on_skip=lambda skip: None))


def test_a_run_over_bad_files_logs_each_once_and_goes_on_exactly(folder, tmp_path, monkeypatch):
    for number in (3, 20, 41):
        victim = Path(scan(folder).paths[number])
        victim.write_bytes(victim.read_bytes()[:600] if number != 20 else b"this is not a picture")
    recipe = tiny(epochs=2, data=DataConfig(train=(str(folder),), on_bad="skip"))
    index = scan(folder)
    run(recipe, tmp_path / "whole", index)
    skips = [each for each in events(tmp_path / "whole") if each["event"] == "skip"]
    assert sorted(each["path"] for each in skips) == [index.paths[number] for number in (3, 20, 41)]
    assert all(
        each["instead"].rsplit("/", 2)[1] == each["path"].rsplit("/", 2)[1] and each["rank"] == 0 for each in skips
    )

    from helpers import Stop, fail_at, weights

    with monkeypatch.context() as patch:
        fail_at(patch, 3)
        with pytest.raises(Stop):
            run(recipe, tmp_path / "stopped", index)
    run(recipe, tmp_path / "stopped", index)
    ours, theirs = weights(tmp_path / "stopped"), weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_without_the_option_a_bad_file_ends_the_run_and_the_option_lets_it_go_on(folder, tmp_path):
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
    with pytest.raises(UserError, match="not a readable image"):
        dataset.open_data(DataConfig(train=(str(folder),), val=str(folder.parent / "val"), on_bad="skip"))
    with pytest.raises(UserError, match="not a readable image"):
        dataset.scan(folder)


def test_it_is_an_option_of_run(folder, tmp_path):
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
    assert "not a readable image" in call(*args, status=2).stderr
    told = call(*args, "--on-bad", "skip")
    assert f"skipping {victim}: its header cannot be read; instead: " in told.stderr
    log = [json.loads(line) for line in (tmp_path / "o" / "log.jsonl").read_text().splitlines()]
    assert [each["path"] for each in log if each["event"] == "skip"] == [str(victim)]
