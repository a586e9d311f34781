"""Networks: timm's, from random weights only, with the features in front of the classifier made visible."""

import difflib
from dataclasses import dataclass

import timm
from torch import Tensor, nn

from fasttrain.batch import Output
from fasttrain.errors import UserError


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
    the features are the pooled ones that enter the classifier (after its dropout, where the network has one)."""

    def __init__(self, arch: str, classes: int) -> None:
        super().__init__()
        if not timm.is_model(arch):
            close = difflib.get_close_matches(arch, [*ARCHS, *timm.list_models()], n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else f"the report's are {', '.join(ARCHS)}"
            raise UserError(f"no network {arch!r} in timm {timm.__version__}; {hint}")
        try:
            self.backbone = timm.create_model(arch, pretrained=False, num_classes=classes)
        except RuntimeError as error:
            raise UserError(f"timm cannot make {arch!r}: {error}") from None
        if not isinstance(self.backbone.get_classifier(), nn.Linear):
            raise UserError(f"{arch!r} does not end in one linear classifier; choose another network")

    def forward(self, images: Tensor) -> Output:
        features = self.backbone.forward_head(self.backbone.forward_features(images), pre_logits=True)
        return Output(self.backbone.get_classifier()(features), features)
