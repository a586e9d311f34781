"""Which folders hold the training images and which the validation images; what can be read in two ways is refused."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import TINY, call, tiny
from helpers import run as train
from PIL import Image

from fasttrain.config.schema import DataConfig
from fasttrain.data.check import examine
from fasttrain.data.open_data import data_line, find_parts, open_data, open_labeled
from fasttrain.data.scan import Limits, scan, scan_unlabeled
from fasttrain.utils.errors import UserError


def fill(*folders: Path, images=("a.jpg",), classes=("ape", "yak")) -> None:
    """Make class folders with one small picture per name."""
    for folder in folders:
        for name in classes:
            (folder / name).mkdir(parents=True, exist_ok=True)
            for image in images:
                Image.new("RGB", (8, 6)).save(folder / name / image)


def opened(*data: Path, val: Path | str = "") -> tuple[int, int | None, str]:
    """How many training and validation images are found, and the line about them."""
    config = DataConfig(train=tuple(map(str, data)), val=str(val))
    train_index, val_index = open_data(config)
    return (
        len(train_index),
        None if val_index is None else len(val_index),
        data_line(find_parts(config), train_index, val_index, config),
    )


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_the_validation_folder_is_found_by_its_usual_names(tmp_path, name):
    fill(tmp_path / "train", tmp_path / "test")
    fill(tmp_path / name, images=("b.jpg", "c.jpg"))
    line = f"2 training images of 2 classes in {tmp_path}/train; 4 validation images in {tmp_path}/{name}; "
    assert opened(tmp_path) == (2, 4, f"{line}not used: {tmp_path}/test")
    assert len(open_labeled(str(tmp_path), ["ape", "yak"], "a run")) == 4
    assert examine(tmp_path, workers=1, progress=False).files == 6


def test_folders_of_images_next_to_the_splits_are_not_used(tmp_path):
    fill(tmp_path / "train", tmp_path / "val")
    fill(tmp_path, classes=("samples", "masks"))
    assert opened(tmp_path)[2].endswith(f"; not used: {tmp_path}/masks, {tmp_path}/samples")


def test_folders_without_splits_have_no_validation_images(tmp_path):
    fill(tmp_path)
    assert opened(tmp_path) == (2, None, f"2 training images of 2 classes in {tmp_path}; no validation images")


def test_the_validation_images_of_several_folders_are_merged(tmp_path):
    for name in ("one", "two"):
        fill(tmp_path / name / "train", tmp_path / name / "val")
    both = (tmp_path / "one", tmp_path / "two")
    assert opened(*both)[:2] == (4, 4)
    assert f"validation images in {both[0]}/val, {both[1]}/val" in opened(*both)[2]
    assert opened(*both, val=both[0] / "val")[:2] == (4, 2)
    # Naming train and val both is how to train on all images.
    assert opened(both[0] / "train", both[0] / "val")[:2] == (4, None)
    assert opened(both[0], both[0] / "val")[:2] == (4, None)


def two_vals(root: Path) -> None:
    fill(root / "val", root / "valid")


def flat_val(root: Path) -> None:
    (root / "val").mkdir()
    Image.new("RGB", (8, 6)).save(root / "val" / "a.jpg")


def empty_val(root: Path) -> None:
    (root / "val").mkdir()


def broken_val(root: Path) -> None:
    (root / "val").symlink_to(root / "nowhere")


def val_file(root: Path) -> None:
    (root / "val").write_text("x")


def a_class_called_train(root: Path) -> None:
    fill(root, classes=("train", "car"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (two_vals, r"both look like validation images; name one of them"),
        (
            flat_val,
            r"val has no class folders: validation images belong in .*val/<class>/\. To train without them, name",
        ),
        (empty_val, r"val has no class folders"),
        (broken_val, r"val is a broken link"),
        (val_file, r"val is a file"),
        (a_class_called_train, r"has train/ with images and folders and, next to it, car/ with images: name"),
    ],
)
def test_what_can_be_read_in_two_ways_is_refused(tmp_path, spoil, message):
    fill(tmp_path / "train")
    spoil(tmp_path)
    for read in (lambda: opened(tmp_path), lambda: open_labeled(str(tmp_path), ["ape", "yak"], "a run")):
        with pytest.raises(UserError, match=message) as error:
            read()
        assert "\n" not in str(error.value)
    assert opened(tmp_path / "train")[:2] == (2, None)
    if spoil is not a_class_called_train:  # where another folder is named, DIR/val does not matter
        fill(tmp_path / "other")
        assert opened(tmp_path, val=tmp_path / "other")[:2] == (2, 2)


def test_links_to_themselves_and_twice_the_same_validation_images_do_no_harm(tmp_path):
    fill(tmp_path / "shared", tmp_path / "one" / "train", tmp_path / "two" / "train")
    for name in ("one", "two"):
        (tmp_path / name / "val").symlink_to(tmp_path / "shared")
        (tmp_path / name / "loop").symlink_to("loop")
    assert opened(tmp_path / "one", tmp_path / "two")[:2] == (4, 2)


def test_hidden_folders_do_not_make_a_class_called_train_a_split(tmp_path):
    fill(tmp_path, classes=("train", "car"))
    (tmp_path / "train" / ".ipynb_checkpoints").mkdir()
    assert opened(tmp_path)[:2] == (2, None)


def test_links_are_followed_only_on_request(tmp_path, capsys):
    """Files, class folders and a whole data set of links, as DVC, git-annex and the caches of hubs make them."""
    fill(tmp_path / "store", images=("a.jpg", "b.jpg"))
    linked = tmp_path / "set"
    (linked / "ape").mkdir(parents=True)
    (linked / "yak").symlink_to(tmp_path / "store" / "yak")
    for name in ("a.jpg", "b.jpg"):
        (linked / "ape" / name).symlink_to(tmp_path / "store" / "ape" / name)
    with pytest.raises(
        UserError, match=r"2 links were not followed, such as .*ape/[ab]\.jpg -> .*store.*: use --links follow"
    ):
        scan(linked, partial=True)
    follow = Limits(links="follow")
    assert scan(linked, limits=follow).ids == ("ape/a.jpg", "ape/b.jpg", "yak/a.jpg", "yak/b.jpg")
    assert len(scan_unlabeled(linked, limits=follow)) == 4
    with pytest.raises(UserError, match="links were not followed"):
        scan_unlabeled(linked)
    (linked / "yak" / "loop").symlink_to(linked)
    assert len(scan_unlabeled(linked, limits=follow)) == 4
    assert examine(linked, workers=1, progress=False, follow_links=True).files == 4
    train_index, _ = open_data(DataConfig(train=(str(linked),), links="follow"))
    assert len(train_index) == 4
    (linked / "ape" / "a.jpg").unlink()
    (linked / "ape" / "b.jpg").unlink()
    (linked / "ape" / "c.jpg").symlink_to(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"1 links are broken, such as .*c\.jpg -> .*nothing"):
        scan(linked, limits=follow)


def test_a_folder_without_images_says_what_it_has(tmp_path):
    fill(tmp_path / "set", classes=("ape",))
    (tmp_path / "set" / "yak").mkdir()
    Image.new("RGB", (8, 6)).save(tmp_path / "set" / "yak" / "a.gif")
    with pytest.raises(UserError, match=r"1 files are ignored, such as .*a\.gif; images end in \.jpg, "):
        scan(tmp_path / "set")
    (tmp_path / "set" / "yak" / "a.gif").unlink()
    fill(tmp_path / "set" / "yak", classes=("deeper",))
    with pytest.raises(UserError, match=r"it has folders, such as .*yak/deeper; images belong in"):
        scan(tmp_path / "set")


def test_names_that_look_alike_are_told_apart(tmp_path, capsys):
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    fill(tmp_path / "a", classes=("ape", composed))
    fill(tmp_path / "b", classes=("ape", decomposed))
    with pytest.raises(UserError, match=r"look alike but are spelled with different characters \('caf\\xe9' and 'cafe"):
        opened(tmp_path / "a", val=tmp_path / "b")
    fill(tmp_path / "a", classes=(decomposed,))
    scan(tmp_path / "a")
    assert "the class folders 'cafe\\u0301' and 'caf\\xe9' look alike" in capsys.readouterr().err


# ---- evaluation on a part of the classes


def test_a_test_set_may_lack_classes_but_not_have_others(tmp_path, capsys):
    classes = ["ape", "cat", "yak"]
    fill(tmp_path / "test", classes=("yak", "ape"))
    (tmp_path / "test" / "cat").mkdir()
    (tmp_path / "test" / "empty").mkdir()
    index = open_labeled(str(tmp_path / "test"), classes, "a run")
    assert (
        index.ids == ("ape/a.jpg", "yak/a.jpg") and index.labels.tolist() == [0, 2] and index.classes == tuple(classes)
    )
    assert f"{tmp_path}/test has no images of 1 of 3 classes: cat" in capsys.readouterr().err
    fill(tmp_path / "test", classes=("dog",))
    with pytest.raises(UserError, match=r"class 'dog' is in .*test but not in a run"):
        open_labeled(str(tmp_path / "test"), classes, "a run")


def test_eval_scores_the_classes_that_are_there(demo_set, tmp_path):
    """Top-1 is that of the same images in an evaluation of all classes."""
    train(tiny(epochs=1), tmp_path / "run", scan(demo_set / "train"))
    names = sorted(path.name for path in (demo_set / "val").iterdir())
    for name in names[:3]:
        shutil.copytree(demo_set / "val" / name, tmp_path / "test" / name)
    probabilities = {}
    for name, data in (("all", demo_set / "val"), ("some", tmp_path / "test")):
        args = ("eval", tmp_path / "run", "--device", "cpu", "--data", data, "--out", tmp_path / f"{name}.npz")
        result = call(*args)
        with np.load(tmp_path / f"{name}.npz") as saved:
            probabilities[name] = dict(zip(saved["ids"].tolist(), saved["probs"], strict=True))
            labels = dict(zip(saved["ids"].tolist(), saved["labels"].tolist(), strict=True))
    assert f"no images of 7 of 10 classes: {', '.join(names[3:8])}, …" in result.stderr
    some = probabilities["some"]
    assert len(some) == 75 and all(np.allclose(some[id_], probabilities["all"][id_], atol=1e-5) for id_ in some)
    top1 = np.mean([probs.argmax() == labels[id_] for id_, probs in some.items()])
    assert f"top-1 {top1:.2%}" in result.stdout


def test_the_line_about_the_images_is_in_the_banner_and_the_dry_run(demo_set, tmp_path):
    args = ("run", *TINY, "--data", demo_set, "--epochs", 1, "--out", tmp_path / "run", "--links", "follow")
    line = f"500 training images of 10 classes in {demo_set}/train; 250 validation images in {demo_set}/val"
    assert line in call(*args, "--dry-run").stdout
    assert line in call(*args).stderr


def test_val_may_name_a_folder_that_holds_train_and_val(tmp_path, demo_set):
    root = tmp_path / "set"
    root.mkdir()
    for name in ("train", "val"):
        (root / name).symlink_to(demo_set / name)
    parts = find_parts(DataConfig(train=(str(demo_set / "train"),), val=str(root)))
    assert [str(part.path) for part in parts.val] == [str(root / "val")]


def test_class_folders_that_differ_in_capitals_are_named(tmp_path, demo_set, capsys):
    shutil.copytree(demo_set / "val", tmp_path / "set")
    name = next((tmp_path / "set").iterdir()).name
    shutil.copytree(tmp_path / "set" / name, tmp_path / "set" / name.upper())
    scan(tmp_path / "set")
    assert "look alike" in capsys.readouterr().err
