"""The official VIPriors lists, and sets made from a small fake ImageNet and short lists."""

import errno
import hashlib
import json
import os
import shutil
from collections import Counter, namedtuple

import pytest

from fasttrain.data import vipriors
from fasttrain.data.place_files import Placed
from fasttrain.utils.errors import RunError, UserError

SHA256 = {
    "train": "39603a3692d4955bbe24f37e2a09520f75a5e8508ac1509b1e798a8fa1974afa",
    "val": "7da0396f71fbf07d7566aca79dc1f561840719f40eb0db4645d526c200f056ba",
    "test": "1761242a23fdc087ea3a88fbed158f8784657368bd61d88afe9a05200ba8c2b6",
}
WNIDS = ("n03", "n01", "n02")  # not sorted: the class index must not depend on the list's order
LISTS = {
    "train": [f"{wnid}/{wnid}_{number}.JPEG" for wnid in WNIDS for number in (7, 3)],
    "val": [f"{wnid}/{wnid}_{number}.JPEG" for wnid in WNIDS for number in (5,)],
    "test": [f"{WNIDS[number % 3]}/ILSVRC2012_val_{number:08}.JPEG" for number in range(11)],
}


@pytest.fixture
def imagenet(tmp_path):
    """A fake ImageNet with a flat val: every file of the lists, and one more in each of train and val."""
    root = tmp_path / "imagenet"
    for entry in LISTS["train"] + LISTS["val"] + ["n01/n01_99.JPEG"]:
        write(root / "train" / entry, entry)
    for entry in [*LISTS["test"], "n01/ILSVRC2012_val_00000099.JPEG"]:
        write(root / "val" / entry.split("/")[1], entry)
    return root


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def tree(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def prepare(imagenet, out, link=False, lists=LISTS):
    return vipriors.prepare(imagenet, out, link, progress=False, lists=lists)


def refuse(message, *args, kind=UserError, **kwargs):
    with pytest.raises(kind, match=message) as caught:
        prepare(*args, **kwargs)
    assert type(caught.value) is kind and "\n" not in str(caught.value)


def siblings(out):
    """The names in the parent folder of `out`, without the fake ImageNet."""
    return sorted(path.name for path in out.parent.iterdir() if path.name != "imagenet")


def stop_after(monkeypatch, name, count, error=None):
    """Make shutil.copyfile or os.link fail after `count` calls, with half a file written. Returns a list to which each
    call adds its source."""
    module = shutil if name == "copyfile" else os
    real, calls = getattr(module, name), []

    def stopping(source, target):
        calls.append(source)
        if len(calls) > count:
            target.write_text("half")
            raise error
        return real(source, target)

    monkeypatch.setattr(module, name, stopping)
    return calls


def test_the_official_lists_are_unchanged():
    lists = vipriors.lists()
    for split, expected in SHA256.items():
        text = "".join(f"{entry}\n" for entry in lists[split])
        assert hashlib.sha256(text.encode()).hexdigest() == expected
        assert len(lists[split]) == len(set(lists[split])) == 50_000
        per_class = Counter(entry.split("/")[0] for entry in lists[split])
        assert len(per_class) == 1000 and set(per_class.values()) == {50}
    assert not set(lists["train"]) & set(lists["val"])


def test_labels_are_positions_among_the_sorted_wnids():
    labels = vipriors.test_labels()
    assert labels[:4] == (222, 354, 416, 197)
    assert Counter(labels) == dict.fromkeys(range(1000), 50)
    assert vipriors.test_labels(LISTS)[:4] == (2, 0, 1, 2)


@pytest.mark.parametrize("link", [False, True], ids=["copy", "link"])
@pytest.mark.parametrize("val", ["flat", "folders", "other folders"])
def test_the_layout_is_that_of_the_challenge(imagenet, tmp_path, link, val):
    if val != "flat":
        for i, entry in enumerate(LISTS["test"]):
            wnid, name = entry.split("/")
            folder = imagenet / "val" / (wnid if val == "folders" else WNIDS[i % 2])
            folder.mkdir(exist_ok=True)
            (imagenet / "val" / name).rename(folder / name)
    out = tmp_path / "deep" / "out"
    assert prepare(imagenet, out, link) == Placed({"train": 6, "val": 3, "test": 11}, 20, True)
    files = tree(out)
    stamp = json.loads(files.pop("vipriors.json"))
    assert set(stamp["sha256"]) == {"train", "val", "test"}
    labels = files.pop("test/labels.csv").decode()
    expected = {f"{split}/{entry}": entry.encode() for split in ("train", "val") for entry in LISTS[split]}
    expected |= {f"test/imgs/img_{i}.JPEG": entry.encode() for i, entry in enumerate(LISTS["test"])}
    assert files == expected
    assert labels == (
        "Image IDs,Labels\nimg_0.JPEG,2\nimg_1.JPEG,0\nimg_10.JPEG,0\nimg_2.JPEG,1\nimg_3.JPEG,2\nimg_4.JPEG,0\n"
        "img_5.JPEG,1\nimg_6.JPEG,2\nimg_7.JPEG,0\nimg_8.JPEG,1\nimg_9.JPEG,2\n"
    )
    assert (out / "train/n01/n01_3.JPEG").samefile(imagenet / "train/n01/n01_3.JPEG") == link
    assert os.listdir(out.parent) == ["out"]


def test_hard_links_follow_symbolic_links(imagenet, tmp_path):
    (imagenet / "train/n01/n01_3.JPEG").rename(tmp_path / "store")
    (imagenet / "train/n01/n01_3.JPEG").symlink_to(tmp_path / "store")
    prepare(imagenet, tmp_path / "out", link=True)
    placed = tmp_path / "out/train/n01/n01_3.JPEG"
    assert not placed.is_symlink() and placed.samefile(tmp_path / "store")


def test_all_missing_files_are_listed_and_nothing_is_made(imagenet, tmp_path):
    gone = [imagenet / "train" / LISTS["train"][i] for i in (0, 2, 4)] + [imagenet / "train" / LISTS["val"][0]]
    for path in gone:
        path.unlink()
    (imagenet / "val" / "ILSVRC2012_val_00000004.JPEG").unlink()
    gone.append(imagenet / "val" / LISTS["test"][4])
    out = tmp_path / "out"
    refuse(r"5 of 20 source files are missing: .*n03_7.JPEG, .*, …; all are listed in .*out.missing.txt", imagenet, out)
    assert (tmp_path / "out.missing.txt").read_text().splitlines()[1:] == list(map(str, gone))
    assert siblings(out) == ["out.missing.txt"]
    for path in gone[:-1]:
        write(path, "back")
    refuse("1 of 20", imagenet, out)
    assert len((tmp_path / "out.missing.txt").read_text().splitlines()) == 2
    write(gone[-1], "back")
    prepare(imagenet, out)
    assert siblings(out) == ["out"], "an outdated list of missing files was not removed"


def test_another_file_named_missing_txt_is_not_overwritten(imagenet, tmp_path):
    (imagenet / "train" / LISTS["train"][0]).unlink()
    write(tmp_path / "out.missing.txt", "mine")
    refuse("the full list is not written, because .*out.missing.txt is another file", imagenet, tmp_path / "out")
    assert (tmp_path / "out.missing.txt").read_text() == "mine"


def test_an_imagenet_without_its_folders_is_refused(tmp_path):
    refuse("no such folder: .*train; --imagenet needs", tmp_path, tmp_path / "out")
    (tmp_path / "train").mkdir()
    refuse("no such folder: .*val; --imagenet needs", tmp_path, tmp_path / "out")
    (tmp_path / "val").mkdir()
    refuse("is inside", tmp_path, tmp_path / "val" / "out")


@pytest.mark.parametrize(("link", "name"), [(False, "copyfile"), (True, "link")], ids=["copy", "link"])
def test_an_interrupted_call_resumes(imagenet, tmp_path, monkeypatch, link, name):
    prepare(imagenet, tmp_path / "complete", link)
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        # The first link only tests whether links are possible.
        stop_after(patch, name, 7 + link, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            prepare(imagenet, out, link)
    assert siblings(out) == ["complete", "out.partial"]
    images = [path for path in tree(tmp_path / "out.partial") if path.endswith(".JPEG")]
    assert len(images) == 7, "half a file counts as a complete one"
    write(tmp_path / "out.partial" / ".part-1", "left by a killed process")
    with monkeypatch.context() as patch:
        calls = stop_after(patch, name, 100)
        assert prepare(imagenet, out, link).new == 13
    assert len(calls) == 13 + link
    assert tree(out) == tree(tmp_path / "complete") and siblings(out) == ["complete", "out"]


def test_files_of_an_interrupted_call_are_checked(imagenet, tmp_path, monkeypatch):
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    with monkeypatch.context() as patch:
        stop_after(patch, "link", 8, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            prepare(imagenet, out, link=True)
    with monkeypatch.context() as patch:
        stop_after(patch, "copyfile", 3, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            prepare(imagenet, out)  # the links must be replaced by copies, not written through
    (partial / "train" / LISTS["train"][0]).write_text("short")
    assert prepare(imagenet, out).new == 20 - 2
    assert (out / "train" / LISTS["train"][0]).read_text() == LISTS["train"][0]
    assert all(path.stat().st_nlink == 1 for path in out.rglob("*") if path.is_file())
    assert {path.read_text() for path in (imagenet / "train").rglob("*.JPEG")} >= {*LISTS["train"], *LISTS["val"]}


def test_a_disk_that_fills_up_is_reported_in_one_line(imagenet, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, "copyfile", 2, OSError(errno.ENOSPC, "No space left on device"))
        refuse("n01_7.JPEG: No space left.*the same command resumes", imagenet, tmp_path / "out", kind=RunError)
    assert prepare(imagenet, tmp_path / "out").new == 18


def test_too_little_space_is_refused_before_anything_is_made(imagenet, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 1000))
    refuse(r"need 0\.0 GB and .* has 0\.0 GB free.*--link", imagenet, tmp_path / "deep" / "out")
    assert not (tmp_path / "deep").exists()
    assert prepare(imagenet, tmp_path / "deep" / "out", link=True).new == 20


def test_impossible_links_are_refused_before_anything_is_made(imagenet, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, "link", 0, OSError(errno.EXDEV, "Invalid cross-device link"))
        refuse("cannot make hard links to .*: Invalid cross-device link; use --copy", imagenet, tmp_path / "out", True)
    assert siblings(tmp_path / "out") == []


def test_folders_with_other_content_are_not_written_to(imagenet, tmp_path):
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    write(out / "thesis.txt", "x")
    refuse("out already exists and is not the requested set", imagenet, out)
    assert tree(out) == {"thesis.txt": b"x"} and not partial.exists()
    shutil.rmtree(out)
    write(partial / "thesis.txt", "x")
    refuse("out.partial already exists and is not the requested set", imagenet, out)
    assert tree(partial) == {"thesis.txt": b"x"} and not out.exists()
    shutil.rmtree(partial)
    out.write_text("a file")
    refuse("already exists", imagenet, out)
    out.unlink()
    out.mkdir()  # empty: nothing to lose
    partial.mkdir()
    (partial / ".part-123").touch()
    (partial / "vipriors.json.part").touch()  # stopped while it wrote the marker
    assert prepare(imagenet, out).made
    assert not [*out.rglob(".*"), *out.rglob("*.part")]


def test_a_finished_set_is_recognized_without_its_sources(imagenet, tmp_path):
    prepare(imagenet, tmp_path / "out")
    shutil.rmtree(imagenet)
    assert prepare(imagenet, tmp_path / "out") == Placed({"train": 6, "val": 3, "test": 11}, 0, False)
    refuse("is not the requested set", imagenet, tmp_path / "out", lists={**LISTS, "val": LISTS["val"][1:]})
