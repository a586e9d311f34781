"""Tar shards: the images that the webdataset library writes and reads, and files that are wrong are named."""

import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from helpers import CPU, TINY, call, same, tiny, write_shards
from helpers import run as train
from PIL import Image

from fasttrain.config.schema import DataConfig
from fasttrain.data.open_data import open_data, open_labeled, open_unlabeled
from fasttrain.data.scan import Limits, scan
from fasttrain.data.stores import shards
from fasttrain.data.stores.shards import expand, open_shards
from fasttrain.pipelines.plan import Plan
from fasttrain.pipelines.train_loader import batches
from fasttrain.utils.errors import RunError, UserError


@pytest.fixture(scope="module")
def pattern(demo_set, tmp_path_factory) -> str:
    return write_shards(demo_set / "train", tmp_path_factory.mktemp("shards"))


def data_of(path: object, **settings: object):
    return open_data(DataConfig(train=(str(path),), **settings))[0]


@pytest.mark.parametrize("label", ["cls", "json"])
def test_shards_have_the_batches_of_the_folder(demo_set, tmp_path, label):
    """Byte for byte; ids, labels, sizes and so the fingerprints are equal."""
    index, folder = data_of(write_shards(demo_set / "train", tmp_path, label=label)), scan(demo_set / "train")
    assert index.fingerprint() == folder.fingerprint()
    assert index.fingerprint_of_sizes() == folder.fingerprint_of_sizes()
    plan = Plan.of(tiny(), folder)
    for a, b in zip(
        batches(plan, index, CPU.device, 1, stop_step=3), batches(plan, folder, CPU.device, 1, stop_step=3), strict=True
    ):
        assert torch.equal(a.pixels, b.pixels) and torch.equal(a.indices, b.indices)


def test_the_library_reads_the_same_images(pattern):
    index = data_of(pattern)
    of_id = {image_id: number for number, image_id in enumerate(index.ids)}
    samples = list(webdataset.WebDataset(pattern, shardshuffle=False))
    assert len(samples) == len(index) == 500
    for sample in samples:
        number = of_id[f"{sample['__key__']}.jpg"]
        assert index.store.content(number).tobytes() == sample["jpg"]
        assert index.classes[index.labels[number]] == sample["cls"].decode()
        assert index.sizes[number].tolist() == list(Image.open(io.BytesIO(sample["jpg"])).size[::-1])


def test_the_headers_are_read_once(pattern, monkeypatch):
    first = data_of(pattern)
    monkeypatch.setattr(shards, "_read", None)
    monkeypatch.setattr("fasttrain.data.scan.read_headers", None)
    second = data_of(pattern)
    assert second.ids == first.ids and np.array_equal(second.sizes, first.sizes)
    assert np.array_equal(second.store.offsets, first.store.offsets)
    for path in expand(pattern):
        os.utime(path, (1, 1))
    with pytest.raises(TypeError):
        data_of(pattern)


def test_many_shards_need_few_open_files(pattern, monkeypatch):
    monkeypatch.setattr(shards, "_OPEN_FILES", 2)
    index = data_of(pattern)
    for number in range(0, 500, 7):
        assert index.store.content(number)[:2].tobytes() == b"\xff\xd8"
    assert len(index.store._open) == 2


def test_a_run_goes_on_from_the_folder_to_the_shards(demo_set, pattern, tmp_path):
    recipe = tiny(epochs=1, batch_size=100)
    train(recipe, tmp_path / "whole", scan(demo_set / "train"))
    train(recipe, tmp_path / "shards", data_of(pattern))
    same(tmp_path / "shards", tmp_path / "whole")


