"""The README's Python code runs as it stands."""

import re

import pytest
import torch
from helpers import ROOT, part_of, run, tiny

from fasttrain.checkpoints import checkpoint
from fasttrain.config.schema import EmaConfig


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_a_checkpoint_goes_back_into_timm(demo_set, tmp_path, decay):
    run(tiny(epochs=1, ema=EmaConfig(decay)), tmp_path / "run", part_of(demo_set, 6))
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert "runs/deepblueai/tresnet_xl-ce/best" in code
    names: dict = {}
    exec(code.replace("runs/deepblueai/tresnet_xl-ce/best", str(tmp_path / "run" / "best")), names)
    ours, _, classes = checkpoint.network(tmp_path / "run")
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(names["network"](images), ours.eval()(images).logits)
    assert names["meta"]["classes"] == classes
