"""Networks: timm's, from random weights only, with the features in front of the classifier made visible."""

import difflib
from dataclasses import dataclass

import timm
import torch
from timm.models.tresnet import TResNet
from torch import Tensor, nn
from torch.nn import functional as F

from fasttrain.batch import Output, at_least_float32
from fasttrain.config import Recipe
from fasttrain.dataset import shown
from fasttrain.errors import UserError
from fasttrain.models import layout
from fasttrain.models.aligned import align


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
    zero_gamma=False: norms that timm starts at 0 start at 1. aligned: a TResNet's widths are filled up to multiples
    of 8 (see `models.aligned`), which changes nothing else. Raises UserError for a network that timm cannot make.
    """

    def __init__(
        self, arch: str, classes: int, *, cosine_head: bool = False, zero_gamma: bool = True, aligned: bool = False
    ) -> None:
        super().__init__()
        if not timm.is_model(arch):
            close = difflib.get_close_matches(arch, [*ARCHS, *timm.list_models()], n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else f"the report's are {', '.join(ARCHS)}"
            raise UserError(f"no network {arch!r} in timm {timm.__version__}; {hint}")
        try:
            self.backbone = timm.create_model(arch, pretrained=False, num_classes=classes)
        except RuntimeError as error:
            raise UserError(f"timm cannot make {arch!r}: {shown(str(error))}") from None
        classifier = self.backbone.get_classifier()
        if not isinstance(classifier, nn.Linear):
            raise UserError(f"{arch!r} does not end in one linear classifier; choose another network")
        if not zero_gamma:
            _start_norms_at_one(self.backbone)
        if aligned and isinstance(self.backbone, TResNet):
            align(self.backbone)
        layout.keep(self.backbone)
        self.cosine = CosineHead(classifier.in_features, classes) if cosine_head else None

    @classmethod
    def of(cls, recipe: Recipe, classes: int) -> "Classifier":
        """The network that a recipe trains, with random weights."""
        cosine_head = any(loss.cosine_head for loss in recipe.losses)
        aligned = recipe.machine.align
        return cls(recipe.arch, classes, cosine_head=cosine_head, zero_gamma=recipe.zero_gamma, aligned=aligned)

    @property
    def classifier_prefix(self) -> str:
        """How the names of the classifier's tensors begin."""
        last = self.backbone.get_classifier()
        return next(f"{name}." for name, module in self.named_modules() if module is last)

    def forward(self, images: Tensor) -> Output:
        features = self.backbone.forward_head(self.backbone.forward_features(images), pre_logits=True)
        logits = self.backbone.get_classifier()(features)
        return Output(logits, features, self.cosine(features) if self.cosine and self.training else None)


class CosineHead(nn.Module):
    """Cosines [B, K], in float32 whatever autocast says, of the angles between features [B, D] and K weights."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(classes, features))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            directions = F.normalize(at_least_float32(features), eps=1e-6)
            return F.linear(directions, F.normalize(self.weight, eps=1e-6)).clamp(-1, 1)


def _start_norms_at_one(network: nn.Module) -> None:
    for module in network.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.ndim == 1 and not weight.is_meta and not weight.detach().any():
            nn.init.ones_(weight)
