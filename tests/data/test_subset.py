"""Cuts of folders of class folders."""

import shutil

import pytest
from PIL import Image

from fasttrain.data import subset
from fasttrain.data.index import scan
from fasttrain.data.place_files import Placed
from fasttrain.utils.errors import UserError

COUNTS = {"ape": 9, "bee": 7, "cow": 12}


@pytest.fixture
def photos_of_animals(tmp_path):
    root = tmp_path / "set"
    for label, (name, count) in enumerate(COUNTS.items()):
        (root / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (4, 4), (label, number, 0)).save(root / name / f"{number}.png")
    return root


def make(folder, out, per_class=4, val_per_class=3, seed=0, link=False):
    placed = subset.make(folder, per_class, val_per_class, out, seed, link, progress=False)
    return placed, {split: set(scan(out / split).ids) for split in ("train", "val")}


@pytest.mark.parametrize("link", [False, True], ids=["copy", "link"])
def test_every_class_gives_as_many_images_and_none_twice(photos_of_animals, tmp_path, link):
    placed, ids = make(photos_of_animals, tmp_path / "out", link=link)
    assert placed == Placed({"train": 12, "val": 9}, 21, True)
    for split, count in (("train", 4), ("val", 3)):
        assert [sum(each.startswith(name) for each in ids[split]) for name in COUNTS] == [count] * 3
        for each in ids[split]:
            ours, theirs = tmp_path / "out" / split / each, photos_of_animals / each
            assert ours.read_bytes() == theirs.read_bytes() and ours.samefile(theirs) == link
    assert not ids["train"] & ids["val"]


def test_the_draw_depends_on_seed_and_names_only(photos_of_animals, tmp_path):
    _, first = make(photos_of_animals, tmp_path / "first")
    shutil.copytree(photos_of_animals, tmp_path / "elsewhere")
    assert make(tmp_path / "elsewhere", tmp_path / "again")[1] == first
    assert make(photos_of_animals, tmp_path / "other", seed=1)[1] != first
    _, small = make(photos_of_animals, tmp_path / "small", per_class=2)
    assert small["train"] < first["train"] and small["val"] == first["val"]
    # Worked out by hand: printf '0\0ape/0.png' | sha256sum, and so on; the first four and the last three of the nine.
    apes = {split: {each for each in first[split] if each.startswith("ape")} for split in first}
    assert apes["train"] == {f"ape/{number}.png" for number in (3, 6, 8, 2)}
    assert apes["val"] == {f"ape/{number}.png" for number in (1, 0, 5)}


def test_a_cut_may_have_no_val(photos_of_animals, tmp_path):
    assert subset.make(photos_of_animals, 7, 0, tmp_path / "out", progress=False).counts == {"train": 21, "val": 0}
    assert sorted(each.name for each in (tmp_path / "out").iterdir()) == ["cut.json", "train"]


def test_small_classes_are_refused(photos_of_animals, tmp_path):
    with pytest.raises(UserError, match=r"class bee has 7 images and the cut needs 8 \(5 train, 3 val\)$"):
        make(photos_of_animals, tmp_path / "out", per_class=5)
    with pytest.raises(UserError, match=r"class ape has 9 .* needs 13 .*, and 2 more classes have too few"):
        make(photos_of_animals, tmp_path / "out", per_class=10)
    assert not list(tmp_path.glob("out*"))


def test_nothing_is_overwritten(photos_of_animals, tmp_path):
    make(photos_of_animals, tmp_path / "out")
    assert make(photos_of_animals, tmp_path / "out")[0] == Placed({"train": 12, "val": 9}, 0, False)
    with pytest.raises(UserError, match="is not the set that was asked for"):
        make(photos_of_animals, tmp_path / "out", seed=1)
    with pytest.raises(UserError, match="lies inside"):
        make(photos_of_animals, photos_of_animals / "out")
