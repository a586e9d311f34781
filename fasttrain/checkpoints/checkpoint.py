"""Checkpoints: folders of safetensors and JSON, written aside and renamed, checked by hash when read.

`OUT/checkpoints/step-00000100/` holds model.safetensors (weights and buffers by name), train.safetensors (the
optimizer's momentum by parameter name, and the averaged weights where the run has such) and meta.json. `OUT/last` and
`OUT/best` are links to such folders.
"""

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fasttrain import __version__
from fasttrain.config import toml
from fasttrain.config.schema import Recipe
from fasttrain.models import Classifier
from fasttrain.models.aligned import cut, pad
from fasttrain.training.state import State
from fasttrain.utils.errors import RunError, UserError
from fasttrain.utils.files import read_json, read_text
from fasttrain.utils.text import printable
from fasttrain.utils.versions import DALI, installed

FORMAT = 3
_MODEL, _TRAIN, _META = "model.safetensors", "train.safetensors", "meta.json"


class Snapshot:
    """A copy of a State in the host's memory, which training on does not change. Taken again, it goes to the same
    memory (pinned, for a GPU), so that only the first one waits for the system to find some."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, Tensor]] = {_MODEL: {}, _TRAIN: {}}
        self.scaler: dict[str, Any] = {}
        self.copied: torch.cuda.Event | None = None

    def take(self, state: State) -> "Snapshot":
        """Copy everything; on a GPU the copies are only asked for, in order with what comes before and after them."""
        self.scaler = state.scaler.state_dict()  # reads its scale, so it comes before all that would be waited for
        averaged = cut(dict(state.ema.model.named_parameters()), state.ema.model) if state.ema else {}
        self._copy(_MODEL, state.model.state_dict())
        self._copy(_TRAIN, _momentum(state) | {f"ema.{name}": each for name, each in averaged.items()})
        if next(state.model.parameters()).is_cuda:
            self.copied = torch.cuda.Event()
            self.copied.record()
        return self

    def _copy(self, file: str, tensors: dict[str, Tensor]) -> None:
        """Contiguous copies: safetensors takes neither strides (channels_last) nor shared memory (tied weights)."""
        copies = self.files[file]
        for name, each in tensors.items():
            if name not in copies:
                copies[name] = torch.empty(each.shape, dtype=each.dtype, pin_memory=each.is_cuda)
            copies[name].copy_(each, non_blocking=True)

    def wait(self) -> None:
        """Until the copies are there."""
        if self.copied is not None:
            self.copied.synchronize()


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as read: its folder, meta.json's content and the tensors, on the CPU."""

    path: Path
    meta: dict[str, Any]
    model: dict[str, Tensor]
    train: dict[str, Tensor]


def save(
    out: Path,
    step: int,
    snapshot: Snapshot,
    *,
    improved: bool,
    keep: int,
    archived: bool = False,
    meta: dict[str, Any],
) -> Path:
    """Write the state after `step` steps, point `last` (and `best`) to it, and remove what is older than `keep`.

    archived: never remove this one. meta: what else meta.json shall hold, as JSON values. A process that is killed
    at any moment leaves `last` where it was or at the new one. Raises RunError where the disk does not take it.
    """
    with _writing(out, step) as (aside, final):
        snapshot.wait()
        for name, tensors in snapshot.files.items():
            save_file(tensors, aside / name)
        content = {
            "format": FORMAT,
            "step": step,
            "archived": archived,
            **meta,
            "scaler": snapshot.scaler,
            "versions": {
                "fasttrain": __version__,
                "torch": torch.__version__,
                "timm": timm.__version__,
                "nvidia-dali": installed(*DALI),
            },
            "sha256": {name: _sha256(aside / name) for name in (_MODEL, _TRAIN)},
        }
        _put_in_place(aside, final, content)
        set_link(out / "last", final)
        if improved:
            set_link(out / "best", final)
    with suppress(OSError):
        _prune(out, keep)
    return final