def test_patterns():
    assert expand("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expand("{x,y}-{0..1}.tar") == ["x-0.tar", "x-1.tar", "y-0.tar", "y-1.tar"]
    with pytest.raises(UserError, match="more than 100,000 files"):
        expand("{0..999}{0..999}.tar")
    with pytest.raises(UserError, match="no such file"):
        expand("nothing-*.tar")
    with pytest.raises(UserError, match=r"cannot read .*none-1\.tar: No such file"):
        open_shards("none-{1..2}.tar", Limits())


def jpeg(color: int = 99, size=(8, 6)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (color, 99, 199)).save(buffer, "JPEG")
    return buffer.getvalue()


def archive(path: Path, members: dict[str, bytes | tarfile.TarInfo]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
                continue
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


GOOD = {"a.jpg": jpeg(1), "a.cls": b"ape", "b.jpg": jpeg(2), "b.cls": b"yak\n"}


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({}, "holds no images"),
        ({"a.txt": b"x"}, "holds no images"),
        ({"a.jpg": jpeg(), "b.jpg": jpeg(), "b.cls": b"1"}, r"a\.jpg has no label; it belongs in a \.cls"),
        (GOOD | {"c.jpg": jpeg(), "c.cls": b"1", "c.json": b'{"cls":2}'}, r"c\.jpg: its \.cls says 1 and its .json 2"),
        (GOOD | {"c.jpg": jpeg(), "c.json": b'{"label": 2.5}'}, r"c\.jpg: the label in its \.json is not a number"),
        (GOOD | {"c.jpg": jpeg(), "c.json": b"{" * 9000}, r"c\.jpg: its \.json cannot be read as JSON"),
        (GOOD | {"c.jpg": jpeg(), "c.cls": b"\xff\0"}, r"c\.jpg: its \.cls is not a number or a name"),
        (GOOD | {"c.jpg": jpeg(), "c.cls": b"x" * 2000}, r"c\.cls is too long for a label"),
        (GOOD | {"c.jpg": jpeg(), "c.png": jpeg(), "c.cls": b"1"}, "sample c has two images"),
        (GOOD | {"../c.jpg": jpeg(), "../c.cls": b"1"}, r"the name '\.\./c\.jpg' leads out of the archive"),
        (GOOD | {"/c.jpg": jpeg(), "/c.cls": b"1"}, "leads out of the archive"),
        ({"a.jpg": jpeg(), "a.cls": b"ape"}, r"\(train\) has only one label \(ape\)"),
        (GOOD | {"c.jpg": b"no image", "c.cls": b"ape"}, r"cannot use the image .*:c\.jpg: it has no header"),
        (GOOD | {"c.jpg": b"", "c.cls": b"ape"}, r"cannot use the image .*:c\.jpg: the file is empty"),
    ],
)  # fmt: skip
def test_wrong_shards_are_refused_in_one_line(tmp_path, members, message):
    with pytest.raises(UserError, match=message) as error:
        data_of(archive(tmp_path / "s.tar", members))
    assert str(error.value).isprintable()


def test_members_that_are_no_sample_are_ignored_and_counted(tmp_path, capsys):
    link = tarfile.TarInfo("c.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    folder = tarfile.TarInfo("deep")
    folder.type = tarfile.DIRTYPE
    more = {"deep": folder, "./deep/d.JPG": jpeg(3), "./deep/d.cls": b"ape", "._e.jpg": b"x", "e.seg.png": jpeg()}
    index = data_of(archive(tmp_path / "s.tar", GOOD | {"c.jpg": link} | more))
    assert index.ids == ("a.jpg", "deep/d.JPG", "b.jpg") and index.classes == ("ape", "yak")
    assert "ignored 3 members" in capsys.readouterr().err


def test_the_same_names_in_two_shards_are_told_apart(tmp_path):
    archive(tmp_path / "s-0.tar", GOOD)
    archive(tmp_path / "s-1.tar", GOOD)
    assert data_of(tmp_path / "s-{0..1}.tar").ids == ("s-0/a.jpg", "s-1/a.jpg", "s-0/b.jpg", "s-1/b.jpg")
    with pytest.raises(UserError, match=r"s-0\.tar is there twice"):
        data_of(tmp_path / "s-{0,0}.tar")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:700], r"is cut off in a\.jpg; copy it again"),
        (lambda data: data[: data.index(b"b.jpg")], "is cut off at byte"),
        (lambda data: data[: data.index(b"b.jpg") + 100], "damaged at byte|cut off"),
        (lambda data: data + data, "another archive follows there"),
        (lambda data: data.replace(b"b.jpg\0", b"c.jpg\0", 1), "is damaged at byte"),  # not its checksum
        (lambda data: b"", "is not a tar file, or is cut off"),
        (lambda data: b"text" * 999, "is not a tar file"),
        (lambda data: b"\x1f\x8b" + data, "is compressed, so that no image can be read alone; decompress it"),
    ],
)
def test_damaged_shards_are_refused_in_one_line(tmp_path, damage, message):
    path = archive(tmp_path / "s.tar", GOOD)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=message):
        data_of(path)


def test_a_shard_that_is_cut_off_during_the_run_is_named(tmp_path):
    index = data_of(archive(tmp_path / "s.tar", GOOD))
    (tmp_path / "s.tar").write_bytes(b"")
    with pytest.raises(RunError, match=r"s\.tar has been cut off since it was opened"):
        index.store.content(0)


