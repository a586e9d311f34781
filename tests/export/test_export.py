"""Exports, opened as their users open them: by timm without fasttrain, by onnxruntime, by torch."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from helpers import call, part_of, run, tiny
from PIL import Image

from fasttrain.checkpoints import checkpoint
from fasttrain.config.schema import DataConfig, EmaConfig, MachineConfig
from fasttrain.evaluation import predictions
from fasttrain.export import write as writing
from fasttrain.export.parity import of_probabilities
from fasttrain.exported import KEY, Graph, ModelConfig, parse_config
from fasttrain.utils.errors import RunError, UserError

FORMATS = ["model.safetensors", "model.pth", "model.onnx", "model.pt2"]


@pytest.fixture(scope="module")
def trained(demo_set, tmp_path_factory) -> Path:
    """A run with averaged weights, which differ from the raw ones."""
    out = tmp_path_factory.mktemp("export") / "run"
    recipe = tiny(
        epochs=3, ema=EmaConfig(0.8), data=DataConfig(train=(str(demo_set / "train"),), val=str(demo_set / "val"))
    )
    run(recipe, out, part_of(demo_set, 20))
    return out


@pytest.fixture(scope="module")
def exports(trained) -> Path:
    """A folder with the run's network as weights and as a graph, compared on 60 images."""
    folder = trained.parent / "exports"
    folder.mkdir()
    for name in ("model.safetensors", "model.onnx"):
        call("export", trained, "--to", folder / name, "--max-images", 60)
    call("export", trained, "--to", folder / "pixels.onnx", "--max-images", 60, "--preprocess")
    return folder


def averaged(trained: Path) -> torch.nn.Module:
    return checkpoint.network(trained)[0]


def test_timm_loads_the_averaged_weights_without_fasttrain(exports, trained, tmp_path):
    images = torch.randn(3, 3, 32, 32)
    torch.save(images, tmp_path / "images.pt")
    code = """
import sys, timm, torch
file, images, out = sys.argv[1:]
images = torch.load(images)
by_path = timm.create_model("test_resnet", num_classes=10, checkpoint_path=file).eval()
by_folder = timm.create_model("local-dir:" + file.rsplit("/", 1)[0], pretrained=True).eval()
assert by_folder.pretrained_cfg["label_names"][3] == "cross-stripes-red", by_folder.pretrained_cfg
assert not any(name.startswith("fasttrain") for name in sys.modules)
with torch.no_grad():
    torch.save([by_path(images), by_folder(images)], out)
"""
    arguments = [str(exports / "model.safetensors"), str(tmp_path / "images.pt"), str(tmp_path / "logits.pt")]
    subprocess.run([sys.executable, "-I", "-c", code, *arguments], check=True)
    with torch.no_grad():
        expected = averaged(trained)(images).logits
    for logits in torch.load(tmp_path / "logits.pt"):
        assert torch.allclose(logits, expected, atol=1e-5)


def test_onnx_takes_any_batch_and_carries_its_preprocessing(exports, trained):
    onnx.checker.check_model(onnx.load(exports / "model.onnx"), full_check=True)
    session = onnxruntime.InferenceSession(exports / "model.onnx")
    model = averaged(trained)
    assert session.get_inputs()[0].shape == ["batch", 3, 32, 32]
    for batch in (1, 2, 7):
        images = torch.randn(batch, 3, 32, 32)
        (logits,) = session.run(["logits"], {"images": images.numpy()})
        with torch.no_grad():
            assert np.allclose(logits, model(images).logits, atol=1e-5)
    config = json.loads(session.get_modelmeta().custom_metadata_map[KEY])
    assert config["label_names"] == checkpoint.network(trained)[2]
    assert config["pretrained_cfg"]["mean"] == [0.485, 0.456, 0.406]


