"""Checkpoints: folders of safetensors and JSON, written atomically, checked by hash when read.

`OUT/checkpoints/step-00000100/` holds model.safetensors (weights and buffers by name), train.safetensors (the
optimizer's momentum by parameter name, and the averaged weights where the run has them) and meta.json. `OUT/last` and
`OUT/best` are links to such folders.
"""

import itertools
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
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
from fasttrain.checkpoints import meta as meta_json
from fasttrain.checkpoints.meta import META, MODEL, TRAIN
from fasttrain.config import toml
from fasttrain.config.schema import Recipe
from fasttrain.models import Classifier
from fasttrain.models.aligned import cut, pad
from fasttrain.training.state import State
from fasttrain.utils.errors import RunError, UserError
from fasttrain.utils.files import atomic, atomic_folder, fsync, read_text, sha256_of
from fasttrain.utils.text import printable
from fasttrain.utils.versions import DALI, installed


class Snapshot:
    """A copy of a State in the host's memory, which further training does not change. Later copies reuse the memory
    (pinned, for a GPU), so that only the first one allocates."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, Tensor]] = {MODEL: {}, TRAIN: {}}
        self.scaler: dict[str, Any] = {}
        self.copied: torch.cuda.Event | None = None

    def take(self, state: State) -> "Snapshot":
        """Copy everything. On a GPU the copies are queued, in order with the work before and after them."""
        self.scaler = state.scaler.state_dict()  # it waits for the device, so it comes before the copies
        averaged = cut(dict(state.ema.model.named_parameters()), state.ema.model) if state.ema else {}
        self._copy(MODEL, state.model.state_dict())
        self._copy(TRAIN, _momentum(state) | {f"ema.{name}": each for name, each in averaged.items()})
        if next(state.model.parameters()).is_cuda:
            self.copied = torch.cuda.Event()
            self.copied.record()
        return self

    def _copy(self, file: str, tensors: dict[str, Tensor]) -> None:
        """Copy to contiguous tensors: safetensors stores neither strides (channels_last) nor shared (tied) weights."""
        copies = self.files[file]
        for name, tensor in tensors.items():
            if name not in copies:
                copies[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            copies[name].copy_(tensor, non_blocking=True)

    def wait(self) -> None:
        """Wait until the copies are complete."""
        if self.copied is not None:
            self.copied.synchronize()


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read: its folder, meta.json's content, and the tensors on the CPU."""

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
    """Write the state after `step` steps, point `last` to it, and remove all but the newest `keep` checkpoints.

    improved: point `best` to it too. archived: never remove this one. meta: the rest of meta.json, as JSON values. If
    the process is killed at any moment, `last` is the previous checkpoint or the new one. Raises RunError if the
    checkpoint cannot be written.
    """
    with _disk_errors(out):
        final = free_name(out, step)
        with _new_folder(final) as temporary:
            snapshot.wait()
            for name, tensors in snapshot.files.items():
                save_file(tensors, temporary / name)
            content = {
                "format": meta_json.FORMAT,
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
                "sha256": {name: sha256_of(temporary / name) for name in (MODEL, TRAIN)},
            }
            meta_json.write(temporary, content)
        set_link(out / "last", final)
        if improved:
            set_link(out / "best", final)
    with suppress(OSError):
        _prune(out, keep)
    return final


def branch(out: Path, path: Path, changes: Callable[[dict[str, Any]], dict[str, Any]]) -> Path:
    """Write another checkpoint with the same tensors, and point `last` to it. changes: returns what differs in its
    meta.json, given the original's. Raises RunError if it cannot be written."""
    meta = meta_json.read(path)
    with _disk_errors(out):
        final = free_name(out, meta["step"])
        with _new_folder(final) as temporary:
            for name in (MODEL, TRAIN):
                try:
                    os.link(path / name, temporary / name)
                except OSError:  # a file system without hard links
                    shutil.copyfile(path / name, temporary / name)
            meta_json.write(temporary, meta | changes(meta) | {"archived": False})
        set_link(out / "last", final)
    return final


@contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
    """Raises RunError where the disk, or safetensors, raises an error."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        home = printable(out / "checkpoints")
        raise RunError(f"cannot write a checkpoint to {home}: {error}; the one before is intact") from None


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder to write a checkpoint into. It becomes `folder` once all of it is on the disk."""
    with atomic_folder(folder) as temporary:
        yield temporary
        for name in (MODEL, TRAIN, META, "."):
            fsync(temporary / name)
    fsync(folder.parent)


def free_name(out: Path, step: int) -> Path:
    """A folder for a new checkpoint. One of the same step may exist, from before the run resumed from an earlier one;
    links may point to it, so it stays for now."""
    names = (f"step-{step:08}{suffix}" for suffix in itertools.chain([""], (f".{n}" for n in itertools.count(1))))
    return next(each for name in names if not (each := out / "checkpoints" / name).exists())


def _momentum(state: State) -> dict[str, Tensor]:
    found = {name: state.optimizer.state[each].get("momentum_buffer") for name, each in state.model.named_parameters()}
    kept = cut({name: each for name, each in found.items() if each is not None}, state.model)
    return {f"momentum.{name}": each for name, each in kept.items()}


def set_link(link: Path, target: Path) -> None:
    """Point `link` to `target` atomically: as a relative link, so that the run's folder can be moved, or, on a file
    system without links, as a file of one line."""
    relative = target.relative_to(link.parent)
    with atomic(link) as temporary:
        try:
            temporary.symlink_to(relative)
        except OSError:
            temporary.write_text(f"{relative}\n", encoding="utf-8")


def read_link(link: Path) -> Path:
    """What `link` points to, whether it exists or not; a path that is no link, itself. (Path.resolve raises for
    loops.)"""
    try:
        if link.is_file() and not link.is_symlink():
            return Path(os.path.realpath(link.parent / read_text(link, 4096).strip()))
        return Path(os.path.realpath(link))
    except (OSError, ValueError):  # such a name cannot exist
        return link


def _prune(out: Path, keep: int) -> None:
    home = out / "checkpoints"
    kept = {read_link(out / link) for link in ("best", "last")}
    steps = sorted(home.glob("step-*"))
    # Where steps fail, the run goes back to the newest checkpoint that was not taken while they failed.
    kept |= {each.resolve() for each in [each for each in reversed(steps) if meta_json.holds(each, "streak", 0)][:1]}
    for old in steps[:-keep]:
        if old.resolve() not in kept and not meta_json.holds(old, "archived", True):
            shutil.rmtree(old, ignore_errors=True)
    for remains in home.glob(".step-*"):  # left by processes that were killed
        shutil.rmtree(remains, ignore_errors=True)
    for remains in (*out.glob(".last.*"), *out.glob(".best.*")):
        remains.unlink(missing_ok=True)


def find(path: Path, first: str = "best") -> Path:
    """The checkpoint that `path` names: its folder, `last` or `best`, or a run's folder.

    first: which one of a run is taken if it has both, `best` or `last`. Raises UserError if there is none.
    """
    second = "last" if first == "best" else "best"
    for candidate in (read_link(path), read_link(path / first), read_link(path / second)):
        if os.path.isfile(candidate / META):  # Path.is_file raises for some impossible paths
            return candidate.resolve()
    why = "" if _exists(path) else ": there is no such file or folder"
    raise UserError(f"{printable(path)} is no checkpoint and holds none{why}")


def _exists(path: Path) -> bool:
    try:
        return os.path.lexists(path)
    except ValueError:  # such a name cannot exist
        return False


