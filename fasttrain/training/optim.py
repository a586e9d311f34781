"""The optimizer, SGD with momentum, and the learning-rate schedules."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fasttrain.config.schema import OptimConfig, Recipe
from fasttrain.utils.errors import UserError


def sgd(model: nn.Module, settings: OptimConfig) -> torch.optim.Optimizer:
    """Fused SGD over all parameters. The learning rate is set before each step (see `lr_schedule`).

    Weight decay applies to every parameter. With decay_norm_bias=false it does not apply to parameters with at most one
    dimension: biases and the weights of norms (Bag of Tricks, section 3.1). Raises UserError where settings.impl is
    apex and apex is not installed, or the network is not on a GPU.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    undecayed = [] if settings.decay_norm_bias else [p for p in parameters if p.ndim <= 1]
    undecayed_ids = {id(p) for p in undecayed}
    decayed = [p for p in parameters if id(p) not in undecayed_ids]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}]
    if undecayed:
        groups.append({"params": undecayed, "weight_decay": 0.0})
    options: dict[str, Any] = {"lr": 0.0, "momentum": settings.momentum, "nesterov": settings.nesterov}
    if settings.impl == "apex":
        optimizer = _apex_sgd(parameters)(groups, **options)
    else:
        optimizer = torch.optim.SGD(groups, **options, fused=True)
    if settings.momentum:
        # torch would create the buffers in the first step. If that step is skipped (by float16's scaler or the guard),
        # they would hold whatever was in memory. From zeros the first step gives the same momentum.
        for p in parameters:
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


def _apex_sgd(parameters: Sequence[nn.Parameter]) -> Callable[..., torch.optim.Optimizer]:
    try:
        from apex.optimizers import FusedSGD
    except ImportError:
        raise UserError(
            "optim.impl=apex: NVIDIA's apex is not installed. Build it from its source with --cpp_ext and --cuda_ext "
            "(the package of that name on PyPI is something else), or leave optim.impl at torch"
        ) from None
    if not all(p.is_cuda for p in parameters):
        raise UserError("optim.impl=apex works on GPUs only; leave optim.impl at torch")
    return FusedSGD


@torch.no_grad()
def step(optimizer: torch.optim.Optimizer, found_inf: Tensor, lr: Tensor | None = None) -> None:
    """Take a step of an optimizer of `sgd`, unless `found_inf` is 1: then weights and momentum stay.

    found_inf: float32 scalar on the device, 0 or 1. lr: the learning rate as such a scalar, instead of the groups' (not
    for apex). For torch's SGD this calls the fused kernel directly, because `SGD.step` visits each parameter first.
    """
    if hasattr(optimizer, "_dummy_overflow_buf"):  # apex's kernels return at once where this is not 0
        optimizer._dummy_overflow_buf.copy_(found_inf)
        optimizer.step()
        return
    for group in optimizer.param_groups:
        parameters = [p for p in group["params"] if p.grad is not None]
        if parameters:
            torch._fused_sgd_(
                parameters,
                [p.grad for p in parameters],
                [optimizer.state[p]["momentum_buffer"] for p in parameters] if group["momentum"] else [],
                weight_decay=group["weight_decay"],
                momentum=group["momentum"],
                lr=group["lr"] if lr is None else lr,
                dampening=0.0,
                nesterov=group["nesterov"],
                maximize=False,
                is_first_step=False,  # the momentum exists from the start
                found_inf=found_inf,
            )


def drop_grads(optimizer: torch.optim.Optimizer) -> None:
    """Drop all gradients, like `optimizer.zero_grad()` but faster."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = None


def lr_schedule(recipe: Recipe, steps_per_epoch: int, steps: int | None = None) -> Callable[[int], float]:
    """The recipe's learning rate as a function of the step. steps: of the run; by default its epochs'. In a run that
    ends by time the warm-up takes a tenth of them at most, so that there is time for the rest."""
    settings = recipe.optim
    steps = recipe.epochs * steps_per_epoch if steps is None else steps
    warmup_steps = round(settings.warmup_epochs * steps_per_epoch)
    return partial(
        lr_at,
        schedule=settings.schedule,
        peak=recipe.peak_lr,
        steps=steps,
        warmup_steps=min(warmup_steps, steps // 10) if recipe.budget else warmup_steps,
        drop_steps=[epoch * steps_per_epoch for epoch in settings.step_epochs],
        drop_factor=settings.step_factor,
    )


def lr_at(
    step: int,
    *,
    peak: float,
    steps: int,
    warmup_steps: int,
    schedule: str = "cosine",
    drop_steps: Sequence[int] = (),
    drop_factor: float = 0.1,
) -> float:
    """The learning rate of step `step` of `steps`, counted from 0.

    It rises linearly from 0 over steps 0 … warmup_steps−1; step `warmup_steps` runs at `peak`, as in the DeepBlueAI
    report (section III-B) and Goyal et al. 2017. A run no longer than its warm-up never reaches the peak. Then it
    follows the schedule, one of `config.schema.SCHEDULES`.
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    match schedule:
        case "cosine":  # down to 0
            progress = (step - warmup_steps) / max(1, steps - warmup_steps)
            return peak * 0.5 * (1 + math.cos(math.pi * progress))
        case "step":  # times drop_factor at each of drop_steps
            return peak * drop_factor ** sum(step >= drop for drop in drop_steps)
    raise ValueError(f"no learning-rate schedule {schedule!r}")
