"""The official lists, and sets placed from a small ImageNet of made-up files and small lists."""

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
    """All that the lists name, flat val, and more that they do not name."""
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


def refuse(says, *args, kind=UserError, **kwargs):
    with pytest.raises(kind, match=says) as caught:
        prepare(*args, **kwargs)
    assert type(caught.value) is kind and "\n" not in str(caught.value)


def names_beside(out):
    return sorted(each.name for each in out.parent.iterdir() if each.name != "imagenet")


def stop_after(monkeypatch, name, count, error=None):
    """Make shutil.copyfile or os.link fail after `count` calls, half a file written; gives the list of its calls."""
    owner = shutil if name == "copyfile" else os
    real, calls = getattr(owner, name), []

    def stopping(source, target):
        calls.append(source)
        if len(calls) > count:
            target.write_text("half")
            raise error
        return real(source, target)

    monkeypatch.setattr(owner, name, stopping)
    return calls


def test_the_official_lists_are_the_challenges():
    lists = vipriors.lists()
    for split, expected in SHA256.items():
        text = "".join(f"{entry}\n" for entry in lists[split])
        assert hashlib.sha256(text.encode()).hexdigest() == expected
        assert len(lists[split]) == len(set(lists[split])) == 50_000
        per_class = Counter(entry.split("/")[0] for entry in lists[split])
        assert len(per_class) == 1000 and set(per_class.values()) == {50}
    assert not set(lists["train"]) & set(lists["val"])


def test_the_labels_are_positions_among_sorted_wnids():
    labels = vipriors.test_labels()
    assert labels[:4] == (222, 354, 416, 197)
    assert Counter(labels) == dict.fromkeys(range(1000), 50)
    assert vipriors.test_labels(LISTS)[:4] == (2, 0, 1, 2)


@pytest.mark.parametrize("link", [False, True], ids=["copy", "link"])
@pytest.mark.parametrize("val", ["flat", "folders", "other folders"])
def test_the_layout_is_the_challenges(imagenet, tmp_path, link, val):
    if val != "flat":
        for at, entry in enumerate(LISTS["test"]):
            wnid, name = entry.split("/")
            folder = imagenet / "val" / (wnid if val == "folders" else WNIDS[at % 2])
            folder.mkdir(exist_ok=True)
            (imagenet / "val" / name).rename(folder / name)
    out = tmp_path / "deep" / "out"
    assert prepare(imagenet, out, link) == Placed({"train": 6, "val": 3, "test": 11}, 20, True)
    found = tree(out)
    stamp = json.loads(found.pop("vipriors.json"))
    assert set(stamp["sha256"]) == {"train", "val", "test"}
    labels = found.pop("test/labels.csv").decode()
    expected = {f"{split}/{entry}": entry.encode() for split in ("train", "val") for entry in LISTS[split]}
    expected |= {f"test/imgs/img_{at}.JPEG": entry.encode() for at, entry in enumerate(LISTS["test"])}
    assert found == expected
    assert labels == (
        "Image IDs,Labels\nimg_0.JPEG,2\nimg_1.JPEG,0\nimg_10.JPEG,0\nimg_2.JPEG,1\nimg_3.JPEG,2\nimg_4.JPEG,0\n"
        "img_5.JPEG,1\nimg_6.JPEG,2\nimg_7.JPEG,0\nimg_8.JPEG,1\nimg_9.JPEG,2\n"
    )
    assert (out / "train/n01/n01_3.JPEG").samefile(imagenet / "train/n01/n01_3.JPEG") == link
    assert os.listdir(out.parent) == ["out"]


def test_links_are_to_what_symbolic_links_lead_to(imagenet, tmp_path):
    (imagenet / "train/n01/n01_3.JPEG").rename(tmp_path / "store")
    (imagenet / "train/n01/n01_3.JPEG").symlink_to(tmp_path / "store")
    prepare(imagenet, tmp_path / "out", link=True)
    placed = tmp_path / "out/train/n01/n01_3.JPEG"
    assert not placed.is_symlink() and placed.samefile(tmp_path / "store")


def test_missing_files_are_all_listed_and_nothing_is_made(imagenet, tmp_path):
    gone = [imagenet / "train" / LISTS["train"][at] for at in (0, 2, 4)] + [imagenet / "train" / LISTS["val"][0]]
    for path in gone:
        path.unlink()
    (imagenet / "val" / "ILSVRC2012_val_00000004.JPEG").unlink()
    gone.append(imagenet / "val" / LISTS["test"][4])
    out = tmp_path / "out"
    refuse(r"5 of 20 source files are missing: .*n03_7.JPEG, .*, …; all are listed in .*out.missing.txt", imagenet, out)
    assert (tmp_path / "out.missing.txt").read_text().splitlines()[1:] == list(map(str, gone))
    assert names_beside(out) == ["out.missing.txt"]
    for path in gone[:-1]:
        write(path, "back")
    refuse("1 of 20", imagenet, out)
    assert len((tmp_path / "out.missing.txt").read_text().splitlines()) == 2
    write(gone[-1], "back")
    prepare(imagenet, out)
    assert names_beside(out) == ["out"], "a list of what is no longer missing must not stay"


