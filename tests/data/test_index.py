"""Scanning: what is taken, what is left out, what is refused, and what is kept for the next time."""

import os

import numpy as np
import pytest
from PIL import Image

from fasttrain.config.schema import DataConfig
from fasttrain.data import index as dataset
from fasttrain.utils.errors import UserError
from fasttrain.utils.text import printable


def picture(path, size=(8, 6), kind=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (9, 99, 199)).save(path, kind)


@pytest.fixture
def small(tmp_path):
    root = tmp_path / "set"
    picture(root / "zebra" / "b.jpg", (10, 20))
    picture(root / "zebra" / "a.PNG", (30, 40))
    picture(root / "ape" / "c.webp", (50, 60))
    return root


def test_a_pipe_is_no_image(small):
    """Opening one would wait for ever."""
    os.mkfifo(small / "ape" / "pipe.jpg")
    before = len(dataset.scan(small))
    assert len(dataset.scan_unlabelled(small)) == before


@pytest.mark.parametrize("turn", [1, 6])
def test_sizes_are_those_of_the_stored_pixels(tmp_path, turn):
    """PIL tells the size of a TIFF after its orientation, and turns the pixels; the pipelines take them as stored."""
    exif = Image.Exif()
    exif[0x0112] = turn
    for name in ("a.jpg", "b.tif", "c.png", "d.webp"):
        for folder in ("ape", "zebra"):
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.new("RGB", (52, 70)).save(tmp_path / folder / name, exif=exif)
    assert {tuple(each) for each in dataset.scan(tmp_path).sizes.tolist()} == {(70, 52)}


def test_an_index_holds_sorted_images_labels_and_sizes(small):
    index = dataset.scan(small)
    assert index.classes == ("ape", "zebra")
    assert index.ids == ("ape/c.webp", "zebra/a.PNG", "zebra/b.jpg")
    assert index.paths == tuple(str(small / each) for each in index.ids)
    assert index.labels.tolist() == [0, 1, 1] and index.labels.dtype == np.int64
    assert index.sizes.tolist() == [[60, 50], [40, 30], [20, 10]] and index.sizes.dtype == np.int32


