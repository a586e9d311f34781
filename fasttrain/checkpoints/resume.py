"""Resuming: what may differ between the run that wrote a checkpoint and the one that resumes from it; going back."""

import difflib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fasttrain.checkpoints import checkpoint
from fasttrain.checkpoints.checkpoint import Checkpoint
from fasttrain.checkpoints.run_dir import abandon_later, newest_before_failures
from fasttrain.config import toml
from fasttrain.config.schema import Recipe
from fasttrain.data.index import Index
from fasttrain.distributed.ranks import Ranks
from fasttrain.evaluation.metrics import NAMES, described
from fasttrain.training.guard import Diverged
from fasttrain.training.progress import Progress, step_of
from fasttrain.utils.errors import UserError
from fasttrain.utils.text import printable

# A run may resume with other values of these: none changes which images a step takes or how each is augmented.
# micro_batch changes which images are mixed with each other, so `machine_changes` reports it.
_FREE = ("name", "micro_batch", "init", "guard", "evaluation", "checkpoint", "resume", "data", "machine")
_NOT_FREE = ("data.balance",)  # but not these of them


def _is_free(key: str) -> bool:
    return key.split(".")[0] in _FREE and key not in _NOT_FREE


def run_fingerprint(recipe: Recipe, index: Index) -> dict[str, Any]:
    """What identifies a run, as plain values: its recipe, its classes, and fingerprints of its images."""
    return {
        "recipe": toml.to_dict(recipe),
        "classes": list(index.classes),
        "data": index.fingerprint(),
        "sizes": index.fingerprint_of_sizes(),
    }


def check_compatible(saved: Checkpoint, ours: dict[str, Any], allow: Sequence[str]) -> list[str]:
    """What differs between a checkpoint's run and `ours` (a `run_fingerprint`), one line each; all of it is allowed.

    allow: `data`, `classes`, keys of the recipe, or parts of it. Raises UserError that names each difference that is
    not allowed, or a name in `allow` that does not exist.
    """
    # A setting that did not exist when the checkpoint was written has its default.
    recipe = toml.from_dict(saved.meta["recipe"], where=printable(saved.path))
    theirs = saved.meta | {"recipe": toml.to_dict(recipe)}
    both = {**toml.flat(theirs["recipe"]), **toml.flat(ours["recipe"])}
    parts = [key.split(".") for key in both if not _is_free(key)]
    names = {"data", "classes", *(".".join(each[:depth]) for each in parts for depth in range(1, len(each) + 1))}
    for name in allow:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "; data, classes, or a key such as optim.lr"
            raise UserError(f"resume.allow: nothing called {printable(name)!r} can differ{hint}")
    _require_same_outputs(saved, ours["classes"])
    found = _differences(theirs, ours)
    refused = [key for key in found if not any(f"{key}.".startswith(f"{name}.") for name in allow)]
    if refused:
        differences = "; ".join(found[key] for key in refused)
        keys = ", ".join(f'"{printable(key)}"' for key in refused)
        raise UserError(
            f"cannot resume from {printable(saved.path)}: {differences}. Name another --out, start over with "
            f"--resume never, or resume anyway with --set 'resume.allow=[{keys}]'"
        )
    return list(found.values())


def _require_same_outputs(saved: Checkpoint, classes: Sequence[str]) -> None:
    """Raises UserError where a class of a checkpoint would have another output now: classes are sorted by name."""
    before = saved.meta["classes"]
    moved = [name for name, now in zip(before, classes, strict=False) if name != now and name in classes]
    if moved:
        was, now = before.index(moved[0]), list(classes).index(moved[0])
        raise UserError(
            f"cannot resume from {printable(saved.path)}: the classes differ, and {printable(moved[0])!r} was output "
            f"{was} and would be {now}. Keep the names' order, or start a new run with --init, which takes all weights "
            "but the classifier's"
        )


