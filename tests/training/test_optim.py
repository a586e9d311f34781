"""The SGD optimizers against a loop in float64 and torch's own; which parameters decay; apex."""

import sys
import types

import pytest
import torch

from fasttrain.config.schema import OptimConfig
from fasttrain.models import Classifier
from fasttrain.training import optim
from fasttrain.utils.errors import UserError


def decay_of(model, optimizer):
    by_id = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    return {name: by_id[id(p)] for name, p in model.named_parameters()}


def test_all_parameters_decay_by_default():
    model = Classifier("test_resnet", 5)
    assert set(decay_of(model, optim.sgd(model, OptimConfig())).values()) == {1e-4}


def test_decay_norm_bias_exempts_vectors():
    model = Classifier("test_resnet", 5)
    decay = decay_of(model, optim.sgd(model, OptimConfig(decay_norm_bias=False)))
    for name, parameter in model.named_parameters():
        assert decay[name] == (0.0 if parameter.ndim <= 1 else 1e-4), name


def test_steps_follow_the_formula():
    """v ← μv + (g + λw), w ← w − ηv over several steps, in float64, without torch's optimizers."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3).double()
    optimizer = optim.sgd(model, OptimConfig(momentum=0.9, weight_decay=1e-2))
    weights = [p.detach().clone() for p in model.parameters()]
    velocities = [torch.zeros_like(weight) for weight in weights]
    for step in range(5):
        optimizer.param_groups[0]["lr"] = lr = 0.1 * (step + 1)
        model(torch.randn(6, 4, dtype=torch.float64)).square().mean().backward()
        for i, parameter in enumerate(model.parameters()):
            assert parameter.grad is not None
            velocities[i] = 0.9 * velocities[i] + parameter.grad + 1e-2 * weights[i]
            weights[i] = weights[i] - lr * velocities[i]
        optimizer.step()
        optimizer.zero_grad()
    for parameter, expected in zip(model.parameters(), weights, strict=True):
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-12, atol=1e-12)


class FusedSGD(torch.optim.SGD):
    """A stand-in for apex's FusedSGD. Like apex's kernels, it does nothing where its flag is not 0."""

    def __init__(self, params, lr, momentum=0, dampening=0, weight_decay=0, nesterov=False, wd_after_momentum=False):
        super().__init__(params, lr, momentum, dampening, weight_decay, nesterov)
        assert not wd_after_momentum
        self._dummy_overflow_buf = torch.zeros(1, dtype=torch.int32)

    def step(self, closure=None):
        assert all("momentum_buffer" in self.state[p] for group in self.param_groups for p in group["params"])
        return None if self._dummy_overflow_buf.item() else super().step(closure)


@pytest.fixture
def apex(monkeypatch):
    """A stand-in for apex, which works on CPUs."""
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    module = types.ModuleType("apex.optimizers")
    module.FusedSGD = FusedSGD  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "apex.optimizers", module)


@pytest.mark.parametrize(
    "settings", [OptimConfig(), OptimConfig(nesterov=True, decay_norm_bias=False), OptimConfig(momentum=0)]
)
def test_a_step_equals_torchs_fused_sgd(settings):
    """Bit for bit, with parameters that have a gradient in every other step only."""
    results = []
    for direct in (True, False):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2), torch.nn.Linear(3, 2))
        optimizer = optim.sgd(model, settings)
        for number in range(6):
            for group in optimizer.param_groups:
                group["lr"] = 0.1 / (1 + number)
            middle = model[0](torch.rand(5, 4))
            model[1 + number % 2](middle).square().mean().backward()
            if direct:
                optim.step(optimizer, torch.tensor(0.0))
                optim.drop_grads(optimizer)
                assert all(p.grad is None for p in model.parameters())
            else:
                optimizer.step()
                optimizer.zero_grad()
        momenta = [optimizer.state[p].get("momentum_buffer", p) for p in model.parameters()]
        results.append([tensor.detach() for tensor in [*model.parameters(), *momenta]])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


def test_apex_gets_the_same_settings_and_skips_failed_steps(apex, monkeypatch):
    monkeypatch.setattr(torch.nn.Parameter, "is_cuda", True)
    settings = OptimConfig(nesterov=True, decay_norm_bias=False, weight_decay=1e-2)
    results = []
    for impl in ("torch", "apex"):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
        optimizer = optim.sgd(model, OptimConfig(**(vars(settings) | {"impl": impl})))
        assert isinstance(optimizer, FusedSGD) == (impl == "apex")
        for step in range(4):
            for group in optimizer.param_groups:
                group["lr"] = 0.1
            model(torch.ones(5, 4)).square().mean().backward()
            optim.step(optimizer, torch.tensor(float(step in (0, 2))))
            optim.drop_grads(optimizer)
        results.append([p.detach() for p in model.parameters()])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_apex_needs_its_own_installation_and_a_gpu(monkeypatch, request):
    monkeypatch.setitem(sys.modules, "apex", None)
    with pytest.raises(UserError, match=r"not installed\. Build it from its source .* PyPI is something else"):
        optim.sgd(Classifier("test_resnet", 5), OptimConfig(impl="apex"))
    request.getfixturevalue("apex")
    with pytest.raises(UserError, match="works on GPUs only"):
        optim.sgd(Classifier("test_resnet", 5), OptimConfig(impl="apex"))