def test_a_graph_with_preprocessing_takes_images_as_pil_opens_them(exports, trained, demo_set):
    session = onnxruntime.InferenceSession(exports / "pixels.onnx")
    transform = timm.data.create_transform(**ModelConfig("test_resnet", ("a",), 32).preprocessing)
    model, sizes = averaged(trained), set()
    for path in sorted((demo_set / "val").rglob("*.jpg"))[::25]:
        image = Image.open(path)
        sizes.add(image.size)
        (probs,) = session.run(["probabilities"], {"images": np.asarray(image)[None]})
        with torch.no_grad():
            expected = model(transform(image)[None]).logits.softmax(1)
        assert np.allclose(probs, expected, atol=2e-3)
    assert len(sizes) == 10


def test_eval_and_predict_take_exports(exports, trained, demo_set, tmp_path):
    val = demo_set / "val"
    call("eval", trained, "--data", val, "--out", tmp_path / "run.npz")
    expected = predictions.load(tmp_path / "run.npz")
    for name in ("model.safetensors", "model.onnx", "pixels.onnx"):
        output = call("eval", exports / name, "--data", val, "--out", tmp_path / "file.npz").output
        found = predictions.load(tmp_path / "file.npz")
        assert np.allclose(found.probs, expected.probs, atol=1e-3) and np.array_equal(found.labels, expected.labels)
        assert f"of {len(found)} images" in output
    call("predict", exports / "model.onnx", "--images", val, "--out", tmp_path / "file.npz")
    assert np.allclose(predictions.load(tmp_path / "file.npz").probs, expected.probs, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("model.onnx", ["--views", "report"], "takes images of 32 x 32 pixels only"),
        ("model.onnx", ["--sizes", "64"], "takes images of 32 x 32 pixels only"),
        ("pixels.onnx", ["--views", "tencrop"], "crops images itself"),
        ("pixels.onnx", ["--interpolation", "bicubic"], "crops images itself"),
        ("model.safetensors", ["--raw"], "one set of weights"),
        ("model.onnx", ["--device", "cuda"], "run on the CPU here"),
        ("missing.onnx", [], "no such file"),
    ],
)
def test_what_a_graph_does_not_take_is_refused(exports, demo_set, name, options, message):
    result = call("eval", exports / name, "--data", demo_set / "val", *options, status=2)
    assert message in result.output and len(result.output.splitlines()) == 1


def test_the_comparison_is_stored(exports):
    for name in ("model.safetensors", "model.onnx", "pixels.onnx"):
        facts = json.loads((exports / f"{name}.parity.json").read_text())
        assert (
            facts["agreement"] + facts["near_ties"] >= 0.995
            and facts["images"] == 60
            and facts["weights"] == "averaged"
        )
        assert abs(facts["top1_file"] - facts["top1_checkpoint"]) < 0.02 and facts["max_difference"] < 0.01
        assert facts["run_by"].startswith("timm" if name.endswith("safetensors") else "onnxruntime")


def test_a_file_that_computes_something_else_is_not_put_in_place(exports, trained, monkeypatch):
    before = {path.name: path.read_bytes() for path in exports.iterdir()}
    original = writing.timm_network

    def damaged(config, weights):  # as a BatchNorm that was folded with the wrong statistics
        network = original(config, weights)
        next(each for each in network.modules() if isinstance(each, torch.nn.BatchNorm2d)).running_var.mul_(9)
        return network

    monkeypatch.setattr(writing, "timm_network", damaged)
    result = call("export", trained, "--to", exports / "model.onnx", "--max-images", 60, status=1)
    assert "model.onnx was not written" in result.output and "have the same top-1 class" in result.output
    assert {path.name: path.read_bytes() for path in exports.iterdir()} == before


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{"mean": [0, 0, 0], "std": [1, 1, 1]}, {"crop_pct": 0.5}, {"interpolation": "nearest"}]
)
def test_a_wrong_preprocessing_is_noticed(trained, tmp_path, monkeypatch, changes):
    original = ModelConfig.to_dict

    def wrong(config):
        content = original(config)
        return content | {"pretrained_cfg": content["pretrained_cfg"] | changes}

    monkeypatch.setattr(ModelConfig, "to_dict", wrong)
    result = call("export", trained, "--to", tmp_path / "model.safetensors", status=1)
    assert "was not written" in result.output and not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_raw_weights_and_every_format(trained, demo_set, tmp_path, name):
    call("export", trained, "--to", tmp_path / name, "--raw")
    call("eval", trained, "--raw", "--data", demo_set / "val", "--out", tmp_path / "raw.npz")
    call("eval", tmp_path / name, "--data", demo_set / "val", "--out", tmp_path / "file.npz")
    raw, found = (predictions.load(tmp_path / f"{each}.npz") for each in ("raw", "file"))
    assert np.allclose(found.probs, raw.probs, atol=1e-5)
    call("eval", trained, "--data", demo_set / "val", "--out", tmp_path / "averaged.npz")
    assert not np.allclose(found.probs, predictions.load(tmp_path / "averaged.npz").probs, atol=1e-3)


