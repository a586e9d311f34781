"""Classifiers: logits equal timm's, features are the classifier's input; the projection head."""

import pytest
import timm
import torch
from torch.nn import functional as F

from fasttrain.models import ARCHS, Classifier
from fasttrain.models.heads import ProjectionHead
from fasttrain.utils.errors import UserError

SMALL = ["test_resnet", "test_byobnet", "test_efficientnet", "test_vit", "test_convnext", "resnet18", "regnetx_002"]


@pytest.mark.parametrize("arch", SMALL)
def test_logits_and_features_equal_timm(arch):
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
    ("arch", "parameters"),
    [("tresnet_xl", 78_436_244), ("resnest101e", 48_275_016), ("seresnext101_32x4d", 48_955_416)],
)
def test_report_networks_have_the_expected_size(arch, parameters):
    with torch.device("meta"):
        model = Classifier(arch, 1000)
        output = model.eval()(torch.empty(2, 3, 224, 224))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert output.logits.shape == (2, 1000) and output.features.shape == (2, model.backbone.num_features)


@pytest.mark.parametrize("arch", ARCHS)
def test_residual_blocks_start_as_identity(arch):
    """The last norm weight of each residual block starts at 0: timm's default, and a trick of Bag of Tricks."""
    model = Classifier(arch, 10)
    zeros = [p for p in model.parameters() if p.ndim == 1 and not p.any()]
    norm_weights = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)}
    assert sum(id(p) in norm_weights for p in zeros) >= 20


def test_weights_are_random_and_never_downloaded(monkeypatch):
    calls = []
    create_model = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *a, **kwargs: calls.append(kwargs) or create_model(*a, **kwargs))
    torch.manual_seed(1)
    one = Classifier("test_resnet", 5)
    torch.manual_seed(2)
    other = Classifier("test_resnet", 5)
    assert all(kwargs["pretrained"] is False for kwargs in calls)
    assert not torch.equal(one.backbone.get_classifier().weight, other.backbone.get_classifier().weight)


@pytest.mark.parametrize(
    ("arch", "message"),
    [("tresnet_x", "tresnet_xl"), ("resnest101", "resnest101e"), ("qqqq", "for example tresnet_xl")],
)
def test_unknown_networks_get_a_suggestion(arch, message):
    with pytest.raises(UserError, match=message):
        Classifier(arch, 10)


def test_networks_without_one_linear_classifier_are_refused():
    with pytest.raises(UserError, match="does not end in one linear classifier"):
        Classifier("deit_tiny_distilled_patch16_224", 10)


# ---- the projection head


@pytest.mark.parametrize("cosine_head", [False, True])
def test_the_projection_head_does_not_change_other_random_weights(cosine_head):
    torch.manual_seed(3)
    plain = Classifier("test_resnet", 5, cosine_head=cosine_head).state_dict()
    torch.manual_seed(3)
    model = Classifier("test_resnet", 5, cosine_head=cosine_head, projection_head=True)
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in plain.items())
    width = model.backbone.num_features
    assert {name: list(tensor.shape) for name, tensor in state.items() if name not in plain} == {
        "projection.hidden.weight": [width, width],
        "projection.hidden.bias": [width],
        "projection.out.weight": [128, width],
        "projection.out.bias": [128],
    }


def test_embeddings_are_float32_unit_vectors_in_training_only():
    torch.manual_seed(0)
    model = Classifier("test_resnet", 5, projection_head=True)
    images = torch.randn(3, 3, 32, 32)
    output = model.train()(images)
    assert output.embedding is not None and output.embedding.shape == (3, 128)
    torch.testing.assert_close(output.embedding.norm(dim=1), torch.ones(3))
    state = model.state_dict()
    hidden = (output.features @ state["projection.hidden.weight"].T + state["projection.hidden.bias"]).clamp(min=0)
    expected = hidden @ state["projection.out.weight"].T + state["projection.out.bias"]
    torch.testing.assert_close(output.embedding, expected / expected.square().sum(1, keepdim=True).sqrt())
    with torch.autocast("cpu", torch.bfloat16):
        cast = model(images)
    assert cast.logits.dtype == torch.bfloat16 and cast.embedding.dtype == torch.float32
    # The layers are in bfloat16, but the normalization is not.
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
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


def test_all_weights_get_a_gradient_from_any_loss():
    """Weights that a loss does not use get zeros; the others get the same bits as without the second head."""
    torch.manual_seed(0)
    plain = Classifier("test_resnet", 5, zero_gamma=False)
    torch.manual_seed(0)
    model = Classifier("test_resnet", 5, projection_head=True, zero_gamma=False)
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    for network in (plain, model):
        F.cross_entropy(network.train()(images).logits, labels).backward()
    expected = {name: parameter.grad for name, parameter in plain.named_parameters()}
    for name, parameter in model.named_parameters():
        actual = parameter.grad
        right = torch.zeros_like(parameter) if name.startswith("projection.") else expected[name]
        assert actual is not None and right is not None and torch.equal(actual, right), name
    model.zero_grad()
    output = model(images)
    assert output.embedding is not None
    output.embedding[:, 0].sum().backward()
    for name, parameter in model.named_parameters():
        actual = parameter.grad
        assert actual is not None and bool(actual.any()) != name.startswith(model.classifier_prefix), name


def test_a_network_with_a_projection_head_compiles_into_one_graph():
    model = Classifier("test_resnet", 5, projection_head=True).train()
    torch.compiler.reset()
    explained = torch._dynamo.explain(model)(torch.randn(2, 3, 32, 32))
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)
    torch.compiler.reset()
