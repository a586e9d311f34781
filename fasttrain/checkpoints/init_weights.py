"""Weights to start a run from: another run's, or a file of a timm network's weights."""

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from fasttrain.checkpoints import checkpoint
from fasttrain.config.schema import InitConfig
from fasttrain.models import Classifier
from fasttrain.models.heads import TRAINING_HEADS
from fasttrain.utils.errors import UserError
from fasttrain.utils.text import printable

FILES = (".pth", ".pt", ".bin", ".safetensors")


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
        found = _from_file(path, model, init.averaged)
    else:
        found = _from_checkpoint(path, arch, classes, init.averaged)
    own = model.state_dict()
    fits = {}
    for name in sorted({*own, *found.tensors}):
        shapes = [str(list(each[name].shape)) if name in each else "not there" for each in (found.tensors, own)]
        of_classes = name.startswith(("cosine.", model.classifier_prefix))
        if shapes[0] == shapes[1] and (found.same_classes or not of_classes):
            fits[name] = found.tensors[name]
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


def _from_file(path: Path, model: Classifier, averaged: bool) -> _Weights:
    """A file with timm's names; its classifier is used where it has as many classes."""
    found = _read(path, averaged)
    if all(name.startswith(("backbone.", *TRAINING_HEADS)) for name in found):
        raise UserError(
            f"--init {printable(path)} is a part of a checkpoint; name its folder, {printable(path.parent)}"
        )
    tensors = {f"backbone.{name}": each for name, each in found.items()}
    own, head = model.state_dict(), model.classifier_prefix
    same_classes = all(name in tensors and tensors[name].shape == own[name].shape for name in own if head in name)
    return _Weights(tensors, same_classes, f"from {printable(path)}")


def _read(path: Path, averaged: bool) -> dict[str, Tensor]:
    """The tensors of an untrusted file. Nothing in it is executed, and it cannot unpack to more than its size."""
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
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # damaged files make the two libraries raise anything
        gist = f"{error}".strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise UserError(f"--init {printable(path)} cannot be read: {printable(gist)}") from None
    for key in (*(("state_dict_ema", "model_ema") if averaged else ()), "state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not (isinstance(content, dict) and content and all(isinstance(each, Tensor) for each in content.values())):
        raise UserError(
            f"--init {printable(path)} holds no weights: expected tensors by name, or `state_dict` with such"
        )
    # DataParallel, DDP and torch.compile put these in front of names.
    return {str(name).removeprefix("_orig_mod.").removeprefix("module."): each for name, each in content.items()}
