"""One training step, from the pipeline's pixels to new weights: what the loop runs, and what the benchmarks time."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from operator import add
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fasttrain.config.schema import Recipe
from fasttrain.distributed.ranks import Ranks
from fasttrain.losses.base import Loss, Term
from fasttrain.pipelines.images import Images
from fasttrain.pipelines.plan import Plan
from fasttrain.training import optim
from fasttrain.training.cuda_graphs import Graphs
from fasttrain.training.ema import Ema
from fasttrain.training.guard import Guard
from fasttrain.training.inputs import HostBatch, InputBuilder, Network, StepScalars
from fasttrain.training.meter import Meter, Row
from fasttrain.training.state import State
from fasttrain.utils.errors import UserError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class StepOutput(NamedTuple):
    """What the device's work of a step gives, on the device: the meter's row, and `Guard.norms`."""

    row: Row
    norms: dict[str, Tensor]


class Step:
    """What a step needs around a network, made for a resolved recipe; calling it trains a step.

    model: a network, which goes to the ranks' device. labels: int64 [N] on the CPU, of all training images. teacher:
    what recipes that distil take theirs from. Raises UserError where the optimizer does not fit the device or the
    precision, or what is asked for cannot be replayed.
    """

    def __init__(
        self,
        recipe: Recipe,
        plan: Plan,
        model: nn.Module,
        labels: Tensor,
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
        self.lr_at = optim.lr_schedule(recipe, plan.steps_per_epoch)
        names = ["loss", *(name for loss in recipe.losses for name in names_of(loss))]
        self.meter = Meter(names, device, kept=recipe.machine.log_steps)
        self.guard = Guard(model, self.optimizer, self.scaler, device)

        self.network: Network = model
        self.no_sync: Callable[[], AbstractContextManager[None]] = nullcontext
        compiled = recipe.machine.compile != "off"
        if ranks.world > 1:
            exchanging = DistributedDataParallel(
                model,
                device_ids=[device.index] if device.type == "cuda" else None,
                gradient_as_bucket_view=True,
                # With accumulation torch aborts; compiled, it is what cuts the graph at the buckets that has to know.
                static_graph=plan.micro_batches == 1 and not compiled,
            )
            self.network, self.no_sync = exchanging, exchanging.no_sync
        averaged: Network | None = self.ema.model if self.ema and plan.aside else None
        if compiled:
            self.network, averaged = torch.compile(self.network), averaged and torch.compile(averaged)
        self.present = InputBuilder(plan, labels, device, dtype, teacher, averaged)

    @property
    def state(self) -> State:
        """What a checkpoint keeps of it."""
        return State(self.model, self.optimizer, self.scaler, self.ema)

    def __call__(self, step: int, feed: Iterator[Images]) -> Tensor:
        """Train the step-th step of the run, from 0, on the next micro-batches of `feed`. Nothing waits for the device,
        but where a step is recorded to be replayed, once for each kind.

        Gives its loss, a float32 scalar on the device, which holds until the next step.
        """
        recipe, plan = self.recipe, self.plan
        lr = self.lr_at(step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        # Dropout and the like draw from a generator that knows the step, so no state has to be saved.
        draw = (step + plan.shift) * self.ranks.world + self.ranks.rank
        seed_generators((recipe.seed << 32) + draw & 0x7FFF_FFFF_FFFF_FFFF, self.ranks.device)

        staged = (self.present.stage(step, micro, *next(feed)) for micro in range(plan.micro_batches))
        now = self.present.now(step)
        if self.graphs is None:
            told = self.work(now, (each.on(self.ranks.device) for each in staged))
        else:
            told = self.graphs(self.work, now, lr, staged)
            self.guard.norms = told.norms
        self.meter.commit(step, told.row)
        if self.ema:
            self.ema.update(step + 1)
            if plan.aside:  # it answers in the next step: the same on all ranks
                self.ranks.share_buffers(self.ema.model)
        return told.row.values[0]

    def work(self, now: StepScalars, staged: Iterable[HostBatch]) -> StepOutput:
        """What the device does in a step, given what is on it: weights, momentum and buffers become the next ones."""
        recipe, plan, present, scaler = self.recipe, self.plan, self.present, self.scaler
        weight = 1 / plan.micro_batches  # of each one's loss in that of its step
        for micro, each in enumerate(staged):
            images, batch = present(each, now)
            last = micro == plan.micro_batches - 1
            with nullcontext() if last else self.no_sync():
                with present.autocast():
                    output = self.network(images)
                terms = {each.name: term for each in recipe.losses if (term := each(output, batch)) is not None}
                loss = reduce(add, (term.loss for term in terms.values()))
                scaler.scale(loss).backward(self.guard.seed(loss, weight))
            self.meter.add(values_of(loss, terms), weight)
        row = self.meter.row(*self.guard.step(now.lr))
        optim.drop_grads(self.optimizer)
        return StepOutput(row, self.guard.norms)


def require_replayable(recipe: Recipe, ranks: Ranks) -> None:
    """UserError where machine.compile=graphs is asked for and a step needs something of the host."""
    for needed, met in (
        ("one rank", ranks.world == 1),
        ("precision bf16 or fp32", recipe.precision != "fp16"),
        ("optim.impl=torch", recipe.optim.impl == "torch"),
    ):
        if not met:
            raise UserError(f"machine.compile=graphs replays whole steps and needs {needed}; leave it at auto")


def seed_generators(seed: int, device: torch.device) -> None:
    """What torch.manual_seed does, for the CPU and this device alone: all it does besides takes a fifth of a
    millisecond a step."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(seed)


def names_of(loss: Loss) -> list[str]:
    """Names under which a loss and its stats are metered."""
    return [loss.name, *(f"{loss.name}/{stat}" for stat in loss.stats)]


def values_of(loss: Tensor, terms: dict[str, Term]) -> dict[str, Tensor]:
    """Everything that a step's terms tell, by the names of `names_of`, and the whole loss."""
    values = {"loss": loss}
    for name, term in terms.items():
        values |= {name: term.loss, **{f"{name}/{stat}": each for stat, each in term.stats.items()}}
    return values
