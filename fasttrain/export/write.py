"""Writes exported files, each format by its file's ending."""

import json
import shutil
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fasttrain.checkpoints import checkpoint
from fasttrain.export.graph import Traceable, traceable
from fasttrain.exported import CONFIG, GRAPHS, KEY, WEIGHTS, ModelConfig, quiet, require_onnxruntime
from fasttrain.utils.errors import RunError, UserError
from fasttrain.utils.text import printable

_MOST_ONNX_BYTES = 2**31 - 2**26  # protobuf's limit, minus what the graph itself takes


def check_ending(path: Path, *, takes_pixels: bool) -> None:
    """Raises UserError where a file's name ends in no format, or a package that writes it is missing."""
    if path.suffix not in (*WEIGHTS, *GRAPHS):
        raise UserError(f"--to {printable(path)}: end the name in one of {', '.join((*WEIGHTS, *GRAPHS))}")
    if takes_pixels and path.suffix not in GRAPHS:
        raise UserError(f"--preprocess is for graphs ({', '.join(GRAPHS)}); timm preprocesses by config.json")
    if path.suffix == ".onnx":
        require_onnxruntime()
        try:
            import onnx  # noqa: F401
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise UserError(f".onnx files need onnx and onnxscript ({error}): pip install onnx onnxscript") from None


def write(path: Path, config: ModelConfig, weights: dict[str, Tensor]) -> None:
    """Write a network to `path`, and its config to config.json next to it. weights: by timm's names. Raises RunError
    where it cannot be exported, OSError where it cannot be written."""
    text = json.dumps(config.to_dict())
    of_weights = json.dumps(config.of_weights().to_dict(), indent=1)
    (path.parent / CONFIG).write_text(of_weights + "\n", encoding="utf-8")
    match path.suffix:
        case ".safetensors":
            save_file(weights, path, {"format": "pt", KEY: text})
            shutil.copymode(path.parent / CONFIG, path)  # safetensors writes files that only their owner can read
        case ".pth":
            torch.save(weights, path)
        case ".pt2":
            _write_pt2(path, config, weights, text)
        case ".onnx":
            _write_onnx(path, config, weights, text)


def _write_pt2(path: Path, config: ModelConfig, weights: dict[str, Tensor], text: str) -> None:
    module, example, axes = _traceable(config, weights)
    shapes = dict.fromkeys(axes, torch.export.Dim.DYNAMIC)
    with quiet(), torch.no_grad():
        try:
            program = torch.export.export(module, (example,), dynamic_shapes=(shapes,))
        except Exception as error:  # of no common class
            raise RunError(f"torch.export does not take {config.arch}: {_reason(error)}") from None
        torch.export.save(program, path, extra_files={CONFIG: text})


def _write_onnx(path: Path, config: ModelConfig, weights: dict[str, Tensor], text: str) -> None:
    if sum(tensor.nbytes for tensor in weights.values()) > _MOST_ONNX_BYTES:
        raise RunError(f"{config.arch} has more weights than one .onnx file can hold; export a .pt2 file instead")
    module, example, axes = _traceable(config, weights)
    output = "probabilities" if config.takes_pixels else "logits"
    with quiet(), torch.no_grad():
        try:
            exported = torch.onnx.export(
                module,
                (example,),
                input_names=["images"],
                output_names=[output],
                dynamic_shapes=(axes,),
                dynamo=True,
                verbose=False,
            )
        except Exception as error:  # of no common class
            raise RunError(f"torch cannot export {config.arch} as ONNX: {_reason(error)}") from None
        assert exported is not None
        exported.model.metadata_props[KEY] = text
        exported.save(path, external_data=False)


def _traceable(config: ModelConfig, weights: dict[str, Tensor]) -> Traceable:
    return traceable(timm_network(config, weights), config.image_size, takes_pixels=config.takes_pixels)


def timm_network(config: ModelConfig, weights: dict[str, Tensor]) -> nn.Module:
    """timm's own network with these weights, in eval mode."""
    network = timm.create_model(config.arch, num_classes=len(config.classes))
    network.load_state_dict(weights)
    return network.eval()


def timm_weights(saved: checkpoint.Checkpoint, *, averaged: bool) -> dict[str, Tensor]:
    """A checkpoint's weights and buffers by timm's names, without the heads that only training uses."""
    found = checkpoint.weights(saved, averaged)
    ours = {name: tensor.contiguous() for name, tensor in found.items() if name.startswith("backbone.")}
    return {name.removeprefix("backbone."): tensor for name, tensor in ours.items()}


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return printable(lines[0])[:200] if lines else type(error).__name__
