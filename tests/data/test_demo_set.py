"""The demo set and its recipe."""

import hashlib
import itertools
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from fasttrain import recipes
from fasttrain.data import demo_set as demo
from fasttrain.data.scan import scan
from fasttrain.utils.errors import UserError


def digest(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(str(f.relative_to(folder)).encode() + f.read_bytes() for f in files)).hexdigest()


def test_there_are_ten_classes_of_50_train_and_25_val_images(demo_set):
    train, val = scan(demo_set / "train"), scan(demo_set / "val")
    assert train.classes == val.classes == tuple(sorted(demo.CLASSES)) and len(train.classes) == 10
    assert (len(train), len(val)) == (500, 250)
    assert not {Path(p).read_bytes() for p in train.paths} & {Path(p).read_bytes() for p in val.paths}


def test_sizes_and_orientations_are_mixed(demo_set):
    sizes = scan(demo_set / "train").sizes
    height, width = sizes[:, 0], sizes[:, 1]
    assert (height > width).sum() > 50 and (width > height).sum() > 50 and (width == height).sum() > 50
    assert sizes.min() >= 80 and sizes.max() <= 320 and len({tuple(size) for size in sizes.tolist()}) > 200
    with Image.open(scan(demo_set / "train").paths[0]) as image:
        assert image.format == "JPEG"


def test_two_properties_do_not_identify_every_class():
    classes = [name.split("-") for name in demo.CLASSES]
    assert len({tuple(properties) for properties in classes}) == 10
    for pair in itertools.combinations(range(3), 2):
        assert len({tuple(properties[i] for i in pair) for properties in classes}) < 10


def test_the_same_seed_gives_the_same_bytes(demo_set, tmp_path, monkeypatch):
    demo.make(tmp_path / "again")
    assert digest(tmp_path / "again") == digest(demo_set)
    monkeypatch.setattr(demo, "CLASSES", demo.CLASSES[:1])
    demo.make(tmp_path / "other", seed=1)
    folder = Path("train", demo.CLASSES[0])
    assert digest(tmp_path / "other" / folder) != digest(demo_set / folder) == digest(tmp_path / "again" / folder)


def test_nothing_is_overwritten(tmp_path, demo_set):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="is not empty and does not hold the demo set"):
        demo.make(tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    assert demo.make(demo_set) is False
    with pytest.raises(UserError, match="seed 5"):
        demo.make(demo_set, seed=5)
    assert not list(demo_set.parent.glob("*.partial"))
    (tmp_path / "mine").rename(tmp_path / "mine\n")
    with pytest.raises(UserError, match=r"mine\\n is not empty"):
        demo.make(tmp_path / "mine\n")


@pytest.mark.parametrize(
    ("combination", "ranks", "batch"),
    [("ce", 1, 25), ("ce", 2, 24), ("ce", 7, 21), ("ce", 26, 26), ("ce+triplet", 1, 24), ("ce+triplet", 4, 16)],
)
def test_the_demo_recipes_batch_divides_by_the_number_of_ranks(tmp_path, combination, ranks, batch):
    recipe = recipes.demo(recipes.for_arch("resnet18", combination), tmp_path, 1, ranks)
    assert recipe.batch_size == batch


def test_the_demo_recipe_keeps_images_per_class(tmp_path):
    """The batch is a multiple of it."""
    recipe = replace(recipes.for_arch("resnet18", "ce+triplet"), images_per_class=3)
    demo_recipe = recipes.demo(recipe, tmp_path, 1, 2)
    assert (demo_recipe.images_per_class, demo_recipe.batch_size) == (3, 24)
