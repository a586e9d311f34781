"""Copies packs, tar shards and parquet files from a slow disk or an address (s3://, gs://, https://) to a local folder.

A copy stays for later runs. Next to it, a record says what it is a copy of and has its SHA-256. A copy that was
interrupted goes on where it stopped.
"""

import fcntl
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from fasttrain.data.scan import cache_dir
from fasttrain.data.stores.arrow import is_arrow
from fasttrain.data.stores.pack import Images, is_pack, open_pack
from fasttrain.data.stores.patterns import expand, expand_braces
from fasttrain.data.stores.shards import is_shards
from fasttrain.utils.errors import CommandError, RunError, UserError
from fasttrain.utils.files import atomic, fsync, opened, read_json_object, sha256_of
from fasttrain.utils.text import printable

if TYPE_CHECKING:  # config imports torch
    from fasttrain.config.schema import DataConfig

_BLOCK = 8 << 20  # bytes that are read and written at once
_ENDINGS = (".safetensors", ".tar", ".parquet", ".arrow")
_MARKS = ("ETag", "etag", "Last-Modified", "LastModified", "mtime", "updated", "md5Hash", "Content-MD5")


def is_address(name: str) -> bool:
    """Whether a name is an address such as s3://bucket/file, not a path."""
    return re.match(r"[A-Za-z][\w+.-]*://", name) is not None


def staged(data: "DataConfig", folder: str) -> "DataConfig":
    """The settings with the names of local copies instead of addresses and, where `folder` is given, instead of packs,
    shards, parquet and Arrow files.

    folder: where the copies are; by default in the user's cache. Processes of a machine that need the same copy wait
    for the one that makes it. Raises UserError where something cannot be copied or does not fit, RunError where the
    source or the disk fails.
    """
    train = tuple(local_name(name, folder) for name in data.train)
    return replace(data, train=train, val=local_name(data.val, folder) if data.val else "")


def local_name(name: str, folder: str = "") -> str:
    """The name of the local copy of what `name` names, which may be a pattern; `name` itself where it is a local folder
    or table, or neither an address nor to be copied. See `staged`."""
    if not is_address(name) and not (
        folder and not os.path.isdir(name) and (is_pack(name) or is_shards(name) or is_arrow(name))
    ):
        return name
    home = Path(folder) if folder else cache_dir() / "staged"
    try:
        sources = _sources(name)
    except UserError as error:
        copies = [_target(address, home) for address in expand_braces(name)] if is_address(name) else []
        if not copies or not all(map(_is_finished, copies)):
            raise
        print(f"{error}; using the copy in {printable(copies[0].parent)}", file=sys.stderr)
        return _as_pattern(copies)
    if len({os.path.basename(source.name) for source in sources}) < len(sources):
        raise UserError(f"{printable(name)} names two files of the same name in different folders; name one folder")
    copies = [_target(source.name, home) for source in sources]
    try:
        for source, copy in zip(sources, copies, strict=True):
            copy.parent.mkdir(parents=True, exist_ok=True)
            _stage(source, copy)
    except OSError as error:
        raise RunError(f"cannot write to {printable(home)}: {error.strerror or error}") from None
    return _as_pattern(copies)


def _target(name: str, home: Path) -> Path:
    """Where the copy of a file is kept."""
    folder, _, last = name.rpartition("/")
    return home / sha256(folder.encode(errors="surrogateescape")).hexdigest()[:16] / last


def _is_finished(copy: Path) -> bool:
    record = read_json_object(copy.with_name(f"{copy.name}.json"))
    return copy.is_file() and copy.stat().st_mtime_ns == record.get("copied_mtime_ns")


def _as_pattern(copies: Sequence[Path]) -> str:
    """One name for several files."""
    if len(copies) == 1:
        return str(copies[0])
    if len({copy.parent for copy in copies}) > 1:
        raise UserError(f"{printable(copies[0].name)} and others are in different folders; name one folder")
    ending = copies[0].suffix
    return str(copies[0].with_name(f"{{{','.join(copy.name.removesuffix(ending) for copy in copies)}}}{ending}"))


@dataclass(frozen=True)
class _Source:
    """A file to copy. name: its path or address. size: in bytes. marks: what changes when its content does."""

    name: str
    size: int
    marks: dict[str, str]

    def open(self) -> BinaryIO:
        """Open it for reading from any position."""
        return opened(self.name)

    def published_hash(self) -> str:
        """The SHA-256 in a file with the same name and `.sha256`; "" where there is none."""
        try:
            with opened(f"{self.name}.sha256") as file:
                return _hash_in(file.read(4096))
        except OSError:
            return ""


@dataclass(frozen=True)
class _RemoteFile(_Source):
    """A file of an fsspec file system, at `path` in it."""

    system: Any
    path: str

    def open(self) -> BinaryIO:
        return self.system.open(self.path, "rb", block_size=_BLOCK)

    def published_hash(self) -> str:
        try:
            return _hash_in(self.system.cat_file(f"{self.path}.sha256", 0, 4096))
        except Exception:  # each file system has its own; there is no such file
            return ""


def _hash_in(content: bytes) -> str:
    match = re.match(rb"[0-9a-fA-F]{64}\b", content.strip())
    return match[0].decode().lower() if match else ""


