"""Weights to start a run from: another run's, or a file of a timm network's weights."""

import argparse
import re
import zipfile
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from fasttrain.checkpoints import checkpoint
from fasttrain.config.schema import InitConfig
from fasttrain.models import Classifier
from fasttrain.models.heads import TRAINING_HEADS
from fasttrain.utils.errors import UserError
from fasttrain.utils.text import printable

FILES = (".pth", ".pt", ".bin", ".safetensors", ".tar", ".ckpt", ".pkl")
# Where training programs keep the weights in their files: timm, torchvision, Lightning and others.
_AVERAGED = ("state_dict_ema", "model_ema", "ema")
_CONTAINERS = ("state_dict", "model_state_dict", "model", "net", "module")
_NUMBERS = ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "b1")
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "backbone.")


class _Weights(NamedTuple):
    tensors: dict[str, Tensor]
    same_classes: bool
    source: str


def initialize(model: Classifier, init: InitConfig, arch: str, classes: Sequence[str]) -> str:
    """Load a checkpoint's or a file's weights into a network. Returns a line that says which were loaded and which stay
    random.

    Only heads may stay random: a cosine or projection head that the weights lack, and the classifier and the cosine
    head where the classes differ (a file has no class names, so there: where their number differs). Heads that the
    network lacks are ignored. Raises UserError that names the first tensor, where anything else does not fit.
    """
    path = Path(init.weights)
    if path.suffix in FILES and not path.is_dir():
        found = _from_file(path, model, init.averaged, classes)
    else:
        found = _from_checkpoint(path, arch, classes, init.averaged)
    own = model.state_dict()
    fits = {}
    for name in sorted({*own, *found.tensors}):
        shapes = [str(list(each[name].shape)) if name in each else "not there" for each in (found.tensors, own)]
        of_classes = name.startswith(("cosine.", model.classifier_prefix))
        if shapes[0] == shapes[1] and (found.same_classes or not of_classes):
            fits[name] = found.tensors[name]
        elif name.endswith("num_batches_tracked") and name not in found.tensors:
            continue  # files from before torch 0.4.1 lack it; it does not matter with a fixed momentum
        elif not (name.startswith(TRAINING_HEADS) or (of_classes and not found.same_classes)):
            raise UserError(
                f"--init {printable(path)}: {printable(name)} is {shapes[0]} in it and {shapes[1]} in this network"
            )
    if not next(model.parameters()).is_meta:  # on the meta device it is only checked
        model.load_state_dict(fits, strict=False)
    return (
        f"init: {len(fits)} of {len(own)} tensors, {found.source}; "
        f"starting random: {', '.join(sorted(own.keys() - fits)) or 'none'}"
    )


def _from_checkpoint(path: Path, arch: str, classes: Sequence[str], averaged: bool) -> _Weights:
    saved = checkpoint.load(path)
    was = saved.meta["recipe"].get("arch")
    if was != arch:
        raise UserError(
            f"--init {printable(path)} holds a {printable(str(was))}, and this run trains a {arch}; "
            "they have to be the same"
        )
    averaged = averaged and checkpoint.has_average(saved)
    kind = "averaged weights" if averaged else "weights"
    source = f"{kind} of step {saved.meta['step']}, from {printable(saved.path)}"
    return _Weights(checkpoint.weights(saved, averaged), saved.meta["classes"] == list(classes), source)


def _from_file(path: Path, model: Classifier, averaged: bool, classes: Sequence[str]) -> _Weights:
    """A file with timm's names; its classifier is used where it has as many classes."""
    if path.name == "model.safetensors" and (path.parent / "meta.json").is_file():
        raise UserError(
            f"--init {printable(path)} is a part of a checkpoint; name its folder, {printable(path.parent)}"
        )
    own, head = model.state_dict(), model.classifier_prefix
    tensors: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    for name, tensor in read_weights(path, f"--init {printable(path)}", averaged).items():
        if name == "n_averaged":  # of torch's AveragedModel
            continue
        ours = _our_name(name, own)
        if ours in tensors:
            first, second = printable(names[ours]), printable(name)
            raise UserError(
                f"--init {printable(path)} holds two networks: {first} and {second} are the same tensor of this one; "
                "save only one of them"
            )
        tensors[ours], names[ours] = tensor, name
    same_classes = all(name in tensors and tensors[name].shape == own[name].shape for name in own if head in name)
    source = f"from {printable(path)}"
    if same_classes:
        source += f", whose outputs have no names: the first is taken as class {printable(classes[0])}, and so on"
    return _Weights(tensors, same_classes, source)


