"""Going on from a checkpoint: what may differ between the run that wrote it and the one that takes it up."""

import difflib
from collections.abc import Sequence
from typing import Any

from fasttrain.checkpoints.checkpoint import Checkpoint
from fasttrain.config import toml
from fasttrain.config.schema import Recipe
from fasttrain.data.index import Index
from fasttrain.utils.errors import UserError
from fasttrain.utils.text import printable

# A run may go on with other values of these: none changes which images a step takes or what is done to them.
_FREE = ("name", "micro_batch", "init", "guard", "evaluation", "checkpoint", "resume", "data", "machine")


def run_fingerprint(recipe: Recipe, index: Index) -> dict[str, Any]:
    """What a run is, as plain values: its recipe, the names of its classes, and fingerprints of its images."""
    return {
        "recipe": toml.to_dict(recipe),
        "classes": list(index.classes),
        "data": index.fingerprint(),
        "sizes": index.fingerprint_of_sizes(),
    }


def check_compatible(saved: Checkpoint, ours: dict[str, Any], allow: Sequence[str]) -> list[str]:
    """What differs between a checkpoint's run and `ours` (an `run_fingerprint`), a line each, all of it allowed.

    allow: `data`, `classes`, keys of the recipe, or parts of it. Raises UserError that names each difference that is
    not allowed, or what in `allow` is no such name.
    """
    # A key that the checkpoint's recipe does not have, because it was written before there was such, has its default.
    recipe = toml.from_dict(saved.meta["recipe"], where=printable(saved.path))
    theirs = saved.meta | {"recipe": toml.to_dict(recipe)}
    both = {**_flat(theirs["recipe"]), **_flat(ours["recipe"])}
    parts = [key.split(".") for key in both if key.split(".")[0] not in _FREE]
    names = {"data", "classes", *(".".join(each[:depth]) for each in parts for depth in range(1, len(each) + 1))}
    for name in allow:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "; data, classes, or a key such as optim.lr"
            raise UserError(f"resume.allow: nothing called {printable(name)!r} can differ{hint}")
    found = _differences(theirs, ours)
    refused = [key for key in found if not any(f"{key}.".startswith(f"{name}.") for name in allow)]
    if refused:
        told, asked = "; ".join(found[key] for key in refused), ", ".join(f'"{printable(key)}"' for key in refused)
        raise UserError(
            f"cannot go on from {printable(saved.path)}: {told}. Name another --out, start over with --resume never, "
            f"or go on all the same with --set 'resume.allow=[{asked}]'"
        )
    return list(found.values())


def _differences(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, str]:
    """What differs, by name, as text."""
    was, now = _flat(theirs["recipe"]), _flat(ours["recipe"])
    found = {
        key: f"{printable(key)} was {_brief(was.get(key))} and is {_brief(now.get(key))}"
        for key in {**was, **now}
        if key.split(".")[0] not in _FREE and was.get(key) != now.get(key)
    }
    if theirs["classes"] != ours["classes"]:
        other = sorted(set(theirs["classes"]) ^ set(ours["classes"]))
        names = f"{', '.join(map(printable, other[:3]))}{', …' if other[3:] else ''}" or "in another order"
        found["classes"] = f"the classes are others ({names})"
    elif theirs["data"] != ours["data"]:
        found["data"] = "the training images are others"
    elif theirs["sizes"] != ours["sizes"] and ours["recipe"]["data"]["on_bad"] == "stop":
        # With `skip` an image may have become unreadable meanwhile, and has no size then.
        found["data"] = "training images have other sizes"
    return found


def _brief(value: Any) -> str:
    text = printable(repr(value))
    return text if len(text) <= 60 else f"{text[:59]}…"


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def step_of(meta: dict[str, Any], steps_per_epoch: int) -> int:
    """The step to go on from: that of a checkpoint's meta.json, or the one at the same share of the epoch where an
    epoch has another number of steps now."""
    epoch, position = divmod(meta["step"], meta["epoch_steps"])
    return epoch * steps_per_epoch + position * steps_per_epoch // meta["epoch_steps"]
