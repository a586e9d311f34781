"""Tables of images: the same images as the folder that they list, and rows that are wrong are named by their line."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import CPU, TINY, call, tiny
from PIL import Image

from fasttrain.config.schema import DataConfig
from fasttrain.data.open_data import open_data
from fasttrain.data.scan import Limits
from fasttrain.data.stores.table import open_table
from fasttrain.pipelines.plan import Plan
from fasttrain.pipelines.train_loader import batches
from fasttrain.utils.errors import UserError


def write_table(path: Path, folder: Path, *, splits: bool, tabs=False) -> Path:
    """A table of a folder's train/ and val/, in an order of its own."""
    rows = []
    for split in ("train", "val") if splits else ("train",):
        for file in sorted((folder / split).rglob("*.jpg"), reverse=True):
            name = file.relative_to(path.parent)
            rows.append([str(name), file.parent.name, *([{"val": "Validation"}.get(split, split)] if splits else [])])
    separator = "\t" if tabs else ","
    header = ["path", "label", *(["split"] if splits else [])]
    path.write_text("".join(separator.join(row) + "\n" for row in [header, *rows]), encoding="utf-8-sig")
    return path


@pytest.mark.parametrize("name", ["images.csv", "images.tsv"])
def test_a_table_has_the_batches_of_the_folder(demo_set, name):
    table = write_table(demo_set / name, demo_set, splits=True, tabs=name.endswith("tsv"))
    try:
        (train, val), (ours, our_val) = (open_data(DataConfig(train=(str(path),))) for path in (demo_set, table))
    finally:
        table.unlink()
    assert ours.ids == tuple(f"train/{image_id}" for image_id in train.ids) and ours.paths == train.paths
    assert np.array_equal(ours.labels, train.labels) and ours.classes == train.classes
    assert np.array_equal(ours.sizes, train.sizes) and len(our_val) == len(val)
    plan = Plan.of(tiny(), train)
    for a, b in zip(
        batches(plan, ours, CPU.device, 1, stop_step=3), batches(plan, train, CPU.device, 1, stop_step=3), strict=True
    ):
        assert torch.equal(a.pixels, b.pixels)


@pytest.fixture
def images(tmp_path) -> Path:
    for name in ("a.jpg", "b.jpg", "deep/c.png"):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6)).save(tmp_path / "set" / name)
    Image.new("RGB", (8, 6)).save(tmp_path / "outside.jpg")
    (tmp_path / "set" / "link.jpg").symlink_to(tmp_path / "outside.jpg")
    (tmp_path / "set" / "notes.txt").write_text("x")
    return tmp_path / "set"


GOOD = "path,label\na.jpg,ape\nb.jpg,yak\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1 must name the columns path and label, and may name split and weight; it has none"),
        ("file,class\na.jpg,ape\n", "line 1 must name the columns .* it has file, class"),
        ("path,label,path\n", "line 1 must name"),
        ("path,label\n", "lists no images"),
        (GOOD + "a.jpg,yak\n", r"line 4: a\.jpg is also in line 2, with the label 'ape'"),
        (GOOD + "./a.jpg,ape\n", r"line 4: a\.jpg is also in line 2$"),
        (GOOD + "deep/c.png\n", "line 4 has 1 values, and line 1 names 2 columns"),
        (GOOD + "deep/c.png,\n", "line 4 has no path or no label"),
        (GOOD + "../outside.jpg,ape\n", r"line 4: \.\./outside\.jpg is not in the table's folder; with --links follow"),
        (GOOD + "link.jpg,ape\n", "line 4: link.jpg is not in the table's folder"),
        (GOOD + "/etc/passwd.jpg,ape\n", "is not in the table's folder"),
        (GOOD + "notes.txt,ape\n", "line 4: notes.txt is not an image; images end in"),
        (GOOD + "missing.jpg,ape\n", "line 4: missing.jpg is not there"),
        ("path,label,split\na.jpg,ape,train\nb.jpg,yak,holdout\n", "line 3 has the split 'holdout'"),
        ("path,label,weight\na.jpg,ape,-1\n", r"line 2 has the weight '-1'; a weight is a number of 0 or more"),
        ("path,label,weight\na.jpg,ape,nan\n", "line 2 has the weight 'nan'"),
        ("path,label,weight\na.jpg,ape,x\n", "line 2 has the weight 'x'"),
        ("path,label\na.jpg,\x1b[31mape\na.jpg,b\n", r"\\x1b\[31mape"),
    ],
)
def test_wrong_tables_are_refused_with_their_line(images, text, message):
    (images / "t.csv").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        open_table(images / "t.csv", Limits(), progress=False)
    assert str(error.value).isprintable()


