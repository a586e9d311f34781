"""The optimizer, SGD with momentum, and the learning rate that a recipe asks for at each step."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fasttrain.config.schema import OptimConfig, Recipe
from fasttrain.utils.errors import UserError


def sgd(model: nn.Module, settings: OptimConfig) -> torch.optim.Optimizer:
    """Fused SGD over all parameters; the learning rate is set before each step (see `lr_schedule`).

    Weight decay is on every parameter. With decay_norm_bias=false it is off where a parameter has at most one
    dimension: biases and the weights of norms (Bag of Tricks, section 3.1). Raises UserError where settings.impl is
    apex and that is not installed, or the network is not on a GPU.
    """
    parameters = [each for each in model.parameters() if each.requires_grad]
    spared = [] if settings.decay_norm_bias else [each for each in parameters if each.ndim <= 1]
    spared_ids = {id(each) for each in spared}
    decayed = [each for each in parameters if id(each) not in spared_ids]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}]
    if spared:
        groups.append({"params": spared, "weight_decay": 0.0})
    how: dict[str, Any] = {"lr": 0.0, "momentum": settings.momentum, "nesterov": settings.nesterov}
    if settings.impl == "apex":
        made = _apex_sgd(parameters)(groups, **how)
    else:
        made = torch.optim.SGD(groups, **how, fused=True)
    if settings.momentum:
        # torch would leave it to the first step, and that step may be skipped (by float16's scaler, or a guard): the
        # buffers would then hold whatever was in memory. From zeros the first step gives the same momentum.
        for each in parameters:
            made.state[each]["momentum_buffer"] = torch.zeros_like(each)
    return made


def _apex_sgd(parameters: Sequence[nn.Parameter]) -> Callable[..., torch.optim.Optimizer]:
    try:
        from apex.optimizers import FusedSGD
    except ImportError:
        raise UserError(
            "optim.impl=apex: NVIDIA's apex is not installed. Build it from its source with --cpp_ext and --cuda_ext "
            "(the package of that name on PyPI is something else), or leave optim.impl at torch"
        ) from None
    if not all(each.is_cuda for each in parameters):
        raise UserError("optim.impl=apex works on GPUs only; leave optim.impl at torch")
    return FusedSGD


@torch.no_grad()
def step(optimizer: torch.optim.Optimizer, found_inf: Tensor, lr: Tensor | None = None) -> None:
    """Take the step of an optimizer of `sgd`; or leave weights and momentum as they are where `found_inf`, a float32
    scalar on the device, is 1 and not 0: decided there. lr: the learning rate, such a scalar too, instead of the
    groups' (not for apex's).

    Of torch's SGD this calls the kernel alone: `SGD.step` looks at each parameter in turn before it comes to that.
    """
    if hasattr(optimizer, "_dummy_overflow_buf"):  # apex's kernels return at once where this is not 0
        optimizer._dummy_overflow_buf.copy_(found_inf)
        optimizer.step()
        return
    for group in optimizer.param_groups:
        parameters = [each for each in group["params"] if each.grad is not None]
        if parameters:
            torch._fused_sgd_(
                parameters,
                [each.grad for each in parameters],
                [optimizer.state[each]["momentum_buffer"] for each in parameters] if group["momentum"] else [],
                weight_decay=group["weight_decay"],
                momentum=group["momentum"],
                lr=group["lr"] if lr is None else lr,
                dampening=0.0,
                nesterov=group["nesterov"],
                maximize=False,
                is_first_step=False,  # there is a momentum from the beginning
                found_inf=found_inf,
            )


def drop_grads(optimizer: torch.optim.Optimizer) -> None:
    """Drop all gradients, as `optimizer.zero_grad()` does, which takes longer over its bookkeeping."""
    for group in optimizer.param_groups:
        for each in group["params"]:
            each.grad = None


def lr_schedule(recipe: Recipe, steps_per_epoch: int) -> Callable[[int], float]:
    """The recipe's learning rate as a function of the step, for a run of so many steps an epoch."""
    settings = recipe.optim
    steps, warmup = recipe.epochs * steps_per_epoch, round(settings.warmup_epochs * steps_per_epoch)
    drops = [each * steps_per_epoch for each in settings.step_epochs] if settings.schedule == "step" else None

    def of_step(step: int) -> float:
        return lr_at(
            step, steps=steps, warmup_steps=warmup, peak=recipe.peak_lr, drops=drops, factor=settings.step_factor
        )

    return of_step


def lr_at(
    step: int, *, steps: int, warmup_steps: int, peak: float, drops: Sequence[int] | None = None, factor: float = 0.1
) -> float:
    """Learning rate of step `step` (0-based) of `steps`: linear warm-up from 0, then a cosine to 0, both per step.

    Warm-up covers steps 0 … warmup_steps−1 and step `warmup_steps` runs at `peak`, as in the DeepBlueAI report
    (section III-B) and Goyal et al. 2017. A run no longer than its warm-up never reaches the peak. With `drops`, the
    rate after the warm-up is instead `peak`, times `factor` for each of those steps that has been reached.
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    if drops is not None:
        return peak * factor ** sum(step >= each for each in drops)
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))