def branch(out: Path, path: Path, changes: Callable[[dict[str, Any]], dict[str, Any]]) -> Path:
    """Another checkpoint of the same tensors, which takes the place of `last`; changes: what its meta.json has of its
    own, given the other's. RunError where the disk does not take it."""
    meta = read_meta(path)
    with _writing(out, meta["step"]) as (aside, final):
        for name in (_MODEL, _TRAIN):
            try:
                os.link(path / name, aside / name)
            except OSError:  # a file system without such links
                shutil.copyfile(path / name, aside / name)
        _put_in_place(aside, final, meta | changes(meta) | {"archived": False})
        set_link(out / "last", final)
    return final


@contextmanager
def _writing(out: Path, step: int) -> Iterator[tuple[Path, Path]]:
    """A folder to write a checkpoint of a step into, and the one that it is to become; what is left of the first is
    removed at the end of the block. Raises RunError in place of what the disk, or safetensors, says."""
    home = out / "checkpoints"
    aside = home / f".step-{step:08}.{os.getpid()}.partial"
    try:
        final = _free_name(out, step)
        aside.mkdir(parents=True)
        yield aside, final
    except (OSError, SafetensorError) as error:
        raise RunError(f"cannot write a checkpoint to {printable(home)}: {error}; the one before is whole") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _free_name(out: Path, step: int) -> Path:
    """A folder for a checkpoint. The same step may be there, written before a resume from an earlier one; links lead
    to it, so it stays for now."""
    names = (f"step-{step:08}{suffix}" for suffix in itertools.chain([""], (f".{n}" for n in itertools.count(1))))
    return next(each for name in names if not (each := out / "checkpoints" / name).exists())


