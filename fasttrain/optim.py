"""The optimizer: SGD with momentum, fused into a few launches."""

import torch
from torch import nn

from fasttrain.config import Optim


def sgd(model: nn.Module, settings: Optim) -> torch.optim.SGD:
    """Fused SGD over all parameters; the learning rate is set before each step (see `schedule.lr_at`).

    Weight decay is on every parameter. With decay_norm_bias=false it is off where a parameter has at most one
    dimension: biases and the weights of norms (Bag of Tricks, section 3.1).
    """
    parameters = [each for each in model.parameters() if each.requires_grad]
    spared = [] if settings.decay_norm_bias else [each for each in parameters if each.ndim <= 1]
    spared_ids = {id(each) for each in spared}
    decayed = [each for each in parameters if id(each) not in spared_ids]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}]
    if spared:
        groups.append({"params": spared, "weight_decay": 0.0})
    return torch.optim.SGD(groups, lr=0.0, momentum=settings.momentum, nesterov=settings.nesterov, fused=True)
