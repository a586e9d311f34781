"""Networks stay in channels_last, forward and backward, compute what timm's do, and compile without a graph break."""

from collections import Counter

import pytest
import timm
import torch
from timm.layers import BlurPool2d, SpaceToDepth
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fasttrain.models import ARCHS, Classifier
from fasttrain.models.channels_last import use_channels_last_forms

VIEWS = ("view", "expand", "slice", "split", "permute", "select", "as_strided", "transpose", "alias", "detach")


def is_activation(value) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim == 4 and value.shape[1] > 1 and value.shape[2:].numel() > 1


class Leaving(TorchDispatchMode):
    """Counts operations that write an activation in another layout than channels_last; views write nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.name().removeprefix("aten::").lstrip("_").split(".")[0]
        # Split attention's softmax is over weights, which have no height and width.
        if not name.startswith((*VIEWS, "softmax")) and "unsafe_view" not in name:
            outside = [
                each
                for each in tree_leaves(result)
                if is_activation(each) and not each.is_contiguous(memory_format=torch.channels_last)
            ]
            self.found[name] += len(outside)
        return result


def left(model) -> Counter[str]:
    images = torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last)
    with Leaving() as leaving:
        output = model(images)
        getattr(output, "logits", output).square().mean().backward()
    return +leaving.found


@pytest.mark.parametrize("arch", ARCHS)
def test_no_activation_or_gradient_leaves_channels_last(arch):
    torch.manual_seed(0)
    model = Classifier(arch, 10).to(memory_format=torch.channels_last).train()
    assert left(model) == Counter()


def test_timms_own_do_leave_it():
    """What the count above would show without the project's forms."""
    model = timm.create_model("resnest14d", num_classes=10).to(memory_format=torch.channels_last).train()
    assert {"sum", "div"} <= left(model).keys()


@pytest.mark.parametrize("arch", ["tresnet_m", "resnest14d", "seresnext26d_32x4d", "resnet10t", "test_efficientnet"])
def test_the_same_is_computed(arch):
    """Beside timm's own, in float64: outputs, gradients, buffers, and the names of everything."""
    torch.manual_seed(0)
    theirs = timm.create_model(arch, num_classes=10).double().train()
    ours = timm.create_model(arch, num_classes=10).double().train()
    ours.load_state_dict(theirs.state_dict())
    use_channels_last_forms(ours).to(memory_format=torch.channels_last)
    images = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    answers = []
    for model in (ours, theirs):
        given = images.clone().requires_grad_()
        logits = model(given)
        logits.square().sum().backward()
        gradients = {name: each.grad for name, each in model.named_parameters()}
        answers.append({"logits": logits, "images": given.grad, **gradients, **model.state_dict()})
    assert answers[0].keys() == answers[1].keys()
    for name, each in answers[1].items():
        torch.testing.assert_close(answers[0][name], each, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("size", [(2, 2), (3, 5), (6, 4), (7, 7)])
def test_borders_are_reflected(size):
    theirs, ours = BlurPool2d(4).double(), use_channels_last_forms(nn.Sequential(BlurPool2d(4))).double()
    images = torch.randn(2, 4, *size, dtype=torch.float64)
    given = [images.clone().requires_grad_() for _ in range(2)]
    results = [theirs(given[0]), ours(given[1])]
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(results[0])
    for each in results:
        (each * weight).sum().backward()
    torch.testing.assert_close(given[1].grad, given[0].grad, rtol=1e-12, atol=1e-12)


def test_blocks_become_channels():
    images = torch.arange(2 * 3 * 8 * 12.0).view(2, 3, 8, 12)
    for layout in (torch.contiguous_format, torch.channels_last):
        ours = use_channels_last_forms(nn.Sequential(SpaceToDepth()))(images.to(memory_format=layout))
        assert torch.equal(ours, SpaceToDepth()(images)) and ours.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "arch",
    [each if each == "seresnext101_32x4d" else pytest.param(each, marks=pytest.mark.slow) for each in ARCHS],
)
def test_the_reports_networks_compile_into_one_graph(arch):
    model = Classifier(arch, 10, cosine_head=True).to(memory_format=torch.channels_last).train()
    torch.compiler.reset()
    found = torch._dynamo.explain(model)(torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last))
    assert (found.graph_count, found.graph_break_count) == (1, 0)
    torch.compiler.reset()
