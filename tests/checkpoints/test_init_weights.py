"""--init from files: a timm network's own weights, and files that are no such thing."""

import os
import pickle
import zipfile
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from fasttrain.checkpoints.init_weights import initialize
from fasttrain.config.schema import InitConfig
from fasttrain.models import Classifier
from fasttrain.utils.errors import UserError


@pytest.fixture(scope="module")
def theirs():
    """A timm network with weights of its own, of five classes."""
    torch.manual_seed(1)
    return timm.create_model("test_resnet", num_classes=5)


def start(path: Path, classes=5, averaged=True):
    torch.manual_seed(2)
    model = Classifier("test_resnet", classes)
    said = initialize(model, InitConfig(str(path), averaged), "test_resnet", [str(each) for each in range(classes)])
    return model, said


IMAGES = torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)
WRAPPED = {
    "plain.pth": lambda state: state,
    "timm.pth": lambda state: {"state_dict": state, "epoch": 3, "arch": "test_resnet", "metric": 0.5},
    "torch.pt": lambda state: {"model": {f"module.{name}": each for name, each in state.items()}},
    "compiled.bin": lambda state: {f"_orig_mod.{name}": each for name, each in state.items()},
    "ema.pth": lambda state: {
        "state_dict": {name: torch.zeros_like(each) for name, each in state.items()},
        "state_dict_ema": state,
    },
}


@pytest.mark.parametrize("name", [*WRAPPED, "hub.safetensors"])
def test_a_timm_networks_weights_are_taken_whole(theirs, tmp_path, name):
    path = tmp_path / name
    if name in WRAPPED:
        torch.save(WRAPPED[name](theirs.state_dict()), path)
    else:
        save_file(theirs.state_dict(), path)
    ours, said = start(path)
    assert torch.equal(ours.eval()(IMAGES).logits, theirs.eval()(IMAGES))
    count = len(theirs.state_dict())
    assert said == f"init: {count} of {count} tensors, from {path}; starting random: none"


def test_raw_weights_where_they_are_asked_for(theirs, tmp_path):
    torch.save({"state_dict": theirs.state_dict(), "state_dict_ema": {}}, tmp_path / "both.pth")
    ours, _ = start(tmp_path / "both.pth", averaged=False)
    assert torch.equal(ours.eval()(IMAGES).logits, theirs.eval()(IMAGES))


def test_another_number_of_classes_leaves_the_classifier_random(theirs, tmp_path):
    torch.save(theirs.state_dict(), tmp_path / "five.pth")
    ours, said = start(tmp_path / "five.pth", classes=7)
    torch.manual_seed(2)
    fresh = Classifier("test_resnet", 7)
    assert torch.equal(ours.backbone.get_classifier().weight, fresh.backbone.get_classifier().weight)
    assert torch.equal(ours.backbone.forward_features(IMAGES), theirs.train().forward_features(IMAGES))
    assert said.endswith("starting random: backbone.fc.bias, backbone.fc.weight")


class Trap:
    """Pickled, it makes a file when it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def hostile(path: Path, how: str, state: dict) -> None:
    if how == "code":
        torch.save({"state_dict": {**state, "x": Trap(path.parent / "executed")}}, path)
    elif how == "old format":
        torch.save(state, path, _use_new_zipfile_serialization=False)
    elif how == "bare pickle":
        path.write_bytes(pickle.dumps(Trap(path.parent / "executed")))
    elif how == "bomb":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data.pkl", bytes(100_000_000))
    elif how == "truncated":
        torch.save(state, path)
        path.write_bytes(path.read_bytes()[:-2000])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "a list":
        torch.save([1, 2], path)
    elif how == "numbers":
        torch.save({"state_dict": {"fc.weight": 3}}, path)
    elif how == "other network":
        torch.save(timm.create_model("test_efficientnet").state_dict(), path)
    elif how == "other shape":
        torch.save({**state, "conv1.0.weight": torch.zeros(2, 2)}, path)
    elif how == "strange name":
        torch.save({**state, "\x1b[31mred\nline": torch.zeros(1)}, path)
    elif how == "safetensors":
        path.write_bytes((2**60).to_bytes(8, "little") + b"{}")
    elif how == "fifo":
        os.mkfifo(path)


CASES = ["code", "old format", "bare pickle", "bomb", "truncated", "empty", "a list", "numbers", "other network"]
CASES += ["other shape", "strange name", "safetensors", "fifo", "missing"]


@pytest.mark.parametrize("how", CASES)
def test_a_file_that_is_no_such_thing_is_refused_in_a_line(theirs, tmp_path, how):
    path = tmp_path / ("weights.safetensors" if how == "safetensors" else "weights.pth")
    hostile(path, how, theirs.state_dict())
    with pytest.raises(UserError) as caught:
        start(path)
    assert str(caught.value).startswith(f"--init {path}") and str(caught.value).isprintable()
    assert not (tmp_path / "executed").exists()


def test_the_trap_works(tmp_path):
    """Without weights_only it would have been executed: the test above can fail."""
    hostile(tmp_path / "weights.pth", "code", {})
    torch.load(tmp_path / "weights.pth", weights_only=False)
    assert (tmp_path / "executed").exists()
