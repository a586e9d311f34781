"""Networks: timm's, from random weights only, with the features in front of the classifier made visible."""

import difflib
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.models.tresnet import TResNet
from torch import Tensor, nn
from torch.nn import functional as F

from fasttrain.config.schema import Recipe
from fasttrain.losses.base import Output, at_least_float32
from fasttrain.models.aligned import align
from fasttrain.models.channels_last import use_channels_last_forms
from fasttrain.utils.errors import UserError
from fasttrain.utils.text import printable


@dataclass(frozen=True)
class Arch:
    """A network that the DeepBlueAI report trains. parameters: with 1000 classes."""

    parameters: int
    batch_size: int


ARCHS = {
    "tresnet_xl": Arch(parameters=78_436_244, batch_size=256),
    "resnest101e": Arch(parameters=48_275_016, batch_size=128),
    "seresnext101_32x4d": Arch(parameters=48_955_416, batch_size=128),
}


class Classifier(nn.Module):
    """A timm network of K classes. Takes images [B, 3, H, W]; gives Output(logits [B, K], features [B, D]), where
    the features are the pooled ones that enter the classifier (after its dropout, where the network has one).

    cosine_head: also gives, in training mode, `Output.cosine` [B, K] from a second head without a bias.
    projection_head: also gives, in training mode, `Output.embedding` [B, E]; its weights have a gradient, of zeros, in
    a step where no loss reads that.
    zero_gamma=False: norms that timm starts at 0 start at 1. aligned: a TResNet's widths are filled up to multiples
    of 8 (see `models.aligned`), which changes nothing else. Raises UserError for a network that timm cannot make.
    """

    def __init__(
        self,
        arch: str,
        classes: int,
        *,
        cosine_head: bool = False,
        projection_head: bool = False,
        zero_gamma: bool = True,
        aligned: bool = False,
    ) -> None:
        super().__init__()
        if not timm.is_model(arch):
            close = difflib.get_close_matches(arch, [*ARCHS, *timm.list_models()], n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else f"the report's are {', '.join(ARCHS)}"
            raise UserError(f"no network {arch!r} in timm {timm.__version__}; {hint}")
        try:
            self.backbone = timm.create_model(arch, pretrained=False, num_classes=classes)
        except RuntimeError as error:
            raise UserError(f"timm cannot make {arch!r}: {printable(str(error))}") from None
        classifier = self.backbone.get_classifier()
        if not isinstance(classifier, nn.Linear):
            raise UserError(f"{arch!r} does not end in one linear classifier; choose another network")
        if not zero_gamma:
            _start_norms_at_one(self.backbone)
        if aligned and isinstance(self.backbone, TResNet):
            align(self.backbone)
        use_channels_last_forms(self.backbone)
        # Heads come last, so that the other weights of a seed are the same with and without them.
        self.cosine = CosineHead(classifier.in_features, classes) if cosine_head else None
        self.projection = ProjectionHead(classifier.in_features) if projection_head else None

    @classmethod
    def of(cls, recipe: Recipe, classes: int) -> "Classifier":
        """The network that a recipe trains, with random weights."""
        return cls(
            recipe.arch,
            classes,
            cosine_head=any(loss.cosine_head for loss in recipe.losses),
            projection_head=any(loss.projection_head for loss in recipe.losses),
            zero_gamma=recipe.zero_gamma,
            aligned=recipe.machine.align == "on",
        )

    @property
    def classifier_prefix(self) -> str:
        """How the names of the classifier's tensors begin."""
        last = self.backbone.get_classifier()
        return next(f"{name}." for name, module in self.named_modules() if module is last)

    def forward(self, images: Tensor) -> Output:
        features = self.backbone.forward_head(self.backbone.forward_features(images), pre_logits=True)
        logits = self.backbone.get_classifier()(features)
        if not self.training:
            return Output(logits, features)
        cosine = self.cosine(features) if self.cosine else None
        embedding = None
        if self.projection:
            logits, embedding = _Tied.apply(logits, self.projection(features))
        return Output(logits, features, cosine, embedding)


_SMALLER = "choose another --image-size, --batch-size or micro_batch"


def build_on_meta(recipe: Recipe, classes: int) -> Classifier:
    """The network that a recipe trains, without values: it costs no memory."""
    with torch.device("meta"):
        return Classifier.of(recipe, classes)


def check_input_shape(model: Classifier, arch: str, rows: int, size: int, advice: str = _SMALLER) -> Output:
    """What a network of `build_on_meta` gives in training for `rows` images of size x size. UserError, with that
    advice, where it does not take them."""
    try:
        return model.train()(torch.empty(rows, 3, size, size, device="meta"))
    except (RuntimeError, ValueError, AssertionError, TypeError) as error:
        gist = printable(" ".join(str(error).split())[:200])
        images = "one image" if rows == 1 else f"{rows} images"
        raise UserError(f"{arch} does not take {images} of {size} x {size} pixels at once ({gist}); {advice}") from None


# How the names of the tensors of heads begin that only training needs.
TRAINING_HEADS = ("cosine.", "projection.")


class CosineHead(nn.Module):
    """Cosines [B, K], in float32 whatever autocast says, of the angles between features [B, D] and K weights."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(classes, features))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, features: Tensor) -> Tensor:
        with _no_autocast(features):
            directions = F.normalize(at_least_float32(features), eps=1e-6)
            return F.linear(directions, F.normalize(self.weight, eps=1e-6)).clamp(-1, 1)


class ProjectionHead(nn.Module):
    """Embeddings [B, dimensions] of length 1 (0 where the projection is), in float32 whatever autocast says, of
    features [B, D]: two linear layers, D wide in between, with a ReLU (Chen et al. 2020, arXiv 2002.05709)."""

    def __init__(self, features: int, dimensions: int = 128) -> None:
        super().__init__()
        self.hidden = nn.Linear(features, features)
        self.out = nn.Linear(features, dimensions)

    def forward(self, features: Tensor) -> Tensor:
        projected = self.out(F.relu(self.hidden(features)))
        with _no_autocast(features):
            return F.normalize(at_least_float32(projected), eps=1e-6)


def _no_autocast(values: Tensor) -> AbstractContextManager[object]:
    """The meta device has no autocast to switch off."""
    return nullcontext() if values.is_meta else torch.autocast(values.device.type, enabled=False)


class _Tied(torch.autograd.Function):
    """Two tensors as they are; where one of them has no gradient, the other's comes with zeros for it.

    A loss that reads the embedding is not there at every step. DDP waits for a gradient of each parameter, or expects
    the same ones at every step, and SGD leaves out parameters without one, their momentum and decay too.
    """

    @staticmethod
    def forward(ctx: Any, one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        return one.view_as(one), other.view_as(other)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients


def _start_norms_at_one(network: nn.Module) -> None:
    for module in network.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.ndim == 1 and not weight.is_meta and not weight.detach().any():
            nn.init.ones_(weight)
