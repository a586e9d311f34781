"""Networks stay in channels_last, forward and backward, compute what timm's do, and compile without graph breaks."""

from collections import Counter

import pytest
import timm
import torch
from timm.layers import BlurPool2d, SpaceToDepth
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fasttrain.models import ARCHS, Classifier
from fasttrain.models.channels_last import mean, use_channels_last_forms

VIEWS = ("view", "expand", "slice", "split", "permute", "select", "as_strided", "transpose", "alias", "detach")


def is_activation(value) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim == 4 and value.shape[1] > 1 and value.shape[2:].numel() > 1


class LayoutCounter(TorchDispatchMode):
    """Counts operations that write an activation in another layout than channels_last. Views write nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.name().removeprefix("aten::").lstrip("_").split(".")[0]
        # Split attention's softmax is over weights, which have no height or width.
        if not name.startswith((*VIEWS, "softmax")) and "unsafe_view" not in name:
            outside = [
                tensor
                for tensor in tree_leaves(result)
                if is_activation(tensor) and not tensor.is_contiguous(memory_format=torch.channels_last)
            ]
            self.counts[name] += len(outside)
        return result


def outside_channels_last(model) -> Counter[str]:
    images = torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last)
    with LayoutCounter() as counter:
        output = model(images)
        getattr(output, "logits", output).square().mean().backward()
    return +counter.counts


@pytest.mark.parametrize("arch", ARCHS)
def test_no_activation_or_gradient_leaves_channels_last(arch):
    torch.manual_seed(0)
    model = Classifier(arch, 10).to(memory_format=torch.channels_last).train()
    assert outside_channels_last(model) == Counter()


def test_the_counter_finds_what_timm_writes_in_other_layouts():
    """timm's own modules leave channels_last."""
    model = timm.create_model("resnest14d", num_classes=10).to(memory_format=torch.channels_last).train()
    assert {"sum", "div"} <= outside_channels_last(model).keys()


def test_the_mean_and_its_gradient_are_torchs_on_images_that_are_not_square():
    images = torch.randn(2, 3, 5, 7, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(mean(images), images.mean((2, 3), keepdim=True))
    assert torch.autograd.gradcheck(mean, images)


@pytest.mark.parametrize("arch", ["tresnet_m", "resnest14d", "seresnext26d_32x4d", "resnet10t", "test_efficientnet"])
def test_results_equal_timm(arch):
    """Outputs, gradients, buffers and all names, in float64."""
    torch.manual_seed(0)
    theirs = timm.create_model(arch, num_classes=10).double().train()
    ours = timm.create_model(arch, num_classes=10).double().train()
    ours.load_state_dict(theirs.state_dict())
    use_channels_last_forms(ours).to(memory_format=torch.channels_last)
    images = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    results = []
    for model in (ours, theirs):
        inputs = images.clone().requires_grad_()
        logits = model(inputs)
        logits.square().sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        results.append({"logits": logits, "images": inputs.grad, **gradients, **model.state_dict()})
    assert results[0].keys() == results[1].keys()
    for name, expected in results[1].items():
        torch.testing.assert_close(results[0][name], expected, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("size", [(2, 2), (3, 5), (6, 4), (7, 7)])
def test_blur_reflects_borders(size):
    theirs, ours = BlurPool2d(4).double(), use_channels_last_forms(nn.Sequential(BlurPool2d(4))).double()
    images = torch.randn(2, 4, *size, dtype=torch.float64)
    inputs = [images.clone().requires_grad_() for _ in range(2)]
    results = [theirs(inputs[0]), ours(inputs[1])]
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(results[0])
    for result in results:
        (result * weight).sum().backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=1e-12, atol=1e-12)


def test_space_to_depth_equals_timm():
    images = torch.arange(2 * 3 * 8 * 12.0).view(2, 3, 8, 12)
    for layout in (torch.contiguous_format, torch.channels_last):
        ours = use_channels_last_forms(nn.Sequential(SpaceToDepth()))(images.to(memory_format=layout))
        assert torch.equal(ours, SpaceToDepth()(images)) and ours.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "arch",
    [arch if arch == "seresnext101_32x4d" else pytest.param(arch, marks=pytest.mark.slow) for arch in ARCHS],
)
def test_report_networks_compile_into_one_graph(arch):
    model = Classifier(arch, 10, cosine_head=True).to(memory_format=torch.channels_last).train()
    torch.compiler.reset()
    explained = torch._dynamo.explain(model)(torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last))
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)
    torch.compiler.reset()
