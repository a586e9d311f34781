"""Checkpoints: round trip, damage, links, pruning and metadata."""

import json
from importlib.metadata import version

import pytest
import torch
from nvidia import dali

from fasttrain import __version__
from fasttrain.checkpoints import checkpoint
from fasttrain.config.schema import OptimConfig
from fasttrain.models import Classifier
from fasttrain.training import optim
from fasttrain.training.state import State
from fasttrain.utils.errors import RunError, UserError

META = {
    "recipe": {"arch": "test_resnet"},
    "classes": ["a", "b"],
    "data": "0",
    "sizes": "0",
    "best": None,
    "epoch_steps": 1,
}
META |= {"world": 1, "shift": 0, "rewinds": 0, "streak": 0, "meters": [], "logged": {}}


def trained_state(seed=0, steps=2):
    """A channels-last network and its SGD optimizer after `steps` steps."""
    torch.manual_seed(seed)
    model = Classifier("test_resnet", 4).to(memory_format=torch.channels_last)
    optimizer = optim.sgd(model, OptimConfig())
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    for _ in range(steps):
        model(torch.randn(4, 3, 32, 32)).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


SCALER = torch.amp.GradScaler("cpu", enabled=False)


def save(out, step=1, improved=False, keep=2, trained=None):
    model, optimizer = trained or trained_state()
    snapshot = checkpoint.Snapshot().take(State(model, optimizer, SCALER))
    return checkpoint.save(out, step, snapshot, improved=improved, keep=keep, meta=META)


def test_restore_returns_all_tensors_in_the_parameters_layout(tmp_path):
    model, optimizer = trained_state()
    save(tmp_path, trained=(model, optimizer))
    other, other_optimizer = trained_state(seed=1, steps=0)
    checkpoint.restore(checkpoint.load(tmp_path / "last"), State(other, other_optimizer, SCALER))
    for (name, ours), theirs in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype, name
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        expected = optimizer.state[ours]["momentum_buffer"]
        restored = other_optimizer.state[theirs]["momentum_buffer"]
        assert torch.equal(expected, restored) and restored.stride() == theirs.stride()


def test_links_and_pruning(tmp_path):
    trained = trained_state()
    for step, improved in ((1, True), (2, False), (3, True), (4, False), (5, False)):
        save(tmp_path, step, improved, keep=1, trained=trained)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-00000003", "step-00000005"]
    assert (tmp_path / "last").resolve().name == "step-00000005"
    assert (tmp_path / "best").resolve().name == "step-00000003"
    assert not (tmp_path / "last").readlink().is_absolute()
    for path in (tmp_path, tmp_path / "best"):
        assert checkpoint.find(path).name == "step-00000003"
    assert checkpoint.find(tmp_path / "last").name == "step-00000005"


def test_checkpoints_of_a_moved_run_load(tmp_path):
    save(tmp_path / "run", improved=True)
    (tmp_path / "run").rename(tmp_path / "moved")
    assert checkpoint.load(tmp_path / "moved").meta["step"] == 1


@pytest.mark.parametrize("name", ["model.safetensors", "train.safetensors"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_damaged_files_are_named(tmp_path, name, damage):
    file = save(tmp_path) / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.unlink()
    if damage != "gone":
        file.write_bytes(content if damage == "flip" else content[:-5])
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        checkpoint.load(tmp_path / "last")


OTHER_FORMAT = '{"format": 99, "sha256": {"model.safetensors": "", "train.safetensors": ""}}'


@pytest.mark.parametrize("text", ["", "[]", "{}", "{", OTHER_FORMAT])
def test_invalid_meta_files_are_refused(tmp_path, text):
    (save(tmp_path) / "meta.json").write_text(text)
    with pytest.raises(UserError):
        checkpoint.load(tmp_path / "last")


def test_a_path_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match="is no checkpoint and holds none"):
        checkpoint.load(tmp_path / "nowhere")


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    save(tmp_path)
    other = Classifier("test_resnet", 5)
    with pytest.raises(UserError, match="does not fit this network: size mismatch"):
        checkpoint.restore_model(checkpoint.load(tmp_path / "last"), other)


def test_a_failed_save_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    save(tmp_path, 1, improved=True)

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(RunError, match="No space left on device; the one before is intact"):
        save(tmp_path, 2)
    assert checkpoint.load(tmp_path / "last").meta["step"] == 1
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_meta_has_the_versions_of_the_libraries(tmp_path):
    versions = json.loads((save(tmp_path) / "meta.json").read_text())["versions"]
    assert versions == {"fasttrain": __version__, "torch": torch.__version__, "timm": version("timm"),
                        "nvidia-dali": dali.__version__}  # fmt: skip


def test_meta_is_json_with_hashes(tmp_path):
    meta = json.loads((save(tmp_path, 7) / "meta.json").read_text())
    assert (
        meta["step"] == 7
        and meta["recipe"] == META["recipe"]
        and set(meta["sha256"])
        == {
            "model.safetensors",
            "train.safetensors",
        }
    )
