import torch

from fasttrain import optim
from fasttrain.config import Optim
from fasttrain.models import Classifier


def decay_of(model, optimizer):
    by_id = {id(each): group["weight_decay"] for group in optimizer.param_groups for each in group["params"]}
    return {name: by_id[id(each)] for name, each in model.named_parameters()}


def test_decay_is_on_everything_by_default():
    model = Classifier("test_resnet", 5)
    assert set(decay_of(model, optim.sgd(model, Optim())).values()) == {1e-4}


def test_decay_can_spare_vectors():
    model = Classifier("test_resnet", 5)
    decay = decay_of(model, optim.sgd(model, Optim(decay_norm_bias=False)))
    for name, parameter in model.named_parameters():
        assert decay[name] == (0.0 if parameter.ndim <= 1 else 1e-4), name


def test_steps_are_the_textbooks():
    """v ← μv + (g + λw), w ← w − ηv over several steps, in float64, without any of torch's optimizers."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3).double()
    optimizer = optim.sgd(model, Optim(momentum=0.9, weight_decay=1e-2))
    weights = [each.detach().clone() for each in model.parameters()]
    velocities = [torch.zeros_like(each) for each in weights]
    for step in range(5):
        optimizer.param_groups[0]["lr"] = lr = 0.1 * (step + 1)
        model(torch.randn(6, 4, dtype=torch.float64)).square().mean().backward()
        for at, parameter in enumerate(model.parameters()):
            assert parameter.grad is not None
            velocities[at] = 0.9 * velocities[at] + parameter.grad + 1e-2 * weights[at]
            weights[at] = weights[at] - lr * velocities[at]
        optimizer.step()
        optimizer.zero_grad()
    for parameter, expected in zip(model.parameters(), weights, strict=True):
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-12, atol=1e-12)