@pytest.mark.slow
def test_an_aligned_network_leaves_at_timms_widths(demo_set, tmp_path):
    machine = MachineConfig(device="cpu", compile="off", align="on", workers=2)
    recipe = tiny(arch="tresnet_m", image_size=64, batch_size=10, epochs=1, machine=machine)
    run(recipe, tmp_path / "run", part_of(demo_set, 2))
    call("export", tmp_path / "run", "--to", tmp_path / "model.safetensors", "--max-images", 20)
    network = timm.create_model("tresnet_m", num_classes=10, checkpoint_path=str(tmp_path / "model.safetensors"))
    assert network.state_dict().keys() == timm.create_model("tresnet_m", num_classes=10).state_dict().keys()


@pytest.mark.slow
def test_images_of_a_pack_and_of_the_demo_set_are_compared_on(trained, demo_set, tmp_path):
    call(
        "data", "pack", demo_set / "val", "--out", tmp_path / "val.safetensors", "--pixels", "raw", "--shorter-side", 80
    )
    output = call("export", trained, "--to", tmp_path / "a.pth", "--data", tmp_path / "val.safetensors").output
    assert "top-1" in output and "val.safetensors" in output
    (tmp_path / "flat").mkdir()
    for number, path in enumerate(sorted((demo_set / "val").rglob("*.jpg"))[::50]):
        (tmp_path / "flat" / f"{number}.jpg").write_bytes(path.read_bytes())
    output = call("export", trained, "--to", tmp_path / "b.pth", "--data", tmp_path / "flat").output
    assert "of 5 images" in output and "before" not in output


def test_agreement_counts_near_ties_apart():
    expected = np.tile(np.array([[0.5, 0.495, 0.005]], np.float32), (200, 1))
    found = expected.copy()
    found[:4] = [0.496, 0.499, 0.005]  # near ties
    labels = np.array([1] * 2 + [0] * 198)
    parity = of_probabilities(expected, found, labels, "a test", "made-up numbers")
    assert (parity.agreement, parity.near_ties, parity.passed) == (0.98, 0.02, True)
    assert parity.top1_checkpoint == parity.top1_file == 0.99
    assert parity.max_difference == pytest.approx(0.004, rel=1e-3)
    found[4:6] = [0.1, 0.8, 0.1]  # the same tie, but another network
    parity = of_probabilities(expected, found, None, "", "")
    assert (parity.agreement, parity.near_ties, parity.passed) == (0.97, 0.02, False)
    with pytest.raises(RunError, match="not finite"):
        of_probabilities(expected, np.full_like(found, np.nan), None, "", "")


def test_a_network_with_nothing_but_near_ties_is_not_passed():
    rng = np.random.default_rng(0)
    flat, other = (0.1 + rng.uniform(-5e-4, 5e-4, (100, 10)).astype(np.float32) for _ in range(2))
    parity = of_probabilities(flat, other, None, "", "")
    assert parity.near_ties > 0.5 and not parity.passed


