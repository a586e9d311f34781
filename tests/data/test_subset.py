"""Subsets of folders of class folders."""

import shutil

import pytest
from PIL import Image

from fasttrain.data import subset
from fasttrain.data.place_files import Placed
from fasttrain.data.scan import scan
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
def test_each_class_gives_the_requested_number_of_images_and_none_twice(photos_of_animals, tmp_path, link):
    placed, ids = make(photos_of_animals, tmp_path / "out", link=link)
    assert placed == Placed({"train": 12, "val": 9}, 21, True)
    for split, count in (("train", 4), ("val", 3)):
        assert [sum(image_id.startswith(name) for image_id in ids[split]) for name in COUNTS] == [count] * 3
        for image_id in ids[split]:
            placed_file, source = tmp_path / "out" / split / image_id, photos_of_animals / image_id
            assert placed_file.read_bytes() == source.read_bytes() and placed_file.samefile(source) == link
    assert not ids["train"] & ids["val"]


def test_the_draw_depends_on_seed_and_names_only(photos_of_animals, tmp_path):
    _, first = make(photos_of_animals, tmp_path / "first")
    shutil.copytree(photos_of_animals, tmp_path / "elsewhere")
    assert make(tmp_path / "elsewhere", tmp_path / "again")[1] == first
    assert make(photos_of_animals, tmp_path / "other", seed=1)[1] != first
    _, small = make(photos_of_animals, tmp_path / "small", per_class=2)
    assert small["train"] < first["train"] and small["val"] == first["val"]
    # Computed by hand, with printf '0\0ape/0.png' | sha256sum and so on: the first four and the last three of the nine.
    apes = {split: {image_id for image_id in first[split] if image_id.startswith("ape")} for split in first}
    assert apes["train"] == {f"ape/{number}.png" for number in (3, 6, 8, 2)}
    assert apes["val"] == {f"ape/{number}.png" for number in (1, 0, 5)}


def test_a_long_tail_falls_exponentially_to_its_ratio(tmp_path):
    root = tmp_path / "photos"
    for label in range(5):
        (root / f"c{label}").mkdir(parents=True)
        for number in range(40):
            Image.new("RGB", (4, 4), (label, number, 0)).save(root / f"c{label}" / f"{number}.png")
    placed = subset.make(root, 32, 2, tmp_path / "out", progress=False, long_tail=16)
    sizes = {name: len(list((tmp_path / "out/train" / name).iterdir())) for name in map("c{}".format, range(5))}
    assert sorted(sizes.values()) == [2, 4, 8, 16, 32] and placed.counts == {"train": 62, "val": 10}
    other = subset.make(root, 32, 2, tmp_path / "other", seed=3, progress=False, long_tail=16)
    assert other.counts == placed.counts and sizes != {
        name: len(list((tmp_path / "other/train" / name).iterdir())) for name in sizes
    }
    # A subset of the equal one, with the same val.
    _, equal = make(root, tmp_path / "equal", per_class=32, val_per_class=2)
    ids = {split: set(scan(tmp_path / "out" / split).ids) for split in ("train", "val")}
    assert ids["train"] < equal["train"] and ids["val"] == equal["val"]
    with pytest.raises(UserError, match="already exists and is not the requested set"):
        subset.make(root, 32, 2, tmp_path / "out", progress=False, long_tail=8)


def test_a_subset_may_have_no_val(photos_of_animals, tmp_path):
    assert subset.make(photos_of_animals, 7, 0, tmp_path / "out", progress=False).counts == {"train": 21, "val": 0}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["cut.json", "train"]


def test_classes_with_too_few_images_are_refused(photos_of_animals, tmp_path):
    with pytest.raises(UserError, match=r"class bee has 7 images and the subset needs 8 \(5 train, 3 val\)$"):
        make(photos_of_animals, tmp_path / "out", per_class=5)
    with pytest.raises(UserError, match=r"class ape has 9 .* needs 13 .*, and 2 more classes have too few"):
        make(photos_of_animals, tmp_path / "out", per_class=10)
    assert not list(tmp_path.glob("out*"))


def test_nothing_is_overwritten(photos_of_animals, tmp_path):
    make(photos_of_animals, tmp_path / "out")
    assert make(photos_of_animals, tmp_path / "out")[0] == Placed({"train": 12, "val": 9}, 0, False)
    with pytest.raises(UserError, match="already exists and is not the requested set"):
        make(photos_of_animals, tmp_path / "out", seed=1)
    with pytest.raises(UserError, match="is inside"):
        make(photos_of_animals, photos_of_animals / "out")