def load(path: Path) -> Checkpoint:
    """Read and verify a checkpoint. The UserError names the file that is missing, damaged or of another format."""
    path = find(path)
    meta = verify(path)
    tensors = {}
    for name in (MODEL, TRAIN):
        try:
            tensors[name] = load_file(path / name)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{printable(path / name)} cannot be read: {printable(str(error))}") from None
    return Checkpoint(path, meta, tensors[MODEL], tensors[TRAIN])


def verify(path: Path) -> dict[str, Any]:
    """Check the folder's files against the hashes in meta.json, and return its content. Raises UserError like
    `load`."""
    meta = meta_json.read(path)
    for name in (MODEL, TRAIN):
        try:
            if not (path / name).is_file():
                raise UserError(f"{printable(path / name)} is missing or not a file")
            if sha256_of(path / name) != meta["sha256"][name]:
                raise UserError(f"{printable(path / name)} is damaged: its SHA-256 is not the one in {META}")
        except OSError as error:
            raise UserError(f"{printable(path / name)} cannot be read: {error.strerror}") from None
    return meta


def restore(saved: Checkpoint, state: State) -> None:
    """Load a checkpoint's whole state into a State. Raises UserError where the network has other tensors."""
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
    if state.ema:  # a run that had no average starts one here
        restore_model(saved, state.ema.model, averaged=has_average(saved))
    try:
        if saved.meta["scaler"]:
            state.scaler.load_state_dict(saved.meta["scaler"])
    except (KeyError, RuntimeError, TypeError):
        raise _misfit(saved, "the scale of its float16 gradients is missing") from None


def _misfit(saved: Checkpoint, reason: str) -> UserError:
    return UserError(f"{printable(saved.path)} does not fit this network: {printable(reason)}")


def restore_model(saved: Checkpoint, model: nn.Module, averaged: bool = False) -> None:
    """Load a checkpoint's weights and buffers into a network. averaged: take the averaged weights. Raises UserError
    where the network has other tensors, or the checkpoint has no averaged weights."""
    if averaged and not has_average(saved):
        raise UserError(f"{printable(saved.path)} has no averaged weights; its run had ema.decay=0")
    try:
        model.load_state_dict(weights(saved, averaged))
    except RuntimeError as error:
        raise _misfit(saved, str(error).splitlines()[-1].strip()) from None


def has_average(saved: Checkpoint) -> bool:
    """Whether a checkpoint holds averaged weights too."""
    return any(key.startswith("ema.") for key in saved.train)


def network(path: Path, averaged: bool | None = None) -> tuple[Classifier, Recipe, list[str]]:
    """A checkpoint's network, on the CPU and in eval mode, with its recipe and class names.

    averaged: take the averaged weights; None: take them if there are any. Raises UserError like `load`.
    """
    saved = load(path)
    recipe = toml.from_dict(saved.meta["recipe"], where=printable(saved.path))
    require_fit(saved, recipe)
    model = Classifier.of(recipe, len(saved.meta["classes"]))
    restore_model(saved, model, averaged=has_average(saved) if averaged is None else averaged)
    return model.eval(), recipe, saved.meta["classes"]


def require_fit(saved: Checkpoint, recipe: Recipe) -> None:
    """Raises UserError unless a checkpoint has the tensors of its network. Checked before the network takes memory."""
    with torch.device("meta"):
        own = Classifier.of(recipe, len(saved.meta["classes"])).state_dict()
    if reason := first_misfit(own, saved.model):
        raise _misfit(saved, reason)


def first_misfit(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> str:
    """Which of a network's own tensors is missing in others or has another shape there; empty where all fit."""
    for name, each in own.items():
        if name not in tensors or tensors[name].shape != each.shape:
            return f"{name} is missing or not {list(each.shape)}"
    return ""


def weights(saved: Checkpoint, averaged: bool) -> dict[str, Tensor]:
    """A checkpoint's weights and buffers by name. averaged: with the averaged weights, which it must have."""
    if not averaged:
        return saved.model
    return saved.model | {key.removeprefix("ema."): each for key, each in saved.train.items() if key.startswith("ema.")}
