"""An exponential moving average of a network's weights."""

import copy

import torch
from torch import Tensor, nn

from fasttrain.utils.tensors import by_dtype


class Ema:
    """A second network whose parameters are a moving average of the first one's; its buffers (BatchNorm's statistics)
    are copies. The first network must keep its tensors and change their values only.

    After step t (1-based) the average is a·θ' + (1−a)·θ with a = min(1 − 1/t, decay): at first the plain mean of the
    weights after each step, later an average over about 1/(1−decay) steps.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.parameters: list[Tensor] = list(self.model.parameters())
        self.model_parameters: list[Tensor] = list(model.parameters())
        self.buffers = list(zip(by_dtype(self.model.buffers()), by_dtype(model.buffers()), strict=True))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the average after `step` steps, in a few launches, without waiting for the device."""
        torch._foreach_lerp_(self.parameters, self.model_parameters, 1 - min(1 - 1 / step, self.decay))
        for own, model_buffers in self.buffers:
            torch._foreach_copy_(own, model_buffers)
