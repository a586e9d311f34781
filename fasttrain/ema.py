"""An exponential moving average of a network's weights."""

import copy

import torch
from torch import Tensor, nn


class Ema:
    """A second network whose parameters follow those of the first; its buffers (BatchNorm's statistics) are copies.

    After step t (1-based) they are a·θ' + (1−a)·θ with a = min(1 − 1/t, decay): at first the plain mean of the weights
    after each step, later an average over some 1/(1−decay) steps.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.parameters: list[Tensor] = list(self.model.parameters())
        self.buffers: list[Tensor] = list(self.model.buffers())

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Follow `model`, which has done `step` steps; a few launches for all tensors, without waiting for any."""
        torch._foreach_lerp_(self.parameters, list(model.parameters()), 1 - min(1 - 1 / step, self.decay))
        if self.buffers:
            torch._foreach_copy_(self.buffers, list(model.buffers()))