def _differences(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, str]:
    """What differs, as text, by name."""
    was, now = toml.flat(theirs["recipe"]), toml.flat(ours["recipe"])
    found = {
        key: f"{printable(key)} was {_brief(was.get(key))} and is {_brief(now.get(key))}"
        for key in {**was, **now}
        if not _is_free(key) and was.get(key) != now.get(key)
    }
    if theirs["classes"] != ours["classes"]:
        other = sorted(set(theirs["classes"]) ^ set(ours["classes"]))
        names = f"{', '.join(map(printable, other[:3]))}{', …' if other[3:] else ''}" or "in another order"
        found["classes"] = f"the classes differ ({names})"
    elif theirs["data"] != ours["data"]:
        found["data"] = "the training images differ"
    elif theirs["sizes"] != ours["sizes"] and ours["recipe"]["data"]["on_bad"] == "stop":
        # With `skip` an image may have become unreadable meanwhile and have no size.
        found["data"] = "training images have other sizes"
    return found


def _brief(value: Any) -> str:
    text = printable(repr(value))
    return text if len(text) <= 60 else f"{text[:59]}…"


def val_fingerprint(index: Index | None) -> str | None:
    """What identifies the validation images: their names, labels and sizes. None without validation images."""
    return None if index is None else f"{index.fingerprint()} {index.fingerprint_of_sizes()}"


def check_validation(meta: dict[str, Any], progress: Progress, now: str | None) -> list[str]:
    """Compare the validation images, given by their `val_fingerprint`, with a checkpoint's. Returns lines to log. If
    they differ, earlier scores do not count any more, since scores over different images cannot be compared."""
    before = meta.get("val", now)
    if before == now:
        return []
    if now is None:
        if progress.best is None:
            return ["this run no longer has validation images"]
        score = described(progress.criterion, progress.best)
        return [f"this run no longer has validation images; `best` stays the checkpoint with {score}"]
    progress.forget_best()
    if before is None:
        name = NAMES[progress.criterion]
        return [f"this run has validation images from now on; `best` is chosen by their {name}"]
    return ["the validation images differ from before: earlier scores do not count, and `best` is chosen again"]


def check_criterion(meta: dict[str, Any], progress: Progress) -> list[str]:
    """Compare the score that chooses the best checkpoint with that of the checkpoint's run. Returns lines to log."""
    before = meta["recipe"].get("evaluation", {}).get("best", "top1")
    if before == progress.criterion:
        return []
    progress.forget_best()
    return [f"`best` was chosen by {NAMES.get(before, printable(str(before)))} and is chosen again, by "
            f"{NAMES[progress.criterion]}"]  # fmt: skip


def machine_changes(meta: dict[str, Any], recipe: Recipe, ranks: Ranks) -> list[str]:
    """What differs in how a checkpoint's run was computed, one line each: ranks, micro-batch, decoder."""
    changes = []
    if meta["world"] != ranks.world:
        changes.append(f"ranks were {meta['world']} and are {ranks.world}")
    micro_batch = meta["recipe"].get("micro_batch", recipe.micro_batch)
    if micro_batch != recipe.micro_batch:
        changes.append(
            f"micro_batch was {printable(str(micro_batch))} and is {recipe.micro_batch}: other partners are mixed"
        )
    decoder = meta["recipe"]["machine"].get("decoder", recipe.machine.decoder)
    if decoder != recipe.machine.decoder:
        changes.append(f"the decoder was {printable(decoder)} and is {recipe.machine.decoder}: pixels differ slightly")
    return changes


def rewind(out: Path, diverged: Diverged, index: Index, rewinds: int) -> Path | None:
    """Make the checkpoint from which a run that has diverged resumes: the newest one from before the failed steps, with
    the images after theirs. If it has gone back `rewinds` times, or has no such checkpoint, return None and write a
    report into the run's folder."""
    found = newest_before_failures(out) if diverged.rewinds < rewinds else None
    if found is None:
        diverged.report(out, index)
        return None
    abandon_later(out, found)

    def changes(meta: dict[str, Any]) -> dict[str, Any]:
        step = step_of(meta, diverged.plan.steps_per_epoch)
        changed = {"shift": diverged.shift(step), "rewinds": diverged.rewinds + 1}
        return changed | {"best": diverged.best, "peak": diverged.best}

    branched = checkpoint.branch(out, found, changes)
    print(f"{diverged}; going back to {printable(found)}, and on with the images after these", file=sys.stderr)
    return branched
