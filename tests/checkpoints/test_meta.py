"""meta.json: its schema is what a run writes, and what a run carries comes back from it."""

import json

import pytest
from helpers import run, tiny

from fasttrain.checkpoints import checkpoint, meta
from fasttrain.config.schema import CheckpointConfig
from fasttrain.training.progress import Progress
from fasttrain.utils.errors import UserError


@pytest.fixture(scope="module")
def trained(index, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "run"
    result = run(tiny(epochs=1, checkpoint=CheckpointConfig(every_steps=2, keep=9)), out, index, index)
    return out, result


def test_a_run_writes_just_the_keys_of_the_schema(trained):
    for folder in (trained[0] / "checkpoints").iterdir():
        assert meta.read(folder).keys() == meta.SCHEMA.keys()


def test_what_a_run_carries_comes_back(trained):
    out, result = trained
    losses = tiny().losses
    last = meta.read(checkpoint.find(out / "last"))
    progress = Progress.from_meta(last, losses, last["epoch_steps"])
    assert (progress.steps_done, progress.best, progress.rewinds) == (5, result.best, 0)
    assert last["scores"]["top1"] == result.scores.top1
    assert progress.logged == {"cross_entropy": []}  # an epoch's means end with it
    middle = meta.read(out / "checkpoints" / "step-00000002")
    restored = Progress.from_meta(middle, losses, 5)
    assert {key: restored.to_meta()[key] for key in ("best", "rewinds", "logged")} == {
        key: middle[key] for key in ("best", "rewinds", "logged")
    }
    assert len(restored.logged["cross_entropy"]) == 1
    assert Progress.from_meta(middle, losses, 10).steps_done == 4  # the same share of an epoch of ten steps


@pytest.mark.parametrize("key", [key for key in meta.SCHEMA if key not in meta._OPTIONAL])
def test_a_missing_value_and_one_of_another_type_are_named(trained, tmp_path, key):
    content = json.loads((checkpoint.find(trained[0] / "last") / meta.META).read_text())
    del content["checksum"]
    missing = {name: value for name, value in content.items() if name != key}
    wrong_type = {**content, key: {"not": ["of", "its", "type"]}}
    for changed in (missing, wrong_type):
        meta.write(tmp_path, changed)
        if changed is wrong_type and key == "recipe":
            meta.read(tmp_path)  # a table; it is checked where the recipe is built
            continue
        with pytest.raises(UserError, match="format" if key == "format" else f"{key!r}"):
            meta.read(tmp_path)
