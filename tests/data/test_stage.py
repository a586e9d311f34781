"""Copies of files on other disks and at addresses: interrupted, changed, damaged, too large; an HTTP server and S3."""

import hashlib
import json
import multiprocessing
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from helpers import TINY, call, write_shards
from PIL import Image

from fasttrain.config.schema import DataConfig
from fasttrain.data import pack, stage
from fasttrain.data.open_data import open_data, open_splits
from fasttrain.data.pack import Encoding
from fasttrain.data.preload import preload
from fasttrain.data.stage import local_name, staged
from fasttrain.utils.errors import RunError, UserError


def make_pack(folder: Path, out: Path, kind: str) -> None:
    pack.make(open_splits(str(folder)), out, Encoding(kind), workers=1, progress=False, say=lambda line: None)


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    """A pack of 40 images of noise in two classes, of about 60 KB."""
    root, rng = tmp_path_factory.mktemp("packed"), np.random.default_rng(0)
    for number in range(40):
        path = root / "set" / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)).save(path)
    out = root / "images.safetensors"
    make_pack(root / "set", out, "raw")
    return out


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(stage, "_BLOCK", 1000)


class Server:
    """An HTTP server of a folder. ranges: the first bytes that were asked for. fail_after: bytes after which a response
    ends too early."""

    def __init__(self, folder: Path) -> None:
        self.ranges: list[int] = []
        self.fail_after: int | None = None
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self.answer(head=True)

            def do_GET(self) -> None:
                self.answer(head=False)

            def answer(self, head: bool) -> None:
                path = folder / self.path.lstrip("/")
                if not path.is_file():
                    self.send_error(404)
                    return
                data = path.read_bytes()
                match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
                first, last = (int(match[1]), int(match[2] or len(data) - 1)) if match else (0, len(data) - 1)
                part = data[first : last + 1]
                self.send_response(206 if match else 200)
                self.send_header("Content-Length", str(len(part)))
                self.send_header("Accept-Ranges", "bytes")
                self.send_header("ETag", f'"{hashlib.md5(data).hexdigest()}"')
                if match:
                    self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(data)}")
                self.end_headers()
                if head:
                    return
                server.ranges.append(first)
                if server.fail_after is not None and first + len(part) > server.fail_after:
                    self.wfile.write(part[: max(0, server.fail_after - first)])
                    self.close_connection = True
                    return
                self.wfile.write(part)

            def log_message(self, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def server(packed, tmp_path):
    (tmp_path / "www").mkdir()
    shutil.copy(packed, tmp_path / "www")
    running = Server(tmp_path / "www")
    yield running
    running.http.shutdown()


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")


def test_a_pack_is_copied_once_and_read_from_there(packed, tmp_path, monkeypatch):
    data = staged(DataConfig(train=(str(packed),)), str(tmp_path / "local"))
    copy = Path(data.train[0])
    assert copy.read_bytes() == packed.read_bytes() and tmp_path / "local" in copy.parents
    record = json.loads(copy.with_name(f"{copy.name}.json").read_text())
    assert record["sha256"] == hashlib.sha256(packed.read_bytes()).hexdigest() and record["address"] == str(packed)
    assert files_in(tmp_path / "local") == ["images.safetensors", "images.safetensors.json"]
    index, _ = open_data(data)
    assert index.store.files == (str(copy),) and preload([index], progress=False) == copy.stat().st_size
    monkeypatch.setattr(stage, "_copy", None)
    assert staged(DataConfig(train=(str(packed),)), str(tmp_path / "local")) == data


def test_folders_and_tables_are_read_where_they_are(packed, tmp_path):
    folder = DataConfig(train=(str(packed.parent / "set"),), val=str(packed.parent / "set"))
    assert staged(folder, str(tmp_path / "local")) == folder
    assert not (tmp_path / "local").exists()


def test_a_copy_that_was_touched_is_hashed_and_a_damaged_one_made_again(packed, tmp_path):
    copy = Path(local_name(str(packed), str(tmp_path)))
    content = copy.read_bytes()
    copy.touch()
    first = copy.stat().st_ino
    assert local_name(str(packed), str(tmp_path)) == str(copy) and copy.stat().st_ino == first
    copy.write_bytes(content[:-1] + b"!")
    local_name(str(packed), str(tmp_path))
    assert copy.read_bytes() == content and copy.stat().st_ino != first


def test_a_copy_of_another_source_is_replaced(packed, tmp_path):
    source = tmp_path / "source" / "images.safetensors"
    source.parent.mkdir()
    shutil.copy(packed, source)
    copy = Path(local_name(str(source), str(tmp_path / "local")))
    make_pack(packed.parent / "set", source, "same")
    assert local_name(str(source), str(tmp_path / "local")) == str(copy)
    assert copy.read_bytes() == source.read_bytes()


def test_an_interrupted_download_goes_on_by_range(server, packed, tmp_path, small_blocks):
    address, size = f"{server.address}/images.safetensors", packed.stat().st_size
    server.fail_after = 20_500
    with pytest.raises(RunError, match=r"cannot copy http://.*images\.safetensors: .*the same command goes on at 0\.0"):
        local_name(address, str(tmp_path / "local"))
    (partial,) = (tmp_path / "local").rglob(".*.partial")
    have = partial.stat().st_size
    assert 10_000 < have <= 20_500
    server.fail_after, server.ranges = None, []
    copy = Path(local_name(address, str(tmp_path / "local")))
    assert copy.read_bytes() == packed.read_bytes() and server.ranges[0] == have < size
    assert files_in(tmp_path / "local") == ["images.safetensors", "images.safetensors.json"]


def test_a_copy_serves_while_its_address_cannot_be_reached(server, packed, tmp_path, capsys):
    address = f"{server.address}/images.safetensors"
    copy = local_name(address, str(tmp_path / "local"))
    server.http.shutdown()
    server.http.server_close()
    assert local_name(address, str(tmp_path / "local")) == copy
    assert "using the copy in" in capsys.readouterr().err
    with pytest.raises(UserError, match="cannot open"):
        local_name(f"{server.address}/other.safetensors", str(tmp_path / "local"))


def test_a_download_of_a_file_that_changes_starts_again(server, packed, tmp_path, small_blocks):
    address = f"{server.address}/images.safetensors"
    server.fail_after = 20_500
    with pytest.raises(RunError):
        local_name(address, str(tmp_path / "local"))
    server.fail_after, server.ranges = None, []
    other = tmp_path / "www" / "images.safetensors"
    make_pack(packed.parent / "set", other, "same")
    assert Path(local_name(address, str(tmp_path / "local"))).read_bytes() == other.read_bytes()
    assert server.ranges[0] == 0


@pytest.mark.parametrize("damage", ["in a pixel", "in a published hash"])
def test_a_file_that_does_not_have_its_hash_is_refused(server, packed, tmp_path, damage):
    path = tmp_path / "www" / "images.safetensors"
    if damage == "in a pixel":
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    else:
        path.with_name("images.safetensors.sha256").write_text("0" * 64 + "  images.safetensors\n")
    with pytest.raises(RunError, match=r"does not have its (hash|SHA-256)"):
        local_name(f"{server.address}/images.safetensors", str(tmp_path / "local"))
    assert "images.safetensors" not in files_in(tmp_path / "local")


def test_what_cannot_be_copied_says_why(server, packed, tmp_path, monkeypatch):
    local = str(tmp_path / "local")
    for name, message in (
        (f"{server.address}/none.safetensors", r"cannot open http://.*none\.safetensors: "),
        (f"{server.address}/images.csv", "cannot open|cannot be copied"),
        ("nothing://x/images.safetensors", "cannot open nothing://"),
        (str(packed.parent / "none-{0..1}.tar"), "cannot read .*none-0.tar: No such file"),
    ):
        with pytest.raises(UserError, match=message) as error:
            local_name(name, local)
        assert str(error.value).isprintable()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 0))
    with pytest.raises(UserError, match=r"needs 0\.00 GB more, and .* has 0\.00 GB free; set machine\.stage"):
        local_name(str(packed), local)