def test_an_image_that_cannot_be_decoded_is_replaced(demo_set, tmp_path):
    folder = tmp_path / "set"
    shutil.copytree(demo_set / "val", folder)
    bad = sorted(folder.rglob("*.jpg"))[7]
    bad.write_bytes(bad.read_bytes()[:300])
    pattern = write_shards(folder, tmp_path / "shards")
    ours, theirs = ([data_of(path, on_bad="skip")] for path in (pattern, folder))
    plan, skips = Plan.of(tiny(epochs=1), ours[0]), ([], [])
    pixels = [
        [batch.pixels.clone() for batch in batches(plan, index, CPU.device, 1, on_skip=skipped.append)]
        for (index,), skipped in zip((ours, theirs), skips, strict=True)
    ]
    assert [skip.reason for skip in skips[0]] == [skip.reason for skip in skips[1]] and len(skips[0]) == 1
    assert all(torch.equal(a, b) for a, b in zip(*pixels, strict=True))


def test_images_without_labels_can_be_predicted(tmp_path):
    path = archive(tmp_path / "s.tar", {"b.jpg": jpeg(), "a.jpg": jpeg()})
    index = open_unlabeled(str(path))
    assert index.ids == ("a.jpg", "b.jpg") and index.labels.tolist() == [-1, -1]
    labeled = archive(tmp_path / "t.tar", GOOD)
    assert open_labeled(str(labeled), ["ape", "cat", "yak"], "run").labels.tolist() == [0, 2]


def test_sizes_belong_to_their_images_with_and_without_labels(tmp_path):
    """The order differs, and the sizes come from the cache."""
    members = {"a.jpg": jpeg(1, (8, 6)), "a.cls": b"yak", "b.jpg": jpeg(2, (20, 10)), "b.cls": b"ape"}
    path = archive(tmp_path / "s.tar", members)
    for _ in range(2):
        labeled, unlabeled = data_of(path), open_unlabeled(str(path))
        assert labeled.ids == ("b.jpg", "a.jpg") and labeled.sizes.tolist() == [[10, 20], [6, 8]]
        assert unlabeled.ids == ("a.jpg", "b.jpg") and unlabeled.sizes.tolist() == [[6, 8], [10, 20]]


def test_a_test_set_may_have_one_class(tmp_path):
    path = archive(tmp_path / "s.tar", {"a.jpg": jpeg(), "a.cls": b"ape"})
    assert open_labeled(str(path), ["ape", "yak"], "run").labels.tolist() == [0]


def test_shards_that_are_named_twice_by_patterns_are_refused(pattern):
    first = expand(pattern)[0]
    with pytest.raises(UserError, match="is given twice"):
        open_data(DataConfig(train=(first, pattern)))
    with pytest.raises(UserError, match="is also a training folder"):
        open_data(DataConfig(train=(pattern,), val=first))


def test_unpacking_loses_no_image(tmp_path):
    members = {"a/b/c.jpg": jpeg(1), "a/b/c.cls": b"x", "a-b/c.jpg": jpeg(2), "a-b/c.cls": b"x", "z/q.jpg": jpeg(3),
               "z/q.cls": b"y"}  # fmt: skip
    path = archive(tmp_path / "s.tar", members)
    call("data", "pack", path, "--out", tmp_path / "p.safetensors", "--workers", 1)
    call("data", "unpack", tmp_path / "p.safetensors", "--out", tmp_path / "back")
    assert sorted(file.read_bytes() for file in (tmp_path / "back").rglob("*.jpg")) == sorted(map(jpeg, (1, 2, 3)))


@pytest.mark.slow
def test_commands_take_shards(demo_set, pattern, tmp_path):
    out = tmp_path / "run"
    result = call("run", *TINY, "--data", pattern, "--val", demo_set / "val", "--epochs", 1, "--out", out)
    assert f"500 training images of 10 classes in {pattern}" in result.stderr
    recipe = json.dumps(str(pattern))
    assert recipe in (out / "recipe.toml").read_text()
    val = write_shards(demo_set / "val", tmp_path / "val")
    of_shards = call("eval", out, "--device", "cpu", "--data", val).stdout
    assert of_shards == call("eval", out, "--device", "cpu", "--data", demo_set).stdout
    assert "500 images read" in call("data", "check", pattern).stdout
    packed = call("data", "pack", pattern, "--out", tmp_path / "p.safetensors", "--workers", 1)
    assert "500 images" in packed.stdout
    call("data", "unpack", tmp_path / "p.safetensors", "--out", tmp_path / "back")
    assert len(list((tmp_path / "back").rglob("*.jpg"))) == 500
    assert "250 images" in call("predict", out, "--device", "cpu", "--images", val, "--out", tmp_path / "p.npz").stdout
