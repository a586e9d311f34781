"""`fasttrain export`: a run's network as a file for other programs, once it has shown that it computes the same."""

import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import timm
import torch

from fasttrain import __version__
from fasttrain.checkpoints import checkpoint
from fasttrain.checkpoints.meta import META
from fasttrain.config import toml
from fasttrain.config.schema import Recipe
from fasttrain.data import demo_set
from fasttrain.data.index import Index
from fasttrain.data.open_data import open_labeled, open_unlabeled, open_val
from fasttrain.data.scan import Limits
from fasttrain.data.stage import is_address
from fasttrain.export.parity import SUFFIX, Parity, compare, is_parity, spread
from fasttrain.export.write import check_ending, timm_weights, write
from fasttrain.exported import CONFIG, KEY, ModelConfig
from fasttrain.utils.environment import torchrun_variable
from fasttrain.utils.errors import RunError, UserError
from fasttrain.utils.files import read_json_object, require_writable_folder, sha256_of
from fasttrain.utils.text import printable


def export(
    run: Path,
    to: Path,
    *,
    takes_pixels: bool = False,
    raw: bool = False,
    data: str | None = None,
    links: str = "inside",
    most_images: int = 500,
) -> Parity:
    """Export a checkpoint's network to a file, whose ending names the format. The file is put in place once it has
    shown on images that it computes the same.

    run: a run's folder or a checkpoint. takes_pixels: a graph for whole images; see `ModelConfig`. raw: the raw
    weights, where the checkpoint has averaged ones too. data: images to compare on; by default the run's validation
    images, or else the demo set's. most_images: at most so many of them; 0: all. Raises UserError where the checkpoint
    or the images cannot be read, or a file must not be overwritten; RunError where the network cannot be exported, or
    the file computes something else.
    """
    if torchrun_variable("WORLD_SIZE", 1) > 1:
        raise UserError("exports are made by one process; start the command without torchrun")
    check_ending(to, takes_pixels=takes_pixels)
    saved = checkpoint.load(run)
    recipe = toml.from_dict(saved.meta["recipe"], where=printable(saved.path))
    checkpoint.require_fit(saved, recipe)
    averaged = checkpoint.has_average(saved) and not raw
    config = ModelConfig(recipe.arch, tuple(saved.meta["classes"]), recipe.image_size, takes_pixels)
    make_folder(to)
    check_overwritable(to, config)
    images = _images(run, recipe, config.classes, data, links)
    index = spread(images.index, most_images)
    try:
        with tempfile.TemporaryDirectory(prefix=".export-", dir=to.parent) as name:
            folder = Path(name)
            file = folder / to.name
            write(file, config, timm_weights(saved, averaged=averaged))
            parity = compare(file, saved.path, index, raw=raw, labeled=images.labeled, images_from=images.origin)
            if not parity.passed:
                raise RunError(f"{parity}. {printable(to)} was not written")
            before = read_json_object(to.with_name(f"{to.name}{SUFFIX}")).get("checkpoint")
            if to.exists() and before != printable(saved.path):
                print(f"replacing {printable(to)}, which was exported from {before}", file=sys.stderr)
            facts = {
                "file": printable(to.name),
                "checkpoint": printable(saved.path),
                "sha256": sha256_of(file),
                "step": saved.meta["step"],
                "weights": "averaged" if averaged else "raw",
                "versions": {"fasttrain": __version__, "torch": torch.__version__, "timm": timm.__version__},
            }
            of_parity = folder / f"{to.name}{SUFFIX}"
            of_parity.write_text(parity.to_json(**facts), encoding="utf-8")
            check_overwritable(to, config)  # another export may have ended in the meantime
            for each in (folder / CONFIG, of_parity, file):
                os.replace(each, to.with_name(each.name))
    except OSError as error:
        raise RunError(f"cannot write {printable(to)}: {error.strerror or error}") from None
    return parity


def make_folder(to: Path) -> None:
    """Make the folder of a file to write. Raises UserError where it cannot be made."""
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {printable(to.parent)}: {error.strerror}") from None


def check_overwritable(to: Path, config: ModelConfig) -> None:
    """Raises UserError where a file or its config.json would replace one that is not an export's, or the config of
    another network's export."""
    require_writable_folder(to)
    if to.with_name(META).exists():
        raise UserError(f"{printable(to.parent)} is a checkpoint's folder; export to another one")
    of_parity = to.with_name(f"{to.name}{SUFFIX}")
    for each in (to, of_parity):
        if each.exists() and not is_parity(of_parity):
            raise UserError(f"{printable(each)} exists and was not made by `fasttrain export`; name another file")
    path = to.with_name(CONFIG)
    if not path.exists():
        return
    there = read_json_object(path)
    if KEY not in there:
        raise UserError(f"{printable(path)} exists and was not made by `fasttrain export`; export to another folder")
    others = [other for other in to.parent.glob(f"*{SUFFIX}") if other.name != f"{to.name}{SUFFIX}"]
    if others and there != config.of_weights().to_dict():
        other = printable(others[0].name.removesuffix(SUFFIX))
        raise UserError(f"{printable(path)} belongs to {other}, which is another network; export to another folder")


@dataclass(frozen=True)
class _Images:
    """Images to compare on. labeled: their labels are those of the network's classes. origin: where they are from."""

    index: Index
    labeled: bool
    origin: str


def _images(run: Path, recipe: Recipe, classes: Sequence[str], data: str | None, links: str) -> _Images:
    limits = Limits.of(recipe.data)._replace(links=links)
    if data:
        try:
            return _Images(open_labeled(data, classes, run, limits), True, f"the images of {printable(data)}")
        except UserError as error:
            try:
                index = open_unlabeled(data, limits)
            except UserError:
                raise error from None
            print(f"comparing without labels: {error}", file=sys.stderr)
            return _Images(index, False, f"the images of {printable(data)}")
    reason = "the run's validation images are at an address, from which nothing is copied here"
    if not any(map(is_address, (*recipe.data.train, recipe.data.val))):
        try:
            found = open_val(recipe.data)
            if found is not None and found.classes == tuple(classes):
                return _Images(found, True, "the run's validation images")
            reason = (
                "the run's validation images have other classes now" if found else "the run has no validation images"
            )
        except UserError as error:
            reason = f"the run's validation images cannot be read ({error})"
    print(f"{reason}; comparing on the demo set's; --data DIR names others", file=sys.stderr)
    return _Images(open_unlabeled(str(demo_set.cached() / "val"), limits), False, "the demo set's validation images")
