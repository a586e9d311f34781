"""Exported networks: what a file of `fasttrain export` says about itself, and how it is opened again.

A file's description is timm's and Hugging Face's config.json with one key more, `fasttrain`. It is stored inside the
file (in .pth files, which have no place for it, only next to the file).
"""

import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fasttrain.checkpoints.checkpoint import first_misfit
from fasttrain.checkpoints.init_weights import read_weights
from fasttrain.config.schema import IMAGE_SIZES, IMAGENET_MEAN, IMAGENET_STD, Recipe
from fasttrain.losses.base import Output
from fasttrain.losses.cross_entropy import CrossEntropy
from fasttrain.models import Classifier
from fasttrain.pipelines.views import Views, shorter_edge
from fasttrain.utils.errors import UserError
from fasttrain.utils.files import read_text
from fasttrain.utils.text import printable

WEIGHTS, GRAPHS = (".safetensors", ".pth"), (".onnx", ".pt2")
CONFIG = "config.json"
KEY = "fasttrain"  # in a config, and of the entry that holds the config in a file
_FORMAT = 1
_CONFIG_BYTES = 16 << 20


@dataclass(frozen=True)
class ModelConfig:
    """What a user of an exported network needs to know.

    arch: timm's name. classes: K names, of the outputs. image_size: side of the crops, in pixels. takes_pixels: a graph
    that takes whole images, uint8 [B, H, W, 3], and returns probabilities [B, K]; otherwise networks take normalized
    crops, float32 [B, 3, S, S], and return logits [B, K].
    """

    arch: str
    classes: tuple[str, ...]
    image_size: int
    takes_pixels: bool = False

    def of_weights(self) -> "ModelConfig":
        """The config of the same network's weights, as config.json next to a file has it."""
        return replace(self, takes_pixels=False)

    @property
    def crop_pct(self) -> float:
        """timm's crop_pct: timm resizes an image's shorter edge to ⌊image_size / crop_pct⌋."""
        edge = shorter_edge(self.image_size)
        digits = 3
        while int(self.image_size / (shortened := int(self.image_size / edge * 10**digits) / 10**digits)) != edge:
            digits += 1
        return shortened

    @property
    def preprocessing(self) -> dict[str, Any]:
        """How crops are made and normalized, in timm's terms."""
        return {
            "input_size": [3, self.image_size, self.image_size],
            "interpolation": "bilinear",
            "crop_pct": self.crop_pct,
            "crop_mode": "center",
            "mean": list(IMAGENET_MEAN),
            "std": list(IMAGENET_STD),
        }

    def to_dict(self) -> dict[str, Any]:
        """The content of config.json."""
        with torch.device("meta"):
            network = Classifier(self.arch, len(self.classes)).backbone
        own = network.pretrained_cfg
        layers = {name: own[name] for name in ("first_conv", "classifier") if own.get(name)}
        return {
            "architecture": self.arch,
            "num_classes": len(self.classes),
            "num_features": network.num_features,
            "pretrained_cfg": {"custom_load": False, "num_classes": len(self.classes), **self.preprocessing, **layers},
            "label_names": list(self.classes),
            KEY: {"format": _FORMAT, "input": "pixels" if self.takes_pixels else "crops"},
        }


def parse_config(text: str, where: str) -> ModelConfig:
    """A config from its text, which is untrusted. Raises UserError where it is not one that fasttrain writes,
    or asks for another preprocessing than fasttrain's."""
    try:
        content = json.loads(text)
        own, cfg = content[KEY], content["pretrained_cfg"]
        names = content["label_names"]
        config = ModelConfig(content["architecture"], tuple(names), cfg["input_size"][1], own["input"] == "pixels")
        smallest, largest = IMAGE_SIZES
        valid = (
            type(config.arch) is str
            and type(names) is list
            and content["num_classes"] == len(names)
            and len(set(config.classes)) == len(config.classes) > 0
            and all(map(_is_name, names))
            and type(config.image_size) is int
            and smallest <= config.image_size <= largest
        )
        if not valid or own["format"] != _FORMAT or own["input"] not in ("pixels", "crops"):
            raise ValueError
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        raise UserError(
            f"{where} was not written by this version of `fasttrain export`; export the run again"
        ) from None
    for key, value in config.preprocessing.items():
        if cfg.get(key) != value:
            raise UserError(f"{where}: {key} is {printable(str(cfg.get(key)))}, and fasttrain evaluates with {value}")
    return config


def _is_name(name: Any) -> bool:
    """Whether a value is text that a file of probabilities can hold."""
    try:
        return type(name) is str and b"\0" not in name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False


def is_exported(path: Path) -> bool:
    """Whether a path names an exported file, by its ending."""
    return path.suffix in (*WEIGHTS, *GRAPHS) and not path.is_dir()


def is_graph(path: Path) -> bool:
    """Whether a path names an exported graph, which runs on the CPU here."""
    return is_exported(path) and path.suffix in GRAPHS