def _sources(name: str) -> list[_Source]:
    """The files that a name or pattern stands for. Raises UserError where one is not there, or not of a kind that can
    be copied."""
    if is_address(name):
        sources: list[_Source] = [found for address in expand_braces(name) for found in _remote_files(address)]
    else:
        sources = []
        for path in expand(name):
            try:
                info = os.stat(path)
            except OSError as error:
                raise UserError(f"cannot read {printable(path)}: {error.strerror}") from None
            sources.append(_Source(os.path.abspath(path), info.st_size, {"mtime_ns": str(info.st_mtime_ns)}))
    for source in sources:
        last = source.name.rsplit("/", 1)[-1]
        if is_address(source.name) and "?" in last:
            raise UserError(f"{printable(source.name)}: an address may have no ?; download the file yourself")
        if not last.lower().endswith(_ENDINGS) or re.search(r"[{},*?\[\]]", last):
            raise UserError(
                f"{printable(source.name)} cannot be copied: an address or machine.stage takes packs (.safetensors), "
                "shards (.tar), parquet and Arrow files; copy a folder or a table yourself"
            )
    return sources


def _remote_files(address: str) -> list[_Source]:
    try:
        import fsspec
    except ImportError:
        raise UserError(f"{printable(address)} needs fsspec: pip install 'fsspec[http]' s3fs") from None
    protocol = address.split("://", 1)[0]
    try:
        system, path = fsspec.core.url_to_fs(address)
        paths = sorted(system.glob(path)) if re.search(r"[*\[]", path) else [path]
        if not paths:
            raise UserError(f"nothing matches {printable(address)}")
        found: list[_Source] = []
        for each in paths:
            info = system.info(each)
            marks = {key: str(info[key]) for key in _MARKS if info.get(key) is not None}
            name = each if is_address(each) else f"{protocol}://{each}"
            if not isinstance(info.get("size"), int) or info.get("type") == "directory":
                raise UserError(f"{printable(name)} has no size that its server tells; download it yourself")
            found.append(_RemoteFile(name, info["size"], marks, system, each))
        return found
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"{printable(address)}: {printable(str(error))}") from None
    except Exception as error:  # each file system has its own
        raise UserError(f"cannot open {printable(address)}: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    lines = (str(error) or type(error).__name__).splitlines()
    name = "" if isinstance(error, OSError) and error.strerror else f"{type(error).__name__}: "
    return printable(f"{name}{lines[0]}"[:300])


def _stage(source: _Source, target: Path) -> None:
    """Copy a file, unless there is a copy already."""
    record_path = target.with_name(f"{target.name}.json")
    wanted = {"address": source.name, "size": source.size, "marks": source.marks}
    with _locked(target.with_name(f".{target.name}.lock")):
        if _is_copy(target, read_json_object(record_path), wanted):
            return
        partial, begun = target.with_name(f".{target.name}.partial"), target.with_name(f".{target.name}.begun")
        if read_json_object(begun) != wanted:
            partial.unlink(missing_ok=True)
            with atomic(begun) as temporary:
                temporary.write_text(json.dumps(wanted), encoding="utf-8")
        digest = _copy(source, partial)
        expected = source.published_hash()
        if digest != sha256_of(partial) or (expected and digest != expected):
            partial.unlink()
            raise RunError(f"the copy of {printable(source.name)} does not have its SHA-256; start again")
        if target.suffix == ".safetensors":
            _check_pack(partial, source.name)
        fsync(partial)
        os.replace(partial, target)
        record = wanted | {"sha256": digest, "copied_mtime_ns": target.stat().st_mtime_ns}
        with atomic(record_path) as temporary:
            temporary.write_text(json.dumps(record, indent=1), encoding="utf-8")
        begun.unlink(missing_ok=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Wait until no other process of this machine holds a lock, and hold it."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _is_copy(target: Path, record: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Whether a file is a copy of what is wanted: by its record, and by its hash if it was touched since."""
    if not target.is_file() or {key: record.get(key) for key in wanted} != wanted:
        return False
    info = target.stat()
    if info.st_size != wanted["size"]:
        return False
    return info.st_mtime_ns == record.get("copied_mtime_ns") or sha256_of(target) == record.get("sha256")


def _copy(source: _Source, partial: Path) -> str:
    """Copy a file to `partial`, from where that ends. Returns the SHA-256 of what was read."""
    from tqdm import tqdm

    digest = sha256()
    with partial.open("ab") as copy, partial.open("rb") as before:
        while block := before.read(_BLOCK):
            digest.update(block)
        done = copy.tell()
        free = shutil.disk_usage(partial.parent).free
        if source.size - done > free:
            raise UserError(
                f"{printable(source.name)} needs {(source.size - done) / 1e9:.2f} GB more, and "
                f"{printable(partial.parent)} has {free / 1e9:.2f} GB free; set machine.stage or XDG_CACHE_HOME to a "
                "folder on another disk"
            )
        name = printable(source.name.rsplit("/", 1)[-1])
        # `disable=None` hides the bar where stderr is not a terminal.
        bar = tqdm(total=source.size, initial=done, desc=f"copying {name}", unit="B", unit_scale=True, disable=None)
        with bar:
            try:
                with source.open() as file:
                    if done:
                        file.seek(done)
                    while done < source.size and (block := file.read(min(_BLOCK, source.size - done))):
                        digest.update(block)
                        copy.write(block)
                        done += len(block)
                        bar.update(len(block))
            except CommandError:
                raise
            except Exception as error:  # each file system has its own
                copy.flush()
                raise RunError(
                    f"cannot copy {printable(source.name)}: {_reason(error)}; the same command goes on at "
                    f"{done / 1e6:.1f} MB"
                ) from None
    if done != source.size:
        raise RunError(
            f"{printable(source.name)} ended at {done} of {source.size} bytes; the same command goes on there"
        )
    return digest.hexdigest()


def _check_pack(path: Path, name: str) -> None:
    """Raises RunError where a pack's images do not have their hashes."""
    for index in open_pack(path).values():
        store = index.store
        assert isinstance(store, Images)
        for number, image_id in enumerate(index.ids):
            if not store.intact(number):
                raise RunError(f"{printable(name)} is damaged: {printable(image_id)} does not have its hash")