def test_weights_of_a_table_reach_a_pack_of_it_and_the_fingerprint(images, tmp_path):
    (images / "t.csv").write_text("path,label,weight\na.jpg,ape,2\nb.jpg,yak,0.5\ndeep/c.png,ape,\n")
    index, _ = open_data(DataConfig(train=(str(images / "t.csv"),)))
    assert dict(zip(index.ids, index.weights.tolist(), strict=True)) == {"a.jpg": 2, "b.jpg": 0.5, "deep/c.png": 1}
    call("data", "pack", images / "t.csv", "--out", tmp_path / "t.safetensors")
    packed, _ = open_data(DataConfig(train=(str(tmp_path / "t.safetensors"),)))
    assert packed.ids == index.ids and packed.weights.tolist() == index.weights.tolist()
    assert packed.fingerprint() == index.fingerprint()
    (images / "u.csv").write_text((images / "t.csv").read_text().replace("0.5", "0.25"))
    assert open_data(DataConfig(train=(str(images / "u.csv"),)))[0].fingerprint() != index.fingerprint()


def test_links_and_other_folders_are_taken_on_request(images):
    (images / "t.csv").write_text(f"{GOOD}link.jpg,ape\n{images.parent / 'outside.jpg'},yak\n")
    index = open_table(images / "t.csv", Limits(links="follow"), progress=False)["train"]
    assert len(index) == 4 and index.sizes.tolist() == [[6, 8]] * 4


def test_an_image_that_cannot_be_used_is_named(images):
    (images / "b.jpg").write_bytes(b"not an image")
    (images / "t.csv").write_text(GOOD)
    with pytest.raises(UserError, match=r"cannot use the image .*b\.jpg: it has no header"):
        open_data(DataConfig(train=(str(images / "t.csv"),)))
    index, _ = open_data(DataConfig(train=(str(images / "t.csv"),), on_bad="skip"))
    assert index.sizes.tolist() == [[6, 8], [0, 0]] and 1 in index.problems


def test_a_table_with_one_label_cannot_be_trained_on(images):
    (images / "t.csv").write_text("path,label\na.jpg,ape\n")
    with pytest.raises(UserError, match=r"t\.csv \(train\) has only one label \(ape\)"):
        open_data(DataConfig(train=(str(images / "t.csv"),)))


def test_a_split_that_lacks_a_class_is_refused_for_training(images):
    (images / "t.csv").write_text("path,label,split\na.jpg,ape,train\nb.jpg,yak,val\n")
    with pytest.raises(UserError, match=r"t\.csv \(train\) has no image of class 'yak'"):
        open_data(DataConfig(train=(str(images / "t.csv"),)))


@pytest.mark.slow
def test_commands_take_a_table(demo_set, tmp_path):
    table = write_table(demo_set / "images.csv", demo_set, splits=True)
    try:
        out = tmp_path / "run"
        result = call("run", *TINY, "--data", table, "--epochs", 1, "--out", out)
        assert (
            f"500 training images of 10 classes in {table} (train); 250 validation images in {table} (val)"
            in result.stderr
        )
        of_table = call("eval", out, "--device", "cpu", "--data", table).stdout
        assert of_table == call("eval", out, "--device", "cpu", "--data", demo_set).stdout
        assert "750 images read" in call("data", "check", table).stdout
        packed = call("data", "pack", table, "--out", tmp_path / "t.safetensors", "--workers", 1)
        assert "750 images" in packed.stdout
        assert call("eval", out, "--device", "cpu", "--data", tmp_path / "t.safetensors").stdout == of_table
    finally:
        table.unlink()
