"""`data check`: each kind of damage is reported by its name, sound files pass, and a quarantine can be undone."""

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
from fasttrain.data.decode_check import Task, check_files
from fasttrain.data.process_pool import map_in_processes
from fasttrain.data.quarantine import quarantine, restore
from fasttrain.utils.errors import UserError


def quarantine_bad(report, folder) -> int:
    return quarantine(report.folder, [finding.path for finding in report.bad], folder)


def picture(seed=0, height=52, width=70) -> Image.Image:
    """A smooth RGB image with some noise."""
    rng = np.random.default_rng(seed)
    gradient = np.linspace(20, 200, width) + np.linspace(0, 40, height)[:, None]
    pixels = gradient[..., None] * rng.uniform(0.3, 1, 3) + rng.normal(0, 25, (height, width, 3))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def encoded(kind="JPEG", image=None, **options) -> bytes:
    buffer = io.BytesIO()
    (image or picture()).save(buffer, kind, **options)
    return buffer.getvalue()


def exif_with(orientation=6) -> Image.Exif:
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
    start = data.index(b"\xff\xc0") + 5
    return data[:start] + struct.pack(">HH", height, width) + data[start + 4 :]


def damaged(data: bytes, content=bytes(40)) -> bytes:
    start = len(data) * 2 // 3
    return data[:start] + content + data[start + len(content) :]


GRAY = picture(1).convert("L")
GOOD = {
    "baseline.jpg": encoded(),
    "progressive.JPEG": encoded(image=picture(2), progressive=True),
    "restarts.jpg": encoded(image=picture(3), restart_marker_rows=1),
    "grey.jpe": encoded(image=GRAY),
    "appended.jfif": encoded(image=picture(4)) + b"after the end",
    "exif.jpg": encoded(image=picture(5), exif=exif_with(1)),
    "rgb.png": encoded("PNG"),
    "palette.png": encoded("PNG", GRAY.convert("P")),
    "lossy.webp": encoded("WEBP"),
    "lossless.webp": encoded("WEBP", lossless=True),
    "rgb.bmp": encoded("BMP"),
    "rgb.tif": encoded("TIFF"),
    "lzw.tiff": encoded("TIFF", compression="tiff_lzw"),
    "fax.tif": encoded("TIFF", GRAY.convert("1"), compression="group4"),
}
DEEP = Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64) * 16)
# Files by name: the content, and the finding to expect, as kind, whether bad, and a part of the reason.
FILES: dict[str, tuple[bytes, str, bool, str]] = {
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
    "bits.tif": (encoded("TIFF", GRAY.convert("1")), "unsupported", True, "1 channel of 1 bit"),
    "lzma.tif": (encoded("TIFF", compression="lzma"), "dali-refuses", True, "PIL decodes it"),
    "text.jpg": (b"Once upon a time", "not-an-image", True, "4f 6e 63 65"),
    "page.jpg": (b"<!DOCTYPE html><html>404</html>", "not-an-image", True, ""),
    "gif.jpg": (encoded("GIF"), "unsupported", True, "GIF; training supports JPEG, PNG"),
    "photo.gif": (encoded("GIF"), "unsupported", True, "GIF"),
    "avif.png": (b"\0\0\0\x20ftypavif\0\0\0\0", "unsupported", True, "AVIF"),
    "phone.jpg": (b"\0\0\0\x18ftypheic\0\0\0\0", "unsupported", True, "HEIF"),
    "drawing.webp": (b"<?xml version='1.0'?>\n<svg/>", "unsupported", True, "SVG"),
    "really-a-jpeg.png": (encoded(image=picture(15)), "wrong-extension", False, "holds a JPEG"),
    "left-out.dat": (encoded(image=picture(16)), "wrong-extension", False, "ignores files with this extension"),
    "claims.jpg": (resized_header(encoded(image=picture(17))), "absurd-size", True, "pixels"),
    "wide.jpg": (resized_header(encoded(image=picture(17)), 8, 20000), "absurd-size", True, "20000 x 8 pixels"),
    "claims.png": (huge_png(), "absurd-size", True, "pixels"),
    "pixel.png": (encoded("PNG", picture(0, 1, 1)), "absurd-size", True, "1 x 1 pixels"),
    "rotated.jpg": (encoded(image=picture(18), exif=exif_with()), "exif-rotated", False, "orientation 6"),
    "rotated.tif": (encoded("TIFF", exif=exif_with()), "exif-rotated", False, "orientation 6"),
    "cmyk.jpg": (encoded(image=picture(19).convert("CMYK")), "cmyk", False, "RGB"),
    "deep.png": (encoded("PNG", DEEP), "16-bit", False, "8 bits"),
    "deep.tiff": (encoded("TIFF", DEEP), "16-bit", False, "8 bits"),
    "notes.txt": (b"x", "stray", False, "ignores it"),
    ".shadow.jpg": (encoded(image=picture(20)), "hidden", False, "ignores it"),
    os.fsdecode(b"caf\xe9.jpg"): (encoded(image=picture(21)), "not-utf8", False, "not UTF-8"),
}
# Findings on folders, links, pipes and copies, by path.
ENTRIES = {
    "notes.txt": ("stray", False, "next to the class folders"),
    ".git": ("hidden", False, ""),
    "self": ("link-loop", False, "a folder that contains it"),
    "void": ("empty-class", True, "training does not start"),
    "elsewhere": ("link-out", False, "a link out of the folder"),
    "ape/deeper": ("stray", False, "a folder in a class folder"),
    "ape/folder.jpg": ("stray", False, "a folder in a class folder"),
    "ape/up": ("link-loop", False, "a folder that contains it"),
    "ape/loop.jpg": ("link-loop", False, "symbolic links"),
    "ape/out.jpg": ("link-out", False, "a link out of the folder"),
    "ape/broken.jpg": ("broken-link", False, "No such file"),
    "ape/pipe.jpg": ("not-an-image", True, "a pipe"),
    "ape/socket.png": ("not-an-image", True, "a pipe"),
    "ape/twin.jpg": ("duplicate", False, "same content as ape/first.jpg"),
    "ape/both.jpg": ("duplicate", True, "same content as zebra/both.jpg, with another label"),
    "zebra/both.jpg": ("duplicate", True, "same content as ape/both.jpg, with another label"),
}


