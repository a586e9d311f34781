"""Checkpoints: folders of safetensors and JSON, written aside and renamed, checked by hash when read.

`OUT/checkpoints/step-00000100/` holds model.safetensors (weights and buffers by name), train.safetensors (the
optimizer's momentum by parameter name, and the averaged weights where the run has such) and meta.json. `OUT/last` and
`OUT/best` are links to such folders.
"""

import fcntl
import hashlib
import itertools
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fasttrain import __version__, recipes
from fasttrain.config import Init, Recipe
from fasttrain.dataset import shown
from fasttrain.ema import Ema
from fasttrain.errors import RunError, UserError
from fasttrain.models import Classifier

FORMAT = 2
_MODEL, _TRAIN, _META = "model.safetensors", "train.safetensors", "meta.json"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as read: its folder, meta.json's content and the tensors, on the CPU."""

    path: Path
    meta: dict[str, Any]
    model: dict[str, Tensor]
    train: dict[str, Tensor]


def open_run(out: Path, resume: str, recipe_toml: str) -> Path | None:
    """Make or reopen a run's folder and write its recipe.toml; gives the checkpoint to go on from, or None.

    resume: `auto` (OUT/last where there is one), `never` (a run that is there is moved aside) or a path. UserError
    where the folder holds something else than a run.
    """
    used = out.is_dir() and any(out.iterdir())
    if used and not (out / "recipe.toml").is_file():
        raise UserError(f"{shown(out)} is not empty and holds no run; name another --out")
    if used and resume == "never":
        aside = next(each for n in itertools.count(1) if not (each := out.with_name(f"{out.name}.{n}")).exists())
        out.rename(aside)
        print(f"the run that was in {shown(out)} is now {shown(aside)}", file=sys.stderr)
    start = None
    if resume == "auto":
        start = _newest(out)
    elif resume != "never":
        start = find(Path(resume))
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not (start and (out / "recipe.toml").exists()):
            (out / "recipe.toml").write_text(recipe_toml, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write to {shown(out)}: {error.strerror}") from None
    return start


@contextmanager
def lock(out: Path) -> Iterator[None]:
    """Keep a run's folder to one process. UserError where another has it; one that has died does not."""
    path = out.parent / f".{out.name}.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            file = path.open("a+")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    break
            except BlockingIOError:
                file.seek(0)
                holder = file.read(64).strip()
                file.close()
                raise UserError(
                    f"another run is writing to {shown(out)} ({holder or 'just started'}); "
                    "wait for it, stop it, or name another --out"
                ) from None
            file.close()  # its holder has removed it in the meantime
    except OSError as error:
        raise UserError(f"cannot write to {shown(out.parent)}: {error.strerror}") from None
    with file:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _newest(out: Path) -> Path | None:
    """The newest whole checkpoint of a run: `last`, or, with a word on stderr, one before it. None where there is
    none yet; UserError where there are only damaged ones."""
    steps = sorted((out / "checkpoints").glob("step-*"), reverse=True)
    last = (out / "last").resolve()
    candidates = [each for each in steps if not last.is_dir() or each.name <= last.name]
    for candidate in candidates:
        try:
            verify(candidate)
            return candidate
        except UserError as error:
            print(f"{error}; looking at the one before", file=sys.stderr)
    if candidates:
        raise UserError(f"no checkpoint in {shown(out / 'checkpoints')} is whole; start over with --resume never")
    return None


def save(
    out: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    ema: Ema | None = None,
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
    home = out / "checkpoints"
    # The same step may be there, written before a resume from an earlier one; links lead to it, so it stays for now.
    names = (f"step-{step:08}{suffix}" for suffix in itertools.chain([""], (f".{n}" for n in itertools.count(1))))
    final = next(each for name in names if not (each := home / name).exists())
    aside = home / f".{final.name}.{os.getpid()}.partial"
    try:
        aside.mkdir(parents=True)
        save_file(_on_cpu(model.state_dict()), aside / _MODEL)
        averaged = {f"ema.{name}": each for name, each in ema.model.named_parameters()} if ema else {}
        save_file(_on_cpu(_momentum(model, optimizer) | averaged), aside / _TRAIN)
        content = {
            "format": FORMAT,
            "step": step,
            "archived": archived,
            **meta,
            "scaler": scaler.state_dict(),
            "versions": {"fasttrain": __version__, "torch": torch.__version__},
            "sha256": {name: _sha256(aside / name) for name in (_MODEL, _TRAIN)},
        }
        (aside / _META).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        for name in (_MODEL, _TRAIN, _META, "."):
            _sync(aside / name)
        aside.rename(final)
        _sync(home)
        _link(out / "last", final)
        if improved:
            _link(out / "best", final)
    except (OSError, SafetensorError) as error:
        raise RunError(f"cannot write a checkpoint to {shown(home)}: {error}; the one before is whole") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    _prune(out, home, keep)
    return final


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies: safetensors takes neither strides (channels_last) nor shared memory (tied weights)."""
    return {name: torch.empty(each.shape, dtype=each.dtype).copy_(each) for name, each in tensors.items()}


def _momentum(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    found = {name: optimizer.state[each].get("momentum_buffer") for name, each in model.named_parameters()}
    return {f"momentum.{name}": each for name, each in found.items() if each is not None}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _link(link: Path, target: Path) -> None:
    """Point `link` to `target`, in one step; as a relative link, so that the run's folder can be moved."""
    aside = link.with_name(f".{link.name}.{os.getpid()}")
    aside.unlink(missing_ok=True)
    aside.symlink_to(target.relative_to(link.parent))
    os.replace(aside, link)


def _prune(out: Path, home: Path, keep: int) -> None:
    kept = {(out / link).resolve() for link in ("best", "last")}
    for old in sorted(home.glob("step-*"))[:-keep]:
        if old.resolve() not in kept and not _is_archived(old):
            shutil.rmtree(old, ignore_errors=True)
    for remains in home.glob(".step-*"):  # of processes that were killed
        shutil.rmtree(remains, ignore_errors=True)


def _is_archived(path: Path) -> bool:
    try:
        return json.loads((path / _META).read_text(encoding="utf-8"))["archived"] is True
    except (OSError, ValueError, KeyError, TypeError):
        return False


def find(path: Path) -> Path:
    """The folder that `path` stands for: a checkpoint, `last` or `best`, or a run's folder (its best, else its last).

    Raises UserError where there is none.
    """
    for candidate in (path, path / "best", path / "last"):
        if (candidate / _META).is_file():
            return candidate.resolve()
    raise UserError(f"{shown(path)} is no checkpoint and holds none")


def load(path: Path) -> Checkpoint:
    """Read and verify a checkpoint. UserError names the file that is missing, damaged or of another format."""
    path = find(path)
    meta = verify(path)
    tensors = {}
    for name in (_MODEL, _TRAIN):
        try:
            tensors[name] = load_file(path / name)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{shown(path / name)} cannot be read: {error}") from None
    return Checkpoint(path, meta, tensors[_MODEL], tensors[_TRAIN])


def verify(path: Path) -> dict[str, Any]:
    """meta.json's content, once the folder's files have the hashes it names. UserError like `load`."""
    try:
        meta = json.loads((path / _META).read_text(encoding="utf-8"))
        known = meta["format"] == FORMAT
        hashes = {name: meta["sha256"][name] for name in (_MODEL, _TRAIN)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{shown(path / _META)} cannot be read as a checkpoint's: {error!r}") from None
    if not known:
        raise UserError(f"{shown(path)} has checkpoint format {meta['format']}; this fasttrain reads {FORMAT}")
    for name, expected in hashes.items():
        try:
            if _sha256(path / name) != expected:
                raise UserError(f"{shown(path / name)} is damaged: its SHA-256 is not the one in {_META}")
        except OSError as error:
            raise UserError(f"{shown(path / name)} cannot be read: {error.strerror}") from None
    return meta


# A run may go on with other values of these: none changes which images a step takes or what is done to them.
_FREE = ("name", "micro_batch", "init", "save", "data", "machine")


def refuse_other(saved: Checkpoint, identity: dict[str, Any]) -> None:
    """UserError, naming each difference, unless a checkpoint comes from a run of the same recipe, classes and images.

    identity: `recipe` (a recipe as plain values), `classes` (names) and `data` (the index's fingerprint).
    """
    ours, theirs = _flat(identity["recipe"]), _flat(saved.meta["recipe"])
    differences = [
        f"{key} was {theirs.get(key)!r} and is {ours.get(key)!r}"
        for key in {**theirs, **ours}
        if key.split(".")[0] not in _FREE and ours.get(key) != theirs.get(key)
    ]
    if saved.meta["classes"] != identity["classes"]:
        other = sorted(set(saved.meta["classes"]) ^ set(identity["classes"]))
        differences.append(f"the classes are others ({', '.join(map(shown, other[:3]))}{', …' if other[3:] else ''})")
    elif saved.meta["data"] != identity["data"]:
        differences.append("the training images are others")
    if differences:
        raise UserError(
            f"cannot go on from {shown(saved.path)}: {'; '.join(differences)}. "
            "Name another --out, or start over with --resume never"
        )


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def restore(
    saved: Checkpoint,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    ema: Ema | None = None,
) -> None:
    """Put a checkpoint's whole state back. UserError when the network's tensors are others."""
    restore_model(saved, model)
    for name, parameter in model.named_parameters():
        momentum = saved.train.get(f"momentum.{name}")
        if momentum is not None:  # in the parameter's own memory layout, which the fused step needs
            optimizer.state[parameter]["momentum_buffer"] = torch.empty_like(parameter).copy_(momentum).detach()
    if ema:
        restore_model(saved, ema.model, averaged=True)
    scaler.load_state_dict(saved.meta["scaler"])


def restore_model(saved: Checkpoint, model: nn.Module, averaged: bool = False) -> None:
    """Put a checkpoint's weights and buffers back; averaged: with the averaged weights. UserError when the network's
    tensors are others, or there are no averaged ones."""
    if averaged and not has_average(saved):
        raise UserError(f"{shown(saved.path)} has no averaged weights; its run had ema.decay=0")
    try:
        model.load_state_dict(_weights(saved, averaged))
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"{shown(saved.path)} does not fit this network: {reason}") from None


def has_average(saved: Checkpoint) -> bool:
    """Whether a checkpoint holds averaged weights beside the raw ones."""
    return any(key.startswith("ema.") for key in saved.train)


def network(path: Path, averaged: bool | None = None) -> tuple[Classifier, Recipe, list[str]]:
    """A checkpoint's network, on the CPU, in eval mode, with the recipe and the class names it was trained on.

    averaged: with the averaged weights (None: where there are such). Raises UserError like `load`.
    """
    saved = load(path)
    recipe = recipes.from_dict(saved.meta["recipe"], where=shown(saved.path))
    model = Classifier.of(recipe, len(saved.meta["classes"]))
    restore_model(saved, model, averaged=has_average(saved) if averaged is None else averaged)
    return model.eval(), recipe, saved.meta["classes"]


def initialise(model: Classifier, init: Init, arch: str, classes: Sequence[str]) -> str:
    """Start a network from a checkpoint's weights; gives a line that says which, and which stay random.

    Only heads may stay random: a cosine head that the checkpoint lacks, and the classifier where the classes are
    others. Heads of the checkpoint that the network lacks are left behind. UserError, naming the first tensor, where
    anything else does not fit.
    """
    path = Path(init.weights)
    saved = load(path)
    was = saved.meta["recipe"]["arch"]
    if was != arch:
        raise UserError(f"--init {shown(path)} holds a {was}, and this run trains a {arch}; they have to be the same")
    averaged = init.averaged and has_average(saved)
    tensors, own = _weights(saved, averaged), model.state_dict()
    same_classes = saved.meta["classes"] == list(classes)
    fits = {}
    for name in sorted({*own, *tensors}):
        shapes = [str(list(each[name].shape)) if name in each else "not there" for each in (tensors, own)]
        head = name.startswith("cosine.") or name.startswith(model.classifier_prefix)
        if shapes[0] == shapes[1] and (same_classes or not head):
            fits[name] = tensors[name]
        elif not (name.startswith("cosine.") or (head and not same_classes)):
            raise UserError(f"--init {shown(path)}: {name} is {shapes[0]} in it and {shapes[1]} in this network")
    model.load_state_dict(fits, strict=False)
    kind = "averaged weights" if averaged else "weights"
    return (
        f"init: {len(fits)} of {len(own)} tensors, {kind} of step {saved.meta['step']}, from {shown(saved.path)}; "
        f"starting random: {', '.join(sorted(own.keys() - fits)) or 'none'}"
    )


def _weights(saved: Checkpoint, averaged: bool) -> dict[str, Tensor]:
    if not averaged:
        return saved.model
    return saved.model | {key.removeprefix("ema."): each for key, each in saved.train.items() if key.startswith("ema.")}