class Graph:
    """An exported graph, run on the CPU in float32. run: raises anything, and may return anything: the file may come
    from anywhere."""

    def __init__(self, path: Path, config: ModelConfig, run: Callable[[Tensor], Tensor]) -> None:
        self.name, self.config, self.run = printable(path), config, run

    def __call__(self, images: Tensor) -> Output:
        """Logits [B, K] for normalized crops, float32 [B, 3, S, S]. Raises UserError where the graph does not take
        them, or returns something else."""
        logits = self._answers(images)
        return Output(logits, logits[:, :0])

    def probabilities(self, images: Tensor) -> Tensor:
        """Probabilities [B, K] of a graph that `takes_pixels` for whole images, uint8 [B, H, W, 3]. Raises UserError
        like `__call__`."""
        probs = self._answers(images)
        if (probs < 0).any() or ((probs.sum(1) - 1).abs() > 1e-3).any():
            raise UserError(f"{self.name} returns values that are no probabilities; export the run again")
        return probs

    def _answers(self, images: Tensor) -> Tensor:
        try:
            found = self.run(images.contiguous())
        except Exception as error:  # of no common class
            reason = printable(" ".join(str(error).split()))[:200]
            raise UserError(f"{self.name} does not take {images.dtype} {list(images.shape)}: {reason}") from None
        expected = [len(images), len(self.config.classes)]
        if not isinstance(found, Tensor) or found.dtype != torch.float32 or list(found.shape) != expected:
            kind = f"{found.dtype} {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise UserError(f"{self.name} returns {kind}, not float32 {expected}; export the run again")
        return found

    def check_views(self, views: Views, interpolation: str) -> None:
        """Raises UserError where the graph does not take these views."""
        size = self.config.image_size
        if self.config.takes_pixels and (len(views) > 1 or interpolation != "bilinear"):
            raise UserError("this graph crops images itself; leave out --views, --sizes and --interpolation")
        if views.sizes != (size,):
            raise UserError(
                f"this graph takes images of {size} x {size} pixels only; leave out --sizes and --views report"
            )


def network(path: Path) -> tuple[Classifier | Graph, Recipe, list[str]]:
    """An exported network on the CPU, in eval mode; a recipe with what evaluations need to know; and its class names.
    Raises UserError where the file cannot be read."""
    if (path.parent / "meta.json").is_file() and path.name.endswith(".safetensors"):
        raise UserError(f"{printable(path)} is a part of a checkpoint; name its folder, {printable(path.parent)}")
    if not path.is_file():
        raise UserError(f"no such file: {printable(path)}")
    opened: Classifier | Graph
    match path.suffix:
        case ".onnx":
            opened = _open_onnx(path)
            config = opened.config
        case ".pt2":
            opened = _open_pt2(path)
            config = opened.config
        case _:
            config = _config_of_weights(path)
            opened = _open_weights(path, config)
    recipe = Recipe(
        name="exported", arch=config.arch, image_size=config.image_size, precision="fp32", losses=(CrossEntropy(),)
    )
    return opened, recipe, list(config.classes)


def _config_of_weights(path: Path) -> ModelConfig:
    where = printable(path)
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                text = (file.metadata() or {}).get(KEY, "{}")
        else:
            where = printable(path.parent / CONFIG)
            text = read_text(path.parent / CONFIG, _CONFIG_BYTES)
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{where} cannot be read: {printable(str(error))[:200]}") from None
    return parse_config(text, where)


def _open_weights(path: Path, config: ModelConfig) -> Classifier:
    """A timm network with a file's weights."""
    tensors = {f"backbone.{name}": tensor for name, tensor in read_weights(path, f"{printable(path)}").items()}
    with torch.device("meta"):  # shapes are compared before the network takes memory
        own = Classifier(config.arch, len(config.classes)).state_dict()
    if reason := first_misfit(own, tensors):
        network = f"{config.arch} with {len(config.classes)} classes"
        raise UserError(f"{printable(path)} does not hold a {network}: {reason}")
    model = Classifier(config.arch, len(config.classes))
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        reason = printable(str(error).splitlines()[-1].strip())[:200]
        raise UserError(
            f"{printable(path)} does not hold a {config.arch} with {len(config.classes)} classes: {reason}"
        ) from None
    return model.eval()


def require_onnxruntime() -> Any:
    """The module onnxruntime. Raises UserError where it is not installed."""
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(f".onnx files need onnxruntime ({error}): pip install onnx onnxscript onnxruntime") from None
    return onnxruntime


def _open_onnx(path: Path) -> Graph:
    runtime = require_onnxruntime()
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        text = session.get_modelmeta().custom_metadata_map.get(KEY, "{}")
    except Exception as error:  # of no common class
        raise UserError(f"{printable(path)} cannot be opened: {printable(str(error))[:200]}") from None
    inputs = session.get_inputs()
    if len(inputs) != 1:
        raise UserError(f"{printable(path)} has {len(inputs)} inputs, and exported networks have one")

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {inputs[0].name: images.numpy()})[0])

    return Graph(path, parse_config(text, printable(path)), run)


@contextmanager
def quiet() -> Iterator[None]:
    """Hide what torch prints about the internals of its exports."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _open_pt2(path: Path) -> Graph:
    files = {CONFIG: ""}
    try:
        with quiet():
            program = torch.export.load(path, extra_files=files).module()
    except Exception as error:  # a damaged file makes torch raise anything
        raise UserError(f"{printable(path)} cannot be opened: {printable(str(error))[:200]}") from None
    assert isinstance(program, nn.Module)
    return Graph(path, parse_config(files[CONFIG] or "{}", printable(path)), program)
