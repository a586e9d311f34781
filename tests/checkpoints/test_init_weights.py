"""--init from files: the weights of a timm network, and files that are refused."""

import argparse
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from fasttrain.checkpoints.init_weights import initialize
from fasttrain.config.schema import InitConfig
from fasttrain.models import Classifier
from fasttrain.utils.errors import UserError


@pytest.fixture(scope="module")
def timm_model():
    """A timm network for five classes."""
    torch.manual_seed(1)
    return timm.create_model("test_resnet", num_classes=5)


def init_from(path: Path, classes=5, averaged=True):
    """A random network with the weights of a file loaded into it, and the line to log."""
    torch.manual_seed(2)
    model = Classifier("test_resnet", classes)
    line = initialize(model, InitConfig(str(path), averaged), "test_resnet", [str(label) for label in range(classes)])
    return model, line


IMAGES = torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)
WRAPPED = {
    "plain.pth": lambda state: state,
    "timm.pth": lambda state: {"state_dict": state, "epoch": 3, "arch": "test_resnet", "metric": 0.5},
    "torch.pt": lambda state: {"model": {f"module.{name}": tensor for name, tensor in state.items()}},
    "compiled.bin": lambda state: {f"_orig_mod.{name}": tensor for name, tensor in state.items()},
    "model_best.pth.tar": lambda state: {  # timm's, with what it was called with
        "state_dict": {f"module._orig_mod.{name}": tensor for name, tensor in state.items()},
        "args": argparse.Namespace(lr=0.1, amp=None, opt_betas=[0.9]),
        "metric": np.float64(71.5),
        "epoch": np.int64(3),
        "optimizer": OrderedDict(state={0: {"step": torch.zeros(1)}}),
    },
    "checkpoint.pth": lambda state: {  # torchvision's reference, with averaged weights
        "model": {name: torch.zeros_like(tensor) for name, tensor in state.items()},
        "model_ema": {"n_averaged": torch.tensor(7)} | {f"module.{name}": tensor for name, tensor in state.items()},
        "args": argparse.Namespace(model="test_resnet"),
    },
    "last.ckpt": lambda state: {  # Lightning's
        "state_dict": {f"model.backbone.{name}": tensor for name, tensor in state.items()},
        "hyper_parameters": {"lr": 0.1},
        "pytorch-lightning_version": "2.5",
    },
    "network.pkl": lambda state: {"net": {"module": {f"_orig_mod.module.{name}": state[name] for name in state}}},
    "untracked.bin": lambda state: {
        "model_state_dict": {name: state[name] for name in state if "num_batches_tracked" not in name}
    },
    "ema.pth": lambda state: {
        "state_dict": {name: torch.zeros_like(tensor) for name, tensor in state.items()},
        "state_dict_ema": state,
    },
}


@pytest.mark.parametrize("name", [*WRAPPED, "hub.safetensors"])
def test_all_weights_of_a_timm_network_are_loaded(timm_model, tmp_path, name):
    path = tmp_path / name
    if name in WRAPPED:
        torch.save(WRAPPED[name](timm_model.state_dict()), path)
    else:
        save_file(timm_model.state_dict(), path)
    ours, line = init_from(path)
    assert torch.equal(ours.eval()(IMAGES).logits, timm_model.eval()(IMAGES))
    count = len(timm_model.state_dict())
    if name == "untracked.bin":
        assert line.startswith("init: ") and "num_batches_tracked" in line and "weight" not in line.split("; ")[-1]
        return
    names = "whose outputs have no names: the first is taken as class 0, and so on"
    assert line == f"init: {count} of {count} tensors, from {path}, {names}; starting random: none"


def test_raw_weights_are_loaded_on_request(timm_model, tmp_path):
    torch.save({"state_dict": timm_model.state_dict(), "state_dict_ema": {}}, tmp_path / "both.pth")
    ours, _ = init_from(tmp_path / "both.pth", averaged=False)
    assert torch.equal(ours.eval()(IMAGES).logits, timm_model.eval()(IMAGES))


def test_another_number_of_classes_leaves_the_classifier_random(timm_model, tmp_path):
    torch.save(timm_model.state_dict(), tmp_path / "five.pth")
    ours, line = init_from(tmp_path / "five.pth", classes=7)
    torch.manual_seed(2)
    random = Classifier("test_resnet", 7)
    assert torch.equal(ours.backbone.get_classifier().weight, random.backbone.get_classifier().weight)
    assert torch.equal(ours.backbone.forward_features(IMAGES), timm_model.train().forward_features(IMAGES))
    assert line.endswith("starting random: backbone.fc.bias, backbone.fc.weight")


