"""Scanning folders: which files are indexed, ignored or refused, and what is cached."""

import errno
import os

import numpy as np
import pytest
from PIL import Image

from fasttrain.config.schema import DataConfig
from fasttrain.data import headers
from fasttrain.data import scan as scan_module
from fasttrain.data.open_data import open_data
from fasttrain.data.scan import cache_dir, scan, scan_unlabeled
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


def test_a_pipe_is_ignored(small):
    """Opening one would block forever."""
    os.mkfifo(small / "ape" / "pipe.jpg")
    before = len(scan(small))
    assert len(scan_unlabeled(small)) == before


@pytest.mark.parametrize("orientation", [1, 6])
def test_sizes_are_those_of_the_stored_pixels(tmp_path, orientation):
    """PIL applies a TIFF's orientation to its size and pixels; the pipelines use the pixels as stored."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in ("a.jpg", "b.tif", "c.png", "d.webp"):
        for folder in ("ape", "zebra"):
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.new("RGB", (52, 70)).save(tmp_path / folder / name, exif=exif)
    assert {tuple(size) for size in scan(tmp_path).sizes.tolist()} == {(70, 52)}


def test_an_index_holds_sorted_images_labels_and_sizes(small):
    index = scan(small)
    assert index.classes == ("ape", "zebra")
    assert index.ids == ("ape/c.webp", "zebra/a.PNG", "zebra/b.jpg")
    assert index.paths == tuple(str(small / image_id) for image_id in index.ids)
    assert index.labels.tolist() == [0, 1, 1] and index.labels.dtype == np.int64
    assert index.sizes.tolist() == [[60, 50], [40, 30], [20, 10]] and index.sizes.dtype == np.int32


@pytest.mark.parametrize("extension", ["jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "JPEG"])
def test_every_image_extension_is_indexed(small, extension):
    picture(small / "ape" / f"x.{extension}")
    assert len(scan(small)) == 4


def test_other_files_are_ignored_and_counted(small, tmp_path, capsys):
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
    index = scan(small)
    assert index.ids == ("ape/c.webp", "ape/inner.jpg", "zebra/a.PNG", "zebra/b.jpg")
    warning = capsys.readouterr().err
    for part in ("1 stray files", "1 files that are not images", "2 hidden files", "1 folders inside class folders",
                 "2 links out of the folder", "1 broken links"):  # fmt: skip
        assert part in warning
    assert warning.count("\n") == 1


def test_a_folder_reached_through_a_link_is_scanned(small, tmp_path):
    (tmp_path / "link").symlink_to(small)
    assert len(scan(tmp_path / "link")) == 3


def test_headers_are_read_again_only_after_a_change(small, monkeypatch):
    first = scan(small)
    read = []
    read_header = headers.read_header
    monkeypatch.setattr(headers, "read_header", lambda path, file: read.append(path) or read_header(path))
    again = scan(small)
    assert not read and np.array_equal(again.sizes, first.sizes)
    picture(small / "zebra" / "b.jpg", (77, 66))
    assert scan(small).sizes.tolist()[2] == [66, 77] and read
    assert not list(small.rglob("*.npy")), "the cache must not be next to the images"


def test_a_repaired_file_is_read_again(small):
    """Also if its size and modification time are those of the damaged one."""
    victim = small / "zebra" / "b.jpg"
    content, times = victim.read_bytes(), victim.stat()
    victim.write_bytes(bytes(len(content)))
    os.utime(victim, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(UserError, match=r"cannot use the image .*no header of an image"):
        scan(small)
    assert (scan(small, keep_unreadable=True).sizes == 0).any()
    victim.write_bytes(content)
    os.utime(victim, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert scan(small).sizes.all()


def test_a_file_that_cannot_be_opened_says_nothing_about_the_image(small, monkeypatch):
    def too_many_files(path):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), path)

    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", too_many_files)
        for keep in (False, True):
            with pytest.raises(UserError, match=r"cannot read \S+: Too many open files"):
                scan(small, keep_unreadable=keep)
    assert len(scan(small)) == 3


@pytest.mark.parametrize("damage", [b"", b"not an array", b"PK\x03\x04", None])
def test_a_damaged_cache_is_ignored(small, damage):
    sizes = scan(small).sizes
    (cached,) = (cache_dir() / "index").glob("*.npy")
    cached.write_bytes(cached.read_bytes()[:-30] if damage is None else damage)
    assert np.array_equal(scan(small).sizes, sizes)


def test_an_unwritable_cache_does_not_matter(small, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(scan(small)) == 3


def test_names_that_are_not_utf8_work_and_print_safely(small):
    raw = os.fsencode(small / "ape") + b"/caf\xe9.jpg"
    os.rename(os.fsencode(small / "zebra" / "b.jpg"), raw)
    index = scan(small)
    assert os.fsencode(index.paths[1]) == raw
    assert printable(index.ids[1]) == "ape/caf\\xe9.jpg"
    index.fingerprint()


def test_printable_escapes_control_characters():
    assert printable("a\x1b[31m\nb\u202e") == "a\\x1b[31m\\nb\\u202e"


def refuse(message, call, *args):
    with pytest.raises(UserError, match=message) as caught:
        call(*args)
    assert "\n" not in str(caught.value)


def test_folders_that_cannot_be_trained_on_are_refused(small, tmp_path):
    refuse("no such folder: .*nowhere", scan, tmp_path / "nowhere")
    (tmp_path / "bare").mkdir()
    refuse("has no class folders", scan, tmp_path / "bare")
    picture(tmp_path / "single" / "only" / "a.jpg")
    refuse(r"only one class \(only\)", scan, tmp_path / "single")
    (small / "void").mkdir()
    refuse("void has no images directly in it", scan, small)


@pytest.mark.parametrize("content", [b"", b"hello", b"\xff\xd8\xff\xe0"])
def test_a_file_with_an_unreadable_header_is_named(small, content):
    (small / "ape" / "bad.jpg").write_bytes(content)
    refuse("cannot use the image .*ape/bad.jpg: (the file is empty|it has no header)", scan, small)


def test_train_and_val_folders_are_found(tmp_path):
    for split in ("train", "val"):
        for name in ("ape", "zebra"):
            picture(tmp_path / "d" / split / name / f"{split}.jpg")
    train, val = open_data(DataConfig(train=(str(tmp_path / "d"),)))
    assert train.ids[0] == "ape/train.jpg" and val is not None and val.ids[0] == "ape/val.jpg"
    train_only, no_val = open_data(DataConfig(train=(str(tmp_path / "d" / "train"),)))
    assert no_val is None and train_only.fingerprint() == train.fingerprint()


def test_two_training_folders_are_merged_without_validation(tmp_path):
    for split in ("train", "val"):
        for name in ("ape", "zebra"):
            picture(tmp_path / split / name / f"{split}.jpg")
    both, no_val = open_data(DataConfig(train=(str(tmp_path / "train"), str(tmp_path / "val"))))
    assert no_val is None and len(both) == 4 and both.labels.tolist() == [0, 1, 0, 1]
    refuse("is given twice", open_data, DataConfig(train=(str(tmp_path / "train"),) * 2))
    refuse(
        "also a training folder", open_data, DataConfig(train=(str(tmp_path / "train"),), val=str(tmp_path / "train"))
    )


def test_a_class_that_one_folder_lacks_is_named(small, tmp_path):
    picture(tmp_path / "val" / "ape" / "a.jpg")
    picture(tmp_path / "val" / "yak" / "a.jpg")
    refuse(
        "class 'zebra' is in .* but not in",
        open_data,
        DataConfig(train=(str(small),), val=str(tmp_path / "val")),
    )
    refuse("class 'zebra'", open_data, DataConfig(train=(str(small), str(tmp_path / "val"))))


def test_the_fingerprint_depends_on_the_images_and_not_on_their_folder(small, tmp_path):
    import shutil

    shutil.copytree(small, tmp_path / "copy")
    original, copy = scan(small), scan(tmp_path / "copy")
    assert original.fingerprint() == copy.fingerprint()
    (tmp_path / "copy" / "zebra" / "b.jpg").rename(tmp_path / "copy" / "ape" / "b.jpg")
    assert original.fingerprint() != scan(tmp_path / "copy").fingerprint()


@pytest.mark.parametrize("scanned", [scan, scan_unlabeled])
def test_a_file_that_vanishes_during_the_scan_is_named(demo_set, tmp_path, monkeypatch, scanned):
    def vanishing(name, info):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(demo_set / name))

    monkeypatch.setattr(scan_module, "stamp", vanishing)
    with pytest.raises(UserError, match=r"cannot read .*: No such file"):
        scanned(demo_set / "val")
