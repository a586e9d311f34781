"""The check of a data set: what each kind of damage is called, that sound files pass, and that moves can be undone."""

import errno
import io
import json
import os
import random
import socket
import struct
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from fasttrain.data import check
from fasttrain.data import quarantine as quarantining
from fasttrain.data.decode_check import read
from fasttrain.data.process_pool import in_processes
from fasttrain.utils.errors import UserError


def quarantine(report, aside) -> int:
    return quarantining.quarantine(report.folder, [each.path for each in report.bad], aside)


def picture(seed=0, height=52, width=70) -> Image.Image:
    """A smooth picture with some noise, RGB."""
    rng = np.random.default_rng(seed)
    slope = np.linspace(20, 200, width) + np.linspace(0, 40, height)[:, None]
    pixels = slope[..., None] * rng.uniform(0.3, 1, 3) + rng.normal(0, 25, (height, width, 3))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def encoded(kind="JPEG", image=None, **options) -> bytes:
    buffer = io.BytesIO()
    (image or picture()).save(buffer, kind, **options)
    return buffer.getvalue()


def turned(orientation=6) -> Image.Exif:
    exif = Image.Exif()
    exif[274] = orientation
    return exif


def huge_png(side=65535) -> bytes:
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def resized_header(data: bytes, height=65535, width=65535) -> bytes:
    """A baseline JPEG that claims another size."""
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def damaged(data: bytes, content=bytes(40)) -> bytes:
    middle = len(data) * 2 // 3
    return data[:middle] + content + data[middle + len(content) :]