def put(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """A folder with one file of each kind, and its report."""
    base = tmp_path_factory.mktemp("zoo")
    root = base / "set"
    for name, content in GOOD.items():
        put(root / "good" / name, content)
    for name, (content, *_) in FILES.items():
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
        patch.chdir(root / "ape")  # the full path may be too long for a socket
        unix.bind("socket.png")
    for path, seed in (("ape/first", 30), ("ape/twin", 30), ("ape/both", 31), ("zebra/both", 31)):
        put(root / f"{path}.jpg", encoded(image=picture(seed)))
    put(root / "zebra" / os.fsdecode(b"bad\xff.jpg"), encoded(image=picture(32))[:-2])
    (root / "ape" / "zlink.jpg").symlink_to("../ape/zeros.jpg")
    return root, check.examine(root, workers=1, progress=False)


def findings_on(report, path: str) -> list[check.Finding]:
    return [finding for finding in report.findings if finding.path == path]


def assert_one_finding(report, path: str, kind: str, bad: bool, reason: str) -> None:
    (finding,) = findings_on(report, path)
    assert (finding.kind, finding.bad) == (kind, bad) and reason in finding.reason
    assert finding.reason.isprintable()


@pytest.mark.parametrize("name", FILES, ids=ascii)
def test_each_kind_of_file_is_reported(zoo, name):
    assert_one_finding(zoo[1], f"ape/{name}", *FILES[name][1:])


@pytest.mark.parametrize("path", ENTRIES)
def test_folders_links_pipes_and_copies_are_reported(zoo, path):
    assert_one_finding(zoo[1], path, *ENTRIES[path])


@pytest.mark.parametrize("name", GOOD)
def test_sound_files_pass(zoo, name):
    assert not findings_on(zoo[1], f"good/{name}")


def test_nothing_else_is_reported(zoo):
    expected = {f"ape/{name}" for name in FILES} | set(ENTRIES)
    rest = [finding for finding in zoo[1].findings if finding.path not in expected]
    bad = os.fsdecode(b"zebra/bad\xff.jpg")
    link = "ape/zlink.jpg"
    kinds = [(link, "corrupt"), (link, "duplicate"), (bad, "not-utf8"), (bad, "truncated")]
    assert [(finding.path, finding.kind) for finding in rest] == kinds


def test_the_report_is_complete_as_text_and_as_json(zoo, tmp_path):
    root, report = zoo
    assert report.findings == tuple(sorted(report.findings))
    assert report.rate == pytest.approx(report.files / report.seconds)
    text = report.text()
    assert "BAD   zebra/bad\\xff.jpg: truncated" in text and "note  ape/caf\\xe9.jpg: not-utf8" in text
    assert "manifest of hashes" in text and f"{report.files} images read" in text and text.isascii()
    check.write_report(report, tmp_path / "report.json")
    check.write_report(report, tmp_path / "report.json")
    saved = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert saved["files"] == report.files and saved["folder"] == str(root)
    assert len(saved["findings"]) == len(report.findings) and "manifest of hashes" in saved["limits"]
    assert {"path": "ape/empty.jpg", "kind": "empty", "reason": "0 bytes", "bad": True} in saved["findings"]
    assert os.listdir(tmp_path) == ["report.json"]


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff\xfe", b"[" * 100000])
def test_a_report_overwrites_only_reports(tmp_path, content):
    (tmp_path / "mine.json").write_bytes(content)
    refuse("is not a report of a check", check.write_report, EMPTY, tmp_path / "mine.json")
    assert (tmp_path / "mine.json").read_bytes() == content
    refuse("is not a report of a check", check.write_report, EMPTY, tmp_path)
    refuse("cannot write .*No such file", check.write_report, EMPTY, tmp_path / "no" / "such.json")


EMPTY = check.Report(Path("."), 0, 0.0, ())


def refuse(message, call, *args):
    with pytest.raises(UserError, match=message) as caught:
        call(*args)
    assert "\n" not in str(caught.value)


def test_train_and_val_are_compared(tmp_path):
    for split, name, seed in (
        ("train", "ape/a", 1), ("train", "ape/b", 1), ("val", "ape/c", 1), ("val", "ape/d", 1), ("train", "ape/e", 2),
        ("train", "yak/f", 3), ("val", "ape/g", 3), ("val", "yak/h", 4), ("train", "yak/.x", 5),
    ):  # fmt: skip
        put(tmp_path / split / f"{name}.jpg", encoded(image=picture(seed)))
    put(tmp_path / "demo.json", b"{}")  # files next to the two folders are not checked
    report = check.examine(tmp_path, workers=2, progress=True)
    assert report.files == 8
    rows = [(finding.path[:-4], finding.kind, finding.bad, finding.reason) for finding in report.findings]
    other_label = "with another label"
    assert rows == [
        ("train/ape/a", "duplicate", True, "same content as val/ape/c.jpg: in train and in val"),
        ("train/ape/b", "duplicate", True, "same content as val/ape/c.jpg: in train and in val"),
        ("train/yak/.x", "hidden", False, "training ignores it"),
        ("train/yak/f", "duplicate", True, f"same content as val/ape/g.jpg, {other_label}"),
        ("val/ape/d", "duplicate", False, "same content as val/ape/c.jpg"),
        ("val/ape/g", "duplicate", True, f"same content as train/yak/f.jpg, {other_label}"),
    ]


def test_folders_that_cannot_be_checked_are_refused(tmp_path):
    refuse("no such folder: .*nowhere", check.examine, tmp_path / "nowhere")
    put(tmp_path / "a.jpg", b"")
    refuse("has no class folders", check.examine, tmp_path)
    (tmp_path / "void").mkdir()
    report = check.examine(tmp_path)  # there are no files, so no process starts
    assert [(finding.path, finding.kind) for finding in report.findings] == [
        ("a.jpg", "stray"),
        ("void", "empty-class"),
    ]


def problems_of(folder: Path, contents: list[bytes], name="x{}.jpg") -> list[list[tuple[str, str]]]:
    """A worker's (kind, reason) pairs for files of these contents, computed in this process."""
    paths = [folder / name.format(number) for number in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    return [problems for problems, _ in check_files([Task(str(path)) for path in paths])]


TRUNCATABLE = [name for name in GOOD if name != "appended.jfif"]


@pytest.mark.parametrize("name", TRUNCATABLE)
def test_every_truncation_is_bad(tmp_path, name):
    content = GOOD[name]
    lengths = [len(content) - 1, len(content) - 2, *random.Random(name).sample(range(len(content) - 2), 20)]
    results = problems_of(tmp_path, [content[:length] for length in lengths], f"x{{}}{name}")
    for length, problems in zip(lengths, results, strict=True):
        assert any(kind in check.BAD for kind, _ in problems), f"{length} of {len(content)} bytes"


def test_a_file_that_only_one_decoder_decodes_is_reported(tmp_path):
    cut, padding = encoded("PNG", save_all=True, append_images=[picture(1)])[:-2], encoded("BMP")[:-2]
    lzma = encoded("TIFF", compression="lzma")
    reasons = [problems[-1][1] for problems in problems_of(tmp_path, [cut, padding, lzma])]
    assert "DALI decodes it" in reasons[0] and reasons[1].endswith("PIL decodes it; DALI: cannot decode it")
    assert reasons[2].startswith("DALI: cannot decode it") and reasons[2].endswith("PIL decodes it")


def test_pixels_that_differ_between_the_decoders_are_reported(tmp_path, monkeypatch):
    """No kind of file that passes the check of headers is known to differ, so PIL is made to decode another image."""
    close, far = np.asarray(picture()).astype(int), np.asarray(picture()).copy()
    far[10:20] ^= 64
    for pixels, differs in ((np.clip(close + 3, 0, 255).astype(np.uint8), False), (far, True)):
        changed = Image.fromarray(pixels)
        with monkeypatch.context() as patch:
            patch.setattr(Image.Image, "convert", lambda self, mode, changed=changed: changed)
            (problems,) = problems_of(tmp_path, [encoded("PNG")], "x{}.png")
        assert [kind for kind, _ in problems] == ["differs"] * differs
    assert "by up to 64 of 255" in problems[0][1]


def test_a_jpeg_that_pil_cannot_identify_says_so(tmp_path):
    """PIL has no opener called MPO, although JPEGs with a second image have this format."""
    (problems,) = problems_of(tmp_path, [b"\xff\xd8\xff" + bytes(100)])
    assert problems[-1][0] == "truncated" and "MPO" not in problems[-1][1] and "PIL: cannot identify" in problems[-1][1]
    assert problems_of(tmp_path, [encoded("MPO", save_all=True, append_images=[picture(1)])]) == [[]]


def test_oriented_tiffs_are_compared_as_stored(tmp_path):
    """PIL rotates TIFFs; the pixels as stored are what training uses, so these must be the same for DALI."""
    contents = [encoded("TIFF", exif=exif_with(orientation)) for orientation in range(1, 9)]
    findings = problems_of(tmp_path, contents, "x{}.tif")
    assert findings[0] == [] and all(
        [kind for kind, _ in found] == ["exif-rotated"] and "unlike PIL and torchvision" in found[0][1]
        for found in findings[1:]
    )


def test_a_worker_reports_a_read_error(tmp_path):
    ((problems, digest),) = check_files([Task(str(tmp_path), True)])
    assert problems == [("unreadable", os.strerror(errno.EISDIR))] and digest is None


def test_too_many_scans_are_not_decoded(tmp_path):
    content = encoded(progressive=True)
    start, end = content.index(b"\xff\xda"), content.rindex(b"\xff\xda")
    bomb = content[:start] + content[start:end] * 100 + content[end:]
    ((kind, reason),) = problems_of(tmp_path, [bomb])[0]
    assert kind == "absurd-size" and "scans" in reason


HEADS = [b"", *(content[:cut] for content in GOOD.values() for cut in (4, 30, 200, 600))]


@settings(max_examples=60, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(pairs=st.lists(st.tuples(st.sampled_from(HEADS), st.binary(max_size=300)), min_size=1, max_size=5))
def test_random_bytes_do_not_stop_a_worker(tmp_path, pairs):
    for problems in problems_of(tmp_path, [head + tail for head, tail in pairs]):
        assert any(kind in check.BAD for kind, _ in problems)


@pytest.mark.parametrize("name", GOOD)
def test_damaged_files_do_not_stop_a_worker_and_give_the_same_result_twice(tmp_path, name):
    rng = random.Random(name)
    contents = []
    for _ in range(12):
        content = bytearray(GOOD[name])
        for _ in range(rng.choice((1, 3, 20))):
            content[rng.randrange(len(content))] = rng.randrange(256)
        contents.append(bytes(content))
    first = problems_of(tmp_path, contents, f"x{{}}{name}")
    assert first == problems_of(tmp_path, contents, f"x{{}}{name}")


def square_or_exit(items):
    """Work for the pool; some items end the process."""
    for item in items:
        if item % 10 == 3:
            os._exit(1)
    return [item * item for item in items]


def exit_at_once(items):
    os._exit(1)


def test_an_item_that_ends_its_process_affects_no_other():
    chunks = [list(range(first, first + 4)) for first in range(0, 20, 4)]
    results = dict(map_in_processes(square_or_exit, iter(chunks), 2))
    assert results == {item: None if item % 10 == 3 else item * item for item in range(20)}


def test_processes_that_do_not_start_are_an_error():
    refuse("do not start", list, map_in_processes(exit_at_once, iter([[1]]), 1))


def test_a_decoder_that_hangs_is_ended(tmp_path):
    (tmp_path / "x.jpg").write_bytes(encoded())
    code = (
        "import sys; from fasttrain.data import decode_check as check; check.decoder(); check.TIMEOUT_S = 0.2; "
        "check._decode_with_pil = lambda file, data: sum(range(10**12)); check.check_files([check.Task(sys.argv[1])])"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "x.jpg")], timeout=60).returncode == 1


def snapshot(root: Path) -> dict[str, object]:
    """The mode of each file, folder and link below `root`, with the content and time or the link's target."""
    tree: dict[str, object] = {}
    for folder, folders, names in os.walk(root):
        for path in (os.path.join(folder, name) for name in [*folders, *names]):
            info = os.lstat(path)
            content: object = os.readlink(path) if os.path.islink(path) else None
            if content is None and os.path.isfile(path):
                content = (Path(path).read_bytes(), info.st_mtime_ns)
            tree[os.path.relpath(path, root)] = (info.st_mode, content)
    return tree


def test_quarantine_can_be_undone(zoo, tmp_path):
    root, report = zoo
    before = snapshot(root)
    aside = tmp_path / "deep" / "aside"
    bad = {finding.path for finding in report.bad} - {"void"}
    assert quarantine_bad(report, aside) == len(bad)
    moved = {
        os.path.relpath(os.path.join(folder, name), aside) for folder, _, names in os.walk(aside) for name in names
    }
    assert moved == bad | {"restore.json"}
    after = snapshot(root)
    assert after == {path: entry for path, entry in before.items() if path not in bad}
    listed = json.loads((aside / "restore.json").read_text(encoding="ascii"))["moves"]
    assert len(listed) == len(bad) and {"zebra/bad\\xff.jpg", "ape/zeros.jpg"} <= {move["to"] for move in listed}
    assert quarantine_bad(report, aside) == 0, "a file was moved twice"
    assert restore(aside, root) == len(bad)
    assert snapshot(root) == before and not aside.exists()


def test_an_untrusted_quarantine_is_restored_only_into_the_named_folder(small, tmp_path):
    """Not into a folder next to it, and not through a link out of it."""
    assert quarantine_bad(small, tmp_path / "aside") == 2
    (tmp_path / "elsewhere").mkdir()
    for folder in (tmp_path / "elsewhere", tmp_path / "se", small.folder / "yak"):
        refuse("has a file that belongs at .*, which is not in", restore, tmp_path / "aside", folder)
    (small.folder / "ape").rmdir()
    (small.folder / "ape").symlink_to(tmp_path / "elsewhere")
    refuse("has a file that belongs at .*, which is not in", restore, tmp_path / "aside", small.folder)
    assert not list((tmp_path / "elsewhere").iterdir()) and (tmp_path / "aside/ape/a.jpg").exists()


@pytest.fixture
def small(tmp_path):
    """A report on two bad files that exist, and one that was deleted."""
    root = tmp_path / "set"
    findings = []
    for path in ("ape/a.jpg", "ape/b.jpg", "yak/c.jpg"):
        put(root / path, path.encode())
        findings.append(check.Finding(path, "corrupt", "", True))
    put(root / "yak/sound.jpg", b"")
    (root / "yak/c.jpg").unlink()
    return check.Report(root, 4, 1.0, (*findings, check.Finding("yak/sound.jpg", "cmyk", "", False)))


def test_adding_to_a_quarantine_overwrites_nothing(small, tmp_path):
    aside = tmp_path / "aside"
    assert quarantine_bad(small, aside) == 2
    put(small.folder / "ape/a.jpg", b"another")
    assert quarantine_bad(small, aside) == 1
    assert (aside / "ape/a.jpg").read_bytes() == b"ape/a.jpg"
    assert (aside / "ape/a.jpg.again").read_bytes() == b"another"
    refuse("1 files stay .* another file exists there", restore, aside, small.folder)
    assert {path.name for path in (small.folder / "ape").iterdir()} == {"a.jpg", "b.jpg"}
    assert (aside / "ape/a.jpg.again").read_bytes() == b"another"
    (small.folder / "ape/a.jpg").rename(small.folder / "ape/old.jpg")
    assert restore(aside, small.folder) == 1 and not aside.exists()
    assert (small.folder / "ape/a.jpg").read_bytes() == b"another"


def test_folders_that_are_not_quarantines_are_refused(small, tmp_path):
    for inside in (small.folder, small.folder / "aside", tmp_path / "link"):
        if inside.name == "link":
            inside.symlink_to(small.folder / "ape")
        refuse("is inside", quarantine_bad, small, inside)
    refuse("neither empty nor a quarantine", quarantine_bad, small, tmp_path)
    put(tmp_path / "file", b"")
    refuse("neither empty nor a quarantine", quarantine_bad, small, tmp_path / "file")
    for content in (
        b"",
        b"{}",
        b'{"moves": [{}]}',
        b'{"moves": 3}',
        manifest("../../x", "/x"),
        manifest("x", "relative"),
    ):
        put(tmp_path / "damaged" / "restore.json", content)
        refuse("neither empty nor a quarantine", quarantine_bad, small, tmp_path / "damaged")
        refuse("is not a quarantine", restore, tmp_path / "damaged", tmp_path)
    assert snapshot(small.folder).keys() == {"ape", "ape/a.jpg", "ape/b.jpg", "yak", "yak/sound.jpg"}


def manifest(to: str, source: str) -> bytes:
    return json.dumps({"moves": [{"to_bytes": to.encode().hex(), "from_bytes": source.encode().hex()}]}).encode()


def test_without_bad_files_no_quarantine_is_made(small, tmp_path):
    assert quarantine_bad(replace(small, findings=()), tmp_path / "aside") == 0
    assert not (tmp_path / "aside").exists()


class Stopped(BaseException):
    pass


@pytest.mark.parametrize("step", range(4))
@pytest.mark.parametrize("across", [False, True], ids=["one file system", "two file systems"])
def test_an_interrupted_move_can_be_undone(small, tmp_path, monkeypatch, step, across):
    before, aside = snapshot(small.folder), tmp_path / "aside"
    calls_left = step

    def stopping(call):
        def wrapped(source, *args, **kwargs):
            nonlocal calls_left
            if across and call is rename and not str(source).endswith(".partial"):
                raise OSError(errno.EXDEV, "other file system")
            if ".json" in str(source):
                return call(source, *args, **kwargs)
            if calls_left == 0:
                raise Stopped
            calls_left -= 1
            return call(source, *args, **kwargs)

        return wrapped

    rename, unlink = os.rename, os.unlink
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", stopping(rename))
        patch.setattr(os, "unlink", stopping(unlink))
        try:
            assert quarantine_bad(small, aside) == 2
        except Stopped:
            assert (aside / "restore.json").exists()
    names = {path for tree in (small.folder, aside) for path in snapshot(tree)}
    assert {"ape/a.jpg", "ape/b.jpg"} <= names, "a file was lost"
    restore(aside, small.folder)
    assert snapshot(small.folder) == before
    assert not aside.exists()
