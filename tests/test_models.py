"""Networks: the logits are timm's own, the features are those in front of the classifier."""

import pytest
import timm
import torch

from fasttrain.errors import UserError
from fasttrain.models import ARCHS, Classifier

SMALL = ["test_resnet", "test_byobnet", "test_efficientnet", "test_vit", "test_convnext", "resnet18", "regnetx_002"]


@pytest.mark.parametrize("arch", SMALL)
def test_logits_and_features_are_timms(arch):
    torch.manual_seed(0)
    model = Classifier(arch, 7).eval()
    images = torch.randn(2, 3, *timm.data.resolve_data_config(model=model.backbone)["input_size"][1:])
    with torch.no_grad():
        output = model(images)
        torch.testing.assert_close(output.logits, model.backbone(images))
        classifier = model.backbone.get_classifier()
        torch.testing.assert_close(output.features @ classifier.weight.T + classifier.bias, output.logits)
    assert output.logits.shape == (2, 7) and output.features.shape == (2, model.backbone.num_features)


@pytest.mark.parametrize(
    ("arch", "millions"), [("tresnet_xl", 78.44), ("resnest101e", 48.28), ("seresnext101_32x4d", 48.96)]
)
def test_the_reports_networks_have_their_size(arch, millions):
    with torch.device("meta"):
        model = Classifier(arch, 1000)
        output = model.eval()(torch.empty(2, 3, 224, 224))
    count = sum(each.numel() for each in model.parameters())
    assert count == ARCHS[arch].parameters and round(count / 1e6, 2) == millions
    assert output.logits.shape == (2, 1000) and output.features.shape == (2, model.backbone.num_features)


@pytest.mark.parametrize("arch", list(ARCHS))
def test_residual_blocks_start_as_identity(arch):
    """The last norm of each residual block starts at zero: timm's default, and a trick of Bag of Tricks."""
    model = Classifier(arch, 10)
    zero = [each for each in model.parameters() if each.ndim == 1 and not each.any()]
    norm_weights = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)}
    assert sum(id(each) in norm_weights for each in zero) >= 20


def test_weights_are_random_and_never_fetched(monkeypatch):
    asked = []
    honest = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: asked.append(kwargs) or honest(*args, **kwargs))
    torch.manual_seed(1)
    one = Classifier("test_resnet", 5)
    torch.manual_seed(2)
    other = Classifier("test_resnet", 5)
    assert all(each["pretrained"] is False for each in asked)
    assert not torch.equal(one.backbone.get_classifier().weight, other.backbone.get_classifier().weight)


@pytest.mark.parametrize(
    ("arch", "says"), [("tresnet_x", "tresnet_xl"), ("resnest101", "resnest101e"), ("qqqq", "the report's are")]
)
def test_unknown_networks_name_the_nearest(arch, says):
    with pytest.raises(UserError, match=says):
        Classifier(arch, 10)


def test_networks_without_one_linear_classifier_are_refused():
    with pytest.raises(UserError, match="does not end in one linear classifier"):
        Classifier("deit_tiny_distilled_patch16_224", 10)
