"""Networks: the logits are timm's own, the features are those in front of the classifier; the projection head."""

import pytest
import timm
import torch
from torch.nn import functional as F

from fasttrain.models import ARCHS, Classifier
from fasttrain.models.heads import ProjectionHead
from fasttrain.utils.errors import UserError

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


# ---- a projection head


@pytest.mark.parametrize("cosine_head", [False, True])
def test_the_projection_head_leaves_a_seeds_other_weights_alone(cosine_head):
    torch.manual_seed(3)
    plain = Classifier("test_resnet", 5, cosine_head=cosine_head).state_dict()
    torch.manual_seed(3)
    model = Classifier("test_resnet", 5, cosine_head=cosine_head, projection_head=True)
    found = model.state_dict()
    assert all(torch.equal(found[name], each) for name, each in plain.items())
    width = model.backbone.num_features
    assert {name: list(each.shape) for name, each in found.items() if name not in plain} == {
        "projection.hidden.weight": [width, width],
        "projection.hidden.bias": [width],
        "projection.out.weight": [128, width],
        "projection.out.bias": [128],
    }


def test_embeddings_are_in_training_only_and_of_length_one_in_float32():
    torch.manual_seed(0)
    model = Classifier("test_resnet", 5, projection_head=True)
    images = torch.randn(3, 3, 32, 32)
    output = model.train()(images)
    assert output.embedding is not None and output.embedding.shape == (3, 128)
    torch.testing.assert_close(output.embedding.norm(dim=1), torch.ones(3))
    own = model.state_dict()
    hidden = (output.features @ own["projection.hidden.weight"].T + own["projection.hidden.bias"]).clamp(min=0)
    expected = hidden @ own["projection.out.weight"].T + own["projection.out.bias"]
    torch.testing.assert_close(output.embedding, expected / expected.square().sum(1, keepdim=True).sqrt())
    with torch.autocast("cpu", torch.bfloat16):
        cast = model(images)
    assert cast.logits.dtype == torch.bfloat16 and cast.embedding.dtype == torch.float32
    # Layers in bfloat16, but not the length.
    assert not torch.equal(cast.embedding, output.embedding)
    torch.testing.assert_close(cast.embedding.norm(dim=1), torch.ones(3), rtol=0, atol=1e-6)
    assert model.eval()(images).embedding is None
    assert Classifier("test_resnet", 5).train()(images).embedding is None


def test_a_projection_of_zero_has_a_finite_gradient():
    head = ProjectionHead(3, 4)
    torch.nn.init.zeros_(head.out.weight)
    torch.nn.init.zeros_(head.out.bias)
    features = torch.randn(2, 3, requires_grad=True)
    embedding = head(features)
    embedding.sum().backward()
    assert not embedding.any() and features.grad is not None and features.grad.isfinite().all()
    assert all(each.grad is not None and each.grad.isfinite().all() for each in head.parameters())


def test_all_weights_have_a_gradient_whatever_the_losses_read():
    """Of zeros where that is the right one; and the others' is the same bits as without the second head."""
    torch.manual_seed(0)
    plain = Classifier("test_resnet", 5, zero_gamma=False)
    torch.manual_seed(0)
    model = Classifier("test_resnet", 5, projection_head=True, zero_gamma=False)
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    for network in (plain, model):
        F.cross_entropy(network.train()(images).logits, labels).backward()
    expected = {name: parameter.grad for name, parameter in plain.named_parameters()}
    for name, parameter in model.named_parameters():
        found = parameter.grad
        right = torch.zeros_like(parameter) if name.startswith("projection.") else expected[name]
        assert found is not None and right is not None and torch.equal(found, right), name
    model.zero_grad()
    output = model(images)
    assert output.embedding is not None
    output.embedding[:, 0].sum().backward()
    for name, parameter in model.named_parameters():
        found = parameter.grad
        assert found is not None and bool(found.any()) != name.startswith(model.classifier_prefix), name


def test_a_network_with_a_projection_head_compiles_into_one_graph():
    model = Classifier("test_resnet", 5, projection_head=True).train()
    torch.compiler.reset()
    found = torch._dynamo.explain(model)(torch.randn(2, 3, 32, 32))
    assert (found.graph_count, found.graph_break_count) == (1, 0)
    torch.compiler.reset()