GREY = picture(1).convert("L")
GOOD = {
    "baseline.jpg": encoded(),
    "progressive.JPEG": encoded(image=picture(2), progressive=True),
    "restarts.jpg": encoded(image=picture(3), restart_marker_rows=1),
    "grey.jpe": encoded(image=GREY),
    "appended.jfif": encoded(image=picture(4)) + b"after the end",
    "exif.jpg": encoded(image=picture(5), exif=turned(1)),
    "rgb.png": encoded("PNG"),
    "palette.png": encoded("PNG", GREY.convert("P")),
    "lossy.webp": encoded("WEBP"),
    "lossless.webp": encoded("WEBP", lossless=True),
    "rgb.bmp": encoded("BMP"),
    "rgb.tif": encoded("TIFF"),
    "lzw.tiff": encoded("TIFF", compression="tiff_lzw"),
}
DEEP = Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64) * 16)
# Content by name, and what must be found: kind, whether bad, and a part of the reason.
PIECES: dict[str, tuple[bytes, str, bool, str]] = {
    "empty.jpg": (b"", "empty", True, "0 bytes"),
    "cut.jpg": (encoded(image=picture(10))[:-2], "truncated", True, "no end-of-image marker"),
    "cut-progressive.jpg": (encoded(image=picture(11), progressive=True)[:-2], "truncated", True, "no end-of-image"),
    "cut.png": (encoded("PNG")[:-2], "truncated", True, "no end chunk"),
    "cut.webp": (encoded("WEBP")[:-2], "truncated", True, "bytes"),
    "cut.bmp": (encoded("BMP")[:-2], "truncated", True, "bytes"),
    "cut.tif": (encoded("TIFF")[:-2], "truncated", True, "PIL: image file is truncated"),
    "half.jpg": (encoded(image=picture(12))[:1500], "truncated", True, "DALI"),
    "half-then-zeros.jpg": (encoded(image=picture(13))[:1500] + bytes(900), "truncated", True, "no end-of-image"),
    "zeros.jpg": (damaged(encoded(image=picture(14)), bytes(512)), "corrupt", True, "libjpeg: Corrupt JPEG data: "),
    "inserted.jpg": (damaged(encoded(image=picture(14)), b"\xff" * 30), "corrupt", True, ""),
    "flipped.png": (damaged(encoded("PNG"), b"?"), "corrupt", True, "PIL: broken PNG file"),
    "fax.tif": (encoded("TIFF", GREY.convert("1"), compression="group4")[:-2], "dali-refuses", True, "PIL decodes it"),
    "text.jpg": (b"Once upon a time", "not-an-image", True, "4f 6e 63 65"),
    "page.jpg": (b"<!DOCTYPE html><html>404</html>", "not-an-image", True, ""),
    "gif.jpg": (encoded("GIF"), "unsupported", True, "GIF; training takes JPEG, PNG"),
    "photo.gif": (encoded("GIF"), "unsupported", True, "GIF"),
    "avif.png": (b"\0\0\0\x20ftypavif\0\0\0\0", "unsupported", True, "AVIF"),
    "phone.jpg": (b"\0\0\0\x18ftypheic\0\0\0\0", "unsupported", True, "HEIF"),
    "drawing.webp": (b"<?xml version='1.0'?>\n<svg/>", "unsupported", True, "SVG"),
    "really-a-jpeg.png": (encoded(image=picture(15)), "wrong-extension", False, "holds a JPEG"),
    "left-out.dat": (encoded(image=picture(16)), "wrong-extension", False, "leaves files of this extension out"),
    "claims.jpg": (resized_header(encoded(image=picture(17))), "absurd-size", True, "pixels"),
    "wide.jpg": (resized_header(encoded(image=picture(17)), 8, 20000), "absurd-size", True, "20000 x 8 pixels"),
    "claims.png": (huge_png(), "absurd-size", True, "pixels"),
    "pixel.png": (encoded("PNG", picture(0, 1, 1)), "absurd-size", True, "1 x 1 pixels"),
    "turned.jpg": (encoded(image=picture(18), exif=turned()), "exif-rotated", False, "orientation 6"),
    "turned.tif": (encoded("TIFF", exif=turned()), "exif-rotated", False, "orientation 6"),
    "cmyk.jpg": (encoded(image=picture(19).convert("CMYK")), "cmyk", False, "RGB"),
    "deep.png": (encoded("PNG", DEEP), "16-bit", False, "8 bits"),
    "deep.tiff": (encoded("TIFF", DEEP), "16-bit", False, "8 bits"),
    "notes.txt": (b"x", "stray", False, "leaves it out"),
    ".shadow.jpg": (encoded(image=picture(20)), "hidden", False, "leaves it out"),
    os.fsdecode(b"caf\xe9.jpg"): (encoded(image=picture(21)), "not-utf8", False, "not UTF-8"),
}
# The same for what is no file of its own content in the class folder `ape`.
PLACES = {
    "notes.txt": ("stray", False, "beside the class folders"),
    ".git": ("hidden", False, ""),
    "self": ("link-loop", False, "a folder that it is in"),
    "void": ("empty-class", True, "refuses to start"),
    "elsewhere": ("link-out", False, "leads to"),
    "ape/deeper": ("stray", False, "a folder in a class folder"),
    "ape/folder.jpg": ("stray", False, "a folder in a class folder"),
    "ape/up": ("link-loop", False, "a folder that it is in"),
    "ape/loop.jpg": ("link-loop", False, "symbolic links"),
    "ape/out.jpg": ("link-out", False, "leads to"),
    "ape/broken.jpg": ("broken-link", False, "No such file"),
    "ape/pipe.jpg": ("not-an-image", True, "a pipe"),
    "ape/socket.png": ("not-an-image", True, "a pipe"),
    "ape/twin.jpg": ("duplicate", False, "same content as ape/first.jpg"),
    "ape/both.jpg": ("duplicate", True, "same content as zebra/both.jpg, which has another label"),
    "zebra/both.jpg": ("duplicate", True, "same content as ape/both.jpg, which has another label"),
}