@pytest.mark.parametrize("extension", ["jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "JPEG"])
def test_all_kinds_of_images_are_taken(small, extension):
    picture(small / "ape" / f"x.{extension}")
    assert len(dataset.scan(small)) == 4


def test_strays_are_left_out_and_counted(small, tmp_path, capsys):
    (small / "notes.txt").write_text("x")
    (small / "ape" / "notes.txt").write_text("x")
    (small / ".hidden").mkdir()
    picture(small / "ape" / ".shadow.jpg")
    picture(small / "ape" / "deeper" / "d.jpg")
    picture(tmp_path / "elsewhere" / "e.jpg")
    (small / "ape" / "out.jpg").symlink_to(tmp_path / "elsewhere" / "e.jpg")
    (small / "outside").symlink_to(tmp_path / "elsewhere")
    (small / "ape" / "broken.jpg").symlink_to(small / "ape" / "nothing.jpg")
    (small / "ape" / "inner.jpg").symlink_to(small / "zebra" / "b.jpg")
    index = dataset.scan(small)
    assert index.ids == ("ape/c.webp", "ape/inner.jpg", "zebra/a.PNG", "zebra/b.jpg")
    warning = capsys.readouterr().err
    for part in ("1 stray files", "1 files that are not images", "2 hidden files", "1 folders inside class folders",
                 "2 links out of the folder", "1 broken links"):  # fmt: skip
        assert part in warning
    assert warning.count("\n") == 1


def test_a_folder_reached_through_a_link_is_scanned(small, tmp_path):
    (tmp_path / "link").symlink_to(small)
    assert len(dataset.scan(tmp_path / "link")) == 3


def test_a_tree_is_read_once_until_it_changes(small, monkeypatch):
    first = dataset.scan(small)
    read = []
    honest = dataset._header_size
    monkeypatch.setattr(dataset, "_header_size", lambda path: read.append(path) or honest(path))
    again = dataset.scan(small)
    assert not read and np.array_equal(again.sizes, first.sizes)
    picture(small / "zebra" / "b.jpg", (77, 66))
    assert dataset.scan(small).sizes.tolist()[2] == [66, 77] and read
    assert not list(small.rglob("*.npy")), "the cache must not lie beside the images"


@pytest.mark.parametrize("damage", [b"", b"not an array", b"PK\x03\x04", None])
def test_a_damaged_cache_is_read_over(small, damage):
    sizes = dataset.scan(small).sizes
    (cached,) = (dataset.cache_dir() / "index").glob("*.npy")
    cached.write_bytes(cached.read_bytes()[:-30] if damage is None else damage)
    assert np.array_equal(dataset.scan(small).sizes, sizes)


def test_an_unwritable_cache_does_not_matter(small, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(dataset.scan(small)) == 3


def test_names_that_are_not_utf8_work_and_print_safely(small):
    raw = os.fsencode(small / "ape") + b"/caf\xe9.jpg"
    os.rename(os.fsencode(small / "zebra" / "b.jpg"), raw)
    index = dataset.scan(small)
    assert os.fsencode(index.paths[1]) == raw
    assert printable(index.ids[1]) == "ape/caf\\xe9.jpg"
    index.fingerprint()


def test_shown_escapes_what_a_terminal_would_obey():
    assert printable("a\x1b[31m\nb\u202e") == "a\\x1b[31m\\nb\\u202e"


def refuse(says, call, *args):
    with pytest.raises(UserError, match=says) as caught:
        call(*args)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_trained_on_is_refused(small, tmp_path):
    refuse("no such folder: .*nowhere", dataset.scan, tmp_path / "nowhere")
    (tmp_path / "bare").mkdir()
    refuse("has no class folders", dataset.scan, tmp_path / "bare")
    picture(tmp_path / "single" / "only" / "a.jpg")
    refuse(r"one class only \(only\)", dataset.scan, tmp_path / "single")
    (small / "void").mkdir()
    refuse("void has no images directly in it", dataset.scan, small)


@pytest.mark.parametrize("content", [b"", b"hello", b"\xff\xd8\xff\xe0"])
def test_an_unreadable_header_is_named(small, content):
    (small / "ape" / "bad.jpg").write_bytes(content)
    refuse("not a readable image: .*ape/bad.jpg", dataset.scan, small)


def test_split_folders_are_found(tmp_path):
    for split in ("train", "val"):
        for name in ("ape", "zebra"):
            picture(tmp_path / "d" / split / name / f"{split}.jpg")
    train, val = dataset.open_data(DataConfig(train=(str(tmp_path / "d"),)))
    assert train.ids[0] == "ape/train.jpg" and val is not None and val.ids[0] == "ape/val.jpg"
    alone, none = dataset.open_data(DataConfig(train=(str(tmp_path / "d" / "train"),)))
    assert none is None and alone.fingerprint() == train.fingerprint()


def test_merging_takes_both_folders_and_no_validation(tmp_path):
    for split in ("train", "val"):
        for name in ("ape", "zebra"):
            picture(tmp_path / split / name / f"{split}.jpg")
    both, none = dataset.open_data(DataConfig(train=(str(tmp_path / "train"), str(tmp_path / "val"))))
    assert none is None and len(both) == 4 and both.labels.tolist() == [0, 1, 0, 1]
    refuse("is named twice", dataset.open_data, DataConfig(train=(str(tmp_path / "train"),) * 2))
    refuse(
        "also trained on", dataset.open_data, DataConfig(train=(str(tmp_path / "train"),), val=str(tmp_path / "train"))
    )


def test_other_classes_are_refused_by_name(small, tmp_path):
    picture(tmp_path / "val" / "ape" / "a.jpg")
    picture(tmp_path / "val" / "yak" / "a.jpg")
    refuse(
        "class 'zebra' is in .* but not in",
        dataset.open_data,
        DataConfig(train=(str(small),), val=str(tmp_path / "val")),
    )
    refuse("class 'zebra'", dataset.open_data, DataConfig(train=(str(small), str(tmp_path / "val"))))


def test_the_fingerprint_sees_images_not_places(small, tmp_path):
    import shutil

    shutil.copytree(small, tmp_path / "copy")
    one, other = dataset.scan(small), dataset.scan(tmp_path / "copy")
    assert one.fingerprint() == other.fingerprint()
    (tmp_path / "copy" / "zebra" / "b.jpg").rename(tmp_path / "copy" / "ape" / "b.jpg")
    assert one.fingerprint() != dataset.scan(tmp_path / "copy").fingerprint()
