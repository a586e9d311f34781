"""timm networks with random weights, as classifiers that also return their features."""

import difflib

import timm
import torch
from timm.models.tresnet import TResNet
from torch import Tensor, nn

from fasttrain.config.schema import Recipe
from fasttrain.losses.base import Output
from fasttrain.models.aligned import align
from fasttrain.models.channels_last import use_channels_last_forms
from fasttrain.models.heads import CosineHead, ProjectionHead, tie
from fasttrain.utils.errors import UserError
from fasttrain.utils.text import printable

ARCHS = ("tresnet_xl", "resnest101e", "seresnext101_32x4d")  # the networks that the DeepBlueAI report trains


def require_known(arch: str) -> None:
    """Raises UserError, which names similar networks, where timm has no network of this name."""
    if not timm.is_model(arch):
        close = difflib.get_close_matches(arch, [*ARCHS, *timm.list_models()], n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else f"for example {', '.join(ARCHS)}"
        raise UserError(f"timm {timm.__version__} has no network {arch!r}; {hint}")


class Classifier(nn.Module):
    """A timm network with K classes. Takes images [B, 3, H, W] and returns Output(logits [B, K], features [B, D]): the
    pooled features that enter the classifier (after its dropout, if the network has one).

    cosine_head: in training mode, also return `Output.cosine` [B, K] from a second head without bias. projection_head:
    in training mode, also return `Output.embedding` [B, E]; in a step where no loss uses it, its weights get a gradient
    of zeros. zero_gamma=False: norm weights that timm initializes with 0 are initialized with 1. aligned: pad a
    TResNet's widths to multiples of 8 (see `models.aligned`), which changes nothing else. Raises UserError for a
    network that timm cannot create.
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
        require_known(arch)
        try:
            self.backbone = timm.create_model(arch, pretrained=False, num_classes=classes)
        except RuntimeError as error:
            raise UserError(f"timm cannot create {arch!r}: {printable(str(error))}") from None
        classifier = self.backbone.get_classifier()
        if not isinstance(classifier, nn.Linear):
            raise UserError(f"{arch!r} does not end in one linear classifier; choose another network")
        if not zero_gamma:
            _init_norms_to_one(self.backbone)
        if aligned and isinstance(self.backbone, TResNet):
            align(self.backbone)
        use_channels_last_forms(self.backbone)
        # The heads come last: a seed gives the same other weights with and without them.
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
        """The prefix of the names of the classifier's tensors."""
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
            logits, embedding = tie(logits, self.projection(features))
        return Output(logits, features, cosine, embedding)


_ADVICE = "choose another --image-size, --batch-size or micro_batch"


def build_on_meta(recipe: Recipe, classes: int) -> Classifier:
    """The network that a recipe trains, on the meta device, where it has no values and takes no memory."""
    with torch.device("meta"):
        return Classifier.of(recipe, classes)


def check_input_shape(model: Classifier, arch: str, rows: int, size: int, advice: str = _ADVICE) -> Output:
    """The training output of a network from `build_on_meta` for `rows` images of size x size. Raises UserError, with
    `advice`, where the network does not accept them."""
    try:
        return model.train()(torch.empty(rows, 3, size, size, device="meta"))
    except (RuntimeError, ValueError, AssertionError, TypeError) as error:
        reason = printable(" ".join(str(error).split())[:200])
        images = "one image" if rows == 1 else f"{rows} images"
        raise UserError(
            f"{arch} does not take {images} of {size} x {size} pixels at once ({reason}); {advice}"
        ) from None


def _init_norms_to_one(network: nn.Module) -> None:
    for module in network.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.ndim == 1 and not weight.is_meta and not weight.detach().any():
            nn.init.ones_(weight)
