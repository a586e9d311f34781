"""Packs: the images of a folder in one safetensors file, with the same batches; damage and bad input are named."""

import hashlib
import json
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import CPU, TINY, call, events, fail_at, run, same, tiny
from PIL import Image
from safetensors.numpy import load_file

from fasttrain.config.schema import DataConfig, MachineConfig
from fasttrain.data import pack
from fasttrain.data.check import examine_pack
from fasttrain.data.open_data import open_data, open_splits
from fasttrain.data.pack import Encoding
from fasttrain.data.stores.pack import open_pack
from fasttrain.pipelines.eval_loader import EvalLoader
from fasttrain.pipelines.plan import Plan
from fasttrain.pipelines.train_loader import batches
from fasttrain.pipelines.views import views_by_name
from fasttrain.utils.errors import RunError, UserError


@pytest.fixture(scope="module")
def folder(demo_set, tmp_path_factory) -> Path:
    """Four training and two validation images per class; one is a PNG."""
    root = tmp_path_factory.mktemp("pack") / "set"
    for split, count in (("train", 4), ("val", 2)):
        for cls in sorted((demo_set / split).iterdir()):
            (root / split / cls.name).mkdir(parents=True)
            for path in sorted(cls.iterdir())[:count]:
                (root / split / cls.name / path.name).write_bytes(path.read_bytes())
    first = sorted((root / "train").rglob("*.jpg"))[0]
    Image.open(first).save(first.with_suffix(".png"))
    first.unlink()
    return root


def make(folder: Path, out: Path, kind="same", shorter_side=0, **options):
    options = {"workers": 1, "progress": False, "say": lambda line: None} | options
    splits = open_splits(str(folder), keep_unreadable=options.get("skip_bad", False))
    return pack.make(splits, out, Encoding(kind, shorter_side), **options)


@pytest.fixture(scope="module")
def packs(folder) -> dict[str, Path]:
    """Packs of the folder, by kind."""
    made = {kind: folder.parent / f"{kind}.safetensors" for kind in ("same", "raw", "jpeg")}
    for kind, path in made.items():
        assert make(folder, path, kind).images == 60
    return made


def data_of(path: Path):
    return open_data(DataConfig(train=(str(path),)))


def plan_of(index) -> Plan:
    return Plan.of(tiny(batch_size=10, epochs=2), index)


@pytest.mark.parametrize("kind", ["same", "raw"])
def test_batches_of_a_pack_are_those_of_the_folder(folder, packs, kind):
    """Byte for byte, in training and in evaluation."""
    (train, val), (packed, packed_val) = data_of(folder), data_of(packs[kind])
    assert packed.fingerprint() == train.fingerprint() and packed_val.fingerprint() == val.fingerprint()
    assert packed.fingerprint_of_sizes() == train.fingerprint_of_sizes()
    for ours, theirs in zip(
        batches(plan_of(packed), packed, CPU.device, 1), batches(plan_of(train), train, CPU.device, 1), strict=True
    ):
        assert torch.equal(ours.pixels, theirs.pixels) and torch.equal(ours.indices, theirs.indices)
    views = views_by_name("report", 32)
    for ours, theirs in zip(
        EvalLoader(packed_val, views, 7, CPU.device, 1), EvalLoader(val, views, 7, CPU.device, 1), strict=True
    ):
        assert all(torch.equal(a, b) for a, b in zip(ours.pixels, theirs.pixels, strict=True))


def test_anyone_can_open_a_pack(folder, packs):
    """With the safetensors library, PIL and hashlib alone."""
    tensors = load_file(packs["raw"])
    files = sorted((folder / "train").rglob("*.*")) + sorted((folder / "val").rglob("*.*"))
    ids = tensors["ids"].tobytes().decode().split("\0")
    assert ids == [f"{path.parent.name}/{path.name}" for path in files]
    for row, path in enumerate(files):
        content = tensors["images"][tensors["offsets"][row] : tensors["offsets"][row + 1]]
        with Image.open(path) as image:
            expected = np.asarray(image.convert("RGB")).astype(int)
        assert tensors["sizes"][row].tolist() == list(expected.shape[:2])
        assert abs(content.reshape(expected.shape) - expected).max() <= 2
        assert hashlib.sha256(content.tobytes()).digest() == tensors["sha256"][row].tobytes()
    same_files = load_file(packs["same"])
    assert same_files["images"].tobytes() == b"".join(path.read_bytes() for path in files)