def _our_name(name: str, own: Container[str]) -> str:
    """The name in our network of a tensor in a file, without the prefixes of DDP, torch.compile and other wrappers."""
    while not (name.startswith(TRAINING_HEADS) or f"backbone.{name}" in own):
        prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), None)
        if prefix is None:
            break
        name = name.removeprefix(prefix)
    return name if name.startswith(TRAINING_HEADS) else f"backbone.{name}"


def read_weights(path: Path, where: str, averaged: bool = True) -> dict[str, Tensor]:
    """The tensors of an untrusted file. Nothing in it is executed, and it cannot unpack to more than its size.

    where: how errors name the file. averaged: of two sets of weights, take the averaged ones. Raises UserError."""
    try:
        if not path.is_file():
            raise ValueError("there is no such file")
        if path.suffix == ".safetensors":
            return load_file(path)
        if not zipfile.is_zipfile(path):
            raise ValueError("it was not written by torch.save, or by torch before 1.6; save it again")
        with zipfile.ZipFile(path) as archive:
            if any(each.compress_type != zipfile.ZIP_STORED for each in archive.infolist()):
                raise ValueError("it is compressed; torch.save does not do that")
        with torch.serialization.safe_globals(_safe_types()):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # damaged files make the two libraries raise anything
        raise UserError(f"{where} cannot be read: {_cause(error)}") from None
    keys = (*_AVERAGED, *_CONTAINERS) if averaged else (*_CONTAINERS, *_AVERAGED)
    found = _state_dict(content, keys, depth=3)
    if found is None:
        raise UserError(
            f"{where} holds no weights: expected a state dict, or one under the key "
            f"{', '.join(_CONTAINERS)} or {', '.join(_AVERAGED)}"
        )
    return {str(name): tensor for name, tensor in found.items()}


def _state_dict(content: Any, keys: Sequence[str], depth: int) -> dict[Any, Tensor] | None:
    """The first table of tensors alone: the content itself, or what is under one of the keys."""
    if not isinstance(content, dict) or not content:
        return None
    if all(isinstance(value, Tensor) for value in content.values()):
        return content
    inner = (_state_dict(content.get(key), keys, depth - 1) for key in keys if depth)
    return next((found for found in inner if found is not None), None)


def _safe_types() -> list[Any]:
    """What training programs save next to weights, and what cannot run code: their arguments, and numbers of numpy."""
    scalar = np.float64(0).__reduce__()[0]
    dtypes = {type(np.dtype(kind)) for kind in _NUMBERS}
    old_name = (scalar, "numpy.core.multiarray.scalar")  # before numpy 2
    return [argparse.Namespace, (_plain_dtype, "numpy.dtype"), *dtypes, scalar, old_name]


def _plain_dtype(kind: str, *_: Any) -> np.dtype[Any]:
    """A dtype of numbers. Others can have any size, which a scalar of them would allocate."""
    if kind not in _NUMBERS:
        raise ValueError(f"numbers of the type {kind!r} are not read")
    return np.dtype(kind)


def _cause(error: Exception) -> str:
    """Why a file cannot be read, as a part of a line."""
    text = str(error).strip()
    if unsafe := re.search(r"unsupported (?:global: )?(?:GLOBAL|class) (\S+)", text, re.IGNORECASE):
        return f"it holds a {printable(unsafe[1])}, which could run code; save only the network's state_dict()"
    detail = re.search(r"WeightsUnpickler error:\s*(.+)", text)
    return printable((detail[1] if detail else text.splitlines()[0] if text else type(error).__name__)[:200])