def test_a_foreign_missing_txt_is_left_alone(imagenet, tmp_path):
    (imagenet / "train" / LISTS["train"][0]).unlink()
    write(tmp_path / "out.missing.txt", "mine")
    refuse("is in the way", imagenet, tmp_path / "out")
    assert (tmp_path / "out.missing.txt").read_text() == "mine"


def test_an_imagenet_without_its_folders_is_refused(tmp_path):
    refuse("no such folder: .*train; --imagenet needs", tmp_path, tmp_path / "out")
    (tmp_path / "train").mkdir()
    refuse("no such folder: .*val; --imagenet needs", tmp_path, tmp_path / "out")
    (tmp_path / "val").mkdir()
    refuse("lies inside", tmp_path, tmp_path / "val" / "out")


@pytest.mark.parametrize(("link", "name"), [(False, "copyfile"), (True, "link")], ids=["copy", "link"])
def test_an_interrupted_run_is_gone_on_with(imagenet, tmp_path, monkeypatch, link, name):
    prepare(imagenet, tmp_path / "whole", link)
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        # The first link is the probe.
        stop_after(patch, name, 7 + link, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            prepare(imagenet, out, link)
    assert names_beside(out) == ["out.partial", "whole"]
    images = [each for each in tree(tmp_path / "out.partial") if each.endswith(".JPEG")]
    assert len(images) == 7, "half a file counts as a whole one"
    write(tmp_path / "out.partial" / ".part-1", "left by a killed process")
    with monkeypatch.context() as patch:
        calls = stop_after(patch, name, 100)
        assert prepare(imagenet, out, link).new == 13
    assert len(calls) == 13 + link
    assert tree(out) == tree(tmp_path / "whole") and names_beside(out) == ["out", "whole"]


def test_what_was_kept_is_checked(imagenet, tmp_path, monkeypatch):
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
    assert all(each.stat().st_nlink == 1 for each in out.rglob("*") if each.is_file())
    assert {path.read_text() for path in (imagenet / "train").rglob("*.JPEG")} >= {*LISTS["train"], *LISTS["val"]}


def test_a_disk_that_fails_midway_is_one_line(imagenet, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, "copyfile", 2, OSError(errno.ENOSPC, "No space left on device"))
        refuse("n01_7.JPEG: No space left.*goes on from there", imagenet, tmp_path / "out", kind=RunError)
    assert prepare(imagenet, tmp_path / "out").new == 18


def test_too_little_room_is_refused_before_anything_is_made(imagenet, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 1000))
    refuse(r"need 0\.0 GB and .* has 0\.0 GB free.*--link", imagenet, tmp_path / "deep" / "out")
    assert not (tmp_path / "deep").exists()
    assert prepare(imagenet, tmp_path / "deep" / "out", link=True).new == 20


def test_impossible_links_are_refused_before_anything_is_made(imagenet, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, "link", 0, OSError(errno.EXDEV, "Invalid cross-device link"))
        refuse("cannot make hard links to .*: Invalid cross-device link; use --copy", imagenet, tmp_path / "out", True)
    assert names_beside(tmp_path / "out") == []


def test_only_its_own_folders_are_written_to(imagenet, tmp_path):
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    write(out / "thesis.txt", "x")
    refuse("out is there already and is not the set", imagenet, out)
    assert tree(out) == {"thesis.txt": b"x"} and not partial.exists()
    shutil.rmtree(out)
    write(partial / "thesis.txt", "x")
    refuse("out.partial is there already and is not the set", imagenet, out)
    assert tree(partial) == {"thesis.txt": b"x"} and not out.exists()
    shutil.rmtree(partial)
    out.write_text("a file")
    refuse("is there already", imagenet, out)
    out.unlink()
    out.mkdir()  # empty: nothing to lose
    partial.mkdir()
    (partial / ".vipriors.123.json").touch()  # stopped while it wrote the marker
    assert prepare(imagenet, out).made
    assert not list(out.rglob(".*"))


def test_a_finished_set_is_recognised_even_without_its_sources(imagenet, tmp_path):
    prepare(imagenet, tmp_path / "out")
    shutil.rmtree(imagenet)
    assert prepare(imagenet, tmp_path / "out") == Placed({"train": 6, "val": 3, "test": 11}, 0, False)
    refuse("is not the set", imagenet, tmp_path / "out", lists={**LISTS, "val": LISTS["val"][1:]})
