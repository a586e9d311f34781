"""An exponential moving average of a network's weights."""

import copy

import torch
from torch import Tensor, nn

from fasttrain.utils.tensors import by_dtype


class Ema:
    """A second network whose parameters follow those of a first; its buffers (BatchNorm's statistics) are copies. The
    first keeps its tensors, whose values change.

    After step t (1-based) they are a·θ' + (1−a)·θ with a = min(1 − 1/t, decay): at first the plain mean of the weights
    after each step, later an average over some 1/(1−decay) steps.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.parameters: list[Tensor] = list(self.model.parameters())
        self.followed: list[Tensor] = list(model.parameters())
        self.buffers = list(zip(by_dtype(self.model.buffers()), by_dtype(model.buffers()), strict=True))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Follow the network, which has done `step` steps: a launch or a few for all parameters, and one for all
        buffers of a dtype, without waiting for any."""
        torch._foreach_lerp_(self.parameters, self.followed, 1 - min(1 - 1 / step, self.decay))
        for own, followed in self.buffers:
            torch._foreach_copy_(own, followed)