class Trap:
    """An object whose pickle makes a folder when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def write_bad_file(path: Path, kind: str, state: dict) -> None:
    """Write a file that must be refused; `kind` is one of CASES."""
    if kind == "code":
        torch.save({"state_dict": {**state, "x": Trap(path.parent / "executed")}}, path)
    elif kind == "old format":
        torch.save(state, path, _use_new_zipfile_serialization=False)
    elif kind == "bare pickle":
        path.write_bytes(pickle.dumps(Trap(path.parent / "executed")))
    elif kind == "bomb":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data.pkl", bytes(100_000_000))
    elif kind == "truncated":
        torch.save(state, path)
        path.write_bytes(path.read_bytes()[:-2000])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "a list":
        torch.save([1, 2], path)
    elif kind == "numbers":
        torch.save({"state_dict": {"fc.weight": 3}}, path)
    elif kind == "other network":
        torch.save(timm.create_model("test_efficientnet").state_dict(), path)
    elif kind == "other shape":
        torch.save({**state, "conv1.0.weight": torch.zeros(2, 2)}, path)
    elif kind == "strange name":
        torch.save({**state, "\x1b[31mred\nline": torch.zeros(1)}, path)
    elif kind == "safetensors":
        path.write_bytes((2**60).to_bytes(8, "little") + b"{}")
    elif kind == "fifo":
        os.mkfifo(path)


CASES = ["code", "old format", "bare pickle", "bomb", "truncated", "empty", "a list", "numbers", "other network"]
CASES += ["other shape", "strange name", "safetensors", "fifo", "missing"]


@pytest.mark.parametrize("kind", CASES)
def test_bad_files_are_refused_in_one_line(timm_model, tmp_path, kind):
    path = tmp_path / ("weights.safetensors" if kind == "safetensors" else "weights.pth")
    write_bad_file(path, kind, timm_model.state_dict())
    with pytest.raises(UserError) as caught:
        init_from(path)
    assert str(caught.value).startswith(f"--init {path}") and str(caught.value).isprintable()
    assert not (tmp_path / "executed").exists()


def test_the_trap_runs_code(tmp_path):
    """Without weights_only the pickle runs its code, so the test above can fail."""
    write_bad_file(tmp_path / "weights.pth", "code", {})
    torch.load(tmp_path / "weights.pth", weights_only=False)
    assert (tmp_path / "executed").exists()


def test_a_class_that_is_not_safe_is_named(tmp_path, timm_model):
    torch.save({"state_dict": timm_model.state_dict(), "x": Trap(tmp_path / "executed")}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match=r"it holds a posix\.mkdir, which could run code; save only"):
        init_from(tmp_path / "weights.pth")
    assert not (tmp_path / "executed").exists()


def test_the_first_tensor_that_differs_is_named(tmp_path, timm_model):
    state = {f"module.{name}": tensor for name, tensor in timm_model.state_dict().items()}
    state["module.conv1.0.weight"] = torch.zeros(2, 2)
    torch.save({"model": state}, tmp_path / "weights.tar")
    with pytest.raises(UserError, match=r"backbone\.conv1\.0\.weight is \[2, 2\] in it and \["):
        init_from(tmp_path / "weights.tar")


@pytest.mark.parametrize("ema", [{"decay": 0.999}, {"decay": 0.999, "shadow": {}}])
def test_a_table_of_settings_is_not_taken_for_weights(tmp_path, timm_model, ema):
    torch.save({"model": timm_model.state_dict(), "ema": ema}, tmp_path / "weights.pth")
    ours, _ = init_from(tmp_path / "weights.pth")
    assert torch.equal(ours.eval()(IMAGES).logits, timm_model.eval()(IMAGES))


def test_two_networks_in_one_file_are_refused(tmp_path, timm_model):
    state = timm_model.state_dict()
    both = {f"model.{name}": tensor for name, tensor in state.items()} | {f"net.{name}": state[name] for name in state}
    torch.save({"state_dict": both}, tmp_path / "weights.ckpt")
    with pytest.raises(UserError, match=r"holds two networks: model\.\S+ and net\.\S+ are the same tensor"):
        init_from(tmp_path / "weights.ckpt")


class HugeScalar:
    """A scalar of numpy that unpacks to a gigabyte."""

    def __reduce__(self):
        return np.float64(0).__reduce__()[0], (np.dtype("V1000000000"), b"")


def test_a_scalar_cannot_have_any_size(tmp_path, timm_model):
    torch.save({"state_dict": timm_model.state_dict(), "x": HugeScalar()}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match=r"cannot be read: .*(V1000000000|numbers of the type|VoidDType)"):
        init_from(tmp_path / "weights.pth")