def test_files_of_others_are_not_overwritten(trained, tmp_path):
    (tmp_path / "model.onnx").write_text("mine")
    assert "was not made by" in call("export", trained, "--to", tmp_path / "model.onnx", status=2).output
    (tmp_path / "config.json").write_text('{"architecture": "mine"}')
    assert "config.json exists" in call("export", trained, "--to", tmp_path / "other.onnx", status=2).output
    (tmp_path / "config.json").unlink()
    (tmp_path / "new.pth.parity.json").write_text("mine")
    assert "parity.json exists" in call("export", trained, "--to", tmp_path / "new.pth", status=2).output
    assert "checkpoint's folder" in call("export", trained, "--to", trained / "best" / "new.pth", status=2).output
    assert {path.read_text() for path in tmp_path.iterdir()} == {"mine"} and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("model.zip", [], "end the name in one of .safetensors, .pth, .onnx, .pt2"),
        ("model.pth", ["--preprocess"], "--preprocess is for graphs"),
        ("file/model.onnx", [], "cannot make the folder"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(trained, tmp_path, name, options, message):
    (tmp_path / "file").touch()
    output = call("export", trained, "--to", tmp_path / name, *options, status=2).output
    assert message in output and len(output.splitlines()) == 1


def fail(images):
    raise ValueError("a line\nand another")


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda images: torch.zeros(1, 2), r"returns torch.float32 \[1, 2\], not float32 \[3, 2\]"),
        (lambda images: torch.zeros(3, 1), "returns"),
        (lambda images: torch.zeros(3, 2, 1), "returns"),
        (lambda images: torch.zeros(3, 2, dtype=torch.int64), "returns torch.int64"),
        (lambda images: (torch.zeros(3, 2),), "returns tuple"),
        (fail, r"does not take torch.float32 \[3, 3, 32, 32\]: a line and another"),
    ],
)
def test_what_a_graph_returns_is_checked(run, message):
    graph = Graph(Path("x.onnx"), ModelConfig("test_resnet", ("a", "b"), 32), run)
    with pytest.raises(UserError, match=f"x.onnx {message}"):
        graph(torch.zeros(3, 3, 32, 32))


@pytest.mark.parametrize("rows", [[[-0.5, 1.5]], [[0.5, 0.6]]])
def test_probabilities_of_a_graph_are_checked(rows):
    graph = Graph(Path("x.onnx"), ModelConfig("test_resnet", ("a", "b"), 32, True), lambda images: torch.tensor(rows))
    with pytest.raises(UserError, match="no probabilities"):
        graph.probabilities(torch.zeros(1, 9, 9, 3, dtype=torch.uint8))


def config_text(**changes) -> str:
    content = ModelConfig("test_resnet", ("a", "b"), 32).to_dict()
    return json.dumps(content | changes)


def test_a_config_is_read_back():
    assert parse_config(config_text(), "x") == ModelConfig("test_resnet", ("a", "b"), 32)


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{}", "[" * 10**5, "nul", '{"fasttrain": 1}', config_text(fasttrain={"format": 2, "input": "crops"}),
        config_text(fasttrain={"format": 1, "input": "audio"}), config_text(architecture=["test_resnet"]),
        config_text(label_names=[]), config_text(label_names=["a", "a"]), config_text(label_names=[1, 2]),
        config_text(label_names="ab"), config_text(label_names=["a", "b\0"]),
        config_text(pretrained_cfg={"input_size": [3, 10**9, 32]}), config_text(pretrained_cfg={"input_size": 3}),
        config_text().replace("0.485", "0.5"), config_text().replace("bilinear", "bicubic"),
    ],
)  # fmt: skip
def test_a_config_of_others_is_refused(text):
    with pytest.raises(UserError, match="x"):
        parse_config(text, "x")


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_files_are_refused_in_one_line(exports, demo_set, tmp_path, name):
    source = exports / name if (exports / name).exists() else exports / "model.safetensors"
    (tmp_path / name).write_bytes(source.read_bytes()[:-1000])
    (tmp_path / "config.json").write_bytes((exports / "config.json").read_bytes())
    output = call("eval", tmp_path / name, "--data", demo_set / "val", status=2).output
    assert len(output.splitlines()) == 1 and name in output
