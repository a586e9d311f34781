"""The README's Python code runs as it stands."""

import re

import numpy as np
import pytest
import timm
import torch
from helpers import ROOT, call, part_of, run, tiny
from PIL import Image

import fasttrain
from fasttrain.checkpoints import checkpoint
from fasttrain.config.schema import EmaConfig


def code_with(part: str) -> str:
    """The README's block of Python code that contains `part`."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (code,) = [block for block in blocks if part in block]
    return code


@pytest.mark.parametrize("decay", [0.0, pytest.param(0.9, marks=pytest.mark.slow)])
def test_an_exported_network_is_used_with_timm_alone(demo_set, tmp_path, monkeypatch, decay):
    run(tiny(epochs=1, ema=EmaConfig(decay)), tmp_path / "run", part_of(demo_set, 6))
    call("export", tmp_path / "run", "--to", tmp_path / "OUT" / "model.safetensors", "--max-images", 20)
    call("export", tmp_path / "run", "--to", tmp_path / "OUT" / "pixels.onnx", "--preprocess", "--max-images", 20)
    path = next((demo_set / "val").rglob("*.jpg"))
    monkeypatch.chdir(tmp_path)
    Image.open(path).save("image.jpg")
    names: dict = {}
    exec(code_with("local-dir:OUT"), names)
    ours, _, classes = checkpoint.network(tmp_path / "run")
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(names["network"](images), ours(images).logits, atol=1e-5)
    assert names["answer"] in classes
    probs = names["probs"].detach().numpy()
    exec(code_with("onnxruntime"), names)
    assert names["classes"] == classes and np.allclose(names["probs"], probs, atol=2e-3)
    size = timm.data.resolve_model_data_config(names["network"])["input_size"]
    assert list(size) == [3, 32, 32]


def test_a_network_is_trained_from_python(demo_set, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "DIR").symlink_to(demo_set)
    small = {"image_size": 32, "batch_size": 50, "device": "cpu"}
    fit = fasttrain.fit
    monkeypatch.setattr(
        fasttrain, "fit", lambda arch, **options: fit("test_resnet", **options | small | {"epochs": 1}), raising=False
    )
    names: dict = {}
    exec(code_with("fasttrain.fit"), names)
    assert names["run"].path.name == "test_resnet" and np.isfinite(names["run"].scores["log_loss"])