def test_larger_images_are_reduced_and_smaller_ones_kept(folder, tmp_path):
    with Image.open(next((folder / "train").rglob("*.png"))) as image:
        sizes = image.size
    make(folder, tmp_path / "small.safetensors", "raw", shorter_side=40)
    small, _ = data_of(tmp_path / "small.safetensors")
    assert (small.sizes.min(1) == 40).all() and min(sizes) > 40
    train, _ = data_of(folder)
    with Image.open(train.paths[0]) as image:
        height, width = small.sizes[0].tolist()
        expected = np.asarray(image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    assert abs(small.store.content(0) - expected).max() <= 2
    make(folder, tmp_path / "large.safetensors", "raw", shorter_side=4000)
    assert np.array_equal(data_of(tmp_path / "large.safetensors")[0].sizes, train.sizes)
    make(folder, tmp_path / "jpeg.safetensors", "jpeg", shorter_side=40)
    index, _ = data_of(tmp_path / "jpeg.safetensors")
    assert len(list(batches(plan_of(index), index, CPU.device, 1))) == 8


def test_a_run_that_began_on_the_folder_resumes_on_the_pack(folder, packs, tmp_path, monkeypatch):
    machine = MachineConfig(device="cpu", compile="off", workers=1, hash_batches=True)
    recipe = tiny(batch_size=10, epochs=2, machine=machine)
    run(recipe, tmp_path / "folder", data_of(folder)[0])
    with monkeypatch.context() as patch:
        fail_at(patch, 3)
        with pytest.raises(Exception, match=None):
            run(recipe, tmp_path / "pack", data_of(folder)[0])
    run(recipe, tmp_path / "pack", data_of(packs["raw"])[0])
    same(tmp_path / "pack", tmp_path / "folder")
    hashes = [
        {event["step"]: event["sha256"] for event in events(tmp_path / name) if event["event"] == "batch"}
        for name in ("folder", "pack")
    ]
    assert hashes[0] == hashes[1] and len(hashes[0]) == 8


def test_unpacking_gives_the_folder_back(folder, packs, tmp_path):
    assert pack.unpack(packs["same"], tmp_path / "same", progress=False) == 60
    for path in folder.rglob("*.*"):
        assert (tmp_path / "same" / path.relative_to(folder)).read_bytes() == path.read_bytes()
    pack.unpack(packs["raw"], tmp_path / "raw", progress=False)
    train, _ = data_of(packs["raw"])
    for number, image_id in enumerate(train.ids):
        with Image.open((tmp_path / "raw" / "train" / image_id).with_suffix(".png")) as image:
            assert np.array_equal(np.asarray(image), train.store.content(number))
    with pytest.raises(UserError, match="exists and is not an empty folder"):
        pack.unpack(packs["raw"], tmp_path / "raw", progress=False)


# ---- interruptions


def test_an_interrupted_pack_goes_on_and_is_the_same_file(folder, packs, tmp_path, monkeypatch):
    out = tmp_path / "raw.safetensors"
    encoded = []
    encode = pack.encode

    def interrupt(images, encoding):
        if len(encoded) > 30:
            raise KeyboardInterrupt
        encoded.extend(images)
        return encode(images, encoding)

    def here(work, chunks, workers):
        for chunk in chunks:
            yield from zip(chunk, work(chunk), strict=True)

    monkeypatch.setattr(pack, "map_in_processes", here)
    monkeypatch.setattr(pack, "_estimate", lambda *args: "")
    monkeypatch.setattr(pack, "BATCH_FILES", 8)
    with monkeypatch.context() as patch:
        patch.setattr(pack, "encode", interrupt)
        with pytest.raises(KeyboardInterrupt):
            make(folder, out, "raw")
    assert not out.exists() and len(encoded) > 30
    counted = []
    monkeypatch.setattr(pack, "encode", lambda images, encoding: counted.extend(images) or encode(images, encoding))
    make(folder, out, "raw")
    assert out.read_bytes() == packs["raw"].read_bytes() and 20 < len(counted) < 40
    assert [path.name for path in tmp_path.iterdir()] == ["raw.safetensors"]


@pytest.mark.slow
def test_a_killed_pack_goes_on_and_is_the_same_file(demo_set, tmp_path):
    """SIGKILL at several moments."""
    command = [sys.executable, "-m", "fasttrain", "data", "pack", str(demo_set), "--pixels", "raw", "--workers", "1"]
    assert subprocess.run([*command, "--out", tmp_path / "whole.safetensors"], timeout=200).returncode == 0
    killed = 0
    for _ in range(20):
        process = subprocess.Popen([*command, "--out", str(tmp_path / "killed.safetensors")])
        journal = tmp_path / ".killed.safetensors.journal"
        lines = len(journal.read_bytes().splitlines()) if journal.exists() else 0
        while process.poll() is None and (not journal.exists() or len(journal.read_bytes().splitlines()) < lines + 60):
            time.sleep(0.005)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            killed += 1
        process.wait()
        if (tmp_path / "killed.safetensors").exists():
            break
    assert killed >= 5
    ours, theirs = load_file(tmp_path / "killed.safetensors"), load_file(tmp_path / "whole.safetensors")
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("free", [1000, None])
def test_a_full_disk_is_named(folder, tmp_path, monkeypatch, free):
    out = tmp_path / "raw.safetensors"
    if free is not None:
        monkeypatch.setattr(pack.shutil, "disk_usage", lambda path: type("Usage", (), {"free": free}))
        with pytest.raises(UserError, match=r"the pack needs about 0\.0 GB more and .* has 0\.0 GB free"):
            make(folder, out, "raw")
        return
    program = (
        "import resource, sys; from fasttrain.cli.main import main; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY)); main(sys.argv[1:])"
    )
    args = ["data", "pack", folder, "--pixels", "raw", "--workers", "1", "--out", out]
    done = subprocess.run([sys.executable, "-c", program, *map(str, args)], capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and "cannot write" in done.stderr and "the same command resumes" in done.stderr
    assert "Traceback" not in done.stderr and not out.exists()


# ---- bad input


@pytest.fixture
def damaged_folder(folder, tmp_path) -> Path:
    root = tmp_path / "damaged"
    for path in folder.rglob("*.*"):
        target = root / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    victim = sorted((root / "train").rglob("*.jpg"))[5]
    victim.write_bytes(victim.read_bytes()[: victim.stat().st_size * 7 // 10])
    sorted((root / "train").rglob("*.jpg"))[9].write_bytes(b"not an image")
    return root


def test_images_that_cannot_be_decoded_are_named_or_left_out(damaged_folder, tmp_path):
    out = tmp_path / "raw.safetensors"
    bad = [
        str(path.relative_to(damaged_folder / "train")) for path in sorted((damaged_folder / "train").rglob("*.jpg"))
    ]
    with pytest.raises(UserError, match=f"cannot use the image .*{bad[9]}"):
        make(damaged_folder, out, "raw")
    (damaged_folder / "train" / bad[9]).unlink()
    for kind in ("same", "raw"):
        with pytest.raises(RunError, match=f"cannot pack .*{bad[5]}: it is damaged.*--on-bad skip"):
            make(damaged_folder, out, kind)
    (damaged_folder / "train" / bad[9]).write_bytes(b"not an image")
    made = make(damaged_folder, out, "raw", skip_bad=True)
    assert made.images == 58 and sorted(name for name, _ in made.left_out) == sorted((bad[5], bad[9]))
    index, _ = data_of(out)
    assert len(index) == 38 and not {bad[5], bad[9]} & set(index.ids)
    assert len(list(batches(plan_of(index), index, CPU.device, 1))) == 6


def test_a_flipped_bit_is_found_and_named(packs, tmp_path):
    path = tmp_path / "flipped.safetensors"
    content = bytearray(packs["raw"].read_bytes())
    start = 8 + struct.unpack("<Q", content[:8])[0]
    train, _ = data_of(packs["raw"])
    content[start + int(train.sizes[:7].prod(1).sum()) * 3 + 5] ^= 4  # in the eighth image
    path.write_bytes(content)
    report = examine_pack(path, progress=False)
    assert [finding.path for finding in report.bad] == [f"train/{train.ids[7]}"] and report.files == 60
    assert not examine_pack(packs["raw"], progress=False).findings
    with pytest.raises(RunError, match=rf"{train.ids[7]} is damaged: it does not have its hash"):
        pack.unpack(path, tmp_path / "out", progress=False)
    assert "does not have its hash" in call("data", "check", path, status=1).stdout


def rewritten(path: Path, change) -> bytes:
    """A pack whose header is changed."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode().ljust(length)
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def with_tensor(path: Path, name: str, position: int, value: int) -> bytes:
    """A pack in which one number of a tensor is changed."""
    content = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    entry = json.loads(content[8 : 8 + length])[name]
    width = {"U8": "B", "I32": "<i", "I64": "<q"}[entry["dtype"]]
    struct.pack_into(width, content, 8 + length + entry["data_offsets"][0] + position * struct.calcsize(width), value)
    return bytes(content)


HOSTILE = {
    "empty": lambda path: b"",
    "cut off": lambda path: path.read_bytes()[:-1000],
    "a huge header": lambda path: struct.pack("<Q", 2**63) + b"{}",
    "not JSON": lambda path: struct.pack("<Q", 4) + b"{{{{",
    "deeply nested": lambda path: struct.pack("<Q", 200_000) + b"[" * 200_000,
    "other metadata": lambda path: rewritten(path, lambda header: header["__metadata__"].update(format="pt")),
    "no labels": lambda path: rewritten(path, lambda header: header.pop("labels")),
    "another type": lambda path: rewritten(path, lambda header: header["labels"].update(dtype="F64")),
    "a shape of terabytes": lambda path: rewritten(path, lambda header: header["sizes"].update(shape=[2**40, 2])),
    "a negative place": lambda path: rewritten(path, lambda header: header["images"].update(data_offsets=[-8, 8])),
    "a place after the file": lambda path: rewritten(
        path, lambda header: header["images"].update(data_offsets=[0, 2**50], shape=[2**50])
    ),
    "text as a shape": lambda path: rewritten(path, lambda header: header["sizes"].update(shape="60x2")),
    "one class twice": lambda path: rewritten(path, lambda header: header["__metadata__"].update(classes='["a", "a"]')),
    "classes of numbers": lambda path: rewritten(path, lambda header: header["__metadata__"].update(classes="[1]")),
    "another kind": lambda path: rewritten(path, lambda header: header["__metadata__"].update(kind="exe")),
    "a label too high": lambda path: with_tensor(path, "labels", 3, 99),
    "a negative label": lambda path: with_tensor(path, "labels", 3, -1),
    "a split without a name": lambda path: with_tensor(path, "splits", 0, 7),
    "an offset that goes back": lambda path: with_tensor(path, "offsets", 2, 0),
    "an offset after the end": lambda path: with_tensor(path, "offsets", 60, 2**40),
    "a size of 0": lambda path: with_tensor(path, "sizes", 4, 0),
    "a size that overflows": lambda path: with_tensor(path, "sizes", 4, 2**31 - 1),
    "an id twice": lambda path: path.read_bytes().replace(b"/002.jpg\0", b"/001.jpg\0", 1),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_files_that_are_not_packs_are_refused_in_one_line(packs, tmp_path, name):
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(HOSTILE[name](packs["raw"]))
    if path.read_bytes() == packs["raw"].read_bytes():
        pytest.fail("nothing was changed")
    with pytest.raises(UserError, match=str(path)) as error:
        open_pack(path)
    assert str(error.value).isprintable()


def test_ids_cannot_leave_the_folder(packs, tmp_path):
    first = data_of(packs["same"])[0].ids[0].encode()
    for name in (b"../" + b"x" * (len(first) - 3), b"/" * len(first), b"a/../" + b"x" * (len(first) - 5)):
        path = tmp_path / "hostile.safetensors"
        path.write_bytes(packs["same"].read_bytes().replace(first + b"\0", name + b"\0", 1))
        with pytest.raises(RunError, match="is not the name of an image in a class"):
            pack.unpack(path, tmp_path / "deep" / "out", progress=False)
        assert {entry.name for entry in tmp_path.iterdir()} <= {"deep", "hostile.safetensors"}
        assert not (tmp_path / "deep" / "out").exists()


def test_what_cannot_be_packed_says_why(folder, packs, tmp_path):
    for out, message in (
        (tmp_path / "x.pack", "end the name in .safetensors"),
        (tmp_path / "no" / "x.safetensors", "there is no folder"),
    ):
        with pytest.raises(UserError, match=message):
            make(folder, out)
    (tmp_path / "weights.safetensors").write_bytes(b"someone's weights")
    with pytest.raises(UserError, match="exists and is not a pack"):
        make(folder, tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match="--pixels same keeps the files"):
        make(folder, tmp_path / "x.safetensors", "same", shorter_side=40)
    with pytest.raises(UserError, match="a pack of pixels already"):
        make(packs["raw"], tmp_path / "x.safetensors", "jpeg")
    mixed = DataConfig(train=(str(packs["raw"]), str(packs["same"])))
    with pytest.raises(UserError, match="one holds decoded pixels and another image files"):
        open_data(mixed)
    both = DataConfig(train=(str(folder / "train"), str(packs["same"])))
    index, _ = open_data(both)
    assert len(index) == 80 and np.array_equal(index.store.content(3), np.fromfile(index.paths[3], np.uint8))
    assert np.array_equal(index.store.content(43), index.store.content(3))


def test_commands_take_a_pack(folder, packs, tmp_path):
    out = tmp_path / "run"
    result = call("run", *TINY[:4], "--batch-size", 10, *TINY[6:], "--data", packs["raw"], "--epochs", 1, "--out", out)
    line = f"40 training images of 10 classes in {packs['raw']} (train); 20 validation images in {packs['raw']} (val)"
    assert line in result.stderr and f"--data {packs['raw']}" in result.stdout
    of_pack = call("eval", out, "--device", "cpu", "--data", packs["raw"]).stdout
    assert of_pack == call("eval", out, "--device", "cpu", "--data", folder).stdout and "of 20 images" in of_pack
    call(
        "show",
        "--arch",
        "test_resnet",
        "--set",
        "image_size=32",
        "--set",
        "batch_size=10",
        "--data",
        packs["same"],
        "--out",
        tmp_path / "b.png",
    )
    call("data", "pack", folder, "--split", "val", "--out", tmp_path / "val.safetensors", "--workers", 1)
    assert len(open_pack(tmp_path / "val.safetensors")["val"]) == 20
    call("predict", out, "--device", "cpu", "--images", tmp_path / "val.safetensors", "--out", tmp_path / "p.npz")
    with np.load(tmp_path / "p.npz") as predicted:
        assert len(predicted["ids"]) == 20
    metadata = json.loads(packs["same"].read_bytes()[8:2000].split(b'"__metadata__": ')[1].split(b"}")[0] + b"}")
    assert metadata["kind"] == "same" and json.loads(metadata["splits"]) == ["train", "val"]
