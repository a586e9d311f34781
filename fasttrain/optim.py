"""The optimizer, SGD with momentum, and the learning rate that a recipe asks for at each step."""

from collections.abc import Callable

import torch
from torch import nn

from fasttrain.config import Optim, Recipe
from fasttrain.schedule import lr_at


def sgd(model: nn.Module, settings: Optim) -> torch.optim.SGD:
    """Fused SGD over all parameters; the learning rate is set before each step (see `rate`).

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
    made = torch.optim.SGD(groups, lr=0.0, momentum=settings.momentum, nesterov=settings.nesterov, fused=True)
    if settings.momentum:
        # torch would leave it to the first step, and that step may be skipped (by float16's scaler, or a guard): the
        # buffers would then hold whatever was in memory. From zeros the first step gives the same momentum.
        for each in parameters:
            made.state[each]["momentum_buffer"] = torch.zeros_like(each)
    return made


def rate(recipe: Recipe, steps_per_epoch: int) -> Callable[[int], float]:
    """The recipe's learning rate as a function of the step, for a run of so many steps an epoch."""
    settings = recipe.optim
    steps, warmup = recipe.epochs * steps_per_epoch, round(settings.warmup_epochs * steps_per_epoch)
    drops = [each * steps_per_epoch for each in settings.step_epochs] if settings.schedule == "step" else None

    def of_step(step: int) -> float:
        return lr_at(
            step, steps=steps, warmup_steps=warmup, peak=recipe.peak_lr, drops=drops, factor=settings.step_factor
        )

    return of_step