def _put_in_place(aside: Path, final: Path, meta: dict[str, Any]) -> None:
    """Complete a checkpoint by its meta.json, and give it its name once all of it is on the disk."""
    meta = meta | {"checksum": _checksum(meta)}
    (aside / _META).write_text(json.dumps(meta, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    for name in (_MODEL, _TRAIN, _META, "."):
        _sync(aside / name)
    aside.rename(final)
    _sync(final.parent)


def _momentum(state: State) -> dict[str, Tensor]:
    found = {name: state.optimizer.state[each].get("momentum_buffer") for name, each in state.model.named_parameters()}
    kept = cut({name: each for name, each in found.items() if each is not None}, state.model)
    return {f"momentum.{name}": each for name, each in kept.items()}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def set_link(link: Path, target: Path) -> None:
    """Point `link` to `target`, in one step: as a relative link, so that the run's folder can be moved, or, on a file
    system without links, as a file of one line."""
    aside, relative = link.with_name(f".{link.name}.{os.getpid()}"), target.relative_to(link.parent)
    aside.unlink(missing_ok=True)
    try:
        aside.symlink_to(relative)
    except OSError:
        aside.write_text(f"{relative}\n", encoding="utf-8")
    os.replace(aside, link)


def read_link(link: Path) -> Path:
    """What `link` points to, whether that is there or not; what is no link, itself. Path.resolve raises for loops."""
    try:
        if link.is_file() and not link.is_symlink():
            return Path(os.path.realpath(link.parent / read_text(link, 4096).strip()))
        return Path(os.path.realpath(link))
    except (OSError, ValueError):  # no such name can be
        return link


def _prune(out: Path, keep: int) -> None:
    home = out / "checkpoints"
    kept = {read_link(out / link) for link in ("best", "last")}
    steps = sorted(home.glob("step-*"))
    # One that was not taken while steps were failing is what a run goes back to.
    kept |= {each.resolve() for each in [each for each in reversed(steps) if _holds(each, "streak", 0)][:1]}
    for old in steps[:-keep]:
        if old.resolve() not in kept and not _holds(old, "archived", True):
            shutil.rmtree(old, ignore_errors=True)
    for remains in home.glob(".step-*"):  # of processes that were killed
        shutil.rmtree(remains, ignore_errors=True)
    for remains in (*out.glob(".last.*"), *out.glob(".best.*")):
        remains.unlink(missing_ok=True)


def _holds(path: Path, key: str, value: Any) -> bool:
    """Whether a checkpoint's meta.json says so; of one that is damaged it does not."""
    try:
        return bool(read_meta(path)[key] == value)
    except UserError:
        return False


def find(path: Path) -> Path:
    """The folder that `path` stands for: a checkpoint, `last` or `best`, or a run's folder (its best, else its last).

    Raises UserError where there is none.
    """
    for candidate in (read_link(path), read_link(path / "best"), read_link(path / "last")):
        if os.path.isfile(candidate / _META):  # False for paths that there cannot be; Path.is_file raises for some
            return candidate.resolve()
    raise UserError(f"{printable(path)} is no checkpoint and holds none")


def load(path: Path) -> Checkpoint:
    """Read and verify a checkpoint. UserError names the file that is missing, damaged or of another format."""
    path = find(path)
    meta = verify(path)
    tensors = {}
    for name in (_MODEL, _TRAIN):
        try:
            tensors[name] = load_file(path / name)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{printable(path / name)} cannot be read: {printable(str(error))}") from None
    return Checkpoint(path, meta, tensors[_MODEL], tensors[_TRAIN])


def verify(path: Path) -> dict[str, Any]:
    """meta.json's content, once the folder's files have the hashes it names. UserError like `load`."""
    meta = read_meta(path)
    for name in (_MODEL, _TRAIN):
        try:
            if not (path / name).is_file():
                raise UserError(f"{printable(path / name)} is missing, or no file")
            if _sha256(path / name) != meta["sha256"][name]:
                raise UserError(f"{printable(path / name)} is damaged: its SHA-256 is not the one in {_META}")
        except OSError as error:
            raise UserError(f"{printable(path / name)} cannot be read: {error.strerror}") from None
    return meta


def read_meta(path: Path) -> dict[str, Any]:
    """The content of a checkpoint's meta.json, which may be anybody's: each value that is used is of its type.

    Raises UserError where it is missing, no file, too large, or holds something else.
    """
    file = path / _META
    try:
        meta = read_json(file)
    except OSError as error:
        raise UserError(f"{printable(file)} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{printable(file)} cannot be read as a checkpoint's: {printable(str(error))}") from None
    if not isinstance(meta, dict):
        raise UserError(f"{printable(file)} cannot be read as a checkpoint's: it holds no object")
    # Format first: those before had no checksum.
    if meta.get("format") != FORMAT:
        was = printable(repr(meta.get("format"))[:40])
        raise UserError(f"{printable(path)} has checkpoint format {was}; this fasttrain reads {FORMAT}")
    try:
        whole = meta.pop("checksum", None) == _checksum(meta)
    except RecursionError:  # json writes less deeply than it reads
        whole = False
    if not whole:
        raise UserError(f"{printable(file)} is damaged: it does not have the checksum that it names")
    for key, holds in _CONTENT.items():
        if key not in meta or not holds(meta[key]):
            raise UserError(
                f"{printable(file)} cannot be read as a checkpoint's: its {key!r} is missing or of another kind"
            )
    return meta


def _checksum(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**53


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -1e30 < value < 1e30  # finite in float32, and so are sums


def _all(holds: Callable[[Any], bool], within: type[list] | type[dict]) -> Callable[[Any], bool]:
    def each_holds(value: Any) -> bool:
        return type(value) is within and all(map(holds, value.values() if isinstance(value, dict) else value))

    return each_holds


_is_mean = _all(_is_number, list)
_are_texts = _all(lambda value: type(value) is str, list)
# What a run reads from meta.json. The recipe is checked where it is made, tensors where they are put.
_CONTENT: dict[str, Callable[[Any], bool]] = {
    "step": _is_count,
    "epoch_steps": lambda value: _is_count(value) and value > 0,
    "world": lambda value: _is_count(value) and value > 0,
    "rewinds": _is_count,
    "shift": _is_count,
    "streak": _is_count,
    "archived": lambda value: type(value) is bool,
    "recipe": lambda value: type(value) is dict,
    "classes": lambda value: _are_texts(value) and 0 < len(value) == len(set(value)),
    "data": lambda value: type(value) is str,
    "sizes": lambda value: type(value) is str,
    "best": lambda value: value is None or _is_number(value),
    "meters": _all(_all(lambda value: _is_mean(value) and len(value) == 2, dict), list),
    "logged": _all(_is_mean, dict),
    "scaler": _all(_is_number, dict),
    "sha256": lambda value: type(value) is dict and all(type(value.get(name)) is str for name in (_MODEL, _TRAIN)),
}


def restore(saved: Checkpoint, state: State) -> None:
    """Put a checkpoint's whole state back. UserError when the network's tensors are others."""
    restore_model(saved, state.model)
    momenta = {key.removeprefix("momentum."): each for key, each in saved.train.items() if key.startswith("momentum.")}
    try:
        momenta = pad(momenta, state.model)
    except UserError as error:
        raise _misfit(saved, f"momentum of {error}") from None
    for name, parameter in state.model.named_parameters():
        buffer = state.optimizer.state[parameter].get("momentum_buffer")
        if name in momenta and buffer is not None:
            buffer.copy_(momenta[name])
    if state.ema:  # from here on, where the run had none before
        restore_model(saved, state.ema.model, averaged=has_average(saved))
    try:
        if saved.meta["scaler"]:
            state.scaler.load_state_dict(saved.meta["scaler"])
    except (KeyError, RuntimeError, TypeError):
        raise _misfit(saved, "the scale of its float16 gradients is missing") from None


def _misfit(saved: Checkpoint, reason: str) -> UserError:
    return UserError(f"{printable(saved.path)} does not fit this network: {printable(reason)}")


def restore_model(saved: Checkpoint, model: nn.Module, averaged: bool = False) -> None:
    """Put a checkpoint's weights and buffers back; averaged: with the averaged weights. UserError when the network's
    tensors are others, or there are no averaged ones."""
    if averaged and not has_average(saved):
        raise UserError(f"{printable(saved.path)} has no averaged weights; its run had ema.decay=0")
    try:
        model.load_state_dict(weights(saved, averaged))
    except RuntimeError as error:
        raise _misfit(saved, str(error).splitlines()[-1].strip()) from None


def has_average(saved: Checkpoint) -> bool:
    """Whether a checkpoint holds averaged weights beside the raw ones."""
    return any(key.startswith("ema.") for key in saved.train)


def network(path: Path, averaged: bool | None = None) -> tuple[Classifier, Recipe, list[str]]:
    """A checkpoint's network, on the CPU, in eval mode, with the recipe and the class names it was trained on.

    averaged: with the averaged weights (None: where there are such). Raises UserError like `load`.
    """
    saved = load(path)
    recipe = toml.from_dict(saved.meta["recipe"], where=printable(saved.path))
    _require_fit(saved, recipe)
    model = Classifier.of(recipe, len(saved.meta["classes"]))
    restore_model(saved, model, averaged=has_average(saved) if averaged is None else averaged)
    return model.eval(), recipe, saved.meta["classes"]


def _require_fit(saved: Checkpoint, recipe: Recipe) -> None:
    """UserError unless a checkpoint has the tensors of its network; found before the network takes any memory."""
    with torch.device("meta"):
        own = Classifier.of(recipe, len(saved.meta["classes"])).state_dict()
    for name, each in own.items():
        if name not in saved.model or saved.model[name].shape != each.shape:
            raise _misfit(saved, f"{name} is missing or not {list(each.shape)}")


def weights(saved: Checkpoint, averaged: bool) -> dict[str, Tensor]:
    """A checkpoint's weights and buffers by name; averaged: with the averaged weights, which it must have."""
    if not averaged:
        return saved.model
    return saved.model | {key.removeprefix("ema."): each for key, each in saved.train.items() if key.startswith("ema.")}
