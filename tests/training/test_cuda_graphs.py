"""Replayed steps. A CPU has no CUDA graphs, but here is a tape that keeps what they keep: which operations, on which
memory, in which order, and no line of Python. What a step takes from the host while it is recorded stays as it was."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import part_of, tiny
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fasttrain.config import toml
from fasttrain.config.schema import EmaConfig, MachineConfig, MixConfig, OptimConfig
from fasttrain.distributed.ranks import Ranks
from fasttrain.losses.arcface import ArcFace
from fasttrain.losses.contrastive import Contrastive
from fasttrain.losses.cross_entropy import CrossEntropy
from fasttrain.losses.mean_teacher import MeanTeacher
from fasttrain.losses.symmetric import SymmetricCrossEntropy
from fasttrain.losses.triplet import Triplet
from fasttrain.models import Classifier
from fasttrain.pipelines.plan import Plan
from fasttrain.pipelines.train_loader import batches
from fasttrain.prepare import resolve_auto
from fasttrain.training.cuda_graphs import PATIENCE, WARM_UP, Graphs
from fasttrain.training.inputs import HostBatch, StepScalars
from fasttrain.training.step import Step, require_replayable
from fasttrain.utils.errors import UserError

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, 0, 1, CPU)
STEPS = 14


ASKING = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "lift_fresh")


class Tape(TorchDispatchMode):
    """Keeps every operation on tensors; to ask for a value or a number of values, or to make a constant on the host, is
    an error, since CUDA's graphs cannot."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name == "index" and any(each.dtype == torch.bool for each in args[1] if each is not None)
        assert not by_mask and name not in ASKING, f"asks the device: {func}"
        result = func(*args, **kwargs or {})
        self.calls.append((func, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            for was, now in zip(tensors(result), tensors(again), strict=True):
                if was.data_ptr() != now.data_ptr():
                    was.detach().copy_(now)


def tensors(result):
    return [each for each in tree_leaves(result) if isinstance(each, torch.Tensor)]


class Taped:
    """Records on tapes. A tape does what it records at once; so its first replay does nothing."""

    def __init__(self):
        self.tapes: list[Tape] = []
        self.ran = self.replayed = 0

    def run(self, work):
        self.ran += 1
        return work()

    def record(self, work):
        with Tape() as tape:
            told = work()
        self.tapes.append(tape)
        before = self.replayed

        def replay():
            if self.replayed > before:
                tape.replay()
            self.replayed += 1

        return told, replay


@pytest.fixture(scope="module")
def index(demo_set):
    return part_of(demo_set, 12)


def steps_of(recipe, index, recorder, seen):
    """The Step after STEPS steps, as it is or with its work on tapes. seen: called before each, and after the last."""
    torch.manual_seed(5)
    plan = Plan.of(recipe, index)
    step = Step(recipe, plan, Classifier.of(recipe, len(index.classes)), torch.from_numpy(index.labels), ALONE)
    if recorder is not None:
        step.graphs = Graphs(CPU, recipe.mix.kinds, recorder)
    feed = batches(plan, index, CPU, 1, stop_step=STEPS)
    for number in range(STEPS):
        seen(number, step)
        step(number, feed)
    seen(STEPS, step)
    return step


CASES: dict[str, dict[str, Any]] = {
    "CutMix and mixup": {"mix": MixConfig(cutmix=0.4, mixup=0.3)},
    "accumulation": {"mix": MixConfig(cutmix=0.5), "micro_batch": 6},
    "never mixed": {"mix": MixConfig(cutmix=0), "losses": (CrossEntropy(), Triplet()), "images_per_class": 4},
    "triplet and ArcFace": {
        "mix": MixConfig(cutmix=0.5),
        "losses": (CrossEntropy(), Triplet(), ArcFace()),
        "images_per_class": 4,
    },
    "views, mean teacher, weights that follow the epoch": {
        "mix": MixConfig(cutmix=0.5),
        "losses": (SymmetricCrossEntropy(), Contrastive(decay="cosine"), MeanTeacher(ramp_epochs=2)),
        "ema": EmaConfig(0.8),
    },
}


@pytest.mark.parametrize("case", CASES)
def test_replayed_steps_are_the_steps(index, case):
    """Weights, momentum, averages, statistics and all that is metered, with learning rates that change."""
    recipe = tiny(
        epochs=20,
        batch_size=12,
        optim=OptimConfig(warmup_epochs=5, lr=0.2, lr_batch=0),
        machine=MachineConfig(device="cpu", compile="off", log_steps=STEPS),
        **CASES[case],
    )
    recipe = resolve_auto(recipe, CPU)
    taped = Taped()
    norms: dict[bool, list[float]] = {True: [], False: []}

    def seen(number, step):
        if number:
            norms[step.graphs is None].append(float(sum(step.guard.norms.values())))

    plain, replayed = (steps_of(recipe, index, recorder, seen) for recorder in (None, taped))
    kinds = len(taped.tapes)
    assert kinds == (1 if case == "never mixed" else 2)
    assert taped.ran >= kinds * WARM_UP and taped.replayed == STEPS - taped.ran >= 4
    assert norms[False] == pytest.approx(norms[True], rel=1e-4)
    for found, expected in zip(vars(plain.state).values(), vars(replayed.state).values(), strict=True):
        compare(found, expected)
    own = replayed.meter.read(ALONE).means
    assert own == pytest.approx(plain.meter.read(ALONE).means, rel=1e-4) and own["loss"] > 0


def compare(found, expected):
    """Two networks, averages, optimizers or scalers."""
    if found is None or isinstance(found, torch.amp.GradScaler):
        return
    states = [(each.model if hasattr(each, "model") else each).state_dict() for each in (found, expected)]
    leaves, others = map(tensors, states)
    assert len(leaves) > 10
    for one, other in zip(leaves, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_replayed_step_that_is_not_finite_changes_nothing(index):
    machine = MachineConfig(device="cpu", compile="off", log_steps=STEPS)
    recipe = resolve_auto(tiny(batch_size=12, mix=MixConfig(cutmix=0), machine=machine, epochs=20), CPU)
    factor, states = torch.ones(()), []

    def seen(number, step):
        if number == 0:
            step.model.register_forward_pre_hook(lambda _, images: (images[0] * factor,))
        factor.fill_(float("nan") if number == STEPS - 2 else 1.0)
        states.append(copy.deepcopy(step.model.state_dict()))

    step = steps_of(recipe, index, Taped(), seen)
    for name, before in states[-3].items():
        assert torch.equal(states[-2][name], before), name
    assert not all(torch.equal(states[-1][name], each) for name, each in states[-2].items())
    assert list(step.meter.read(ALONE).failures) == [STEPS - 2]


def test_what_a_recording_takes_from_the_host_stays(index):
    """The tape shows it: a learning rate of the host's would be that of the recorded step for ever."""
    weight = torch.zeros(2)
    rates = iter((1.0, 10.0, 100.0))
    told, replay = Taped().record(lambda: weight.add_(next(rates)))
    replay()
    replay()
    assert told is weight and weight.tolist() == [2.0, 2.0]
    for asking in (
        lambda: weight.sum().item(),
        lambda: bool(weight[0] > 1),
        lambda: weight[weight > 1],
        lambda: torch.tensor([1.0]),
    ):
        with pytest.raises(AssertionError, match="asks the device"):
            Taped().record(asking)


def test_a_kind_that_is_rare_is_not_waited_for_for_ever():
    count = torch.zeros(())
    taped = Taped()
    made = Graphs[torch.Tensor](CPU, {True, False}, taped)
    batch = HostBatch(torch.zeros(1, 2, 2, 3), torch.zeros(1), torch.zeros(1, 7), True)
    for step in range(PATIENCE + 5):
        made(lambda now, staged: count.add_(1), StepScalars(0.0, 0.0), 0.1, [batch._replace(mixed=step != 50)])
    assert taped.ran == PATIENCE and taped.replayed == 5 and not made.complete
    assert count == PATIENCE + 5


@pytest.mark.parametrize(
    ("setting", "needs"),
    [("precision=fp16", "precision bf16 or fp32"), ("optim.impl=apex", "optim.impl=torch")],
)
def test_what_cannot_be_replayed_is_refused(index, setting, needs):
    recipe = toml.override(tiny(machine=MachineConfig(device="cpu", compile="graphs")), tuple(setting.split("=")))
    with pytest.raises(UserError, match=f"machine.compile=graphs replays whole steps and needs {needs}"):
        require_replayable(resolve_auto(recipe, CPU), ALONE)


def test_several_ranks_are_refused():
    recipe = resolve_auto(tiny(machine=MachineConfig(device="cpu", compile="graphs")), CPU)
    require_replayable(recipe, ALONE)
    with pytest.raises(UserError, match="needs one rank"):
        require_replayable(recipe, replace(ALONE, world=2))
