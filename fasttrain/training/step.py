"""One training step, from the pipeline's pixels to new weights: forward, loss, backward and update."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from operator import add
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fasttrain.config.schema import Recipe
from fasttrain.data.index import Index
from fasttrain.distributed.ranks import Ranks
from fasttrain.losses.base import Loss, Term
from fasttrain.pipelines.images import Images
from fasttrain.pipelines.plan import Plan
from fasttrain.training import optim
from fasttrain.training.cuda_graphs import Graphs
from fasttrain.training.ema import Ema
from fasttrain.training.guard import GradCheck, Guard
from fasttrain.training.inputs import HostBatch, InputBuilder, Network, StepScalars
from fasttrain.training.meter import Meter, Row
from fasttrain.training.state import State
from fasttrain.utils.errors import UserError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class StepOutput(NamedTuple):
    """What a step leaves on the device: the meter's row, and the gradient norms by parameter."""

    row: Row
    norms: dict[str, Tensor]


class Step:
    """Trains a network step by step; built for a resolved recipe.

    model: the network; it is moved to the ranks' device. index: the training images. teacher: the network that a recipe
    distils from. Raises UserError where the optimizer does not fit the device or the precision, where a loss weighs a
    class that is not there, or where CUDA graphs cannot replay this recipe.
    """

    def __init__(
        self,
        recipe: Recipe,
        plan: Plan,
        model: nn.Module,
        index: Index,
        ranks: Ranks,
        teacher: Network | None = None,
    ) -> None:
        self.recipe, self.plan, self.ranks = recipe, plan, ranks
        device, dtype = ranks.device, DTYPES[recipe.precision]
        self.dtype = dtype
        self.model = model.to(device).to(memory_format=torch.channels_last).train()
        self.ema = Ema(model, recipe.ema.decay) if recipe.ema.decay else None
        self.optimizer = optim.sgd(model, recipe.optim)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        if self.scaler.is_enabled() and recipe.optim.impl == "apex":
            raise UserError("optim.impl=apex waits for the device in every step with float16; leave it at torch")
        self.graphs = None
        if recipe.machine.compile == "graphs":
            require_replayable(recipe, ranks)
            self.graphs = Graphs[StepOutput](device, recipe.mix.kinds)
        self.lr_at = optim.lr_schedule(recipe, plan.steps_per_epoch, plan.steps)
        names = ["loss", *(name for loss in recipe.losses for name in metric_names(loss))]
        self.meter = Meter(names, device, rows=min(recipe.machine.log_steps, plan.steps_per_epoch))
        self.guard = Guard(model, self.scaler, device)

        self.network: Network = model  # what a step calls: the model, in DDP and compiled where the recipe says so
        self.no_sync: Callable[[], AbstractContextManager[None]] = nullcontext
        compiled = recipe.machine.compile != "off"
        if ranks.world > 1:
            ddp = DistributedDataParallel(
                model,
                device_ids=[device.index] if device.type == "cuda" else None,
                gradient_as_bucket_view=True,
                # torch aborts with a static graph and gradient accumulation. A compiled network must not have one
                # either: DDP's buckets are where the graph is cut.
                static_graph=plan.micro_batches == 1 and not compiled,
            )
            self.network, self.no_sync = ddp, ddp.no_sync
        ema: Network | None = self.ema.model if self.ema and plan.ema_views else None
        if compiled:
            self.network, ema = torch.compile(self.network), ema and torch.compile(ema)
        self.inputs = InputBuilder(plan, index, device, dtype, teacher, ema, recipe.losses)

    def follow(self, plan: Plan) -> None:
        """Take a plan that differs from the present one in its number of steps only."""
        self.plan = self.inputs.plan = plan
        self.lr_at = optim.lr_schedule(self.recipe, plan.steps_per_epoch, plan.steps)

    @property
    def state(self) -> State:
        """What a checkpoint saves of it."""
        return State(self.model, self.optimizer, self.scaler, self.ema)

    def __call__(self, step: int, batches: Iterator[Images]) -> Tensor:
        """Train step `step` of the run, counted from 0, on the next `plan.micro_batches` of `batches`.

        Returns the step's loss, a float32 scalar on the device that holds until the next step. Nothing waits for the
        device, except where CUDA graphs record a step, once for each kind of step.
        """
        plan, lr = self.plan, self.lr_at(step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        # Dropout and the like draw from generators that are seeded by the step, so no generator's state is saved.
        seed_generators(generator_seed(self.recipe.seed, step + plan.shift, self.ranks), self.ranks.device)

        micro_batches = zip(range(plan.micro_batches), batches)  # noqa: B905 (`batches` may go on after this step)
        on_host = (self.inputs.on_host(step, micro, images) for micro, images in micro_batches)
        scalars = self.inputs.scalars(step)
        if self.graphs is None:
            output = self.forward_backward_update(scalars, (batch.to(self.ranks.device) for batch in on_host))
        else:
            output = self.graphs(self.forward_backward_update, scalars, lr, on_host)
            self.guard.norms = output.norms
        self.meter.commit(step, output.row)
        if self.ema:
            self.ema.update(step + 1)
            if plan.ema_views:  # the averaged network answers in the next step, and must answer alike on all ranks
                self.ranks.share_buffers(self.ema.model)
        return output.row.values[0]

    def forward_backward_update(self, scalars: StepScalars, batches: Iterable[HostBatch]) -> StepOutput:
        """The device's part of a step: forward, loss, backward for each micro-batch, then the update."""
        micro_batches, scaler = self.plan.micro_batches, self.scaler
        share = 1 / micro_batches  # of each micro-batch's loss in the step's
        for micro, host_batch in enumerate(batches):
            images, batch = self.inputs(host_batch, scalars)
            is_last = micro == micro_batches - 1
            with nullcontext() if is_last else self.no_sync():
                with self.inputs.autocast():
                    output = self.network(images)
                terms = {fn.name: term for fn in self.recipe.losses if (term := fn(output, batch)) is not None}
                loss = reduce(add, (term.loss for term in terms.values()))
                # The gradient starts with `share`, or with nan where the loss is not finite.
                scaler.scale(loss).backward(self.guard.first_gradient(loss, share))
            self.meter.add(metrics(loss, terms), share)

        check = update(self.optimizer, scaler, self.guard, scalars.lr)
        return StepOutput(self.meter.row(check.norm, check.failed), self.guard.norms)


def update(
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, guard: Guard, lr: Tensor | None = None
) -> GradCheck:
    """Take the optimizer's step and drop the gradients. If they are not finite, weights, momentum and buffers stay what
    they were before the step. lr: see `optim.step`."""
    check = guard.check()
    if scaler.is_enabled():  # it skips a step whose gradients are not finite
        scaler.step(optimizer)
        scaler.update()
    else:
        optim.step(optimizer, found_inf=check.failed, lr=lr)
    guard.restore_buffers(check.finite)
    optim.drop_grads(optimizer)
    return check


def require_replayable(recipe: Recipe, ranks: Ranks) -> None:
    """Raises UserError where machine.compile=graphs cannot replay a recipe's steps."""
    for requirement, is_met in (
        ("one rank", ranks.world == 1),
        ("precision bf16 or fp32", recipe.precision != "fp16"),
        ("optim.impl=torch", recipe.optim.impl == "torch"),
    ):
        if not is_met:
            raise UserError(f"machine.compile=graphs replays whole steps and needs {requirement}; leave it at auto")


def generator_seed(seed: int, step: int, ranks: Ranks) -> int:
    """The seed of torch's generators in a step, different for each step and rank."""
    return (seed << 32) + step * ranks.world + ranks.rank & 0x7FFF_FFFF_FFFF_FFFF


def seed_generators(seed: int, device: torch.device) -> None:
    """torch.manual_seed for the CPU and this device only; the rest of it takes 0.2 ms per step."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(seed)


def metric_names(loss: Loss) -> list[str]:
    """Names under which a loss and its stats are logged."""
    return [loss.name, *(f"{loss.name}/{stat}" for stat in loss.stats)]


def metrics(loss: Tensor, terms: dict[str, Term]) -> dict[str, Tensor]:
    """The whole loss, and the terms with their stats by the names of `metric_names`."""
    values = {"loss": loss}
    for name, term in terms.items():
        values |= {name: term.loss, **{f"{name}/{stat}": value for stat, value in term.stats.items()}}
    return values