def _copy_in_a_process(source: str, folder: str) -> str:
    return local_name(source, folder)


@pytest.mark.slow
def test_processes_that_need_the_same_copy_wait_for_it(packed, tmp_path):
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        names = pool.starmap(_copy_in_a_process, [(str(packed), str(tmp_path / "local"))] * 6)
    assert len(set(names)) == 1 and Path(names[0]).read_bytes() == packed.read_bytes()


@pytest.mark.slow
def test_a_run_and_an_evaluation_read_shards_and_packs_at_addresses(server, demo_set, tmp_path):
    write_shards(demo_set / "train", tmp_path / "www")
    address = f"{server.address}/shard-{{000000..000003}}.tar"
    out, local = tmp_path / "run", tmp_path / "local"
    options = ["--set", f"machine.stage={local}", "--set", "machine.preload=true"]
    result = call("run", *TINY, "--data", address, "--val", demo_set / "val", "--epochs", 1, "--out", out, *options)
    assert f"500 training images of 10 classes in {local}" in result.stderr
    assert json.dumps(address) in (out / "recipe.toml").read_text()
    assert "of 500 images" in call("eval", out, "--device", "cpu", "--data", address).stdout


@pytest.mark.slow
def test_s3(packed, tmp_path, monkeypatch):
    """Against moto's server."""
    import boto3
    from moto.server import ThreadedMotoServer

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    moto = ThreadedMotoServer(port=0)
    moto.start()
    try:
        host, port = moto.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        client = boto3.client("s3")
        client.create_bucket(Bucket="bucket")
        client.upload_file(str(packed), "bucket", "sets/images.safetensors")
        copy = Path(local_name("s3://bucket/sets/images.safetensors", str(tmp_path)))
        assert copy.read_bytes() == packed.read_bytes()
        assert Path(local_name("s3://bucket/sets/im*.safetensors", str(tmp_path))) == copy
        with pytest.raises(UserError, match="cannot open s3://bucket/none"):
            local_name("s3://bucket/none.tar", str(tmp_path))
    finally:
        moto.stop()