def put(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """A folder with one of everything, and its report."""
    base = tmp_path_factory.mktemp("zoo")
    root = base / "set"
    for name, content in GOOD.items():
        put(root / "good" / name, content)
    for name, (content, *_) in PIECES.items():
        put(root / "ape" / name, content)
    put(root / "notes.txt", b"x")
    put(root / ".git" / "config", b"x")
    (root / "void").mkdir()
    put(root / "ape" / "deeper" / "x.jpg", b"")
    put(root / "ape" / "folder.jpg" / "x.jpg", b"")
    put(base / "outside" / "x.jpg", b"")
    (root / "elsewhere").symlink_to(base / "outside")
    (root / "ape" / "out.jpg").symlink_to(base / "outside" / "x.jpg")
    (root / "self").symlink_to(".")
    (root / "ape" / "up").symlink_to("..")
    (root / "ape" / "loop.jpg").symlink_to("loop.jpg")
    (root / "ape" / "broken.jpg").symlink_to("nothing.jpg")
    os.mkfifo(root / "ape" / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as unix, pytest.MonkeyPatch.context() as patch:
        patch.chdir(root / "ape")  # the whole path may be too long for a socket
        unix.bind("socket.png")
    for path, seed in (("ape/first", 30), ("ape/twin", 30), ("ape/both", 31), ("zebra/both", 31)):
        put(root / f"{path}.jpg", encoded(image=picture(seed)))
    put(root / "zebra" / os.fsdecode(b"bad\xff.jpg"), encoded(image=picture(32))[:-2])
    (root / "ape" / "zlink.jpg").symlink_to("../ape/zeros.jpg")
    return root, check.examine(root, workers=1, progress=False)


def found(report, path: str) -> list[check.Finding]:
    return [each for each in report.findings if each.path == path]


def one(report, path: str, kind: str, bad: bool, says: str) -> None:
    (finding,) = found(report, path)
    assert (finding.kind, finding.bad) == (kind, bad) and says in finding.reason
    assert finding.reason.isprintable()


@pytest.mark.parametrize("name", PIECES, ids=ascii)
def test_a_file_is_found_out(zoo, name):
    one(zoo[1], f"ape/{name}", *PIECES[name][1:])


@pytest.mark.parametrize("path", PLACES)
def test_what_is_no_good_file_is_found(zoo, path):
    one(zoo[1], path, *PLACES[path])


@pytest.mark.parametrize("name", GOOD)
def test_sound_files_pass(zoo, name):
    assert not found(zoo[1], f"good/{name}")


def test_nothing_else_is_found(zoo):
    expected = {f"ape/{name}" for name in PIECES} | set(PLACES)
    rest = [each for each in zoo[1].findings if each.path not in expected]
    bad = os.fsdecode(b"zebra/bad\xff.jpg")
    link = "ape/zlink.jpg"
    kinds = [(link, "corrupt"), (link, "duplicate"), (bad, "not-utf8"), (bad, "truncated")]
    assert [(each.path, each.kind) for each in rest] == kinds


def test_the_report_says_it_all(zoo, tmp_path):
    root, report = zoo
    assert report.findings == tuple(sorted(report.findings))
    assert report.rate == pytest.approx(report.files / report.seconds)
    text = report.text()
    assert "BAD   zebra/bad\\xff.jpg: truncated" in text and "note  ape/caf\\xe9.jpg: not-utf8" in text
    assert "manifest of hashes" in text and f"{report.files} image files" in text and text.isascii()
    check.write_report(report, tmp_path / "report.json")
    check.write_report(report, tmp_path / "report.json")
    saved = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert saved["files"] == report.files and saved["folder"] == str(root)
    assert len(saved["findings"]) == len(report.findings) and "manifest of hashes" in saved["limits"]
    assert {"path": "ape/empty.jpg", "kind": "empty", "reason": "0 bytes", "bad": True} in saved["findings"]
    assert os.listdir(tmp_path) == ["report.json"]


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff\xfe", b"[" * 100000])
def test_a_report_replaces_reports_only(tmp_path, content):
    (tmp_path / "mine.json").write_bytes(content)
    refuse("is no report of a check", check.write_report, EMPTY, tmp_path / "mine.json")
    assert (tmp_path / "mine.json").read_bytes() == content
    refuse("is no report of a check", check.write_report, EMPTY, tmp_path)
    refuse("cannot write .*No such file", check.write_report, EMPTY, tmp_path / "no" / "such.json")


EMPTY = check.Report(Path("."), 0, 0.0, ())


def refuse(says, call, *args):
    with pytest.raises(UserError, match=says) as caught:
        call(*args)
    assert "\n" not in str(caught.value)


def test_train_and_val_are_compared(tmp_path):
    for split, name, seed in (
        ("train", "ape/a", 1), ("train", "ape/b", 1), ("val", "ape/c", 1), ("val", "ape/d", 1), ("train", "ape/e", 2),
        ("train", "yak/f", 3), ("val", "ape/g", 3), ("val", "yak/h", 4), ("train", "yak/.x", 5),
    ):  # fmt: skip
        put(tmp_path / split / f"{name}.jpg", encoded(image=picture(seed)))
    put(tmp_path / "demo.json", b"{}")  # nobody looks beside the two
    report = check.examine(tmp_path, workers=2, progress=True)
    assert report.files == 8
    rows = [(each.path[:-4], each.kind, each.bad, each.reason) for each in report.findings]
    other = "which has another label"
    assert rows == [
        ("train/ape/a", "duplicate", True, "same content as val/ape/c.jpg: in train and in val"),
        ("train/ape/b", "duplicate", True, "same content as val/ape/c.jpg: in train and in val"),
        ("train/yak/.x", "hidden", False, "training leaves it out"),
        ("train/yak/f", "duplicate", True, f"same content as val/ape/g.jpg, {other}"),
        ("val/ape/d", "duplicate", False, "same content as val/ape/c.jpg"),
        ("val/ape/g", "duplicate", True, f"same content as train/yak/f.jpg, {other}"),
    ]


def test_folders_that_cannot_be_checked_are_refused(tmp_path):
    refuse("no such folder: .*nowhere", check.examine, tmp_path / "nowhere")
    put(tmp_path / "a.jpg", b"")
    refuse("has no class folders", check.examine, tmp_path)
    (tmp_path / "void").mkdir()
    report = check.examine(tmp_path)  # without a file no process starts
    assert [(each.path, each.kind) for each in report.findings] == [("a.jpg", "stray"), ("void", "empty-class")]


def verdicts(folder: Path, contents: list[bytes], name="x{}.jpg") -> list[list[tuple[str, str]]]:
    """What a worker says of such files, in this process."""
    paths = [folder / name.format(number) for number in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    return [notes for notes, _ in read([(str(path), False) for path in paths])]


TRUNCATABLE = [name for name in GOOD if name != "appended.jfif"]


@pytest.mark.parametrize("name", TRUNCATABLE)
def test_every_truncation_is_bad(tmp_path, name):
    content = GOOD[name]
    lengths = [len(content) - 1, len(content) - 2, *random.Random(name).sample(range(len(content) - 2), 20)]
    found = verdicts(tmp_path, [content[:each] for each in lengths], f"x{{}}{name}")
    for length, notes in zip(lengths, found, strict=True):
        assert any(kind in check.BAD for kind, _ in notes), f"{length} of {len(content)} bytes"


def test_decoders_that_differ_are_reported_either_way(tmp_path):
    cut, padding = encoded("PNG", save_all=True, append_images=[picture(1)])[:-2], encoded("BMP")[:-2]
    fax = encoded("TIFF", GREY.convert("1"), compression="group4")[:-2]
    reasons = [notes[-1][1] for notes in verdicts(tmp_path, [cut, padding, fax])]
    assert "DALI decodes it" in reasons[0] and reasons[1].endswith("PIL decodes it; DALI: cannot decode it")
    assert reasons[2].startswith("DALI: cannot decode it") and reasons[2].endswith("PIL decodes it")


def test_a_worker_says_why_it_cannot_read(tmp_path):
    ((notes, digest),) = read([(str(tmp_path), True)])
    assert notes == [("unreadable", os.strerror(errno.EISDIR))] and digest is None


def test_too_many_scans_are_not_decoded(tmp_path):
    content = encoded(progressive=True)
    start, end = content.index(b"\xff\xda"), content.rindex(b"\xff\xda")
    bomb = content[:start] + content[start:end] * 100 + content[end:]
    ((kind, reason),) = verdicts(tmp_path, [bomb])[0]
    assert kind == "absurd-size" and "scans" in reason


HEADS = [b"", *(content[:cut] for content in GOOD.values() for cut in (4, 30, 200, 600))]


@settings(max_examples=60, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(pairs=st.lists(st.tuples(st.sampled_from(HEADS), st.binary(max_size=300)), min_size=1, max_size=5))
def test_no_bytes_stop_a_worker(tmp_path, pairs):
    for notes in verdicts(tmp_path, [head + tail for head, tail in pairs]):
        assert any(kind in check.BAD for kind, _ in notes)


@pytest.mark.parametrize("name", GOOD)
def test_no_damage_stops_a_worker(tmp_path, name):
    rng = random.Random(name)
    contents = []
    for _ in range(12):
        content = bytearray(GOOD[name])
        for _ in range(rng.choice((1, 3, 20))):
            content[rng.randrange(len(content))] = rng.randrange(256)
        contents.append(bytes(content))
    first = verdicts(tmp_path, contents, f"x{{}}{name}")
    assert first == verdicts(tmp_path, contents, f"x{{}}{name}")


def fragile(items):
    """Work for the pool: some items end the process."""
    for item in items:
        if item % 10 == 3:
            os._exit(1)
    return [item * item for item in items]


def never(items):
    os._exit(1)


def test_an_item_that_ends_its_process_costs_no_other():
    chunks = [list(range(first, first + 4)) for first in range(0, 20, 4)]
    results = dict(in_processes(fragile, iter(chunks), 2))
    assert results == {item: None if item % 10 == 3 else item * item for item in range(20)}


def test_processes_that_do_not_start_are_an_error():
    refuse("do not start", list, in_processes(never, iter([[1]]), 1))


def test_a_decoder_that_does_not_return_is_ended(tmp_path):
    (tmp_path / "x.jpg").write_bytes(encoded())
    code = (
        "import sys; from fasttrain.data import decode_check as check; check._decoder(); check.SECONDS = 0.2; "
        "check._decode_with_pil = lambda look, data: sum(range(10**12)); check.read([(sys.argv[1], False)])"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "x.jpg")], timeout=60).returncode == 1


def snapshot(root: Path) -> dict[str, object]:
    tree: dict[str, object] = {}
    for folder, folders, names in os.walk(root):
        for path in (os.path.join(folder, name) for name in [*folders, *names]):
            info = os.lstat(path)
            about: object = os.readlink(path) if os.path.islink(path) else None
            if about is None and os.path.isfile(path):
                about = (Path(path).read_bytes(), info.st_mtime_ns)
            tree[os.path.relpath(path, root)] = (info.st_mode, about)
    return tree


def test_quarantine_can_be_undone(zoo, tmp_path):
    root, report = zoo
    before = snapshot(root)
    aside = tmp_path / "aside" / "here"
    bad = {each.path for each in report.bad} - {"void"}
    assert quarantine(report, aside) == len(bad)
    held = {os.path.relpath(os.path.join(folder, name), aside) for folder, _, names in os.walk(aside) for name in names}
    assert held == bad | {"restore.json"}
    after = snapshot(root)
    assert after == {path: about for path, about in before.items() if path not in bad}
    listed = json.loads((aside / "restore.json").read_text(encoding="ascii"))["moves"]
    assert len(listed) == len(bad) and {"zebra/bad\\xff.jpg", "ape/zeros.jpg"} <= {each["to"] for each in listed}
    assert quarantine(report, aside) == 0, "all are there already"
    assert quarantining.restore(aside, root) == len(bad)
    assert snapshot(root) == before and not aside.exists()


def test_a_quarantine_of_anybodys_writes_nowhere_else(small, tmp_path):
    """Neither to a folder beside the one that is named, nor through a link in it that leads out."""
    assert quarantine(small, tmp_path / "aside") == 2
    (tmp_path / "elsewhere").mkdir()
    for folder in (tmp_path / "elsewhere", tmp_path / "se", small.folder / "yak"):
        refuse("is where a file of .* belongs, outside of", quarantining.restore, tmp_path / "aside", folder)
    (small.folder / "ape").rmdir()
    (small.folder / "ape").symlink_to(tmp_path / "elsewhere")
    refuse("belongs, outside of", quarantining.restore, tmp_path / "aside", small.folder)
    assert not list((tmp_path / "elsewhere").iterdir()) and (tmp_path / "aside/ape/a.jpg").exists()


@pytest.fixture
def small(tmp_path):
    """A report on two bad files that are there, and one that is gone."""
    root = tmp_path / "set"
    findings = []
    for path in ("ape/a.jpg", "ape/b.jpg", "yak/c.jpg"):
        put(root / path, path.encode())
        findings.append(check.Finding(path, "corrupt", "", True))
    put(root / "yak/sound.jpg", b"")
    (root / "yak/c.jpg").unlink()
    return check.Report(root, 4, 1.0, (*findings, check.Finding("yak/sound.jpg", "cmyk", "", False)))


def test_a_quarantine_grows_and_overwrites_nothing(small, tmp_path):
    aside = tmp_path / "aside"
    assert quarantine(small, aside) == 2
    put(small.folder / "ape/a.jpg", b"another")
    assert quarantine(small, aside) == 1
    assert (aside / "ape/a.jpg").read_bytes() == b"ape/a.jpg"
    assert (aside / "ape/a.jpg.again").read_bytes() == b"another"
    refuse("1 files stay .* the place is taken", quarantining.restore, aside, small.folder)
    assert {each.name for each in (small.folder / "ape").iterdir()} == {"a.jpg", "b.jpg"}
    assert (aside / "ape/a.jpg.again").read_bytes() == b"another"
    (small.folder / "ape/a.jpg").rename(small.folder / "ape/old.jpg")
    assert quarantining.restore(aside, small.folder) == 1 and not aside.exists()
    assert (small.folder / "ape/a.jpg").read_bytes() == b"another"


def test_folders_that_are_no_quarantine_are_refused(small, tmp_path):
    for inside in (small.folder, small.folder / "aside", tmp_path / "link"):
        if inside.name == "link":
            inside.symlink_to(small.folder / "ape")
        refuse("is inside", quarantine, small, inside)
    refuse("neither empty nor a quarantine", quarantine, small, tmp_path)
    put(tmp_path / "file", b"")
    refuse("neither empty nor a quarantine", quarantine, small, tmp_path / "file")
    for content in (b"", b"{}", b'{"moves": [{}]}', b'{"moves": 3}', evil("../../x", "/x"), evil("x", "relative")):
        put(tmp_path / "damaged" / "restore.json", content)
        refuse("neither empty nor a quarantine", quarantine, small, tmp_path / "damaged")
        refuse("is no quarantine", quarantining.restore, tmp_path / "damaged", tmp_path)
    assert snapshot(small.folder).keys() == {"ape", "ape/a.jpg", "ape/b.jpg", "yak", "yak/sound.jpg"}


def evil(to: str, source: str) -> bytes:
    return json.dumps({"moves": [{"to_bytes": to.encode().hex(), "from_bytes": source.encode().hex()}]}).encode()


def test_nothing_bad_leaves_no_trace(small, tmp_path):
    assert quarantine(replace(small, findings=()), tmp_path / "aside") == 0
    assert not (tmp_path / "aside").exists()


class Stopped(BaseException):
    pass


@pytest.mark.parametrize("step", range(4))
@pytest.mark.parametrize("across", [False, True], ids=["one file system", "two file systems"])
def test_an_interrupted_move_can_be_undone(small, tmp_path, monkeypatch, step, across):
    before, aside = snapshot(small.folder), tmp_path / "aside"
    left = step

    def counted(call):
        def wrapped(source, *args, **kwargs):
            nonlocal left
            if across and call is rename and not str(source).endswith(".partial"):
                raise OSError(errno.EXDEV, "other file system")
            if ".json" in str(source):
                return call(source, *args, **kwargs)
            if left == 0:
                raise Stopped
            left -= 1
            return call(source, *args, **kwargs)

        return wrapped

    rename, unlink = os.rename, os.unlink
    with monkeypatch.context() as patch:
        patch.setattr(quarantining.os, "rename", counted(rename))
        patch.setattr(quarantining.os, "unlink", counted(unlink))
        try:
            assert quarantine(small, aside) == 2
        except Stopped:
            assert (aside / "restore.json").exists()
    names = {path for tree in (small.folder, aside) for path in snapshot(tree)}
    assert {"ape/a.jpg", "ape/b.jpg"} <= names, "each is in one place at least"
    quarantining.restore(aside, small.folder)
    assert snapshot(small.folder) == before
    assert not aside.exists()
